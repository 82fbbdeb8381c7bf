"""The content of a file before tensors are read: descriptions of tensors, inert values, and a walk over them.

An object may share parts, because pickle writes each part once. So a few hundred bytes can describe a tree of billions
of values. The limits count values of the tree, because callers walk over it as a tree.
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


# Bytes of a temporary tensor.
_BOX = 1 << 20


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A range of bytes of one file that holds a box of a tensor.

    It is a msgspec ``Struct`` without garbage collection, because a header has one for every tensor, and the collector
    would visit all of them again and again.

    Attributes:
        offset: Position of the first element in the file, in bytes.
        nbytes: Number of bytes from the first to the last element of the box, including gaps.
        stride: Number of elements between neighbours in each dimension of the box; None: row-major, without gaps.
        box: The box of the tensor; None: all of it.
        file: Name of the file in a checkpoint of several files; empty in a checkpoint of one file.
        container: ``raw``: ``offset`` is the position of the elements. ``torch_zip``: it is the position of an archive
            of torch.save with this tensor only; the format resolves such a piece to a raw one at the first read.
        is_conjugated: Whether reading must carry out a lazy conjugation.
        is_negated: Whether reading must carry out a lazy negation.
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
    """The description of one tensor of a checkpoint: shape, dtype, and the location of its bytes.

    Two keys with equal pieces are one tensor (tied weights).

    Attributes:
        shape: Size of each dimension.
        dtype: torch's name of the dtype, without ``torch.``.
        pieces: Boxes that together make up the tensor, without overlap; empty for a tensor that is computed when read.
        key: The argument for ``Checkpoint.read``, for a tensor without pieces.
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
        """The piece that holds all of the tensor; None if the tensor has several pieces or no piece."""
        piece = self.pieces[0] if len(self.pieces) == 1 else None
        return piece if piece is not None and piece.box is None else None

    @property
    def stride(self) -> tuple[int, ...]:
        """Number of elements between neighbours in each dimension; row-major unless a single piece states another."""
        whole = self.whole
        return row_major(self.shape) if whole is None or whole.stride is None else whole.stride

    @property
    def dense(self) -> Piece | None:
        """The piece whose bytes are exactly the elements of the tensor, in any order; else None."""
        whole = self.whole
        if whole is None or whole.is_conjugated or whole.is_negated:
            return None
        return whole if whole.stride is None or is_dense(self.shape, whole.stride) else None

    @property
    def contiguous(self) -> Piece | None:
        """The piece whose bytes are exactly the elements of the tensor in row-major order; else None."""
        dense = self.dense
        if dense is None or dense.stride is None or 0 in self.shape:
            return dense
        # The stride of a dimension with one element has no effect, and torch writes arbitrary ones.
        steps = zip(self.shape, dense.stride, row_major(self.shape), strict=True)
        return dense if all(size == 1 or step == own for size, step, own in steps) else None

    def part(self, box: Box) -> TensorInfo:
        """Return the description of a box of the tensor; its pieces are the parts of the pieces within the box.

        Raises ``ValueError`` for a box outside the tensor, and for a tensor without raw pieces.
        """
        if len(box) != len(self.shape) or any(
            not 0 <= begin <= end <= size for (begin, end), size in zip(box, self.shape, strict=True)
        ):
            raise ValueError(f"{box} is not a box of a tensor of the shape {list(self.shape)}")
        if not self.pieces or any(piece.container != "raw" for piece in self.pieces):
            raise ValueError("the locations of its elements are not known: it is computed, or not resolved yet")
        shape = tuple(end - begin for begin, end in box)
        found = (self._within(piece, box) for piece in self.pieces)
        return TensorInfo(shape, self.dtype, tuple(piece for piece in found if piece is not None))

    def boxes(self) -> Iterator[Box]:
        """Yield boxes of about 1 MiB that together make up the tensor.

        The tensor is split along the dimension that varies slowest in the file, so each box is one range of bytes. A
        tensor without elements has no box; a tensor without dimensions has one.
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
        """Return the description of the same bytes in one dimension; the tensor must be ``contiguous``."""
        (piece,) = self.pieces
        return TensorInfo((math.prod(self.shape),), self.dtype, (msgspec.structs.replace(piece, stride=None),))

    def _within(self, piece: Piece, box: Box) -> Piece | None:
        """Return the part of a piece within ``box``, with a box relative to it; None if they do not overlap."""
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
    """Return the strides of a row-major tensor without gaps, as torch defines them (a size of 0 counts as 1)."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    return tuple(reversed(strides))


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from the first to the last one of a tensor, including gaps."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the tensor uses every element from its first to its last one exactly once, in any order."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True)):
        if size > 1 and step != 0:
            if step != expected:
                return False
            expected *= size
    return 0 in shape or expected == span(shape, stride)


class UnreadableError(Exception):
    """A file is damaged or cannot be read. The message gives reason and next step; the caller puts the path before."""


class OpcodeError(Exception):
    """The pickle of a file is damaged or does something that torch.save never does; the message gives the reason."""


