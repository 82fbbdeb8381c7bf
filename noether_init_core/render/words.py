"""How numbers, actions and rules are said. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs

from noether_init_core.messages import one_line
from noether_init_core.surgery.plan import Action


@attrs.frozen
class Mark:
    """How an action looks: the symbol tells it from all others where there is no colour."""

    symbol: str
    word: str
    style: str

    def text(self, width: int) -> str:
        """Symbol and word, the word in ``width`` columns."""
        return f" {self.symbol} {self.word:<{width}}"


MARKS: Mapping[Action, Mark] = {
    "load": Mark("=", "load", "green"),
    "rename": Mark(">", "rename", "green"),
    "transform": Mark("~", "transform", "cyan"),
    "cast": Mark("c", "cast", "cyan"),
    "keep": Mark("o", "keep", "yellow"),
    "reset": Mark("r", "reset", "yellow"),
    "mismatch": Mark("x", "mismatch", "bold red"),
    "missing": Mark("?", "missing", "bold red"),
    "unexpected": Mark("!", "unexpected", "bold red"),
    "removed": Mark("-", "removed", "dim"),
    "outside": Mark(".", "outside", "dim"),
}

_UNITS = ("", " k", " M", " G", " T", " P")

# Labels of transforms end in the rule itself, whose names stand beside it anyway.
_TRANSFORM = re.compile(r"(?:(?P<place>.+:[0-9]+) )?(?P<rule>[\w.]*transforms\.[0-9]+) \(.*\)", re.DOTALL)


def amount(number: int) -> str:
    """A number of elements in at most seven columns: ``768``, ``7.7 k``, ``14.2 M``."""
    value, unit = float(number), 0
    # 999,950 would be rounded to 1000.0 k
    while value >= (999.95 if unit else 1000) and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f}{_UNITS[unit]}" if unit else str(number)


def percent(share: float) -> str:
    """A share from 0 to 1, rounded so that only all is ``100 %`` and only nothing is ``0 %``."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    return "< 0.1 %" if share < 0.001 else f"{min(100 * share, 99.9):.1f} %"


def place_of_rule(rule: str) -> str:
    """Where a rule stands, short: ``init.yaml:7`` or ``transforms.1``; other rules as they are."""
    found = _TRANSFORM.fullmatch(rule)
    return one_line(rule if found is None else found["place"] or found["rule"])
