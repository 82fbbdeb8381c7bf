"""The entries of a file and a model, and problems where they do not fit, each with a fix."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import Literal, Protocol

import attrs

from noether_init_core.messages import listed, yaml_line
from noether_init_core.surgery.name_rules import NameMatch
from noether_init_core.surgery.patterns import near
from noether_init_core.surgery.plan import LOADED_BEFORE, WRITING, PlanRow, Problem, memory_of
from noether_init_core.surgery.steps import (
    Cast,
    Concat,
    Interpolate,
    Shape,
    Stack,
    Step,
    Transpose,
    shapes_after,
    written,
)


class TensorSpec(Protocol):
    """The properties of a tensor that a plan needs; ``TensorInfo`` of the readers has them."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


@attrs.frozen
class TargetSpec:
    """One entry of a model's state dict.

    Attributes:
        shape: The shape; empty for a 0-dimensional tensor and for an object that is not a tensor.
        dtype: The dtype without ``torch.``, or ``object`` for a module's extra state.
        nbytes: Number of elements times bytes per element.
        is_parameter: False for buffers and extra state.
        tied_to: If this is a further name of the same memory in this model, the first name; else None.
        identity: Equal for entries with the same memory, also of other models; None if unknown.
        unwritable: Why the entry cannot be written in place, in words; empty if it can.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    is_parameter: bool = True
    tied_to: str | None = None
    identity: Hashable = None
    unwritable: str = ""


@attrs.frozen
class PlanPart:
    """One single model and the file that it is initialized from.

    Attributes:
        model: Path of names of the model.
        description: Origin of the file, in words: ``pretrain @ latest = E4_U16_S128``.
        files: Names of the files.
        sources: Entries of the file's state dict.
        targets: Entries of the model's state dict, in order.
        hidden: Names of non-persistent buffers: the model has them, its state dict does not.
        loaded: Names of the model that an earlier initializer will have loaded.
        resettable: Names of the model whose module has ``reset_parameters``.
        unlisted: Parameters of the model that its state dict leaves out.
    """

    model: str
    description: str
    files: tuple[str, ...]
    sources: Mapping[str, TensorSpec]
    targets: Mapping[str, TargetSpec]
    hidden: frozenset[str] = frozenset()
    loaded: frozenset[str] = frozenset()
    resettable: frozenset[str] = frozenset()
    unlisted: Mapping[str, TargetSpec] = attrs.Factory(dict)


CastPolicy = Literal["same_kind", "none", "any"]


def _kind_of(dtype: str) -> str:
    if dtype in ("bool", "object"):
        return dtype
    if dtype.startswith("complex"):
        return "complex"
    return "float" if dtype.startswith(("float", "bfloat")) else "integer"


def can_cast(source: str, target: str, policy: CastPolicy) -> bool:
    """Whether the policy ``cast:`` of the config allows the conversion of one dtype to the other."""
    if source == target:
        return True
    from_kind, to_kind = _kind_of(source), _kind_of(target)
    if policy == "none" or "object" in (from_kind, to_kind) or (from_kind == "complex" and to_kind != "complex"):
        return False
    return policy == "any" or from_kind == to_kind


def can_follow(dtypes: Sequence[str], steps: Sequence[Step]) -> bool:
    """Whether the steps lose nothing by dtype: complex stays complex, and combined tensors have one dtype."""
    current = set(dtypes)
    for step in steps:
        kinds = set(map(_kind_of, current))
        if isinstance(step, Cast):
            if "object" in kinds or ("complex" in kinds and _kind_of(step.dtype) != "complex"):
                return False
            current = {step.dtype}
        elif isinstance(step, Concat | Stack):
            if len(current) > 1:
                return False
        elif isinstance(step, Interpolate) and kinds != {"float"}:
            return False
    return len(current) == 1


#: The hint for entries that could keep the model's value, if the kind has a rule for it.
KEEP_MODEL_HINT = "To keep the model's own values there add: {line}"
_OTHER_NAMES = " Names differ; for rules: ninit suggest, or stack.suggest(model)"
# A fresh head or two is usual; beyond that, keeping the model's values would leave much of it random.
_FEW_MODULES = 2
_MOST_ENTRIES = 8
# A wrong rule is wrong for every layer: a few examples suffice.
_MOST_PROBLEMS = 5
_NUMBER = re.compile(r"[0-9]+")


class Problems:
    """The problems and warnings of one part of a plan. ``fresh_hint`` as in ``plan_load``."""

    def __init__(self, part: PlanPart, match: NameMatch, fresh_hint: str) -> None:
        self._part, self._match, self._hint = part, match, fresh_hint
        before = KEEP_MODEL_HINT.partition("{")[0]
        self._has_rules = fresh_hint.startswith(before)
        #: A rule as the config writes it: an item of a list, or in the text of ``fresh_hint``.
        self._line = fresh_hint.removeprefix(before) if "{rule}" in fresh_hint else "- {rule}"
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def add(self, code: str, message: str, keys: Sequence[str]) -> None:
        """Add a problem of this model."""
        self.problems.append(Problem(code, message, self._part.model, tuple(keys)))

    def warn(self, code: str, message: str, keys: Sequence[str]) -> None:
        """Add a warning about this model."""
        self.warnings.append(Problem(code, message, self._part.model, tuple(keys)))

    def names(self) -> None:
        """Report problems of the rules themselves, and names that rules overwrite."""
        for source, by, target, rule in self._match.overwritten:
            self.warn("overwritten", f"{source} and {by} both become {target} ({rule}); {by} is taken", (source, by))
        problems = [attrs.evolve(problem, model=self._part.model) for problem in self._match.problems]
        self.problems += problems[:_MOST_PROBLEMS]
        if problems[_MOST_PROBLEMS:]:
            self.add("more", f"and {len(problems) - _MOST_PROBLEMS} more of the same kind", ())

    def casts(self, rows: Sequence[PlanRow], before: str) -> None:
        """Warn of tensors that are converted to another dtype."""
        what = rows[0].key if len(rows) == 1 else f"{len(rows)} tensors ({rows[0].key}, ...)"
        self.warn("cast", f"{what}: {before} in the file becomes {rows[0].dtype}", [row.key for row in rows])

    def missing(self, rows: Sequence[PlanRow], unexpected: Sequence[str], *, was_to_reset: bool) -> None:
        """Report entries that are not in the file, with a fix: a rename, near names, or a rule that keeps them."""
        if not rows:
            return
        names = [row.key for row in rows]
        lost = [name for name in names if name not in self._part.resettable] if was_to_reset else []
        self.add(
            "missing",
            f"{self._part.model} needs {listed(names)}, not found in the file"
            + (self._taken_away(names) or self._in_their_place(names, unexpected))
            + (f" (on_missing: reset cannot reset {listed(lost)}: no reset_parameters in their modules)" * bool(lost)),
            names,
        )

    def _taken_away(self, names: Sequence[str]) -> str:
        """The rule that renames an entry of the file which the model needs; empty without one."""
        for name in names:
            if name in self._match.astray:
                target, rule = self._match.astray[name]
                return f" after renaming: {rule} makes {name} of the file {target}.{self._fresh(names)}"
        return ""

    def _in_their_place(self, names: Sequence[str], unexpected: Sequence[str]) -> str:
        """Near names in the file. If many names differ, it advises no rule that would leave the model random."""
        near = self._near(names[0], unexpected or list(self._part.sources), "the file has") or "."
        differ = unexpected and len({name.rpartition(".")[0] for name in names}) > _FEW_MODULES
        # without a hint no user reads the message: suggest itself plans like this
        other = _OTHER_NAMES if differ and self._hint else self._fresh(names)
        return near + (self._rename(names, unexpected) or other)

    def mismatched(self, rows: Sequence[PlanRow]) -> None:
        """Report entries of another shape, with a step that gives the shape, or a rule that keeps the model's value."""
        groups: dict[str, list[PlanRow]] = {}
        for row in rows:
            groups.setdefault(self._step_for(row), []).append(row)
        for fix, together in groups.items():
            first, names, more = _summary(together)
            made = ""
            if first.steps:
                shape = shapes_after(first.steps, first.source_shapes, first.parts)[1][first.part]
                made = f" by {first.rule}, gives {list(shape)}"
            message = (
                f"{first.key}: file {listed(map(list, first.source_shapes))}{made}, model {list(first.shape)}{more}."
            )
            self.add("mismatch", message + (fix or self._fresh(names)), names)

    def dtypes(self, rows: Sequence[PlanRow], policy: str) -> None:
        """Report entries whose dtype may not be converted."""
        if rows:
            first, names, more = _summary(rows)
            have = " and ".join(dict.fromkeys(self._part.sources[source].dtype for source in first.sources))
            self.add(
                "dtype",
                f"{first.key}: the file has {have}, the model {first.dtype}; "
                f"cast: {policy} does not allow the conversion{more}",
                names,
            )

    def unexpected(self, names: Sequence[str]) -> None:
        """Report entries of the file that are not in the model, grouped by the rule that renames them."""
        by_rule: dict[str, list[str]] = {}
        for name in names:
            by_rule.setdefault(self._match.astray.get(name, ("", ""))[1], []).append(name)
        for rule, sources in by_rule.items():
            made = [self._match.astray[name][0] for name in sources] if rule else sources
            has = f"{rule} makes" if rule else "the file has"
            message = f"{has} {listed(made)}, not found in {self._part.model}"
            close = self._near(made[0], list(self._part.targets), "the model has")
            written = self._match.written.get(made[0], made[0])
            if written != made[0] and made[0] in self._part.targets:
                close = f". In rules, leave out the prefix of a wrapper: {written}"
            self.add("unexpected", message + close.rstrip("."), sources)

    def squares(self, rows: Sequence[PlanRow]) -> None:
        """Warn of square matrices that stay as they are where others of the same layers are transposed."""
        groups = {_group(row.key) for row in rows if any(isinstance(step, Transpose) for step in row.steps)}
        plain = (row for row in rows if row.writes and not row.steps) if groups else ()
        square = (row for row in plain if len(row.shape) == 2 and row.shape[0] == row.shape[1])
        names = [row.key for row in square if _group(row.key) in groups]
        if names:
            verb = "is square and not transposed" if len(names) == 1 else "are square and not transposed"
            message = f"{listed(names)} {verb}, while others in the same layers are: shapes do not show which is right"
            self.warn("square", message, names)

    def _in_rules(self, names: Iterable[str]) -> list[str]:
        """Names as rules write them: below roots, without the prefixes of wrappers."""
        return [self._match.written.get(name, name) for name in names]

    def _near(self, name: str, others: Sequence[str], words: str) -> str:
        """A sentence with names similar to ``name``; empty without any."""
        candidates = near(name, others)
        return f". Near {name}, {words}: {', '.join(candidates)}." if candidates else ""

    def _step_for(self, row: PlanRow) -> str:
        """The rule with a step that makes the shape of the model; empty without one."""
        step = _fixing_step(row)
        if step is None:
            return ""
        kind = "Transposed" if isinstance(step, Transpose) else "Another grid"
        rule = self._line.format(rule=yaml_line({"from": self._in_rules(row.sources)[0], "do": [written(step)]}))
        if isinstance(step, Transpose) and row.rule is not None and "(" in row.rule:
            rule = f"add do: [transpose] to {row.rule}"
        return f" {kind}. Next: {rule}"

    def _fresh(self, names: Sequence[str]) -> str:
        """The config line that keeps exactly ``names`` of the model; whole names if a part of them would match more."""
        if not self._hint:
            return ""
        wanted = set(names)
        others = self._in_rules(target for target in self._part.targets if target not in wanted)
        names = self._in_rules(names)
        if len(names) > _MOST_ENTRIES and len({name.rpartition(".")[0] for name in names}) > _MOST_ENTRIES:
            return _OTHER_NAMES
        rule = ""
        modules = list(dict.fromkeys(name.rpartition(".")[0] + "." if "." in name else name for name in names))
        if self._has_rules or any(module in other for module in modules for other in others):
            # patterns of Noether match substrings, and 5.weight is a substring of 15.weight
            whole = tuple(one for one in modules if not any(f"{other}.".startswith(one) for other in others))
            entries = [*whole, *(name for name in names if not f"{name}.".startswith(whole))]
            value = entries[0] if len(entries) == 1 else entries
            rule = yaml_line({"keep_model": value})
            if self._has_rules:
                line = f"- keep_model: {yaml_line(value)}"
            else:
                line = f"transforms: {yaml_line([{'keep_model': value}])}"
                if self._match.matched:
                    line += ", with the rules of the other fields written as transforms, too"
        else:
            entries, line = modules, f"patterns_to_instantiate: {yaml_line(modules)}"
        return _OTHER_NAMES if len(entries) > _MOST_ENTRIES else " " + self._hint.format(line=line, rule=rule)

    def _rename(self, missing: Sequence[str], unexpected: Sequence[str]) -> str:
        """The config line of one rename that resolves every missing name; empty without one."""
        if not self._hint or not unexpected or len(missing) > 10_000:
            return ""
        sides = (missing, self._part.targets), (unexpected, self._part.sources)
        wanted, theirs = (
            dict(zip(self._in_rules(names), (tuple(specs[name].shape) for name in names), strict=True))
            for names, specs in sides
        )
        found = _single_rename(wanted, theirs)
        if found is None:
            return ""
        src, dst = found
        if not self._has_rules:
            return f" One rename fits all: patterns_to_rename: {yaml_line([{'src': src, 'dst': dst}])}"
        if not src.endswith(".") or not all(name.startswith(src) for name in theirs):
            return ""
        rule = {"from": src, "to": dst} if dst else {"from": f"{src}<rest..>", "to": "<rest..>"}
        return f" One rename fits all: {self._line.format(rule=yaml_line(rule))}"


