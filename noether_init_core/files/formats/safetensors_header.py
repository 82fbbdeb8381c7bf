"""The header of a safetensors file: which tensor lies where, all of it checked before anything is believed.

Our own checks come first, then those of the safetensors library, through the descriptor that is already open. The
bytes of tensors are read by the reader, as those of every format.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable
from typing import Any, NoReturn

import attrs

from noether_init_core.errors import CheckpointFormatError
from noether_init_core.files.formats.zip_records import Record
from noether_init_core.files.storage.file_handle import FileHandle
from noether_init_core.files.tensor_info import ITEMSIZES, TensorInfo

__all__ = ["DTYPES", "SafetensorsHeader", "is_safetensors", "read_safetensors_header"]

#: Name in the header -> torch's name. F4 stores two elements per byte, which torch counts as one.
DTYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F16": "float16",
    "F32": "float32",
    "F4": "float4_e2m1fn_x2",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "I8": "int8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "U8": "uint8",
}
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_LENGTH = 8
#: The library's own limit.
_MAX_HEADER = 100_000_000
_MOST_TENSORS = 1_000_000
# An empty list takes two bytes of JSON and thirty times as much memory; a tensor has three brackets.
_MOST_BRACKETS = 4 * _MOST_TENSORS
_LONGEST_KEY = 4096
_MOST_DIMENSIONS = 64
_LARGEST = 1 << 58
_NEXT_COPY = "Next: copy the file again from where it was written, or take an older checkpoint"
_NEXT_SAVE = "Next: write it again with safetensors.torch.save_file(tensors, path)"


@attrs.frozen
class SafetensorsHeader:
    """What the header says, in its own order; each tensor is a record of its own, without a checksum."""

    tensors: dict[str, TensorInfo]
    records: dict[str, Record]
    metadata: dict[str, str]


def is_safetensors(handle: FileHandle) -> bool:
    """Whether the first bytes are those of a safetensors file, whatever its name.

    A zip archive of stored records has zero where the header of a safetensors file has its first brace.
    """
    return handle.size > _LENGTH and handle.read(1, _LENGTH) == b"{"


def read_safetensors_header(handle: FileHandle) -> SafetensorsHeader:
    """Names, shapes, dtypes and places. Raises ``CheckpointFormatError``; reads no bytes of tensors."""
    (length,) = struct.unpack("<Q", handle.read(_LENGTH, 0))
    if length > _MAX_HEADER:
        _refuse(handle, f"its header would be {length} bytes long, more than {_MAX_HEADER}")
    start = _LENGTH + length
    if start > handle.size:
        _refuse(handle, f"it is cut off: its header of {length} bytes does not fit into {handle.size}", _NEXT_COPY)
    raw = handle.read(length, _LENGTH)
    entries = _parse(handle, raw)
    metadata = _metadata(handle, entries.pop(_METADATA, {}))
    if len(entries) > _MOST_TENSORS:
        _refuse(handle, f"it has {len(entries)} tensors, more than {_MOST_TENSORS}")
    tensors, records = {}, {}
    for key, entry in entries.items():
        tensors[key], records[key] = _tensor(handle, key, entry, start)
    in_order = sorted(records.values(), key=lambda record: (record.offset, record.size))
    _check_places(handle, in_order, start)
    _check_by_library(handle, in_order)
    return SafetensorsHeader(tensors, records, metadata)


def _parse(handle: FileHandle, raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        _refuse(handle, f"its header begins with {raw[:8]!r} instead of a brace")
    if raw.count(b"[") + raw.count(b"{") > _MOST_BRACKETS:
        _refuse(handle, "its header holds far more lists than tensors have")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            _refuse(handle, f"its header has the key {_show(twice)} twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        _refuse(handle, "its header is not written in UTF-8", _NEXT_COPY)
    except CheckpointFormatError:
        raise
    except (ValueError, RecursionError) as error:
        # ValueError: no JSON, or an integer of thousands of digits; RecursionError: lists nested thousands deep
        _refuse(handle, f"its header cannot be read ({str(error)[:80]})", _NEXT_COPY)
    if type(value) is not dict:
        _refuse(handle, "its header is not one JSON object")
    return value


def _metadata(handle: FileHandle, value: Any) -> dict[str, str]:
    if type(value) is not dict or any(type(text) is not str for text in value.values()):
        _refuse(handle, f"its {_METADATA} is not a mapping from text to text")
    return value


def _tensor(handle: FileHandle, key: str, entry: Any, start: int) -> tuple[TensorInfo, Record]:
    """The tensor, and its bytes by their place in the file."""
    if len(key) > _LONGEST_KEY:
        _refuse(handle, f"the key {_show(key)} is {len(key)} characters long, more than {_LONGEST_KEY}")
    if type(entry) is not dict or entry.keys() != _FIELDS:
        there = ", ".join(map(_show, itertools.islice(entry, 8))) if type(entry) is dict else type(entry).__name__
        _refuse(handle, f"{_show(key)} should have dtype, shape and data_offsets; it has {there}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        _refuse(handle, f"{_show(key)} has the dtype {_show(str(entry['dtype']))}, which torch does not have")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        _refuse(handle, f"the shape of {_show(key)} is no list of at most {_MOST_DIMENSIONS} whole numbers from 0 on")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(handle, f"the data_offsets of {_show(key)} are not two whole numbers from 0 on")
    if entry["dtype"] == "F4":
        if not shape or shape[-1] % 2:
            _refuse(handle, f"{_show(key)} has an odd number of elements of four bits in a row")
        shape = [*shape[:-1], shape[-1] // 2]
    stride = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= size or 1
        if step >= _LARGEST:
            _refuse(handle, f"the shape of {_show(key)} is absurd")
    begin, end = offsets
    nbytes = 0 if 0 in shape else step * ITEMSIZES[dtype]
    if end - begin != nbytes:
        _refuse(handle, f"{_show(key)} takes {nbytes} bytes as {entry['dtype']} {shape}, its offsets say {end - begin}")
    info = TensorInfo(tuple(shape), dtype, nbytes, key, 0, tuple(reversed(stride)))
    return info, Record(key, start + begin, nbytes, 0)


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(size) is int and 0 <= size < _LARGEST for size in value)


def _check_places(handle: FileHandle, in_order: Iterable[Record], start: int) -> None:
    """The tensors' bytes fill the rest of the file, one behind the other."""
    position = start
    for record in in_order:
        if record.offset > position:
            _refuse(handle, f"it has {record.offset - position} bytes before {_show(record.name)} of no tensor")
        if record.offset < position:
            _refuse(handle, f"the bytes of {_show(record.name)} overlap those of another tensor")
        position += record.size
    if position > handle.size:
        _refuse(handle, f"it is cut off: {position - handle.size} bytes of its tensors are missing", _NEXT_COPY)
    if position < handle.size:
        _refuse(handle, f"it has {handle.size - position} bytes behind its last tensor", _NEXT_COPY)


def _check_by_library(handle: FileHandle, in_order: list[Record]) -> None:
    """The library, which defines the format, must accept the file too, and find the same order in it."""
    from safetensors import SafetensorError, safe_open

    try:
        # by the descriptor, so that it is the same file; pread, because a mapped file that is cut off kills the process
        with safe_open(f"/dev/fd/{handle.fileno()}", framework="numpy", backend="pread") as file:
            keys = file.offset_keys()
    except (SafetensorError, OSError) as error:
        _refuse(handle, f"the safetensors library does not accept it ({_printable(str(error)[:200])})")
    filled = {record.name for record in in_order if record.size}
    expected = [record.name for record in in_order if record.size]
    if len(keys) != len(in_order) or [key for key in keys if key in filled] != expected:
        _refuse(handle, "the safetensors library finds other tensors in it")


def _printable(text: str) -> str:
    return text if text.isprintable() and text.isascii() else ascii(text)


def _show(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def _refuse(handle: FileHandle, reason: str, following: str = _NEXT_SAVE) -> NoReturn:
    raise CheckpointFormatError(
        f"{handle.path} cannot be read as a safetensors file: {reason}. {following}", path=handle.path
    )
