"""Descriptions of tensors in a checkpoint: shape, dtype, and the bytes that they lie in. Torch is not needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import attrs

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


@attrs.frozen
class Piece:
    """Bytes of one file that hold a box of a tensor.

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

    def flat(self) -> TensorInfo:
        """The description of the same bytes in one dimension, of a tensor that is ``contiguous``."""
        (piece,) = self.pieces
        return TensorInfo((math.prod(self.shape),), self.dtype, (attrs.evolve(piece, stride=None),))

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
        return attrs.evolve(
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
