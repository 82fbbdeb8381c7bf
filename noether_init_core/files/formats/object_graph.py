"""An object that was read: where its tensors are, and whether it may be handed out.

An object may share parts (pickle writes each part once), so that a few hundred bytes can stand for a tree of
billions. What is handed out is limited as a tree, since that is how everybody walks over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from noether_init_core.files.formats.builders import OpcodeError
from noether_init_core.files.formats.inert_values import ForeignObject, RefusedTensor, StorageRef
from noether_init_core.files.tensor_info import TensorInfo
from noether_init_core.files.tensor_names import children, join, named

__all__ = ["MAX_DEPTH", "ObjectGraph", "dotted"]

MAX_DEPTH = 128
_CONTAINERS = frozenset({dict, list, tuple, ForeignObject})
_UNREADABLE = frozenset({RefusedTensor, StorageRef})


class ObjectGraph:
    """Tensors and foreign objects in an object; ``size`` are the bytes of the header behind it.

    ``problems``: path -> why, of tensors that cannot be read. ``foreign``: name of a class -> path of its first object.

    Raises ``OpcodeError`` for an object that contains itself, or is too deep or too large as a tree.
    """

    def __init__(self, root: Any, size: int) -> None:
        self.problems: dict[str, str] = {}
        self.foreign: dict[str, str] = {}
        self._largest = 1_000_000 + 20 * size
        self._most_tensors = 10_000 + size
        # id -> (values in the tree below, tensors in it); None while it is being looked at
        self._seen: dict[int, tuple[int, int] | None] = {}
        self._visit(root, (), 0)

    def tensors(self, parts: Mapping[Any, Any]) -> dict[str, TensorInfo]:
        """Dotted path -> tensor, in parts of the object. Of two equal paths the second gets ``#2``, and so on."""
        return named(parts, TensorInfo, self._holds_tensors)

    def count(self, value: Any) -> int:
        """Tensors below a part of the object; a tensor in the place of a part counts as none."""
        return (self._seen.get(id(value)) or (0, 0))[1] if type(value) in _CONTAINERS else 0

    def _holds_tensors(self, value: Any) -> bool:
        return self.count(value) > 0

    def _visit(self, value: Any, path: tuple[Any, ...], depth: int) -> tuple[int, int]:
        kind = type(value)
        if kind is TensorInfo:
            return 1, 1
        if kind in _UNREADABLE:
            reason = value.reason if kind is RefusedTensor else "it is a bare storage; store a tensor instead"
            self.problems.setdefault(dotted(path), reason)
            return 1, 0
        if kind not in _CONTAINERS:
            return 1, 0
        known = self._seen.get(id(value), (0, 0))
        if known is None:
            raise OpcodeError(f"its object contains itself at {dotted(path)[:200]!r}")
        if known[0]:
            return known
        if depth == MAX_DEPTH:
            raise OpcodeError(f"its object is nested deeper than {MAX_DEPTH}")
        if kind is ForeignObject:
            self.foreign.setdefault(value.name, dotted(path))
        self._seen[id(value)] = None
        values, tensors = 1, 0
        for key, child in children(value):
            child_kind = type(child)
            if child_kind is TensorInfo:
                values += 1
                tensors += 1
            elif child_kind in _CONTAINERS or child_kind in _UNREADABLE:
                more = self._visit(child, (*path, key), depth + 1)
                values += more[0]
                tensors += more[1]
            else:
                values += 1
        if values > self._largest or tensors > self._most_tensors:
            raise OpcodeError("its object repeats its parts so often that it is far larger than the file")
        self._seen[id(value)] = values, tensors
        return values, tensors


def dotted(path: Iterable[Any]) -> str:
    """The path as it is shown and asked for: ``state.0.exp_avg``."""
    name = ""
    for key in path:
        name = join(name, key)
    return name
