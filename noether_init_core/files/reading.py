"""From the file into tensors: fresh ones, and ones that exist. Torch is imported when the first is asked for."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from noether_init_core.errors import CheckpointFormatError, StateMismatchError
from noether_init_core.files.formats.inert_values import ForeignObject, GlobalName
from noether_init_core.files.formats.zip_records import Record
from noether_init_core.files.module_versions import METADATA, Versions
from noether_init_core.files.storage.file_handle import CHUNK, FileHandle, Transfer
from noether_init_core.files.tensor_info import ITEMSIZES, TensorInfo
from noether_init_core.files.tensor_names import children
from noether_init_core.memory import in_large_pages
from noether_init_core.stopwatch import Stopwatch

if TYPE_CHECKING:
    import torch

__all__ = [
    "Materializer",
    "allocated",
    "are_equal",
    "copy_staged",
    "copy_tensors",
    "map_tensors",
    "read_pieces",
    "read_tensor",
]

# Bytes of a temporary tensor, where one is needed.
_PIECE = 1 << 20


def read_tensor(handle: FileHandle, records: Mapping[str, Record], info: TensorInfo, key: str = "") -> torch.Tensor:
    """A new CPU tensor that owns its memory, without gradient; lazy conjugation and negation are carried out."""
    import torch

    dtype = _dtype_of(handle, info, key)
    memory = in_large_pages(torch.empty(info.span * info.itemsize, dtype=torch.uint8))
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
    handle: FileHandle,
    records: Mapping[str, Record],
    sources: Sequence[tuple[str, TensorInfo, torch.Tensor]],
    stopwatch: Stopwatch,
) -> None:
    """Copy into existing tensors of the same shape: straight into their memory, or in chunks through small buffers.

    Everything that can be known is checked first, so ``StateMismatchError`` means that nothing was changed.
    """
    import torch

    problems = []
    for key, info, target in sources:
        if tuple(target.shape) != info.shape:
            problems.append(f"{key}: file {list(info.shape)}, target {list(target.shape)}")
        elif target.is_meta:
            problems.append(f"{key}: the target is on the meta device and has no memory; use read()")
        elif not _has_memory(target):
            problems.append(f"{key}: the memory of the target was taken away")
    if problems:
        raise StateMismatchError(
            f"{handle.path} cannot be copied into these tensors, nothing was changed: {'; '.join(problems[:10])}"
            + (f" and {len(problems) - 10} more" if len(problems) > 10 else ""),
            problems=problems,
        )
    direct: list[Transfer] = []
    rest: list[tuple[str, TensorInfo, torch.Tensor]] = []
    staged: dict[torch.device, list[tuple[str, TensorInfo, torch.Tensor]]] = {}
    for key, info, target in sources:
        if info.nbytes == 0:
            continue
        if _is_direct(info, target):
            direct.append(_transfer(records, info, target, key))
        elif target.device.type == "cuda" and info.is_contiguous and target.is_contiguous() and _is_plain(info, target):
            staged.setdefault(target.device, []).append((key, info, target))
        else:
            rest.append((key, info, target))
    with stopwatch.phase("read", sum(transfer.target.nbytes for transfer in direct)):
        handle.read_all(direct)
    with torch.no_grad():
        for device, of_device in staged.items():
            with stopwatch.phase("copy", sum(info.nbytes for _key, info, _target in of_device)):
                copy_staged(handle, records, of_device, device)
        if rest:
            with stopwatch.phase("cast", sum(info.nbytes for _key, info, _target in rest)):
                for key, info, target in rest:
                    _copy_in_chunks(handle, records, info, target, key)


def copy_staged(
    handle: FileHandle,
    records: Mapping[str, Record],
    sources: Sequence[tuple[str, TensorInfo, torch.Tensor]],
    device: torch.device,
) -> None:
    """Copy contiguous tensors to contiguous ones on ``device`` through two buffers, one filled while one is sent.

    The buffers are pinned for a CUDA device, so that it fetches them by itself. When this returns, all has arrived.
    """
    import torch

    is_cuda = device.type == "cuda"
    buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
    sent: list[torch.cuda.Event | None] = [None, None]
    turn = 0
    try:
        for key, info, target in sources:
            flat = target.detach().view(-1)
            step = CHUNK // info.itemsize
            for begin in range(0, flat.numel(), step):
                end = min(begin + step, flat.numel())
                piece = buffers[turn][: (end - begin) * info.itemsize]
                event = sent[turn]
                if event is not None:
                    event.synchronize()  # its former content is on its way no more
                handle.read_into(_bytes_of(piece), _offset(records, info) + begin * info.itemsize, key)
                values = piece.view(getattr(torch, info.dtype))
                if values.dtype is not flat.dtype:  # sent as it is, cast over there
                    values = values.to(device, non_blocking=True)
                flat[begin:end].copy_(values, non_blocking=True)
                if is_cuda:
                    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    event.record(torch.cuda.current_stream(device))
                    sent[turn] = event
                turn = 1 - turn
    finally:
        for event in sent:
            if event is not None:
                event.synchronize()  # the buffers must outlive what is on its way


def allocated(
    handle: FileHandle, records: Mapping[str, Record], infos: Iterable[TensorInfo]
) -> tuple[dict[TensorInfo, torch.Tensor], dict[str, memoryview]]:
    """New, unfilled tensors for those that are their whole record, and record -> the memory of its tensor.

    Other tensors are left out. The memory views keep the tensors alive.
    """
    import torch

    tensors: dict[TensorInfo, torch.Tensor] = {}
    memory: dict[str, memoryview] = {}
    for info in infos:
        whole = info.nbytes == records[info.record].size and info.is_contiguous and info.nbytes > 0
        if whole and info.record not in memory and not (info.is_conjugated or info.is_negated):
            dtype = _dtype_of(handle, info, "")
            carrier = in_large_pages(torch.empty(info.nbytes, dtype=torch.uint8))
            tensors[info] = carrier.view(dtype).view(info.shape)
            memory[info.record] = _bytes_of(carrier)
    return tensors, memory


def map_tensors(
    handle: FileHandle, records: Mapping[str, Record], infos: Mapping[str, TensorInfo]
) -> dict[str, torch.Tensor]:
    """Tensors over one private mapping of the file; those that cannot be are left out. No two of them share memory."""
    import mmap

    import torch

    content = mmap.mmap(handle.fileno(), handle.size, access=mmap.ACCESS_COPY)
    taken: set[str] = set()
    found = {}
    for key, info in infos.items():
        offset = _offset(records, info)
        usable = info.is_contiguous and not (info.is_conjugated or info.is_negated) and offset % info.itemsize == 0
        if info.nbytes == 0 or not usable or info.record in taken:
            continue
        if offset + info.nbytes > len(content):  # cut off since it was opened
            continue
        taken.add(info.record)
        # the tensor keeps the mapping alive
        flat = torch.frombuffer(
            content, dtype=_dtype_of(handle, info, key), count=info.nbytes // info.itemsize, offset=offset
        )
        found[key] = flat.view(info.shape)
    return found


def are_equal(handle: FileHandle, records: Mapping[str, Record], first: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; they are read in chunks."""
    import torch

    if (first.dtype, first.shape) != (other.dtype, other.shape):
        return False
    if first == other or first.nbytes == 0:
        return True
    flags = (first.is_conjugated, first.is_negated, other.is_conjugated, other.is_negated)
    if first.is_contiguous and other.is_contiguous and not any(flags):
        begins = _offset(records, first), _offset(records, other)
        for at in range(0, first.nbytes, _PIECE):
            length = min(_PIECE, first.nbytes - at)
            if handle.read(length, begins[0] + at) != handle.read(length, begins[1] + at):
                return False
        return True
    carrier = _carriers()[first.itemsize]
    tensors = (read_tensor(handle, records, info).contiguous() for info in (first, other))
    mine, theirs = (tensor.view(carrier) for tensor in tensors)
    return torch.equal(mine.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))


