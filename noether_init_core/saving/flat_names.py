"""Copies of committed sets under Noether's flat names, and the record of which of these names are ours.

All of it happens under the lock of the folder. No committed set depends on it: it may fail at any step, and the next
save makes up for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import attrs

from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.sets.checkpoint_set import CheckpointFile, CheckpointSet
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.flat_files import RECORD_NAME, WrittenName, is_ours, read_record
from noether_init_core.sets.snapshot import Snapshot

logger = logging.getLogger(__name__)

_TEMPORARY = ".noether-init-flat.tmp"
_RECORD_TEMPORARY = ".noether-init-flat.json.tmp"
#: What a save that was cut short may leave in the folder of checkpoints.
TEMPORARY_NAMES = (_TEMPORARY, _RECORD_TEMPORARY)


def refresh_flat_names(
    checkpoints: Path, committed: CheckpointSet, before: Callable[[], Iterator[CheckpointSet]], storage: FileSystem
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


def give_room(checkpoints: Path, storage: FileSystem) -> int:
    """Remove every name that we wrote, for a set that finds no room; returns how many. The sets are untouched.

    Raises ``OSError``.
    """
    return _remove(checkpoints, read_record(checkpoints, storage), storage)


def remove_orphans(snapshot: Snapshot) -> None:
    """Remove the names that we wrote for sets that are gone, unless another program has rewritten them since.

    Raises ``OSError``.
    """
    record = read_record(snapshot.folder, snapshot.storage)
    committed = {folder.name for folder in snapshot.folders if snapshot.is_committed(folder)} if record else set()
    orphans = {name: written for name, written in record.items() if written.set_name not in committed}
    if _remove(snapshot.folder, orphans, snapshot.storage):
        logger.info("flat names of removed sets are removed: %s", ", ".join(sorted(orphans)))


def remove_names_of(checkpoints: Path, set_name: str, storage: FileSystem) -> None:
    """Remove the names that we wrote for one set, unless another program has rewritten them since.

    Raises ``OSError``.
    """
    record = read_record(checkpoints, storage)
    _remove(checkpoints, {name: one for name, one in record.items() if one.set_name == set_name}, storage)


def _remove(checkpoints: Path, names: Mapping[str, WrittenName], storage: FileSystem) -> int:
    ours = [name for name, written in names.items() if is_ours(checkpoints / name, written, storage)]
    # trainers first: without one, what is left beside it is no set
    for name in sorted(ours, key=lambda name: (not name.endswith("_trainer.th"), name)):
        storage.unlink(checkpoints / name)
    return len(ours)


def _refresh_tag(
    checkpoints: Path,
    committed: CheckpointSet,
    before: Callable[[], Iterator[CheckpointSet]],
    tag: str,
    storage: FileSystem,
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
    parsed = parse(file.name)
    if parsed is None:
        raise ValueError(f"{file.path} has no checkpoint name")
    return str(attrs.evolve(parsed, tag=tag))


def _replace(target: Path, source: Path, storage: FileSystem, *, linked: bool) -> None:
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


def _record(checkpoints: Path, committed: CheckpointSet, names: Iterable[str], storage: FileSystem) -> None:
    record = read_record(checkpoints, storage)
    for name in names:
        found = storage.identity_of(checkpoints / name)
        if found is not None:
            record[name] = WrittenName(committed.folder.name, *found)
    kept = {name: written for name, written in sorted(record.items()) if is_ours(checkpoints / name, written, storage)}
    temporary = checkpoints / _RECORD_TEMPORARY
    storage.unlink(temporary)
    with storage.open_write(temporary) as file:
        file.write(json.dumps({name: attrs.astuple(written) for name, written in kept.items()}, indent=0).encode())
    storage.rename(temporary, checkpoints / RECORD_NAME)
