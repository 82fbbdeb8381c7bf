"""Timings: what the stopwatch counts, and that every phase is counted where it happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch

from noether_init_core import (
    CheckpointWriter,
    InitializerBase,
    InitializerStack,
    KindConfig,
    PathProvider,
    PlanError,
    Timing,
    TrainingIteration,
    bind,
    kinds,
    open_checkpoint,
)
from noether_init_core.stopwatch import Stopwatch, summed


class Clock:
    """Shows what it is told; ``pass_`` lets time go by."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_a_phase_inside_another_is_not_counted_twice() -> None:
    """The outer one stands still meanwhile; bytes belong to the phase that says them."""
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.phase("copy", 8):
        clock.pass_(1)
        with watch.phase("read", 64):
            clock.pass_(2)
        clock.pass_(4)
    clock.pass_(8)
    assert watch.timings == (Timing("read", 2, 64), Timing("copy", 5, 8))


def test_short_phases_are_not_lost_on_a_clock_that_runs_for_long() -> None:
    """Only differences of what it shows are added up."""
    clock = Clock()
    clock.now = 2.0**40
    watch = Stopwatch(clock)
    with watch.phase("copy"):
        clock.pass_(1)
    watch._seconds["copy"] = 0.1
    with watch.phase("copy"):
        clock.pass_(2)
    assert watch.timings == (Timing("copy", 0.1 + 2),)


def test_phases_are_told_in_their_order_and_those_of_others_behind() -> None:
    """Whatever came first; a kind may have a phase of its own."""
    clock = Clock()
    watch = Stopwatch(clock)
    for name in ("unpack", "copy", "find", "download"):
        with watch.phase(name):
            clock.pass_(1)
    assert [one.phase for one in watch.timings] == ["find", "copy", "unpack", "download"]


def test_a_phase_that_raises_has_its_time_and_no_bytes() -> None:
    """What failed took time, and nobody knows how many bytes went through it."""
    clock = Clock()
    watch = Stopwatch(clock)

    def fail() -> None:
        with watch.phase("read", 64):
            clock.pass_(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with watch.phase("copy"):
        clock.pass_(1)
    assert watch.timings == (Timing("read", 3), Timing("copy", 1))


def test_since_earlier_timings_is_what_is_new() -> None:
    """Seconds and bytes of each phase that went on."""
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.phase("read", 10):
        clock.pass_(1)
    earlier = watch.timings
    assert watch.since(earlier) == ()
    with watch.phase("read", 5):
        clock.pass_(2)
    assert watch.since(earlier) == (Timing("read", 2, 5),)
    assert watch.since(()) == (Timing("read", 3, 15),)


def test_sums_keep_none_where_nobody_counted_bytes() -> None:
    """None is not zero bytes."""
    found = summed([Timing("read", 1, 4), Timing("find", 1), Timing("read", 2), Timing("find", 2)])
    assert found == (Timing("find", 3), Timing("read", 3, 4))


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 16)).to(dtype)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(8, 64, dtype=dtype)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return bind(module, name="net", optimizer=optimizer)


WEIGHTS = 4 * (64 * 32 + 32 + 32 * 16 + 16)


@pytest.fixture
def run(tmp_path: Path) -> PathProvider:
    paths = PathProvider(tmp_path, "source")
    CheckpointWriter(paths).save(net(), TrainingIteration(1, 2, 3), trainer=Stateful())
    return paths


