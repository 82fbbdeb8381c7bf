"""RunStore: which runs, stages, sets and tags exist on disk, and which set a tag means. Never creates anything."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    ConfigError,
)
from noether_init_core.files.storage.disk import LOCAL, Storage
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider, check_name
from noether_init_core.sets import refusals
from noether_init_core.sets.checkpoint_set import (
    CheckpointFile,
    CheckpointSet,
    Need,
    SetFolder,
    check_consistency,
    check_files,
    check_reachable,
    list_names,
    load_set,
    set_folders,
)
from noether_init_core.sets.fallback_steps import Step, committed_steps, legacy_steps
from noether_init_core.sets.flat_sets import (
    iteration_in,
    later_flat_sets,
    legacy_sets,
    newest_legacy,
    plain_before,
)
from noether_init_core.sets.queries import FOLLOWING, Query, is_of, sets_meant

__all__ = ["CheckpointFile", "CheckpointSet", "Need", "RunStore", "check_consistency"]

logger = logging.getLogger(__name__)

#: How often sets are listed anew before an error is believed.
_LOOKS = 5
_Found = TypeVar("_Found")


class RunStore:
    """The checkpoints of one run and stage.

    Everything is looked up anew at each call. Answers depend on names and contents only, never on the order in which
    a folder lists its entries. In a folder with a committed set, the flat files beside it are not read.
    """

    def __init__(self, paths: PathProvider, *, storage: Storage = LOCAL, asked_by: refusals.AskedBy = "tag") -> None:
        self.paths = PathProvider.of(paths)
        self.storage = storage
        #: What asks; errors advise what its config can say.
        self.asked_by = asked_by
        self._told: set[str] = set()

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints, symbolic links resolved. It may not exist.

        Raises ``CheckpointNotFoundError`` where it cannot be reached: a link that leads nowhere is no empty folder.
        """
        check_reachable(self.paths.checkpoint_path, self.storage)
        return self.storage.resolve(self.paths.checkpoint_path)

    # What exists.

    def runs(self) -> tuple[str, ...]:
        """Runs below the output root that have a checkpoint folder, themselves or in a stage; sorted."""
        root = self._root
        return tuple(
            name
            for name in list_names(root, self.storage)
            # a folder such as .git can be no run
            if _is_name(name)
            and (
                self.storage.is_folder(root / name / "checkpoints")
                # below the root, the folder "debug" holds runs of its own
                or ((self.paths.debug or name != "debug") and self.stages(name))
            )
        )

    def stages(self, run_id: str | None = None) -> tuple[str, ...]:
        """Stages of the run that have a checkpoint folder, sorted."""
        run = self._root / (self.paths.run_id if run_id is None else check_name(run_id, "run_id"))
        return tuple(
            name for name in list_names(run, self.storage) if self.storage.is_folder(run / name / "checkpoints")
        )

    def sets(self) -> tuple[CheckpointSet, ...]:
        """Every set, oldest first.

        Committed sets, in the order of their commits, if there are any; sets whose manifest cannot be read are in
        ``broken()``. Otherwise the sets of a legacy folder: those whose tag says the iteration in its order, then the
        others by tag.
        """
        folders = self._committed()
        if folders:
            broken: list[tuple[SetFolder, CheckpointError]] = []
            return tuple(self._newest_first(folders, broken))[::-1]
        legacy = legacy_sets(self.folder, self.storage)
        known = [one for one in legacy if one.iteration is not None]
        return (*reversed(known), *(one for one in legacy if one.iteration is None))

    def broken(self) -> tuple[CheckpointError, ...]:
        """For each committed set that cannot be used, newest first, what is wrong with its manifest or files."""
        errors: list[tuple[SetFolder, CheckpointError]] = []
        folders = self._committed()
        by_path = {folder.path: folder for folder in folders}
        for checkpoint_set in self._newest_first(folders, errors):
            try:
                check_files(checkpoint_set, self.storage)
            except CheckpointError as error:
                errors.append((by_path[checkpoint_set.folder], error))
        return tuple(error for _, error in sorted(errors, key=lambda item: -item[0].sequence))

    def uncommitted(self) -> tuple[str, ...]:
        """Folders of sets that were never finished: no manifest. They are never picked."""
        return tuple(folder.path.name for folder in set_folders(self.folder, self.storage) if not folder.committed)

    def tags(self) -> tuple[str, ...]:
        """Every tag, sorted."""
        return tuple(sorted({tag for checkpoint_set in self.sets() for tag in checkpoint_set.tags}))

    def flat_tags(self) -> tuple[str, ...]:
        """Tags of flat files, sorted; where there are committed sets, ``find`` does not read these."""
        return tuple(sorted(one.name for one in legacy_sets(self.folder, self.storage)))

    def trainer_names(self) -> tuple[str, ...]:
        """Models that have trainer files, sorted."""
        return tuple(sorted({name for checkpoint_set in self.sets() for name in checkpoint_set.models("trainer")}))

    # What is meant.

    def newest(self, model: str | None = None) -> CheckpointSet | None:
        """The set to resume this run from: the newest that has a trainer file; None where there is none.

        Newest is the highest sequence of the committed sets; in a legacy folder the latest iteration, the plain
        ``E.._U.._S..`` before other tags of it. ``model``: only sets with the trainer file of this model count.

        Raises ``CheckpointCorruptError`` if a newer committed set is broken, ``AmbiguousCheckpointError`` if flat files
        of a later iteration, not ours, stand beside the committed sets.
        """
        models = frozenset(() if model is None else (model,))
        return self._steadily(lambda folders: self._newest_of(folders, models))

    def _newest_of(self, folders: Sequence[SetFolder], models: Set[str]) -> CheckpointSet | None:
        if not folders:
            legacy = legacy_sets(self.folder, self.storage)
            try:
                return newest_legacy(legacy, models)
            except (CheckpointCorruptError, CheckpointFormatError) as error:
                if self.asked_by == "auto_resume":
                    error.add(f". {refusals.ways_on(self, newest_legacy(legacy, models, []), may_walk_back=True)}")
                raise
        self._refuse_later_flat_files(folders)
        broken: list[tuple[SetFolder, CheckpointError]] = []
        sets = self._newest_first(folders, broken)
        found = next((one for one in sets if one.models("trainer") and models <= set(one.models("trainer"))), None)
        self._refuse_broken(found, folders, broken, Query.of(None), models, any_tag=True)
        return found

    def find(
        self, tag: str | Mapping[str, Any] | TrainingIteration | None, needs: Sequence[Need] = ()
    ) -> CheckpointSet:
        """The set that ``tag`` means, with every file that is needed.

        ``tag`` is None (``latest``), a tag as it was saved, ``best`` or ``best.<metric>``, an iteration as text or
        mapping (``E10_U100_S200``): the newest set of it that has the models; or one field of it (``E10``,
        ``{"epoch": 10}``): then the newest match that has everything needed. A text means the newest set saved under it
        that has any of the models needed: others can be saved into the run by themselves. Sets that come and go
        meanwhile are no error.

        Raises:
            CheckpointNotFoundError: The run, stage, tag, model or info does not exist; what exists is listed.
            IncompleteSetError: The set lacks a part; sets that have everything are listed.
            AmbiguousCheckpointError: ``best`` with several metrics; several models for a need without a name; flat
                files of a later iteration than the newest committed set, unless one set is asked for by name.
            CheckpointCorruptError: The manifest is broken, or files are missing or cut short.
        """
        query = Query.of(tag)
        return self._steadily(lambda folders: self._find_in(folders, query, needs))

    def _find_in(self, folders: Sequence[SetFolder], query: Query, needs: Sequence[Need]) -> CheckpointSet:
        broken: list[tuple[SetFolder, CheckpointError]] = []
        models = {need.model for need in needs if need.model is not None}
        if folders:
            if query.automatic:
                self._refuse_later_flat_files(folders)
            candidates = sets_meant(query, lambda: self._newest_first(folders, broken), models, self.folder)
        else:
            legacy = legacy_sets(self.folder, self.storage)
            if not legacy:
                raise refusals.nothing_here(self)
            candidates = sets_meant(query, lambda: iter(legacy), folder=self.folder)
        first = next(candidates, None)
        if first is None or not is_of(first, models):
            # the set that was asked for may be one of those that cannot be read
            self._refuse_broken(None, folders, broken, query, models)
        if first is None:
            raise refusals.no_such_tag(self, query.text)
        chosen = first
        while not all(chosen.has(need) for need in needs):
            following = next(candidates, None)
            if following is None:
                raise refusals.missing_files(self, first, query.text, needs)
            chosen = following
        self._refuse_broken(chosen, folders, broken, query, models)
        return chosen

    def is_begun(self) -> bool:
        """Whether there is a set to resume this run from, be it a broken one; unfinished saves do not count."""
        folders = self._committed()
        broken: list[tuple[SetFolder, CheckpointError]] = []
        sets = self._newest_first(folders, broken) if folders else iter(legacy_sets(self.folder, self.storage))
        return any(one.models("trainer") for one in sets) or bool(broken)

    def descending(
        self,
        tag: str | Mapping[str, Any] | TrainingIteration | None,
        models: Collection[str] = (),
        *,
        any_tag: bool = False,
    ) -> Iterator[Step]:
        """What an open tag means, and then, one by one, what to walk back to.

        Open are ``latest`` and ``last``, and iterations that are not full (``E10``). Committed sets come in falling
        sequence. For an iteration that is every set that it matches. For a text it is the newest readable set that has
        the tag, and every set before it. What a set with an unreadable manifest was tagged cannot be known: newer ones
        come first, with what is wrong, and do not make the tag mean a set that never had it; only where no readable set
        has the tag, every set before the newest unreadable one comes.

        A folder without manifests gives what the tag means, and then only the plain ``E.._U.._S..`` that are not later
        than the iteration that some file of it says.

        Args:
            tag: As in ``find``.
            models: Only sets with any of these models count; others are saved into the run by themselves.
            any_tag: Begin with the newest set, whatever its tags, as ``newest`` does.

        Yields: the name of a set, and the set, or why its manifest or its header cannot be read.

        Raises what ``find`` raises where nothing is meant; ``CheckpointFormatError`` for a set of a newer release,
        which is not broken.
        """
        query, asked = Query.of(tag), frozenset(models)
        folders = self._committed()
        if folders:
            self._refuse_later_flat_files(folders)
            steps = committed_steps(folders, query, asked, self.storage, any_tag=any_tag)
        else:
            legacy = legacy_sets(self.folder, self.storage)
            if not legacy:
                raise refusals.nothing_here(self)
            steps = legacy_steps(legacy, query, asked, any_tag=any_tag)
        is_empty = True
        for step in steps:
            is_empty = False
            yield step
        if is_empty:
            needs = [Need(model, "trainer") for model in sorted(asked)]
            newest = self.newest() if any_tag else None
            if newest is not None:
                self.require(newest, needs)
            elif not any_tag:
                self.find(tag, needs)
            if folders or not any_tag:
                raise refusals.no_such_tag(self, query.text)

    def older_good(self, checkpoint_set: CheckpointSet) -> CheckpointSet | None:
        """The newest set of its models before this one whose files are there.

        Without manifests it is the newest plain ``E.._U.._S..``.
        """
        if checkpoint_set.committed:
            own = checkpoint_set.sequence or 0
            folders = [folder for folder in self._committed() if folder.sequence < own]
            return self._newest_good(folders, frozenset(checkpoint_set.models()))
        before = plain_before(legacy_sets(self.folder, self.storage), checkpoint_set)
        return next((one for one in before if one.models("trainer")), None)

    def require(self, checkpoint_set: CheckpointSet, needs: Sequence[Need]) -> None:
        """Make sure that a set which was found before has further files; raises what ``find`` would raise."""
        if not all(checkpoint_set.has(need) for need in needs):
            raise refusals.missing_files(self, checkpoint_set, checkpoint_set.name, needs)

    def iteration_of(self, checkpoint_set: CheckpointSet) -> TrainingIteration | None:
        """The iteration of the set; where its name does not say, the header of its trainer file, else of weights.

        None where no file says. Raises errors of the reader, ``CheckpointFormatError`` for a malformed iteration.
        """
        return iteration_in(checkpoint_set)

    # The rest is behind the scenes.

    @property
    def _root(self) -> Path:
        return self.paths.output_root / "debug" if self.paths.debug else self.paths.output_root

    def _committed(self) -> list[SetFolder]:
        return [folder for folder in set_folders(self.folder, self.storage) if folder.committed]

    def _steadily(self, look: Callable[[Sequence[SetFolder]], _Found]) -> _Found:
        """Look again where a writer committed or retired sets meanwhile: what went wrong was only out of date."""
        for _ in range(_LOOKS):
            folders = self._committed()
            try:
                return look(folders)
            except CheckpointError:
                if self._committed() == folders:
                    raise
        return look(self._committed())

    def _newest_first(
        self, folders: Sequence[SetFolder], broken: list[tuple[SetFolder, CheckpointError]]
    ) -> Iterator[CheckpointSet]:
        """Read manifests as they are asked for; those that cannot be read are collected in ``broken``."""
        for folder in reversed(folders):
            try:
                yield load_set(folder, self.storage)
            except CheckpointError as error:
                broken.append((folder, error))

    def _refuse_broken(
        self,
        chosen: CheckpointSet | None,
        folders: Sequence[SetFolder],
        broken: Sequence[tuple[SetFolder, CheckpointError]],
        query: Query,
        models: Set[str],
        *,
        any_tag: bool = False,
    ) -> None:
        """Raise if ``chosen`` is damaged, or an unreadable newer set could have been the one that was asked for."""
        asked = query.iteration if query.iteration is not None else TrainingIteration()
        sequence = -1 if chosen is None or chosen.sequence is None else chosen.sequence
        problem: tuple[int, CheckpointError] | None = next(
            (
                (folder.sequence, error)
                for folder, error in broken
                if folder.sequence > sequence and asked.matches(folder.iteration)
            ),
            None,
        )
        if problem is None and chosen is not None:
            try:
                check_files(chosen, self.storage)
            except CheckpointCorruptError as error:
                problem = sequence, error
        if problem is None:
            return
        # an open text leads back to the newest set that has the tag, if one can be read; see descending
        tag = query.text if query.text in FOLLOWING and chosen is not None and not any_tag else ""
        below = sequence + 1 if tag and problem[0] > sequence else problem[0]
        good = self._newest_good([folder for folder in folders if folder.sequence < below], models)
        may_walk_back = (
            query.automatic and good is not None and good.iteration is not None and asked.matches(good.iteration)
        )
        older = self._newest_good([folder for folder in folders if folder.sequence < problem[0]], models)
        raise refusals.broken_set(
            self, problem[1], good, may_walk_back=may_walk_back, saved_as="" if good == older else tag
        ) from problem[1]

    def _newest_good(self, folders: Sequence[SetFolder], models: Set[str]) -> CheckpointSet | None:
        for checkpoint_set in self._newest_first(folders, []):
            if not is_of(checkpoint_set, models):
                continue
            try:
                check_files(checkpoint_set, self.storage)
            except CheckpointError:
                continue
            return checkpoint_set
        return None

    def _refuse_later_flat_files(self, folders: Sequence[SetFolder]) -> None:
        """Somebody else (Noether itself) went on from our sets: which of both is meant is not ours to guess.

        Flat files that we wrote are copies; where their set is gone, somebody has removed it, and they mean nothing.
        """
        later, removed = later_flat_sets(self.folder, folders, self.storage)
        # A writer refreshes flat names right after its commit: list the sets again before anybody is accused.
        if later:
            folders = self._committed() or folders
            later, removed = later_flat_sets(self.folder, folders, self.storage)
        if removed:
            self._tell(
                f"{self.folder}: flat files of {', '.join(sorted(removed))} are copies of a set that was removed, and "
                f"are passed over; the newest committed set is {folders[-1].path.name}"
            )
        if later:
            raise refusals.later_flat_files(self, folders[-1], later)

    def _tell(self, message: str) -> None:
        """Warn, once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)


def _is_name(name: str) -> bool:
    try:
        check_name(name, "run_id")
    except ConfigError:
        return False
    return True
