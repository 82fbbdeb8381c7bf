"""Optimizer state by parameter name: decided by a pure function, carried out by one other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

from noether_init_core.errors import StateMismatchError
from noether_init_core.surgery.names import near

__all__ = ["OptimizerPlan", "apply_optimizer", "optimizer_names", "plan_optimizer", "torch_optimizer"]

LAYOUT_KEYS = {"state", "param_groups"}


@attrs.frozen(eq=False)
class OptimizerPlan:
    """What a stored optimizer state becomes.

    Attributes:
        state: For each target group, for each of its parameters: the stored state of it (tensors are descriptions of
            tensors in the file), or None where the parameter has none and starts afresh.
        fields: For each target group the stored fields (``lr``, ``betas``, ...), without ``params``.
        fresh: Names of parameters that start afresh by a rule of the config.
        warnings: What a person should know.
    """

    state: tuple[tuple[Mapping[str, Any] | None, ...], ...]
    fields: tuple[Mapping[str, Any], ...]
    fresh: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer itself: ``optimizer``, or the one inside Noether's wrapper (``torch_optim``).

    Raises ``StateMismatchError`` for anything else.
    """
    inner = getattr(optimizer, "torch_optim", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise StateMismatchError(
            f"a {type(optimizer).__name__} is neither a torch optimizer nor a wrapper with torch_optim; "
            "its state cannot be matched by parameter names"
        )
    return inner


def optimizer_names(optimizer: torch.optim.Optimizer, model: Any) -> list[list[str]]:
    """Names of the parameters of each group, found by identity among those of ``model``.

    Raises ``StateMismatchError`` for a parameter that ``model`` has not.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        strange = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in names]
        if strange:
            raise StateMismatchError(
                f"group {number} of the optimizer of {model.name} holds {len(strange)} parameters that are not "
                f"parameters of the model (the first is number {strange[0]} of the group). "
                "Build the optimizer from the model's own parameters"
            )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return groups


def plan_optimizer(
    saved: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    source_names: Mapping[str, str | None] | None = None,
    where: str = "",
) -> OptimizerPlan:
    """Match a stored optimizer state to the groups of an optimizer, by name. Pure.

    Args:
        saved: ``state``, ``param_groups`` and ``param_idx_to_name`` as stored; tensors are descriptions.
        groups: Names of the target's parameters, group by group.
        shapes: Shape of each of them.
        source_names: Name in the model -> name in the file, None for a parameter that keeps its own value and so
            starts with fresh state; names that are absent are the same on both sides.
        where: The file, for messages.

    Raises:
        StateMismatchError: listing every parameter without counterpart, every shape that does not fit, and every
            group whose parameters come from several stored groups.
    """
    if not isinstance(saved, Mapping) or not saved.keys() >= LAYOUT_KEYS:
        raise StateMismatchError(f"{where} is no state of an optimizer: it needs state and param_groups")
    renamed = dict(source_names or {})
    stored, warnings = _stored_names(saved, groups, where)
    wanted = {renamed.get(name, name) for names in groups for name in names}
    left = [name for name in stored if name not in wanted]
    problems: list[str] = []
    fresh: list[str] = []
    states: list[tuple[Mapping[str, Any] | None, ...]] = []
    fields: list[Mapping[str, Any]] = []
    for number, names in enumerate(groups):
        group_states: list[Mapping[str, Any] | None] = []
        from_groups: dict[int, str] = {}
        for name in names:
            source = renamed.get(name, name)
            if source is None:
                fresh.append(name)
                group_states.append(None)
            elif source not in stored:
                candidates = near(source, left)
                hint = f"; near: {', '.join(candidates)}" if candidates else ""
                problems.append(f"{name} has no state in the file{hint}")
                group_states.append(None)
            else:
                index, group = stored[source]
                from_groups.setdefault(group, name)
                state = saved["state"].get(index)
                if state is not None:
                    problems += _misfits(name, state, shapes[name])
                group_states.append(state)
        if len(from_groups) > 1:
            problems.append(
                f"group {number} holds parameters of several stored groups ("
                + ", ".join(f"{name} of group {group}" for group, name in from_groups.items())
                + "), so that its lr and weight_decay would be ambiguous"
            )
        states.append(tuple(group_states))
        chosen = saved["param_groups"][next(iter(from_groups))] if from_groups else {}
        fields.append({key: value for key, value in chosen.items() if key not in ("params", "param_names")})
    gone = [name for name in left if stored[name][0] in saved["state"]]
    if gone:
        message = f"the file has state of {', '.join(gone[:5])}" + (f" and {len(gone) - 5} more" if gone[5:] else "")
        message += ", which the optimizer has not"
        if source_names is None:
            problems.append(message)
        else:
            warnings.append(message)
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if problems[20:] else "")
        raise StateMismatchError(
            f"the optimizer state in {where} does not fit:\n  {shown}\nNothing was changed. "
            "To start with a fresh optimizer: load_optim: false",
            problems=problems,
        )
    return OptimizerPlan(tuple(states), tuple(fields), tuple(fresh), tuple(warnings))


def apply_optimizer(
    plan: OptimizerPlan,
    optimizer: torch.optim.Optimizer,
    read: Callable[[Any], Any],
    *,
    keep_fields: bool = False,
) -> None:
    """Give ``optimizer`` the planned state; all of it is read before anything is changed.

    Args:
        plan: Made for the groups of this optimizer.
        optimizer: Changed in place; parameters and groups keep their identity. An optimizer with a
            ``load_state_dict`` of its own gets the state through that.
        read: Turns the description of a tensor into the tensor, and leaves everything else.
        keep_fields: Keep the fields of the groups (``lr``, ``weight_decay``) as they are configured now, as Noether's
            wrapper does; otherwise the stored ones are taken, as torch does.
    """
    prepared: list[list[dict[str, Any] | None]] = []
    for group, states in zip(optimizer.param_groups, plan.state, strict=True):
        row = []
        for parameter, state in zip(group["params"], states, strict=True):
            row.append(None if state is None else _placed(state, parameter, group, read))
        prepared.append(row)
    fields = [{key: read(value) for key, value in stored.items()} for stored in plan.fields]
    if keep_fields:
        fields = [{} for _ in fields]
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        optimizer.load_state_dict(_positional(optimizer, prepared, fields))
        return
    for group, placed, stored in zip(optimizer.param_groups, prepared, fields, strict=True):
        for parameter, values in zip(group["params"], placed, strict=True):
            optimizer.state.pop(parameter, None)
            if values is not None:
                optimizer.state[parameter] = values
        group.update(stored)
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def _stored_names(
    saved: Mapping[str, Any], groups: Sequence[Sequence[str]], where: str
) -> tuple[dict[str, tuple[Any, int]], list[str]]:
    """Name -> (index, number of its group) of the stored parameters, and warnings."""
    recorded = saved.get("param_idx_to_name")
    stored: dict[str, tuple[Any, int]] = {}
    warnings: list[str] = []
    total = sum(len(group["params"]) for group in saved["param_groups"])
    if recorded is None and not all("param_names" in group for group in saved["param_groups"]):
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != [len(names) for names in groups]:
            raise StateMismatchError(
                f"{where} records no names of parameters, and its groups of {sizes} parameters are not those of the "
                f"optimizer ({[len(names) for names in groups]}). Save it again with CheckpointWriter"
            )
        warnings.append(f"{where} records no names of parameters; they are matched by position")
        for number, (group, names) in enumerate(zip(saved["param_groups"], groups, strict=True)):
            stored.update({name: (index, number) for name, index in zip(names, group["params"], strict=True)})
        return stored, warnings
    for number, group in enumerate(saved["param_groups"]):
        if recorded is not None:
            missing = [index for index in group["params"] if index not in recorded]
            if missing:
                raise StateMismatchError(f"{where} records no name for parameter {missing[0]} of group {number}")
            names = [recorded[index] for index in group["params"]]
        else:
            names = list(group["param_names"])
        stored.update({name: (index, number) for name, index in zip(names, group["params"], strict=True)})
    if len(stored) != total:
        raise StateMismatchError(f"{where} records the same name for several parameters")
    return stored, warnings


def _misfits(name: str, state: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
    """State with as many dimensions as the parameter must have its shape or, as in Adafactor, sizes of 1."""
    return [
        f"{name}: {key} has shape {list(value.shape)}, the parameter {list(shape)}"
        for key, value in state.items()
        if hasattr(value, "shape")
        and len(value.shape) == len(shape)
        and any(size not in (1, wanted) for size, wanted in zip(value.shape, shape, strict=True))
    ]


def _placed(
    state: Mapping[str, Any], parameter: torch.Tensor, group: Mapping[str, Any], read: Callable[[Any], Any]
) -> dict[str, Any]:
    """The state on the device where torch keeps it; dtypes stay as stored (torch would cast to the parameter's)."""
    placed = {}
    on_device = bool(group.get("capturable") or group.get("fused"))
    for key, value in state.items():
        value = read(value)
        if isinstance(value, torch.Tensor) and (key != "step" or on_device):
            value = value.to(parameter.device)
        placed[key] = value
    return placed


def _positional(
    optimizer: torch.optim.Optimizer,
    prepared: list[list[dict[str, Any] | None]],
    fields: list[dict[str, Any]],
) -> dict[str, Any]:
    layout = optimizer.state_dict()
    indices = [group["params"] for group in layout["param_groups"]]
    state = {
        index: values
        for row, group in zip(prepared, indices, strict=True)
        for values, index in zip(row, group, strict=True)
        if values is not None
    }
    groups = [
        {**group, **stored, "params": group["params"]}
        for group, stored in zip(layout["param_groups"], fields, strict=True)
    ]
    return {**layout, "state": state, "param_groups": groups}
