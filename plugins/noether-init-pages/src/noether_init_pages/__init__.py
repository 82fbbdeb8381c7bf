"""Pages: show a plan, a report, a comparison or a lineage of noether-init-core as one self-contained HTML file.

The content of a page is the JSON of its value, which is embedded in it. Scripts and styles are in ``assets``.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import PurePath
from typing import Any, Protocol

import attrs

from noether_init_core.render.text import MARKS

__all__ = ["HasToDict", "html_page"]

#: Version of Apache ECharts in ``charts.min.js``, which ``tools/charts`` builds.
CHARTS_VERSION = "6.1.0"
_VERSION = 1
# Larger data are compressed, to a tenth of the size or less.
_MOST_READABLE = 1_000_000
_MOST_NAMES = 3


class HasToDict(Protocol):
    """A plan, a report, a comparison or a lineage."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with ``format`` and ``version``."""
        ...


def html_page(value: HasToDict | Mapping[str, Any], *, title: str | None = None) -> str:
    """Return one self-contained HTML page about a plan, a report, a comparison of checkpoints or a lineage.

    The page fetches nothing. A content security policy with digests allows only its own scripts. It follows the light
    or dark mode of the reader, and can be printed. Write it as UTF-8. The same value gives the same page; torch is not
    imported.

    Args:
        value: ``LoadPlan``, ``InitReport``, ``CheckpointDiff``, ``Lineage``, or their JSON data.
        title: One line of plain text; None: a title from the value.

    Raises ``ValueError`` for data of another format or version.
    """
    data = dict(value) if isinstance(value, Mapping) else value.to_dict()
    name, version = data.get("format"), data.get("version")
    if not isinstance(name, str) or name not in _PAGES:
        raise ValueError(f"no page for the format {name!r}; there are pages for: {', '.join(_PAGES)}")
    if version != _VERSION:
        is_newer = isinstance(version, int) and version > _VERSION
        change = "pip install --upgrade noether-init-pages" if is_newer else "pass the value itself, or its to_dict()"
        raise ValueError(
            f"{name} of version {version!r} cannot be shown; this release shows version {_VERSION}. Next: {change}"
        )
    about, command = _PAGES[name](data)
    return _document(name.removeprefix("noether-init-"), about if title is None else title, data, command)


def _of_plan(data: Mapping[str, Any]) -> tuple[str, str]:
    """Return the title of a page, and the command that prints the same as text, for readers without JavaScript."""
    models = _some(one["model"] for one in data["origins"])
    return f"What {data['kind'] or 'the config'} will do to {models or 'the model'}", "ninit plan CONFIG"


def _of_report(data: Mapping[str, Any]) -> tuple[str, str]:
    kinds = _some(one["kind"] for one in data["initializers"])
    return f"What {kinds or 'no initializer'} did", "print(report)"


def _of_diff(data: Mapping[str, Any]) -> tuple[str, str]:
    a, b = (data[side]["origin"] or PurePath(data[side]["path"]).name for side in ("a", "b"))
    return f"{a} against {b}", "ninit diff A B"


def _of_lineage(data: Mapping[str, Any]) -> tuple[str, str]:
    return f"Where {data['focus'] or 'these runs'} came from", "ninit lineage PATH"


_PAGES = {
    "noether-init-plan": _of_plan,
    "noether-init-report": _of_report,
    "noether-init-diff": _of_diff,
    "noether-init-lineage": _of_lineage,
}


def _some(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    return ", ".join(found[:_MOST_NAMES]) + (" and others" if found[_MOST_NAMES:] else "")


def _document(page: str, title: str, data: dict[str, Any], command: str) -> str:
    from jinja2 import Environment, StrictUndefined

    assets = files("noether_init_pages") / "assets"
    scripts = [(assets / name).read_text("utf-8") for name in ("charts.min.js", "common.js", f"{page}.js")]
    data_type, stored = _stored(_json(data))
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string((assets / "page.html.j2").read_text("utf-8")).render(
        page=page,
        title=title,
        command=command,
        style=(assets / "page.css").read_text("utf-8"),
        data_type=data_type,
        data=stored,
        marks=_json({action: attrs.asdict(mark) for action, mark in MARKS.items()}),
        scripts=scripts,
        policy=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        version=importlib.metadata.version("noether-init-core"),
        charts_version=CHARTS_VERSION,
    )


def _json(data: Any) -> str:
    """Return strict JSON without characters of HTML markup, because names in files may be hostile."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _stored(text: str) -> tuple[str, str]:
    """Return type and text of the element with the data: plain, or compressed if the page would be large."""
    if len(text) <= _MOST_READABLE:
        return "application/json", text
    return "application/gzip", base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
