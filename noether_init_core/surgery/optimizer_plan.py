"""What a stored optimizer state becomes, by parameter name. Pure; ``applying/optimizer_state.py`` carries it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from noether_init_core.errors import StateMismatchError
from noether_init_core.messages import listed
from noether_init_core.surgery.advice import Advice
from noether_init_core.surgery.optimizer_fields import (
    Group,
    OptimizerPolicies,
    ambiguous_fields,
    fields_of,
    lacking_state,
    left_cycled,
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
#: One number for a whole parameter; a parameter of one element does not make it a moment.
_COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})
#: State of rows and columns, which optimizers keep for parameters of at least two dimensions.
_FACTORS = frozenset({"row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"})

#: State of one vector over all parameters, which LBFGS keeps under the first one.
_JOINT_STATE = frozenset({"prev_flat_grad", "old_dirs"})

State = Mapping[str, Any]


@attrs.frozen
class ParameterOrigin:
    """Where the value of a parameter comes from, according to the plan of the weights.

    Attributes:
        sources: Names in the file. Empty if the value is not from the file; its optimizer state is then fresh, unless
            ``stays``.
        steps: The transforms of the tensors of ``sources``; they give one or more tensors.
        part: Index of the tensor that the parameter takes from the result of ``steps``.
        source_shapes: The shape of each source.
        dtypes: The dtype in the file (None if the sources differ), and the dtype in the model.
        stays: Whether an earlier initializer has loaded the parameter. Its optimizer state is then not changed.
    """

    sources: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    part: int = 0
    source_shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str | None, str] | None = None
    stays: bool = False


@attrs.frozen
class Stays:
    """In place of the state of a parameter: the optimizer keeps its present state."""


STAYS = Stays()


@attrs.frozen(eq=False)
class Moved:
    """State that follows its parameter through the steps: stored values of one key, one for each source.

    ``dtype`` is the dtype to convert to, None for the stored one. Without ``steps`` all values must be equal, and the
    first one is taken.
    """

    values: tuple[Any, ...]
    steps: tuple[Step, ...] = ()
    part: int = 0
    dtype: str | None = None


@attrs.frozen(eq=False)
class OptimizerPlan:
    """What a stored optimizer state becomes.

    Attributes:
        state: For each target group and each of its parameters, its stored state: tensors are descriptions of tensors
            in the file, and values that follow a transform are ``Moved``. None for fresh state, ``STAYS`` if the
            optimizer keeps its own.
        fields: For each target group the stored fields (``lr``, ``betas``, ...) that are taken, without ``params``.
        warnings: Messages for the user.
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
    advice: Advice | None = None,
) -> OptimizerPlan:
    """Match a stored optimizer state to the groups of an optimizer, by name. Pure.

    State with the shape of its parameter follows the parameter: it is renamed, split, concatenated, or padded with
    zeros. State with the dtype of the stored parameter gets the dtype of the parameter. State that cannot follow (of an
    interpolated parameter, or factored state) is fresh, with a warning.

    Args:
        saved: ``state``, ``param_groups`` and ``param_idx_to_name`` as stored; tensors are descriptions.
        groups: Names of the target's parameters, group by group.
        shapes: Shape of each parameter.
        current: The present groups.
        origins: Name in the model -> its origin; absent names are the same on both sides.
        aliases: First name of a parameter -> all of its names; state is found under any of them.
        optimizer_class: The class of the optimizer; compared with the recorded class, if there is one.
        policies: What to do where optimizer and file do not fit.
        where: The file, for messages.
        advice: How the config writes a line that puts the plan right.

    Raises:
        StateMismatchError: For parameters without counterpart, shapes that do not fit, groups whose stored fields
            contradict each other, another class of optimizer, and fields without state in the file. Lists all.
    """
    if not isinstance(saved, Mapping) or not saved.keys() >= {"state", "param_groups"}:
        raise StateMismatchError(f"{where} is not the state of an optimizer: state or param_groups not found")
    stored, warnings = _stored_names(saved, groups, where)
    planner = _Planner(
        saved,
        groups,
        shapes,
        origins,
        aliases or {},
        policies or OptimizerPolicies(),
        where,
        advice or Advice(),
        stored,
        warnings,
    )
    return planner.plan(current, optimizer_class)


