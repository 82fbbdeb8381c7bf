"""What a stored optimizer state becomes, by parameter name. Pure; ``applying/optimizer_state.py`` carries it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from noether_init_core.errors import StateMismatchError
from noether_init_core.messages import listed
from noether_init_core.surgery.optimizer_fields import (
    Group,
    OptimizerPolicies,
    ambiguous_fields,
    fields_of,
    lacking_state,
    other_class,
    several_groups,
    unknown_fields,
)
from noether_init_core.surgery.patterns import near
from noether_init_core.surgery.steps import Cast, Pad, Shape, Step

#: State that has the shape of its parameter, whatever the optimizer.
_SHAPED_STATE = frozenset(
    ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "exp_inf"]
)
#: One number for a whole parameter, also where the parameter has but one element.
_COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})
#: State of rows and columns, which optimizers keep for parameters of two dimensions and more.
_FACTORS = frozenset({"row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"})

State = Mapping[str, Any]


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


@attrs.frozen(eq=False)
class OptimizerPlan:
    """What a stored optimizer state becomes.

    Attributes:
        state: For each target group, for each of its parameters: the stored state of it (tensors are descriptions of
            tensors in the file, what goes the way of a transform is ``Moved``), None where it starts afresh, ``STAYS``
            where the optimizer keeps what it has.
        fields: For each target group the stored fields (``lr``, ``betas``, ...) that are taken, without ``params``.
        warnings: What a person should know.
    """

    state: tuple[tuple[Mapping[str, Any] | Stays | None, ...], ...]
    fields: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...] = ()


def plan_optimizer(
    saved: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, Shape],
    current: Sequence[Group],
    *,
    origins: Mapping[str, ParameterOrigin] | None = None,
    aliases: Mapping[str, tuple[str, ...]] | None = None,
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
        current: The groups as they are.
        origins: Name in the model -> where its value comes from; names that are absent are the same on both sides.
        aliases: First name of a parameter -> all of its names; state is found under any of them.
        optimizer_class: The class that the state is for; compared with the one that is recorded, where one is.
        policies: What is done where optimizer and file do not fit.
        where: The file, for messages.

    Raises:
        StateMismatchError: listing every parameter without counterpart, every shape that does not fit, and every
            group whose parameters come from stored groups with different fields. Also where the state is that of
            another class of optimizer, where groups with different fields would all take those of one stored group, and
            where a field of the optimizer needs state that the file has not.
    """
    if not isinstance(saved, Mapping) or not saved.keys() >= {"state", "param_groups"}:
        raise StateMismatchError(f"{where} is no state of an optimizer: it needs state and param_groups")
    stored, warnings = _stored_names(saved, groups, where)
    planner = _Planner(
        saved, groups, shapes, origins, aliases or {}, policies or OptimizerPolicies(), where, stored, warnings
    )
    return planner.plan(current, optimizer_class)


