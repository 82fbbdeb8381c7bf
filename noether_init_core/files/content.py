"""The content of a file before tensors are read: descriptions of tensors, inert values, and a walk over them.

An object may share parts (pickle writes each part once), so that a few hundred bytes can stand for a tree of
billions. What is handed out is limited as a tree, since that is how everybody walks over it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import attrs
import msgspec

#: First and one past the last index in each dimension.
Box = tuple[tuple[int, int], ...]

#: Bytes per element of every dtype that can be read, by torch's name without ``torch.``.
ITEMSIZES = {
    name: size
    for size, names in {
        1: "bits1x8 bits2x4 bits4x2 bits8 bool float4_e2m1fn_x2 "
        "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu int8 uint8",
        2: "bfloat16 bits16 float16 int16 uint16",
        4: "complex32 float32 int32 uint32",
        8: "complex64 float64 int64 uint64",
        16: "complex128",
    }.items()
    for name in names.split()
}


# Bytes of a temporary tensor, where one is needed.
_BOX = 1 << 20


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Bytes of one file that hold a box of a tensor.

    A header has one for every tensor: as a ``Struct`` it is no work for the garbage collector.

    Attributes:
        offset: Place of the first element in the file.
        nbytes: Bytes from the first to the last element that the box uses, those between them included.
        stride: Elements between neighbours in each dimension of the box; None: row-major, without gaps.
        box: The box of the tensor; None: all of it.
        file: Name of the file in a checkpoint of several files; empty: the only one.
        container: ``raw``: ``offset`` leads to the elements. ``torch_zip``: it leads to a whole archive of torch.save
            that holds this tensor only; a format resolves such a piece to a raw one when it is first read.
        is_conjugated: The bytes are those before a lazy conjugation; reading carries it out.
        is_negated: The same for a lazy negation.
    """

    offset: int
    nbytes: int
    stride: tuple[int, ...] | None = None
    box: Box | None = None
    file: str = ""
    container: Literal["raw", "torch_zip"] = "raw"
    is_conjugated: bool = False
    is_negated: bool = False


