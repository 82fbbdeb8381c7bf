"""Nested values (mappings, lists, tuples): list their leaves, replace their leaves, compare them bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def leaves(value: Any) -> list[Any]:
    """Return every value in ``value`` that is not a mapping, list or tuple, in order; ``[value]`` for such a value."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    return [value] if items is None else [leaf for item in items for leaf in leaves(item)]


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a new value of the same structure in which ``change(leaf)`` replaces every leaf. Keys stay."""
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [mapped(item, change) for item in value]
    if isinstance(value, tuple):
        return tuple(mapped(item, change) for item in value)
    return change(value)


def equal(first: Any, other: Any) -> bool:
    """Whether two nested values have the same types, keys, dtypes, shapes and bits of tensors and NumPy arrays.

    Tensors on different devices are compared on the CPU. NaN equals NaN; in tensors, if the bits are the same.
    """
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        return first.keys() == other.keys() and all(equal(first[key], other[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(other, list | tuple):
        return (
            type(first) is type(other)
            and len(first) == len(other)
            and all(equal(one, two) for one, two in zip(first, other, strict=True))
        )
    if type(first) is not type(other):
        return False
    if hasattr(first, "untyped_storage"):
        import torch

        if first.dtype != other.dtype or first.shape != other.shape:
            return False
        # Conjugation and negation are lazy flags in torch: the bytes of a view with a flag are not its values.
        plain = (tensor.detach().resolve_conj().resolve_neg().cpu().contiguous() for tensor in (first, other))
        one, two = (tensor.reshape(-1).view(torch.uint8) for tensor in plain)
        return bool(torch.equal(one, two))
    if hasattr(first, "tobytes") and hasattr(first, "shape"):  # arrays of NumPy, for which == has no single result
        return bool(first.dtype == other.dtype and first.shape == other.shape and first.tobytes() == other.tobytes())
    return first is other or bool(first == other) or bool(first != first and other != other)
