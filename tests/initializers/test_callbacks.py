"""Callback states: by key, by position for older files, and never twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from noether_init_core.errors import StateMismatchError
from noether_init_core.initializers.callbacks import apply_callbacks, plan_callbacks


class Counter:
    """A stateful callback."""

    def __init__(self, count: int = 0, key: str | None = None) -> None:
        self.count = count
        self.loads = 0
        if key is not None:
            self.checkpoint_key = key

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "seen": torch.tensor([self.count])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        self.loads += 1


class Stateless:
    """A callback without state, as most of Noether's."""

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state_dict: Any) -> None:
        raise AssertionError("a callback without state was handed one")


def test_states_are_matched_by_key_whatever_the_order() -> None:
    """Two callbacks of one class with keys of their own get their own states."""
    first, second = Counter(key="a"), Counter(key="b")
    saved = {"b": Counter(2).state_dict(), "a": Counter(1).state_dict()}
    apply_callbacks(plan_callbacks(saved, [second, Stateless(), first], where="x"))
    assert (first.count, second.count) == (1, 2)


def test_the_class_name_is_the_key_where_there_is_none() -> None:
    """A callback without ``checkpoint_key`` is found by its class."""
    callback = Counter()
    apply_callbacks(plan_callbacks({"Counter": Counter(4).state_dict()}, [callback], where="x"))
    assert callback.count == 4


def test_two_callbacks_for_one_state_are_refused() -> None:
    """One state cannot be meant for both."""
    with pytest.raises(StateMismatchError, match="2 callbacks have that key"):
        plan_callbacks({"Counter": Counter(4).state_dict()}, [Counter(), Counter()], where="x")


def test_what_finds_no_counterpart_is_told_and_left() -> None:
    """A new callback keeps its state, an old state is skipped; both are warnings."""
    callback = Counter(key="new")
    plan = plan_callbacks({"old": Counter(4).state_dict()}, [callback], where="the trainer file")
    assert plan.states == ()
    assert plan.warnings == (
        "the trainer file has no state for callback new; it has old",
        "the trainer file has states of callbacks that this run has not: old",
    )


def test_an_equal_state_is_not_loaded_again() -> None:
    """A trainer may have restored its callbacks; loading is not repeated."""
    callback = Counter(4)
    apply_callbacks(plan_callbacks({"Counter": Counter(4).state_dict()}, [callback], where="x"))
    assert callback.loads == 0


def test_positional_states_of_older_files() -> None:
    """A list is matched by position, and refused where number or fields do not fit."""
    callback = Counter()
    apply_callbacks(plan_callbacks([None, Counter(3).state_dict()], [Stateless(), callback], where="x"))
    assert callback.count == 3
    with pytest.raises(StateMismatchError, match="2 callbacks by position, this run has 1"):
        plan_callbacks([None, None], [callback], where="x")
    with pytest.raises(StateMismatchError, match="order of the callbacks has changed"):
        plan_callbacks([Counter(3).state_dict(), None], [Stateless(), callback], where="x")
