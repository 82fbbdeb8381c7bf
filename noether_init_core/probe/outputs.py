"""What a model returned: the values that are kept of it, and how far two returns differ."""

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

#: How many values are kept of one output; of a larger one as many random places, always the same ones.
MOST_VALUES = 1 << 18
_SEED = 0x6E6F6574686572
#: A value this many times larger than the typical one of its output is compared apart: it would hide the others.
_HUGE = 100.0
#: Part of the values that have to be nearly the same to count as a constant, such as that of a mask.
_OFTEN = 0.05
#: Part of the whole numbers that may differ where scores were rounded otherwise.
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
_COMPARED = (torch.Tensor, bool, int, float, str)
_COMPLEX = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


class Output(pydantic.BaseModel):
    """What is kept of one output tensor, or of one number or text. Outputs of one digest are equal.

    Attributes:
        path: Its place in what the model returned: ``output``, ``output.logits``, ``output.1``.
        shape: Its shape.
        dtype: Its dtype without ``torch.``; ``str`` for a text.
        digest: ``xxh3_128:...`` of its contiguous little-endian bytes.
        values: Its values, at most ``MOST_VALUES`` of them, in one dimension; none of a text.
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
            raise ValueError(f"values is no {self.dtype} tensor of shape [{count}]")
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Output) and all(
            getattr(self, name) == getattr(other, name) for name in ("path", "shape", "dtype", "digest")
        )

    @property
    def norm(self) -> float:
        """Euclidean norm of the finite values that are kept."""
        numbers = _numbers(self.values)
        numbers = numbers[np.isfinite(numbers)]
        # squares may leave the range of float64
        largest = float(np.abs(numbers).max(initial=0.0))
        return largest * float(np.linalg.norm(numbers / largest)) if largest else 0.0


@attrs.frozen
class Compared:
    """How an output compares with what it was.

    Attributes:
        path: Its place in what the model returned.
        is_same: Whether the bits are the same.
        difference: Norm of the difference in parts of the norm; None where it makes no sense: other shapes, kinds of
            numbers, places of NaN.
        tolerance: Up to which difference it is rounding.
        problem: What is different, in words, where it is not rounding.
        changed: For whole numbers, truth values and texts, which are not rounded: the part of them that differs.
    """

    path: str
    is_same: bool
    difference: float | None = 0.0
    tolerance: float = 0.0
    problem: str = ""
    changed: float | None = None


def outputs_of(returned: Any) -> tuple[Output, ...]:
    """Every tensor, number and text in what a model returned.

    Mappings, tuples, lists, dataclasses and attrs classes are searched; ``uncompared`` names what else there is. Of
    several with one path, such as those of the keys 0 and "0", the second gets the path ``output.0#2``.

    Raises ``ConfigError`` where there is nothing of that, and for tensors that have no plain memory.
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
        raise ConfigError(f"the model returns {type_of(returned)} without a tensor in it")
    return tuple(found.values())


def uncompared(returned: Any) -> tuple[str, ...]:
    """Objects in what a model returned that cannot be compared, in words; None is none of them."""
    return tuple(
        f"{path} ({type_of(value)})"
        for path, value in _leaves(returned, "output")
        if value is not None and not isinstance(value, _COMPARED)
    )


def has_values(outputs: Iterable[Output]) -> bool:
    """Whether there is anything in the outputs of a model that is not NaN."""
    return any(not one.values.numel() or not np.isnan(_numbers(one.values)).all() for one in outputs)


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
    """How each output compares, in the order of ``expected``; outputs that only one side has are problems.

    Whole numbers and truth values have to be equal, unless an output of floating-point numbers is rounded otherwise:
    then a choice between near values may differ, too, for one in twenty at most. Texts have to be equal.

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
        all_dtypes = (then.dtype, other.dtype, *dtypes)
        is_same_dtype = is_alike and then.dtype == other.dtype and len(set(dtypes)) < 2
        allowed = tolerance_for(all_dtypes, devices, is_alike=is_same_dtype) if tolerance is None else tolerance
        # values of few bits are the same by chance
        is_fine = tolerance_for(all_dtypes, ()) <= _TOLERANCES["float32"]
        compared.append(_compared(then, other, allowed, is_fine))
    compared += [Compared(path, False, None, 0.0, "was not returned then") for path in now]
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
        return Output(path=path, shape=(), dtype="str", digest=f"xxh3_128:{digest}", values=torch.empty(0))
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or hasattr(tensor, "device_mesh"):
        raise ConfigError(f"{path}: {type_of(tensor)} that is {tensor.layout}, quantized, sharded or without memory")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = plain.reshape(-1)
    if len(flat) > MOST_VALUES:
        # the numbers of PCG64 are the same everywhere and for ever
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
        problem = f"has the shape {list(now.shape)}, it had {list(then.shape)}"
        return Compared(then.path, False, None, tolerance, problem)
    if _is_floating(then.dtype) is not _is_floating(now.dtype) or (then.dtype == "str") is not (now.dtype == "str"):
        return Compared(then.path, False, None, tolerance, f"has the dtype {now.dtype}, it had {then.dtype}")
    if not _is_floating(then.dtype):
        changed = 1.0
        if then.values.numel():
            others = int((then.values.to(torch.int64) != now.values.to(torch.int64)).sum())
            # a single one is few, however many there are
            changed = 0.0 if others == 1 else others / then.values.numel()
        return Compared(then.path, False, None, 0.0, "has other values", changed)
    first, other = _numbers(then.values), _numbers(now.values)
    places = [np.isnan(one) + 2 * np.isposinf(one) + 3 * np.isneginf(one) for one in (first, other)]
    if (places[0] != places[1]).any():
        problem = "has NaN or infinities in other places" if places[1].any() else "has no NaN or infinities as it had"
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
    """Norm of the difference in parts of the larger norm, also where squares leave the range of float64."""
    largest = max(float(np.abs(one).max(initial=0.0)) for one in (first, other))
    if not largest:
        return 0.0
    first, other = first / largest, other / largest
    return float(np.linalg.norm(first - other) / max(np.linalg.norm(first), np.linalg.norm(other)))


def _limits(sizes: _Numbers, is_fine: bool) -> list[float]:
    """Magnitudes from which on constants, and lone values, hide the others.

    A mask is one value, or nearly one. Other large values stay among the small ones, which may be their rounding.
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
    # two, since one value and its rounding may be in both
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
