"""Loops as people write them, killed after any step and started again unedited: the same values, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from support.advice import executes, saw
from torch.utils.data import Dataset

from noether_init_core import TrainerState
from noether_init_core.errors import StateMismatchError

BATCHES, EPOCHS = 7, 3


class KilledError(Exception):
    """The process is gone."""


class Numbers(Dataset[int]):
    """The samples 0 to length - 1."""

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> int:
        return index


@attrs.define(eq=False)
class World:
    """What outlives a process: the last save. ``log`` has what a training depends on, in its order."""

    kill_at: int | None = None
    saved: dict[str, Any] | None = None
    log: list[Any] = attrs.Factory(list)
    kept: int = 0
    saves: int = 0

    def begin(self, **options: Any) -> tuple[TrainerState, Any]:
        """A process begins; what was logged after the last save is lost."""
        state = TrainerState(seed=0)
        loader = state.loader(Numbers(), 1, **options)
        del self.log[self.kept :]
        if self.saved is not None:
            state.load_state_dict(copy.deepcopy(self.saved))
        return state, loader

    def save(self, state: TrainerState) -> None:
        """Save, and be killed right after the save that is to be the last."""
        self.saved, self.kept = copy.deepcopy(state.state_dict()), len(self.log)
        self.saves += 1
        if self.saves == self.kill_at:
            raise KilledError


def accumulating(world: World, steps: int) -> None:
    """Accumulation by ``enumerate``, with a step at the end of the epoch; validation between epochs."""
    state, loader = world.begin()
    gradient: list[int] = []
    while state.epoch < EPOCHS:
        for i, batch in enumerate(loader):
            gradient.append(int(batch))
            if (i + 1) % steps == 0 or i + 1 == len(loader):
                world.log.append(tuple(gradient))
                gradient = []
                state.advance()
                world.save(state)
        world.log.append(f"validated {state.epoch}")


def by_range(world: World, steps: int) -> None:
    """The loop counts itself, and calls ``next``; it saves after the validation too."""
    state, loader = world.begin()
    gradient: list[int] = []
    while state.epoch < EPOCHS:
        batches = iter(loader)
        for i in range(len(loader)):
            gradient.append(int(next(batches)))
            if (i + 1) % steps == 0 or i + 1 == len(loader):
                world.log.append(tuple(gradient))
                gradient = []
                state.advance()


def zipped(world: World, steps: int) -> None:
    """The length of the pass, zipped with the batches."""
    state, loader = world.begin()
    gradient: list[int] = []
    while state.epoch < EPOCHS:
        for i, batch in zip(range(len(loader)), loader):  # noqa: B905  # as people write it
            gradient.append(int(batch))
            if (i + 1) % steps == 0 or i + 1 == len(loader):
                world.log.append(tuple(gradient))
                gradient = []
                state.advance()
                world.save(state)
        world.log.append(f"validated {state.epoch}")


def absolute(world: World, steps: int) -> None:
    """Indices over the whole run, from the positions of the loader."""
    state, loader = world.begin()
    gradient: list[int] = []
    while state.epoch < EPOCHS:
        for i, batch in loader.enumerate():
            gradient.append(int(batch))
            index = state.epoch * loader.batches_per_epoch + i
            if (i + 1) % steps == 0 or loader.is_last:
                world.log.append((index, *gradient))
                gradient = []
                state.advance()
                world.save(state)
        world.log.append(f"validated {state.epoch}")


def stopping_early(world: World, steps: int) -> None:
    """The loop is left in the middle of an epoch, and the rest is trained in the next one."""
    state, loader = world.begin()
    while state.update < BATCHES * EPOCHS:
        for batch in loader:
            world.log.append(int(batch))
            state.advance()
            world.save(state)
            if state.update % (steps + 3) == 0:
                break


def saving_between(world: World, steps: int) -> None:
    """One save after each validation."""
    state, loader = world.begin()
    while state.epoch < EPOCHS:
        for batch in loader:
            world.log.append(int(batch))
            state.advance()
        world.log.append(f"validated {state.epoch}")
        world.save(state)


def watched(world: World, steps: int) -> None:
    """A bar around the loader, which asks it for its length first."""

    def bar(loader: Any) -> Iterator[Any]:
        total = len(loader)
        for number, batch in enumerate(loader):
            assert number < total
            yield batch

    state, loader = world.begin()
    while state.epoch < EPOCHS:
        for batch in bar(loader):
            world.log.append(int(batch))
            state.advance()
            world.save(state)
        world.log.append(f"validated {state.epoch}")


LOOPS = [accumulating, zipped, absolute, stopping_early, saving_between, watched]


def run(loop: Callable[[World, int], None], steps: int, kill_at: int | None = None) -> World:
    """Run a loop to its end; after a kill it starts again, unedited."""
    world = World(kill_at)
    try:
        loop(world, steps)
    except KilledError:
        world.kill_at = None
        loop(world, steps)
    return world


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_goes_on_as_if_it_had_not_been_killed(loop: Callable[[World, int], None], steps: int) -> None:
    """After every save, the last step of an epoch among them: batches, steps and validations are the same."""
    whole = run(loop, steps)
    assert whole.saves >= EPOCHS
    for kill_at in range(1, whole.saves + 1):
        assert run(loop, steps, kill_at).log == whole.log


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_loop_that_calls_next_trains_its_epochs(steps: int) -> None:
    """Its passes never end, so that epochs must not be completed by their end."""
    world = World()
    by_range(world, steps)
    assert [one for step in world.log for one in step] == [*map(int, _order())]
    assert len(world.log) == EPOCHS * -(-BATCHES // steps)


def _order() -> list[int]:
    loader = TrainerState(seed=0).loader(Numbers(), 1)
    return [int(one) for epoch in range(EPOCHS) for one in loader.layout.indices(0, epoch)]


def kept_length(world: World, steps: int) -> None:
    """The length is asked once, so after a resume it is that of the rest."""
    state, loader = world.begin()
    length = len(loader)
    gradient: list[int] = []
    while state.epoch < EPOCHS:
        for i, batch in enumerate(loader):
            gradient.append(int(batch))
            if (i + 1) % steps == 0 or i + 1 == length:
                world.log.append(tuple(gradient))
                gradient = []
                state.advance()
                world.save(state)


def full_length(world: World, steps: int) -> None:
    """The length of a full epoch, with positions that begin at 0 after a resume."""
    state, loader = world.begin()
    gradient: list[int] = []
    while state.epoch < EPOCHS:
        for i, batch in enumerate(loader):
            gradient.append(int(batch))
            if (i + 1) % steps == 0 or i + 1 == loader.batches_per_epoch:
                world.log.append(tuple(gradient))
                gradient = []
                state.advance()
                world.save(state)


def outcome(loop: Callable[[World, int], None], steps: int, kill_at: int) -> Any:
    """The log of a run that was killed, or the text of the error with which it was refused."""
    try:
        return run(loop, steps, kill_at).log
    except StateMismatchError as error:
        return saw(str(error))


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("loop", [kept_length, full_length], ids=lambda loop: loop.__name__)
def test_a_loop_with_another_length_is_right_or_refused(loop: Callable[[World, int], None], steps: int) -> None:
    """Never wrong without a word; and some kill is refused, with the positions that are right."""
    whole = run(loop, steps)
    refused = 0
    for kill_at in range(1, whole.saves + 1):
        found = outcome(loop, steps, kill_at)
        assert found == whole.log or "loader.enumerate()" in found
        refused += isinstance(found, str)
    assert refused


@executes(
    "training/loader.py",
    "Next: for i, batch in loader.enumerate(), with loader.batches_per_epoch as the length",
)
def test_positions_of_the_loader_are_right_where_others_are_refused() -> None:
    """The loop of the advice, in the situations that give it."""
    for loop, steps in ((kept_length, 3), (full_length, 3), (full_length, 2)):
        for kill_at in range(1, 10):
            outcome(loop, steps, kill_at)
    whole = run(absolute, 3)
    assert all(run(absolute, 3, kill_at).log == whole.log for kill_at in range(1, whole.saves + 1))


@executes(
    "training/loader.py",
    "Next: for i, batch in loader.enumerate(), with loader.batches_per_epoch as the length; "
    "state.discard() for batches without a step; state.loader(..., across_epochs=True) if the next epoch takes them",
)
@pytest.mark.parametrize("way", ["discard", "across_epochs"])
def test_batches_in_no_step_are_discarded_or_taken_by_the_next_epoch(way: str) -> None:
    """A loop that steps each third batch only: without either, a resumed epoch ends with an error."""

    def loop(world: World, steps: int, way: str = way) -> None:
        state, loader = world.begin(**({"across_epochs": True} if way == "across_epochs" else {}))
        gradient: list[int] = []
        while state.epoch < EPOCHS:
            for batch in loader:
                gradient.append(int(batch))
                if len(gradient) == steps:
                    world.log.append(tuple(gradient))
                    gradient = []
                    state.advance()
                    world.save(state)
            if way == "discard" and gradient:
                state.discard()
                gradient = []

    with pytest.raises(StateMismatchError) as caught:
        run(lambda world, steps: loop(world, steps, ""), 3, 1)
    saw(str(caught.value))
    if way == "discard":
        return
    whole = run(loop, 3)
    assert all(run(loop, 3, kill_at).log == whole.log for kill_at in range(1, whole.saves + 1))


def test_the_iteration_is_that_of_the_checkpoint() -> None:
    """Beside the epochs that the loop asks for, which count once their loop has ended."""
    world = World(kill_at=BATCHES)
    with pytest.raises(KilledError):
        accumulating(world, 1)
    state, loader = world.begin()
    assert str(state.iteration) == f"E1_U{BATCHES}_S{BATCHES}"
    assert (state.epoch, len(loader)) == (0, 0)
    assert list(loader) == []
    assert (state.epoch, len(loader)) == (1, BATCHES)
    assert state.state_dict()["trainer_state"]["loader"]["open"] is False


@executes("training/loader.py", "Next, if that code uses variables of the loop: set them before the loop")
@pytest.mark.parametrize("is_set", [False, True])
def test_code_behind_the_loop_may_need_its_variables(is_set: bool, caplog: pytest.LogCaptureFixture) -> None:
    """After a resume from the last step there is no batch; the log says so before the code fails."""

    def loop(world: World, steps: int) -> None:
        state, loader = world.begin()
        if is_set:
            batch = None
        while state.epoch < EPOCHS:
            for batch in loader:  # noqa: B007  # used behind the loop
                state.advance()
                world.save(state)
            world.log.append(batch is None)

    if is_set:
        assert run(loop, 1, BATCHES).log == [True, False, False]
    else:
        with pytest.raises(UnboundLocalError):
            run(loop, 1, BATCHES)
    assert "set them before the loop" in saw(caplog.text)
