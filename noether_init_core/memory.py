"""Memory helpers: huge pages for new tensors, a pause of the garbage collector, NaN and infinities, digests.

NaN and infinities are found from bit patterns. That is exact for every dtype, runs at memory speed and needs no torch.
A float is NaN or infinite if all bits of its exponent are set. If the bits are read as signed integers, a positive NaN
or infinity is larger than every finite number. If they are read as unsigned integers, a negative one is. So two maxima
decide, and unlike a sum they cannot overflow. For dtypes with a fast dot product, the sum of squares is computed first.
It is finite only if every element is; if it is not finite, the exact check follows.
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

# Small enough for the processor's caches. Large enough that the cost of system calls, and of threads that wait for the
# interpreter lock, is small. A multiple of every element size, so that no element lies in two pieces.
BUFFER = 2 << 20
# Huge pages have 2 MiB; a smaller tensor contains at most one that is complete, and the call costs more than it saves.
_LEAST = 4 << 20


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Advise the kernel to back an unfilled CPU tensor with huge pages; return the same tensor.

    Page faults of 4 KiB take two to three times as long as reading and comparing the bytes. A system without huge pages
    ignores the advice, and a tensor on another device is returned as is.
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
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux defines it
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause the cyclic garbage collector in the block.

    Large headers, plans and runs create many objects and no cycles, so the collector would double the time for nothing.
    The switch is global to the process: another thread's collections pause too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


Finding = Literal["NaN", "infinities"]


# dtype -> bytes of one number; bits of positive infinity, None for a format without infinity; bits of the smallest NaN.
# A complex number counts as two floats.
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
# Formats with a single NaN: the bits that minus zero has elsewhere, or, for the format without a sign, all bits set.
_SINGLE_NAN = {"float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80, "float8_e8m0fnu": 0xFF}


def can_be_nonfinite(dtype: str) -> bool:
    """Whether ``dtype`` (torch's name without ``torch.``) can represent NaN."""
    return dtype in _PATTERNS or dtype in _SINGLE_NAN


def nonfinite(data: memoryview, dtype: str) -> Finding | None:
    """Return ``NaN`` if an element is NaN, else ``infinities`` if an element is infinite, else None.

    Args:
        data: Complete elements of ``dtype`` in the byte order of the machine; the address need not be aligned.
        dtype: torch's name without ``torch.``; ``can_be_nonfinite(dtype)`` must be true.
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
    # numpy has a vectorized dot product for these only; a finite number may still overflow when it is squared, so a
    # result that is not finite proves nothing.
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
    """Return ``xxh3_128:<hex>``, CRC-32, and the ``nonfinite`` finding of complete elements, in one pass over memory.

    The pieces fit the cache, so the second and third computation of a piece do not read memory again.
    """
    state, crc, found = xxhash.xxh3_128(), 0, set[Finding]()
    is_looked_at = can_be_nonfinite(dtype)
    for begin in range(0, len(data), BUFFER):
        piece = data[begin : begin + BUFFER]
        state.update(piece)
        crc = isal_zlib.crc32(piece, crc)
        if is_looked_at and (finding := nonfinite(piece, dtype)) is not None:
            found.add(finding)
    return f"xxh3_128:{state.hexdigest()}", crc, "NaN" if "NaN" in found else next(iter(found), None)
