"""Carry out a LoadPlan: the only place that writes weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch.nn.modules.module import _IncompatibleKeys

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

    Each tensor is written once, also when it has several names. Modules with loading code of their own get it run,
    with everything below them, on tensors in memory; hooks that follow a load are called. The plan must be free of
    problems and the reader verified; nothing is decided here. Returns the names that were written.
    """
    rows = tuple(rows)
    copies: dict[str, torch.Tensor] = {}
    repeated: list[tuple[str, torch.Tensor]] = []
    written: list[str] = []
    seen: set[int] = set()
    for own in targets.own_loading:
        own.module.load_state_dict(_state_below(own.prefix, rows, reader, targets))
    for row in rows:
        if not row.writes or row.target is None:
            continue
        if any(row.target.startswith(own.prefix) for own in targets.own_loading):
            written.append(row.target)
            continue
        written.append(row.target)
        source = row.sources[0]
        if row.dtype == "object":
            targets.extra_state[row.target].set_extra_state(_extra_state(reader, source))
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
    for module in targets.after_loading:
        for hook in tuple(module._load_state_dict_post_hooks.values()):
            hook(module, _IncompatibleKeys([], []))
    return written


def _state_below(prefix: str, rows: Iterable[PlanRow], reader: WeightReader, targets: ModelTargets) -> dict[str, Any]:
    """The planned state dict of one module, names without its prefix; what is kept stands in it as it is."""
    state: dict[str, Any] = {}
    for row in rows:
        if row.target is None or not row.target.startswith(prefix):
            continue
        name = row.target.removeprefix(prefix)
        if row.dtype == "object":
            if row.writes:
                state[name] = _extra_state(reader, row.sources[0])
            else:
                state[name] = targets.extra_state[row.target].get_extra_state()
        else:
            state[name] = reader.read(row.sources[0]) if row.writes else targets.tensors[row.target].detach().clone()
    return state


def _extra_state(reader: WeightReader, key: str) -> Any:
    """Extra state as it was saved; some modules keep it in a tensor."""
    return reader.materialize(reader.extra_state[key]) if key in reader.extra_state else reader.read(key)


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
