"""A look over an object that was read: where its tensors are, and whether it may be handed out.

An object may share parts (pickle writes each part once), so that a few hundred bytes can stand for a tree of
billions. What is handed out is limited as a tree, since that is how everybody walks over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from noether_init_core.checkpoints.builders import OpcodeError
from noether_init_core.checkpoints.tensor_info import TensorInfo
from noether_init_core.checkpoints.values import ForeignObject, RefusedTensor, StorageRef

__all__ = ["MAX_DEPTH", "Survey", "children"]

MAX_DEPTH = 128
_CONTAINERS = frozenset({dict, list, tuple, ForeignObject})
_UNREADABLE = frozenset({RefusedTensor, StorageRef})


class Survey:
    """What was found; ``size`` are the bytes of the pickle behind the object.

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
        found: dict[str, TensorInfo] = {}
        for key, value in parts.items():
            self._collect(value, dotted((key,)), found)
        return found

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

    def _collect(self, value: Any, path: str, found: dict[str, TensorInfo]) -> None:
        if type(value) is TensorInfo:
            name, number = path, 1
            while name in found:
                number += 1
                name = f"{path}#{number}"
            found[name] = value
        elif type(value) in _CONTAINERS and (self._seen[id(value)] or (0, 0))[1]:
            for key, child in children(value):
                if type(child) is TensorInfo or type(child) in _CONTAINERS:
                    self._collect(child, _join(path, key), found)


def children(value: Any) -> Iterable[tuple[Any, Any]]:
    """Key or position, and value, of what a container holds. Members of a set are no tensors and have none."""
    if type(value) is dict:
        return value.items()
    if type(value) is ForeignObject:
        return (("args", value.args), ("state", value.state), ("items", value.items))
    return enumerate(value)


def dotted(path: Iterable[Any]) -> str:
    """The path as it is shown and asked for: ``state.0.exp_avg``."""
    name = ""
    for key in path:
        name = _join(name, key)
    return name


def _join(path: str, key: Any) -> str:
    text = key if type(key) is str else repr(key)
    return f"{path}.{text}" if path else text
