"""Reads that fail: each of them once, and each of them together with all that follow."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from faults.campaign.damage import judge
from faults.campaign.subjects import Subject
from noether_init_core.errors import InitError, PartlyInitializedError

__all__ = ["HOW", "failing_reads", "reading_failures"]

#: ``cut``: the file ends where it did not end when it was opened.
HOW = ("EIO once", "EIO from then on", "cut from then on")


class _Reads:
    """The calls of the system that read at a place, counted, and failing from a number on."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.calls = at, how, 0
        self._pread, self._preadv = os.pread, os.preadv

    def _fails(self) -> bool:
        self.calls += 1
        return bool(self.at) and (self.calls == self.at or (self.calls > self.at and self.how != HOW[0]))

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        if not self._fails():
            return self._pread(descriptor, length, offset)
        if self.how == HOW[2]:
            return b""
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def preadv(self, descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if not self._fails():
            return self._preadv(descriptor, buffers, offset, flags)
        if self.how == HOW[2]:
            return 0
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextlib.contextmanager
def failing_reads(at: int, how: str) -> Iterator[_Reads]:
    """Let the read with the number ``at`` fail, and later ones; 0 only counts. A disk that does so is not at hand."""
    reads = _Reads(at, how)
    before = os.pread, os.preadv
    os.pread, os.preadv = reads.pread, reads.preadv  # type: ignore[assignment]
    try:
        yield reads
    finally:
        os.pread, os.preadv = before


def reading_failures(subject: Subject, how: str, *, start: int = 0) -> Iterator[Counter[str]]:
    """One counter for each read of one initialization.

    ``partly`` counts the one exception: the disk failed after everything had been verified, ``PartlyInitializedError``
    says so, and the states of trainer and callback are as they were.
    """
    truth = subject.truth(subject.load)
    with failing_reads(0, how) as counting:
        subject.attempt(subject.load)
    for at in range(1 + start, counting.calls + 1):
        with failing_reads(at, how):
            found = subject.attempt(subject.load)
        counted = Counter(tried=1)
        if found.error is None:
            counted["harmless" if found.after == truth else "silent"] += 1
        elif isinstance(found.error, PartlyInitializedError):
            counted["partly" if found.states_kept else "half changed"] += 1
        else:
            counted["detected"] += 1
            counted["half changed"] += found.after != found.before
            counted["foreign error"] += not isinstance(found.error, InitError)
        yield counted
    if judge(subject, subject.load, truth).outcome != "harmless":
        raise AssertionError(f"{subject.name}: the files changed while they were read")
