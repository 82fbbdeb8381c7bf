"""Texts for marks, numbers and rules; lines of a given width filled with phrases and long names. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from rich.text import Text

from noether_init_core.messages import one_line

if TYPE_CHECKING:
    from noether_init_core.surgery.plan import Action


@attrs.frozen
class Mark:
    """Symbol, word and colour of an action; the symbol alone identifies it where there is no colour."""

    symbol: str
    word: str
    style: str

    def start(self, width: int) -> Text:
        """The beginning of a line: the symbol, and the word in ``width`` columns."""
        return Text(f" {self.symbol} {self.word:<{width}}", self.style)


#: The order in which rows are listed: problems last, next to the prompt.
MARKS: Mapping[Action, Mark] = {
    "load": Mark("=", "load", "green"),
    "rename": Mark(">", "rename", "green"),
    "cast": Mark("c", "cast", "cyan"),
    "transform": Mark("~", "transform", "cyan"),
    "reset": Mark("r", "reset", "yellow"),
    "keep": Mark("o", "keep", "yellow"),
    "outside": Mark(".", "outside", "dim"),
    "removed": Mark("-", "removed", "dim"),
    "unexpected": Mark("!", "unexpected", "bold red"),
    "missing": Mark("?", "missing", "bold red"),
    "mismatch": Mark("x", "mismatch", "bold red"),
}

_UNITS = ("", " k", " M", " G", " T", " P")

# The label of a transform ends in the rule itself, whose names the line shows already.
_TRANSFORM = re.compile(r"(?:(?P<place>.+:[0-9]+) )?(?P<rule>[\w.]*transforms\.[0-9]+) \(.*\)", re.DOTALL)


def amount(number: int) -> str:
    """A number of elements in at most seven columns: ``768``, ``7.7 k``, ``14.2 M``."""
    value, unit = float(number), 0
    # 999,950 would be printed as 1000.0 k
    while value >= (999.95 if unit else 1000) and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f}{_UNITS[unit]}" if unit else str(number)


def percent(share: float) -> str:
    """A share from 0 to 1, rounded so that only all is ``100 %`` and only nothing is ``0 %``."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    return "< 0.1 %" if share < 0.001 else f"{min(100 * share, 99.9):.1f} %"


def sizes(shape: Sequence[int]) -> str:
    """The sizes of a tensor: ``[768,3,16,16]``."""
    return f"[{','.join(map(str, shape))}]"


def place_of_rule(rule: str) -> str:
    """The place of a rule, short: ``init.yaml:7`` or ``transforms.1``; other rules unchanged."""
    found = _TRANSFORM.fullmatch(rule)
    return one_line(rule if found is None else found["place"] or found["rule"])


def from_here(path: Path | str) -> Path:
    """The path as seen from the current folder, where it lies below it."""
    path, here = Path(path), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


def filled(
    start: Text, phrases: Sequence[Text], width: int, indent: str = "    ", *, first: str = "", between: str = "   "
) -> list[Text]:
    """``start`` and the phrases in lines of at most ``width``; a phrase is broken only if no line can hold it.

    Args:
        start: The beginning of the first line.
        phrases: The phrases after it.
        width: Columns, at least 20.
        indent: The beginning of further lines; four spaces if it would take more than half of the width.
        first: The text before the first phrase.
        between: The text between two phrases on one line.
    """
    indent = _indent(indent, width)
    lines = [start.copy()]
    space = first
    for phrase in phrases:
        if len(lines[-1]) + len(space) + len(phrase) <= width:
            lines[-1].append(space).append_text(phrase)
        elif len(phrase) + len(indent) <= width and lines[-1].plain.strip():
            lines.append(Text(indent).append_text(phrase))
        else:
            _add_words(lines, phrase, space, width, indent)
        space = between
    return _finished(lines)


@attrs.frozen
class NameLine:
    """One line about names: its mark, a name or a pattern, numbers in columns, and details."""

    mark: Mark
    name: str
    numbers: tuple[str, ...] = ()
    details: Sequence[Text] = ()


def in_columns(table: Sequence[NameLine], width: int, most: int | None = None) -> Iterator[list[Text]]:
    """For each line of a table, lines of at most ``width``, with names and numbers aligned.

    A name of more than ``most`` characters, or too long for numbers beside it, moves the numbers to the right. Spaces
    in a name are kept. Lines without numbers have no columns.
    """
    aligned = [line for line in table if line.numbers]
    word = max((len(line.mark.word) for line in table), default=0)
    start = max((len(line.mark.start(word)) for line in table), default=0) + 2
    widths = [max(map(len, column)) for column in zip(*(line.numbers for line in aligned), strict=True)]
    room = width - start - sum(number + 2 for number in widths)
    room = room if most is None else min(room, most)
    names = max((len(line.name) for line in aligned if len(line.name) <= room), default=0)
    indent = _indent(" " * start, width)
    for line in table:
        name, numbers = line.name, "  ".join(map(str.rjust, line.numbers, widths))
        if line.numbers and len(name) <= names:
            name = name.ljust(names)
        else:
            numbers = numbers.strip()
        lines = [line.mark.start(word).append("  ")]
        _add_pieces(lines, Text(name, "not dim"), width, indent)
        phrases = [*([Text(numbers, "dim")] if numbers else []), *line.details]
        yield _finished(lines[:-1]) + filled(lines[-1], phrases, width, indent, first="  ", between="  ")


def _indent(indent: str, width: int) -> str:
    return indent if len(indent) <= width // 2 else "    "


def _add_words(lines: list[Text], phrase: Text, space: str, width: int, indent: str) -> None:
    for word in filter(None, phrase.split(" ")):
        gap = space if lines[-1].plain.strip() else ""
        space = " "
        if len(lines[-1]) + len(gap) + len(word) <= width:
            lines[-1].append(gap).append_text(word)
            continue
        if lines[-1].plain.strip():
            lines.append(Text(indent))
        _add_pieces(lines, word, width, indent)


def _add_pieces(lines: list[Text], word: Text, width: int, indent: str) -> None:
    """Break a word after a dot, a comma or a slash in the second half of the line, else anywhere."""
    while len(word) > (room := width - len(lines[-1])):
        head = word.plain[: max(room, 0)]
        cut = max(head.rfind("."), head.rfind(","), head.rfind("/")) + 1
        cut = cut if cut > room // 2 else len(head)
        lines[-1].append_text(word[:cut])
        lines.append(Text(indent))
        word = word[cut:]
    lines[-1].append_text(word)


def _finished(lines: Sequence[Text]) -> list[Text]:
    for line in lines:
        line.rstrip()
        line.no_wrap, line.overflow = True, "ignore"
    return [line for line in lines if line.plain]
