"""Fresh memory in large pages: touching 1 GB for the first time in small ones takes longer than to fill it."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["prefer_large_pages"]

_FROM = 4 << 20


def prefer_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, whose fresh memory may come in large pages; advice to the system, which may not follow it."""
    advise = _advise()
    storage = tensor.untyped_storage()
    if advise is not None and tensor.device.type == "cpu" and storage.nbytes() >= _FROM:
        begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """``madvise`` of the C library, which Python has for its own mappings only; None where there is no such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    import ctypes

    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    found: Callable[[int, int, int], int] = function
    return found
