"""The way back: the plan from a model's entries to those of the file, and plans carried out on tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from noether_init_core.errors import PlanError
from noether_init_core.surgery.plan import Action, LoadPlan, PlanRow
from noether_init_core.surgery.steps import Shape, Step, carry_out

if TYPE_CHECKING:
    import torch

__all__ = ["inverted", "transformed"]

_Way = tuple[str, tuple[str, ...], tuple[Step, ...]]


def inverted(plan: LoadPlan) -> LoadPlan:
    """The plan that makes the file's entries of the model's, for every row that loads; dtypes are those of the model.

    Loading what it makes gives the model's tensors again, bit for bit. What the model keeps, and what of the file is
    not used, has no part in it.

    Raises ``PlanError`` for a plan with problems, for steps that lose something (slice, pad, interpolate, cast), and
    where only some of the parts of a split have a place in the model.
    """
    plan.raise_for_problems()
    ways: dict[_Way, list[PlanRow]] = {}
    for row in plan.rows:
        if row.writes and row.target is not None and row.tied_to is None:
            ways.setdefault((row.model, row.sources, row.steps), []).append(row)
    rows: list[PlanRow] = []
    problems: list[str] = []
    for (_model, sources, steps), parts in ways.items():
        parts.sort(key=lambda row: row.part)
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
            rows.append(
                attrs.evolve(
                    first,
                    target=source,
                    sources=targets,
                    action=action,
                    shape=first.source_shapes[number],
                    nbytes=first.nbytes // max(first.numel, 1) * _elements(first.source_shapes[number]),
                    source_shape=shapes[0] if len(shapes) == 1 else None,
                    source_dtype=first.dtype,
                    steps=back,
                    part=number,
                    parts=len(sources),
                    source_shapes=shapes,
                )
            )
    if problems:
        listed = "\n  ".join(dict.fromkeys(problems))
        raise PlanError(f"{plan.kind} has no way back:\n  {listed}", plan=plan, problems=tuple(problems))
    return LoadPlan(f"{plan.kind}, inverted", tuple(rows), origins=plan.origins)


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


def _elements(shape: Shape) -> int:
    number = 1
    for size in shape:
        number *= size
    return number


def transformed(plan: LoadPlan, state: Mapping[str, torch.Tensor], model: str | None = None) -> dict[str, torch.Tensor]:
    """What a plan makes of tensors in memory: new tensors under the names of its targets, for one single model.

    Args:
        plan: Any plan without problems, such as ``plan.inverted()``.
        state: The tensors under the names of its sources; they stay as they are.
        model: Path of the single model; None where there is only one.

    Raises ``PlanError`` where ``state`` lacks an entry, or ``model`` is needed.
    """
    plan.raise_for_problems()
    models = list(dict.fromkeys(row.model for row in plan.rows))
    if model is None and len(models) > 1:
        raise PlanError(f"the plan is about several models; say which: {', '.join(models)}", plan=plan)
    made: dict[str, torch.Tensor] = {}
    for row in plan.rows:
        if not row.writes or row.target is None or model not in (None, row.model):
            continue
        lacking = [source for source in row.sources if source not in state]
        if lacking:
            raise PlanError(f"{row.target} needs {', '.join(lacking)}, which the state has not", plan=plan)
        value = carry_out(row.steps, [state[source].detach() for source in row.sources])[row.part]
        made[row.target] = value.clone(memory_format=_contiguous())
    return made


def _contiguous() -> torch.memory_format:
    import torch

    return torch.contiguous_format
