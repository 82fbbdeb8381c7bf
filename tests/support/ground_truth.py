"""The results that Noether itself computed, and targets in the state that it started from."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from noether_init_core import PathProvider, bind, compose

RUNS = ("mlp_train", "composite", "early_stop")
NAMES_OF_SUBMODELS = {"encoder": "enc_net", "decoder": "decoder"}


def runs_folder() -> Path | None:
    """The folder of Noether's runs, where it exists."""
    for parent in Path(__file__).resolve().parents:
        folder = parent / "shared" / "noether_runs"
        if folder.is_dir():
            return folder
    return None


@cache
def expected(run: str) -> dict[str, Any]:
    """Ground truth of one run; empty where the folder is absent."""
    folder = runs_folder()
    return {} if folder is None else json.loads((folder / f"expected_{run}.json").read_text())


def records(section: str) -> list[tuple[str, dict[str, Any]]]:
    """(run, record) of one section over all runs."""
    return [(run, record) for run in RUNS for record in expected(run).get(section, [])]


def record_id(value: Any) -> str | None:
    """Readable ids of parametrised records."""
    if isinstance(value, dict):
        return str(value.get("id", value.get("tag", "")))
    return None


@cache
def models_module() -> ModuleType:
    """``models.py`` beside the runs: the same models in pure torch."""
    folder = runs_folder()
    assert folder is not None
    spec = importlib.util.spec_from_file_location("noether_run_models", folder / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paths_for(run: str) -> PathProvider:
    """A new run beside Noether's runs; it exists in name only."""
    folder = runs_folder()
    assert folder is not None
    return PathProvider(folder, "new_run", expected(run)["stage_name"])


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the contiguous little-endian bytes, as in the ground truth."""
    return hashlib.sha256(
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def digests(module: torch.nn.Module) -> dict[str, str]:
    """Digest of every entry of the state dict."""
    return {name: digest(tensor) for name, tensor in module.state_dict().items()}


def build_target(target: Mapping[str, Any]) -> tuple[torch.nn.Module, Any]:
    """The module in the state that Noether's initializer found it in, and the model that binds it."""
    folder = runs_folder()
    assert folder is not None
    module = getattr(models_module(), target["class"])(**target["kwargs"])
    module.load_state_dict(torch.load(folder / target["init_file"], weights_only=True))
    preloaded = target.get("preloaded")
    if isinstance(preloaded, str):
        module.load_state_dict(torch.load(folder / preloaded, weights_only=True)["state_dict"])
    elif preloaded:
        for name, file in preloaded.items():
            module.submodels[name].load_state_dict(torch.load(folder / file, weights_only=True)["state_dict"])
    return module, bind_target(module, target["name"])


def bind_target(module: torch.nn.Module, name: str, optimizers: Mapping[str, Any] | None = None) -> Any:
    """``module`` as a model; its ``submodels`` get the names that they had in Noether."""
    optimizers = optimizers or {}
    if hasattr(module, "submodels"):
        return compose(
            name,
            {
                key: bind(submodule, name=NAMES_OF_SUBMODELS[key], optimizer=optimizers.get(key))
                for key, submodule in module.submodels.items()
            },
        )
    return bind(module, name=name, optimizer=optimizers.get(""))


def file_digests(run: str, name: str) -> dict[str, str]:
    """Digests of the weights in one file of a run."""
    files = expected(run)["files"]
    record = files[f"{expected(run)['checkpoint_dir']}/{name}"]
    return {key: value["sha256"] for key, value in record["state_dict"].items()}


def decode(value: Any) -> Any:
    """A value of the ground truth with its encodings of infinities undone; tensors stay descriptions."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: decode(item) for key, item in value.items()}
    return [decode(item) for item in value] if isinstance(value, list) else value


def encode(value: Any) -> Any:
    """Plain data with tensors in the encoding of the ground truth."""
    if isinstance(value, torch.Tensor):
        return {
            "__tensor__": {
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "sha256": digest(value),
            }
        }
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, list | tuple) else value
