"""From the file into tensors: fresh ones, and ones that exist. Torch is imported when the first is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from noether_init_core.checkpoints.file_handle import FileHandle, Transfer
from noether_init_core.checkpoints.records import Record
from noether_init_core.checkpoints.survey import children
from noether_init_core.checkpoints.tensor_info import ITEMSIZES, TensorInfo
from noether_init_core.checkpoints.values import ForeignObject, GlobalName
from noether_init_core.errors import CheckpointFormatError, StateMismatchError

if TYPE_CHECKING:
    import torch

__all__ = ["Materializer", "copy_tensors", "read_tensor"]


def read_tensor(handle: FileHandle, records: Mapping[str, Record], info: TensorInfo, key: str = "") -> torch.Tensor:
    """A new CPU tensor that owns its memory, without gradient; lazy conjugation and negation are carried out."""
    import torch

    dtype = getattr(torch, info.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointFormatError(
            f"{handle.path}: {key or info.record} has the dtype {info.dtype}, which torch {torch.__version__} lacks. "
            "Next: pip install --upgrade torch",
            path=handle.path,
        )
    memory = torch.empty(info.span * info.itemsize, dtype=torch.uint8)
    if info.nbytes == 0:
        return memory.view(dtype).reshape(info.shape)
    handle.read_all([Transfer(_bytes_of(memory), _offset(records, info), key)])
    # As integers, because not every dtype can be cloned.
    carrier = memory.view(_carriers()[info.itemsize]).as_strided(info.shape, info.stride)
    if memory.numel() != info.nbytes:  # the tensor was a view with gaps, or elements that it has several times
        carrier = carrier.clone()
    tensor = carrier.view(dtype)
    if info.is_conjugated:
        tensor = tensor.conj().resolve_conj()
    return tensor.neg() if info.is_negated else tensor


def copy_tensors(
    handle: FileHandle, records: Mapping[str, Record], sources: Sequence[tuple[str, TensorInfo, torch.Tensor]]
) -> None:
    """Copy into existing tensors of the same shape: straight into their memory, or through one tensor at a time.

    Everything that can be known is checked first, so ``StateMismatchError`` means that nothing was changed.
    """
    import torch

    problems = []
    for key, info, target in sources:
        if tuple(target.shape) != info.shape:
            problems.append(f"{key}: file {list(info.shape)}, target {list(target.shape)}")
        elif target.is_meta:
            problems.append(f"{key}: the target is on the meta device and has no memory; use read()")
    if problems:
        raise StateMismatchError(
            f"{handle.path} cannot be copied into these tensors, nothing was changed: {'; '.join(problems[:10])}"
            + (f" and {len(problems) - 10} more" if len(problems) > 10 else ""),
            problems=problems,
        )
    direct: list[Transfer] = []
    rest: list[tuple[str, TensorInfo, torch.Tensor]] = []
    for key, info, target in sources:
        if info.nbytes == 0:
            continue
        if _is_direct(info, target):
            direct.append(Transfer(_bytes_of(target), _offset(records, info), key))
        else:
            rest.append((key, info, target))
    handle.read_all(direct)
    with torch.no_grad():
        for key, info, target in rest:
            target.copy_(read_tensor(handle, records, info, key))


class Materializer:
    """Turns an object of plain values into the same with real tensors; parts that were shared stay shared."""

    def __init__(self, handle: FileHandle, records: Mapping[str, Record]) -> None:
        self._handle = handle
        self._records = records
        # Views of one storage may overlap, and each gets memory of its own; a small file must not ask for much.
        self._left = (1 << 20) + 16 * handle.size
        self._tensors: dict[TensorInfo, torch.Tensor] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}

    def convert(self, value: Any) -> Any:
        """The value with tensors, ``torch.dtype`` and ``torch.device`` in place of what stands for them."""
        kind = type(value)
        if kind is TensorInfo:
            return self._tensor(value)
        if kind is GlobalName:
            return _dtype(value)
        if kind is set or kind is frozenset:
            return kind(map(self.convert, value))
        if kind not in (dict, list, tuple, ForeignObject):
            return value
        known = self._containers.get(id(value))
        if known is None:
            # the value is kept too: an id may be used again once its object is gone
            known = self._containers[id(value)] = (value, self._container(value))
        return known[1]

    def _container(self, value: Any) -> Any:
        if type(value) is dict:
            return {self.convert(key): self.convert(child) for key, child in value.items()}
        if type(value) is ForeignObject:
            if value.name == "torch.device":
                return self._device(value)
            return ForeignObject(value.name, *(self.convert(child) for _, child in children(value)))
        return type(value)(map(self.convert, value))

    def _tensor(self, info: TensorInfo) -> torch.Tensor:
        known = self._tensors.get(info)
        if known is None:
            self._left -= info.span * info.itemsize
            if self._left < 0:
                raise CheckpointFormatError(
                    f"{self._handle.path} has views of its storages that would take more than 16 times its size. "
                    "Next: read the tensors that are needed, one by one",
                    path=self._handle.path,
                )
            known = self._tensors[info] = read_tensor(self._handle, self._records, info)
        return known

    def _device(self, value: ForeignObject) -> torch.device:
        import torch

        try:
            return torch.device(*value.args)
        except RuntimeError as error:
            raise CheckpointFormatError(
                f"{self._handle.path} names the device {value.args}, which torch {torch.__version__} does not know",
                path=self._handle.path,
            ) from error


def _dtype(value: GlobalName) -> Any:
    name = value.name.removeprefix("torch.")
    if name not in ITEMSIZES:
        return value
    import torch

    return getattr(torch, name, value)


def _carriers() -> dict[int, torch.dtype]:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _offset(records: Mapping[str, Record], info: TensorInfo) -> int:
    return records[info.record].offset + info.storage_offset * info.itemsize


def _is_direct(info: TensorInfo, target: torch.Tensor) -> bool:
    import torch

    return (
        type(target) in (torch.Tensor, torch.nn.Parameter)
        and target.device.type == "cpu"
        and target.dtype is getattr(torch, info.dtype, None)
        and target.layout == torch.strided
        and target.is_contiguous()
        and info.is_contiguous
        and not (info.is_conjugated or info.is_negated or target.is_conj() or target.is_neg())
    )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; it stays valid as long as the view is held."""
    import torch

    # A dimension of one element may have any stride, which a plain view would keep.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
