"""Helpers of the tests with real libraries: import one, load a file, compare two models bit for bit."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import InitializerStack, InitReport, bind


def library(name: str) -> Any:
    """The module of a library; without it the test is skipped, with what the installer said."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        said = Path(sys.prefix) / "not-installed.json"
        messages = json.loads(said.read_text("utf-8")) if said.exists() else {}
        pytest.skip(f"{name}: {messages.get(name.partition('.')[0], error)}")


def load(module: torch.nn.Module, path: Path, **config: Any) -> InitReport:
    """Plan the weights of a file, and load them; the plan is fine, and every byte that has a checksum is verified."""
    stack = InitializerStack.from_config([{"kind": "file", "path": str(path), **config}])
    assert stack.plan(bind(module, name="net")).is_fine
    return stack.initialize(bind(module, name="net"))


def assert_same(module: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Every parameter and buffer has the same dtype, shape and bits, also those outside of the state dict."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    other = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    assert own.keys() == other.keys()
    assert len(own) > 0
    for name, tensor in own.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        one, two = (value.detach().reshape(-1).view(torch.uint8) for value in (tensor.cpu(), other[name].cpu()))
        assert torch.equal(one, two), name


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """The module with other values everywhere, so that nothing is equal by luck."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(2, 3)
    return module
