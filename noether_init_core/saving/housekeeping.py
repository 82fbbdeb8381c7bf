"""Clean up around a save: flat names for Noether, removal of unfinished saves, removal of sets that no rule keeps.

All steps run under the lock of the folder. No committed set depends on them: if a step fails, the next save repeats it.
A record file lists the flat names that this package wrote.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from noether_init_core.errors import CheckpointError
from noether_init_core.files.storage.disk import FileSystem, is_out_of_reach, naming
from noether_init_core.messages import logger_of
from noether_init_core.saving.retention import Retention, superfluous_sets
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointFile, CheckpointSet, SetFolder, list_names
from noether_init_core.sets.file_names import CheckpointFileName, parse
from noether_init_core.sets.flat_files import RECORD_NAME, WrittenName, is_ours, read_record
from noether_init_core.sets.manifest import MANIFEST_NAME
from noether_init_core.sets.snapshot import Snapshot

logger = logger_of(__name__)

_TEMPORARY = re.compile(r"\.noether-init-flat\.(.*\.)?tmp")
_RECORD_TEMPORARY = ".noether-init-flat.json.tmp"
# Noether takes all files beside a trainer file of a tag as one set. So the trainer file is removed first and written
# last; in between, a reader finds no set instead of a mixed one.
_ORDER = ("model", "optim", "trainer")


def collect_leftovers(snapshot: Snapshot) -> None:
    """Remove folders of sets that were never committed, and temporary files; failures are logged.

    Links are not followed, because their targets may belong to others.

    Raises ``CheckpointUnreachableError`` if the disk does not answer whether a set was committed.
    """
    storage, checkpoints = snapshot.storage, snapshot.folder
    for folder in snapshot.folders:
        if snapshot.is_committed(folder) or not storage.is_folder(folder.path):
            continue
        if storage.is_link(folder.path):
            logger.warning(
                "not removed: %s has no manifest and is a link to %s", folder.path, storage.resolve(folder.path)
            )
            continue
        try:
            _remove_folder(checkpoints, folder.path, storage)
            snapshot.remove(folder)
        except OSError as error:
            logger.warning("the unfinished set %s could not be removed: %s", folder.path, error)
    for name in filter(_TEMPORARY.fullmatch, list_names(checkpoints, storage)):
        try:
            storage.unlink(checkpoints / name)
        except OSError as error:
            logger.warning("%s could not be removed: %s", checkpoints / name, error)


def retire_sets(snapshot: Snapshot, rules: Retention, training: str | None = None) -> None:
    """Remove the committed sets of one training that no rule keeps, oldest first.

    These sets stay: sets that cannot be read, so that a person can inspect them; sets behind a link, because the target
    may belong to others; sets of other trainings. A set counts as good by the presence and sizes of its files and by
    the recorded values in its manifest.

    The snapshot remembers sets of earlier saves and uses them unchanged while no name in their folder changes. Before
    sets are removed, the remembered ones among them are read again, and so are those that the decision relies on: the
    two newest good sets of each model, and the sets that ``best`` and ``every`` keep. If one differs, all are read
    again and the decision is repeated.

    With a set, those flat names are removed that this package wrote for it and no other program has changed since, and
    hard links to its files. Other flat names may be the only copy of a save by another program.

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
            logger.warning("not counted by retention: %s", problem)
        found.append((candidate, is_asked and problem is None))
        folders[folder.name] = folder
    decision = superfluous_sets(found, rules, training)
    retired = [candidate for candidate in decision.superfluous if not storage.is_link(candidate.folder)]
    if retired:
        # These sets may have been damaged or replaced since the save at which they were read.
        remembered = [one for one in (*retired, *decision.relied_on) if one.place in snapshot.recalled]
        if not all([snapshot.confirm(folders[one.place]) for one in remembered]):  # noqa: C419 - confirm every set
            # If one set differs from memory, others may differ too.
            snapshot.forget()
            retire_sets(snapshot, rules, training)
            return
    failed: OSError | None = None
    for candidate in reversed(retired):
        # Without its manifest the set does not exist for any reader. Its files are removed only after that is on the
        # disk: a crash in between must not leave a committed set with missing files.
        storage.unlink(candidate.folder / MANIFEST_NAME)
        storage.fsync_folder(candidate.folder)
        _remove_names(snapshot, candidate.folder.name.__eq__)
        try:
            _remove_folder(checkpoints, candidate.folder, storage)
        except OSError as error:
            failed = failed or error
    if retired:
        storage.fsync_folder(checkpoints / SETS_FOLDER)
    # One failure must not keep the other sets on a disk that may be full.
    if failed is not None:
        raise failed


def _remove_folder(checkpoints: Path, folder: Path, storage: FileSystem) -> None:
    for name in list_names(folder, storage):
        # A flat name may be a hard link to the file, which would keep its bytes on the disk. Behind a symbolic link, on
        # either side, may be the only copy of another program.
        flat, own = checkpoints / name, folder / name
        is_linked = storage.is_link(flat) or storage.is_link(own)
        if parse(name) is not None and not is_linked and storage.is_same_file(flat, own):
            storage.unlink(flat)
        _remove(own, storage)
    storage.remove_folder(folder)


def _remove(path: Path, storage: FileSystem) -> None:
    """Remove a name in the folder of a set; a foreign folder is removed recursively, without following links."""
    if storage.is_folder(path) and not storage.is_link(path):
        for name in list_names(path, storage):
            _remove(path / name, storage)
        storage.remove_folder(path)
    else:
        storage.unlink(path)


# Flat names.