class Stateful:
    def state_dict(self) -> dict[str, Any]:
        return {"table": torch.zeros(1000)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def phases(report: Any) -> dict[str, Timing]:
    return {one.phase: one for one in report.timings}


def initialize(run: PathProvider, model: Any, **config: Any) -> Any:
    stack = InitializerStack.from_config([{"kind": "previous_run", "run_id": "source", **config}], path_provider=run)
    return stack.initialize(model)


def test_weights_are_found_screened_verified_and_read(run: PathProvider) -> None:
    """Of the same dtype they go straight into the parameters: no copy; every byte is verified and read once."""
    found = phases(initialize(run, net(1)))
    assert list(found) == ["find", "screen", "verify", "read"]
    assert all(one.seconds > 0 for one in found.values())
    assert (found["find"].nbytes, found["screen"].nbytes, found["read"].nbytes) == (None, None, WEIGHTS)
    (file,) = (run.checkpoint_path / "sets").rglob("*_model.th")
    assert WEIGHTS <= (found["verify"].nbytes or 0) <= file.stat().st_size


def test_verify_none_compares_nothing(run: PathProvider) -> None:
    """No byte is counted as verified."""
    found = phases(initialize(run, net(1), verify="none"))
    assert found["verify"].nbytes is None
    assert found["read"].nbytes == WEIGHTS


def test_another_dtype_is_a_cast(run: PathProvider) -> None:
    """Reading the pieces is in it; the bytes are those of the file."""
    found = phases(initialize(run, net(1, torch.bfloat16)))
    assert found["cast"].nbytes == WEIGHTS
    assert found["read"].nbytes is None


def test_steps_read_and_then_copy(run: PathProvider) -> None:
    """What is transposed on the way is read once and copied once; the rest is read into place."""
    rules = [{"from": "0.weight", "to": "0.weight", "do": ["transpose", "transpose"]}]
    found = phases(initialize(run, net(1), transforms=rules))
    assert found["read"].nbytes == WEIGHTS
    assert found["copy"].nbytes == 4 * 64 * 32


def test_a_resume_counts_the_optimizer_and_the_trainer(run: PathProvider) -> None:
    """All three files are verified; moments are read by the pass that verifies them, the trainer's table is read."""
    report = InitializerStack.from_config([{"kind": "resume"}], path_provider=run).initialize(net(1), Stateful())
    found = phases(report)
    size = sum(file.stat().st_size for file in (run.checkpoint_path / "sets").rglob("*.th"))
    assert 3 * WEIGHTS + 4000 <= (found["verify"].nbytes or 0) <= size
    assert found["read"].nbytes == WEIGHTS + 4000
    assert "copy" in found


def test_walking_back_counts_what_was_read_on_the_way(run: PathProvider) -> None:
    """The broken set that is passed over has taken its time, too."""
    CheckpointWriter(run).save(net(1), TrainingIteration(2, 4, 6), trainer=Stateful())
    broken = next((run.checkpoint_path / "sets").glob("00000002*")) / "net_cp=E2_U4_S6_model.th"
    broken.chmod(0o644)
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    stack = InitializerStack.from_config([{"kind": "resume", "on_invalid": "previous"}], path_provider=run)
    report = stack.initialize(net(2), Stateful())
    assert [name for name, _reason in report.initializers[0].passed_over] == ["00000002_E2_U4_S6"]
    assert (phases(report)["verify"].nbytes or 0) > 7 * WEIGHTS


def test_each_initialization_has_timings_of_its_own(run: PathProvider) -> None:
    """What the first one took is not in the report of the second, and failures leave nothing behind."""
    stack = InitializerStack.from_config([{"kind": "previous_run", "run_id": "source"}], path_provider=run)
    for _ in range(2):
        assert phases(stack.initialize(net(1)))["read"].nbytes == WEIGHTS
    with pytest.raises(PlanError):
        stack.initialize(bind(torch.nn.Linear(2, 2), name="net"))
    assert stack.initializers[0].timings == ()


def test_timings_are_in_the_report_and_its_json_but_make_no_report_another_one(run: PathProvider) -> None:
    """Two starts that did the same have equal reports; what is kept beside sets has no seconds."""
    first, second = (initialize(run, net(1)) for _ in range(2))
    assert first.timings != second.timings
    assert first == second
    data = json.loads(first.to_json())
    assert [one["phase"] for one in data["timings"]] == ["find", "screen", "verify", "read"]
    assert data["initializers"][0]["timings"] == data["timings"] == [attrs.asdict(one) for one in first.timings]
    assert '"seconds"' not in json.dumps(first.provenance())


def test_the_sum_is_over_all_initializers(run: PathProvider) -> None:
    """Two that read the same file have read it twice."""
    config = {"kind": "previous_run", "run_id": "source"}
    report = InitializerStack.from_config([config, config], path_provider=run).initialize(net(1))
    each = [one.nbytes for of in report.initializers for one in of.timings if one.phase == "read"]
    assert each == [WEIGHTS, WEIGHTS]
    assert phases(report)["read"].nbytes == 2 * WEIGHTS


def test_a_reader_counts_for_a_stopwatch_that_it_is_given(tmp_path: Path) -> None:
    """A digest reads the whole file; one tensor is read by itself."""
    torch.save({"a": torch.zeros(100)}, tmp_path / "a.pt")
    watch = Stopwatch()
    with open_checkpoint(tmp_path / "a.pt", stopwatch=watch) as reader:
        assert [one.phase for one in watch.timings] == ["screen"]
        reader.read("a")
        reader.materialize(reader.load())
    assert {one.phase: one.nbytes for one in watch.timings} == {"screen": None, "read": 800}


class Downloading(InitializerBase):
    """A kind that neither calls the constructor of the base class nor its ``release``."""

    config_class: ClassVar[type[KindConfig]] = KindConfig
    contract: ClassVar[int] = 1

    def __init__(self, config: KindConfig, *, path_provider: Any = None) -> None:
        self.config = config

    def init_weights(self, model: Any) -> None:
        with self.stopwatch.phase("download", 1000):
            pass

    def init_optimizer(self, model: Any) -> None:
        pass

    def release(self) -> None:
        pass


@pytest.fixture
def downloading() -> Iterator[None]:
    kinds.register("downloading", Downloading)
    yield
    kinds.unregister("downloading")


@pytest.mark.usefixtures("downloading")
def test_a_kind_of_others_records_phases_of_its_own() -> None:
    """With the stopwatch that it has; the stack begins anew after each initialization."""
    stack = InitializerStack.from_config([{"kind": "downloading"}])
    for _ in range(2):
        (found,) = stack.initialize(net(1)).timings
        assert (found.phase, found.nbytes) == ("download", 1000)
