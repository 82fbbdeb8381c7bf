"""What is removed from a folder of checkpoints: unfinished saves, and sets that no rule keeps.

It is removed under the lock of the folder. No committed set depends on it: it may fail at any step, and the next save
makes up for it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from noether_init_core.errors import CheckpointError
from noether_init_core.files.storage.disk import FileSystem, is_out_of_reach
from noether_init_core.saving.flat_names import TEMPORARY_NAMES, remove_names_of
from noether_init_core.saving.retention import Retention, superfluous_sets
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointSet, SetFolder, list_names
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.manifest import MANIFEST_NAME
from noether_init_core.sets.snapshot import Snapshot

logger = logging.getLogger(__name__)


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
    for name in TEMPORARY_NAMES:
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
    of each model, those that ``best`` keeps, and those that ``every`` keeps in their place.

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
            retire_sets(snapshot, rules, training)
            return
    failed: OSError | None = None
    for candidate in reversed(retired):
        # Without its manifest the set is gone for every reader; only then do its files go.
        storage.unlink(candidate.folder / MANIFEST_NAME)
        storage.fsync_folder(candidate.folder)
        remove_names_of(checkpoints, candidate.folder.name, storage)
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
