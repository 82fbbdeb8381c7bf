"""Tiny models of every shape that an initializer meets, and a trainer and a callback with one number of state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from noether_init_core.models import bind, compose


def _plain(**more: torch.nn.Module) -> torch.nn.Sequential:
    """A matrix, a bias, and a scale."""
    return torch.nn.Sequential(OrderedDict(embed=torch.nn.Linear(4, 3), norm=torch.nn.LayerNorm(3), **more))


def _with_half_precision() -> torch.nn.Sequential:
    """Besides, a square matrix, which also fits the other way round, and half precision."""
    module = _plain(square=torch.nn.Linear(3, 3, bias=False))
    module.coarse = torch.nn.Parameter(torch.empty(5, dtype=torch.bfloat16))
    return module


def _tied() -> torch.nn.Sequential:
    """An embedding whose matrix is that of the head, too."""
    embed, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    return torch.nn.Sequential(OrderedDict(embed=embed, head=head))


def _buffers() -> torch.nn.Sequential:
    """No parameter at all: running statistics, a counter, a mask with an infinity, and a buffer that is not saved."""
    norm = torch.nn.BatchNorm1d(3, affine=False)
    module = torch.nn.Sequential(OrderedDict(norm=norm))
    module.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.0]))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr]  # there with track_running_stats
        norm.num_batches_tracked.fill_(int(torch.randint(1, 100, ())))  # type: ignore[union-attr]
    return module


def _single(name: str, module: torch.nn.Module, **more: Any) -> Any:
    """Bound, with values of its own everywhere, and an optimizer that has made a step."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    parameters = list(module.parameters())
    if not parameters:
        return bind(module, name=name, **more)
    # another learning rate for each seed
    optimizer = torch.optim.AdamW(parameters, lr=0.01 + 0.01 * float(torch.rand(())))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return bind(module, name=name, optimizer=optimizer, **more)


def _composite() -> Any:
    return compose(
        "pair", {"encoder": _single("encoder", _plain()), "absent": None, "decoder": _single("decoder", _plain())}
    )


def _nested() -> Any:
    inner = compose("inner", {"first": _single("first", _plain()), "second": _single("second", _plain())})
    return compose("outer", {"inner": inner, "head": _single("head", _plain())})


def _frozen() -> Any:
    model = _single("net", _plain(), is_frozen=True)
    model.module.requires_grad_(False)
    return model


#: Shape -> what makes a model of that shape, by the global generator.
SHAPES: Mapping[str, Callable[[], Any]] = {
    "single": lambda: _single("net", _with_half_precision()),
    "composite": _composite,
    "nested": _nested,
    "frozen": _frozen,
    "meta_device": lambda: _single("net", _plain()),
    "tied": lambda: _single("net", _tied()),
    "buffers": lambda: _single("net", _buffers()),
}


def new_model(shape: str, seed: int, *, on_meta: bool | None = None) -> Any:
    """A model of a shape of ``SHAPES``, every value from ``seed``; the global generator stays as it was.

    Args:
        shape: ``single``, ``composite``, ``nested``, ``frozen``, ``meta_device``, ``tied`` or ``buffers``.
        seed: Models of different seeds differ in every entry.
        on_meta: Whether it is on the meta device, without an optimizer; None: where the shape says so.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if on_meta or (on_meta is None and shape == "meta_device"):
            with torch.device("meta"):
                return bind(_plain(), name="net")
        return SHAPES[shape]()


def with_extra_parameter(seed: int) -> Any:
    """The single model with one parameter more, ``extra``, which no source has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _with_half_precision()
        module.register_parameter("extra", torch.nn.Parameter(torch.empty(3)))
        return _single("net", module)


def leaf_state(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the state dict of a single model, by reference to nothing."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Counter:
    """A callback whose state is one number."""

    checkpoint_key = "counter"

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.number = state_dict["number"]


class NumberedTrainer:
    """A trainer whose state is one number, and the states of its callbacks."""

    def __init__(self, number: int = 0, callbacks: tuple[Counter, ...] = ()) -> None:
        self.number = number
        self.callbacks = callbacks

    def state_dict(self) -> dict[str, Any]:
        states = {callback.checkpoint_key: callback.state_dict() for callback in self.callbacks}
        return {"number": self.number, "callback_state_dicts": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.number = state_dict["number"]
