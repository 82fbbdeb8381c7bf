"""What a file hands to foreign code, which real unpickling would run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from noether_init_core.files.content import ForeignObject, Record, RefusedTensor, StorageRef, TensorInfo, TensorKey

#: Yields every part of a value once; takes the ids of parts that were walked before, and adds to them.
Walk = Callable[[Any, set[int]], Iterator[Any]]
#: Types of values that may lead to memory or to something that can be changed.
_LEADING = frozenset(
    {dict, list, tuple, set, frozenset, ForeignObject, RefusedTensor, StorageRef, TensorInfo, TensorKey}
)
#: Containers that may be changed.
_CHANGEABLE = frozenset({dict, list, set, ForeignObject})

#: How a file lets a call change the weights.
TAKES_WEIGHTS = "a call that takes the weights"


class Handed:
    """What a file hands to foreign code: real unpickling could change it there.

    A call (REDUCE, NEWOBJ) has the whole of what its arguments reach: dicts and lists, and the memory of tensors. A
    state or an item of a foreign object may hold tensors, as every module and optimizer does. But a dict or list of the
    weights in it, or a bare storage, is handed over too. A partial and a method hold what a later call then takes.

    ``calls`` are among ``made``, all foreign objects of the file. ``records`` are those of the file, in their order.
    """

    def __init__(
        self, calls: Sequence[ForeignObject], made: Sequence[ForeignObject], records: Mapping[str, Record]
    ) -> None:
        self.made = made
        self._calls = calls
        self._starts = [record.offset for record in records.values()] if made else []
        self._by_call: dict[int, ForeignObject] | None = None
        self._by_state: dict[int, ForeignObject] = {}
        self._memory: dict[int, ForeignObject] = {}

    def to(self, walk: Walk, part: Any, is_strict: bool) -> tuple[ForeignObject, str] | None:
        """Return the foreign object that ``part`` is handed to, and how; None if it stays.

        ``is_strict``: a state or item that holds a dict or list counts.
        """
        if self._by_call is None:
            self._by_call = {}
            self._search(walk)
        if type(part) is TensorInfo:
            found = self._memory.get(self._record(part.pieces[0].offset))
        else:
            found = self._by_call.get(id(part))
            if found is None and is_strict and id(part) in self._by_state:
                return self._by_state[id(part)], "an object that holds the dict of the weights"
        return None if found is None else (found, TAKES_WEIGHTS)

    def _record(self, offset: int) -> int:
        return bisect_right(self._starts, offset)

    def _search(self, walk: Walk) -> None:
        """Walk over all that is handed over, once for calls and once for states and items."""
        met: set[int] = set()
        for foreign in self._calls:
            if not _LEADING.isdisjoint(map(type, foreign.args)):
                self._note(walk(foreign.args, met), foreign, self._by_call)
        for foreign in self.made:  # of other keys than texts, an index for example, the meaning is not known
            if type(foreign.items) is dict and any(type(key) is not str for key in foreign.items):
                self._note(walk(foreign.items, met), foreign, self._by_call)
        met = set()
        for foreign in self.made:
            for part in (foreign.args, foreign.state, foreign.items):
                if type(part) in _LEADING and not (type(part) is tuple and _LEADING.isdisjoint(map(type, part))):
                    self._note(walk(part, met), foreign, self._by_state)

    def _note(self, parts: Iterable[Any], foreign: ForeignObject, found: dict[int, ForeignObject] | None) -> None:
        for part in parts:
            if type(part) in _CHANGEABLE and found is not None:
                found.setdefault(id(part), foreign)
            elif type(part) is StorageRef:
                self._memory.setdefault(self._record(part.offset), foreign)
            elif type(part) is TensorInfo and found is self._by_call:
                self._memory.setdefault(self._record(part.pieces[0].offset), foreign)
