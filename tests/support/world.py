"""A small world for tests of everything at once: a run on disk, a model, and what must not change."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind
from support.foreign import ForeignPackages

__all__ = ["FIRST", "INPUTS", "OUTPUTS", "SECOND", "Trainer", "World", "new_model"]

FIRST, SECOND = TrainingIteration(1, 10, 100), TrainingIteration(2, 20, 200)
#: Widths of the model.
INPUTS, OUTPUTS = 3, 2


class Trainer:
    """What a trainer must offer, with one number of state."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number = state["number"]


def new_model(seed: int) -> Any:
    """A linear layer with an optimizer that has made a step."""
    torch.manual_seed(seed)
    module = torch.nn.Linear(INPUTS, OUTPUTS)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(4, INPUTS)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return bind(module, name="net", optimizer=optimizer)


class World:
    """A model to initialize, and a run with two committed sets to initialize it from."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, foreign: ForeignPackages) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.foreign = foreign
        self.marker = folder / "ran"
        self.paths = PathProvider(folder / "out", "source")
        source = new_model(1)
        self.good = {key: value.clone() for key, value in source.state_dict().items()}
        for number, iteration in enumerate((FIRST, SECOND)):
            CheckpointWriter(self.paths, flat_names=False).save(source, iteration, trainer=Trainer(number + 7))
        self.model = new_model(2)
        self.trainer = Trainer()

    # Places

    def set_folder(self, iteration: TrainingIteration = SECOND) -> Path:
        """The folder of a committed set of the run."""
        (found,) = self.paths.checkpoint_path.glob(f"sets/*_{iteration}")
        return found

    def file_of(self, part: str, iteration: TrainingIteration = SECOND) -> Path:
        """A file of a committed set."""
        return self.set_folder(iteration) / f"net_cp={iteration}_{part}.th"

    def legacy(self) -> Path:
        """Make the run one of Noether's: the second set as flat files under ``latest``, without a manifest."""
        folder = self.paths.checkpoint_path
        for part in ("model", "optim", "trainer"):
            shutil.copyfile(self.file_of(part), folder / f"net_cp=latest_{part}.th")
            os.chmod(folder / f"net_cp=latest_{part}.th", 0o644)
        shutil.rmtree(folder / "sets")
        return folder

    # Entries

    def start(self, config: Mapping[str, Any], **more: Any) -> Any:
        """Initialize the model, in a run of its own unless it resumes."""
        paths = self.paths if config.get("kind") == "resume" else self.paths.with_run("new")
        stack = InitializerStack.from_config([dict(config)], path_provider=paths)
        return stack.initialize(self.model, trainer=self.trainer, **more)

    def file(self, path: Path, **more: Any) -> Any:
        """Initialize the model by the kind ``file``."""
        return self.start({"kind": "file", "path": str(path), **more})

    def previous_run(self, **more: Any) -> Any:
        """Initialize the model from the run."""
        return self.start({"kind": "previous_run", "run_id": "source", **more})

    def resume(self, **more: Any) -> Any:
        """Go on with the run."""
        return self.start({"kind": "resume", **more})

    # What must not change

    def state(self) -> dict[str, Any]:
        """Weights, optimizer and trainer, as values."""
        weights = {key: value.tolist() for key, value in self.model.state_dict().items()}
        optimizer = copy.deepcopy(self.model.optimizer.state_dict())
        moments = {
            index: {key: value.tolist() for key, value in state.items()} for index, state in optimizer["state"].items()
        }
        return {"weights": weights, "moments": moments, "groups": optimizer["param_groups"], **vars(self.trainer)}

    def disk(self) -> dict[str, Any]:
        """Everything on disk below the folder of the test, with content."""
        found: dict[str, Any] = {}
        for path in sorted(self.folder.rglob("*")):
            kind = path.lstat().st_mode
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            if "__pycache__" not in path.parts:
                found[str(path.relative_to(self.folder))] = (kind, content)
        return found
