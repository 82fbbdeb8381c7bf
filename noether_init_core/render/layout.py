"""Lines of a given width: phrases stay whole where they can, long names are broken behind dots. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text


def filled(
    start: Text, phrases: Sequence[Text], width: int, indent: str = "    ", *, first: str = "", between: str = "   "
) -> list[Text]:
    """``start`` and the phrases in lines of at most ``width``; a phrase is broken only where it fits on no line.

    Args:
        start: What the first line begins with.
        phrases: What follows it.
        width: At least 20.
        indent: What further lines begin with; shorter where it would take more than half of the width.
        first: What stands before the first phrase.
        between: What stands between two phrases on one line.
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


def broken(start: Text, name: Text, width: int, indent: str) -> list[Text]:
    """``start`` and one name, spaces and all, in as many lines as it takes."""
    indent = _indent(indent, width)
    lines = [start.copy()]
    _add_pieces(lines, name, width, indent)
    return _finished(lines)


def _indent(indent: str, width: int) -> str:
    return indent if len(indent) <= width // 2 else "    "


def _add_words(lines: list[Text], phrase: Text, space: str, width: int, indent: str) -> None:
    for word in phrase.split(" "):
        if not word.plain:
            continue
        gap = space if lines[-1].plain.strip() else ""
        space = " "
        if len(lines[-1]) + len(gap) + len(word) <= width:
            lines[-1].append(gap).append_text(word)
            continue
        if lines[-1].plain.strip():
            lines.append(Text(indent))
        _add_pieces(lines, word, width, indent)


def _add_pieces(lines: list[Text], word: Text, width: int, indent: str) -> None:
    for piece in _pieces(word, width - len(lines[-1]), width - len(indent)):
        if len(lines[-1]) + len(piece) > width:
            lines.append(Text(indent))
        lines[-1].append_text(piece)


def _pieces(word: Text, room: int, others: int) -> Iterator[Text]:
    while len(word) > room:
        head = word.plain[: max(room, 0)]
        cut = max(head.rfind("."), head.rfind(","), head.rfind("/")) + 1
        cut = cut if cut > room // 2 else len(head)
        if cut:
            yield word[:cut]
        word, room = word[cut:], others
    yield word


def _finished(lines: Sequence[Text]) -> list[Text]:
    for line in lines:
        line.rstrip()
        line.no_wrap, line.overflow = True, "ignore"
    return [line for line in lines if line.plain]
