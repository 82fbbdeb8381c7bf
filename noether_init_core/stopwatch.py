"""Measure the phases of an initialization: their seconds and their bytes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import attrs

#: The phases of this package, in the order in which reports list them. A kind may add its own.
PHASES = ("find", "screen", "verify", "read", "cast", "copy")


@attrs.frozen
class Timing:
    """Seconds and bytes of one phase; ``nbytes`` is None for a phase that counts no bytes.

    ======== =============================================================================================
    find     select the set and the files: list folders, read manifests
    screen   open files: check the structure, read the header, locate all tensors. No bytes are counted
    verify   compare bytes with checksums or digests, check values for NaN. Optimizer state is read into its
             final memory by the same pass, so with ``verify: full`` this includes reading it
    read     read from the file into memory; most weights go straight into the parameter without a copy
    cast     convert tensors of another dtype or memory order than in the file, piece by piece; this includes
             reading the pieces
    copy     run steps of ``transforms`` and loading code of modules, copy to an accelerator through small
             buffers (including reading), hand over optimizer state
    ======== =============================================================================================

    A phase inside another one is counted separately, so no second counts twice. Work outside all phases is not counted:
    config, plan, code of trainers and callbacks, the report. With several threads, seconds are elapsed time, not the
    sum over threads.
    """

    phase: str
    seconds: float
    nbytes: int | None = None


class Stopwatch:
    """Adds up the time of phases. Not thread-safe; a phase costs two clock reads.

    A kind with reading code of its own measures it under a name of ``PHASES`` or a new name::

        with self.stopwatch.phase("download", nbytes):
            ...

    ``open_checkpoint(path, stopwatch=self.stopwatch)`` measures the phases of the reader.

    Attributes:
        bar: Shows a phase: from its name and bytes a context that gives a function to call with the bytes of each read.
            Set it before files are opened.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._nbytes: defaultdict[str, int] = defaultdict(int)
        self._running: list[str] = []
        self._since = 0.0
        self.bar: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] | None = None
        self._advance: Callable[[int], None] | None = None

    @contextmanager
    def phase(self, name: str, nbytes: int | None = None, *, expected: int | None = None) -> Iterator[None]:
        """Count the time of the block without the phases inside it, and ``nbytes`` unless the block raises.

        ``expected`` is the number of bytes at which a bar ends, where ``count`` gives the real number afterwards.
        """
        self._switch()
        self._running.append(name)
        try:
            with self._shown(name, expected or nbytes or 0):
                yield
            self.count(nbytes or 0)
        finally:
            self._switch()
            self._running.pop()

    def count(self, nbytes: int) -> None:
        """Add bytes to the running phase, for a number that is known only afterwards."""
        if nbytes:
            self._nbytes[self._running[-1]] += nbytes

    def advance(self, nbytes: int) -> None:
        """Move the bar, if one is shown. May be called from any thread."""
        if self._advance is not None:
            self._advance(nbytes)

    def _shown(self, name: str, nbytes: int) -> AbstractContextManager[None]:
        # a phase inside another one moves the bar of that one
        is_shown = self.bar is not None and nbytes and self._advance is None
        return self._with_bar(name, nbytes) if is_shown else nullcontext()

    @contextmanager
    def _with_bar(self, name: str, nbytes: int) -> Iterator[None]:
        assert self.bar is not None
        with self.bar(name, nbytes) as self._advance:
            try:
                yield
            finally:
                self._advance = None

    @property
    def timings(self) -> tuple[Timing, ...]:
        """The counts so far: ``PHASES`` in their order, then other phases in the order of their first use."""
        return _ordered(self._seconds, self._nbytes)

    def since(self, earlier: Iterable[Timing]) -> tuple[Timing, ...]:
        """Return the counts since ``timings`` had the value ``earlier``."""
        taken = [Timing(one.phase, -one.seconds, -(one.nbytes or 0)) for one in earlier]
        counted = [Timing(one.phase, one.seconds, one.nbytes or None) for one in summed([*self.timings, *taken])]
        return tuple(one for one in counted if one.seconds or one.nbytes)

    def _switch(self) -> None:
        """Add the time since the last switch to the phase that was running."""
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now


def summed(timings: Iterable[Timing]) -> tuple[Timing, ...]:
    """Return one timing for each phase; bytes are None for a phase without bytes."""
    seconds: defaultdict[str, float] = defaultdict(float)
    nbytes: defaultdict[str, int] = defaultdict(int)
    for one in timings:
        seconds[one.phase] += one.seconds
        if one.nbytes is not None:
            nbytes[one.phase] += one.nbytes
    return _ordered(seconds, nbytes)


def _ordered(seconds: Mapping[str, float], nbytes: Mapping[str, int]) -> tuple[Timing, ...]:
    names = [*(name for name in PHASES if name in seconds), *(name for name in seconds if name not in PHASES)]
    return tuple(Timing(name, seconds[name], nbytes.get(name)) for name in names)
