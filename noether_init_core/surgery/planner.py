"""plan_load: decides what happens to every entry of models and files. Pure: nothing is read, nothing is changed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

from noether_init_core.surgery.names import NameMatch, NameRules, near, single_rename, with_wrappers
from noether_init_core.surgery.plan import Action, LoadPlan, PlanPart, PlanRow, Problem, TargetSpec, TensorSpec

__all__ = ["plan_load"]

Cast = Literal["same_kind", "none", "any"]


def plan_load(
    kind: str, parts: Sequence[PlanPart], rules: NameRules, *, cast: Cast = "same_kind", fresh_hint: str = ""
) -> LoadPlan:
    """Decide what happens to every entry of every part. Pure: nothing is read, nothing is changed.

    Args:
        kind: The kind that asks, for messages.
        parts: The single models, each with its file.
        rules: The surgery on names; the same rules for every part.
        cast: ``same_kind`` allows float to float and integer to integer of any width, ``none`` only equal dtypes,
            ``any`` everything but complex to real.
        fresh_hint: What is said beside missing and misshaped entries, with ``{line}`` for the config line that keeps
            them. Empty where the kind has no such line.
    """
    rows: list[PlanRow] = []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    equal: list[tuple[str, str, str]] = []
    matches: list[NameMatch] = []
    for part in parts:
        match = with_wrappers(rules.match(tuple(part.sources), tuple(part.targets)), part.sources, part.targets)
        matches.append(match)
        planned = _PartPlanner(part, match, cast, fresh_hint)
        planned.run()
        rows += planned.rows
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
    origins = tuple((part.model, part.origin, part.file) for part in parts)
    return LoadPlan(kind, tuple(rows), tuple(problems), tuple(warnings), origins, tuple(equal), across)


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
        if identity is not None and (row.writes or row.action == "keep"):
            places.setdefault(identity, []).append(row)
    across: list[tuple[str, str, str, str]] = []
    problems: list[Problem] = []
    for group in places.values():
        first = next((row for row in group if row.writes), None)
        others = [row for row in group if first is not None and row.model != first.model]
        if first is None:
            continue
        for row in others:
            if row.writes:
                across.append((first.model, first.sources[0], row.model, row.sources[0]))
            else:
                message = (
                    f"{row.model}: {row.target} is kept, but it is the same tensor as {first.target} of "
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


class _PartPlanner:
    """The rows and problems of one part."""

    def __init__(self, part: PlanPart, match: NameMatch, cast: Cast, fresh_hint: str) -> None:
        self.part, self.match, self.cast, self.fresh_hint = part, match, cast, fresh_hint
        self.rows: list[PlanRow] = []
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.equal: list[tuple[str, str, str]] = []
        self._tied: dict[str, list[str]] = {}
        for name, spec in part.targets.items():
            self._tied.setdefault(spec.tied_to or name, []).append(name)

    def run(self) -> None:
        found: dict[str, list[str]] = {"missing": [], "mismatch": [], "dtype": [], "unwritable": []}
        for name, spec in self.part.targets.items():
            problem = self._plan_target(name, spec)
            if problem is not None:
                found[problem].append(name)
        unexpected = self._plan_unused()
        for source, by, target, rule in self.match.overwritten:
            self._warn("overwritten", f"{source} and {by} both become {target} ({rule}); {by} is taken", (source, by))
        self._report_missing(found["missing"], unexpected)
        self._report_mismatched(found["mismatch"])
        self._report_dtypes(found["dtype"])
        for name in found["unwritable"]:
            self._problem("unwritable", f"{name} {self.part.targets[name].unwritable}, so it cannot be loaded", [name])
        if unexpected:
            self._problem(
                "unexpected",
                f"the file has {_listed(unexpected)}, which {self.part.model} has not"
                + self._near_hint(unexpected, list(self.part.targets), "the model has").rstrip("."),
                unexpected,
            )
        self._check_tied()

    def _plan_target(self, name: str, spec: TargetSpec) -> str | None:
        """Add the row of one entry of the model; the code of its problem, if it has one."""
        match = self.match
        if name in match.kept:
            self._keep(name, spec)
            return None
        move = match.moves.get(name)
        if move is None:
            donor = next((other for other in self._tied[spec.tied_to or name] if other in match.moves), None)
            if donor is None:
                self._row(name, (), "missing", spec)
                return "missing"
            move = (match.moves[donor][0], f"tied to {donor}")
        source, rule = move
        source_spec = self.part.sources[source]
        if tuple(source_spec.shape) != spec.shape:
            self._row(name, (source,), "mismatch", spec, rule=rule, source=source_spec)
            return "mismatch"
        if not _can_cast(source_spec.dtype, spec.dtype, self.cast):
            self._row(name, (source,), "mismatch", spec, rule=rule, source=source_spec)
            return "dtype"
        action: Action = "load" if source == name or name not in match.moves else "rename"
        if source_spec.dtype != spec.dtype:
            action = "cast"
            self._warn("cast", f"{name}: {source_spec.dtype} in the file becomes {spec.dtype}", (name,))
        self._row(name, (source,), action, spec, rule=rule, source=source_spec)
        return "unwritable" if spec.unwritable else None

    def _keep(self, name: str, spec: TargetSpec) -> None:
        rule = self.match.kept[name]
        source = next((source for source, target in self.match.unused_kept.items() if target == name), None)
        pattern = rule.partition(": ")[2]
        if source is not None and tuple(self.part.sources[source].shape) == spec.shape and not name.startswith(pattern):
            # a pattern that hits inside a name may not be meant for it: 5. is in 15.weight, head. in lm_head.weight
            self._warn("kept", f"{name} keeps its value by {rule}, though the file has one that fits", (name,))
        self._row(name, (), "keep", spec, rule=rule)

    def _plan_unused(self) -> list[str]:
        used = {source for row in self.rows for source in row.sources}
        unexpected = []
        for source, spec in self.part.sources.items():
            if source in used:
                continue
            rule = self.match.removed.get(source)
            if rule is None and source in self.match.unused_kept:
                rule = self.match.kept[self.match.unused_kept[source]]
            if rule is None and source in self.part.hidden:
                rule = "non-persistent buffer of the model"
            action: Action = "unexpected" if rule is None else "removed"
            if rule is None:
                unexpected.append(source)
            shape, dtype = tuple(spec.shape), spec.dtype
            self.rows.append(
                PlanRow(self.part.model, None, (source,), action, shape, dtype, spec.nbytes, rule, shape, dtype, False)
            )
        return unexpected

    def _check_tied(self) -> None:
        writes = {row.target: row for row in self.rows if row.writes}
        keeps = {row.target for row in self.rows if row.action == "keep"}
        for names in self._tied.values():
            sources = list(dict.fromkeys(writes[name].sources[0] for name in names if name in writes))
            for other in sources[1:]:
                self.equal.append((self.part.model, sources[0], other))
            kept = [name for name in names if name in keeps and name in self.match.kept]
            if kept and sources:
                loaded = next(name for name in names if name in writes)
                self._problem(
                    "tied", f"{kept[0]} is kept, but it is the same tensor as {loaded}, which is loaded", names
                )

    def _report_missing(self, missing: list[str], unexpected: list[str]) -> None:
        if missing:
            self._problem(
                "missing",
                f"{self.part.model} needs {_listed(missing)}, which the file has not"
                + self._near_hint(missing, unexpected or list(self.part.sources), "the file has")
                + (self._rename(missing, unexpected) or self._fresh(missing)),
                missing,
            )

    def _report_mismatched(self, mismatched: list[str]) -> None:
        if mismatched:
            first = next(row for row in self.rows if row.target == mismatched[0])
            more = f"; {_listed(mismatched[1:])} too" if len(mismatched) > 1 else ""
            self._problem(
                "mismatch",
                f"{first.target}: file {list(first.source_shape or ())}, model {list(first.shape)}{more}."
                + self._fresh(mismatched),
                mismatched,
            )

    def _report_dtypes(self, names: list[str]) -> None:
        if names:
            row = next(row for row in self.rows if row.target == names[0])
            more = f"; {_listed(names[1:])} too" if len(names) > 1 else ""
            self._problem(
                "dtype",
                f"{row.target}: the file has {row.source_dtype}, the model {row.dtype}; "
                f"cast: {self.cast} does not convert one to the other{more}",
                names,
            )

    def _near_hint(self, names: list[str], others: list[str], words: str) -> str:
        candidates = near(names[0], others)
        return f". Near {names[0]}, {words}: {', '.join(candidates)}." if candidates else "."

    def _fresh(self, names: list[str]) -> str:
        """The config line that keeps exactly ``names`` of the model: whole names where parts of them would hit more."""
        if not self.fresh_hint:
            return ""
        wanted = set(names)
        modules = list(dict.fromkeys(name.rpartition(".")[0] + "." if "." in name else name for name in names))
        if any(module in target for module in modules for target in self.part.targets if target not in wanted):
            field, entries = "keys_to_instantiate", names
        else:
            field, entries = "patterns_to_instantiate", modules
        shown = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "")
        return " " + self.fresh_hint.format(line=f"{field}: [{shown}]")

    def _rename(self, missing: list[str], unexpected: list[str]) -> str:
        """The config line of one rename that would resolve every missing name, where there is one."""
        if not self.fresh_hint or not unexpected or len(missing) > 10_000:
            return ""
        found = single_rename(missing, unexpected)
        if found is None:
            return ""
        return f' One rename fits all: patterns_to_rename: [{{src: {found[0]}, dst: "{found[1]}"}}]'

    def _row(
        self,
        target: str,
        sources: tuple[str, ...],
        action: Action,
        spec: TargetSpec,
        *,
        rule: str | None = None,
        source: TensorSpec | None = None,
    ) -> None:
        self.rows.append(
            PlanRow(
                self.part.model,
                target,
                sources,
                action,
                spec.shape,
                spec.dtype,
                spec.nbytes,
                rule,
                None if source is None else tuple(source.shape),
                None if source is None else source.dtype,
                spec.is_parameter,
            )
        )

    def _problem(self, code: str, message: str, keys: Sequence[str]) -> None:
        self.problems.append(Problem(code, message, self.part.model, tuple(keys)))

    def _warn(self, code: str, message: str, keys: Sequence[str]) -> None:
        self.warnings.append(Problem(code, message, self.part.model, tuple(keys)))


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
