"""Names near a model or tag that was not found, as lines of a config. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from noether_init_core.errors import ConfigError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import near, yaml_field, yaml_line

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


def line_with_info(asked: str, tags: Collection[str], infos: Collection[str]) -> str | None:
    """The fields for a tag such as ``latest_ema=0.9``, whose info is a field of its own; None for other tags."""
    found = _WITH_INFO.fullmatch(asked)
    if found is None or found["info"] not in infos:
        return None
    tag = found["tag"] or "latest"
    if tag not in tags and not _is_iteration(tag):
        return None
    return yaml_line({"checkpoint_tag": tag, "model_info": found["info"]})


def line_without_info(tag: str, info: str | None, tags: Collection[str]) -> str | None:
    """The fields for weights whose info is in their tag: Noether wrote such files before 2026-02-19."""
    together = f"{tag}_{info}"
    return yaml_line({"checkpoint_tag": together, "model_info": None}) if info and together in tags else None


def tag_field(tag: str) -> str:
    """The line that selects a tag."""
    return yaml_field("checkpoint_tag", tag)


def _is_iteration(tag: str) -> bool:
    try:
        TrainingIteration.from_string(tag)
    except (ConfigError, ValueError):
        return False
    return True
