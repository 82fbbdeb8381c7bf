"""Lines of a config that select another model or tag, and where they go. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import attrs

from noether_init_core.errors import ConfigError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import near, yaml_field, yaml_line


@attrs.frozen
class AskedBy:
    """The config that asks for a set: which fields it has, and where they go.

    Attributes:
        kind: ``tag`` can set a tag, ``resume`` a tag and ``on_invalid``. ``auto_resume`` has no tag, and its
            ``on_invalid`` may stand beside it.
        place: The place of the config: ``initializers.0, init.yaml:2``; empty if unknown.
        whole: The key whose whole value the config is, ``auto_resume: true``; else empty.
    """

    kind: Literal["tag", "resume", "auto_resume"] = "tag"
    place: str = ""
    whole: str = ""

    @property
    def where(self) -> str:
        """The place, to be put behind a line: `` (in initializers.0, init.yaml:2)``."""
        return f" (in {self.place})" if self.place else ""

    def line(self, fields: Mapping[str, Any]) -> str:
        """The line that sets fields, and its place."""
        whole = self.whole or ("auto_resume" if self.kind == "auto_resume" and not self.place else "")
        if whole:
            return yaml_field(whole, dict(fields))
        line = yaml_line(dict(fields))
        return (line[1:-1] if len(fields) == 1 else line) + self.where

    def tag(self, tag: str) -> str:
        """The line that selects a tag, and its place."""
        if self.kind != "auto_resume":
            return self.line({"checkpoint_tag": tag})
        return self.of_kind("resume", checkpoint_tag=tag)

    def of_kind(self, kind: str, **fields: Any) -> str:
        """The line that makes it a config of another kind, and its place."""
        if self.kind != "auto_resume":
            return self.line({"kind": kind, **fields})
        return f"- {yaml_line({'kind': kind, **fields})} (in initializers, in place of auto_resume)"

    def walk_back(self) -> str:
        """The line that continues from the newest good set, and its place."""
        if self.kind == "auto_resume":
            return f"on_invalid: previous (beside {self.place or 'auto_resume'})"
        return f"on_invalid: previous{self.where or ' (in this resume)'}"


#: Nobody has told which config asks.
UNKNOWN = AskedBy()

# ``latest_ema=0.9``: the tag and the info, as Noether wrote them before it put the info in front of the tag.
_WITH_INFO = re.compile(r"(?:(?P<tag>.+)_)?(?P<info>[^_=]+=[^=]+)", re.DOTALL)


def nearest_model(asked: str, named: Sequence[str], cutoff: float = 0.5) -> str | None:
    """The name that is probably intended: a submodel of that name, a part of that composite, or a similar name."""
    last = asked.rpartition(".")[2]
    others = [name for name in named if name != asked]
    found = [
        *(name for name in others if name.endswith(f".{asked}")),
        *(name for name in others if name.rpartition(".")[2] == last),
        *(name for name in others if name.startswith(f"{asked}.")),
    ]
    if found:
        return found[0]
    return next((name for name in near(asked, named, 1, cutoff=cutoff) if name != asked), None)


def fields_with_info(asked: str, tags: Collection[str], infos: Collection[str]) -> dict[str, Any] | None:
    """The fields for a tag such as ``latest_ema=0.9``, whose info is a field of its own; None for other tags."""
    found = _WITH_INFO.fullmatch(asked)
    if found is None or found["info"] not in infos:
        return None
    tag = found["tag"] or "latest"
    if tag not in tags and not _is_iteration(tag):
        return None
    return {"checkpoint_tag": tag, "model_info": found["info"]}


def fields_without_info(tag: str, info: str | None, tags: Collection[str]) -> dict[str, Any] | None:
    """The fields for weights whose info is in their tag: Noether wrote such files before 2026-02-19."""
    together = f"{tag}_{info}"
    return {"checkpoint_tag": together, "model_info": None} if info and together in tags else None


def _is_iteration(tag: str) -> bool:
    try:
        TrainingIteration.from_string(tag)
    except (ConfigError, ValueError):
        return False
    return True
