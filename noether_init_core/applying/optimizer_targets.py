"""What an optimizer has: its groups by the names of a model's parameters."""

from __future__ import annotations

from typing import Any

import torch

from noether_init_core.errors import StateMismatchError, type_of

__all__ = ["class_name", "optimizer_names", "parameter_aliases", "torch_optimizer"]


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer itself: ``optimizer``, or the one inside Noether's wrapper (``torch_optim``).

    Raises ``StateMismatchError`` for anything else.
    """
    inner = getattr(optimizer, "torch_optim", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise StateMismatchError(
            f"{type_of(optimizer)} is neither a torch optimizer nor a wrapper with torch_optim; "
            "its state cannot be matched by parameter names"
        )
    return inner


def optimizer_names(optimizer: torch.optim.Optimizer, model: Any) -> list[list[str]]:
    """Names of the parameters of each group, found by identity among those of ``model``.

    Raises ``StateMismatchError`` for a parameter that ``model`` has not.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        strange = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in names]
        if strange:
            raise StateMismatchError(
                f"group {number} of the optimizer of {model.name} holds {len(strange)} parameters that are not "
                f"parameters of the model (the first is number {strange[0]} of the group). "
                "Build the optimizer from the model's own parameters"
            )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return groups


def parameter_aliases(model: Any) -> dict[str, tuple[str, ...]]:
    """First name of a parameter -> all of its names; a file may know it by another one than the first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {found[0]: tuple(found) for found in names.values()}


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """The class of an optimizer, as it is recorded beside its state."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
