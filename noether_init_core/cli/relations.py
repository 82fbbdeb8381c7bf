"""``ninit diff`` and ``lineage``: how checkpoints stand to each other, by their weights and by their origin."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from noether_init_core.cli.options import AsJson, Html, ShowAll
from noether_init_core.cli.output import check_path, check_target, from_here, progress, show, write_html
from noether_init_core.errors import CheckpointFormatError
from noether_init_core.messages import counted, one_line
from noether_init_core.render.folding import fold_alike
from noether_init_core.render.text import Mark, NameLine, amount, filled, in_columns, percent

if TYPE_CHECKING:
    from noether_init_core.diff.compare import CheckpointDiff, DiffRow, DiffSide, State
    from noether_init_core.lineage import Lineage, LineageEdge, LineageNode

_STATES: dict[State, Mark] = {
    "equal": Mark("=", "equal", "green"),
    "changed": Mark("~", "changed", "cyan"),
    "dtype": Mark("c", "dtype", "cyan"),
    "shape": Mark("x", "shape", "bold red"),
    "nonfinite": Mark("!", "nonfinite", "bold red"),
    "only_a": Mark("-", "only in A", "yellow"),
    "only_b": Mark("+", "only in B", "yellow"),
}
_MOST_LARGEST, _MOST_LINES, _MOST_TEXTS = 10, 20, 12
_SIDE = "A file, the folder of a set, a run folder (its newest set), or RUN@TAG."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, of the other checkpoint.", show_default=False)],
    strip: Annotated[
        list[str] | None,
        typer.Option(help="A prefix to take off names on both sides, such as module.; may be said again."),
    ] = None,
    html: Html = None,
    show_all: ShowAll = False,
    exact: Annotated[bool, typer.Option("--exact", help="Exit code 1 for other values, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the weights of two checkpoints: names, shapes, and the drift of every tensor, ‖B − A‖ / ‖A‖.

    Tensors are read in pieces, so that memory does not grow with the model. Exit code 0: the same names and shapes;
    values may differ. 1: names or shapes differ, or there is NaN on one side.
    """
    check_target(html, "--html")
    for one in (a, b):
        # RUN@TAG, unless there is a path of that name
        path = Path(one)
        check_path(Path(one.rpartition("@")[0]) if "@" in path.name and not path.exists() else path)
    from noether_init_core.diff.compare import compare_sides, side_at

    sides = side_at(a), side_at(b)
    nbytes = sum(path.stat().st_size for side in sides for path in side.files.values())
    with progress("comparing", nbytes) as advance:
        found = compare_sides(*sides, strip=strip or (), advance=advance)
    if as_json:
        typer.echo(found.to_json())
    else:
        _show_diff(found, show_all)
    write_html(html, found)
    if not found.is_same_form or (exact and not found.is_equal):
        raise typer.Exit(1)


def _show_diff(found: CheckpointDiff, show_all: bool) -> None:
    console = Console()
    for name, side in (("A", found.a), ("B", found.b)):
        console.print(_side(name, side), soft_wrap=True)
    for line in _lines(found, show_all, console.width):
        console.print(line)


def _side(name: str, side: DiffSide) -> Text:
    words = side.origin or str(from_here(side.path))
    if side.origin is None and side.run_id is not None:
        words += f"   {side.run_id}" + (f" @ {side.iteration}" if side.iteration is not None else "")
    tensors = counted(side.tensors, "tensor")
    return Text(f"{name}  ", "bold").append(one_line(words), "not bold").append(f"   {tensors}", "dim")


