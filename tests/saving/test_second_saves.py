"""A second save of one iteration: what a resume gets that selects it."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import torch

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind
from noether_init_core.errors import CheckpointWriteError
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.training import TrainerState


class Loop:
    """A model, its optimizer, a schedule and the state of the loop."""

    def __init__(self) -> None:
        self.network = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        self.model = bind(self.network, name="mlp", optimizer=self.optimizer)
        self.state = TrainerState(seed=1, schedule=self.schedule)

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.network(torch.ones(1, 2)).sum().backward()
            self.optimizer.step()
            self.schedule.step()
            self.state.advance(samples=1)

    def resumed(self, paths: PathProvider, config: Any) -> int:
        """Start again from ``config`` and return the epoch of the schedule."""
        InitializerStack.from_config(config, path_provider=paths).initialize(self.model, trainer=self.state)
        return int(self.schedule.last_epoch)


@pytest.mark.parametrize("is_new_writer", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"auto_resume": True},
        {"auto_resume": True, "on_invalid": "previous"},
        [{"kind": "resume"}],
        [{"kind": "resume", "checkpoint_tag": "best"}],
        [{"kind": "resume", "checkpoint_tag": "U3"}],
    ],
)
def test_a_second_save_without_a_trainer_keeps_its_state(paths: PathProvider, config: Any, is_new_writer: bool) -> None:
    """The best weights are saved again under another tag, and a resume selects the newest set."""
    loop, writer = Loop(), CheckpointWriter(paths)
    for _ in range(3):
        loop.train()
        writer.save(loop.model, trainer=loop.state)
    writer = CheckpointWriter(paths) if is_new_writer else writer
    writer.save(loop.model, loop.state.iteration, tags=("best",))
    writer.save(loop.model, loop.state.iteration)
    assert Loop().resumed(paths, config) == 3


def test_a_state_of_another_iteration_is_not_taken(paths: PathProvider) -> None:
    """The schedule would be at another place than the weights."""
    loop, writer = Loop(), CheckpointWriter(paths)
    loop.train()
    writer.save(loop.model, trainer=loop.state)
    loop.train()
    writer.save(loop.model, loop.state.iteration)
    assert Loop().resumed(paths, {"auto_resume": True}) == 0


def test_a_state_of_another_training_is_not_taken(paths: PathProvider) -> None:
    """A run that begins anew in the same folder comes by the same iterations."""
    loop = Loop()
    loop.train(3)
    CheckpointWriter(paths).save(loop.model, trainer=loop.state)
    other, writer = Loop(), CheckpointWriter(paths)
    for update in (1, 2, 3):
        writer.save(other.model, TrainingIteration(0, update, update))
    assert Loop().resumed(paths, {"auto_resume": True}) == 0


def test_states_of_callbacks_are_kept_as_well(paths: PathProvider) -> None:
    """They lie in the trainer file."""

    class Trainer:
        def state_dict(self) -> dict[str, Any]:
            return {"note": torch.ones(3), "callback_state_dicts": {"Average": {"beta": 0.9}}}

    loop, writer, at = Loop(), CheckpointWriter(paths), TrainingIteration(1, 2, 3)
    first = writer.save(loop.model, at, trainer=Trainer())
    second = writer.save(loop.model, at, tags=("best",))
    contents = [torch.load(found.folder / "mlp_cp=E1_U2_S3_trainer.th") for found in (first, second)]
    assert contents[1].keys() == contents[0].keys()
    assert contents[1]["callback_state_dicts"] == {"Average": {"beta": 0.9}}
    assert contents[1]["note"].equal(torch.ones(3))


def test_a_state_that_is_damaged_is_reported_and_does_not_stop_the_save(
    paths: PathProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights of the second save are good; the first set cannot be resumed anyway."""
    loop, writer, at = Loop(), CheckpointWriter(paths), TrainingIteration(1, 2, 3)
    first = writer.save(loop.model, at, trainer=_At(at))
    path = first.folder / "mlp_cp=E1_U2_S3_trainer.th"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    writer.save(loop.model, at, tags=("best",))
    assert f"{at} is saved without trainer state" in caplog.text


def test_a_state_that_cannot_be_reached_stops_the_save(paths: PathProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first set may be good, and the second one would hide it."""
    loop, writer, at = Loop(), CheckpointWriter(paths), TrainingIteration(1, 2, 3)
    first = writer.save(loop.model, at, trainer=_At(at))
    real = os.open

    def failing(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path) == str(first.folder / "mlp_cp=E1_U2_S3_trainer.th"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(CheckpointWriteError, match=r"trainer.*not committed"):
        writer.save(loop.model, at, tags=("best",))
    monkeypatch.undo()
    assert Snapshot(paths).sets() == (first,)


class _At:
    """A trainer with one value."""

    def __init__(self, iteration: TrainingIteration) -> None:
        self.iteration = iteration

    def state_dict(self) -> dict[str, Any]:
        return {"value": torch.arange(4.0)}
