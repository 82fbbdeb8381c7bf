"""The kinds of the core pass the kit like everybody's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from noether_init_core import CheckpointError, CheckpointNotFoundError
from noether_init_core.testing import Case, InitializerConformance, SavedRun, Wrong, closed, open_

CORE = "noether-init-core"


class TestFile(InitializerConformance):
    kind = "file"
    distribution = CORE
    composites = nested = closed("one file holds one model")

    @pytest.fixture
    def make_config(self) -> Callable[[Case], dict[str, Any]]:
        return lambda case: {"path": str(case.source.file)}

    @pytest.fixture
    def wrong_configs(self, tmp_path: Path, broken_runs: Mapping[str, SavedRun]) -> Sequence[Wrong]:
        return [
            Wrong("no such file", {"path": str(tmp_path / "none.pt")}, CheckpointNotFoundError, "none.pt"),
            *(Wrong(what, {"path": str(run.file)}, CheckpointError) for what, run in broken_runs.items()),
        ]


class TestFileWithSurgery(TestFile):
    """A rule of every form, and a step of every form that moves nothing."""

    @pytest.fixture
    def make_config(self) -> Callable[[Case], dict[str, Any]]:
        steps = ["transpose", "transpose", {"slice": {"dim": 0}}, {"reshape": [-1]}]
        rules = [
            {"from": "square.weight", "do": [*steps[:3]], "optional": True},
            {"from_regex": "coarse", "do": steps[3:], "optional": True},
            {"drop": ["*.no_such_name"]},
        ]
        return lambda case: {"path": str(case.source.file), "transforms": rules, "on_unmatched_rule": "warn"}


class OfRuns(InitializerConformance):
    distribution = CORE
    needs_path_provider = open_()
    __test__ = False

    @pytest.fixture
    def wrong_configs(self, broken_runs: Mapping[str, SavedRun]) -> Sequence[Wrong]:
        return [
            Wrong(what, {"run_id": run.run_id, "output_path": str(run.paths.output_root)}, CheckpointError)
            for what, run in broken_runs.items()
        ]


class TestPreviousRun(OfRuns):
    kind = "previous_run"

    @pytest.fixture
    def make_config(self) -> Callable[[Case], dict[str, Any]]:
        return lambda case: {"run_id": case.source.run_id}


class TestResume(OfRuns):
    kind = "resume"
    continues = restores_optimizer = restores_trainer = restores_callbacks = open_()

    @pytest.fixture
    def make_config(self) -> Callable[[Case], dict[str, Any]]:
        return lambda case: {}
