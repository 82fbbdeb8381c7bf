"""Non-persistent buffers of a meta model get their values from code of the model, with ``on_missing: reset``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import InitializerStack, PlanError, bind


class Rotary(torch.nn.Module):
    """Frequencies that no file holds, and an integer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)
        self.register_buffer("steps", torch.arange(3), persistent=False)

    @staticmethod
    def frequencies() -> torch.Tensor:
        return 1.0 / 100.0 ** (torch.arange(3) / 3)


class Resets(Rotary):
    """Fills one buffer in place, and makes the other one anew."""

    def reset_parameters(self) -> None:
        self.inv_freq.copy_(self.frequencies())
        self.register_buffer("steps", torch.arange(3), persistent=False)


class HalfReset(Rotary):
    """Forgets the integer."""

    def reset_parameters(self) -> None:
        self.inv_freq.copy_(self.frequencies())


class Model(torch.nn.Module):
    """One linear layer beside the frequencies."""

    def __init__(self, rotary: type[Rotary]) -> None:
        super().__init__()
        self.linear, self.inner = torch.nn.Linear(2, 2), torch.nn.Sequential(rotary())


class InitsWeights(Model):
    """As in transformers: the model knows how to fill each of its modules."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        fill(module)


def fill(module: torch.nn.Module) -> None:
    assert isinstance(module, Rotary)
    module.inv_freq = module.frequencies()
    module.get_buffer("steps").copy_(torch.arange(3))


def stack_for(tmp_path: Path, **config: Any) -> tuple[InitializerStack, Model]:
    source = Model(Rotary)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    return InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "weights.pt"), **config}]), source


@pytest.mark.parametrize("how", ["reset_parameters", "_init_weights", "a callable"])
@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_code_of_the_model_fills_them(how: str, default: str, tmp_path: Path) -> None:
    """In place or by a new buffer; the weights are those of the file, whatever the default device is."""
    stack, source = stack_for(tmp_path, on_missing="reset")
    with torch.device("meta"):
        model = InitsWeights(Rotary) if how == "_init_weights" else Model(Resets if how[0] == "r" else Rotary)
    bound = bind(model, "net", reset=fill if how == "a callable" else None)
    with torch.device(default):
        plan = stack.plan(bound)
        assert plan.is_fine, plan.problems
        assert all(buffer.is_meta for buffer in model.buffers())
        stack.initialize(bound)
    for (name, value), (_name, wanted) in zip(model.named_buffers(), source.named_buffers(), strict=True):
        assert value.device.type == "cpu"
        assert torch.equal(value, wanted), name
    assert torch.equal(model.linear.weight, source.linear.weight)


def refused(tmp_path: Path, rotary: type[Rotary], words: str, reset: Any = None, **config: Any) -> None:
    stack, _source = stack_for(tmp_path, **config)
    with torch.device("meta"):
        model = Model(rotary)
    bound = bind(model, "net", reset=reset)
    assert [words in one.message for one in stack.plan(bound).problems] == [True]
    with pytest.raises(PlanError, match="Nothing was changed"):
        stack.initialize(bound)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_without_code_or_policy_the_plan_names_the_way(tmp_path: Path) -> None:
    """A buffer that the code leaves empty, and code that fails, are known beforehand as well."""
    way = "Next: on_missing: reset, with reset_parameters in their modules, _init_weights in the model, or bind(module"
    refused(tmp_path, Resets, way)
    refused(tmp_path, Rotary, way, on_missing="reset")
    refused(tmp_path, HalfReset, "inner.0.steps would get no values from reset_parameters", on_missing="reset")

    def fails(_module: torch.nn.Module) -> None:
        raise ValueError("no such module")

    refused(tmp_path, Rotary, "cannot be filled: ValueError: no such module", fails, on_missing="reset")
