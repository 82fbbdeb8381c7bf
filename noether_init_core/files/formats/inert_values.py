"""Inert values that stand for what a file names but the reader never imports or calls."""

from __future__ import annotations

from typing import Any

import attrs

__all__ = ["ForeignObject", "GlobalName", "RefusedTensor", "StorageRef"]


@attrs.frozen
class GlobalName:
    """A class, function or dtype that the file names as a value, e.g. ``GlobalName("torch.bfloat16")``."""

    name: str


@attrs.define(eq=False)
class ForeignObject:
    """An object of a class that is known by name only: what it would have been built from.

    ``args`` are those of its constructor, ``state`` what would have been given to ``__setstate__``, ``items`` the
    content where the class is a kind of list or dict. ``torch.device`` is read as such a record, too.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] | dict[Any, Any] | None = None


@attrs.frozen
class StorageRef:
    """The storage behind tensors: a record of the file. ``dtype`` is None where the storage has none of its own."""

    record: str
    offset: int
    nbytes: int
    dtype: str | None


@attrs.frozen
class RefusedTensor:
    """A tensor that cannot be read; it stays in its place until its key is known."""

    reason: str
