"""Flat files of a folder: the sets that they are where there is no manifest, and copies of committed sets for Noether.

A record says which names are copies that we wrote. Whatever changes something here happens under the lock of the
folder. No committed set depends on it: it may fail at any step, and the next save makes up for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import CheckpointError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import Storage
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.checkpoint_set import (
    CheckpointFile,
    CheckpointSet,
    SetFolder,
    list_names,
    reaching,
    said_by,
    sorted_files,
)
from noether_init_core.sets.file_names import iteration_of_tag, parse

__all__ = [
    "TEMPORARY_NAMES",
    "changed_names",
    "flat_copies",
    "give_room",
    "iteration_in",
    "legacy_sets",
    "plain_before",
    "refresh_flat_names",
    "remove_names_of",
    "remove_orphans",
]

logger = logging.getLogger(__name__)

_TEMPORARY = ".noether-init-flat.tmp"
_RECORD = ".noether-init-flat.json"
_RECORD_TEMPORARY = ".noether-init-flat.json.tmp"
_MAX_RECORD_BYTES = 64 << 20
#: What a save that was cut short may leave in the folder of checkpoints.
TEMPORARY_NAMES = (_TEMPORARY, _RECORD_TEMPORARY)


@attrs.frozen
class _Written:
    """A name that we wrote: for which set, and how to tell whether it is still that file."""

    set_name: str
    size: int
    modified_ns: int


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


def refresh_flat_names(
    checkpoints: Path, committed: CheckpointSet, before: Callable[[], Iterator[CheckpointSet]], storage: Storage
) -> None:
    """Give the files of a committed set Noether's names in the folder of checkpoints.

    The names of its iteration are further names of the same files where that is safe, else copies. Every other tag is
    rewritten by Noether in place, so its names are copies. There, the trainer's name goes first and comes back last:
    while there is a trainer file, everything beside it belongs to it.

    ``before`` gives the committed sets, newest first.

    Raises ``OSError``.
    """
    own = str(committed.iteration)
    names: list[str] = []
    try:
        for file in committed.files:
            _replace(checkpoints / _flat_name(file, own), file.path, storage, linked=True)
            names.append(_flat_name(file, own))
        for tag in committed.tags:
            if tag != own:
                _refresh_tag(checkpoints, committed, before, tag, storage, names)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the telling one
            _record(checkpoints, committed, names, storage)
        raise
    _record(checkpoints, committed, names, storage)


def give_room(checkpoints: Path, storage: Storage) -> int:
    """Remove every name that we wrote, for a set that finds no room; returns how many. The sets are untouched.

    Raises ``OSError``.
    """
    return _remove(checkpoints, _read_record(checkpoints, storage), storage)


def remove_orphans(checkpoints: Path, folders: Iterable[SetFolder], storage: Storage) -> None:
    """Remove the names that we wrote for sets that are gone, unless another program has rewritten them since.

    ``folders`` are those of the sets that are there. Raises ``OSError``.
    """
    record = _read_record(checkpoints, storage)
    committed = {folder.path.name for folder in folders if record and folder.is_committed(storage)}
    orphans = {name: written for name, written in record.items() if written.set_name not in committed}
    if _remove(checkpoints, orphans, storage):
        logger.info("flat names of removed sets are removed: %s", ", ".join(sorted(orphans)))


def remove_names_of(checkpoints: Path, set_name: str, storage: Storage) -> None:
    """Remove the names that we wrote for one set, unless another program has rewritten them since.

    Raises ``OSError``.
    """
    record = _read_record(checkpoints, storage)
    _remove(checkpoints, {name: one for name, one in record.items() if one.set_name == set_name}, storage)


def flat_copies(checkpoints: Path, storage: Storage) -> dict[str, str]:
    """Flat name -> folder name of the set that it is a copy of, for names that are still as we wrote them."""
    record = _read_record(checkpoints, storage)
    return {
        name: written.set_name for name, written in record.items() if _is_ours(checkpoints / name, written, storage)
    }


def changed_names(checkpoints: Path, storage: Storage) -> tuple[str, ...]:
    """Names that we wrote and that are other files by now, sorted: rewritten by another program, or damaged."""
    record = _read_record(checkpoints, storage)
    there = (name for name in record if storage.identity_of(checkpoints / name) is not None)
    return tuple(sorted(name for name in there if not _is_ours(checkpoints / name, record[name], storage)))


def _remove(checkpoints: Path, names: Mapping[str, _Written], storage: Storage) -> int:
    ours = [name for name, written in names.items() if _is_ours(checkpoints / name, written, storage)]
    # trainers first: without one, what is left beside it is no set
    for name in sorted(ours, key=lambda name: (not name.endswith("_trainer.th"), name)):
        storage.unlink(checkpoints / name)
    return len(ours)


def _refresh_tag(
    checkpoints: Path,
    committed: CheckpointSet,
    before: Callable[[], Iterator[CheckpointSet]],
    tag: str,
    storage: Storage,
    written: list[str],
) -> None:
    # Only names that the set brought which the tag meant before may be removed, and of these models: those of models
    # that are saved separately stay what the tag means of them.
    models = committed.models()
    others = (one for one in before() if one.folder != committed.folder)
    previous = next((one for one in others if tag in one.tags and one.is_of(models)), None)
    names = {_flat_name(file, tag): file for file in committed.files}
    stale = {_flat_name(file, tag): file for file in (previous.files if previous else ())}
    for part in ("trainer", "optim", "model"):
        for name, file in sorted({**stale, **names}.items()):
            if file.part == part and (part != "model" or name not in names):
                storage.unlink(checkpoints / name)
    for part in ("model", "optim", "trainer"):
        for name, file in sorted(names.items()):
            if file.part == part:
                _replace(checkpoints / name, file.path, storage, linked=False)
                written.append(name)


def _flat_name(file: CheckpointFile, tag: str) -> str:
    parsed = parse(file.path.name)
    if parsed is None:
        raise ValueError(f"{file.path} has no checkpoint name")
    return str(attrs.evolve(parsed, tag=tag))


def _replace(target: Path, source: Path, storage: Storage, *, linked: bool) -> None:
    temporary = target.parent / _TEMPORARY
    try:
        if not storage.reflink(source, temporary) and not (linked and storage.hardlink(source, temporary)):
            storage.copy(source, temporary)
        storage.rename(temporary, target)
    except OSError:
        # on a full disk, half a copy would take the room that the next save needs; the first error is the telling one
        with contextlib.suppress(OSError):
            storage.unlink(temporary)
        raise
    # renaming one name of a file to another name of the same file does nothing at all
    storage.unlink(temporary)


# The record: which flat names are ours. Where it is lost, names of removed sets stay until a person removes them.


def _is_ours(path: Path, written: _Written, storage: Storage) -> bool:
    return storage.identity_of(path) == (written.size, written.modified_ns)


def _read_record(checkpoints: Path, storage: Storage) -> dict[str, _Written]:
    path = checkpoints / _RECORD
    if storage.size_of(path) is None:
        return {}
    try:
        found: Any = json.loads(storage.read_bytes(path, _MAX_RECORD_BYTES))
    except (ValueError, RecursionError) as error:
        logger.warning("%s cannot be read, so that names of removed sets stay: %s", path, error)
        return {}
    entries = found.items() if isinstance(found, Mapping) else ()
    return {
        name: _Written(*entry)
        for name, entry in entries
        # nothing but names that a flat file can have is ever removed
        if parse(name) is not None and isinstance(entry, list) and list(map(type, entry)) == [str, int, int]
    }


def _record(checkpoints: Path, committed: CheckpointSet, names: Iterable[str], storage: Storage) -> None:
    record = _read_record(checkpoints, storage)
    for name in names:
        found = storage.identity_of(checkpoints / name)
        if found is not None:
            record[name] = _Written(committed.folder.name, *found)
    kept = {name: written for name, written in sorted(record.items()) if _is_ours(checkpoints / name, written, storage)}
    temporary = checkpoints / _RECORD_TEMPORARY
    storage.unlink(temporary)
    with storage.open_write(temporary) as file:
        file.write(json.dumps({name: attrs.astuple(written) for name, written in kept.items()}, indent=0).encode())
    storage.rename(temporary, checkpoints / _RECORD)
