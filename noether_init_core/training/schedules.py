"""Learning rate schedules: the number of steps in a stored state, and where another schedule is after that number.

A schedule is replayed: ``step()`` is called as often as in the saved run, in groups that no checkpoint has changed.
Only that gives the bits of a run that had the schedule from its start. A constructor with ``last_epoch``, closed forms
and changed attributes give other values.
"""

from __future__ import annotations

import collections
import copy
import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from noether_init_core.errors import StateMismatchError
from noether_init_core.messages import counted, listed, logger_of, one_line
from noether_init_core.nested import equal

_logger = logger_of(__name__)
#: Fields that the constructors of torch's schedules write into groups, whether or not a step changes them.
_CONSTRUCTED = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"})
#: Values in the state of torch's schedules that steps change.
_POSITIONS = frozenset(
    {
        "T_cur",
        "T_i",
        "_get_lr_called_within_step",
        "_is_initial",
        "_last_lr",
        "_step_count",
        "best",
        "cooldown_counter",
        "last_epoch",
        "num_bad_epochs",
        "verbose",
    }
)
#: A replay of more steps takes seconds, so it is logged.
_MANY_STEPS = 100_000


@attrs.frozen(eq=False)
class Replayed:
    """A schedule after a number of steps.

    Attributes:
        state: The result of its ``state_dict()``.
        groups: For each group of the optimizer, the fields that the schedule writes, with their values.
    """

    state: Mapping[str, Any]
    groups: tuple[Mapping[str, Any], ...]

    @property
    def fields(self) -> frozenset[str]:
        """The names of all fields that the schedule writes."""
        return frozenset(field for group in self.groups for field in group)


def is_schedule(member: Any) -> bool:
    """Whether an object is a learning rate schedule of torch, or derived from one."""
    return isinstance(member, torch.optim.lr_scheduler.LRScheduler)


