"""Tell what a file or folder is that this package does not read, and which command leads from it to one that it reads.

Only the first bytes, names inside an archive, and the name of the file are looked at. A command never writes over a
file: it names a new one beside the input.
"""

from __future__ import annotations

import os
import re
import shlex
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from noether_init_core.files.content import UnreadableError
from noether_init_core.files.refusals import new_name
from noether_init_core.files.storage.handle import Handle
from noether_init_core.messages import in_shell, one_line, python_command, python_text, quoted

NEXT_COPY = "Next: copy the file again from where it was written, or take an older checkpoint"
NEXT_SAVE = "Next: write the weights to another file with torch.save(state_dict, path)"
_INDEX_GUESS = 1 << 20
_BLOCK = 512
_MOST_MEMBERS = 200
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".th", ".bin")
# The start of a file of torch.save before the zip format: a pickle of torch.serialization.MAGIC_NUMBER.
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# The last bytes of a table in LevelDB's format, as the index of a checkpoint of TensorFlow is.
_TABLE = bytes.fromhex("57fb808b247547db")
#: First bytes -> the name of a compression, and the command that writes the content to standard output.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -c"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
}


def unreadable(reason: str, following: str = NEXT_SAVE) -> UnreadableError:
    """Return the error for a file that cannot be read; the caller puts the path before."""
    return UnreadableError(f"cannot be read as a checkpoint: {reason}. {following}")


def check_kind(handle: Handle, head: bytes) -> None:
    """Raise an error that names the kind of file, unless the file starts as a zip archive.

    ``head``: the first 64 bytes, or all bytes of a shorter file.
    """
    path = handle.path
    if re.search(r"\.distcp$", path.name):
        raise unreadable("it is one file of a folder of torch.distributed.checkpoint", _next_dcp(path.parent))
    if head.startswith(b"PK"):
        return
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            raise _compressed(handle, name, command)
    if _is_tar(handle.read(min(handle.size, _BLOCK), 0)):
        raise _tar(handle, "")
    for found, reason, following in _by_content(handle, head):
        if found:
            raise unreadable(reason, following)
    is_text = head.isascii() and head.decode("ascii").strip("\r\n\t").isprintable()
    what = "text" if is_text else "neither a zip archive nor safetensors"
    raise unreadable(f"it is {what} (it begins with {head[:16]!r})")


def _opened_by(call: str, path: Path) -> str:
    """``call``: an expression with ``{path}`` for the file."""
    call = call.replace("{path}", python_text(str(path)))
    return f"Next: {call} opens it; write its tensors with torch.save to another file"


def _made_from(call: str, path: Path) -> str:
    call = call.replace("{path}", python_text(str(path)))
    return f"Next: take the checkpoint that it was made from; {call} opens it for a look"


def _next_tensorflow(path: Path) -> str:
    """``path``: a file or the folder of a checkpoint or of a SavedModel; the call takes a prefix or a folder."""
    name = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path.name)
    prefix = path.parent if path.name == "checkpoint" else path.with_name(name)
    return _opened_by("tf.train.load_checkpoint({path})", prefix)


def _written_again(path: Path, value: str, modules: str = "torch") -> str:
    """The command that writes ``value``, an expression with ``{path}`` for the file, to another file."""
    value = value.replace("{path}", python_text(str(path)))
    suffix = path.suffix if path.suffix in _WEIGHTS else ".pt"
    new = python_text(new_name(path, ".tensors", suffix))
    return python_command(f"import {modules}; torch.save({value}, {new})")