def _single_rename(missing: Mapping[str, Shape], unexpected: Mapping[str, Shape]) -> tuple[str, str] | None:
    """The one replacement ``(src, dst)`` in names of the file that gives every missing name, with its shape."""
    first = next(iter(unexpected)).split(".")
    for wanted in [name for name in missing if name.rpartition(".")[2] == first[-1]][:20]:
        other = wanted.split(".")
        shared = 0
        while shared < min(len(first), len(other)) and first[-1 - shared] == other[-1 - shared]:
            shared += 1
        src, dst = (
            ".".join(segments[: len(segments) - shared]) + ("." if len(segments) > shared else "")
            for segments in (first, other)
        )
        if src and {name.replace(src, dst): shape for name, shape in unexpected.items()}.items() >= missing.items():
            return src, dst
    return None


def _summary(rows: Sequence[PlanRow]) -> tuple[PlanRow, list[str], str]:
    """The first row, the names of all rows, and a phrase with the other names."""
    names = [row.key for row in rows]
    return rows[0], names, f"; {listed(names[1:])} too" if names[1:] else ""


def _fixing_step(row: PlanRow) -> Step | None:
    """Transpose, or another square grid of a position embedding, if one of them gives the shape of the model."""
    if row.steps or len(row.source_shapes) != 1 or len(row.shape) < 2 or len(row.source_shapes[0]) != len(row.shape):
        return None
    source, target = row.source_shapes[0], row.shape
    if source != target and Transpose().shapes([source]) == [target]:
        return Transpose()
    grids = square_grids(source, target) if "pos" in row.key.lower() else []
    # one prefix token, the class token, is the most common
    return min(grids, key=lambda step: (1, 0, 2)[step.prefix_tokens], default=None)


