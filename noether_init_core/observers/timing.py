"""The observer ``timing``: prints where the time of an initialization goes, a line for each hook."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import Any

from noether_init_core.kinds.hookspec import HOOK_NAMES, hookimpl
from noether_init_core.stopwatch import Stopwatch, Timing

_UNITS = ("B", "kB", "MB", "GB", "TB")
Around = Generator[None, Any, Any]


def _wrapper(hook: str) -> Callable[[TimingObserver, Any], Around]:
    @hookimpl(wrapper=True)
    def around(self: TimingObserver, initializer: Any) -> Around:
        return (yield from self._around(hook, initializer))

    return around


class TimingObserver:
    """Prints to stderr, around each hook of each initializer: the hook's own time, and what is new in its ``timings``.

    A line ``check`` tells of what came between two hooks, which is the check: most of ``find``, ``screen`` and
    ``verify``. The line is printed when the hook ends, also when it fails.
    """

    def __init__(self) -> None:
        self._told: weakref.WeakKeyDictionary[Stopwatch, tuple[Timing, ...]] = weakref.WeakKeyDictionary()

    start_checkpoint, init_trainer, init_weights, init_optimizer, init_callbacks = map(_wrapper, HOOK_NAMES)

    def _around(self, hook: str, initializer: Any) -> Around:
        before = self._new_of(initializer)
        if before:
            _tell(initializer, "check", "", before)
        began = time.perf_counter()
        word = "failed"
        try:
            result = yield
            word = ""
            return result
        finally:
            seconds = _seconds(time.perf_counter() - began)
            _tell(initializer, hook, seconds, self._new_of(initializer), word)

    def _new_of(self, initializer: Any) -> tuple[Timing, ...]:
        watch: Stopwatch = initializer.stopwatch
        found = watch.since(self._told.get(watch, ()))
        self._told[watch] = watch.timings
        return found


def in_words(one: Timing) -> str:
    """``read 52.1 ms, 1.21 GB at 23.2 GB/s``."""
    words = f"{one.phase} {_seconds(one.seconds)}"
    if not one.nbytes:
        return words
    rate = f" at {_bytes(one.nbytes / one.seconds)}/s" if one.seconds > 0 else ""
    return f"{words}, {_bytes(one.nbytes)}{rate}"


def _tell(initializer: Any, what: str, seconds: str, timings: Iterable[Timing], word: str = "") -> None:
    said = "  ".join(filter(None, (word, "; ".join(map(in_words, timings)))))
    print(f"timing  {initializer.config.kind:<14} {what:<16} {seconds:>9}  {said}".rstrip(), file=sys.stderr)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{1 if seconds >= 0.01 else 2}f} ms"


def _bytes(number: float) -> str:
    unit = 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {_UNITS[unit]}"
