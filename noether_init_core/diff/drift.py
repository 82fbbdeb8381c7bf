"""How far one tensor moved from A to B, as numbers, piece by piece: two pieces in memory, never two tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
# Squares of numbers of other dtypes are far from the ends of float64.
_WIDE = ("float64", "complex128")
_LARGEST, _SMALLEST = 1e300, 1e-280


@attrs.frozen
class Drift:
    """What was found of two tensors, or of all of them together.

    Attributes:
        is_equal: The same bits, so dtypes have to be the same.
        norm_a: Euclidean norm of A; infinite where no float can hold it.
        norm_b: Euclidean norm of B.
        norm_difference: Euclidean norm of B - A.
        relative_norm: Norm of B - A over that of A; 0 where both are zero, None where A alone is.
        cosine: Of the angle between both; None where one of them is zero.
        max_abs: The largest absolute difference of two elements.
        nonfinite_a: Elements of A that are NaN or infinite; then, and of dtypes without numbers, norms are None.
        nonfinite_b: Elements of B.
    """

    is_equal: bool
    norm_a: float | None = None
    norm_b: float | None = None
    norm_difference: float | None = None
    relative_norm: float | None = None
    cosine: float | None = None
    max_abs: float | None = None
    nonfinite_a: int = 0
    nonfinite_b: int = 0


def is_comparable(dtype: str) -> bool:
    """Whether tensors of a dtype have numbers."""
    return not dtype.startswith(_WITHOUT_NUMBERS)


def total_of(drifts: list[Drift]) -> Drift:
    """Of all that have norms, as one vector."""
    known = [one for one in drifts if one.norm_a is not None and one.norm_b is not None]
    a = math.hypot(*(one.norm_a or 0.0 for one in known))
    b = math.hypot(*(one.norm_b or 0.0 for one in known))
    difference = math.hypot(*(one.norm_difference or 0.0 for one in known))
    cosine = None
    if 0 < a < math.inf and 0 < b < math.inf:
        shares = ((one.cosine or 0.0) * ((one.norm_a or 0.0) / a) * ((one.norm_b or 0.0) / b) for one in known)
        cosine = 1.0 if difference == 0 else _cosine(math.fsum(shares))
    relative = 0.0 if difference == 0 else finite(difference / a) if a > 0 else None
    return Drift(all(one.is_equal for one in drifts), a, b, difference, relative, cosine)


def drift_of(
    a: Checkpoint,
    first: TensorInfo,
    b: Checkpoint,
    second: TensorInfo,
    room: Room,
    advance: Callable[[int], None],
) -> Drift:
    """Compare two tensors of one shape.

    Args:
        a: The file of the first.
        first: The first tensor.
        b: The file of the second; it may be the same.
        second: The second tensor.
        room: Memory for the arithmetic, to be given again for the next tensors.
        advance: Told the bytes of both as they are read.

    Reads each tensor once; again to count NaN, and where squares are too large or too small for a float.
    """
    has_numbers = is_comparable(first.dtype) and is_comparable(second.dtype)
    sums = _Sums(room)
    pieces = _pieces(a, first, b, second, advance)
    for one, two in room.ahead(pieces) if first.nbytes > _PIECE else pieces:
        sums.compare(one, two, has_numbers)
    if not has_numbers:
        return Drift(sums.is_equal)
    if not sums.is_sure(first.dtype in _WIDE or second.dtype in _WIDE):
        # rare, so that another look costs less than always looking for it
        nonfinite_a = nonfinite_b = 0
        largest = [0.0, 0.0, 0.0]
        for one, two in _pieces(a, first, b, second):
            numbers = room.numbers(one, two)
            nonfinite_a += _nonfinite(numbers[0], one.is_complex())
            nonfinite_b += _nonfinite(numbers[1], two.is_complex())
            largest = list(map(max, largest, map(_largest, (*numbers, room.difference(*numbers)))))
        if nonfinite_a or nonfinite_b:
            return Drift(sums.is_equal, nonfinite_a=nonfinite_a, nonfinite_b=nonfinite_b)
        sums = _Sums(room, _power(largest[0]), _power(largest[1]), _power(largest[2]), sums.is_equal)
        for one, two in _pieces(a, first, b, second):
            sums.add(one, two)
    return sums.drift()


class Room:
    """Where the arithmetic is done: float64 memory for two pieces and their difference, and a thread that reads ahead.

    Memory that is asked for anew for every piece costs up to ten times as much as the arithmetic. In the block, torch
    has one thread: two of them wait for each other at the end of every operation, up to forty times as long where
    another process has one of the cores.
    """

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}
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

    def numbers(self, *pieces: torch.Tensor) -> list[torch.Tensor]:
        """The pieces in float64, until the next call; of complex numbers both parts."""
        found = []
        for place, piece in enumerate(pieces):
            if piece.is_complex():
                piece = torch.view_as_real(piece).reshape(-1)
            # float8 knows no way to float64 on every build
            found.append(self._at(place, piece.numel()).copy_(piece.float() if piece.dtype.itemsize == 1 else piece))
        if len({one.numel() for one in found}) > 1:  # numbers with imaginary parts on one side only
            found = [
                torch.stack((one, torch.zeros_like(one)), -1).view(-1) if not piece.is_complex() else one
                for one, piece in zip(found, pieces, strict=True)
            ]
        return found

    def difference(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B - A, until the next call."""
        return torch.sub(b, a, out=self._at(2, a.numel()))

    def _at(self, place: int, size: int) -> torch.Tensor:
        memory = self._memory.get(place)
        if memory is None or memory.numel() < size:
            memory = self._memory[place] = torch.empty(size, dtype=torch.float64)
        return memory[:size]


