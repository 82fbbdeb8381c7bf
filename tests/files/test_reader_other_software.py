"""Checkpoints as other software lays them out around a state dict."""

from __future__ import annotations

from pathlib import Path

import torch

from noether_init_core import InitializerStack, bind, open_checkpoint


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
