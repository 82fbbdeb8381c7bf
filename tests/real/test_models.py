"""Weights that libraries of models write: timm, torchvision, transformers, PEFT, diffusers, ultralytics, and others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import InitializerStack, bind, open_checkpoint
from noether_init_core.errors import UnsafeGlobalError
from real.libraries import assert_same, library, load, scrambled


def test_a_checkpoint_of_timm_is_loaded(tmp_path: Path) -> None:
    """As its saver writes it: beside the weights lie the namespace of the script, optimizer and average."""
    timm = library("timm")
    utils = library("timm.utils")
    model = timm.create_model("test_vit", pretrained=False, num_classes=5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 160, 160)).sum().backward()
    optimizer.step()
    average = utils.ModelEmaV3(model, decay=0.5)
    arguments = argparse.Namespace(model="test_vit", lr=0.1, data=Path("/data"))
    saver = utils.CheckpointSaver(
        model, optimizer, args=arguments, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=0.5)
    for path in sorted(tmp_path.glob("*.pth.tar")):
        for entry, use_average in (("state_dict", False), ("state_dict_ema", True)):
            twin = scrambled(timm.create_model("test_vit", pretrained=False, num_classes=5))
            library("timm.models").load_checkpoint(twin, str(path), use_ema=use_average, weights_only=False)
            with open_checkpoint(path, entry=entry) as reader:
                for key, value in twin.state_dict().items():
                    assert torch.equal(reader.read(key), value)
        target = scrambled(timm.create_model("test_vit", pretrained=False, num_classes=5))
        report = load(target, path)
        assert_same(target, model)
        assert "args (argparse.Namespace)" in report.initializers[0].not_restored[0]


def test_weights_of_torchvision_are_loaded(tmp_path: Path) -> None:
    """A bare state dict, as its reference scripts save it below the key ``model``."""
    models = library("torchvision.models")
    model = models.mobilenet_v3_small(num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arguments = argparse.Namespace(lr=0.1)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0, "args": arguments}
    torch.save(content, tmp_path / "model_0.pth")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    for file, config in (("model_0.pth", {"source_root": "model"}), ("weights.pth", {})):
        target = scrambled(models.mobilenet_v3_small(num_classes=3))
        load(target, tmp_path / file, **config)
        assert_same(target, model)


def test_weights_of_transformers_are_loaded(tmp_path: Path) -> None:
    """As safetensors, with the tied head left out by the library."""
    transformers = library("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    target = scrambled(transformers.BertForMaskedLM(config))
    load(target, tmp_path / "model.safetensors")
    assert_same(target, transformers.BertForMaskedLM.from_pretrained(tmp_path))


def test_an_adapter_of_peft_is_loaded(tmp_path: Path) -> None:
    """The file leaves out the name of the adapter, which two rules put back; the base keeps its values."""
    peft = library("peft")

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    config = peft.LoraConfig(target_modules=["0", "2"], r=2)
    model = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    target = peft.get_peft_model(base(), config)
    rules = [
        {"from": f"<path..>.lora_{side}.weight", "to": f"<path..>.lora_{side}.default.weight"} for side in ("A", "B")
    ]
    load(target, tmp_path / "adapter_model.safetensors", transforms=rules, on_missing="keep")
    assert_same(target, peft.PeftModel.from_pretrained(base(), tmp_path))


def test_a_network_of_diffusers_is_loaded(tmp_path: Path) -> None:
    """As safetensors, and as the torch file that older versions wrote."""
    diffusers = library("diffusers")

    def unet() -> Any:
        return diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    model = unet()
    for is_safe, file in ((True, "diffusion_pytorch_model.safetensors"), (False, "diffusion_pytorch_model.bin")):
        model.save_pretrained(tmp_path / file, safe_serialization=is_safe)
        target = scrambled(unet())
        load(target, tmp_path / file / file)
        assert_same(target, diffusers.UNet2DModel.from_pretrained(tmp_path / file, use_safetensors=is_safe))


def test_a_pickled_module_of_ultralytics_leads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused; the line that is said writes another file, which is loaded, and the module is as it was."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    ultralytics = library("ultralytics")
    yolo = ultralytics.YOLO("yolov8n.yaml")
    path = tmp_path / "last.pt"
    yolo.save(path)
    before = path.read_bytes()
    with pytest.raises(UnsafeGlobalError, match="It holds a pickled module") as caught:
        load(yolo.model, path)
    said = str(caught.value)
    exec(said[said.index("torch.save(") :], {"torch": torch})
    assert path.read_bytes() == before
    target = scrambled(ultralytics.YOLO("yolov8n.yaml").model)
    load(target, tmp_path / "last.state_dict.pt")
    assert_same(target, torch.load(path, weights_only=False)["model"].float())


def test_a_checkpoint_of_mmengine_is_loaded(tmp_path: Path) -> None:
    """As its runner writes it: its message hub holds methods and arrays of NumPy."""
    library("mmengine")
    runners, models = library("mmengine.runner"), library("mmengine.model")

    class Net(models.BaseModel):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))

        def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
            found = self.net(torch.stack(list(inputs)) if isinstance(inputs, list | tuple) else inputs)
            return {"loss": found.square().mean()} if mode == "loss" else found

    data = [{"inputs": torch.randn(3)} for _ in range(4)]
    runner = runners.Runner(
        model=Net(),
        work_dir=str(tmp_path),
        train_dataloader={
            "batch_size": 2, "dataset": data, "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": False}, "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        default_hooks={"logger": {"type": "LoggerHook", "interval": 1}},
        custom_hooks=[{"type": "EMAHook"}],
        experiment_name="real",
    )  # fmt: skip
    runner.train()
    twin, target = Net(), scrambled(Net())
    # mmengine's own load_checkpoint fails from torch 2.6 on, because it does not pass weights_only=False
    twin.load_state_dict(torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"])
    report = load(target, tmp_path / "epoch_1.pth")
    assert_same(target, twin)
    assert "message_hub" in report.initializers[0].not_restored[0]


def test_a_model_of_neuraloperator_is_loaded(tmp_path: Path) -> None:
    """Its state dict holds the arguments of the model, with a function among them, under ``_metadata``."""
    models = library("neuralop.models")

    def operator() -> Any:
        return models.FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2)

    operator().save_checkpoint(tmp_path, "fno")
    target = scrambled(operator())
    report = load(target, tmp_path / "fno_state_dict.pt")
    assert_same(target, models.FNO.from_checkpoint(tmp_path, "fno"))
    assert "_metadata" in report.initializers[0].not_restored[0]


def test_a_model_of_safetensors_is_loaded(tmp_path: Path) -> None:
    """Its writer keeps one of several tied tensors."""
    library("safetensors")
    writer = library("safetensors.torch")

    def tied() -> torch.nn.Module:
        module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
        module["head"].weight = module["embed"].weight
        return module

    model, target, twin = tied(), scrambled(tied()), scrambled(tied())
    writer.save_model(model, str(tmp_path / "model.safetensors"))
    writer.load_model(twin, str(tmp_path / "model.safetensors"))
    stack = InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "model.safetensors")}])
    stack.initialize(bind(target, name="net"))
    assert_same(target, twin)
    assert target["head"].weight is target["embed"].weight
