"""Flat files that do not belong together, and links that lead to what is not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.advice import executes

from noether_init_core import (
    CheckpointFormatError,
    CheckpointUnreachableError,
    CheckpointWriteError,
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    TornSetError,
    TrainingIteration,
    bind,
)


class Trainer:
    """Takes any state."""

    state: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def net(value: float = 0.0) -> Any:
    module = torch.nn.Linear(2, 1)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, value)
    return bind(module, name="net")


class Flat:
    """A folder of flat files, as Noether writes them."""

    def __init__(self, root: Path) -> None:
        self.paths = PathProvider(root, "A")
        self.folder = self.paths.checkpoint_path
        self.folder.mkdir(parents=True)

    def weights(self, name: str, value: float, number: int = 2, run: str = "A") -> None:
        iteration = TrainingIteration(number, number, number).to_mapping()
        content = {"state_dict": net(value).state_dict(), "training_iteration": iteration, "run_id": run}
        torch.save(content, self.folder / f"{name}_model.th")

    def trainer(self, name: str, number: int = 2, run: str = "A", **more: Any) -> None:
        iteration = TrainingIteration(number, number, number).to_mapping()
        content = {"callback_state_dicts": {}, "training_iteration": iteration, "run_id": run, **more}
        torch.save(content, self.folder / f"{name}_trainer.th")

    def start(self, **config: Any) -> Any:
        model = net()
        InitializerStack.from_config([config], path_provider=self.paths).initialize(model, trainer=Trainer())
        return model.weight[0, 0].item()


@pytest.mark.parametrize("kind", ["previous_run", "resume"])
def test_an_average_of_another_run_is_not_that_of_the_set(tmp_path: Path, kind: str) -> None:
    """It has the iteration of the set in its name and header, and comes from another training."""
    flat = Flat(tmp_path)
    flat.weights("net_cp=latest", 2.0)
    flat.trainer("net_cp=latest")
    flat.weights("net_ema=0.9_cp=latest", 3.0, 3)
    flat.weights("net_ema=0.9_cp=E2_U2_S2", 77.0, run="B")
    with pytest.raises(TornSetError, match="different runs"):
        flat.start(kind=kind, run_id="A", model_info="ema=0.9")
    flat.weights("net_ema=0.9_cp=E2_U2_S2", 5.0)
    assert flat.start(kind=kind, run_id="A", model_info="ema=0.9") == 5.0


@pytest.mark.parametrize("kind", ["previous_run", "resume"])
def test_weights_of_another_run_beside_the_trainer_file_are_refused(tmp_path: Path, kind: str) -> None:
    """Also where the trainer file is not loaded."""
    flat = Flat(tmp_path)
    flat.weights("net_cp=latest", 55.0, run="B")
    flat.trainer("net_cp=latest")
    with pytest.raises(TornSetError, match="different runs"):
        flat.start(kind=kind, run_id="A")
    flat.trainer("net_cp=latest", run="B")  # a folder that was renamed
    assert flat.start(kind=kind, run_id="A") == 55.0


def test_weights_that_were_written_again_after_the_start_was_asked_for_are_refused(tmp_path: Path) -> None:
    """The trainer's state of the first save would go with the weights of the second one, of the same iteration."""
    flat = Flat(tmp_path)
    flat.weights("net_cp=latest", 1.0)
    flat.trainer("net_cp=latest", save=1)
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=flat.paths)
    stack.start_checkpoint()
    (flat.folder / "net_cp=latest_model.th").unlink()
    flat.weights("net_cp=latest", 2.0)
    flat.trainer("net_cp=latest", save=2)
    model, trainer = net(), Trainer()
    with pytest.raises(TornSetError, match="was written again since it was selected"):
        stack.initialize(model, trainer=trainer)
    assert (model.weight[0, 0].item(), trainer.state) == (0.0, None)
    assert flat.start(kind="resume") == 2.0


def saved(root: Path, *numbers: int) -> tuple[PathProvider, CheckpointWriter, Path]:
    """A run with a set for each number; the last folder."""
    paths = PathProvider(root / "out", "run")
    writer = CheckpointWriter(paths)
    for number in numbers:
        folder = writer.save(net(number), TrainingIteration(number, number, number), trainer=Trainer()).folder
    return paths, writer, folder


