"""What a tag asks for, and which of the sets it can mean."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import AmbiguousCheckpointError, ConfigError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import check_name
from noether_init_core.sets.checkpoint_set import CheckpointSet

__all__ = ["FOLLOWING", "Query", "is_of", "sets_meant"]

#: Tags that follow the run by themselves; Noether rewrites their files in place.
FOLLOWING = ("latest", "last")
_BEST = ("best_model.", "best.")


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


def sets_meant(
    query: Query,
    newest_first: Callable[[], Iterator[CheckpointSet]],
    models: Set[str] = frozenset(),
    folder: Path | None = None,
) -> Iterator[CheckpointSet]:
    """Sets that the query can mean, best first. Tags that mean one set yield at most that one.

    Several models can be saved into one run, each in sets of its own. So a full iteration means its newest set with all
    of ``models``, another tag its newest set with any: the set of a model that lacks another one is no reason for an
    older set.

    Raises ``AmbiguousCheckpointError`` for ``best`` where ``folder`` has several such tags.
    """
    iteration = query.iteration
    if iteration is not None and not iteration.is_fully_specified:
        return (one for one in newest_first() if one.iteration is not None and iteration.matches(one.iteration))
    if iteration is not None:
        same = (one for one in newest_first() if one.iteration == iteration)
        return itertools.islice(_preferred(same, lambda one: _has_all(one, models)), 1)
    text = query.text
    if text == "best" or text.startswith(_BEST[1]):
        text = _best(text, {tag for one in newest_first() for tag in one.tags}, folder)
    tagged = (one for one in newest_first() if text in one.tags)
    return itertools.islice(_preferred(tagged, lambda one: is_of(one, models)), 1)


def is_of(one: CheckpointSet, models: Set[str]) -> bool:
    """Whether the set is one of any of ``models`` (with or without info), or of a whole that they are parts of.

    Of no models every set is.
    """
    return not models or any(
        name in (file.model, file.stem) or name.startswith(f"{file.model}.") for file in one.files for name in models
    )


def _has_all(one: CheckpointSet, models: Set[str]) -> bool:
    return all(any(name in (file.model, file.stem) for file in one.files) for name in models)


def _preferred(sets: Iterator[CheckpointSet], is_asked_for: Callable[[CheckpointSet], bool]) -> Iterator[CheckpointSet]:
    """Those that are asked for; where there is none, the first set, of which the error says what it lacks."""
    first = None
    is_found = False
    for one in sets:
        first = first or one
        if is_asked_for(one):
            is_found = True
            yield one
    if first is not None and not is_found:
        yield first


def _best(text: str, tags: set[str], folder: Path | None) -> str:
    if text in tags:
        return text
    if text != "best":
        return _BEST[0] + text.removeprefix("best.")
    found = sorted(tag for tag in tags if tag.startswith(_BEST))
    if len(found) > 1:
        raise AmbiguousCheckpointError(
            f'"best" could be any of {", ".join(found)}. Say which: checkpoint_tag: {found[0]}',
            path=folder,
            candidates=found,
        )
    return found[0] if found else text
