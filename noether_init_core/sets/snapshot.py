"""Snapshot: the checkpoints of one run and stage at one moment."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import CheckpointError, CheckpointNotFoundError
from noether_init_core.files.storage.disk import LOCAL, FileSystem, reaching
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import logger_of
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import (
    SETS_FOLDER,
    CheckpointFile,
    CheckpointSet,
    SetFolder,
    check_files,
    check_reachable,
    load_set,
    set_folders,
)
from noether_init_core.sets.file_names import FOLLOWING, Part
from noether_init_core.sets.flat_files import flat_copies, iteration_in, legacy_sets, plain_before
from noether_init_core.sets.manifest import MANIFEST_NAME

logger = logger_of(__name__)

#: A committed set, or the error of reading its manifest.
Head = CheckpointSet | CheckpointError


@attrs.define(eq=False)
class _Known:
    """A committed set as it was read at ``looked_ns``, with the modification time ``changed_ns`` of its folder."""

    folder: SetFolder
    changed_ns: int
    looked_ns: int
    identity: tuple[int, int] | None
    head: CheckpointSet | None = None
    is_whole: bool = False

    @classmethod
    def of(cls, folder: SetFolder, storage: FileSystem) -> _Known | None:
        """Create it, before the set is read; None if the name is not a folder."""
        looked_ns = time.time_ns()
        with reaching(folder.path):
            (changed_ns,) = storage.changed_in(folder.parent, [folder.name])
        with reaching(folder.manifest_path):
            identity = storage.identity_of(folder.manifest_path)
        return None if changed_ns is None else cls(folder, changed_ns, looked_ns, identity)

    def holds(self, changed_ns: int | None, storage: FileSystem) -> bool:
        """Whether the set is unchanged, judged by the modification time of its folder."""
        if changed_ns != self.changed_ns:
            return False
        # Time stamps of file systems have steps of milliseconds, old ones of seconds. A change within one step after
        # the set was read does not show, so within that time the manifest is compared, too.
        tick_ns = 2_000_000_000 if self.changed_ns % 1_000_000_000 == 0 else 20_000_000
        if self.looked_ns - self.changed_ns > tick_ns:
            return True
        now = _Known.of(self.folder, storage)
        if now is None or now.identity != self.identity:
            return False
        self.looked_ns, self.is_whole = now.looked_ns, False
        return True


class Memory(dict[str, _Known]):
    """A cache of the committed sets of one folder, for a writer, which needs them at every save.

    An entry is valid while no file is added to its folder, removed or renamed. Later changes of bytes are not detected,
    so before sets are removed, ``Snapshot.confirm`` reads the important ones again.
    """

    folder: Path | None = None

    def of(self, folder: Path) -> Memory:
        """Return itself, cleared if it was of another folder, such as after a change of the working directory."""
        if self.folder != folder:
            self.clear()
            self.folder = folder
        return self

    def recall(self, folders: Iterable[SetFolder], storage: FileSystem) -> None:
        """Drop the entries of sets that were removed or whose folders have changed."""
        known = [self[folder.name] for folder in folders if folder.name in self]
        if known:
            parent = known[0].folder.parent
            with reaching(parent):
                changed = storage.changed_in(parent, [one.folder.name for one in known])
            known = [one for one, now in zip(known, changed, strict=True) if one.holds(now, storage)]
        self.clear()
        self.update((one.folder.name, one) for one in known)


class Snapshot:
    """The checkpoints of one run and stage at one moment; read only.

    The constructor lists the folder of sets. Manifests and flat files are read at the first use, newest first, and
    cached. Results depend on names and contents only, never on the order of a directory listing. Create a new snapshot
    for each question; any rank may. Methods are not thread-safe.

    Args:
        paths: The run and stage; any object with ``output_root``, ``run_id`` and ``stage_name``.
        storage: The file operations.
        memory: A cache that is shared with earlier snapshots of the folder.

    Raises ``CheckpointUnreachableError`` if the folder cannot be read, such as a dangling link; a missing folder is
    empty.
    """

    def __init__(self, paths: Any, *, storage: FileSystem = LOCAL, memory: Memory | None = None) -> None:
        self.paths = PathProvider.of(paths)
        self.storage = storage
        check_reachable(self.paths.checkpoint_path, storage)
        #: The folder of checkpoints, symbolic links resolved; it may not exist.
        with reaching(self.paths.checkpoint_path):
            self.folder: Path = storage.resolve(self.paths.checkpoint_path)
        known = {} if memory is None else {name: one.folder for name, one in memory.of(self.folder).items()}
        #: All folders with the name of a set, oldest first, including those without a manifest.
        self.folders = tuple(set_folders(self.folder, storage, known))
        self._memory = memory
        if memory:
            memory.recall(self.folders, storage)
        #: Names of sets whose cached entries were not confirmed.
        self.recalled = set(memory or ())
        remembered: Mapping[str, _Known] = memory or {}
        self._heads: dict[str, Head | None] = {
            name: known.head for name, known in remembered.items() if known.head is not None
        }
        self._problems: dict[str, CheckpointError | None] = {
            name: None for name, known in remembered.items() if known.is_whole
        }
        self._flat_before: dict[str, tuple[CheckpointSet, ...]] = {}
        self._iterations: dict[str, TrainingIteration | CheckpointError | None] = {}

    # Committed sets.

    def head(self, folder: SetFolder) -> Head | None:
        """Return the set in a folder, or the error of reading its manifest; None for an uncommitted folder."""
        if folder.name not in self._heads:
            known = self._known(folder)
            found = known.head if known is not None and known.head is not None else self._read(folder)
            if known is not None and self._memory is not None and isinstance(found, CheckpointSet):
                known.head, self._memory[folder.name] = found, known  # errors are not cached: they may be temporary
            self._heads[folder.name] = found
        return self._heads[folder.name]

    def is_committed(self, folder: SetFolder) -> bool:
        """Whether a manifest exists, even a damaged one. Raises ``CheckpointUnreachableError`` if the disk fails."""
        if folder.name in self._heads:
            return self._heads[folder.name] is not None
        if self._memory is not None and folder.name in self._memory:
            return True
        known = self._known(folder)
        is_committed = folder.is_committed(self.storage)
        if is_committed and known is not None and self._memory is not None:
            self._memory[folder.name] = known
        return is_committed

    def confirm(self, folder: SetFolder) -> bool:
        """Read a cached set again; return False if its manifest has changed or its files have other sizes."""
        before = self._heads[folder.name]
        if folder.name in self.recalled and self._memory is not None:
            self.recalled.remove(folder.name)
            del self._memory[folder.name], self._heads[folder.name]
            self._problems.pop(folder.name, None)
        found = self.head(folder)
        if not isinstance(found, CheckpointSet) or not isinstance(before, CheckpointSet):
            return False
        return found.manifest == before.manifest and self.problem_of(found) is None

    def forget(self) -> None:
        """Drop all cached entries, so that sets are read again at the next use."""
        for name in self.recalled:
            self._heads.pop(name, None)
            self._problems.pop(name, None)
            if self._memory is not None:
                self._memory.pop(name, None)
        self.recalled.clear()

    def _known(self, folder: SetFolder) -> _Known | None:
        """Return the cache entry of a set, or a new one to fill; None without a cache."""
        if self._memory is None:
            return None
        return self._memory.get(folder.name) or _Known.of(folder, self.storage)

    def _read(self, folder: SetFolder) -> Head | None:
        try:
            return load_set(folder, self.storage)
        except CheckpointError as error:
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return error
        if not folder.is_committed(self.storage):
            return None
        # The set was committed between both reads; or the manifest is a dangling link, which counts as damaged.
        try:
            return load_set(folder, self.storage)
        except CheckpointError as error:
            return error

    def add(self, name: str) -> CheckpointSet:
        """Add a set that was just committed, as the newest. Raises ``CheckpointError`` for a bad manifest."""
        folder = SetFolder.of(self.folder / SETS_FOLDER, name)
        found = None if folder is None else self.head(folder)
        if folder is None or not isinstance(found, CheckpointSet):
            if isinstance(found, CheckpointError):
                raise found
            path = self.folder / SETS_FOLDER / name
            raise CheckpointNotFoundError(f"{MANIFEST_NAME} not found in {path}", path=path)
        self.folders = (*self.folders, folder)
        return found

    def remove(self, folder: SetFolder) -> None:
        """Remove a folder that was just deleted."""
        self.folders = tuple(one for one in self.folders if one.name != folder.name)

    def heads(
        self, iteration: TrainingIteration | None = None, *, below: int | None = None
    ) -> Iterator[tuple[SetFolder, Head]]:
        """Yield the committed sets, newest first; each is read when it is needed.

        Args:
            iteration: Only sets that match its specified fields.
            below: Only sets of a lower sequence.
        """
        for folder in reversed(self.folders):
            if (iteration is None or iteration.matches(folder.iteration)) and (
                below is None or folder.sequence < below
            ):
                found = self.head(folder)
                if found is not None:
                    yield folder, found

    def readable(self, *, below: int | None = None) -> Iterator[CheckpointSet]:
        """Yield the committed sets with a valid manifest, newest first; ``below``: only those of a lower sequence."""
        return (found for _folder, found in self.heads(below=below) if isinstance(found, CheckpointSet))

    @property
    def newest_folder(self) -> SetFolder | None:
        """The newest folder with a manifest, even a damaged one; None if no set was committed."""
        return next((folder for folder, _found in self.heads()), None)

    def problem_of(self, found: CheckpointSet) -> CheckpointError | None:
        """Return the problem of the files of a committed set, judged by presence and size; else None."""
        place = found.place
        if place not in self._problems:
            try:
                check_files(found, self.storage)
                self._problems[place] = None
            except CheckpointError as error:
                self._problems[place] = error
            known = None if self._memory is None else self._memory.get(place)
            if known is not None:
                known.is_whole = self._problems[place] is None
        return self._problems[place]

    def newest_good(self, models: Collection[str], below: int) -> CheckpointSet | None:
        """Return the newest committed set of any of ``models`` with all files and a sequence lower than ``below``."""
        sets = (found for found in self.readable(below=below) if found.is_of(models))
        return next((found for found in sets if self.problem_of(found) is None), None)

    def older_good(self, found: CheckpointSet) -> CheckpointSet | None:
        """Return the newest set of the same models before ``found`` with all files; for flat files by iteration."""
        if found.committed:
            return self.newest_good(found.models(), found.sequence or 0)
        return next((one for one in self.flat_before(found) if one.models("trainer")), None)

    def is_current(self) -> bool:
        """Whether no set was committed or removed since the snapshot was created."""
        seen = {folder.name: folder for folder in self.folders}
        if {folder.name for folder in set_folders(self.folder, self.storage, seen)} != seen.keys():
            return False
        return all((head is not None) == seen[name].is_committed(self.storage) for name, head in self._heads.items())

    @property
    def saw_unfinished(self) -> bool:
        """Whether an uncommitted folder was seen: a save in progress, or an interrupted one."""
        return None in self._heads.values()

    # Flat files.

    @cached_property
    def flat(self) -> tuple[CheckpointSet, ...]:
        """Flat files by tag: latest iteration first, plain tags before suffixed ones; then other tags."""
        return tuple(legacy_sets(self.folder, self.storage))

    def iteration_of(self, found: CheckpointSet) -> TrainingIteration | None:
        """Return the iteration of a set from its name, else from its trainer file, else from weights; or None.

        Raises errors of the reader, ``CheckpointFormatError`` for an invalid iteration.
        """
        if found.iteration is not None:
            return found.iteration
        if found.name not in self._iterations:
            try:
                self._iterations[found.name] = iteration_in(found)
            except CheckpointError as error:
                self._iterations[found.name] = error
        recorded = self._iterations[found.name]
        if isinstance(recorded, CheckpointError):
            raise recorded
        return recorded

    def flat_before(self, found: CheckpointSet) -> tuple[CheckpointSet, ...]:
        """Return the other flat sets with plain tags ``E.._U.._S..`` that are not later than the files of ``found``."""
        if found.name not in self._flat_before:
            self._flat_before[found.name] = tuple(plain_before(self.flat, found))
        return self._flat_before[found.name]

    @cached_property
    def later_flat(self) -> list[tuple[CheckpointSet, TrainingIteration]]:
        """Flat files that another program wrote, of later iterations than the newest committed set.

        Unchanged copies that this package wrote belong to a removed set and are ignored.
        """
        newest = self.newest_folder
        if newest is None or not self.flat:
            return []
        copies = flat_copies(self.folder, self.storage)
        removed: set[str] = set()
        later: list[tuple[CheckpointSet, TrainingIteration]] = []
        for flat in self.flat:
            iteration = flat.iteration
            if iteration is None and flat.name in FOLLOWING:
                try:
                    iteration = self.iteration_of(flat)
                except CheckpointError as error:
                    # It may be a copy for Noether that a crash left incomplete, so the committed sets stay valid.
                    logger.warning("%s beside committed sets cannot be read: %s", flat.name, error)
            if iteration is None or not iteration.is_fully_specified or iteration <= newest.iteration:
                continue
            same = (folder for folder in self.folders if folder.iteration == iteration)
            if any(map(self.is_committed, same)):
                continue
            known = [copies[file.name] for file in flat.files if file.name in copies]
            if len(known) < len(flat.files):
                later.append((flat, iteration))
            else:
                removed.update(known)
        if removed:
            logger.warning(
                "%s: flat files of %s are copies of a removed set and are ignored; the newest committed set is %s",
                self.folder,
                ", ".join(sorted(removed)),
                newest.name,
            )
        return later

    def newest_flat(
        self, models: Collection[str] = (), unreadable: list[tuple[str, CheckpointError]] | None = None
    ) -> CheckpointSet | None:
        """Return the flat set of the latest iteration that has trainer files of ``models``, or any trainer file.

        Sets whose iteration cannot be read are added to ``unreadable``; without it, the error is raised.
        """
        preferred = [one for one in self.flat if one.models("trainer") and set(models) <= set(one.models("trainer"))]
        preferred.sort(key=lambda one: FOLLOWING.index(one.name) if one.name in FOLLOWING else 2)
        preferred.sort(key=lambda one: one.iteration is None)
        dated: list[tuple[CheckpointSet, TrainingIteration]] = []
        for one in preferred:
            try:
                iteration = self.iteration_of(one)
            except CheckpointError as error:
                if unreadable is None:
                    raise
                unreadable.append((one.name, error))
                continue
            if iteration is not None and iteration.is_fully_specified:
                dated.append((one, iteration))
        # max() returns the first of equal iterations, so the order above decides.
        return max(dated, key=lambda pair: pair[1], default=(None,))[0]

    def is_begun(self) -> bool:
        """Whether the run has a set to resume, even a broken one; uncommitted saves do not count."""
        return self.newest_folder is not None or any(one.models("trainer") for one in self.flat)

    # Lists for commands and messages; these methods read every manifest.

    def sets(self) -> tuple[CheckpointSet, ...]:
        """Return all sets, oldest first; a set with an unreadable manifest is in ``broken()`` instead.

        If committed sets exist, these in the order of their commits. Otherwise the sets of flat files: iteration tags
        in order, then other tags.
        """
        if self.newest_folder is not None:
            return tuple(self.readable())[::-1]
        known = [one for one in self.flat if one.iteration is not None]
        return (*reversed(known), *(one for one in self.flat if one.iteration is None))

    def broken(self) -> tuple[CheckpointError, ...]:
        """Return the problem of each broken committed set, newest first: of its manifest, or of its files."""
        problems = (
            found if isinstance(found, CheckpointError) else self.problem_of(found) for _folder, found in self.heads()
        )
        return tuple(problem for problem in problems if problem is not None)

    def uncommitted(self) -> tuple[str, ...]:
        """Return the folders without a manifest, from interrupted or running saves; they are never selected."""
        return tuple(
            folder.name
            for folder in self.folders
            if not self.is_committed(folder) and self.storage.is_folder(folder.path)
        )

    def tags(self) -> tuple[str, ...]:
        """Return all tags, sorted."""
        return tuple(sorted({tag for one in self.sets() for tag in one.tags}))

    @cached_property
    def selected_by(self) -> Mapping[str, tuple[str, ...]]:
        """Place of each set -> the tags that select it; its other tags select a later set of its models."""
        holders: dict[str, dict[tuple[str, ...], CheckpointSet]] = {}
        found = {}
        for one in reversed(self.sets()):
            models = one.models()
            later = {tag: holders.setdefault(tag, {}) for tag in one.tags}
            found[one.place] = tuple(
                tag for tag in one.tags if not any(other.is_of(models) for other in later[tag].values())
            )
            for tag in one.tags:
                later[tag].setdefault(models, one)
        return found

    def parts(self) -> tuple[tuple[str, Part], ...]:
        """Return model and part of every plain file of all sets, sorted.

        The newest manifest records the files of earlier sets, so others are read only if it lacks some of these itself.
        """
        newest = next((found for _folder, found in self.heads()), None)
        if isinstance(newest, CheckpointSet) and newest.manifest is not None:
            own = _parts_of(newest.files)
            if own >= set(newest.manifest.seen):
                return tuple(sorted(own))
        return tuple(sorted(_parts_of(file for one in self.sets() for file in one.files)))

    def trainer_names(self) -> tuple[str, ...]:
        """Return the models with trainer files, sorted."""
        return tuple(model for model, part in self.parts() if part == "trainer")


def _parts_of(files: Iterable[CheckpointFile]) -> set[tuple[str, Part]]:
    return {(file.model, file.part) for file in files if file.info is None}
