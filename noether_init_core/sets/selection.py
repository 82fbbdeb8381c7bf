"""Select the set for a query: a pure decision over a snapshot, repeated if the folder changes meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import attrs

from noether_init_core.errors import CheckpointError, CheckpointFormatError
from noether_init_core.files.storage.disk import is_out_of_reach
from noether_init_core.iteration import TrainingIteration
from noether_init_core.memory import no_garbage_collection
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need
from noether_init_core.sets.file_names import FOLLOWING, PART_NAMES, Part, Query
from noether_init_core.sets.hints import UNKNOWN, AskedBy
from noether_init_core.sets.refusals import (
    Broken,
    LaterFlatFiles,
    Missing,
    NoGoodSet,
    NoSuchTag,
    NothingHere,
    Refusal,
    SeveralBest,
    worded,
)
from noether_init_core.sets.snapshot import Snapshot

_BEST = ("best_model.", "best.")
_NOTHING: Mapping[str, str] = MappingProxyType({})
T = TypeVar("T")
#: How often the sets are listed again before an error is raised: a writer may commit and remove sets meanwhile.
_LOOKS = 5


@attrs.frozen
class Policy:
    """Options of a selection.

    Attributes:
        any_tag: Select the newest set with a trainer file, independent of its tags (``auto_resume``).
        walk_back: If the selected set of an open tag is broken, select the newest good set before it.
        root: The model whose complete sets are preferred.
        parts: If several sets match, and for walking back, a set must have every file of ``root`` of these parts that
            any set has. This is ignored if no set has all of them.
    """

    any_tag: bool = False
    walk_back: bool = False
    root: str | None = None
    parts: tuple[Part, ...] = ()


_PLAIN = Policy()


@attrs.frozen
class Selected:
    """A selected set, (set, reason) of each broken set that was passed over, newest first, and the snapshot."""

    found: CheckpointSet
    passed_over: tuple[tuple[str, str], ...]
    snapshot: Snapshot = attrs.field(repr=False, eq=False)


def select(
    snapshot: Snapshot,
    query: Query,
    needs: Sequence[Need] = (),
    policy: Policy = _PLAIN,
    broken: Mapping[str, str] = _NOTHING,
) -> Selected | Refusal:
    """Select the set for ``query`` that has every needed file, or return the reason why there is no such set.

    The newest set is the committed one with the highest sequence; without committed sets, the flat files of the latest
    iteration. A query selects:

    - a literal tag: the newest set with this tag and any of the needed models, because models can be saved separately;
    - ``best``: the only ``best_model.*`` or ``best.*`` tag, unless a set has the literal tag ``best``; likewise
      ``best.loss`` is ``best_model.loss``;
    - a full iteration: its newest set that has all needed models;
    - a partial iteration (``E10``): the newest match that has every needed file.

    If committed sets exist, flat files are not read. If flat files are later than those, nothing is selected
    automatically.

    With ``policy.walk_back``, older sets of the needed models are tried after the selected one. The tags of a set with
    an unreadable manifest are unknown. If a readable set has the tag, only newer unreadable sets are passed over. If no
    readable set has it, every set before the newest unreadable one is tried. Of flat files, plain ``E.._U.._S..`` sets
    are tried that are not later than the files of the first one.

    Args:
        snapshot: The sets on disk.
        query: The query.
        needs: The files that the set must have.
        policy: Options of the selection.
        broken: Name of a set -> problem that the caller has found. Walking back passes over these.
    """
    return _Question(snapshot, query, tuple(needs), policy, broken).answer()


#: Name and sequence (0 for flat files) of a set, and the set or the error of reading it.
_Step = tuple[str, int, CheckpointSet | CheckpointError]


@attrs.frozen
class _Question:
    """The arguments of ``select``, and the steps of the decision; no step has effects."""

    snapshot: Snapshot
    query: Query
    needs: tuple[Need, ...]
    policy: Policy
    broken: Mapping[str, str]

    def answer(self) -> Selected | Refusal:
        newest = self.snapshot.newest_folder
        if newest is None and not self.snapshot.flat:
            return NothingHere()
        # Another program may have continued the run without manifests. To resume the older committed set would lose its
        # training silently.
        if newest is not None and (self.query.automatic or self.policy.any_tag):
            later = self.snapshot.later_flat
            if later:
                return LaterFlatFiles(newest, tuple(later))
        if self.policy.walk_back and (self.query.automatic or self.policy.any_tag):
            steps = self._steps_back() if newest is not None else self._flat_steps_back()
            first = next(steps, None)
            if first is not None:
                return self._walk_back(itertools.chain([first], steps))
        return self._selected()

    @property
    def _models(self) -> frozenset[str]:
        return frozenset(need.model for need in self.needs if need.model is not None)

    @property
    def _is_choosy(self) -> bool:
        """Whether the newest set with every needed file is selected, instead of one certain set."""
        return self.policy.any_tag or self.query.is_minimal

    @property
    def _everything(self) -> tuple[Need, ...]:
        """The needed files and those of ``policy.parts``; only the needed ones if no set has all of them."""
        root = self.policy.root
        if root is None:
            return self.needs
        wanted = [
            Need(model, part)
            for model, part in self.snapshot.parts()
            if part in self.policy.parts and (model == root or model.startswith(f"{root}."))
        ]
        everything = tuple(dict.fromkeys((*self.needs, *wanted)))
        sets = self._readable([])
        return everything if any(all(map(one.has, everything)) for one in sets) else self.needs

    def _selected(self) -> Selected | Refusal:
        """Select without walking back; an unreadable set that may match is an error, never passed over."""
        text = self._literal_tag()
        if isinstance(text, SeveralBest):
            return text
        needs = self._everything if self.query.is_minimal and not self.policy.any_tag else self.needs
        if self.policy.any_tag and self.snapshot.newest_folder is None:
            return self._newest_flat()
        errors: list[tuple[int, CheckpointError]] = []
        first = chosen = None
        for found in self._readable(errors):
            if text not in ("", *found.tags) or (self.policy.any_tag and not found.models("trainer")):
                continue
            first = first or found
            if self._is_asked_for(found, needs):
                chosen = found
                break
        if chosen is None:
            if errors and (first is None or not first.is_of(self._models)):
                return self._broken(*errors[0], None)
            if first is None:
                return NothingHere() if self.policy.any_tag else NoSuchTag(self.query.text)
            return Missing(first, self.query.text, self.needs)
        if not all(chosen.has(need) for need in self.needs):
            return Missing(chosen, self.query.text, self.needs)
        if errors:
            return self._broken(*errors[0], chosen)
        problem = self.snapshot.problem_of(chosen)
        if problem is not None:
            return self._broken(chosen.sequence or 0, problem, chosen)
        return Selected(chosen, (), self.snapshot)

    def _readable(self, errors: list[tuple[int, CheckpointError]]) -> Iterator[CheckpointSet]:
        """Yield sets that match the iteration of the query, newest first; errors of reading are added to ``errors``."""
        iteration = None if self.policy.any_tag else self.query.iteration
        if self.snapshot.newest_folder is None:
            yield from (one for one in self.snapshot.flat if self._can_select(one.iteration))
            return
        for folder, found in self.snapshot.heads(iteration):
            if isinstance(found, CheckpointError):
                errors.append((folder.sequence, found))
            else:
                yield found

    def _is_asked_for(self, found: CheckpointSet, needs: Sequence[Need]) -> bool:
        """Whether a set with the right tag or iteration is the one to select, by its models and files."""
        if self._is_choosy:
            return all(found.has(need) for need in needs)
        if not found.committed or self.query.iteration is None:
            return not found.committed or found.is_of(self._models)
        return all(any(name in (file.model, file.stem) for file in found.files) for name in self._models)

    def _newest_flat(self) -> Selected | Refusal:
        try:
            found = self.snapshot.newest_flat(self._models)
        except CheckpointError as error:
            return Broken(error, self.snapshot.newest_flat(self._models, []), may_walk_back=True)
        if found is not None:
            return Selected(found, (), self.snapshot)
        begun = next(
            (one for one in self.snapshot.flat if set(self._models) <= set(one.models("trainer") or ("",))), None
        )
        if begun is None or not begun.models("trainer"):
            return NothingHere()
        message = (
            f"{begun.folder}: no trainer file records a full training_iteration, so it is unknown where to go on. "
            "Next: kind: previous_run for its weights, and a start at iteration zero"
        )
        return Broken(CheckpointFormatError(message, path=begun.folder), None, may_walk_back=False)

    def _literal_tag(self) -> str | SeveralBest:
        """Return the tag to search for, with ``best`` resolved; empty if no tag decides."""
        text = self.query.text
        if self.policy.any_tag or self.query.iteration is not None:
            return ""
        if text != "best" and not text.startswith(_BEST[1]):
            return text
        wholes = tuple(f"{name}." for name in self._models)
        tags = {
            tag
            for one in self.snapshot.sets()
            if one.is_of(self._models) or any(name.startswith(wholes) for name in one.models())
            for tag in one.tags
        }
        if text in tags:
            return text
        if text != "best":
            return _BEST[0] + text.removeprefix(_BEST[1])
        found = tuple(sorted(tag for tag in tags if tag.startswith(_BEST)))
        return SeveralBest(found) if len(found) > 1 else next(iter(found), text)

    def _broken(self, sequence: int, error: CheckpointError, chosen: CheckpointSet | None) -> Broken:
        """Return the refusal. ``sequence``: of the broken set; ``chosen``: the newest readable set that matches."""
        # An open tag leads back to the newest readable set with this tag, even if newer unreadable sets exist.
        is_open = self.query.text in FOLLOWING and chosen is not None and not self.policy.any_tag
        below = (chosen.sequence or 0) + 1 if is_open and chosen and sequence > (chosen.sequence or 0) else sequence
        good = self.snapshot.newest_good(self._models, below)
        # Walking back passes over absent and damaged sets only: see ``_walk_back``.
        is_over = not is_out_of_reach(error) and not (sequence and isinstance(error, CheckpointFormatError))
        may_walk_back = self.query.automatic and good is not None and self._can_select(good.iteration) and is_over
        newest = good if below == sequence else self.snapshot.newest_good(self._models, sequence)
        return Broken(error, good, may_walk_back, self.query.text if is_open and good != newest else "")

    def _can_select(self, iteration: TrainingIteration | None) -> bool:
        return self.policy.any_tag or self.query.can_select(iteration)

    # Walking back.

    def _walk_back(self, steps: Iterator[_Step]) -> Selected | Refusal:
        tried: dict[str, str] = {}
        incomplete: CheckpointSet | None = None
        for name, sequence, found in steps:
            if isinstance(found, CheckpointError):
                # A set of a newer release, or one on a failing disk, may be good: to pass over it would lose training.
                if is_out_of_reach(found) or (sequence and isinstance(found, CheckpointFormatError)):
                    return self._broken(sequence, found, None)
                tried[name] = str(found)
                continue
            needs = self._everything if tried or self._is_choosy else self.needs
            lacking = [need for need in needs if not found.has(need)]
            if not lacking and name not in self.broken:
                return Selected(found, tuple(tried.items()), self.snapshot)
            if not lacking:
                tried[name] = self.broken[name]
            elif tried:
                words = (PART_NAMES[need.part] + (f" of {need.model}" if need.model else "") for need in lacking)
                tried[name] = f"it was saved without {', '.join(words)}"
            elif self._is_choosy:
                incomplete = incomplete or found
            else:
                return Missing(found, found.name, self.needs)
        if incomplete is not None and not tried:
            return Missing(incomplete, incomplete.name, self._everything)
        return NoGoodSet(tried)

    def _steps_back(self) -> Iterator[_Step]:
        """Yield the committed set of the query, then older sets to walk back to; nothing if no set matches."""
        heads = self.snapshot.heads(None if self.policy.any_tag else self.query.iteration)
        steps = (
            (one.name, one.sequence, found)
            for one, found in heads
            # The models of an unreadable set are unknown, so it counts as a match.
            if isinstance(found, CheckpointError) or found.is_of(self._models)
        )
        if self._is_choosy:
            yield from steps
            return
        above: list[_Step] = []
        for step in steps:
            found = step[-1]
            if isinstance(found, CheckpointSet) and self.query.text in found.tags:
                # Newer readable sets without the tag are left out; newer unreadable ones may have it.
                yield from (one for one in above if isinstance(one[-1], CheckpointError))
                yield step
                yield from steps
                return
            if above or isinstance(found, CheckpointError):
                above.append(step)
        yield from above

    def _flat_steps_back(self) -> Iterator[_Step]:
        """Yield the sets of flat files in the same way."""
        if self.policy.any_tag:
            unreadable: list[tuple[str, CheckpointError]] = []
            first = self.snapshot.newest_flat(self._models, unreadable)
            yield from ((name, 0, error) for name, error in unreadable)
        else:
            text = "" if self.query.is_minimal else self.query.text
            matching = (one for one in self.snapshot.flat if self.query.can_select(one.iteration))
            first = next((one for one in matching if text in ("", *one.tags)), None)
        if first is None:
            return
        yield first.name, 0, first
        for one in self.snapshot.flat_before(first):
            if self.query.can_select(one.iteration):
                yield one.name, 0, one


# The selection on a disk that may change meanwhile. A refusal becomes an error.


@no_garbage_collection()
def find_set(
    snapshot: Snapshot,
    tag: str | Mapping[str, Any] | TrainingIteration | None = None,
    needs: Sequence[Need] = (),
    policy: Policy = _PLAIN,
    *,
    broken: Mapping[str, str] = _NOTHING,
    asked_by: AskedBy = UNKNOWN,
) -> Selected:
    """Select the set for ``tag`` that has every needed file; see ``select`` for the rules.

    It only reads, so it may be called while a run saves. If a writer commits or removes sets meanwhile, the selection
    is repeated on a new snapshot, which ``Selected.snapshot`` holds.

    Args:
        snapshot: The sets on disk.
        tag: None (``latest``), a literal tag, ``best`` or ``best.<metric>``, or an iteration as string or mapping:
            ``E10_U100_S200``, or one field (``E10``, ``{"epoch": 10}``).
        needs: The files that the set must have.
        policy: Options of the selection.
        broken: Name of a set -> problem that the caller has found.
        asked_by: The kind of config that asks; errors advise lines for it.

    Raises:
        ConfigError: ``tag`` is invalid.
        CheckpointNotFoundError: The run, stage, tag, model or info does not exist; the message lists what exists.
        IncompleteSetError: The set lacks a part; the message lists complete sets.
        AmbiguousCheckpointError: ``best`` matches several metrics. Several models match a need without a name. Flat
            files are later than the newest committed set, and the tag does not name one set.
        CheckpointCorruptError: The manifest is damaged, or files are missing or truncated.
        CheckpointFormatError: Another release wrote the manifest.
        NoGoodSetError: No set to walk back to is good.
    """
    return _selected(*_ask(snapshot, Query.of(tag), needs, policy, broken), asked_by)


def _ask(
    snapshot: Snapshot, query: Query, needs: Sequence[Need], policy: Policy, broken: Mapping[str, str]
) -> tuple[Selected | Refusal, Snapshot]:
    """Return the answer, and its snapshot. A refusal on an outdated snapshot is not returned, but asked again."""
    for looks_left in reversed(range(_LOOKS + 1)):
        answer = select(snapshot, query, needs, policy, broken)
        # Between listing and reading, a writer may have removed a set, or committed one in a folder that looked
        # unfinished. So these answers count only if the snapshot is still current.
        is_doubtful = snapshot.saw_unfinished or not isinstance(answer, Selected)
        if not is_doubtful or not looks_left or snapshot.is_current():
            break
        snapshot = Snapshot(snapshot.paths, storage=snapshot.storage)
    return answer, snapshot


def _selected(answer: Selected | Refusal, snapshot: Snapshot, asked_by: AskedBy) -> Selected:
    if isinstance(answer, Selected):
        return answer
    raise worded(answer, snapshot, asked_by) from getattr(answer, "error", None)


@no_garbage_collection()
def newest_set(snapshot: Snapshot, model: str | None = None, *, asked_by: AskedBy = UNKNOWN) -> CheckpointSet | None:
    """Return the newest set with a trainer file (of ``model``), independent of its tags; None if no set has one.

    It only reads, so it may be called while a run saves.

    Raises ``CheckpointCorruptError`` if a newer committed set is broken, ``AmbiguousCheckpointError`` if another
    program wrote flat files of a later iteration beside the committed sets.
    """
    needs = () if model is None else (Need(model, "trainer"),)
    answer, snapshot = _ask(snapshot, Query.of(None), needs, Policy(any_tag=True), {})
    return None if isinstance(answer, Missing | NothingHere) else _selected(answer, snapshot, asked_by).found


def walk_back(
    snapshot: Snapshot,
    tag: str | Mapping[str, Any] | TrainingIteration | None,
    prove: Callable[[CheckpointSet], T],
    needs: Sequence[Need],
    policy: Policy,
    *,
    asked_by: AskedBy,
) -> tuple[Selected, T]:
    """Return the newest set that ``prove`` accepts, and the result of ``prove``; ``policy`` has ``walk_back``.

    ``prove`` verifies a set and raises ``CheckpointError`` or ``OSError`` for a broken one. Raises the errors of
    ``find_set``. If ``prove`` fails because the disk does, its error is raised, because the set may be good.
    """
    broken: dict[str, str] = {}
    while True:
        selected = find_set(snapshot, tag, needs, policy, broken=broken, asked_by=asked_by)
        try:
            return selected, prove(selected.found)
        except (CheckpointError, OSError) as error:
            # A failing disk proves nothing about the set.
            if is_out_of_reach(error):
                raise
            snapshot = selected.snapshot
            broken[selected.found.place] = str(error)


def require(snapshot: Snapshot, found: CheckpointSet, needs: Sequence[Need], *, asked_by: AskedBy = UNKNOWN) -> None:
    """Check that a selected set has further files. Raises the errors of ``find_set``."""
    if not all(found.has(need) for need in needs):
        raise worded(Missing(found, found.name, tuple(needs)), snapshot, asked_by)
