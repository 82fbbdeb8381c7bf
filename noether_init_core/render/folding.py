"""Folding: the rows of a plan as few lines, each of which lists exactly its rows. Pure.

Rows with the same action, rule and steps are grouped. Their names form a tree with one segment per level; equal
branches become one, so that twelve equal layers are ``blocks.{0..11}.mlp.*``. A layer that differs from its siblings,
in the model or in its action, keeps a line of its own.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from noether_init_core.memory import no_garbage_collection
from noether_init_core.messages import one_line
from noether_init_core.render.text import MARKS

if TYPE_CHECKING:
    from noether_init_core.surgery.plan import Action, PlanRow
    from noether_init_core.surgery.steps import Step

_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>0|[1-9][0-9]*)", re.DOTALL)
_SPECIAL = re.compile(r"[\\{},*]")
# A hostile file may hold a name of a hundred thousand dots, and the tree is walked recursively: keep it whole.
_MOST_SEGMENTS = 64


@attrs.frozen
class KeyPattern:
    """A pattern of names that differ in some segments only: ``blocks.{0..11}.{q,k,v}.*``.

    Attributes:
        segments: For each segment, its alternatives.
        below: Whether it ends in ``*``: every name below, at any depth, in the model or the file.
    """

    segments: tuple[tuple[str, ...], ...]
    below: bool = False

    def text(self, most: int | None = None) -> str:
        """The pattern as text. Braces, commas, stars and backslashes within names are escaped by a backslash.

        Args:
            most: Show at most this many alternatives that are not numbers, and the number of the others.
        """
        return ".".join([*(_segment_text(texts, most) for texts in self.segments), *(["*"] if self.below else [])])

    def __str__(self) -> str:
        return self.text()


@attrs.frozen
class Fold:
    """Rows that one line shows.

    Attributes:
        action: The action of each row.
        rule: The config line that decided each row; None if no rule did.
        steps: What is done with the tensors, as in the plan.
        pattern: Names of the rows in the model; for unused entries, in the file.
        sources: Names in the file; empty if they equal the names in the model, or without any.
        rows: The rows, in the order of the plan.
    """

    action: Action
    rule: str | None
    steps: tuple[Step, ...]
    pattern: KeyPattern
    sources: tuple[KeyPattern, ...]
    rows: tuple[PlanRow, ...]

    @property
    def elements(self) -> int:
        """Number of elements of all rows."""
        return sum(row.numel for row in self.rows)


@no_garbage_collection()
def fold_rows(rows: Sequence[PlanRow]) -> tuple[Fold, ...]:
    """Fold the rows of one single model and one file: every row is in exactly one fold.

    Folds are ordered by action, from loads to mismatches, and then by their first row. A line implies that layer 0
    comes from layer 0; a row whose sources or parts differ from that is never folded with the others.
    """
    targets = _known(row.target for row in rows if row.target is not None)
    sources = _known(name for row in rows for name in row.sources)
    groups: dict[Hashable, list[PlanRow]] = {}
    for row in rows:
        groups.setdefault(_way(row), []).append(row)
    places = {id(row): number for number, row in enumerate(rows)}
    order = list(MARKS)
    folds = []
    for way in groups.values():
        for group in _aligned(way):
            known = sources if group[0].target is None else targets
            for pattern, members in _patterns([(row.key, row) for row in group], known):
                members.sort(key=lambda row: places[id(row)])
                folds.append(_fold(pattern, members, sources))
    folds.sort(key=lambda fold: (order.index(fold.action), places[id(fold.rows[0])]))
    return tuple(folds)


@no_garbage_collection()
def fold_alike(keys: Mapping[str, Hashable]) -> tuple[tuple[KeyPattern, tuple[str, ...]], ...]:
    """Fold keys that have the same value, such as a dtype and a shape: each pattern with its keys, by its first key.

    Every key is in exactly one pattern, and no pattern matches a key of another.
    """
    known = _known(keys)
    places = {key: number for number, key in enumerate(keys)}
    groups: dict[Hashable, list[str]] = {}
    for key, value in keys.items():
        groups.setdefault(value, []).append(key)
    found = [
        (pattern, tuple(sorted(members, key=places.__getitem__)))
        for group in groups.values()
        for pattern, members in _patterns([(key, key) for key in group], known)
    ]
    return tuple(sorted(found, key=lambda one: places[one[1][0]]))


def _fold(pattern: KeyPattern, rows: Sequence[PlanRow], known: Counter[str]) -> Fold:
    first = rows[0]
    folded: tuple[KeyPattern, ...] = ()
    if any(row.target is not None and row.sources and row.sources != (row.target,) for row in rows):
        names = dict.fromkeys(name for row in sorted(rows, key=lambda row: row.part) for name in row.sources)
        folded = tuple(found for found, _ in _patterns([(name, name) for name in names], known))
    return Fold(first.action, first.rule, first.steps, pattern, folded, tuple(rows))


def _way(row: PlanRow) -> Hashable:
    """The properties that rows must share to be shown on one line."""
    differs: Hashable = None
    if row.action == "mismatch":
        differs = row.shape, row.source_shapes, row.dtype, row.source_dtype
    elif row.writes and row.source_dtype != row.dtype:
        differs = row.dtype, row.source_dtype
    return row.origin, row.target is None, row.action, row.rule, row.steps, len(row.sources), row.parts, differs


def _aligned(rows: list[PlanRow]) -> Iterator[list[PlanRow]]:
    """Rows in groups within which each number of a source equals one of the target, or is the same for all.

    A reader takes ``a.{0,1} <- b.{0,1}`` as 0 from 0 and 1 from 1, and parts in the order in which they are listed.
    """
    if rows[0].target is None or not rows[0].sources:
        yield rows
        return
    layouts: dict[Hashable, list[tuple[PlanRow, tuple[int, ...], tuple[int, ...]]]] = {}
    for row in rows:
        stems, numbers = _numbers_of(row.key)
        found = [_numbers_of(source) for source in row.sources]
        layout = stems, tuple([stem for stem, _ in found])
        layouts.setdefault(layout, []).append((row, numbers, tuple([number for _, those in found for number in those])))
    groups: dict[Hashable, list[PlanRow]] = {}
    for members in layouts.values():
        own = list(zip(*(numbers for _, numbers, _ in members), strict=True))
        theirs = list(zip(*(numbers for _, _, numbers in members), strict=True))
        astray = [place for place, column in enumerate(theirs) if len(set(column)) > 1 and column not in own]
        for row, _, numbers in members:
            groups.setdefault(tuple([numbers[place] for place in astray]), []).append(row)
    for group in groups.values():
        group.sort(key=lambda row: row.part)
        if _in_order_of_parts(group):
            yield group
        else:
            yield from (list(members) for _part, members in itertools.groupby(group, key=lambda row: row.part))


def _in_order_of_parts(rows: Sequence[PlanRow]) -> bool:
    """Whether numbers of targets rise with the part that they get; a pattern lists names in the order of ``rows``."""
    if rows[0].parts == 1:
        return True
    highest: dict[Hashable, tuple[int, ...]] = {}
    for row in rows:
        stems, numbers = _numbers_of(row.key)
        place = row.sources, stems
        if highest.get(place, numbers) > numbers:
            return False
        highest[place] = numbers
    return True


def _numbers_of(key: str) -> tuple[tuple[tuple[str, bool], ...], tuple[int, ...]]:
    """``layer1.0.weight`` as ``layer``, nothing and ``weight``, each with whether a number follows; and ``(1, 0)``."""
    found = [_numbered(segment) for segment in _segments_of(key)]
    stems = tuple([(stem, number is not None) for stem, number in found])
    return stems, tuple([number for _, number in found if number is not None])


# a model of 100,000 keys has only a few distinct segments
@functools.lru_cache(maxsize=4096)
def _numbered(segment: str) -> tuple[str, int | None]:
    found = _NUMBERED.fullmatch(segment)
    # int() of a thousand digits is slow, and Python refuses it beyond 4,300 digits
    return (segment, None) if found is None or len(found["number"]) > 9 else (found["stem"], int(found["number"]))


def _segments_of(key: str) -> list[str]:
    segments = key.split(".", _MOST_SEGMENTS)
    return segments if len(segments) <= _MOST_SEGMENTS else [key]


def _known(keys: Iterable[str]) -> Counter[str]:
    """Prefix -> number of names below it, among all names of a model or a file."""
    below: Counter[str] = Counter()
    for key in dict.fromkeys(keys):
        prefix = ""
        for segment in _segments_of(key):
            below[prefix] += 1
            prefix = f"{prefix}{segment}."
    return below


@attrs.define(eq=False)
class _Node:
    """One segment in the tree of names.

    ``shape`` is equal for nodes with the same names below, of which the same ones are complete.
    """

    values: list[Any] = attrs.Factory(list)
    children: dict[str, _Node] = attrs.Factory(dict)
    count: int = 0
    shape: int = 0
    is_whole: bool = False


def _patterns(pairs: Sequence[tuple[str, Any]], known: Counter[str]) -> list[tuple[KeyPattern, list[Any]]]:
    """Disjoint patterns for the names in ``pairs``, each with the values of its names, such as rows."""
    root = _Node()
    for key, value in pairs:
        node = root
        for segment in _segments_of(key):
            child = node.children.get(segment)
            if child is None:
                child = node.children[segment] = _Node()
            node = child
        node.values.append(value)
    shapes: dict[Hashable, int] = {}
    _measure(root, "", known, shapes)
    # the pattern `*` alone would name nothing
    root.is_whole = False
    return list(_lines([root], ()))


def _measure(node: _Node, prefix: str, known: Counter[str], shapes: dict[Hashable, int]) -> bool:
    """Set count, shape and completeness of ``node`` from its children; returns whether each list below is uniform."""
    is_uniform = True
    for segment, child in node.children.items():
        is_uniform = _measure(child, f"{prefix}{segment}.", known, shapes) and is_uniform
        node.count += child.count + bool(child.values)
    is_full = bool(node.children) and node.count == known[prefix]
    names = tuple(sorted([(segment, child.shape) for segment, child in node.children.items()]))
    node.shape = shapes.setdefault((bool(node.values), is_full, names), len(shapes))
    is_uniform = is_uniform and _is_of_one_kind(node.children)
    node.is_whole = is_full and is_uniform and len(node.children) > 1 and not all(map(str.isdecimal, node.children))
    return is_uniform


def _is_of_one_kind(children: Mapping[str, _Node]) -> bool:
    """False if some numbered siblings are equal and others differ: the reader must see the ones that differ."""
    families: dict[str, list[int]] = {}
    for segment, child in children.items():
        stem, number = _numbered(segment)
        if number is not None:
            families.setdefault(stem, []).append(child.shape)
    return all(len(set(shapes)) in (1, len(shapes)) for shapes in families.values())


def _lines(nodes: Sequence[_Node], before: tuple[tuple[str, ...], ...]) -> Iterator[tuple[KeyPattern, list[Any]]]:
    """The patterns at and below ``nodes``, which are equal and whose places differ only in the last of ``before``."""
    first = nodes[0]
    if first.values:
        yield KeyPattern(before), [value for node in nodes for value in node.values]
    if first.is_whole:
        yield KeyPattern(before, below=True), [value for node in nodes for value in _below(node)]
        return
    classes: dict[Hashable, list[str]] = {}
    for segment, child in first.children.items():
        alike: Hashable = child.shape
        if not segment.isdecimal() and child.is_whole and not child.values:
            alike = "whole"
        classes.setdefault((segment.isdecimal(), alike), []).append(segment)
    for texts in classes.values():
        members = [node.children[segment] for node in nodes for segment in texts]
        yield from _lines(members, (*before, tuple(texts)))


def _below(node: _Node) -> Iterator[Any]:
    for child in node.children.values():
        yield from child.values
        yield from _below(child)


def _segment_text(texts: tuple[str, ...], most: int | None) -> str:
    if len(texts) == 1:
        return _escaped(texts[0])
    found = [_numbered(text) for text in texts]
    numbers = sorted(number for _, number in found if number is not None)
    if len(numbers) == len(texts) and len({stem for stem, _ in found}) == 1:
        return f"{_escaped(found[0][0])}{{{_ranges(numbers)}}}"
    shown = list(map(_escaped, texts))
    if most is not None and len(shown) > most:
        shown = [*shown[:most], f"... {len(texts) - most} more"]
    return f"{{{','.join(shown)}}}"


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _escaped(text: str) -> str:
    return one_line(_SPECIAL.sub(r"\\\g<0>", text))
