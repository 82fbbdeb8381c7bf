"""What a resume takes from a checkpoint, piece by piece; each advised line is pasted into the config."""

from __future__ import annotations

import copy
import functools
import logging
import random
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy
import pydantic
import pytest
import torch
import yaml
from support.advice import executes, saw
from torch.optim import lr_scheduler

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, TrainingIteration, bind
from noether_init_core.builtin.previous_run import PreviousRunInitializerConfig
from noether_init_core.builtin.resume import ResumeInitializerConfig
from noether_init_core.errors import InitError, StateMismatchError
from noether_init_core.nested import equal


@attrs.define(eq=False)
class Holder:
    """A stateful object."""

    value: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


class Callback(Holder):
    """A callback with a key of its own."""

    def __init__(self, key: str, value: float = 0.0) -> None:
        super().__init__(value)
        self.checkpoint_key = key


@attrs.define(eq=False)
class Loop:
    """A model with its optimizer and the state of a training loop."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    state: TrainerState
    loader: Any = None

    @classmethod
    def of(
        cls,
        *,
        rate: float = 0.1,
        seed: int | None = None,
        samples: int = 0,
        batch_size: int = 4,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        **stateful: Callable[[torch.optim.Optimizer], Any],
    ) -> Loop:
        module = torch.nn.Linear(2, 2)
        made = optimizer(module.parameters(), lr=rate)
        state = TrainerState(seed=seed, **{name: make(made) for name, make in stateful.items()})
        loop = cls(module, made, state)
        if samples:
            loop.loader = state.loader(list(range(samples)), batch_size)
        return loop

    @property
    def schedules(self) -> list[Any]:
        return [one for one in self.state._members.named.values() if hasattr(one, "step")]

    @property
    def rate(self) -> Any:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def model(self) -> Any:
        return bind(self.module, "net", self.optimizer)

    def train(self, updates: int, *schedules: Any) -> Loop:
        """Make updates, and a step of each schedule."""
        batches = iter(self.loader) if self.loader is not None else None
        for _ in range(updates):
            self.optimizer.zero_grad()
            self.module(torch.ones(1, 2)).sum().backward()
            self.optimizer.step()
            for schedule in schedules:
                schedule.step()
            if batches is None:
                self.state.advance(samples=1)
            else:
                next(batches)
                self.state.advance()
        return self

    def save(self, paths: PathProvider) -> None:
        CheckpointWriter(paths).save(self.model, trainer=self.state)

    def resume(self, paths: PathProvider, given: list[Any] | None = None, **restore: Any) -> Loop:
        config = {"kind": "resume", **({"restore": restore} if restore else {})}
        stack = InitializerStack.from_config([config], path_provider=paths)
        stack.initialize(self.model, trainer=self.state, callbacks=given)
        return self


def step_of(gamma: float = 0.5, size: int = 3) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda optimizer: lr_scheduler.StepLR(optimizer, size, gamma)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, 20)


def alone(make: Callable[[torch.optim.Optimizer], Any]) -> Callable[[torch.optim.Optimizer], Any]:
    """A schedule of an optimizer of its own, that no model has."""

    def made(_: torch.optim.Optimizer) -> Any:
        schedule = make(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
        schedule.optimizer.step()  # torch asks for that before the schedule's first step
        return schedule

    return made


def advised(start: Callable[[], Any], mark: str = "Next[^:]*: ") -> dict[str, Any]:
    """The pieces of the line that a refused start advises."""
    with pytest.raises(InitError) as caught:
        start()
    found = re.search(rf"{mark}.*?(restore: \{{.*\}})", str(caught.value))
    assert found is not None, str(caught.value)
    line: dict[str, Any] = yaml.safe_load(found[1])
    return dict(line["restore"])


def saved_with(paths: PathProvider, **stateful: Any) -> Loop:
    loop = Loop.of(**stateful)
    loop.train(5, *loop.schedules).save(paths)
    return loop


@executes("training/members.py", "Next: {}")
def test_another_class_and_a_kept_rate_lead_to_the_schedule_of_the_script(paths: PathProvider) -> None:
    """The line of each refusal starts the run, with the rates of the script."""
    saved_with(paths, schedule=step_of())
    other = Loop.of(schedule=cosine)
    pieces = advised(lambda: other.resume(paths))
    assert pieces == {"schedule": "config"}
    expected = Loop.of(schedule=cosine)
    expected.train(5, expected.state._members.named["schedule"])
    assert other.resume(paths, **pieces).optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"]

    slower = Loop.of(rate=0.01, schedule=step_of())
    pieces = advised(lambda: slower.resume(paths, optimizer={"lr": "config"}))
    assert pieces == {"optimizer": {"lr": "config"}, "schedule": "config"}
    assert slower.resume(paths, **pieces).optimizer.param_groups[0]["lr"] == 0.005


def test_the_lines_name_one_of_several_schedules(paths: PathProvider) -> None:
    """``schedule`` is for the only one; beside others each has its name."""
    saved_with(paths, first=step_of(), second=alone(step_of(0.9)))
    other = Loop.of(first=step_of(), second=alone(cosine))
    pieces = advised(lambda: other.resume(paths))
    assert pieces == {"schedules": {"second": "config"}}
    other.resume(paths, **pieces)


@executes("training/members.py", "Next: TrainerState(..., schedule=...)")
def test_schedule_is_for_one_schedule(paths: PathProvider) -> None:
    """With two, the line has their names; with none, it is to be passed."""
    saved_with(paths, first=step_of(), second=alone(step_of(0.9)))
    other = Loop.of(first=step_of(), second=alone(step_of(0.9)))
    pieces = advised(lambda: other.resume(paths, schedule="config"))
    assert pieces == {"schedules": {"first": "config", "second": "config"}}
    other.resume(paths, **pieces)

    bare = PathProvider(paths.output_root, "bare")
    saved_with(bare)
    with pytest.raises(StateMismatchError, match=re.escape("Next: TrainerState(..., schedule=...)")):
        Loop.of().resume(bare, schedule="config")
    with pytest.raises(StateMismatchError, match="no state of schedule"):
        Loop.of(schedule=cosine).resume(bare)
    Loop.of(schedule=cosine).resume(bare, schedule={"steps": 5})


@executes("training/members.py", "Next, to begin without it: {}", "Next: TrainerState(..., {}), or {}")
def test_objects_come_and_go(paths: PathProvider) -> None:
    """A new object begins anew; the state of one that is gone is left. Schedules too."""
    saved_with(paths, gone=lambda _: Holder(3.0), old=step_of())
    new = Loop.of(gone=lambda _: Holder(), old=step_of(), more=lambda _: Holder(7.0), schedule=alone(cosine))
    pieces = advised(lambda: new.resume(paths))
    assert pieces == {"stateful": {"more": "skip"}, "schedules": {"schedule": "skip"}}
    new.resume(paths, **pieces)
    assert (new.state._members.named["gone"].value, new.state._members.named["more"].value) == (3.0, 7.0)

    less = Loop.of()
    pieces = advised(lambda: less.resume(paths))
    assert pieces == {"stateful": {"gone": "skip", "old": "skip"}}
    less.resume(paths, **pieces)
    with pytest.raises(StateMismatchError) as caught:
        Loop.of().resume(paths)
    call = re.search(r"Next: (TrainerState\(.*?\)),", str(caught.value))
    assert call is not None
    assert call[1] == "TrainerState(..., gone=..., old=...)"
    Loop.of(gone=lambda _: Holder(), old=step_of()).resume(paths)


def test_misspelt_names_are_refused(paths: PathProvider) -> None:
    """A name that is in neither would choose nothing."""
    saved_with(paths, ema=lambda _: Holder(3.0))
    with pytest.raises(StateMismatchError, match="restore: stateful: emma is not in this TrainerState; near: ema"):
        Loop.of(ema=lambda _: Holder()).resume(paths, stateful={"emma": "skip"})
    with pytest.raises(StateMismatchError, match="restore: schedules: ema is not in this TrainerState; it has none"):
        Loop.of(ema=lambda _: Holder()).resume(paths, schedules={"ema": "config"})


@executes("training/members.py", "Next, with the right number: {}")
def test_steps_that_are_not_recorded_are_said(paths: PathProvider) -> None:
    """A schedule of the user that does not count; the number is put in."""

    class Uncounted(lr_scheduler.StepLR):
        def state_dict(self) -> dict[str, Any]:
            return {"last_epoch": self.last_epoch}

    saved_with(paths, schedule=lambda optimizer: Uncounted(optimizer, 3))
    again = Loop.of(schedule=lambda optimizer: Uncounted(optimizer, 2))
    pieces = advised(lambda: again.resume(paths, schedule="config"))
    assert pieces == {"schedule": {"steps": 1000}}
    again.resume(paths, schedule={"steps": 5})
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@executes(
    "training/schedules.py", "Next: {}", "Next: build it without last_epoch, and initialize before its first step"
)
def test_what_cannot_be_built_or_was_stepped_is_replayed_whole_and_fresh(paths: PathProvider) -> None:
    """A single setting of a OneCycleLR; a schedule that was stepped before the start."""

    def cycle(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)

    saved_with(paths, schedule=cycle)
    again = Loop.of(schedule=cycle)
    pieces = advised(lambda: again.resume(paths, schedule={"total_steps": "config"}))
    assert pieces == {"schedule": "config"}
    again.resume(paths, **pieces)

    def later(optimizer: torch.optim.Optimizer) -> Any:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return lr_scheduler.CosineAnnealingLR(optimizer, 20, last_epoch=4)

    early, moved, built = Loop.of(schedule=cosine), Loop.of(schedule=cosine), Loop.of(schedule=later)
    early.optimizer.step()
    early.state._members.named["schedule"].step()
    moved.optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        moved.state._members.named["schedule"].step(3)
    for loop, place in ((early, 1), (moved, 3), (built, 5)):
        with pytest.raises(StateMismatchError, match=f"is at step {place} .*Next: build it without last_epoch, and in"):
            loop.resume(paths, schedule="config")
    fresh = Loop.of(schedule=cosine)
    rates = fresh.resume(paths, schedule="config", optimizer={"betas": "config"}).optimizer.param_groups[0]["lr"]
    through = Loop.of(schedule=cosine)
    assert rates == through.train(5, *through.schedules).optimizer.param_groups[0]["lr"]


@executes("training/members.py", "Next: TrainerState(..., schedule=ChainedScheduler([{}])), and {}")
def test_schedules_of_one_optimizer_are_replayed_as_one(paths: PathProvider) -> None:
    """Each goes on from the rate that the other has set, so that a replay of one alone gives neither's rates."""
    short: dict[str, Any] = {"warm": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 10), "decay": step_of(0.5, 2)}
    longer: dict[str, Any] = {**short, "decay": step_of(0.5, 4)}
    saved_with(paths, **short)
    assert Loop.of(**short).resume(paths).rate == saved_with(PathProvider(paths.output_root, "same"), **short).rate

    other = Loop.of(**longer)
    before = other.rate
    for choices in ({"warm": "config", "decay": "config"}, {"decay": "config"}, {"decay": "skip"}):
        pieces = advised(functools.partial(other.resume, paths, schedules=choices))
        assert pieces == {"schedule": {"steps": 5}, "stateful": {"warm": "skip", "decay": "skip"}}
        assert other.rate == before

    def chained(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.ChainedScheduler([make(optimizer) for make in longer.values()], optimizer=optimizer)

    through = Loop.of(**longer)
    assert Loop.of(schedule=chained).resume(paths, **pieces).rate == through.train(5, *through.schedules).rate
    assert Loop.of(**longer).resume(paths, schedules=dict.fromkeys(longer, "skip")).rate == before


@executes("training/members.py", "Next: bind(module, optimizer=...), without restore: {optimizer: skip}")
@pytest.mark.parametrize("way", ["skipped", "unbound"])
def test_a_restored_schedule_has_its_rate_without_the_optimizer(way: str, paths: PathProvider) -> None:
    """The next rate is computed from that of the group, which nobody else sets then."""
    saved = saved_with(paths, schedule=cosine)

    def start(loop: Loop) -> Loop:
        model = loop.model if way == "skipped" else bind(loop.module, "net")
        config = {"kind": "resume", "restore": {"optimizer": "skip"}} if way == "skipped" else {"kind": "resume"}
        InitializerStack.from_config([config], path_provider=paths).initialize(model, trainer=loop.state)
        return loop

    again = start(Loop.of(rate=0.3, schedule=cosine))
    assert again.rate == saved.rate
    for loop in (saved, again):
        loop.train(3, *loop.schedules)
    assert again.rate == saved.rate

    paths = PathProvider(paths.output_root, "two")
    saved = saved_with(paths, warm=lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 10), decay=step_of(0.5, 1))
    again = Loop.of(warm=lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 10), decay=step_of(0.5, 1))
    before = copy.deepcopy(again.state.state_dict()["trainer_state"]["stateful"])
    with pytest.raises(InitError, match=re.escape("Next: bind(module, optimizer=...), without restore: {optimizer: ")):
        start(again)
    assert equal(again.state.state_dict()["trainer_state"]["stateful"], before)
    assert again.resume(paths).rate == saved.rate


