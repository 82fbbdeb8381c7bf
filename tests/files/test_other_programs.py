"""Files that other programs write, and pointers of git: what the error advises is done with the programs themselves."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.advice import digests, executes, typed

from noether_init_core import InitializerStack, bind, open_checkpoint
from noether_init_core.errors import CheckpointFormatError

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def content() -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer)
    return buffer.getvalue()


def of_h5py(path: Path, h5py: Any) -> None:
    """As h5py and older Keras write."""
    with h5py.File(path, "w") as file:
        for key, value in WEIGHTS.items():
            file[key] = value.numpy()


def of_tensorflow(path: Path, tf: Any) -> None:
    """A checkpoint by its prefix, or a SavedModel, which has one in it."""
    names = {key: tf.Variable(value.numpy()) for key, value in WEIGHTS.items()}
    checkpoint = tf.train.Checkpoint(**names)
    if path.name == "saved":
        tf.saved_model.save(checkpoint, str(path))
    else:
        folder = path if path.name == "folder" else path.parent
        checkpoint.save(str(folder / "model.ckpt"))


def of_keras(path: Path, keras: Any) -> None:
    """A model of one layer, whose kernel is transposed."""
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.set_weights([WEIGHTS["weight"].numpy().T, WEIGHTS["bias"].numpy()])
    model.save(path)


def of_flax(path: Path, flax: Any) -> None:
    """Parameters as Flax writes them."""
    path.write_bytes(flax.serialization.to_bytes({key: value.numpy() for key, value in WEIGHTS.items()}))


def arrays_of(opened: Any) -> dict[str, Any]:
    """The arrays in what a call of an advice returned."""
    if hasattr(opened, "get_variable_to_shape_map"):
        suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
        return {key: opened.get_tensor(key + suffix) for key in WEIGHTS}
    if hasattr(opened, "get_weights"):
        kernel, bias = opened.get_weights()
        return {"weight": kernel.T, "bias": bias}
    return {key: opened[key][()] for key in WEIGHTS}


# Name -> the module that writes and opens it, how it is written, and bytes that are told the same without the module.
INDEX = bytes(100) + bytes.fromhex("57fb808b247547db")
OPENED: dict[str, tuple[str, Callable[[Path, Any], None], bytes]] = {
    "model.h5": ("h5py", of_h5py, b"\x89HDF\r\n\x1a\n" + bytes(60)),
    "model.ckpt-1.index": ("tensorflow", of_tensorflow, INDEX),
    "model.ckpt-1.data-00000-of-00001": ("tensorflow", of_tensorflow, b"\x01\x02" * 80),
    "checkpoint": ("tensorflow", of_tensorflow, b'model_checkpoint_path: "model.ckpt-1"\n'),
    "folder": ("tensorflow", of_tensorflow, b""),
    "saved": ("tensorflow", of_tensorflow, b""),
    "model.keras": ("keras", of_keras, b""),
    "flax_model.msgpack": ("flax.serialization", of_flax, b"\x81\xa6params\x81\xa5dense" + bytes(60)),
}


def module_or_skip(name: str) -> Any:
    """The module that a call of an advice needs, which is another project's."""
    return pytest.importorskip(name, reason=f"{name} is not here", exc_type=ImportError)


@executes("files/formats/others.py", "Next: {} opens it; write its tensors with torch.save to another file")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPENED)
def test_the_tensors_of_another_program_are_written_with_torch_save(tmp_path: Path, name: str) -> None:
    """Those that the call of the message opens; the new file is loaded, and the other one stays."""
    module, write, stands_for = OPENED[name]
    path = tmp_path / name
    if stands_for:
        (tmp_path / "told").mkdir()
        (tmp_path / "told" / name).write_bytes(stands_for)
        with pytest.raises(CheckpointFormatError, match="opens it; write its tensors with"):
            open_checkpoint(tmp_path / "told" / name)
        shutil.rmtree(tmp_path / "told")
    module_or_skip(module)
    first = module.partition(".")[0]
    library = sys.modules[first]
    write(path, library)
    before = digests(tmp_path)
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path)
    call = re.search(r"Next: (.*) opens it; write its tensors with torch\.save to another file$", str(caught.value))
    assert call is not None
    opened = eval(call[1], {"tf" if first == "tensorflow" else first: library})
    new = tmp_path / "new.pt"
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in arrays_of(opened).items()}, new)
    target = torch.nn.Linear(3, 2)
    InitializerStack.from_config([{"kind": "file", "path": str(new)}]).initialize(bind(target, "net"))
    assert all(torch.equal(target.state_dict()[key], value) for key, value in WEIGHTS.items())
    assert before.items() <= digests(tmp_path).items()