def square_grids(source: Shape, target: Shape) -> list[Interpolate]:
    """The steps from one square grid of tokens to another that fit, with 0 to 2 prefix tokens."""
    if (*source[:-2], source[-1]) != (*target[:-2], target[-1]):
        return []
    found = []
    for prefix in (0, 1, 2):
        rows, to_rows = (math.isqrt(max(tokens - prefix, 0)) for tokens in (source[-2], target[-2]))
        if min(rows, to_rows) > 1 and (rows**2 + prefix, to_rows**2 + prefix) == (source[-2], target[-2]):
            found.append(Interpolate((rows, rows), (to_rows, to_rows), prefix))
    return found


def _group(name: str) -> str:
    """The name up to the number of its layer, with the number removed."""
    found = _NUMBER.search(name)
    return name[: found.start()] if found else name.rpartition(".")[0].partition(".")[0]


_DONE = {"keep": "kept", "reset": "reset"}
# actions that decide the final value of an entry
_SETTLED = WRITING | _DONE.keys()


def names_of_ties(targets: Mapping[str, TargetSpec]) -> dict[str, list[str]]:
    """First name of each tensor of a model that has several names -> all of its names."""
    tied: dict[str, list[str]] = {spec.tied_to: [] for spec in targets.values() if spec.tied_to is not None}
    for name, spec in targets.items() if tied else ():
        if (first := spec.tied_to or name) in tied:
            tied[first].append(name)
    return tied


