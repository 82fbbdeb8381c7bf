"""The way back: the plan from a model's entries to those of the file, and plans carried out on tensors in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import attrs

from noether_init_core.surgery.rows import Action, PlanRow
from noether_init_core.surgery.steps import Shape, Step, carry_out

if TYPE_CHECKING:
    import torch

__all__ = ["rows_back", "transformed"]

_Way = tuple[str, tuple[str, ...], tuple[Step, ...]]


def rows_back(rows: Iterable[PlanRow]) -> tuple[tuple[PlanRow, ...], tuple[str, ...]]:
    """The rows that make the file's entries of the model's, and why some have no way back."""
    ways: dict[_Way, list[PlanRow]] = {}
    for row in rows:
        if row.writes and row.target is not None and row.dtype != "object":
            ways.setdefault((row.model, row.sources, row.steps), []).append(row)
    found: list[PlanRow] = []
    problems: list[str] = []
    for (_model, sources, steps), parts in ways.items():
        # of several names of one tensor, the first will do
        parts = sorted({row.part: row for row in reversed(parts)}.values(), key=lambda row: row.part)
        first = parts[0]
        where = first.rule or first.key
        back, reason = _back(steps, first.source_shapes)
        if not reason and steps and [row.part for row in parts] != list(range(first.parts)):
            reason = "some of its parts have no place in the model"
        if reason:
            problems.append(f"{where}: {reason}")
            continue
        targets = tuple(row.key for row in parts)
        shapes = tuple(row.shape for row in parts)
        if not steps:
            targets, shapes = targets[:1], shapes[:1]  # several names in the model for one entry of the file
        for number, source in enumerate(sources):
            action: Action = "transform" if back else ("load" if targets == (source,) else "rename")
            found.append(
                attrs.evolve(
                    first,
                    target=source,
                    sources=targets,
                    action=action,
                    shape=first.source_shapes[number],
                    nbytes=first.nbytes // max(first.numel, 1) * math.prod(first.source_shapes[number]),
                    source_dtype=first.dtype,
                    steps=back,
                    part=number,
                    parts=len(sources),
                    source_shapes=shapes,
                )
            )
    seen: set[tuple[str, str | None]] = set()
    for row in found:
        if (row.model, row.target) in seen:
            problems.append(f"{row.target}: several files have such an entry. Next: the plan of one initializer")
        seen.add((row.model, row.target))
    return tuple(found), tuple(problems)


def _back(steps: tuple[Step, ...], shapes: tuple[Shape, ...]) -> tuple[tuple[Step, ...], str]:
    """The steps back, and why there are none."""
    current, back = list(shapes), []
    for step in steps:
        undone = step.inverse(current)
        if undone is None:
            return (), f"{step.name} has no inverse"
        back.append(undone)
        current = step.shapes(current)
    return tuple(reversed(back)), ""


def transformed(rows: Iterable[PlanRow], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New tensors under the names of the targets, made of those in ``state``, which has all that is needed."""
    import torch

    made: dict[str, torch.Tensor] = {}
    for row in rows:
        if row.target is not None:
            value = carry_out(row.steps, [state[source].detach() for source in row.sources])[row.part]
            made[row.target] = value.clone(memory_format=torch.contiguous_format)
    return made
