"""The values: what torch.nn.init promises, the same bits whatever else there is, and no generator of anybody else."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from noether_init_core import InitializerStack, bind
from noether_init_random import FUNCTIONS, seed_of

WIDE, TALL = 96, 160
KERNEL = (6, 4, 3, 3)
DRAWN = {
    "kaiming_normal_": {"mode": "fan_out", "nonlinearity": "relu"},
    "kaiming_uniform_": {"a": 0.2},
    "normal_": {"mean": 1.5, "std": 0.25},
    "orthogonal_": {"gain": 2.0},
    "trunc_normal_": {"std": 0.5, "a": -0.6, "b": 0.7},
    "uniform_": {"a": -3.0, "b": 5.0},
    "xavier_normal_": {"gain": 0.5},
    "xavier_uniform_": {},
}
FIXED: dict[str, dict[str, Any]] = {
    "constant_": {"val": 2.5},
    "dirac_": {"groups": 2},
    "eye_": {},
    "ones_": {},
    "zeros_": {},
}


def module_of(dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> torch.nn.Module:
    """A module with one parameter for each shape, all NaN."""
    module = torch.nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype)))
    return module


def start(module: torch.nn.Module, *rules: dict[str, Any], seed: int = 7) -> dict[str, torch.Tensor]:
    """Initialize the module, and what its parameters then are."""
    config = {"kind": "random", "seed": seed, "rules": list(rules)}
    InitializerStack.from_config([config]).initialize(bind(module, name="net"))
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def matrix(init: str, **arguments: Any) -> torch.Tensor:
    """A matrix that the function has drawn."""
    return start(module_of(weight=(TALL, WIDE)), {"match": "weight", "init": init, **arguments})["weight"]


def test_every_function_of_torch_is_tested_here() -> None:
    """What the installed torch has is known to draw, or to draw nothing; sparse_ alone is left out."""
    of_torch = {name for name in vars(torch.nn.init) if name.endswith("_") and not name.startswith("_")}
    assert set(FUNCTIONS) == DRAWN.keys() | FIXED.keys() == of_torch - {"sparse_"}


@pytest.mark.parametrize("init", sorted(DRAWN))
def test_values_are_those_of_torch_with_a_generator_of_the_same_seed(init: str) -> None:
    """Bit by bit; the seed is a function of the config's seed and the name."""
    right = torch.empty(TALL, WIDE)
    FUNCTIONS[init](right, **DRAWN[init], generator=torch.Generator().manual_seed(seed_of(7, "weight")))
    assert torch.equal(matrix(init, **DRAWN[init]), right)


def test_seeds_do_not_change_from_release_to_release() -> None:
    """Numbers that were written down once: other ones would draw every model anew."""
    assert [seed_of(0, "weight"), seed_of(7, "weight"), seed_of(7, "encoder.weight"), seed_of(-1, "")] == [
        4041729264,
        789685716,
        2072177925,
        1170230835,
    ]


@pytest.mark.parametrize(
    ("init", "arguments", "mean", "std"),
    [
        ("normal_", {"mean": 1.5, "std": 0.25}, 1.5, 0.25),
        ("uniform_", {"a": -3, "b": 5}, 1.0, 8 / math.sqrt(12)),
        ("kaiming_normal_", {"mode": "fan_out", "nonlinearity": "relu"}, 0.0, math.sqrt(2 / TALL)),
        ("kaiming_normal_", {"mode": "fan_in", "nonlinearity": "linear"}, 0.0, math.sqrt(1 / WIDE)),
        ("kaiming_uniform_", {"nonlinearity": "relu"}, 0.0, math.sqrt(2 / WIDE)),
        ("xavier_normal_", {"gain": 2}, 0.0, 2 * math.sqrt(2 / (WIDE + TALL))),
        ("xavier_uniform_", {}, 0.0, math.sqrt(2 / (WIDE + TALL))),
    ],
)
def test_mean_and_deviation_are_those_of_the_distribution(
    init: str, arguments: dict[str, Any], mean: float, std: float
) -> None:
    """Within four standard errors of 15,360 values."""
    values = matrix(init, **arguments)
    error = std / math.sqrt(values.numel())
    assert values.mean().item() == pytest.approx(mean, abs=4 * error)
    assert values.std().item() == pytest.approx(std, abs=4 * error)


