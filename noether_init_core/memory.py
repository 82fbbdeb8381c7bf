"""Memory: large pages for tensors that are about to be filled, no search for garbage where there is none."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import mmap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
