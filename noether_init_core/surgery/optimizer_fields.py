"""Fields of the groups of optimizers (``lr``, ``betas``, ...): whose values count, and what does not fit. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs

from noether_init_core.messages import near

Group = Mapping[str, Any]

#: Fields of groups by which the algorithms of torch differ; other fields come and go with releases and schedulers.
_TELLING_FIELDS = {"betas", "momentum", "alpha", "rho", "lambd", "etas", "nesterov", "history_size", "centered"}
_TELLING_FIELDS |= {"lr_decay", "beta2_decay"}
#: Field of the groups -> state that every parameter has while it is on, and state that tells the optimizers meant.
_NEEDED_STATE = {
    "amsgrad": ("max_exp_avg_sq", "exp_avg_sq"),
    "centered": ("grad_avg", "square_avg"),
    "momentum": ("momentum_buffer", "square_avg"),
}
_NO_FIELDS = frozenset({"params", "param_names"})


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


def fields_of(group: Group, policies: OptimizerPolicies) -> dict[str, Any]:
    """The fields of a stored group that are taken."""
    return {key: value for key, value in group.items() if key not in _NO_FIELDS and not policies.keeps(key)}


def lacking_state(before: Group, fields: Group, state: Mapping[str, Any]) -> tuple[str, str] | None:
    """(field, key) where a field that was off in the group ``before`` is on, and its state is not there."""
    for field, (key, beside) in _NEEDED_STATE.items():
        if fields.get(field) and not before.get(field) and beside in state and key not in state:
            return field, key
    return None


def other_class(saved: Mapping[str, Any], current: Sequence[Group], optimizer_class: str) -> list[str]:
    """Whether the state is that of another class: by its record, else by the fields that tell algorithms apart."""
    recorded = saved.get("optimizer_class")
    if isinstance(recorded, str) and optimizer_class:
        same = recorded == optimizer_class
        return [] if same else [f"the state is of a {recorded}, the optimizer is a {optimizer_class}"]
    if not current or not saved["param_groups"]:
        return []
    mine, stored = current[0], saved["param_groups"][0]
    decoupled = {group.get("decoupled_weight_decay") for group in (mine, stored)} - {None}
    if _TELLING_FIELDS & mine.keys() == _TELLING_FIELDS & stored.keys() and len(decoupled) < 2:
        return []
    return [
        f"the state is of another class of optimizer than {optimizer_class or 'this one'}: its groups have "
        f"{', '.join(sorted(stored.keys() - _NO_FIELDS))}"
    ]


def unknown_fields(groups: Iterable[Group], policies: OptimizerPolicies) -> list[str]:
    """A field that is misspelt would silently be taken from the other side."""
    known = sorted({key for group in groups for key in group} - {"params"})
    messages = []
    for field in [field for field in policies.fields if field not in ("*", *known)]:
        close = near(field, known, cutoff=0.5)
        hint = f"near: {', '.join(close)}" if close else f"they have: {', '.join(known)}"
        messages.append(f"param_groups: the groups of the optimizer have no {field}; {hint}")
    return messages


def several_groups(
    number: int, from_groups: Mapping[int, str], stored: Sequence[Group], policies: OptimizerPolicies
) -> list[str]:
    """Fields that differ between the stored groups that one group draws from: none of them is the right one.

    ``from_groups``: number of a stored group -> the first parameter that comes from it.
    """
    groups = [stored[one] for one in from_groups]
    differing = _differing(groups, {key for group in groups for key in group}, policies)
    if not differing:
        return []
    places = ", ".join(f"{name} of group {group}" for group, name in from_groups.items())
    return [
        f"group {number} holds parameters of several stored groups ({places}), which differ in "
        f"{' and '.join(differing)}. To keep those of the optimizer: {_kept(differing)}"
    ]


def ambiguous_fields(chosen: Sequence[int | None], current: Sequence[Group], policies: OptimizerPolicies) -> list[str]:
    """Groups that differ now and would all get the fields of one stored group.

    ``chosen``: for each group of the optimizer, the number of the stored group that its fields are taken from.
    """
    problems: list[str] = []
    for stored in sorted({number for number in chosen if number is not None}):
        first, *others = (number for number, source in enumerate(chosen) if source == stored)
        for number in others:
            both = current[first], current[number]
            differing = _differing(both, both[0].keys() & both[1].keys(), policies)
            if differing:
                problems.append(
                    f"groups {first} and {number} of the optimizer differ in {' and '.join(differing)}, but both would "
                    f"take the values of stored group {stored}. Build the groups as the saved run did, or keep their "
                    f"own: {_kept(differing)}"
                )
    return problems


def _differing(groups: Sequence[Group], names: Iterable[str], policies: OptimizerPolicies) -> list[str]:
    """Those of ``names`` that are not the same in all groups, but for those that keep the optimizer's own value."""
    absent = object()
    found = sorted(
        key
        for key in set(names) - _NO_FIELDS
        if not policies.keeps(key)
        and any(_differ(groups[0].get(key, absent), group.get(key, absent)) for group in groups[1:])
    )
    # it goes with lr
    return [key for key in found if key != "initial_lr" or "lr" not in found]


def _differ(first: Any, other: Any) -> bool:
    """Whether two values differ, also tensors or a tensor and a number."""
    differs = first != other
    return bool(differs.any()) if hasattr(differs, "any") else bool(differs)


def _kept(fields: Sequence[str]) -> str:
    """The config line that keeps the optimizer's own values of fields."""
    return f"param_groups: {{{', '.join(f'{field}: config' for field in fields)}}}"