@pytest.mark.parametrize("numbers", [(1, 2), (2,)], ids=["beside an older set", "alone"])
def test_the_newest_set_behind_a_link_to_a_disk_that_is_gone_is_not_passed_over(
    tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    """Neither an older set nor a fresh start; and a save says so. With the disk back, the set is found."""
    paths, writer, folder = saved(tmp_path, *numbers)
    disk = tmp_path / "disk"
    disk.mkdir()
    shutil.move(folder, disk / folder.name)
    folder.symlink_to(disk / folder.name)
    disk.rename(tmp_path / "off")
    for config in (True, {"on_invalid": "previous"}):
        with pytest.raises(CheckpointUnreachableError, match=r"is a link to .* Next: mount its disk"):
            InitializerStack.from_config({"auto_resume": config, "initializers": []}, path_provider=paths)
    with pytest.raises(CheckpointUnreachableError):
        InitializerStack.from_config([{"kind": "previous_run", "run_id": "run"}], path_provider=paths).plan(net())
    with pytest.raises(CheckpointWriteError, match="is a link to"):
        writer.save(net(9), TrainingIteration(9, 9, 9), trainer=Trainer())
    (tmp_path / "off").rename(disk)
    stack = InitializerStack.from_config({"auto_resume": True, "initializers": []}, path_provider=paths)
    assert str(stack.start_checkpoint()) == "E2_U2_S2"


def test_flat_files_behind_links_to_a_disk_that_is_gone_are_not_passed_over(tmp_path: Path) -> None:
    """Older files that are there are not the newest."""
    flat, disk = Flat(tmp_path), tmp_path / "disk"
    disk.mkdir()
    flat.weights("net_cp=latest", 2.0)
    flat.trainer("net_cp=latest")
    for path in list(flat.folder.iterdir()):
        shutil.move(path, disk / path.name)
        path.symlink_to(disk / path.name)
    flat.weights("net_cp=E1_U1_S1", 1.0, 1)
    flat.trainer("net_cp=E1_U1_S1", 1)
    assert flat.start(kind="resume") == 2.0
    disk.rename(tmp_path / "off")
    with pytest.raises(CheckpointUnreachableError, match="Next: mount its disk"):
        flat.start(kind="resume")


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_file_of_another_program_behind_a_link_in_a_set_is_not_removed(tmp_path: Path, is_committed: bool) -> None:
    """Clean-up and retention remove the link, and not what may be the only copy."""
    paths, writer, folder = saved(tmp_path, 1)
    if is_committed:
        file = folder / "net_cp=E1_U1_S1_model.th"
        flat = paths.checkpoint_path / file.name
        file.rename(flat)
    else:
        folder = folder.with_name("00000007_E9_U9_S9")
        folder.mkdir()
        flat = paths.checkpoint_path / "net_cp=E9_U9_S9_model.th"
        torch.save({"state_dict": {}}, flat)
        file = folder / flat.name
    file.symlink_to(os.path.relpath(flat, folder))
    content = flat.read_bytes()
    writer = CheckpointWriter(paths, keep_last=2)
    for number in (11, 12, 13):
        writer.save(net(number), TrainingIteration(number, number, number), trainer=Trainer())
    assert flat.read_bytes() == content
    assert not folder.exists()


@executes("sets/selection.py", "Next: kind: previous_run for its weights, and a start at iteration zero")
@pytest.mark.parametrize("iteration", [None, {"epoch": 3, "update": None, "sample": None}])
def test_a_trainer_file_without_a_full_iteration_is_no_fresh_start(tmp_path: Path, iteration: Any) -> None:
    """The run is there; only where it stands is unknown. Its weights can be had."""
    flat = Flat(tmp_path)
    torch.save({"state_dict": net(5.0).state_dict()}, flat.folder / "net_cp=latest_model.th")
    state = {"callback_state_dicts": {}, **({"training_iteration": iteration} if iteration else {})}
    torch.save(state, flat.folder / "net_cp=latest_trainer.th")
    for config in (True, {"on_invalid": "previous"}):
        with pytest.raises(CheckpointFormatError):
            InitializerStack.from_config(
                {"auto_resume": config, "initializers": []}, path_provider=flat.paths
            ).start_checkpoint()
    assert flat.start(kind="previous_run", run_id="A") == 5.0
