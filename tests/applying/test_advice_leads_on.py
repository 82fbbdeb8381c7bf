"""What a message about a model that cannot be loaded into advises is done here, and it loads then."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.advice import digests, executes, saw
from support.following import advised, refusal
from torch import nn

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind
from noether_init_core.applying.places import ReadOnlyMemory, unwritable


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """Loads a file with ones into a layer, as a config with further fields says."""
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "w.pt")
    before = digests(tmp_path)

    def call(module: nn.Module, **fields: Any) -> None:
        config = {"kind": "file", "path": str(tmp_path / "w.pt"), **fields}
        InitializerStack.from_config([config]).initialize(bind(module, "net"))
        assert all(bool((value == 1).all()) for value in module.state_dict().values())
        assert digests(tmp_path) == before

    return call


@executes("applying/targets.py", "pass one batch through the model")
def test_a_lazy_module_gets_its_shapes(start: Callable[..., Any]) -> None:
    """By a batch."""
    module = nn.LazyLinear(2)
    assert advised(lambda: start(module)) == "pass one batch through the model"
    module(torch.ones(1, 3))
    start(module)


@executes("applying/targets.py", "initialize the module without the hook or override that adds it")
def test_an_entry_that_a_hook_adds_is_left_out(start: Callable[..., Any]) -> None:
    """The hook is put back afterwards."""
    module = nn.Linear(3, 2)

    def add(_module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        state[f"{prefix}more"] = torch.ones(1)

    hook = module.register_state_dict_post_hook(add)
    assert "without the hook or override" in advised(lambda: start(module))
    hook.remove()
    start(module)


@executes("applying/places.py", "replace it by a clone()")
def test_memory_that_is_read_only_is_replaced(tmp_path: Path, start: Callable[..., Any]) -> None:
    """That of a file which is mapped without being writable."""
    with open(tmp_path / "w.pt", "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    module = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="not writable"):
        module.bias.data = torch.frombuffer(memory, dtype=torch.float32, count=2)
    saw(unwritable(module.bias, ReadOnlyMemory()))
    said = advised(lambda: start(module))
    assert said.startswith("replace it by a clone()")
    module.bias.data = module.bias.data.clone()
    start(module)


@executes("applying/places.py", "load outside of vmap and grad")
def test_a_transformed_tensor_is_loaded_before(start: Callable[..., Any]) -> None:
    """Inside torch.func it cannot be written."""
    module = nn.Linear(3, 2)
    told: list[str] = []

    def inside(values: torch.Tensor) -> torch.Tensor:
        changed = nn.Linear(3, 2, bias=False)
        del changed.bias
        changed.register_buffer("bias", values)
        saw(unwritable(values, ReadOnlyMemory()))
        told.append(refusal(lambda: start(changed)))
        return values.sum()

    torch.func.grad(inside)(torch.zeros(2))
    assert "Next: load outside of vmap and grad" in told[0]
    start(module)


@executes("applying/weights.py", "Next: module.to_empty(device='cpu')")
def test_a_model_on_the_meta_device_gets_memory(start: Callable[..., Any]) -> None:
    """For an entry that is not in the file."""
    with torch.device("meta"):
        module = nn.Linear(3, 2)
        module.register_buffer("extra", torch.ones(1))
    said = refusal(lambda: start(module, on_missing="keep"))
    call = re.search(r"module\.to_empty\(device='cpu'\)", said)
    assert call is not None
    eval(call[0], {"module": module})
    module.get_buffer("extra").fill_(1)
    start(module, on_missing="keep")


def trained(kind: Any = torch.optim.AdamW, **arguments: Any) -> Any:
    module = nn.Linear(3, 2)
    optimizer = kind(module.parameters(), lr=0.1, **arguments)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return bind(module, "net", optimizer)


@executes("applying/optimizer_state.py", "build the optimizer from model.parameters()")
def test_an_optimizer_that_is_outdated_is_built_again(tmp_path: Path) -> None:
    """A parameter was replaced after the model was bound."""
    paths = PathProvider(tmp_path, "run")
    CheckpointWriter(paths).save(trained(), TrainingIteration(1, 1, 1))
    before = digests(tmp_path)
    model = trained()
    model.module.weight = nn.Parameter(torch.zeros(2, 3))
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    call = advised(lambda: stack.initialize(model)).partition(" from ")[2]
    parameters = eval(call, {"model": model})
    model = bind(model.module, "net", torch.optim.AdamW(parameters))
    stack.initialize(model)
    assert len(model.optimizer.state) == 2
    assert digests(tmp_path) == before
