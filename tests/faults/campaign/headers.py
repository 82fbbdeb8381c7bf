"""Readers of foreign headers as functions of bytes: an ``InitError`` or nothing, soon, and in little memory.

``check`` raises ``MisbehaviourError`` for another exception, more than two seconds of the processor, or over 200 MB.
"""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from noether_init_core import InitializerStack, PathProvider
from noether_init_core.errors import InitError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.sets.file_names import check_tag, iteration_of_tag, parse
from noether_init_core.sets.manifest import read_manifest, sealed

__all__ = ["TARGETS", "MisbehaviourError", "check", "seeds"]

MOST_SECONDS = 2.0
MOST_BYTES = 200 << 20

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

_folder = tempfile.TemporaryDirectory(prefix="headers-")


class MisbehaviourError(Exception):
    """A reader did what no header may make it do."""


def _file(name: str, data: bytes) -> Path:
    path = Path(_folder.name) / name
    path.write_bytes(data)
    return path


def archive(data: bytes) -> None:
    """A whole ``.th``."""
    with open_checkpoint(_file("archive.th", data)) as reader:
        reader.verify()
        reader.load()


def opcodes(data: bytes) -> None:
    """The pickle of a ``.th``, in an archive that is in order."""
    records = {"data.pkl": data, "byteorder": b"little", "data/0": bytes(16), "data/1": bytes(64), "version": b"3\n"}
    with open_checkpoint(_file("opcodes.th", _stored(records))) as reader:
        reader.load()


def _stored(records: Mapping[str, bytes]) -> bytes:
    """A zip archive of stored records; the standard library takes ten times as long."""
    body = central = b""
    for name, content in records.items():
        raw, fields = b"a/" + name.encode(), (zlib.crc32(content), len(content), len(content))
        place = len(body)
        body += struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 33, *fields, len(raw), 0) + raw + content
        central += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, *fields, len(raw), 0, 0, 0, 0, 0, place
        ) + raw  # fmt: skip
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, len(records), len(records), len(central), len(body), 0)
    return body + central + end


def safetensors(data: bytes) -> None:
    """A whole safetensors file, or, if it begins like JSON, a header whose length is right."""
    if data[:1] == b"{":
        data = struct.pack("<Q", len(data)) + data + bytes(64)
    with open_checkpoint(_file("weights.safetensors", data)) as reader:
        reader.load()


def manifest(data: bytes) -> None:
    """A manifest, sealed so that its content is looked at."""
    read_manifest(_file("manifest.json", sealed(data)))


def names(data: bytes) -> None:
    """Names of files and tags; what parses prints as it was."""
    text = data.decode("utf-8", "surrogateescape")
    found = parse(text)
    if found is not None and str(found) != text:
        raise MisbehaviourError(f"{text!r} is printed as {str(found)!r}")
    iteration_of_tag(text)
    check_tag(text)


def config(data: bytes) -> None:
    """A config file; the kinds that it names are looked up, no file of a checkpoint is."""
    InitializerStack.from_file(_file("init.yaml", data), path_provider=PathProvider(_folder.name, "run"))


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "archive": archive,
    "opcodes": opcodes,
    "safetensors": safetensors,
    "manifest": manifest,
    "names": names,
    "config": config,
}


def check(target: str, data: bytes) -> bool:
    """Whether the reader accepted the bytes. Raises ``MisbehaviourError``."""
    before, begin = _reset_peak(), time.process_time()
    try:
        TARGETS[target](data)
        accepted = True
    except InitError:
        accepted = False
    except Exception as error:
        raise MisbehaviourError(f"{type(error).__name__}: {error}") from error
    seconds, memory = time.process_time() - begin, _peak() - before
    if seconds > MOST_SECONDS:
        raise MisbehaviourError(f"{seconds:.1f} s")
    if memory > MOST_BYTES:
        raise MisbehaviourError(f"{memory >> 20} MB")
    return accepted


def _reset_peak() -> int:
    """Bytes that this process holds; where the system allows it, its peak begins there again.

    Elsewhere the peak is that of the whole process, and a call is seen only where it takes more than all before it.
    """
    with contextlib.suppress(FileNotFoundError):
        _RESET.write_text("5")
    return _peak()