@attrs.define(eq=False)
class _Planner:
    """The matching of one stored state to one optimizer. ``stored``: name -> its index and the number of its group."""

    saved: Mapping[str, Any]
    groups: Sequence[Sequence[str]]
    shapes: Mapping[str, Shape]
    origins: Mapping[str, ParameterOrigin] | None
    aliases: Mapping[str, tuple[str, ...]]
    policies: OptimizerPolicies
    where: str
    stored: Mapping[str, tuple[Any, int]]
    warnings: list[str]
    problems: list[str] = attrs.Factory(list)
    #: Why state starts afresh that a rule did not ask for -> the parameters.
    reset: defaultdict[str, list[str]] = attrs.field(factory=lambda: defaultdict(list))

    def plan(self, current: Sequence[Group], optimizer_class: str) -> OptimizerPlan:
        stored_groups: Sequence[Group] = self.saved["param_groups"]
        self.problems += other_class(self.saved, current, optimizer_class)
        self.problems += unknown_fields((*stored_groups, *current), self.policies)
        ways = {name: self._origin(name) for names in self.groups for name in names}
        wanted = {source for origin in ways.values() for source in origin.sources}
        left = [name for name in self.stored if name not in wanted]
        states: list[tuple[State | Stays | None, ...]] = []
        fields: list[Mapping[str, Any]] = []
        chosen: list[int | None] = []
        for number, names in enumerate(self.groups):
            # number of a stored group -> the first parameter that comes from it
            from_groups: dict[int, str] = {}
            states.append(tuple(self._state(name, ways[name], left, from_groups) for name in names))
            chosen.append(next(iter(from_groups), None))
            fields.append({} if chosen[-1] is None else fields_of(stored_groups[chosen[-1]], self.policies))
            differing = several_groups(number, from_groups, stored_groups, self.policies)
            self.problems += differing or self._lacking(
                dict(zip(names, states[-1], strict=True)), ways, {**current[number], **fields[-1]}
            )
        self.problems += ambiguous_fields(chosen, current, self.policies)
        self._report_unused(left)
        self.warnings += (
            f"optimizer state of {listed(names)} starts afresh: {why}" for why, names in self.reset.items()
        )
        if self.problems:
            raise StateMismatchError(
                f"the optimizer state in {self.where} does not fit:\n  "
                f"{listed(self.problems, 20, separator=_NEXT_LINE)}\nNothing was changed. "
                "To start with a fresh optimizer: load_optim: false",
                problems=self.problems,
            )
        return OptimizerPlan(tuple(states), tuple(fields), tuple(self.warnings))

    def _lacking(
        self, states: Mapping[str, State | Stays | None], ways: Mapping[str, ParameterOrigin], fields: Group
    ) -> list[str]:
        """State that a field of the optimizer needs, and that was not kept where the field was off."""
        lacking: dict[tuple[str, str], list[str]] = {}
        for name, state in states.items():
            if isinstance(state, Mapping):
                group = self.stored[ways[name].sources[0]][1]
                found = lacking_state(self.saved["param_groups"][group], fields, state)
                if found is not None:
                    lacking.setdefault(found, []).append(name)
        return [
            f"{field} of the optimizer is {fields[field]} and needs {key}, not found in the file for "
            f"{listed(named)}. Next: build the optimizer without {field}, or load_optim: false"
            for (field, key), named in lacking.items()
        ]

    def _origin(self, name: str) -> ParameterOrigin:
        """By the plan of the weights, under any of the parameter's names; else the same name on both sides."""
        names = self.aliases.get(name, (name,))
        decided = [self.origins[alias] for alias in names if alias in self.origins] if self.origins else []
        if decided:
            known = [origin for origin in decided if origin.sources]
            fits = (origin for origin in known if all(source in self.stored for source in origin.sources))
            stays = any(origin.stays for origin in decided)
            return next(fits, known[0] if known else ParameterOrigin(stays=stays))
        return ParameterOrigin((next((alias for alias in names if alias in self.stored), name),))

    def _state(
        self, name: str, origin: ParameterOrigin, left: list[str], from_groups: dict[int, str]
    ) -> State | Stays | None:
        """The stored state of one parameter, on its way; None where it starts afresh."""
        if origin.stays:
            return STAYS
        if not origin.sources:
            return None
        lacking = [source for source in origin.sources if source not in self.stored]
        if lacking:
            if self.policies.on_missing == "fresh":
                self.reset["the file has none"].append(name)
                return None
            candidates = near(lacking[0], left)
            hint = f"; near: {', '.join(candidates)}" if candidates else ""
            self.problems.append(f"{name} has no state in the file{hint}. For fresh state: on_missing_state: fresh")
            return None
        found = [self.stored[source] for source in origin.sources]
        for _index, group in found:
            from_groups.setdefault(group, name)
        stored = [self.saved["state"].get(index) for index, _group in found]
        present = [state for state in stored if state is not None]
        if not present:
            return None
        # SGD keeps None for a momentum that did not begin yet
        kinds = {frozenset(key for key, value in state.items() if value is not None) for state in present}
        if len(present) < len(stored) or len(kinds) > 1:
            self.problems.append(f"{name} comes from {', '.join(origin.sources)}, which have state of different keys")
            return None
        # moments are padded with zeros, and their dtypes are looked at apart
        steps = tuple(
            attrs.evolve(step, value=None) if isinstance(step, Pad) else step
            for step in origin.steps
            if not isinstance(step, Cast)
        )
        reason = self._cannot_follow(name, steps, origin, present)
        if reason:
            self.reset[reason].append(name)
            return None
        before = origin.source_shapes or (self.shapes[name],)
        if not steps:
            self.problems += (
                f"{name}: {key} has shape {list(value.shape)}, the parameter {list(before[0])}"
                for key, value in present[0].items()
                if key in _SHAPED_STATE and _shape(value) not in (None, before[0])
            )
        return {
            key: _value(key, tuple(state.get(key) for state in present), before, attrs.evolve(origin, steps=steps))
            for key in present[0]
        }

    def _cannot_follow(self, name: str, steps: Sequence[Step], origin: ParameterOrigin, states: Sequence[State]) -> str:
        """Why state cannot go the way of its parameter, in words; empty where it can."""
        for step in steps:
            if not step.moves_moments:
                return f"{step.name} makes values that its moments do not belong to"
        for state, shape in zip(states, origin.source_shapes, strict=True) if steps else ():
            for key, value in state.items():
                if not _is_counter(key, value, shape) and (key in _FACTORS or _shape(value) != shape):
                    return f"{key} does not have the shape of its parameter, so that transforms do not apply to it"
            if (len(shape) > 1) != (len(self.shapes[name]) > 1) and self._is_factored():
                return "the optimizer keeps other state for one dimension than for several"
        return ""

    def _is_factored(self) -> bool:
        """Whether the optimizer keeps state of rows and columns."""
        states = (state for state in self.saved["state"].values() if isinstance(state, Mapping))
        return any(key in _FACTORS or key == "variance" for state in states for key in state)

    def _report_unused(self, left: Sequence[str]) -> None:
        gone = [name for name in left if self.stored[name][0] in self.saved["state"]]
        policy = self.policies.on_unexpected
        if not gone or policy == "ignore":
            return
        if policy == "error" or self.origins is None:
            what = f"the file has state of {listed(gone)}, not found in the optimizer"
            self.problems.append(f"{what}. To leave it: on_unexpected_state: ignore")
        else:
            what = f"optimizer state of {listed(gone)} is not taken over"
            self.warnings.append(f"{what}: no parameter of the optimizer takes it")


