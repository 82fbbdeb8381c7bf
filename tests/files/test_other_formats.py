"""Files and folders of other formats: the error says what they are, and the command that it prints leads on."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.advice import executes

from noether_init_core import InitializerStack, bind, open_checkpoint
from noether_init_core.errors import CheckpointFormatError

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def saved(value: Any = WEIGHTS, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def tar(path: Path, mode: str = "w", name: str = "./model_weights.ckpt") -> None:
    """A tar archive with a config and weights in it."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member, content in (("./model_config.yaml", b"a: 1\n"), (name, saved())):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def zipped(path: Path, names: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A zip archive as the standard library writes it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in names.items():
            archive.writestr(name, content)


def baselines(path: Path, compression: int = zipfile.ZIP_STORED) -> None:
    """A model as Stable-Baselines3 saves it."""
    names = {
        "data": b"{}",
        "pytorch_variables.pth": saved({}),
        "policy.pth": saved(),
        "policy.optimizer.pth": saved({}),
    }
    zipped(path, {**names, "_stable_baselines3_version": b"2.4.0"}, compression)


def distributed(path: Path) -> None:
    """A folder of torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(dict(WEIGHTS), checkpoint_id=path, no_dist=True)


def scripted(path: Path) -> None:
    """A module that TorchScript saves."""
    module = torch.nn.Linear(3, 2)
    module.load_state_dict(WEIGHTS)
    torch.jit.save(torch.jit.script(module), str(path))


def arrays(path: Path) -> None:
    """Arrays of NumPy under the names of the weights."""
    np.savez(path, weight=WEIGHTS["weight"].numpy(), bias=WEIGHTS["bias"].numpy())


# Name of the file -> how to write it, what the error says, and the file that the command makes; "": it makes none.
Kind = tuple[Callable[[Path], object], str, str]
LEADS_ON: dict[str, Kind] = {
    "a.pt": (
        lambda path: path.write_bytes(saved(_use_new_zipfile_serialization=False)),
        "before torch 1.6",
        "a.tensors.pt",
    ),
    "a.nemo": (tar, "archive of a NeMo model.*model_weights.ckpt", "a.files/model_weights.ckpt"),
    "b.nemo": (lambda path: tar(path, "w:gz"), "NeMo model.*compressed by gzip", "b.files/model_weights.ckpt"),
    "a b.tar": (lambda path: tar(path, name="it's/weights.pt"), "a tar archive", "a b.files/it's/weights.pt"),
    "a.pt.gz": (lambda path: path.write_bytes(gzip.compress(saved())), "compressed by gzip", "a.unpacked.pt"),
    "a.zip": (baselines, "Stable-Baselines3", "a.files/policy.pth"),
    "b.zip": (lambda path: baselines(path, zipfile.ZIP_DEFLATED), "Stable-Baselines3", "b.files/policy.pth"),
    "c.zip": (lambda path: zipped(path, {"run/last.pt": saved()}), "archive of files", "c.files/run/last.pt"),
    "a.npz": (arrays, "NumPy arrays", "a.tensors.pt"),
    "a.pkl": (lambda path: path.write_bytes(pickle.dumps(WEIGHTS)), "plain pickle", "a.tensors.pt"),
    "folder": (distributed, "folder of torch.distributed.checkpoint", "folder.pt"),
    "a.torchscript": (scripted, "TorchScript", "a.tensors.pt"),
}


@executes(
    "files/formats/others.py",
    "Next: {}",
    "Next, if you trust it: {}",
    "Next: {}, then give that file",
    "Next: mkdir {} && tar -xf {} -C {}, then give {}",
    "Next: mkdir {} && unzip -q {} -d {}, then give {}",
    "Next: {} {} > {}, then give that file",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEADS_ON)
def test_the_command_leads_to_a_file_that_is_loaded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run as it is printed, twice: it changes no file that is there, and what it writes is loaded."""
    write, says, result = LEADS_ON[name]
    path = tmp_path / name
    write(path)
    before = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
    stack = InitializerStack.from_config([{"kind": "file", "path": str(path)}])
    with pytest.raises(CheckpointFormatError, match=says) as caught:
        stack.plan(bind(torch.nn.Linear(3, 2), name="net"))
    for made in (result, None):
        said = str(caught.value)
        command = re.search(r"Next[^:]*: (.*?)(?:, then give .*)?$", said)[1]
        if shutil.which(command.split()[0]) is None and not command.startswith("python "):
            pytest.skip(f"{command.split()[0]} is not here")
        command = re.sub("^python ", f"{sys.executable} ", command)
        subprocess.run(["bash", "-ec", command], check=True, capture_output=True, cwd=tmp_path)
        assert {one: one.read_bytes() for one in before} == before
        if made is not None:
            target = torch.nn.Linear(3, 2)
            InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / made)}]).initialize(
                bind(target, "net")
            )
            assert all(torch.equal(target.state_dict()[key], value) for key, value in WEIGHTS.items())
        before = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
        with pytest.raises(CheckpointFormatError, match=says) as caught:
            open_checkpoint(path)


