"""Fingerprints of outputs: small, equal for equal bits, and telling how far two outputs lie apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
import xxhash

from noether_init_core.checkpoints.plain import bytes_of_tensor
from noether_init_core.errors import ConfigError, type_of

__all__ = ["PROJECTIONS", "Compared", "OutputFingerprint", "compare", "fingerprints", "tolerance_for"]

#: How many projections: the distance of two outputs is told from them with a deviation of a sixth.
PROJECTIONS = 16
_SEED = 0x6E6F6574686572
_CHUNK = 1 << 16
_MAX_DEPTH = 60
_MOST_OUTPUTS = 10_000

#: Distance in parts of the norm up to which two outputs count as rounded otherwise, by dtype. Twelve ways to compute
#: on CPUs (instruction sets, libraries, one and two threads; a transformer, a convolutional, a recurrent and a plain
#: network) were at most 2e-7, 5e-7, 2e-3 and 9e-3 apart.
_TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
#: Where an accelerator takes part, float32 may be multiplied with the 10 bits of TensorFloat-32.
_ACCELERATED = 5e-3
#: Narrower formats.
_NARROW = 0.2
_COMPLEX = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


@attrs.frozen
class OutputFingerprint:
    """What is kept of one output tensor.

    Attributes:
        path: Its place in what the model returned: ``output``, ``output.logits``, ``output.1``.
        shape: Its shape.
        dtype: Its dtype without ``torch.``.
        digest: ``xxh3_128:...`` of its contiguous little-endian bytes.
        norm: Euclidean norm of its finite values, in float64.
        projections: Sums of its finite values under random signs, in float64. The signs are bits of NumPy's PCG64,
            which is the same everywhere and for ever.
        nonfinite: Digest of where which of NaN and infinities are; None where all values are finite.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    digest: str
    norm: float
    projections: tuple[float, ...]
    nonfinite: str | None = None


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


def fingerprints(output: Any) -> tuple[OutputFingerprint, ...]:
    """Of every tensor in what a model returned: mappings, tuples, lists, dataclasses and attrs classes are searched.

    Raises ``ConfigError`` where there is no tensor, and for tensors that have no plain memory.
    """
    found: dict[str, OutputFingerprint] = {}
    for place, tensor in _tensors(output, "output", 0):
        path, number = place, 1
        while path in found:
            number += 1
            path = f"{place}#{number}"
        found[path] = _fingerprint(path, tensor)
        if len(found) > _MOST_OUTPUTS:
            raise ConfigError(f"the model returns more than {_MOST_OUTPUTS:,} tensors")
    if not found:
        raise ConfigError(f"the model returns {type_of(output)} without a tensor in it")
    return tuple(found.values())


def _tensors(value: Any, path: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{path[:200]}: what the model returns is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    for key, child in _children(value):
        yield from _tensors(child, f"{path}.{key}", depth + 1)


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return enumerate(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    if attrs.has(type(value)):
        return [(field.name, getattr(value, field.name, None)) for field in attrs.fields(type(value))]
    return ()


def _fingerprint(path: str, tensor: torch.Tensor) -> OutputFingerprint:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or hasattr(tensor, "device_mesh"):
        raise ConfigError(f"{path}: {type_of(tensor)} that is {tensor.layout}, quantized, sharded or without memory")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    norm, projections, nonfinite = _projected(torch.view_as_real(plain) if plain.is_complex() else plain)
    return OutputFingerprint(
        path=path,
        shape=tuple(plain.shape),
        dtype=str(plain.dtype).removeprefix("torch."),
        digest=f"xxh3_128:{xxhash.xxh3_128_hexdigest(bytes_of_tensor(plain))}",
        norm=norm,
        projections=projections,
        nonfinite=nonfinite,
    )


def _projected(tensor: torch.Tensor) -> tuple[float, tuple[float, ...], str | None]:
    """Norm, projections, digest of the places of what is not finite."""
    flat = tensor.reshape(-1)
    bits = np.random.PCG64(_SEED)
    sums, squares = np.zeros(PROJECTIONS), 0.0
    places, is_finite = xxhash.xxh3_128(), True
    # a sum that leaves the range of float64 is infinite, and compares as different
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, flat.numel(), _CHUNK):
            values = flat[begin : begin + _CHUNK].to(torch.float64).numpy()
            kinds = np.isnan(values) + 2 * np.isposinf(values) + 3 * np.isneginf(values)
            places.update(kinds.astype(np.uint8).tobytes())
            if kinds.any():
                is_finite = False
                values = np.where(kinds == 0, values, 0.0)
            # one number of 64 bits for each value: its lowest bits are the signs
            drawn = bits.random_raw(len(values)).astype("<u8").view(np.uint8).reshape(-1, 8)[:, : PROJECTIONS // 8]
            signs = np.unpackbits(drawn, axis=1, bitorder="little").astype(np.float64)
            sums += 2 * (values @ signs) - values.sum()
            squares += float(values @ values)
    nonfinite = None if is_finite else f"xxh3_128:{places.hexdigest()}"
    sums[np.isnan(sums)] = np.inf
    return math.sqrt(squares), tuple(map(float, sums)), nonfinite


def tolerance_for(dtypes: Iterable[str], devices: Iterable[str]) -> float:
    """Up to which difference it is rounding, for the coarsest of ``dtypes``; ``devices`` are types such as ``cuda``.

    ======== ============ ==================================
    float64  float32      float16, bfloat16, narrower ones
    ======== ============ ==================================
    1e-6     1e-4         1e-2, 5e-2, 0.2
    ======== ============ ==================================

    With an accelerator, float32 gets 5e-3.
    """
    is_accelerated = any(device != "cpu" for device in devices)
    found = []
    for dtype in dtypes:
        plain = _COMPLEX.get(dtype, dtype)
        if is_floating(plain):
            one = _TOLERANCES.get(plain, _NARROW)
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
) -> tuple[Compared, ...]:
    """How each output compares, in the order of ``expected``; outputs that only one side has are problems.

    Whole numbers and truth values have to be equal, unless an output of floating-point numbers is rounded otherwise:
    then a choice between near values may fall otherwise, too.

    Args:
        expected: What was saved.
        found: What the model computes now.
        dtypes: Of the model's parameters, then and now.
        devices: Types of devices, then and now.
        tolerance: Instead of ``tolerance_for``.
    """
    dtypes, devices = tuple(dtypes), tuple(devices)
    now = {one.path: one for one in found}
    compared = []
    for then in expected:
        other = now.pop(then.path, None)
        if other is None:
            compared.append(Compared(then.path, False, None, 0.0, "is not returned any more"))
            continue
        allowed = tolerance_for((then.dtype, other.dtype, *dtypes), devices) if tolerance is None else tolerance
        compared.append(_compared(then, other, allowed))
    compared += [Compared(path, False, None, 0.0, "was not returned then") for path in now]
    is_rounded = any(not one.is_same and not one.problem for one in compared)
    return tuple(attrs.evolve(one, problem="") if one.is_exact and is_rounded else one for one in compared)


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
    """The norm of the difference in parts of the larger norm."""
    scale = max(then.norm, now.norm)
    if scale == 0:
        return 0.0
    squares = [((one - other) / scale) ** 2 for one, other in zip(then.projections, now.projections, strict=True)]
    found = max(math.sqrt(sum(squares) / len(squares)), abs(then.norm - now.norm) / scale)
    return found if math.isfinite(found) else math.inf
