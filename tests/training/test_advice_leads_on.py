"""What a ``TrainerState`` and its loader advise is done here, in the situation that advises it, and leads on."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.advice import digests, executes
from support.following import advised
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, bind
from noether_init_core.training import state as state_module


class Numbers(Dataset[int]):
    """The samples 0 to length - 1."""

    def __init__(self, length: int = 8) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """Samples without an index."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class Holder:
    """The smallest stateful object."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def run(expression: str, **names: Any) -> Any:
    """Evaluate a call that an advice has, with names of the program in it."""
    return eval(expression, {"TrainerState": TrainerState, "torch": torch, **names})


@executes("training/loader.py", "Next: use a dataset with __len__ and __getitem__")
@executes("training/loader.py", "Next: set a smaller batch_size, or drop_last=False")
def test_a_dataset_and_batches_are_given_as_advised() -> None:
    """A dataset with both methods, and either of the two arguments."""
    state = TrainerState(seed=0)
    methods = re.findall(r"__\w+__", advised(lambda: state.loader(Stream(), 2)))
    assert methods == ["__len__", "__getitem__"]
    assert all(hasattr(Numbers, method) for method in methods)
    assert advised(lambda: state.loader(Numbers(), 9, drop_last=True)) == "set a smaller batch_size, or drop_last=False"
    assert len(TrainerState(seed=0).loader(Numbers(), 8, drop_last=True)) == 1
    assert len(state.loader(Numbers(), 9, drop_last=False)) == 1


@executes("training/loader.py", "Next: call state.advance() after each optimizer step; if one step needs more")
def test_an_epoch_is_advanced_or_steps_are_longer_than_it() -> None:
    """Either call ends the error; the number of batches is the one that the message has."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(), 4)
    advice = advised(lambda: list(loader))
    first, _, second = advice.partition(", pass their number: ")
    assert first.startswith("call state.advance() after each optimizer step")
    longer = TrainerState(seed=0)
    loader = run(second.replace("...", "dataset, 4"), state=longer, dataset=Numbers())
    batches = 0
    while longer.update == 0:
        for _batch in loader:
            batches += 1
            if batches == 3:
                longer.advance()
                break
    assert longer.update == 1
    state = TrainerState(seed=0)
    for _batch in state.loader(Numbers(), 4):
        run(first.partition("call ")[2].partition(" after")[0], state=state)
    assert state.iteration.to_mapping() == {"epoch": 1, "update": 2, "sample": 8}


