"""Interpret the pickle opcodes that torch.save writes; nothing that a file names is imported or called.

Protocols 2 to 5 are read. Names are looked up in ``builders``. Everything that is built with an unknown name is an
inert record, which is refused only if somebody asks for it; until then it counts as everything else does.

Depth, keys and copies are limited, and the number of objects is limited by the size of the file: see ``limits``.
"""

from __future__ import annotations

import struct
from typing import Any

from noether_init_core.files.content import ForeignObject, GlobalName, LimitError, OpcodeError
from noether_init_core.files.formats.builders import BUILDERS, storage_of
from noether_init_core.files.formats.rare_opcodes import ABSENT, RARE, RareOpcodes
from noether_init_core.files.limits import MEMOIZED, OBJECTS, SHORT

#: Limit of open marks; a nested container needs one or two.
_MARKS = 400
#: Memory of what a call builds, in empty lists.
_BUILT = 3

_LENGTH_4 = struct.Struct("<I").unpack_from
_INTEGER_4 = struct.Struct("<i").unpack_from


class Interpreter(RareOpcodes):
    """One run over the content of ``data.pkl``; see ``RareOpcodes`` for its arguments and findings."""

    def run(self) -> Any:
        """Return the object in the file. Raises ``OpcodeError``."""
        try:
            value = self._run()
            if [len(state) for _owner, state in self.attached] != self._attached_sizes:
                raise OpcodeError("data.pkl changes the attributes of a dict after it has set them")
            return value
        except (IndexError, struct.error):  # the stack is empty, the data ends, or nothing was memoized there
            raise OpcodeError(f"data.pkl is damaged near byte {self._position}") from None
        except UnicodeError:
            raise OpcodeError(f"data.pkl has a text in a wrong encoding near byte {self._position}") from None

    def _run(self) -> Any:
        # The opcodes that make up nearly all of a state dict are handled inline, because a method call for each would
        # take most of the time. The others have a method each.
        data, memo, scope, names = self._data, self._memo, self._scope, BUILDERS
        cold, end = RARE, len(data)
        objects, most_objects = 0, OBJECTS.of(end)
        short, most_short, most_memoized = 0, SHORT.of(end), MEMOIZED.of(end)
        stack = self._stack
        position = 0
        while True:
            self._position = position
            opcode = data[position]
            position += 1
            if opcode == 0x71:  # BINPUT
                number = data[position]
                if number == len(memo):
                    memo.append(stack[-1])
                elif number < len(memo):
                    memo[number] = stack[-1]
                else:
                    self._memoize(number, stack[-1])
                position += 1
            elif opcode == 0x68:  # BINGET
                value = memo[data[position]]
                if value is ABSENT:
                    raise IndexError
                stack.append(value)
                position += 1
            elif opcode == 0x72:  # LONG_BINPUT
                number = _LENGTH_4(data, position)[0]
                if number == len(memo):
                    memo.append(stack[-1])
                elif number < len(memo):
                    memo[number] = stack[-1]
                else:
                    self._memoize(number, stack[-1])
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
                objects += 1
                if objects > most_objects:
                    raise OBJECTS.error(end, self._position)
                self._stack = stack = self._marked.pop()
                stack.append(items)
            elif opcode == 0x52:  # REDUCE
                args = stack.pop()
                function = stack[-1]
                objects += 1
                if objects > most_objects:
                    raise OBJECTS.error(end, self._position)
                if type(function) is not GlobalName or type(args) is not tuple:
                    stack[-1] = self._call(function, args)
                    continue
                builder = names.get(function.name)
                if not args and function.name == "collections.OrderedDict":  # one stands beside every tensor
                    stack[-1] = {}
                elif builder is None:
                    stack[-1] = self._foreign(function.name, args)
                else:
                    objects += _BUILT - 1
                    try:
                        stack[-1] = builder(scope, args)
                        if type(stack[-1]) is ForeignObject:
                            self._note_built(stack[-1])
                    except LimitError:
                        raise
                    except OpcodeError:
                        if not self._are_foreign(args):
                            raise
                        stack[-1] = self._foreign(function.name, args)
            elif opcode == 0x58:  # BINUNICODE
                start = position + 4
                position = start + _LENGTH_4(data, position)[0]
                if position > end:
                    raise IndexError
                objects += 1
                if objects > most_objects:
                    raise OBJECTS.error(end, self._position)
                stack.append(data[start:position].decode("utf-8", "surrogatepass"))
            elif opcode == 0x6A:  # LONG_BINGET
                value = memo[_LENGTH_4(data, position)[0]]
                if value is ABSENT:
                    raise IndexError
                stack.append(value)
                position += 4
            elif opcode == 0x94:  # MEMOIZE
                memo.append(stack[-1])
                if len(memo) > most_memoized:
                    raise MEMOIZED.error(end, self._position)
            elif opcode == 0x8C:  # SHORT_BINUNICODE
                start = position + 1
                position = start + data[position]
                if position > end:
                    raise IndexError
                objects += 1
                if objects > most_objects:
                    raise OBJECTS.error(end, self._position)
                stack.append(data[start:position].decode("utf-8", "surrogatepass"))
            elif opcode == 0x51:  # BINPERSID
                objects += 1
                if objects > most_objects:
                    raise OBJECTS.error(end, self._position)
                stack[-1] = storage_of(scope, self._records, stack[-1])
            elif opcode == 0x29:  # EMPTY_TUPLE
                short += 1
                if short > most_short:
                    raise SHORT.error(end, self._position)
                stack.append(())
            elif opcode == 0x4D:  # BININT2
                stack.append(data[position] | data[position + 1] << 8)
                position += 2
            elif opcode == 0x89:  # NEWFALSE
                short += 1
                if short > most_short:
                    raise SHORT.error(end, self._position)
                stack.append(False)
            elif opcode == 0x4E:  # NONE
                short += 1
                if short > most_short:
                    raise SHORT.error(end, self._position)
                stack.append(None)
            elif opcode == 0x86:  # TUPLE2
                second = stack.pop()
                stack[-1] = (stack[-1], second)
                objects += 1
                if objects > most_objects:
                    raise OBJECTS.error(end, self._position)
            elif opcode == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
                objects += 1
                if objects > most_objects:
                    raise OBJECTS.error(end, self._position)
            elif opcode == 0x4A:  # BININT
                stack.append(_INTEGER_4(data, position)[0])
                position += 4
            elif opcode == 0x2E:  # STOP
                break
            else:
                method = cold.get(opcode)
                if method is None:
                    raise OpcodeError(f"data.pkl has the opcode {opcode:#04x} at byte {position - 1}, unknown here")
                short += 1
                if short > most_short:
                    raise SHORT.error(end, self._position)
                self._position, self._objects = position, objects
                method(self)
                position, stack, objects = self._position, self._stack, self._objects
        if len(stack) != 1 or self._marked or position != end:
            raise OpcodeError(f"data.pkl ends at byte {position} of {end}, or not with one object")
        return stack[0]
