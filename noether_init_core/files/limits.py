"""How much the pickle of a file may build: limits that grow with its size.

torch.save writes 90 bytes or more for a tensor and its ten objects. For a short text, a pair of numbers, or an empty
container, each with its number in the memo, it writes six or more. So the limits are above what honest files of any
size have. They keep a refusal within seconds, and within about 15 times the size of the pickle in memory.
"""

from __future__ import annotations

import attrs

from noether_init_core.files.content import LimitError


@attrs.frozen
class Limit:
    """``always`` for a file of any size, and one more for every ``bytes_each`` bytes of its pickle."""

    always: int
    bytes_each: int
    what: str

    def of(self, size: int) -> int:
        """Return the limit for a pickle of ``size`` bytes."""
        return self.always + size // self.bytes_each

    def error(self, size: int, position: int | None = None) -> LimitError:
        """Return the error for a pickle of ``size`` bytes that goes beyond the limit, at ``position`` if known."""
        place = f"in {size:,} bytes" if position is None else f"by byte {position:,} of {size:,}"
        return LimitError(
            f"data.pkl has more than {self.of(size):,} {self.what} {place}; the limit is "
            f"{self.always:,} and one more for every {self.bytes_each} bytes"
        )


#: Containers, texts, bytes and results of calls; large ones count several times.
OBJECTS = Limit(1 << 19, 8, "objects")
#: Opcodes that torch.save writes rarely, many of which take one byte: None, True, marks of containers.
SHORT = Limit(1 << 20, 6, "values and opcodes of one byte")
MEMOIZED = Limit(1 << 19, 3, "entries in its memo")
#: Records of foreign classes. Each is looked at again and again: what it holds, what is handed to it, where it lies.
FOREIGN = Limit(1 << 17, 64, "objects of foreign classes")
#: Places where containers stand; one container may stand at many.
PLACES = Limit(1 << 19, 8, "containers in containers, those that are shared counted at each place")
NAMES = Limit(1 << 13, 64, "names")
