"""The observer ``progress``: a bar for every large piece of reading, on a terminal or in a notebook."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from noether_init_core.kinds.hookspec import hookimpl
from noether_init_core.kinds.naming import name_of
from noether_init_core.messages import one_line
from noether_init_core.progress import Advance, progress

Around = Generator[None, Any, Any]
# what is smaller is read in less time than a bar waits
_LEAST = 1 << 24


class ProgressObserver:
    """Shows a bar with bytes and rate while a phase of an initializer reads, where that takes longer than a second.

    It goes to stderr on a terminal, below the cell in a notebook, and nowhere else. Phases are those of ``Timing``.
    """

    @hookimpl(wrapper=True)
    def start_checkpoint(self, initializer: Any) -> Around:
        _watch(initializer)
        return (yield)

    @hookimpl(wrapper=True)
    def init_weights(self, initializer: Any) -> Around:
        # not every entry of a config is asked for its start
        _watch(initializer)
        return (yield)


def _watch(initializer: Any) -> None:
    kind = one_line(name_of(initializer))

    def bar(phase: str, nbytes: int) -> AbstractContextManager[Advance]:
        if nbytes < _LEAST:
            return nullcontext(lambda _nbytes: None)
        return progress(f"{kind}: {phase}", nbytes)

    initializer.stopwatch.bar = bar
