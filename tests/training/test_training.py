"""TrainerState: iteration, data order, random generators and stateful objects of a plain loop."""

from __future__ import annotations

import collections
import copy
import io
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import Dataset, IterableDataset

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, bind
from noether_init_core.errors import ConfigError, StateMismatchError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.training import TrainerState


class Numbers(Dataset[int]):
    """The samples 0 to length - 1; remembers which were read."""

    def __init__(self, length: int = 10) -> None:
        self.length = length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class Noisy(Numbers):
    """Samples with noise of all three global generators."""

    def __getitem__(self, index: int) -> Any:
        noise = [float(torch.rand(())), random.random(), float(numpy.random.rand())]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


class Counter:
    """The smallest stateful object."""

    def __init__(self, value: Any = 0, refuses: bool = False) -> None:
        self.value = value
        self.refuses = refuses

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses and state["value"] != self.value:
            raise RuntimeError("no room")
        self.value = state["value"]


def run(state: TrainerState, loader: Any, updates: int, accumulate: int = 1) -> list[list[int]]:
    """Train ``updates`` steps; returns the samples of each step."""
    steps: list[list[int]] = []
    waiting: list[int] = []
    while len(steps) < updates:
        for number, batch in enumerate(loader, start=1):
            waiting += batch.tolist()
            if number % accumulate:
                continue
            state.advance()
            steps.append(waiting)
            waiting = []
            if len(steps) == updates:
                break
        waiting = []
    return steps


def flat(steps: list[list[int]]) -> list[int]:
    """The samples of several steps in one list."""
    return [sample for step in steps for sample in step]


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """Write and read a state as a checkpoint would, with the loader that runs no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_starts_at_zero_and_counts_updates_samples_and_epochs() -> None:
    """The last batch of an epoch, which is smaller, completes the epoch."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(10), batch_size=4)
    assert state.iteration == TrainingIteration.zero()
    assert len(loader) == 3
    seen = []
    for _batch in loader:
        state.advance()
        seen.append(str(state.iteration))
    assert seen == ["E0_U1_S4", "E0_U2_S8", "E1_U3_S10"]
    assert (state.epoch, state.update, state.sample) == (1, 3, 10)


def test_drop_last_leaves_the_rest_out() -> None:
    """With drop_last an epoch has full batches only."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(10), batch_size=4, drop_last=True)
    assert [len(samples) for samples in run(state, loader, 4)] == [4, 4, 4, 4]
    assert str(state.iteration) == "E2_U4_S16"


def test_loops_with_data_from_elsewhere_say_samples_and_epochs() -> None:
    """Without a loader nothing can be counted, so that samples are an argument and the end of an epoch is another."""
    state = TrainerState()
    state.advance(samples=3)
    state.advance(samples=2, end_of_epoch=True)
    assert str(state.iteration) == "E1_U2_S5"
    with pytest.raises(ConfigError, match=r"advance\(samples=len\(batch\)\)"):
        state.advance()
    with pytest.raises(ConfigError, match="not -1"):
        state.advance(samples=-1)
    state.loader(Numbers(), batch_size=2)
    with pytest.raises(ConfigError, match="detects the end"):
        state.advance(end_of_epoch=True)


def draw() -> list[float]:
    """One number of each global generator."""
    return [float(torch.rand(())), random.random(), float(numpy.random.rand()), random.gauss(0, 1)]


def test_a_seed_seeds_all_three_generators() -> None:
    """The same seed gives the same numbers of torch, Python and NumPy; another seed gives others of each."""
    TrainerState(seed=7)
    first = draw()
    TrainerState(seed=7)
    assert draw() == first
    TrainerState(seed=2**40)
    assert not set(draw()) & set(first)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1"])
def test_seeds_that_are_none_are_refused(seed: Any) -> None:
    """A seed is a whole number that every generator can be derived from."""
    with pytest.raises(ConfigError, match="seed must be"):
        TrainerState(seed=seed)


def test_without_a_seed_the_order_is_drawn_and_comes_back_on_resume() -> None:
    """A run without a seed resumes in its own order, though the new process drew another one."""
    state = TrainerState()
    loader = state.loader(Numbers(), batch_size=2)
    run(state, loader, 3)
    saved = through_file(state.state_dict())
    resumed = TrainerState()
    other = resumed.loader(Numbers(), batch_size=2)
    assert resumed.seed != state.seed
    resumed.load_state_dict(saved)
    assert run(resumed, other, 5) == run(state, loader, 5)


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    """Each epoch holds every sample once in another order, whatever else draws random numbers."""
    orders = []
    for noise in (0, 5):
        state = TrainerState(seed=3)
        loader = state.loader(Numbers(12), batch_size=5)
        torch.rand(noise)
        steps = run(state, loader, 6)
        epochs = [flat(steps[:3]), flat(steps[3:])]
        assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
        assert epochs[0] != epochs[1]
        orders.append(steps)
    assert orders[0] == orders[1]
    other = TrainerState(seed=4)
    assert run(other, other.loader(Numbers(12), batch_size=5), 6) != orders[0]


def test_unshuffled_data_keeps_its_order() -> None:
    """shuffle=False reads 0, 1, 2 and so on in every epoch."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(4), batch_size=3, shuffle=False)
    assert run(state, loader, 4) == [[0, 1, 2], [3]] * 2


