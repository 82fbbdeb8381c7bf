"""Folders of runs that have another name than the run, and what callbacks are shown of them."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import (
    CheckpointError,
    CheckpointWriter,
    ConfigError,
    InitializerStack,
    PathProvider,
    StateMismatchError,
    TrainingIteration,
    bind,
)
from noether_init_core.paths import check_run_id


def model_of(value: float) -> Any:
    module = torch.nn.Linear(2, 2)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, value)
    return bind(module, "net")


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    """A run with one set, in a stage."""
    paths = PathProvider(tmp_path, "original", "train")
    CheckpointWriter(paths, flat_names=True).save(model_of(3), TrainingIteration(1, 2, 3))
    return paths


def start(config: Any, paths: PathProvider, model: Any, **further: Any) -> Any:
    return InitializerStack.from_config(config, path_provider=paths).initialize(model, **further)


def test_a_run_cannot_have_the_name_of_the_folder_of_debug_runs(tmp_path: Path) -> None:
    """Otherwise ``debug`` with stage ``a`` would be the debug run ``a``, and auto_resume would go on from it."""
    for make in (
        lambda: PathProvider(tmp_path, "debug", "a"),
        lambda: PathProvider(tmp_path, "run").with_run("debug"),
        lambda: InitializerStack.from_config([{"kind": "previous_run", "run_id": "debug"}], path_provider=None),
    ):
        with pytest.raises(ConfigError, match="holds the runs of debug mode"):
            make()
    assert [check_run_id(name) for name in ("Debug", "debug1")] == ["Debug", "debug1"]
    assert PathProvider(tmp_path, "a", debug=True).run_output_path == tmp_path / "debug" / "a"


@pytest.mark.parametrize(
    "config", [{"auto_resume": True}, {"auto_resume": True, "on_invalid": "previous"}, [{"kind": "resume"}]]
)
@pytest.mark.parametrize("is_stage", [False, True])
def test_a_run_does_not_go_on_from_a_folder_that_was_copied(paths: PathProvider, config: Any, is_stage: bool) -> None:
    """It says nothing of another run, so that it would continue a stranger's training; nothing is changed."""
    copied = PathProvider(paths.output_root, *(("original", "other") if is_stage else ("copy", "train")))
    shutil.copytree(paths.run_output_path, copied.run_output_path)
    model = model_of(0)
    with pytest.raises(CheckpointError, match=r"written by run original/train and is read as run \w+/\w+:") as caught:
        start(config, copied, model)
    assert "run_id: " + copied.run_id in str(caught.value)
    assert model.weight.sum() == 0
    assert start(config, paths, model).start == TrainingIteration(1, 2, 3)


@pytest.mark.parametrize("kind", ["resume", "previous_run"])
def test_a_folder_that_was_renamed_is_used_where_the_config_names_it(
    paths: PathProvider, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """That makes it a choice: one line in the log, and after the next save the run is its own."""
    renamed = PathProvider(paths.output_root, "renamed", "train")
    shutil.move(paths.output_root / "original", paths.output_root / "renamed")
    model = model_of(0)
    with caplog.at_level(logging.WARNING):
        start([{"kind": kind, "run_id": "renamed", "stage_name": "train"}], renamed, model)
    assert model.weight.sum() == 12
    assert [record.message for record in caplog.records if "was renamed or copied" in record.message] != []
    CheckpointWriter(renamed, flat_names=True).save(model, TrainingIteration(2, 3, 4))
    caplog.clear()
    assert start({"auto_resume": True}, renamed, model).start == TrainingIteration(2, 3, 4)
    assert caplog.records == []


class Plain:
    """A callback without files of its own."""


class FromFiles:
    """A callback that resumes from files, as Noether's EMA does."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def resume_from_checkpoint(self, resumption_paths: Any, model: Any) -> None:
        self.found = sorted(path.name for path in resumption_paths.checkpoint_path.iterdir())


def no_room(*arguments: Any, **options: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "config", [{"kind": "resume"}, {"kind": "previous_run", "run_id": "original", "load_callbacks": True}]
)
def test_a_temporary_folder_is_made_only_for_callbacks_that_need_it(
    paths: PathProvider, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    """Where none can be made, such a callback is an error before anything changes, and others do not notice."""
    config = {**config, "stage_name": "train"} if config["kind"] == "previous_run" else config
    callback, model = FromFiles(), model_of(0)
    start([config], paths, model, callbacks=[Plain(), callback])
    assert "net_cp=latest_model.th" in callback.found
    monkeypatch.setattr(tempfile, "mkdtemp", no_room)
    model = model_of(0)
    with pytest.raises(StateMismatchError, match=r"temporary folder.*No space left.*Nothing was changed"):
        start([config], paths, model, callbacks=[callback])
    assert model.weight.sum() == 0
    start([config], paths, model, callbacks=[Plain()])
    assert model.weight.sum() == 12
