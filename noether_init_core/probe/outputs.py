"""Record the outputs of a model, and compare two records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias

import attrs
import numpy as np
import pydantic
import torch
import xxhash

from noether_init_core.errors import ConfigError, type_of
from noether_init_core.files.reading import memory_of_tensor

_Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

#: Number of values to keep of one output. Of a larger output, values at fixed pseudo-random positions are kept.
MOST_VALUES = 1 << 18
_SEED = 0x6E6F6574686572
#: Values this many times larger than the typical one are compared separately, because they would dominate the norm.
_HUGE = 100.0
#: Share of the values that must be nearly equal to count as a constant, such as the value of a mask.
_OFTEN = 0.05
#: Share of integers that may differ if floating-point outputs are rounded differently (argmax of close scores).
_CHOICES = 0.05

#: Largest difference, relative to the norm, that counts as rounding, by dtype. The largest differences measured between
#: twelve CPU configurations (instruction sets, libraries, one and two threads; a transformer, a convolutional, a
#: recurrent and a plain network) were 2e-7, 5e-7, 2e-3 and 9e-3.
_TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
#: Half precision on the same kind of processor with the same software: the bits should be equal, and wrong weights may
#: differ by less than the limits above (two exchanged layers of twelve: 4e-3).
_ALIKE = {"float16": 5e-4, "bfloat16": 2e-3}
#: On accelerators, float32 may be multiplied with the 10 bits of TensorFloat-32.
_ACCELERATED = 5e-3
#: Formats narrower than 16 bits.
_NARROW = 0.2
_COMPARED = (torch.Tensor, bool, int, float, str)
_COMPLEX = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


class Output(pydantic.BaseModel):
    """The record of one output: a tensor, a number or a string. Outputs with equal digests are equal.

    Attributes:
        path: Its place in the returned value: ``output``, ``output.logits``, ``output.1``.
        shape: Its shape.
        dtype: Its dtype without ``torch.``; ``str`` for a string.
        digest: ``xxh3_128:...`` of its contiguous little-endian bytes.
        values: Up to ``MOST_VALUES`` values in one dimension; empty for a string.
    """

    model_config = pydantic.ConfigDict(frozen=True, arbitrary_types_allowed=True)

    path: str
    shape: tuple[pydantic.NonNegativeInt, ...]
    dtype: str
    digest: str = pydantic.Field(pattern=r"^xxh3_128:[0-9a-f]{32}$")
    values: torch.Tensor = pydantic.Field(repr=False)

    @pydantic.model_validator(mode="after")
    def _has_its_values(self) -> Self:
        count = 0 if self.dtype == "str" else min(math.prod(self.shape), MOST_VALUES)
        if self.values.shape != (count,) or self.dtype not in ("str", _name_of(self.values.dtype)):
            raise ValueError(f"values is not a {self.dtype} tensor of shape [{count}]")
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Output) and all(
            getattr(self, name) == getattr(other, name) for name in ("path", "shape", "dtype", "digest")
        )

    @property
    def norm(self) -> float:
        """Euclidean norm of the finite recorded values."""
        numbers = _numbers(self.values)
        numbers = numbers[np.isfinite(numbers)]
        # Scaled by the largest value, because squares may overflow float64.
        largest = float(np.abs(numbers).max(initial=0.0))
        return largest * float(np.linalg.norm(numbers / largest)) if largest else 0.0


@attrs.frozen
class Compared:
    """The result of comparing one output with its record.

    Attributes:
        path: Its place in the returned value.
        is_same: Whether the bits are equal.
        difference: Norm of the difference, relative to the norm; None if it is undefined: other shapes, kinds of
            numbers, or positions of NaN.
        tolerance: Largest difference that counts as rounding.
        problem: The difference in words; empty if it is equal or rounding.
        changed: For integers, booleans and strings, which are not rounded: the share of values that differ.
    """

    path: str
    is_same: bool
    difference: float | None = 0.0
    tolerance: float = 0.0
    problem: str = ""
    changed: float | None = None


def outputs_of(returned: Any) -> tuple[Output, ...]:
    """Record every tensor, number and string in the returned value of a model.

    Mappings, tuples, lists, dataclasses and attrs classes are searched; ``uncompared`` lists other objects. If two have
    one path, such as those of the keys 0 and "0", the second gets the path ``output.0#2``.

    Raises ``ConfigError`` if nothing is found, and for tensors without plain memory (sparse, quantized, sharded, meta).
    """
    found: dict[str, Output] = {}
    for place, value in _leaves(returned, "output"):
        if isinstance(value, _COMPARED):
            path, number = place, 1
            while path in found:
                number += 1
                path = f"{place}#{number}"
            found[path] = _output(path, value)
    if not found:
        raise ConfigError(f"the model returns {type_of(returned)} without a tensor, number or string in it")
    return tuple(found.values())


def uncompared(returned: Any) -> tuple[str, ...]:
    """List the objects in the returned value of a model that cannot be compared, in words; None is ignored."""
    return tuple(
        f"{path} ({type_of(value)})"
        for path, value in _leaves(returned, "output")
        if value is not None and not isinstance(value, _COMPARED)
    )


def has_values(outputs: Iterable[Output]) -> bool:
    """Whether any value in the outputs is not NaN; an output without values counts."""
    return any(not one.values.numel() or not np.isnan(_numbers(one.values)).all() for one in outputs)


def tolerance_for(dtypes: Iterable[str], devices: Iterable[str], *, is_alike: bool = False) -> float:
    """Return the largest difference that counts as rounding, for the coarsest of ``dtypes``.

    ======== ============ ==================================
    float64  float32      float16, bfloat16, narrower ones
    ======== ============ ==================================
    1e-6     1e-4         1e-2, 5e-2, 0.2
    ======== ============ ==================================

    If ``devices`` has a type other than ``cpu``, such as ``cuda``, float32 gets 5e-3. With ``is_alike``, for the same
    kind of processor, software and dtypes, float16 gets 5e-4 and bfloat16 2e-3.
    """
    is_accelerated = any(device != "cpu" for device in devices)
    found = [0.0]
    for dtype in filter(_is_floating, dtypes):
        plain = _COMPLEX.get(dtype, dtype)
        one = _TOLERANCES.get(plain, _NARROW)
        if is_alike:
            one = _ALIKE.get(plain, one)
        found.append(max(one, _ACCELERATED) if is_accelerated and plain == "float32" else one)
    return max(found)


def compare(
    expected: Sequence[Output],
    found: Sequence[Output],
    *,
    dtypes: Iterable[str] = (),
    devices: Iterable[str] = ("cpu",),
    tolerance: float | None = None,
    is_alike: bool = False,
) -> tuple[Compared, ...]:
    """Compare outputs, in the order of ``expected``; an output that only one side has is a problem.

    Strings must be equal. Integers and booleans must be equal, unless a floating-point output is rounded differently.
    Then up to one in twenty may differ, because they may be choices between close values.

    Args:
        expected: The recorded outputs.
        found: The current outputs of the model.
        dtypes: Dtypes of the parameters of the model, at the save and now.
        devices: Types of devices, at the save and now.
        tolerance: Largest difference that counts as rounding; None: ``tolerance_for``.
        is_alike: Whether release of torch, threads and kind of processor are the same as at the save.
    """
    dtypes, devices = tuple(dtypes), tuple(devices)
    now = {one.path: one for one in found}
    compared = []
    for then in expected:
        other = now.pop(then.path, None)
        if other is None:
            compared.append(Compared(then.path, False, None, 0.0, "is no longer returned"))
            continue
        all_dtypes = (then.dtype, other.dtype, *dtypes)
        is_same_dtype = is_alike and then.dtype == other.dtype and len(set(dtypes)) < 2
        allowed = tolerance_for(all_dtypes, devices, is_alike=is_same_dtype) if tolerance is None else tolerance
        # Values of few bits are often equal by chance, so only fine dtypes can show repeated values.
        is_fine = tolerance_for(all_dtypes, ()) <= _TOLERANCES["float32"]
        compared.append(_compared(then, other, allowed, is_fine))
    compared += [Compared(path, False, None, 0.0, "was not returned when the set was saved") for path in now]
    if not any(not one.is_same and not one.problem and one.changed is None for one in compared):
        return tuple(compared)
    return tuple(
        attrs.evolve(one, problem="") if one.changed is not None and one.changed <= _CHOICES else one
        for one in compared
    )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = None if isinstance(value, torch.Tensor) else _children(value)
    if children is None:
        yield path, value
        return
    for key, child in children:
        yield from _leaves(child, f"{path}.{key}")


def _children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return enumerate(value)
    fields: Any = ()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
    elif attrs.has(type(value)):
        fields = attrs.fields(type(value))
    return [(field.name, getattr(value, field.name, None)) for field in fields] or None


def _output(path: str, value: Any) -> Output:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        value = str(value)
    if isinstance(value, str):
        digest = xxhash.xxh3_128_hexdigest(value.encode("utf-8", "surrogatepass"))
        return Output(
            path=path, shape=(), dtype="str", digest=f"xxh3_128:{digest}", values=torch.empty(0, device="cpu")
        )
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64, device="cpu")
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, device="cpu")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or hasattr(tensor, "device_mesh"):
        raise ConfigError(
            f"{path}: {type_of(tensor)} with layout {tensor.layout} is sparse, quantized, sharded or without memory, "
            "so it cannot be compared"
        )
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = plain.reshape(-1)
    if len(flat) > MOST_VALUES:
        # NumPy guarantees the raw stream of PCG64 for all versions and platforms, so the positions are reproducible.
        places = np.random.PCG64(_SEED).random_raw(MOST_VALUES) % np.uint64(len(flat))
        kept = flat[torch.from_numpy(places.astype(np.int64))]
    else:
        kept = flat.clone()
    digest = f"xxh3_128:{xxhash.xxh3_128_hexdigest(memory_of_tensor(plain))}"
    return Output(path=path, shape=tuple(plain.shape), dtype=_name_of(plain.dtype), digest=digest, values=kept)


def _compared(then: Output, now: Output, tolerance: float, is_fine: bool) -> Compared:
    if (then.shape, then.dtype, then.digest) == (now.shape, now.dtype, now.digest):
        return Compared(then.path, True, 0.0, tolerance)
    if then.shape != now.shape:
        problem = f"has the shape {list(now.shape)} instead of {list(then.shape)}"
        return Compared(then.path, False, None, tolerance, problem)
    if _is_floating(then.dtype) is not _is_floating(now.dtype) or (then.dtype == "str") is not (now.dtype == "str"):
        return Compared(then.path, False, None, tolerance, f"has the dtype {now.dtype} instead of {then.dtype}")
    if not _is_floating(then.dtype):
        changed = 1.0
        if then.values.numel():
            others = int((then.values.to(torch.int64) != now.values.to(torch.int64)).sum())
            # A single different value is accepted even in a small output, where it is more than one in twenty.
            changed = 0.0 if others == 1 else others / then.values.numel()
        return Compared(then.path, False, None, 0.0, "has other values", changed)
    first, other = _numbers(then.values), _numbers(now.values)
    places = [np.isnan(one) + 2 * np.isposinf(one) + 3 * np.isneginf(one) for one in (first, other)]
    if (places[0] != places[1]).any():
        problem = "has NaN or infinities in other places" if places[1].any() else "lacks the recorded NaN or infinities"
        return Compared(then.path, False, None, tolerance, problem)
    first, other = first[places[0] == 0], other[places[0] == 0]
    sizes = np.maximum(np.abs(first), np.abs(other))
    shown = [sizes < limit for limit in (math.inf, *_limits(sizes, is_fine))]
    difference = max(_apart(first[one], other[one]) for one in shown)
    return Compared(then.path, False, difference, tolerance, "" if difference <= tolerance else "differs")


def _numbers(values: torch.Tensor) -> _Numbers:
    flat = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
    return flat.to(torch.float64).numpy()


def _apart(first: _Numbers, other: _Numbers) -> float:
    """Return the norm of the difference relative to the larger norm; scaled, so that squares do not overflow."""
    largest = max(float(np.abs(one).max(initial=0.0)) for one in (first, other))
    if not largest:
        return 0.0
    first, other = first / largest, other / largest
    return float(np.linalg.norm(first - other) / max(np.linalg.norm(first), np.linalg.norm(other)))


def _limits(sizes: _Numbers, is_fine: bool) -> list[float]:
    """Return magnitudes above which constants and single large values would dominate the norm.

    A mask consists of one value, or nearly so. Other large values are compared together with the small ones, which may
    be their rounding errors.
    """
    values, repeats = np.unique(sizes[sizes > 0], return_counts=True)
    if not len(values):
        return []
    exponents = np.log2(values)
    groups, group = np.unique(np.rint(exponents * 16), return_inverse=True)
    counts = np.bincount(group, weights=repeats)
    is_constant = counts > max(1.0, counts.sum() * _OFTEN)
    if is_fine:
        is_constant |= np.bincount(group, weights=repeats > np.median(repeats)) > 0
    # The two largest groups, because a value and its rounding may fall into neighbouring groups.
    is_constant[-2:] = True
    limits: list[float] = []
    last = float(np.median(exponents))
    for limit in (groups[is_constant] - 0.5) / 16:
        if limit > last + math.log2(_HUGE):
            last = float(limit)
            limits.append(2.0**last)
    return limits


def _is_floating(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
