"""``progress``: how far reading is, on a terminal or in a notebook; nothing anywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module
from typing import Any

#: Called with every number of bytes that are done, from any thread.
Advance = Callable[[int], None]

_PATIENCE_S = 1.0
_PAUSE_S = 0.2
# rich refuses a second bar
_is_shown = threading.Lock()


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Advance]:
    """Show a bar for the work of the block, where it takes longer than a second. Inside another one it shows nothing.

    Args:
        label: What is done, as one word: ``verifying``.
        total: Bytes in all; None for work that does not tell how far it is.

    Gives what is to be called with every number of bytes that are done, from any thread.
    """
    if not _is_shown.acquire(blocking=False):
        yield _nothing
        return
    try:
        with (_in_notebook if _has_notebook() else _on_terminal)(label, total) as advance:
            yield advance
    finally:
        _is_shown.release()


def _nothing(_nbytes: int) -> None:
    """The function to call where no bar is shown."""


def _has_notebook() -> bool:
    """Whether the code runs in a kernel of IPython."""
    shell: Any = import_module("IPython").get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


@contextmanager
def _on_terminal(label: str, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _nothing
        return
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(label, total=total)
    timer = threading.Timer(_PATIENCE_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda nbytes: bar.advance(task, nbytes)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


@contextmanager
def _in_notebook(label: str, total: int | None) -> Iterator[Advance]:
    from rich.filesize import decimal

    display = import_module("IPython.display").display
    lock, began, done = threading.Lock(), time.monotonic(), 0
    due = began + _PATIENCE_S
    handle: Any = None

    def show() -> None:
        nonlocal handle
        rate = decimal(round(done / max(time.monotonic() - began, 1e-6)))
        text = f"{label}  {decimal(done)}{'' if total is None else f' of {decimal(total)}'}, {rate}/s"
        ends = "" if total is None else f' value="{done}" max="{total}"'
        data = {"text/plain": text, "text/html": f"<progress{ends}></progress> {escape(text)}"}
        if handle is None:
            handle = display(data, raw=True, display_id=True)
        else:
            handle.update(data, raw=True)

    def advance(nbytes: int) -> None:
        nonlocal done, due
        with lock:
            done += nbytes
            if time.monotonic() >= due:
                due = time.monotonic() + _PAUSE_S
                show()

    yield advance
    if handle is not None:
        show()
