"""What is known of an open file: digests from elsewhere, which of its bytes are those that were written, which values
are not finite; and the one pass over the file that tells.

Several threads read into a small buffer each, or straight into memory of the caller where that is given; nothing else
is allocated, however large the file is.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NoReturn

import attrs
import xxhash
from isal import isal_zlib

from noether_init_core.errors import CheckpointCorruptError, CheckpointFormatError
from noether_init_core.files.checkpoint import Digests, TensorDigest, Verified
from noether_init_core.files.content import Content, Piece, Record, TensorInfo
from noether_init_core.files.reading import nonfinite_in, read_tensor
from noether_init_core.files.storage.handle import GROUP, Handle, by_threads
from noether_init_core.memory import BUFFER, Finding, can_be_nonfinite, nonfinite
from noether_init_core.messages import listed

_logger = logging.getLogger(__name__)
_REPLACED = "is not the file that was committed"
_NEXT = "It was written over. Next: take an older checkpoint"


def digest_of_records(records: Iterable[Record]) -> str:
    """``xxh3_128:...`` of the names, places, sizes and CRC-32 of all records; it stands for every byte in them."""
    lines = [f"{record.name}\0{record.offset}\0{record.size}\0{record.crc}\n" for record in records]
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(''.join(lines).encode())}"


class Verification:
    """The comparisons of one open file.

    Args:
        handle: The file.
        content: What its format says of it.
        digests: What is known of it from elsewhere.
        tensors: The tensors that ``digests`` speaks of, by key.
        named: Gives all tensors by name, for messages.
        count: Is told how many bytes were read, as soon as they were.
    """

    def __init__(
        self,
        handle: Handle,
        content: Content,
        digests: Digests,
        tensors: Mapping[str, TensorInfo],
        named: Callable[[], Mapping[str, TensorInfo]],
        count: Callable[[int], None],
    ) -> None:
        self._handle = handle
        self._content = content
        self._records = content.records
        self._digests = digests
        self._tensors = tensors
        self._named = named
        self._count = count
        filled = [record for record in self._records.values() if record.size]
        self._offsets = [record.offset for record in filled]
        self._filled = filled
        self._left = {record.name for record in filled}
        self._known: dict[TensorInfo, Finding | None] = {}
        self._has_checksums = any(record.crc is not None for record in filled)
        #: Whether there is anything to compare the bytes with.
        self.is_possible = self._has_checksums or digests.file is not None
        # not every manifest knows of records
        self._is_by_file = digests.file is not None and (digests.records is None or not self._has_checksums)
        self._agrees = False
        self._examined = 0

    def verify(
        self,
        infos: Iterable[TensorInfo] | None = None,
        part: tuple[int, int] | None = None,
        *,
        look: Collection[TensorInfo] = (),
        targets: Mapping[str, memoryview] | None = None,
    ) -> Verified:
        """Compare what was not compared yet, look at values and fill memory, in one pass where that can be.

        Args:
            infos: Compare the records of these tensors; None: all records.
            part: ``(i, n)``: compare the i-th of n shares of them, counted from 0.
            look: Tensors whose values are looked at.
            targets: Record -> memory for all of its bytes.
        """
        before = self._examined
        chosen: set[str] = set()
        if self._is_by_file:
            self._compare_file()
            by = str(self._digests.file).partition(":")[0]
        elif not self._has_checksums:
            self._pass_over()
            by = "unverifiable"
        else:
            if self._digests.records is not None:
                self._compare_header()
            chosen = {record.name for record in self._share(infos, part)} & self._left | (targets or {}).keys()
            by = "crc32" if self._digests.records is None else "xxh3_128"
        written = [self._whole_tensors[name] for name in chosen & self._whole_tensors.keys()]
        stated = {info: tensor.values for info, tensor in written if tensor.values is not None}
        self.examine(chosen, [info for info in look if info not in stated], targets)
        self._known.update({info: None if values == "finite" else values for info, values in stated.items()})
        if chosen:
            self._handle.check_unchanged()
            self._left -= chosen
        return Verified(by, self._examined - before)

    def nonfinite(self, infos: Iterable[TensorInfo]) -> dict[TensorInfo, Finding]:
        """Those tensors that hold NaN or infinities, and which. What a pass has looked at is not read again."""
        infos = tuple(infos)
        self.examine((), infos)
        for info in infos:
            if len(info.pieces) > 1 and info not in self._known:
                self._known[info] = nonfinite_in(read_tensor(self._handle, info))
        return {info: finding for info in infos if (finding := self._known.get(info)) is not None}

    def record_of(self, piece: Piece) -> Record | None:
        """The record that a piece lies in; None where it lies in none, as one without bytes does."""
        index = bisect.bisect_right(self._offsets, piece.offset) - 1
        record = self._filled[index] if index >= 0 and piece.nbytes else None
        return record if record and piece.offset + piece.nbytes <= record.offset + record.size else None

    def foreign(self, infos: Iterable[TensorInfo]) -> list[TensorInfo]:
        """Those of which a piece lies in no record of this file."""
        return [info for info in infos if any(piece.nbytes and self.record_of(piece) is None for piece in info.pieces)]

    def whole_records(self, infos: Iterable[TensorInfo]) -> dict[TensorInfo, Record]:
        """Those whose bytes, in the order in which they are to be read, are a whole record, and that."""
        found = ((info, self._filled_by(info.contiguous)) for info in infos)
        return {info: record for info, record in found if record is not None}

    def checksums(self, tensors: Mapping[str, TensorInfo]) -> dict[str, int | None]:
        """CRC-32 of the bytes of each, in their order in the file; None where the file has none of them alone."""
        found: dict[str, int | None] = {}
        for name, info in tensors.items():
            piece = info.dense
            record = self._filled_by(piece)
            is_empty = piece is not None and not piece.nbytes and self._has_checksums
            found[name] = record.crc if record is not None else 0 if is_empty else None
        return found

    def _filled_by(self, piece: Piece | None) -> Record | None:
        if piece is None:
            return None
        record = self.record_of(piece)
        return record if record is not None and record.size == piece.nbytes else None

    def _compare_file(self) -> None:
        """By the digest of all bytes: no part of it can be left out."""
        if not self._left:
            return
        try:
            self._handle.check_digest(str(self._digests.file))
        except CheckpointCorruptError:
            if self._has_checksums:  # names the keys, where it is damage and not another file
                self.examine(self._records)
            raise
        self._examined += self._handle.size
        self._count(self._handle.size)
        self._handle.check_unchanged()
        self._left.clear()

    def _pass_over(self) -> None:
        """What a file without checksums leads to."""
        if self._content.format == "torch" and self._filled:
            raise CheckpointFormatError(
                f"{self._handle.path} was written without checksums (torch.serialization.set_crc32_options(False)), so "
                "its bytes cannot be verified. To load it without that: verify: header",
                path=self._handle.path,
            )
        if self._left:
            _logger.warning(
                "%s: a safetensors file carries no checksums, so only its structure was checked. A digest would cover "
                "every byte: digest: xxh3_128:... or sha256:...",
                self._handle.path,
            )
            self._left.clear()

    def _compare_header(self) -> None:
        """Compare all that the header says with what was written."""
        if self._agrees:
            return
        digests, size = self._digests, self._handle.size
        expected = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in digests.tensors.items()}
        found = {key: (info.dtype, info.shape) for key, info in self._tensors.items()}
        different = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        if digests.size is not None and size != digests.size:
            problem = f"has {size} bytes; {digests.size} were written"
        elif different:
            problem = f"{_REPLACED}: {listed(different)} differ from the manifest. {_NEXT}"
        elif digest_of_records(self._records.values()) != digests.records:
            problem = f"{_REPLACED}: its records have other checksums than the manifest says. {_NEXT}"
        else:
            self._agrees = True
            return
        self.examine(self._records)  # names the keys, where it is damage and not another file
        path = self._handle.path
        raise CheckpointCorruptError(f"{path} {problem}", path=path, key=", ".join(different))

    @functools.cached_property
    def _whole_tensors(self) -> Mapping[str, tuple[TensorInfo, TensorDigest]]:
        """Record -> the tensor that is all of it, and what was written of that."""
        written = {key: info for key, info in self._tensors.items() if key in self._digests.tensors}
        records = self.whole_records(written.values())
        return {
            records[info].name: (info, self._digests.tensors[key]) for key, info in written.items() if info in records
        }

    def _share(self, infos: Iterable[TensorInfo] | None, part: tuple[int, int] | None) -> Iterable[Record]:
        """The records of tensors, or the share of them that has the same number of bytes as every other one."""
        records: Iterable[Record] = self._filled
        if infos is not None:
            found = (self.record_of(piece) for info in infos for piece in info.pieces)
            records = sorted({record for record in found if record is not None}, key=lambda one: one.offset)
        if part is None:
            return records
        number, of = part
        records = list(records)
        ends = itertools.accumulate(record.size for record in records)
        total = sum(record.size for record in records)
        return [
            record for record, end in zip(records, ends, strict=True) if (end - record.size) * of // total == number
        ]

    def examine(
        self, chosen: Collection[str], look: Iterable[TensorInfo] = (), targets: Mapping[str, memoryview] | None = None
    ) -> None:
        """Read records once: compare the ``chosen`` ones, look at values, fill memory (record -> all of its bytes).

        Raises ``CheckpointCorruptError`` with the keys of damaged records.
        """
        targets = targets or {}
        looked_at = self._ranges(info for info in look if info not in self._known)
        stretches = [
            Stretch(
                name,
                record.offset,
                record.size,
                record.crc if name in chosen else None,
                self._whole_tensors[name][1].digest if name in chosen and name in self._whole_tensors else None,
                tuple(looked_at.get(name, ())),
                targets.get(name),
            )
            for name, record in self._records.items()
            if name in chosen or name in looked_at or name in targets
        ]
        if not stretches:
            return
        damaged, found, nbytes = examine(self._handle, stretches)
        self._examined += nbytes
        self._count(nbytes)
        if damaged:
            self._refuse_damage(stretch.name for stretch in damaged)
        for name, ranges in looked_at.items():
            for values, infos in ranges.items():
                finding = found.get((name, values))
                for info in infos:
                    is_sure = finding is None or info.dense is not None
                    # a view has gaps, and what was found may lie in one of them
                    self._known[info] = finding if is_sure else nonfinite_in(read_tensor(self._handle, info))

    def _ranges(self, infos: Iterable[TensorInfo]) -> dict[str, dict[Values, list[TensorInfo]]]:
        """Record -> what to look at in it, each with the tensors that it tells of."""
        found: dict[str, dict[Values, list[TensorInfo]]] = {}
        for info in infos:
            piece = info.whole
            record = None if piece is None else self.record_of(piece)
            if piece is not None and record is not None and can_be_nonfinite(info.dtype):
                begin = piece.offset - record.offset
                values = Values(begin, begin + piece.nbytes, info.dtype)
                found.setdefault(record.name, {}).setdefault(values, []).append(info)
        return found

    def _refuse_damage(self, damaged: Iterable[str]) -> NoReturn:
        keys: dict[str, list[str]] = {name: [] for name in damaged}
        for key, info in self._named().items():
            for piece in info.pieces:
                record = self.record_of(piece)
                if record is not None and record.name in keys:
                    keys[record.name].append(key)
        raise self._handle.damage(keys)


# The pass over a file.


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


def examine(
    handle: Handle, stretches: Sequence[Stretch]
) -> tuple[list[Stretch], dict[tuple[str, Values], Finding], int]:
    """Read every stretch once, compare it and look at its values. Raises ``CheckpointCorruptError`` if the file ends.

    Returns the stretches whose bytes are not those that were written; what is not finite, by the name of the stretch
    and the place in it; and how many bytes were read. A stretch with neither checksum, values nor target is not read.
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
    damaged = [
        one
        for one in stretches
        if (crcs.get(one) != one.crc if one.digest is None else work.digests[one] != one.digest)
    ]
    # of one place, NaN comes after infinities, and so it counts
    found = sorted(work.found, key=lambda item: item[2], reverse=True)
    nonfinite = {(name, values): finding for name, values, finding in found}
    return damaged, nonfinite, sum(part.nbytes for part in parts)


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
            is_alone = part.stretch.target is not None or part.nbytes > BUFFER
            if together and (is_alone or part.position + part.nbytes > together[0].position + BUFFER):
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
            self._own.buffer = memoryview(bytearray(BUFFER))
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
        for begin in range(part.begin, part.begin + part.nbytes, BUFFER):
            length = min(BUFFER, part.begin + part.nbytes - begin)
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