def test_a_resumed_loader_reads_nothing_of_what_was_consumed() -> None:
    """In the middle of an epoch only the rest is read from the dataset."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(10), batch_size=2)
    done = run(state, loader, 3)
    dataset = Numbers(10)
    resumed = TrainerState(seed=0)
    other = resumed.loader(dataset, batch_size=2)
    resumed.load_state_dict(through_file(state.state_dict()))
    rest = run(resumed, other, 2)
    assert dataset.read == flat(rest)
    assert sorted(flat(done + rest)) == list(range(10))
    assert str(resumed.iteration) == "E1_U5_S10"


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 13),
    batch_size=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    stop=st.integers(1, 9),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_resumed_data_is_the_uninterrupted_data(
    length: int, batch_size: int, accumulate: int, stop: int, drop_last: bool, seed: int
) -> None:
    """For any sizes, any number of accumulated batches and any point of interruption, the steps are the same."""
    batches = length // batch_size if drop_last else -(-length // batch_size)
    if batches < accumulate:
        return

    def begin() -> tuple[TrainerState, Any]:
        state = TrainerState(seed=seed)
        return state, state.loader(Numbers(length), batch_size, drop_last=drop_last, across_epochs=True)

    whole, loader = begin()
    expected = run(whole, loader, stop + 5, accumulate)
    state, loader = begin()
    before = run(state, loader, stop, accumulate)
    resumed, other = begin()
    resumed.load_state_dict(copy.deepcopy(state.state_dict()))
    # Accumulation goes on where it was: the loop of ``run`` counts batches per epoch.
    position = resumed.state_dict()["trainer_state"]["loader"]["batch"]
    assert position % accumulate == 0
    assert before + run(resumed, other, 5, accumulate) == expected
    assert resumed.iteration == whole.iteration


def noisy_steps(state: TrainerState, workers: int, updates: int, **options: Any) -> list[torch.Tensor]:
    """The batches of ``updates`` steps of noisy data."""
    options |= {"prefetch_factor": 4} if workers else {}
    loader = state.loader(Noisy(12), batch_size=3, num_workers=workers, **options)
    steps: list[torch.Tensor] = []
    while len(steps) < updates:
        for batch in loader:
            state.advance()
            steps.append(batch)
            if len(steps) == updates:
                break
    return steps


def test_worker_processes_change_no_number() -> None:
    """Augmented samples are the same with 0, 1 and 2 workers, also after a resume with another number of workers."""
    expected = torch.stack(noisy_steps(TrainerState(seed=1), 0, 7))
    assert len(set(expected[..., 1:].flatten().tolist())) == 7 * 3 * 3
    for workers, later in ((1, 0), (2, 1)):
        state = TrainerState(seed=1)
        before = noisy_steps(state, workers, 2)
        assert torch.equal(torch.stack(before), expected[:2])
        resumed = TrainerState(seed=1)
        resumed.load_state_dict(state.state_dict())
        after = noisy_steps(resumed, later, 5)
        assert torch.equal(torch.stack(after), expected[2:])


def test_prefetched_batches_do_not_count() -> None:
    """Workers that read the whole epoch ahead leave the position at what the loop consumed."""
    state = TrainerState(seed=1)
    noisy_steps(state, 2, 1)
    assert state.state_dict()["trainer_state"]["loader"]["batch"] == 1
    assert str(state.iteration) == "E0_U1_S3"


def test_persistent_workers_begin_each_pass_at_the_position() -> None:
    """Workers that live across epochs get the order of the new epoch."""
    expected = torch.stack(noisy_steps(TrainerState(seed=1), 0, 9))
    found = noisy_steps(TrainerState(seed=1), 1, 9, persistent_workers=True)
    assert torch.equal(torch.stack(found), expected)


def test_loading_data_draws_nothing_from_the_loops_generators() -> None:
    """Samples have seeds of their own, so that dropout does not depend on how data is read."""
    state = TrainerState(seed=1)
    expected = draw()
    state = TrainerState(seed=1)
    for _batch in state.loader(Noisy(12), batch_size=3):
        state.advance()
    assert draw() == expected


def test_a_collate_function_is_used_and_seeded() -> None:
    """The user's collate_fn gets the samples of a batch, and its randomness belongs to the batch."""

    def collate(samples: list[int]) -> tuple[list[int], float]:
        return samples, random.random()

    found = []
    for workers in (0, 0, 1):
        state = TrainerState(seed=1)
        for batch in state.loader(Numbers(3), 3, shuffle=False, num_workers=workers, collate_fn=collate):
            state.advance()
            found.append(batch)
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [0, 1, 2]


def test_datasets_that_read_whole_batches_are_asked_for_them() -> None:
    """A dataset with __getitems__ gets the indices of a batch in one call."""

    class Whole(Numbers):
        def __getitems__(self, indices: list[int]) -> list[int]:
            self.read.append(len(indices))
            return indices

    dataset = Whole(5)
    state = TrainerState(seed=0)
    run(state, state.loader(dataset, batch_size=3), 2)
    assert dataset.read == [3, 2]


