"""Every file that Noether wrote, against what Noether recorded of it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core.files.content import TensorInfo
from noether_init_core.files.opening import open_checkpoint

RUNS = ("mlp_train", "composite", "early_stop")


def recorded(folder: Path, run: str, kind: str) -> dict[str, dict[str, Any]]:
    """File -> what Noether recorded, for files of one kind; a run always has some."""
    files: dict[str, dict[str, Any]] = json.loads((folder / f"expected_{run}.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if entry["kind"] == kind}


def digest(tensor: torch.Tensor) -> str:
    """The digest of the tensor's contiguous bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def encoded(value: Any) -> Any:
    """A loaded value in the encoding of the records."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return {"__tensor__": {"shape": list(value.shape), "dtype": name, "sha256": digest(value)}}
    if isinstance(value, dict):
        return {str(key): encoded(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    return value


@pytest.mark.parametrize("run", RUNS)
def test_model_files_have_the_recorded_tensors_and_metadata(noether_runs: Path, run: str) -> None:
    """Keys in their order, shapes, dtypes and bytes of every model file are the recorded ones, and so is the rest."""
    files = recorded(noether_runs, run, "model")
    assert files
    for name, entry in files.items():
        with open_checkpoint(noether_runs / name) as reader:
            reader.verify()
            assert list(reader.tensors()) == list(entry["state_dict"]), name
            assert reader.extra_state == {}
            for key, expected in entry["state_dict"].items():
                info = reader.tensors()[key]
                assert [info.dtype, list(info.shape)] == [expected["dtype"], expected["shape"]]
                assert digest(reader.read(key)) == expected["sha256"], f"{name} {key}"
            assert ["state_dict", *reader.metadata] == entry["top_level_keys"]
            for key in ("checkpoint_tag", "run_id", "config_kind"):
                assert reader.metadata.get(key) == entry[key]
            assert reader.metadata["training_iteration"] == entry["training_iteration"]
            assert {key: reader.metadata[key] for key in entry["extra"]} == entry["extra"]


@pytest.mark.parametrize("run", RUNS)
def test_optimizer_files_have_the_recorded_state(noether_runs: Path, run: str) -> None:
    """Parameter groups, names and moments of every optimizer file are the recorded ones, by load and by path."""
    files = recorded(noether_runs, run, "optim")
    assert files
    for name, entry in files.items():
        with open_checkpoint(noether_runs / name) as reader:
            reader.verify()
            loaded = reader.load()
            assert list(loaded) == entry["top_level_keys"] == list(reader.metadata)
            for key in entry["top_level_keys"]:
                assert encoded(loaded[key]) == entry[key], f"{name} {key}"
            for index, moments in entry["state"].items():
                for moment, expected in moments.items():
                    info = reader.metadata["state"][int(index)][moment]
                    assert isinstance(info, TensorInfo)
                    assert encoded(reader.read(info)) == encoded(reader.read(f"state.{index}.{moment}")) == expected


@pytest.mark.parametrize("run", RUNS)
def test_trainer_files_have_the_recorded_state(noether_runs: Path, run: str) -> None:
    """The iteration and the states of callbacks, tensors in them included, are the recorded ones."""
    files = recorded(noether_runs, run, "trainer")
    assert files
    for name, entry in files.items():
        with open_checkpoint(noether_runs / name) as reader:
            reader.verify()
            loaded = reader.load()
            assert list(loaded) == entry["top_level_keys"]
            assert loaded["training_iteration"] == entry["training_iteration"]
            assert encoded(loaded["callback_state_dicts"]) == entry["callback_state_dicts"], name


@pytest.mark.parametrize("run", RUNS)
def test_every_file_is_what_torch_load_reads(noether_runs: Path, run: str) -> None:
    """All kinds of files equal what ``torch.load`` reads, and have the recorded digest."""
    files = json.loads((noether_runs / f"expected_{run}.json").read_text())["files"]
    # the metric log is recorded, but not in every copy of the folder
    present = {name: entry for name, entry in files.items() if (noether_runs / name).exists()}
    assert {entry["kind"] for name, entry in files.items() if name not in present} <= {"tracker"}
    for name, entry in present.items():
        with open_checkpoint(noether_runs / name, digests=f"sha256:{entry['sha256']}") as reader:
            assert reader.verify().by == "sha256"
            assert encoded(reader.load()) == encoded(torch.load(noether_runs / name, weights_only=True)), name


def test_bare_state_dicts_of_initial_weights_are_read(noether_runs: Path) -> None:
    """A file that is a state dict itself has its keys as tensors and no metadata."""
    files = sorted((noether_runs / "init_states").glob("*.pt"))
    assert files
    for path in files:
        expected = torch.load(path, weights_only=True)
        with open_checkpoint(path) as reader:
            assert list(reader.tensors()) == list(expected)
            assert reader.metadata == {}
            assert encoded(reader.load()) == encoded(dict(expected))
