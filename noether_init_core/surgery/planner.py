"""plan_load: decides what happens to every entry of models and files. Pure: nothing is read, nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import attrs

from noether_init_core.memory import no_garbage_collection
from noether_init_core.surgery.advice import Advice
from noether_init_core.surgery.name_rules import NameMatch, NameRules, Taken, with_wrappers
from noether_init_core.surgery.plan import (
    LOADED_BEFORE,
    Action,
    LoadPlan,
    Origin,
    PlanPart,
    PlanRow,
    Problem,
    TargetSpec,
    TensorSpec,
    share_loaded,
)
from noether_init_core.surgery.steps import Cast as CastStep
from noether_init_core.surgery.steps import (
    Concat,
    Interpolate,
    Pad,
    Slice,
    Stack,
    Step,
    StepError,
    shapes_after,
)
from noether_init_core.surgery.transforms import glob_set

__all__ = ["Policies", "plan_load"]

Cast = Literal["same_kind", "none", "any"]


@attrs.frozen
class Policies:
    """What is done where file and model do not fit; the first word of each is the default.

    Attributes:
        on_missing: The file has nothing for an entry of the model: ``error``, ``keep`` its present value, or ``reset``
            it by its module's own ``reset_parameters``.
        on_unexpected: The file has an entry that the model has not: ``error`` or ``ignore``.
        on_mismatch: Shapes differ: ``error``, ``keep`` the model's value, ``slice`` what is too long in the file, or
            ``pad`` what is too short (the model's own values stay behind it).
        cast: ``same_kind`` allows float to float and integer to integer of any width, ``none`` only equal dtypes,
            ``any`` everything but complex to real.
        min_coverage: Glob of names -> least share of their parameters that must come from checkpoints, from 0 to 1.
    """

    on_missing: Literal["error", "keep", "reset"] = "error"
    on_unexpected: Literal["error", "ignore"] = "error"
    on_mismatch: Literal["error", "keep", "slice", "pad"] = "error"
    cast: Cast = "same_kind"
    min_coverage: Mapping[str, float] = attrs.Factory(dict)


def plan_load(
    kind: str,
    parts: Sequence[PlanPart],
    rules: NameRules,
    *,
    policies: Policies | None = None,
    fresh_hint: str = "",
) -> LoadPlan:
    """Decide what happens to every entry of every part. Pure: nothing is read, nothing is changed.

    Args:
        kind: The kind that asks, for messages.
        parts: The single models, each with its file.
        rules: The surgery on names; the same rules for every part.
        policies: What is done where file and model do not fit.
        fresh_hint: What is said beside missing and misshaped entries, with ``{line}`` for the config line that keeps
            them. Empty where the kind has no such line.
    """
    with no_garbage_collection():
        return _planned(kind, parts, rules, Policies() if policies is None else policies, fresh_hint)


def _planned(kind: str, parts: Sequence[PlanPart], rules: NameRules, policies: Policies, fresh_hint: str) -> LoadPlan:
    rows: list[PlanRow] = []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    equal: list[tuple[str, str, str]] = []
    matches: list[NameMatch] = []
    written: set[Hashable] = set()
    for number, part in enumerate(parts):
        if written:
            # what an earlier submodel loads, this one shares with it
            before = {name for name, spec in part.targets.items() if spec.identity in written}
            part = attrs.evolve(part, loaded=part.loaded | before)
        match = with_wrappers(rules.match(tuple(part.sources), tuple(part.targets)), part.sources, part.targets)
        matches.append(match)
        planned = _PartPlanner(part, match, policies, fresh_hint, number)
        planned.run()
        rows += planned.rows
        if len(parts) > 1:
            written |= {part.targets[str(row.target)].identity for row in planned.rows if row.writes} - {None}
        problems += planned.problems
        warnings += planned.warnings
        equal += planned.equal
    names = ", ".join(part.model for part in parts)
    for message, is_error in rules.unmatched(matches, [tuple(part.sources) for part in parts]):
        (problems if is_error else warnings).append(Problem("unmatched-rule", message, names))
    if parts and not problems and not any(row.writes for row in rows):
        problems.append(Problem("nothing-loaded", "no tensor of the model would be loaded", names))
    across, shared = _ties_across(parts, rows)
    problems += shared
    problems += _too_little(rows, policies.min_coverage, names)
    origins = tuple(Origin(kind, part.model, description=part.description, files=part.files) for part in parts)
    return LoadPlan(kind, tuple(rows), tuple(problems), tuple(warnings), origins, tuple(equal), across)


def _too_little(rows: Sequence[PlanRow], least: Mapping[str, float], names: str) -> list[Problem]:
    """What ``min_coverage`` asks for and does not get."""
    problems = []
    for glob, share in least.items():
        globs = glob_set([glob])
        chosen = [row for row in rows if row.target is not None and globs.matching(row.target)]
        if not any(row.is_parameter for row in chosen):
            below = glob_set([] if glob.endswith(".") else [f"{glob}."])
            dotted = any(below.matching(row.target) for row in rows if row.target is not None)
            hint = f". Next: {glob}. (a trailing dot means everything below)" if dotted else ""
            problems.append(Problem("coverage", f"min_coverage: {glob} matches no parameter of the model{hint}", names))
            continue
        covered = share_loaded(chosen, or_before=True)
        if covered < share:
            lacks = [row.key for row in chosen if row.is_parameter and not row.writes and row.rule != LOADED_BEFORE]
            what = "the parameters" if glob == "**" else f"the parameters of {glob}"
            message = (
                f"min_coverage: {100 * covered:.1f} % of {what} come from a checkpoint, {100 * share:g} % are asked "
                f"for; not {_listed(lacks)}"
            )
            problems.append(Problem("coverage", message, names, tuple(lacks)))
    return problems


def _ties_across(
    parts: Sequence[PlanPart], rows: Sequence[PlanRow]
) -> tuple[tuple[tuple[str, str, str, str], ...], list[Problem]]:
    """Entries of different models that are the same memory: what must be equal, and what cannot be."""
    places: dict[Hashable, list[PlanRow]] = {}
    identities = {
        (part.model, name): spec.identity
        for part in parts
        for name, spec in part.targets.items()
        if spec.identity is not None
    }
    for row in rows:
        identity = identities.get((row.model, row.target or ""))
        if identity is not None and row.rule != LOADED_BEFORE and (row.writes or row.action in ("keep", "reset")):
            places.setdefault(identity, []).append(row)
    across: list[tuple[str, str, str, str]] = []
    problems: list[Problem] = []
    for group in places.values():
        first = next((row for row in group if row.writes), None)
        others = [row for row in group if first is not None and row.model != first.model]
        if first is None:
            continue
        for row in others:
            if row.writes and (row.steps or first.steps):
                message = (
                    f"{row.target} of {row.model} and {first.target} of {first.model} are one tensor, and transforms "
                    "make it twice. Next: a rule that makes it once"
                )
                problems.append(Problem("tied", message, row.model, (row.key,)))
            elif row.writes:
                across.append((first.model, first.sources[0], row.model, row.sources[0]))
            else:
                done = "kept" if row.action == "keep" else "reset"
                message = (
                    f"{row.model}: {row.target} is {done}, but it is the same tensor as {first.target} of "
                    f"{first.model}, which is loaded"
                )
                problems.append(Problem("tied", message, row.model, (row.key,)))
    return tuple(dict.fromkeys(across)), problems


def _kind_of(dtype: str) -> str:
    if dtype == "bool" or dtype == "object":
        return dtype
    if dtype.startswith("complex"):
        return "complex"
    return "float" if dtype.startswith(("float", "bfloat")) else "integer"


def _can_cast(source: str, target: str, cast: Cast) -> bool:
    if source == target:
        return True
    from_kind, to_kind = _kind_of(source), _kind_of(target)
    if cast == "none" or "object" in (from_kind, to_kind) or (from_kind == "complex" and to_kind != "complex"):
        return False
    return cast == "any" or from_kind == to_kind


# Elements that any step may make.
_SMALL = 1 << 20
# A rule that is wrong is wrong for every layer.
_MOST_PROBLEMS = 5


class _PartPlanner:
    """The rows and problems of one part."""

    def __init__(self, part: PlanPart, match: NameMatch, policies: Policies, fresh_hint: str, origin: int) -> None:
        self.part, self.match, self.policies, self.origin = part, match, policies, origin
        self._advice = Advice(part, fresh_hint, match.said)
        self.rows: list[PlanRow] = []
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.equal: list[tuple[str, str, str]] = []
        self._casts: dict[tuple[str, str], list[str]] = {}
        self._step_errors: dict[tuple[str, str], list[str]] = {}
        self._resolved: dict[tuple[int, tuple[str, ...], int], tuple[tuple[Step, ...], list[tuple[int, ...]]]] = {}
        self._fitted: set[str] = set()
        self._unused_for: dict[str, str] | None = None
        self._taking: set[str] | None = None
        self._tied: dict[str, list[str]] = {}
        for first in {spec.tied_to: None for spec in part.targets.values() if spec.tied_to is not None}:
            self._tied[first] = []
        if self._tied:
            for name, spec in part.targets.items():
                first = spec.tied_to or name
                if first in self._tied:
                    self._tied[first].append(name)

    def run(self) -> None:
        found: dict[str, list[str]] = {"missing": [], "mismatch": [], "dtype": [], "unwritable": []}
        for name, spec in self.part.targets.items():
            problem = self._plan_target(name, spec)
            if problem is not None:
                found[problem].append(name)
        unexpected = self._plan_unused()
        for source, by, target, rule in self.match.overwritten:
            self._warn("overwritten", f"{source} and {by} both become {target} ({rule}); {by} is taken", (source, by))
        for (before, dtype), names in self._casts.items():
            what = names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"
            self._warn("cast", f"{what}: {before} in the file becomes {dtype}", names)
        for problem_of_names in self.match.problems[:_MOST_PROBLEMS]:
            self._problem(problem_of_names.code, problem_of_names.message, problem_of_names.names)
        if len(self.match.problems) > _MOST_PROBLEMS:
            self._problem("more", f"and {len(self.match.problems) - _MOST_PROBLEMS} more of that sort", ())
        self._report_missing(found["missing"], unexpected)
        self._report_mismatched(found["mismatch"])
        self._report_dtypes(found["dtype"])
        for name in found["unwritable"]:
            self._problem("unwritable", f"{name} {self.part.targets[name].unwritable}, so it cannot be loaded", [name])
        self._report_unexpected(unexpected)
        self._check_tied()
        squares = self._advice.squares(self.rows)
        if squares:
            verb = "is square and taken as it is" if len(squares) == 1 else "are square and taken as they are"
            self._warn(
                "square",
                f"{_listed(squares)} {verb}, while others beside are transposed: shapes cannot tell whether to",
                squares,
            )

    def _plan_target(self, name: str, spec: TargetSpec) -> str | None:
        """Add the row of one entry of the model; the code of its problem, if it has one."""
        match = self.match
        if name in match.kept:
            self._keep(name, spec)
            return None
        taken = match.moves.get(name)
        if taken is None:
            donor = next((other for other in self._tied.get(spec.tied_to or name, ()) if other in match.moves), None)
            if donor is None:
                return self._missing(name, spec)
            taken = attrs.evolve(match.moves[donor], rule=f"tied to {donor}")
        sources = [self.part.sources[source] for source in taken.sources]
        try:
            steps, shape = self._steps(taken, sources, spec)
        except StepError as error:
            self._row(name, taken.sources, "mismatch", spec, taken, sources)
            self._step_errors.setdefault((taken.rule or "", str(error)), []).append(name)
            return None
        if steps:
            rule = taken.rule
            if taken.sources[0] in self._fitted and not rule:
                rule = f"on_mismatch: {self.policies.on_mismatch}"
            taken = attrs.evolve(taken, steps=steps, rule=rule)
        if shape != spec.shape:
            if self.policies.on_mismatch == "keep":
                self._row(name, (), "keep", spec, Taken((), "on_mismatch: keep"))
                return None
            self._row(name, taken.sources, "mismatch", spec, taken, sources)
            return "mismatch"
        return self._plan_dtype(name, spec, taken, sources)

    def _plan_dtype(self, name: str, spec: TargetSpec, taken: Taken, sources: list[TensorSpec]) -> str | None:
        if not taken.steps and sources[0].dtype == spec.dtype:
            is_same = taken.sources == (name,) or name not in self.match.moves
            self._row(name, taken.sources, "load" if is_same else "rename", spec, taken, sources)
            return "unwritable" if spec.unwritable else None
        dtypes = dict.fromkeys(source.dtype for source in sources)
        explicit = [step.dtype for step in taken.steps if isinstance(step, CastStep)]
        before = explicit[-1] if explicit else next(iter(dtypes))
        can = _can_cast(before, spec.dtype, self.policies.cast) and _can_follow(list(dtypes), taken.steps)
        if not can or (taken.steps and spec.dtype == "object"):
            self._row(name, taken.sources, "mismatch", spec, taken, sources)
            return "dtype"
        action: Action = "rename"
        if taken.steps:
            action = "transform"
        elif taken.sources == (name,) or name not in self.match.moves:
            action = "load"
        if before != spec.dtype or list(dtypes) != [spec.dtype]:
            action = "transform" if taken.steps else "cast"
            if not explicit:
                self._casts.setdefault((before, spec.dtype), []).append(name)
        self._row(name, taken.sources, action, spec, taken, sources)
        return "unwritable" if spec.unwritable else None

    def _steps(
        self, taken: Taken, sources: list[TensorSpec], spec: TargetSpec
    ) -> tuple[tuple[Step, ...], tuple[int, ...]]:
        """The steps, every argument said, those that ``on_mismatch`` adds included, and the shape that they give."""
        if not taken.steps and tuple(sources[0].shape) == spec.shape:
            return (), spec.shape
        key = id(taken.steps), taken.sources, taken.parts
        known = self._resolved.get(key)
        if known is None:
            before = [tuple(source.shape) for source in sources]
            most = 64 * max(map(math.prod, (spec.shape, *before))) + _SMALL
            known = self._resolved[key] = shapes_after(taken.steps, before, taken.parts, most)
        steps, shapes = known
        shape = shapes[taken.part]
        if shape != spec.shape and len(shape) == len(spec.shape) and taken.parts == 1:
            steps = (*steps, *_fitting(shape, spec.shape, self.policies.on_mismatch))
            if len(steps) > len(known[0]):
                shape = spec.shape
                self._fitted.add(taken.sources[0])
        if any(step.keeps_model for step in steps[:-1]):
            keeps = [number for number, step in enumerate(steps) if step.keeps_model]
            if not all(step.keeps_model for step in steps[keeps[0] :]):
                raise StepError("pad without a value lets the model's own elements stay, so it has to come last")
        return steps, shape

    def _missing(self, name: str, spec: TargetSpec) -> str | None:
        if name in self.part.loaded:
            self._row(name, (), "keep", spec, Taken((), LOADED_BEFORE))
            return None
        policy = self.policies.on_missing
        if policy == "error" or (policy == "reset" and name not in self.part.resettable):
            self._row(name, (), "missing", spec, Taken(()))
            return "missing"
        self._row(name, (), "keep" if policy == "keep" else "reset", spec, Taken((), f"on_missing: {policy}"))
        return None

    def _keep(self, name: str, spec: TargetSpec) -> None:
        rule = self.match.kept[name]
        if self._unused_for is None:
            self._unused_for = {target: source for source, target in reversed(self.match.unused_kept.items())}
        source = self._unused_for.get(name)
        pattern = rule.partition(": ")[2]
        if source is not None and tuple(self.part.sources[source].shape) == spec.shape and not name.startswith(pattern):
            # a pattern that hits inside a name may not be meant for it: 5. is in 15.weight, head. in lm_head.weight
            self._warn("kept", f"{name} keeps its value by {rule}, though the file has one that fits", (name,))
        self._row(name, (), "keep", spec, Taken((), LOADED_BEFORE if name in self.part.loaded else rule))

    def _plan_unused(self) -> list[str]:
        used = {source for row in self.rows for source in row.sources}
        unexpected = []
        for source, spec in self.part.sources.items():
            if source in used:
                if self.match.astray.get(source, ("", ""))[1] and self.policies.on_unexpected == "error":
                    unexpected.append(source)  # one of several parts has no place in the model
                continue
            rule = self._rule_of_unused(source)
            action: Action = "unexpected" if rule is None else "removed"
            if source in self.match.outside:
                action = "outside"
            if rule is None:
                unexpected.append(source)
            shape, dtype = tuple(spec.shape), spec.dtype
            self.rows.append(
                PlanRow(
                    self.part.model,
                    None,
                    (source,),
                    action,
                    shape,
                    dtype,
                    spec.nbytes,
                    rule,
                    dtype,
                    is_parameter=False,
                    source_shapes=(shape,),
                    origin=self.origin,
                )
            )
        return unexpected

    def _rule_of_unused(self, source: str) -> str | None:
        """Why an entry of the file is not used; None: nobody said that it should not be."""
        if source in self.match.removed:
            return self.match.removed[source]
        if source in self.match.unused_kept:
            return self.match.kept[self.match.unused_kept[source]]
        if source in self.match.outside:
            return "outside source_root"
        if source in self.part.hidden:
            return "non-persistent buffer of the model"
        if source not in self.match.astray and self.policies.on_mismatch == "keep" and self._is_target_of(source):
            return "on_mismatch: keep"
        return None if self.policies.on_unexpected == "error" else "on_unexpected: ignore"

    def _is_target_of(self, source: str) -> bool:
        if self._taking is None:
            self._taking = {name for taken in self.match.moves.values() for name in taken.sources}
        return source in self._taking

    def _report_unexpected(self, unexpected: list[str]) -> None:
        by_rule: dict[str, list[str]] = {}
        for source in unexpected:
            by_rule.setdefault(self.match.astray.get(source, ("", ""))[1], []).append(source)
        for rule, names in by_rule.items():
            if not rule:
                self._problem(
                    "unexpected",
                    f"the file has {_listed(names)}, which {self.part.model} has not"
                    + self._advice.near(names, list(self.part.targets), "the model has").rstrip("."),
                    names,
                )
                continue
            made = [self.match.astray[name][0] for name in names]
            self._problem(
                "unexpected",
                f"{rule} makes {_listed(made)}, which {self.part.model} has not"
                + self._advice.near(made, list(self.part.targets), "the model has").rstrip("."),
                names,
            )

    def _check_tied(self) -> None:
        if not self._tied:
            return
        writes = {row.target: row for row in self.rows if row.writes}
        keeps = {row.target for row in self.rows if row.action == "keep" and row.rule != LOADED_BEFORE}
        resets = {row.target for row in self.rows if row.action == "reset"}
        for names in self._tied.values():
            if len(names) == 1:
                continue
            rows = [writes[name] for name in names if name in writes]
            ways = dict.fromkeys((row.sources, row.steps, row.part) for row in rows)
            if len(ways) > 1 and any(row.steps for row in rows):
                both = " and ".join(row.key for row in rows[:2])
                self._problem("tied", f"{both} are one tensor, and transforms make it twice. Next: drop one", names)
            elif rows:
                sources = list(dict.fromkeys(row.sources[0] for row in rows))
                self.equal += [(self.part.model, sources[0], other) for other in sources[1:]]
            kept = [name for name in names if name in keeps and name in self.match.kept]
            reset = [name for name in names if name in resets]
            if kept and (rows or reset):
                other = f"{rows[0].key}, which is loaded" if rows else f"{reset[0]}, which is reset"
                self._problem("tied", f"{kept[0]} is kept, but it is the same tensor as {other}", names)

    def _report_missing(self, missing: list[str], unexpected: list[str]) -> None:
        if missing:
            self._problem(
                "missing",
                f"{self.part.model} needs {_listed(missing)}, which the file has not"
                + self._advice.near(missing, unexpected or list(self.part.sources), "the file has")
                + self._advice.missing(missing, unexpected)
                + self._cannot_reset(missing),
                missing,
            )

    def _cannot_reset(self, missing: list[str]) -> str:
        names = [name for name in missing if name not in self.part.resettable]
        if self.policies.on_missing != "reset" or not names:
            return ""
        return f" (on_missing: reset cannot reset {_listed(names)}: no reset_parameters in their modules)"

    def _report_mismatched(self, mismatched: list[str]) -> None:
        rows = {row.target: row for row in self.rows if row.target in set(mismatched)}
        by_advice: dict[str, list[PlanRow]] = {}
        for name in mismatched:
            row = rows[name]
            own = self._advice.mismatch([row])
            by_advice.setdefault(own if own.startswith((" Transposed", " Another")) else "", []).append(row)
        for together in by_advice.values():
            first = together[0]
            more = f"; {_listed([row.key for row in together[1:]])} too" if len(together) > 1 else ""
            made = f" by {first.rule}, gives {list(self._made(first))}" if first.steps else ""
            shapes = ", ".join(str(list(shape)) for shape in first.source_shapes)
            self._problem(
                "mismatch",
                f"{first.key}: file {shapes}{made}, model {list(first.shape)}{more}.{self._advice.mismatch(together)}",
                [row.key for row in together],
            )
        for (rule, reason), names in self._step_errors.items():
            self._problem("step", f"{rule or names[0]}: {reason} ({_listed(names)})", names)

    def _made(self, row: PlanRow) -> tuple[int, ...]:
        return shapes_after(row.steps, row.source_shapes, row.parts)[1][row.part]

    def _report_dtypes(self, names: list[str]) -> None:
        if names:
            row = next(row for row in self.rows if row.target == names[0])
            more = f"; {_listed(names[1:])} too" if len(names) > 1 else ""
            self._problem(
                "dtype",
                f"{row.target}: the file has {self._dtypes(row)}, the model {row.dtype}; "
                f"cast: {self.policies.cast} does not convert one to the other{more}",
                names,
            )

    def _dtypes(self, row: PlanRow) -> str:
        return " and ".join(dict.fromkeys(self.part.sources[source].dtype for source in row.sources))

    def _row(
        self,
        target: str,
        sources: tuple[str, ...],
        action: Action,
        spec: TargetSpec,
        taken: Taken,
        source_specs: Sequence[TensorSpec] = (),
    ) -> None:
        shapes = tuple([tuple(source.shape) for source in source_specs])
        self.rows.append(
            PlanRow(
                self.part.model,
                target,
                sources,
                action,
                spec.shape,
                spec.dtype,
                spec.nbytes,
                taken.rule,
                _dtype_of_all(source_specs),
                spec.is_parameter,
                taken.steps,
                taken.part,
                taken.parts,
                shapes,
                spec.tied_to,
                self.origin,
                spec.identity,
            )
        )

    def _problem(self, code: str, message: str, keys: Sequence[str]) -> None:
        self.problems.append(Problem(code, message, self.part.model, tuple(keys)))

    def _warn(self, code: str, message: str, keys: Sequence[str]) -> None:
        self.warnings.append(Problem(code, message, self.part.model, tuple(keys)))


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _can_follow(dtypes: Sequence[str], steps: Sequence[Step]) -> bool:
    """Whether steps lose nothing by dtype: complex stays complex, and what is put together is of one dtype."""
    current = list(dtypes)
    for step in steps:
        if isinstance(step, CastStep):
            if any(_kind_of(dtype) == "object" for dtype in current):
                return False
            if _kind_of(step.dtype) != "complex" and any(_kind_of(dtype) == "complex" for dtype in current):
                return False
            current = [step.dtype]
        elif isinstance(step, Concat | Stack):
            if len(set(current)) > 1:
                return False
        elif isinstance(step, Interpolate) and any(_kind_of(dtype) != "float" for dtype in current):
            return False
    return len(set(current)) == 1


def _dtype_of_all(sources: Sequence[TensorSpec]) -> str | None:
    if len(sources) == 1:
        return sources[0].dtype
    dtypes = {source.dtype for source in sources}
    return dtypes.pop() if len(dtypes) == 1 else None


def _fitting(shape: tuple[int, ...], wanted: tuple[int, ...], policy: str) -> tuple[Step, ...]:
    """The steps of ``on_mismatch`` that make ``wanted`` of ``shape``; none where they cannot."""
    if policy == "slice" and all(have >= want for have, want in zip(shape, wanted, strict=True)):
        pairs = enumerate(zip(shape, wanted, strict=True))
        return tuple(Slice(dim, 0, want) for dim, (have, want) in pairs if have > want)
    if policy == "pad" and all(have <= want for have, want in zip(shape, wanted, strict=True)):
        pairs = enumerate(zip(shape, wanted, strict=True))
        return tuple(Pad(want, dim) for dim, (have, want) in pairs if have < want)
    return ()