def test_a_loop_that_is_left_early_goes_on_after_the_last_step() -> None:
    """After break the next for begins behind the last advance, and what was handed out since comes again."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(8), batch_size=2)
    handed = []
    for number, batch in enumerate(loader):
        handed.append(batch.tolist())
        if number == 1:
            break
        state.advance()
    passing = iter(loader)
    assert next(passing).tolist() == handed[1]
    state.advance()
    assert str(state.iteration) == "E0_U2_S4"


def test_a_step_after_break_consumes_the_batches_before_it() -> None:
    """A loop that breaks, then makes its step, has consumed what it was handed."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(8), batch_size=2)
    for number, _batch in enumerate(loader):
        if number == 1:
            break
    state.advance()
    assert str(state.iteration) == "E0_U1_S4"
    assert state.state_dict()["trainer_state"]["loader"]["batch"] == 2


def test_batches_too_few_for_a_step_end_with_their_epoch() -> None:
    """With 5 batches and 2 per step the epoch ends after its data; a step after the loop counts their samples."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(10), batch_size=2)
    for number, _batch in enumerate(loader, start=1):
        if number % 2 == 0:
            state.advance()
    assert str(state.iteration) == "E1_U2_S8"
    state.advance()
    assert str(state.iteration) == "E1_U3_S10"
    assert [len(samples) for samples in run(state, loader, 5)] == [2] * 5
    assert str(state.iteration) == "E2_U8_S20"


def batch_numbers(batches: int, **options: Any) -> tuple[TrainerState, Any]:
    """A state and a loader of batches [0], [1], ... in this order."""
    state = TrainerState(seed=0)
    return state, state.loader(Numbers(batches), 1, shuffle=False, **options)


def test_batches_at_the_end_of_an_epoch_belong_to_the_next_step() -> None:
    """Gradients go on over the end of an epoch, and so do their samples; saving in between would lose them."""
    state, loader = batch_numbers(6)
    number = 0
    for epoch in range(4):
        for _batch in loader:
            number += 1
            if number % 4 == 0:
                state.advance()
        if number % 4:
            with pytest.raises(StateMismatchError, match=rf"last 2 batches before epoch {epoch + 1} .*discard\(\)"):
                state.state_dict()
        else:
            state.state_dict()
    assert str(state.iteration) == "E4_U6_S24"


def test_discarded_batches_go_into_no_step() -> None:
    """A loop that sets gradients to zero says so; then it can save, and they do not count."""
    state, loader = batch_numbers(5)
    for number, _batch in enumerate(loader, start=1):
        if number % 2 == 0:
            state.advance()
    state.discard()
    saved = state.state_dict()
    assert str(state.iteration) == "E1_U2_S4"
    assert saved["trainer_state"]["loader"]["batch"] == 0
    passing = iter(loader)
    next(passing)
    state.discard()
    assert next(passing).tolist() == [1]
    state.advance()
    assert str(state.iteration) == "E1_U3_S5"
    assert state.state_dict()["trainer_state"]["loader"]["batch"] == 2


def test_a_step_of_more_batches_than_an_epoch_has_is_announced() -> None:
    """With accumulate=4 an epoch of 2 batches needs no step; one that should have had a step is still an error."""
    state, loader = batch_numbers(2)
    with pytest.raises(StateMismatchError, match=r"ended after 2 batches without advance\(\).*accumulate=3"):
        list(loader)
    state, loader = batch_numbers(2, accumulate=4)
    list(loader)
    with pytest.raises(StateMismatchError, match="after 4 batches"):
        list(loader)
    state, loader = batch_numbers(2, accumulate=4)
    number = 0
    while state.epoch < 6:
        for _batch in loader:
            number += 1
            if number % 4 == 0:
                state.advance()
    assert str(state.iteration) == "E6_U3_S12"
    assert state.state_dict()["trainer_state"]["loader"]["batch"] == 0
    with pytest.raises(ConfigError, match="accumulate must be"):
        batch_numbers(2, accumulate=0)


def prefetched(state: TrainerState, loader: Any, updates: int) -> list[int]:
    """Train on one batch while the next one is fetched already; returns what was trained on."""
    seen: list[int] = []
    while len(seen) < updates:
        passing = iter(loader)
        following = next(passing)
        while following is not None and len(seen) < updates:
            current, following = following, next(passing, None)
            seen += current.tolist()
            state.advance(batches=1)
            state.state_dict()
    return seen


def test_a_loop_that_fetches_ahead_says_how_many_batches_it_used() -> None:
    """Saved after any step and resumed, it goes on with the batch that it had fetched but not used."""
    expected = [0, 1, 2, 3, 4] * 2
    for stop in range(1, 10):
        state, loader = batch_numbers(5)
        assert prefetched(state, loader, stop) == expected[:stop]
        assert str(state.iteration) == f"E{stop // 5}_U{stop}_S{stop}"
        resumed, other = batch_numbers(5)
        resumed.load_state_dict(through_file(state.state_dict()))
        assert prefetched(resumed, other, 10 - stop) == expected[stop:]
        assert str(resumed.iteration) == "E2_U10_S10"


def test_a_loop_that_fetches_ahead_without_saying_so_is_found_out() -> None:
    """By its samples at the first step, without them at the last step of the epoch."""
    state, loader = batch_numbers(3)
    passing = iter(loader)
    following = next(passing)
    current, following = following, next(passing)
    with pytest.raises(StateMismatchError, match=r"batches of 1, 1 samples since.*advance\(batches=1\)"):
        state.advance(samples=len(current))
    state.advance()
    current, following = following, next(passing)
    state.advance()
    assert next(passing, None) is None
    with pytest.raises(
        StateMismatchError, match=r"without a new batch.*advance\(batches=1\) if .*advance\(samples=0\)"
    ):
        state.advance()
    assert str(state.iteration) == "E1_U2_S3"
    state.advance(samples=0)
    assert str(state.iteration) == "E1_U3_S3"


def test_a_step_can_count_its_samples_itself() -> None:
    """With both numbers said, other samples than those handed out are meant."""
    state, loader = batch_numbers(4)
    passing = iter(loader)
    next(passing)
    with pytest.raises(StateMismatchError, match=r"advance\(samples=7, batches=1\)"):
        state.advance(samples=7)
    state.advance(samples=7, batches=1)
    assert str(state.iteration) == "E0_U1_S7"
    with pytest.raises(StateMismatchError, match=r"batches=2\), but the loader returned 0 batches"):
        state.advance(batches=2)
    with pytest.raises(ConfigError, match="batches must be"):
        state.advance(batches=-1)
    with pytest.raises(ConfigError, match="without a loader"):
        TrainerState().advance(samples=1, batches=1)


def test_an_epoch_without_a_step_is_an_error() -> None:
    """Who forgets advance() learns it at the end of the first epoch, not from an endless loop."""
    state = TrainerState(seed=0)
    with pytest.raises(StateMismatchError, match=r"epoch 0 ended after 5 batches without advance\(\)"):
        list(state.loader(Numbers(10), batch_size=2))


def test_saving_between_a_batch_and_its_step_is_an_error() -> None:
    """Weights that a half done step has touched belong to no iteration."""
    state = TrainerState(seed=0)
    for _batch in state.loader(Numbers(10), batch_size=2):
        with pytest.raises(StateMismatchError, match=r"the loader returned 1 batches.*save right after advance"):
            state.state_dict()
        state.advance()
        state.state_dict()
        break


def test_saving_after_a_loop_was_left_says_what_comes_again(caplog: pytest.LogCaptureFixture) -> None:
    """A loop that breaks at the top of its body can save; the batch it did not use is handed out again."""
    state = TrainerState(seed=0)
    for _batch in state.loader(Numbers(10), batch_size=2):
        break
    with caplog.at_level(logging.WARNING):
        saved = state.state_dict()
    assert saved["trainer_state"]["loader"]["batch"] == 0
    assert "1 batches after the last advance() will be returned again" in caplog.text


def test_one_position_means_one_loader_and_one_pass() -> None:
    """A second loader is refused, and a pass over the data ends when another one is begun."""
    state = TrainerState(seed=0)
    loader = state.loader(Numbers(10), batch_size=2)
    with pytest.raises(ConfigError, match=r"validation.*another TrainerState"):
        state.loader(Numbers(10), batch_size=2)
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(StateMismatchError, match="outdated"):
        next(first)


def test_a_pass_ends_when_a_state_is_loaded() -> None:
    """A for over the loader that was begun before the state was loaded has the wrong data."""
    state = TrainerState(seed=0)
    saved = state.state_dict()
    passing = iter(state.loader(Numbers(10), batch_size=2))
    next(passing)
    state.load_state_dict(saved)
    with pytest.raises(StateMismatchError, match="outdated"):
        next(passing)


class Endless(IterableDataset[int]):
    """A dataset without samples by number."""

    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Endless(), {"batch_size": 2}, "an Endless is not a map-style dataset"),
        (Numbers(), {"batch_size": 0}, "batch_size must be"),
        (Numbers(0), {"batch_size": 2}, "give no batch"),
        (Numbers(3), {"batch_size": 4, "drop_last": True}, "give no batch"),
    ],
)
def test_data_that_cannot_be_resumed_is_refused(dataset: Any, options: dict[str, Any], message: str) -> None:
    """A stream has no position, and no batches are no epoch."""
    with pytest.raises(ConfigError, match=message):
        TrainerState(seed=0).loader(dataset, **options)


def saved_after(updates: int, **layout: Any) -> dict[str, Any]:
    """The state of a run with 10 samples in batches of 2 after some updates."""
    state = TrainerState(seed=5)
    run(state, state.loader(Numbers(10), **{"batch_size": 2, **layout}), updates)
    return through_file(state.state_dict())


@pytest.mark.parametrize("loader_first", [True, False])
@pytest.mark.parametrize(
    ("seed", "length", "layout", "message"),
    [
        (6, 10, {}, "seed: 5 when saved, 6 now"),
        (5, 12, {}, "samples in the dataset: 10 when saved, 12 now"),
        (5, 10, {"batch_size": 5}, "batch_size: 2 when saved, 5 now"),
        (5, 10, {"shuffle": False}, "shuffle: True when saved, False now"),
        (5, 10, {"drop_last": True}, "drop_last: False when saved, True now"),
    ],
)
def test_other_data_is_an_error_that_names_both_values(
    seed: int, length: int, layout: dict[str, Any], message: str, loader_first: bool
) -> None:
    """A position in other data would skip or repeat samples silently, whichever is called first."""
    saved = saved_after(3)
    state = TrainerState(seed=seed)

    def make_loader() -> None:
        state.loader(Numbers(length), **{"batch_size": 2, **layout})

    if loader_first:
        make_loader()
        with pytest.raises(StateMismatchError, match=message):
            state.check_state_dict(saved)
    with pytest.raises(StateMismatchError, match=message):  # noqa: PT012  # which of the two raises is not the point
        state.load_state_dict(saved)
        make_loader()
    if loader_first:
        assert state.iteration.is_zero


def test_at_the_end_of_an_epoch_the_batch_size_may_change() -> None:
    """A set of a completed epoch has no position inside one; the number of samples must still be the same."""
    saved = saved_after(5)
    state = TrainerState(seed=5)
    loader = state.loader(Numbers(10), batch_size=5, drop_last=True)
    state.load_state_dict(saved)
    assert [len(samples) for samples in run(state, loader, 2)] == [5, 5]
    assert str(state.iteration) == "E2_U7_S20"
    other = TrainerState(seed=5)
    other.loader(Numbers(11), batch_size=2)
    with pytest.raises(StateMismatchError, match="samples in the dataset"):
        other.load_state_dict(saved)


def test_a_position_cannot_be_lost() -> None:
    """A run that resumes inside an epoch but takes its data from elsewhere is told to use the loader."""
    state = TrainerState(seed=5)
    state.load_state_dict(saved_after(3))
    state.restore_rng()
    assert state.state_dict()["trainer_state"]["loader"]["batch"] == 3
    with pytest.raises(StateMismatchError, match=r"after 3 batches of epoch 0.*state\.loader"):
        state.advance(samples=2)


def test_generators_are_restored_last_and_only_then() -> None:
    """Loading leaves the generators alone; restore_rng puts them back whatever was drawn in between."""
    state = TrainerState(seed=5)
    draw()
    numpy.random.randn()  # leaves half of a pair of normal numbers waiting
    saved = through_file(state.state_dict())
    expected = [*draw(), numpy.random.randn()]
    resumed = TrainerState(seed=5)
    before = torch.get_rng_state()
    resumed.load_state_dict(saved)
    assert torch.equal(torch.get_rng_state(), before)
    torch.nn.Linear(3, 3)
    resumed.restore_rng()
    assert [*draw(), numpy.random.randn()] == expected
    resumed.restore_rng()
    assert draw() != expected[:4]


def test_a_step_before_the_generators_were_restored_warns(caplog: pytest.LogCaptureFixture) -> None:
    """Training on without restore_rng would make other numbers silently."""
    state = TrainerState()
    state.load_state_dict(TrainerState().state_dict())
    with caplog.at_level(logging.WARNING):
        state.advance(samples=1)
        state.advance(samples=1)
    assert caplog.text.count("restore_rng()") == 1


def test_a_state_that_was_put_back_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    """After a failed start the object has its own earlier state again, with the generators where they were."""
    state = TrainerState(seed=3)
    before = copy.deepcopy(state.state_dict())
    state.load_state_dict(saved_after(2) | {"trainer_state": saved_after(2)["trainer_state"] | {"seed": 3}})
    TrainerState(seed=3)
    state.load_state_dict(before)
    draw()
    with caplog.at_level(logging.WARNING):
        state.advance(samples=1)
    assert "restore_rng()" not in caplog.text
    draw()
    state.load_state_dict(before)
    with caplog.at_level(logging.WARNING):
        state.advance(samples=1)
    assert caplog.text.count("restore_rng()") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_generators_of_absent_devices_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """A state from a machine with two GPUs is loaded on one without; the log says what could not be restored."""
    state = TrainerState(seed=0)
    saved = through_file(state.state_dict())
    assert "cuda" not in saved["trainer_state"]["rng"]
    expected = draw()
    saved["trainer_state"]["rng"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 2
    state.load_state_dict(saved)
    with caplog.at_level(logging.WARNING):
        state.restore_rng()
    assert draw() == expected
    assert "2 CUDA devices, found 0" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_generators_of_devices_are_restored() -> None:
    """Numbers drawn on each CUDA device come again."""
    state = TrainerState(seed=0)
    devices = range(torch.cuda.device_count())
    torch.rand(3, device=0)
    saved = through_file(state.state_dict())
    expected = [torch.rand(3, device=index).tolist() for index in devices]
    state.load_state_dict(saved)
    state.restore_rng()
    assert [torch.rand(3, device=index).tolist() for index in devices] == expected


@pytest.mark.parametrize("name", ["torch", "python", "numpy"])
def test_broken_generator_states_are_found_before_anything_changes(name: str) -> None:
    """A state that a generator would refuse is refused while nothing has been loaded."""
    member = Counter(1)
    state = TrainerState(seed=0, member=member)
    saved = state.state_dict()
    saved["trainer_state"]["rng"][name] = torch.zeros(3) if name == "torch" else {"version": 3}
    member.value = 2
    with pytest.raises(StateMismatchError, match="stored states of random generators are invalid"):
        state.load_state_dict(saved)
    assert member.value == 2


def test_states_are_plain_data() -> None:
    """The state holds only what a safe loader reads, NumPy scalars and odd containers included, and comes back."""
    value = {
        "best": numpy.float64(0.5),
        "seen": {1, 2},
        "history": collections.deque([1.0, 2.0], maxlen=3),
        "counts": collections.Counter({3: 2}),
        "array": numpy.arange(3, dtype=numpy.uint16),
        "pair": (1, "a", None, True),
        "infinity": float("inf"),
    }
    state = TrainerState(seed=0, member=Counter(value))
    saved = through_file(state.state_dict())
    plain = saved["trainer_state"]["stateful"]["member"]["value"]
    assert type(plain["best"]) is float
    assert type(plain["counts"]) is dict
    other = Counter(copy.deepcopy(value))
    other.value["best"] = numpy.float64(0.0)
    TrainerState(seed=0, member=other).load_state_dict(saved)
    assert {name: type(found) for name, found in other.value.items()} == {name: type(v) for name, v in value.items()}
    assert other.value["history"].maxlen == 3
    assert other.value["array"].dtype == numpy.uint16
    assert other.value["array"].tolist() == [0, 1, 2]
    assert {k: v for k, v in other.value.items() if k != "array"} == {k: v for k, v in value.items() if k != "array"}


def test_states_that_no_checkpoint_can_hold_are_named() -> None:
    """The error says where in which object the odd value is."""
    state = TrainerState(metric=Counter({"inner": [1, object()]}))
    with pytest.raises(StateMismatchError, match=r"metric\.value\.inner\.1 is a builtins\.object"):
        state.state_dict()


def test_missing_and_unknown_objects_are_listed_together() -> None:
    """Names are compared before anything is loaded, and both sides are shown."""
    saved = TrainerState(seed=0, schedule=Counter(1), ema=Counter(2)).state_dict()
    schedule = Counter(7)
    with pytest.raises(StateMismatchError, match=r"no state of scaler.*state of ema, but this TrainerState") as caught:
        TrainerState(seed=0, schedule=schedule, scaler=Counter(3)).load_state_dict(saved)
    assert schedule.value == 7
    assert len(caught.value.problems) == 2
    with pytest.raises(StateMismatchError, match=r"Next: TrainerState\(\.\.\., schedule=\.\.\., ema=\.\.\.\)"):
        TrainerState(seed=0).load_state_dict(saved)


def test_weights_that_were_loaded_in_place_are_put_back() -> None:
    """An object that copies into its own tensors, as every module does, gets back what it had before."""

    def members(value: float, refuses: bool = False) -> dict[str, Any]:
        average = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(average.weight, value)
        return {"ema": average, "other": Counter(value, refuses)}

    saved = through_file(TrainerState(**members(1.0)).state_dict())
    own = members(2.0, refuses=True)
    with pytest.raises(StateMismatchError, match="other refuses"):
        TrainerState(**own).load_state_dict(saved)
    assert own["ema"].weight.item() == 2.0


def test_an_object_that_refuses_its_state_leaves_all_as_it_was() -> None:
    """All or nothing: those that were loaded before it get their own state back, and so does the iteration."""
    saved = TrainerState(first=Counter(1), second=Counter(2), third=Counter(3)).state_dict()
    saved["training_iteration"] = {"epoch": 1, "update": 2, "sample": 3}
    members: dict[str, Any] = {"first": Counter(4), "second": Counter(5, refuses=True), "third": Counter(6)}
    state = TrainerState(**members)
    with pytest.raises(
        StateMismatchError, match=r"second refuses its state: RuntimeError: no room. All objects were restored"
    ):
        state.load_state_dict(saved)
    assert [member.value for member in members.values()] == [4, 5, 6]
    assert state.iteration.is_zero


@pytest.mark.parametrize("name", ["loader", "rng", "iteration", "model"])
def test_reserved_names_are_refused(name: str) -> None:
    """Names that mean something else are refused at construction."""
    with pytest.raises(ConfigError, match=f"'{name}' is a reserved name"):
        TrainerState(**{name: Counter()})  # type: ignore[arg-type]  # the name may be that of an argument


@pytest.mark.parametrize("member", [None, 3, {"state_dict": 1}, Counter, torch.zeros(1)])
def test_objects_without_state_are_refused(member: Any) -> None:
    """An object without state_dict and load_state_dict, or the class instead of it, is a mistake."""
    with pytest.raises(ConfigError, match=r"metric is (?:an?|the class) .* lacks state_dict\(\)"):
        TrainerState(metric=member)


def test_a_scaler_is_written_where_noether_looks_for_it() -> None:
    """A gradient scaler of that name is at the top of the trainer file, too; any other object is not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    saved = through_file(TrainerState(grad_scaler=scaler).state_dict())
    assert saved["grad_scaler"]["scale"] == 8.0
    assert "grad_scaler" not in TrainerState(grad_scaler=Counter()).state_dict()
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    TrainerState(grad_scaler=other).load_state_dict(saved)
    assert other.get_scale() == 8.0