TOLD: dict[str, tuple[bytes, str]] = {
    "model.gguf": (b"GGUF\x03\0\0\0" + bytes(60), r"GGUF file of llama\.cpp.*gguf"),
    "__0_0.distcp": (saved(), "one file of a folder of torch.distributed.checkpoint.*dcp_to_torch"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.13" + bytes(60), "ONNX graph"),
    "model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5 file.*h5py"),
    "model.ckpt-1.index": (bytes(100) + bytes.fromhex("57fb808b247547db"), "checkpoint of TensorFlow"),
    "model.ckpt-1.data-00000-of-00001": (b"\x01\x02" * 80, "checkpoint of TensorFlow"),
    "checkpoint": (b'model_checkpoint_path: "model.ckpt-1"\n', "checkpoint of TensorFlow"),
    "flax_model.msgpack": (b"\x81\xa6params\x81\xa5dense" + bytes(60), "msgpack.*flax"),
    "flax_model.pt": (b"\x82\xa6params\x81\xa5dense" + bytes(60), "msgpack.*flax"),
    "model.tflite": (b"\x1c\0\0\0TFL3" + bytes(60), "TensorFlow Lite"),
    "array.npy": (b"\x93NUMPY\x01\0" + bytes(60), r"one array of NumPy.*torch\.save"),
    "page.pt": (b"<!DOCTYPE html>\n<html><head>", "web page.*head -c 500"),
    "page.safetensors": (b"\n<html lang='en'>" + bytes(60), "web page.*head -c 500"),
    "denied.pt": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "web page"),
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS.*git -C .* lfs"),
    "pointer.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "Git LFS.*git -C .* lfs",
    ),
    "annexed.pt": (b"/annex/objects/SHA256E-s1--ab.pt\n", "git-annex.*git -C .* annex get annexed.pt"),
    "config.json": (b'{"a": 1}\n', "JSON text.*file of weights"),
    "tricky.json": (b'{"a": 1{', "JSON text"),
    "brace.json": (b'{"abcd":{}}\n', "JSON text"),
    "empty.pt": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "a.bz2": (b"BZh9" + bytes(60), "compressed by bzip2.*bzip2 -dc"),
    "a.xz": (b"\xfd7zXZ\0" + bytes(60), "compressed by xz"),
    "a.zst": (b"\x28\xb5\x2f\xfd" + bytes(60), "compressed by zstd"),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_file_of_another_format_is_told_what_it_is(tmp_path: Path, name: str) -> None:
    """What it is, and what opens it or what to do about it; nothing is written."""
    content, says = TOLD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=says) as caught:
        open_checkpoint(tmp_path / name)
    assert caught.value.path == tmp_path / name
    assert "Next: " in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == [name]