def refresh_flat_names(snapshot: Snapshot, committed: CheckpointSet) -> None:
    """Write Noether's flat names for the files of a committed set into the folder of checkpoints.

    The names with the iteration as tag are reflinks or hard links if that is safe, else copies. Names with other tags
    are copies, because Noether rewrites such files in place. Their trainer file is removed first and written last,
    because Noether takes all files beside a trainer file as one set.

    A file that this package did not write, or that has changed since, is not replaced: it may be the only copy of a
    save by another program. The files of its tag are left as they are, with a warning.

    Raises ``OSError``.
    """
    own, checkpoints, storage = str(committed.iteration), snapshot.folder, snapshot.storage
    # Names that were removed or changed since are dropped from the record.
    record = read_record(checkpoints, storage)
    record = {name: one for name, one in record.items() if is_ours(checkpoints / name, one, storage)}
    for tag in (own, *(tag for tag in committed.tags if tag != own)):
        _refresh_tag(snapshot, committed, tag, record, linked=tag == own)


def give_room(snapshot: Snapshot) -> int:
    """Remove every flat name that this package wrote, to free space for a set; return their number.

    The sets stay. Raises ``OSError``.
    """
    return len(_remove_names(snapshot, lambda set_name: True))


def remove_orphans(snapshot: Snapshot) -> None:
    """Remove flat names of sets that no longer exist, unless another program has rewritten them since.

    Raises ``OSError``.
    """
    committed = functools.cache(lambda: {folder.name for folder in snapshot.folders if snapshot.is_committed(folder)})
    removed = _remove_names(snapshot, lambda set_name: set_name not in committed())
    if removed:
        logger.info("removed flat names of removed sets: %s", ", ".join(sorted(removed)))


def _remove_names(snapshot: Snapshot, of: Callable[[str], bool]) -> list[str]:
    """Remove recorded flat names of sets selected by ``of``, unless another program rewrote them; return them."""
    storage, checkpoints = snapshot.storage, snapshot.folder
    record = read_record(checkpoints, storage)
    names = [name for name, one in record.items() if of(one.set_name) and is_ours(checkpoints / name, one, storage)]
    # Trainer files first: without one, the files that remain are not a set for Noether.
    for name in sorted(names, key=lambda name: (not name.endswith("_trainer.th"), name)):
        storage.unlink(checkpoints / name)
    return names


def _refresh_tag(
    snapshot: Snapshot, committed: CheckpointSet, tag: str, record: dict[str, WrittenName], *, linked: bool
) -> None:
    """Write the names of one tag. ``record``: the names of this package that are unchanged, which is updated."""
    storage, checkpoints, models = snapshot.storage, snapshot.folder, committed.models()
    names = _flat_names(committed, tag)
    stale: dict[str, CheckpointFile] = {}
    if not linked:
        # Names of the set that had this tag before, with the same models. Models that are saved separately under the
        # same tag keep their files.
        others = (one for one in snapshot.readable() if one.folder != committed.folder)
        previous = next((one for one in others if tag in one.tags and one.is_of(models)), None)
        stale = {} if previous is None else _flat_names(previous, tag)
    before = [name for name, _file in reversed(_in_order({**stale, **names}))]
    for name in before:
        if name not in record and storage.exists(checkpoints / name):
            _tell_of_foreign(checkpoints / name, tag)
            return
    for name in before:
        # Another program may have written it since.
        if name in record and is_ours(checkpoints / name, record.pop(name), storage):
            storage.unlink(checkpoints / name)
    temporaries: dict[str, Path] = {}
    try:
        for number, (name, file) in enumerate(_in_order(names)):
            temporaries[name] = checkpoints / f".noether-init-flat.{number}.tmp"
            _copy(file.path, temporaries[name], storage, linked=linked)
            found = storage.identity_of(temporaries[name])
            if found is not None:
                record[name] = WrittenName(committed.folder.name, *found)
        # Recorded first: a name that appears without its record would be taken for that of another program.
        _write_record(checkpoints, record, storage)
        for name, temporary in temporaries.items():
            if not storage.rename_new(temporary, checkpoints / name):
                _tell_of_foreign(checkpoints / name, tag)
                break
    finally:
        # On a full disk, a partial copy would take the space that the next save needs. The first error is the cause, so
        # a second one is suppressed.
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                storage.unlink(temporary)


def _tell_of_foreign(path: Path, tag: str) -> None:
    logger.warning(
        "%s was written or changed by another program and is not replaced; the flat files of %s stay as they are. "
        "Next: remove them if they are not needed, or use another run_id",
        path,
        tag,
    )


def _flat_names(found: CheckpointSet, tag: str) -> dict[str, CheckpointFile]:
    """Return flat name under ``tag`` -> file, for the files of a set."""
    return {str(CheckpointFileName(file.model, file.info, tag, file.part)): file for file in found.files}


def _in_order(names: Mapping[str, CheckpointFile]) -> list[tuple[str, CheckpointFile]]:
    return sorted(names.items(), key=lambda item: (_ORDER.index(item[1].part), item[0]))


def _copy(source: Path, target: Path, storage: FileSystem, *, linked: bool) -> None:
    if not storage.reflink(source, target) and not (linked and storage.hardlink(source, target)):
        storage.copy(source, target)


def _write_record(checkpoints: Path, record: Mapping[str, WrittenName], storage: FileSystem) -> None:
    """Write the record of flat names, and flush it to the disk."""
    temporary = checkpoints / _RECORD_TEMPORARY
    storage.unlink(temporary)
    with naming(temporary), storage.open_write(temporary) as file:
        file.write(json.dumps({name: attrs.astuple(one) for name, one in sorted(record.items())}, indent=0).encode())
        storage.fsync(file)
    storage.rename(temporary, checkpoints / RECORD_NAME)
    storage.fsync_folder(checkpoints)
