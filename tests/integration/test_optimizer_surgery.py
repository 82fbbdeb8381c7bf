"""After every surgery that rules can say, the optimizer takes its next step; the one of its twin where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind

Shapes = Mapping[str, tuple[int, ...]]


@attrs.frozen
class Surgery:
    """Parameters of the file and of the model, what the config says, and whether nothing is lost on the way."""

    before: Shapes
    after: Shapes
    config: Mapping[str, Any]
    has_inverse: bool = True
    dtype: torch.dtype = torch.float32


def by_rule(before: Shapes, after: Shapes, *steps: Any, **more: Any) -> Surgery:
    rule = {"from": list(before), "to": list(after), "do": list(steps)}
    return Surgery(before, after, {"transforms": [rule]}, **more)


SURGERIES = {
    "rename": Surgery({"a": (3, 4)}, {"b": (3, 4)}, {"transforms": [{"from": "a", "to": "b"}]}),
    "transpose": by_rule({"a": (3, 4)}, {"a": (4, 3)}, "transpose"),
    "transpose of a bias": by_rule({"a": (3,)}, {"a": (3,)}, "transpose"),
    "split": by_rule({"qkv": (6, 4)}, {"q": (2, 4), "k": (2, 4), "v": (2, 4)}, {"split": 0}),
    "split of a bias": by_rule({"qkv": (6,)}, {"q": (1,), "k": (3,), "v": (2,)}, {"split": {"sizes": [1, 3, 2]}}),
    "concat": by_rule({"q": (2, 4), "k": (3, 4)}, {"qk": (5, 4)}, {"concat": 0}),
    "stack": by_rule({"x": (3,), "y": (3,)}, {"xy": (2, 3)}, {"stack": 0}),
    "stack of scalars": by_rule({"x": (), "y": ()}, {"xy": (2,)}, {"stack": 0}),
    "unstack": by_rule({"xy": (2, 3)}, {"x": (3,), "y": (3,)}, {"unstack": 0}),
    "unstack to scalars": by_rule({"xy": (2,)}, {"x": (), "y": ()}, {"unstack": 0}),
    "reshape": by_rule({"a": (3, 4)}, {"a": (12,)}, {"reshape": [-1]}),
    "reshape of a vector": by_rule({"a": (12,)}, {"a": (3, 4)}, {"reshape": [3, 4]}),
    "reshape of a scalar": by_rule({"a": ()}, {"a": (1,)}, {"reshape": [1]}),
    "reshape of one element": by_rule({"a": (1, 1)}, {"a": (1,)}, {"reshape": [1]}),
    "chain": by_rule({"qkv": (4, 6)}, {"q": (3, 4), "k": (3, 4)}, "transpose", {"split": 0}),
    "slice": by_rule({"a": (6, 4)}, {"a": (3, 4)}, {"slice": {"start": 1, "stop": 4}}, has_inverse=False),
    "pad": by_rule({"a": (3, 4)}, {"a": (6, 4)}, {"pad": {"size": 6}}, has_inverse=False),
    "pad with a value": by_rule({"a": (3,)}, {"a": (6,)}, {"pad": {"size": 6, "value": -3}}, has_inverse=False),
    "cast": by_rule({"a": (3, 4)}, {"a": (3, 4)}, {"cast": "bfloat16"}, has_inverse=False),
    "cast of a scalar": by_rule({"a": ()}, {"a": ()}, {"cast": "bfloat16"}, has_inverse=False),
    "conversion": Surgery({"a": (3, 4)}, {"a": (3, 4)}, {}, has_inverse=False, dtype=torch.bfloat16),
    "cast and conversion": by_rule(
        {"a": (3,), "b": (3,)}, {"a": (6,)}, {"cast": "float16"}, {"concat": 0}, has_inverse=False, dtype=torch.bfloat16
    ),
    "on_mismatch: slice": Surgery({"a": (6, 4)}, {"a": (3, 4)}, {"on_mismatch": "slice"}, has_inverse=False),
    "on_mismatch: pad": Surgery({"a": (3, 4)}, {"a": (6, 5)}, {"on_mismatch": "pad"}, has_inverse=False),
    "on_mismatch: pad of a vector": Surgery({"a": (3,)}, {"a": (6,)}, {"on_mismatch": "pad"}, has_inverse=False),
}

Build = Callable[[torch.nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=0.1),
    "AdamW amsgrad": lambda module: torch.optim.AdamW(module.parameters(), lr=0.1, amsgrad=True),
    "NAdam": lambda module: torch.optim.NAdam(module.parameters(), lr=0.1),
    "SGD": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
    "Adafactor": lambda module: torch.optim.Adafactor(module.parameters(), lr=0.1),
}


def module_of(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    module = torch.nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, torch.nn.Parameter(torch.rand(shape, dtype=dtype)))
    return module


def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of a loss that is the same wherever an element stands."""
    optimizer.zero_grad()
    torch.as_tensor(sum(((p - 0.3) ** 2 + p**3).sum() for p in module.parameters())).backward()
    optimizer.step()


