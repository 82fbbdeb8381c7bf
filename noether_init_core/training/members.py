"""The stateful objects of a training loop: their states for a checkpoint, and what each takes from one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Mapping
from typing import Any

import attrs
import torch

from noether_init_core.errors import ConfigError, StateMismatchError, type_of
from noether_init_core.messages import counted, listed, logger_of, near, one_line
from noether_init_core.nested import equal
from noether_init_core.restore import Difference, Restore, ScheduleChoice, restore_line
from noether_init_core.training.plain_state import plain, restored
from noether_init_core.training.schedules import (
    Replayed,
    is_schedule,
    put_fields,
    rebuild,
    recorded_steps,
    replay,
    settings,
)

_logger = logger_of(__name__)
_RESERVED = frozenset({"callbacks", "init_report", "iteration", "lineage", "loader", "model", "rng", "version"})


@attrs.frozen(eq=False)
class MembersPlan:
    """What each object takes.

    Attributes:
        states: Name -> the state to load.
        replayed: Name of a schedule of the script -> where it is after the steps of the saved run.
        differences: What differs between checkpoint and script.
    """

    states: Mapping[str, Any] = attrs.Factory(dict)
    replayed: Mapping[str, Replayed] = attrs.Factory(dict)
    differences: tuple[Difference, ...] = ()


@attrs.define(eq=False)
class Members:
    """Objects with ``state_dict`` and ``load_state_dict``, by name.

    Raises ``ConfigError`` for a reserved name, or an object without these methods.
    """

    named: dict[str, Any]

    def __attrs_post_init__(self) -> None:
        for name, member in self.named.items():
            _check_member(name, member)

    def __iter__(self) -> Any:
        return iter(self.named)

    def state(self) -> dict[str, dict[str, Any]]:
        """State, types of values and class of each object, as plain data. Tensors are not copied."""
        found = {name: plain(member.state_dict(), name) for name, member in self.named.items()}
        return {
            "stateful": {name: value for name, (value, _types) in found.items()},
            "types": {name: types for name, (_value, types) in found.items()},
            "classes": {name: class_of(member) for name, member in self.named.items()},
        }

    def plan(self, stored: Mapping[str, Mapping[str, Any]], restore: Restore) -> MembersPlan:
        """Decide what each object takes. Schedules of the script are replayed and put back; nothing changes.

        Args:
            stored: The result of ``state``.
            restore: The choice for each object.

        Raises ``StateMismatchError`` with everything that does not fit.
        """
        choices = self._choices(restore)
        states, classes, types = stored["stateful"], stored["classes"], stored["types"]
        problems = [*self._unknown_names(restore, states), *self._absent(choices, states, restore)]
        problems += self._parted(choices, states)
        taken: dict[str, Any] = {}
        replayed: dict[str, Replayed] = {}
        differences: list[Difference] = []
        for name, choice in choices.items():
            member = self.named[name]
            if choice.side == "checkpoint" and name in states:
                problems += self._other_class(name, classes.get(name)) or self._other_groups(name, states[name])
            if choice.side == "skip" and not is_schedule(member):
                continue
            if problems or (name not in states and choice.side == "checkpoint"):
                continue
            try:
                state = restored(states[name], types[name], member.state_dict(), name) if name in states else {}
                if choice.side == "checkpoint":
                    taken[name] = state
                    differences += self._differences(name, state)
                else:
                    replayed[name] = self._replayed(name, choice, state, classes.get(name), restore)
                    differences += self._other_count(name, choice, state)
                problems += self._undone(name, choice, restore)
            except StateMismatchError as error:
                problems += error.problems or [str(error)]
        if problems:
            raise StateMismatchError("the trainer state does not fit: " + "; ".join(problems), problems=problems)
        return MembersPlan(taken, replayed, tuple(differences))

    def load(self, plan: MembersPlan) -> MembersPlan:
        """Give each object its state; if one raises, all get their former state again.

        Returns the plan for ``put_rates``, which holds no states any more.

        The groups of optimizers are not changed: ``put_rates`` does that, after the state of optimizers was loaded.
        """
        states = {**plan.states, **{name: one.state for name, one in plan.replayed.items()}}
        before = {name: copy.deepcopy(self.named[name].state_dict()) for name in states}
        # An object may change part of itself before it raises, so the failing one is restored, too.
        touched: list[str] = []
        try:
            for name, state in states.items():
                touched.append(name)
                self.named[name].load_state_dict(copy.deepcopy(dict(state)) if name in plan.replayed else state)
        except Exception as error:
            stuck = []
            for other in touched:
                try:
                    self.named[other].load_state_dict(copy.deepcopy(before[other]))
                    if not equal(self.named[other].state_dict(), before[other]):
                        stuck.append(other)
                except Exception:  # an object that refused one state may refuse its own, too; the message names it
                    _logger.exception("%s could not be restored to its former state", other)
                    stuck.append(other)
            outcome = f"{', '.join(stuck)} could not be restored" if stuck else "all objects were restored"
            problem = f"{touched[-1]} refuses its state: {type(error).__name__}: {one_line(str(error))}"
            raise StateMismatchError(f"{problem}. {outcome[0].upper()}{outcome[1:]}", problems=[problem]) from error
        return attrs.evolve(plan, states=dict.fromkeys(plan.states))

    def put_rates(self, plan: MembersPlan, loaded: Collection[int] | None = None) -> None:
        """Write the rates of schedules into the groups of their optimizers.

        A replayed schedule writes all that it wrote. One that was restored writes its last rates, if its optimizer took
        no state: most schedules compute the next rate from that of the group.

        Args:
            plan: What ``load`` has loaded.
            loaded: Ids of the groups of optimizers that took their state; None: all did.

        Raises ``StateMismatchError`` if the rates of such a group are unknown.
        """
        last = {} if loaded is None else self._last_rates(plan, loaded)
        for name, one in plan.replayed.items():
            for group, fields in zip(self.named[name].optimizer.param_groups, one.groups, strict=True):
                put_fields(group, fields)
        for name, rates in last.items():
            for group, rate in zip(self.named[name].optimizer.param_groups, rates, strict=True):
                put_fields(group, {"lr": rate})

    def _last_rates(self, plan: MembersPlan, loaded: Collection[int]) -> dict[str, list[Any]]:
        """Name of a restored schedule whose optimizer took no state -> the last rate of each group."""
        found: dict[str, list[Any]] = {}
        for name in plan.states:
            member = self.named[name]
            # an optimizer that is an object of the loop has taken its state there
            if not is_schedule(member) or any(member.optimizer is other for other in self.named.values()):
                continue
            groups, rates = member.optimizer.param_groups, getattr(member, "_last_lr", None)
            if all(id(group) in loaded for group in groups):
                continue
            others = [other for other in found if self.named[other].optimizer is member.optimizer]
            is_told = isinstance(rates, list) and len(rates) == len(groups)
            if not is_told or not all(equal(found[other], rates) for other in others):
                raise StateMismatchError(
                    f"{' and '.join([*others, name])} cannot go on: the optimizer takes no state, and its rates are "
                    "not known. Next: bind(module, optimizer=...), without restore: {optimizer: skip}"
                )
            found[name] = list(rates or [])
        return found

    def written_fields(self, plan: MembersPlan) -> dict[int, frozenset[str]]:
        """Id of an optimizer -> the fields of its groups that replayed schedules write."""
        found: dict[int, frozenset[str]] = {}
        for name, one in plan.replayed.items():
            optimizer = id(self.named[name].optimizer)
            found[optimizer] = found.get(optimizer, frozenset()) | one.fields
        return found

    def _choices(self, restore: Restore) -> dict[str, ScheduleChoice]:
        """The choice for each object; ``config`` and fields are for schedules only."""
        schedules = [name for name, member in self.named.items() if is_schedule(member)]
        if restore.schedule is not None and len(schedules) != 1:
            line = restore_line(schedules=dict.fromkeys(schedules, "config"))
            what = (
                f"{len(schedules)} of them: {', '.join(schedules)}" if schedules else f"{listed(self, none='nothing')}"
            )
            following = f"Next: {line}" if schedules else "Next: TrainerState(..., schedule=...)"
            raise StateMismatchError(
                f"restore: schedule is for one schedule, and this TrainerState has {what}. {following}"
            )
        found = {}
        for name, member in self.named.items():
            choice = ScheduleChoice()
            if name in schedules:
                choice = restore.schedules.get(name) or restore.schedule or choice
            if name in restore.stateful or (not restore.scaler and isinstance(member, torch.amp.GradScaler)):
                choice = ScheduleChoice("skip")
            found[name] = choice
        return found

    def _unknown_names(self, restore: Restore, states: Mapping[str, Any]) -> list[str]:
        known = {name for name, member in self.named.items() if is_schedule(member)}
        problems = []
        for field, names, allowed in (
            ("schedules", restore.schedules, {*known, *(states.keys() - self.named.keys())}),
            ("stateful", restore.stateful, {*self.named, *states}),
        ):
            for name in names:
                if name not in allowed:
                    close = near(name, allowed)
                    hint = f"near: {', '.join(close)}" if close else f"it has {listed(sorted(allowed), none='none')}"
                    problems.append(f"restore: {field}: {name} is not in this TrainerState; {hint}")
        return problems

    def _absent(self, choices: Mapping[str, ScheduleChoice], states: Mapping[str, Any], restore: Restore) -> list[str]:
        """Objects without state in the checkpoint, and states without an object."""
        missing = [
            name
            for name, choice in choices.items()
            if name not in states and choice.side != "skip" and (choice.side != "config" or choice.steps is None)
        ]
        left = {name for name, one in restore.schedules.items() if one.side == "skip"} | restore.stateful
        unknown = [name for name in states if name not in self.named and name not in left]
        problems = []
        if missing:
            skipped: dict[str, dict[str, str]] = {}
            for name in missing:
                skipped.setdefault("schedules" if is_schedule(self.named[name]) else "stateful", {})[name] = "skip"
            problems.append(
                f"no state of {', '.join(missing)} found in the checkpoint; it has {listed(states, none='no state')}. "
                f"Next, to begin without it: {restore_line(**skipped)}"
            )
        if unknown:
            named = ", ".join(f"{name}=..." for name in unknown)
            problems.append(
                f"the checkpoint has state of {', '.join(unknown)}, but this TrainerState has "
                f"{listed(self, none='no objects')}. Next: TrainerState(..., {named}), or "
                f"{restore_line(stateful=dict.fromkeys(unknown, 'skip'))}"
            )
        return problems

    def _parted(self, choices: Mapping[str, ScheduleChoice], states: Mapping[str, Any]) -> list[str]:
        """Schedules of one optimizer that do not all come from one side: each goes on from the rate of the other."""
        shared: dict[int, list[str]] = {}
        for name, member in self.named.items():
            if is_schedule(member):
                shared.setdefault(id(member.optimizer), []).append(name)
        problems = []
        for names in shared.values():
            is_one = len({id(self.named[name]) for name in names}) == 1
            chosen = {choices[name] for name in names}
            if len(chosen) == 1 and (is_one or chosen <= {ScheduleChoice(), ScheduleChoice("skip")}):
                continue
            counts = set()
            for name in names:
                with contextlib.suppress(StateMismatchError):
                    counts |= {recorded_steps(states[name])} if name in states else set()
            following = ""
            if len(counts) == 1 and not is_one:
                old = dict.fromkeys([name for name in names if name in states], "skip")
                line = restore_line(schedule={"steps": counts.pop()}, stateful=old)
                following = f". Next: TrainerState(..., schedule=ChainedScheduler([{', '.join(names)}])), and {line}"
            problems.append(
                f"{' and '.join(names)} set the rates of one optimizer together, so all of them are taken from the "
                f"checkpoint, or all are skipped{following}"
            )
        return problems

    def _other_count(self, name: str, choice: ScheduleChoice, state: Mapping[str, Any]) -> list[Difference]:
        """The number of steps that the config gives, if the checkpoint records another."""
        try:
            recorded = recorded_steps(state)
        except StateMismatchError:
            return []
        if choice.steps is None or choice.steps == recorded:
            return []
        value = dict.fromkeys(choice.fields, "config") or "config"
        line = self._line(name, value)
        return [Difference(f"{name}.steps", str(recorded), str(choice.steps), taken="config", line=line)]

    def _line(self, name: str, value: Any, **others: Any) -> str:
        """The line of a config with the choice ``value`` for an object."""
        if not is_schedule(self.named[name]):
            return restore_line(**others, stateful={name: value})
        is_only = sum(map(is_schedule, self.named.values())) == 1
        return restore_line(**others, **({"schedule": value} if is_only else {"schedules": {name: value}}))

    def _other_class(self, name: str, stored: Any) -> list[str]:
        member = self.named[name]
        now = class_of(member)
        if not isinstance(stored, str) or stored == now:
            return []
        line = self._line(name, "config" if is_schedule(member) else "skip")
        return [f"{name} is a {stored} in the checkpoint and a {now} now. Next: {line}"]

    def _other_groups(self, name: str, state: Mapping[str, Any]) -> list[str]:
        """A schedule, or a part of one, with rates for another number of groups than its optimizer has."""
        member = self.named[name]
        if not is_schedule(member):
            return []
        groups = len(member.optimizer.param_groups)
        for key, rates in settings(type(member), state).items():
            if key.split(".")[-1] == "base_lrs" and isinstance(rates, list | tuple) and len(rates) != groups:
                return [
                    f"{name} has rates of {counted(len(rates), 'group')} in the checkpoint, and its optimizer has "
                    f"{groups} now. Next: {self._line(name, 'config')}"
                ]
        return []

    def _replayed(
        self, name: str, choice: ScheduleChoice, state: Mapping[str, Any], stored_class: Any, restore: Restore
    ) -> Replayed:
        member, steps = self.named[name], choice.steps
        if choice.side == "skip":
            return replay(member, 0, name)
        if steps is None:
            try:
                steps = recorded_steps(state)
            except StateMismatchError as error:
                line = self._line(name, {**dict.fromkeys(choice.fields, "config"), "steps": 1000})
                raise StateMismatchError(
                    f"{name}: the number of steps in the checkpoint is unknown: {error}. "
                    f"Next, with the right number: {line}"
                ) from error
        if choice.side == "config":
            return replay(member, steps, name)
        problems = self._other_class(name, stored_class)
        if problems:
            raise StateMismatchError(problems[0], problems=problems)
        own_rates = restore.optimizer.get("lr", restore.optimizer.get("*")) == "config"
        whole = self._line(name, "config")
        return rebuild(member, state, choice.fields, steps, name, own_rates=own_rates, line=whole)

    def _undone(self, name: str, choice: ScheduleChoice, restore: Restore) -> list[str]:
        """A problem if a restored schedule would replace, at its next step, what the config keeps of the script."""
        member = self.named[name]
        if not is_schedule(member) or choice.side != "checkpoint":
            return []
        fields = {"lr", "initial_lr", "*"}
        if {"base_momentum", "max_momentum"} & {key for group in member.optimizer.param_groups for key in group}:
            fields |= {"betas", "momentum", "base_momentum", "max_momentum"}
        kept = [field for field, side in restore.optimizer.items() if side == "config" and field in fields]
        if not kept:
            return []
        line = self._line(name, "config", optimizer=dict(restore.optimizer))
        return [
            f"{', '.join(f'{field}: config' for field in kept)} would be undone at the next step of {name}, which is "
            f"restored with its old rates. Next: {line}"
        ]

    def _differences(self, name: str, state: Mapping[str, Any]) -> list[Difference]:
        """Settings of a schedule that differ from those of the script."""
        member = self.named[name]
        if not is_schedule(member):
            return []
        kind = type(member)
        stored, own = settings(kind, state), settings(kind, member.state_dict())
        line = self._line(name, "config")
        return [
            Difference(f"{name}.{key}", _text(stored[key]), _text(own[key]), line=line)
            for key in own
            if key in stored and not equal(stored[key], own[key])
        ]


def other_version(version: Any, reads: int) -> StateMismatchError:
    """The error for a state in another version than this release ``reads``; an upgrade helps with newer ones only."""
    if isinstance(version, int) and version < reads:
        following = "Next, for the weights alone: kind: previous_run"
    else:
        following = "Next: pip install --upgrade noether-init-core"
    return StateMismatchError(f"trainer_state has version {version!r}; this release reads version {reads}. {following}")


def class_of(member: Any) -> str:
    """The class of an object, as recorded beside its state."""
    return f"{type(member).__module__}.{type(member).__qualname__}"


def _text(value: Any) -> str:
    return one_line(str(dict(value) if isinstance(value, Mapping) else value), 60)


def _check_member(name: str, member: Any) -> None:
    if name in _RESERVED:
        raise ConfigError(f"{name!r} is a reserved name; reserved are {', '.join(sorted(_RESERVED))}")
    if isinstance(member, type) or not all(
        callable(getattr(member, method, None)) for method in ("state_dict", "load_state_dict")
    ):
        raise ConfigError(
            f"{name} is {type_of(member)} and lacks state_dict() or load_state_dict(); "
            "TrainerState accepts only objects with both"
        )
