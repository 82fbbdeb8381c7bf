"""Optimizer state by parameter name: decided by a pure function, carried out by one other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import torch

from noether_init_core.errors import StateMismatchError, type_of
from noether_init_core.surgery.name_rules import near
from noether_init_core.surgery.steps import Cast, Pad, Step

__all__ = [
    "STAYS",
    "Moved",
    "OptimizerPlan",
    "OptimizerPolicies",
    "ParameterOrigin",
    "Stays",
    "class_name",
    "lacking_state",
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
#: One number for a whole parameter, also where the parameter has but one element.
_COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})
#: State of rows and columns, which optimizers keep for parameters of two dimensions and more.
_FACTORS = frozenset({"row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"})
#: Field of the groups -> state that every parameter has while it is on, and state that tells the optimizers meant.
_NEEDED_STATE = {
    "amsgrad": ("max_exp_avg_sq", "exp_avg_sq"),
    "centered": ("grad_avg", "square_avg"),
    "momentum": ("momentum_buffer", "square_avg"),
}
_NO_FIELDS = frozenset({"params", "param_names"})


@attrs.frozen
class ParameterOrigin:
    """Where a parameter gets its value from, as the plan of the weights says it.

    Attributes:
        sources: Names in the file; none where it does not come from the file, so that its state starts afresh.
        steps: What is done with them.
        part: Which of the tensors that the steps make is the parameter's.
        source_shapes: The shape of each source.
        dtypes: The dtype in the file, None where that of the sources differs, and the dtype in the model.
        stays: An earlier initializer has loaded it: its state is left as it is.
    """

    sources: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    part: int = 0
    source_shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str | None, str] | None = None
    stays: bool = False


@attrs.frozen
class Stays:
    """In place of the state of a parameter: the optimizer keeps what it has."""


STAYS = Stays()


@attrs.frozen(eq=False)
class Moved:
    """State that goes the way of its parameter: stored values of one key, one for each source.

    ``dtype`` is the one to convert to, None the stored one. Without ``steps``, all values have to be equal, and the
    first is taken.
    """

    values: tuple[Any, ...]
    steps: tuple[Step, ...] = ()
    part: int = 0
    dtype: str | None = None


@attrs.frozen
class OptimizerPolicies:
    """What is done where optimizer and file do not fit.

    Attributes:
        on_missing: A parameter whose weights are loaded has no state in the file, since it is new there or was frozen:
            ``error``, or ``fresh`` state.
        on_unexpected: The file has state of a parameter that the optimizer has not: ``error`` or ``ignore``; None is
            an error unless the weights were renamed or left out.
        fields: Field of the groups (``lr``; ``*`` for all others) -> ``checkpoint`` or ``config``: whose value stays.
            ``initial_lr``, from which schedules set ``lr``, goes with ``lr`` unless it is named itself.
    """

    on_missing: Literal["error", "fresh"] = "error"
    on_unexpected: Literal["error", "ignore"] | None = None
    fields: Mapping[str, Literal["checkpoint", "config"]] = attrs.Factory(dict)

    def keeps(self, field: str) -> bool:
        """Whether the optimizer keeps its own value of a field."""
        if field == "initial_lr" and field not in self.fields:
            field = "lr"
        return self.fields.get(field, self.fields.get("*", "checkpoint")) == "config"


@attrs.frozen(eq=False)
class OptimizerPlan:
    """What a stored optimizer state becomes.

    Attributes:
        state: For each target group, for each of its parameters: the stored state of it (tensors are descriptions of
            tensors in the file, what goes the way of a transform is ``Moved``), None where it starts afresh, ``STAYS``
            where the optimizer keeps what it has.
        fields: For each target group the stored fields (``lr``, ``betas``, ...) that are taken, without ``params``.
        fresh: Names of parameters that start afresh by a rule of the config, or because nothing can follow.
        warnings: What a person should know.
    """

    state: tuple[tuple[Mapping[str, Any] | Stays | None, ...], ...]
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
    origins: Mapping[str, ParameterOrigin] | None = None,
    aliases: Mapping[str, tuple[str, ...]] | None = None,
    current: Sequence[Mapping[str, Any]] | None = None,
    optimizer_class: str = "",
    policies: OptimizerPolicies | None = None,
    where: str = "",
) -> OptimizerPlan:
    """Match a stored optimizer state to the groups of an optimizer, by name. Pure.

    State of the shape of its parameter goes the way of the parameter: renamed, split, concatenated with it, padded with
    zeros; what had the dtype of the stored parameter gets that of the parameter. What cannot follow (an interpolated
    parameter, factored state) starts afresh, and a warning says so.

    Args:
        saved: ``state``, ``param_groups`` and ``param_idx_to_name`` as stored; tensors are descriptions.
        groups: Names of the target's parameters, group by group.
        shapes: Shape of each of them.
        origins: Name in the model -> where its value comes from; names that are absent are the same on both sides.
        aliases: First name of a parameter -> all of its names; state is found under any of them.
        current: The groups as they are, where their fields will be replaced by stored ones.
        optimizer_class: The class that the state is for; compared with the one that is recorded, where one is.
        policies: What is done where optimizer and file do not fit.
        where: The file, for messages.

    Raises:
        StateMismatchError: listing every parameter without counterpart, every shape that does not fit, and every
            group whose parameters come from stored groups with different fields. Also where the state is that of
            another class of optimizer, where groups with different fields would all take those of one stored group, and
            where a field of the optimizer needs state that the file has not.
    """
    if not isinstance(saved, Mapping) or not saved.keys() >= LAYOUT_KEYS:
        raise StateMismatchError(f"{where} is no state of an optimizer: it needs state and param_groups")
    planner = _Planner(saved, groups, shapes, origins, aliases or {}, policies or OptimizerPolicies(), where)
    return planner.plan(current, optimizer_class)


class _Planner:
    """The matching of one stored state to one optimizer."""

    def __init__(
        self,
        saved: Mapping[str, Any],
        groups: Sequence[Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
        origins: Mapping[str, ParameterOrigin] | None,
        aliases: Mapping[str, tuple[str, ...]],
        policies: OptimizerPolicies,
        where: str,
    ) -> None:
        self._saved, self._groups, self._shapes = saved, groups, shapes
        self._origins, self._policies, self._where = origins, policies, where
        self._stored, self._warnings = _stored_names(saved, groups, where)
        self._aliases = aliases
        self._is_factored = any(
            key in _FACTORS or key == "variance"
            for state in saved["state"].values()
            if isinstance(state, Mapping)
            for key in state
        )
        self._problems: list[str] = []
        self._fresh: list[str] = []
        self._used: set[str] = set()
        self._reset: dict[str, list[str]] = {}

    def plan(self, current: Sequence[Mapping[str, Any]] | None, optimizer_class: str) -> OptimizerPlan:
        self._problems += _other_class(self._saved, current, optimizer_class)
        self._problems += self._unknown_fields(current)
        origins = {name: self._origin(name) for names in self._groups for name in names}
        wanted = {source for origin in origins.values() for source in origin.sources}
        left = [name for name in self._stored if name not in wanted]
        states: list[tuple[Mapping[str, Any] | Stays | None, ...]] = []
        fields: list[Mapping[str, Any]] = []
        chosen_groups: list[int | None] = []
        for number, names in enumerate(self._groups):
            from_groups: dict[int, str] = {}
            states.append(tuple(self._state(name, origins[name], left, from_groups) for name in names))
            chosen_groups.append(next(iter(from_groups), None))
            chosen = self._saved["param_groups"][next(iter(from_groups))] if from_groups else {}
            taken = {
                key: value for key, value in chosen.items() if key not in _NO_FIELDS and not self._policies.keeps(key)
            }
            held = {} if current is None else current[number]
            self._problems += self._several_groups(number, from_groups) or self._needed_state(
                names, states[-1], origins, {**held, **taken}
            )
            fields.append(taken)
        self._problems += _ambiguous_fields(chosen_groups, current, self._policies)
        self._report_unused(left)
        for reason, names in self._reset.items():
            self._warnings.append(f"optimizer state of {_listed(names)} starts afresh: {reason}")
        if self._problems:
            self._raise()
        return OptimizerPlan(tuple(states), tuple(fields), tuple(self._fresh), tuple(self._warnings))

    def _several_groups(self, number: int, from_groups: Mapping[int, str]) -> list[str]:
        """Fields that differ between the stored groups that one group draws from: none of them is the right one."""
        stored = [self._saved["param_groups"][group] for group in from_groups]
        differing = _differing_fields(stored, self._policies)
        if not differing:
            return []
        return [
            f"group {number} holds parameters of several stored groups ("
            + ", ".join(f"{name} of group {group}" for group, name in from_groups.items())
            + f"), which differ in {' and '.join(differing)}. To keep those of the optimizer: {_kept(differing)}"
        ]

    def _needed_state(
        self,
        names: Sequence[str],
        states: Sequence[Mapping[str, Any] | Stays | None],
        origins: Mapping[str, ParameterOrigin],
        fields: Mapping[str, Any],
    ) -> list[str]:
        """State that a field of the optimizer needs, and that was not kept where the field was off."""
        lacking: dict[tuple[str, str], list[str]] = {}
        for name, state in zip(names, states, strict=True):
            if isinstance(state, Mapping):
                group = self._stored[origins[name].sources[0]][1]
                found = lacking_state(self._saved["param_groups"][group], fields, state)
                if found is not None:
                    lacking.setdefault(found, []).append(name)
        return [
            f"{field} of the optimizer is {fields[field]} and needs {key}, which the file has not for "
            f"{_listed(named)}. Next: build the optimizer without {field}, or load_optim: false"
            for (field, key), named in lacking.items()
        ]

    def _unknown_fields(self, current: Sequence[Mapping[str, Any]] | None) -> list[str]:
        """A field that is misspelt would silently be taken from the other side."""
        known = {key for group in (*self._saved["param_groups"], *(current or ())) for key in group} - {"params"}
        messages = []
        for field in self._policies.fields:
            if field != "*" and field not in known:
                close = near(field, sorted(known))
                hint = f"near: {', '.join(close)}" if close else f"they have: {', '.join(sorted(known))}"
                messages.append(f"param_groups: the groups of the optimizer have no {field}; {hint}")
        return messages

    def _origin(self, name: str) -> ParameterOrigin:
        """By the plan of the weights, under any of the parameter's names; else the same name on both sides."""
        names = self._aliases.get(name, (name,))
        decided = [self._origins[alias] for alias in names if alias in self._origins] if self._origins else []
        if decided:
            known = [origin for origin in decided if origin.sources]
            fits = (origin for origin in known if all(source in self._stored for source in origin.sources))
            stays = any(origin.stays for origin in decided)
            return next(fits, known[0] if known else ParameterOrigin(stays=stays))
        return ParameterOrigin((next((alias for alias in names if alias in self._stored), name),))

    def _state(
        self, name: str, origin: ParameterOrigin, left: list[str], from_groups: dict[int, str]
    ) -> Mapping[str, Any] | Stays | None:
        """The stored state of one parameter, on its way; None where it starts afresh."""
        if origin.stays:
            return STAYS
        if not origin.sources:
            self._fresh.append(name)
            return None
        lacking = [source for source in origin.sources if source not in self._stored]
        if lacking:
            if self._policies.on_missing == "fresh":
                self._fresh.append(name)
                self._reset.setdefault("the file has none", []).append(name)
                return None
            candidates = near(lacking[0], left)
            hint = f"; near: {', '.join(candidates)}" if candidates else ""
            self._problems.append(f"{name} has no state in the file{hint}. For fresh state: on_missing_state: fresh")
            return None
        found = [self._stored[source] for source in origin.sources]
        for _index, group in found:
            from_groups.setdefault(group, name)
        stored = [self._saved["state"].get(index) for index, _group in found]
        present = [state for state in stored if state is not None]
        if not present:
            return None
        if len(present) < len(stored) or len({_kinds_of(state) for state in present}) > 1:
            self._problems.append(f"{name} comes from {', '.join(origin.sources)}, which have state of different keys")
            return None
        steps = _moment_steps(origin.steps)
        reason = self._cannot_follow(name, steps, origin, present)
        if reason:
            self._fresh.append(name)
            self._reset.setdefault(reason, []).append(name)
            return None
        before = origin.source_shapes or (self._shapes[name],)
        if not steps:
            self._problems += _misfits(name, present[0], before[0])
        return {
            key: _value(key, tuple(state.get(key) for state in present), before, attrs.evolve(origin, steps=steps))
            for key in present[0]
        }

    def _cannot_follow(
        self, name: str, steps: Sequence[Step], origin: ParameterOrigin, states: Sequence[Mapping[str, Any]]
    ) -> str:
        """Why state cannot go the way of its parameter, in words; empty where it can."""
        for step in steps:
            if not step.moves_moments:
                return f"{step.name} makes values that its moments do not belong to"
        if not steps:
            return ""
        for state, shape in zip(states, origin.source_shapes, strict=True):
            for key, value in state.items():
                if not _is_counter(key, value, shape) and (key in _FACTORS or _shape(value) != shape):
                    return f"{key} has not the shape of its parameter, so that transforms do not apply to it"
            if self._is_factored and (len(shape) > 1) != (len(self._shapes[name]) > 1):
                return "the optimizer keeps other state for one dimension than for several"
        return ""

    def _report_unused(self, left: Sequence[str]) -> None:
        gone = [name for name in left if self._stored[name][0] in self._saved["state"]]
        policy = self._policies.on_unexpected
        if not gone or policy == "ignore":
            return
        if policy == "error" or self._origins is None:
            self._problems.append(
                f"the file has state of {_listed(gone)}, which the optimizer has not. To leave it: "
                "on_unexpected_state: ignore"
            )
        else:
            self._warnings.append(
                f"optimizer state of {_listed(gone)} is not taken over: no parameter of the optimizer takes it"
            )

    def _raise(self) -> None:
        problems = self._problems
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if problems[20:] else "")
        raise StateMismatchError(
            f"the optimizer state in {self._where} does not fit:\n  {shown}\nNothing was changed. "
            "To start with a fresh optimizer: load_optim: false",
            problems=problems,
        )


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def _shape(value: Any) -> tuple[int, ...] | None:
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _is_counter(key: str, value: Any, shape: tuple[int, ...]) -> bool:
    """Whether state is about a parameter of ``shape`` as a whole, so that it stays what it is on any way."""
    return key in _COUNTERS or _shape(value) is None or (_shape(value) == () and shape != ())


