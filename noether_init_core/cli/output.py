"""What commands print: lines and tables for people, JSON for programs, a bar where it takes long.

Names come from files, folders, configs and plugins. Everything is printed by these functions, which escape what a
terminal would act on.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from noether_init_core.messages import one_line, printable

#: A cell of a table: a text, or a text and its colour.
Cell = str | tuple[str, str]

_NUMBERS = ("bytes", "elements", "files", "keys", "sets", "tensors")
_WHOLE = ("", "dtype", "iteration", "newest", "set")
_NARROW = 80
# rich takes a quarter of a millisecond for each
_MOST_IN_TABLE = 2_000


def show(line: str, *, err: bool = False) -> None:
    """Print one line; line breaks within it are escaped."""
    typer.echo(one_line(line), err=err)


def show_text(text: str, *, err: bool = False) -> None:
    """Print a text with line breaks of its own."""
    typer.echo(printable(text), err=err)


def show_json(name: str, data: Mapping[str, Any]) -> None:
    """Print ``data`` as the JSON of a command: its format comes first, and its version, unless ``data`` has one."""
    typer.echo(json.dumps({"format": f"noether-init-{name}", "version": 1, **data}, indent=1, default=os.fspath))


def show_commands(commands: Sequence[tuple[str, str]], narrow: int = 50) -> None:
    """Print commands to type next, each with what it does: beside it, or below it where a command is long."""
    width = max(len(command) for command, _what in commands)
    typer.echo("\nnext:")
    for command, what in commands:
        show(f"  {command:<{width}}   {what}".rstrip() if width < narrow else f"  {command}")
        if what and width >= narrow:
            show(f"      {what}")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table without lines.

    A first column without a name holds marks, of which a narrow terminal shows the symbols; their words stand below.
    """
    lines = [[(cell, "") if isinstance(cell, str) else cell for cell in row] for row in rows]
    if len(lines) > _MOST_IN_TABLE:
        texts = [list(columns), *([one_line(text) for text, _style in line] for line in lines)]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        typer.echo("\n".join("  ".join(map(str.ljust, text, widths)).rstrip() for text in texts))
        return
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        # a short name is not broken for the sake of tags
        is_short = column == "run" and all(len(line[number][0]) <= console.width // 3 for line in lines)
        table.add_column(
            column,
            overflow="fold",
            no_wrap=is_short or column in (*_NUMBERS, *_WHOLE),
            justify="right" if column in _NUMBERS else "left",
        )
    is_narrow = columns[0] == "" and console.width < _NARROW
    for line in lines:
        shown = [(line[0][0][:1], line[0][1]), *line[1:]] if is_narrow else line
        table.add_row(*(Text(one_line(text), style) for text, style in shown))
    console.print(table)
    if is_narrow:
        show(", ".join(dict.fromkeys(line[0][0] for line in lines)))


def from_here(path: Path | str) -> Path:
    """The path as seen from the current folder, where it lies below it."""
    path, here = Path(path), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


_PATIENCE_S = 1.0


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called with every number of bytes that are done.

    Args:
        label: What is done, as one word: ``verifying``.
        total: Bytes in all; None for work that does not tell how far it is.

    Without a terminal nothing is written. May be called from several threads.
    """
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