def _lines(found: CheckpointDiff, show_all: bool, width: int) -> Iterator[Text]:
    models = dict.fromkeys(row.model for row in found.rows)
    for model in models:
        rows = [row for row in found.rows if row.model == model]
        if len(models) > 1:
            yield Text(one_line(model) or "(no name)", "bold")
        for lines in in_columns(list(_of_model(rows, show_all)), width, width // 2):
            yield from lines
    moved = [row for row in found.rows if row.relative_norm]
    # to as many digits as rounding leaves alone, so that equals stay in their order
    largest = sorted(moved, key=lambda row: -float(f"{row.relative_norm:.9g}"))[:_MOST_LARGEST]
    if largest and not show_all:
        yield Text("moved most", "bold")
        for row in largest:
            cosine = "" if row.cosine is None else f"  cosine {row.cosine:.6f}"
            start = Text(f"   {row.relative_norm:<7.3g}{cosine}")
            yield from filled(start, [Text(one_line(row.key))], width, "      ", first="  ")
    for note in found.notes:
        yield from filled(Text(" w  ", "yellow"), [Text(one_line(note))], width, "    ")
    phrases = []
    if found.relative_norm is not None:
        phrases.append(Text(f"drift {found.relative_norm:.3g}", "bold"))
    if found.cosine is not None:
        phrases.append(Text(f"cosine {found.cosine:.6f}"))
    phrases.append(Text(f"{amount(found.elements_compared)} of {amount(found.elements)} elements compared"))
    if found.is_equal:
        phrases.append(Text("equal tensors", "green"))
    elif not found.is_same_form:
        wrong = sum(row.state in ("shape", "nonfinite", "only_a", "only_b") for row in found.rows)
        phrases.append(Text(f"{counted(wrong, 'key')} of another form", "bold red"))
    yield from filled(Text(""), phrases, width)


def _of_model(rows: Sequence[DiffRow], show_all: bool) -> Iterator[NameLine]:
    lines = [(one_line(row.key), [row]) for row in rows]
    if not show_all:
        by_key = {row.key: row for row in rows}
        folds = fold_alike({row.key: (row.state, _way(row)) for row in rows})
        lines = [(one_line(pattern.text(_MOST_TEXTS)), [by_key[key] for key in keys]) for pattern, keys in folds]
    word = max(len(_STATES[row.state].word) for row in rows)
    for state, mark in _STATES.items():
        of_state = [line for line in lines if line[1][0].state == state]
        shown = of_state if show_all else of_state[:_MOST_LINES]
        for name, members in shown:
            numbers = counted(len(members), "key"), amount(sum(row.elements for row in members))
            yield NameLine(mark.start(word), name, () if show_all else numbers, list(_details(members)))
        left = sum(len(members) for _name, members in of_state[len(shown) :])
        if left:
            yield NameLine(mark.start(word), f"{counted(left, 'more key')} (--all shows them)")


def _way(row: DiffRow) -> tuple[Any, ...]:
    """What rows of one line have in common."""
    if row.state == "shape":
        return row.shape_a, row.shape_b
    return (row.dtype_a, row.dtype_b) if row.state == "dtype" else ()


def _details(rows: Sequence[DiffRow]) -> Iterator[Text]:
    first = rows[0]
    if first.state == "shape" and first.shape_a is not None and first.shape_b is not None:
        yield Text(f"A {list(first.shape_a)}  B {list(first.shape_b)}")
    if first.state == "dtype":
        yield Text(f"{first.dtype_a} -> {first.dtype_b}")
    drifts = [row.relative_norm for row in rows if row.relative_norm is not None]
    if drifts and first.state != "equal":
        least, most = f"{min(drifts):.3g}", f"{max(drifts):.3g}"
        yield Text(f"drift {least}" if least == most else f"drift {least} to {most}")
    lost = [sum(row.nonfinite_a for row in rows), sum(row.nonfinite_b for row in rows)]
    if first.state == "nonfinite":
        yield Text(f"NaN or infinite: A {lost[0]:,}  B {lost[1]:,}")
    elif lost[0]:
        yield Text(f"NaN or infinite: {lost[0]:,}")
    notes = Counter(row.note for row in rows if row.note and not row.nonfinite_a)
    for note, number in notes.most_common(2):
        yield Text(f"({note}{'' if number == len(rows) else f': {number} of them'})", "dim")


_NODES = {"run": ("o", "cyan"), "file": ("=", "green"), "missing": ("?", "red")}
#: Generations that are unfolded: each is indented further, and lines have an end.
_MOST_DEEP = 6


def lineage(
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
    check_target(html, "--html")
    for one in (path, *(roots or ())):
        check_path(one)
        if not one.is_dir():
            raise CheckpointFormatError(
                f"{one} is a file; records lie beside the sets of runs. Next: ninit lineage RUN_FOLDER", path=one
            )
    from noether_init_core.lineage import lineage_of

    found = lineage_of(path, roots or ())
    if as_json:
        typer.echo(found.to_json())
    else:
        _show_lineage(found)
    write_html(html, found)
    if found.problems:
        raise typer.Exit(1)


def _show_lineage(found: Lineage) -> None:
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
    return f"ninit lineage {one_line(shlex.quote(str(from_here(node.path))))}"


def _edges(found: Lineage, name: str, *, down: bool) -> list[LineageEdge]:
    """Those that lead away from a node, or to it; a run that went on from itself has none for that."""
    return [one for one in found.edges if one.source != one.target and name == (one.source if down else one.target)]


def _line(node: LineageNode, edge: LineageEdge | None = None, *, is_repeated: bool = False) -> Text:
    symbol, style = _NODES[node.type]
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
