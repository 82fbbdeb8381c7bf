"""``noether-init lineage PATH``: which runs and files the weights of a run came from, and what came from it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from noether_init_core.cli.files import check_page, check_path, write_html
from noether_init_core.cli.options import AsJson, Html
from noether_init_core.cli.output import from_here, show
from noether_init_core.errors import CheckpointFormatError
from noether_init_core.messages import counted, one_line
from noether_init_core.render.text import percent

if TYPE_CHECKING:
    from noether_init_core.lineage.graph import Lineage, LineageEdge, LineageNode

_MARKS = {"run": ("o", "cyan"), "file": ("=", "green"), "missing": ("?", "red")}
#: Generations that are unfolded: each is indented further, and lines have an end.
_MOST_DEEP = 6


def run(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run folder, a set, or an output root.", show_default=False)
    ],
    roots: Annotated[
        list[Path] | None,
        typer.Option("--root", help="A further output root to look in; may be said again.", show_default=False),
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Show where the weights of a run came from, and what came from it. Reads records only, never tensors.

    Descendants are looked for in the output root that the run lies in, and in those of --root. Exit code 1: a record
    could not be read; what could be is shown.
    """
    check_page(html)
    for one in (path, *(roots or ())):
        check_path(one)
        if not one.is_dir():
            raise CheckpointFormatError(
                f"{one} is a file; records lie beside the sets of runs. Next: noether-init lineage RUN_FOLDER", path=one
            )
    from noether_init_core.lineage.reading import lineage_of

    found = lineage_of(path, roots or ())
    if as_json:
        typer.echo(found.to_json())
    else:
        _show(found)
    write_html(html, found)
    if found.problems:
        raise typer.Exit(1)


def _show(found: Lineage) -> None:
    console = Console()
    if found.focus is None:
        # those that came from nowhere, with all that came from them; then what stands in a circle
        shown: set[str] = set()
        starts = [node for node in found.nodes if not _edges(found, node.id, down=False)]
        for node in [*starts, *(node for node in found.nodes if node not in starts)]:
            if node.id not in shown:
                tree = Tree(_line(node))
                _grow(tree, found, node.id, down=True, shown=shown)
                console.print(tree)
    else:
        node = found.node(found.focus)
        tree = Tree(_line(node))
        for title, down in (("came from", False), ("went into", True)):
            if _edges(found, node.id, down=down):
                _grow(tree.add(title), found, node.id, down=down, shown=set())
        console.print(tree)
        if not _edges(found, node.id, down=False) and not node.note:
            show("no checkpoint is recorded that it came from")
    for problem in found.problems:
        show(f"x {problem}")


def _grow(tree: Tree, found: Lineage, name: str, *, down: bool, shown: set[str], depth: int = 1) -> None:
    """What came from a node, or what it came from, below it; what is shown already is not unfolded again."""
    shown.add(name)
    edges = _edges(found, name, down=down)
    if edges and depth > _MOST_DEEP:
        tree.add(f"... {'later' if down else 'earlier'} ones: {_following(found.node(name))}")
        return
    for edge in edges:
        other = edge.target if down else edge.source
        is_repeated = other in shown
        branch = tree.add(_line(found.node(other), edge, is_repeated=is_repeated))
        if not is_repeated:
            _grow(branch, found, other, down=down, shown=shown, depth=depth + 1)


def _following(node: LineageNode) -> str:
    """How to see what is beyond a node: from there, typed from here, or in the JSON."""
    if node.type == "missing":
        return "--json has them all"
    return f"noether-init lineage {one_line(shlex.quote(str(from_here(node.path))))}"


def _edges(found: Lineage, name: str, *, down: bool) -> list[LineageEdge]:
    """Those that lead away from a node, or to it; a run that went on from itself has none for that."""
    return [one for one in found.edges if one.source != one.target and name == (one.source if down else one.target)]


def _line(node: LineageNode, edge: LineageEdge | None = None, *, is_repeated: bool = False) -> Text:
    symbol, style = _MARKS[node.type]
    name = Path(node.id).name if node.type == "file" else node.id
    line = Text(f"{symbol} ", style).append(one_line(name), "bold")
    if edge is not None:
        iteration = edge.iteration if edge.iteration != edge.tag else None
        which = " = ".join(filter(None, (edge.tag, iteration)))
        line.append(f"  {one_line(edge.kind)}", "cyan").append(f" @ {one_line(which)}" if which else "")
        if edge.tensors is not None:
            share = f" ({percent(edge.share)})" if edge.share is not None else ""
            line.append(f"  {one_line(edge.model)}: {counted(edge.tensors, 'tensor')}{share}", "dim")
        if edge.note:
            line.append(f"  - {edge.note}", "yellow")
    elif node.sets:
        newest = node.sets[0]
        tags = [tag for tag in newest.tags if tag not in (newest.iteration, newest.name)]
        words = f"  {counted(len(node.sets), 'set')}, newest {newest.iteration or newest.name}"
        line.append(words + (f" ({', '.join(map(one_line, tags))})" if tags else ""), "dim")
    if edge is None and node.resumed:
        line.append(f"  continued {counted(node.resumed, 'time')}", "dim")
    if is_repeated:
        line.append("  see above", "dim")
    elif node.note:
        line.append(f"  - {one_line(node.note)}", "yellow")
    return line
