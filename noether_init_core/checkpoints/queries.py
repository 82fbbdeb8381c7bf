"""What a tag asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from noether_init_core.errors import ConfigError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import check_name

__all__ = ["FOLLOWING", "Query"]

#: Tags that follow the run by themselves; Noether rewrites their files in place.
FOLLOWING = ("latest", "last")


@attrs.frozen
class Query:
    """What a tag asks for: a tag as it is written, an iteration, or any iteration that has some of its fields."""

    text: str
    iteration: TrainingIteration | None
    automatic: bool

    @classmethod
    def of(cls, tag: str | Mapping[str, Any] | TrainingIteration | None) -> Query:
        if tag is None:
            return cls("latest", None, automatic=True)
        if isinstance(tag, Mapping):
            tag = TrainingIteration.from_mapping(tag)
        if isinstance(tag, TrainingIteration):
            if not (tag.is_minimally_specified or tag.is_fully_specified):
                raise ConfigError(
                    f"checkpoint_tag {tag.to_mapping()} must say one of epoch, update, sample, or all three"
                )
            return cls(str(tag), tag, automatic=not tag.is_fully_specified)
        check_name(tag, "checkpoint_tag")
        try:
            iteration = TrainingIteration.from_string(tag)
        except ConfigError:
            return cls(tag, None, automatic=tag in FOLLOWING)
        return cls(tag, iteration, automatic=not iteration.is_fully_specified)
