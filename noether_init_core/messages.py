"""Parts of messages: shortened lists, near names, counts, escaped foreign text, and YAML to paste."""

from __future__ import annotations

import difflib
import logging
import os
import shlex
from collections.abc import Collection, Iterable
from typing import Any


def listed(names: Iterable[object], most: int = 5, *, separator: str = ", ", none: str = "") -> str:
    """The first ``most`` names, and the number of the others: ``a, b and 3 more``; ``none`` for an empty list."""
    texts = list(map(str, names))
    more = len(texts) - most
    rest = f"{separator if separator.strip(' ') != ',' else ' '}and {more} more" if more > 0 else ""
    return separator.join(texts[:most]) + rest if texts else none


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: ``1 set``, ``12 sets``. ``plural`` is for nouns whose plural is not formed by an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def near(name: str, known: Collection[str], most: int = 3, *, cutoff: float = 0.6) -> list[str]:
    """Names in ``known`` of which ``name`` may be a misspelling, nearest first; equal distances keep their order.

    Args:
        name: The name that was not found. Case is ignored, and ``-`` equals ``_``. Only 200 characters are compared.
        known: The names that exist. Beyond 5,000 the result is empty, because the time grows with lengths and number.
        most: How many names to return.
        cutoff: The least ratio of ``difflib``, from 0 to 1.
    """
    if len(known) > 5_000:
        return []
    folded: dict[str, str] = {}
    for one in known:
        folded.setdefault(_folded(one), one)
    matcher, order = difflib.SequenceMatcher(b=_folded(name)), {one: number for number, one in enumerate(folded)}

    def distance(one: str) -> tuple[float, int]:
        matcher.set_seq1(one)
        return -matcher.ratio(), order[one]

    found = difflib.get_close_matches(_folded(name), list(folded), n=max(64, most), cutoff=cutoff)
    return [folded[one] for one in sorted(found, key=distance)[:most]]


def _folded(name: str) -> str:
    return name[:200].lower().replace("-", "_")


def printable(text: str) -> str:
    """``text`` with each character that a terminal would act on replaced by its escape; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


def one_line(text: str, most: int | None = None) -> str:
    """Foreign text for one line of output: line breaks are escaped too, and text beyond ``most`` characters is cut."""
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    return printable(text).replace("\n", "\\n")


class _Escaping(logging.Filter):
    """Escapes foreign text in records: a name must not write to the terminal, or begin a line of its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = printable(str(record.msg))
        if isinstance(record.args, tuple):
            record.args = tuple(map(_shown, record.args))
        return True


def _shown(argument: object) -> object:
    """An argument of a record: numbers as they are, texts on one line, and the lines of a report escaped."""
    if argument is None or isinstance(argument, int | float):
        return argument
    return one_line(str(argument)) if isinstance(argument, str | os.PathLike) else printable(str(argument))


_ESCAPING = _Escaping()


def logger_of(name: str) -> logging.Logger:
    """The logger ``name``, whose records have foreign text escaped. May be called again for the same name."""
    logger = logging.getLogger(name)
    logger.addFilter(_ESCAPING)
    return logger


def quoted(text: object, most: int = 80) -> str:
    """Foreign text in double quotes, on one line, cut after ``most`` characters."""
    return f'"{one_line(str(text), most)}"'


def in_shell(value: object) -> str:
    """A path or a name as one word of a command for a shell."""
    return shlex.quote(str(value))


def python_command(statements: str) -> str:
    """The line for a shell that runs Python statements, in which texts are ``python_text``."""
    return f"python -c {shlex.quote(statements)}"


def python_text(text: str) -> str:
    """``text`` as a literal of Python in ASCII, in double quotes where it can be: those need no escape in a shell."""
    literal = ascii(text)
    return f'"{literal[1:-1]}"' if literal.startswith("'") and '"' not in literal and "\\'" not in literal else literal


def yaml_field(name: str, value: Any) -> str:
    """``name: value`` as one line of a block mapping: ``run_id: "a #c"``."""
    return yaml_line({name: value})[1:-1]


def yaml_line(value: Any) -> str:
    """``value`` as YAML on one line, to paste into a config: ``{keep_model: "a #c"}``.

    Reading the line returns an equal value. Characters that a terminal would act on are escaped.
    """
    import yaml

    class OneLine(yaml.SafeDumper):
        """Double quotes keep a line break as an escape; single ones would break the line."""

    def text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)

    OneLine.add_representer(str, text_node)
    OneLine.add_multi_representer(str, text_node)  # texts that know where they stand in a file

    def dumped(*, allow_unicode: bool) -> str:
        text: str = yaml.dump(
            value,
            Dumper=OneLine,
            default_flow_style=True,
            sort_keys=False,
            width=float("inf"),
            allow_unicode=allow_unicode,
        )
        # PyYAML ends a single scalar with a document marker
        return text.removesuffix("\n").removesuffix("\n...")

    text = dumped(allow_unicode=True)
    return text if text.isprintable() else dumped(allow_unicode=False)
