"""Where the time of an initialization went: phases, their seconds and their bytes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import attrs

#: The phases of this package, in the order in which they are told; a kind may have others besides.
PHASES = ("find", "screen", "verify", "read", "cast", "copy")


@attrs.frozen
class Timing:
    """Seconds of one phase, and the bytes that went through it; None where bytes make no sense.

    ======== =============================================================================================
    find     which set and which files are meant: folders listed, manifests read
    screen   files opened: structure, header, places of all tensors. No bytes are counted
    verify   bytes compared with checksums or digests, values looked at. Optimizer state is read into the
             memory that it stays in by the same pass, so with ``verify: full`` its reading is in here
    read     from the file into memory, for most weights straight into the parameter: no copy follows
    cast     tensors of another dtype or order in memory than in the file, converted piece by piece; reading
             the pieces is in here
    copy     what steps of ``transforms`` make, loading code of modules, the way to an accelerator through
             small buffers (reading included), optimizer state that is handed over
    ======== =============================================================================================

    A phase inside another one counts by itself, so no second counts twice. Between the phases is what is in none of
    them: config, plan, code of trainers and callbacks, the report. With several threads it is the time that passed,
    and not that of each thread.
    """

    phase: str
    seconds: float
    nbytes: int | None = None


class Stopwatch:
    """Adds up the time of phases; for one thread at a time. A phase costs two looks at a clock.

    A kind that reads in its own way measures it so, under a name of ``PHASES`` or one of its own::

        with self.stopwatch.phase("download", nbytes):
            ...

    ``open_checkpoint(path, stopwatch=self.stopwatch)`` measures what the reader does.

    Attributes:
        bar: Shows a phase: its name and bytes -> a context that gives what is called with bytes as they are read. Set
            it before files are opened.
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
        """Count the time of the block, less that of phases inside it; ``nbytes`` unless it raises.

        ``expected`` bytes are those that a bar ends with, where ``count`` tells the real number afterwards.
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
        """Add bytes to the phase that runs, where their number is known only afterwards."""
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
        """What has been counted so far: ``PHASES`` in their order, then others as they came."""
        return _ordered(self._seconds, self._nbytes)

    def since(self, earlier: Iterable[Timing]) -> tuple[Timing, ...]:
        """What has been counted since ``timings`` was ``earlier``."""
        taken = [Timing(one.phase, -one.seconds, -(one.nbytes or 0)) for one in earlier]
        counted = [Timing(one.phase, one.seconds, one.nbytes or None) for one in summed([*self.timings, *taken])]
        return tuple(one for one in counted if one.seconds or one.nbytes)

    def _switch(self) -> None:
        """Give the time since the last switch to the phase that ran."""
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now


def summed(timings: Iterable[Timing]) -> tuple[Timing, ...]:
    """One timing for each phase; bytes are None where none of them has any."""
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
