"""Which set a query means: a pure decision over a snapshot, which reads only what the decision needs."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs

from noether_init_core.errors import CheckpointError, CheckpointFormatError, ConfigError
from noether_init_core.files.storage.disk import is_out_of_reach
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import check_name
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, SetFolder
from noether_init_core.sets.file_names import FOLLOWING, PART_NAMES, Part
from noether_init_core.sets.snapshot import Snapshot

__all__ = [
    "Broken",
    "LaterFlatFiles",
    "Missing",
    "NoGoodSet",
    "NoSuchTag",
    "NothingHere",
    "Policy",
    "Query",
    "Refusal",
    "Selected",
    "SeveralBest",
    "newest_flat",
    "older_good",
    "select",
]

_BEST = ("best_model.", "best.")
_NOTHING: Mapping[str, str] = MappingProxyType({})


@attrs.frozen
class Query:
    """What a tag asks for: a tag as it is written, an iteration, or any iteration that has some of its fields.

    ``automatic``: the answer changes as the run goes on (``latest``, ``last``, ``E10``).
    """

    text: str
    iteration: TrainingIteration | None
    automatic: bool

    @classmethod
    def of(cls, tag: str | Mapping[str, Any] | TrainingIteration | None) -> Query:
        """Parse a ``checkpoint_tag``; None means ``latest``. Raises ``ConfigError``."""
        if tag is None:
            return cls("latest", None, automatic=True)
        if isinstance(tag, Mapping):
            tag = TrainingIteration.from_mapping(tag)
        if isinstance(tag, TrainingIteration):
            if not (tag.is_minimally_specified or tag.is_fully_specified):
                raise ConfigError(
                    f"checkpoint_tag {tag.to_mapping()} must say one of epoch, update, sample, or all three"
                )
            return cls(str(tag), tag, automatic=not tag.is_fully_specified)
        check_name(tag, "checkpoint_tag")
        try:
            iteration = TrainingIteration.from_string(tag)
        except ConfigError:
            return cls(tag, None, automatic=tag in FOLLOWING)
        return cls(tag, iteration, automatic=not iteration.is_fully_specified)

    @property
    def is_minimal(self) -> bool:
        """Whether it asks for the newest of all iterations that match."""
        return self.iteration is not None and not self.iteration.is_fully_specified

    def may_mean(self, iteration: TrainingIteration | None) -> bool:
        """Whether a set of ``iteration`` can be meant; what a text means, the iteration does not tell."""
        return self.iteration is None or (iteration is not None and self.iteration.matches(iteration))


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


@attrs.frozen
class NothingHere:
    """There is no set at all: no such run or stage, or one without checkpoints."""


@attrs.frozen
class NoSuchTag:
    """There are sets, and none is meant by the tag."""

    tag: str


@attrs.frozen
class SeveralBest:
    """``best`` could be any of these tags."""

    tags: tuple[str, ...]


@attrs.frozen
class Missing:
    """The set that is meant lacks a file: a wrong name, or a part that was never saved."""

    found: CheckpointSet
    tag: str
    needs: tuple[Need, ...]


@attrs.frozen
class Broken:
    """The set that is meant is damaged, or a newer one that cannot be read may be the one that is meant.

    Attributes:
        error: What is wrong with it.
        good: The newest older set whose files are there.
        may_walk_back: Whether ``on_invalid: previous`` leads to it.
        saved_as: A tag, where ``good`` is the newest older set that has it, and not the newest of all.
    """

    error: CheckpointError
    good: CheckpointSet | None = None
    may_walk_back: bool = False
    saved_as: str = ""


@attrs.frozen
class LaterFlatFiles:
    """Beside the committed sets there are files that go further, and not we wrote them."""

    newest: SetFolder
    later: tuple[tuple[CheckpointSet, TrainingIteration], ...]


@attrs.frozen
class NoGoodSet:
    """Every set that could be walked back to is broken: name -> why."""

    tried: Mapping[str, str]


Refusal = NothingHere | NoSuchTag | SeveralBest | Missing | Broken | LaterFlatFiles | NoGoodSet


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
    themselves. A full iteration means its newest set that has all of them; one field of it (``E10``) the newest match
    that has everything needed. Beside committed sets, flat files are not read; where they are later, no set is chosen
    automatically.

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


def newest_flat(
    snapshot: Snapshot, models: Collection[str] = (), unreadable: list[tuple[str, CheckpointError]] | None = None
) -> CheckpointSet | None:
    """The set of flat files of the latest iteration that has the trainer files of ``models``, or any.

    ``unreadable`` collects sets of which the iteration cannot be told, else they raise.
    """
    preferred = [one for one in snapshot.flat if one.models("trainer") and set(models) <= set(one.models("trainer"))]
    preferred.sort(key=lambda one: FOLLOWING.index(one.name) if one.name in FOLLOWING else 2)
    preferred.sort(key=lambda one: one.iteration is None)
    said: list[tuple[CheckpointSet, TrainingIteration]] = []
    for one in preferred:
        try:
            iteration = snapshot.iteration_of(one)
        except CheckpointError as error:
            if unreadable is None:
                raise
            unreadable.append((one.name, error))
            continue
        if iteration is not None and iteration.is_fully_specified:
            said.append((one, iteration))
    newest = max((iteration for _, iteration in said), default=None)
    return next((one for one, iteration in said if iteration == newest), None)


def older_good(snapshot: Snapshot, found: CheckpointSet) -> CheckpointSet | None:
    """The newest set of its models before ``found`` whose files are there; of flat files the newest plain iteration."""
    if found.committed:
        return _newest_good(snapshot, found.sequence or 0, found.models())
    return next((one for one in snapshot.flat_before(found) if one.models("trainer")), None)


def _newest_good(snapshot: Snapshot, below: int, models: Collection[str]) -> CheckpointSet | None:
    sets = (found for found in snapshot.readable(below=below) if found.is_of(models))
    return next((found for found in sets if snapshot.problem_of(found) is None), None)


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
        text = self._text()
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
        return (
            Selected(chosen, (), self.snapshot)
            if problem is None
            else self._broken(chosen.sequence or 0, problem, chosen)
        )

    def _readable(self, errors: list[tuple[int, CheckpointError]]) -> Iterator[CheckpointSet]:
        """Sets that the iteration of the query allows, best first; those that cannot be read go to ``errors``."""
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
            found = newest_flat(self.snapshot, self._models)
        except CheckpointError as error:
            return Broken(error, newest_flat(self.snapshot, self._models, []), may_walk_back=True)
        return NothingHere() if found is None else Selected(found, (), self.snapshot)

    def _text(self) -> str | SeveralBest:
        """The tag to look for, ``best`` resolved; empty where no tag decides."""
        text = self.query.text
        if self.policy.any_tag or self.query.iteration is not None:
            return ""
        if text != "best" and not text.startswith(_BEST[1]):
            return text
        tags = self.snapshot.tags()
        if text in tags:
            return text
        if text != "best":
            return _BEST[0] + text.removeprefix(_BEST[1])
        found = tuple(tag for tag in tags if tag.startswith(_BEST))
        return SeveralBest(found) if len(found) > 1 else next(iter(found), text)

    def _broken(self, sequence: int, error: CheckpointError, chosen: CheckpointSet | None) -> Broken:
        """``sequence`` is that of the broken set; ``chosen`` the newest that is known to be meant."""
        # an open text leads back to the newest set that has the tag, if one can be read
        is_open = self.query.text in FOLLOWING and chosen is not None and not self.policy.any_tag
        below = (chosen.sequence or 0) + 1 if is_open and chosen and sequence > (chosen.sequence or 0) else sequence
        good = _newest_good(self.snapshot, below, self._models)
        may_walk_back = self.query.automatic and good is not None and self._may_mean(good.iteration)
        newest = good if below == sequence else _newest_good(self.snapshot, sequence, self._models)
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
            (one.path.name, one.sequence, found)
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
            first = newest_flat(self.snapshot, self._models, unreadable)
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
