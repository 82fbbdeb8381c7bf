"""What follows a commit: flat names for Noether, retention, and the collection of what a killed save left behind.

Everything here happens under the lock of the folder. No committed set depends on it: it may fail at any step, and the
next save makes up for it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import attrs

from noether_init_core.checkpoints.manifest import MANIFEST_NAME
from noether_init_core.checkpoints.names import parse
from noether_init_core.checkpoints.retention import Retention, superfluous_sets
from noether_init_core.checkpoints.sets import (
    SETS_FOLDER,
    CheckpointFile,
    CheckpointSet,
    check_files,
    list_names,
    load_set,
    set_folders,
)
from noether_init_core.checkpoints.storage import Storage
from noether_init_core.errors import CheckpointError

__all__ = ["collect_leftovers", "refresh_flat_names", "retire_sets"]

logger = logging.getLogger(__name__)

_TEMPORARY = ".noether-init-flat.tmp"


def collect_leftovers(checkpoints: Path, storage: Storage) -> None:
    """Remove folders of sets that were never committed; what cannot be removed is logged and left."""
    for folder in set_folders(checkpoints, storage):
        if not folder.committed:
            try:
                _remove_folder(checkpoints, folder.path, storage)
            except OSError as error:
                logger.warning("the unfinished set %s could not be removed: %s", folder.path, error)


def refresh_flat_names(checkpoints: Path, committed: CheckpointSet, storage: Storage) -> None:
    """Give the files of a committed set Noether's names in the folder of checkpoints.

    The names of its iteration are further names of the same files. Every other tag is rewritten by Noether in place,
    so its names are copies. There, the trainer's name goes first and comes back last: while there is a trainer file,
    everything beside it belongs to it.

    Raises ``OSError``.
    """
    storage.unlink(checkpoints / _TEMPORARY)
    own = str(committed.iteration)
    for file in committed.files:
        _replace(checkpoints / _flat_name(file, own), file.path, storage, linked=True)
    for tag in committed.tags:
        if tag != own:
            _refresh_tag(checkpoints, committed, tag, storage)


def _refresh_tag(checkpoints: Path, committed: CheckpointSet, tag: str, storage: Storage) -> None:
    previous = _holder_before(checkpoints, committed, tag, storage)
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


def _holder_before(checkpoints: Path, committed: CheckpointSet, tag: str, storage: Storage) -> CheckpointSet | None:
    """The set that the tag meant before; only names that it brought may be removed, others are not ours."""
    for folder in reversed(set_folders(checkpoints, storage)):
        if folder.committed and folder.sequence < (committed.sequence or 0):
            try:
                candidate = load_set(folder, storage)
            except CheckpointError as error:
                logger.warning("%s", error)
                continue
            if tag in candidate.tags:
                return candidate
    return None


def _flat_name(file: CheckpointFile, tag: str) -> str:
    parsed = parse(file.path.name)
    if parsed is None:
        raise ValueError(f"{file.path} has no checkpoint name")
    return str(attrs.evolve(parsed, tag=tag))


def _replace(target: Path, source: Path, storage: Storage, *, linked: bool) -> None:
    temporary = target.parent / _TEMPORARY
    if not storage.reflink(source, temporary) and not (linked and storage.hardlink(source, temporary)):
        storage.copy(source, temporary)
    storage.rename(temporary, target)
    # renaming one name of a file to another name of the same file does nothing at all
    storage.unlink(temporary)


def retire_sets(checkpoints: Path, rules: Retention, storage: Storage) -> None:
    """Remove the committed sets that no rule keeps, oldest first.

    Sets that cannot be read stay, since somebody will want to look at them. Whether a set is good is told from the
    presence and the sizes of its files.

    Raises ``OSError``.
    """
    folders = [folder for folder in set_folders(checkpoints, storage) if folder.committed]
    found: list[tuple[CheckpointSet, bool]] = []
    for folder in reversed(folders):
        try:
            candidate = load_set(folder, storage)
        except CheckpointError as error:
            logger.warning("kept: %s", error)
            continue
        found.append((candidate, _has_its_files(candidate, storage)))
    retired = superfluous_sets(found, rules)
    gone = {candidate.folder for candidate in retired}
    kept_names = {file.path.name for candidate, _ in found if candidate.folder not in gone for file in candidate.files}
    for candidate in reversed(retired):
        # Without its manifest the set is gone for every reader; only then do its files go.
        storage.unlink(candidate.folder / MANIFEST_NAME)
        storage.fsync_folder(candidate.folder)
        for name in {file.path.name for file in candidate.files} - kept_names:
            storage.unlink(checkpoints / name)
        _remove_folder(checkpoints, candidate.folder, storage)
    if retired:
        storage.fsync_folder(checkpoints / SETS_FOLDER)


def _has_its_files(candidate: CheckpointSet, storage: Storage) -> bool:
    try:
        check_files(candidate, storage)
    except CheckpointError as error:
        logger.warning("no good set: %s", error)
        return False
    return True


def _remove_folder(checkpoints: Path, folder: Path, storage: Storage) -> None:
    for name in list_names(folder, storage):
        # a flat name of a retired set keeps its bytes on the disk
        if parse(name) is not None and storage.is_same_file(checkpoints / name, folder / name):
            storage.unlink(checkpoints / name)
        storage.unlink(folder / name)
    storage.remove_folder(folder)
