"""The observer ``timing``: a line for each hook on stderr, and nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from noether_init_core import (
    CheckpointWriter,
    InitializerBase,
    InitializerStack,
    KindConfig,
    PartlyInitializedError,
    PathProvider,
    TrainerState,
    bind,
    kinds,
)
from noether_init_core.observers.timing import in_words
from noether_init_core.stopwatch import Timing


def model() -> Any:
    module = torch.nn.Linear(300, 300)
    return bind(module, name="net", optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))


@pytest.fixture
def run(tmp_path: Path) -> PathProvider:
    paths = PathProvider(tmp_path, "source")
    CheckpointWriter(paths).save(model(), trainer=TrainerState(seed=0))
    return paths


def lines(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str, str]]:
    """(kind, hook or check, the rest) of each line; nothing is on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    found = []
    for line in captured.err.splitlines():
        matched = re.fullmatch(r"timing  (\S+) +(\S+) *(.*)", line)
        assert matched, line
        found.append((matched[1], matched[2], matched[3]))
    return found


def test_a_line_for_each_hook_and_for_the_check(run: PathProvider, capsys: pytest.CaptureFixture[str]) -> None:
    """Switched on by name; what the check took stands in a line of its own before the first hook."""
    config = {"observers": ["timing"], "initializers": [{"kind": "resume"}]}
    stack = InitializerStack.from_config(config, path_provider=run)
    stack.initialize(model(), trainer=TrainerState(seed=0), callbacks=[])
    said = lines(capsys)
    assert [(kind, hook) for kind, hook, _rest in said] == [
        ("resume", "start_checkpoint"),
        ("resume", "check"),
        ("resume", "init_trainer"),
        ("resume", "init_weights"),
        ("resume", "init_optimizer"),
        ("resume", "init_callbacks"),
    ]
    rest = {hook: rest for _kind, hook, rest in said}
    assert re.match(r"[\d.]+ ms  find [\d.]+ ms; screen ", rest["start_checkpoint"])
    assert re.search(r"verify [\d.]+ ms, [\d.]+ kB at [\d.]+ .B/s", rest["check"])
    assert re.fullmatch(r"[\d.]+ ms  read [\d.]+ ms, 361 kB at [\d.]+ .B/s", rest["init_weights"])


def test_a_second_initialization_begins_anew(run: PathProvider, capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines are those of the first, whatever the stopwatch showed before."""
    config = {"observers": ["timing"], "initializers": [{"kind": "previous_run", "run_id": "source"}]}
    stack = InitializerStack.from_config(config, path_provider=run)
    stack.initialize(model())
    first = [re.sub(r"[\d.]+ \S+", "", rest) for *_, rest in lines(capsys)]
    stack.initialize(model())
    assert [re.sub(r"[\d.]+ \S+", "", rest) for *_, rest in lines(capsys)] == first


def test_nothing_is_printed_unless_it_is_switched_on(run: PathProvider, capsys: pytest.CaptureFixture[str]) -> None:
    """Being installed is not enough."""
    InitializerStack.from_config([{"kind": "resume"}], path_provider=run).initialize(model(), TrainerState(seed=0))
    assert capsys.readouterr().err == ""


class Failing(InitializerBase):
    config_class: ClassVar[type[KindConfig]] = KindConfig
    contract: ClassVar[int] = 1

    def init_weights(self, model: Any) -> None:
        raise RuntimeError("the plugin failed")

    def init_optimizer(self, model: Any) -> None:
        pass


@pytest.fixture
def failing() -> Iterator[None]:
    kinds.register("failing", Failing)
    yield
    kinds.unregister("failing")


@pytest.mark.usefixtures("failing")
def test_a_hook_that_fails_has_its_line_and_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The time until then is told, and the error goes on."""
    stack = InitializerStack.from_config({"observers": ["timing"], "initializers": [{"kind": "failing"}]})
    with pytest.raises(PartlyInitializedError, match="the plugin failed"):
        stack.initialize(model())
    assert re.fullmatch(r"[\d.]+ ms  failed", lines(capsys)[-1][2])


@pytest.mark.parametrize(
    ("timing", "words"),
    [
        (Timing("find", 0.0031), "find 3.10 ms"),
        (Timing("read", 0.0521, 1_210_000_000), "read 52.1 ms, 1.21 GB at 23.2 GB/s"),
        (Timing("verify", 2.5, 999_600), "verify 2.50 s, 1 MB at 400 kB/s"),
        (Timing("copy", 0.0, 12), "copy 0.00 ms, 12 B"),
    ],
)
def test_phases_in_words(timing: Timing, words: str) -> None:
    """Seconds, bytes and rate, three digits each; no rate of no time."""
    assert in_words(timing) == words