class Materializer:
    """Turns an object of plain values into the same with real tensors; parts that were shared stay shared.

    ``versions``: id of a dict -> the ``_metadata`` that it gets back.
    """

    def __init__(self, handle: FileHandle, records: Mapping[str, Record], versions: Mapping[int, Versions]) -> None:
        self._versions = versions
        self._handle = handle
        self._records = records
        # Views of one storage may overlap, and each gets memory of its own; a small file must not ask for much.
        self._left = (1 << 20) + 16 * handle.size
        self._tensors: dict[TensorInfo, torch.Tensor] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that have been read."""
        return sum(info.nbytes for info in self._tensors)

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
            items = ((self.convert(key), self.convert(child)) for key, child in value.items())
            if id(value) not in self._versions:
                return dict(items)
            state_dict = OrderedDict(items)
            metadata = OrderedDict((path, copy.deepcopy(said)) for path, said in self._versions[id(value)].items())
            setattr(state_dict, METADATA, metadata)
            return state_dict
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


def _dtype_of(handle: FileHandle, info: TensorInfo, key: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, info.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointFormatError(
            f"{handle.path}: {key or info.record} has the dtype {info.dtype}, which torch {torch.__version__} lacks. "
            "Next: pip install --upgrade torch",
            path=handle.path,
        )
    return dtype


def _carriers() -> dict[int, torch.dtype]:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _offset(records: Mapping[str, Record], info: TensorInfo) -> int:
    return records[info.record].offset + info.storage_offset * info.itemsize


def _is_plain(info: TensorInfo, target: torch.Tensor) -> bool:
    import torch

    return (
        type(target) in (torch.Tensor, torch.nn.Parameter)
        and target.layout == torch.strided
        and isinstance(getattr(torch, info.dtype, None), torch.dtype)
        and not (info.is_conjugated or info.is_negated or target.is_conj() or target.is_neg())
    )


def _is_direct(info: TensorInfo, target: torch.Tensor) -> bool:
    import torch

    return (
        _is_plain(info, target)
        and target.device.type == "cpu"
        and target.dtype is getattr(torch, info.dtype)
        and target.is_contiguous()
        and info.is_contiguous
    )


def _has_memory(target: torch.Tensor) -> bool:
    """Whether the storage reaches as far as the tensor says; sharded training takes storages away meanwhile."""
    import torch

    if type(target) not in (torch.Tensor, torch.nn.Parameter) or target.layout != torch.strided or not target.numel():
        return True
    span = 1 + sum((size - 1) * stride for size, stride in zip(target.shape, target.stride(), strict=True))
    return (target.storage_offset() + span) * target.element_size() <= target.untyped_storage().nbytes()


def _transfer(records: Mapping[str, Record], info: TensorInfo, target: torch.Tensor, key: str) -> Transfer:
    memory = _bytes_of(target)
    if memory.nbytes != info.nbytes:  # never write beyond a tensor, whatever else is wrong
        raise StateMismatchError(f"{key}: {info.nbytes} bytes do not fit into {memory.nbytes}", problems=[key])
    return Transfer(memory, _offset(records, info), key)


def _copy_in_chunks(
    handle: FileHandle, records: Mapping[str, Record], info: TensorInfo, target: torch.Tensor, key: str
) -> None:
    if info.is_contiguous and target.is_contiguous():
        info, target = attrs.evolve(info, shape=(info.nbytes // info.itemsize,), stride=(1,)), target.view(-1)
    for dimension, begin, piece in read_pieces(handle, records, info, key):
        if piece.dim() == 0:
            target.copy_(piece)
        else:
            target.narrow(dimension, begin, piece.shape[dimension]).copy_(piece)


def read_pieces(
    handle: FileHandle, records: Mapping[str, Record], info: TensorInfo, key: str = ""
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Dimension, begin along it, and the slice from there: along the slowest dimension in the file, so that a slice is
    one piece of it. A tensor without elements has none, one without dimensions is its only slice.
    """
    if info.nbytes == 0:
        return
    if not info.shape:
        yield 0, 0, read_tensor(handle, records, info, key)
        return
    dimension = max(range(len(info.shape)), key=lambda number: (info.shape[number] > 1, info.stride[number]))
    size, stride = info.shape[dimension], info.stride[dimension]
    step = max(1, _PIECE // (info.nbytes // size))
    for begin in range(0, size, step):
        length = min(step, size - begin)
        shape = (*info.shape[:dimension], length, *info.shape[dimension + 1 :])
        part = attrs.evolve(
            info,
            shape=shape,
            nbytes=info.nbytes // size * length,
            storage_offset=info.storage_offset + begin * stride,
        )
        yield dimension, begin, read_tensor(handle, records, part, key)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; it stays valid as long as the view is held."""
    import torch

    # A dimension of one element may have any stride, which a plain view would keep.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