def _by_content(handle: Handle, head: bytes) -> Iterator[tuple[bool, str, str]]:
    """Yield (whether the file is of a kind, what that is, the next step), the surest ones first."""
    path, text = handle.path, head.lstrip().lower()
    unpickled = _written_again(path, 'pickle.load(open({path}, "rb"))', "pickle, torch")
    array = _written_again(path, '{"array": torch.from_numpy(numpy.load({path}))}', "numpy, torch")
    yield (
        head[:1] == b"\x80" and _LEGACY in head[:24],
        "torch.save wrote it in the format before torch 1.6, which is not a zip archive",
        f"Next, with torch >= 1.6: {_written_again(path, 'torch.load({path}, weights_only=True)')}",
    )
    yield (
        head[:1] == b"\x80" and head[1:2] <= b"\x05",
        "it is a plain pickle, which runs code when it is loaded",
        f"Next, if you trust it: {unpickled}",
    )
    yield (
        head.startswith(b"version https://git-lfs"),
        "it is a pointer of Git LFS, not the file itself",
        f"Next: git -C {in_shell(path.parent)} lfs pull",
    )
    yield (
        head.startswith(b"/annex/objects/"),
        "it is a pointer of git-annex, not the file itself",
        f"Next: git -C {in_shell(path.parent)} annex get {in_shell(path.name)}",
    )
    yield (
        text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")),
        "it is a web page, not a checkpoint: a login or an error page was saved instead of the file",
        f"Next: head -c 500 {shlex.quote(str(path))} shows what the server said; then download the file again",
    )
    is_json = text.startswith(b"{")
    yield (
        is_json and b'"weight_map"' in handle.read(min(handle.size, _INDEX_GUESS), 0),
        "it is the index of a sharded checkpoint, which cannot be read yet",
        "Next: open one of the shards, or join all of them in one file",
    )
    yield is_json, "it is JSON text, not a checkpoint", "Next: give the file of weights beside it"
    yield (
        head.startswith(b"GGUF"),
        "it is a GGUF file of llama.cpp, whose weights are usually quantized for inference",
        _made_from("gguf.GGUFReader({path})", path),
    )
    yield (
        head.startswith(b"\x93NUMPY"),
        "it is one array of NumPy (.npy)",
        f"Next: {array}",
    )
    yield (
        head.startswith(b"\x89HDF\r\n"),
        "it is an HDF5 file, as Keras and h5py write",
        _opened_by("h5py.File({path})", path),
    )
    tail = handle.read(min(handle.size, 8), max(0, handle.size - 8))
    is_shard = re.search(r"\.data-\d{5}-of-\d{5}$", path.name) is not None
    yield (
        tail == _TABLE or is_shard or head.startswith(b"model_checkpoint_path:"),
        "it is a part of a checkpoint of TensorFlow",
        _next_tensorflow(path),
    )
    yield (
        path.suffix == ".onnx" or (head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head)),
        "it is an ONNX graph, made for inference",
        _made_from("onnx.load({path})", path),
    )
    yield (
        path.suffix == ".msgpack" or re.match(rb"[\x81-\x8f][\xa1-\xbf]", head) is not None,
        "it is a msgpack file, as Flax writes",
        _opened_by('flax.serialization.msgpack_restore(open({path}, "rb").read())', path),
    )
    yield (
        head[4:8] == b"TFL3",
        "it is a model of TensorFlow Lite",
        _made_from("ai_edge_litert.interpreter.Interpreter({path})", path),
    )
    yield not any(head), "it begins with zeros, as after a crash before its content reached the disk", NEXT_COPY


def _compressed(handle: Handle, name: str, command: str) -> UnreadableError:
    path = handle.path
    if name == "gzip":
        try:
            first = zlib.decompressobj(31).decompress(handle.read(min(handle.size, 4096), 0), _BLOCK)
        except zlib.error:
            first = b""
        if _is_tar(first):
            return _tar(handle, name)
    target = path.with_suffix("") if path.suffix in (".gz", ".bz2", ".xz", ".zst") else path
    new = new_name(target, ".unpacked")
    return unreadable(
        f"it is compressed by {name}",
        f"Next: {command} {shlex.quote(str(path))} > {shlex.quote(new)}, then give that file",
    )


def _is_tar(block: bytes) -> bool:
    return block[257:262] == b"ustar"


