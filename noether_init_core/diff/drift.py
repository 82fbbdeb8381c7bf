"""Compute the difference of two tensors piece by piece, with two pieces in memory, never two tensors."""

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

# Elements of a piece. For smaller ones the interpreter takes most of the time; larger ones do not fit the caches.
_PIECE = 1 << 18
# Dtypes without arithmetic; such tensors are only compared for equality.
_WITHOUT_NUMBERS = ("bits", "float4", "float8_e8m0fnu")
# A sum of squares outside this range may have overflowed or lost small values.
_LARGEST, _SMALLEST = 1e300, 1e-280


@attrs.frozen
class Drift:
    """The difference of two pieces, of two tensors, or of many tensors together.

    Attributes:
        is_equal: Whether dtypes and bits are the same.
        norm_a: Euclidean norm of A; infinite if it exceeds float64. None for non-finite elements or dtypes without
            arithmetic.
        norm_b: Euclidean norm of B.
        norm_difference: Euclidean norm of B - A.
        cosine: Cosine of the angle between both; None if a norm is zero or infinite.
        max_abs: Largest absolute difference of two elements.
        nonfinite_a: Number of NaN and infinite elements in A.
        nonfinite_b: Number of NaN and infinite elements in B.
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
        """Norm of B - A divided by that of A; 0 if both are equal, None if only A is zero, or if it is infinite."""
        if self.norm_a is None or self.norm_difference is None:
            return None
        if self.norm_difference == 0:
            return 0.0
        return finite(self.norm_difference / self.norm_a) if self.norm_a > 0 else None


def are_comparable(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether both dtypes have arithmetic, and both are real or both are complex."""
    has_numbers = not (a.dtype.startswith(_WITHOUT_NUMBERS) or b.dtype.startswith(_WITHOUT_NUMBERS))
    return has_numbers and a.dtype.startswith("complex") == b.dtype.startswith("complex")


def total_of(drifts: Sequence[Drift]) -> Drift:
    """Combine differences as if all tensors were one vector."""
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
        # Rounding could give a cosine slightly beyond 1.
        cosine = 1.0 if difference == 0 else max(-1.0, min(1.0, math.fsum(shares)))
    return Drift(is_equal, a, b, difference, cosine, max((one.max_abs for one in drifts), default=0.0))


#: An open file, and a tensor in it.
_Placed = tuple[Checkpoint, TensorInfo]


def drift_of(first: _Placed, second: _Placed, room: Room, advance: Callable[[int], None]) -> Drift:
    """Compare two tensors of one shape, each with its file; both are read once.

    Args:
        first: The tensor of A.
        second: The tensor of B; the file may be the same.
        room: Memory for the arithmetic, to reuse for further tensors.
        advance: Called with the bytes of both after each read.
    """
    has_numbers = are_comparable(first[1], second[1])
    pieces = _pieces(first, second, advance)
    ahead = room.ahead(pieces) if first[1].nbytes > _PIECE else pieces
    return total_of([_of_pieces(one, two, room, has_numbers) for one, two in ahead])


def _of_pieces(one: torch.Tensor, two: torch.Tensor, room: Room, has_numbers: bool) -> Drift:
    is_equal = one.dtype == two.dtype and torch.equal(_bits(one), _bits(two))
    if not has_numbers:
        return Drift(is_equal)
    # Not every build of torch converts float8 to float64 directly.
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
    """Reused float64 memory for two pieces and their difference, and a thread that reads ahead.

    New memory for every piece would take up to ten times as long as the arithmetic. In the block, torch uses one
    thread: with more, they wait for each other after every operation, up to forty times as long if another process uses
    one of the cores.
    """

    def __init__(self) -> None:
        # Twice the size, for both parts of complex numbers.
        self._memory = torch.empty(3, 2 * _PIECE, dtype=torch.float64, device="cpu")
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
        """Yield the items; while the caller uses one, the thread creates the next."""
        coming = self._reading.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = self._reading.submit(next, items, None)
            yield item

    def numbers(self, place: int, piece: torch.Tensor) -> torch.Tensor:
        """Return the piece in float64 (both parts of complex numbers), valid until the next call for this place."""
        if piece.is_complex():
            piece = torch.view_as_real(piece).reshape(-1)
        return self._memory[place, : piece.numel()].copy_(piece)

    def difference(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return B - A, valid until the next call."""
        return torch.sub(b, a, out=self._memory[2, : a.numel()])


def _pieces(
    placed: _Placed, other_placed: _Placed, advance: Callable[[int], None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield pieces with the same elements of both tensors, in one dimension."""
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
        # Split alternately along the outermost dimension of either file, so that a piece is few ranges of both.
        dimension = _outermost(part if is_turn_of_a else other)
        size = part.shape[dimension]
        middle = size // 2
        for begin, end in ((middle, size), (0, middle)):
            halves = _part(part, dimension, begin, end), _part(other, dimension, begin, end)
            left.append((*halves, not is_turn_of_a))


def _read(reader: Checkpoint, info: TensorInfo) -> torch.Tensor:
    """Read a piece; if its elements are far apart in the file, in halves, so that the gaps need little memory."""
    if sum(piece.nbytes for piece in info.pieces) <= 4 * _PIECE * info.itemsize:
        return reader.read(info)
    dimension = _outermost(info)
    size = info.shape[dimension]
    middle = size // 2
    halves = (_part(info, dimension, *ends) for ends in ((0, middle), (middle, size)))
    return torch.cat([_read(reader, half) for half in halves], dimension)


def _outermost(info: TensorInfo) -> int:
    """Return the dimension with the largest stride, ignoring those of one element."""
    return max(range(len(info.shape)), key=lambda at: (info.shape[at] > 1, info.stride[at]))


def _part(info: TensorInfo, dimension: int, begin: int, end: int) -> TensorInfo:
    whole = tuple((0, size) for size in info.shape)
    return info.part((*whole[:dimension], (begin, end), *whole[dimension + 1 :]))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Comparing single bytes takes four times as long.
    carriers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.view(carriers.get(tensor.dtype.itemsize, torch.int64))


def _nonfinite(piece: torch.Tensor) -> int:
    return int((~torch.isfinite(piece)).sum())


def _norm(numbers: torch.Tensor) -> tuple[float, float]:
    """Return the Euclidean norm as two factors: a scale, by which ``numbers`` are divided in place, and the rest.

    The scale is 0 if all numbers are zero, and not finite if one of them is not.
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
    return abs(max(-float(least), float(most)))  # abs() turns -0.0 into 0.0


def finite(value: float | None) -> float | None:
    """Return the value; None for infinity and NaN, which JSON cannot represent."""
    return value if value is not None and math.isfinite(value) else None
