"""Verify an open file: compare its bytes with checksums and digests, and find values that are not finite, in one pass.

Several threads read, each into a small buffer or directly into memory of the caller. Nothing else is allocated, however
large the file is.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NoReturn

import attrs
import xxhash
from isal import isal_zlib

from noether_init_core.errors import CheckpointCorruptError, CheckpointFormatError
from noether_init_core.files.checkpoint import Digests, TensorDigest, Verified
from noether_init_core.files.content import Piece, Record, TensorInfo
from noether_init_core.files.graph import Content
from noether_init_core.files.reading import nonfinite_in, read_tensor
from noether_init_core.files.storage.handle import GROUP, Handle, by_threads
from noether_init_core.memory import BUFFER, Finding, can_be_nonfinite, nonfinite
from noether_init_core.messages import listed, logger_of

_logger = logger_of(__name__)
_REPLACED = "is not the file that was committed"
_NEXT = "It was overwritten. Next: take an older checkpoint"


def digest_of_records(records: Iterable[Record]) -> str:
    """Return ``xxh3_128:...`` of the names, positions, sizes and CRC-32 of all records, so of every byte in them."""
    lines = [f"{record.name}\0{record.offset}\0{record.size}\0{record.crc}\n" for record in records]
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(''.join(lines).encode())}"


class Verification:
    """The comparisons of one open file.

    Args:
        handle: The file.
        content: Its screened content.
        digests: Its digests from another source, such as a manifest.
        tensors: The tensors that ``digests`` lists, by key.
        named: Returns all tensors by name, for messages.
        count: Called with the number of bytes after each read.
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
        #: Whether checksums or digests exist to compare the bytes with.
        self.is_possible = self._has_checksums or digests.file is not None
        # A manifest of another writer may have a digest of the file only.
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
        """Compare records that were not compared yet, check values and fill memory, in one pass if possible.

        Args:
            infos: Compare the records of these tensors; None: all records.
            part: ``(i, n)``: compare the i-th of n shares of them, counted from 0.
            look: Tensors whose values are checked.
            targets: Name of a record -> memory for all of its bytes.
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
        """Return tensor -> NaN or infinities. Tensors that an earlier pass has checked are not read again."""
        infos = tuple(infos)
        self.examine((), infos)
        for info in infos:
            if len(info.pieces) > 1 and info not in self._known:
                self._known[info] = nonfinite_in(read_tensor(self._handle, info))
        return {info: finding for info in infos if (finding := self._known.get(info)) is not None}

    def record_of(self, piece: Piece) -> Record | None:
        """Return the record that contains a piece; None if no record does, or if the piece is empty."""
        index = bisect.bisect_right(self._offsets, piece.offset) - 1
        record = self._filled[index] if index >= 0 and piece.nbytes else None
        return record if record and piece.offset + piece.nbytes <= record.offset + record.size else None

    def foreign(self, infos: Iterable[TensorInfo]) -> list[TensorInfo]:
        """Return the tensors that have a piece outside all records of this file."""
        return [info for info in infos if any(piece.nbytes and self.record_of(piece) is None for piece in info.pieces)]

    def whole_records(self, infos: Iterable[TensorInfo]) -> dict[TensorInfo, Record]:
        """Return tensor -> record, for the tensors whose row-major bytes are exactly one record."""
        found = ((info, self._filled_by(info.contiguous)) for info in infos)
        return {info: record for info, record in found if record is not None}

    def checksums(self, tensors: Mapping[str, TensorInfo]) -> dict[str, int | None]:
        """Return name -> CRC-32 of its bytes as stored; None for a tensor without a record of exactly its bytes."""
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
        """Compare all bytes with the digest of the file; a digest cannot be checked in parts."""
        if not self._left:
            return
        try:
            self._handle.check_digest(str(self._digests.file))
        except CheckpointCorruptError:
            # If the file is damaged, this raises an error with the keys; if it is another intact file, it passes.
            if self._has_checksums:
                self.examine(self._records)
            raise
        self._examined += self._handle.size
        self._count(self._handle.size)
        self._handle.check_unchanged()
        self._left.clear()

    def _pass_over(self) -> None:
        """Refuse a torch file without checksums; warn once for a safetensors file, which never has any."""
        if self._content.format == "torch" and self._filled:
            raise CheckpointFormatError(
                f"{self._handle.path} was written without checksums (torch.serialization.set_crc32_options(False)), so "
                "its bytes cannot be verified. Next: set verify: header to load it unverified",
                path=self._handle.path,
            )
        if self._left:
            _logger.warning(
                "%s: a safetensors file has no checksums, so only its structure was checked. Next: set digest: "
                "xxh3_128:... or sha256:... to verify every byte",
                self._handle.path,
            )
            self._left.clear()

    def _compare_header(self) -> None:
        """Compare size, keys, dtypes, shapes and checksums in the header with the manifest."""
        if self._agrees:
            return
        digests, size = self._digests, self._handle.size
        expected = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in digests.tensors.items()}
        found = {key: (info.dtype, info.shape) for key, info in self._tensors.items()}
        different = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        if digests.size is not None and size != digests.size:
            problem = f"has {size} bytes; its manifest records {digests.size}"
        elif different:
            problem = f"{_REPLACED}: {listed(different)} differ from the manifest. {_NEXT}"
        elif digest_of_records(self._records.values()) != digests.records:
            problem = f"{_REPLACED}: the checksums of its records differ from the manifest. {_NEXT}"
        else:
            self._agrees = True
            return
        self.examine(self._records)  # for a damaged file, this raises an error that names the keys
        path = self._handle.path
        raise CheckpointCorruptError(f"{path} {problem}", path=path, key=", ".join(different))

    @functools.cached_property
    def _whole_tensors(self) -> Mapping[str, tuple[TensorInfo, TensorDigest]]:
        """Name of a record -> the tensor that covers exactly this record, and its description in the manifest."""
        written = {key: info for key, info in self._tensors.items() if key in self._digests.tensors}
        records = self.whole_records(written.values())
        return {
            records[info].name: (info, self._digests.tensors[key]) for key, info in written.items() if info in records
        }

    def _share(self, infos: Iterable[TensorInfo] | None, part: tuple[int, int] | None) -> Iterable[Record]:
        """Return the records of tensors, or one of n shares with about equal numbers of bytes."""
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
        """Read records once: compare the ``chosen`` ones, check values, fill memory (name -> all bytes of a record).

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
                    # A view has gaps between its elements, and the non-finite value may be in a gap.
                    self._known[info] = finding if is_sure else nonfinite_in(read_tensor(self._handle, info))

    def _ranges(self, infos: Iterable[TensorInfo]) -> dict[str, dict[Values, list[TensorInfo]]]:
        """Return name of a record -> ranges of values to check -> the tensors with exactly these values."""
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
    """A range of floating-point elements, from byte ``begin`` to ``end`` of a stretch, to check for NaN and
    infinities."""

    begin: int
    end: int
    dtype: str


