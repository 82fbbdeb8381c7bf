"""Flat files of a folder: the sets that they are where there is no manifest, and copies of committed sets for Noether.

A record says which names are copies that ``saving.housekeeping`` wrote.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import CheckpointError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import FileSystem
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

logger = logging.getLogger(__name__)

RECORD_NAME = ".noether-init-flat.json"
_MAX_RECORD_BYTES = 64 << 20


@attrs.frozen
class WrittenName:
    """A name that we wrote: for which set, and how to tell whether it is still that file."""

    set_name: str
    size: int
    modified_ns: int


def legacy_sets(folder: Path, storage: FileSystem) -> list[CheckpointSet]:
    """Sets by the tag of flat files: latest iteration first, the plain tag before suffixed ones; then the named."""
    by_tag: dict[str, list[CheckpointFile]] = {}
    for name in list_names(folder, storage):
        parsed = parse(name)
        with reaching(folder / name):
            identity = None if parsed is None else storage.identity_of(folder / name, True)
        if parsed is not None and identity is not None:
            file = CheckpointFile(folder, name, parsed.model, parsed.info, parsed.part, identity)
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
    """The iteration that the header of the set's trainer file says, else that of weights.

    None where no file says. Raises errors of the reader, ``CheckpointFormatError`` for a malformed iteration.
    """
    asked = (file for file in checkpoint_set.files if file.part != "optim")
    for file in sorted(asked, key=lambda file: (file.part == "model", file.stem)):
        with open_checkpoint(file.path) as reader:
            iteration, _run = said_by(reader.metadata, file.path)
        if iteration is not None:
            return iteration
    return None


def _iterations_in(checkpoint_set: CheckpointSet) -> Iterator[TrainingIteration]:
    """The full iterations that the files of a set say, as far as they can be read."""
    for file in checkpoint_set.files:
        try:
            with open_checkpoint(file.path) as reader:
                iteration, _run = said_by(reader.metadata, file.path)
        except (CheckpointError, OSError) as error:
            logger.debug("%s says no iteration: %s", file.path, error)
            continue
        if iteration is not None and iteration.is_fully_specified:
            yield iteration


# Copies of committed sets, and the record of them.


def flat_copies(checkpoints: Path, storage: FileSystem) -> dict[str, str]:
    """Flat name -> folder name of the set that it is a copy of, for names that are still as we wrote them."""
    record = read_record(checkpoints, storage)
    return {name: written.set_name for name, written in record.items() if is_ours(checkpoints / name, written, storage)}


def changed_names(checkpoints: Path, storage: FileSystem) -> tuple[str, ...]:
    """Names that we wrote and that are other files by now, sorted: rewritten by another program, or damaged."""
    record = read_record(checkpoints, storage)
    there = (name for name in record if storage.identity_of(checkpoints / name) is not None)
    return tuple(sorted(name for name in there if not is_ours(checkpoints / name, record[name], storage)))


# The record: which flat names are ours. Where it is lost, names of removed sets stay until a person removes them.


def is_ours(path: Path, written: WrittenName, storage: FileSystem) -> bool:
    """Whether a name is still the file that we wrote."""
    with reaching(path):
        return storage.identity_of(path) == (written.size, written.modified_ns)


def read_record(checkpoints: Path, storage: FileSystem) -> dict[str, WrittenName]:
    """The names that we wrote; none where the record cannot be read, with a warning."""
    path = checkpoints / RECORD_NAME
    with reaching(path):
        text = None if storage.size_of(path) is None else storage.read_bytes(path, _MAX_RECORD_BYTES)
    try:
        found: Any = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        logger.warning("%s cannot be read, so that names of removed sets stay: %s", path, error)
        return {}
    entries = found.items() if isinstance(found, Mapping) else ()
    return {
        name: WrittenName(*entry)
        for name, entry in entries
        # nothing but names that a flat file can have is ever removed
        if parse(name) is not None and isinstance(entry, list) and list(map(type, entry)) == [str, int, int]
    }