@attrs.frozen
class TensorInfo:
    """One tensor of a checkpoint: what it looks like, and where its bytes are.

    Two keys with equal pieces are one tensor (tied weights).

    Attributes:
        shape: Its sizes.
        dtype: torch's name of the dtype, without ``torch.``.
        pieces: Boxes that make up the tensor, without overlap; none for a tensor that is computed when it is read.
        key: What ``Checkpoint.read`` takes for a tensor that has no pieces.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...] = ()
    key: str = ""

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Number of elements times their size."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]

    @property
    def whole(self) -> Piece | None:
        """The piece that holds all of the tensor; None where several do, or none."""
        piece = self.pieces[0] if len(self.pieces) == 1 else None
        return piece if piece is not None and piece.box is None else None

    @property
    def stride(self) -> tuple[int, ...]:
        """Elements between neighbours in each dimension; row-major where no single piece says otherwise."""
        whole = self.whole
        return row_major(self.shape) if whole is None or whole.stride is None else whole.stride

    @property
    def dense(self) -> Piece | None:
        """The piece whose bytes are those of the tensor and no others, in whatever order, as they are to be read."""
        whole = self.whole
        if whole is None or whole.is_conjugated or whole.is_negated:
            return None
        return whole if whole.stride is None or is_dense(self.shape, whole.stride) else None

    @property
    def contiguous(self) -> Piece | None:
        """The piece that holds the elements one after the other, in row-major order, as they are to be read."""
        dense = self.dense
        if dense is None or dense.stride is None or 0 in self.shape:
            return dense
        # a dimension of one element may have any stride
        steps = zip(self.shape, dense.stride, row_major(self.shape), strict=True)
        return dense if all(size == 1 or step == own for size, step, own in steps) else None

    def part(self, box: Box) -> TensorInfo:
        """The description of a box of the tensor, whose pieces are those parts of its pieces that lie in the box.

        Raises ``ValueError`` for a box that does not lie in the tensor, or a tensor without pieces.
        """
        if len(box) != len(self.shape) or any(
            not 0 <= begin <= end <= size for (begin, end), size in zip(box, self.shape, strict=True)
        ):
            raise ValueError(f"{box} is no box of a tensor of the shape {list(self.shape)}")
        if not self.pieces or any(piece.container != "raw" for piece in self.pieces):
            raise ValueError("the places of its elements are not known: it is computed, or not resolved yet")
        shape = tuple(end - begin for begin, end in box)
        found = (self._within(piece, box) for piece in self.pieces)
        return TensorInfo(shape, self.dtype, tuple(piece for piece in found if piece is not None))

    def boxes(self) -> Iterator[Box]:
        """Boxes of about a megabyte that make it up: along the slowest dimension in the file, so each is one stretch.

        A tensor without elements has none, one without dimensions is its only one.
        """
        if self.nbytes == 0:
            return
        shape, stride = self.shape, self.stride
        slowest = max(range(len(shape)), key=lambda number: (shape[number] > 1, stride[number]), default=0)
        size = shape[slowest] if shape else 1
        step = max(1, _BOX // (self.nbytes // size))
        for begin in range(0, size, step):
            ends = (begin, min(begin + step, size))
            yield tuple(ends if number == slowest else (0, whole) for number, whole in enumerate(shape))

    def flat(self) -> TensorInfo:
        """The description of the same bytes in one dimension, of a tensor that is ``contiguous``."""
        (piece,) = self.pieces
        return TensorInfo((math.prod(self.shape),), self.dtype, (msgspec.structs.replace(piece, stride=None),))

    def _within(self, piece: Piece, box: Box) -> Piece | None:
        """The part of a piece that lies in ``box``, which is where its own box counts from; None for none."""
        own = piece.box or tuple((0, size) for size in self.shape)
        common = tuple(
            (max(begin, first), min(end, last)) for (begin, end), (first, last) in zip(box, own, strict=True)
        )
        if piece.box is not None and any(begin >= end for begin, end in common):
            return None
        stride = piece.stride or row_major(tuple(end - begin for begin, end in own))
        skipped = sum((begin - first) * step for (begin, _), (first, _), step in zip(common, own, stride, strict=True))
        shape = tuple(end - begin for begin, end in common)
        return msgspec.structs.replace(
            piece,
            offset=piece.offset + skipped * self.itemsize,
            nbytes=span(shape, stride) * self.itemsize,
            stride=stride,
            box=None
            if common == box
            else tuple((begin - start, end - start) for (begin, end), (start, _) in zip(common, box, strict=True)),
        )


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps, as torch counts them."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    return tuple(reversed(strides))


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one of a tensor, those between them included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether every element from the first to the last one belongs to the tensor, in whatever order."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True)):
        if size > 1 and step != 0:
            if step != expected:
                return False
            expected *= size
    return 0 in shape or expected == span(shape, stride)


class UnreadableError(Exception):
    """A file is damaged or cannot be read; the message says why and what to do. The path is put before it."""


class OpcodeError(Exception):
    """The pickle of a file is damaged or does what torch.save does not do; the message says what."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """One stretch of bytes: its name in the file, its place, and its CRC-32 if it has one."""

    name: str
    offset: int
    size: int
    crc: int | None


@attrs.frozen
class GlobalName:
    """A class, function or dtype that the file names as a value, e.g. ``GlobalName("torch.bfloat16")``."""

    name: str


@attrs.define(eq=False)
class ForeignObject:
    """An object of a class that is known by name only: what it would have been built from.

    ``args`` are those of its constructor, ``state`` what would have been given to ``__setstate__``, ``items`` the
    content where the class is a kind of list or dict. ``torch.device`` is read as such a record, too.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] | dict[Any, Any] | None = None


@attrs.frozen
class StorageRef:
    """The storage behind tensors: a record of the file. ``dtype`` is None where the storage has none of its own."""

    record: str
    offset: int
    nbytes: int
    dtype: str | None


@attrs.frozen
class RefusedTensor:
    """A tensor that cannot be read; it stays in its place until its key is known."""

    reason: str


T = TypeVar("T")

#: The last name of a module's extra state in a state dict.
EXTRA_STATE = "_extra_state"


def children(value: Any) -> Iterable[tuple[Any, Any]]:
    """Key or position, and value, of what a container holds. Members of a set are no tensors and have none."""
    if isinstance(value, dict):
        return value.items()
    if type(value) is ForeignObject:
        return (("args", value.args), ("state", value.state), ("items", value.items))
    return enumerate(value)


def join(path: str, key: Any) -> str:
    """The path of what stands under ``key`` in what ``path`` leads to."""
    text = key if type(key) is str else repr(key)
    return f"{path}.{text}" if path else text


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def named(
    parts: Mapping[Any, Any], kind: type[T], is_searched: Callable[[Any], object] = _is_container
) -> dict[str, T]:
    """Dotted path -> every value of ``kind`` in ``parts``, in their order. Of two equal paths the second gets ``#2``.

    What is written and what is read is named by this one function, since a manifest lists tensors by these names: the
    writer has tensors in its object, the reader descriptions of them. ``is_searched``: whether a value may hold some.
    """
    found: dict[str, T] = {}
    for key, value in parts.items():
        _collect(value, join("", key), kind, is_searched, found)
    return found


def _collect(value: Any, path: str, kind: type[T], is_searched: Callable[[Any], object], found: dict[str, T]) -> None:
    if isinstance(value, kind):
        name, number = path, 1
        while name in found:
            number += 1
            name = f"{path}#{number}"
        found[name] = value
    elif is_searched(value):
        for key, child in children(value):
            _collect(child, join(path, key), kind, is_searched, found)


