"""Computes a load plan: decides what happens to every entry of models and files. Pure: reads and changes nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence, Set
from functools import cached_property
from typing import Literal

import attrs

from noether_init_core.memory import no_garbage_collection
from noether_init_core.messages import listed
from noether_init_core.surgery.advice import Advice
from noether_init_core.surgery.casts import CastPolicy, can_cast, can_follow
from noether_init_core.surgery.fit import (
    TIED,
    Brought,
    PlanPart,
    Problems,
    TargetSpec,
    TensorSpec,
)
from noether_init_core.surgery.name_rules import NameMatch, NameRules, Taken, Transforms
from noether_init_core.surgery.patterns import PatternSet, lacks_dot, parse_glob
from noether_init_core.surgery.plan import LOADED_BEFORE, Action, LoadPlan, Origin, PlanRow, Problem, share_loaded
from noether_init_core.surgery.steps import Cast, Pad, Shape, Slice, Step, StepError, shapes_after
from noether_init_core.surgery.ties import names_of_ties, ties

#: ``PlanRow.rule`` of an entry of the file that is left out.
NOT_A_TENSOR = "neither tensor nor extra state"
_EXTRA_STATE = "_extra_state"
# A step may always make this many elements; above it, the limit depends on file and model.
_SMALL = 1 << 20


@attrs.frozen
class Policies:
    """What to do where file and model do not fit; the first value of each is the default.

    Attributes:
        on_missing: An entry of the model is not in the file: ``error``, ``keep`` its present value, or ``reset`` it by
            ``reset_parameters`` of its module.
        on_unexpected: An entry of the file is not in the model: ``error`` or ``ignore``.
        on_mismatch: Shapes differ: ``error``, ``keep`` the model's value, ``slice`` the file's tensor where it is
            longer, or ``pad`` it where it is shorter (with the model's own values).
        cast: ``same_kind`` allows float to float and integer to integer of any width, ``none`` only equal dtypes,
            ``any`` all but complex to real.
        min_coverage: Glob of names -> least share of their parameters that must come from checkpoints, from 0 to 1.
    """

    on_missing: Literal["error", "keep", "reset"] = "error"
    on_unexpected: Literal["error", "ignore"] = "error"
    on_mismatch: Literal["error", "keep", "slice", "pad"] = "error"
    cast: CastPolicy = "same_kind"
    min_coverage: Mapping[str, float] = attrs.Factory(dict)


@no_garbage_collection()
def plan_load(
    kind: str,
    parts: Sequence[PlanPart],
    rules: NameRules,
    *,
    policies: Policies | None = None,
    advice: Advice | None = None,
) -> LoadPlan:
    """Decide what happens to every entry of every part. Pure: reads no file, changes no model.

    Args:
        kind: The kind of the initializer, for messages.
        parts: The single models, each with its file.
        rules: The surgery on names; the same rules for every part.
        policies: What to do where file and model do not fit.
        advice: How the config writes the lines that put problems right; None for problems without advice.

    Raises nothing for entries that do not fit: they are problems of the plan.
    """
    policies = Policies() if policies is None else policies
    rows: list[PlanRow] = []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    matches: list[NameMatch] = []
    written: set[Hashable] = set()
    planners: list[_PartPlanner] = []
    for number, part in enumerate(parts):
        if written:
            # tensors that this submodel shares with an earlier one, which loads them
            before = {name for name, spec in part.targets.items() if spec.identity in written}
            part = attrs.evolve(part, loaded=part.loaded | before)
        match = rules.match(tuple(part.sources), (*part.targets, *part.unlisted))
        matches.append(match)
        planner = _PartPlanner(part, match, rules, policies, advice, number)
        planner.run()
        planners.append(planner)
        rows += planner.rows
        if len(parts) > 1:
            written |= {row.identity for row in planner.rows if row.writes} - {None}
        problems += planner.found.problems
        warnings += planner.found.warnings
    names = ", ".join(part.model for part in parts)
    sources = [name for part in parts for name in part.sources]
    targets = [name for part in parts for name in (*part.targets, *part.unlisted)]
    for message, is_error in rules.unmatched(matches, sources, targets):
        (problems if is_error else warnings).append(Problem("unmatched-rule", message, names))
    kept = {(part.model, name) for part, match in zip(parts, matches, strict=True) for name in match.kept}
    equal, tied = ties(rows, kept)
    problems += tied
    loaded = {row.identity for row in rows if row.writes} - {None}
    for planner in planners:
        unlisted, about = planner.plan_unlisted(loaded)
        rows += unlisted
        warnings += about
    if parts and not problems and not any(row.writes for row in rows):
        where = next(filter(None, (planner.found.elsewhere() for planner in planners)), "")
        problems.append(Problem("nothing-loaded", f"the plan loads no tensor of the model{where}", names))
    problems += _too_little(rows, policies.min_coverage, names)
    origins = tuple(Origin(kind, part.model, description=part.description, files=part.files) for part in parts)
    return LoadPlan(kind, tuple(rows), tuple(problems), tuple(warnings), origins, equal)


def _too_little(rows: Sequence[PlanRow], least: Mapping[str, float], names: str) -> list[Problem]:
    """Problems for globs of ``min_coverage`` whose share is not reached."""
    problems = []
    targets = [row for row in rows if row.target is not None]
    for glob, share in least.items():
        globs = PatternSet([parse_glob(glob).expression])
        chosen = [row for row in targets if globs.matching(row.key)]
        if not any(row.is_parameter for row in chosen):
            dotted = lacks_dot(glob, (row.key for row in targets))
            hint = f". Next: {glob}. (a trailing dot means everything below)" if dotted else ""
            problems.append(Problem("coverage", f"min_coverage: {glob} matches no parameter of the model{hint}", names))
            continue
        covered = share_loaded(chosen, or_before=True)
        if covered < share:
            absent = [row.key for row in chosen if row.is_parameter and not row.writes and row.rule != LOADED_BEFORE]
            what = "the parameters" if glob == "**" else f"the parameters of {glob}"
            message = (
                f"min_coverage: {100 * covered:.1f} % of {what} come from a checkpoint, below {100 * share:g} %; "
                f"not loaded: {listed(absent)}"
            )
            problems.append(Problem("coverage", message, names, tuple(absent)))
    return problems


class _PartPlanner:
    """Computes the rows of one part, and its problems."""

    def __init__(
        self,
        part: PlanPart,
        match: NameMatch,
        rules: NameRules,
        policies: Policies,
        advice: Advice | None,
        origin: int,
    ) -> None:
        self.part, self.match, self.policies, self.origin = part, match, policies, origin
        self.rows: list[PlanRow] = []
        self.found = Problems(part, match, rules, advice)
        self._misshaped: list[PlanRow] = []
        self._inconvertible: list[PlanRow] = []
        self._casts: dict[tuple[str, str], list[PlanRow]] = {}
        self._step_errors: dict[tuple[str, str], list[str]] = {}
        self._resolved: dict[tuple[int, tuple[str, ...], int], tuple[tuple[Step, ...], list[Shape]]] = {}
        self._specs = {**part.targets, **part.unlisted}
        self._tied = names_of_ties(self._specs)

    def run(self) -> None:
        """Fill ``rows`` and ``found``."""
        for name, spec in self.part.targets.items():
            self._plan_target(name, spec)
        for name, spec in self._unlisted_to_load.items():
            self._plan_target(name, spec)
        unexpected = self._plan_unused()
        found = self.found
        found.names()
        found.loads = any(row.writes for row in self.rows)
        for (before, _dtype), rows in self._casts.items():
            found.casts(rows, before)
        missing = [row for row in self.rows if row.action == "missing"]
        found.missing(missing, unexpected, was_to_reset=self.policies.on_missing == "reset")
        found.mismatched(self._misshaped, self.rows)
        for (rule, reason), names in self._step_errors.items():
            found.add("step", f"{rule or names[0]}: {reason} ({listed(names)})", names)
        found.dtypes(self._inconvertible, self.policies.cast)
        found.unwritable({row.key: self._specs[row.key].unwritable for row in self.rows if row.writes})
        found.unexpected(unexpected)
        if plain := [row.key for row in self.rows if row.target is None and row.rule == NOT_A_TENSOR]:
            found.warn("not-a-tensor", f"{listed(plain)} of the file: {NOT_A_TENSOR}, left out", plain)
        found.squares(self.rows)

    def plan_unlisted(self, written: Set[Hashable]) -> tuple[list[PlanRow], list[Problem]]:
        """The rows of parameters that the state dict leaves out, and a warning that names them.

        ``written``: memory that rows load; a parameter that another submodel lists has its row there.
        """
        own = {
            name: spec
            for name, spec in self.part.unlisted.items()
            if name not in self._unlisted_to_load and spec.tied_to is None and spec.identity not in written
        }
        rows, found = [], Problems(self.part, self.match, Transforms(), None)
        for name, spec in own.items():
            rule = LOADED_BEFORE if name in self.part.loaded else "not in state_dict()"
            rows.append(self._row(name, "keep", spec, Taken((), rule)))
        if names := [name for name in own if name not in self.part.loaded]:
            found.warn(
                "unlisted", f"state_dict() leaves out {listed(names)}, which will keep the present values", names
            )
        return rows, found.warnings

    @cached_property
    def _unlisted_to_load(self) -> dict[str, TargetSpec]:
        """Entries that the state dict leaves out and that get a value from the file, as in torch."""
        match, brought = self.match, self.part.brought
        return {
            name: spec
            for name, spec in self.part.unlisted.items()
            if name not in match.kept and (name in match.moves or name in brought)
        }

    def _plan_target(self, name: str, spec: TargetSpec) -> None:
        """Add the row of one entry of the model."""
        match = self.match
        if name in match.kept:
            self._keep(name, spec)
            return
        if name in self.part.brought and name not in self.part.loaded:
            self._bring(name, spec, self.part.brought[name])
            return
        taken = match.moves.get(name)
        if taken is None:
            donor = next((other for other in self._tied.get(spec.tied_to or name, ()) if other in match.moves), None)
            if donor is None:
                self._missing(name, spec)
                return
            taken = attrs.evolve(match.moves[donor], rule=f"{TIED}{donor}")
        sources = [self.part.sources[source] for source in taken.sources]
        if spec.unwritable:
            self._row(name, "load" if taken.sources == (name,) else "rename", spec, taken)
            return
        try:
            steps, shape, fitted = self._steps(taken, sources, spec)
        except StepError as error:
            self._row(name, "mismatch", spec, taken)
            self._step_errors.setdefault((taken.rule or "", str(error)), []).append(name)
            return
        if steps:
            rule = taken.rule or (f"on_mismatch: {self.policies.on_mismatch}" if fitted else None)
            taken = attrs.evolve(taken, steps=steps, rule=rule)
        if shape == spec.shape:
            self._plan_dtype(name, spec, taken, sources)
        elif self.policies.on_mismatch == "keep":
            self._row(name, "keep", spec, Taken((), "on_mismatch: keep"))
        else:
            self._misshaped.append(self._row(name, "mismatch", spec, taken))

    def _bring(self, name: str, spec: TargetSpec, brought: Brought) -> None:
        """Add the row of an entry whose value is made by loading code."""
        taken = Taken(brought.sources, brought.rule)
        if not brought.sources:
            self._row(name, "keep", spec, taken)
        elif brought.is_copy and brought.shape == spec.shape == self.part.sources[brought.sources[0]].shape:
            self.match.moves[name] = taken
            self._plan_dtype(name, spec, taken, [self.part.sources[brought.sources[0]]])
        else:
            self._row(name, "transform", attrs.evolve(spec, shape=brought.shape), taken)

    def _plan_dtype(self, name: str, spec: TargetSpec, taken: Taken, sources: list[TensorSpec]) -> None:
        is_same = taken.sources == (name,) or name not in self.match.moves
        action: Action = "transform" if taken.steps else "load" if is_same else "rename"
        if taken.steps or sources[0].dtype != spec.dtype:
            dtypes = list(dict.fromkeys(source.dtype for source in sources))
            explicit = [step.dtype for step in taken.steps if isinstance(step, Cast)]
            before = explicit[-1] if explicit else dtypes[0]
            can = can_cast(before, spec.dtype, self.policies.cast) and can_follow(dtypes, taken.steps)
            if not can or (taken.steps and spec.dtype == "object"):
                self._inconvertible.append(self._row(name, "mismatch", spec, taken))
                return
            if not taken.steps:
                action = "cast"
        row = self._row(name, action, spec, taken)
        if action == "cast" or (taken.steps and not explicit and dtypes != [spec.dtype]):
            self._casts.setdefault((before, spec.dtype), []).append(row)

    def _steps(self, taken: Taken, sources: list[TensorSpec], spec: TargetSpec) -> tuple[tuple[Step, ...], Shape, bool]:
        """The steps with every argument, their resulting shape, and whether ``on_mismatch`` added some."""
        if not taken.steps and tuple(sources[0].shape) == spec.shape:
            return (), spec.shape, False
        key = id(taken.steps), taken.sources, taken.parts
        known = self._resolved.get(key)
        if known is None:
            before = [tuple(source.shape) for source in sources]
            most = 64 * max(map(math.prod, (spec.shape, *before))) + _SMALL
            known = self._resolved[key] = shapes_after(taken.steps, before, taken.parts, most)
        steps, shapes = known
        shape = shapes[taken.part]
        fitting: tuple[Step, ...] = ()
        if shape != spec.shape and len(shape) == len(spec.shape) and taken.parts == 1:
            fitting = _fitting(shape, spec.shape, self.policies.on_mismatch)
            steps, shape = (*steps, *fitting), spec.shape if fitting else shape
        kept = [step.keeps_model for step in steps]
        if any(before and not after for before, after in itertools.pairwise(kept)):
            raise StepError("pad without a value keeps the model's own elements, so it must be the last step")
        return steps, shape, bool(fitting)

    def _missing(self, name: str, spec: TargetSpec) -> None:
        policy = self.policies.on_missing
        if name in self.part.loaded:
            self._row(name, "keep", spec, Taken((), LOADED_BEFORE))
        elif policy == "error" or (policy == "reset" and name not in self.part.resettable):
            self._row(name, "missing", spec, Taken(()))
        else:
            self._row(name, policy, spec, Taken((), f"on_missing: {policy}"))

    def _keep(self, name: str, spec: TargetSpec) -> None:
        rule = self.match.kept[name]
        source = self._unused_for.get(name)
        pattern = rule.partition(": ")[2]
        if source is not None and tuple(self.part.sources[source].shape) == spec.shape and not name.startswith(pattern):
            # a substring may match a name by mistake: 5. is in 15.weight, head. in lm_head.weight
            self.found.warn("kept", f"{name} keeps its value by {rule}, although an entry of the file fits", (name,))
        self._row(name, "keep", spec, Taken((), LOADED_BEFORE if name in self.part.loaded else rule))

    @cached_property
    def _unused_for(self) -> dict[str, str]:
        """Name of the model that is kept -> the first name of the file that it would have taken."""
        return {target: source for source, target in reversed(self.match.unused_kept.items())}

    @cached_property
    def _moved(self) -> set[str]:
        """Names of the file that rules map to an entry of the model."""
        return {name for taken in self.match.moves.values() for name in taken.sources}

    def _plan_unused(self) -> list[str]:
        """Add the rows of unused entries of the file; returns the names that are a problem."""
        used = {source for row in self.rows for source in row.sources}
        unexpected = []
        for source, spec in self.part.sources.items():
            if source in used:
                if self.match.astray.get(source, ("", ""))[1] and self.policies.on_unexpected == "error":
                    unexpected.append(source)  # a split gives a part that is not in the model
                continue
            rule = self._rule_of_unused(source)
            action: Action = "unexpected" if rule is None else "removed"
            if source in self.match.outside:
                action = "outside"
            if rule is None:
                unexpected.append(source)
            unused = TargetSpec(tuple(spec.shape), spec.dtype, spec.nbytes, is_parameter=False)
            self._row(None, action, unused, Taken((source,), rule))
        return unexpected

    def _rule_of_unused(self, source: str) -> str | None:
        """The reason why an entry of the file is unused; None if no rule decided so."""
        match = self.match
        if source in match.removed:
            return match.removed[source]
        if source in self.part.consumed:
            return self.part.consumed[source]
        if source in match.unused_kept:
            return match.kept[match.unused_kept[source]]
        if source in match.outside:
            return "outside source_root"
        if source in self.part.hidden:
            return "non-persistent buffer of the model"
        if self.policies.on_mismatch == "keep" and source not in match.astray and source in self._moved:
            return "on_mismatch: keep"
        if self.part.sources[source].dtype == "object" and not source.endswith(_EXTRA_STATE):
            return NOT_A_TENSOR
        return None if self.policies.on_unexpected == "error" else "on_unexpected: ignore"

    def _row(self, target: str | None, action: Action, spec: TargetSpec, taken: Taken) -> PlanRow:
        sources = [self.part.sources[source] for source in taken.sources]
        dtypes = {source.dtype for source in sources}
        row = PlanRow(
            self.part.model,
            target,
            taken.sources,
            action,
            spec.shape,
            spec.dtype,
            spec.nbytes,
            taken.rule,
            dtypes.pop() if len(dtypes) == 1 else None,
            spec.is_parameter,
            taken.steps,
            taken.part,
            taken.parts,
            tuple([tuple(source.shape) for source in sources]),
            spec.tied_to,
            self.origin,
            spec.identity,
        )
        self.rows.append(row)
        return row


def _fitting(shape: Shape, wanted: Shape, policy: str) -> tuple[Step, ...]:
    """The steps of ``on_mismatch`` that turn ``shape`` into ``wanted``; empty if they cannot."""
    pairs = list(zip(shape, wanted, strict=True))
    if policy == "slice" and all(have >= want for have, want in pairs):
        return tuple(Slice(dim, 0, want) for dim, (have, want) in enumerate(pairs) if have > want)
    if policy == "pad" and all(have <= want for have, want in pairs):
        return tuple(Pad(want, dim) for dim, (have, want) in enumerate(pairs) if have < want)
    return ()
