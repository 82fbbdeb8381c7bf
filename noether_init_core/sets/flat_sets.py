"""Flat files of a folder: the sets that they are where there is no manifest, and what they say of their iteration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from noether_init_core.errors import CheckpointError, CheckpointFormatError, ConfigError
from noether_init_core.files.storage.disk import Storage
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.checkpoint_set import (
    CheckpointFile,
    CheckpointSet,
    list_names,
    reaching,
    said_by,
    sorted_files,
)
from noether_init_core.sets.file_names import iteration_of_tag, parse

__all__ = ["iteration_in", "legacy_sets", "plain_before"]

logger = logging.getLogger(__name__)


def legacy_sets(folder: Path, storage: Storage) -> list[CheckpointSet]:
    """Sets by the tag of flat files: latest iteration first, the plain tag before suffixed ones; then the named."""
    by_tag: dict[str, list[CheckpointFile]] = {}
    for name in list_names(folder, storage):
        parsed = parse(name)
        with reaching(folder / name):
            is_file = parsed is not None and storage.size_of(folder / name) is not None
        if parsed is not None and is_file:
            file = CheckpointFile(folder / name, parsed.model, parsed.info, parsed.part)
            by_tag.setdefault(parsed.tag, []).append(file)
    found = [
        CheckpointSet(folder, tag, (tag,), iteration_of_tag(tag), None, False, sorted_files(files))
        for tag, files in sorted(by_tag.items())
    ]
    known = [one for one in found if one.iteration is not None]
    known.sort(key=lambda one: one.name != str(one.iteration))
    known.sort(key=lambda one: one.iteration or TrainingIteration.zero(), reverse=True)
    return [*known, *(one for one in found if one.iteration is None)]


def plain_before(legacy: Sequence[CheckpointSet], first: CheckpointSet) -> Iterator[CheckpointSet]:
    """The plain ``E.._U.._S..`` of flat files that are not later than what some file of ``first`` says."""
    latest = max(_iterations_in(first), default=None)
    for one in legacy:
        iteration = one.iteration
        if latest is None or iteration is None or iteration > latest or one == first:
            continue
        if one.name == str(iteration):
            yield one


def iteration_in(checkpoint_set: CheckpointSet) -> TrainingIteration | None:
    """The iteration of the set; where its name does not say, the header of its trainer file, else of weights.

    None where no file says. Raises errors of the reader, ``CheckpointFormatError`` for a malformed iteration.
    """
    if checkpoint_set.iteration is not None:
        return checkpoint_set.iteration
    from noether_init_core.files.opening import open_checkpoint

    order = {"trainer": 0, "model": 1, "optim": 2}
    for file in sorted(checkpoint_set.files, key=lambda file: (order[file.part], file.stem)):
        if file.part == "optim":
            continue
        with open_checkpoint(file.path) as reader:
            said = reader.metadata.get("training_iteration")
        if isinstance(said, Mapping):
            try:
                return TrainingIteration.from_mapping(said)
            except ConfigError as error:
                raise CheckpointFormatError(f"{file.path}: training_iteration: {error}", path=file.path) from error
    return None


def _iterations_in(checkpoint_set: CheckpointSet) -> Iterator[TrainingIteration]:
    """The full iterations that the files of a set say, as far as they can be read."""
    from noether_init_core.files.opening import open_checkpoint

    for file in checkpoint_set.files:
        try:
            with open_checkpoint(file.path) as reader:
                iteration, _run = said_by(reader.metadata, file.path)
        except (CheckpointError, OSError) as error:
            logger.debug("%s says no iteration: %s", file.path, error)
            continue
        if iteration is not None and iteration.is_fully_specified:
            yield iteration
