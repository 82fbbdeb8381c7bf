"""Snapshot: the checkpoints of one run and stage, looked at once for a question."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import CheckpointError, CheckpointNotFoundError
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import (
    SETS_FOLDER,
    CheckpointFile,
    CheckpointSet,
    SetFolder,
    check_files,
    check_reachable,
    load_set,
    reaching,
    set_folders,
)
from noether_init_core.sets.file_names import FOLLOWING, Part
from noether_init_core.sets.flat_files import flat_copies, iteration_in, legacy_sets, plain_before
from noether_init_core.sets.manifest import MANIFEST_NAME

logger = logging.getLogger(__name__)

#: A committed set, or why its manifest cannot be used.
Head = CheckpointSet | CheckpointError


@attrs.define(eq=False)
class _Known:
    """A committed set as it was at ``looked_ns``, when its folder had last changed at ``changed_ns``."""

    folder: SetFolder
    changed_ns: int
    looked_ns: int
    identity: tuple[int, int] | None
    head: CheckpointSet | None = None
    is_whole: bool = False

    @classmethod
    def of(cls, folder: SetFolder, storage: FileSystem) -> _Known | None:
        """To be called before the set is looked at; None for what is not remembered."""
        looked_ns = time.time_ns()
        with reaching(folder.path):
            (changed_ns,) = storage.changed_in(folder.parent, [folder.name])
        with reaching(folder.manifest_path):
            identity = storage.identity_of(folder.manifest_path)
        return None if changed_ns is None else cls(folder, changed_ns, looked_ns, identity)

    def holds(self, changed_ns: int | None, storage: FileSystem) -> bool:
        """Whether the set is as it was, as far as the time at which names in its folder last changed tells."""
        if changed_ns != self.changed_ns:
            return False
        # clocks of file systems tick in milliseconds, old ones in seconds: a further change may not show
        tick_ns = 2_000_000_000 if self.changed_ns % 1_000_000_000 == 0 else 20_000_000
        if self.looked_ns - self.changed_ns > tick_ns:
            return True
        now = _Known.of(self.folder, storage)
        if now is None or now.identity != self.identity:
            return False
        self.looked_ns, self.is_whole = now.looked_ns, False
        return True


class Memory(dict[str, _Known]):
    """What is known of the committed sets of one folder: for a writer, which looks at them at every save.

    A set is remembered while nothing is added to its folder, removed from it or renamed in it. That bytes of a file
    were cut off or changed since is not noticed: what must not be wrong is confirmed (``Snapshot.confirm``).
    """

    folder: Path | None = None

    def of(self, folder: Path) -> Memory:
        """Itself; empty if it was of another folder, as after a link was changed, or the working directory."""
        if self.folder != folder:
            self.clear()
            self.folder = folder
        return self

    def recall(self, folders: Iterable[SetFolder], storage: FileSystem) -> None:
        """Forget the sets that are gone, and those whose folders have changed."""
        known = [self[folder.name] for folder in folders if folder.name in self]
        if known:
            parent = known[0].folder.parent
            with reaching(parent):
                changed = storage.changed_in(parent, [one.folder.name for one in known])
            known = [one for one, now in zip(known, changed, strict=True) if one.holds(now, storage)]
        self.clear()
        self.update((one.folder.name, one) for one in known)


class Snapshot:
    """The checkpoints of one run and stage: names at once, everything else when it is asked for, and only once.

    The folder of sets is listed when the snapshot is made. Manifests are read newest first as they are needed, and
    remembered; so is what was found out of flat files. Answers depend on names and contents only, never on the order in
    which a folder lists its entries. Nothing is created. It is of one moment: for the next question make a new one.

    Args:
        paths: The run and stage; anything with ``output_root``, ``run_id`` and ``stage_name``.
        storage: The file operations.
        memory: What earlier snapshots of the folder have found out, which is not looked up again.

    Raises ``CheckpointNotFoundError`` if the folder cannot be reached: a link that leads nowhere is no empty folder.
    """

    def __init__(self, paths: Any, *, storage: FileSystem = LOCAL, memory: Memory | None = None) -> None:
        self.paths = PathProvider.of(paths)
        self.storage = storage
        check_reachable(self.paths.checkpoint_path, storage)
        #: The folder of the checkpoints, symbolic links resolved. It may not exist.
        self.folder: Path = storage.resolve(self.paths.checkpoint_path)
        known = {} if memory is None else {name: one.folder for name, one in memory.of(self.folder).items()}
        #: By name, oldest first; those without a manifest are among them.
        self.folders = tuple(set_folders(self.folder, storage, known))
        self._memory = memory
        if memory:
            memory.recall(self.folders, storage)
        #: Names of sets of which what is remembered has not been confirmed.
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
        """The set in a folder, or why its manifest cannot be used; None where no save was finished."""
        if folder.name not in self._heads:
            known = self._known(folder)
            found = known.head if known is not None and known.head is not None else self._read(folder)
            if known is not None and self._memory is not None and isinstance(found, CheckpointSet):
                known.head, self._memory[folder.name] = found, known
            self._heads[folder.name] = found
        return self._heads[folder.name]

    def is_committed(self, folder: SetFolder) -> bool:
        """Whether it has a manifest, be it a damaged one. Raises ``CheckpointNotFoundError`` if that cannot be told."""
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
        """Look again at a set that was remembered; False if it is another one by now, or not as it was written."""
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
        """Take nothing as it is remembered: the sets are looked at again as they are asked for."""
        for name in self.recalled:
            self._heads.pop(name, None)
            self._problems.pop(name, None)
            if self._memory is not None:
                self._memory.pop(name, None)
        self.recalled.clear()

    def _known(self, folder: SetFolder) -> _Known | None:
        """What is remembered of a set, or can be once it was looked at; None where nothing is remembered."""
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
        # committed between both looks; or a link to nowhere, which is a damaged manifest
        try:
            return load_set(folder, self.storage)
        except CheckpointError as error:
            return error

    def add(self, name: str) -> CheckpointSet:
        """Take up a set that was committed just now, as the newest; raises what is wrong with its manifest."""
        folder = SetFolder.of(self.folder / SETS_FOLDER, name)
        found = None if folder is None else self.head(folder)
        if folder is None or not isinstance(found, CheckpointSet):
            if isinstance(found, CheckpointError):
                raise found
            path = self.folder / SETS_FOLDER / name
            raise CheckpointNotFoundError(f"{path} has no {MANIFEST_NAME}", path=path)
        self.folders = (*self.folders, folder)
        return found

    def remove(self, folder: SetFolder) -> None:
        """Leave out a folder that was removed just now."""
        self.folders = tuple(one for one in self.folders if one.name != folder.name)

    def heads(
        self, iteration: TrainingIteration | None = None, *, below: int | None = None
    ) -> Iterator[tuple[SetFolder, Head]]:
        """The committed sets, newest first, read as they are asked for.

        Args:
            iteration: Only sets that it matches, in the fields that it says.
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
        """The committed sets whose manifest can be used, newest first; ``below``: only those of a lower sequence."""
        return (found for _folder, found in self.heads(below=below) if isinstance(found, CheckpointSet))

    @property
    def newest_folder(self) -> SetFolder | None:
        """The newest folder with a manifest, be it a damaged one; None where no set was committed."""
        return next((folder for folder, _found in self.heads()), None)

    def problem_of(self, found: CheckpointSet) -> CheckpointError | None:
        """What is wrong with the files of a committed set, as their sizes tell; None where nothing is."""
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
        """The newest committed set of any of ``models``, of a lower sequence than ``below``, whose files are there."""
        sets = (found for found in self.readable(below=below) if found.is_of(models))
        return next((found for found in sets if self.problem_of(found) is None), None)

    def older_good(self, found: CheckpointSet) -> CheckpointSet | None:
        """The newest set of its models before ``found`` whose files are there; of flat files the newest iteration."""
        if found.committed:
            return self.newest_good(found.models(), found.sequence or 0)
        return next((one for one in self.flat_before(found) if one.models("trainer")), None)

    def is_current(self) -> bool:
        """Whether sets are still there as they were seen: none committed or retired meanwhile."""
        seen = {folder.name: folder for folder in self.folders}
        if {folder.name for folder in set_folders(self.folder, self.storage, seen)} != seen.keys():
            return False
        return all((head is not None) == seen[name].is_committed(self.storage) for name, head in self._heads.items())

    @property
    def saw_unfinished(self) -> bool:
        """Whether a folder without a manifest was passed by: a save that is under way, or one that was cut short."""
        return None in self._heads.values()

    # Flat files.

    @cached_property
    def flat(self) -> tuple[CheckpointSet, ...]:
        """Flat files by tag: latest iteration first, the plain tag before suffixed ones; then the named tags."""
        return tuple(legacy_sets(self.folder, self.storage))

    def iteration_of(self, found: CheckpointSet) -> TrainingIteration | None:
        """The iteration of a set; where its name does not say, the header of its trainer file, else of weights.

        None where no file says. Raises errors of the reader, ``CheckpointFormatError`` for a malformed iteration.
        """
        if found.iteration is not None:
            return found.iteration
        if found.name not in self._iterations:
            try:
                self._iterations[found.name] = iteration_in(found)
            except CheckpointError as error:
                self._iterations[found.name] = error
        said = self._iterations[found.name]
        if isinstance(said, CheckpointError):
            raise said
        return said

    def flat_before(self, found: CheckpointSet) -> tuple[CheckpointSet, ...]:
        """Plain ``E.._U.._S..`` of flat files, latest first, not later than what some file of ``found`` says."""
        if found.name not in self._flat_before:
            self._flat_before[found.name] = tuple(plain_before(self.flat, found))
        return self._flat_before[found.name]

    @cached_property
    def later_flat(self) -> list[tuple[CheckpointSet, TrainingIteration]]:
        """Flat files of a later iteration than the newest committed set that are not as a save of ours left them.

        Those that are as it left them are copies of a set that was removed, and mean nothing.
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
                    # A copy for Noether that a crash left unfinished says nothing about our sets.
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
                "%s: flat files of %s are copies of a set that was removed, and are passed over; the newest committed "
                "set is %s",
                self.folder,
                ", ".join(sorted(removed)),
                newest.name,
            )
        return later

    def newest_flat(
        self, models: Collection[str] = (), unreadable: list[tuple[str, CheckpointError]] | None = None
    ) -> CheckpointSet | None:
        """The set of flat files of the latest iteration that has the trainer files of ``models``, or any.

        ``unreadable`` collects sets of which the iteration cannot be told, else they raise.
        """
        preferred = [one for one in self.flat if one.models("trainer") and set(models) <= set(one.models("trainer"))]
        preferred.sort(key=lambda one: FOLLOWING.index(one.name) if one.name in FOLLOWING else 2)
        preferred.sort(key=lambda one: one.iteration is None)
        said: list[tuple[CheckpointSet, TrainingIteration]] = []
        for one in preferred:
            try:
                iteration = self.iteration_of(one)
            except CheckpointError as error:
                if unreadable is None:
                    raise
                unreadable.append((one.name, error))
                continue
            if iteration is not None and iteration.is_fully_specified:
                said.append((one, iteration))
        # of equal iterations the first
        return max(said, key=lambda pair: pair[1], default=(None,))[0]

    def is_begun(self) -> bool:
        """Whether there is a set to resume the run from, be it a broken one; unfinished saves do not count."""
        return self.newest_folder is not None or any(one.models("trainer") for one in self.flat)

    # What there is, for lists and messages: this reads every manifest.

    def sets(self) -> tuple[CheckpointSet, ...]:
        """Every set, oldest first.

        Committed sets, in the order of their commits, if there are any; sets whose manifest cannot be read are in
        ``broken()``. Otherwise the sets of flat files: those whose tag says the iteration in its order, then the
        others by tag.
        """
        if self.newest_folder is not None:
            return tuple(self.readable())[::-1]
        known = [one for one in self.flat if one.iteration is not None]
        return (*reversed(known), *(one for one in self.flat if one.iteration is None))

    def broken(self) -> tuple[CheckpointError, ...]:
        """For each committed set that cannot be used, newest first, what is wrong with its manifest or files."""
        problems = (
            found if isinstance(found, CheckpointError) else self.problem_of(found) for _folder, found in self.heads()
        )
        return tuple(problem for problem in problems if problem is not None)

    def uncommitted(self) -> tuple[str, ...]:
        """Folders of sets that were never finished: no manifest. They are never picked."""
        return tuple(
            folder.name
            for folder in self.folders
            if not self.is_committed(folder) and self.storage.is_folder(folder.path)
        )

    def tags(self) -> tuple[str, ...]:
        """Every tag, sorted."""
        return tuple(sorted({tag for one in self.sets() for tag in one.tags}))

    @cached_property
    def meant_by(self) -> Mapping[str, tuple[str, ...]]:
        """Place of each set -> the tags that mean it: a later set of its models can have taken over the others."""
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
        """Model and part of every plain file that some set has, sorted.

        The newest manifest says what sets before it had; the others are read only where it lacks some of that.
        """
        newest = next((found for _folder, found in self.heads()), None)
        if isinstance(newest, CheckpointSet) and newest.manifest is not None:
            own = _parts_of(newest.files)
            if own >= set(newest.manifest.seen):
                return tuple(sorted(own))
        return tuple(sorted(_parts_of(file for one in self.sets() for file in one.files)))

    def trainer_names(self) -> tuple[str, ...]:
        """Models that have trainer files, sorted."""
        return tuple(model for model, part in self.parts() if part == "trainer")


def _parts_of(files: Iterable[CheckpointFile]) -> set[tuple[str, Part]]:
    return {(file.model, file.part) for file in files if file.info is None}
