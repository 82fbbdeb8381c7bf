"""Fingerprints of outputs: small, equal for equal bits, and telling how far two outputs lie apart."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
import xxhash

from noether_init_core.errors import ConfigError, type_of
from noether_init_core.files.plain_data import bytes_of_tensor

__all__ = ["PROJECTIONS", "Compared", "Level", "OutputFingerprint", "compare", "fingerprints", "tolerance_for"]

#: How many projections: the distance of two outputs is told from them with a deviation of a sixth.
PROJECTIONS = 16
_SEED = 0x6E6F6574686572
_CHUNK = 1 << 16
_MAX_DEPTH = 60
_MOST_OUTPUTS = 10_000
#: A value this many times larger than the typical one of its output is measured apart: it would drown the others.
_HUGE = 100.0
_MOST_LEVELS = 8
#: Whole numbers that may have fallen otherwise where scores were rounded otherwise.
_CHOICES = 0.05

#: Distance in parts of the norm up to which two outputs count as rounded otherwise, by dtype. Twelve ways to compute
#: on CPUs (instruction sets, libraries, one and two threads; a transformer, a convolutional, a recurrent and a plain
#: network) were at most 2e-7, 5e-7, 2e-3 and 9e-3 apart.
_TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
#: Half precision on the same kind of processor with the same software: the bits should be the same, and wrong weights
#: may lie nearer than the limits above (two exchanged layers of twelve: 4e-3).
_ALIKE = {"float16": 5e-4, "bfloat16": 2e-3}
#: Where an accelerator takes part, float32 may be multiplied with the 10 bits of TensorFloat-32.
_ACCELERATED = 5e-3
#: Narrower formats.
_NARROW = 0.2
_COMPLEX = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


@attrs.frozen
class Level:
    """An output without its huge values, which hide the others: masks of -1e9 beside scores of 1.

    Values up to ``limit`` count as they are, values from twice that on not at all. Between, the weight falls steadily,
    so that rounding moves no value from here to there.

    Attributes:
        limit: Up to which magnitude.
        norm: Euclidean norm of the values below twice the limit.
        projections: Like those of the output.
    """

    limit: float
    norm: float
    projections: tuple[float, ...]


@attrs.frozen
class OutputFingerprint:
    """What is kept of one output tensor, or of one number or text.

    Attributes:
        path: Its place in what the model returned: ``output``, ``output.logits``, ``output.1``.
        shape: Its shape.
        dtype: Its dtype without ``torch.``; ``str`` for a text.
        digest: ``xxh3_128:...`` of its contiguous little-endian bytes.
        norm: Euclidean norm of its finite values, in float64.
        projections: Sums of its finite values under random signs, in float64. The signs are bits of NumPy's PCG64,
            which is the same everywhere and for ever.
        nonfinite: Digest of where which of NaN and infinities are; None where all values are finite.
        levels: The output without its huge values, where it has such, for every magnitude at which some begin.
        choices: For whole numbers, sums of random signs that depend on place and value: they tell how many are others.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    digest: str
    norm: float
    projections: tuple[float, ...]
    nonfinite: str | None = None
    levels: tuple[Level, ...] = ()
    choices: tuple[float, ...] = ()


@attrs.frozen
class Compared:
    """How an output compares with what it was.

    Attributes:
        path: Its place in what the model returned.
        is_same: Whether the bits are the same.
        difference: Norm of the difference in parts of the norm, as estimated from the projections; None where it
            makes no sense: other shapes, kinds of numbers, places of NaN.
        tolerance: Up to which difference it is rounding.
        problem: What is different, in words, where it is not rounding.
        is_exact: Whether it holds whole numbers or truth values, which are not rounded.
    """

    path: str
    is_same: bool
    difference: float | None = 0.0
    tolerance: float = 0.0
    problem: str = ""
    is_exact: bool = False


