"""Optimizers with hooks or methods of their own: what they refuse is found before the weights are written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.advice import executes

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PartlyInitializedError,
    PathProvider,
    StateMismatchError,
    TrainerState,
    TrainingIteration,
    bind,
)


class Armed(torch.optim.AdamW):
    """Refuses in one of its methods, or in a hook, once ``how`` says so."""

    how = ""
    calls = 0

    def __init__(self, parameters: Any, how: str = "") -> None:
        super().__init__(parameters, lr=0.1)
        self.how = how
        if how == "hook before":
            self.register_load_state_dict_pre_hook(self.refuse)
        if how == "hook after":
            self.register_load_state_dict_post_hook(self.refuse)

    @staticmethod
    def refuse(*_arguments: Any) -> None:
        raise ValueError("it refuses")

    def load_state_dict(self, state: Any) -> None:
        if self.how == "half":
            for values in self.state.values():
                values["exp_avg"].zero_()
            self.param_groups[0]["lr"] = 7.0
            self.refuse()
        super().load_state_dict(state)
        if self.how == "doubles":
            for values in self.state.values():
                values["exp_avg"].mul_(2)
        if self.how == "second time":
            type(self).calls += 1
            for values in self.state.values():
                values["exp_avg"].zero_()
            if type(self).calls > 1:
                self.refuse()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if self.how == "setstate":
            self.refuse()


def trained(make: Callable[[Any], Any], seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(2, 2)
    optimizer = make(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def resumed(tmp_path: Path, how: str) -> tuple[Any, Any, Callable[[], Any], Any]:
    source, source_optimizer = trained(Armed, 1)
    trainer = TrainerState(seed=0)
    trainer.advance(4)
    paths = PathProvider(tmp_path, run_id="a")
    CheckpointWriter(paths).save(bind(source, "net", optimizer=source_optimizer), trainer=trainer)
    model, optimizer = trained(lambda parameters: Armed(parameters, how), 2)
    stack = InitializerStack.from_config([{"kind": "resume", "run_id": "a"}], path_provider=paths)
    view = bind(model, "net", optimizer=optimizer)
    return model, optimizer, lambda: stack.initialize(view, trainer=TrainerState(seed=0)), source_optimizer


def values(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("how", ["hook before", "hook after", "half", "setstate"])
def test_an_optimizer_that_refuses_its_state_is_found_before_a_change(how: str, tmp_path: Path) -> None:
    """Model and optimizer are as they were."""
    model, optimizer, initialize, _source = resumed(tmp_path, how)
    weight, before = model.weight.detach().clone(), values(optimizer)
    with pytest.raises(StateMismatchError, match="optimizer Armed fails: ValueError: it refuses"):
        initialize()
    assert torch.equal(model.weight, weight)
    assert str(values(optimizer)) == str(before)


def test_code_of_an_optimizer_runs_once_on_its_state(tmp_path: Path) -> None:
    """The trial on a copy leaves no trace in what is loaded."""
    _model, optimizer, initialize, source = resumed(tmp_path, "doubles")
    initialize()
    for own, other in zip(optimizer.state.values(), source.state.values(), strict=True):
        assert torch.equal(own["exp_avg"], other["exp_avg"] * 2)
        assert torch.equal(own["exp_avg_sq"], other["exp_avg_sq"])


def test_an_optimizer_that_fails_later_gets_its_values_back(tmp_path: Path) -> None:
    """Also those that its code changed in place, and its settings."""
    Armed.calls = 0
    _model, optimizer, initialize, _source = resumed(tmp_path, "second time")
    before = values(optimizer)
    with pytest.raises(PartlyInitializedError, match="it refuses"):
        initialize()
    assert str(values(optimizer)) == str(before)


class Live:
    """Its state dict is its own dict, and its load counts."""

    def __init__(self) -> None:
        self.state: dict[str, int] = {"count": 0}

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state.update(state)
        self.state["count"] += 1


class Refuses:
    def __init__(self, *, refuses: bool) -> None:
        self.refuses = refuses

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.refuses:
            self.refuses = False
            raise ValueError("not now")


def test_an_object_that_is_not_as_before_is_named(tmp_path: Path) -> None:
    """One that takes its former state and changes it is not restored; no weights were written."""
    paths = PathProvider(tmp_path, run_id="a")
    trainer = TrainerState(seed=0, live=Live(), other=Refuses(refuses=False))
    trainer.advance(4)
    CheckpointWriter(paths).save(bind(torch.nn.Linear(2, 2), "net"), trainer=trainer)
    stack = InitializerStack.from_config([{"kind": "resume", "run_id": "a", "load_optim": False}], path_provider=paths)
    with pytest.raises(PartlyInitializedError) as caught:
        stack.initialize(
            bind(torch.nn.Linear(2, 2), "net"), trainer=TrainerState(seed=0, live=Live(), other=Refuses(refuses=True))
        )
    assert "Live could not be restored" in str(caught.value)
    assert "No initializer has written weights." in str(caught.value)


class Overriding(torch.optim.AdamW):
    """Loads through a method of its own."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)