@executes("training/members.py", "Next: {}")
@pytest.mark.parametrize("make", [cosine, lambda o: lr_scheduler.SequentialLR(o, [cosine(o), step_of()(o)], [3])])
def test_a_schedule_has_a_rate_for_each_group(make: Any, paths: PathProvider) -> None:
    """Of groups beyond those of the saved run, no step would set the rate."""
    saved_with(paths, schedule=make)

    def split() -> Loop:
        loop = Loop.of()
        groups = [{"params": [one]} for one in loop.module.parameters()]
        loop.optimizer = torch.optim.AdamW(groups, lr=0.1)
        loop.state = TrainerState(schedule=make(loop.optimizer))
        return loop

    loop = split()
    pieces = advised(functools.partial(loop.resume, paths))
    assert pieces == {"schedule": "config"}
    loop.resume(paths, **pieces)
    through = Loop.of(schedule=make)
    for one in (loop, through.train(5, *through.schedules)):
        one.train(2, *one.schedules)
    assert [group["lr"] for group in loop.optimizer.param_groups] == [through.rate] * 2


def test_another_number_of_steps_than_recorded_is_said(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """The config's number is used, and the line takes that of the checkpoint."""
    saved = saved_with(paths, schedule=cosine)
    third = Loop.of(schedule=cosine)
    third.train(3, *third.schedules)
    assert Loop.of(schedule=cosine).resume(paths, schedule={"steps": 3}).rate == third.rate
    said = "schedule.steps: 5 in the checkpoint, 3 now; config is used. Next, to change that: restore: {schedule: conf"
    assert said in caplog.text
    caplog.clear()
    assert Loop.of(schedule=cosine).resume(paths, schedule={"steps": 5}).rate == saved.rate
    assert "schedule.steps" not in caplog.text


@executes("surgery/optimizer_fields.py", "Next: {}")
def test_a_cycled_momentum_goes_back_to_that_of_the_script(paths: PathProvider) -> None:
    """OneCycleLR cycles betas; a cosine does not set them, so that the cycled ones would stay."""
    saved_with(paths, schedule=lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40))
    again = Loop.of(schedule=cosine)
    pieces = advised(lambda: again.resume(paths, schedule="config"))
    assert pieces == {"optimizer": {"betas": "config"}, "schedule": "config"}
    assert again.resume(paths, **pieces).optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_differences_are_warned_of_before_the_start(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint's settings are used by default; the log says so, with the line for the others."""
    saved_with(paths, schedule=step_of())
    Loop.of(schedule=step_of(size=4)).resume(paths)
    said = [record.getMessage() for record in caplog.records if "schedule.step_size" in record.getMessage()]
    assert len(said) == 1
    assert "schedule.step_size: 3 in the checkpoint, 4 now; checkpoint is used" in said[0]
    assert "restore: {schedule: config}" in said[0]


@executes("restore.py", "Next, to change that: {}")
def test_a_difference_is_changed_by_its_line(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """The setting of the script then holds, and nothing is reported."""
    saved_with(paths, schedule=step_of())
    Loop.of(schedule=step_of(size=4)).resume(paths)
    found = re.search(r"Next, to change that: (restore: .*)", saw(caplog.text))
    assert found is not None
    caplog.clear()
    again = Loop.of(schedule=step_of(size=4)).resume(paths, **yaml.safe_load(found[1])["restore"])
    assert again.state._members.named["schedule"].step_size == 4
    assert "schedule.step_size" not in caplog.text


def first_of(loop: Loop) -> list[int]:
    """The samples of the next batch."""
    return list(next(iter(loop.loader)).tolist())


def test_data_and_generators_are_left(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """The epoch begins anew in the order of the script; generators go on as they are; no warning asks for them."""
    Loop.of(seed=1, samples=40).train(3).save(paths)
    whole = Loop.of(seed=1, samples=40).resume(paths)
    assert (whole.state.update, len(whole.loader)) == (3, 7)

    again = Loop.of(seed=2, samples=40)
    drawn = torch.get_rng_state(), random.getstate(), numpy.random.get_state(legacy=False)
    again.resume(paths, data="skip", rng="skip")
    assert equal(drawn[0], torch.get_rng_state())
    assert drawn[1] == random.getstate()
    assert numpy.array_equal(drawn[2]["state"]["key"], numpy.random.get_state(legacy=False)["state"]["key"])
    assert (again.state.seed, again.state.update, again.state.epoch) == (2, 3, 0)
    assert first_of(again) == first_of(Loop.of(seed=2, samples=40))
    assert "random generators" not in caplog.text


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ({}, "trainer: ema, schedule"),
        ({"optimizer": {"eps": "config"}}, "trainer: ema, schedule"),
        ({"schedule": "config"}, "trainer: ema, schedule, with restore: {schedule: config}"),
        ({"stateful": {"ema": "skip"}}, "trainer: schedule, with restore: {stateful: {ema: skip}}"),
    ],
)
def test_the_report_tells_whose_pieces_were_taken(pieces: dict[str, Any], told: str, paths: PathProvider) -> None:
    """A schedule of the script is not reported like one that was restored."""
    saved_with(paths, ema=lambda _: Holder(3.0), schedule=cosine)
    loop = Loop.of(ema=lambda _: Holder(), schedule=cosine)
    stack = InitializerStack.from_config([{"kind": "resume", "restore": pieces}], path_provider=paths)
    assert told in stack.initialize(loop.model, trainer=loop.state).initializers[0].restored


@pytest.mark.parametrize("iteration", ["checkpoint", "zero"])
def test_a_new_order_of_the_data_keeps_what_follows_an_epoch(iteration: str, paths: PathProvider) -> None:
    """Killed at the last step of an epoch: the code behind the loop runs, then the next epoch in the new order."""
    saved = Loop.of(seed=1, samples=20)
    for _ in saved.loader:
        saved.state.advance()
        if saved.state.update == 5:
            saved.save(paths)
    again = Loop.of(seed=2, samples=20).resume(paths, data="skip", iteration=iteration)
    if iteration == "checkpoint":
        assert again.state.epoch == 0
        assert [*again.loader] == []
    assert again.state.epoch == (1 if iteration == "checkpoint" else 0)
    order = again.loader.layout.indices(2, again.state.epoch)
    assert next(iter(again.loader)).tolist() == order[:4].tolist()


@executes("training/state.py", "Next, to begin the epoch anew: {}")
def test_another_seed_leads_to_a_new_epoch(paths: PathProvider) -> None:
    """The line of the refusal starts with the seed of the script."""
    Loop.of(seed=1, samples=40).train(3).save(paths)
    again = Loop.of(seed=2, samples=36)
    pieces = advised(lambda: again.resume(paths))
    assert pieces == {"data": "skip"}
    assert again.resume(paths, **pieces).state.seed == 2


@executes("config/restore.py", "Next: {}")
def test_the_iteration_is_zero(paths: PathProvider) -> None:
    """Everything else is restored; data of an epoch would contradict it, and the line says how."""
    saved = Loop.of(seed=1, samples=40).train(3)
    saved.save(paths)
    again = Loop.of(seed=1, samples=40)
    pieces = advised(lambda: again.resume(paths, iteration="zero"))
    assert pieces == {"iteration": "zero", "data": "skip"}
    stack = InitializerStack.from_config([{"kind": "resume", "restore": pieces}], path_provider=paths)
    assert stack.start_checkpoint() == TrainingIteration.zero()
    report = stack.initialize(again.model, trainer=again.state)
    assert report.start == again.state.iteration == TrainingIteration.zero()
    assert equal(again.module.weight, saved.module.weight)


def test_the_scaler_is_left(paths: PathProvider) -> None:
    """Its scale is that of the script."""

    def scaler(_: Any, scale: float = 8.0) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=scale)

    Loop.of(grad_scaler=scaler).train(5).save(paths)

    def started(**restore: Any) -> Any:
        loop = Loop.of(grad_scaler=lambda _: scaler(_, 2.0)).resume(paths, **restore)
        return loop.state._members.named["grad_scaler"].state_dict()["scale"]

    assert (started(), started(scaler="skip")) == (8.0, 2.0)


