"""Paths that were typed, and what commands print and write: lines, tables, JSON, files.

Names come from files, folders, configs and plugins. Everything is printed by these functions, which escape what a
terminal would act on. Files are written as a whole, or not at all.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from noether_init_core.errors import CheckpointFormatError, CheckpointNotFoundError, InitError
from noether_init_core.messages import listed, near, one_line, printable
from noether_init_core.uris import local_path

if TYPE_CHECKING:
    from noether_init_pages import SaysItself

#: A cell of a table: a text, or a text and its colour.
Cell = str | tuple[str, str]

_NUMBERS = ("bytes", "elements", "files", "keys", "sets", "tensors")
_WHOLE = ("", "dtype", "iteration", "kind", "newest", "observer", "set")
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


def show_commands(commands: Iterable[tuple[str, str]]) -> None:
    """Print commands to type next, each with what it does below it."""
    typer.echo("\nnext:")
    for command, what in commands:
        show(f"  {command}")
        if what:
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


_LOOKED_AT = 4096
#: Option -> suffixes of its files, and what those that it wrote begin with.
_WRITTEN = {
    "--html": ((".html", ".htm"), b'content="noether-init-core'),
    "--json": ((".json",), b'"format": "noether-init-plan"'),
}


def check_target(path: Path | None, option: str) -> None:
    """Raise ``typer.BadParameter`` where ``option`` cannot write its file, ``InitError`` where none can be made.

    To be called before the work is done: a slip of the hand must not cost a config, a manifest or a report. A file that
    is there is replaced only where it is of this kind and of ours; nothing is written among checkpoints. For
    ``--json``, ``-`` is standard output.
    """
    if path is None or (option == "--json" and str(path) == "-"):
        return
    from noether_init_core.sets.checkpoint_set import lies_in_a_run

    suffixes, ours = _WRITTEN[option]
    problem = None
    if path.is_dir():
        problem = f"{path} is a folder. Next: {option} {path / ('plan' + suffixes[0])}"
    elif path.suffix.lower() not in suffixes or not path.stem:
        kept = " exists, is kept, and" if path.exists() else ""
        named = path.with_suffix(suffixes[0]) if path.stem.strip("-. ") else Path("plan").with_suffix(suffixes[0])
        problem = f"{path}{kept} is no {suffixes[0]} file. Next: {option} {named}"
    elif not path.parent.is_dir():
        problem = f"there is no folder {path.parent}. Next: mkdir -p {path.parent}"
    elif lies_in_a_run(path):
        problem = f"{path} lies among checkpoints of a run. Next: {option} {path.name}, in this folder"
    elif os.path.lexists(path) and not (path.is_file() and not path.is_symlink() and ours in _head(path)):
        problem = f"{path} exists and was not written by this option; it is kept. Next: another name"
    if problem is not None:
        raise typer.BadParameter(problem, param_hint=option)
    if option == "--html" and importlib.util.find_spec("noether_init_pages") is None:
        raise InitError(
            "--html needs the distribution noether-init-pages, which is not installed. "
            'Next: pip install "noether-init-core[pages]"'
        )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_LOOKED_AT)


def write_html(path: Path | None, value: SaysItself) -> None:
    """Write the page of a value, and say where it is on standard error; nothing for None."""
    if path is not None:
        from noether_init_pages import html_page

        write_text(path, html_page(value))
        typer.echo(f"page: {path}", err=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 and give it its name at the end. Raises ``InitError``; then nothing has changed."""
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial")
    try:
        # names that are no text come out of files, too
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(temporary, path)
    except OSError as error:
        raise InitError(f"{path} cannot be written: {error.strerror}. Nothing was changed there") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_path(path: Path) -> None:
    """Raise where ``path`` cannot be what was meant, with what is near to it and the next command.

    Raises ``ConfigError`` for a URI, ``CheckpointNotFoundError`` for an absent path, ``CheckpointFormatError`` for a
    config or another text.
    """
    local_path(path)
    if not path.exists():
        folder = next((parent for parent in path.parents if parent.is_dir()), Path())
        asked = path.relative_to(folder).parts[0] if path.is_relative_to(folder) and path != folder else path.name
        there = sorted(glob.glob("*", root_dir=folder))
        found = near(asked, there, cutoff=0.5)
        nearest = f"Near: {', '.join(str(folder / name) for name in found)}. " if found else ""
        where = "this folder" if folder == Path() else str(folder)
        following = shlex.quote(str(folder / (found[0] if found else "")))
        raise CheckpointNotFoundError(
            f"{path} does not exist. {nearest}In {where} there are: {listed(there, 8, none='no files')}. "
            f"Next: ninit inspect {following}",
            path=path,
            asked=str(path),
            candidates=found or there,
        )
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file() and b"\0" not in _head(path):
        raise CheckpointFormatError(
            f"{path} is text, no checkpoint. If it is a config: ninit validate {shlex.quote(str(path))}",
            path=path,
        )
