"""Memory: large pages for tensors that are about to be filled, no search for garbage, and what the bytes in it are.

NaN and infinities are told from bit patterns: exact for every dtype, at memory speed, without torch. A float is NaN or
infinite if all bits of its exponent are set. Of such elements the positive ones are the largest of all where the bits
are read as signed integers, the negative ones where they are read as unsigned ones. Two maxima, then, say what is
there; unlike a sum they cannot overflow. Where there is a faster sum, it goes first: the sum of all squares is finite
only if every element is, and what is not finite gets the exact look.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import mmap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import xxhash
from isal import isal_zlib

if TYPE_CHECKING:
    import torch

# Small enough for the processor's caches, large enough that system calls, and threads that wait for the interpreter, do
# not count. A multiple of every size of an element, so that no element lies in two pieces.
BUFFER = 2 << 20
# Below that, a large page would hardly be filled.
_LEAST = 4 << 20


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The same unfilled CPU tensor. Its memory is given out by large pages when it is touched for the first time.

    By pages of 4 KiB that takes two to three times as long as all reading and comparing. It is advice: where a system
    does not take it, nothing else changes.
    """
    advise = _advise()
    if advise is not None and tensor.device.type == "cpu":
        begin, length = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if length >= _LEAST:
            advise(first, begin + length - first, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # of Linux
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A header, plan or run of many parts is many objects and no garbage: looking for some would double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


Finding = Literal["NaN", "infinities"]


# Bytes of one number; the bits of infinity without sign, None where there is none; those of the first NaN.
_PATTERNS: dict[str, tuple[int, int | None, int]] = {
    "bfloat16": (2, 0x7F80, 0x7F81),
    "complex128": (8, 0x7FF << 52, (0x7FF << 52) + 1),
    "complex32": (2, 0x7C00, 0x7C01),
    "complex64": (4, 0x7F800000, 0x7F800001),
    "float16": (2, 0x7C00, 0x7C01),
    "float32": (4, 0x7F800000, 0x7F800001),
    "float64": (8, 0x7FF << 52, (0x7FF << 52) + 1),
    "float8_e4m3fn": (1, None, 0x7F),
    "float8_e5m2": (1, 0x7C, 0x7D),
}
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
    size, infinity, nan = _PATTERNS[dtype]
    if size >= 4:
        numbers = np.frombuffer(data, f"f{size}")
        with np.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(np.dot(numbers, numbers)):
                return None
    signed = np.frombuffer(data, f"i{size}")
    negative = int(signed.view(f"u{size}").max()) - (1 << (8 * size - 1))
    largest = max(int(signed.max()), negative)
    if largest >= nan:
        return "NaN"
    return "infinities" if infinity is not None and largest >= infinity else None


def examine_memory(data: memoryview, dtype: str) -> tuple[str, int, Finding | None]:
    """``xxh3_128:<hex>``, CRC-32, and what is not finite among whole elements, looked at once while in the cache."""
    state, crc, found = xxhash.xxh3_128(), 0, set[Finding]()
    is_looked_at = can_be_nonfinite(dtype)
    for begin in range(0, len(data), BUFFER):
        piece = data[begin : begin + BUFFER]
        state.update(piece)
        crc = isal_zlib.crc32(piece, crc)
        if is_looked_at and (finding := nonfinite(piece, dtype)) is not None:
            found.add(finding)
    return f"xxh3_128:{state.hexdigest()}", crc, "NaN" if "NaN" in found else next(iter(found), None)
