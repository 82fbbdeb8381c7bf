"""A bar for those who wait: bytes, rate and time left, on the standard error of a terminal, after a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

__all__ = ["progress", "transfers"]

_PATIENCE_S = 1.0
_TURN_S = 0.1


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called with every number of bytes that are done.

    Args:
        label: What is done, as one word: ``verifying``.
        total: Bytes in all; None where that is not known.

    Without a terminal nothing is written. May be called from several threads.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=total)
    timer = threading.Timer(_PATIENCE_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done: bar.advance(task, done)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


@contextmanager
def transfers(label: str, total: int, counter: Literal["rchar", "wchar"]) -> Iterator[None]:
    """The same bar for work that tells nothing of itself: what this process reads or writes meanwhile moves it.

    Args:
        label: What is done.
        total: About how many bytes will be read or written.
        counter: ``rchar`` for reading, ``wchar`` for writing: lines of ``/proc/self/io``. Where that is not there, the
            bar only shows that something goes on.
    """
    done = threading.Event()

    def watch(advance: Callable[[int], None], before: int) -> None:
        while not done.wait(_TURN_S):
            now = _counted(counter)
            advance(now - before)
            before = now

    with progress(label, total) as advance:
        watcher = threading.Thread(target=watch, args=(advance, _counted(counter)), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _counted(counter: str) -> int:
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(counter)), 0)