def fingerprints(
    output: Any, *, like: Sequence[OutputFingerprint] = (), dtype: str | None = None
) -> tuple[OutputFingerprint, ...]:
    """Of every tensor, number and text in what a model returned.

    Mappings, tuples, lists, dataclasses and attrs classes are searched; ``uncompared`` names what else there is.

    Args:
        output: What the model returned.
        like: Fingerprints to compare with: values are huge where they were then.
        dtype: Of the model, whose rounding its outputs have.

    Raises ``ConfigError`` where there is nothing of that, and for tensors that have no plain memory.
    """
    limits = {one.path: tuple(level.limit for level in one.levels) for one in like}
    found: dict[str, OutputFingerprint] = {}
    for place, value in _leaves(output, "output", 0):
        if not isinstance(value, torch.Tensor | bool | int | float | str):
            continue
        path, number = place, 1
        while path in found:
            number += 1
            path = f"{place}#{number}"
        found[path] = _fingerprint(path, value, limits.get(path, () if like else None), dtype)
        if len(found) > _MOST_OUTPUTS:
            raise ConfigError(f"the model returns more than {_MOST_OUTPUTS:,} tensors")
    if not found:
        raise ConfigError(f"the model returns {type_of(output)} without a tensor in it")
    return tuple(found.values())


def uncompared(output: Any) -> tuple[str, ...]:
    """Objects in what a model returned that have no fingerprint, in words; None is none of them."""
    return tuple(
        f"{path} ({type_of(value)})"
        for path, value in _leaves(output, "output", 0)
        if value is not None and not isinstance(value, torch.Tensor | bool | int | float | str)
    )


def has_values(output: Any) -> bool:
    """Whether there is anything in what a model returned that is not NaN."""
    for _path, value in _leaves(output, "output", 0):
        if isinstance(value, torch.Tensor):
            plain = value.detach().to(torch.float32) if value.is_floating_point() else value.detach()
            if plain.numel() == 0 or not bool(torch.isnan(plain).all()):
                return True
        elif isinstance(value, int | str) or (isinstance(value, float) and not math.isnan(value)):
            return True
    return False


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{path[:200]}: what the model returns is nested more than {_MAX_DEPTH} deep")
    children = None if isinstance(value, torch.Tensor) else _children(value)
    if children is None:
        yield path, value
        return
    for key, child in children:
        yield from _leaves(child, f"{path}.{key}", depth + 1)


