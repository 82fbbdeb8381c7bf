"""Flat files in a folder of checkpoints: legacy sets without manifest, and copies of committed sets for Noether.

A record file lists the copies that ``saving.housekeeping`` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import CheckpointError, TornSetError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import LOCAL, FileSystem, reaching
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import logger_of
from noether_init_core.sets.checkpoint_set import (
    CheckpointFile,
    CheckpointSet,
    check_consistency,
    list_names,
    recorded_in,
    refuse_dangling,
    sorted_files,
)
from noether_init_core.sets.file_names import iteration_of_tag, parse

logger = logger_of(__name__)

RECORD_NAME = ".noether-init-flat.json"
_MAX_RECORD_BYTES = 64 << 20


@attrs.frozen
class WrittenName:
    """A flat name that this package wrote: its set, and the size and time that identify the file."""

    set_name: str
    size: int
    modified_ns: int


def legacy_sets(folder: Path, storage: FileSystem) -> list[CheckpointSet]:
    """Group flat files by tag: latest iteration first, plain before suffixed (``E1_U7_S28.x``), then other tags."""
    by_tag: dict[str, list[CheckpointFile]] = {}
    for name in list_names(folder, storage):
        parsed = parse(name)
        with reaching(folder / name):
            identity = None if parsed is None else storage.identity_of(folder / name, True)
        if parsed is not None and identity is not None:
            file = CheckpointFile(folder, name, parsed.model, parsed.info, parsed.part, identity)
            by_tag.setdefault(parsed.tag, []).append(file)
        elif parsed is not None:
            refuse_dangling(folder / name, storage)
    found = [
        CheckpointSet(folder, tag, (tag,), iteration_of_tag(tag), None, False, sorted_files(files))
        for tag, files in sorted(by_tag.items())
    ]
    known = [one for one in found if one.iteration is not None]
    known.sort(key=lambda one: one.name != str(one.iteration))
    known.sort(key=lambda one: one.iteration or TrainingIteration.zero(), reverse=True)
    return [*known, *(one for one in found if one.iteration is None)]


def check_as_listed(file: CheckpointFile, storage: FileSystem = LOCAL) -> None:
    """Check that a flat file was not written again since it was listed.

    An optimizer file of Noether records no iteration, so that nothing else would show it. Raises ``TornSetError``, and
    ``CheckpointUnreachableError`` if the disk fails.
    """
    with reaching(file.path):
        is_same = file.identity is None or file.identity == storage.identity_of(file.path, True)
    if not is_same:
        raise TornSetError(
            f"{file.path} was written again since it was selected, by the run that it is of: it may not be of one "
            "iteration with the other files. Next: start again",
            path=file.path,
        )


def plain_before(legacy: Sequence[CheckpointSet], first: CheckpointSet) -> Iterator[CheckpointSet]:
    """Yield legacy sets with a plain ``E.._U.._S..`` tag that are not later than all files of ``first``."""
    latest = max(_iterations_in(first), default=None)
    for one in legacy:
        iteration = one.iteration
        if latest is None or iteration is None or iteration > latest or one == first:
            continue
        if one.name == str(iteration):
            yield one


def iteration_in(checkpoint_set: CheckpointSet) -> TrainingIteration | None:
    """Return the iteration in the header of the trainer file of a set, else of its weights; None if not recorded.

    Raises errors of the reader, ``CheckpointFormatError`` for an invalid iteration.
    """
    asked = (file for file in checkpoint_set.files if file.part != "optim")
    for file in sorted(asked, key=lambda file: (file.part == "model", file.stem)):
        with open_checkpoint(file.path) as reader:
            iteration, _run = recorded_in(reader.metadata, file.path)
        if iteration is not None:
            return iteration
    return None


def _iterations_in(checkpoint_set: CheckpointSet) -> Iterator[TrainingIteration]:
    """Yield the full iterations in the headers of all readable files of a set."""
    for file in checkpoint_set.files:
        try:
            with open_checkpoint(file.path) as reader:
                iteration, _run = recorded_in(reader.metadata, file.path)
        except (CheckpointError, OSError) as error:
            logger.debug("no iteration was read from %s: %s", file.path, error)
            continue
        if iteration is not None and iteration.is_fully_specified:
            yield iteration


def own_files(
    chosen: CheckpointSet, iteration: TrainingIteration | None, flat: Sequence[CheckpointSet]
) -> Iterator[CheckpointFile]:
    """Yield the files of a set; further weights (with info) of another iteration are replaced by those of its own.

    Other programs write averages at other times than checkpoints, so ``latest`` can have an average that is newer than
    its other files. The average of the same iteration is in the flat set with the iteration as tag.

    Args:
        chosen: The set; a committed set has only files of its own.
        iteration: The iteration of the set; None if it is not recorded.
        flat: All flat sets of the folder.

    Raises ``TornSetError`` if there is no average of the iteration, and errors of the reader.
    """
    for file in chosen.files:
        yield file if chosen.committed or file.info is None else _own_file(file, iteration, flat)


def _own_file(
    file: CheckpointFile, iteration: TrainingIteration | None, flat: Sequence[CheckpointSet]
) -> CheckpointFile:
    recorded = _iteration_of(file)
    if iteration is None or recorded in (None, iteration):
        return file
    others = (one.file(file.model, file.part, file.info) for one in flat if one.name == str(iteration))
    own = next((other for other in others if other is not None), None)
    if own is not None and _iteration_of(own) in (None, iteration):
        return own
    raise TornSetError(
        f"{file.path} is of {recorded}, and the set is of {iteration}; no {file.stem} of {iteration} was found. "
        "Next: take another set",
        path=file.path,
        found={file.name: str(recorded)},
    )


def check_headers(found: CheckpointSet) -> None:
    """Check that the headers of all files of a set record one iteration and one run.

    Raises ``TornSetError``, and errors of the reader.
    """
    recorded = {}
    for file in found.files:
        with open_checkpoint(file.path) as reader:
            recorded[file.name] = recorded_in(reader.metadata, file.path)
    check_consistency(recorded, found)


def _iteration_of(file: CheckpointFile) -> TrainingIteration | None:
    with open_checkpoint(file.path) as reader:
        return recorded_in(reader.metadata, file.path)[0]


# Copies of committed sets, and the record of them.


def flat_copies(checkpoints: Path, storage: FileSystem) -> dict[str, str]:
    """Return flat name -> folder name of its set, for copies that are unchanged since this package wrote them."""
    record = read_record(checkpoints, storage)
    return {name: written.set_name for name, written in record.items() if is_ours(checkpoints / name, written, storage)}


def changed_names(checkpoints: Path, storage: FileSystem) -> tuple[str, ...]:
    """Return recorded names whose files have changed since, sorted: rewritten by another program, or damaged."""
    record = read_record(checkpoints, storage)
    with reaching(checkpoints):
        there = [name for name in record if storage.identity_of(checkpoints / name) is not None]
    return tuple(sorted(name for name in there if not is_ours(checkpoints / name, record[name], storage)))


# The record of flat names. If it is lost, flat names of removed sets stay until a person removes them.


def is_ours(path: Path, written: WrittenName, storage: FileSystem) -> bool:
    """Whether a name is still the file that this package wrote."""
    # By size and time, not by digest: every save asks for all flat names, and reading them would take too long.
    with reaching(path):
        return storage.identity_of(path) == (written.size, written.modified_ns)


def read_record(checkpoints: Path, storage: FileSystem) -> dict[str, WrittenName]:
    """Return the recorded names; empty, with a warning, if the record cannot be read."""
    path = checkpoints / RECORD_NAME
    with reaching(path):
        text = None if storage.size_of(path) is None else storage.read_bytes(path, _MAX_RECORD_BYTES)
    try:
        found: Any = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        logger.warning("%s cannot be read, so flat names of removed sets stay: %s", path, error)
        return {}
    entries = found.items() if isinstance(found, Mapping) else ()
    return {
        name: WrittenName(*entry)
        for name, entry in entries
        # The record is used to remove files. A damaged one must never remove a file of another name.
        if parse(name) is not None and isinstance(entry, list) and list(map(type, entry)) == [str, int, int]
    }
