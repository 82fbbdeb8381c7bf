"""The state of an optimizer by parameter names, and the writing of a planned state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from noether_init_core import nested
from noether_init_core.applying.rehearsal import act_on_copy
from noether_init_core.errors import StateMismatchError, type_of
from noether_init_core.restore import restore_line
from noether_init_core.surgery.optimizer_fields import lacking_state
from noether_init_core.surgery.optimizer_plan import STAYS, Moved, OptimizerPlan, Stays
from noether_init_core.surgery.steps import carry_out


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer: ``optimizer`` itself, or the one inside Noether's wrapper (``torch_optim``).

    Raises ``StateMismatchError`` for any other object.
    """
    inner = getattr(optimizer, "torch_optim", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise StateMismatchError(
            f"{type_of(optimizer)} is neither a torch optimizer nor a wrapper with torch_optim; "
            "its state cannot be matched by parameter names"
        )
    return inner


def optimizer_names(optimizer: torch.optim.Optimizer, model: Any) -> list[list[str]]:
    """Names of the parameters of each group, found by identity among those of ``model``.

    Raises ``StateMismatchError`` for a parameter that is not in ``model``.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        foreign = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in names]
        if foreign:
            raise StateMismatchError(
                f"group {number} of the optimizer of {model.name} holds {len(foreign)} parameters that are not "
                f"parameters of the model (the first is number {foreign[0]} of the group). "
                "Next: build the optimizer from model.parameters()"
            )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return groups


def parameter_aliases(model: Any) -> dict[str, tuple[str, ...]]:
    """First name of a parameter -> all of its names; a file may use any of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {found[0]: tuple(found) for found in names.values()}


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """The class of an optimizer, as recorded beside its state."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


#: For each parameter of a group: its new state, None for fresh state, or ``STAYS`` to keep its own.
_Row = list[dict[str, Any] | Stays | None]


def moved_value(moved: Moved, values: list[Any], where: str) -> Any:
    """Apply the steps of ``moved`` to the values that were read; a tensor in the result has its own memory.

    Raises ``StateMismatchError`` if values that must be equal differ, or do not fit the dtype, as complex ones do not
    fit a real one.
    """
    made = values[0]
    if not moved.steps:
        if any(not nested.equal(made, other) for other in values[1:]):
            raise StateMismatchError(
                f"{where}: parameters that become one have counters that differ ({', '.join(map(str, values[:3]))}). "
                "Nothing was changed. Next: load_optim: false",
                problems=[where],
            )
    else:
        made = carry_out(moved.steps, values)[moved.part].contiguous()
        if made.untyped_storage().nbytes() != made.numel() * made.element_size() or made.data_ptr() in {
            value.data_ptr() for value in values
        }:
            made = made.clone()
    if moved.dtype is None:
        return made
    dtype: torch.dtype = getattr(torch, moved.dtype)
    loses_part = made.is_complex() and not dtype.is_complex
    cast = made if loses_part else made.to(dtype)
    if loses_part or not torch.equal(_is_finite(cast), _is_finite(made)):
        why = ", which has no imaginary part" if loses_part else ""
        raise StateMismatchError(
            f"{where}: values of {made.dtype} do not fit {dtype}{why}. Nothing was changed", problems=[where]
        )
    return cast


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    # torch has no isfinite for float8 dtypes
    return torch.isfinite(tensor if tensor.is_complex() else tensor.float())


def apply_optimizer(plan: OptimizerPlan, optimizer: torch.optim.Optimizer) -> None:
    """Write the planned state into ``optimizer``; tensors are in place of their descriptions.

    Args:
        plan: Made for the groups of this optimizer. State that is ``STAYS`` is not changed.
        optimizer: Changed in place; parameters and groups keep their identity. An optimizer with its own
            ``load_state_dict``, or with hooks on it, gets the state through that method.

    If the optimizer raises, its earlier state is restored and the error is raised again. Raises ``StateMismatchError``
    if a field would be taken that contradicts state which stays.
    """
    prepared: list[_Row] = [
        [
            _placed(state, parameter, group) if isinstance(state, Mapping) else state
            for parameter, state in zip(group["params"], states, strict=True)
        ]
        for group, states in zip(optimizer.param_groups, plan.state, strict=True)
    ]
    fields = [dict(stored) for stored in plan.fields]
    _check_staying(optimizer, prepared, fields)
    groups, attributes = list(optimizer.param_groups), dict(vars(optimizer))
    states = {key: dict(values) if isinstance(values, dict) else values for key, values in optimizer.state.items()}
    before = states, [dict(group) for group in groups]
    values = [(one, one.detach().clone()) for one in _tensors_of(optimizer)] if has_own_loading(optimizer) else []
    state = optimizer.state
    try:
        _hand_over(optimizer, prepared, fields)
    except BaseException:  # also after KeyboardInterrupt, the optimizer must not be half changed
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        state.clear()
        state.update(before[0])
        for group, own in zip(groups, before[1], strict=True):
            group.clear()
            group.update(own)
        optimizer.param_groups[:] = groups
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def has_own_loading(optimizer: torch.optim.Optimizer) -> bool:
    """Whether code of users sees the state that is loaded: hooks, or overrides of the methods that take it."""
    kind = type(optimizer)
    own = [getattr(kind, name) for name in ("load_state_dict", "__setstate__")]
    own += [vars(optimizer)[name] for name in ("load_state_dict", "__setstate__") if name in vars(optimizer)]
    hooks = optimizer._optimizer_load_state_dict_pre_hooks or optimizer._optimizer_load_state_dict_post_hooks
    return bool(hooks) or any(str(one.__module__).split(".")[0] != "torch" for one in own)


def rehearsed_optimizer(plan: OptimizerPlan, optimizer: torch.optim.Optimizer) -> str:
    """Why the optimizer refuses its planned state, in words; empty if it does not. It is tried on a copy.

    Only code of users is tried: the code of torch takes what was planned.
    """
    if not has_own_loading(optimizer):
        return ""
    tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def cloned(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    def load(copied: torch.optim.Optimizer) -> None:
        state, fields = nested.mapped(plan.state, cloned), nested.mapped(plan.fields, cloned)
        apply_optimizer(attrs.evolve(plan, state=state, fields=fields), copied)

    return act_on_copy(optimizer, [*tensors, *_tensors_of(optimizer)], load)


def _tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors in the state of an optimizer."""
    return [
        leaf for state in optimizer.state.values() for leaf in nested.leaves(state) if isinstance(leaf, torch.Tensor)
    ]


def _check_staying(optimizer: torch.optim.Optimizer, prepared: list[_Row], fields: list[dict[str, Any]]) -> None:
    """Raise if a group takes a field that needs state which an earlier initializer did not load."""
    for number, (group, row, taken) in enumerate(zip(optimizer.param_groups, prepared, fields, strict=True)):
        for parameter, state in zip(group["params"], row, strict=True):
            found = state is STAYS and lacking_state(group, {**group, **taken}, optimizer.state.get(parameter, {}))
            if found:
                field, key = found
                problem = f"group {number} takes {field} from this checkpoint, but the state loaded before has no {key}"
                raise StateMismatchError(
                    f"{problem}. Next: {restore_line(optimizer={field: 'config'})}", problems=[problem]
                )


def _hand_over(optimizer: torch.optim.Optimizer, prepared: list[_Row], fields: list[dict[str, Any]]) -> None:
    has_hooks = optimizer._optimizer_load_state_dict_pre_hooks or optimizer._optimizer_load_state_dict_post_hooks
    if has_hooks or type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        optimizer.load_state_dict(_positional(optimizer, prepared, fields))
        _undo_casts(optimizer, prepared)
        return
    for group, placed, stored in zip(optimizer.param_groups, prepared, fields, strict=True):
        for parameter, values in zip(group["params"], placed, strict=True):
            if isinstance(values, Stays):
                continue
            optimizer.state.pop(parameter, None)
            if values is not None:
                optimizer.state[parameter] = values
        group.update(stored)
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def _undo_casts(optimizer: torch.optim.Optimizer, prepared: list[_Row]) -> None:
    """Put back state that torch has cast to the dtype of its parameter, as float32 moments of bfloat16 weights.

    torch does so in ``load_state_dict``. The class of the optimizer is the one that saved the state, so it keeps state
    in the dtype that was saved. What a hook has changed stays.
    """
    for group, row in zip(optimizer.param_groups, prepared, strict=True):
        for parameter, values in zip(group["params"], row, strict=True):
            held = optimizer.state.get(parameter, {})
            for key, value in values.items() if isinstance(values, Mapping) else ():
                cast = held.get(key)
                if not isinstance(value, torch.Tensor) or not isinstance(cast, torch.Tensor):
                    continue
                if cast.dtype != value.dtype and torch.equal(value.to(cast.device, cast.dtype), cast):
                    held[key] = value.to(cast.device)


def _placed(state: Mapping[str, Any], parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state on the device where torch keeps it; dtypes stay as stored, unless the parameter was cast."""
    on_device = bool(group.get("capturable") or group.get("fused"))

    def placed(leaf: Any) -> Any:
        return leaf.to(parameter.device) if isinstance(leaf, torch.Tensor) else leaf

    # LBFGS and others keep lists of tensors
    return {
        key: value if key == "step" and not on_device else nested.mapped(value, placed) for key, value in state.items()
    }


def _positional(optimizer: torch.optim.Optimizer, prepared: list[_Row], fields: list[dict[str, Any]]) -> dict[str, Any]:
    layout = optimizer.state_dict()
    indices = [group["params"] for group in layout["param_groups"]]
    state = {
        index: layout["state"][index] if isinstance(values, Stays) else values
        for row, group in zip(prepared, indices, strict=True)
        for values, index in zip(row, group, strict=True)
        if values is not None and (not isinstance(values, Stays) or index in layout["state"])
    }
    groups = [
        {**group, **stored, "params": group["params"]}
        for group, stored in zip(layout["param_groups"], fields, strict=True)
    ]
    return {**layout, "state": state, "param_groups": groups}
