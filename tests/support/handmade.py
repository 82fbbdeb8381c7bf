"""Checkpoint files put together byte by byte, also ones that torch.save would never write."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["call", "integer", "name", "string", "tensor", "write_pickle", "write_safetensors", "write_zip"]


def name(module: str, attribute: str) -> bytes:
    """The opcode that names a global."""
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def string(text: str) -> bytes:
    """The opcode that pushes a text."""
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    """The opcode that pushes an integer of any size."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    """The opcodes that call a global with arguments that are opcodes themselves."""
    return name(module, attribute) + b"(" + b"".join(arguments) + b"tR"


def tensor(
    shape: Sequence[int],
    stride: Sequence[int],
    *,
    offset: int = 0,
    numel: int = 4,
    storage: str = "FloatStorage",
    record: str = "0",
    location: str = "cpu",
) -> bytes:
    """The opcodes of a tensor as torch.save writes them, with numbers that it would not write."""
    reference = b"(" + string("storage") + name("torch", storage) + string(record) + string(location)
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        reference + integer(numel) + b"tQ",
        integer(offset),
        b"(" + b"".join(map(integer, shape)) + b"t",
        b"(" + b"".join(map(integer, stride)) + b"t",
        b"\x89",
        call("collections", "OrderedDict"),
    )


def write_pickle(path: Path, opcodes: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    """A well-formed archive around a pickle; the opcodes come without the first (PROTO) and the last one (STOP)."""
    content = {"data.pkl": b"\x80\x02" + opcodes + b".", "byteorder": b"little", "data/0": bytes(16)}
    return write_zip(path, {**content, **(records or {})})


def write_zip(path: Path, records: Mapping[str, bytes], *, folder: str = "archive/") -> Path:
    """Stored records by the standard library, without anything that torch adds but the version of the format."""
    version = {} if {"version", ".data/version"} & {*records} else {"version": b"3\n"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, content in {**records, **version}.items():
            archive.writestr(zipfile.ZipInfo(folder + record), content)
    return path


def write_safetensors(
    path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None
) -> Path:
    """A file in the safetensors format; ``header`` as bytes, or another ``length`` of it, need not be right."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def write_large(path: Path, size: int, header: bytes, tail: bytes) -> None:
    """An archive in the format for more than 4 GiB, with a storage of ``size`` bytes that is a hole but for its end."""
    central = b""
    with open(path, "wb") as file:
        for record, length in ((b"a/data/0", size), (b"a/data.pkl", len(header)), (b"a/data/1", 4), (b"a/version", 2)):
            position = file.tell()
            file.write(struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 0x808, 0, 0, 0, 0, 0, 0, len(record), 0) + record)
            if record == b"a/data/0":
                file.seek(length - len(tail), 1)
                content = tail
            else:
                content = {b"a/data.pkl": header, b"a/version": b"3\n"}.get(record, bytes(4))
            file.write(content)
            large = [value for value in (length, length, position) if value >= 0xFFFFFFFF]
            extra = struct.pack("<2H", 1, 8 * len(large)) + struct.pack(f"<{len(large)}Q", *large) if large else b""
            small, place = min(length, 0xFFFFFFFF), min(position, 0xFFFFFFFF)
            crc = zlib.crc32(content) if length == len(content) else 1
            central += struct.pack(
                "<4s6H3L5H2L", b"PK\x01\x02", 0, 0, 0x808, 0, 0, 0, crc, small, small,
                len(record), len(extra), 0, 0, 0, 0, place,
            ) + record + extra  # fmt: skip
        start = file.tell()
        file.write(central)
        end = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 4, 4, len(central), start))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 4, 4, len(central), 0xFFFFFFFF, 0))
