"""Parts of messages, written once: lists that are cut, near names, counts, foreign text made safe, YAML to paste."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any


def listed(names: Iterable[object], most: int = 5, *, separator: str = ", ", none: str = "") -> str:
    """The first ``most`` names, and how many more there are: ``a, b and 3 more``; ``none`` where there are none."""
    texts = list(map(str, names))
    more = len(texts) - most
    rest = f"{separator if separator.strip(' ') != ',' else ' '}and {more} more" if more > 0 else ""
    return separator.join(texts[:most]) + rest if texts else none


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 set``, ``12 sets``; ``plural`` where an s is not enough."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def near(name: str, known: Collection[str], most: int = 3, *, cutoff: float = 0.6) -> list[str]:
    """Those of ``known`` that ``name`` may be a misspelling of, nearest first; equally near ones in their order.

    Case, ``-`` and ``_`` do not count. Only the first 200 characters of ``name`` are compared, and nothing is sought
    among more than 5,000 names, since that takes time by their product.
    """
    if len(known) > 5_000:
        return []
    folded: dict[str, str] = {}
    for one in known:
        folded.setdefault(_folded(one), one)
    sought, order = difflib.SequenceMatcher(b=_folded(name)), {one: number for number, one in enumerate(folded)}

    def distance(one: str) -> tuple[float, int]:
        sought.set_seq1(one)
        return -sought.ratio(), order[one]

    found = difflib.get_close_matches(_folded(name), list(folded), n=max(64, most), cutoff=cutoff)
    return [folded[one] for one in sorted(found, key=distance)[:most]]


def _folded(name: str) -> str:
    return name[:200].lower().replace("-", "_")


def printable(text: str) -> str:
    """``text`` with an escape in the place of each character that a terminal would act on; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


def one_line(text: str, most: int | None = None) -> str:
    """Foreign text for one line of output: line breaks are escaped, too, and text beyond ``most`` characters is cut."""
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    return printable(text).replace("\n", "\\n")


def quoted(text: object, most: int = 80) -> str:
    """Foreign text in double quotes, on one line, cut after ``most`` characters."""
    return f'"{one_line(str(text), most)}"'


def yaml_line(value: Any) -> str:
    """``value`` as YAML on one line, to be pasted into a config: ``{keep_model: "a #c"}``.

    Read back it is the same value. Characters that a terminal would act on are escaped.
    """
    import yaml

    class OneLine(yaml.SafeDumper):
        """Double quotes keep a line break as an escape; single ones would break the line."""

    def text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)

    OneLine.add_representer(str, text_node)

    def dumped(*, allow_unicode: bool) -> str:
        text: str = yaml.dump(
            value,
            Dumper=OneLine,
            default_flow_style=True,
            sort_keys=False,
            width=float("inf"),
            allow_unicode=allow_unicode,
        )
        # a scalar alone ends with a document marker
        return text.removesuffix("\n").removesuffix("\n...")

    text = dumped(allow_unicode=True)
    return text if text.isprintable() else dumped(allow_unicode=False)
