"""What an initialization, or a look at files, leaves behind: nothing that waits for the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
from support.world import new_model

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    TrainerState,
    compare_checkpoints,
)
from noether_init_core.files.opening import FileCheckpoint
from noether_init_core.sets.health import verify_run
from noether_init_core.sets.snapshot import Snapshot


def _initialize(folder: Path, kind: str, **config: object) -> None:
    entry = {"kind": kind, "run_id": "before", "model_name": "net", **config}
    stack = InitializerStack.from_config([entry], path_provider=PathProvider(folder, "now"))
    stack.plan(new_model(2))
    stack.initialize(new_model(2), trainer=TrainerState(seed=1))


def _compare(folder: Path) -> None:
    run = PathProvider(folder, "before").run_output_path
    assert compare_checkpoints(run, run).is_equal


USES: dict[str, Callable[[Path], object]] = {
    "resume": lambda folder: _initialize(folder, "resume"),
    "previous_run": lambda folder: _initialize(folder, "previous_run", load_optim=True),
    "diff": _compare,
    "verify": lambda folder: verify_run(Snapshot(PathProvider(folder, "before"))),
}


def _opened() -> list[FileCheckpoint]:
    return [one for one in gc.get_objects() if type(one) is FileCheckpoint]


@pytest.mark.parametrize("use", USES)
def test_no_opened_file_outlives_its_use(tmp_path: Path, use: str) -> None:
    """Headers and tensors of files are gone when it is done: no circle of references holds them."""
    trainer = TrainerState(seed=1)
    trainer.advance(100, end_of_epoch=True)
    CheckpointWriter(PathProvider(tmp_path, "before")).save(new_model(1), trainer=trainer)
    gc.collect()
    gc.disable()
    try:
        # other tests of this process may keep files of their own
        before = _opened()
        USES[use](tmp_path)
        assert [one for one in _opened() if one not in before] == []
    finally:
        gc.enable()
