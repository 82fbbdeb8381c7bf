"""State dicts of arbitrary objects as plain data, and back into the types that the object itself uses."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from noether_init_core.errors import StateMismatchError, type_of

__all__ = ["like", "plain"]


def plain(value: Any, place: str) -> Any:
    """``value`` made of dict, list, tuple, str, int, float, bool, None and tensors only.

    Containers are new ones, tensors are not copied. NumPy scalars and arrays become numbers and tensors, sets become
    lists, kinds of dict become dict. Raises ``StateMismatchError`` naming the ``place`` of anything else: a checkpoint
    with an arbitrary object in it could not be read by a safe loader.
    """
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, numpy.generic):
        return plain(value.item(), place)
    if isinstance(value, numpy.ndarray):
        try:
            return torch.from_numpy(value.copy())
        except TypeError as error:
            raise StateMismatchError(f"{place} is a NumPy array of {value.dtype}, which no tensor can hold") from error
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {_key(key, place): plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item, f"{place}.{number}") for number, item in enumerate(value))
    if isinstance(value, list | set | frozenset | collections.deque):
        return [plain(item, f"{place}.{number}") for number, item in enumerate(value)]
    raise StateMismatchError(
        f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold. "
        "Next: let its state_dict() return numbers, texts, tensors, and lists or dicts of these"
    )


def _key(key: Any, place: str) -> Any:
    if isinstance(key, numpy.generic):
        key = key.item()
    if key is None or type(key) in (bool, int, float, str):
        return key
    raise StateMismatchError(f"{place} has the key {key!r}, {type_of(key)}; keys must be texts or numbers")


def like(template: Any, value: Any) -> Any:
    """``value``, as ``plain`` made it, in the types of ``template``: the state that its owner has at the moment.

    ``MultiStepLR`` needs its ``Counter`` back, a module the ``_metadata`` of its state dict. Containers are new ones;
    where ``template`` says nothing, ``value`` stays plain.
    """
    if isinstance(value, Mapping):
        known = template if isinstance(template, Mapping) else {}
        items = {key: like(known.get(key), item) for key, item in value.items()}
        if isinstance(template, collections.Counter):
            return collections.Counter(items)
        if isinstance(template, collections.defaultdict):
            return collections.defaultdict(template.default_factory, items)
        if isinstance(template, collections.OrderedDict):
            ordered = collections.OrderedDict(items)
            if hasattr(template, "_metadata"):
                ordered._metadata = template._metadata  # type: ignore[attr-defined]  # as torch.nn.Module does
            return ordered
        return items
    if isinstance(value, list | tuple):
        if isinstance(template, set | frozenset):
            return type(template)(value)
        if isinstance(template, collections.deque):
            return collections.deque(value, template.maxlen)
        if isinstance(template, list | tuple) and len(template) == len(value):
            items_ = [like(known, item) for known, item in zip(template, value, strict=True)]
        else:
            items_ = [like(None, item) for item in value]
        if isinstance(template, tuple) and hasattr(template, "_fields"):
            return type(template)(*items_)
        return type(value)(items_)
    if isinstance(template, numpy.ndarray) and isinstance(value, torch.Tensor):
        return value.cpu().numpy().astype(template.dtype)
    if isinstance(template, numpy.generic) and isinstance(value, bool | int | float | complex | str):
        return template.dtype.type(value)
    return value