@pytest.mark.parametrize("how", ["no code", "hook", "method", "hook that changes"])
def test_moments_keep_their_dtype_beside_narrow_weights(tmp_path: Path, how: str) -> None:
    """torch casts state to the dtype of the parameter in load_state_dict, which hooks and methods go through."""
    kind = Overriding if how == "method" else torch.optim.AdamW
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = kind(module.parameters(), lr=0.1)
    moment = torch.randn(2, 3)
    for parameter in module.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": moment if parameter.ndim == 2 else torch.randn(2),
            "exp_avg_sq": torch.rand_like(parameter, dtype=torch.float32),
        }
    paths = PathProvider(tmp_path, run_id="a")
    CheckpointWriter(paths).save(bind(module, "net", optimizer), TrainingIteration(1, 3, 3))
    again = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    taking = kind(again.parameters(), lr=0.1)
    if how == "hook":
        taking.register_load_state_dict_post_hook(lambda _: None)
    if how == "hook that changes":
        taking.register_load_state_dict_post_hook(lambda one: one.state[again.weight]["exp_avg"].zero_())
    InitializerStack.from_config([{"kind": "resume"}], path_provider=paths).initialize(bind(again, "net", taking))
    held = taking.state[again.weight]["exp_avg"]
    if how == "hook that changes":
        assert not held.any()
    else:
        assert torch.equal(held, moment)
        assert held.dtype == torch.float32
    assert taking.state[again.bias]["exp_avg_sq"].dtype == torch.float32


def lbfgs(order: str) -> tuple[Any, Any]:
    """Two layers, built in an order, and an optimizer that made steps."""
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in order})
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module["b"](module["a"](torch.ones(1, 2))).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return module, optimizer


@executes("surgery/optimizer_plan.py", "Next: build the optimizer over the parameters in that order, or {}")
def test_state_of_all_parameters_as_one_vector_needs_their_order(tmp_path: Path) -> None:
    """LBFGS keeps it under the first parameter; reordered modules would read it wrongly, or not at all."""
    module, optimizer = lbfgs("ab")
    paths = PathProvider(tmp_path, run_id="a")
    CheckpointWriter(paths).save(bind(module, "net", optimizer), TrainingIteration(1, 3, 3))
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    again, other = lbfgs("ba")
    with pytest.raises(StateMismatchError, match=r"a.weight, a.bias, b.weight, b.bias\), and the parameters now are b"):
        stack.initialize(bind(again, "net", other))
    ordered = torch.optim.LBFGS([*again["a"].parameters(), *again["b"].parameters()], lr=0.1, max_iter=3)
    stack.initialize(bind(again, "net", ordered))
    assert torch.equal(
        ordered.state[again["a"].weight]["prev_flat_grad"], optimizer.state[module["a"].weight]["prev_flat_grad"]
    )
