"""Comparison of every record with the checksum that was written for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import attrs
from isal import isal_zlib

from noether_init_core.checkpoints.file_handle import FileHandle
from noether_init_core.checkpoints.records import Record

__all__ = ["damaged_records"]

# Small enough for the processor's cache, large enough that the system calls do not count.
_BUFFER = 1 << 20
# One thread takes this much at a time; larger records are split and their sums combined.
_GROUP = 32 << 20


@attrs.frozen
class _Segment:
    index: int
    offset: int
    length: int


def damaged_records(handle: FileHandle, records: Sequence[Record]) -> list[Record]:
    """The records whose bytes do not have their CRC-32. Never more than a small buffer per thread is in memory."""
    groups = deque(_grouped(records))
    sums: dict[_Segment, int] = {}

    def work() -> None:
        buffer = memoryview(bytearray(_BUFFER))
        while True:
            try:
                group = groups.popleft()
            except IndexError:
                return
            _sum_group(handle, group, buffer, sums)

    if len(groups) < 2:
        work()
    else:
        with ThreadPoolExecutor(2) as pool:
            for result in [pool.submit(work), pool.submit(work)]:
                result.result()
    found = [0] * len(records)
    for segment in sorted(sums, key=lambda segment: segment.offset):
        found[segment.index] = isal_zlib.crc32_combine(found[segment.index], sums[segment], segment.length)
    return [record for record, crc in zip(records, found, strict=True) if crc != record.crc]


def _grouped(records: Sequence[Record]) -> Iterable[list[_Segment]]:
    group: list[_Segment] = []
    total = 0
    for index, record in sorted(enumerate(records), key=lambda pair: pair[1].offset):
        for start in range(0, record.size, _GROUP):
            length = min(_GROUP, record.size - start)
            group.append(_Segment(index, record.offset + start, length))
            total += length
            if total >= _GROUP:
                yield group
                group, total = [], 0
    if group:
        yield group


def _sum_group(handle: FileHandle, group: list[_Segment], buffer: memoryview, sums: dict[_Segment, int]) -> None:
    """One pass over neighbouring segments; one read serves as many small ones as it holds."""
    begin = end = 0  # what part of the file is in the buffer
    stop = group[-1].offset + group[-1].length
    for segment in group:
        crc, position, last = 0, segment.offset, segment.offset + segment.length
        while position < last:
            if not begin <= position < end:
                begin, end = position, min(position + len(buffer), stop)
                handle.read_into(buffer[: end - begin], begin)
            upto = min(end, last)
            crc = isal_zlib.crc32(buffer[position - begin : upto - begin], crc)
            position = upto
        sums[segment] = crc