def ties(
    rows: Sequence[PlanRow], kept: Set[tuple[str, str]]
) -> tuple[tuple[tuple[str, str, str, str], ...], list[Problem]]:
    """For entries that are one tensor: ``equal`` of a ``LoadPlan``, and problems.

    ``kept``: (model, name) of the entries that rules of the config keep.
    """
    places: defaultdict[Hashable, list[PlanRow]] = defaultdict(list)
    for row in rows:
        if row.target is not None and row.action in _SETTLED and row.rule != LOADED_BEFORE:
            places[memory_of(row)].append(row)
    equal: dict[tuple[str, str, str, str], None] = {}
    problems: list[Problem] = []
    for group in places.values():
        if len(group) == 1:
            continue
        # the entry that decides: the first one loaded, else the first one reset
        first = min(group, key=lambda row: (not row.writes, row.action != "reset"))
        for row in group:
            is_same_model = row.model == first.model
            one, other = (f"{each.key}{'' if is_same_model else f' of {each.model}'}" for each in (row, first))
            message = ""
            if row.writes:
                is_same = (row.sources, row.steps, row.part) == (first.sources, first.steps, first.part)
                if is_same_model and is_same:
                    continue
                if row.steps or first.steps:
                    message = f"{other} and {one} are one tensor, and transforms compute it twice. Next: drop one"
                else:
                    equal[first.model, first.sources[0], row.model, row.sources[0]] = None
            elif row.action != first.action and ((row.model, row.key) in kept if is_same_model else first.writes):
                done = "loaded" if first.writes else "reset"
                message = f"{one} is {_DONE[row.action]}, but it is the same tensor as {other}, which is {done}"
            if message:
                problems.append(Problem("tied", message, row.model, (row.key,)))
    return tuple(equal), problems
