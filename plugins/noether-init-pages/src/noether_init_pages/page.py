"""``html_page``: what a value of noether-init says, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Protocol

from noether_init_pages.document import Page, document

_PAGES: Mapping[str, tuple[Page, int]] = {
    "noether-init-plan": ("plan", 1),
    "noether-init-report": ("report", 1),
    "noether-init-diff": ("diff", 1),
    "noether-init-lineage": ("lineage", 1),
}
_MOST_NAMES = 3


class SaysItself(Protocol):
    """A plan, a report, a comparison, a lineage."""

    def to_dict(self) -> dict[str, Any]:
        """What it says, as plain data with ``format`` and ``version``."""
        ...


def html_page(value: SaysItself | Mapping[str, Any], *, title: str | None = None) -> str:
    """One self-contained HTML page about a plan, a report, a comparison of checkpoints or a lineage.

    Args:
        value: ``LoadPlan``, ``InitReport``, ``CheckpointDiff``, ``Lineage``, or the JSON that one of them wrote.
        title: One line of plain text; None: what the value is about.

    The page fetches nothing, runs no script but its own, follows light and dark, and can be printed. Its numbers are
    those of the JSON, which is embedded in it. Write it as UTF-8. The same value gives the same page; torch is not
    needed.

    Raises ``ValueError`` for data of another format or of a newer version.
    """
    data = dict(value) if isinstance(value, Mapping) else value.to_dict()
    name, version = data.get("format"), data.get("version")
    if not isinstance(name, str) or name not in _PAGES:
        raise ValueError(f"there is no page for format {name!r}; there are pages for: {', '.join(_PAGES)}")
    page, known = _PAGES[name]
    if version != known:
        raise ValueError(f"{name} of version {version!r} cannot be shown; this release shows version {known}")
    said, command = _WORDS[page](data)
    return document(page, said if title is None else title, data, command)


def _of_plan(data: Mapping[str, Any]) -> tuple[str, str]:
    models = _some(dict.fromkeys(one["model"] for one in data["origins"]))
    return f"What {data['kind'] or 'the config'} will do to {models or 'the model'}", "noether-init plan CONFIG"


def _of_report(data: Mapping[str, Any]) -> tuple[str, str]:
    kinds = _some(dict.fromkeys(one["kind"] for one in data["initializers"]))
    return f"What {kinds or 'no initializer'} did", "print(report)"


def _of_diff(data: Mapping[str, Any]) -> tuple[str, str]:
    sides = [data[side]["origin"] or PurePath(data[side]["path"]).name for side in ("a", "b")]
    return f"{sides[0]} against {sides[1]}", "noether-init diff A B"


def _of_lineage(data: Mapping[str, Any]) -> tuple[str, str]:
    return f"Where {data['focus'] or 'these runs'} came from", "noether-init lineage PATH"


_WORDS = {"plan": _of_plan, "report": _of_report, "diff": _of_diff, "lineage": _of_lineage}


def _some(names: Mapping[str, Any]) -> str:
    found = list(names)
    return ", ".join(found[:_MOST_NAMES]) + (" and others" if found[_MOST_NAMES:] else "")
