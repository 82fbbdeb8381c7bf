"""Callback states: by key, by position for older files, and never twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind
from noether_init_core.errors import StateMismatchError
from noether_init_core.initializers.callbacks import StatesBefore, apply_callbacks, plan_callbacks


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


class Stubborn:
    """Fails in the middle of taking its state, if told to."""

    def __init__(self, number: int, *, fails: bool = False) -> None:
        self.first = self.second = number
        self.fails = fails

    def state_dict(self) -> dict[str, int]:
        return {"first": self.first, "second": self.second}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["first"]
        if self.fails:
            self.fails = False
            raise ValueError("not today")
        self.second = state["second"]


def test_a_hook_called_alone_puts_back_what_it_changed_before_it_failed(tmp_path: Path) -> None:
    """Trainer and callbacks are as they were, though no stack looks after them."""
    paths = PathProvider(tmp_path, "run")
    model = bind(torch.nn.Linear(2, 2), name="net")
    of_callbacks: dict[str, Any] = {"Stubborn": {"first": 5, "second": 5}}
    state: dict[str, Any] = {**Stubborn(7).state_dict(), "callback_state_dicts": of_callbacks}
    saving = Stubborn(7)
    saving.state_dict = lambda: state  # type: ignore[method-assign]
    CheckpointWriter(paths).save(model, TrainingIteration(1, 1, 1), trainer=saving)
    (initializer,) = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths).initializers
    trainer, callback = Stubborn(1, fails=True), Stubborn(2, fails=True)
    with pytest.raises(ValueError, match="not today"):
        initializer.init_trainer(trainer)
    assert (trainer.first, trainer.second) == (1, 1)
    with pytest.raises(ValueError, match="not today"):
        initializer.init_callbacks([callback], model)
    assert (callback.first, callback.second) == (2, 2)


class Forgetful:
    """Takes a part of its state back, and no more of it; keeps values of many types."""

    def __init__(self, number: int, *, forgets: bool) -> None:
        self.values: dict[str, Any] = {
            "first": number,
            "array": numpy.full(3, float(number)),
            "tensor": torch.full((3,), float(number)),
            "note": object(),
        }
        self.forgets = forgets

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        first = state.pop("first")
        self.values = {**copy.deepcopy(state), "first": self.values["first"] if self.forgets else first}


@pytest.mark.parametrize("forgets", [True, False])
def test_a_state_that_is_put_back_in_part_only_is_named(*, forgets: bool) -> None:
    """``load_state_dict`` raises nothing, so the state is compared; the entries that differ are named."""
    trainer, callback = Forgetful(1, forgets=forgets), Forgetful(2, forgets=False)
    before = StatesBefore.taken(trainer, [callback])
    trainer.values = Forgetful(5, forgets=False).values
    callback.values = Forgetful(6, forgets=False).values
    expected = ["The state of Forgetful was put back, but is not what it was: first."] if forgets else []
    assert before.put_back() == expected
    assert callback.values["first"] == 2
    assert trainer.values["array"].tolist() == [1.0, 1.0, 1.0]
