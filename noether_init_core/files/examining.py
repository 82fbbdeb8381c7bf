"""One pass over a file: every byte against its checksum or digest, and the values while they are in the cache.

Several threads read into a small buffer each, or straight into memory of the caller where that is given; nothing else
is allocated, however large the file is.

NaN and infinities are told from bit patterns: exact for every dtype, at memory speed, without torch. A float is NaN or
infinite if all bits of its exponent are set. Of such elements the positive ones are the largest of all where the bits
are read as signed integers, the negative ones where they are read as unsigned ones. Two maxima, then, say what is
there; unlike a sum they cannot overflow. Where there is a faster sum, it goes first: the sum of all squares is finite
only if every element is, and what is not finite gets the exact look.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import attrs
import xxhash
from isal import isal_zlib

from noether_init_core.errors import CheckpointCorruptError
from noether_init_core.files.content import Record
from noether_init_core.files.storage.handle import GROUP, Handle, by_threads
from noether_init_core.messages import listed

# Small enough for the processor's caches, large enough that system calls, and threads that wait for the interpreter, do
# not count. A multiple of every size of an element, so that no element lies in two pieces.
_BUFFER = 2 << 20


@attrs.frozen
class Values:
    """Floating-point elements from byte ``begin`` to ``end`` of a stretch, to be looked at for NaN and infinities."""

    begin: int
    end: int
    dtype: str


@attrs.frozen(eq=False)
class Stretch:
    """Neighbouring bytes of the file that have one checksum.

    Attributes:
        name: For the caller.
        offset: Place of the first byte.
        size: Number of bytes.
        crc: Expected CRC-32; None: not compared.
        digest: Expected ``xxh3_128:<hex>``, compared instead of ``crc``.
        values: What to look at; whole elements, counted from the first byte of the stretch.
        target: Memory of ``size`` bytes that the bytes are read into; None: they are only looked at.
    """

    name: str
    offset: int
    size: int
    crc: int | None = None
    digest: str | None = None
    values: tuple[Values, ...] = ()
    target: memoryview | None = None


@attrs.frozen
class Findings:
    """What ``examine`` found: stretches whose bytes are not those that were written, and values that are not finite.

    ``nonfinite`` has the name of the stretch, which of its ``values``, and what is there; ``nbytes`` is how much was
    read.
    """

    damaged: tuple[Stretch, ...]
    nonfinite: dict[tuple[str, Values], Finding]
    nbytes: int


def check_record(handle: Handle, record: Record, data: bytes) -> None:
    """Raise ``CheckpointCorruptError`` if ``data`` does not have the checksum of the record."""
    if record.crc is not None and isal_zlib.crc32(data) != record.crc:
        raise damage(handle.path, {record.name: []})


def damage(path: Path, keys: Mapping[str, Sequence[str]]) -> CheckpointCorruptError:
    """The error for damaged records; ``keys``: name of a record -> the keys whose bytes are in it."""
    parts = (f"{listed(names, 10)} ({record})" if names else record for record, names in keys.items())
    return CheckpointCorruptError(
        f"{path} is damaged: the bytes of {listed(parts, 20, separator='; ')} are not those that were written. "
        "Next: copy the file again from where it was written, or take an older checkpoint",
        path=path,
        key=", ".join(name for names in keys.values() for name in names),
    )


def examine(handle: Handle, stretches: Sequence[Stretch]) -> Findings:
    """Read every stretch once, compare it and look at its values. Raises ``CheckpointCorruptError`` if the file ends.

    A stretch with neither checksum, values nor target is not read.
    """
    for stretch in stretches:
        if stretch.target is not None and stretch.target.nbytes != stretch.size:
            raise ValueError(f"{stretch.name}: {stretch.target.nbytes} bytes of memory for {stretch.size} bytes")
    parts = _parts(stretches)
    work = _Work(handle)
    by_threads([(part.nbytes, part) for part in parts], work.read_group)
    crcs: dict[Stretch, int] = {}
    for part, crc in sorted(work.crcs.items(), key=lambda item: item[0].position):
        crcs[part.stretch] = isal_zlib.crc32_combine(crcs.get(part.stretch, 0), crc, part.nbytes)
    damaged = (
        one
        for one in stretches
        if (crcs.get(one) != one.crc if one.digest is None else work.digests[one] != one.digest)
    )
    # of one place, NaN comes after infinities, and so it counts
    found = sorted(work.found, key=lambda item: item[2], reverse=True)
    nonfinite = {(name, values): finding for name, values, finding in found}
    return Findings(tuple(damaged), nonfinite, sum(part.nbytes for part in parts))


def examine_memory(data: memoryview, dtype: str) -> tuple[str, int, Finding | None]:
    """``xxh3_128:<hex>``, CRC-32, and what is not finite among whole elements, looked at once while in the cache."""
    state, crc, found = xxhash.xxh3_128(), 0, set[Finding]()
    is_looked_at = can_be_nonfinite(dtype)
    for begin in range(0, len(data), _BUFFER):
        piece = data[begin : begin + _BUFFER]
        state.update(piece)
        crc = isal_zlib.crc32(piece, crc)
        if is_looked_at and (finding := nonfinite(piece, dtype)) is not None:
            found.add(finding)
    return f"xxh3_128:{state.hexdigest()}", crc, "NaN" if "NaN" in found else next(iter(found), None)


@attrs.frozen
class _Part:
    """What one thread takes at a time; ``begin`` counts in the stretch, ``position`` in the file."""

    stretch: Stretch
    begin: int
    nbytes: int

    @property
    def position(self) -> int:
        return self.stretch.offset + self.begin


def _parts(stretches: Sequence[Stretch]) -> list[_Part]:
    """In the order of the file; large stretches are split where their checksum can be combined of parts."""
    parts = []
    for one in sorted(stretches, key=lambda stretch: stretch.offset):
        if one.crc is not None or one.digest is not None or one.values or one.target is not None:
            step = max(one.size, 1) if one.digest is not None else GROUP
            parts += [_Part(one, at, min(step, one.size - at)) for at in range(0, max(one.size, 1), step)]
    return parts


class _Work:
    """What the threads share; every operation on the containers is a single step."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._own = threading.local()
        self.crcs: dict[_Part, int] = {}
        self.digests: dict[Stretch, str] = {}
        self.found: set[tuple[str, Values, Finding]] = set()

    def read_group(self, group: list[_Part]) -> None:
        """One pass over neighbouring parts; one read serves as many small ones as it holds."""
        together: list[_Part] = []
        for part in group:
            is_alone = part.stretch.target is not None or part.nbytes > _BUFFER
            if together and (is_alone or part.position + part.nbytes > together[0].position + _BUFFER):
                self._read_together(together)
                together = []
            if is_alone:
                self._look(part, self._pieces(part))
            else:
                together.append(part)
        if together:
            self._read_together(together)

    def _buffer(self) -> memoryview:
        """One for each thread, made once: its pages are touched for the first time only once."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(_BUFFER))
        return self._own.buffer  # type: ignore[no-any-return]  # what is kept for a thread has no type

    def _read_together(self, parts: Sequence[_Part]) -> None:
        begin = parts[0].position
        data = self._buffer()[: max(part.position + part.nbytes for part in parts) - begin]
        self._handle.read_into(data, begin, parts[0].stretch.name)
        for part in parts:
            at = part.position - begin
            self._look(part, (data[at : at + part.nbytes],))

    def _pieces(self, part: _Part) -> Iterable[memoryview]:
        """What is read of a part, one after the other: into its target, or into the buffer again and again."""
        target = part.stretch.target
        for begin in range(part.begin, part.begin + part.nbytes, _BUFFER):
            length = min(_BUFFER, part.begin + part.nbytes - begin)
            piece = self._buffer()[:length] if target is None else target[begin : begin + length]
            self._handle.read_into(piece, part.stretch.offset + begin, part.stretch.name)
            yield piece

    def _look(self, part: _Part, pieces: Iterable[memoryview]) -> None:
        """Sum up and look at the pieces of one part, each while it is in the cache."""
        stretch = part.stretch
        state = xxhash.xxh3_128() if stretch.digest is not None else None
        crc, at = 0, part.begin
        for piece in pieces:
            if state is not None:
                state.update(piece)
            elif stretch.crc is not None:
                crc = isal_zlib.crc32(piece, crc)
            for values in stretch.values:
                first, behind = max(values.begin, at), min(values.end, at + len(piece))
                if first < behind:
                    found = nonfinite(piece[first - at : behind - at], values.dtype)
                    if found is not None:
                        self.found.add((stretch.name, values, found))
            at += len(piece)
        if state is not None:
            self.digests[stretch] = f"xxh3_128:{state.hexdigest()}"
        elif stretch.crc is not None:
            self.crcs[part] = crc


Finding = Literal["NaN", "infinities"]


# Bytes of one number; the bits of infinity without sign, None where there is none; those of the first NaN.
_PATTERNS: dict[str, tuple[int, int | None, int]] = {
    "bfloat16": (2, 0x7F80, 0x7F81),
    "complex128": (8, 0x7FF << 52, (0x7FF << 52) + 1),
    "complex32": (2, 0x7C00, 0x7C01),
    "complex64": (4, 0x7F800000, 0x7F800001),
    "float16": (2, 0x7C00, 0x7C01),
    "float32": (4, 0x7F800000, 0x7F800001),
    "float64": (8, 0x7FF << 52, (0x7FF << 52) + 1),
    "float8_e4m3fn": (1, None, 0x7F),
    "float8_e5m2": (1, 0x7C, 0x7D),
}
# Formats with a single NaN: the bits of minus zero, or, without a sign, all of them set.
_SINGLE_NAN = {"float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80, "float8_e8m0fnu": 0xFF}


def can_be_nonfinite(dtype: str) -> bool:
    """Whether the dtype (torch's name without ``torch.``) has NaN at all."""
    return dtype in _PATTERNS or dtype in _SINGLE_NAN


def nonfinite(data: memoryview, dtype: str) -> Finding | None:
    """``NaN`` if there is one among the elements, else ``infinities`` if there is one, else None.

    ``data``: whole elements of ``dtype``, in the byte order of the machine, at any address.
    """
    import numpy as np

    if not data:
        return None
    single = _SINGLE_NAN.get(dtype)
    if single is not None:
        octets = np.frombuffer(data, np.uint8)
        found = octets.view(np.int8).min() == -128 if single == 0x80 else octets.max() == single
        return "NaN" if found else None
    size, infinity, nan = _PATTERNS[dtype]
    if size >= 4:
        numbers = np.frombuffer(data, f"f{size}")
        with np.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(np.dot(numbers, numbers)):
                return None
    signed = np.frombuffer(data, f"i{size}")
    negative = int(signed.view(f"u{size}").max()) - (1 << (8 * size - 1))
    largest = max(int(signed.max()), negative)
    if largest >= nan:
        return "NaN"
    return "infinities" if infinity is not None and largest >= infinity else None
