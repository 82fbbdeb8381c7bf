"""What an open tag leads to, set by set: the one that it means, and then what to walk back to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from noether_init_core.errors import CheckpointError, CheckpointFormatError
from noether_init_core.files.storage.disk import Storage
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.checkpoint_set import CheckpointSet, SetFolder, load_set
from noether_init_core.sets.flat_sets import newest_legacy, plain_before
from noether_init_core.sets.manifest import MANIFEST_NAME
from noether_init_core.sets.queries import Query, is_of, sets_meant

__all__ = ["Step", "committed_steps", "legacy_steps"]

#: The name of a set, and the set, or why its manifest or its header cannot be read.
Step = tuple[str, CheckpointSet | CheckpointError]


def committed_steps(
    folders: Sequence[SetFolder], query: Query, models: Set[str], storage: Storage, *, any_tag: bool
) -> Iterator[Step]:
    """Committed sets in falling sequence; see ``RunStore.descending``. None where nothing is meant.

    Raises ``CheckpointFormatError`` for a set of a newer release, which is not broken.
    """
    steps = _read(folders, query, models, storage)
    if any_tag or query.iteration is not None:
        yield from steps
        return
    above: list[Step] = []
    for name, found in steps:
        if isinstance(found, CheckpointError):
            above.append((name, found))
        elif query.text in found.tags:
            # A set that never had the tag is not meant by it, whatever the unreadable ones had.
            yield from (step for step in above if isinstance(step[1], CheckpointError))
            yield name, found
            yield from steps
            return
        elif above:
            above.append((name, found))
    yield from above


def legacy_steps(legacy: Sequence[CheckpointSet], query: Query, models: Set[str], *, any_tag: bool) -> Iterator[Step]:
    """The sets of flat files; see ``RunStore.descending``. None where nothing is meant."""
    unreadable: list[tuple[str, CheckpointError]] = []
    if any_tag:
        first = newest_legacy(legacy, models, unreadable)
        yield from unreadable
    else:
        first = next(sets_meant(query, lambda: iter(legacy)), None)
    if first is None:
        return
    yield first.name, first
    for one in plain_before(legacy, first):
        if query.iteration is None or (one.iteration is not None and query.iteration.matches(one.iteration)):
            yield one.name, one


def _read(folders: Sequence[SetFolder], query: Query, models: Set[str], storage: Storage) -> Iterator[Step]:
    """Those that the query allows, as they are asked for; of which models an unreadable one is cannot be known."""
    scope = query.iteration if query.iteration is not None else TrainingIteration()
    for folder in reversed(folders):
        if not scope.matches(folder.iteration):
            continue
        try:
            found: CheckpointSet | CheckpointError = load_set(folder, storage)
        except CheckpointFormatError:
            raise
        except CheckpointError as error:
            if not storage.exists(folder.path / MANIFEST_NAME):
                continue  # retired since it was listed
            found = error
        if isinstance(found, CheckpointError) or is_of(found, models):
            yield folder.path.name, found
