"""RunStore: which runs, stages, sets and tags exist on disk, and which set a tag means. Never creates anything."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from noether_init_core.checkpoints import explain
from noether_init_core.checkpoints.flat_names import flat_copies
from noether_init_core.checkpoints.manifest import MANIFEST_NAME
from noether_init_core.checkpoints.names import CheckpointFileName, iteration_of_tag, parse
from noether_init_core.checkpoints.queries import FOLLOWING, Query
from noether_init_core.checkpoints.sets import (
    CheckpointFile,
    CheckpointSet,
    Need,
    SetFolder,
    check_consistency,
    check_files,
    check_reachable,
    list_names,
    load_set,
    said_by,
    set_folders,
    sorted_files,
)
from noether_init_core.checkpoints.storage import LOCAL, Storage
from noether_init_core.errors import (
    AmbiguousCheckpointError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    ConfigError,
)
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider, check_name

__all__ = ["CheckpointFile", "CheckpointSet", "Need", "RunStore", "check_consistency"]

logger = logging.getLogger(__name__)

_BEST = ("best_model.", "best.")
#: How often sets are listed anew before an error is believed.
_LOOKS = 5
_Found = TypeVar("_Found")


class RunStore:
    """The checkpoints of one run and stage.

    Everything is looked up anew at each call. Answers depend on names and contents only, never on the order in which
    a folder lists its entries. In a folder with a committed set, the flat files beside it are not read.
    """

    def __init__(self, paths: PathProvider, *, storage: Storage = LOCAL, asked_by: explain.AskedBy = "tag") -> None:
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
        legacy = self._legacy()
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
        return tuple(sorted(one.name for one in self._legacy()))

    def trainer_names(self) -> tuple[str, ...]:
        """Models that have trainer files, sorted."""
        return tuple(sorted({name for checkpoint_set in self.sets() for name in checkpoint_set.models("trainer")}))

    # What is meant.

    def newest(self) -> CheckpointSet | None:
        """The set to resume this run from: the newest that has a trainer file; None where there is none.

        Newest is the highest sequence of the committed sets; in a legacy folder the latest iteration, the plain
        ``E.._U.._S..`` before other tags of it. Raises ``CheckpointCorruptError`` if a newer committed set is broken,
        ``AmbiguousCheckpointError`` if flat files of a later iteration, not ours, stand beside the committed sets.
        """
        return self._steadily(self._newest_of)

    def _newest_of(self, folders: Sequence[SetFolder]) -> CheckpointSet | None:
        if not folders:
            try:
                return self._newest_legacy()
            except (CheckpointCorruptError, CheckpointFormatError) as error:
                if self.asked_by == "auto_resume":
                    error.add(f". {explain.ways_on(self, self._newest_legacy([]), may_walk_back=True)}")
                raise
        self._refuse_later_flat_files(folders)
        broken: list[tuple[SetFolder, CheckpointError]] = []
        found = next((one for one in self._newest_first(folders, broken) if one.models("trainer")), None)
        self._refuse_broken(found, folders, broken, TrainingIteration(), is_automatic=True)
        return found

    def find(
        self, tag: str | Mapping[str, Any] | TrainingIteration | None, needs: Sequence[Need] = ()
    ) -> CheckpointSet:
        """The set that ``tag`` means, with every file that is needed.

        ``tag`` is None (``latest``), a tag as it was saved, ``best`` or ``best.<metric>``, an iteration as text or
        mapping (``E10_U100_S200``): the newest set of it that has the models; or one field of it (``E10``,
        ``{"epoch": 10}``): then the newest match that has everything needed. Sets that come and go meanwhile are no
        error.

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
        if folders:
            if query.automatic:
                self._refuse_later_flat_files(folders)
            models = {need.model for need in needs if need.model is not None}
            candidates = self._matches(query, lambda: self._newest_first(folders, broken), models)
        else:
            legacy = self._legacy()
            if not legacy:
                raise explain.nothing_here(self)
            candidates = self._matches(query, lambda: iter(legacy))
        scope = query.iteration if query.iteration is not None else TrainingIteration()
        first = next(candidates, None)
        if first is None:
            self._refuse_broken(None, folders, broken, scope, is_automatic=query.automatic)
            raise explain.no_such_tag(self, query.text)
        chosen = first
        while not all(chosen.has(need) for need in needs):
            following = next(candidates, None)
            if following is None:
                raise explain.missing_files(self, first, query.text, needs)
            chosen = following
        self._refuse_broken(chosen, folders, broken, scope, is_automatic=query.automatic)
        return chosen

    def is_begun(self) -> bool:
        """Whether there is a set to resume this run from, be it a broken one; unfinished saves do not count."""
        folders = self._committed()
        broken: list[tuple[SetFolder, CheckpointError]] = []
        sets = self._newest_first(folders, broken) if folders else iter(self._legacy())
        return any(one.models("trainer") for one in sets) or bool(broken)

    def descending(
        self, tag: str | Mapping[str, Any] | TrainingIteration | None, *, any_tag: bool = False
    ) -> Iterator[tuple[str, CheckpointSet | CheckpointError]]:
        """What an open tag means, and then, one by one, what to walk back to.

        Open are ``latest`` and ``last``, and iterations that are not full (``E10``). Committed sets come in falling
        sequence: for a text every set before the one that has the tag, for an iteration every set that it matches.
        A folder without manifests gives what the tag means, and then only the plain ``E.._U.._S..`` that are not later
        than the iteration that some file of it says.

        Args:
            tag: As in ``find``.
            any_tag: Begin with the newest set, whatever its tags, as ``newest`` does.

        Yields: the name of a set, and the set, or why its manifest or its header cannot be read.

        Raises what ``find`` raises where nothing is meant; ``CheckpointFormatError`` for a set of a newer release,
        which is not broken.
        """
        query = Query.of(tag)
        folders = self._committed()
        if not folders:
            yield from self._legacy_descending(query, any_tag)
            return
        self._refuse_later_flat_files(folders)
        scope = query.iteration if query.iteration is not None else TrainingIteration()
        is_below = any_tag or query.iteration is not None
        is_empty = True
        for folder in reversed(folders):
            if not scope.matches(folder.iteration):
                continue
            try:
                found: CheckpointSet | CheckpointError = load_set(folder, self.storage)
            except CheckpointFormatError:
                raise
            except CheckpointError as error:
                if not self.storage.exists(folder.path / MANIFEST_NAME):
                    continue  # retired since it was listed
                found = error
            if is_below or isinstance(found, CheckpointError) or query.text in found.tags:
                is_below, is_empty = True, False
                yield folder.path.name, found
        if is_empty:
            raise explain.no_such_tag(self, query.text)

    def older_good(self, checkpoint_set: CheckpointSet) -> CheckpointSet | None:
        """The newest set before this one whose files are there; without manifests the newest plain ``E.._U.._S..``."""
        if checkpoint_set.committed:
            own = checkpoint_set.sequence or 0
            return self._newest_good([folder for folder in self._committed() if folder.sequence < own])
        return next((one for one in self._plain_before(checkpoint_set) if one.models("trainer")), None)

    def require(self, checkpoint_set: CheckpointSet, needs: Sequence[Need]) -> None:
        """Make sure that a set which was found before has further files; raises what ``find`` would raise."""
        if not all(checkpoint_set.has(need) for need in needs):
            raise explain.missing_files(self, checkpoint_set, checkpoint_set.name, needs)

    def iteration_of(self, checkpoint_set: CheckpointSet) -> TrainingIteration | None:
        """The iteration of the set; where its name does not say, the header of its trainer file, else of weights.

        None where no file says. Raises errors of the reader, ``CheckpointFormatError`` for a malformed iteration.
        """
        if checkpoint_set.iteration is not None:
            return checkpoint_set.iteration
        from noether_init_core.checkpoints.reader import open_checkpoint

        order = {"trainer": 0, "model": 1, "optim": 2}
        for file in sorted(checkpoint_set.files, key=lambda file: (order[file.part], file.stem)):
            if file.part == "optim":
                continue
            with open_checkpoint(file.path) as reader:
                said = reader.metadata.get("training_iteration")
            if isinstance(said, Mapping):
                try:
                    return TrainingIteration.from_mapping(said)
                except ConfigError as error:
                    raise CheckpointFormatError(f"{file.path}: training_iteration: {error}", path=file.path) from error
        return None

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
        asked: TrainingIteration,
        *,
        is_automatic: bool,
    ) -> None:
        """Raise if ``chosen`` is damaged, or an unreadable newer set could have been the one that was asked for."""
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
        older = [folder for folder in folders if folder.sequence < problem[0]]
        good = self._newest_good(older)
        may_walk_back = (
            is_automatic and good is not None and good.iteration is not None and asked.matches(good.iteration)
        )
        raise explain.broken_set(self, problem[1], good, may_walk_back=may_walk_back) from problem[1]

    def _newest_good(self, folders: Sequence[SetFolder]) -> CheckpointSet | None:
        for checkpoint_set in self._newest_first(folders, []):
            try:
                check_files(checkpoint_set, self.storage)
            except CheckpointError:
                continue
            return checkpoint_set
        return None

    def _matches(
        self, query: Query, newest_first: Callable[[], Iterator[CheckpointSet]], models: Set[str] = frozenset()
    ) -> Iterator[CheckpointSet]:
        """Sets that the query can mean, best first. Tags that mean one set yield at most that one.

        Several models can be saved at one iteration, each in sets of its own: the newest set with ``models`` is meant.
        """
        iteration = query.iteration
        if iteration is not None and not iteration.is_fully_specified:
            return (one for one in newest_first() if one.iteration is not None and iteration.matches(one.iteration))
        if iteration is not None:
            same = (one for one in newest_first() if one.iteration == iteration)
            return itertools.islice(_with_models(same, models) if models else same, 1)
        text = query.text
        if text == "best" or text.startswith(_BEST[1]):
            text = self._best(text, {tag for one in newest_first() for tag in one.tags})
        return itertools.islice((one for one in newest_first() if text in one.tags), 1)

    def _best(self, text: str, tags: set[str]) -> str:
        if text in tags:
            return text
        if text != "best":
            return _BEST[0] + text.removeprefix("best.")
        found = sorted(tag for tag in tags if tag.startswith(_BEST))
        if len(found) > 1:
            raise AmbiguousCheckpointError(
                f'"best" could be any of {", ".join(found)}. Say which: checkpoint_tag: {found[0]}',
                path=self.folder,
                candidates=found,
            )
        return found[0] if found else text

    def _legacy(self) -> list[CheckpointSet]:
        """Sets by the tag of flat files: latest iteration first, the plain tag before suffixed ones; then the named."""
        folder = self.folder
        by_tag: dict[str, list[CheckpointFile]] = {}
        for name in list_names(folder, self.storage):
            parsed = parse(name)
            if parsed is not None and self.storage.size_of(folder / name) is not None:
                by_tag.setdefault(parsed.tag, []).append(_file(folder, name, parsed))
        found = [
            CheckpointSet(folder, tag, (tag,), iteration_of_tag(tag), None, False, sorted_files(files))
            for tag, files in sorted(by_tag.items())
        ]
        known = [one for one in found if one.iteration is not None]
        known.sort(key=lambda one: one.name != str(one.iteration))
        known.sort(key=lambda one: one.iteration or TrainingIteration.zero(), reverse=True)
        return [*known, *(one for one in found if one.iteration is None)]

    def _legacy_descending(self, query: Query, any_tag: bool) -> Iterator[tuple[str, CheckpointSet | CheckpointError]]:
        legacy = self._legacy()
        if not legacy:
            raise explain.nothing_here(self)
        if any_tag:
            unreadable: list[tuple[str, CheckpointError]] = []
            first = self._newest_legacy(unreadable)
            yield from unreadable
        else:
            first = next(self._matches(query, lambda: iter(legacy)), None)
            if first is None:
                raise explain.no_such_tag(self, query.text)
        if first is None:
            return
        yield first.name, first
        for one in self._plain_before(first):
            if query.iteration is None or (one.iteration is not None and query.iteration.matches(one.iteration)):
                yield one.name, one

    def _plain_before(self, first: CheckpointSet) -> Iterator[CheckpointSet]:
        """The plain ``E.._U.._S..`` of flat files that are not later than what some file of ``first`` says."""
        latest = max(self._iterations_in(first), default=None)
        for one in self._legacy():
            iteration = one.iteration
            if latest is None or iteration is None or iteration > latest or one == first:
                continue
            if one.name == str(iteration):
                yield one

    def _iterations_in(self, checkpoint_set: CheckpointSet) -> Iterator[TrainingIteration]:
        """The full iterations that the files of a set say, as far as they can be read."""
        from noether_init_core.checkpoints.reader import open_checkpoint

        for file in checkpoint_set.files:
            try:
                with open_checkpoint(file.path) as reader:
                    iteration, _run = said_by(reader.metadata, file.path)
            except (CheckpointError, OSError) as error:
                logger.debug("%s says no iteration: %s", file.path, error)
                continue
            if iteration is not None and iteration.is_fully_specified:
                yield iteration

    def _newest_legacy(self, unreadable: list[tuple[str, CheckpointError]] | None = None) -> CheckpointSet | None:
        """The set of the latest iteration; ``unreadable`` collects sets of which it cannot be told, else they raise."""
        preferred = [one for one in self._legacy() if one.models("trainer")]
        preferred.sort(key=lambda one: FOLLOWING.index(one.name) if one.name in FOLLOWING else 2)
        preferred.sort(key=lambda one: one.iteration is None)
        found: list[tuple[CheckpointSet, TrainingIteration | None]] = []
        for one in preferred:
            try:
                found.append((one, self.iteration_of(one)))
            except CheckpointError as error:
                if unreadable is None:
                    raise
                unreadable.append((one.name, error))
        said = [(one, iteration) for one, iteration in found if iteration is not None and iteration.is_fully_specified]
        newest = max((iteration for _, iteration in said), default=None)
        return next((one for one, iteration in said if iteration == newest), None)

    def _refuse_later_flat_files(self, folders: Sequence[SetFolder]) -> None:
        """Somebody else (Noether itself) went on from our sets: which of both is meant is not ours to guess.

        Flat files that we wrote are copies; where their set is gone, somebody has removed it, and they mean nothing.
        """
        later = self._later_flat_files(folders)
        # A writer refreshes flat names right after its commit: list the sets again before anybody is accused.
        if later:
            folders = self._committed() or folders
            later = self._later_flat_files(folders)
        if not later:
            return
        raise explain.later_flat_files(self, folders[-1], later)

    def _later_flat_files(self, folders: Sequence[SetFolder]) -> list[tuple[CheckpointSet, TrainingIteration]]:
        newest = folders[-1].iteration
        committed = {folder.iteration for folder in folders}
        copies = flat_copies(self.folder, self.storage)
        removed: set[str | None] = set()
        later = []
        for flat in self._legacy():
            iteration = flat.iteration
            if iteration is None and flat.name in FOLLOWING:
                try:
                    iteration = self.iteration_of(flat)
                except CheckpointError as error:
                    # A copy for Noether that a crash left unfinished says nothing about our sets.
                    logger.warning("%s beside committed sets cannot be read: %s", flat.name, error)
            if iteration is None or not iteration.is_fully_specified or iteration in committed or iteration <= newest:
                continue
            sets = {copies.get(file.path.name) for file in flat.files}
            if None in sets:
                later.append((flat, iteration))
            else:
                removed.update(sets)
        if removed:
            self._tell(
                f"{self.folder}: flat files of {', '.join(sorted(map(str, removed)))} are copies of a set that was "
                f"removed, and are passed over; the newest committed set is {folders[-1].path.name}"
            )
        return later

    def _tell(self, message: str) -> None:
        """Warn, once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)


def _with_models(sets: Iterator[CheckpointSet], models: Set[str]) -> Iterator[CheckpointSet]:
    """Those with all of the models; where there is none, the first set, which lacks some."""
    first = None
    is_found = False
    for one in sets:
        first = first or one
        if all(any(name in (file.model, file.stem) for file in one.files) for name in models):
            is_found = True
            yield one
    if first is not None and not is_found:
        yield first


def _is_name(name: str) -> bool:
    try:
        check_name(name, "run_id")
    except ConfigError:
        return False
    return True


def _file(folder: Path, name: str, parsed: CheckpointFileName) -> CheckpointFile:
    return CheckpointFile(folder / name, parsed.model, parsed.info, parsed.part)
