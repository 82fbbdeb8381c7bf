"""The entries of a file and a model, and problems where they do not fit, each with a fix."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import attrs

from noether_init_core.messages import listed
from noether_init_core.surgery.advice import Advice, in_rules, resized
from noether_init_core.surgery.name_rules import NameMatch, NameRules
from noether_init_core.surgery.patterns import near
from noether_init_core.surgery.plan import PlanRow, Problem
from noether_init_core.surgery.roots import other_root, wrong_root
from noether_init_core.surgery.steps import (
    Interpolate,
    Pad,
    Shape,
    Step,
    Transpose,
    shapes_after,
    written,
)
from noether_init_core.surgery.wrappers import bare_names


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
class Brought:
    """The value that loading code of modules gives to an entry of the model.

    Attributes:
        sources: Names in the file that the value is computed from; empty if the code fills it otherwise.
        rule: The code, in words.
        shape: The shape that the entry has afterwards.
        is_copy: Whether the value is a copy of the single source.
    """

    sources: tuple[str, ...]
    rule: str
    shape: tuple[int, ...]
    is_copy: bool


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
        unlisted: Parameters and persistent buffers that the state dict leaves out; they load where the file has them.
        brought: Names of the model whose value is made by loading code of modules.
        consumed: Names in the file that only such code takes -> the code, in words.
        beside: Names of parts of the file that lie beside its state dict, and are not in ``sources``.
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
    brought: Mapping[str, Brought] = attrs.Factory(dict)
    consumed: Mapping[str, str] = attrs.Factory(dict)
    beside: tuple[str, ...] = ()


#: What begins the part of a message with the line that puts the plan right.
KEEP = "To keep the model's own values there add: "
DROP = "To leave it unread add: "
_OTHER_NAMES = " Names differ; for rules: ninit suggest, or stack.suggest(model)"
# A fresh head or two is usual; beyond that, keeping the model's values would leave much of it random.
_FEW_MODULES = 2
# A wrong rule is wrong for every layer: a few examples suffice.
_MOST_PROBLEMS = 5
_NUMBER = re.compile(r"[0-9]+")


class Problems:
    """The problems and warnings of one part of a plan. ``rules`` and ``advice`` as in ``plan_load``."""

    def __init__(self, part: PlanPart, match: NameMatch, rules: NameRules, advice: Advice | None) -> None:
        self._part, self._match, self._rules, self._advice = part, match, rules, advice
        # whether the same entries have other names in the file, so that none of them is superfluous
        self._is_renamed = False
        #: Whether the plan loads some tensor; if not, keeping the model and dropping the file is no advice.
        self.loads = True
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
        if self._is_elsewhere:
            self.add("source-root", wrong_root(self._rules, self._part, self._advice), ())
        names = [row.key for row in rows]
        lost = [name for name in names if name not in self._part.resettable] if was_to_reset else []
        self.add(
            "missing",
            f"{self._part.model} needs {listed(names)}, not found in the file"
            + (self._taken_away(names) or self._in_their_place(names, unexpected))
            + (f" (on_missing: reset cannot reset {listed(lost)}: no reset_parameters in their modules)" * bool(lost)),
            names,
        )

    def elsewhere(self) -> str:
        """The part of the file that fits the model better than what the rules see; empty without one."""
        if self._advice is None:
            return ""
        if self._is_elsewhere:
            return f"; {wrong_root(self._rules, self._part, self._advice)}"
        return other_root(self._rules, self._match, self._part, self._advice)

    @property
    def _is_elsewhere(self) -> bool:
        """Whether ``source_root`` leaves out the whole file."""
        return bool(self._match.outside) and len(self._match.outside) == len(self._part.sources)

    def _taken_away(self, names: Sequence[str]) -> str:
        """The rule that renames an entry of the file which the model needs; empty without one."""
        for name in names:
            if name in self._match.astray:
                target, rule = self._match.astray[name]
                return f" after renaming: {rule} makes {name} of the file {target}.{self._fresh(names)}"
        return ""

    def _in_their_place(self, names: Sequence[str], unexpected: Sequence[str]) -> str:
        """Near names in the file. If many names differ, it advises no rule that would leave the model random."""
        if self._is_elsewhere:
            return ""
        near = self._near(names[0], unexpected or list(self._part.sources), "the file has") or "."
        if root := self.elsewhere():
            self._is_renamed = True
            return near.removesuffix(".") + root
        differ = unexpected and (not self.loads or len({name.rpartition(".")[0] for name in names}) > _FEW_MODULES)
        rename = self._rename(names, unexpected)
        self._is_renamed = bool(rename or differ)
        # without advice no user reads the message: suggest itself plans like this
        other = _OTHER_NAMES if differ and self._advice else self._fresh_or_later(names, unexpected)
        return near + (rename or other)

    def _fresh_or_later(self, names: Sequence[str], unexpected: Sequence[str]) -> str:
        """The line for entries that the file lacks: a later initializer may load them, or they keep their values."""
        if self._advice is None or unexpected or not self._advice.is_followed:
            return self._fresh(names)
        return f" A later initializer loads weights, too. Next: {self._advice.field('on_missing', 'keep')}"

    def mismatched(self, rows: Sequence[PlanRow], others: Iterable[PlanRow]) -> None:
        """Report entries of another shape, with a step that gives the shape, or a rule that keeps the model's value.

        ``others``: all rows of the model.
        """
        groups: dict[str, list[PlanRow]] = {}
        parts = resized(shapes_of(rows), shapes_of(row for row in others if row.writes)) if rows else {}
        for row in rows:
            groups.setdefault(self._step_for(row, parts.get(row.key, ())), []).append(row)
        for fix, together in groups.items():
            first, names, more = _summary(together)
            made = ""
            if first.steps:
                shape = shapes_after(first.steps, first.source_shapes, first.parts)[1][first.part]
                made = f" by {first.rule}, gives {list(shape)}"
            message = (
                f"{first.key}: file {listed(map(list, first.source_shapes))}{made}, model {list(first.shape)}{more}."
            )
            self.add("mismatch", message + (fix or self._fresh(names, "on_mismatch")), names)

    def unwritable(self, reasons: Mapping[str, str]) -> None:
        """Report entries that cannot be written in place; one problem for those with the same reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            if reason:
                why, _, following = reason.partition(". Next: ")
                more = f"; {listed(names[1:])} too" if names[1:] else ""
                fix = f". Next: {following}" if following else ""
                self.add("unwritable", f"{names[0]} {why}, so it cannot be loaded{more}{fix}", names)

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
            self.add("unexpected", message + close.rstrip(".") + self._unread(sources, rule), sources)

    def _unread(self, names: Sequence[str], rule: str) -> str:
        """The line that leaves entries of the file unread; empty if a rename or a better rule is the way on."""
        is_wrong = rule and all(taken.rule != rule for taken in self._match.moves.values())
        if self._advice is None or is_wrong or self._is_renamed or not self.loads:
            return ""
        dropped = set(names)
        others = [name for name in self._part.sources if name not in dropped]
        return f". {DROP}{self._advice.drop(names, others, self._written)}"

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

    @cached_property
    def _written(self) -> Mapping[str, str]:
        """Name -> how rules write it, if that differs: below roots, without the prefixes of wrappers."""
        sides = self._part.targets, self._part.sources
        # the fields of Noether see whole names, and the rules that a line may add do not
        return self._match.written or {
            name: bare for side in sides for bare, name in bare_names(side).items() if name != bare
        }

    def _in_rules(self, names: Iterable[str]) -> list[str]:
        return in_rules(names, self._written)

    def _near(self, name: str, others: Sequence[str], words: str) -> str:
        """A sentence with names similar to ``name``; empty without any."""
        candidates = near(name, others)
        return f". Near {name}, {words}: {', '.join(candidates)}." if candidates else ""

    def _step_for(self, row: PlanRow, parts: Sequence[Step]) -> str:
        """The rule with steps that make the shape of the model; empty without one. ``parts``: those of ``resized``."""
        step = _fixing_step(row)
        if self._advice is None or not (step or (parts and not row.steps)):
            return ""
        if isinstance(step, Transpose) and row.rule is not None and "(" in row.rule:
            return f" Transposed. Next: add do: [transpose] to {row.rule}"
        steps = parts if step is None else [step]
        words = "Transposed" if isinstance(step, Transpose) else "Another grid"
        if step is None:
            policy, which = ("pad", "the model") if isinstance(steps[0], Pad) else ("slice", "the file")
            words = f"{which.capitalize()} has more at the end (on_mismatch: {policy} takes the common part)"
        rule = {"from": self._in_rules(row.sources)[0], "do": [written(one) for one in steps]}
        decided = row.rule or ""
        target = self._in_rules([decided.removeprefix(TIED) if decided.startswith(TIED) else row.key])[0]
        if target != rule["from"]:
            rule = {"from": rule["from"], "to": target, "do": rule["do"]}
        return f" {words}. Next: {self._advice.rule(rule)}"

    def _fresh(self, names: Sequence[str], policy: str = "on_missing") -> str:
        """The line that keeps exactly ``names`` of the model; for many names without a pattern the policy."""
        if self._advice is None:
            return ""
        wanted = set(names)
        others = [target for target in self._part.targets if target not in wanted]
        line = self._advice.keep(names, others, self._written)
        return f" {KEEP}{line or self._advice.field(policy, 'keep')}"

    def _rename(self, missing: Sequence[str], unexpected: Sequence[str]) -> str:
        """The config line of one rename that resolves every missing name; empty without one."""
        if self._advice is None or not unexpected or len(missing) > 10_000:
            return ""
        sides = (missing, self._part.targets), (unexpected, self._part.sources)
        has_fields = self._advice.style == "fields"
        wanted, theirs = (
            {(name if has_fields else self._written.get(name, name)): tuple(specs[name].shape) for name in names}
            for names, specs in sides
        )
        found = _single_rename(wanted, theirs, anywhere=has_fields)
        if found is None:
            return ""
        src, dst = found
        if has_fields:
            renames = [*self._advice.fields.get("patterns_to_rename", ()), {"src": src, "dst": dst}]
            return f" One rename fits all: {self._advice.field('patterns_to_rename', renames)}"
        if not src.endswith("."):
            return ""
        rule = {"from": src, "to": dst} if dst else {"from": f"{src}<rest..>", "to": "<rest..>"}
        return f" One rename fits all: {self._advice.rule(rule)}"