@pytest.mark.parametrize(
    ("init", "arguments", "low", "high"),
    [
        ("uniform_", {"a": -3, "b": 5}, -3.0, 5.0),
        ("trunc_normal_", {"std": 0.5, "a": -0.6, "b": 0.7}, -0.6, 0.7),
        ("xavier_uniform_", {}, -math.sqrt(6 / (WIDE + TALL)), math.sqrt(6 / (WIDE + TALL))),
        ("kaiming_uniform_", {"nonlinearity": "relu"}, -math.sqrt(6 / WIDE), math.sqrt(6 / WIDE)),
    ],
)
def test_values_fill_the_range_and_do_not_leave_it(
    init: str, arguments: dict[str, Any], low: float, high: float
) -> None:
    """The least and the greatest of 15,360 values lie within the bounds, and within a hundredth of them."""
    values, slack = matrix(init, **arguments), (high - low) / 100
    assert low - 1e-6 <= values.min() <= low + slack
    assert high - slack <= values.max() <= high + 1e-6


def test_functions_that_draw_nothing_give_their_fixed_values() -> None:
    """Constants, the identity, and the identity of a convolution in two groups."""
    assert torch.equal(matrix("constant_", val=2.5), torch.full((TALL, WIDE), 2.5))
    assert torch.equal(matrix("ones_"), torch.ones(TALL, WIDE))
    assert torch.equal(matrix("zeros_"), torch.zeros(TALL, WIDE))
    assert torch.equal(matrix("eye_"), torch.eye(TALL, WIDE))
    kernel = start(module_of(weight=KERNEL), {"match": "weight", "init": "dirac_", "groups": 2})["weight"]
    assert kernel.nonzero().tolist() == [[row, row % 3, 1, 1] for row in range(6)]
    gram = matrix("orthogonal_", gain=2).T @ matrix("orthogonal_", gain=2)
    assert torch.allclose(gram, 4 * torch.eye(WIDE), atol=1e-4)


def test_the_first_rule_that_matches_counts() -> None:
    """Order decides, not which pattern is the narrower one."""
    rules = [
        {"match": "a", "init": "ones_"},
        {"match": "*", "init": "zeros_"},
    ]
    assert {name: one.sum().item() for name, one in start(module_of(a=(2,), b=(2,)), *rules).items()} == {
        "a": 2.0,
        "b": 0.0,
    }


def test_other_parameters_and_their_order_do_not_matter() -> None:
    """A parameter gets the same bits first or last, among few or many, under this rule or an equal one."""
    every = {"match": "**", "init": "normal_"}
    few = start(module_of(a=(5, 3), b=(4,)), every)
    many = start(module_of(c=(7,), b=(4,), d=(2, 2), a=(5, 3)), {"match": "c", "init": "ones_"}, every)
    assert {name: torch.equal(few[name], many[name]) for name in few} == {"a": True, "b": True}


def test_names_and_seeds_decide() -> None:
    """Two parameters of one shape differ, and so does one under two seeds."""
    rule = {"match": "*", "init": "normal_"}
    first, other = start(module_of(a=(8,), b=(8,)), rule), start(module_of(a=(8,), b=(8,)), rule, seed=8)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], other["a"])


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_wrappers_of_modules_do_not_matter(wrapper: str) -> None:
    """Names are without the segments that data parallelism and compilation add, for rules and for seeds."""
    plain = torch.nn.Sequential(OrderedDict(encoder=torch.nn.Linear(3, 2)))
    wrapped = torch.nn.Sequential(
        OrderedDict([(wrapper, torch.nn.Sequential(OrderedDict(encoder=torch.nn.Linear(3, 2))))])
    )
    rule = {"match": "encoder.weight", "init": "normal_"}
    right = start(plain, rule)["encoder.weight"]
    assert torch.equal(start(wrapped, rule)[f"{wrapper}.encoder.weight"], right)


PROGRAM = """
import hashlib, sys, torch
from noether_init_core import InitializerStack, bind
seed, threads = map(int, sys.argv[1:])
torch.manual_seed(seed)
torch.rand(seed)
torch.set_num_threads(threads)
module = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Linear(70, 90))
rules = [
    {"match": "0.weight", "init": "kaiming_normal_"},
    {"match": "1.weight", "init": "orthogonal_"},
    {"match": "*.bias", "init": "trunc_normal_"},
]
InitializerStack.from_config([{"kind": "random", "seed": 3, "rules": rules}]).initialize(bind(module, name="net"))
for name, parameter in module.named_parameters():
    print(name, hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest())
"""


