"""A kind may open what it locates in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from support.average import Average

from noether_init_core import InitializerStack, Source, SourceInitializer, bind, kinds, open_checkpoint
from noether_init_core.errors import PlanError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.initializers.base import LocateQuery


class AverageOfFolder(SourceInitializer):
    """The mean of all files of a folder."""

    contract: ClassVar[int] = 1
    folder: ClassVar[Path]

    def locate(self, query: LocateQuery) -> Source | None:
        return Source(self.folder)

    def open(self, source: Source) -> Checkpoint:
        return Average(*(open_checkpoint(path) for path in sorted(source.location.glob("*.pt"))))


@pytest.fixture
def average(tmp_path: Path) -> Iterator[str]:
    """The name of the kind, registered for a folder of two files."""
    AverageOfFolder.folder = tmp_path
    for number in (1, 3):
        torch.save({"weight": torch.full((2, 3), float(number)), "bias": torch.zeros(2)}, tmp_path / f"{number}.pt")
    kinds.register("average_of_folder", AverageOfFolder)
    yield "average_of_folder"
    kinds.unregister("average_of_folder")


def test_a_checkpoint_that_is_computed_is_planned_loaded_and_traced(average: str, tmp_path: Path) -> None:
    """Rules, casts and the report work as with a file."""
    module = torch.nn.Linear(3, 2).double()
    model = bind(module, name="net")
    stack = InitializerStack.from_config([{"kind": average, "transforms": [{"drop": "bias"}, {"keep_model": "bias"}]}])
    kept = module.bias.detach().clone()
    assert stack.plan(model).is_fine
    report = stack.initialize(model)
    assert torch.equal(module.weight, torch.full((2, 3), 2.0, dtype=torch.float64))
    assert torch.equal(module.bias, kept)
    assert str(tmp_path) in str(report)


def test_nan_in_a_checkpoint_that_is_computed_changes_nothing(average: str, tmp_path: Path) -> None:
    """Values are looked at, though there are no bytes to verify."""
    torch.save({"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}, tmp_path / "2.pt")
    module = torch.nn.Linear(3, 2)
    before = module.weight.detach().clone()
    with pytest.raises(PlanError, match="weight holds NaN"):
        InitializerStack.from_config([{"kind": average}]).initialize(bind(module, name="net"))
    assert torch.equal(module.weight, before)
