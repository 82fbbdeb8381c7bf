"""What is advised for values of other torch releases, views, sharded tensors and replaced files is done here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.advice import digests, executes, saw
from support.following import advised

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind, open_checkpoint
from noether_init_core.sets.selection import find_set
from noether_init_core.sets.snapshot import Snapshot


@executes("files/reading.py", "Next: pip install --upgrade torch")
def test_a_dtype_of_a_newer_torch_is_read_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch without the name refuses the tensor; the one that has it, which the command would install, reads it."""
    value = torch.tensor([1, 2], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    torch.save({"scale": value}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        with monkeypatch.context() as patch:
            patch.delattr(torch, "float8_e8m0fnu")
            assert advised(lambda: reader.read("scale")) == "pip install --upgrade torch"
        assert torch.equal(reader.read("scale").view(torch.uint8), value.view(torch.uint8))


DEVICE = """
import sys, torch
from noether_init_core import open_checkpoint
if sys.argv[2] == "with":
    torch.utils.rename_privateuse1_backend("nova")  # what such a package does when it is imported
try:
    with open_checkpoint(sys.argv[1]) as reader:
        print(reader.load()["device"])
except Exception as error:
    print(error)
"""


@executes("files/reading.py", "Next: import the package that adds this device, or pip install --upgrade torch")
def test_a_device_of_another_package_is_known_after_its_import(tmp_path: Path) -> None:
    """Each in a process of its own, since a device cannot be taken away again."""
    path = tmp_path / "a.pt"

    def printed(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, str(path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    printed(
        "import sys, torch\ntorch.utils.rename_privateuse1_backend('nova')\n"
        "torch.save({'weight': torch.ones(2), 'device': torch.device('nova', 0)}, sys.argv[1])"
    )
    before = digests(tmp_path)
    said = saw(printed(DEVICE, "without"))
    assert said.endswith("Next: import the package that adds this device, or pip install --upgrade torch")
    assert printed(DEVICE, "with") == "nova:0"
    assert digests(tmp_path) == before


@executes("files/reading.py", "Next: read the tensors that you need with read(key)")
def test_of_overlapping_views_single_ones_are_read(tmp_path: Path) -> None:
    """All of them would take much more memory than the file has bytes."""
    whole = torch.arange(99_999.0)
    torch.save({f"v{number}": whole[number : number + 99_900] for number in range(40)}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert "read(key)" in advised(reader.load)
        key = "v39"
        assert torch.equal(reader.read(key), whole[39:99_939])


@executes("files/plain_data.py", "Next: save value.{}")
def test_a_sharded_tensor_is_saved_whole(tmp_path: Path) -> None:
    """By the call of the message, which every rank makes; here there is one."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = torch.arange(6.0).reshape(2, 3)
    distributed.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        value = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        writer = CheckpointWriter(PathProvider(tmp_path, "run"))
        model = bind(torch.nn.Linear(3, 2), "net")
        iteration = TrainingIteration(1, 1, 1)
        state = {**model.module.state_dict(), "weight": value}
        said = advised(lambda: writer.save(model, iteration, averages={"ema=0.9": state}))
        assert said == "save value.full_tensor()"
        state["weight"] = eval(said.removeprefix("save "), {"value": value})
        found = writer.save(model, iteration, averages={"ema=0.9": state})
    finally:
        distributed.destroy_process_group()
    with open_checkpoint(next(found.folder.glob("net_ema=0.9_*_model.th"))) as reader:
        assert torch.equal(reader.read("weight"), weight)


@executes("files/verification.py", "Next: take an older checkpoint")
@pytest.mark.parametrize("change", ["names", "what is beside the tensors"])
def test_an_older_checkpoint_is_taken_for_one_that_was_overwritten(tmp_path: Path, change: str) -> None:
    """By another file, whole in itself and as long; the older set is verified and loaded, and nothing is written."""
    paths, other = (
        PathProvider(tmp_path, "run"),
        PathProvider(tmp_path / "other", "run" if change == "names" else "rum"),
    )
    net = torch.nn.Linear(3, 2)
    for number in (1, 2):
        CheckpointWriter(paths).save(bind(net, "net"), TrainingIteration(number, number, number))
    weight = net.weight
    if change == "names":
        del net.weight
        net.register_parameter("height", torch.nn.Parameter(weight))
    CheckpointWriter(other).save(bind(net, "net"), TrainingIteration(2, 2, 2))
    path = next(find_set(Snapshot(paths), "latest").found.folder.glob("*_model.th"))
    size = path.stat().st_size
    shutil.copy(find_set(Snapshot(other), "latest").found.folder / path.name, path)
    assert path.stat().st_size == size
    before = digests(tmp_path)

    def verify(tag: str) -> None:
        found = find_set(Snapshot(paths), tag).found
        file = next(file for file in found.files if file.part == "model")
        with open_checkpoint(file.path, digests=found.digests_of(file)) as reader:
            reader.verify()

    assert advised(lambda: verify("latest")) == "take an older checkpoint"
    verify("E1_U1_S1")
    target = torch.nn.Linear(3, 2)
    entry = {"kind": "previous_run", "run_id": "run", "checkpoint_tag": "E1_U1_S1"}
    stack = InitializerStack.from_config([entry], path_provider=PathProvider(tmp_path, "new"))
    stack.initialize(bind(target, "net"))
    assert torch.equal(target.weight, weight)
    assert digests(tmp_path) == before
