"""Read tensors from a file: new ones, existing ones, and those in nested objects. Torch is imported at the first
read."""

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

    # Key for messages, description, and the destination, a tensor of the same shape.
    _Source = tuple[str, TensorInfo, torch.Tensor]


def read_tensor(handle: Handle, info: TensorInfo, key: str = "") -> torch.Tensor:
    """Read a new CPU tensor that owns its memory, without gradient; lazy conjugation and negation are carried out."""
    import torch

    dtype = _dtype_of(handle, info, key)
    contiguous = info.contiguous
    piece = info.whole if contiguous is None else contiguous
    if piece is None:
        return _joined(handle, info, key)
    memory = in_large_pages(torch.empty(piece.nbytes, dtype=torch.uint8, device="cpu"))
    handle.read_all([(memory_of_tensor(memory), piece.offset, key)] if piece.nbytes else [])
    if contiguous is not None or not piece.nbytes:
        return memory.view(dtype).view(info.shape)
    carrier = memory.view(_carrier(info.itemsize)).as_strided(info.shape, info.stride)
    if piece.nbytes != info.nbytes:  # a view with gaps, or with elements that it repeats (stride 0)
        carrier = carrier.clone()
    tensor = carrier.view(dtype)
    if piece.is_conjugated:
        tensor = tensor.conj().resolve_conj()
    return tensor.neg() if piece.is_negated else tensor


def _joined(handle: Handle, info: TensorInfo, key: str) -> torch.Tensor:
    """Read a tensor of several pieces, one piece after the other."""
    import torch

    missing = math.prod(info.shape)
    joined = torch.empty(info.shape, dtype=_carrier(info.itemsize), device="cpu")
    for piece in info.pieces:
        box = piece.box or tuple((0, size) for size in info.shape)
        shape = tuple(end - begin for begin, end in box)
        part = TensorInfo(shape, info.dtype, (msgspec.structs.replace(piece, box=None),))
        joined[tuple(slice(*ends) for ends in box)] = read_tensor(handle, part, key).view(joined.dtype)
        missing -= math.prod(shape)
    if missing:
        raise CheckpointCorruptError(
            f"{handle.path}: the pieces of {key or 'a tensor'} do not cover its shape {list(info.shape)}",
            path=handle.path,
            key=key,
        )
    return joined.view(_dtype_of(handle, info, key))


def nonfinite_in(tensor: torch.Tensor) -> Finding | None:
    """Return ``NaN`` if the tensor holds NaN, else ``infinities`` if it holds an infinity, else None."""
    import torch

    if tensor.element_size() == 1 and tensor.is_floating_point():
        tensor = tensor.float()
    if bool(torch.isnan(tensor).any()):
        return "NaN"
    return "infinities" if bool(torch.isinf(tensor).any()) else None


