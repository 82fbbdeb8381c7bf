"""Checkpoints as other software lays them out around a state dict."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from noether_init_core import InitializerStack, UnsafeGlobalError, bind, open_checkpoint


class Tied(torch.nn.Module):
    """Two layers with one weight, as embeddings and heads of language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.last = torch.nn.Linear(2, 2, bias=False)
        self.last.weight = self.first.weight


def initialize(module: torch.nn.Module, path: Path) -> None:
    """Weights by the kind ``file``."""
    InitializerStack.from_config([{"kind": "file", "path": str(path)}]).initialize(bind(module, name="net"))


def test_a_checkpoint_as_lightning_writes_it_is_read(tmp_path: Path) -> None:
    """Its loops, callbacks, hyperparameters and optimizer states are plain values around a state dict."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    name = "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1}"
    progress = {
        "total": {"ready": 20, "completed": 20},
        "current": {"ready": 10, "completed": 10},
        "is_last_batch": True,
    }
    checkpoint = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": module.state_dict(),
        "loops": {
            "fit_loop": {"state_dict": {}, "epoch_progress": progress, "epoch_loop.state_dict": {"_batches": 20}}
        },
        "callbacks": {
            name: {
                "monitor": "val_loss",
                "best_model_score": torch.tensor(0.25),
                "best_model_path": "epoch=1.ckpt",
                "best_k_models": {"epoch=1.ckpt": torch.tensor(0.25)},
                "kth_value": torch.tensor(0.25),
            }
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "MixedPrecision": torch.amp.GradScaler("cpu").state_dict(),
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "sizes": [3, 2], "nested": {"bias": True}},
    }
    torch.save(checkpoint, tmp_path / "epoch=1.ckpt")
    with open_checkpoint(tmp_path / "epoch=1.ckpt") as reader:
        reader.verify()
        assert list(reader.tensors()) == ["weight", "bias"]
        assert reader.metadata["hyper_parameters"] == checkpoint["hyper_parameters"]
        assert reader.materialize(reader.metadata["callbacks"])[name]["best_model_score"] == 0.25
        moments = reader.materialize(reader.metadata["optimizer_states"])[0]["state"][0]
        assert torch.equal(moments["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    target = torch.nn.Linear(3, 2)
    initialize(target, tmp_path / "epoch=1.ckpt")
    assert torch.equal(target.weight, module.weight)


def test_a_bin_as_transformers_wrote_it_is_read(tmp_path: Path) -> None:
    """A bare state dict with the metadata that ``Module.state_dict`` attaches, half precision, tied entries."""
    path = tmp_path / "pytorch_model.bin"
    module = Tied().half()
    torch.save(module.state_dict(), path)
    with open_checkpoint(path) as reader:
        reader.verify()
        assert {key: info.dtype for key, info in reader.tensors().items()} == dict.fromkeys(
            ["first.weight", "last.weight"], "float16"
        )
        assert reader.tensors()["first.weight"] == reader.tensors()["last.weight"]
    target = Tied()
    initialize(target, path)
    assert target.first.weight is target.last.weight
    assert torch.equal(target.first.weight, module.first.weight.float())


def test_a_checkpoint_as_timm_writes_it_is_read(tmp_path: Path) -> None:
    """The namespace of the script lies beside the weights and their average."""
    module, average = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    content = {
        "epoch": 0,
        "arch": "linear",
        "state_dict": module.state_dict(),
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.1).state_dict(),
        "version": 2,
        "args": argparse.Namespace(model="linear", data=Path("/data")),
        "state_dict_ema": average.state_dict(),
        "metric": np.float64(0.5),
    }
    torch.save(content, tmp_path / "last.pth.tar")
    target = torch.nn.Linear(3, 2)
    initialize(target, tmp_path / "last.pth.tar")
    assert torch.equal(target.weight, module.weight)
    with open_checkpoint(tmp_path / "last.pth.tar", entry="state_dict_ema") as reader:
        assert torch.equal(reader.read("weight"), average.weight)
        assert list(reader.unread) == ["args", "metric"]


class History:
    """Logged values with methods that pickle finds by getattr, as mmengine keeps them."""

    def __init__(self) -> None:
        self.values = np.arange(3.0)
        self.methods = {"mean": History.mean}

    def mean(self) -> float:
        """The mean of the values."""
        return float(self.values.mean())


def test_a_checkpoint_as_mmengine_writes_it_is_read(tmp_path: Path) -> None:
    """Its message hub holds methods and arrays, which are not asked for."""
    module, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    hub = {"log_scalars": {"train/loss": History()}, "runtime_info": {"iter": 4}, "resumed_keys": {}}
    torch.save({"meta": {"epoch": 1}, "state_dict": module.state_dict(), "message_hub": hub}, tmp_path / "epoch_1.pth")
    initialize(target, tmp_path / "epoch_1.pth")
    assert torch.equal(target.weight, module.weight)


class Detector(torch.nn.Module):
    """A model that its trainer pickles as a whole, as ultralytics does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(3, 2)


def test_a_pickled_model_as_ultralytics_writes_it_leads_on(tmp_path: Path) -> None:
    """The line that is said writes the state dict, in half precision, to another file."""
    module = Detector()
    content: dict[str, Any] = {"epoch": -1, "model": None, "ema": Detector().half(), "train_args": {"lr0": 0.01}}
    content["optimizer"] = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9).state_dict()
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UnsafeGlobalError, match="It holds a pickled module") as caught:
        initialize(module, tmp_path / "last.pt")
    exec(str(caught.value)[str(caught.value).index("torch.save(") :], {"torch": torch})
    initialize(module, tmp_path / "last.state_dict.pt")
    assert torch.equal(module.net.weight, content["ema"].net.weight.float())
