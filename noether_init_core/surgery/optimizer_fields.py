"""Fields of optimizer groups (``lr``, ``betas``, ...): whose value is taken, and what does not fit. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs

from noether_init_core.messages import near
from noether_init_core.restore import restore_line

Group = Mapping[str, Any]

#: Fields that differ between the algorithms of torch; others depend on its release or are added by schedulers.
_TELLING_FIELDS = {"betas", "momentum", "alpha", "rho", "lambd", "etas", "nesterov", "history_size", "centered"}
_TELLING_FIELDS |= {"lr_decay", "beta2_decay"}
#: Field -> state that each parameter has while the field is on, and state by which to recognize these optimizers.
_NEEDED_STATE = {
    "amsgrad": ("max_exp_avg_sq", "exp_avg_sq"),
    "centered": ("grad_avg", "square_avg"),
    "momentum": ("momentum_buffer", "square_avg"),
}
_NO_FIELDS = frozenset({"params", "param_names"})


@attrs.frozen
class OptimizerPolicies:
    """What to do where optimizer and file do not fit.

    Attributes:
        on_missing: A parameter whose weights are loaded has no state in the file (it was new or frozen there):
            ``error``, or ``fresh`` state.
        on_unexpected: The file has state of a parameter that is not in the optimizer: ``error`` or ``ignore``; None is
            an error unless rules renamed or dropped weights.
        fields: Field of the groups (``lr``; ``*`` for all others) -> ``checkpoint`` or ``config``: whose value is used.
            ``initial_lr``, from which schedules set ``lr``, follows ``lr`` unless it is named itself.
        named: The fields that the config names.
        scheduled: The fields that a schedule of the script sets, which takes the place of the saved one.
    """

    on_missing: Literal["error", "fresh"] = "error"
    on_unexpected: Literal["error", "ignore"] | None = None
    fields: Mapping[str, Literal["checkpoint", "config"]] = attrs.Factory(dict)
    named: Collection[str] = ()
    scheduled: Collection[str] = ()

    def keeps(self, field: str) -> bool:
        """Whether the optimizer keeps its own value of a field."""
        if field == "initial_lr" and field not in self.fields:
            field = "lr"
        return self.fields.get(field, self.fields.get("*", "checkpoint")) == "config"


def fields_of(group: Group, policies: OptimizerPolicies) -> dict[str, Any]:
    """The fields of a stored group that are taken."""
    return {key: value for key, value in group.items() if key not in _NO_FIELDS and not policies.keeps(key)}


def lacking_state(before: Group, fields: Group, state: Mapping[str, Any]) -> tuple[str, str] | None:
    """(field, key) if a field is on that was off in the group ``before``, and its state is absent; else None."""
    for field, (key, beside) in _NEEDED_STATE.items():
        if fields.get(field) and not before.get(field) and beside in state and key not in state:
            return field, key
    return None


def other_class(saved: Mapping[str, Any], current: Sequence[Group], optimizer_class: str) -> list[str]:
    """A problem if the state is of another optimizer class, by its record or by fields of some algorithms only."""
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
    """Problems for fields that no group has: a misspelt field would silently be taken from the other side."""
    known = sorted({key for group in groups for key in group} - {"params"})
    messages = []
    for field in [field for field in policies.named if field not in ("*", *known)]:
        close = near(field, known, cutoff=0.5)
        hint = f"near: {', '.join(close)}" if close else f"they have: {', '.join(known)}"
        messages.append(f"restore: optimizer: {field} not found in the groups of the optimizer; {hint}")
    return messages


def left_cycled(stored: Sequence[Group], current: Sequence[Group], policies: OptimizerPolicies) -> list[str]:
    """Problems for momentum that the saved schedule cycled, and that no schedule of the script sets any more.

    The value in the checkpoint is that of one moment of the cycle; it would stay for the rest of the run.
    """
    cycled = any({"base_momentum", "max_momentum"} & group.keys() for group in stored)
    if not policies.scheduled or not cycled:
        return []
    found = [
        field
        for field in ("betas", "momentum")
        if field not in policies.scheduled
        and field not in policies.named
        and any(
            field in group and _differ(group[field], own.get(field))
            for group, own in zip(stored, current, strict=False)
        )
    ]
    return [
        f"{field}: {stored[0].get(field)} in the checkpoint is a value of the saved schedule, and the schedule of the "
        f"script does not set it. Next: {restore_line(optimizer={field: 'config'}, schedule='config')}"
        for field in found
    ]


def several_groups(
    number: int, from_groups: Mapping[int, str], stored: Sequence[Group], policies: OptimizerPolicies
) -> list[str]:
    """A problem if one group takes parameters of several stored groups with different fields.

    No stored value is right for all of them. ``from_groups``: number of a stored group -> the first parameter that
    comes from it.
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
    """Problems for groups that differ now and would all get the fields of one stored group.

    ``chosen``: for each group of the optimizer, the number of the stored group that its fields come from.
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
    """Those of ``names`` that differ between the groups, except fields that keep the optimizer's own value."""
    absent = object()
    found = sorted(
        key
        for key in set(names) - _NO_FIELDS
        if not policies.keeps(key)
        and any(_differ(groups[0].get(key, absent), group.get(key, absent)) for group in groups[1:])
    )
    # initial_lr follows lr, and one message is enough
    return [key for key in found if key != "initial_lr" or "lr" not in found]


def _differ(first: Any, other: Any) -> bool:
    """Whether two values differ; each may be a tensor or a number."""
    differs = first != other
    return bool(differs.any()) if hasattr(differs, "any") else bool(differs)


def _kept(fields: Sequence[str]) -> str:
    """The config line that keeps the optimizer's own values of fields."""
    return restore_line(optimizer=dict.fromkeys(fields, "config"))