def check_targets(path: Path, sources: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> None:
    """Raise ``StateMismatchError`` unless every target has memory and the shape of its source."""
    problems = []
    for key, shape, target in sources:
        if tuple(target.shape) != shape:
            problems.append(f"{key}: checkpoint {list(shape)}, target {list(target.shape)}")
        elif target.is_meta:
            problems.append(f"{key}: the target is on the meta device and has no memory; use read()")
        elif not _has_memory(target):
            problems.append(f"{key}: the storage of the target was freed")
    if problems:
        raise StateMismatchError(
            f"{path} was not copied, all targets are unchanged: {listed(problems, 10, separator='; ')}",
            problems=problems,
        )


def copy_tensors(handle: Handle, sources: Sequence[_Source], stopwatch: Stopwatch) -> None:
    """Copy into existing tensors of the same shape: directly into their memory, or in chunks through small buffers.

    Targets are checked first, so after ``StateMismatchError`` all targets are unchanged.
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
            if memory.nbytes != piece.nbytes:  # a last guard: a write beyond the tensor would corrupt the process
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
    """Copy contiguous tensors to contiguous targets on ``device`` through two buffers: one is filled, one is sent.

    For a CUDA device the buffers are pinned, so that copies run asynchronously. All copies are complete on return.
    """
    import torch

    is_cuda = device.type == "cuda"
    buffers = [torch.empty(CHUNK, dtype=torch.uint8, device="cpu", pin_memory=is_cuda) for _ in range(2)]
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
                    event.synchronize()  # the copy from this buffer is complete, so it may be overwritten
                handle.read_into(memory_of_tensor(piece), info.pieces[0].offset + begin * info.itemsize, key)
                values = piece.view(getattr(torch, info.dtype))
                if values.dtype is not flat.dtype:  # send the bytes of the file, and cast on the device
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
                event.synchronize()  # the buffers must not be freed while the device still reads them


def allocated(
    handle: Handle, records: Mapping[TensorInfo, Record]
) -> tuple[dict[TensorInfo, torch.Tensor], dict[str, memoryview]]:
    """Allocate unfilled tensors; return description -> tensor, and name of a record -> memory of its tensor.

    The memory views keep the tensors alive.
    """
    import torch

    tensors: dict[TensorInfo, torch.Tensor] = {}
    memory: dict[str, memoryview] = {}
    for info, record in records.items():
        if record.name not in memory:
            carrier = in_large_pages(torch.empty(record.size, dtype=torch.uint8, device="cpu"))
            tensors[info] = carrier.view(_dtype_of(handle, info, "")).view(info.shape)
            memory[record.name] = memory_of_tensor(carrier)
    return tensors, memory


def map_tensors(handle: Handle, infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Return tensors on one private mapping of the file; keys that cannot be mapped are left out. No two overlap."""
    import mmap

    import torch

    storage = handle.storage
    if not isinstance(storage, LocalFile):
        return {}
    content = mmap.mmap(storage.descriptor, handle.size, access=mmap.ACCESS_COPY)
    end = 0
    found = {}
    places = ((key, info, info.contiguous) for key, info in infos.items())
    mappable = [(piece.offset, piece.nbytes, key, info) for key, info, piece in places if piece is not None]
    for offset, nbytes, key, info in sorted(mappable, key=lambda item: item[0]):
        # A tensor that overlaps the one before would share its memory, so a write to one would change the other. The
        # file may have been truncated since it was opened, so the end is compared with the mapping.
        if nbytes and offset % info.itemsize == 0 and end <= offset <= offset + nbytes <= len(content):
            end = offset + nbytes
            # frombuffer keeps a reference to the mapping, so the handle may be closed.
            dtype = _dtype_of(handle, info, key)
            flat = torch.frombuffer(content, dtype=dtype, count=nbytes // info.itemsize, offset=offset)
            found[key] = flat.view(info.shape)
    return found


def _dtype_of(handle: Handle, info: TensorInfo, key: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, info.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointFormatError(
            f"{handle.path}: {key or 'a tensor'} has the dtype {info.dtype}, unknown to torch {torch.__version__}. "
            "Next: pip install --upgrade torch",
            path=handle.path,
        )
    return dtype


def _carrier(itemsize: int) -> torch.dtype:
    """Return a dtype of this size with copy and clone; float8 and bits dtypes do not support all operations."""
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
    """Whether the storage covers the tensor; FSDP frees storages of parameters between uses."""
    import torch

    if type(target) not in (torch.Tensor, torch.nn.Parameter) or target.layout != torch.strided or not target.numel():
        return True
    end = target.storage_offset() + span(target.shape, target.stride())
    return end * target.element_size() <= target.untyped_storage().nbytes()


def memory_of_tensor(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor that covers its storage, in memory order; the view keeps the tensor alive."""
    import torch

    # A dimension of one element may have any stride, and view(torch.uint8) would refuse that.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


class Materializer:
    """Replaces descriptions in an object by tensors; shared parts stay shared.

    Args:
        read: Returns the tensor of a description.
        versions: Id of a dict -> the ``_metadata`` to set on its copy.
        path: Path of the checkpoint, for messages.
        most: Size of the checkpoint in bytes.
    """

    def __init__(
        self, read: Callable[[TensorInfo], torch.Tensor], versions: Mapping[int, Versions], path: Path, most: int
    ) -> None:
        self._read = read
        self._versions = versions
        self._path = path
        # Views of one storage may overlap, and each gets its own memory. The limit keeps a small hostile file from
        # allocating all memory.
        self._left = (1 << 20) + 16 * most
        self._tensors: dict[TensorInfo, torch.Tensor] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}
        #: Bytes of the tensors that have been read.
        self.nbytes = 0

    def convert(self, value: Any) -> Any:
        """Return the value with tensors, ``torch.dtype`` and ``torch.device`` in place of their descriptions."""
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
            # The value is kept too, because Python reuses the id of an object that was freed.
            known = self._containers[id(value)] = (value, self._container(value))
        return known[1]

    def _container(self, value: Any) -> Any:
        if type(value) is dict:
            items = ((self.convert(key), self.convert(child)) for key, child in value.items())
            if id(value) not in self._versions:
                return dict(items)
            state_dict = OrderedDict(items)
            # A copy, because loading code of modules may change the versions in place.
            versions = self._versions[id(value)].items()
            metadata = OrderedDict((path, copy.deepcopy(version)) for path, version in versions)
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
                    f"{self._path} has overlapping views that would take more than 16 times its size in memory. "
                    "Next: read the tensors that you need with read(key)",
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
                f"{self._path} contains the device {value.args}, unknown to torch {torch.__version__}. "
                "Next: import the package that adds this device, or pip install --upgrade torch",
                path=self._path,
            ) from error


def _dtype(value: GlobalName) -> Any:
    name = value.name.removeprefix("torch.")
    if name not in ITEMSIZES:
        return value
    import torch

    return getattr(torch, name, value)
