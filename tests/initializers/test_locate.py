"""What a kind of others is asked for, and what it may answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from noether_init_core import (
    BaseCheckpoint,
    CheckpointWriter,
    InitializerStack,
    KindConfig,
    LocateQuery,
    OptimizerStateConfig,
    PathProvider,
    Source,
    SourceInitializer,
    SourceInitializerConfig,
    TrainingIteration,
    bind,
    compose,
    open_checkpoint,
)


class Folder(SourceInitializer):
    """Files of one committed set, by name; records what it was asked for."""

    config_class: ClassVar[type[KindConfig]] = OptimizerStateConfig
    contract: ClassVar[int] = 1

    def __init__(self, config: KindConfig, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder
        self.asked: list[tuple[str, str, str, bool]] = []

    def locate(self, query: LocateQuery) -> Source | None:
        self.asked.append((query.model_name, query.path, query.part, query.model is not None))
        (file,) = self.folder.glob(f"{query.model_name}_cp=*_{query.part}.th")
        return Source(file)


def pair(seed: int) -> Any:
    torch.manual_seed(seed)
    modules = {name: torch.nn.Linear(2, 2) for name in ("left", "right")}
    return compose(
        "pair", {name: bind(one, name, torch.optim.AdamW(one.parameters())) for name, one in modules.items()}
    )


def test_locate_is_asked_once_for_each_model_and_part(tmp_path: Path) -> None:
    """Weights, and optimizer state where the config asks for it; the state is restored without further code."""
    source, target = pair(1), pair(2)
    for leaf in source.submodels.values():
        leaf.module(torch.ones(1, 2)).sum().backward()
        leaf.optimizer.step()
    saved = CheckpointWriter(PathProvider(tmp_path, "run")).save(source, TrainingIteration(1, 1, 1))
    initializer = Folder(OptimizerStateConfig(kind="folder", load_optim=True), saved.folder)
    report = InitializerStack([initializer]).initialize(target)
    assert sorted(initializer.asked) == [
        (f"pair.{name}", f"pair.{name}", part, True) for name in ("left", "right") for part in ("model", "optim")
    ]
    for name, leaf in target.submodels.items():
        assert torch.equal(leaf.module.weight, source.submodels[name].module.weight)
        assert leaf.optimizer.state[leaf.module.weight]["step"] == 1
    assert [text.partition(" (")[0] for text in report.initializers[0].restored] == [
        "optimizer of pair.left",
        "optimizer of pair.right",
    ]


class Average(BaseCheckpoint):
    """The mean of two files, computed when it is read."""

    def __init__(self, path: Path, files: tuple[Path, ...]) -> None:
        self.path = path
        self._open = [open_checkpoint(file) for file in files]

    @property
    def entries(self) -> Mapping[str, int]:
        return self._open[0].entries

    def tensors(self, entry: str | None = None) -> Mapping[str, Any]:
        return self._open[0].tensors(entry)

    def read(self, key: Any, box: Any = None) -> torch.Tensor:
        return torch.stack([one.read(key, box) for one in self._open]).mean(0)

    def close(self) -> None:
        for one in self._open:
            one.close()


class Averaging(SourceInitializer):
    """The mean of ``a.pt`` and ``b.pt``."""

    config_class: ClassVar[type[KindConfig]] = SourceInitializerConfig
    contract: ClassVar[int] = 1

    def __init__(self, config: KindConfig, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder

    def locate(self, query: LocateQuery) -> Source | None:
        return Source(self.folder, origin={"run_id": "mean"}) if query.part == "model" else None

    def open(self, source: Source) -> Average:
        return Average(source.location, (source.location / "a.pt", source.location / "b.pt"))


def test_a_checkpoint_of_a_kind_s_own_is_planned_loaded_and_reported(tmp_path: Path) -> None:
    """``open`` may return whatever has the methods of a checkpoint, also one that computes its tensors."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        torch.save({"weight": torch.full((2, 2), value), "bias": torch.full((2,), value)}, tmp_path / f"{name}.pt")
    module = torch.nn.Linear(2, 2)
    stack = InitializerStack([Averaging(SourceInitializerConfig(kind="averaging"), tmp_path)])
    assert stack.plan(bind(module, "net")).counts() == {"load": 2}
    report = stack.initialize(bind(module, "net"))
    assert torch.equal(module.weight, torch.full((2, 2), 2.0))
    assert report.loaded_parameters() == ("weight", "bias")
    assert [(one.path, dict(one.origin)) for one in report.sources] == [(str(tmp_path), {"run_id": "mean"})]


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({}, "model.pt"),
        ({"run_id": "a", "stage_name": "s", "tag": "latest", "iteration": "E1"}, "a/s @ latest = E1"),
        ({"run_id": "a", "revision": "9f8e", "commit": "42"}, "a (revision 9f8e, commit 42)"),
        ({"revision": "9f8e"}, "model.pt (revision 9f8e)"),
    ],
)
def test_every_key_of_an_origin_is_shown(origin: dict[str, str], words: str) -> None:
    """Also one that this package does not know; without a run the file is named."""
    assert Source("model.pt", origin=origin).describe() == words