def _children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return enumerate(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    if attrs.has(type(value)):
        return [(field.name, getattr(value, field.name, None)) for field in attrs.fields(type(value))]
    return None


def _fingerprint(path: str, value: Any, limits: tuple[float, ...] | None, dtype: str | None) -> OutputFingerprint:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        value = str(value)
    if isinstance(value, str):
        digest = xxhash.xxh3_128_hexdigest(value.encode("utf-8", "surrogatepass"))
        return OutputFingerprint(path, (), "str", f"xxh3_128:{digest}", 0.0, (0.0,) * PROJECTIONS)
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or hasattr(tensor, "device_mesh"):
        raise ConfigError(f"{path}: {type_of(tensor)} that is {tensor.layout}, quantized, sharded or without memory")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = (torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1)
    name = str(plain.dtype).removeprefix("torch.")
    norm, projections, nonfinite = _projected(flat)
    if not is_floating(name):
        limits = ()
    elif limits is None:
        limits = _limits(flat, max(_rounding(one) for one in (name, dtype) if one))
    return OutputFingerprint(
        path=path,
        shape=tuple(plain.shape),
        dtype=name,
        digest=f"xxh3_128:{xxhash.xxh3_128_hexdigest(bytes_of_tensor(plain))}",
        norm=norm,
        projections=projections,
        nonfinite=nonfinite,
        levels=tuple(Level(limit, *_projected(flat, limit)[:2]) for limit in limits),
        choices=() if is_floating(name) else _choices(flat),
    )


def _signs(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One row for each number of 64 bits: its lowest bits."""
    drawn = bits.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : PROJECTIONS // 8]
    return np.unpackbits(drawn, axis=1, bitorder="little").astype(np.float64)


def _projected(flat: torch.Tensor, limit: float = math.inf) -> tuple[float, tuple[float, ...], str | None]:
    """Norm, projections, digest of the places of what is not finite."""
    bits = np.random.PCG64(_SEED)
    sums, squares = np.zeros(PROJECTIONS), 0.0
    places, is_finite = xxhash.xxh3_128(), True
    factor = 1.0
    if flat.dtype is torch.float64 and flat.numel() and limit > 1e150:
        # squares would leave the range
        factor = 2.0**-600 if float(flat.nan_to_num(0.0, 0.0, 0.0).abs().max()) > 1e150 else 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, flat.numel(), _CHUNK):
            values = flat[begin : begin + _CHUNK].to(torch.float64).numpy()
            kinds = np.isnan(values) + 2 * np.isposinf(values) + 3 * np.isneginf(values)
            places.update(kinds.astype(np.uint8).tobytes())
            if kinds.any():
                is_finite = False
                values = np.where(kinds == 0, values, 0.0)
            if factor != 1.0:
                values = values * factor
            if limit != math.inf:
                sizes = np.abs(values)
                values = np.where(sizes < 2 * limit, values, 0.0)
                squares += float(values @ values)
                values = np.where(sizes <= limit, values, np.sign(values) * np.maximum(2 * limit - sizes, 0.0))
            else:
                squares += float(values @ values)
            sums += 2 * (values @ _signs(bits.random_raw(len(values)))) - values.sum()
        sums, norm = sums / factor, float(np.float64(math.sqrt(squares)) / factor)
    nonfinite = None if is_finite else f"xxh3_128:{places.hexdigest()}"
    most = sys.float_info.max
    return min(norm, most), tuple(map(float, np.clip(np.nan_to_num(sums, nan=most), -most, most))), nonfinite


def _rounding(dtype: str) -> float:
    """A unit in the last place of 1, in parts of what counts as rounding."""
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not is_floating(dtype):
        return 0.0
    return torch.finfo(found).eps / _TOLERANCES.get(_COMPLEX.get(dtype, dtype), _NARROW)


def _limits(flat: torch.Tensor, rounding: float) -> tuple[float, ...]:
    """The magnitudes at which huge values begin; none for an output whose values are of one kind."""
    values = np.abs(flat.to(torch.float64).numpy())
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return ()
    sizes, counts = np.unique(values, return_counts=True)
    begin = float(np.median(sizes))
    if sizes[-1] <= _HUGE * begin:
        return ()
    # A mask is one value many times, or nearly one. Beside other large values, small ones may be their rounding.
    mantissas, exponents = np.frexp(sizes)
    _near, group = np.unique(exponents * 64 + np.rint(mantissas * 32), return_inverse=True)
    is_varied = np.bincount(group, weights=counts)[group] <= max(1.0, len(values) / 20)
    if rounding < 0.01:
        is_varied &= counts == 1
    if is_varied.any():
        largest = float(sizes[is_varied][-1])
        begin = begin if begin > 4 * rounding * largest else max(begin, largest)
    limits: list[float] = []
    while len(limits) < _MOST_LEVELS and math.isfinite(_HUGE * begin) and sizes[-1] > _HUGE * begin:
        limits.append(_HUGE * begin)
        begin = float(sizes[sizes > limits[-1]][0])
    return tuple(limits)


def _choices(flat: torch.Tensor) -> tuple[float, ...]:
    bits, sums = np.random.PCG64(_SEED), np.zeros(PROJECTIONS)
    for begin in range(0, flat.numel(), _CHUNK):
        values = flat[begin : begin + _CHUNK].to(torch.int64).numpy().astype(np.uint64)
        with np.errstate(over="ignore"):
            # splitmix64: another value is another row of signs
            mixed = values * np.uint64(0x9E3779B97F4A7C15) + bits.random_raw(len(values)).astype(np.uint64)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
        sums += 2 * _signs(mixed).sum(axis=0) - len(values)
    return tuple(map(float, sums))


def tolerance_for(dtypes: Iterable[str], devices: Iterable[str], *, is_alike: bool = False) -> float:
    """Up to which difference it is rounding, for the coarsest of ``dtypes``; ``devices`` are types such as ``cuda``.

    ======== ============ ==================================
    float64  float32      float16, bfloat16, narrower ones
    ======== ============ ==================================
    1e-6     1e-4         1e-2, 5e-2, 0.2
    ======== ============ ==================================

    With an accelerator, float32 gets 5e-3. With ``is_alike``, on the same kind of processor with the same software and
    dtypes, float16 gets 5e-4, bfloat16 2e-3.
    """
    is_accelerated = any(device != "cpu" for device in devices)
    found = []
    for dtype in dtypes:
        plain = _COMPLEX.get(dtype, dtype)
        if is_floating(plain):
            one = _TOLERANCES.get(plain, _NARROW)
            if is_alike:
                one = _ALIKE.get(plain, one)
            found.append(max(one, _ACCELERATED) if is_accelerated and plain == "float32" else one)
    return max(found, default=0.0)


def is_floating(dtype: str) -> bool:
    """Whether values of the dtype are rounded."""
    return dtype.startswith(("float", "bfloat", "complex"))


def compare(
    expected: Sequence[OutputFingerprint],
    found: Sequence[OutputFingerprint],
    *,
    dtypes: Iterable[str] = (),
    devices: Iterable[str] = ("cpu",),
    tolerance: float | None = None,
    is_alike: bool = False,
) -> tuple[Compared, ...]:
    """How each output compares, in the order of ``expected``; outputs that only one side has are problems.

    Whole numbers and truth values have to be equal, unless an output of floating-point numbers is rounded otherwise:
    then a choice between near values may fall otherwise, too, for one in twenty at most. Texts have to be equal.

    Args:
        expected: What was saved.
        found: What the model computes now.
        dtypes: Of the model's parameters, then and now.
        devices: Types of devices, then and now.
        tolerance: Instead of ``tolerance_for``.
        is_alike: Whether it was computed by the same release of torch, threads and kind of processor.
    """
    dtypes, devices = tuple(dtypes), tuple(devices)
    now = {one.path: one for one in found}
    compared = []
    for then in expected:
        other = now.pop(then.path, None)
        if other is None:
            compared.append(Compared(then.path, False, None, 0.0, "is not returned any more"))
            continue
        allowed = tolerance
        if allowed is None:
            all_dtypes = (then.dtype, other.dtype, *dtypes)
            is_same_dtype = is_alike and then.dtype == other.dtype and len(set(dtypes)) < 2
            allowed = tolerance_for(all_dtypes, devices, is_alike=is_same_dtype)
        compared.append(_compared(then, other, allowed))
    compared += [Compared(path, False, None, 0.0, "was not returned then") for path in now]
    is_rounded = any(not one.is_same and not one.problem for one in compared)
    before = {one.path: one for one in expected}
    after = {one.path: one for one in found}
    return tuple(
        attrs.evolve(one, problem="")
        if one.is_exact and is_rounded and _are_few(before[one.path], after[one.path])
        else one
        for one in compared
    )


def _are_few(then: OutputFingerprint, now: OutputFingerprint) -> bool:
    """Whether at most one whole number in twenty is another, or a single one."""
    if "str" in (then.dtype, now.dtype):
        return False
    if then.choices and now.choices:
        squares = [(one - other) ** 2 for one, other in zip(then.choices, now.choices, strict=True)]
        changed = sum(squares) / len(squares) / 2
    else:  # each that is another is so by one at least
        changed = (_difference(then, now) * max(then.norm, now.norm)) ** 2
    return changed <= max(2.0, _CHOICES * math.prod(then.shape))


def _compared(then: OutputFingerprint, now: OutputFingerprint, tolerance: float) -> Compared:
    if (then.shape, then.dtype, then.digest) == (now.shape, now.dtype, now.digest):
        return Compared(then.path, True, 0.0, tolerance)
    if then.shape != now.shape:
        problem = f"has the shape {list(now.shape)}, it had {list(then.shape)}"
    elif is_floating(then.dtype) is not is_floating(now.dtype):
        problem = f"has the dtype {now.dtype}, it had {then.dtype}"
    elif then.nonfinite != now.nonfinite:
        problem = "has NaN or infinities in other places" if now.nonfinite else "has no NaN or infinities as it had"
    else:
        difference = _difference(then, now)
        if not is_floating(then.dtype):
            return Compared(then.path, False, difference, 0.0, "has other values", is_exact=True)
        within = difference <= tolerance
        return Compared(then.path, False, difference, tolerance, "" if within else "differs")
    return Compared(then.path, False, None, tolerance, problem)


def _difference(then: OutputFingerprint, now: OutputFingerprint) -> float:
    """The norm of the difference in parts of the larger norm; the largest one of the output and its levels."""
    found = [_apart(then, now)]
    scale = max(then.norm, now.norm)
    if scale:
        found.append(abs(then.norm - now.norm) / scale)
    for one, other in zip(then.levels, now.levels, strict=True):
        if one.limit != other.limit:
            raise ValueError(f"{now.path} was not measured like that to compare with")
        found.append(_apart(one, other))
    return max(one if math.isfinite(one) else math.inf for one in found)


def _apart(then: OutputFingerprint | Level, now: OutputFingerprint | Level) -> float:
    scale = max(then.norm, now.norm)
    if scale == 0:
        return 0.0
    squares = [(one / scale - other / scale) ** 2 for one, other in zip(then.projections, now.projections, strict=True)]
    return math.sqrt(sum(squares) / len(squares))