_NEXT_LINE = "\n  "


def _shape(value: Any) -> Shape | None:
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _is_counter(key: str, value: Any, shape: Shape) -> bool:
    """Whether state is about a parameter of ``shape`` as a whole, so that it stays what it is on any way."""
    return key in _COUNTERS or _shape(value) is None or (_shape(value) == () and shape != ())


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


def _stored_names(
    saved: Mapping[str, Any], groups: Sequence[Sequence[str]], where: str
) -> tuple[dict[str, tuple[Any, int]], list[str]]:
    """Name -> (index, number of its group) of the stored parameters, and warnings."""
    recorded, stored_groups = saved.get("param_idx_to_name"), saved["param_groups"]
    sizes = [len(group["params"]) for group in stored_groups]
    names: Sequence[Sequence[str]]
    warnings: list[str] = []
    if recorded is not None:
        for number, group in enumerate(stored_groups):
            missing = [index for index in group["params"] if index not in recorded]
            if missing:
                raise StateMismatchError(f"{where} records no name for parameter {missing[0]} of group {number}")
        names = [[recorded[index] for index in group["params"]] for group in stored_groups]
    elif all("param_names" in group for group in stored_groups):
        names = [group["param_names"] for group in stored_groups]
    else:
        names, wanted = groups, [len(names) for names in groups]
        if sizes != wanted:
            raise StateMismatchError(
                f"{where} records no names of parameters, and its groups of {sizes} parameters are not those of the "
                f"optimizer ({wanted}). Save it again with CheckpointWriter"
            )
        warnings.append(f"{where} records no names of parameters; they are matched by position")
    stored: dict[str, tuple[Any, int]] = {}
    for number, (group, named) in enumerate(zip(stored_groups, names, strict=True)):
        stored.update({name: (index, number) for name, index in zip(named, group["params"], strict=True)})
    if len(stored) != sum(sizes):
        raise StateMismatchError(f"{where} records the same name for several parameters")
    return stored, warnings
