"""A walk over the object in a file: the tensors that can be read, and the inert parts that are refused when asked for.

An object may share parts, because pickle writes each part once. So a few hundred bytes can describe a tree of billions
of values. The limits count values of the tree, because callers walk over it as a tree. Inert parts count, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

from noether_init_core.errors import type_of
from noether_init_core.files.content import (
    ForeignName,
    ForeignObject,
    OpcodeError,
    Record,
    RefusedTensor,
    StorageRef,
    TensorInfo,
    TensorKey,
    Versions,
    children,
    dotted,
    named,
)
from noether_init_core.messages import listed, one_line

MAX_DEPTH = 128
_CONTAINERS = frozenset({dict, list, tuple, ForeignObject})
_SETS = frozenset({set, frozenset})
#: Types of values with parts, or with a reason to refuse them.
_PARTS = frozenset({*_CONTAINERS, *_SETS, RefusedTensor, StorageRef, ForeignName, TensorKey})
_WALKED = _PARTS | {TensorInfo}
_CYCLE = "it contains itself"
_DEEP = f"it is nested deeper than {MAX_DEPTH}"
_REPEATS = "its object repeats shared parts so often that its tree is far larger than the file"

#: Of a tree: number of values, number of tensors, height, and whether a part is unread.
Found = tuple[int, int, int, bool]
_UNKNOWN: Found = 0, 0, 0, False


@attrs.frozen
class Unread:
    """A part of a file that was skipped. ``foreign``: its name, if it is an object of a foreign class; else empty.

    ``reason`` is shown where somebody asks for the part; ``tensors`` is the number of tensors inside it.
    """

    foreign: str
    reason: str
    tensors: int = 0

    def __str__(self) -> str:
        inside = f", with {self.tensors} tensor{'s' if self.tensors > 1 else ''}" if self.tensors else ""
        return f"{self.foreign or self.reason}{inside}"


class ObjectGraph:
    """The tensors in an object; ``size`` is the number of bytes of the header that describes it.

    A part that is foreign, contains itself, is nested too deep, or is a tensor that cannot be read, is *unread*: its
    tensors are not listed, and a caller that asks for a value with such a part gets an error.

    Args:
        root: The object.
        size: Number of bytes of its header.
        names: Foreign names that were not allowed.
        calls: The records of calls of names that are not known, also of calls whose result the file drops.
        attached: Dicts with attributes that were set on them.
        marred: Id of a dict -> why it cannot be read.

    Raises ``OpcodeError`` for an object that is too large as a tree, and for a tensor that contradicts the file.
    """

    def __init__(
        self,
        root: Any,
        size: int,
        names: Collection[str] = (),
        calls: Sequence[ForeignObject] = (),
        attached: Sequence[tuple[dict[Any, Any], Any]] = (),
        marred: Mapping[int, str] | None = None,
    ) -> None:
        self._names = names
        self._calls = calls
        self._marred = dict(marred or {})
        self._owners = root, attached  # kept alive, because parts are known by their ids
        self._attached: dict[int, list[Any]] = {}
        for owner, state in attached:
            self._attached.setdefault(id(owner), []).append(state)
        self._largest = 1_000_000 + 20 * size
        self._most_tensors = 10_000 + size
        self._damaged: dict[str, str] = {}
        # Id -> the findings; None while it is being visited, which detects cycles.
        self._seen: dict[int, Found | None] = {}
        self._weights: dict[int, int | None] = {}
        if type(root) in _PARTS:
            self._visit(root, (), 0)
        if self._damaged:
            raise OpcodeError(
                listed((f"{one_line(at)}: {why}" for at, why in self._damaged.items()), 10, separator="; ")
            )

    # What can be read.

    def tensors(self, parts: Mapping[Any, Any]) -> dict[str, TensorInfo]:
        """Return dotted path -> tensor in parts of the object; the second of two equal paths gets ``#2``."""
        return named(parts, TensorInfo, self.count)

    def count(self, value: Any) -> int:
        """Return the number of tensors below a part of the object; 0 for a part that is unread or itself a tensor."""
        return (self._seen.get(id(value)) or (0, 0))[1] if type(value) in _CONTAINERS else 0

    # What cannot.

    def is_spoiled(self, value: Any) -> bool:
        """Whether a part of the object is unread, or has an unread part below."""
        return type(value) in _PARTS and ((self._seen.get(id(value)) or _UNKNOWN)[3] or self.is_unread(value))

    def unread(self, value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Unread]]:
        """Yield path, part, and reason of every unread part of ``value``; parts below an unread one are left out."""
        met: set[int] = set()
        stack: list[tuple[tuple[Any, ...], Iterator[tuple[Any, Any]]]] = [(path, iter([(None, value)]))]
        while stack:
            above, parts = stack[-1]
            key, value = next(parts, (_UNKNOWN, None))
            if key is _UNKNOWN:
                stack.pop()
                continue
            path = above if key is None and len(stack) == 1 else (*above, key)
            reason = self._reason(value)
            if reason:
                is_foreign = type(value) in (ForeignObject, ForeignName) and value.name in self._names
                yield path, value, Unread(value.name if is_foreign else "", reason)
            elif self.is_spoiled(value) and id(value) not in met:
                met.add(id(value))
                stack.append((path, self._parts(value)))

    def is_unread(self, value: Any) -> bool:
        """Whether a part of the object is itself unread."""
        return bool(self._reason(value))

    def names_in(self, value: Any, met: set[int] | None = None) -> list[str]:
        """Return the foreign names in a part of the object, in order, also those inside of unread parts."""
        found: dict[str, None] = {}
        for one in self.walk(value, met):
            if type(one) in (ForeignObject, ForeignName) and one.name in self._names:
                found[one.name] = None
        return list(found)

    def walk(self, value: Any, met: set[int] | None = None) -> Iterator[Any]:
        """Yield every part of ``value`` once, depth first, also inside of unread parts.

        ``met``: ids of parts that were walked before; ids are added.
        """
        met = set() if met is None else met
        stack = [value]
        while stack:
            one = stack.pop()
            if id(one) not in met:
                met.add(id(one))
                yield one
                stack += reversed([part for _key, part in self._parts(one) if type(part) in _WALKED])

    def calls_on(self, value: Any) -> list[str]:
        """Return the foreign names that the file calls with a part of ``value``: they could change it.

        A part is a container or a tensor of the tree that can be read, as one object.
        """
        asked = {id(one) for one in self._readable(value)} if self._calls else set()
        found: dict[str, None] = {}
        met: set[int] = set()  # a part is walked once for all calls
        for call in self._calls:
            if any(id(part) in asked for part in self.walk(call.args, met)):
                found.update(dict.fromkeys(self.names_in(call)))
        return list(found)

    def _readable(self, value: Any) -> Iterator[Any]:
        """Yield ``value``, and the containers with tensors, and the tensors, that are listed of it."""
        met: set[int] = set()
        stack = [value]
        while stack:
            one = stack.pop()
            if id(one) not in met and (one is value or type(one) is TensorInfo or self.count(one)):
                met.add(id(one))
                yield one
                stack += [child for _key, child in children(one)] if type(one) in _CONTAINERS else ()

    def _is_cyclic(self, value: Any) -> bool:
        return self._marred.get(id(value)) is _CYCLE

    def _reason(self, value: Any) -> str:
        """Return why a part is unread; empty for a part that can be read, whatever is below."""
        kind = type(value)
        if kind is ForeignObject or kind is ForeignName:
            if value.name in self._names:
                return f"it is an object of {value.name}" if kind is ForeignObject else f"it is {value.name}"
        elif kind is RefusedTensor:
            return str(value.reason)
        elif kind is StorageRef:
            return "it is a bare storage; store a tensor instead"
        elif kind is TensorKey:
            return f"a key is {type_of(value.key)}"
        return self._marred.get(id(value), "")

    def _parts(self, value: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (key, part) of a container; of a dict also the keys that are inert, and what was set on it."""
        kind = type(value)
        if kind is dict:
            for key, child in value.items():
                if type(key) is not str and self._is_inert_key(key):
                    yield "key", key
                yield key, child
            for state in self._attached.get(id(value), ()):
                yield "__dict__", state
        elif kind in _CONTAINERS or kind in _SETS:
            yield from enumerate(value) if kind in _SETS else children(value)
        elif kind is TensorKey:
            yield "key", value.key

    def _is_inert_key(self, key: Any) -> bool:
        return type(key) in (ForeignName, ForeignObject, TensorKey) or (
            type(key) in (tuple, frozenset) and any(map(self._is_inert_key, key))
        )

    # The visit.

    def _visit(self, value: Any, path: tuple[Any, ...], depth: int) -> Found:
        """Return what is below ``value``, as far as it can be read."""
        if self._reason(value):
            return self._weigh(value, path), 0, 0, True
        known = self._seen.get(id(value), _UNKNOWN)
        if known is None:
            self._marred[id(value)] = _CYCLE
            return 1, 0, 0, True
        if depth + known[2] >= MAX_DEPTH:
            if known[0]:
                raise OpcodeError(_DEEP)
            self._marred[id(value)] = _DEEP
            return self._weigh(value, path), 0, 0, True
        if known[0]:
            return known
        self._seen[id(value)] = None
        values, tensors, height, is_spoiled = 1, 0, 0, False
        for key, child in self._parts(value):
            if type(child) in _PARTS:
                of_child = self._visit(child, (*path, key), depth + 1)
                values += of_child[0]
                tensors += of_child[1]
                height = max(height, of_child[2])
                is_spoiled |= of_child[3]
            else:  # a fast path: most children are tensors and plain values, and a call costs more than this
                values += 1
                tensors += type(child) is TensorInfo
        if values > self._largest or tensors > self._most_tensors:
            raise OpcodeError(_REPEATS)
        if self._is_cyclic(value):
            tensors, is_spoiled = 0, True
        self._seen[id(value)] = found = values, tensors, height + 1, is_spoiled
        return found

    def _weigh(self, root: Any, path: tuple[Any, ...]) -> int:
        """Return the number of values in the tree below an unread part; a part that contains itself ends there."""
        weights = self._weights
        frames: list[list[Any]] = [[root, self._parts(root), 1]]
        while True:
            value, parts, _total = frame = frames[-1]
            for _key, child in parts:
                known = weights.get(id(child), 0) if type(child) in _PARTS else 1
                if known == 0:
                    weights[id(child)] = None
                    frames.append([child, self._parts(child), 1])
                    break
                frame[2] += known or 1
            else:
                if type(value) is RefusedTensor and value.is_damaged:
                    self._damaged.setdefault(dotted(path), value.reason)
                total = frame[2]
                if total > self._largest:
                    raise OpcodeError(_REPEATS)
                weights[id(value)] = total
                frames.pop()
                if not frames:
                    return int(total)
                frames[-1][2] += total


@attrs.frozen(eq=False)
class Content:
    """A screened file, before bytes of its tensors are read.

    Attributes:
        format: Name of the format.
        value: The object as plain Python, with ``TensorInfo`` in place of tensors.
        graph: Index of the tensors in ``value``.
        records: All ranges of bytes that hold values, in the order of the file. Either all have a checksum, or no
            record has one.
        versions: Id of a dict in ``value`` -> the versions of modules that are attached to it.
        metadata: The texts beside ``value``; None for a format without them.
    """

    format: Literal["torch", "safetensors"]
    value: Any
    graph: ObjectGraph
    records: Mapping[str, Record]
    versions: Mapping[int, Versions] = attrs.Factory(dict)
    metadata: Mapping[str, str] | None = None
