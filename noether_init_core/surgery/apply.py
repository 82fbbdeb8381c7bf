"""Carry out a LoadPlan: the only place that writes weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import torch

from noether_init_core.errors import PlanError
from noether_init_core.surgery.plan import LoadPlan, PlanRow, Problem
from noether_init_core.surgery.targets import ModelTargets

__all__ = ["WeightReader", "apply_rows", "check_values"]

OnNonfinite = Literal["error", "warn", "ignore"]


class WeightReader(Protocol):
    """What is needed of a reader of checkpoints."""

    @property
    def extra_state(self) -> Mapping[str, Any]: ...
    def materialize(self, value: Any) -> Any: ...
    def read(self, key: str) -> torch.Tensor: ...
    def copy_into(self, targets: Mapping[str, torch.Tensor]) -> None: ...


def apply_rows(rows: Iterable[PlanRow], reader: WeightReader, targets: ModelTargets) -> list[str]:
    """Write every tensor that ``rows`` (of one model) load, in place; parameters keep their identity.

    Each tensor is written once, also when it has several names. The plan must be free of problems and the reader
    verified; nothing is decided here. Returns the names that were written.
    """
    copies: dict[str, torch.Tensor] = {}
    repeated: list[tuple[str, torch.Tensor]] = []
    written: list[str] = []
    seen: set[int] = set()
    for row in rows:
        if not row.writes or row.target is None:
            continue
        written.append(row.target)
        source = row.sources[0]
        if row.dtype == "object":
            targets.extra_state[row.target].set_extra_state(reader.materialize(reader.extra_state[source]))
            continue
        tensor = targets.tensors[row.target]
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if source in copies:
            repeated.append((source, tensor))
        else:
            copies[source] = tensor
    with torch.no_grad():
        reader.copy_into(copies)
        for source, tensor in repeated:
            reader.copy_into({source: tensor})
    return written


def check_values(plan: LoadPlan, model: str, reader: WeightReader, on_nonfinite: OnNonfinite) -> list[Problem]:
    """Look at the values that the plan will load into ``model``: NaN and infinities, and tied entries that differ.

    NaN is a problem everywhere, infinities are one in parameters only (buffers hold masks). With ``on_nonfinite``
    ``warn`` or ``ignore`` only differing tied entries raise.

    Returns: the findings about NaN and infinities where ``on_nonfinite`` is ``warn``.
    Raises: ``PlanError``; the model is untouched.
    """
    problems = []
    for of_model, first, other in plan.equal:
        if of_model == model and not _same(reader.read(first), reader.read(other)):
            problems.append(
                Problem("tied", f"{first} and {other} differ in the file but are one tensor in {model}", model)
            )
    findings: list[Problem] = []
    if on_nonfinite != "ignore":
        for row in plan.rows_of(model):
            if row.writes and row.dtype != "object":
                what = _nonfinite(reader.read(row.sources[0]), infinities=row.is_parameter)
                if what:
                    findings.append(Problem("nonfinite", f"{row.sources[0]} holds {what}", model, (row.key,)))
    if on_nonfinite == "error" and findings:
        problems += findings[:5]
        if len(findings) > 5:
            problems.append(Problem("nonfinite", f"and {len(findings) - 5} more tensors", model))
    if problems:
        shown = tuple(problem.message for problem in problems)
        origin = next((f"{origin} ({file})" for name, origin, file in plan.origins if name == model), "")
        hint = "\nTo load it all the same: on_nonfinite: warn" if findings and on_nonfinite == "error" else ""
        raise PlanError(
            f"{plan.kind}: {model} <- {origin}\n  " + "\n  ".join(shown) + f"{hint}\nNothing was changed.",
            plan=plan,
            problems=shown,
        )
    return findings


def _same(first: torch.Tensor, other: torch.Tensor) -> bool:
    return first.dtype == other.dtype and torch.equal(
        first.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def _nonfinite(tensor: torch.Tensor, *, infinities: bool) -> str:
    """What is not finite in ``tensor``, in words; empty where all is well. One sum settles the ordinary case."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return ""
    if tensor.element_size() == 1:
        tensor = tensor.float()
    total = tensor.sum() if tensor.element_size() >= 4 else tensor.sum(dtype=torch.float32)
    if bool(torch.isfinite(total)):
        return ""
    if bool(torch.isnan(tensor).any()):
        return "NaN"
    return "infinities" if infinities and bool(torch.isinf(tensor).any()) else ""
