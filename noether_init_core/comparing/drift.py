"""How far one tensor moved from A to B, as numbers, piece by piece: two pieces in memory, never two tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import attrs

from noether_init_core.checkpoints.reader import CheckpointReader
from noether_init_core.checkpoints.tensor_info import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["Drift", "drift_of", "is_comparable"]

#: Elements of a piece: with the copies in float64 they fit into the cache of a core.
_PIECE = 1 << 18
# What no arithmetic is defined for; such tensors are equal or not.
_WITHOUT_NUMBERS = ("bits", "float4", "float8_e8m0fnu")
# Sums of squares beyond these are taken again with scaled numbers.
_LARGEST, _SMALLEST = 1e300, 1e-290


@attrs.define
class Drift:
    """Sums over the elements, of numbers divided by ``scale``."""

    is_equal: bool = True
    scale: float = 1.0
    a: float = 0.0
    b: float = 0.0
    both: float = 0.0
    difference: float = 0.0
    largest: float = 0.0
    max_abs: float = 0.0
    nonfinite_a: int = 0
    nonfinite_b: int = 0

    @property
    def is_finite(self) -> bool:
        """No NaN, no infinity on either side."""
        return self.nonfinite_a == 0 == self.nonfinite_b

    @property
    def norm_a(self) -> float | None:
        """Euclidean norm of A; None where no float can hold it."""
        return _finite(self.scale * math.sqrt(self.a))

    @property
    def norm_b(self) -> float | None:
        """Euclidean norm of B."""
        return _finite(self.scale * math.sqrt(self.b))

    @property
    def relative_norm(self) -> float | None:
        """Norm of B - A over that of A; 0 where both are zero, None where A alone is."""
        return relative(self.difference, self.a)

    @property
    def cosine(self) -> float | None:
        """Of the angle between both."""
        return cosine_of(self.both, self.a, self.b)


def relative(difference: float, a: float) -> float | None:
    """Relative norm of sums of squares."""
    if difference == 0:
        return 0.0
    return _finite(math.sqrt(difference) / math.sqrt(a)) if a > 0 else None


def cosine_of(both: float, a: float, b: float) -> float | None:
    """Cosine of sums of products; rounding never takes it beyond 1."""
    if a <= 0 or b <= 0:
        return None
    value = _finite(both / math.sqrt(a) / math.sqrt(b))
    return None if value is None else max(-1.0, min(1.0, value))


def is_comparable(dtype: str) -> bool:
    """Whether tensors of a dtype have numbers."""
    return not dtype.startswith(_WITHOUT_NUMBERS)


def drift_of(
    a: CheckpointReader, first: TensorInfo, b: CheckpointReader, second: TensorInfo, advance: Callable[[int], None]
) -> Drift:
    """Compare two tensors of one shape.

    Args:
        a: The file of the first.
        first: The first tensor.
        b: The file of the second; it may be the same.
        second: The second tensor.
        advance: Told the bytes of both as they are read.

    Reads each tensor once; twice where squares of its numbers are too large or too small for a float.
    """
    found = _sums(a, first, b, second, 1.0, advance)
    sums = (found.a, found.b, found.difference)
    is_off = not all(map(math.isfinite, sums)) or any(0 < one < _SMALLEST or one > _LARGEST for one in sums)
    is_off = is_off or (found.largest > 0 and max(sums) == 0)
    if found.is_finite and found.largest > 0 and is_off:
        found = _sums(a, first, b, second, found.largest, lambda _bytes: None)
    return found


def _sums(
    a: CheckpointReader,
    first: TensorInfo,
    b: CheckpointReader,
    second: TensorInfo,
    scale: float,
    advance: Callable[[int], None],
) -> Drift:
    import torch

    found = Drift(scale=scale)
    has_numbers = is_comparable(first.dtype) and is_comparable(second.dtype)
    for part, other in _pieces(first, second):
        one, two = a.read(part).reshape(-1), b.read(other).reshape(-1)
        is_same = part.dtype == other.dtype and torch.equal(_bits(one), _bits(two))
        found.is_equal = found.is_equal and is_same
        if has_numbers:
            _add(found, _numbers(one), None if is_same else _numbers(two), scale)
        advance(part.nbytes + other.nbytes)
    return found


def _add(found: Drift, one: torch.Tensor, two: torch.Tensor | None, scale: float) -> None:
    import torch

    if one.numel() == 0:
        return
    lost = int(one.numel() - torch.isfinite(one).sum())
    found.nonfinite_a += lost
    found.nonfinite_b += lost if two is None else int(two.numel() - torch.isfinite(two).sum())
    if not found.is_finite:
        return
    found.largest = max(found.largest, float(one.abs().max()))
    if scale != 1.0:
        one = one / scale
    squares = float(torch.dot(one, one))
    found.a += squares
    if two is None:
        found.b += squares
        found.both += squares
        return
    found.largest = max(found.largest, float(two.abs().max()))
    if scale != 1.0:
        two = two / scale
    found.b += float(torch.dot(two, two))
    found.both += float(torch.dot(one, two))
    difference = two - one
    found.difference += float(torch.dot(difference, difference))
    found.max_abs = max(found.max_abs, float(difference.abs().max()) * scale)


def _pieces(first: TensorInfo, second: TensorInfo) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """The same elements of both, in pieces: along the only dimension where both lie in order, else along the first."""
    if first.nbytes == 0:
        return
    if first.is_contiguous and second.is_contiguous:
        flat = (first.nbytes // first.itemsize,)
        first, second = (attrs.evolve(one, shape=flat, stride=(1,)) for one in (first, second))
    dimension = next((number for number, size in enumerate(first.shape) if size > 1), None)
    if dimension is None:
        yield first, second
        return
    size = first.shape[dimension]
    step = max(1, _PIECE // (first.nbytes // first.itemsize // size))
    for begin in range(0, size, step):
        length = min(step, size - begin)
        yield _part(first, dimension, begin, length), _part(second, dimension, begin, length)


def _part(info: TensorInfo, dimension: int, begin: int, length: int) -> TensorInfo:
    size = info.shape[dimension]
    return attrs.evolve(
        info,
        shape=(*info.shape[:dimension], length, *info.shape[dimension + 1 :]),
        nbytes=info.nbytes // size * length,
        storage_offset=info.storage_offset + begin * info.stride[dimension],
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().view(torch.uint8)


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """In float64; of complex numbers both parts."""
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj().to(torch.complex128)).reshape(-1)
    # float8 knows no way to float64 on every build
    return (tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor).to(torch.float64)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
