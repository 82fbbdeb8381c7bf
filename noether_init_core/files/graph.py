"""A walk over the object in a file: the tensors that can be read, and the inert parts that are refused when asked for.

An object may share parts, because pickle writes each part once. So a few hundred bytes can describe a tree of billions
of values. The limits count values of the tree, because callers walk over it as a tree. Inert parts count, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

from noether_init_core.errors import type_of
from noether_init_core.files.content import (
    METADATA,
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
    length_of,
    named,
    place_of,
)
from noether_init_core.files.handed import Handed
from noether_init_core.files.limits import PLACES
from noether_init_core.messages import listed, one_line

MAX_DEPTH = 128
#: Number of damaged tensors that are looked at for a message.
_MOST_DAMAGED = 100
_CONTAINERS = frozenset({dict, list, tuple, ForeignObject})
_SETS = frozenset({set, frozenset})
#: Types of values with parts, or with a reason to refuse them.
_PARTS = frozenset({*_CONTAINERS, *_SETS, RefusedTensor, StorageRef, ForeignName, TensorKey})
_WALKED = _PARTS | {TensorInfo}
#: Types of values that hold something; a name does not.
_HOLDING = _WALKED - {ForeignName}
#: Most values of a part whose findings are not remembered.
_FEW = 8
_PLAIN_KEYS = frozenset({str, int})
_CYCLE = "it contains itself"
_DEEP = f"it is nested deeper than {MAX_DEPTH}"
_REPEATS = "its object repeats shared parts so often that its tree is far larger than the file"

#: Of a tree: number of values, number of tensors, height, and whether a part is unread.
#: And the number of letters in the dotted names of its tensors.
Found = tuple[int, int, int, bool, int]
_UNKNOWN: Found = 0, 0, 0, False, 0


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
        attached: Dicts with attributes that were set on them.
        marred: Id of a dict -> why it cannot be read.
        foreign_keyed: Dicts with keys of foreign classes. Such a key may equal another, so the dicts are unread.
        handed: What the file hands to foreign code.

    Raises ``OpcodeError`` for an object that is too large as a tree, and for a tensor that contradicts the file.
    """

    def __init__(
        self,
        root: Any,
        size: int,
        names: Collection[str] = (),
        attached: Sequence[tuple[dict[Any, Any], Any]] = (),
        marred: Mapping[int, str] | None = None,
        foreign_keyed: Sequence[dict[Any, Any]] = (),
        handed: Handed | None = None,
    ) -> None:
        self._names = names
        self._handed = handed
        self._marred = dict(marred or {})
        self._owners = root, attached, foreign_keyed  # kept alive, because parts are known by their ids
        self._foreign_keys = {id(one): name for one in foreign_keyed for name in self._names_of_keys(one)}
        self._attached: dict[int, list[Any]] = {}
        for owner, state in attached:
            self._attached.setdefault(id(owner), []).append(state)
        self._largest = 1_000_000 + 20 * size
        self._most_tensors = 10_000 + size
        self._places, self._most_places, self._size = 0, PLACES.of(size), size
        self._most_letters = (4 << 20) + 16 * size
        self._damaged: dict[str, str] = {}
        # Id -> the findings; None while it is being visited, which detects cycles.
        self._seen: dict[int, Found | None] = {}
        self._weights: dict[int, int | None] = {}
        self._equal: dict[Found, Found] = {}  # equal findings are kept once
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
                name = value.name if is_foreign else self._foreign_keys.get(id(value), "")
                yield path, value, Unread(name, reason)
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

    def calls_on(self, value: Any, *, are_weights: bool = True, is_whole: bool = False) -> dict[str, str]:
        """Return foreign name -> what the file lets it do with a part of ``value``: it could change it.

        ``are_weights``: dicts and lists are looked for also in states and items of foreign objects. ``is_whole``: all
        of ``value`` is asked for, not only what holds tensors.
        """
        handed = self._handed
        if handed is None or not handed.made:
            return {}
        found: dict[str, str] = {}
        met: set[int] = set()
        for one, is_named in self._readable(value, is_whole):
            taken = handed.to(self.walk, one, are_weights and is_named)
            if taken is not None:
                foreign, how = taken
                found |= dict.fromkeys(self.names_in(foreign, met), how) or ({} if found else {foreign.name: how})
        return found

    def names(self) -> Collection[str]:
        """Return the foreign names of the file that were not allowed, also of what it drops."""
        return self._names

    def _readable(self, value: Any, is_whole: bool) -> Iterator[tuple[Any, bool]]:
        """Yield ``value``, the containers with tensors, and the tensors, that are listed of it; each at most twice.

        With each comes whether only texts and positions lead to it, not other keys: the state of an optimizer has its
        parameters by number, and shares these dicts with the optimizer itself. Unread parts are left out, and so is
        a ``_metadata`` among the keys of ``value``.
        """
        met: tuple[set[int], set[int]] = set(), set()
        stack = [(value, True)]
        while stack:
            one, is_named = stack.pop()
            if id(one) in met[True] or id(one) in met[is_named]:
                continue
            is_listed = type(one) is TensorInfo or self.count(one) or (is_whole and not self._reason(one))
            if one is value or is_listed:
                met[is_named].add(id(one))
                yield one, is_named
                if type(one) in _CONTAINERS:
                    parts = self._parts(one) if is_whole else children(one)
                    is_dict = type(one) is dict
                    stack += [
                        (child, is_named and not (is_dict and type(key) is not str))
                        for key, child in parts
                        if type(child) in _WALKED and not (one is value and key == METADATA)
                    ]

    def _names_of_keys(self, keys: Iterable[Any]) -> list[str]:
        """Return the first foreign name among keys that are foreign, or tuples with something foreign."""
        for key in keys:
            if type(key) in (ForeignName, ForeignObject) and key.name in self._names:
                return [key.name]
            inner = key.key if type(key) is TensorKey else key
            found = self._names_of_keys(inner) if type(inner) in (tuple, frozenset) else []
            if found:
                return found
        return []

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
        foreign = self._foreign_keys.get(id(value)) if kind is dict else None
        return f"a key of it is of {foreign}" if foreign else self._marred.get(id(value), "")

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
            return self._weigh(value, path), 0, 0, True, 0
        known = self._seen.get(id(value), _UNKNOWN)
        if known is None:
            self._marred[id(value)] = _CYCLE
            return 1, 0, 0, True, 0
        if depth + known[2] >= MAX_DEPTH:
            if known[0]:
                raise OpcodeError(_DEEP)
            self._marred[id(value)] = _DEEP
            return self._weigh(value, path), 0, 0, True, 0
        if known[0]:
            return known
        self._seen[id(value)] = None
        values, tensors, height, is_spoiled, letters = 1, 0, 0, False, 0
        for key, child in self._parts(value):
            if type(child) in _PARTS:
                self._places += 1
                if self._places > self._most_places:
                    raise PLACES.error(self._size)
                if type(child) is StorageRef or (type(child) is RefusedTensor and not child.is_damaged):
                    values, is_spoiled = values + 1, True
                    continue
                if depth + 2 < MAX_DEPTH and (small := self._small(child)) is not None:
                    values += small[0]
                    height = max(height, small[1])
                    is_spoiled |= small[1] == 0
                    continue
                of_child = self._visit(child, (*path, key), depth + 1)
                values += of_child[0]
                tensors += of_child[1]
                height = max(height, of_child[2])
                is_spoiled |= of_child[3]
                if of_child[1]:
                    letters += of_child[4] + of_child[1] * (length_of(key) + 1)
            else:  # a fast path: most children are tensors and plain values, and a call costs more than this
                values += 1
                if type(child) is TensorInfo:
                    tensors += 1
                    letters += (len(key) if type(key) is str else length_of(key)) + 1
        if values > self._largest or tensors > self._most_tensors:
            raise OpcodeError(_REPEATS)
        if letters > self._most_letters:
            raise OpcodeError("the dotted names of its tensors are far longer than the file")
        if self._is_cyclic(value):
            tensors, is_spoiled = 0, True
        found = values, tensors, height + 1, is_spoiled, letters
        self._seen[id(value)] = found = self._equal.setdefault(found, found)
        return found

    def _small(self, value: Any) -> tuple[int, int] | None:
        """Return number of values and height of a part with few and only plain ones; None for another part.

        It is not remembered: to look again takes less time and memory. The height of an unread part is 0.
        """
        kind, height, parted = type(value), 1, _WALKED
        if kind is dict:
            if len(value) > _FEW or not _PLAIN_KEYS.issuperset(map(type, value)) or id(value) in self._attached:
                return None
            parts = value.values()
        elif kind is list or kind is tuple:
            parts = value
        elif kind is ForeignObject and value.state is None and value.items is None:
            parts = value.args
            # An unread part may also hold names.
            height, parted = (0, _HOLDING) if value.name in self._names else (2, _WALKED)
        else:
            return None
        if len(parts) > _FEW or not parted.isdisjoint(map(type, parts)) or id(value) in self._marred:
            return None
        return len(parts) + (4 if kind is ForeignObject else 1), height

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
                if type(value) is RefusedTensor and value.is_damaged and len(self._damaged) < _MOST_DAMAGED:
                    self._damaged.setdefault(place_of(path), value.reason)
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
