"""Whole objects out of a checkpoint: plain values with real tensors in them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noether_init_core.errors import CheckpointFormatError
from noether_init_core.files.formats.inert_values import ForeignObject, GlobalName
from noether_init_core.files.formats.module_versions import METADATA, Versions
from noether_init_core.files.tensor_info import ITEMSIZES, TensorInfo
from noether_init_core.files.tensor_names import children

if TYPE_CHECKING:
    import torch

__all__ = ["Materializer"]


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
            self._left -= sum(piece.nbytes for piece in info.pieces) or info.nbytes
            if self._left < 0:
                raise CheckpointFormatError(
                    f"{self._path} has views of its storages that would take more than 16 times its size. "
                    "Next: read the tensors that are needed, one by one",
                    path=self._path,
                )
            known = self._tensors[info] = self._read(info)
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
