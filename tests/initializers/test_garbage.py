"""What an initialization leaves behind: nothing that waits for the garbage collector."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    TrainerState,
    TrainingIteration,
    bind,
)
from noether_init_core.files.opening import FileCheckpoint


def _resume(paths: PathProvider) -> None:
    """Take weights, moments and trainer of the run."""
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    config = {"kind": "resume", "run_id": "before", "model_name": "net"}
    stack = InitializerStack.from_config([config], path_provider=paths)
    stack.initialize(bind(module, name="net", optimizer=optimizer), trainer=TrainerState(seed=1))
    assert optimizer.state


def test_no_opened_file_outlives_a_resume(tmp_path: Path) -> None:
    """Headers and tensors of its files are gone when it is done: no circle of references holds them."""
    paths = PathProvider(tmp_path, "before")
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    trainer = TrainerState(seed=1)
    trainer.advance(1, end_of_epoch=True)
    CheckpointWriter(paths).save(
        bind(module, name="net", optimizer=optimizer), TrainingIteration(1, 1, 1), trainer=trainer
    )
    gc.collect()
    gc.disable()
    try:
        _resume(PathProvider(tmp_path, "now"))
        assert not [one for one in gc.get_objects() if type(one) is FileCheckpoint]
    finally:
        gc.enable()
