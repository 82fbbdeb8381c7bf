"""NaN and infinities in raw bytes, told from bit patterns: exact for every dtype, at memory speed, without torch.

A float is NaN or infinite if all bits of its exponent are set. Of such elements the positive ones are the largest of
all where the bits are read as signed integers, the negative ones where they are read as unsigned ones. Two maxima,
then, say what is there; unlike a sum they cannot overflow. Where there is a faster sum, it goes first: the sum of all
squares is finite only if every element is, and what is not finite gets the exact look.
"""

from __future__ import annotations

import math
from typing import Literal

import attrs

__all__ = ["Finding", "can_be_nonfinite", "nonfinite"]

Finding = Literal["NaN", "infinities"]


@attrs.frozen
class _Patterns:
    """``size``: bytes of one number. ``infinity``: its bits without sign; None: there is none. ``nan``: the first."""

    size: int
    infinity: int | None
    nan: int


_PATTERNS = {
    "bfloat16": _Patterns(2, 0x7F80, 0x7F81),
    "complex128": _Patterns(8, 0x7FF << 52, (0x7FF << 52) + 1),
    "complex32": _Patterns(2, 0x7C00, 0x7C01),
    "complex64": _Patterns(4, 0x7F800000, 0x7F800001),
    "float16": _Patterns(2, 0x7C00, 0x7C01),
    "float32": _Patterns(4, 0x7F800000, 0x7F800001),
    "float64": _Patterns(8, 0x7FF << 52, (0x7FF << 52) + 1),
    "float8_e4m3fn": _Patterns(1, None, 0x7F),
    "float8_e5m2": _Patterns(1, 0x7C, 0x7D),
}
_FLOAT = {4: "f4", 8: "f8"}
_SIGNED = {1: "i1", 2: "i2", 4: "i4", 8: "i8"}
_UNSIGNED = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}
# Formats with a single NaN: the bits of minus zero, or, without a sign, all of them set.
_SINGLE_NAN = {"float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80, "float8_e8m0fnu": 0xFF}


def can_be_nonfinite(dtype: str) -> bool:
    """Whether the dtype (torch's name without ``torch.``) has NaN at all."""
    return dtype in _PATTERNS or dtype in _SINGLE_NAN


def nonfinite(data: memoryview, dtype: str) -> Finding | None:
    """``NaN`` if there is one among the elements, else ``infinities`` if there is one, else None.

    ``data``: whole elements of ``dtype``, in the byte order of the machine, at any address.
    """
    import numpy as np

    if not data:
        return None
    single = _SINGLE_NAN.get(dtype)
    if single is not None:
        octets = np.frombuffer(data, np.uint8)
        found = octets.view(np.int8).min() == -128 if single == 0x80 else octets.max() == single
        return "NaN" if found else None
    patterns = _PATTERNS[dtype]
    if patterns.size >= 4:
        numbers = np.frombuffer(data, _FLOAT[patterns.size])
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.dot(numbers, numbers)
        if math.isfinite(total):
            return None
    signed = np.frombuffer(data, _SIGNED[patterns.size])
    negative = int(signed.view(_UNSIGNED[patterns.size]).max()) - (1 << (8 * patterns.size - 1))
    largest = max(int(signed.max()), negative)
    if largest >= patterns.nan:
        return "NaN"
    return "infinities" if patterns.infinity is not None and largest >= patterns.infinity else None