def _kinds_of(state: Mapping[str, Any]) -> frozenset[str]:
    """The keys that have a value: SGD keeps None for a momentum that did not begin yet."""
    return frozenset(key for key, value in state.items() if value is not None)


def _moment_steps(steps: Sequence[Step]) -> tuple[Step, ...]:
    """What is done with moments where ``steps`` are done with the parameter: no value of a pad, and dtypes apart."""
    return tuple(
        attrs.evolve(step, value=None) if isinstance(step, Pad) else step
        for step in steps
        if not isinstance(step, Cast)
    )


def _value(key: str, values: tuple[Any, ...], shapes: tuple[tuple[int, ...], ...], origin: ParameterOrigin) -> Any:
    """The stored values of one key, one for each source, on the way of their parameter."""
    pairs = list(zip(values, shapes, strict=True))
    is_counter = any(_is_counter(key, value, shape) for value, shape in pairs)
    is_shaped = not is_counter and all(_shape(value) == shape for value, shape in pairs)
    dtype = None
    if origin.dtypes is not None and (is_shaped or (key in _FACTORS and not is_counter)):
        # what had the parameter's own dtype, as torch makes it, goes on having it
        before, after = origin.dtypes
        stored = {str(value.dtype).removeprefix("torch.") for value in values}
        if (stored == {before} or (before is None and len(stored) > 1)) and stored != {after}:
            dtype = after
    if origin.steps and is_shaped:
        return Moved(values, origin.steps, origin.part, dtype)
    if len(values) > 1 or dtype is not None:
        return Moved(values, dtype=dtype)
    return values[0]


