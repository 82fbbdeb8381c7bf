"""Paths that were typed; and files that commands write for people and programs: whole, or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from noether_init_core.errors import CheckpointFormatError, CheckpointNotFoundError, InitError
from noether_init_core.messages import listed, near

if TYPE_CHECKING:
    from noether_init_pages import SaysItself

_LOOKED_AT = 4096
# what our own files begin with
_PAGE, _PLAN = b'content="noether-init-core', b'"format": "noether-init-plan"'


def check_page(path: Path | None) -> None:
    """Raise ``typer.BadParameter`` where a page cannot be written, ``InitError`` where none can be made."""
    if path is None:
        return
    _check(path, "--html", (".html", ".htm"), _PAGE)
    try:
        import noether_init_pages  # noqa: F401 - found out before the work is done
    except ModuleNotFoundError as error:
        if error.name != "noether_init_pages":
            raise
        raise InitError(
            "--html needs the distribution noether-init-pages, which is not installed. "
            'Next: pip install "noether-init-core[pages]"'
        ) from None


def check_plan(path: Path | None) -> None:
    """Raise ``typer.BadParameter`` where the JSON of a plan cannot be written; ``-`` is standard output."""
    if path is not None and str(path) != "-":
        _check(path, "--json", (".json",), _PLAN)


def _check(path: Path, option: str, suffixes: tuple[str, ...], ours: bytes) -> None:
    """To be called before the work is done: a slip of the hand must not cost a config, a manifest or a report.

    A file that is there is replaced only where it is of this kind and of ours; nothing is written among checkpoints.
    """
    from noether_init_core.sets.checkpoint_set import lies_in_a_run

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


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_LOOKED_AT)


def write_html(path: Path | None, value: SaysItself, title: str | None = None) -> None:
    """Write the page of a value, and say where it is on standard error; nothing for None."""
    if path is not None:
        from noether_init_pages import html_page

        write_text(path, html_page(value, title=title))
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

    Raises ``CheckpointNotFoundError`` for an absent path, ``CheckpointFormatError`` for a config or another text.
    """
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
            f"Next: noether-init inspect {following}",
            path=path,
            asked=str(path),
            candidates=found or there,
        )
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file() and b"\0" not in _head(path):
        raise CheckpointFormatError(
            f"{path} is text, no checkpoint. If it is a config: noether-init validate {shlex.quote(str(path))}",
            path=path,
        )
