"""Interpret the pickle opcodes that torch.save writes; nothing that a file names is imported or called.

Protocols 2 to 5 are read. Names are looked up in ``builders``. Everything that is built with an unknown name is an
inert record, which is refused only if somebody asks for it; until then it counts as everything else does.

Depth, keys and copies are limited, and the number of objects is limited by the size of the file. Memory stays below
16 MiB plus 80 times the size of the header; a normal file needs about 10 times.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from noether_init_core.errors import type_of
from noether_init_core.files.content import ForeignName, ForeignObject, GlobalName, OpcodeError, Record
from noether_init_core.files.formats.builders import BUILDERS, KNOWN_NAMES, Scope, add_members, set_items, storage_of

#: Limit of open marks; a nested container needs one or two.
_MARKS = 400
#: Limit of the bytes of an integer; Python refuses str() of much longer ones, because it takes quadratic time.
_LONGEST_INTEGER = 1024
_LONGEST_NAME = 512
#: pickle numbers memoized objects one by one. A file with arbitrary numbers could choose them to collide in a dict.
_MEMO_GAP = 1024
#: Number of objects that is accepted for a file of any size.
_ALWAYS = 1 << 16
#: Memory of an empty set, in empty lists.
_SET = 4
#: Memory of an inert record and of what the graph keeps about it; pickle writes at least five bytes for an object.
_RECORD = 2
#: Attributes of the dicts that a file may make; an own one of these names would stand in its place.
_ATTRIBUTES_OF_DICTS = frozenset({*dir(OrderedDict()), *dir(Counter()), *dir(defaultdict())})
_TOO_MANY = "data.pkl builds far more objects than its size accounts for"
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_OLD_NAMES = {"builtins.xrange": "builtins.range", "builtins.unicode": "builtins.str", "builtins.long": "builtins.int"}

_LENGTH_4 = struct.Struct("<I").unpack_from
_LENGTH_8 = struct.Struct("<Q").unpack_from
_INTEGER_4 = struct.Struct("<i").unpack_from
_FLOAT_8 = struct.Struct(">d").unpack_from


class Interpreter:
    """One run over the content of ``data.pkl``.

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
        # pickle writes at least three bytes for a container. A hostile file could write an empty one in one byte, and
        # each takes 56 bytes of memory or more.
        self._containers = 1024 + len(data) // 2
        self._most_names = _ALWAYS // 8 + len(data) // 64
        self._position = 0
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._names: dict[bytes, GlobalName] = {}

    def run(self) -> Any:
        """Return the object in the file. Raises ``OpcodeError``."""
        try:
            value = self._run()
            if [len(state) for _owner, state in self.attached] != self._attached_sizes:
                raise OpcodeError("data.pkl changes the attributes of a dict after it has set them")
            return value
        except (IndexError, KeyError, struct.error):
            # IndexError: the stack is empty or the data ends. KeyError: no object was memoized under the number.
            raise OpcodeError(f"data.pkl is damaged near byte {self._position}") from None
        except UnicodeError:
            raise OpcodeError(f"data.pkl has a text in a wrong encoding near byte {self._position}") from None

    def _run(self) -> Any:
        # The opcodes that make up nearly all of a state dict are handled inline, because a method call for each would
        # take most of the time. The others have a method each.
        data, memo, scope, names = self._data, self._memo, self._scope, BUILDERS
        cold = _COLD
        # pickle writes about three bytes or more for a memoized object, and for a tuple; small files get an allowance.
        most_entries = tuples_left = _ALWAYS + len(data) // 3
        stack = self._stack
        position = 0
        end = len(data)
        while True:
            self._position = position
            opcode = data[position]
            position += 1
            if opcode == 0x71:  # BINPUT
                memo[data[position]] = stack[-1]
                position += 1
            elif opcode == 0x68:  # BINGET
                stack.append(memo[data[position]])
                position += 1
            elif opcode == 0x72:  # LONG_BINPUT
                number = _LENGTH_4(data, position)[0]
                if number > len(memo) + _MEMO_GAP:
                    raise OpcodeError(f"data.pkl stores a part under the number {number}, far beyond those before")
                memo[number] = stack[-1]
                position += 4
            elif opcode == 0x4B:  # BININT1
                stack.append(data[position])
                position += 1
            elif opcode == 0x28:  # MARK
                self._marked.append(stack)
                if len(self._marked) > _MARKS:
                    raise OpcodeError(f"data.pkl is nested deeper than {_MARKS}")
                self._stack = stack = []
            elif opcode == 0x74:  # TUPLE
                items = tuple(stack)
                tuples_left -= 1
                if tuples_left < 0:
                    raise OpcodeError(_TOO_MANY)
                self._stack = stack = self._marked.pop()
                stack.append(items)
            elif opcode == 0x52:  # REDUCE
                args = stack.pop()
                function = stack[-1]
                if type(function) is not GlobalName or type(args) is not tuple:
                    stack[-1] = self._call(function, args)
                    continue
                builder = names.get(function.name)
                if not args and function.name == "collections.OrderedDict":  # one stands beside every tensor
                    stack[-1] = {}
                elif builder is None:
                    stack[-1] = self._foreign(function.name, args)
                else:
                    try:
                        stack[-1] = builder(scope, args)
                        if type(stack[-1]) is ForeignObject:
                            self._note_built(stack[-1])
                    except OpcodeError:
                        if not self._are_foreign(args):
                            raise
                        stack[-1] = self._foreign(function.name, args)
            elif opcode == 0x58:  # BINUNICODE
                start = position + 4
                position = start + _LENGTH_4(data, position)[0]
                if position > end:
                    raise IndexError
                stack.append(data[start:position].decode("utf-8", "surrogatepass"))
            elif opcode == 0x6A:  # LONG_BINGET
                stack.append(memo[_LENGTH_4(data, position)[0]])
                position += 4
            elif opcode == 0x94:  # MEMOIZE
                number = len(memo)
                if number > most_entries:
                    raise OpcodeError(_TOO_MANY)
                memo[number] = stack[-1]
            elif opcode == 0x8C:  # SHORT_BINUNICODE
                start = position + 1
                position = start + data[position]
                if position > end:
                    raise IndexError
                stack.append(data[start:position].decode("utf-8", "surrogatepass"))
            elif opcode == 0x51:  # BINPERSID
                stack[-1] = storage_of(scope, self._records, stack[-1])
            elif opcode == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif opcode == 0x4D:  # BININT2
                stack.append(data[position] | data[position + 1] << 8)
                position += 2
            elif opcode == 0x89:  # NEWFALSE
                stack.append(False)
            elif opcode == 0x86:  # TUPLE2
                second = stack.pop()
                stack[-1] = (stack[-1], second)
                tuples_left -= 1
                if tuples_left < 0:
                    raise OpcodeError(_TOO_MANY)
            elif opcode == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
                tuples_left -= 1
                if tuples_left < 0:
                    raise OpcodeError(_TOO_MANY)
            elif opcode == 0x4A:  # BININT
                stack.append(_INTEGER_4(data, position)[0])
                position += 4
            elif opcode == 0x2E:  # STOP
                break
            else:
                method = cold.get(opcode)
                if method is None:
                    raise OpcodeError(f"data.pkl has the opcode {opcode:#04x} at byte {position - 1}, unknown here")
                self._position = position
                method(self)
                position, stack = self._position, self._stack
        if len(stack) != 1 or self._marked or position != end:
            raise OpcodeError(f"data.pkl ends at byte {position} of {end}, or not with one object")
        return stack[0]

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
            if len(self._names) > self._most_names:
                raise OpcodeError("data.pkl has far more names than its size accounts for")
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
        self._count_container(_RECORD)
        found = ForeignObject(name, args)
        if name not in self._allowed or self._are_foreign(args):
            self.made.append(found)
            is_method = name == "builtins.getattr" and len(args) == 2 and type(args[0]) is ForeignObject
            if not (is_method and type(args[1]) is str) and name != "functools.partial":
                self.calls.append(found)
        return found

    def _note_built(self, found: ForeignObject) -> None:
        """Note an object of a tensor subclass, and the call that makes its tensor."""
        self._count_container(_RECORD)
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
            self._count_container(_SET)
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

    def _count_container(self, weight: int = 1) -> None:
        self._containers -= weight
        if self._containers < 0:
            raise OpcodeError(_TOO_MANY)

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
        self._count_container(weight)
        self._stack.append(container)

    def _frozen_set(self) -> None:
        self._count_container(_SET)
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
        if len(items) % 2:
            raise OpcodeError("data.pkl sets an item of a dict without a value")
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


