"""What follows a commit: flat names for Noether, and the removal of unfinished saves and of sets that no rule keeps.

All of it happens under the lock of the folder. No committed set depends on it: it may fail at any step, and the next
save makes up for it. A record says which flat names are ours.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import attrs

from noether_init_core.errors import CheckpointError
from noether_init_core.files.storage.disk import FileSystem, is_out_of_reach
from noether_init_core.saving.retention import Retention, superfluous_sets
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointFile, CheckpointSet, SetFolder, list_names
from noether_init_core.sets.file_names import CheckpointFileName, parse
from noether_init_core.sets.flat_files import RECORD_NAME, WrittenName, is_ours, read_record
from noether_init_core.sets.manifest import MANIFEST_NAME
from noether_init_core.sets.snapshot import Snapshot

logger = logging.getLogger(__name__)

_TEMPORARY = ".noether-init-flat.tmp"
_RECORD_TEMPORARY = ".noether-init-flat.json.tmp"
# What a trainer file lies beside belongs to it, so that goes first and comes last.
_ORDER = ("model", "optim", "trainer")


def collect_leftovers(snapshot: Snapshot) -> None:
    """Remove folders of sets that were never committed, and temporary files; what cannot be is logged and left.

    A link is never followed: what it leads to is not ours.

    Raises ``CheckpointNotFoundError`` if whether a set was committed cannot be told.
    """
    storage, checkpoints = snapshot.storage, snapshot.folder
    for folder in snapshot.folders:
        if snapshot.is_committed(folder) or not storage.is_folder(folder.path):
            continue
        if storage.is_link(folder.path):
            logger.warning("left: %s has no manifest, and is a link to %s", folder.path, storage.resolve(folder.path))
            continue
        try:
            _remove_folder(checkpoints, folder.path, storage)
            snapshot.remove(folder)
        except OSError as error:
            logger.warning("the unfinished set %s could not be removed: %s", folder.path, error)
    for name in (_TEMPORARY, _RECORD_TEMPORARY):
        try:
            storage.unlink(checkpoints / name)
        except OSError as error:
            logger.warning("%s could not be removed: %s", checkpoints / name, error)


def retire_sets(snapshot: Snapshot, rules: Retention, training: str | None = None) -> None:
    """Remove the committed sets of one training that no rule keeps, oldest first.

    Sets that cannot be read or reached stay, since somebody will want to look at them; so do sets behind a link, since
    what it leads to is not ours, and sets of other trainings. Whether a set is good is told from the presence and the
    sizes of its files, and from what its manifest says of their values. A set that the snapshot remembers is taken as
    it was while no name in its folder changes. Before others go, they are looked at again, and the two newest good ones
    of each model, those that ``best`` keeps, and those that ``every`` keeps in their place; if one of these is not as
    it was, all are.

    Of flat names those go with a set that we wrote for it and nobody has changed since, and those that are other names
    of its very files. Others may be the only copy of what another program saved.

    Raises ``OSError``.
    """
    storage, checkpoints = snapshot.storage, snapshot.folder
    found: list[tuple[CheckpointSet, bool]] = []
    folders: dict[str, SetFolder] = {}
    for folder, candidate in snapshot.heads():
        if isinstance(candidate, CheckpointError):
            logger.warning("kept: %s", candidate)
            continue
        is_asked = candidate.manifest is not None and candidate.manifest.training == training
        problem = snapshot.problem_of(candidate) if is_asked else None
        if is_out_of_reach(problem):
            logger.warning("kept: %s", problem)
            continue
        if problem is not None:
            logger.warning("no good set: %s", problem)
        found.append((candidate, is_asked and problem is None))
        folders[folder.name] = folder
    decision = superfluous_sets(found, rules, training)
    retired = [candidate for candidate in decision.superfluous if not storage.is_link(candidate.folder)]
    if retired:
        # they may have been damaged or replaced since an earlier save
        remembered = [one for one in (*retired, *decision.relied_on) if one.place in snapshot.recalled]
        if not all([snapshot.confirm(folders[one.place]) for one in remembered]):  # noqa: C419 - each is looked at
            # where one was not as it was remembered, others may not be either
            snapshot.forget()
            retire_sets(snapshot, rules, training)
            return
    failed: OSError | None = None
    for candidate in reversed(retired):
        # Without its manifest the set is gone for every reader; only then do its files go.
        storage.unlink(candidate.folder / MANIFEST_NAME)
        storage.fsync_folder(candidate.folder)
        _remove_names(snapshot, candidate.folder.name.__eq__)
        try:
            _remove_folder(checkpoints, candidate.folder, storage)
        except OSError as error:
            failed = failed or error
    if retired:
        storage.fsync_folder(checkpoints / SETS_FOLDER)
    # the others have gone all the same
    if failed is not None:
        raise failed


def _remove_folder(checkpoints: Path, folder: Path, storage: FileSystem) -> None:
    for name in list_names(folder, storage):
        # a flat name of a retired set keeps its bytes on the disk
        if parse(name) is not None and storage.is_same_file(checkpoints / name, folder / name):
            storage.unlink(checkpoints / name)
        _remove(folder / name, storage)
    storage.remove_folder(folder)


def _remove(path: Path, storage: FileSystem) -> None:
    """A name in a set; also a folder that somebody put there, with all that is in it. A link is not followed."""
    if storage.is_folder(path) and not storage.is_link(path):
        for name in list_names(path, storage):
            _remove(path / name, storage)
        storage.remove_folder(path)
    else:
        storage.unlink(path)


# Flat names.


def refresh_flat_names(snapshot: Snapshot, committed: CheckpointSet) -> None:
    """Give the files of a committed set Noether's names in the folder of checkpoints.

    The names of its iteration are further names of the same files where that is safe, else copies. Every other tag is
    rewritten by Noether in place, so its names are copies. There, the trainer's name goes first and comes back last:
    while there is a trainer file, everything beside it belongs to it.

    Raises ``OSError``.
    """
    own = str(committed.iteration)
    names: list[str] = []
    try:
        for name, file in _flat_names(committed, own).items():
            _replace(snapshot.folder / name, file.path, snapshot.storage, linked=True)
            names.append(name)
        for tag in committed.tags:
            if tag != own:
                _refresh_tag(snapshot, committed, tag, names)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the telling one
            _record(snapshot, committed, names)
        raise
    _record(snapshot, committed, names)


def give_room(snapshot: Snapshot) -> int:
    """Remove every name that we wrote, for a set that finds no room; returns how many. The sets are untouched.

    Raises ``OSError``.
    """
    return len(_remove_names(snapshot, lambda set_name: True))


def remove_orphans(snapshot: Snapshot) -> None:
    """Remove the names that we wrote for sets that are gone, unless another program has rewritten them since.

    Raises ``OSError``.
    """
    committed = functools.cache(lambda: {folder.name for folder in snapshot.folders if snapshot.is_committed(folder)})
    removed = _remove_names(snapshot, lambda set_name: set_name not in committed())
    if removed:
        logger.info("flat names of removed sets are removed: %s", ", ".join(sorted(removed)))


def _remove_names(snapshot: Snapshot, of: Callable[[str], bool]) -> list[str]:
    """Remove the names that we wrote ``of`` sets, unless another program has rewritten them since; returns them."""
    storage, checkpoints = snapshot.storage, snapshot.folder
    record = read_record(checkpoints, storage)
    names = [name for name, one in record.items() if of(one.set_name) and is_ours(checkpoints / name, one, storage)]
    # trainers first: without one, what is left beside it is no set
    for name in sorted(names, key=lambda name: (not name.endswith("_trainer.th"), name)):
        storage.unlink(checkpoints / name)
    return names


def _refresh_tag(snapshot: Snapshot, committed: CheckpointSet, tag: str, written: list[str]) -> None:
    # Only names that the set brought which the tag meant before may be removed, and of these models: those of models
    # that are saved separately stay what the tag means of them.
    storage, checkpoints, models = snapshot.storage, snapshot.folder, committed.models()
    others = (one for one in snapshot.readable() if one.folder != committed.folder)
    previous = next((one for one in others if tag in one.tags and one.is_of(models)), None)
    names = _flat_names(committed, tag)
    stale = {} if previous is None else _flat_names(previous, tag)
    for name, file in reversed(_in_order({**stale, **names})):
        if file.part != "model" or name not in names:
            storage.unlink(checkpoints / name)
    for name, file in _in_order(names):
        _replace(checkpoints / name, file.path, storage, linked=False)
        written.append(name)


def _flat_names(found: CheckpointSet, tag: str) -> dict[str, CheckpointFile]:
    """The names of the files of a set under a tag."""
    return {str(CheckpointFileName(file.model, file.info, tag, file.part)): file for file in found.files}


def _in_order(names: Mapping[str, CheckpointFile]) -> list[tuple[str, CheckpointFile]]:
    return sorted(names.items(), key=lambda item: (_ORDER.index(item[1].part), item[0]))


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


def _record(snapshot: Snapshot, committed: CheckpointSet, names: Iterable[str]) -> None:
    storage, checkpoints = snapshot.storage, snapshot.folder
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