def test_a_trainer_file_of_noether_sets_the_iteration_only(caplog: pytest.LogCaptureFixture) -> None:
    """Such a file holds nothing of this loop; the log says so, and the data begins with the epoch."""
    member = Counter(1)
    state = TrainerState(seed=0, schedule=member)
    loader = state.loader(Numbers(4), batch_size=2, shuffle=False)
    run(state, loader, 1)
    with caplog.at_level(logging.WARNING):
        state.load_state_dict(
            {"callback_state_dicts": {}, "training_iteration": {"epoch": 2, "update": 8, "sample": 64}}
        )
    assert str(state.iteration) == "E2_U8_S64"
    assert member.value == 1
    assert "schedule are unchanged" in caplog.text
    assert run(state, loader, 2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "training_iteration not found"),
        ({"training_iteration": {"epoch": 1}}, "epoch, update and sample are needed"),
        ({"training_iteration": {"epoch": "x"}}, "training_iteration is invalid"),
        ({"training_iteration": 5}, "training_iteration is invalid"),
        (
            {"training_iteration": {"epoch": 0, "update": 0, "sample": 0}, "trainer_state": {"version": 99}},
            "version 99",
        ),
        ({"training_iteration": {"epoch": 0, "update": 0, "sample": 0}, "trainer_state": {"version": 2}}, "no seed"),
    ],
)
def test_what_is_no_trainer_state_is_refused(state: dict[str, Any], message: str) -> None:
    """Foreign or newer data is refused with what is wrong about it."""
    with pytest.raises(StateMismatchError, match=message):
        TrainerState().load_state_dict(state)