def _single_rename(
    missing: Mapping[str, Shape], unexpected: Mapping[str, Shape], *, anywhere: bool
) -> tuple[str, str] | None:
    """The one replacement ``(src, dst)`` in names of the file that gives every missing name, with its shape.

    ``anywhere``: ``src`` is replaced wherever it occurs, as in Noether; else at the beginning only.
    """
    wanted = next(iter(missing))
    leaf = wanted.rpartition(".")[2]
    for theirs in [name for name in unexpected if name.rpartition(".")[2] == leaf][:20]:
        first, other = theirs.split("."), wanted.split(".")
        shared = 0
        while shared < min(len(first), len(other)) and first[-1 - shared] == other[-1 - shared]:
            shared += 1
        src, dst = (
            ".".join(segments[: len(segments) - shared]) + ("." if len(segments) > shared else "")
            for segments in (first, other)
        )
        if not src:
            continue
        moved = {
            name.replace(src, dst) if anywhere else dst + name.removeprefix(src): shape
            for name, shape in unexpected.items()
            if anywhere or name.startswith(src)
        }
        if moved.items() >= missing.items():
            return src, dst
    return None


def _summary(rows: Sequence[PlanRow]) -> tuple[PlanRow, list[str], str]:
    """The first row, the names of all rows, and a phrase with the other names."""
    names = [row.key for row in rows]
    return rows[0], names, f"; {listed(names[1:])} too" if names[1:] else ""


def shapes_of(rows: Iterable[PlanRow]) -> dict[str, tuple[Shape, Shape]]:
    """Name of each entry with one source of another shape -> the shapes in the file and in the model."""
    single = (row for row in rows if len(row.source_shapes) == 1)
    return {row.key: (row.source_shapes[0], row.shape) for row in single if row.source_shapes[0] != row.shape}


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


#: What begins ``PlanRow.rule`` of a further name of a tensor, before the name that is loaded.
TIED = "tied to "
