"""What a save with ``probe=`` advises is done here, in the situation that advises it, and leads on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.advice import digests, executes
from support.following import advised

from noether_init_core import CheckpointWriter, PathProvider, TrainingIteration, bind

ONE, TWO = TrainingIteration(1, 10, 100), TrainingIteration(2, 20, 200)
BATCH = torch.ones(1, 3)


class FullyShardedDataParallel(torch.nn.Linear):
    """Known by its name; its state dict is complete."""


class Changing(torch.nn.Linear):
    """Replaces a part of itself when it runs, which cannot be put back."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.steps = 0

    def forward(self, batch: torch.Tensor) -> Any:
        with torch.no_grad():
            self.weight.add_(1)
        return super().forward(batch)


class Failing(Changing):
    """Changes its weights, and raises."""

    def forward(self, batch: torch.Tensor) -> Any:
        super().forward(batch)
        raise RuntimeError("no room")


class NoCall:
    """A model without ``__call__``."""

    name, device, is_frozen, optimizer = "net", torch.device("cpu"), False, None

    def __init__(self) -> None:
        self.module = torch.nn.Linear(3, 2)
        self.state_dict, self.named_parameters = self.module.state_dict, self.module.named_parameters
        self.load_state_dict = self.module.load_state_dict


class Called(NoCall):
    """With one."""

    def __call__(self, batch: torch.Tensor) -> Any:
        return self.module(batch)


def nan() -> torch.nn.Linear:
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.fill_(torch.nan)
    return module


#: The model and the batch of a save -> the advice, and a model and a batch that it leads to.
CASES: dict[str, tuple[Any, Any, str, Any, Any]] = {
    "sharded": (
        lambda: bind(FullyShardedDataParallel(3, 2), "net"),
        BATCH,
        "save without probe=",
        lambda: bind(FullyShardedDataParallel(3, 2), "net"),
        None,
    ),
    "nan": (
        lambda: bind(nan(), "net"),
        BATCH,
        "check its weights, or save without probe=",
        lambda: bind(torch.nn.Linear(3, 2), "net"),
        BATCH,
    ),
    "batch": (
        lambda: bind(torch.nn.Linear(3, 2), "net"),
        torch.ones(1, 4),
        "pass another probe, or save without probe=",
        lambda: bind(torch.nn.Linear(3, 2), "net"),
        BATCH,
    ),
    "call": (NoCall, BATCH, "define __call__(self, batch), or save without probe=", Called, BATCH),
    "changing": (
        lambda: bind(Changing(), "net"),
        BATCH,
        "build or load it again, and save without probe=",
        lambda: bind(Changing(), "net"),
        None,
    ),
}


@executes("probe/probe.py", "Next: save without probe=", "check its weights", "pass another probe", "define __call__")
@executes("probe/probe.py", "Next: build or load it again, and save without probe=")
@pytest.mark.parametrize("case", CASES)
def test_a_save_without_the_probe_or_with_another_works(paths: PathProvider, case: str) -> None:
    """Nothing was written before; the set from before stays."""
    model, batch, expected, other, another = CASES[case]
    writer = CheckpointWriter(paths)
    writer.save(bind(torch.nn.Linear(3, 2), "net"), ONE)
    before = digests(paths.checkpoint_path / "sets")
    advice = advised(lambda: writer.save(model(), TWO, probe=batch))
    assert advice.removesuffix(". Nothing was written") == expected
    assert digests(paths.checkpoint_path / "sets") == before
    writer.save(other(), TWO, probe=another)
    if "build or load it again" in expected or case in ("nan", "batch", "call"):
        writer.save(other(), TWO)
    assert before.items() < digests(paths.checkpoint_path / "sets").items()


@executes("probe/probe.py", "Next: build or load it again")
def test_a_model_that_was_changed_by_a_failed_run_is_built_again(paths: PathProvider) -> None:
    """The note on the error of the model names it."""
    writer = CheckpointWriter(paths)
    changed = Failing()
    said = advised(lambda: writer.save(bind(changed, "net"), ONE, probe=BATCH))
    assert said == "pass another probe, or save without probe="
    writer.save(bind(Failing(), "net"), ONE)
