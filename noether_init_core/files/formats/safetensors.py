"""The header of a safetensors file: which tensor lies where, all of it checked before anything is believed.

The header is parsed once, here: what the safetensors library refuses is refused, and more. A test compares the two.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

from noether_init_core.files.content import ITEMSIZES, Content, ObjectGraph, Piece, Record, TensorInfo, UnreadableError
from noether_init_core.files.storage.handle import Handle
from noether_init_core.messages import quoted

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


def read_safetensors(handle: Handle) -> Content:
    """Names, shapes, dtypes and places. Raises ``CheckpointFormatError``; reads no bytes of tensors."""
    (length,) = struct.unpack("<Q", handle.read(_LENGTH, 0))
    if length > _MAX_HEADER:
        _refuse(f"its header would be {length} bytes long, more than {_MAX_HEADER}")
    start = _LENGTH + length
    if start > handle.size:
        _refuse(f"it is cut off: its header of {length} bytes does not fit into {handle.size}", _NEXT_COPY)
    entries = _parse(handle.read(length, _LENGTH))
    metadata = entries.pop(_METADATA, {})
    if type(metadata) is not dict or any(type(text) is not str for text in metadata.values()):
        _refuse(f"its {_METADATA} is not a mapping from text to text")
    if len(entries) > _MOST_TENSORS:
        _refuse(f"it has {len(entries)} tensors, more than {_MOST_TENSORS}")
    tensors = {key: _tensor(key, entry, start) for key, entry in entries.items()}
    records = [Record(key, piece.offset, piece.nbytes, None) for key, info in tensors.items() for piece in info.pieces]
    records.sort(key=lambda record: (record.offset, record.size))
    _check_places(handle.size, records, start)
    graph = ObjectGraph(tensors, length)
    return Content("safetensors", tensors, graph, {one.name: one for one in records}, metadata=metadata)


def _parse(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        _refuse(f"its header begins with {raw[:8]!r} instead of a brace")
    if raw.count(b"[") + raw.count(b"{") > _MOST_BRACKETS:
        _refuse("its header holds far more lists than tensors have")

    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in raw:  # half a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        _refuse("its header is not written in UTF-8", _NEXT_COPY)
    except (ValueError, RecursionError) as error:
        # ValueError: no JSON, or an integer of thousands of digits; RecursionError: lists nested thousands deep
        _refuse(f"its header cannot be read ({str(error)[:80]})", _NEXT_COPY)
    if twice:
        _refuse(f"its header has the key {quoted(twice[0])} twice")
    if type(value) is not dict:
        _refuse("its header is not one JSON object")
    return value


def _tensor(key: str, entry: Any, start: int) -> TensorInfo:
    if len(key) > _LONGEST_KEY:
        _refuse(f"the key {quoted(key)} is {len(key)} characters long, more than {_LONGEST_KEY}")
    if type(entry) is not dict or entry.keys() != _FIELDS:
        there = ", ".join(map(quoted, itertools.islice(entry, 8))) if type(entry) is dict else type(entry).__name__
        _refuse(f"{quoted(key)} should have dtype, shape and data_offsets; it has {there}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        _refuse(f"{quoted(key)} has the dtype {quoted(str(entry['dtype']))}, which torch does not have")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        _refuse(f"the shape of {quoted(key)} is no list of at most {_MOST_DIMENSIONS} whole numbers from 0 on")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(f"the data_offsets of {quoted(key)} are not two whole numbers from 0 on")
    if entry["dtype"] == "F4":
        if not shape or shape[-1] % 2:
            _refuse(f"{quoted(key)} has an odd number of elements of four bits in a row")
        shape = [*shape[:-1], shape[-1] // 2]
    count = 1
    for size in shape:
        count *= size or 1
        if count >= _LARGEST:
            _refuse(f"the shape of {quoted(key)} is absurd")
    begin, end = offsets
    nbytes = 0 if 0 in shape else count * ITEMSIZES[dtype]
    if end - begin != nbytes:
        _refuse(f"{quoted(key)} takes {nbytes} bytes as {entry['dtype']} {shape}, its offsets say {end - begin}")
    return TensorInfo(tuple(shape), dtype, (Piece(start + begin, nbytes),))


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(size) is int and 0 <= size < _LARGEST for size in value)


def _check_places(size: int, in_order: Iterable[Record], start: int) -> None:
    """The tensors' bytes fill the rest of the file, one behind the other."""
    position = start
    for record in in_order:
        if record.offset > position:
            _refuse(f"it has {record.offset - position} bytes before {quoted(record.name)} of no tensor")
        if record.offset < position:
            _refuse(f"the bytes of {quoted(record.name)} overlap those of another tensor")
        position += record.size
    if position > size:
        _refuse(f"it is cut off: {position - size} bytes of its tensors are missing", _NEXT_COPY)
    if position < size:
        _refuse(f"it has {size - position} bytes behind its last tensor", _NEXT_COPY)


def _refuse(reason: str, following: str = _NEXT_SAVE) -> NoReturn:
    raise UnreadableError(f"cannot be read as a safetensors file: {reason}. {following}")
