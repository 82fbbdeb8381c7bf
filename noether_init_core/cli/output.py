"""Output of commands: lines, tables, JSON and files; and checks of paths that were typed.

Names come from files, folders, configs and plugins. These functions print everything, and escape each character that a
terminal would act on. Files are written completely, or not at all.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from noether_init_core.errors import CheckpointFormatError, CheckpointNotFoundError, InitError
from noether_init_core.files.storage.disk import LOCAL, reaching
from noether_init_core.links import absence, no_folder
from noether_init_core.messages import in_shell, listed, near, one_line, printable
from noether_init_core.uris import local_path

if TYPE_CHECKING:
    from noether_init_pages import HasToDict

#: A cell of a table: a text, or a text and its colour.
Cell = str | tuple[str, str]

#: The JSON texts of each ``only_json`` that is entered.
_held: list[list[str]] = []
#: The standard outputs that got JSON.
_with_json: list[TextIO] = []
_NUMBERS = ("bytes", "elements", "files", "keys", "sets", "tensors")
_WHOLE = ("", "dtype", "iteration", "kind", "newest", "observer", "set")
_NARROW = 80
# rich takes a quarter of a millisecond for each row; beyond this number, str.ljust does the same
_MOST_IN_TABLE = 2_000


def show(line: str, *, err: bool = False) -> None:
    """Print one line; line breaks within it are escaped."""
    typer.echo(one_line(line), err=err)


def show_text(text: str, *, err: bool = False) -> None:
    """Print a text that may have several lines."""
    typer.echo(printable(text), err=err)


def show_json(name: str, data: Mapping[str, Any]) -> None:
    """Print ``data`` as the JSON of a command, after its format and its version (1 unless ``data`` sets another)."""
    print_json(json.dumps({"format": f"noether-init-{name}", "version": 1, **data}, indent=1, default=os.fspath))


def print_json(text: str) -> None:
    """Print a JSON text; within ``only_json`` at its end."""
    if _held:
        _held[-1].append(text)
    else:
        typer.echo(text)


@contextlib.contextmanager
def only_json() -> Iterator[None]:
    """Within the block nothing but ``print_json`` reaches standard output.

    What models and plugins print goes to standard error, also from C code and child processes.
    """
    texts: list[str] = []
    _held.append(texts)
    _with_json.append(sys.stdout)
    sys.stdout.flush()
    try:
        with _descriptor_redirected(sys.stdout, sys.stderr), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _held.remove(texts)
        for text in texts:
            typer.echo(text)


def leave_stdout_to_json() -> None:
    """Send all later output of this process to standard error, if its standard output got JSON.

    Plugins may print once more when the process ends: in threads, and in functions that ``atexit`` calls.
    """
    if sys.stdout is None or sys.stderr is None or sys.stdout is not sys.__stdout__ or sys.stdout not in _with_json:
        return
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = sys.stderr


@contextlib.contextmanager
def _descriptor_redirected(stream: TextIO, to: TextIO) -> Iterator[None]:
    try:
        number, target = stream.fileno(), to.fileno()
    except (OSError, ValueError):  # a stream of a notebook or a test has none
        yield
        return
    kept = os.dup(number)
    try:
        os.dup2(target, number)
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


def show_commands(commands: Iterable[tuple[str, str]]) -> None:
    """Print commands to type next, each with its purpose on the line below."""
    typer.echo("\nnext:")
    for command, what in commands:
        show(f"  {command}")
        if what:
            show(f"      {what}")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table without rules.

    A first column without a name holds marks. A terminal below 80 columns shows their symbols only, and a legend below.
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
        # rich would fold a short name to make room for long tags
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
#: Option -> suffixes of its files, and bytes near the start of each file that it wrote.
_WRITTEN = {
    "--html": ((".html", ".htm"), b'content="noether-init-core'),
    "--json": ((".json",), b'"format": "noether-init-plan"'),
}


def check_target(path: Path | None, option: str) -> None:
    """Raise ``typer.BadParameter`` where ``option`` cannot write its file, ``InitError`` where a package is missing.

    Call it before the work, because a typing error must not replace a config, a manifest or a report. A file that
    exists is replaced only if this option wrote it, and no file is written among checkpoints. For ``--json``, ``-`` is
    standard output.
    """
    if path is None or (option == "--json" and str(path) == "-"):
        return
    from noether_init_core.sets.checkpoint_set import lies_in_a_run

    suffixes, ours = _WRITTEN[option]
    problem = None
    with reaching(path):
        if LOCAL.is_folder(path):
            problem = f"{path} is a folder. Next: {option} {in_shell(path / ('plan' + suffixes[0]))}"
        elif path.suffix.lower() not in suffixes or not path.stem:
            kept = " exists, was not replaced, and" if LOCAL.exists(path) else ""
            named = path.with_suffix(suffixes[0]) if path.stem.strip("-. ") else Path("plan").with_suffix(suffixes[0])
            problem = f"{path}{kept} is not a {suffixes[0]} file. Next: {option} {in_shell(named)}"
        elif not LOCAL.is_folder(path.parent):
            problem = f"{no_folder(path.parent)}. Next: mkdir -p {in_shell(path.parent)}"
        elif lies_in_a_run(path):
            problem = f"{path} is in the checkpoint folder of a run. Next: {option} {in_shell(path.name)}"
        elif LOCAL.exists(path) and not (not LOCAL.is_link(path) and LOCAL.is_file(path) and ours in _head(path)):
            problem = f"{path} exists and was not written by {option}; it was not replaced. Next: another name"
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


def write_html(path: Path | None, value: HasToDict) -> None:
    """Write the page of a value and print its path on standard error; do nothing if ``path`` is None."""
    if path is not None:
        from noether_init_pages import html_page

        write_text(path, html_page(value))
        typer.echo(f"page: {path}", err=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically. Raises ``InitError``; then the file is unchanged."""
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial")
    try:
        # a name in a file may hold a lone surrogate, which UTF-8 cannot encode
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(temporary, path)
    except OSError as error:
        raise InitError(f"{path} cannot be written: {error.strerror}. Nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def _with_model(path: Path) -> str:
    """The command that takes the model of a module, if there is a config for it here."""
    configs = sorted([*glob.glob("*.yaml"), *glob.glob("*.yml")], key=lambda name: (name != "init.yaml", name))
    if not configs:
        return "A command with --model takes it, beside a config. Next: ninit, which lists runs and configs here"
    with reaching(path), path.open("rb") as file:
        name = "build" if re.search(rb"^(def|class) build\b", file.read(100_000), re.MULTILINE) else "callable"
    folder = "" if path.parent == Path() else f" --app-dir {in_shell(path.parent)}"
    model = in_shell(f"{path.stem}:{name}")
    return f"A model is given beside a config. Next: ninit plan {in_shell(configs[0])} --model {model}{folder}"


def check_path(path: Path) -> None:
    """Raise where ``path`` is absent or is a config; the message names near paths and the next command.

    Raises ``ConfigError`` for a URI, ``CheckpointNotFoundError`` for an absent path, ``CheckpointFormatError`` for a
    file of YAML or Python.
    """
    from noether_init_core.sets.checkpoint_set import list_names

    local_path(path)
    with reaching(path):
        is_there = LOCAL.leads_somewhere(path)
        is_module = path.suffix.lower() == ".py" and LOCAL.is_file(path)
        is_config = path.suffix.lower() in (".yaml", ".yml") and LOCAL.is_file(path) and b"\0" not in _head(path)
    absent = "" if is_there else absence(path)
    if "Next: " in absent:
        raise CheckpointNotFoundError(f"{path} {absent}", path=path, asked=str(path))
    run, at, tag = path.name.rpartition("@")
    if not is_there and at and run and LOCAL.leads_somewhere(path.with_name(run)):
        raise CheckpointNotFoundError(
            f"{path} does not exist, and only ninit diff takes RUN@{one_line(tag)}. "
            f"Next: ninit inspect {in_shell(path.with_name(run))}",
            path=path,
            asked=str(path),
        )
    if not is_there:
        with reaching(path):
            folder = next((parent for parent in path.parents if LOCAL.is_folder(parent)), Path())
            there = [name for name in list_names(folder, LOCAL) if not name.startswith(".")]
        asked = path.relative_to(folder).parts[0] if path.is_relative_to(folder) and path != folder else path.name
        found = near(asked, there, cutoff=0.5)
        nearest = f"Near: {', '.join(str(folder / name) for name in found)}. " if found else ""
        where = "this folder" if folder == Path() else str(folder)
        following = shlex.quote(str(folder / (found[0] if found else "")))
        raise CheckpointNotFoundError(
            f"{path} does not exist. {nearest}Found in {where}: {listed(there, 8, none='no files')}. "
            f"Next: ninit inspect {following}",
            path=path,
            asked=str(path),
            candidates=found or there,
        )
    if is_module:
        raise CheckpointFormatError(f"{path} is a Python file, not a checkpoint. {_with_model(path)}", path=path)
    if is_config:
        raise CheckpointFormatError(
            f"{path} is a YAML file, not a checkpoint. Next: ninit validate {shlex.quote(str(path))}",
            path=path,
        )