@attrs.define
class _Sums:
    """Sums of products over the elements; numbers are divided by their scale before."""

    room: Room
    scale_a: float = 1.0
    scale_b: float = 1.0
    scale_difference: float = 1.0
    is_equal: bool = True
    a: float = 0.0
    b: float = 0.0
    both: float = 0.0
    difference: float = 0.0
    max_abs: float = 0.0

    def compare(self, one: torch.Tensor, two: torch.Tensor, has_numbers: bool) -> None:
        """The first look at a piece: bits, then sums without scales."""
        is_same = one.dtype == two.dtype and torch.equal(_bits(one), _bits(two))
        self.is_equal = self.is_equal and is_same
        if has_numbers and is_same:
            (numbers,) = self.room.numbers(one)
            squares = float(torch.dot(numbers, numbers))
            self.a, self.b, self.both = self.a + squares, self.b + squares, self.both + squares
        elif has_numbers:
            self.add(one, two)

    def add(self, one: torch.Tensor, two: torch.Tensor) -> None:
        """Add a piece."""
        a, b = self.room.numbers(one, two)
        difference = self.room.difference(a, b)
        self.max_abs = max(self.max_abs, _largest(difference))
        if (self.scale_a, self.scale_b, self.scale_difference) != (1.0, 1.0, 1.0):
            if math.isinf(self.max_abs):  # two numbers at the opposite ends
                difference = b / self.scale_difference - a / self.scale_difference
            else:
                difference /= self.scale_difference
            a /= self.scale_a
            b /= self.scale_b
        self.a += float(torch.dot(a, a))
        self.b += float(torch.dot(b, b))
        self.both += float(torch.dot(a, b))
        self.difference += float(torch.dot(difference, difference))

    def is_sure(self, is_wide: bool) -> bool:
        """Whether these are the sums, neither overflown nor vanished."""
        sums = (self.a, self.b, self.difference)
        if not is_wide:
            return all(map(math.isfinite, sums))
        checked = sums[:2] if self.is_equal else sums
        return all(_SMALLEST <= one <= _LARGEST for one in checked)

    def drift(self) -> Drift:
        """What the sums say."""
        a, b, difference = math.sqrt(self.a), math.sqrt(self.b), math.sqrt(self.difference)
        relative: float | None = 0.0
        if difference > 0:
            relative = finite(difference / a * (self.scale_difference / self.scale_a)) if a > 0 else None
        return Drift(
            self.is_equal,
            a * self.scale_a,
            b * self.scale_b,
            difference * self.scale_difference,
            relative,
            None if not (a > 0 and b > 0) else 1.0 if difference == 0 else _cosine(self.both / a / b),
            self.max_abs,
        )


def _pieces(
    a: Checkpoint,
    first: TensorInfo,
    b: Checkpoint,
    second: TensorInfo,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same elements of both, flat, piece by piece."""
    if first.nbytes == 0:
        return
    if first.contiguous and second.contiguous:
        first, second = first.flat(), second.flat()
    left = [(first, second, True)]
    while left:
        part, other, is_turn_of_a = left.pop()
        if part.nbytes // part.itemsize <= _PIECE:
            yield _read(a, part).reshape(-1), _read(b, other).reshape(-1)
            advance(part.nbytes + other.nbytes)
            continue
        # By turns along what lies farthest apart in either, so that pieces are few stretches of both files.
        dimension = _outermost(part if is_turn_of_a else other)
        size = part.shape[dimension]
        middle = size // 2 if len(part.shape) > 1 else max(1, size // 2 // _PIECE) * _PIECE
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
    carriers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(carriers.get(tensor.dtype.itemsize, torch.int64))


def _nonfinite(numbers: torch.Tensor, is_complex: bool) -> int:
    lost = ~torch.isfinite(numbers)
    return int((lost.view(-1, 2).any(-1) if is_complex else lost).sum())


def _largest(numbers: torch.Tensor) -> float:
    least, most = torch.aminmax(numbers)
    return max(-float(least), float(most))


def _power(value: float) -> float:
    """A power of two near it, which divides without rounding."""
    if value == 0:
        return 1.0
    return math.ldexp(1.0, 1022) if math.isinf(value) else math.ldexp(1.0, max(-1021, math.frexp(value)[1] - 1))


def _cosine(value: float) -> float:
    """Rounding never takes it beyond 1."""
    return max(-1.0, min(1.0, value))


def finite(value: float | None) -> float | None:
    """The value; None for infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