Schedule = Callable[[torch.optim.Optimizer], Any]
SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20),
    "restarts": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3, T_mult=2),
    "one_cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
    "sequential": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16),
        ],
        milestones=[4],
    ),
    "chained": lambda optimizer: torch.optim.lr_scheduler.ChainedScheduler(
        [
            torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=6),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ]
    ),
    "multi_step": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 7, 7, 9]),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "polynomial": lambda optimizer: torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=15, power=2.0),
    "cyclic": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
}


@pytest.mark.parametrize("stop", [1, 5, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_resume_bit_for_bit(name: str, stop: int) -> None:
    """Building a schedule changes the optimizer; after both states are loaded every group is as if never stopped."""

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any, TrainerState]:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        schedule = SCHEDULES[name](optimizer)
        return module, optimizer, schedule, TrainerState(schedule=schedule)

    def train(parts: tuple[torch.nn.Module, torch.optim.Optimizer, Any, TrainerState], first: int, last: int) -> None:
        module, optimizer, schedule, state = parts
        for step in range(first, last):
            optimizer.zero_grad()
            module(torch.full((1, 3), float(step))).sum().backward()
            optimizer.step()
            schedule.step()
            state.advance(samples=1)

    def groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

    whole = build()
    train(whole, 0, 12)
    stopped = build()
    train(stopped, 0, stop)
    saved = through_file([part.state_dict() for part in (stopped[0], stopped[1], stopped[3])])  # type: ignore[arg-type]
    resumed = build()
    resumed[3].load_state_dict(saved[2])
    resumed[0].load_state_dict(saved[0])
    resumed[1].load_state_dict(saved[1])
    train(resumed, stop, 12)
    assert groups(resumed[1]) == groups(whole[1])
    assert resumed[2].get_last_lr() == whole[2].get_last_lr()
    assert torch.equal(resumed[0].weight, whole[0].weight)  # type: ignore[arg-type]
    assert resumed[3].iteration == whole[3].iteration == TrainingIteration(0, 12, 12)


def test_a_plateau_schedule_resumes_with_its_best_value() -> None:
    """The one schedule that is fed with a metric keeps its count of bad epochs."""

    def build() -> tuple[torch.optim.Optimizer, Any, TrainerState]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
        return optimizer, schedule, TrainerState(schedule=schedule)

    _optimizer, schedule, state = build()
    for value in (1.0, 2.0):
        schedule.step(value)
    optimizer, resumed, other = build()
    other.load_state_dict(through_file(state.state_dict()))
    resumed.step(2.0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert resumed.best == 1.0


def test_averaged_models_resume_with_their_count() -> None:
    """An average of weights is a module, whose state comes back under the same keys, count included."""
    average = torch.optim.swa_utils.AveragedModel(torch.nn.BatchNorm1d(2), use_buffers=True)
    with torch.no_grad():
        average.module.weight.fill_(3.0)
    average.n_averaged += 4
    saved = through_file(TrainerState(ema=average).state_dict())
    other = torch.optim.swa_utils.AveragedModel(torch.nn.BatchNorm1d(2), use_buffers=True)
    TrainerState(ema=other).load_state_dict(saved)
    assert other.module.weight.tolist() == [3.0, 3.0]
    assert int(other.n_averaged) == 4


Pair = collections.namedtuple("Pair", ["first", "second"])

TYPED: list[Any] = [
    numpy.array(0.37),
    numpy.array([1, 2], dtype=numpy.uint8),
    numpy.arange(6, dtype=numpy.int16).reshape(2, 3)[:, ::-1],
    numpy.array([0.5, 0.25], dtype=">f4"),
    numpy.float64(0.37),
    numpy.float16(0.1),
    numpy.int64(2**53 + 1),
    numpy.bool_(True),
    numpy.str_("a"),
    {1, (2, frozenset({3}))},
    frozenset({"a"}),
    (1, [numpy.int8(3)], (2.0,)),
    torch.Size([2, 3]),
    collections.deque([numpy.float32(1.5)], maxlen=4),
    collections.Counter({3: 2}),
    collections.OrderedDict([("b", 1), ("a", 2)]),
    collections.defaultdict(list, {"a": [1]}),
    {numpy.int64(3): {"inner": numpy.zeros(0)}, "text": None},
]


def same(first: Any, other: Any) -> bool:
    """Equal, with equal types all the way down."""
    if type(first) is not type(other):
        return False
    if isinstance(first, numpy.ndarray):
        return bool(first.dtype == other.dtype and first.shape == other.shape and (first == other).all())
    if isinstance(first, numpy.generic):
        return bool(first.dtype == other.dtype and first == other)
    if isinstance(first, dict):
        return all(same(a, b) for a, b in zip(first.items(), other.items(), strict=True))
    if isinstance(first, list | tuple | collections.deque):
        return len(first) == len(other) and all(same(a, b) for a, b in zip(first, other, strict=True))
    return bool(first == other)


@pytest.mark.parametrize("fresh", [None, 0, {}, numpy.array(0), numpy.int32(0), numpy.zeros(2, numpy.int64), [], "x"])
@pytest.mark.parametrize("saved", TYPED, ids=[f"{type(value).__name__}{i}" for i, value in enumerate(TYPED)])
def test_values_come_back_with_the_types_that_were_saved(saved: Any, fresh: Any) -> None:
    """Whatever the fresh object happens to hold, an integer zero or nothing yet."""
    other = Counter(fresh)
    stored = through_file(TrainerState(seed=0, member=Counter(saved)).state_dict())
    TrainerState(seed=0, member=other).load_state_dict(stored)
    assert same(other.value, saved), (saved, other.value)


def test_types_survive_a_committed_set(tmp_path: Path) -> None:
    """Through our own writer and reader as through torch's safe one."""
    saved = dict(enumerate(TYPED))
    paths = PathProvider(tmp_path, "run")
    model = bind(torch.nn.Linear(2, 2), "net")
    CheckpointWriter(paths).save(model, trainer=TrainerState(seed=0, member=Counter(saved)))
    other = Counter()
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    stack.initialize(model, trainer=TrainerState(seed=0, member=other))
    assert same(other.value, saved)


def test_loaded_arrays_are_not_those_of_the_stored_state() -> None:
    """What the loop adds to its array must not change the state that it was loaded from."""
    stored = TrainerState(seed=0, member=Counter(numpy.zeros(2))).state_dict()
    other = Counter(numpy.ones(2))
    TrainerState(seed=0, member=other).load_state_dict(stored)
    other.value += 1
    assert stored["trainer_state"]["stateful"]["member"]["value"].tolist() == [0.0, 0.0]


class Odd(dict[str, int]):
    """A dict of somebody's own."""


@pytest.mark.parametrize(
    "value",
    [
        Odd(a=1),
        numpy.array(["a"]),
        numpy.datetime64("2020-01-01"),
        numpy.ma.masked_array([1], [True]),
        numpy.longdouble(1),
    ],
)
def test_values_whose_type_could_not_come_back_are_refused(value: Any) -> None:
    """With their place, when they are saved."""
    with pytest.raises(StateMismatchError, match=r"member\.value\.0 is a"):
        TrainerState(seed=0, member=Counter([value])).state_dict()


@pytest.mark.parametrize("value", [Pair(1, numpy.float32(2)), collections.defaultdict(lambda: 7, {"a": 1})])
def test_a_class_that_no_file_can_name_is_taken_from_the_object_or_refused(value: Any) -> None:
    """It is there, or nothing is loaded; never a plain tuple or dict instead."""
    stored = through_file(TrainerState(seed=0, member=Counter([value])).state_dict())
    other = Counter([Pair(0, 0) if isinstance(value, Pair) else collections.defaultdict(lambda: 7)])
    TrainerState(seed=0, member=other).load_state_dict(stored)
    assert same(other.value, [value])
    fresh = Counter(None)
    with pytest.raises(StateMismatchError, match=r"member\.value\.0 was a"):
        TrainerState(seed=0, member=fresh).check_state_dict(stored)
    with pytest.raises(StateMismatchError, match="is a NoneType now"):
        TrainerState(seed=0, member=fresh).load_state_dict(stored)
    assert fresh.value is None


@pytest.mark.parametrize(
    "types",
    [
        None,
        {},
        {"member": 3},
        {"member": [[[0], "scalar", "O"]]},
        {"member": [[3]]},
        {"member": [[[0], "ndarray", "<f4"]]},
    ],
)
def test_types_that_do_not_fit_are_refused_before_anything_changes(types: Any) -> None:
    """A file may say what it likes, also nothing."""
    stored = TrainerState(seed=0, member=Counter(numpy.float64(0.37))).state_dict()
    stored["trainer_state"]["types"] = types
    other = Counter(numpy.int64(5))
    state = TrainerState(seed=0, member=other)
    with pytest.raises(StateMismatchError, match="types"):
        state.load_state_dict(stored)
    assert other.value == 5


class Versioned(torch.nn.Module):
    """Remembers which version it was told when it was loaded."""

    _version = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.told: Any = None

    def _load_from_state_dict(self, state: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        self.told = local_metadata.get("version")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


class Newer(Versioned):
    """The same, later."""

    _version = 2


@pytest.mark.parametrize("saved", [Versioned, Newer])
def test_modules_are_told_the_version_that_was_saved(tmp_path: Path, saved: type[Versioned]) -> None:
    """And not the one that they have now, which would keep them from translating older values."""
    paths = PathProvider(tmp_path, "run")
    model = bind(torch.nn.Linear(2, 2), "net")
    CheckpointWriter(paths).save(model, trainer=TrainerState(seed=0, ema=torch.nn.Sequential(saved())))
    ema = torch.nn.Sequential(Newer())
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    stack.initialize(model, trainer=TrainerState(seed=0, ema=ema))
    assert ema[0].told == saved._version