def state_dict_of(value: Any, kind: type[Any]) -> dict[Any, Any] | None:
    """The state dict of a file: under the key of that name, or the whole object; None where there is none.

    Its tensors are named by its own keys, which must be texts, and all others in the file not at all.
    """
    if not isinstance(value, dict):
        return None
    state_dict = value.get("state_dict")
    if isinstance(state_dict, dict):
        return state_dict
    return value if is_state_dict(value, kind) else None


def is_state_dict(value: Any, kind: type[Any]) -> bool:
    """Whether it is a dict of tensors under texts, at least one, with nothing else than extra state beside them."""
    return (
        isinstance(value, dict)
        and any(isinstance(child, kind) for child in value.values())
        and all(
            type(key) is str and (isinstance(child, kind) or key.rpartition(".")[2] == EXTRA_STATE)
            for key, child in value.items()
        )
    )


MAX_DEPTH = 128
_CONTAINERS = frozenset({dict, list, tuple, ForeignObject})
_UNREADABLE = frozenset({RefusedTensor, StorageRef})


class ObjectGraph:
    """Tensors and foreign objects in an object; ``size`` are the bytes of the header behind it.

    ``problems``: path -> why, of tensors that cannot be read. ``foreign``: name of a class -> path of its first object.

    Raises ``OpcodeError`` for an object that contains itself, or is too deep or too large as a tree.
    """

    def __init__(self, root: Any, size: int) -> None:
        self.problems: dict[str, str] = {}
        self.foreign: dict[str, str] = {}
        self._largest = 1_000_000 + 20 * size
        self._most_tensors = 10_000 + size
        # id -> (values in the tree below, tensors in it); None while it is being looked at
        self._seen: dict[int, tuple[int, int] | None] = {}
        self._visit(root, (), 0)

    def tensors(self, parts: Mapping[Any, Any]) -> dict[str, TensorInfo]:
        """Dotted path -> tensor, in parts of the object. Of two equal paths the second gets ``#2``, and so on."""
        return named(parts, TensorInfo, self.count)

    def count(self, value: Any) -> int:
        """Tensors below a part of the object; a tensor in the place of a part counts as none."""
        return (self._seen.get(id(value)) or (0, 0))[1] if type(value) in _CONTAINERS else 0

    def _visit(self, value: Any, path: tuple[Any, ...], depth: int) -> tuple[int, int]:
        kind = type(value)
        if kind in _UNREADABLE:
            reason = value.reason if kind is RefusedTensor else "it is a bare storage; store a tensor instead"
            self.problems.setdefault(dotted(path), reason)
        if kind not in _CONTAINERS:
            return 1, int(kind is TensorInfo)
        known = self._seen.get(id(value), (0, 0))
        if known is None:
            raise OpcodeError(f"its object contains itself at {dotted(path)[:200]!r}")
        if known[0]:
            return known
        if depth == MAX_DEPTH:
            raise OpcodeError(f"its object is nested deeper than {MAX_DEPTH}")
        if kind is ForeignObject:
            self.foreign.setdefault(value.name, dotted(path))
        self._seen[id(value)] = None
        values, tensors = 1, 0
        for key, child in children(value):
            child_kind = type(child)
            if child_kind in _CONTAINERS or child_kind in _UNREADABLE:
                more_values, more_tensors = self._visit(child, (*path, key), depth + 1)
                values += more_values
                tensors += more_tensors
            else:  # most are tensors and plain values: a call for each would take far longer
                values += 1
                tensors += child_kind is TensorInfo
        if values > self._largest or tensors > self._most_tensors:
            raise OpcodeError("its object repeats its parts so often that it is far larger than the file")
        self._seen[id(value)] = values, tensors
        return values, tensors


def dotted(path: Iterable[Any]) -> str:
    """The path as it is shown and asked for: ``state.0.exp_avg``."""
    return functools.reduce(join, path, "")


#: The attribute of a state dict.
METADATA = "_metadata"

#: Path of a module, without a dot at its end -> what it says of its state, such as ``{"version": 2}``.
Versions = Mapping[str, Mapping[str, Any]]


@attrs.frozen(eq=False)
class Content:
    """A screened file, before bytes of its tensors are read.

    Attributes:
        format: Which format it is.
        value: The object, plain Python, with ``TensorInfo`` in the place of tensors.
        graph: Where tensors are in ``value``.
        records: All bytes that carry values, in their order; each has a checksum, or none of them.
        versions: Id of a dict in ``value`` -> the versions of modules that are attached to it.
        metadata: What the file says besides ``value``; None where ``value`` is all.
    """

    format: Literal["torch", "safetensors"]
    value: Any
    graph: ObjectGraph
    records: Mapping[str, Record]
    versions: Mapping[int, Versions] = attrs.Factory(dict)
    metadata: Mapping[str, str] | None = None