def _peak() -> int:
    """The most bytes of memory that this process has held since the peak was reset."""
    if _RESET.exists():
        return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seeds(target: str) -> list[bytes]:
    """Real inputs to begin with, all of which are accepted."""
    return list(_SEEDS[target]())


def _files() -> Iterator[Path]:
    """The files of a set."""
    from faults.campaign.saves import Numbered

    root = Path(_folder.name) / "seeds"
    if not root.exists():
        Numbered(2).save(root, 1, tags=("latest", "best_model.loss.val"), averages=True)
    yield from sorted((root / "run" / "checkpoints" / "sets" / "00000001_E1_U1_S1").iterdir())


def _archives() -> Iterator[bytes]:
    for path in _files():
        if path.suffix == ".th":
            yield path.read_bytes()
    yield _stored({"data.pkl": b"\x80\x02}.", "byteorder": b"little", "version": b"3\n"})


def _pickles() -> Iterator[bytes]:
    """Pickles whose storages have the 16 and 64 bytes of the archive around them."""
    import zipfile
    from collections import OrderedDict

    import torch

    first, second = torch.ones(4), torch.zeros(8, dtype=torch.int64)
    said = {"training_iteration": {"epoch": 1, "update": 2, "sample": 3}, "run_id": "run", "checkpoint_tag": "latest"}
    state = {0: {"step": 1.0, "exp_avg": first.view(2, 2)}, 1: {"exp_avg": second}}
    for value in (
        {"state_dict": OrderedDict(w=torch.nn.Parameter(first), v=second[1:5], t=first.view(2, 2).T), **said},
        {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}]},
        {"a": [1, 2.5, None, True], "b": (b"x", {1: 2}, {3}, 1j), "c": torch.float16, "d": 1 << 70, "e": first},
        [torch.device("cpu"), torch.Size([1, 2]), slice(1, 2), range(3), bytearray(b"xy"), frozenset({4})],
    ):
        path = Path(_folder.name) / "pickled.th"
        torch.save(value, path)
        with zipfile.ZipFile(path) as opened:
            yield opened.read("pickled/data.pkl")


def _safetensors() -> Iterator[bytes]:
    import safetensors.torch
    import torch

    data = safetensors.torch.save({"a": torch.ones(2, 3), "b": torch.zeros(1, dtype=torch.int64)}, {"format": "pt"})
    yield data
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    # the library puts tensors of many bytes per element first
    header["b"]["data_offsets"], header["b"]["shape"] = [0, 40], [5]
    header["a"]["data_offsets"] = [40, 64]
    yield json.dumps(header).encode()


def _manifests() -> Iterator[bytes]:
    for path in _files():
        if path.name == "manifest.json":
            text = json.loads(path.read_bytes())
            del text["digest"]
            yield json.dumps(text).encode()


def _names() -> Iterator[bytes]:
    for name in (
        "mlp_cp=latest_model.th",
        "autoenc.encoder_ema=0.9_cp=E1_U7_S28_optim.th",
        "mlp_cp=best_model.loss.val.total_trainer.th",
        "E1_U7_S28.early_exit",
    ):
        yield name.encode()


def _configs() -> Iterator[bytes]:
    for lines in (
        (
            "auto_resume: true",
            "initializers:",
            "- {kind: previous_run, run_id: a, keys_to_remove: [x]}",
            "observers: []",
        ),
        ("initializers:", "  - kind: resume", "    checkpoint_tag: {epoch: 10}", "  - kind: file", "    path: a.th"),
        (
            "model: {initializers: []}",
            "resume_run_id: 2026_02_19",
            "resume_checkpoint: latest",
            "trainer: {initializer: null}",
        ),
    ):
        yield "\n".join([*lines, ""]).encode()


_SEEDS: Mapping[str, Callable[[], Iterator[bytes]]] = {
    "archive": _archives,
    "opcodes": _pickles,
    "safetensors": _safetensors,
    "manifest": _manifests,
    "names": _names,
    "config": _configs,
}
