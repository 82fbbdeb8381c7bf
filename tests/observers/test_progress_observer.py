"""The observer ``progress``: a bar for each large phase, which is told every byte that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, bind
from noether_init_core.errors import CheckpointCorruptError
from noether_init_core.observers import progress as module


@attrs.define
class Bar:
    """A bar as it would be shown."""

    label: str
    total: int | None
    done: int = 0
    has_ended: bool = False


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    """Every bar of the test; also little work has one."""
    found: list[Bar] = []

    @contextmanager
    def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        bar = Bar(label, total)
        found.append(bar)

        def advance(nbytes: int) -> None:
            bar.done += nbytes

        try:
            yield advance
        finally:
            bar.has_ended = True

    monkeypatch.setattr(module, "progress", progress)
    monkeypatch.setattr(module, "_LEAST", 1)
    return found


def model() -> Any:
    layer = torch.nn.Linear(300, 300)
    return bind(layer, name="net", optimizer=torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9))


@pytest.fixture
def run(tmp_path: Path) -> PathProvider:
    paths = PathProvider(tmp_path, "source")
    CheckpointWriter(paths).save(model(), trainer=TrainerState(seed=0))
    return paths


def start(run: PathProvider, **entry: Any) -> InitializerStack:
    """A stack with the observer switched on by its name."""
    config = {"kind": "previous_run", "run_id": "source", "load_optim": False, **entry}
    return InitializerStack.from_config({"observers": ["progress"], "initializers": [config]}, path_provider=run)


def test_verifying_and_reading_have_a_bar_each(run: PathProvider, bars: list[Bar]) -> None:
    """Both end near their total: a file is a little more than its records, weights are read exactly."""
    start(run).initialize(model())
    verify, read = bars
    assert (verify.label, read.label) == ("previous_run: verify", "previous_run: read")
    assert read.done == read.total == 4 * (300 * 300 + 300)
    assert verify.total is not None
    assert read.total < verify.done <= verify.total < 1.02 * read.total
    assert verify.has_ended
    assert read.has_ended


def test_what_steps_read_moves_one_bar(run: PathProvider, bars: list[Bar]) -> None:
    """Reads inside a phase are no bars of their own."""
    start(run, transforms=[{"from": "weight", "to": "weight", "do": ["transpose"]}]).initialize(model())
    assert [bar.label for bar in bars] == ["previous_run: verify", "previous_run: read", "previous_run: copy"]
    assert [bar.done for bar in bars[1:]] == [4 * 300, 4 * 300 * 300]


def test_a_bar_ends_with_an_error(run: PathProvider, bars: list[Bar]) -> None:
    """Damage is found while the bar is there; the next initialization has bars again."""
    (path,) = run.checkpoint_path.rglob("net_cp=*_model.th")
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    stack = start(run)
    path.write_bytes(damaged)
    with pytest.raises(CheckpointCorruptError):
        stack.initialize(model())
    assert [(bar.label, bar.has_ended) for bar in bars] == [("previous_run: verify", True)]
    path.write_bytes(content)
    stack.initialize(model())
    assert [bar.has_ended for bar in bars[1:]] == [True, True]


def test_little_work_has_no_bar(run: PathProvider, bars: list[Bar], monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 16 MiB; nor has anything without the observer."""
    monkeypatch.undo()
    start(run).initialize(model())
    assert bars == []
