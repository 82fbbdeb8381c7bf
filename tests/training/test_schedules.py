"""Every schedule of torch and transformers, resumed unchanged, longer, with another rate, and as another class."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, bind
from noether_init_core.errors import StateMismatchError
from noether_init_core.nested import equal
from noether_init_core.training.schedules import is_schedule, recorded_steps, replay

STEPS, AFTER = 37, 20
Make = Callable[[torch.optim.Optimizer, float], Any]


def _lambda(optimizer: torch.optim.Optimizer, longer: float) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step / (20 * longer)))


def _cosine_with_warmup(optimizer: torch.optim.Optimizer, longer: float) -> Any:
    """A schedule as transformers builds them: a LambdaLR over a partial function."""

    def rate(step: int, warmup: int, total: int) -> float:
        if step < warmup:
            return step / warmup
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))

    return lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, 10, int(80 * longer)))


#: Name of a class -> schedules of it; ``longer`` stretches them.
TABLE: dict[str, Make] = {
    "LambdaLR": _lambda,
    "MultiplicativeLR": lambda o, longer: lr_scheduler.MultiplicativeLR(o, lambda step: 1 - 0.05 / longer),
    "StepLR": lambda o, longer: lr_scheduler.StepLR(o, int(7 * longer)),
    "MultiStepLR": lambda o, longer: lr_scheduler.MultiStepLR(o, [5, 20, 20, int(40 * longer)]),
    "ConstantLR": lambda o, longer: lr_scheduler.ConstantLR(o, 0.3, int(40 * longer)),
    "LinearLR": lambda o, longer: lr_scheduler.LinearLR(o, 0.1, 1.0, int(45 * longer)),
    "ExponentialLR": lambda o, longer: lr_scheduler.ExponentialLR(o, 1 - 0.03 / longer),
    "SequentialLR": lambda o, longer: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 10), lr_scheduler.CosineAnnealingLR(o, int(60 * longer))], [10]
    ),
    "CosineAnnealingLR": lambda o, longer: lr_scheduler.CosineAnnealingLR(o, int(60 * longer)),
    "ChainedScheduler": lambda o, longer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 10), lr_scheduler.ExponentialLR(o, 1 - 0.03 / longer)], optimizer=o
    ),
    "CyclicLR": lambda o, longer: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=int(10 * longer)),
    "CosineAnnealingWarmRestarts": lambda o, longer: lr_scheduler.CosineAnnealingWarmRestarts(o, int(10 * longer), 2),
    "OneCycleLR": lambda o, longer: lr_scheduler.OneCycleLR(o, 0.1, total_steps=int(70 * longer)),
    "PolynomialLR": lambda o, longer: lr_scheduler.PolynomialLR(o, int(60 * longer), 2.0),
    "SWALR": lambda o, longer: SWALR(o, 0.05, anneal_epochs=int(50 * longer)),
    "warmup and cosine": _cosine_with_warmup,
}
#: Classes whose single settings can be taken from the script, and the setting that ``longer`` changes.
SETTINGS = {
    "StepLR": "step_size",
    "MultiStepLR": "milestones",
    "ConstantLR": "total_iters",
    "LinearLR": "total_iters",
    "ExponentialLR": "gamma",
    "CosineAnnealingLR": "T_max",
    "CosineAnnealingWarmRestarts": "T_0",
    "PolynomialLR": "total_iters",
}
OPTIMIZERS = ["adamw", "adamw with tensors", "sgd"]


def test_the_table_has_every_schedule_of_torch() -> None:
    """A class that a later torch adds must be tried."""
    of_torch = {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}
    assert of_torch - {"ReduceLROnPlateau"} == TABLE.keys() - {"warmup and cosine"}


@attrs.define(eq=False)
class Run:
    """A module with two groups, an optimizer and a schedule."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any

    @classmethod
    def of(cls, make: Make, longer: float, *, rate: float = 0.1, optimizer: str = "adamw") -> Run:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
        rates: list[Any] = [rate, rate / 2]
        if "tensors" in optimizer:
            rates = [torch.tensor(one, dtype=torch.float64) for one in rates]
        groups = [{"params": part.parameters(), "lr": one} for part, one in zip(module, rates, strict=True)]
        if optimizer == "sgd":
            made: torch.optim.Optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
        else:
            made = torch.optim.AdamW(groups, lr=rate)
        return cls(module, made, make(made, longer))

    def train(self, steps: int) -> list[Any]:
        """The rates and momentums of each update."""
        found = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.module(torch.ones(1, 2)).square().sum().backward()
            self.optimizer.step()
            try:
                self.schedule.step()
            except ValueError:  # a OneCycleLR that is over
                break
            found.append(copy.deepcopy([self.values(group) for group in self.optimizer.param_groups]))
        return found

    @staticmethod
    def values(group: dict[str, Any]) -> dict[str, Any]:
        return {key: group[key] for key in ("lr", "betas", "momentum") if key in group}


