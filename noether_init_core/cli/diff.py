"""``noether-init diff A B``: keys, shapes, and how far every tensor moved from one checkpoint to another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from noether_init_core.cli.files import check_page, check_path, write_html
from noether_init_core.cli.options import AsJson, Html, ShowAll
from noether_init_core.cli.output import from_here, progress
from noether_init_core.messages import counted, one_line
from noether_init_core.render.folding import KeyPattern, fold_alike
from noether_init_core.render.text import Mark, NameLine, amount, filled, in_columns

if TYPE_CHECKING:
    from noether_init_core.diff.values import CheckpointDiff, DiffRow, DiffSide, State

_MARKS: dict[State, Mark] = {
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


def run(
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
    check_page(html)
    for path in (a, b):
        _check(path)
    from noether_init_core.diff.compare import bytes_to_read, compare_sides, side_at

    sides = side_at(a), side_at(b)
    with progress("comparing", sum(map(bytes_to_read, sides))) as advance:
        found = compare_sides(*sides, strip=strip or (), advance=advance)
    if as_json:
        typer.echo(found.to_json())
    else:
        _show(found, show_all)
    write_html(html, found)
    if not found.is_same_form or (exact and not found.is_equal):
        raise typer.Exit(1)


def _check(said: str) -> None:
    """A path that can be no checkpoint is told as everywhere, with what is near to it."""
    path = Path(said)
    check_path(Path(said.rpartition("@")[0]) if "@" in path.name and not path.exists() else path)


def _show(found: CheckpointDiff, show_all: bool) -> None:
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
    by_key = {row.key: row for row in rows}
    folds: dict[State, list[tuple[KeyPattern, list[DiffRow]]]] = {}
    for pattern, keys in () if show_all else fold_alike({row.key: (row.state, _way(row)) for row in rows}):
        folds.setdefault(by_key[keys[0]].state, []).append((pattern, [by_key[key] for key in keys]))
    word = max(len(_MARKS[row.state].word) for row in rows)
    for state, mark in _MARKS.items():
        chosen = [row for row in rows if row.state == state]
        start = mark.start(word)
        if show_all:
            for row in chosen:
                yield NameLine(start, one_line(row.key), (), list(_details([row])))
            continue
        left = len(chosen)
        for pattern, members in folds.get(state, [])[:_MOST_LINES]:
            numbers = counted(len(members), "key"), amount(sum(row.elements for row in members))
            yield NameLine(start, one_line(pattern.text(_MOST_TEXTS)), numbers, list(_details(members)))
            left -= len(members)
        if left:
            yield NameLine(start, f"{counted(left, 'more key')} (--all shows them)")


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
