"""A kind may open what it locates in its own way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from support.average import Average

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    Source,
    SourceInitializer,
    TrainingIteration,
    bind,
    kinds,
    open_checkpoint,
)
from noether_init_core.errors import PlanError
from noether_init_core.files.checkpoint import Checkpoint, Verified
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
    assert [source.verified for source in report.sources] == ["unverifiable, claimed by support.average.Average"]


class Boasting(Average):
    """Says that it has verified, and keeps its name to itself."""

    def verify(self, *_arguments: Any, **_options: Any) -> Verified:
        return Verified("sha256")


def test_what_a_strangers_class_verified_is_its_own_claim(
    average: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report says whose word it is, also where the class does not."""
    file = tmp_path / "1.pt"
    monkeypatch.setattr(AverageOfFolder, "open", lambda _self, _source: Boasting(open_checkpoint(file)))
    report = InitializerStack.from_config([{"kind": average}]).initialize(bind(torch.nn.Linear(3, 2), name="net"))
    (source,) = report.to_dict()["sources"]
    assert source["verified"] == f"sha256, claimed by {Boasting.__module__}.Boasting"


@pytest.mark.parametrize(
    ("name", "config", "verified"),
    [
        ("w.pt", {}, "crc32"),
        ("w.pt", {"verify": "header"}, ""),
        ("w.safetensors", {}, "unverifiable"),
        ("w.safetensors", {"verify": "none"}, ""),
    ],
)
def test_the_report_says_by_what_a_file_was_verified(
    tmp_path: Path, name: str, config: dict[str, str], verified: str
) -> None:
    """By its checksums, by nothing, or it was not asked for; a given digest: see the next test."""
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / name) if name.endswith(".pt") else save_file(state, tmp_path / name)
    configs = [{"kind": "file", "path": str(tmp_path / name), **config}]
    report = InitializerStack.from_config(configs).initialize(bind(torch.nn.Linear(3, 2), name="net"))
    assert [source.verified for source in report.sources] == [verified]


def test_the_report_says_by_which_digest_files_of_sets_were_verified(tmp_path: Path) -> None:
    """Those of the manifest; after a digest in the config, that."""
    old, new = PathProvider(tmp_path, "old"), PathProvider(tmp_path, "new")
    found = CheckpointWriter(old).save(bind(torch.nn.Linear(3, 2), name="net"), TrainingIteration(1, 1, 1))
    weights = found.files[0].path
    sha256 = f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()}"
    configs: dict[str, dict[str, str]] = {
        "xxh3_128": {"kind": "previous_run", "run_id": "old", "model_name": "net"},
        "sha256": {"kind": "file", "path": str(weights), "digest": sha256},
    }
    for verified, config in configs.items():
        stack = InitializerStack.from_config([config], path_provider=new)
        report = stack.initialize(bind(torch.nn.Linear(3, 2), name="net"))
        assert [source.verified for source in report.sources] == [verified]


def test_nan_in_a_checkpoint_that_is_computed_changes_nothing(average: str, tmp_path: Path) -> None:
    """Values are looked at, though there are no bytes to verify."""
    torch.save({"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}, tmp_path / "2.pt")
    module = torch.nn.Linear(3, 2)
    before = module.weight.detach().clone()
    with pytest.raises(PlanError, match="weight holds NaN"):
        InitializerStack.from_config([{"kind": average}]).initialize(bind(module, name="net"))
    assert torch.equal(module.weight, before)