def lacking_state(
    before: Mapping[str, Any], fields: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[str, str] | None:
    """(field, key) where a field that was off in the group ``before`` is on, and its state is not there."""
    for field, (key, beside) in _NEEDED_STATE.items():
        if fields.get(field) and not before.get(field) and beside in state and key not in state:
            return field, key
    return None


def _differing_fields(groups: Sequence[Mapping[str, Any]], policies: OptimizerPolicies) -> list[str]:
    """Fields that are not the same in all groups, but for those that keep the optimizer's own value."""
    names = {key for group in groups for key in group} - _NO_FIELDS
    absent = object()
    found = sorted(
        key
        for key in names
        if not policies.keeps(key)
        and any(_differ(groups[0].get(key, absent), group.get(key, absent)) for group in groups[1:])
    )
    # it goes with lr
    return [key for key in found if key != "initial_lr" or "lr" not in found]


def _kept(fields: Sequence[str]) -> str:
    """The config line that keeps the optimizer's own values of fields."""
    return f"param_groups: {{{', '.join(f'{field}: config' for field in fields)}}}"


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
                f"{', '.join(sorted(key for key in stored if key not in _NO_FIELDS))}"
            )
    return problems


def _ambiguous_fields(
    chosen: Sequence[int | None], current: Sequence[Mapping[str, Any]] | None, policies: OptimizerPolicies
) -> list[str]:
    """Groups that differ now and would all get the fields of one stored group."""
    problems = []
    for stored in sorted({number for number in chosen if number is not None}):
        numbers = [number for number, source in enumerate(chosen) if source == stored]
        if current is None or len(numbers) < 2:
            continue
        first = current[numbers[0]]
        for number in numbers[1:]:
            differing = [
                key
                for key in first.keys() & current[number].keys() - _NO_FIELDS
                if not policies.keeps(key) and _differ(first[key], current[number][key])
            ]
            if differing:
                shown = " and ".join(sorted(differing))
                problems.append(
                    f"groups {numbers[0]} and {number} of the optimizer differ in {shown}, but both would take the "
                    f"values of stored group {stored}. Build the groups as the saved run did, or keep their own: "
                    f"{_kept(sorted(differing))}"
                )
    return problems


def _differ(first: Any, other: Any) -> bool:
    if torch.is_tensor(first) and not torch.is_tensor(other) and not isinstance(other, int | float):
        return True
    return bool(torch.as_tensor(first).ne(torch.as_tensor(other)).any()) if torch.is_tensor(first) else first != other