@attrs.define(eq=False)
class _Planner:
    """Matches one stored state to one optimizer. ``stored``: name -> its index and the number of its group."""

    saved: Mapping[str, Any]
    groups: Sequence[Sequence[str]]
    shapes: Mapping[str, Shape]
    origins: Mapping[str, ParameterOrigin] | None
    aliases: Mapping[str, tuple[str, ...]]
    policies: OptimizerPolicies
    where: str
    advice: Advice
    stored: Mapping[str, tuple[Any, int]]
    warnings: list[str]
    problems: list[str] = attrs.Factory(list)
    #: Reason why state is fresh although no rule asked for it -> the parameters.
    reset: defaultdict[str, list[str]] = attrs.field(factory=lambda: defaultdict(list))

    def plan(self, current: Sequence[Group], optimizer_class: str) -> OptimizerPlan:
        stored_groups: Sequence[Group] = self.saved["param_groups"]
        self.problems += other_class(self.saved, current, optimizer_class)
        self.problems += unknown_fields((*stored_groups, *current), self.policies)
        self.problems += self._other_order()
        self.problems += left_cycled(stored_groups, current, self.policies)
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
        self.warnings += (f"optimizer state of {listed(names)} is fresh: {why}" for why, names in self.reset.items())
        if self.problems:
            raise StateMismatchError(
                f"the optimizer state in {self.where} does not fit:\n  "
                f"{listed(self.problems, 20, separator=_NEXT_LINE)}\nNothing was changed. "
                f"Next, for a fresh optimizer: {self.advice.field('load_optim', False)}",
                problems=self.problems,
            )
        return OptimizerPlan(tuple(states), tuple(fields), tuple(self.warnings))

    def _other_order(self) -> list[str]:
        """A problem if state of all parameters as one vector, as of LBFGS, would be read in another order."""
        states = (state for state in self.saved["state"].values() if isinstance(state, Mapping))
        if not any(_JOINT_STATE & state.keys() for state in states):
            return []
        origins = [self._origin(name) for names in self.groups for name in names]
        now = [source for origin in origins for source in origin.sources]
        if now == list(self.stored) and not any(origin.steps or origin.stays for origin in origins):
            return []
        return [
            "this optimizer keeps its state for all parameters as one vector, in the order of the saved run "
            f"({listed(self.stored)}), and the parameters now are {listed(now)}. Next: build the optimizer over the "
            f"parameters in that order, or {self.advice.field('load_optim', False)}"
        ]

    def _lacking(
        self, states: Mapping[str, State | Stays | None], ways: Mapping[str, ParameterOrigin], fields: Group
    ) -> list[str]:
        """Report state that a field of the optimizer needs, and that was not saved because the field was off."""
        lacking: dict[tuple[str, str], list[str]] = {}
        for name, state in states.items():
            if isinstance(state, Mapping):
                group = self.stored[ways[name].sources[0]][1]
                found = lacking_state(self.saved["param_groups"][group], fields, state)
                if found is not None:
                    lacking.setdefault(found, []).append(name)
        return [
            f"{field} of the optimizer is {fields[field]} and needs {key}, not found in the file for "
            f"{listed(named)}. Next: build the optimizer without {field}, or {self.advice.field('load_optim', False)}"
            for (field, key), named in lacking.items()
        ]

    def _origin(self, name: str) -> ParameterOrigin:
        """The origin by the plan of the weights, under any of the parameter's names; else the same name."""
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
        """The stored state of one parameter with the steps it follows; None for fresh state."""
        if origin.stays:
            return STAYS
        if not origin.sources:
            return None
        lacking = [source for source in origin.sources if source not in self.stored]
        if lacking:
            if self.policies.on_missing == "fresh":
                self.reset["not found in the file"].append(name)
                return None
            candidates = near(lacking[0], left)
            hint = f"; near: {', '.join(candidates)}" if candidates else ""
            line = self.advice.field("on_missing_state", "fresh")
            self.problems.append(f"state of {name} not found in the file{hint}. Next: {line}")
            return None
        found = [self.stored[source] for source in origin.sources]
        for _index, group in found:
            from_groups.setdefault(group, name)
        stored = [self.saved["state"].get(index) for index, _group in found]
        present = [state for state in stored if state is not None]
        if not present:
            return None
        # SGD stores None for a momentum before its first step
        kinds = {frozenset(key for key, value in state.items() if value is not None) for state in present}
        if len(present) < len(stored) or len(kinds) > 1:
            self.problems.append(f"{name} comes from {', '.join(origin.sources)}, which have state of different keys")
            return None
        # moments are padded with zeros, and _value() converts their dtypes
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
        """Why state cannot follow its parameter through the steps, in words; empty if it can."""
        for step in steps:
            if not step.moves_moments:
                return f"the moments do not belong to the values that {step.name} computes"
        for state, shape in zip(states, origin.source_shapes, strict=True) if steps else ():
            for key, value in state.items():
                if not _is_counter(key, value, shape) and (key in _FACTORS or _shape(value) != shape):
                    return f"{key} does not have the shape of its parameter, so that transforms do not apply to it"
            if (len(shape) > 1) != (len(self.shapes[name]) > 1) and self._is_factored():
                return "the optimizer keeps other state for one dimension than for several"
        return ""

    def _is_factored(self) -> bool:
        """Whether the optimizer stores state of rows and columns."""
        states = (state for state in self.saved["state"].values() if isinstance(state, Mapping))
        return any(key in _FACTORS or key == "variance" for state in states for key in state)

    def _report_unused(self, left: Sequence[str]) -> None:
        gone = [name for name in left if self.stored[name][0] in self.saved["state"]]
        policy = self.policies.on_unexpected
        if not gone or policy == "ignore":
            return
        if policy == "error" or self.origins is None:
            what = f"the file has state of {listed(gone)}, not found in the optimizer"
            self.problems.append(f"{what}. Next: {self.advice.field('on_unexpected_state', 'ignore')}")
        else:
            what = f"optimizer state of {listed(gone)} was not loaded"
            self.warnings.append(f"{what}: no parameter of the optimizer takes it")