def test_callbacks_are_left_by_key(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """One, or all; nothing is reported as lacking."""
    loop = Loop.of().train(2)
    state = loop.state.state_dict()
    state["callback_state_dicts"] = {"a": {"value": 1.0}, "b": {"value": 2.0}}

    class Trainer:
        iteration = loop.state.iteration

        def state_dict(self) -> dict[str, Any]:
            return state

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            """Takes nothing."""

    CheckpointWriter(paths).save(loop.model, loop.state.iteration, trainer=Trainer())
    for callbacks, expected in (
        ("checkpoint", (1.0, 2.0)),
        ("skip", (0.0, 0.0)),
        ({"a": "skip"}, (0.0, 2.0)),
        ({"b": "checkpoint"}, (1.0, 2.0)),
    ):
        both = [Callback("a"), Callback("b")]
        Loop.of().resume(paths, both, callbacks=callbacks)
        assert tuple(one.value for one in both) == expected


@executes("builtin/resume.py", "Next: trainer=TrainerState(...), or choose only optimizer and callbacks")
def test_a_trainer_that_takes_its_state_as_a_whole_is_refused_pieces(paths: PathProvider) -> None:
    """Its load_state_dict has no argument for them; nothing would be left out."""
    saved_with(paths, schedule=step_of())

    class Whole(Holder):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.value = 1.0

    loop, trainer = Loop.of(schedule=step_of()), Whole()

    def start(**restore: Any) -> None:
        stack = InitializerStack.from_config([{"kind": "resume", "restore": restore}], path_provider=paths)
        stack.initialize(loop.model, trainer=trainer)

    with pytest.raises(StateMismatchError, match="has no argument restore"):
        start(schedule="config")
    assert trainer.value == 0.0
    start(optimizer={"weight_decay": "config"})
    assert trainer.value == 1.0
    loop.resume(paths, schedule="config")


def test_the_optimizer_is_left_or_takes_fields(paths: PathProvider) -> None:
    """``optimizer: skip`` equals ``load_optim: false``; a field is that of the script."""
    saved_with(paths)
    again = Loop.of(optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.5))
    again.resume(paths, optimizer={"weight_decay": "config"})
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert len(again.optimizer.state) == 2
    left = Loop.of(rate=0.7).resume(paths, optimizer="skip")
    assert not left.optimizer.state
    assert left.optimizer.param_groups[0]["lr"] == 0.7


