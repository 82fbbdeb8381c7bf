"""Optimizer state by parameter name: decided by a pure function, carried out by one other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

from noether_init_core.errors import StateMismatchError, type_of
from noether_init_core.surgery.names import near

__all__ = [
    "OptimizerPlan",
    "apply_optimizer",
    "class_name",
    "optimizer_names",
    "parameter_aliases",
    "plan_optimizer",
    "torch_optimizer",
]

LAYOUT_KEYS = {"state", "param_groups"}
#: Fields of groups by which the algorithms of torch differ; other fields come and go with releases and schedulers.
_TELLING_FIELDS = frozenset(
    {
        "betas",
        "momentum",
        "alpha",
        "rho",
        "lambd",
        "etas",
        "nesterov",
        "history_size",
        "centered",
        "lr_decay",
        "beta2_decay",
    }
)
#: State that has the shape of its parameter, whatever the optimizer.
_SHAPED_STATE = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "exp_inf"}
)


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
            f"{type_of(optimizer)} is neither a torch optimizer nor a wrapper with torch_optim; "
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


def parameter_aliases(model: Any) -> dict[str, tuple[str, ...]]:
    """First name of a parameter -> all of its names; a file may know it by another one than the first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {found[0]: tuple(found) for found in names.values()}


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """The class of an optimizer, as it is recorded beside its state."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def plan_optimizer(
    saved: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    source_names: Mapping[str, str | None] | None = None,
    aliases: Mapping[str, tuple[str, ...]] | None = None,
    current: Sequence[Mapping[str, Any]] | None = None,
    optimizer_class: str = "",
    where: str = "",
) -> OptimizerPlan:
    """Match a stored optimizer state to the groups of an optimizer, by name. Pure.

    Args:
        saved: ``state``, ``param_groups`` and ``param_idx_to_name`` as stored; tensors are descriptions.
        groups: Names of the target's parameters, group by group.
        shapes: Shape of each of them.
        source_names: Name in the model -> name in the file, None for a parameter that keeps its own value and so
            starts with fresh state; names that are absent are the same on both sides.
        aliases: First name of a parameter -> all of its names; state is found under any of them.
        current: The groups as they are, where their fields will be replaced by stored ones.
        optimizer_class: The class that the state is for; compared with the one that is recorded, where one is.
        where: The file, for messages.

    Raises:
        StateMismatchError: listing every parameter without counterpart, every shape that does not fit, and every
            group whose parameters come from several stored groups. Also where the state is that of another class of
            optimizer, and where groups with different fields would all take those of one stored group.
    """
    if not isinstance(saved, Mapping) or not saved.keys() >= LAYOUT_KEYS:
        raise StateMismatchError(f"{where} is no state of an optimizer: it needs state and param_groups")
    stored, warnings = _stored_names(saved, groups, where)
    renamed = _renamed(groups, stored, source_names or {}, aliases or {})
    wanted = {renamed.get(name, name) for names in groups for name in names}
    left = [name for name in stored if name not in wanted]
    problems = _other_class(saved, current, optimizer_class)
    fresh: list[str] = []
    states: list[tuple[Mapping[str, Any] | None, ...]] = []
    fields: list[Mapping[str, Any]] = []
    chosen_groups: list[int | None] = []
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
        chosen_groups.append(next(iter(from_groups), None))
        chosen = saved["param_groups"][next(iter(from_groups))] if from_groups else {}
        fields.append({key: value for key, value in chosen.items() if key not in ("params", "param_names")})
    problems += _ambiguous_fields(chosen_groups, current)
    gone = [name for name in left if stored[name][0] in saved["state"]]
    if gone:
        listed = ", ".join(gone[:5]) + (f" and {len(gone) - 5} more" if gone[5:] else "")
        if source_names is None:
            problems.append(f"the file has state of {listed}, which the optimizer has not")
        else:
            warnings.append(f"optimizer state of {listed} is not taken over: nothing was loaded from there")
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

    Should the optimizer refuse its state, it is put back as it was and the error goes on.
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
    before = dict(optimizer.state), [dict(group) for group in optimizer.param_groups]
    try:
        _hand_over(optimizer, prepared, fields)
    except Exception:
        optimizer.state.clear()
        optimizer.state.update(before[0])
        for group, values in zip(optimizer.param_groups, before[1], strict=True):
            group.clear()
            group.update(values)
        raise


def _hand_over(
    optimizer: torch.optim.Optimizer, prepared: list[list[dict[str, Any] | None]], fields: list[dict[str, Any]]
) -> None:
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
    """State that should have the shape of its parameter and has not; other state (``step``, factors) is free."""
    return [
        f"{name}: {key} has shape {list(value.shape)}, the parameter {list(shape)}"
        for key, value in state.items()
        if key in _SHAPED_STATE and hasattr(value, "shape") and tuple(value.shape) != shape
    ]


def _renamed(
    groups: Sequence[Sequence[str]],
    stored: Mapping[str, Any],
    source_names: Mapping[str, str | None],
    aliases: Mapping[str, tuple[str, ...]],
) -> dict[str, str | None]:
    """Name in the model -> name in the file: by the plan of the weights, else under any of the parameter's names."""
    renamed: dict[str, str | None] = {}
    for name in (name for names in groups for name in names):
        names = aliases.get(name, (name,))
        decided = [source_names[alias] for alias in names if alias in source_names]
        if decided:
            sources = [source for source in decided if source is not None]
            renamed[name] = next((source for source in sources if source in stored), sources[0] if sources else None)
        else:
            renamed[name] = next((alias for alias in names if alias in stored), name)
    return renamed


def _other_class(
    saved: Mapping[str, Any], current: Sequence[Mapping[str, Any]] | None, optimizer_class: str
) -> list[str]:
    """Whether the state is that of another class: by its record, else by the fields that tell algorithms apart."""
    recorded = saved.get("optimizer_class")
    if isinstance(recorded, str) and optimizer_class:
        same = recorded == optimizer_class
        return [] if same else [f"the state is of a {recorded}, the optimizer is a {optimizer_class}"]
    problems: list[str] = []
    if not current:
        return problems
    for stored in saved["param_groups"][:1]:
        mine, theirs = _TELLING_FIELDS & set(current[0]), _TELLING_FIELDS & set(stored)
        decoupled = (current[0].get("decoupled_weight_decay"), stored.get("decoupled_weight_decay"))
        if mine != theirs or (None not in decoupled and decoupled[0] != decoupled[1]):
            problems.append(
                f"the state is of another class of optimizer than {optimizer_class or 'this one'}: its groups have "
                f"{', '.join(sorted(key for key in stored if key not in ('params', 'param_names')))}"
            )
    return problems


def _ambiguous_fields(chosen: Sequence[int | None], current: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Groups that differ now and would all get the fields of one stored group."""
    problems = []
    for stored in sorted({number for number in chosen if number is not None}):
        numbers = [number for number, source in enumerate(chosen) if source == stored]
        if current is None or len(numbers) < 2:
            continue
        first = current[numbers[0]]
        for number in numbers[1:]:
            differing = [
                key for key in ("lr", "weight_decay") if key in first and current[number].get(key) != first.get(key)
            ]
            if differing:
                problems.append(
                    f"groups {numbers[0]} and {number} of the optimizer differ in {' and '.join(differing)}, but both "
                    f"would take the values of stored group {stored}. Build the groups as the saved run did"
                )
    return problems


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
