"""How far one tensor moved from A to B, as numbers, piece by piece: two pieces in memory, never two tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import attrs
import torch

from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.content import TensorInfo

_Item = TypeVar("_Item")

# Elements of a piece: smaller ones are lost in the interpreter, larger ones leave the caches.
_PIECE = 1 << 18
# What no arithmetic is defined for; such tensors are equal or not.
_WITHOUT_NUMBERS = ("bits", "float4", "float8_e8m0fnu")
# Squares beyond these may have overflown or vanished.
_LARGEST, _SMALLEST = 1e300, 1e-280


@attrs.frozen
class Drift:
    """What was found of two pieces, of two tensors, or of all of them together.

    Attributes:
        is_equal: The same bits, so dtypes have to be the same.
        norm_a: Euclidean norm of A; infinite where no float can hold it.
        norm_b: Euclidean norm of B.
        norm_difference: Euclidean norm of B - A.
        cosine: Of the angle between both; None where one of them is zero, or infinite.
        max_abs: The largest absolute difference of two elements.
        nonfinite_a: Elements of A that are NaN or infinite; then, and of dtypes without numbers, norms are None.
        nonfinite_b: Elements of B.
    """

    is_equal: bool
    norm_a: float | None = None
    norm_b: float | None = None
    norm_difference: float | None = None
    cosine: float | None = None
    max_abs: float = 0.0
    nonfinite_a: int = 0
    nonfinite_b: int = 0

    @property
    def relative_norm(self) -> float | None:
        """Norm of B - A over that of A; 0 where both are zero, None where A alone is, or no float can hold it."""
        if self.norm_a is None or self.norm_difference is None:
            return None
        if self.norm_difference == 0:
            return 0.0
        return finite(self.norm_difference / self.norm_a) if self.norm_a > 0 else None


def are_comparable(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether both have numbers, and of one sort."""
    has_numbers = not (a.dtype.startswith(_WITHOUT_NUMBERS) or b.dtype.startswith(_WITHOUT_NUMBERS))
    return has_numbers and a.dtype.startswith("complex") == b.dtype.startswith("complex")


def total_of(drifts: Sequence[Drift]) -> Drift:
    """Of all of them, as one vector."""
    is_equal = all(one.is_equal for one in drifts)
    if any(one.norm_a is None for one in drifts):
        lost_a, lost_b = sum(one.nonfinite_a for one in drifts), sum(one.nonfinite_b for one in drifts)
        return Drift(is_equal, nonfinite_a=lost_a, nonfinite_b=lost_b)
    a = math.hypot(*(one.norm_a or 0.0 for one in drifts))
    b = math.hypot(*(one.norm_b or 0.0 for one in drifts))
    difference = math.hypot(*(one.norm_difference or 0.0 for one in drifts))
    cosine = None
    if 0 < a < math.inf and 0 < b < math.inf:
        shares = ((one.cosine or 0.0) * ((one.norm_a or 0.0) / a) * ((one.norm_b or 0.0) / b) for one in drifts)
        # rounding never takes it beyond 1
        cosine = 1.0 if difference == 0 else max(-1.0, min(1.0, math.fsum(shares)))
    return Drift(is_equal, a, b, difference, cosine, max((one.max_abs for one in drifts), default=0.0))


#: A tensor, and the file that it is in.
_Placed = tuple[Checkpoint, TensorInfo]


def drift_of(first: _Placed, second: _Placed, room: Room, advance: Callable[[int], None]) -> Drift:
    """Compare two tensors of one shape, each with its file; reads both once.

    Args:
        first: The tensor of A.
        second: That of B; the file may be the same.
        room: Memory for the arithmetic, to be given again for the next tensors.
        advance: Told the bytes of both as they are read.
    """
    has_numbers = are_comparable(first[1], second[1])
    pieces = _pieces(first, second, advance)
    ahead = room.ahead(pieces) if first[1].nbytes > _PIECE else pieces
    return total_of([_of_pieces(one, two, room, has_numbers) for one, two in ahead])


def _of_pieces(one: torch.Tensor, two: torch.Tensor, room: Room, has_numbers: bool) -> Drift:
    is_equal = one.dtype == two.dtype and torch.equal(_bits(one), _bits(two))
    if not has_numbers:
        return Drift(is_equal)
    # float8 knows no way to float64 on every build
    one, two = (piece.float() if piece.dtype.itemsize == 1 else piece for piece in (one, two))
    a = room.numbers(0, one)
    difference, max_abs = 0.0, 0.0
    if not is_equal:
        b = room.numbers(1, two)
        apart = room.difference(a, b)
        max_abs = _largest(apart)
        difference = math.prod(_norm(apart))
    scale_a, norm_a = _norm(a)
    scale_b, norm_b = (scale_a, norm_a) if is_equal else _norm(b)
    if not (math.isfinite(scale_a) and math.isfinite(scale_b)):
        return Drift(is_equal, nonfinite_a=_nonfinite(one), nonfinite_b=_nonfinite(two))
    cosine = None
    if scale_a > 0 and scale_b > 0:
        cosine = 1.0 if is_equal else float(torch.dot(a, b)) / norm_a / norm_b
    return Drift(is_equal, scale_a * norm_a, scale_b * norm_b, difference, cosine, max_abs)