@executes("config/source.py", "Next: leave one of them out")
def test_optimizer_and_load_optim_do_not_contradict() -> None:
    """Each alone is a config."""
    both: dict[str, Any] = {"load_optim": True, "restore": {"optimizer": "skip"}}
    with pytest.raises(pydantic.ValidationError) as caught:
        ResumeInitializerConfig(**both)
    assert "Next: leave one of them out" in saw(str(caught.value))
    for name in both:
        ResumeInitializerConfig(**{name: both[name]})
    with pytest.raises(pydantic.ValidationError, match="Next: load_optim: true, or remove restore"):
        PreviousRunInitializerConfig(run_id="a", restore={"optimizer": {"lr": "config"}})
    with pytest.raises(pydantic.ValidationError, match="Extra inputs are not permitted"):
        PreviousRunInitializerConfig(run_id="a", load_optim=True, restore={"schedule": "config"})


@pytest.mark.parametrize(
    ("restore", "said"),
    [
        ({"schedule": {"T_max": 5}}, "T_max: write config"),
        ({"schedule": {"steps": -1}}, "steps is the number of steps"),
        ({"schedule": {"steps": True}}, "steps is the number of steps"),
        ({"schedule": {}}, "write config for the whole schedule"),
        ({"schedule": "config", "schedules": {"a": "config"}}, "schedule and schedules are both given"),
        ({"schedule": "none"}, "checkpoint"),
        ({"seed": "skip"}, "Extra inputs are not permitted"),
    ],
)
def test_other_choices_are_refused(restore: dict[str, Any], said: str) -> None:
    """Each with what may be written."""
    with pytest.raises(pydantic.ValidationError, match=said):
        ResumeInitializerConfig(restore=restore)


