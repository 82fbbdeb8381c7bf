"""Convert values to plain data and CPU tensors before they are written, or raise an error that names the place."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from noether_init_core.errors import CheckpointFormatError
from noether_init_core.files.content import ITEMSIZES, METADATA, is_dense
from noether_init_core.files.formats.torch_zip import not_plain

MAX_DEPTH = 60
_SCALARS = (bool, int, float, complex, str, bytes, bytearray)


def plain(value: Any, place: str) -> Any:
    """Return a copy of ``value`` that the reader can read again.

    Dicts (in order), lists, tuples, sets, numbers, strings, bytes, None and dense tensors keep their type. Tensors are
    detached and moved to the CPU; CPU tensors share their memory with the copy. NumPy scalars become Python numbers,
    paths become strings, other mappings become dicts, members of enumerations become their values. Tied tensors stay
    tied.

    Raises ``CheckpointFormatError`` for anything else; the message names the place in the object, below ``place``.
    """
    return _Plain().of(value, place, 0)


class _Plain:
    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], torch.Tensor] = {}
        # Keys contain the address of a storage. If a storage were freed, a new one could get its address and be taken
        # for a tied tensor.
        self._alive: list[torch.Tensor] = []
        # Address of a storage -> dtype and place of its first tensor.
        self._storages: dict[int, tuple[torch.dtype, str]] = {}

    def of(self, value: Any, place: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _refuse(place, f"nested more than {MAX_DEPTH} deep, or holding itself")
        if isinstance(value, torch.Tensor):
            return self._tensor(value, place)
        if isinstance(value, Mapping):
            return self._mapping(value, place, depth)
        if type(value) is list:
            return [self.of(item, f"{place}.{index}", depth + 1) for index, item in enumerate(value)]
        if type(value) in (tuple, torch.Size):
            return tuple(self.of(item, f"{place}.{index}", depth + 1) for index, item in enumerate(value))
        if type(value) is set:
            return {self._key(member, place) for member in value}
        return _scalar(value, place)

    def _mapping(self, value: Mapping[Any, Any], place: str, depth: int) -> dict[Any, Any]:
        items = ((self._key(key, place), self.of(item, f"{place}.{key}", depth + 1)) for key, item in value.items())
        if isinstance(value, Counter):  # torch's MultiStepLR keeps its milestones in one, and needs it back
            return Counter(dict(items))
        if not isinstance(value, OrderedDict):
            return dict(items)
        ordered = OrderedDict(items)
        metadata = getattr(value, METADATA, None)
        if metadata is not None:  # every state dict of torch has versions of modules there
            ready = self.of(metadata, f"{place}.{METADATA}", depth + 1)
            wrong = not_plain(ready, set())
            if wrong is not None:
                raise _refuse(f"{place}.{METADATA}.{wrong}", "other than a dict of plain values")
            setattr(ordered, METADATA, ready)
        return ordered

    def _key(self, key: Any, place: str) -> Any:
        if type(key) is tuple:
            return tuple(_scalar(item, f"{place}: {key!r}") for item in key)
        return _scalar(key, f"{place}: {key!r}")

    def _tensor(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        detached = tensor.detach()
        if type(detached) is not torch.Tensor:
            call = "full_tensor()" if hasattr(tensor, "full_tensor") else "as_subclass(torch.Tensor)"
            raise _refuse(place, f"a {_name(tensor)}, not a plain tensor,", f"Next: save value.{call}")
        if detached.is_nested:
            raise _refuse(place, "a nested tensor", "Next: save value.to_padded_tensor(0.0)")
        if detached.is_quantized:
            raise _refuse(place, "a quantized tensor", "Next: save value.dequantize()")
        if detached.layout is not torch.strided:
            raise _refuse(place, f"a tensor with the layout {detached.layout}", "Next: save value.to_dense()")
        if str(detached.dtype).removeprefix("torch.") not in ITEMSIZES:
            raise _refuse(place, f"a tensor of {detached.dtype}", "Next: save value.view(torch.uint8)")
        if detached.is_meta:
            raise _refuse(place, "a tensor on the meta device, which has no values")
        storage = detached.untyped_storage()
        key = (
            storage.data_ptr() or id(storage),
            str(detached.device),
            detached.dtype,
            detached.storage_offset(),
            tuple(detached.shape),
            detached.stride(),
        )
        if key not in self._tensors:
            ready = detached.cpu().resolve_conj().resolve_neg()
            if not _is_whole(ready):
                ready = ready.clone(memory_format=torch.contiguous_format)
            self._check_storage(ready, place)
            self._tensors[key] = ready
            self._alive += [detached, ready]
        return self._tensors[key]

    def _check_storage(self, tensor: torch.Tensor, place: str) -> None:
        """Refuse two dtypes in one storage, because torch writes each storage once, with one dtype."""
        address = tensor.untyped_storage().data_ptr()
        dtype, first = self._storages.setdefault(address, (tensor.dtype, place))
        if address and dtype is not tensor.dtype:
            raise _refuse(
                place, f"a {tensor.dtype} in the same memory as {first}, a {dtype},", "Next: save a clone() of one"
            )


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether the tensor covers its storage, each element once; for a view, torch.save would write the rest too."""
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.untyped_storage().nbytes() != nbytes:
        return False
    return tensor.is_contiguous() or is_dense(tensor.shape, tensor.stride())


def _scalar(value: Any, place: str) -> Any:
    if value is None or type(value) in _SCALARS:
        return value
    if isinstance(value, np.generic):
        item = value.item()
        if type(item) in _SCALARS:
            return item
        raise _refuse(place, f"a {_name(value)}")
    if isinstance(value, np.ndarray):
        raise _refuse(place, "a NumPy array", "Next: save torch.from_numpy(array), or array.tolist()")
    if isinstance(value, PurePath):
        return str(value)
    # pickle would write subclasses, such as enumerations, by the name of their class, which the reader refuses.
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return str.__str__(value) if kind is str else kind(value)
    raise _refuse(place, f"a {_name(value)}", "Next: save numbers, strings, lists, tuples, dicts and tensors only")


def _refuse(place: str, what: str, advice: str = "") -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{place}: {what} cannot be saved, because it could not be read safely" + (f". {advice}" if advice else "")
    )


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
