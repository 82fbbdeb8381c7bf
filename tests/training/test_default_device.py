"""Saves, loads and resumes do not depend on torch's default device and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, TrainingIteration, bind


@pytest.fixture(params=[("meta", torch.float32), ("cpu", torch.float64), ("meta", torch.bfloat16)])
def defaults(request: pytest.FixtureRequest) -> Iterator[tuple[str, torch.dtype]]:
    """The defaults to set; they are put back after the test."""
    before = torch.get_default_dtype()
    try:
        yield request.param
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


class Training:
    """A model with a norm, its optimizer with state, and a schedule."""

    def __init__(self) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.model(torch.randn(4, 3)).sum().backward()
        self.optimizer.step()

    @property
    def bound(self) -> Any:
        return bind(self.model, "net", optimizer=self.optimizer)


def state_of(training: Training) -> list[torch.Tensor]:
    states = training.optimizer.state_dict()["state"]
    return [
        *training.model.state_dict().values(),
        *(value for number in sorted(states) for value in states[number].values()),
    ]


@pytest.mark.parametrize("kind", ["resume", "previous_run"])
def test_a_start_is_the_same_under_any_defaults(kind: str, defaults: tuple[str, torch.dtype], tmp_path: Path) -> None:
    """Weights, optimizer, schedule, generators and the position in the data."""
    source, target = Training(), Training()
    data = [torch.zeros(3) for _ in range(8)]
    wanted = [value.clone() for value in state_of(source)]
    device, dtype = defaults
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    paths = PathProvider(tmp_path, "run")
    trainer = TrainerState(seed=3, schedule=source.schedule)
    seen = []
    for batch in trainer.loader(data, batch_size=2, shuffle=True):
        seen.append(batch.shape)
        trainer.advance(samples=2)
        if len(seen) == 2:
            break
    CheckpointWriter(paths).save(source.bound, trainer=trainer)
    again = TrainerState(seed=3, schedule=target.schedule)
    loader = again.loader(data, batch_size=2, shuffle=True)
    config: dict[str, Any] = {"kind": kind, "run_id": "run"}
    if kind == "previous_run":
        config["load_optim"] = True
    stack = InitializerStack.from_config([config], path_provider=paths if kind == "resume" else paths.with_run("new"))
    stack.initialize(target.bound, trainer=again)
    for found, value in zip(state_of(target), wanted, strict=True):
        assert found.device.type == "cpu"
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
    if kind == "resume":
        assert again.iteration == trainer.iteration
        assert len(loader) == 2


def test_rules_and_a_seed_work_under_any_defaults(defaults: tuple[str, torch.dtype], tmp_path: Path) -> None:
    """A pad makes new values; a trainer without a seed draws one; interpolation computes in its own dtype."""
    state = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    torch.save(state, tmp_path / "weights.pt")
    model = torch.nn.Linear(4, 3)
    device, dtype = defaults
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    rule = {"from": "weight", "to": "weight", "do": [{"pad": {"dim": 1, "size": 4, "value": 0.5}}]}
    config = {"kind": "file", "path": str(tmp_path / "weights.pt"), "transforms": [rule]}
    InitializerStack.from_config([config]).initialize(bind(model, "net"))
    assert model.weight.tolist() == [[1.0, 1.0, 0.5, 0.5]] * 3
    assert isinstance(TrainerState().seed, int)
    writer = CheckpointWriter(PathProvider(tmp_path, "run"))
    assert writer.save(bind(model, "net"), TrainingIteration(0, 1, 8)).folder.is_dir()