@executes("training/loader.py", "Next: start a new for")
def test_a_new_for_goes_on_where_another_ended() -> None:
    """The outdated one is not continued."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(), 2)
    outdated = iter(loader)
    next(outdated)
    state.advance()
    next(iter(loader))
    assert advised(lambda: next(outdated)) == "start a new for"
    assert len(list(loader)) == 3


@executes("training/loader.py", "Next: use a torch.utils.data.DataLoader with a DistributedSampler")
def test_several_ranks_use_the_sampler_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank reads other samples, and the step is counted by its number of samples."""
    state = TrainerState(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_available", lambda: True)
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        advice = advised(lambda: state.loader(Numbers(), 2))
    assert advice == "use a torch.utils.data.DataLoader with a DistributedSampler"
    dataset = Numbers()
    read = []
    for rank in range(2):
        sampler: Any = DistributedSampler(dataset, num_replicas=2, rank=rank)
        read += [int(one) for batch in DataLoader(dataset, 2, sampler=sampler) for one in batch]
    assert sorted(read) == list(range(8))
    state.advance(samples=8)


Pair = collections.namedtuple("Pair", ["first", "second"])


@executes("training/plain_state.py", "Next: give the object such a dict before its state is loaded")
@executes("training/plain_state.py", "Next: give the object such a value before its state is loaded, or save a plain")
@executes("training/plain_state.py", "Next: return numbers, strings, tensors, arrays, and lists or dicts of these in")
def test_an_object_has_a_value_of_the_class_or_saves_a_plain_one() -> None:
    """A defaultdict with a factory of its own, a named tuple, and an object of another class."""
    saved = TrainerState(seed=0, one=Holder(collections.defaultdict(lambda: 7, {"a": 1}))).state_dict()
    assert advised(lambda: TrainerState(seed=0, one=Holder()).load_state_dict(saved)) == (
        "give the object such a dict before its state is loaded"
    )
    holder = Holder(collections.defaultdict(lambda: 7))
    TrainerState(seed=0, one=holder).load_state_dict(saved)
    assert (holder.value["a"], holder.value["b"]) == (1, 7)

    saved = TrainerState(seed=0, one=Holder(Pair(1, 2))).state_dict()
    assert advised(lambda: TrainerState(seed=0, one=Holder()).load_state_dict(saved)) == (
        "give the object such a value before its state is loaded, or save a plain tuple"
    )
    for before, value in ((Pair(0, 0), Pair(1, 2)), (0, (1, 2))):
        saved = TrainerState(seed=0, one=Holder(value)).state_dict()
        holder = Holder(before)
        TrainerState(seed=0, one=holder).load_state_dict(saved)
        assert holder.value == value

    advice = advised(lambda: TrainerState(seed=0, one=Holder(object())).state_dict())
    assert advice.startswith("return numbers, strings, tensors, arrays, and lists or dicts of these")
    values: list[Any] = [1, "b", torch.ones(2), numpy.ones(2), [1.5], {"c": 2}]
    TrainerState(seed=0, one=Holder(values)).state_dict()


@executes("training/randomness.py", "Next: keep the global generator, and pass your own generator to TrainerState as")
def test_a_generator_of_its_own_is_a_stateful_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """The global one is kept, and the draws of the own one go on."""

    class Drawing:
        generator = numpy.random.Generator(numpy.random.PCG64(3))

        def state_dict(self) -> dict[str, Any]:
            return {key: str(value) for key, value in self.generator.bit_generator.state["state"].items()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            found = self.generator.bit_generator.state
            found["state"] = {key: int(value) for key, value in state.items()}
            self.generator.bit_generator.state = found

    with monkeypatch.context() as patch:
        other = {"bit_generator": "PCG64"}
        patch.setattr(numpy.random, "get_state", lambda legacy=True: other)
        advice = advised(lambda: TrainerState(seed=0).state_dict())
    assert advice.startswith("keep the global generator")
    own = Drawing()
    state = TrainerState(seed=0, drawing=own)
    saved = state.state_dict()
    drawn = own.generator.random()
    state.load_state_dict(saved)
    assert own.generator.random() == drawn


@executes("training/randomness.py", "Next: resume from another tag, or start a new training with kind: previous_run")
def test_a_set_with_broken_generators_is_left_by_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tag is resumed, and the weights of the broken set start a new training; all files stay."""
    paths = PathProvider(tmp_path, "run")
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    model = bind(module, "net", optimizer=optimizer)
    state = TrainerState(seed=0)
    state.advance(samples=1)
    CheckpointWriter(paths).save(model, trainer=state)
    state.advance(samples=1)
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "take_rng", lambda: {"torch": torch.zeros(3)})
        CheckpointWriter(paths).save(model, trainer=state)
    before = digests(paths.checkpoint_path / "sets")

    def started(**fields: Any) -> int:
        trainer = TrainerState()
        stack = InitializerStack.from_config([{"run_id": "run", **fields}], path_provider=PathProvider(tmp_path, "b"))
        stack.initialize(model, trainer=trainer)
        return trainer.update

    advice = advised(lambda: started(kind="resume"))
    tag, _, new = advice.partition(", or ")
    assert tag == "resume from another tag"
    assert started(kind="resume", checkpoint_tag="E0_U1_S1") == 1
    found = re.fullmatch(r"start a new training with kind: (\w+)", new)
    assert found is not None
    assert started(kind=found[1]) == 0
    assert digests(paths.checkpoint_path / "sets") == before


@executes(
    "training/state.py",
    "Next: advance(samples=len(batch)), and with end_of_epoch=True",
    "Next: call advance() without end_of_epoch",
)
@executes("training/state.py", "Next: advance(batches=1) if the loop fetches the next batch before the step; advance(")
@executes("training/state.py", "Next: advance(batches=1) if the loop fetches the next batch before the step; state.d")
@executes("training/state.py", "Next: call state.loader(dataset, batch_size=...) as the saved run did")
@pytest.mark.parametrize("case", ["no loader", "end of epoch", "no new batch", "another number", "resumed"])
def test_a_step_is_counted_by_the_advised_call(case: str) -> None:
    """Each call of the message is made in a state as that of the error."""

    def fresh() -> tuple[TrainerState, Any]:
        state = TrainerState(seed=0)
        if case == "no loader":
            return state, [0, 1]
        if case == "resumed":
            first = TrainerState(seed=0)
            next(iter(first.loader(Numbers(), batch_size=2)))
            first.advance()
            state.load_state_dict(first.state_dict())
            return state, None
        batches = iter(state.loader(Numbers(), 2))
        batch = next(batches)
        if case == "no new batch":
            state.advance()
        return state, batch

    wrong: dict[str, Any] = {
        "no loader": {},
        "end of epoch": {"end_of_epoch": True},
        "no new batch": {},
        "another number": {"samples": 3},
        "resumed": {"samples": 2},
    }
    state, _batch = fresh()
    advice = advised(lambda: state.advance(**wrong[case]))
    calls = re.findall(r"(?:state\.)?\w+\([^()]*(?:\(batch\))?[^()]*\)", advice)
    assert calls
    for call in calls:
        state, batch = fresh()
        before = state.update
        if call == "advance(batches=1)" and case == "no new batch":
            # the loop that the advice is for: the next batch is there before the step
            state = TrainerState(seed=0)
            batches = iter(state.loader(Numbers(), 2))
            next(batches)
            next(batches)
            before = 0
        names = {"state": state, "advance": state.advance, "batch": batch, "dataset": Numbers()}
        run(call.replace("batch_size=...", "batch_size=2"), **names)
        if call.startswith("state."):
            if case == "resumed":
                for _ in state._loader or ():
                    state.advance()
                    break
            else:
                continue
        assert state.update == before + 1, call


@executes("training/state.py", "Next: advance(samples=..., end_of_epoch=True) for the last batch of each")
def test_epochs_are_counted_without_a_loader(caplog: pytest.LogCaptureFixture) -> None:
    """The text of the state and the log of a save say how, until an epoch has ended so."""
    caplog.set_level("INFO")
    state = TrainerState(seed=0)
    assert "end_of_epoch" not in repr(state)
    state.state_dict()
    assert not caplog.records
    state.advance(samples=4)
    assert "TrainerState(E0_U1_S4, no step with end_of_epoch=True yet, " in repr(state)
    state.state_dict()
    call = caplog.text.partition("Next: ")[2].partition(" for the last")[0]
    run(call.replace("...", "4"), advance=state.advance)
    assert state.epoch == 1
    caplog.clear()
    state.state_dict()
    assert not caplog.records
    assert "end_of_epoch" not in repr(state)
    # a position that a loader has counted needs no such word
    first, other = TrainerState(seed=0), TrainerState(seed=0)
    next(iter(first.loader(Numbers(), 2)))
    first.advance()
    other.load_state_dict(first.state_dict())
    assert not any("end_of_epoch" in repr(one) for one in (first, other))


@executes("training/state.py", "Next: save right after advance()", "Next: save right after advance(); or make a step")
def test_a_state_is_taken_between_two_steps() -> None:
    """After a step, after a step at the end of the epoch, or after the rest is discarded."""
    state = TrainerState(seed=0)
    batches = iter(state.loader(Numbers(), 2))
    next(batches)
    assert advised(state.state_dict) == "save right after advance()"
    state.advance()
    state.state_dict()

    def ended() -> TrainerState:
        one = TrainerState(seed=0)
        for number, _batch in enumerate(one.loader(Numbers(), 2, accumulate=3), start=1):
            if number % 3 == 0:
                one.advance()
        return one

    ways = advised(ended().state_dict).split("; or ")
    assert [way.partition(" ")[0] for way in ways] == ["save", "make", "set"]
    for way in (lambda one: one.advance(), lambda one: one.advance(), lambda one: one.discard()):
        one = ended()
        way(one)
        one.state_dict()


@executes("training/state.py", "Next: use a plain torch.utils.data.DataLoader for validation, or another TrainerState")
def test_a_second_loader_is_a_plain_one_or_of_another_state() -> None:
    """Both leave the position of the first one as it is."""
    state = TrainerState(seed=0)
    state.loader(Numbers(), 2)
    first, _, second = advised(lambda: state.loader(Numbers(), 2)).partition(", or another ")
    plain = run(first.removeprefix("use a plain ").removesuffix(" for validation"))(Numbers(), 2)
    assert len(list(plain)) == 4
    other = run(second.partition(" ")[0])(seed=1)
    assert len(other.loader(Numbers(), 2)) == 4
    assert state.update == 0


@executes("training/state.py", "Next: call restore_rng() after everything is built")
def test_generators_are_restored_before_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    """Without the call, the first step warns; with it, the draws are those of the saved run."""
    torch.manual_seed(5)
    first = TrainerState(seed=0)
    saved = first.state_dict()
    drawn = torch.rand(2)
    state = TrainerState()
    state.load_state_dict(saved)
    state.advance(samples=1)
    call = re.search(r"Next: call (restore_rng\(\)) after everything is built", caplog.text)
    assert call is not None
    caplog.clear()
    state = TrainerState()
    state.load_state_dict(saved)
    run(f"state.{call[1]}", state=state)
    assert torch.equal(torch.rand(2), drawn)
    state.advance(samples=1)
    assert caplog.text == ""


@executes("training/members.py", "Next: pip install --upgrade noether-init-core")
@executes("training/members.py", "Next: TrainerState(..., {}), or {}")
def test_a_state_is_loaded_by_the_release_and_the_objects_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The release that the command would install reads its version; the objects are passed by the names."""
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "_VERSION", 99)
        newer = TrainerState(seed=0).state_dict()
    assert advised(lambda: TrainerState().load_state_dict(newer)) == "pip install --upgrade noether-init-core"
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "_VERSION", 99)
        TrainerState().load_state_dict(newer)
    saved = TrainerState(seed=0, one=Holder(3), two=Holder(4)).state_dict()
    call = advised(lambda: TrainerState().load_state_dict(saved)).partition(", or ")[0]
    assert call == "TrainerState(..., one=..., two=...)"
    run(call.replace("(..., ", "(").replace("...", "Holder()"), Holder=Holder).load_state_dict(saved)


@executes("training/members.py", "Next, for the weights alone: kind: previous_run")
def test_an_older_state_leads_to_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No newer release reads it either; the weights beside it are loaded."""
    paths = PathProvider(tmp_path, "old")
    module = torch.nn.Linear(2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "_VERSION", 1)
        CheckpointWriter(paths).save(bind(module, "net"), trainer=TrainerState(seed=0))
    again = torch.nn.Linear(2, 2)

    def start(kind: str) -> None:
        stack = InitializerStack.from_config([{"kind": kind, "run_id": "old"}], path_provider=paths)
        stack.initialize(bind(again, "net"), trainer=TrainerState(seed=0))

    kind = advised(lambda: start("resume"), mark="Next, for the weights alone: kind: ")
    start(kind)
    assert torch.equal(again.weight, module.weight)
