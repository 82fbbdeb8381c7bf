"""What every kind must do: the kit of the core, told what this kind cannot do, and which values it brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from noether_init_core import PlanError, leaf_models
from noether_init_core.testing import Case, InitializerConformance, Wrong, closed
from noether_init_random import seed_of

SEED = 11


class TestRandom(InitializerConformance):
    kind = "random"
    distribution = "noether-init-random"
    plans = closed("there is no file to plan from")
    compares_models = closed("parameters of any shape can be drawn")
    meta_device = closed("it writes in place, so memory comes first: module.to_empty")
    buffers = closed("buffers belong to their modules, and without parameters no rule matches anything")

    @pytest.fixture
    def make_config(self) -> Callable[[Case], dict[str, Any]]:
        return lambda case: {"seed": SEED, "rules": [{"match": "**", "init": "uniform_", "a": -2}]}

    @pytest.fixture
    def wrong_configs(self) -> Sequence[Wrong]:
        everything = {"match": "**", "init": "zeros_"}
        return [
            Wrong(
                "a rule for nothing", {"rules": [everything, {"match": "*.gain", "init": "ones_"}]}, PlanError, "*.gain"
            ),
            Wrong(
                "a vector has no fan", {"rules": [{"match": "**", "init": "kaiming_normal_"}]}, PlanError, "norm.weight"
            ),
            Wrong("no deviation", {"rules": [{**everything, "init": "normal_", "std": -1}]}, PlanError, "std >= 0.0"),
            Wrong(
                "a parameter without rule",
                {"rules": [{"match": "*.*", "init": "zeros_"}], "on_leftover": "error"},
                PlanError,
                "no rule matches coarse",
            ),
        ]

    @pytest.fixture
    def expected(self) -> Callable[[Case], Mapping[str, Mapping[str, torch.Tensor]]]:
        return expected_values


def expected_values(case: Case) -> dict[str, dict[str, torch.Tensor]]:
    """What torch draws for every parameter from a generator of its own; a tied one under its first name."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for path, leaf in leaf_models(case.model):
        below = path.removeprefix(case.model.name).lstrip(".")
        names = {id(parameter): name for name, parameter in leaf.named_parameters()}
        found[path] = {}
        for name, tensor in leaf.state_dict(keep_vars=True).items():
            if id(tensor) not in names:  # a buffer, which is not drawn
                found[path][name] = tensor
                continue
            seed = seed_of(SEED, f"{below}.{names[id(tensor)]}".lstrip("."))
            found[path][name] = _drawn(tensor, seed)
    return found


def _drawn(parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """Values of the dtype of the parameter; half precision is drawn in single precision."""
    values = torch.empty(parameter.shape, dtype=parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32)
    return values.uniform_(-2, 1, generator=torch.Generator().manual_seed(seed))
