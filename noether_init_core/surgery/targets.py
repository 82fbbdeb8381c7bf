"""What a model has: its state dict's entries as specifications for the plan and as tensors to write to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from noether_init_core.surgery.plan import TargetSpec

__all__ = ["ModelTargets", "dtype_name", "model_targets"]


@attrs.frozen(eq=False)
class ModelTargets:
    """The entries of one single model.

    Attributes:
        specs: Name -> specification, in the order of the state dict.
        tensors: Name -> the parameter or buffer itself, not a copy. Extra state is not in it.
        hidden: Names of non-persistent buffers.
        extra_state: Name -> the module that has extra state.
    """

    specs: Mapping[str, TargetSpec]
    tensors: Mapping[str, torch.Tensor]
    hidden: frozenset[str]
    extra_state: Mapping[str, torch.nn.Module]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


def model_targets(model: Any) -> ModelTargets:
    """Read names, shapes and dtypes of ``model`` (a module, or a view on one). Nothing is changed or copied."""
    specs: dict[str, TargetSpec] = {}
    tensors: dict[str, torch.Tensor] = {}
    extra: dict[str, torch.nn.Module] = {}
    first_names: dict[int, str] = {}
    modules = dict(model.named_modules())
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            owner, _, leaf = name.rpartition(".")
            if leaf == "_extra_state" and owner in modules:
                extra[name] = modules[owner]
            specs[name] = TargetSpec((), "object", 0, is_parameter=False)
            continue
        first = first_names.setdefault(id(value), name)
        tensors[name] = value
        specs[name] = TargetSpec(
            shape=tuple(value.shape),
            dtype=dtype_name(value.dtype),
            nbytes=value.numel() * value.element_size(),
            is_parameter=isinstance(value, torch.nn.Parameter),
            tied_to=None if first == name else first,
        )
    hidden = frozenset(name for name, _buffer in model.named_buffers(remove_duplicate=False)) - specs.keys()
    return ModelTargets(specs, tensors, hidden, extra)
