"""Flat files of one tag that are of different iterations, as an interrupted run of another program leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import InitializerStack, PathProvider, bind, compose
from noether_init_core.errors import TornSetError
from noether_init_core.inspection.reading import look_at_folder
from noether_init_core.sets.health import verify_run
from noether_init_core.sets.snapshot import Snapshot

PLAIN = "E3_U12_S48"


class Trainer:
    """The least trainer."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Folder:
    """A folder of flat files; the value of all weights is the number of the update, plus a half for an average."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "run" / "checkpoints"
        self.folder.mkdir(parents=True)

    def put(self, stem: str, tag: str, part: str, update: int) -> None:
        """Write one file that records the iteration of ``update``."""
        content: dict[str, Any] = {
            "training_iteration": {"epoch": update // 4, "update": update, "sample": 4 * update},
            "run_id": "run",
        }
        if part == "model":
            value = update + 0.5 * ("=" in stem)
            content["state_dict"] = {"weight": torch.full((1, 2), value), "bias": torch.full((1,), value)}
        elif part == "optim":
            layer = torch.nn.Linear(2, 1)
            content |= torch.optim.AdamW(layer.parameters()).state_dict()
            content["param_idx_to_name"] = {0: "weight", 1: "bias"}
        torch.save(content, self.folder / f"{stem}_cp={tag}_{part}.th")

    def put_set(self, tag: str, update: int, stem: str = "mlp") -> None:
        """Write weights, optimizer and trainer."""
        for part in ("model", "optim", "trainer"):
            self.put(stem, tag, part, update)

    def start(self, config: Any, model: Any = None, **more: Any) -> float:
        """Initialize a model from the folder and return the value of its weights."""
        network = torch.nn.Linear(2, 1)
        torch.nn.init.constant_(network.weight, -1)
        model = model or bind(network, name="mlp", optimizer=torch.optim.AdamW(network.parameters()))
        paths = PathProvider(self.root, "run" if "resume" in str(config) else "new")
        try:
            InitializerStack.from_config(config, path_provider=paths).initialize(model, trainer=Trainer(), **more)
        except TornSetError:
            assert (network.weight == -1).all(), "an error leaves the model as it was"
            raise
        return network.weight[0, 0].item()

    def problems(self) -> str:
        """Everything that inspect and verify report."""
        run = look_at_folder(self.root / "run")
        health = verify_run(Snapshot(PathProvider(self.root, "run")))
        states = {one.name: one.state for one in health.sets}
        return f"{run.problems} {states}"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A checkpoint at U12 under two tags; ``latest`` has an average of U14."""
    found = Folder(tmp_path)
    for tag in ("latest", PLAIN):
        found.put_set(tag, 12)
    found.put("mlp_ema=0.9", "latest", "model", 14)
    return found


def resume(**fields: Any) -> list[dict[str, Any]]:
    return [{"kind": "resume", **fields}]


def warm(**fields: Any) -> list[dict[str, Any]]:
    return [{"kind": "previous_run", "run_id": "run", **fields}]


@pytest.mark.parametrize("kind", [resume, warm])
def test_the_average_of_the_set_itself_is_taken(folder: Folder, kind: Callable[..., Any]) -> None:
    """It lies under the tag of the iteration; that of ``latest`` is newer than the weights beside it."""
    folder.put("mlp_ema=0.9", PLAIN, "model", 12)
    assert folder.start(kind(model_info="ema=0.9")) == 12.5
    assert folder.start(kind()) == 12


@pytest.mark.parametrize("kind", [resume, warm])
def test_without_an_average_of_the_set_there_is_an_error(folder: Folder, kind: Callable[..., Any]) -> None:
    """Also where the file under the tag of the iteration records another one."""
    with pytest.raises(TornSetError, match=r"E3_U14_S56.*E3_U12_S48"):
        folder.start(kind(model_info="ema=0.9"))
    folder.put("mlp_ema=0.9", PLAIN, "model", 8)
    with pytest.raises(TornSetError, match=r"E3_U14_S56.*E3_U12_S48"):
        folder.start(kind(model_info="ema=0.9"))
    with pytest.raises(TornSetError, match="E2_U8_S32"):
        folder.start(kind(model_info="ema=0.9", checkpoint_tag=PLAIN))


def test_each_of_several_averages_is_compared(folder: Folder) -> None:
    """One is of the iteration of the set, the other one is not and has no copy of its own."""
    folder.put("mlp_ema=0.5", "latest", "model", 12)
    assert folder.start(warm(model_info="ema=0.5")) == 12.5
    with pytest.raises(TornSetError, match=r"ema=0\.9"):
        folder.start(warm(model_info="ema=0.9"))


def test_inspect_and_verify_report_the_mixture(folder: Folder) -> None:
    """And say nothing of the set whose files agree."""
    said = folder.problems()
    assert "mixes files of different iterations" in said
    assert f"'{PLAIN}': 'good', 'latest': 'broken'" in said


@pytest.mark.parametrize("part", ["trainer", "model", "optim"])
def test_each_part_of_another_iteration_is_an_error(tmp_path: Path, part: str) -> None:
    """For a warm start, the trainer file decides the iteration that is reported, so it has to agree as well."""
    folder = Folder(tmp_path)
    folder.put_set("latest", 12)
    folder.put("mlp", "latest", part, 14)
    with pytest.raises(TornSetError, match="E3_U14_S56"):
        folder.start(resume())
    if part != "optim":
        with pytest.raises(TornSetError, match="E3_U14_S56"):
            folder.start(warm())
    assert "'latest': 'broken'" in folder.problems()


def test_submodels_of_different_iterations_are_an_error(tmp_path: Path) -> None:
    """Also where only one of them is loaded."""
    folder = Folder(tmp_path)
    for part, name in (("model", "net.a"), ("model", "net.b"), ("trainer", "net")):
        folder.put(name, "latest", part, 12)
    folder.put("net.b", "latest", "model", 14)
    parts = {name: bind(torch.nn.Linear(2, 1), name=name) for name in ("a", "b")}
    with pytest.raises(TornSetError, match="E3_U14_S56"):
        folder.start(warm(), compose("net", parts))
    with pytest.raises(TornSetError, match="E3_U14_S56"):
        folder.start(warm(), compose("net", {"b": parts["b"]}))


class Callback:
    """Looks at the averages in the folder that it is shown."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def resume_from_checkpoint(self, resumption_paths: Any, model: Any) -> None:
        for path in resumption_paths.checkpoint_path.glob("*ema*"):
            self.seen[path.name] = torch.load(path)["training_iteration"]["update"]


@pytest.mark.parametrize("config", [resume(), warm(load_callbacks=True)])
def test_callbacks_are_shown_the_average_of_the_set(folder: Folder, config: Any) -> None:
    """Without one, nothing is started."""
    callback = Callback()
    with pytest.raises(TornSetError, match=r"ema=0\.9"):
        folder.start(config, callbacks=[callback])
    assert not callback.seen
    folder.put("mlp_ema=0.9", PLAIN, "model", 12)
    folder.start(config, callbacks=[callback])
    assert callback.seen["mlp_ema=0.9_cp=latest_model.th"] == 12