def saved(run: Run, paths: PathProvider) -> None:
    """Train ``run`` and save it."""
    state = TrainerState(schedule=run.schedule)
    run.train(STEPS)
    for _ in range(STEPS):
        state.advance(samples=1)
    CheckpointWriter(paths).save(bind(run.module, "net", run.optimizer), trainer=state)


def resumed(run: Run, paths: PathProvider, **restore: Any) -> Run:
    """Resume into ``run``."""
    config = {"kind": "resume", "restore": restore} if restore else {"kind": "resume"}
    stack = InitializerStack.from_config([config], path_provider=paths)
    stack.initialize(bind(run.module, "net", run.optimizer), trainer=TrainerState(schedule=run.schedule))
    return run


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", TABLE)
def test_a_resumed_schedule_goes_on(name: str, optimizer: str, paths: PathProvider) -> None:
    """The whole checkpoint: the next rates are those of the run that was not interrupted."""
    through = Run.of(TABLE[name], 1, optimizer=optimizer)
    saved(Run.of(TABLE[name], 1, optimizer=optimizer), paths)
    through.train(STEPS)
    again = resumed(Run.of(TABLE[name], 1, optimizer=optimizer), paths)
    assert equal(again.train(AFTER), through.train(AFTER))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("longer", "rate"), [(1.5, 0.1), (1.0, 0.04), (1.5, 0.04)])
@pytest.mark.parametrize("name", TABLE)
def test_the_schedule_of_the_script_is_replayed(
    name: str, longer: float, rate: float, optimizer: str, paths: PathProvider
) -> None:
    """A longer run and another rate: the next rates are those of a run that had this schedule from its start."""
    saved(Run.of(TABLE[name], 1, optimizer=optimizer), paths)
    reference = Run.of(TABLE[name], longer, rate=rate, optimizer=optimizer)
    held = [group["lr"] for group in reference.optimizer.param_groups]
    reference.train(STEPS)
    again = resumed(Run.of(TABLE[name], longer, rate=rate, optimizer=optimizer), paths, schedule="config")
    now = [group["lr"] for group in again.optimizer.param_groups]
    assert equal(now, [group["lr"] for group in reference.optimizer.param_groups])
    assert equal(again.train(AFTER), reference.train(AFTER))
    assert len(held) == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", TABLE)
def test_another_class_is_replayed_or_refused(name: str, optimizer: str, paths: PathProvider) -> None:
    """From each class to a cosine; a cycled momentum is refused until the config says whose it is."""
    saved(Run.of(TABLE[name], 1, optimizer=optimizer), paths)
    cosine: Make = lambda o, longer: lr_scheduler.CosineAnnealingLR(o, 80)  # noqa: E731  # as in the table
    reference = Run.of(cosine, 1, optimizer=optimizer)
    reference.train(STEPS)
    if name != "CosineAnnealingLR":
        with pytest.raises(StateMismatchError, match=re.escape("Next: restore: {schedule: config}")):
            resumed(Run.of(cosine, 1, optimizer=optimizer), paths)
    choice: dict[str, Any] = {"schedule": "config"}
    if name in ("OneCycleLR", "CyclicLR"):
        field = "momentum" if optimizer == "sgd" else "betas"
        with pytest.raises(StateMismatchError, match=f"{field}: config"):
            resumed(Run.of(cosine, 1, optimizer=optimizer), paths, **choice)
        choice["optimizer"] = {field: "config"}
    again = resumed(Run.of(cosine, 1, optimizer=optimizer), paths, **choice)
    assert equal(again.train(AFTER), reference.train(AFTER))


@pytest.mark.parametrize("name", TABLE)
def test_one_setting_is_taken_or_refused(name: str, paths: PathProvider) -> None:
    """With the rate of the checkpoint, and with the script's; a class that cannot be rebuilt is refused by name."""
    saved(Run.of(TABLE[name], 1), paths)
    setting = SETTINGS.get(name)
    if setting is None:
        kind = type(Run.of(TABLE[name], 1).schedule)
        first = next(one for one in list(inspect.signature(kind).parameters)[1:] if one != "last_epoch")
        with pytest.raises(StateMismatchError, match="schedule: config"):
            resumed(Run.of(TABLE[name], 1.5), paths, schedule={first: "config"})
        return
    for rate, choice in ((0.1, {}), (0.04, {"optimizer": {"lr": "config"}})):
        reference = Run.of(TABLE[name], 1.5, rate=rate)
        reference.train(STEPS)
        again = resumed(Run.of(TABLE[name], 1.5, rate=0.04), paths, schedule={setting: "config"}, **choice)
        assert equal(again.train(AFTER), reference.train(AFTER))


