"""From the file into tensors: fresh ones, ones that exist, and those in whole objects. Torch is imported when the first
is asked for.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from noether_init_core.errors import CheckpointCorruptError, CheckpointFormatError, StateMismatchError
from noether_init_core.files.content import (
    ITEMSIZES,
    METADATA,
    ForeignObject,
    GlobalName,
    Record,
    TensorInfo,
    Versions,
    children,
    span,
)
from noether_init_core.files.storage.handle import CHUNK, Handle, LocalFile, Transfer
from noether_init_core.memory import Finding, in_large_pages
from noether_init_core.messages import listed
from noether_init_core.stopwatch import Stopwatch

if TYPE_CHECKING:
    import torch

    # key for messages, what is read, the tensor of the same shape that it goes into
    _Source = tuple[str, TensorInfo, torch.Tensor]


def read_tensor(handle: Handle, info: TensorInfo, key: str = "") -> torch.Tensor:
    """A new CPU tensor that owns its memory, without gradient; lazy conjugation and negation are carried out."""
    import torch

    dtype = _dtype_of(handle, info, key)
    contiguous = info.contiguous
    piece = info.whole if contiguous is None else contiguous
    if piece is None:
        return _joined(handle, info, key)
    memory = in_large_pages(torch.empty(piece.nbytes, dtype=torch.uint8))
    handle.read_all([(memory_of_tensor(memory), piece.offset, key)] if piece.nbytes else [])
    if contiguous is not None or not piece.nbytes:
        return memory.view(dtype).view(info.shape)
    carrier = memory.view(_carrier(info.itemsize)).as_strided(info.shape, info.stride)
    if piece.nbytes != info.nbytes:  # the tensor was a view with gaps, or elements that it has several times
        carrier = carrier.clone()
    tensor = carrier.view(dtype)
    if piece.is_conjugated:
        tensor = tensor.conj().resolve_conj()
    return tensor.neg() if piece.is_negated else tensor


def _joined(handle: Handle, info: TensorInfo, key: str) -> torch.Tensor:
    """A tensor of several pieces, each of which is read by itself."""
    import torch

    missing = math.prod(info.shape)
    joined = torch.empty(info.shape, dtype=_carrier(info.itemsize))
    for piece in info.pieces:
        box = piece.box or tuple((0, size) for size in info.shape)
        shape = tuple(end - begin for begin, end in box)
        part = TensorInfo(shape, info.dtype, (msgspec.structs.replace(piece, box=None),))
        joined[tuple(slice(*ends) for ends in box)] = read_tensor(handle, part, key).view(joined.dtype)
        missing -= math.prod(shape)
    if missing:
        raise CheckpointCorruptError(
            f"{handle.path}: the pieces of {key or 'a tensor'} do not make up its shape {list(info.shape)}",
            path=handle.path,
            key=key,
        )
    return joined.view(_dtype_of(handle, info, key))


def nonfinite_in(tensor: torch.Tensor) -> Finding | None:
    """``NaN`` if there is one in the tensor, else ``infinities`` if there is one, else None."""
    import torch

    if tensor.element_size() == 1 and tensor.is_floating_point():
        tensor = tensor.float()
    if bool(torch.isnan(tensor).any()):
        return "NaN"
    return "infinities" if bool(torch.isinf(tensor).any()) else None


def check_targets(path: Path, sources: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> None:
    """Raise ``StateMismatchError`` unless every target has the shape that is copied into it, and memory."""
    problems = []
    for key, shape, target in sources:
        if tuple(target.shape) != shape:
            problems.append(f"{key}: checkpoint {list(shape)}, target {list(target.shape)}")
        elif target.is_meta:
            problems.append(f"{key}: the target is on the meta device and has no memory; use read()")
        elif not _has_memory(target):
            problems.append(f"{key}: the memory of the target was taken away")
    if problems:
        raise StateMismatchError(
            f"{path} cannot be copied into these tensors, nothing was changed: {listed(problems, 10, separator='; ')}",
            problems=problems,
        )


def copy_tensors(handle: Handle, sources: Sequence[_Source], stopwatch: Stopwatch) -> None:
    """Copy into existing tensors of the same shape: straight into their memory, or in chunks through small buffers.

    Everything that can be known is checked first, so ``StateMismatchError`` means that nothing was changed.
    """
    import torch

    check_targets(handle.path, ((key, info.shape, target) for key, info, target in sources))
    direct: list[Transfer] = []
    rest: list[_Source] = []
    staged: dict[torch.device, list[_Source]] = {}
    for key, info, target in sources:
        if not target.numel():
            continue
        piece = info.contiguous if _is_plain(target) else None
        dtype = getattr(torch, info.dtype, None)
        if piece is not None and target.device.type == "cpu" and target.dtype is dtype:
            memory = memory_of_tensor(target)
            if memory.nbytes != piece.nbytes:  # never write beyond a tensor, whatever else is wrong
                raise StateMismatchError(f"{key}: {piece.nbytes} bytes do not fit into {memory.nbytes}", problems=[key])
            direct.append((memory, piece.offset, key))
        elif piece is not None and target.device.type == "cuda" and isinstance(dtype, torch.dtype):
            staged.setdefault(target.device, []).append((key, info, target))
        else:
            rest.append((key, info, target))
    with stopwatch.phase("read", sum(memory.nbytes for memory, _offset, _key in direct)):
        handle.read_all(direct)
    with torch.no_grad():
        for device, of_device in staged.items():
            with stopwatch.phase("copy", sum(info.nbytes for _key, info, _target in of_device)):
                copy_staged(handle, of_device, device)
        if rest:
            with stopwatch.phase("cast", sum(info.nbytes for _key, info, _target in rest)):
                for key, info, target in rest:
                    if target.is_contiguous() and info.contiguous is not None:
                        info, target = info.flat(), target.view(-1)
                    for box in info.boxes():
                        part = read_tensor(handle, info.part(box), key)
                        target[tuple(slice(*ends) for ends in box)].copy_(part)


def copy_staged(handle: Handle, sources: Sequence[_Source], device: torch.device) -> None:
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
                handle.read_into(memory_of_tensor(piece), info.pieces[0].offset + begin * info.itemsize, key)
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
    handle: Handle, records: Mapping[TensorInfo, Record]
) -> tuple[dict[TensorInfo, torch.Tensor], dict[str, memoryview]]:
    """New, unfilled tensors for those that are a whole record, and record -> the memory of its tensor.

    The memory views keep the tensors alive.
    """
    import torch

    tensors: dict[TensorInfo, torch.Tensor] = {}
    memory: dict[str, memoryview] = {}
    for info, record in records.items():
        if record.name not in memory:
            carrier = in_large_pages(torch.empty(record.size, dtype=torch.uint8))
            tensors[info] = carrier.view(_dtype_of(handle, info, "")).view(info.shape)
            memory[record.name] = memory_of_tensor(carrier)
    return tensors, memory


def map_tensors(handle: Handle, infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Tensors over one private mapping of the file; those that cannot be are left out. No two of them share memory."""
    import mmap

    import torch

    storage = handle.storage
    if not isinstance(storage, LocalFile):
        return {}
    content = mmap.mmap(storage.descriptor, handle.size, access=mmap.ACCESS_COPY)
    end = 0
    found = {}
    places = ((key, info, info.contiguous) for key, info in infos.items())
    usable = [(piece.offset, piece.nbytes, key, info) for key, info, piece in places if piece is not None]
    for offset, nbytes, key, info in sorted(usable, key=lambda item: item[0]):
        # what overlaps the one before it would share its memory; the file may have been cut off since it was opened
        if nbytes and offset % info.itemsize == 0 and end <= offset <= offset + nbytes <= len(content):
            end = offset + nbytes
            # the tensor keeps the mapping alive
            dtype = _dtype_of(handle, info, key)
            flat = torch.frombuffer(content, dtype=dtype, count=nbytes // info.itemsize, offset=offset)
            found[key] = flat.view(info.shape)
    return found


def _dtype_of(handle: Handle, info: TensorInfo, key: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, info.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointFormatError(
            f"{handle.path}: {key or 'a tensor'} has the dtype {info.dtype}, which torch {torch.__version__} lacks. "
            "Next: pip install --upgrade torch",
            path=handle.path,
        )
    return dtype


def _carrier(itemsize: int) -> torch.dtype:
    """A dtype of that size that can be copied and cloned; not every one can."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[itemsize]


def _is_plain(target: torch.Tensor) -> bool:
    import torch

    return (
        type(target) in (torch.Tensor, torch.nn.Parameter)
        and target.layout == torch.strided
        and target.is_contiguous()
        and not (target.is_conj() or target.is_neg())
    )


def _has_memory(target: torch.Tensor) -> bool:
    """Whether the storage reaches as far as the tensor says; sharded training takes storages away meanwhile."""
    import torch

    if type(target) not in (torch.Tensor, torch.nn.Parameter) or target.layout != torch.strided or not target.numel():
        return True
    end = target.storage_offset() + span(target.shape, target.stride())
    return end * target.element_size() <= target.untyped_storage().nbytes()


def memory_of_tensor(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor that is all of its storage, in the order of memory; it lives as long as they do."""
    import torch

    # A dimension of one element may have any stride, which a plain view would keep.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


class Materializer:
    """Turns an object of plain values into the same with real tensors; parts that were shared stay shared.

    Args:
        read: Gives the tensor of a description.
        versions: Id of a dict -> the ``_metadata`` that it gets back.
        path: Of the checkpoint, for messages.
        most: Bytes of the checkpoint.
    """

    def __init__(
        self, read: Callable[[TensorInfo], torch.Tensor], versions: Mapping[int, Versions], path: Path, most: int
    ) -> None:
        self._read = read
        self._versions = versions
        self._path = path
        # Views of one storage may overlap, and each gets memory of its own; a small file must not ask for much.
        self._left = (1 << 20) + 16 * most
        self._tensors: dict[TensorInfo, torch.Tensor] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}
        #: Bytes of the tensors that have been read.
        self.nbytes = 0

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
            self._left -= sum(piece.nbytes for piece in info.pieces) or info.nbytes
            if self._left < 0:
                raise CheckpointFormatError(
                    f"{self._path} has views of its storages that would take more than 16 times its size. "
                    "Next: read the tensors that are needed, one by one",
                    path=self._path,
                )
            known = self._tensors[info] = self._read(info)
            self.nbytes += known.nbytes
        return known

    def _device(self, value: ForeignObject) -> torch.device:
        import torch

        try:
            return torch.device(*value.args)
        except RuntimeError as error:
            raise CheckpointFormatError(
                f"{self._path} names the device {value.args}, which torch {torch.__version__} does not know",
                path=self._path,
            ) from error


def _dtype(value: GlobalName) -> Any:
    name = value.name.removeprefix("torch.")
    if name not in ITEMSIZES:
        return value
    import torch

    return getattr(torch, name, value)