class LimitError(OpcodeError):
    """The pickle of a file builds more than a limit allows; the message gives the limit."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """One range of bytes in a file: its name, position, size, and its CRC-32 or None."""

    name: str
    offset: int
    size: int
    crc: int | None


@attrs.frozen
class GlobalName:
    """The name of a class, function or dtype that the file has as a value, such as ``GlobalName("torch.bfloat16")``."""

    name: str


@attrs.frozen
class ForeignName(GlobalName):
    """A name that neither tensors nor plain values need, and that the caller did not allow."""


@attrs.define(eq=False, weakref_slot=False)
class ForeignObject:
    """An inert record of an object whose class is neither imported nor called.

    ``args`` are the arguments of its constructor, ``state`` the argument of ``__setstate__``, ``items`` the content of
    a subclass of list, set or dict. ``torch.device`` is read as such a record, too.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] | dict[Any, Any] | None = None


@attrs.frozen(eq=False)
class TensorKey:
    """A key of a dict, or a member of a set, that is or contains a tensor; it is never hashed by the tensor."""

    key: Any


@attrs.frozen
class StorageRef:
    """The storage of tensors, a record of the file. ``dtype`` is None for an untyped storage."""

    record: str
    offset: int
    nbytes: int
    dtype: str | None


@attrs.frozen
class RefusedTensor:
    """A tensor that cannot be read. It takes the tensor's place in the object, so that the error can name its key.

    ``is_damaged``: the file contradicts itself, so it is refused even if the tensor is not asked for.
    """

    reason: str
    is_damaged: bool = False


T = TypeVar("T")

#: The last name of a module's extra state in a state dict.
EXTRA_STATE = "_extra_state"


def children(value: Any) -> Iterable[tuple[Any, Any]]:
    """Yield (key or position, value) of a container. A set is not searched: its hashable members hold no tensors."""
    if isinstance(value, dict):
        return value.items()
    if type(value) is ForeignObject:
        return (("args", value.args), ("state", value.state), ("items", value.items))
    return enumerate(value)


def length_of(key: Any) -> int:
    """Return about how many letters ``key`` has in a dotted name, without writing it."""
    kind = type(key)
    if kind is str or kind is bytes:
        return len(key) if kind is str else 4 * len(key)
    if kind is tuple or kind is frozenset:
        return 2 + sum(2 + length_of(part) for part in key)
    return key.bit_length() // 3 + 1 if kind is int else 40


def join(path: str, key: Any) -> str:
    """Return the dotted path of the child ``key`` of the value at ``path``."""
    text = key if type(key) is str else repr(key)
    return f"{path}.{text}" if path else text


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def named(
    parts: Mapping[Any, Any], kind: type[T], is_searched: Callable[[Any], object] = _is_container
) -> dict[str, T]:
    """Return dotted path -> every value of ``kind`` in ``parts``, in order; the second of two equal paths gets ``#2``.

    Writer and reader both name tensors with this function, because a manifest lists tensors by these names. The writer
    searches for tensors, the reader for their descriptions. ``is_searched`` tells whether a value may contain some.
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
    """Return the state dict of a file: the value of the key ``state_dict``, or the complete object; else None.

    Only tensors of the state dict are named, by its own keys, which must be strings.
    """
    if not isinstance(value, dict):
        return None
    state_dict = value.get("state_dict")
    if isinstance(state_dict, dict):
        return state_dict
    return value if is_state_dict(value, kind) else None


def is_state_dict(value: Any, kind: type[Any]) -> bool:
    """Whether ``value`` is a dict with string keys that holds at least one tensor, and else only extra state."""
    return (
        isinstance(value, dict)
        and any(isinstance(child, kind) for child in value.values())
        and all(
            type(key) is str and (isinstance(child, kind) or key.rpartition(".")[2] == EXTRA_STATE)
            for key, child in value.items()
        )
    )


def dotted(path: Iterable[Any]) -> str:
    """Join keys to a dotted path, such as ``state.0.exp_avg``."""
    return functools.reduce(join, path, "")


def place_of(path: Iterable[Any]) -> str:
    """Join keys to a dotted path for a message; long keys are cut, and foreign ones are named only."""
    return dotted(key if type(key) in _SHOWN and length_of(key) <= _LONG else _cut(key) for key in path)


_SHOWN = frozenset({str, int, float, bool, bytes, type(None)})
_LONG = 200


def _cut(key: Any) -> str:
    if type(key) is str:
        return f"{key[:_LONG]}..."
    if type(key) is tuple and length_of(key) <= _LONG and all(type(part) in _SHOWN for part in key):
        return repr(key)
    return f"<{key.name[:_LONG]}>" if isinstance(key, GlobalName | ForeignObject) else f"<{type(key).__name__}>"


#: The attribute in which torch keeps the versions of modules on a state dict.
METADATA = "_metadata"

#: Path of a module, without a dot at its end -> for example ``{"version": 2}``.
Versions = Mapping[str, Mapping[str, Any]]
