"""Files that commands write for people and programs: pages and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from noether_init_core.pages.page import SaysItself

__all__ = ["Html", "check_target", "write_html", "write_text"]

Html = Annotated[
    Path | None,
    typer.Option("--html", help="Write a page to look at: one file, no network.", metavar="FILE", show_default=False),
]


def check_target(path: Path | None, option: str, suffixes: tuple[str, ...]) -> None:
    """Raise ``typer.BadParameter`` where writing there would destroy something else, or cannot succeed.

    To be called before the work is done. A file is written only where its name says that it is of this kind: a config
    behind ``--html`` is a slip of the hand.
    """
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder. Next: {path / ('plan' + suffixes[0])}", param_hint=option)
    if path.suffix.lower() not in suffixes:
        kept = " exists, is kept, and" if path.exists() else ""
        raise typer.BadParameter(
            f"{path}{kept} is no {suffixes[0]} file. Next: {option} {path.with_suffix(suffixes[0])}", param_hint=option
        )
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}. Next: mkdir -p {path.parent}", param_hint=option)


def write_html(path: Path | None, value: SaysItself, title: str | None = None) -> None:
    """Write the page of a value, and say where it is on standard error; nothing for None."""
    if path is None:
        return
    from noether_init_core.pages.page import html_page

    write_text(path, html_page(value, title=title), "--html")
    typer.echo(f"page: {path}", err=True)


def write_text(path: Path, text: str, option: str) -> None:
    """Write text as UTF-8. Raises ``typer.BadParameter`` where it cannot be written."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint=option) from error
