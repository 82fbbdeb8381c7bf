"""Conversions: values that a dtype cannot hold are found, whatever torch makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import InitializerStack, PlanError, bind

INF = float("inf")


def converted(folder: Path, values: Any, source: torch.dtype, target: torch.dtype, cast: str) -> torch.Tensor:
    """The buffer of a module of dtype ``target`` after a file with ``values`` was loaded."""
    torch.save({"b": torch.tensor(values, dtype=source)}, folder / "a.pt")
    module = torch.nn.Module()
    module.register_buffer("b", torch.zeros(len(values), dtype=target))
    config = {"kind": "file", "path": str(folder / "a.pt"), "cast": cast}
    InitializerStack.from_config([config]).initialize(bind(module, name="net"))
    return module.get_buffer("b")


@pytest.mark.parametrize(
    ("values", "source", "target"),
    [
        ([-3.0, 1e6], torch.float32, torch.float8_e4m3fn),
        ([-3.0, 1e6], torch.float32, torch.float8_e8m0fnu),
        ([0.0, 2.0], torch.float32, torch.float8_e8m0fnu),
        ([1.0, 1e6], torch.bfloat16, torch.float16),
        ([1.0, 3.4028235e38], torch.float32, torch.bfloat16),
        ([100_000, 3], torch.int64, torch.float16),
        ([2**63 - 1, 1], torch.int64, torch.float8_e5m2),
        ([2**24 + 1, 1], torch.int64, torch.float32),
        ([2**63 - 1, 1], torch.int64, torch.float64),
        ([5, 1], torch.int64, torch.bool),
        ([256, 1], torch.uint64, torch.uint8),
        ([-1, 1], torch.int8, torch.uint8),
        ([1e300, 2.0], torch.float64, torch.complex64),
        ([1e300 + 0j, 2.0], torch.complex128, torch.complex64),
        ([1.5, 2.0], torch.float32, torch.int32),
        ([9.3e18, 2.0], torch.float32, torch.int64),
        ([INF, 2.0], torch.float32, torch.float8_e4m3fn),
    ],
)
def test_values_that_do_not_fit_are_refused(
    tmp_path: Path, values: Any, source: torch.dtype, target: torch.dtype
) -> None:
    """Saturated, infinite, rounded to another integer, without its sign: none of it happens silently."""
    with pytest.raises(PlanError, match="do not fit"):
        converted(tmp_path, values, source, target, "any")


@pytest.mark.parametrize(
    ("values", "source", "target"),
    [
        ([-3.0, 448.0], torch.float32, torch.float8_e4m3fn),
        ([2.0, 0.5], torch.float32, torch.float8_e8m0fnu),
        ([65504.0, 1e-9], torch.float32, torch.float16),
        ([INF, -2.5], torch.float32, torch.float16),
        ([2**24, 3], torch.int64, torch.float32),
        ([255, 1], torch.uint64, torch.uint8),
        ([1, 0], torch.int64, torch.bool),
        ([3.0, -2.0], torch.float32, torch.int8),
        ([1.5, 2.0], torch.float64, torch.complex64),
    ],
)
def test_values_that_fit_are_what_torch_makes_of_them(
    tmp_path: Path, values: Any, source: torch.dtype, target: torch.dtype
) -> None:
    """Rounding of fractions is what a conversion is asked for."""
    loaded = converted(tmp_path, values, source, target, "any")
    truth = torch.tensor(values, dtype=source).to(target)
    assert torch.equal(loaded.view(torch.uint8), truth.view(torch.uint8))