_COLD: dict[int, Callable[[Interpreter], object]] = {
    0x30: Interpreter._pop,
    0x31: Interpreter._pop_mark,
    0x42: lambda run: run._stack.append(run._take(4)),
    0x43: lambda run: run._stack.append(run._take(1)),
    0x47: Interpreter._float,
    0x4E: lambda run: run._stack.append(None),
    0x5D: lambda run: run._empty([]),
    0x61: lambda run: run._extend([run._stack.pop()]),
    0x62: Interpreter._build,
    0x63: Interpreter._global,
    0x65: lambda run: run._extend(run._pop_mark()),
    0x73: lambda run: run._update(run._pop_last(2)),
    0x75: lambda run: run._update(run._pop_mark()),
    0x7D: lambda run: run._empty({}),
    0x80: Interpreter._protocol,
    0x81: lambda run: run._new_object({}),
    0x87: lambda run: run._stack.append(tuple(run._pop_last(3))),
    0x88: lambda run: run._stack.append(True),
    0x8A: lambda run: run._integer(1),
    0x8B: lambda run: run._integer(4),
    0x8D: lambda run: run._stack.append(run._take(8).decode("utf-8", "surrogatepass")),
    0x8E: lambda run: run._stack.append(run._take(8)),
    0x8F: lambda run: run._empty(set(), _SET),
    0x90: Interpreter._add_items,
    0x91: Interpreter._frozen_set,
    0x92: lambda run: run._new_object(run._stack.pop()),
    0x93: Interpreter._stack_global,
    0x95: Interpreter._frame,
    0x96: lambda run: run._stack.append(bytearray(run._take(8))),
}