def of_gguf(path: Path, gguf: Any) -> None:
    """Quantized or not, as converters of llama.cpp write."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in WEIGHTS.items():
        writer.add_tensor(key, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_onnx(path: Path, onnx: Any) -> None:
    """A graph with the weights as initializers."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = [onnx.numpy_helper.from_array(value.numpy(), key) for key, value in WEIGHTS.items()]
    node = helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)
    ends = [[helper.make_tensor_value_info(name, kind, [1, size])] for name, size in (("x", 3), ("y", 2))]
    onnx.save(helper.make_model(helper.make_graph([node], "net", *ends, weights), producer_name="pytorch"), path)


MADE: dict[str, tuple[str, Callable[[Path, Any], None], bytes]] = {
    "model.gguf": ("gguf", of_gguf, b"GGUF\x03\0\0\0" + bytes(60)),
    "model.onnx": ("onnx", of_onnx, b"\x08\x07\x12\x07pytorch\x1a\x052.13" + bytes(60)),
}


@executes("files/formats/others.py", "Next: take the checkpoint that it was made from; {} opens it for a look")
@pytest.mark.parametrize("name", MADE)
def test_the_checkpoint_that_a_file_was_made_from_is_taken(tmp_path: Path, name: str) -> None:
    """The call of the message shows the names, by which the checkpoint is found; that is loaded."""
    module, write, stands_for = MADE[name]
    (tmp_path / name).write_bytes(stands_for)
    with pytest.raises(CheckpointFormatError, match="Next: take the checkpoint that it was made from; "):
        open_checkpoint(tmp_path / name)
    (tmp_path / name).unlink()
    library = module_or_skip(module)
    (tmp_path / "origin.pt").write_bytes(content())
    write(tmp_path / name, library)
    before = digests(tmp_path)
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(tmp_path / name)
    call = re.search(r"; (\S.*) opens it for a look$", str(caught.value))
    assert call is not None
    opened = eval(call[1], {module: library})
    graph = getattr(opened, "graph", None)
    names = [one.name for one in (opened.tensors if graph is None else graph.initializer)]
    assert sorted(names) == sorted(WEIGHTS)
    target = torch.nn.Linear(3, 2)
    InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "origin.pt")}]).initialize(
        bind(target, "net")
    )
    assert all(torch.equal(target.state_dict()[key], value) for key, value in WEIGHTS.items())
    assert digests(tmp_path) == before


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder; returns what it prints."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"git {arguments}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def git_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of git of their own, so that those of the user neither count nor change."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(home / "gitconfig"))
    (home / "gitconfig").write_text('[user]\n\tname = a\n\temail = a@b.c\n[protocol "file"]\n\tallow = always\n')
    return home


@executes("files/formats/others.py", "Next: git -C {} lfs pull", "Next: git -C {} annex get {}")
@pytest.mark.usefixtures("git_home")
@pytest.mark.parametrize("tool", ["lfs", "annex"])
def test_the_file_behind_a_pointer_is_fetched(tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command of the message, in a clone that has the pointer alone; then it is loaded."""
    pointers = {
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "annex": b"/annex/objects/SHA256E-s1--ab.pt\n",
    }
    name = "it's net.pt"
    (tmp_path / name).write_bytes(pointers[tool])
    with pytest.raises(CheckpointFormatError, match=f"Next: git -C .* {tool} "):
        open_checkpoint(tmp_path / name)
    if shutil.which("git") is None or shutil.which(f"git-{tool}") is None:
        pytest.skip(f"git {tool} is not here; make git-tools installs it")
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    git(origin, "init", "-q", "-b", "main")
    if tool == "lfs":
        git(origin, "lfs", "install", "--local")
        git(origin, "lfs", "track", "*.pt")
    else:
        git(origin, "annex", "init", "-q")
        git(origin, "config", "annex.largefiles", "include=*.pt")
        git(origin, "config", "annex.addunlocked", "true")
    (origin / name).write_bytes(content())
    git(origin, *(("annex", "add") if tool == "annex" else ("add",)), ".")
    git(origin, "add", ".")
    git(origin, "commit", "-q", "-m", "weights")
    monkeypatch.setenv("GIT_LFS_SKIP_SMUDGE", "1")
    git(tmp_path, "clone", "-q", str(origin), str(clone))
    if tool == "annex":
        git(clone, "annex", "init", "-q")
    else:
        git(clone, "lfs", "install", "--local")
    path = clone / name
    assert (clone / name).stat().st_size < 200
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path)
    monkeypatch.delenv("GIT_LFS_SKIP_SMUDGE")
    typed(str(caught.value).rpartition("Next: ")[2], tmp_path)
    with open_checkpoint(path) as reader:
        reader.verify()
        assert torch.equal(reader.read("weight"), WEIGHTS["weight"])
