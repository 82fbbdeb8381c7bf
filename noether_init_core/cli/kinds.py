"""``noether-init kinds``: every installed kind, without importing any."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated

import typer

from noether_init_core import kinds
from noether_init_core.errors import printable
from noether_init_core.observers.loading import ObserverInfo, installed_observers

__all__ = ["run"]


def run(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of objects.")] = False,
    observers: Annotated[
        bool, typer.Option("--observers", help="List observers instead, for observers: [...].")
    ] = False,
) -> None:
    """List the kinds that installed distributions offer. No plugin is imported."""
    found: tuple[kinds.KindInfo | ObserverInfo, ...] = installed_observers() if observers else kinds.installed()
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
        typer.echo(f"no {what} is installed. Next: pip install noether-init-core")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", what, "offered by"):
        table.add_column(column, overflow="fold")
    for info in found:
        if info.blocked_by is not None:
            mark, style = f"- {info.blocked_by}", "dim"
        elif counts[info.name] > 1:
            mark, style = "x conflict", "red"
        else:
            mark, style = "ok", "green"
        cells = [Text(mark, style), *(Text(printable(text)) for text in (info.name, info.source))]
        table.add_row(*cells)
    Console().print(table)
    if any(count > 1 for count in counts.values()):
        typer.echo(f"x what is offered more than once cannot be used; see {kinds.DENY_VARIABLE}")
