"""TrainingIteration: completed epochs, updates and samples of a training run."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Self

import attrs

from noether_init_core.errors import ConfigError
from noether_init_core.messages import one_line

_FIELDS = ("epoch", "update", "sample")
_PATTERN = re.compile(r"(?:E(?P<epoch>\d{1,18}))?(?:_?U(?P<update>\d{1,18}))?(?:_?S(?P<sample>\d{1,18}))?", re.ASCII)


def check_whole(name: str, value: object, *, least: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is an integer of at least ``least``; booleans are refused."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")


@functools.total_ordering
@attrs.frozen(order=False)
class TrainingIteration:
    """Completed epochs, optimizer updates and samples of a run; None for a field that is not specified.

    *Fully specified*: all three fields. *Minimally specified*: exactly one, which is a query such as 'the newest set of
    epoch 10'. Iterations that specify the same fields are ordered by epoch, then update, then sample. Comparing others
    with ``<`` raises ``ConfigError``, because their order is not defined. Text form: ``E10_U100_S200``.

    Raises ``ConfigError`` for a field that is not a whole number of at least 0.
    """

    epoch: int | None = None
    update: int | None = None
    sample: int | None = None

    def __attrs_post_init__(self) -> None:
        for name, value in zip(_FIELDS, (self.epoch, self.update, self.sample), strict=True):
            if value is not None:
                check_whole(name, value, least=0)

    @classmethod
    def zero(cls) -> Self:
        """Return the iteration at which a new run starts: all fields 0."""
        return cls(0, 0, 0)

    @classmethod
    def from_string(cls, text: str) -> Self:
        """Parse ``E10_U100_S200`` or a part of it (``E10``, ``U100_S200``). Raises ``ConfigError``."""
        parsed = cls.in_text(text)
        if parsed is None:
            raise ConfigError(
                f"{text!r} is not a training iteration. Next: write E10_U100_S200 or a part of it, such as E10 or U100"
            )
        return parsed

    @classmethod
    def in_text(cls, text: str) -> Self | None:
        """Return the iteration whose text form is exactly ``text``; None for other text (``latest``, ``E010``)."""
        found = _PATTERN.fullmatch(text)
        if not text or found is None:
            return None
        parsed = cls(**{name: int(value) for name, value in found.groupdict().items() if value is not None})
        return parsed if str(parsed) == text else None

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Self:
        """Build from ``{"epoch": 1, "update": 4, "sample": 32}`` or a part of it. Raises ``ConfigError``."""
        unknown = sorted(one_line(str(name)) for name in values if name not in _FIELDS)
        if unknown:
            raise ConfigError(
                f"unknown field {', '.join(unknown)} of an iteration; the fields are epoch, update and sample"
            )
        return cls(**values)  # type: ignore[arg-type]  # each value is checked above

    @property
    def is_fully_specified(self) -> bool:
        """Whether all three fields are specified."""
        return None not in (self.epoch, self.update, self.sample)

    @property
    def is_minimally_specified(self) -> bool:
        """Whether exactly one field is specified."""
        return sum(value is not None for value in (self.epoch, self.update, self.sample)) == 1

    @property
    def is_zero(self) -> bool:
        """Whether no field is greater than 0: nothing has been trained."""
        return not (self.epoch or self.update or self.sample)

    def matches(self, other: TrainingIteration) -> bool:
        """Whether ``other`` has the same value in every field that this iteration specifies."""
        return all(getattr(self, name) in (None, getattr(other, name)) for name in _FIELDS)

    def to_mapping(self) -> dict[str, int]:
        """Return the specified fields as plain data."""
        return {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, TrainingIteration):
            return NotImplemented
        mine, theirs = self.to_mapping(), other.to_mapping()
        if mine.keys() != theirs.keys():
            raise ConfigError(
                f"{self or 'an empty iteration'} and {other or 'an empty iteration'} specify different fields and "
                "cannot be compared"
            )
        return tuple(mine.values()) < tuple(theirs.values())

    def __str__(self) -> str:
        return "_".join(f"{name[0].upper()}{value}" for name, value in self.to_mapping().items())
