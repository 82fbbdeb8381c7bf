"""Which set a query means: a pure decision over a snapshot; asked again where the folder changes meanwhile."""

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
from noether_init_core.sets.refusals import (
    AskedBy,
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
#: How often sets are listed anew before an error is believed.
_LOOKS = 5


@attrs.frozen
class Policy:
    """How a query is answered.

    Attributes:
        any_tag: The newest set that has a trainer file is meant, whatever its tags (``auto_resume``).
        walk_back: An open tag leads from a broken set to the newest good set before it.
        root: Model whose sets are preferred complete.
        parts: For a query that several sets match, and for walking back, sets count that have every file of ``root``
            of these parts that some set has; unless no set has all of them.
    """

    any_tag: bool = False
    walk_back: bool = False
    root: str | None = None
    parts: tuple[Part, ...] = ()


_PLAIN = Policy()


@attrs.frozen
class Selected:
    """The set that is meant; (set, why) of each that was passed over on the way back to it, newest first; what it was
    selected from.
    """

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
    """The set that ``query`` means, with every file that is needed.

    Newest is the highest sequence of the committed sets; where there is none, the latest iteration of flat files. A
    text means the newest set saved under it that has any of the models needed: others can be saved into the run by
    themselves. Unless such a set was saved under just that text, ``best`` stands for the only ``best_model.*`` (or
    ``best.*``) that they have, ``best.loss`` for ``best_model.loss``. A full iteration means its newest set that has
    all of the models; one field of it (``E10``) the newest match that has everything needed. Beside committed sets,
    flat files are not read; where they are later, no set is chosen automatically.

    With ``policy.walk_back``, an open tag means what it means, and then every older set, of the models needed, in turn.
    What a set with an unreadable manifest was tagged cannot be known: newer ones are passed over, and do not make the
    tag mean a set that never had it; only where no readable set has the tag, every set before the newest unreadable
    one comes. Of flat files only the plain ``E.._U.._S..`` come, none later than what some file of the first one says.

    Args:
        snapshot: What is there.
        query: What is asked for.
        needs: The files that the set must have.
        policy: How the query is answered.
        broken: Name of a set -> what the caller has found wrong with it. Walking back passes over these.
    """
    return _Question(snapshot, query, tuple(needs), policy, broken).answer()


#: Name and sequence (0 for flat files) of a set, and the set, or why it cannot be read.
_Step = tuple[str, int, CheckpointSet | CheckpointError]


@attrs.frozen
class _Question:
    """One question; the answer is put together from these steps, none of which changes anything."""

    snapshot: Snapshot
    query: Query
    needs: tuple[Need, ...]
    policy: Policy
    broken: Mapping[str, str]

    def answer(self) -> Selected | Refusal:
        newest = self.snapshot.newest_folder
        if newest is None and not self.snapshot.flat:
            return NothingHere()
        if newest is not None and (self.query.automatic or self.policy.any_tag):
            later = self.snapshot.later_flat
            if later:
                return LaterFlatFiles(newest, tuple(later))
        if self.policy.walk_back and (self.query.automatic or self.policy.any_tag):
            steps = self._steps_back() if newest is not None else self._flat_steps_back()
            first = next(steps, None)
            if first is not None:
                return self._walk_back(itertools.chain([first], steps))
        return self._meant()

    @property
    def _models(self) -> frozenset[str]:
        return frozenset(need.model for need in self.needs if need.model is not None)

    @property
    def _is_choosy(self) -> bool:
        """Whether the newest set that has everything is meant, and not one certain set."""
        return self.policy.any_tag or self.query.is_minimal

    @property
    def _everything(self) -> tuple[Need, ...]:
        """What is needed, and what sets of the policy's model have at best; that, unless no set has all of it."""
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

    def _meant(self) -> Selected | Refusal:
        """The one set that is meant, or why there is none; a set that cannot be read is never passed over."""
        text = self._meant_tag()
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
        """Sets that the iteration of the query allows, newest first; those that cannot be read go to ``errors``."""
        iteration = None if self.policy.any_tag else self.query.iteration
        if self.snapshot.newest_folder is None:
            yield from (one for one in self.snapshot.flat if self._may_mean(one.iteration))
            return
        for folder, found in self.snapshot.heads(iteration):
            if isinstance(found, CheckpointError):
                errors.append((folder.sequence, found))
            else:
                yield found

    def _is_asked_for(self, found: CheckpointSet, needs: Sequence[Need]) -> bool:
        """Whether the set is the one that is meant, of those that have the tag or match the iteration."""
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
        return NothingHere() if found is None else Selected(found, (), self.snapshot)

    def _meant_tag(self) -> str | SeveralBest:
        """The tag to look for; empty where none decides. ``best`` is that of the models and their parts."""
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
        """``sequence`` is that of the broken set; ``chosen`` the newest that is known to be meant."""
        # an open text leads back to the newest set that has the tag, if one can be read
        is_open = self.query.text in FOLLOWING and chosen is not None and not self.policy.any_tag
        below = (chosen.sequence or 0) + 1 if is_open and chosen and sequence > (chosen.sequence or 0) else sequence
        good = self.snapshot.newest_good(self._models, below)
        may_walk_back = self.query.automatic and good is not None and self._may_mean(good.iteration)
        newest = good if below == sequence else self.snapshot.newest_good(self._models, sequence)
        return Broken(error, good, may_walk_back, self.query.text if is_open and good != newest else "")

    def _may_mean(self, iteration: TrainingIteration | None) -> bool:
        return self.policy.any_tag or self.query.may_mean(iteration)

    # Walking back.

    def _walk_back(self, steps: Iterator[_Step]) -> Selected | Refusal:
        tried: dict[str, str] = {}
        incomplete: CheckpointSet | None = None
        for name, sequence, found in steps:
            if isinstance(found, CheckpointError):
                # a set of a newer release, or one that cannot be reached, is not broken
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
        """Committed sets: what the query means, then what to walk back to. None where nothing is meant."""
        heads = self.snapshot.heads(None if self.policy.any_tag else self.query.iteration)
        steps = (
            (one.name, one.sequence, found)
            for one, found in heads
            # of which models an unreadable set is cannot be known
            if isinstance(found, CheckpointError) or found.is_of(self._models)
        )
        if self._is_choosy:
            yield from steps
            return
        above: list[_Step] = []
        for step in steps:
            found = step[-1]
            if isinstance(found, CheckpointSet) and self.query.text in found.tags:
                # A set that never had the tag is not meant by it, whatever the unreadable ones had.
                yield from (one for one in above if isinstance(one[-1], CheckpointError))
                yield step
                yield from steps
                return
            if above or isinstance(found, CheckpointError):
                above.append(step)
        yield from above

    def _flat_steps_back(self) -> Iterator[_Step]:
        """The same for sets of flat files."""
        if self.policy.any_tag:
            unreadable: list[tuple[str, CheckpointError]] = []
            first = self.snapshot.newest_flat(self._models, unreadable)
            yield from ((name, 0, error) for name, error in unreadable)
        else:
            text = "" if self.query.is_minimal else self.query.text
            matching = (one for one in self.snapshot.flat if self.query.may_mean(one.iteration))
            first = next((one for one in matching if text in ("", *one.tags)), None)
        if first is None:
            return
        yield first.name, 0, first
        for one in self.snapshot.flat_before(first):
            if self.query.may_mean(one.iteration):
                yield one.name, 0, one


# The same on the disk, which changes meanwhile; an error where no set can be told.


@no_garbage_collection()
def find_set(
    snapshot: Snapshot,
    tag: str | Mapping[str, Any] | TrainingIteration | None = None,
    needs: Sequence[Need] = (),
    policy: Policy = _PLAIN,
    *,
    broken: Mapping[str, str] = _NOTHING,
    asked_by: AskedBy = "tag",
) -> Selected:
    """The set that ``tag`` means, with every file that is needed; what that is, ``select`` says.

    A writer may commit or retire sets meanwhile: then it is asked again, of a new snapshot, which ``Selected`` holds.

    Args:
        snapshot: What is there.
        tag: None (``latest``), a tag as it was saved, ``best`` or ``best.<metric>``, or an iteration as text or
            mapping: ``E10_U100_S200``, or one field of it (``E10``, ``{"epoch": 10}``).
        needs: The files that the set must have.
        policy: How it is answered.
        broken: Sets that the caller has found broken.
        asked_by: Who asks; errors advise what its config can say.

    Raises:
        ConfigError: ``tag`` is none.
        CheckpointNotFoundError: The run, stage, tag, model or info does not exist; what exists is listed.
        IncompleteSetError: The set lacks a part; sets that have everything are listed.
        AmbiguousCheckpointError: ``best`` with several metrics; several models for a need without a name; flat files of
            a later iteration than the newest committed set, unless one set is asked for by name.
        CheckpointCorruptError: The manifest is broken, or files are missing or cut short. ``CheckpointFormatError``:
            another release wrote it. ``NoGoodSetError``: so it is with every set that could be walked back to.
    """
    return _selected(*_ask(snapshot, Query.of(tag), needs, policy, broken), asked_by)


def _ask(
    snapshot: Snapshot, query: Query, needs: Sequence[Need], policy: Policy, broken: Mapping[str, str]
) -> tuple[Selected | Refusal, Snapshot]:
    """The answer, and the snapshot that gave it: one that writers have not overtaken."""
    for looks_left in reversed(range(_LOOKS + 1)):
        answer = select(snapshot, query, needs, policy, broken)
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
def newest_set(snapshot: Snapshot, model: str | None = None, *, asked_by: AskedBy = "tag") -> CheckpointSet | None:
    """The newest set with a trainer file (of ``model``), whatever its tags; None where there is none.

    Raises ``CheckpointCorruptError`` if a newer committed set is broken, ``AmbiguousCheckpointError`` if flat files
    of a later iteration, not ours, lie beside the committed sets.
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
    """The newest set that is proven good, and what its proof gave; ``policy`` has ``walk_back``.

    ``prove`` verifies a set; it raises ``CheckpointError`` or ``OSError`` for a broken one. Raises what ``find_set``
    raises, and what ``prove`` raises for a set that cannot be reached: whether that is broken is not known.
    """
    broken: dict[str, str] = {}
    while True:
        selected = find_set(snapshot, tag, needs, policy, broken=broken, asked_by=asked_by)
        try:
            return selected, prove(selected.found)
        except (CheckpointError, OSError) as error:
            if is_out_of_reach(error, unless_read=True):
                raise
            snapshot = selected.snapshot
            broken[selected.found.place] = str(error)


def require(snapshot: Snapshot, found: CheckpointSet, needs: Sequence[Need], *, asked_by: AskedBy = "tag") -> None:
    """Make sure that a set which was selected before has further files; raises what ``find_set`` would raise."""
    if not all(found.has(need) for need in needs):
        raise worded(Missing(found, found.name, tuple(needs)), snapshot, asked_by)