def _tar(handle: Handle, compressed_by: str) -> UnreadableError:
    path = handle.path
    folder = new_name(path.with_suffix(""), ".files")
    inside = [] if compressed_by else [name for name in _members(handle) if name.endswith(_WEIGHTS)]
    what = "the archive of a NeMo model (a tar file)" if path.suffix == ".nemo" else "a tar archive"
    found = f" with {quoted(inside[0])} in it" if inside else ""
    file = shlex.quote(f"{folder}/{inside[0].removeprefix('./')}") if inside else "the file of weights in it"
    into = shlex.quote(folder)
    return unreadable(
        f"it is {what}{f', compressed by {compressed_by}' if compressed_by else ''}{found}",
        f"Next: mkdir {into} && tar -xf {shlex.quote(str(path))} -C {into}, then give {one_line(file)}",
    )


def _members(handle: Handle) -> Iterator[str]:
    """Yield the names in a tar archive, as far as they stay in its folder; only the first ones are looked at."""
    at = 0
    for _ in range(_MOST_MEMBERS):
        if at + _BLOCK > handle.size:
            return
        block = handle.read(_BLOCK, at)
        size = block[124:136].strip(b" \0")
        if not _is_tar(block) or not re.fullmatch(rb"[0-7]+", size):
            return
        name = block[:100].partition(b"\0")[0].decode("utf-8", "replace")
        if not name.startswith("/") and ".." not in name.split("/"):
            yield name
        at += _BLOCK + -(-int(size, 8) // _BLOCK) * _BLOCK


def zip_kind(path: Path, names: Collection[str]) -> UnreadableError | None:
    """Return the error for an archive that torch.save did not write, by the names in it; None if it is unknown."""
    first = {name.partition("/")[0] for name in names}
    below = {name.partition("/")[2] for name in names}
    unpacked = new_name(path.with_suffix(""), ".files")
    into = shlex.quote(unpacked)

    def unzip(name: str) -> str:
        file = shlex.quote(os.path.join(unpacked, name))
        return f"Next: mkdir {into} && unzip -q {shlex.quote(str(path))} -d {into}, then give {file}"

    if "constants.pkl" in below or any(name.startswith("code/") for name in below):
        return unreadable(
            "it is a TorchScript archive, which holds code",
            f"Next, if you trust it: {_written_again(path, 'torch.jit.load({path}).state_dict()')}",
        )
    if "policy.pth" in first:
        return unreadable("it is a model of Stable-Baselines3, an archive of several files", unzip("policy.pth"))
    if names and all(name.endswith(".npy") for name in names):
        value = "{name: torch.from_numpy(array) for name, array in numpy.load({path}).items()}"
        return unreadable(
            "it is an archive of NumPy arrays (.npz)", f"Next: {_written_again(path, value, 'numpy, torch')}"
        )
    if "model.weights.h5" in first:
        return unreadable("it is a model of Keras", _opened_by("keras.models.load_model({path})", path))
    inside = sorted(name for name in names if name.endswith(_WEIGHTS) and ".." not in name and not name.startswith("/"))
    if inside and not any(name.endswith("data.pkl") for name in names):
        return unreadable(f"it is an archive of files, {quoted(inside[0])} among them", unzip(inside[0]))
    return None


def folder_kind(path: Path) -> UnreadableError | None:
    """Return the error for a folder, by what it holds; None if that is unknown, or if it cannot be listed."""
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return None
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return unreadable("it is a folder of torch.distributed.checkpoint", _next_dcp(path))
    if "saved_model.pb" in names:
        return unreadable("it is a SavedModel of TensorFlow", _next_tensorflow(path / "variables" / "variables"))
    if "checkpoint" in names and any(name.endswith(".index") for name in names):
        return unreadable("it is a folder of TensorFlow", _next_tensorflow(path))
    files = [name for name in names if name.endswith(_WEIGHTS)]
    if not files:
        return None
    first = one_line(str(path / files[0]))
    if len(files) == 1:
        return unreadable("it is a folder", f"Next: give its file {first}")
    return unreadable(f"it is a folder with {len(files)} files of weights", f"Next: give one, such as {first}")


def _next_dcp(folder: Path) -> str:
    new = new_name(folder.with_name(f"{folder.name}.pt"), "")
    command = ["python", "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", str(folder), new]
    return f"Next: {' '.join(map(shlex.quote, command))}, then give that file"