@pytest.mark.parametrize("name", TABLE)
def test_a_kept_rate_is_not_undone(name: str, paths: PathProvider) -> None:
    """A rate of the script below a restored schedule is refused, with the line that holds; that line loads."""
    saved(Run.of(TABLE[name], 1), paths)
    with pytest.raises(
        StateMismatchError, match=re.escape("Next: restore: {optimizer: {lr: config}, schedule: config}")
    ):
        resumed(Run.of(TABLE[name], 1, rate=0.02), paths, optimizer={"lr": "config"})
    reference = Run.of(TABLE[name], 1, rate=0.02)
    reference.train(STEPS)
    again = resumed(Run.of(TABLE[name], 1, rate=0.02), paths, optimizer={"lr": "config"}, schedule="config")
    assert equal(again.train(AFTER), reference.train(AFTER))


@pytest.mark.parametrize("name", TABLE)
def test_a_skipped_schedule_begins_anew(name: str, paths: PathProvider) -> None:
    """The rates of a new run, whatever rates the groups of the checkpoint had."""
    saved(Run.of(TABLE[name], 1), paths)
    again = resumed(Run.of(TABLE[name], 1), paths, schedule="skip")
    assert equal(again.train(AFTER), Run.of(TABLE[name], 1).train(AFTER))


def test_a_tensor_of_the_rate_keeps_its_identity(paths: PathProvider) -> None:
    """A captured graph reads the rate from that tensor."""
    saved(Run.of(TABLE["StepLR"], 1, optimizer="adamw with tensors"), paths)
    again = Run.of(TABLE["StepLR"], 2, optimizer="adamw with tensors")
    held = [group["lr"] for group in again.optimizer.param_groups]
    resumed(again, paths, schedule="config")
    assert all(group["lr"] is one for group, one in zip(again.optimizer.param_groups, held, strict=True))


def test_what_takes_a_metric_cannot_be_replayed(paths: PathProvider) -> None:
    """The start is refused with the reason, and nothing is changed."""
    run = Run.of(lambda o, longer: lr_scheduler.ReduceLROnPlateau(o), 1)
    state = TrainerState(schedule=run.schedule)
    run.schedule.step(1.0)
    state.advance(samples=1)
    CheckpointWriter(paths).save(bind(run.module, "net", run.optimizer), trainer=state)
    again = Run.of(lambda o, longer: lr_scheduler.ReduceLROnPlateau(o, factor=0.5), 1)
    before = copy.deepcopy(again.schedule.state_dict())
    with pytest.raises(StateMismatchError, match="metric"):
        resumed(again, paths, schedule="config")
    assert equal(again.schedule.state_dict(), before)
    assert resumed(again, paths).schedule.factor == 0.1


def test_steps_by_fractions_cannot_be_replayed(paths: PathProvider) -> None:
    """Warm restarts that were stepped within an epoch."""
    make = TABLE["CosineAnnealingWarmRestarts"]
    run = Run.of(make, 1)
    state = TrainerState(schedule=run.schedule)
    run.schedule.step(2.25)
    state.advance(samples=1)
    CheckpointWriter(paths).save(bind(run.module, "net", run.optimizer), trainer=state)
    with pytest.raises(StateMismatchError, match="fractions"):
        resumed(Run.of(make, 1), paths, schedule="config")


def test_a_schedule_that_is_too_short_is_refused(paths: PathProvider) -> None:
    """A OneCycleLR of fewer steps than the saved run made."""
    saved(Run.of(TABLE["OneCycleLR"], 1), paths)
    again = Run.of(TABLE["OneCycleLR"], 0.4)
    before = copy.deepcopy((again.schedule.state_dict(), [again.values(one) for one in again.optimizer.param_groups]))
    with pytest.raises(StateMismatchError, match=f"fails at step 29 of the {STEPS} steps of the saved run"):
        resumed(again, paths, schedule="config")
    after = again.schedule.state_dict(), [again.values(one) for one in again.optimizer.param_groups]
    assert equal(after, before)


@pytest.mark.parametrize("name", TABLE)
def test_a_replay_changes_nothing(name: str) -> None:
    """Neither the schedule nor the groups, tensors among them."""
    run = Run.of(TABLE[name], 1, optimizer="adamw with tensors")

    def look() -> Any:
        groups = [{key: value for key, value in one.items() if key != "params"} for one in run.optimizer.param_groups]
        return copy.deepcopy((run.schedule.state_dict(), groups))

    before = look()
    found = replay(run.schedule, 5, "schedule")
    assert equal(look(), before)
    assert recorded_steps(found.state) == 5
    assert is_schedule(run.schedule)