def put_fields(group: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Write fields into a group of an optimizer; a tensor that is there keeps its identity, as torch's own code does.

    A captured graph or a compiled step reads the learning rate from that tensor.
    """
    for field, value in fields.items():
        held = group.get(field)
        if isinstance(held, torch.Tensor):
            held.fill_(value) if not isinstance(value, torch.Tensor) else held.copy_(value)
        else:
            group[field] = value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def recorded_steps(state: Mapping[str, Any]) -> int:
    """Return how often ``step()`` was called on the schedule with this state. Pure.

    Raises ``StateMismatchError``, with the reason, if the state does not tell it, or if the steps had arguments.
    """
    last, parts = state.get("last_epoch"), state.get("_schedulers")
    if isinstance(parts, Sequence) and parts and all(isinstance(part, Mapping) for part in parts):
        if "_milestones" in state:
            for part in parts:
                _refuse_fractions(part)
            return _whole(last, state)
        counts = {recorded_steps(part) for part in parts}
        if len(counts) > 1:
            raise StateMismatchError(f"its parts made different numbers of steps: {listed(sorted(counts))}")
        return counts.pop()
    if "num_bad_epochs" in state:
        raise StateMismatchError("its steps take a metric, and the values of that metric are not stored")
    if "T_cur" in state:
        _refuse_fractions(state)
        return _whole(last, state)
    steps = state.get("_step_count")
    if isinstance(steps, int) and steps > 0 and _whole(last, state) != steps - 1:
        raise StateMismatchError(
            f"it made {counted(steps - 1, 'step')} and is at {last}: it was stepped with an argument, or built with "
            "last_epoch"
        )
    if not isinstance(steps, int) or steps < 1:
        raise StateMismatchError("its state does not record the number of its steps")
    return steps - 1


def _refuse_fractions(state: Mapping[str, Any]) -> None:
    position = state.get("T_cur", 0)
    if int(position) != position:
        raise StateMismatchError(f"it was stepped with fractions (T_cur is {position}), which are not stored")


def _whole(last: Any, state: Mapping[str, Any]) -> int:
    if not isinstance(last, int) or last < 0:
        raise StateMismatchError(f"its state does not record the number of its steps; last_epoch is {last!r}")
    return last


def refusal(schedule: Any) -> str:
    """Why a schedule cannot be replayed, in words; empty if it can. Pure."""
    for part in getattr(schedule, "_schedulers", ()):
        found = refusal(part)
        if found:
            return found
    parameters = list(inspect.signature(schedule.step).parameters.values())
    needed = [
        one.name
        for one in parameters
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    if needed:
        return f"step() of {type(schedule).__name__} takes {', '.join(needed)}, whose values were not stored"
    return ""


def replay(schedule: Any, steps: int, name: str) -> Replayed:
    """Return where a schedule is after ``steps`` calls of ``step()``. The schedule and its optimizer are unchanged.

    Args:
        schedule: Has made no step.
        steps: How many calls to make; a call takes 5 to 100 microseconds.
        name: Its name, for messages.

    Raises ``StateMismatchError`` if it was stepped before, cannot be replayed, or raises at a step.
    """
    reason = refusal(schedule)
    if reason:
        raise StateMismatchError(f"{name} cannot be replayed: {reason}")
    made = _made(schedule)
    if made:
        raise StateMismatchError(
            f"{name} is at step {made} before the start, so it cannot be replayed. "
            "Next: build it without last_epoch, and initialize before its first step"
        )
    groups = schedule.optimizer.param_groups
    if steps > _MANY_STEPS:
        _logger.info("%s: %d steps are replayed", name, steps)
    with _undone(schedule):
        before = [_copied(group) for group in groups]
        _step(schedule, steps, name)
        return Replayed(copy.deepcopy(schedule.state_dict()), _written(before, groups))


def _made(schedule: Any) -> int:
    """Where a schedule of the script is: 0 at its beginning, or where it does not tell.

    A step with an argument, or ``last_epoch`` in the constructor, moves it without a count.
    """
    last = getattr(schedule, "last_epoch", 0)
    if isinstance(last, int | float) and last > 0:
        return int(last) or 1
    try:
        return recorded_steps(schedule.state_dict())
    except StateMismatchError:
        return 0


def _step(schedule: Any, steps: int, name: str) -> None:
    with warnings.catch_warnings():
        # torch asks for optimizer.step() first, which a replay does not call
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step|Seems like `optimizer.step")
        for number in range(1, steps + 1):
            try:
                schedule.step()
            except Exception as error:
                raise StateMismatchError(
                    f"{name}: {type(schedule).__name__} fails at step {number} of the {steps} steps of the saved run: "
                    f"{type(error).__name__}: {one_line(str(error))}"
                ) from error


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)
        for key, value in group.items()
        if key != "params"
    }


def _written(before: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The fields of each group that a schedule has written: those that changed, and those that constructors write."""
    found = []
    for old, group in zip(before, groups, strict=True):
        now = _copied(group)
        names = {key for key, value in now.items() if key in _CONSTRUCTED or not equal(value, old.get(key))}
        if names & {"base_momentum", "max_momentum"}:
            names |= {"betas", "momentum"} & now.keys()
        found.append({key: value for key, value in now.items() if key in names})
    return tuple(found)


@contextmanager
def _undone(schedule: Any) -> Iterator[None]:
    """Put the schedule and the groups of its optimizer back after the block."""
    groups = schedule.optimizer.param_groups
    state, fields = copy.deepcopy(schedule.state_dict()), [_copied(group) for group in groups]
    try:
        yield
    finally:
        schedule.load_state_dict(state)
        for group, kept in zip(groups, fields, strict=True):
            for key in group.keys() - kept.keys() - {"params"}:
                del group[key]
            put_fields(group, kept)


def rebuild(
    schedule: Any,
    stored: Mapping[str, Any],
    fields: Collection[str],
    steps: int,
    name: str,
    *,
    own_rates: bool = False,
    line: str = "",
) -> Replayed:
    """Return where a schedule is that has some fields of ``schedule``, and all others of a stored state. Pure.

    It is built anew and replayed, because a changed attribute of a schedule that has made steps gives other values. To
    prove that its class can be built from a stored state, the stored schedule is built first and must come out equal.

    Args:
        schedule: The schedule of the script; it has made no step, and is not changed.
        stored: The stored state.
        fields: Arguments of its class to take from ``schedule``, such as ``T_max``.
        steps: How many steps the stored schedule has made.
        name: Its name, for messages.
        own_rates: Whether the learning rates at the start are those of ``schedule``, not those of ``stored``.
        line: The line of a config that takes the whole schedule of the script.

    Raises ``StateMismatchError``, with the reason, if that is not possible.
    """
    reason = refusal(schedule)
    arguments = _arguments(type(schedule))
    unknown = [field for field in fields if field not in arguments]
    if unknown:
        raise StateMismatchError(
            f"{name}: {', '.join(unknown)} not found among the arguments of {type(schedule).__name__}: "
            f"{', '.join(arguments) or 'none'}"
        )
    own = vars(schedule)
    lacking = [key for key in arguments if key not in stored or key not in own]
    if not reason and lacking:
        reason = f"its state does not hold {', '.join(lacking)}"
    if not reason:
        values = {key: _argument(key, stored[key]) for key in arguments}
        proof = _built(schedule, values, _rates(stored, schedule, name), steps, name)
        if not equal(_comparable(proof.state), _comparable(stored)):
            reason = "built from the stored settings, it does not come out as it was stored"
    if reason:
        raise StateMismatchError(
            f"{name}: {', '.join(fields)} alone cannot be taken from the config: {reason}. Next: {line}"
        )
    values |= {field: _argument(field, own[field]) for field in fields}
    return _built(schedule, values, _rates(own if own_rates else stored, schedule, name), steps, name)


def _arguments(kind: type) -> list[str]:
    """The arguments of a schedule's class that are settings."""
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    return [one.name for one in parameters if one.name not in ("last_epoch", "verbose")]


def _argument(key: str, value: Any) -> Any:
    # MultiStepLR counts its milestones
    return sorted(value.elements()) if isinstance(value, collections.Counter) else copy.deepcopy(value)


def _rates(state: Mapping[str, Any], schedule: Any, name: str) -> list[Any]:
    rates, groups = state.get("base_lrs"), schedule.optimizer.param_groups
    if not isinstance(rates, list) or len(rates) != len(groups):
        found = "none" if not isinstance(rates, list) else len(rates)
        raise StateMismatchError(f"{name}: base_lrs of {len(groups)} groups are needed; found: {found}")
    return rates


def _comparable(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, collections.Counter) else value for key, value in state.items()}


