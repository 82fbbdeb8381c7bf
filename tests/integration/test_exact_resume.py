"""A resumed run equals the uninterrupted one bit for bit, and needs every single piece of its state for that."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, bind

BATCHES = 5
UPDATES = 3 * BATCHES
MIDDLE = BATCHES + 2


class Run:
    """A plain loop with everything that has state: dropout, BatchNorm, AdamW, a schedule, EMA, augmentation."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(23, 4, generator=generator)
        self.network = torch.nn.Sequential(
            *(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Dropout(0.3)),
            torch.nn.Linear(6, 1),
        )
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=UPDATES)
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        self.state = TrainerState(seed=3, schedule=self.schedule, ema=self.ema)
        self.loader = self.state.loader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=5)
        self.model = bind(self.network, name="net", optimizer=self.optimizer)
        self.paths = PathProvider(folder, "run")
        self.losses: dict[int, float] = {}

    def start(self) -> str:
        """What the first lines of a training script do; returns where the run starts."""
        stack = InitializerStack.from_config({"auto_resume": True, "initializers": []}, path_provider=self.paths)
        return str(stack.initialize(self.model, trainer=self.state).start)

    def train(self, until: int) -> Run:
        """Make updates, as a training script would, until there are that many."""
        while self.state.iteration.update != until:
            for inputs, targets in self.loader:
                noise = torch.from_numpy(numpy.random.normal(scale=0.1, size=tuple(inputs.shape))).float()
                inputs = inputs * random.uniform(0.5, 1.5) + noise
                loss = torch.nn.functional.mse_loss(self.network(inputs), targets)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.ema.update_parameters(self.network)
                self.state.advance()
                self.losses[int(self.state.iteration.update or 0)] = loss.item()
                if self.state.iteration.update == until:
                    break
        return self

    def save(self) -> None:
        """Commit a set."""
        CheckpointWriter(self.paths).save(
            self.model, trainer=self.state, averages={"ema=0.8": self.ema.module.state_dict()}
        )

    def numbers(self, before: Run | None = None) -> dict[str, Any]:
        """All that a run ends with, by name, tensors as bytes; ``before`` made the updates before it."""
        found: dict[str, Any] = {}
        trainer = self.state.state_dict()
        trainer["losses"] = (before.losses if before else {}) | self.losses
        whole = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "trainer": trainer}

        def walk(value: Any, place: str) -> None:
            if isinstance(value, dict):
                for key, item in value.items():
                    walk(item, f"{place}/{key}")
            elif isinstance(value, list | tuple):
                for number, item in enumerate(value):
                    walk(item, f"{place}/{number}")
            else:
                found[place] = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

        walk(whole, "")
        return found


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, Any]:
    """The numbers of the run that is never interrupted."""
    run = Run(tmp_path / "whole")
    assert run.start() == "E0_U0_S0"
    return run.train(UPDATES).numbers()


def differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Places where the numbers differ."""
    return sorted(place for place in {*first, *other} if first.get(place) != other.get(place))


@pytest.mark.parametrize(
    ("stop", "start"),
    [(MIDDLE, "E1_U7_S33"), (1, "E0_U1_S5"), (BATCHES, "E1_U5_S23"), (2 * BATCHES - 1, "E1_U9_S43")],
    ids=["middle of an epoch", "first update", "end of an epoch", "before the last batch"],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, whole: dict[str, Any], stop: int, start: str) -> None:
    """Saved by the writer and resumed by the stack in newly built objects, every number is the same."""
    stopped = Run(tmp_path).train(stop)
    stopped.save()
    resumed = Run(tmp_path)
    torch.randn(5)  # what happens while things are built must not matter
    assert resumed.start() == start
    found = resumed.train(UPDATES).numbers(before=stopped)
    assert len(found) > 60
    assert differences(found, whole) == []


def test_resuming_many_times_equals_not_at_all(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A run that is stopped after each single update ends with the same numbers."""
    losses: dict[int, float] = {}
    for update in range(1, UPDATES + 1):
        run = Run(tmp_path)
        run.start()
        run.train(update).save()
        losses |= run.losses
    run.losses = losses
    assert differences(run.numbers(), whole) == []


def test_work_after_the_last_set_is_made_again(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Updates after the newest set are lost in a crash and come back with the same losses."""
    crashed = Run(tmp_path)
    crashed.train(MIDDLE).save()
    crashed.train(MIDDLE + 2)
    resumed = Run(tmp_path)
    assert resumed.start() == "E1_U7_S33"
    assert differences(resumed.train(UPDATES).numbers(before=crashed), whole) == []
    again = {update: resumed.losses[update] for update in (MIDDLE + 1, MIDDLE + 2)}
    assert again.items() <= crashed.losses.items()


def change_trainer(run: Run, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the state of the trainer in place."""
    state = copy.deepcopy(run.state.state_dict())
    change(state["trainer_state"])
    run.state.load_state_dict(state)
    run.state.restore_rng()


def leave_out(run: Run, fresh: Run, fresh_trainer: dict[str, Any], piece: str) -> None:
    """Give the resumed run one piece of state as a newly built run has it, as if it were not in the checkpoint."""
    ours = fresh_trainer["trainer_state"]
    names = {name for name, _parameter in fresh.network.named_parameters()}
    if piece in ("weights", "buffers"):
        kept = {k: v for k, v in fresh.network.state_dict().items() if (k in names) == (piece == "weights")}
        run.network.load_state_dict(kept, strict=False)
    elif piece == "optimizer":
        run.optimizer.load_state_dict(fresh.optimizer.state_dict())
    elif piece in ("schedule", "ema"):
        change_trainer(run, lambda state: state["stateful"].update({piece: ours["stateful"][piece]}))
    elif piece.endswith(" RNG"):
        name = piece.removesuffix(" RNG")
        change_trainer(run, lambda state: state["rng"].update({name: ours["rng"][name]}))
    elif piece == "data order":
        change_trainer(run, lambda state: state["loader"].update(batch=ours["loader"]["batch"]))
    elif piece != "nothing":
        raise AssertionError(piece)


PIECES = ("weights", "buffers", "optimizer", "schedule", "torch RNG", "python RNG", "numpy RNG", "data order", "ema")


@pytest.mark.parametrize("piece", ["nothing", *PIECES])
def test_each_piece_of_state_is_needed(tmp_path: Path, whole: dict[str, Any], piece: str) -> None:
    """With one piece as in a newly built run the numbers at the end are others; with none left out they are equal."""
    stopped = Run(tmp_path).train(MIDDLE)
    stopped.save()
    fresh = Run(tmp_path / "fresh")
    fresh_trainer = copy.deepcopy(fresh.state.state_dict())
    resumed = Run(tmp_path)
    assert resumed.start() == "E1_U7_S33"
    leave_out(resumed, fresh, fresh_trainer, piece)
    found = resumed.train(UPDATES).numbers(before=stopped)
    places = differences(found, whole)
    if piece == "nothing":
        assert places == []
    elif piece == "ema":
        # nothing that is trained depends on the average, hence it alone is wrong
        assert places
        assert all("/stateful/ema/" in place for place in places)
    elif piece == "buffers":
        # in training BatchNorm does not look at its buffers, hence only they and their average are wrong
        assert places
        assert all("running_" in place or "num_batches_tracked" in place for place in places)
    else:
        assert any(place.startswith("/network/") and place.endswith("weight") for place in places)
        assert found["/trainer/losses/15"] != whole["/trainer/losses/15"]