_NEXT_LINE = "\n  "


def _shape(value: Any) -> Shape | None:
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _is_counter(key: str, value: Any, shape: Shape) -> bool:
    """Whether state belongs to a parameter of ``shape`` as a whole, so that no step changes it."""
    return key in _COUNTERS or _shape(value) is None or (_shape(value) == () and shape != ())


def _value(key: str, values: tuple[Any, ...], shapes: tuple[tuple[int, ...], ...], origin: ParameterOrigin) -> Any:
    """The stored values of one key, one for each source, with the steps of their parameter."""
    pairs = list(zip(values, shapes, strict=True))
    is_counter = any(_is_counter(key, value, shape) for value, shape in pairs)
    is_shaped = not is_counter and all(_shape(value) == shape for value, shape in pairs)
    dtype = None
    if origin.dtypes is not None and (is_shaped or (key in _FACTORS and not is_counter)):
        # torch creates moments in the dtype of the parameter: a cast of the parameter must cast them, too
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
                f"{where} records no parameter names, and its groups of {sizes} parameters do not fit those of the "
                f"optimizer ({wanted}). Save it again with CheckpointWriter"
            )
        warnings.append(f"{where} records no parameter names; parameters were matched by position")
    stored: dict[str, tuple[Any, int]] = {}
    for number, (group, named) in enumerate(zip(stored_groups, names, strict=True)):
        stored.update({name: (index, number) for name, index in zip(named, group["params"], strict=True)})
    if len(stored) != sum(sizes):
        raise StateMismatchError(f"{where} records the same name for several parameters")
    return stored, warnings
