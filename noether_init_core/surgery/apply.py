"""Carry out a LoadPlan: the only place that writes weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch.nn.modules.module import _IncompatibleKeys

from noether_init_core.errors import PlanError
from noether_init_core.surgery.fresh import FreshMemory, on_meta
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
    def is_same(self, first: str, other: str) -> bool: ...
    def nonfinite(self, keys: Collection[str]) -> Mapping[str, str]: ...
    def mapped(self, keys: Collection[str]) -> Mapping[str, torch.Tensor]: ...
    def copy_into(self, targets: Mapping[str, torch.Tensor]) -> None: ...


def apply_rows(
    rows: Iterable[PlanRow],
    reader: WeightReader,
    targets: ModelTargets,
    *,
    device: torch.device | None = None,
    may_map: bool = False,
) -> list[str]:
    """Write every tensor that ``rows`` (of one model) load, in place; parameters keep their identity.

    Tensors on the meta device get memory on ``device`` (the CPU); with ``may_map`` that may be the file, mapped.

    Each tensor is written once, also when it has several names. Modules with loading code of their own get it run,
    with everything below them, on tensors in memory; hooks that follow a load are called. The plan must be free of
    problems and the reader verified; nothing is decided here. Returns the names that were written.
    """
    rows = tuple(rows)
    copies: dict[str, torch.Tensor] = {}
    repeated: list[tuple[str, torch.Tensor]] = []
    written: list[str] = []
    seen: set[int] = set()
    fresh = FreshMemory(on_meta(targets), torch.device("cpu") if device is None else device)
    for own in targets.own_loading:
        fresh.hand_over(tensor for name, tensor in targets.tensors.items() if name.startswith(own.prefix))
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
    if may_map:
        usable = [
            row.sources[0]
            for row in rows
            if row.sources
            and row.sources[0] in copies
            and row.source_dtype
            and fresh.can_be_mapped(copies[row.sources[0]], row.source_dtype)
        ]
        for source, tensor in reader.mapped(usable).items():
            fresh.put(copies.pop(source), tensor)
    with torch.no_grad():
        reader.copy_into({source: fresh.of(tensor) for source, tensor in copies.items()})
        for source, tensor in repeated:
            reader.copy_into({source: fresh.of(tensor)})
    fresh.hand_over()
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
        if of_model == model and not reader.is_same(first, other):
            problems.append(
                Problem("tied", f"{first} and {other} differ in the file but are one tensor in {model}", model)
            )
    findings: list[Problem] = []
    if on_nonfinite != "ignore":
        rows = [row for row in plan.rows_of(model) if row.writes and row.dtype != "object"]
        found = reader.nonfinite([row.sources[0] for row in rows])
        for row in rows:
            what = found.get(row.sources[0])
            if what == "NaN" or (what and row.is_parameter):
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
