"""The state of a run over pickle opcodes, and the opcodes that torch.save writes rarely: each has a method.

``opcodes`` has the loop, and the opcodes that make up nearly all of a state dict.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from noether_init_core.errors import type_of
from noether_init_core.files.content import ForeignName, ForeignObject, GlobalName, OpcodeError, Record
from noether_init_core.files.formats.builders import KNOWN_NAMES, Scope, add_members, set_items
from noether_init_core.files.limits import FOREIGN, NAMES, OBJECTS

#: Limit of the bytes of an integer; Python refuses str() of much longer ones, because it takes quadratic time.
_LONGEST_INTEGER = 1024
_LONGEST_NAME = 512
#: pickle numbers memoized objects one by one, some writers from 1. The numbers are positions in a list, so that those
#: which a file leaves out take memory, too.
_MOST_LEFT_OUT = 1024
ABSENT = object()
#: Memory of an empty set, and of what the first items add to a dict, in empty lists.
_SET = 4
_FILLED = 2
#: Attributes of the dicts that a file may make; an own one of these names would stand in its place.
_ATTRIBUTES_OF_DICTS = frozenset({*dir(OrderedDict()), *dir(Counter()), *dir(defaultdict())})
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_OLD_NAMES = {"builtins.xrange": "builtins.range", "builtins.unicode": "builtins.str", "builtins.long": "builtins.int"}

_LENGTH_8 = struct.Struct("<Q").unpack_from
_FLOAT_8 = struct.Struct(">d").unpack_from


def _is_simple(key: Any) -> bool:
    """Whether a key needs no check: a text, or a number that is its own hash."""
    return type(key) is str or (type(key) is int and 0 <= key < 1 << 32)


class RareOpcodes:
    """What a run over ``data.pkl`` has so far: stack, marks, memo and counts.

    ``records`` are the records of the file. After the run, ``unknown`` holds the names that are neither known nor in
    ``allowed``, in order of appearance. Records of these names must not be given to a caller.
    """

    def __init__(self, data: bytes, records: Mapping[str, Record], allowed: Collection[str] = ()) -> None:
        self.unknown: dict[str, None] = {}
        #: Dicts, each with the attributes that were set on it (``_metadata`` of state dicts), in order.
        self.attached: list[tuple[dict[Any, Any], Any]] = []
        #: The records of all objects that are not allowed, also of those that the file drops, in order.
        self.made: list[ForeignObject] = []
        #: Those of them whose making runs foreign code on their arguments.
        self.calls: list[ForeignObject] = []
        self._data = data
        self._records = records
        self._allowed = frozenset(allowed)
        self._scope = Scope(len(data))
        #: Dicts with keys of foreign classes.
        self.foreign_keyed = self._scope.foreign_keyed
        self._attached_sizes: list[int] = []
        #: Number of objects so far, in empty lists; and of those of foreign classes.
        self._objects = self._foreign_objects = 0
        self._most_objects, self._most_foreign = OBJECTS.of(len(data)), FOREIGN.of(len(data))
        self._position = 0
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: list[Any] = []
        self._left_out = 0
        self._names: dict[bytes, GlobalName] = {}

    def _memoize(self, number: int, value: Any) -> None:
        """Keep a part under a number that leaves out others."""
        left_out = number - len(self._memo)
        self._left_out += left_out
        if self._left_out > _MOST_LEFT_OUT:
            raise OpcodeError(f"data.pkl stores a part under the number {number}, far beyond those before")
        self._memo += [ABSENT] * left_out
        self._memo.append(value)

    # Names

    def _name(self, raw: bytes, module: str, name: str) -> None:
        known = self._names.get(raw)
        if known is None:
            full = f"{_OLD_MODULES.get(module, module)}.{name}"
            full = _OLD_NAMES.get(full, full)
            known = GlobalName(full)
            if full not in KNOWN_NAMES and full not in self._allowed and f"{module}.{name}" not in self._allowed:
                self.unknown[full] = None
                known = ForeignName(full)
            self._names[raw] = known
            if len(self._names) > NAMES.of(len(self._data)):
                raise NAMES.error(len(self._data), self._position)
        self._stack.append(known)

    def _global(self) -> None:
        data, position = self._data, self._position
        middle = data.find(b"\n", position, position + _LONGEST_NAME)
        stop = data.find(b"\n", middle + 1, middle + 1 + _LONGEST_NAME)
        if middle < 0 or stop < 0:
            raise OpcodeError(f"data.pkl has a name without end near byte {position}")
        self._position = stop + 1
        module, name = data[position:middle].decode("utf-8"), data[middle + 1 : stop].decode("utf-8")
        self._name(data[position:stop], module, name)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str or len(name) + len(module) > _LONGEST_NAME:
            raise OpcodeError("data.pkl has a name that is not a string, or is too long")
        self._name(f"{module}\n{name}".encode("utf-8", "surrogatepass"), module, name)

    def _foreign(self, name: str, args: tuple[Any, ...]) -> ForeignObject:
        if name in KNOWN_NAMES and not self._are_foreign(args):
            raise OpcodeError(f"data.pkl calls {name}, which torch.save never does")
        self._count_foreign()
        found = ForeignObject(name, args)
        if name not in self._allowed or self._are_foreign(args):
            self.made.append(found)
            is_method = name == "builtins.getattr" and len(args) == 2 and type(args[0]) is ForeignObject
            if not (is_method and type(args[1]) is str) and name != "functools.partial":
                self.calls.append(found)
        return found

    def _note_built(self, found: ForeignObject) -> None:
        """Note an object of a tensor subclass, and the call that makes its tensor."""
        self._count_foreign()
        for one in (found, *found.args[:1]):
            if type(one) is ForeignObject and one.name in self.unknown:
                self.made.append(one)
                self.calls.append(one)

    def _call(self, function: Any, args: Any) -> ForeignObject:
        """Record a call of an unknown name, or of an inert object such as the result of ``getattr``."""
        if type(args) is not tuple or type(function) not in (ForeignName, ForeignObject):
            raise OpcodeError("data.pkl calls something that is not a name")
        return self._foreign(*self._named(function, args))

    def _named(self, kind: GlobalName | ForeignObject, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        """Return the name for a record, and its arguments; an inert object that is called is one of them."""
        if type(kind) is not ForeignObject:
            return kind.name, args
        name = kind.name if kind.name.endswith("()") else f"{kind.name}()"
        if name not in self._allowed:
            self.unknown[name] = None
        return name, (kind, args)

    def _are_foreign(self, args: tuple[Any, ...]) -> bool:
        """Whether an argument, or an item of one, is inert, so that a call of a known name has an inert result."""
        for arg in args:
            parts = arg if type(arg) in (tuple, list) else (arg,)
            self._scope.charge(len(parts))
            if any(type(part) in (ForeignName, ForeignObject) for part in parts):
                return True
        return False

    def _new_object(self, keywords: object) -> None:
        args, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, GlobalName | ForeignObject) or type(args) is not tuple or type(keywords) is not dict:
            raise OpcodeError("data.pkl builds an object of something that is not a name")
        self._stack.append(self._foreign(*self._named(kind, (*args, keywords) if keywords else args)))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is ForeignObject:
            if target.state is not None:
                raise OpcodeError(f"data.pkl gives two states to one object of {target.name}")
            target.state = state
        elif type(target) is dict:
            self._count(_SET)
            if type(state) is not dict:
                raise OpcodeError(f"data.pkl gives {type_of(state)} as attributes to a dict")
            self._scope.charge(len(state))
            for name in state:
                if name in _ATTRIBUTES_OF_DICTS:
                    raise OpcodeError(f"data.pkl sets the attribute {name} of a dict, which all dicts have")
            self.attached.append((target, state))
            self._attached_sizes.append(len(state))
        else:
            raise OpcodeError(f"data.pkl gives a state to {type_of(target)}")

    # Containers

    def _count(self, weight: int = 1) -> None:
        self._objects += weight
        if self._objects > self._most_objects:
            raise OBJECTS.error(len(self._data), self._position)

    def _count_foreign(self) -> None:
        self._foreign_objects += 1
        if self._foreign_objects > self._most_foreign:
            raise FOREIGN.error(len(self._data), self._position)

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def _pop_last(self, count: int) -> list[Any]:
        items = self._stack[-count:]
        if len(items) < count:
            raise IndexError
        del self._stack[-count:]
        return items

    def _empty(self, container: Any, weight: int = 1) -> None:
        self._count(weight)
        self._stack.append(container)

    def _frozen_set(self) -> None:
        self._count(_SET)
        members: set[Any] = set()
        add_members(self._scope, members, self._pop_mark())
        self._stack.append(frozenset(members))

    def _target(self, kind: type, what: str) -> Any:
        """Return the container on the stack to fill; that of an inert object is created at the first item."""
        target = self._stack[-1]
        if type(target) is ForeignObject:
            if target.state is not None:  # pickle writes the state last
                raise OpcodeError(f"data.pkl gives items to an object of {target.name} after its state")
            if target.items is None:
                target.items = kind()
            target = target.items
        if type(target) is not kind:
            raise OpcodeError(f"data.pkl {what} {type_of(target)}")
        return target

    def _extend(self, items: list[Any]) -> None:
        self._target(list, "appends to").extend(items)

    def _add_items(self) -> None:
        items = self._pop_mark()
        if type(self._stack[-1]) is ForeignObject:
            self._extend(items)
            return
        if type(self._stack[-1]) is not set:
            raise OpcodeError(f"data.pkl adds members to {type_of(self._stack[-1])}")
        add_members(self._scope, self._stack[-1], items)

    def _update(self, items: list[Any]) -> None:
        target = self._target(dict, "sets an item of")
        self._count(_FILLED + len(items) // 4)
        if len(items) % 2:
            raise OpcodeError("data.pkl sets an item of a dict without a value")
        if len(items) == 2 and _is_simple(items[0]) and items[0] not in target:
            target[items[0]] = items[1]
            return
        expected = len(target) + len(items) // 2
        set_items(self._scope, target, items)
        if len(target) != expected:
            raise OpcodeError("data.pkl has a dict with one key twice")

    # Scalars, text and bytes

    def _protocol(self) -> None:
        protocol = self._data[self._position]
        self._position += 1
        if not 2 <= protocol <= 5:
            raise OpcodeError(f"data.pkl is written in pickle protocol {protocol}; 2 to 5 can be read")

    def _frame(self) -> None:
        length = _LENGTH_8(self._data, self._position)[0]
        self._position += 8
        if self._position + length > len(self._data):
            raise OpcodeError("data.pkl has a frame that ends behind it")

    def _float(self) -> None:
        self._stack.append(_FLOAT_8(self._data, self._position)[0])
        self._position += 8

    def _take(self, length_bytes: int) -> bytes:
        start = self._position + length_bytes
        if start > len(self._data):
            raise IndexError
        stop = start + int.from_bytes(self._data[self._position : start], "little")
        if stop > len(self._data):
            raise OpcodeError(f"data.pkl has a text or bytes at byte {start} that end behind it")
        self._position = stop
        return self._data[start:stop]

    def _text(self, length_bytes: int) -> bytes:
        self._count()
        return self._take(length_bytes)

    def _integer(self, length_bytes: int) -> None:
        digits = self._take(length_bytes)
        if len(digits) > _LONGEST_INTEGER:
            raise OpcodeError(f"data.pkl has an integer of {len(digits)} bytes")
        self._stack.append(int.from_bytes(digits, "little", signed=True))

    # The stack. pickle writes these opcodes for tuples that contain themselves through a list.

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()


RARE: dict[int, Callable[[RareOpcodes], object]] = {
    0x30: RareOpcodes._pop,
    0x31: RareOpcodes._pop_mark,
    0x42: lambda run: run._stack.append(run._text(4)),
    0x43: lambda run: run._stack.append(run._text(1)),
    0x47: RareOpcodes._float,
    0x5D: lambda run: run._empty([]),
    0x61: lambda run: run._extend([run._stack.pop()]),
    0x62: RareOpcodes._build,
    0x63: RareOpcodes._global,
    0x65: lambda run: run._extend(run._pop_mark()),
    0x73: lambda run: run._update(run._pop_last(2)),
    0x75: lambda run: run._update(run._pop_mark()),
    0x7D: lambda run: run._empty({}),
    0x80: RareOpcodes._protocol,
    0x81: lambda run: run._new_object({}),
    0x87: lambda run: run._empty(tuple(run._pop_last(3))),
    0x88: lambda run: run._stack.append(True),
    0x8A: lambda run: run._integer(1),
    0x8B: lambda run: run._integer(4),
    0x8D: lambda run: run._stack.append(run._text(8).decode("utf-8", "surrogatepass")),
    0x8E: lambda run: run._stack.append(run._text(8)),
    0x8F: lambda run: run._empty(set(), _SET),
    0x90: RareOpcodes._add_items,
    0x91: RareOpcodes._frozen_set,
    0x92: lambda run: run._new_object(run._stack.pop()),
    0x93: RareOpcodes._stack_global,
    0x95: RareOpcodes._frame,
    0x96: lambda run: run._stack.append(bytearray(run._text(8))),
}
