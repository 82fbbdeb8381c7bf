"""The memory of tensors: which are the same, which overlap, and which cannot be written in place."""

from __future__ import annotations

import bisect
import functools
import sys
from collections import defaultdict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

#: Equal for two tensors with the same elements in memory; see ``tensor_identity``.
Identity = Hashable
K = TypeVar("K", bound=Hashable)

# Views with more separate runs of elements than this count as the range from their first to their last byte.
_MOST_RUNS = 1 << 24


def tensor_identity(tensor: torch.Tensor) -> Identity:
    """Equal for two tensors that are the same elements of the same memory; on the meta device, the same object."""
    if tensor.is_meta or not is_ordinary(tensor) or tensor.numel() == 0:
        return ("object", id(tensor))
    storage = tensor.untyped_storage()
    if not storage.data_ptr():
        return ("object", id(tensor))
    return (
        str(tensor.device),
        storage.data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def overlapping(tensors: Mapping[K, torch.Tensor]) -> dict[K, K]:
    """Key of a tensor that shares memory with another without being the same tensor -> the key of that other one."""
    storages: defaultdict[Any, dict[Identity, K]] = defaultdict(dict)
    for key, tensor in tensors.items():
        identity: Any = tensor_identity(tensor)
        if identity[0] != "object":
            storages[identity[:2]].setdefault(identity, key)
    found: dict[K, K] = {}
    for views in storages.values():
        if len(views) > 1:
            for one, other in _overlaps({key: tensors[key] for key in views.values()}):
                found.setdefault(one, other)
                found.setdefault(other, one)
    return found


def _overlaps(tensors: Mapping[K, torch.Tensor]) -> list[tuple[K, K]]:
    """Pairs of views of one storage that share bytes: each view that overlaps another is in some pair."""
    keys = list(tensors)
    runs = [_runs_of(tensor) for tensor in tensors.values()]
    begins, ends = (np.concatenate([run[side] for run in runs]) for side in (0, 1))
    owners = np.repeat(np.arange(len(keys)), [len(run[0]) for run in runs])
    order = np.lexsort((ends, begins))
    begins, ends, owners = begins[order], ends[order], owners[order]
    # the run before each one that reaches furthest; if it reaches into this one, the two overlap
    reach = np.maximum.accumulate(ends)
    is_furthest = ends == reach
    furthest = np.maximum.accumulate(np.where(is_furthest, np.arange(len(ends)), 0))
    inside = np.flatnonzero((begins[1:] < reach[:-1]) & (owners[1:] != owners[furthest[:-1]])) + 1
    pairs = np.unique(np.stack([owners[inside], owners[furthest[inside - 1]]]), axis=1) if len(inside) else None
    return [(keys[one], keys[other]) for one, other in pairs.T.tolist()] if pairs is not None else []


def _runs_of(tensor: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The ranges of bytes of its storage that a tensor takes: where each begins, and where it ends."""
    size, begin = tensor.element_size(), int(tensor.storage_offset())
    dims = sorted((stride, length) for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if length > 1)
    run = 1
    while dims and dims[0][0] <= run:
        stride, length = dims.pop(0)
        run += (length - 1) * stride
    starts = np.array([begin], np.int64)
    if len(dims) and int(np.prod([length for _stride, length in dims], dtype=object)) > _MOST_RUNS:
        run += sum((length - 1) * stride for stride, length in dims)
        dims = []
    for stride, length in dims:
        starts = (starts[:, None] + np.arange(length, dtype=np.int64) * stride).ravel()
    return starts * size, (starts + run) * size


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor may share memory, as after ``expand`` and in sliding windows."""
    reach = 0
    for stride, length in sorted(
        (stride, length) for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if length > 1
    ):
        if stride <= reach:
            return not tensor.numel() or _repeats(tensor)
        reach += (length - 1) * stride
    return False


def _repeats(tensor: torch.Tensor) -> bool:
    if tensor.numel() > _MOST_RUNS:
        return True
    positions = np.zeros(1, np.int64)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        positions = (positions[:, None] + np.arange(length, dtype=np.int64) * stride).ravel()
    return len(np.unique(positions)) < len(positions)


def unwritable(tensor: torch.Tensor, read_only: ReadOnlyMemory) -> str:
    """Why the tensor cannot be written in place, in words; empty if it can."""
    name = type(tensor).__name__
    if _is_sharded(tensor):
        return f"is sharded over ranks ({name}), which is not supported. Next: load before the model is sharded"
    if tensor.layout is not torch.strided:
        return f"has the layout {str(tensor.layout).removeprefix('torch.')}, which is not supported"
    if tensor.is_nested or tensor.is_quantized:
        return f"is a {'nested' if tensor.is_nested else 'quantized'} tensor, which is not supported"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "is inside a transformation of torch.func. Next: load outside of vmap and grad"
    if not is_ordinary(tensor):
        return f"is a {name} without memory of its own, which is not supported. Next: load the plain tensors first"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode"
    if tensor.is_meta or not tensor.numel():
        return ""
    end = tensor.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if end * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "has no memory: its storage was freed"
    if overlaps_itself(tensor):
        return "is expanded: several of its elements share memory"
    if tensor.device.type == "cpu" and tensor.data_ptr() in read_only:
        return "lies in memory that is read-only, such as a mapped file. Next: replace it by a clone()"
    return ""


def valueless_mode() -> str:
    """Why nothing can be written now, in words: a mode of torch is entered whose new tensors hold no values.

    ``FakeTensorMode`` is one. A model that was built before it has memory, but torch refuses to write into it.
    """
    made = torch.empty(1, device="cpu")
    if is_ordinary(made) and not made.is_meta:
        return ""
    return (
        f"cannot be written in a mode of torch that makes tensors without values ({type(made).__name__}). "
        "Next: initialize outside of the mode"
    )


def _is_sharded(tensor: torch.Tensor) -> bool:
    return any(kind.__module__.startswith("torch.distributed.") for kind in type(tensor).__mro__)


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor has strided memory of its own, which wrappers of other tensors do not have."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.is_meta or type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


class ReadOnlyMemory:
    """The ranges of addresses of this process where a write would end it; known on Linux only. Read once, on demand."""

    @functools.cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        found = []
        maps = Path("/proc/self/maps")
        for line in maps.read_text(errors="replace").splitlines() if sys.platform == "linux" else ():
            place, permissions = line.split(maxsplit=2)[:2]
            if permissions[1] != "w":
                begin, _, end = place.partition("-")
                found.append((int(begin, 16), int(end, 16)))
        return found

    def __contains__(self, address: int) -> bool:
        number = bisect.bisect_right(self._ranges, (address, sys.maxsize)) - 1
        return number >= 0 and address < self._ranges[number][1]
