"""Advice beside problems of a plan: the line of a config that would mend them, where one can be told."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from noether_init_core.surgery.name_rules import near, single_rename
from noether_init_core.surgery.rows import PlanPart, PlanRow
from noether_init_core.surgery.steps import Transpose

__all__ = ["KEEP_MODEL_HINT", "Advice"]

#: What is said beside entries that could keep the model's value, where there is a rule for it.
KEEP_MODEL_HINT = "To keep the model's own values there add: {line}"
_OTHER_NAMES = " Names differ; for rules: noether-init suggest, or stack.suggest(model)"
# A head or two may begin anew; more of it would leave the model random.
_FEW_MODULES = 2
_MOST_ENTRIES = 8
_NUMBER = re.compile(r"[0-9]+")


class Advice:
    """For one part of a plan. ``fresh_hint`` as in ``plan_load``."""

    def __init__(self, part: PlanPart, fresh_hint: str, said: Mapping[str, str] | None = None) -> None:
        self._part, self._hint, self._said = part, fresh_hint, said or {}
        # as rules say them: below roots, without the prefixes of wrappers
        self._targets = [self._said.get(name, name) for name in part.targets]

    @property
    def _has_rules(self) -> bool:
        return self._hint.startswith(KEEP_MODEL_HINT)

    def near(self, names: Sequence[str], others: Sequence[str], words: str) -> str:
        """Names that look like the first of ``names``."""
        candidates = near(names[0], others)
        return f". Near {names[0]}, {words}: {', '.join(candidates)}." if candidates else "."

    def missing(self, missing: Sequence[str], unexpected: Sequence[str]) -> str:
        """Of entries that the file has not: one rename, other names, or a fresh start of these."""
        return self._rename(missing, unexpected) or self._other_names(missing, unexpected) or self._fresh(missing)

    def mismatch(self, rows: Sequence[PlanRow]) -> str:
        """Of entries of another shape: a step that makes the shape, where there is one; else a fresh start of these."""
        first = rows[0]
        if all(_is_transposed(row) for row in rows):
            source = self._said.get(first.sources[0], first.sources[0])
            rule = f"- {{from: {source}, do: [transpose]}}"
            if first.rule is not None and "(" in first.rule:
                rule = f"add do: [transpose] to {first.rule}"
            return f" Transposed. Next: {rule}"
        grid = _grid(first)
        if grid and len(rows) == 1:
            source = self._said.get(first.sources[0], first.sources[0])
            return f" Another grid. Next: - {{from: {source}, do: [interpolate: {grid}]}}"
        return self._fresh([row.key for row in rows])

    def squares(self, rows: Sequence[PlanRow]) -> list[str]:
        """Square matrices that stay as they are where others of the same layers are transposed: shapes cannot tell."""
        groups = {
            _group(row.key) for row in rows if row.steps and any(isinstance(step, Transpose) for step in row.steps)
        }
        if not groups:
            return []
        return [
            row.key
            for row in rows
            if not row.steps
            and len(row.shape) == 2
            and row.shape[0] == row.shape[1]
            and row.writes
            and _group(row.key) in groups
        ]

    def _fresh(self, names: Sequence[str]) -> str:
        """The config line that keeps exactly ``names`` of the model: whole names where parts of them would hit more."""
        if not self._hint:
            return ""
        wanted = set(names)
        names = [self._said.get(name, name) for name in names]
        entries: Sequence[str]
        if len(names) > _MOST_ENTRIES and len({name.rpartition(".")[0] for name in names}) > _MOST_ENTRIES:
            return _OTHER_NAMES
        modules = list(dict.fromkeys(name.rpartition(".")[0] + "." if "." in name else name for name in names))
        if self._has_rules:
            whole = [
                module
                for module in modules
                if all(target in wanted for target in self._targets if f"{target}.".startswith(module))
            ]
            entries = [*whole, *(name for name in names if not f"{name}.".startswith(tuple(whole) or "\0"))]
            if len(entries) > _MOST_ENTRIES:
                return _OTHER_NAMES
            shown = ", ".join(entries)
            return " " + self._hint.format(line=f"- keep_model: [{shown}]" if entries[1:] else f"- keep_model: {shown}")
        if any(module in target for module in modules for target in self._targets if target not in wanted):
            field, entries = "keys_to_instantiate", names
        else:
            field, entries = "patterns_to_instantiate", modules
        if len(entries) > _MOST_ENTRIES:
            return _OTHER_NAMES
        shown = ", ".join(entries)
        return " " + self._hint.format(line=f"{field}: [{shown}]")

    def _other_names(self, missing: Sequence[str], unexpected: Sequence[str]) -> str:
        """Where names differ on both sides all over, keeping the model's own values would leave it random."""
        modules = {name.rpartition(".")[0] for name in missing}
        if not unexpected or len(modules) <= _FEW_MODULES:
            return ""
        return _OTHER_NAMES

    def _rename(self, missing: Sequence[str], unexpected: Sequence[str]) -> str:
        """The config line of one rename that would resolve every missing name, where there is one."""
        if not self._hint or not unexpected or len(missing) > 10_000:
            return ""
        missing = [self._said.get(name, name) for name in missing]
        unexpected = [self._said.get(name, name) for name in unexpected]
        found = single_rename(missing, unexpected)
        if found is None:
            return ""
        src, dst = found
        if not self._has_rules:
            return f' One rename fits all: patterns_to_rename: [{{src: {src}, dst: "{dst}"}}]'
        if not src.endswith(".") or not all(name.startswith(src) for name in unexpected):
            return ""
        rule = f"{{from: {src}, to: {dst}}}" if dst else f"{{from: {src}<rest..>, to: <rest..>}}"
        return f" One rename fits all: - {rule}"


def _is_transposed(row: PlanRow) -> bool:
    if len(row.source_shapes) != 1 or len(row.shape) < 2 or len(row.source_shapes[0]) != len(row.shape):
        return False
    source = row.source_shapes[0]
    return not row.steps and source != row.shape and (*source[:-2], source[-1], source[-2]) == row.shape


def _grid(row: PlanRow) -> str:
    """The arguments of ``interpolate`` for a position embedding of another square grid; empty where it is none."""
    if len(row.source_shapes) != 1 or row.steps or "pos" not in row.key.lower():
        return ""
    source = row.source_shapes[0]
    if (
        len(source) < 2
        or len(source) != len(row.shape)
        or (*source[:-2], source[-1]) != (*row.shape[:-2], row.shape[-1])
    ):
        return ""
    for prefix in (1, 0, 2):
        sides = [math.isqrt(max(tokens - prefix, 0)) for tokens in (source[-2], row.shape[-2])]
        if all(
            side > 1 and side * side + prefix == tokens
            for side, tokens in zip(sides, (source[-2], row.shape[-2]), strict=True)
        ):
            tokens = f", prefix_tokens: {prefix}" if prefix else ""
            return f"{{grid: [{sides[0]}, {sides[0]}], to_grid: [{sides[1]}, {sides[1]}]{tokens}}}"
    return ""


def _group(name: str) -> str:
    """The name up to the number of its layer, whichever that is."""
    found = _NUMBER.search(name)
    return name[: found.start()] if found else name.rpartition(".")[0].partition(".")[0]