class Room:
    """Where the arithmetic is done: float64 memory for two pieces and their difference, and a thread that reads ahead.

    Memory that is asked for anew for every piece costs up to ten times as much as the arithmetic. In the block, torch
    has one thread: two of them wait for each other at the end of every operation, up to forty times as long where
    another process has one of the cores.
    """

    def __init__(self) -> None:
        # of complex numbers both parts
        self._memory = torch.empty(3, 2 * _PIECE, dtype=torch.float64)
        self._reading = ThreadPoolExecutor(1)
        self._threads = 0

    def __enter__(self) -> Room:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._threads)
        self._reading.shutdown(cancel_futures=True)

    def ahead(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """The items; while one is used, the next is made."""
        coming = self._reading.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = self._reading.submit(next, items, None)
            yield item

    def numbers(self, place: int, piece: torch.Tensor) -> torch.Tensor:
        """The piece in float64, until the next call for this place; of complex numbers both parts."""
        if piece.is_complex():
            piece = torch.view_as_real(piece).reshape(-1)
        return self._memory[place, : piece.numel()].copy_(piece)

    def difference(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B - A, until the next call."""
        return torch.sub(b, a, out=self._memory[2, : a.numel()])


def _pieces(
    placed: _Placed, other_placed: _Placed, advance: Callable[[int], None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same elements of both, flat, piece by piece."""
    (a, first), (b, second) = placed, other_placed
    if first.nbytes == 0:
        return
    if first.contiguous and second.contiguous:
        first, second = first.flat(), second.flat()
        (size,) = first.shape
        for begin in range(0, size, _PIECE):
            one, other = (_part(info, 0, begin, min(begin + _PIECE, size)) for info in (first, second))
            yield a.read(one), b.read(other)
            advance(one.nbytes + other.nbytes)
        return
    left = [(first, second, True)]
    while left:
        part, other, is_turn_of_a = left.pop()
        if part.nbytes // part.itemsize <= _PIECE:
            yield _read(a, part).contiguous().view(-1), _read(b, other).contiguous().view(-1)
            advance(part.nbytes + other.nbytes)
            continue
        # By turns along what lies farthest apart in either, so that pieces are few stretches of both files.
        dimension = _outermost(part if is_turn_of_a else other)
        size = part.shape[dimension]
        middle = size // 2
        for begin, end in ((middle, size), (0, middle)):
            halves = _part(part, dimension, begin, end), _part(other, dimension, begin, end)
            left.append((*halves, not is_turn_of_a))


def _read(reader: Checkpoint, info: TensorInfo) -> torch.Tensor:
    """A piece; where its stretches lie far apart, what is between them is not in memory at once."""
    if sum(piece.nbytes for piece in info.pieces) <= 4 * _PIECE * info.itemsize:
        return reader.read(info)
    dimension = _outermost(info)
    size = info.shape[dimension]
    middle = size // 2
    halves = (_part(info, dimension, *ends) for ends in ((0, middle), (middle, size)))
    return torch.cat([_read(reader, half) for half in halves], dimension)


def _outermost(info: TensorInfo) -> int:
    """The dimension whose neighbours lie farthest apart."""
    return max(range(len(info.shape)), key=lambda at: (info.shape[at] > 1, info.stride[at]))


def _part(info: TensorInfo, dimension: int, begin: int, end: int) -> TensorInfo:
    whole = tuple((0, size) for size in info.shape)
    return info.part((*whole[:dimension], (begin, end), *whole[dimension + 1 :]))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # single bytes take four times as long to compare
    carriers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.view(carriers.get(tensor.dtype.itemsize, torch.int64))


def _nonfinite(piece: torch.Tensor) -> int:
    return int((~torch.isfinite(piece)).sum())


def _norm(numbers: torch.Tensor) -> tuple[float, float]:
    """The Euclidean norm as two factors: a scale by which ``numbers`` are divided in place, and their norm then.

    The scale is 0 where all are zero, and not finite where one of them is not.
    """
    squares = float(torch.dot(numbers, numbers))
    if _SMALLEST <= squares <= _LARGEST:
        return 1.0, math.sqrt(squares)
    scale = _largest(numbers)
    if not 0 < scale < math.inf:
        return scale, 1.0
    numbers /= scale
    return scale, math.sqrt(float(torch.dot(numbers, numbers)))


def _largest(numbers: torch.Tensor) -> float:
    least, most = torch.aminmax(numbers)
    return abs(max(-float(least), float(most)))  # no -0.0


def finite(value: float | None) -> float | None:
    """The value; None for infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
