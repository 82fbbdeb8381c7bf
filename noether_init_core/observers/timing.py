"""The observer ``timing``: prints the time of each hook and phase of an initialization."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import Any

from noether_init_core.kinds.hookspec import HOOK_NAMES, hookimpl
from noether_init_core.kinds.naming import name_of
from noether_init_core.stopwatch import Stopwatch, Timing

_UNITS = ("B", "kB", "MB", "GB", "TB")
Around = Generator[None, Any, Any]


def _wrapper(hook: str) -> Callable[[TimingObserver, Any], Around]:
    @hookimpl(wrapper=True)
    def around(self: TimingObserver, initializer: Any) -> Around:
        return (yield from self._around(hook, initializer))

    return around


class TimingObserver:
    """Prints a line to stderr for each hook of each initializer: the time of the hook, and its new ``timings``.

    A line ``check`` has the time between two hooks, which is the check: most of ``find``, ``screen`` and ``verify``. A
    line is printed at the end of a hook, even if the hook fails.
    """

    def __init__(self) -> None:
        self._printed: weakref.WeakKeyDictionary[Stopwatch, tuple[Timing, ...]] = weakref.WeakKeyDictionary()

    start_checkpoint, init_trainer, init_weights, init_optimizer, init_callbacks = map(_wrapper, HOOK_NAMES)

    def _around(self, hook: str, initializer: Any) -> Around:
        before = self._new_of(initializer)
        if before:
            _print(initializer, "check", "", before)
        began = time.perf_counter()
        word = "failed"
        try:
            result = yield
            word = ""
            return result
        finally:
            seconds = _seconds(time.perf_counter() - began)
            _print(initializer, hook, seconds, self._new_of(initializer), word)

    def _new_of(self, initializer: Any) -> tuple[Timing, ...]:
        watch: Stopwatch = initializer.stopwatch
        found = watch.since(self._printed.get(watch, ()))
        self._printed[watch] = watch.timings
        return found


def in_words(one: Timing) -> str:
    """Return a timing in words: ``read 52.1 ms, 1.21 GB at 23.2 GB/s``."""
    words = f"{one.phase} {_seconds(one.seconds)}"
    if not one.nbytes:
        return words
    rate = f" at {_bytes(one.nbytes / one.seconds)}/s" if one.seconds > 0 else ""
    return f"{words}, {_bytes(one.nbytes)}{rate}"


def _print(initializer: Any, what: str, seconds: str, timings: Iterable[Timing], word: str = "") -> None:
    words = "  ".join(filter(None, (word, "; ".join(map(in_words, timings)))))
    print(f"timing  {name_of(initializer):<14} {what:<16} {seconds:>9}  {words}".rstrip(), file=sys.stderr)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{1 if seconds >= 0.01 else 2}f} ms"


def _bytes(number: float) -> str:
    unit = 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {_UNITS[unit]}"
