"""Snapshot: the checkpoints of one run and stage, looked at once for a question."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from noether_init_core.errors import CheckpointError, CheckpointNotFoundError
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import (
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


class Snapshot:
    """The checkpoints of one run and stage: names at once, everything else when it is asked for, and only once.

    The folder of sets is listed when the snapshot is made. Manifests are read newest first as they are needed, and
    remembered; so is what was found out of flat files. Answers depend on names and contents only, never on the order in
    which a folder lists its entries. Nothing is created. It is of one moment: for the next question make a new one.

    Args:
        paths: The run and stage; anything with ``output_root``, ``run_id`` and ``stage_name``.
        storage: The file operations.
        before: An earlier snapshot of the folder: manifests that have not changed since are not read again.

    Raises ``CheckpointNotFoundError`` if the folder cannot be reached: a link that leads nowhere is no empty folder.
    """

    def __init__(self, paths: Any, *, storage: FileSystem = LOCAL, before: Snapshot | None = None) -> None:
        self.paths = PathProvider.of(paths)
        self.storage = storage
        check_reachable(self.paths.checkpoint_path, storage)
        #: The folder of the checkpoints, symbolic links resolved. It may not exist.
        self.folder: Path = storage.resolve(self.paths.checkpoint_path)
        #: By name, oldest first; those without a manifest are among them.
        self.folders = tuple(set_folders(self.folder, storage))
        self._heads: dict[SetFolder, Head | None] = {}
        #: Size and time of change of manifests when they were read, for a later snapshot.
        self._identities: dict[SetFolder, tuple[int, int] | None] = {}
        self._taken_over: set[SetFolder] = set()
        self._before = before
        if before is not None:
            before._before = None
        self._problems: dict[Path, CheckpointError | None] = {}
        self._flat_before: dict[str, tuple[CheckpointSet, ...]] = {}
        self._iterations: dict[str, TrainingIteration | CheckpointError | None] = {}

    # Committed sets.

    def head(self, folder: SetFolder) -> Head | None:
        """The set in a folder, or why its manifest cannot be used; None where no save was finished."""
        if folder not in self._heads:
            path, before = folder.path / MANIFEST_NAME, self._before
            with reaching(path):
                identity = self.storage.identity_of(path)
            if before is not None and identity is not None and before._identities.get(folder) == identity:
                found = before._heads[folder]
                self._taken_over.add(folder)
            else:
                found = self._read(folder)
            # together, since a read may be interrupted
            self._heads[folder], self._identities[folder] = found, identity
        return self._heads[folder]

    def confirm(self, folder: SetFolder) -> bool:
        """Read a head anew that was taken over from an earlier snapshot; False if it cannot be used any more."""
        if folder in self._taken_over:
            self._heads[folder] = self._read(folder)
            self._taken_over.remove(folder)
        return isinstance(self._heads[folder], CheckpointSet)

    def _read(self, folder: SetFolder) -> Head | None:
        try:
            return load_set(folder, self.storage)
        except CheckpointError as error:
            is_absent = isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)
            # a manifest that is a link to nowhere was committed
            return None if is_absent and not folder.is_committed(self.storage) else error

    def add(self, folder: SetFolder) -> CheckpointSet:
        """Take up a set that was committed just now, as the newest; raises what is wrong with its manifest."""
        self.folders = (*self.folders, folder)
        found = self.head(folder)
        if not isinstance(found, CheckpointSet):
            raise found or CheckpointNotFoundError(f"{folder.path} has no {MANIFEST_NAME}", path=folder.path)
        return found

    def remove(self, folder: SetFolder) -> None:
        """Leave out a folder that was removed just now."""
        self.folders = tuple(one for one in self.folders if one != folder)

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
        if found.folder not in self._problems:
            try:
                check_files(found, self.storage)
                self._problems[found.folder] = None
            except CheckpointError as error:
                self._problems[found.folder] = error
        return self._problems[found.folder]

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
        if tuple(set_folders(self.folder, self.storage)) != self.folders:
            return False
        return all((head is not None) == folder.is_committed(self.storage) for folder, head in self._heads.items())

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
            if any(folder.is_committed(self.storage) for folder in same):
                continue
            known = [copies[file.path.name] for file in flat.files if file.path.name in copies]
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
                newest.path.name,
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
            folder.path.name
            for folder in self.folders
            if not folder.is_committed(self.storage) and self.storage.is_folder(folder.path)
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
