"""States of callbacks: matched to callbacks by a pure function, handed over by one other."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from noether_init_core import nested
from noether_init_core.errors import StateMismatchError, type_of

__all__ = ["CallbackPlan", "apply_callbacks", "callback_key", "plan_callbacks"]


@attrs.frozen(eq=False)
class CallbackPlan:
    """Which callback gets which stored state, and what a person should know."""

    states: tuple[tuple[Any, dict[str, Any]], ...]
    warnings: tuple[str, ...] = ()


def callback_key(callback: Any) -> str:
    """``checkpoint_key`` where the callback has one, else the name of its class."""
    key = getattr(callback, "checkpoint_key", None)
    return str(key) if key is not None else type(callback).__name__


def plan_callbacks(saved: Any, callbacks: Sequence[Any], *, where: str) -> CallbackPlan:
    """Match stored states to callbacks: by key, or by position for the list of older files. Pure.

    A state without a callback and a stateful callback without a state are warnings, as in Noether. Raises
    ``StateMismatchError`` where two callbacks of one key would both take a state, and where a positional list does
    not fit the callbacks.
    """
    if isinstance(saved, Mapping):
        return _by_key(saved, callbacks, where)
    if isinstance(saved, list | tuple):
        return _by_position(saved, callbacks, where)
    raise StateMismatchError(f"{where}: callback_state_dicts is {type_of(saved)}, not a mapping or a list")


def _by_key(saved: Mapping[str, Any], callbacks: Sequence[Any], where: str) -> CallbackPlan:
    stateful = [callback for callback in callbacks if _is_stateful(callback)]
    counts = Counter(callback_key(callback) for callback in callbacks)
    states: list[tuple[Any, dict[str, Any]]] = []
    warnings: list[str] = []
    for callback in stateful:
        key = callback_key(callback)
        if saved.get(key) is None:
            if key not in saved and _own_state(callback):
                warnings.append(f"{where} has no state for callback {key}; it has {', '.join(saved) or 'none'}")
            continue
        if counts[key] > 1:
            raise StateMismatchError(
                f"{where} has one state for callback {key}, but {counts[key]} callbacks have that key. "
                "Give each its own checkpoint_key"
            )
        states.append((callback, saved[key]))
    unused = [key for key in saved if key not in counts]
    if unused:
        warnings.append(f"{where} has states of callbacks that this run has not: {', '.join(unused)}")
    return CallbackPlan(tuple(states), tuple(warnings))


def _by_position(saved: Sequence[Any], callbacks: Sequence[Any], where: str) -> CallbackPlan:
    if len(saved) != len(callbacks):
        raise StateMismatchError(
            f"{where} has the states of {len(saved)} callbacks by position, this run has {len(callbacks)} callbacks: "
            f"{', '.join(callback_key(callback) for callback in callbacks) or 'none'}"
        )
    states = []
    for number, (callback, state) in enumerate(zip(callbacks, saved, strict=True)):
        own = _own_state(callback)
        if set(own or {}) != set(state or {}):
            raise StateMismatchError(
                f"{where}: state {number} has {_fields(state)}, callback {number} ({callback_key(callback)}) has "
                f"{_fields(own)}; the order of the callbacks has changed since the file was written"
            )
        if state:
            states.append((callback, state))
    return CallbackPlan(tuple(states))


def apply_callbacks(plan: CallbackPlan) -> None:
    """Hand each callback its state, unless it has that state already (a trainer may have loaded it)."""
    for callback, state in plan.states:
        if not nested.equal(_own_state(callback), state):
            callback.load_state_dict(copy.deepcopy(state))


def _is_stateful(callback: Any) -> bool:
    return callable(getattr(callback, "load_state_dict", None))


def _own_state(callback: Any) -> dict[str, Any] | None:
    take = getattr(callback, "state_dict", None)
    state = take() if callable(take) else None
    return state if state else None


def _fields(state: Any) -> str:
    return ", ".join(sorted(map(str, state))) if state else "nothing"
