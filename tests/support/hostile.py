"""Files of torch.save that must be refused, by name: which requirement, how to write it, the error, what it says."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from noether_init_core import CheckpointFormatError, UnsafeGlobalError
from support.handmade import call, integer, name, string, tensor, write_pickle, write_zip
from support.world import INPUTS, OUTPUTS

__all__ = ["FILES", "Payload"]

GOOD = tensor([OUTPUTS, INPUTS], [INPUTS, 1], numel=6)


def under_key(opcodes: bytes) -> bytes:
    """A state dict with one key."""
    return b"}" + string("weight") + opcodes + b"s"


class Subclass(torch.Tensor):
    """A tensor of a class of one's own."""


class Payload:
    """Leaves a file named ``ran`` in the working folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def saved(value: Any) -> Callable[[Path], object]:
    """The file as torch.save writes it."""
    return lambda path: torch.save(value, path)


def pickled(opcodes: bytes, **records: bytes) -> Callable[[Path], object]:
    """A good archive around these opcodes."""
    content = {"data/0": bytes(24), **{key.replace("_", "/"): value for key, value in records.items()}}
    return lambda path: write_pickle(path, opcodes, content)


def zipped(*names: str, compression: int = zipfile.ZIP_STORED) -> Callable[[Path], object]:
    """An archive with these entries, good in all else."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            for entry in (*names, "version"):
                header = b"\x80\x02" + under_key(GOOD) + b"."
                content = header if entry.endswith(".pkl") else b"3\n" if entry == "version" else bytes(24)
                file.writestr(zipfile.ZipInfo(f"a/{entry}"), content, compression)

    return write


def oversized(path: Path) -> None:
    """An archive whose list of records gives one a size of two gigabytes."""
    raw = write_zip(path, {"data.pkl": b"\x80\x02" + under_key(GOOD) + b".", "data/0": bytes(24)}).read_bytes()
    at = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 1) + 20
    path.write_bytes(raw[:at] + (1 << 31).to_bytes(4, "little") * 2 + raw[at + 8 :])


HUGE = 10**9
Hostile = tuple[int, Callable[[Path], object], type[Exception], str]


def _safe(row: int, opcodes: bytes, says: str, **records: bytes) -> Hostile:
    """Opcodes in a good archive, refused for what they do."""
    return row, pickled(opcodes, **records), CheckpointFormatError, says


def _key(row: int, opcodes: bytes, says: str, **records: bytes) -> Hostile:
    """The same for a tensor under the key ``weight``, which the error names."""
    return _safe(row, under_key(opcodes), f"weight: .*{says}", **records)


def _unsafe(row: int, write: Callable[[Path], object], says: str) -> Hostile:
    return row, write, UnsafeGlobalError, says


def _archive(row: int, write: Callable[[Path], object], says: str) -> Hostile:
    return row, write, CheckpointFormatError, says


def _rebuild(kind: str) -> bytes:
    return call("torch._utils", f"_rebuild_{kind}", b"N")


def _save_subclass(path: Path) -> None:
    torch.save({"weight": torch.ones(2).as_subclass(Subclass)}, path)


FILES: dict[str, Hostile] = {
    "call of os.system": _unsafe(1, saved({"state_dict": {}, "x": Payload()}), r"(posix|nt)\.system"),
    "call of eval": _unsafe(1, pickled(call("builtins", "eval", string("1"))), r"builtins\.eval"),
    "class of a library": _unsafe(2, saved({"a": argparse.Namespace(lr=1)}), r"Namespace \(at a\).*allow_globals="),
    "module as a value": _unsafe(2, pickled(b"}" + string("a") + name("os", "path") + b"s"), r"os\.path.*allow_gl"),
    "bytearray of a gigabyte": _safe(3, call("builtins", "bytearray", integer(HUGE)), "bytearray"),
    "bytes of a gigabyte": _safe(3, call("builtins", "bytes", integer(HUGE)), "bytes"),
    "tensor of gigabytes": _key(3, tensor([HUGE], [1], numel=6), "does not fit into its storage"),
    "stride of zero": _key(3, tensor([HUGE, 9], [0, 0], numel=6), "does not fit into its storage"),
    "storage of gigabytes": _key(3, tensor([6], [1], numel=HUGE), "needs 4000000000"),
    "doubled tuples": _safe(4, b"})" + b"q\x00h\x00\x86" * 50 + b"Ns", "key"),
    "nested tuples": _safe(4, b"})" + b"\x85" * 400 + b"Ns", "a key is a tuple nested deeper"),
    "nested lists": _safe(4, b"]" * 400 + b"a" * 399, "nested deeper"),
    "deflated": _archive(5, zipped("data.pkl", "data/0", compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "oversized record": _archive(5, oversized, "of 2147483648 bytes does not fit"),
    "duplicate header": _archive(6, zipped("data.pkl", "data.pkl", "data/0"), "two records named"),
    "duplicate storage": _archive(6, zipped("data.pkl", "data/0", "data/0"), "two records named"),
    "small storage": _key(7, GOOD, "its storage needs 24 bytes, but the record data/0 has 20", data_0=bytes(20)),
    "missing storage": _key(7, tensor([6], [1], record="9"), "missing"),
    "sparse tensor": _archive(8, saved({"weight": torch.eye(2).to_sparse()}), "weight: it is a sparse tensor"),
    "meta tensor": _archive(8, saved({"weight": torch.ones(2, device="meta")}), "weight: it is a meta tensor"),
    "quantized tensor": _key(8, _rebuild("qtensor"), "a quantized tensor"),
    "nested tensor": _key(8, _rebuild("nested_tensor"), "a nested tensor"),
    "tensor subclass": _unsafe(8, _save_subclass, r"hostile\.Subclass \(at weight\), which"),
}
