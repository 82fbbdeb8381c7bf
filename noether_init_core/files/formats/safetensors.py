"""Parse the header of a safetensors file; every field is checked before it is used.

It refuses everything that the safetensors library refuses, and more; a test compares the two. The library is not used
to read tensors, because it maps the file: truncating a mapped file kills the process, and rewriting it changes the
model.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

from noether_init_core.files.content import ITEMSIZES, Piece, Record, TensorInfo, UnreadableError
from noether_init_core.files.graph import Content, ObjectGraph
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
#: The limit of the safetensors library.
_MAX_HEADER = 100_000_000
_MOST_TENSORS = 1_000_000
# An empty list takes two bytes of JSON and thirty times as much memory; a tensor has three brackets.
_MOST_BRACKETS = 4 * _MOST_TENSORS
_LONGEST_KEY = 4096
_MOST_DIMENSIONS = 64
_LARGEST = 1 << 58
_NEXT_COPY = "Next: copy the file again from where it was written, or take an older checkpoint"
_NEXT_SAVE = "Next: write it to another file with safetensors.torch.save_file(tensors, path)"


def read_safetensors(handle: Handle) -> Content:
    """Return names, shapes, dtypes and positions of all tensors; no bytes of tensors are read.

    Raises ``UnreadableError``.
    """
    (length,) = struct.unpack("<Q", handle.read(_LENGTH, 0))
    if length > _MAX_HEADER:
        _refuse(f"it states a header of {length} bytes, more than {_MAX_HEADER}")
    start = _LENGTH + length
    if start > handle.size:
        _refuse(f"it is truncated: it has {handle.size} bytes and states a header of {length} bytes", _NEXT_COPY)
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
        _refuse("its header has far more lists than its tensors need")

    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in raw:  # json accepts half a surrogate pair, which no file name, log or JSON output can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        _refuse("its header is not written in UTF-8", _NEXT_COPY)
    except (ValueError, RecursionError) as error:
        # ValueError: not JSON, or an integer of thousands of digits. RecursionError: thousands of nested lists.
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
        _refuse(f"{quoted(key)} must have exactly dtype, shape and data_offsets; it has {there}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        _refuse(f"{quoted(key)} has the dtype {quoted(str(entry['dtype']))}, unknown to torch")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        _refuse(f"the shape of {quoted(key)} is not a list of at most {_MOST_DIMENSIONS} integers >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(f"the data_offsets of {quoted(key)} are not two integers >= 0")
    if entry["dtype"] == "F4":
        if not shape or shape[-1] % 2:
            _refuse(f"{quoted(key)} has 4-bit elements and an odd last dimension")
        shape = [*shape[:-1], shape[-1] // 2]
    count = 1
    for size in shape:
        count *= size or 1
        if count >= _LARGEST:
            _refuse(f"the shape of {quoted(key)} has more than 2**58 elements")
    begin, end = offsets
    nbytes = 0 if 0 in shape else count * ITEMSIZES[dtype]
    if end - begin != nbytes:
        _refuse(f"{quoted(key)} needs {nbytes} bytes for {entry['dtype']} {shape}; its offsets span {end - begin}")
    return TensorInfo(tuple(shape), dtype, (Piece(start + begin, nbytes),))


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(size) is int and 0 <= size < _LARGEST for size in value)


def _check_places(size: int, in_order: Iterable[Record], start: int) -> None:
    """Refuse gaps and overlaps: the bytes of the tensors must fill the rest of the file."""
    position = start
    for record in in_order:
        if record.offset > position:
            _refuse(f"it has {record.offset - position} bytes before {quoted(record.name)} that belong to no tensor")
        if record.offset < position:
            _refuse(f"the bytes of {quoted(record.name)} overlap those of another tensor")
        position += record.size
    if position > size:
        _refuse(f"it is truncated: {position - size} bytes of its tensors are missing", _NEXT_COPY)
    if position < size:
        _refuse(f"it has {size - position} bytes after its last tensor", _NEXT_COPY)


def _refuse(reason: str, following: str = _NEXT_SAVE) -> NoReturn:
    raise UnreadableError(f"cannot be read as a safetensors file: {reason}. {following}")
