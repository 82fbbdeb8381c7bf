"""Checkpoints of Lightning, the Trainer of transformers, and accelerate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import open_checkpoint
from noether_init_core.errors import CheckpointFormatError, PlanError, UnsafeGlobalError
from real.libraries import assert_same, library, load, scrambled


def small() -> torch.nn.Sequential:
    """A network with parameters, buffers and a counter."""
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def lightning_module(lightning: Any) -> Any:
    """The class of a module with hyperparameters that plain pickle holds: a path and a namespace."""

    class Net(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, options: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = small()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    return Net


def fit(lightning: Any, folder: Path, *callbacks: Any) -> tuple[Any, Any, Path]:
    """A module that was trained for one step, its class, and the checkpoint of its trainer."""
    net = lightning_module(lightning)
    module = net(argparse.Namespace(lr=0.1, folder=Path("/data")))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=4)
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, net, folder / "last.ckpt"


def test_a_checkpoint_of_lightning_is_loaded(tmp_path: Path) -> None:
    """With its namespace and path of hyperparameters, which are listed as unread."""
    lightning = library("lightning")
    _module, net, path = fit(lightning, tmp_path)
    twin = net.load_from_checkpoint(path, weights_only=False)
    target = scrambled(net())
    report = load(target, path)
    assert_same(target, twin)
    assert "argparse.Namespace" in report.initializers[0].not_restored[0]


def test_averaged_weights_of_lightning_are_loaded(tmp_path: Path) -> None:
    """Its callback writes the average as state dict, and the model as it trained beside it."""
    lightning = library("lightning")
    callbacks = library("lightning.pytorch.callbacks")
    _module, net, path = fit(lightning, tmp_path, callbacks.EMAWeightAveraging(decay=0.5))
    target = scrambled(net())
    load(target, path)
    assert_same(target, net.load_from_checkpoint(path, weights_only=False))
    stored = torch.load(path, weights_only=False)
    with open_checkpoint(path, entry="current_model_state") as reader:
        for key, value in stored["current_model_state"].items():
            assert torch.equal(reader.read(key), value)


def tiny_transformer(transformers: Any) -> Any:
    """A language model with tied embeddings, of random weights."""
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def test_a_checkpoint_of_the_trainer_of_transformers_is_loaded(tmp_path: Path) -> None:
    """Its weights; its pickled arguments are refused by name; optimizer and schedule are plain."""
    transformers = library("transformers")
    library("accelerate")
    model = tiny_transformer(transformers)
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    folder = tmp_path / "checkpoint-1"
    target = scrambled(tiny_transformer(transformers))
    load(target, folder / "model.safetensors")
    assert_same(target, transformers.GPT2LMHeadModel.from_pretrained(folder))
    with pytest.raises(UnsafeGlobalError, match="TrainingArguments"):
        open_checkpoint(folder / "training_args.bin")
    with open_checkpoint(folder / "optimizer.pt") as reader:
        assert set(reader.values("")) == {"state", "param_groups"}


def test_a_sharded_checkpoint_is_told_what_it_is(tmp_path: Path) -> None:
    """The index is refused with the next step; one shard alone is read, and the plan says what is missing."""
    transformers = library("transformers")
    model = tiny_transformer(transformers)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    with pytest.raises(CheckpointFormatError, match=r"index of a sharded checkpoint.*Next: "):
        load(model, tmp_path / "model.safetensors.index.json")
    first = sorted(tmp_path.glob("model-00001-of-*.safetensors"))[0]
    with pytest.raises((PlanError, AssertionError)):
        load(model, first)


def test_a_state_of_accelerate_is_loaded(tmp_path: Path) -> None:
    """Its weights as safetensors and as torch file; the random states hold NumPy, and are refused when asked for."""
    accelerate = library("accelerate")
    for is_safe, file in ((True, "model.safetensors"), (False, "pytorch_model.bin")):
        accelerator = accelerate.Accelerator(cpu=True)
        module = small()
        optimizer = torch.optim.AdamW(module.parameters())
        module, optimizer = accelerator.prepare(module, optimizer)
        module(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        folder = tmp_path / file
        accelerator.save_state(str(folder), safe_serialization=is_safe)
        target = scrambled(small())
        load(target, folder / file)
        assert_same(target, accelerator.unwrap_model(module))
    with open_checkpoint(folder / "optimizer.bin") as reader:
        assert len(reader.tensors()) == 18
    with pytest.raises(CheckpointFormatError):
        open_checkpoint(folder / "random_states_0.pkl").load()


def test_a_sharded_model_of_accelerate_is_told_what_it_is(tmp_path: Path) -> None:
    """Each shard is a file of safetensors; the index names the next step."""
    accelerate = library("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(
        torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)]), str(tmp_path), max_shard_size="20KB"
    )
    with pytest.raises(CheckpointFormatError, match=r"index of a sharded checkpoint.*Next: "):
        open_checkpoint(tmp_path / "model.safetensors.index.json")
    for shard in tmp_path.glob("model-*.safetensors"):
        open_checkpoint(shard).close()