def _built(schedule: Any, values: Mapping[str, Any], rates: Sequence[Any], steps: int, name: str) -> Replayed:
    """Build a schedule over groups of its own and replay it."""
    groups = []
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        fields = {key: value for key, value in _copied(group).items() if key not in _CONSTRUCTED}
        rate = rate.detach().clone() if isinstance(rate, torch.Tensor) else rate
        groups.append({**fields, "params": [torch.zeros(1, device="cpu")], "lr": rate})
    optimizer = torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.0)
    for held, group in zip(optimizer.param_groups, groups, strict=True):
        held.clear()
        held.update(group)
    before = [_copied(group) for group in groups]
    try:
        built = type(schedule)(optimizer, **values)
    except Exception as error:
        raise StateMismatchError(
            f"{name}: {type(schedule).__name__} cannot be built: {type(error).__name__}: {one_line(str(error))}"
        ) from error
    _step(built, steps, name)
    return Replayed(copy.deepcopy(built.state_dict()), _written(before, optimizer.param_groups))


def settings(kind: type, state: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The settings in the state of a schedule of this class: what no step changes. Keys of parts have a path. Pure."""
    is_known = kind.__module__.startswith("torch.")
    chosen = {key for key in state if key not in _POSITIONS} if is_known else {*_arguments(kind), "base_lrs"}
    found = {f"{place}{key}": value for key, value in state.items() if key in chosen and key != "_schedulers"}
    for number, part in enumerate(state.get("_schedulers", ())):
        if isinstance(part, Mapping):
            found |= settings(torch.optim.lr_scheduler.LRScheduler, part, f"{place}{number}.")
    return found
