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
    work = _Work(handle, stretches)
    by_threads([(part.nbytes, part) for part in parts], work.read_group)
    return work.findings(sum(part.nbytes for part in parts))


@attrs.frozen
class Examined:
    """Bytes in memory: ``xxh3_128:<hex>``, CRC-32, and what of NaN and infinities is among their values."""

    digest: str
    crc: int
    nonfinite: Finding | None


def examine_memory(data: memoryview, dtype: str) -> Examined:
    """One look at whole elements of ``dtype``, by pieces that stay in the cache."""
    state, crc, found = xxhash.xxh3_128(), 0, set[Finding]()
    is_looked_at = can_be_nonfinite(dtype)
    for begin in range(0, len(data), _BUFFER):
        piece = data[begin : begin + _BUFFER]
        state.update(piece)
        crc = isal_zlib.crc32(piece, crc)
        if is_looked_at and (finding := nonfinite(piece, dtype)) is not None:
            found.add(finding)
    return Examined(f"xxh3_128:{state.hexdigest()}", crc, "NaN" if "NaN" in found else next(iter(found), None))


@attrs.frozen
class _Part:
    index: int
    begin: int
    nbytes: int


def _parts(stretches: Sequence[Stretch]) -> list[_Part]:
    """In the order of the file; large stretches are split where their checksum can be combined of parts."""
    parts = []
    for index, one in sorted(enumerate(stretches), key=lambda pair: pair[1].offset):
        if one.crc is not None or one.digest is not None or one.values or one.target is not None:
            step = max(one.size, 1) if one.digest is not None else GROUP
            parts += [_Part(index, at, min(step, one.size - at)) for at in range(0, max(one.size, 1), step)]
    return parts


class _Work:
    """What the threads share; every operation on the containers is a single step."""

    def __init__(self, handle: Handle, stretches: Sequence[Stretch]) -> None:
        self._handle = handle
        self._stretches = stretches
        self._sums: dict[tuple[int, int], tuple[int, int]] = {}
        self._digests: dict[int, str] = {}
        self._found: set[tuple[str, Values, Finding]] = set()
        self._own = threading.local()

    def findings(self, nbytes: int) -> Findings:
        crcs = [0] * len(self._stretches)
        for (index, _begin), (crc, length) in sorted(self._sums.items()):
            crcs[index] = isal_zlib.crc32_combine(crcs[index], crc, length)
        damaged = []
        for index, stretch in enumerate(self._stretches):
            if stretch.digest is not None:
                if self._digests[index] != stretch.digest:
                    damaged.append(stretch)
            elif stretch.crc is not None and crcs[index] != stretch.crc:
                damaged.append(stretch)
        found: dict[tuple[str, Values], Finding] = {}
        for name, values, finding in self._found:
            if found.get((name, values)) != "NaN":
                found[name, values] = finding
        return Findings(tuple(damaged), found, nbytes)

    def read_group(self, group: list[_Part]) -> None:
        """One pass over neighbouring parts; one read serves as many small ones as it holds."""
        buffer = self._buffer()
        begin = end = 0  # what part of the file is in the buffer
        for number, part in enumerate(group):
            stretch = self._stretches[part.index]
            position = stretch.offset + part.begin
            upto = position + part.nbytes
            if stretch.target is not None or part.nbytes > len(buffer):
                begin = end = 0
                self._look(part, self._pieces(stretch, part, buffer))
            else:
                if position < begin or upto > end:
                    begin, end = position, self._end_of_read(group, number, position + len(buffer))
                    self._handle.read_into(buffer[: end - begin], begin, stretch.name)
                self._look(part, (buffer[position - begin : upto - begin],))

    def _buffer(self) -> memoryview:
        """One for each thread, made once: its pages are touched for the first time only once."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(_BUFFER))
        return self._own.buffer  # type: ignore[no-any-return]  # what is kept for a thread has no type

    def _end_of_read(self, group: list[_Part], number: int, limit: int) -> int:
        """Behind the last part, from ``number`` on, that one read can serve as a whole."""
        end = 0
        for part in group[number:]:
            stretch = self._stretches[part.index]
            behind = stretch.offset + part.begin + part.nbytes
            if stretch.target is not None or behind > limit:
                break
            end = behind
        return end

    def _pieces(self, stretch: Stretch, part: _Part, buffer: memoryview) -> Iterable[memoryview]:
        """What is read of a part, one after the other: into its target, or into the buffer again and again."""
        end = part.begin + part.nbytes
        for begin in range(part.begin, end, _BUFFER):
            length = min(_BUFFER, end - begin)
            piece = buffer[:length] if stretch.target is None else stretch.target[begin : begin + length]
            self._handle.read_into(piece, stretch.offset + begin, stretch.name)
            yield piece

    def _look(self, part: _Part, pieces: Iterable[memoryview]) -> None:
        """Sum up and look at the pieces of one part, each while it is in the cache."""
        stretch = self._stretches[part.index]
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
                        self._found.add((stretch.name, values, found))
            at += len(piece)
        if state is not None:
            self._digests[part.index] = f"xxh3_128:{state.hexdigest()}"
        elif stretch.crc is not None:
            self._sums[part.index, part.begin] = crc, part.nbytes


Finding = Literal["NaN", "infinities"]


@attrs.frozen
class _Patterns:
    """``size``: bytes of one number. ``infinity``: its bits without sign; None: there is none. ``nan``: the first."""

    size: int
    infinity: int | None
    nan: int


_PATTERNS = {
    "bfloat16": _Patterns(2, 0x7F80, 0x7F81),
    "complex128": _Patterns(8, 0x7FF << 52, (0x7FF << 52) + 1),
    "complex32": _Patterns(2, 0x7C00, 0x7C01),
    "complex64": _Patterns(4, 0x7F800000, 0x7F800001),
    "float16": _Patterns(2, 0x7C00, 0x7C01),
    "float32": _Patterns(4, 0x7F800000, 0x7F800001),
    "float64": _Patterns(8, 0x7FF << 52, (0x7FF << 52) + 1),
    "float8_e4m3fn": _Patterns(1, None, 0x7F),
    "float8_e5m2": _Patterns(1, 0x7C, 0x7D),
}
_FLOAT = {4: "f4", 8: "f8"}
_SIGNED = {1: "i1", 2: "i2", 4: "i4", 8: "i8"}
_UNSIGNED = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}
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
    patterns = _PATTERNS[dtype]
    if patterns.size >= 4:
        numbers = np.frombuffer(data, _FLOAT[patterns.size])
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.dot(numbers, numbers)
        if math.isfinite(total):
            return None
    signed = np.frombuffer(data, _SIGNED[patterns.size])
    negative = int(signed.view(_UNSIGNED[patterns.size]).max()) - (1 << (8 * patterns.size - 1))
    largest = max(int(signed.max()), negative)
    if largest >= patterns.nan:
        return "NaN"
    return "infinities" if patterns.infinity is not None and largest >= patterns.infinity else None