@attrs.frozen(eq=False)
class Stretch:
    """A range of bytes of the file with one checksum.

    Attributes:
        name: Name for the caller.
        offset: Position of the first byte.
        size: Number of bytes.
        crc: Expected CRC-32; None: not compared.
        digest: Expected ``xxh3_128:<hex>``, compared instead of ``crc``.
        values: Ranges of complete elements to check, counted from the first byte of the stretch.
        target: Memory of ``size`` bytes to fill; None: the bytes are read into a buffer and dropped.
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
    """Read every stretch once, compare it and check its values. Raises ``CheckpointCorruptError`` if the file ends.

    Returns the damaged stretches, (name of a stretch, range) -> finding, and the number of bytes read.
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
    # If one range has both findings, NaN must win: in this order it comes last and replaces the infinities.
    found = sorted(work.found, key=lambda item: item[2], reverse=True)
    nonfinite = {(name, values): finding for name, values, finding in found}
    return damaged, nonfinite, sum(part.nbytes for part in parts)


@attrs.frozen
class _Part:
    """The unit of work of one thread; ``begin`` is relative to the stretch, ``position`` to the file."""

    stretch: Stretch
    begin: int
    nbytes: int

    @property
    def position(self) -> int:
        return self.stretch.offset + self.begin


def _parts(stretches: Sequence[Stretch]) -> list[_Part]:
    """Split stretches into parts, in the order of the file; only CRC-32 of parts can be combined, xxh3 cannot."""
    parts = []
    for one in sorted(stretches, key=lambda stretch: stretch.offset):
        if one.crc is not None or one.digest is not None or one.values or one.target is not None:
            step = max(one.size, 1) if one.digest is not None else GROUP
            parts += [_Part(one, at, min(step, one.size - at)) for at in range(0, max(one.size, 1), step)]
    return parts


class _Work:
    """The state that the threads share. Each operation on its containers is atomic, so it needs no lock."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._own = threading.local()
        self.crcs: dict[_Part, int] = {}
        self.digests: dict[Stretch, str] = {}
        self.found: set[tuple[str, Values, Finding]] = set()

    def read_group(self, group: list[_Part]) -> None:
        """Read neighbouring parts; one read of a buffer serves as many small parts as it holds."""
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
        """Return the buffer of this thread; it is created once, because page faults of new memory are slow."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(BUFFER))
        return self._own.buffer  # type: ignore[no-any-return]  # attributes of threading.local have no type

    def _read_together(self, parts: Sequence[_Part]) -> None:
        begin = parts[0].position
        data = self._buffer()[: max(part.position + part.nbytes for part in parts) - begin]
        self._handle.read_into(data, begin, parts[0].stretch.name)
        for part in parts:
            at = part.position - begin
            self._look(part, (data[at : at + part.nbytes],))

    def _pieces(self, part: _Part) -> Iterable[memoryview]:
        """Read a part piece by piece, into its target or into the reused buffer, and yield each piece."""
        target = part.stretch.target
        for begin in range(part.begin, part.begin + part.nbytes, BUFFER):
            length = min(BUFFER, part.begin + part.nbytes - begin)
            piece = self._buffer()[:length] if target is None else target[begin : begin + length]
            self._handle.read_into(piece, part.stretch.offset + begin, part.stretch.name)
            yield piece

    def _look(self, part: _Part, pieces: Iterable[memoryview]) -> None:
        """Update checksum and findings with the pieces of one part, each while it is in the cache."""
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