@executes(
    "initializers/optimizer.py",
    "Next: bind(module, optimizer=...), or {}",
    "Next: requires_grad_ before initialize, or {}",
)
def test_state_of_an_optimizer_that_nobody_took_is_told(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """The model has no optimizer, or is frozen at that moment: in the plan, the log and the report."""
    saved_with(paths)

    def start(loop: Loop, model: Any, **restore: Any) -> tuple[list[str], tuple[str, ...]]:
        stack = InitializerStack.from_config([{"kind": "resume", "restore": restore}], path_provider=paths)
        planned = [warning.message for warning in stack.plan(model).warnings]
        return planned, stack.initialize(model, trainer=loop.state).initializers[0].not_restored

    loop = Loop.of()
    planned, left = start(loop, bind(loop.module, "net"))
    assert (
        left
        == tuple(planned)
        == (
            "optimizer state: not loaded, net has no optimizer. Next: bind(module, optimizer="
            "...), or restore: {optimizer: skip}",
        )
    )
    assert saw(left[0]) in caplog.text
    loop.module.requires_grad_(requires_grad=False)
    _planned, left = start(loop, loop.model)
    assert "net is frozen. Next: requires_grad_ before initialize" in saw(left[0])
    assert start(loop, loop.model, optimizer="skip")[1] == ()
    loop.module.requires_grad_()
    assert start(loop, loop.model)[1] == ()
    assert len(loop.optimizer.state) == 2


def test_a_failed_start_leaves_schedules_and_rates(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """A callback raises after everything was loaded but weights: the schedule of the script is where it was."""
    saved_with(paths, schedule=step_of())
    again = Loop.of(rate=0.3, schedule=cosine)

    class Raising(Callback):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            raise RuntimeError("no")

    before = copy.deepcopy(again.state._members.named["schedule"].state_dict())
    caplog.set_level(logging.ERROR)
    again.optimizer.register_load_state_dict_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(InitError):
        again.resume(paths, schedule="config")
    assert equal(again.state._members.named["schedule"].state_dict(), before)
    assert again.optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kind": "resume", "restore": {"shedule": "config"}}, "Near: schedule"),
        ({"kind": "resume", "restore": {"seed": "skip"}}, "restore of resume has: optimizer, schedule"),
        (
            {"kind": "previous_run", "run_id": "a", "load_optim": True, "restore": {"schedule": "config"}},
            "restore of previous_run has: optimizer.",
        ),
    ],
)
def test_an_unknown_piece_is_answered_by_those_that_exist(
    config: dict[str, Any], said: str, paths: PathProvider
) -> None:
    """A near one, or all of this kind."""
    with pytest.raises(InitError, match="unknown key") as caught:
        InitializerStack.from_config([config], path_provider=paths)
    assert said in str(caught.value)
