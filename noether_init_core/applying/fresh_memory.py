"""Memory for parameters and buffers that have none yet, because the model was built on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from noether_init_core.applying.targets import ModelTargets
from noether_init_core.memory import in_large_pages
from noether_init_core.surgery.plan import PlanRow

__all__ = ["FreshMemory", "device_for", "has_weak_references", "left_without_memory", "on_meta"]


def on_meta(targets: ModelTargets) -> dict[str, torch.Tensor]:
    """The targets that have no memory; a tied tensor under its first name only."""
    found: dict[int, str] = {}
    for name, tensor in targets.tensors.items():
        if tensor.is_meta:
            found.setdefault(id(tensor), name)
    return {name: targets.tensors[name] for name in found.values()}


def left_without_memory(model: Any, rows: Iterable[PlanRow], targets: ModelTargets) -> list[str]:
    """Parameters and buffers on the meta device that ``rows`` do not load, and so would have no values.

    Among them are non-persistent buffers, which no file has.
    """
    names = [row.target for row in rows if (row.writes or row.action == "reset") and row.target is not None]
    written = {id(targets.tensors[name]) for name in names if name in targets.tensors}
    found: dict[str, torch.Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        **targets.tensors,
    }
    return [name for name, tensor in found.items() if tensor.is_meta and id(tensor) not in written]


def device_for(model: Any) -> torch.device:
    """Where the memory is to be: the device that was given for the model, else the CPU."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) and device.type != "meta" else torch.device("cpu")


class FreshMemory:
    """New tensors that take the place of ones on the meta device, once they are filled.

    The objects of parameters stay the same, so ties, optimizers and ``requires_grad`` stay as they are.
    """

    def __init__(self, targets: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._device = device
        self._meta = {id(tensor): tensor for tensor in targets.values()}
        self._new: dict[int, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is to be filled: the tensor itself where it has memory, else the one that will take its place."""
        if id(tensor) not in self._meta:
            return tensor
        if id(tensor) not in self._new:
            self._new[id(tensor)] = in_large_pages(torch.empty_like(tensor, device=self._device, requires_grad=False))
        return self._new[id(tensor)]

    def can_be_mapped(self, tensor: torch.Tensor, dtype: str) -> bool:
        """Whether memory of the file can take the place of ``tensor``."""
        is_ours = id(tensor) in self._meta and self._device.type == "cpu" and tensor.is_contiguous()
        return is_ours and tensor.dtype is getattr(torch, dtype, None)

    def put(self, tensor: torch.Tensor, new: torch.Tensor) -> None:
        """Let ``new`` take the place of ``tensor``."""
        self._new[id(tensor)] = new

    def hand_over(self, tensors: Iterable[torch.Tensor] | None = None) -> None:
        """Give the tensors (all that were asked for) their memory."""
        chosen = list(self._new) if tensors is None else [id(tensor) for tensor in tensors if id(tensor) in self._meta]
        for key in chosen:
            old = self._meta.pop(key)
            new = self._new.pop(key, None)
            if new is None:
                new = torch.empty_like(old, device=self._device, requires_grad=False)
            if isinstance(old, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def has_weak_references(tensor: torch.Tensor) -> bool:
    """Whether something refers to the tensor in a way that keeps it from being exchanged."""
    return bool(weakref.getweakrefs(tensor))