def operated(folder: Path, surgery: Surgery, build: Build) -> tuple[Any, ...]:
    """The module of the file with its optimizer, the fresh one with its own, and the plan between them."""
    module = module_of(surgery.before, 0)
    optimizer = build(module)
    for _ in range(3):
        step(module, optimizer)
    iteration = TrainingIteration(1, 1, 1)
    CheckpointWriter(PathProvider(folder, "before")).save(bind(module, name="net", optimizer=optimizer), iteration)
    fresh = module_of(surgery.after, 1, surgery.dtype)
    its = build(fresh)
    config = {"kind": "previous_run", "run_id": "before", "load_optim": True, **surgery.config}
    stack = InitializerStack.from_config([config], path_provider=PathProvider(folder, "after"))
    model = bind(fresh, name="net", optimizer=its)
    plan = stack.plan(model)
    stack.initialize(model)
    return module, optimizer, fresh, its, plan


@pytest.mark.parametrize("surgery", SURGERIES.values(), ids=SURGERIES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_step_runs_and_is_that_of_the_twin(tmp_path: Path, kind: str, surgery: Surgery) -> None:
    """Where nothing is lost, surgery after the step gives what the step after surgery gives."""
    module, optimizer, fresh, its, plan = operated(tmp_path, surgery, OPTIMIZERS[kind])
    before = {name: value.detach().clone() for name, value in fresh.named_parameters()}
    if kind != "Adafactor":
        for parameter in fresh.parameters():
            state = its.state[parameter]
            moments = {key: value for key, value in state.items() if key not in ("step", "mu_product")}
            assert moments
            assert {key: value.shape for key, value in moments.items()} == dict.fromkeys(moments, parameter.shape)
            assert {value.dtype for value in moments.values()} == {surgery.dtype}
    step(fresh, its)
    assert all(torch.isfinite(value).all() for value in fresh.parameters())
    assert not any(torch.equal(value, before[name]) for name, value in fresh.named_parameters())
    # Adafactor looks at whole parameters: what is one after the surgery is another one
    if surgery.has_inverse and (kind != "Adafactor" or surgery is SURGERIES["rename"]):
        step(module, optimizer)
        truth = plan.transformed(module.state_dict())
        for name, value in fresh.named_parameters():
            torch.testing.assert_close(value.detach(), truth[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [{}, {"value": -3}], ids=["the model's own", "a value"])
def test_padded_moments_are_zeros_whatever_the_value(tmp_path: Path, value: dict[str, Any]) -> None:
    """A value is one of the parameter; nothing is known of its gradients."""
    surgery = by_rule({"a": (3,)}, {"a": (6,)}, {"pad": {"size": 6, **value}})
    module, optimizer, fresh, its, _plan = operated(tmp_path, surgery, OPTIMIZERS["AdamW amsgrad"])
    stored, moved = optimizer.state[module.a], its.state[fresh.a]
    assert fresh.a[3:].eq(-3).all() == bool(value)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(moved[key], torch.cat([stored[key], torch.zeros(3)]))


def test_moments_are_not_rounded_by_a_cast_of_their_parameter(tmp_path: Path) -> None:
    """The parameter comes back to float32 rounded, its moments as they were."""
    module, optimizer, fresh, its, _plan = operated(tmp_path, SURGERIES["cast"], OPTIMIZERS["AdamW"])
    assert torch.equal(fresh.a, module.a.bfloat16().float())
    assert torch.equal(its.state[fresh.a]["exp_avg"], optimizer.state[module.a]["exp_avg"])


def test_state_of_vectors_does_not_become_that_of_matrices(tmp_path: Path) -> None:
    """Adafactor keeps factors for the one and a variance for the other: it starts afresh, and the plan says so."""
    for number, name in enumerate(("stack", "unstack", "reshape of a vector", "reshape of one element")):
        _module, _optimizer, fresh, its, plan = operated(
            tmp_path / str(number), SURGERIES[name], OPTIMIZERS["Adafactor"]
        )
        assert not any(parameter in its.state for parameter in fresh.parameters())
        (warning,) = plan.warnings
        assert warning.code == "optimizer"
        assert "is fresh" in warning.message
