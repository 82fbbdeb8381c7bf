"""The content of a file: the object in it, where its tensors and trees are, and which bytes are verified together.

An object may share parts (pickle writes each part once), so that a few hundred bytes can stand for a tree of
billions. What is handed out is limited as a tree, since that is how everybody walks over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import attrs

from noether_init_core.errors import CheckpointFormatError
from noether_init_core.files.tensor_info import TensorInfo
from noether_init_core.messages import one_line


class OpcodeError(Exception):
    """The pickle of a file is damaged or does what torch.save does not do; the message says what."""


@attrs.frozen
class Record:
    """One stretch of bytes: its name in the file, its place, and its CRC-32 if it has one."""

    name: str
    offset: int
    size: int
    crc: int | None


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


T = TypeVar("T")

#: The last name of a module's extra state in a state dict.
EXTRA_STATE = "_extra_state"


def children(value: Any) -> Iterable[tuple[Any, Any]]:
    """Key or position, and value, of what a container holds. Members of a set are no tensors and have none."""
    if isinstance(value, dict):
        return value.items()
    if type(value) is ForeignObject:
        return (("args", value.args), ("state", value.state), ("items", value.items))
    return enumerate(value)


def join(path: str, key: Any) -> str:
    """The path of what stands under ``key`` in what ``path`` leads to."""
    text = key if type(key) is str else repr(key)
    return f"{path}.{text}" if path else text


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def named(parts: Mapping[Any, Any], kind: type[T], is_searched: Callable[[Any], bool] = _is_container) -> dict[str, T]:
    """Dotted path -> every value of ``kind`` in ``parts``, in their order. Of two equal paths the second gets ``#2``.

    What is written and what is read is named by this one function, since a manifest lists tensors by these names: the
    writer has tensors in its object, the reader descriptions of them. ``is_searched``: whether a value may hold some.
    """
    found: dict[str, T] = {}
    for key, value in parts.items():
        _collect(value, join("", key), kind, is_searched, found)
    return found


def _collect(value: Any, path: str, kind: type[T], is_searched: Callable[[Any], bool], found: dict[str, T]) -> None:
    if isinstance(value, kind):
        name, number = path, 1
        while name in found:
            number += 1
            name = f"{path}#{number}"
        found[name] = value
    elif is_searched(value):
        for key, child in children(value):
            _collect(child, join(path, key), kind, is_searched, found)


def state_dict_of(value: Any, kind: type[Any]) -> dict[Any, Any] | None:
    """The state dict of a file: under the key of that name, or the whole object; None where there is none.

    Its tensors are named by its own keys, which must be texts, and all others in the file not at all.
    """
    if not isinstance(value, dict):
        return None
    state_dict = value.get("state_dict")
    if isinstance(state_dict, dict):
        return state_dict
    return value if is_state_dict(value, kind) else None


def is_state_dict(value: Any, kind: type[Any]) -> bool:
    """Whether it is a dict of tensors under texts, at least one, with nothing else than extra state beside them."""
    return (
        isinstance(value, dict)
        and any(isinstance(child, kind) for child in value.values())
        and all(
            type(key) is str and (isinstance(child, kind) or key.rpartition(".")[2] == EXTRA_STATE)
            for key, child in value.items()
        )
    )


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


#: The attribute of a state dict.
METADATA = "_metadata"

#: Path of a module, without a dot at its end -> what it says of its state, such as ``{"version": 2}``.
Versions = Mapping[str, Mapping[str, Any]]

_SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None)})


def versions_in(attached: Iterable[tuple[dict[Any, Any], Any]], size: int) -> dict[int, Versions]:
    """Id of a dict -> the versions that were attached to it; ``size`` are the bytes of the pickle.

    A file may attach one object to many dicts, so each is looked at once. Raises ``OpcodeError`` for ``_metadata`` that
    is no dict of dicts of plain values: torch could not use it either.
    """
    versioned = [(owner, state[METADATA]) for owner, state in attached if type(state) is dict and METADATA in state]
    ObjectGraph([metadata for _owner, metadata in versioned], size)
    screened: dict[int, Versions] = {}
    plain: set[int] = set()
    for _owner, metadata in versioned:
        if id(metadata) not in screened:
            wrong = not_plain(metadata, plain)
            if wrong is not None:
                raise OpcodeError(f"the _metadata of a state dict says of {wrong:.80} something else than plain values")
            screened[id(metadata)] = MappingProxyType(metadata)
    return {id(owner): screened[id(metadata)] for owner, metadata in versioned}


def not_plain(metadata: Any, known: set[int]) -> str | None:
    """The first module of which it is not a dict of plain values that is said; None where all is well.

    ``known``: ids of containers that were found plain before.
    """
    if not isinstance(metadata, dict):
        return "all modules"
    return next(
        (
            repr(path)
            for path, said in metadata.items()
            if type(path) is not str or not isinstance(said, dict) or not _is_plain(said, known)
        ),
        None,
    )


def _is_plain(value: Any, known: set[int]) -> bool:
    """Whether it is made of dicts, lists, tuples and scalars; ``known`` are the containers that were looked at."""
    if type(value) in _SCALARS:
        return True
    if not isinstance(value, dict | list | tuple):
        return False
    if id(value) not in known:
        if isinstance(value, dict) and not all(type(key) in _SCALARS for key in value):
            return False
        if not all(_is_plain(child, known) for _key, child in children(value)):
            return False
        known.add(id(value))
    return True


@attrs.frozen(eq=False)
class Content:
    """A screened file, before bytes of its tensors are read.

    Attributes:
        format: Which format it is.
        value: The object, plain Python, with ``TensorInfo`` in the place of tensors.
        graph: Where tensors are in ``value``.
        records: All bytes that carry values, in their order; each has a checksum, or none of them.
        versions: Id of a dict in ``value`` -> the versions of modules that are attached to it.
        metadata: What the file says besides ``value``; None where ``value`` is all.
    """

    format: Literal["torch", "safetensors"]
    value: Any
    graph: ObjectGraph
    records: Mapping[str, Record]
    versions: Mapping[int, Versions] = attrs.Factory(dict)
    metadata: Mapping[str, str] | None = None


@attrs.frozen(eq=False)
class Tree:
    """One tree: its tensors by key, its other entries where it is a state dict, and what lies beside it in the file."""

    name: str
    tensors: Mapping[str, TensorInfo]
    extra_state: Mapping[str, Any]
    beside: Mapping[Any, Any]
    versions: Versions


class Trees:
    """The trees of one file. An empty name means the whole object."""

    def __init__(self, content: Content, path: Path) -> None:
        self._content = content
        self._path = path
        root = content.value
        self._own = state_dict_of(root, TensorInfo)
        self._is_below = self._own is not None and self._own is not root
        self._parts: Mapping[Any, Any] = root if type(root) is dict else {"object": root}
        self._found = {
            key: child
            for key, child in (root.items() if type(root) is dict else ())
            if type(key) is str and key and (content.graph.count(child) or (self._is_below and child is self._own))
        }

    @property
    def counts(self) -> dict[str, int]:
        """Name -> number of tensors; the empty name counts those that lie in no other tree."""
        found = {name: self._content.graph.count(tree) for name, tree in self._found.items()}
        outside = self._content.graph.count(self._content.value) - sum(found.values())
        return {"": outside, **found} if outside or not found else found

    def value(self, name: str) -> Any:
        """The tree of that name. Raises ``KeyError`` for a name that does not exist."""
        return self._found[name] if name else self._content.value

    def tensors(self, name: str) -> Mapping[str, TensorInfo]:
        """A state dict's tensors by its own keys, those of another tree by dotted paths in it. Raises ``KeyError``."""
        tree = self.value(name)
        return tree if is_state_dict(tree, TensorInfo) else self._dotted(name)

    def select(self, entry: str | None) -> Tree:
        """The tree that is meant; None: the state dict, else everything. Raises ``KeyError``."""
        name = entry if entry is not None else "state_dict" if self._is_below else ""
        tree = self.value(name)
        beside = {key: child for key, child in self._parts.items() if key != name} if name else self._parts
        has_tensors = type(tree) is dict and any(type(child) is TensorInfo for child in tree.values())
        if not (name and has_tensors) and (self._own is None or tree is not self._own):
            return Tree(name, MappingProxyType(self._dotted(name)), {}, beside, {})
        wrong = next((key for key in tree if type(key) is not str), None)
        if wrong is not None:
            raise CheckpointFormatError(
                f"{self._path} cannot be read as a checkpoint: its state dict has the key {one_line(repr(wrong))}, "
                "which is no text. Next: write it again with torch.save(state_dict, path)",
                path=self._path,
            )
        tensors = {key: child for key, child in tree.items() if type(child) is TensorInfo}
        others = {key: child for key, child in tree.items() if key not in tensors}
        versions = self._content.versions.get(id(tree), {})
        return Tree(name, MappingProxyType(tensors), others, beside if name else {}, versions)

    def _dotted(self, name: str) -> dict[str, TensorInfo]:
        return self._content.graph.tensors(dict(children(self._found[name])) if name else self._parts)