def drawn_elsewhere(seed: int, threads: int) -> dict[str, str]:
    """Name -> digest of what another process has drawn, whose global generator was seeded and used before."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(seed), str(threads)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split() for line in lines)


def test_processes_draw_the_same_bits() -> None:
    """As ranks do; orthogonal_ only with as many threads, with which LAPACK's last bits change."""
    one, same, threads = drawn_elsewhere(1, 1), drawn_elsewhere(99, 1), drawn_elsewhere(1, 2)
    assert list(one) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert len({*one.values()}) == 4
    assert same == one
    assert {name: threads[name] for name in one if name != "1.weight"} == {
        name: digest for name, digest in one.items() if name != "1.weight"
    }


def generators() -> list[str]:
    """The states of all global generators, as texts."""
    states: list[Any] = [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state(legacy=False)]
    return [repr(state) for state in states]


@pytest.mark.parametrize(("init", "arguments"), sorted({**DRAWN, **FIXED}.items()), ids=lambda value: str(value)[:16])
def test_global_generators_are_left_alone(init: str, arguments: dict[str, Any]) -> None:
    """No function that a rule may name draws from torch's, Python's or NumPy's generator."""
    shape = KERNEL if init == "dirac_" else (TALL, WIDE)
    before = generators()
    values = start(module_of(weight=shape), {"match": "weight", "init": init, **arguments})["weight"]
    assert generators() == before
    assert not values.isnan().any()


def test_sparse_is_left_out_because_it_draws_from_the_global_generator() -> None:
    """Once torch draws all of it from the generator that it is given, this fails, and rules may name it."""
    before = torch.get_rng_state()
    torch.nn.init.sparse_(torch.empty(8, 8), sparsity=0.5, generator=torch.Generator().manual_seed(0))
    touched = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    assert touched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("init", sorted(DRAWN))
def test_narrow_parameters_get_the_values_of_float32_rounded(init: str, dtype: torch.dtype) -> None:
    """Also by functions that torch has not for them; the parameter keeps its dtype."""
    module = module_of(weight=(TALL, WIDE))
    narrow = module_of(weight=(TALL, WIDE))
    narrow.weight = torch.nn.Parameter(torch.zeros(TALL, WIDE, dtype=dtype), requires_grad=False)
    rule = {"match": "weight", "init": init, **DRAWN[init]}
    rounded = start(module, rule)["weight"].to(dtype)
    values = start(narrow, rule)["weight"]
    assert values.dtype is dtype
    assert torch.equal(values.float(), rounded.float())
    assert values.float().unique().numel() > 10


def test_wide_parameters_are_drawn_in_their_own_dtype() -> None:
    """Float64 and complex numbers, as torch draws them."""
    for dtype in (torch.float64, torch.complex64):
        right = torch.empty(5, 3, dtype=dtype).normal_(generator=torch.Generator().manual_seed(seed_of(7, "weight")))
        assert torch.equal(start(module_of(dtype, weight=(5, 3)), {"match": "*", "init": "normal_"})["weight"], right)


@pytest.mark.parametrize(
    "around",
    [
        pytest.param(lambda: torch.device("meta"), id="default device"),
        pytest.param(lambda: torch.inference_mode(), id="inference mode"),
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast"),
    ],
)
def test_what_is_set_around_the_start_does_not_matter(around: Callable[[], Any]) -> None:
    """Neither the device that new tensors get, nor the mode."""
    rules = [{"match": "a", "init": "orthogonal_"}, {"match": "b", "init": "eye_"}]
    right = start(module_of(a=(4, 3), b=(3, 3)), *rules)
    module = module_of(a=(4, 3), b=(3, 3))
    with around():
        config = {"kind": "random", "seed": 7, "rules": rules}
        InitializerStack.from_config([config]).initialize(bind(module, name="net"))
    assert {name: torch.equal(one, right[name]) for name, one in module.named_parameters()} == {"a": True, "b": True}


def test_the_layout_in_memory_stays_and_does_not_matter() -> None:
    """A channels-last kernel and a transposed matrix get the same values at the same places."""
    module = module_of(kernel=KERNEL, matrix=(5, 3))
    module.kernel = torch.nn.Parameter(torch.zeros(KERNEL).to(memory_format=torch.channels_last))
    module.matrix = torch.nn.Parameter(torch.zeros(3, 5).T)
    strides = [one.stride() for one in module.parameters()]
    rule = {"match": "*", "init": "normal_"}
    values, right = start(module, rule), start(module_of(kernel=KERNEL, matrix=(5, 3)), rule)
    assert {name: torch.equal(one, right[name]) for name, one in values.items()} == {"kernel": True, "matrix": True}
    assert [one.stride() for one in module.parameters()] == strides
