"""``noether-init kinds``: every installed kind, without importing any."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated

import typer

from noether_init_core import kinds
from noether_init_core.cli.output import show, show_table
from noether_init_core.messages import one_line
from noether_init_core.observers.loading import installed_observers


def run(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of objects.")] = False,
    observers: Annotated[
        bool, typer.Option("--observers", help="List observers instead, for observers: [...].")
    ] = False,
) -> None:
    """List the kinds that installed distributions offer. No plugin is imported."""
    found = installed_observers() if observers else kinds.installed()
    what = "observer" if observers else "kind"
    counts = Counter(info.name for info in found if info.blocked_by is None)
    if as_json:
        rows = [
            {
                "name": info.name,
                "distribution": info.distribution,
                "version": info.version,
                "target": info.target,
                "blocked_by": info.blocked_by,
                "conflict": info.blocked_by is None and counts[info.name] > 1,
            }
            for info in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not found:
        show(f"no {what} is installed. Next: pip install noether-init-core")
        return
    _show(
        what,
        [(_mark(info.blocked_by, counts[info.name]), one_line(info.name), one_line(info.source)) for info in found],
    )
    if any(count > 1 for count in counts.values()):
        show(f"x what is offered more than once cannot be used; see {kinds.DENY_VARIABLE}")


def _mark(blocked_by: str | None, count: int) -> tuple[str, str]:
    if blocked_by is not None:
        return f"- {blocked_by}", "dim"
    return ("x conflict", "red") if count > 1 else ("ok", "green")


def _show(what: str, rows: list[tuple[tuple[str, str], str, str]]) -> None:
    """A table; where it does not fit, who offers a kind stands below it, so that no name is broken."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    widths = [max(map(len, column)) for column in zip(*((mark[0], *rest) for mark, *rest in rows), strict=True)]
    if sum(widths) + 4 <= console.width:
        show_table(("", what, "offered by"), rows)
        return
    for (mark, style), name, source in rows:
        # a line that is too long all the same is broken by the terminal, and copied as one
        console.print(Text(mark, style).append(f"  {name}", "not dim"), soft_wrap=True)
        console.print(Text(f"      {source}", "dim"), soft_wrap=True)
