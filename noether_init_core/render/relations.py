"""How checkpoints are related, by weights and by origin: the lines of ``ninit diff`` and ``ninit lineage``."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from rich.tree import Tree

from noether_init_core.messages import counted, one_line
from noether_init_core.render.folding import fold_alike
from noether_init_core.render.text import Mark, NameLine, amount, filled, from_here, in_columns, percent

if TYPE_CHECKING:
    from noether_init_core.diff.compare import CheckpointDiff, DiffRow, State
    from noether_init_core.diff.sides import DiffSide
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


@attrs.frozen(eq=False)
class DiffView:
    """A comparison as rich shows it: ``Console().print(DiffView(diff), soft_wrap=True)``.

    Attributes:
        diff: The comparison.
        unfolded: A line for every key.
        option: The option that shows all keys, named where some are left out; empty outside of commands.
    """

    diff: CheckpointDiff
    unfolded: bool = False
    option: str = "--all"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        for name, words, tensors in self.sides():
            yield Text(f"{name}  ", "bold").append(words, "not bold").append(f"   {tensors}", "dim")
        models = self.models()
        for model, lines in models.items():
            if len(models) > 1:
                yield Text(model, "bold")
            for printed in in_columns(lines, width, width // 2):
                yield from printed
        largest = self.largest()
        if largest:
            yield Text("moved most", "bold")
        for row in largest:
            cosine = "" if row.cosine is None else f"  cosine {row.cosine:.6f}"
            start = Text(f"   {row.relative_norm:<7.3g}{cosine}")
            yield from filled(start, [Text(one_line(row.key))], width, "      ", first="  ")
        for note in self.diff.notes:
            yield from filled(Text(" w  ", "yellow"), [Text(one_line(note))], width, "    ")
        yield from filled(Text(""), self.summary(), width)

    def sides(self) -> list[tuple[str, str, str]]:
        """For each side its letter, its origin, and its number of tensors."""
        return [
            (name, one_line(_side(side)), counted(side.tensors, "tensor"))
            for name, side in (("A", self.diff.a), ("B", self.diff.b))
        ]

    def models(self) -> dict[str, list[NameLine]]:
        """Name of each model -> its lines, by state."""
        by_model: dict[str, list[DiffRow]] = {}
        for row in self.diff.rows:
            by_model.setdefault(row.model, []).append(row)
        return {one_line(model) or "(no name)": list(self._of_model(rows)) for model, rows in by_model.items()}

    def largest(self) -> list[DiffRow]:
        """The keys that moved most; empty if every key has its own line."""
        moved = [] if self.unfolded else [row for row in self.diff.rows if row.relative_norm]
        # nine digits: sums in another order differ beyond them, and equal drifts must keep the order of the file
        return sorted(moved, key=lambda row: -float(f"{row.relative_norm:.9g}"))[:_MOST_LARGEST]

    def summary(self) -> list[Text]:
        """The numbers of the whole comparison, a phrase each."""
        found, phrases = self.diff, []
        if found.relative_norm is not None:
            phrases.append(Text(f"drift {found.relative_norm:.3g}", "bold"))
        if found.cosine is not None:
            phrases.append(Text(f"cosine {found.cosine:.6f}"))
        phrases.append(Text(f"{amount(found.elements_compared)} of {amount(found.elements)} elements compared"))
        if found.is_equal:
            phrases.append(Text("equal tensors", "green"))
        elif not found.is_same_form:
            wrong = sum(row.state in ("shape", "nonfinite", "only_a", "only_b") for row in found.rows)
            phrases.append(Text(f"{counted(wrong, 'key')} not comparable", "bold red"))
        return phrases

    def _of_model(self, rows: Sequence[DiffRow]) -> Iterator[NameLine]:
        lines = [(one_line(row.key), [row]) for row in rows]
        if not self.unfolded:
            by_key = {row.key: row for row in rows}
            folds = fold_alike({row.key: (row.state, _way(row)) for row in rows})
            lines = [(one_line(pattern.text(_MOST_TEXTS)), [by_key[key] for key in keys]) for pattern, keys in folds]
        for state, mark in _STATES.items():
            of_state = [line for line in lines if line[1][0].state == state]
            shown = of_state if self.unfolded else of_state[:_MOST_LINES]
            for name, members in shown:
                numbers = counted(len(members), "key"), amount(sum(row.elements for row in members))
                yield NameLine(mark, name, () if self.unfolded else numbers, list(_details(members)))
            left = sum(len(members) for _name, members in of_state[len(shown) :])
            if left:
                how = f" ({self.option} shows them)" if self.option else ""
                yield NameLine(mark, f"{counted(left, 'more key')}{how}")


def _side(side: DiffSide) -> str:
    words = side.origin or str(from_here(side.path))
    if side.origin is None and side.run_id is not None:
        words += f"   {side.run_id}" + (f" @ {side.iteration}" if side.iteration is not None else "")
    return words


def _way(row: DiffRow) -> tuple[Any, ...]:
    """The properties that all rows of one line share."""
    if row.state == "shape":
        return row.shape_a, row.shape_b
    return (row.dtype_a, row.dtype_b) if row.state == "dtype" else ()


def _details(rows: Sequence[DiffRow]) -> Iterator[Text]:
    first = rows[0]
    if first.state == "shape" and first.shape_a is not None and first.shape_b is not None:
        yield Text(f"A {list(first.shape_a)}  B {list(first.shape_b)}")
    if first.state == "dtype":
        yield Text(one_line(f"{first.dtype_a} -> {first.dtype_b}"))
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
        yield Text(one_line(f"({note}{'' if number == len(rows) else f': {number} of them'})"), "dim")


_NODES = {"run": ("o", "cyan"), "file": ("=", "green"), "missing": ("?", "red")}
#: Generations that are unfolded: each is indented further, and lines have an end.
_MOST_DEEP = 6


@attrs.frozen
class LineageLine:
    """One line of a lineage: its depth, and its phrases, of which the first names the run or file."""

    depth: int
    phrases: Sequence[Text]


@attrs.frozen(eq=False)
class LineageView:
    """A lineage as rich shows it: ``Console().print(LineageView(lineage), soft_wrap=True)``."""

    lineage: Lineage

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        trees: list[Tree] = []
        path: list[Tree] = []
        for line in self.lines():
            text = Text("  ").join(line.phrases)
            del path[line.depth :]
            path.append(path[-1].add(text) if path else Tree(text))
            if line.depth == 0:
                trees.append(path[0])
        for tree in trees:
            yield from console.render(tree, options.update(no_wrap=False, overflow="fold"))
        yield from map(Text, self.notes())

    def notes(self) -> list[str]:
        """The messages below the lines."""
        found, said = self.lineage, []
        if found.focus is not None and not found.node(found.focus).note and not _edges(found, found.focus, down=False):
            said.append("no origin is recorded")
        return [*said, *(one_line(f"x {problem}") for problem in found.problems)]

    def lines(self) -> Iterator[LineageLine]:
        """The requested run with its origins and descendants; for an output root, each run without an origin.

        A node that is shown already is not expanded again.
        """
        found = self.lineage
        if found.focus is None:
            # nodes without an origin first, each with its descendants; then nodes of cycles, which have no such start
            shown: set[str] = set()
            starts = [node for node in found.nodes if not _edges(found, node.id, down=False)]
            for node in [*starts, *(node for node in found.nodes if node not in starts)]:
                if node.id not in shown:
                    yield LineageLine(0, _phrases(node))
                    yield from self._below(node.id, down=True, shown=shown)
            return
        yield LineageLine(0, _phrases(found.node(found.focus)))
        for title, down in (("came from", False), ("went into", True)):
            if _edges(found, found.focus, down=down):
                yield LineageLine(1, [Text(title)])
                yield from self._below(found.focus, down=down, shown=set(), depth=2)

    def _below(self, name: str, *, down: bool, shown: set[str], depth: int = 1) -> Iterator[LineageLine]:
        """The descendants or the origins of a node; a node that is shown already is not expanded again."""
        found = self.lineage
        shown.add(name)
        edges = _edges(found, name, down=down)
        generation = depth if found.focus is None else depth - 1
        if edges and generation > _MOST_DEEP:
            said = f"... {'later' if down else 'earlier'} ones: {_following(found.node(name))}"
            yield LineageLine(depth, [Text(said)])
            return
        for edge in edges:
            other = edge.target if down else edge.source
            is_repeated = other in shown
            yield LineageLine(depth, _phrases(found.node(other), edge, is_repeated=is_repeated))
            if not is_repeated:
                yield from self._below(other, down=down, shown=shown, depth=depth + 1)


def _following(node: LineageNode) -> str:
    """How to see what is beyond a node: the command that starts there, or ``--json``."""
    if node.type == "missing":
        return "--json lists all"
    return f"ninit lineage {one_line(shlex.quote(str(from_here(node.path))))}"


def _edges(found: Lineage, name: str, *, down: bool) -> list[LineageEdge]:
    """Edges from a node, or to it; a run that was resumed from itself has no edge for that."""
    return [one for one in found.edges if one.source != one.target and name == (one.source if down else one.target)]


def _phrases(node: LineageNode, edge: LineageEdge | None = None, *, is_repeated: bool = False) -> list[Text]:
    symbol, style = _NODES[node.type]
    name = Path(node.id).name if node.type == "file" else node.id
    found = [Text(f"{symbol} ", style).append(one_line(name), "bold")]
    if edge is not None:
        iteration = edge.iteration if edge.iteration != edge.tag else None
        which = " = ".join(filter(None, (edge.tag, iteration)))
        found.append(Text().append(one_line(edge.kind), "cyan").append(f" @ {one_line(which)}" if which else ""))
        if edge.tensors is not None:
            share = f" ({percent(edge.share)})" if edge.share is not None else ""
            found.append(Text(f"{one_line(edge.model)}: {counted(edge.tensors, 'tensor')}{share}", "dim"))
        if edge.note:
            found.append(Text(f"- {one_line(edge.note)}", "yellow"))
    elif node.sets:
        newest = node.sets[0]
        tags = [tag for tag in newest.tags if tag not in (newest.iteration, newest.name)]
        words = f"{counted(len(node.sets), 'set')}, newest {newest.iteration or newest.name}"
        found.append(Text(one_line(words + (f" ({', '.join(tags)})" if tags else "")), "dim"))
    if edge is None and node.resumed:
        found.append(Text(f"continued {counted(node.resumed, 'time')}", "dim"))
    if is_repeated:
        found.append(Text("see above", "dim"))
    elif node.note:
        found.append(Text(f"- {one_line(node.note)}", "yellow"))
    return found