@executes("files/formats/others.py", "Next: give its file {}", "Next: give one, such as {}")
def test_the_file_of_a_folder_that_is_named_is_read(tmp_path: Path) -> None:
    """The only file of weights, or the first of several."""
    for count in (1, 2):
        (tmp_path / f"{count}.pt").write_bytes(saved())
        with pytest.raises(CheckpointFormatError, match="it is a folder") as caught:
            open_checkpoint(tmp_path)
        with open_checkpoint(re.split("give its file |such as ", str(caught.value))[1]) as reader:
            assert list(reader.tensors()) == list(WEIGHTS)


@executes("files/formats/others.py", "Next: head -c 500 {} shows what the server said")
def test_the_command_shows_what_a_server_said(tmp_path: Path) -> None:
    """Its answer is the content of the file."""
    (tmp_path / "a.pt").write_bytes(b"<html>Please log in</html>")
    with pytest.raises(CheckpointFormatError, match="web page") as caught:
        open_checkpoint(tmp_path / "a.pt")
    command = re.search(r"Next: (.*) shows", str(caught.value))[1]
    assert b"Please log in" in subprocess.run(["bash", "-ec", command], check=True, capture_output=True).stdout


@executes("files/formats/others.py", "Next: write the weights to another file with torch.save(state_dict, path)")
def test_what_is_written_again_is_read(tmp_path: Path) -> None:
    """A file of text is refused; torch.save to another path makes one that is read."""
    (tmp_path / "a.pt").write_bytes(b"a log of something")
    with pytest.raises(CheckpointFormatError, match=r"it is text.*to another file with torch\.save\(state"):
        open_checkpoint(tmp_path / "a.pt")
    torch.save(WEIGHTS, tmp_path / "b.pt")
    open_checkpoint(tmp_path / "b.pt").close()
    assert (tmp_path / "a.pt").read_bytes() == b"a log of something"


@executes("files/formats/others.py", "Next: open one of the shards", "Next: give the file of weights beside it")
def test_the_file_beside_an_index_or_a_config_is_read(tmp_path: Path) -> None:
    """A shard holds some of the tensors; the weights beside a config hold all."""
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "model-1.safetensors"}}', "utf-8")
    (tmp_path / "config.json").write_text('{"a": 1}', "utf-8")
    (tmp_path / "model-1.safetensors").write_bytes(saved())
    for name, says in (("model.safetensors.index.json", "open one of the shards"), ("config.json", "beside it")):
        with pytest.raises(CheckpointFormatError, match=says):
            open_checkpoint(tmp_path / name)
    open_checkpoint(tmp_path / "model-1.safetensors").close()


def test_a_folder_is_told_by_what_it_holds(tmp_path: Path) -> None:
    """Its only file of weights, one of several, the program that wrote it, or that it is a folder."""
    for names, says in (
        (["config.json", "model.safetensors"], r"it is a folder\. Next: give its file .*model\.safetensors"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "a folder with 2 files of weights"),
        (["saved_model.pb"], "SavedModel of TensorFlow"),
        (["checkpoint", "model.index"], "folder of TensorFlow"),
        (["notes.txt"], "is a folder, not a checkpoint file"),
        ([], "is a folder, not a checkpoint file"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"")
        with pytest.raises(CheckpointFormatError, match=says):
            open_checkpoint(folder)


def test_names_in_an_archive_that_leave_its_folder_are_not_advised(tmp_path: Path) -> None:
    """The command unpacks into a new folder; a member outside of it is never named."""
    tar(tmp_path / "a.tar", name="../../weights.pt")
    zipped(tmp_path / "a.zip", {"../weights.pt": saved()})
    for name in ("a.tar", "a.zip"):
        with pytest.raises(CheckpointFormatError) as caught:
            open_checkpoint(tmp_path / name)
        assert "weights.pt" not in str(caught.value).partition("Next")[2]


def test_damaged_archives_are_still_told_as_damaged(tmp_path: Path) -> None:
    """A file of torch.save that was cut is no archive of something else."""
    content = saved()
    (tmp_path / "a.pt").write_bytes(content[:-10])
    with pytest.raises(CheckpointFormatError, match="truncated"):
        open_checkpoint(tmp_path / "a.pt")
