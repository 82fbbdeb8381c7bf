"""What stands in front of names on one side, such as ``module.``: taken off, or named where it hides what is common."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Sequence

__all__ = ["prefix_note", "without_prefixes"]

_LEAST_SHARE = 0.5
_SAMPLES, _CANDIDATES = 8, 4


def without_prefixes(name: str, prefixes: Sequence[str]) -> str:
    """The name without any of the prefixes, each taken off once, in whatever order they stand there."""
    left = [prefix for prefix in prefixes if prefix]
    while found := next((prefix for prefix in left if name.startswith(prefix)), None):
        left.remove(found)
        name = name.removeprefix(found)
    return name


def prefix_note(a: Collection[str], b: Collection[str]) -> str:
    """What to strip where few names are common and most would be then; empty where that is not so."""
    enough = _LEAST_SHARE * min(len(a), len(b))
    common = len(set(a) & set(b))
    if common >= enough:
        return ""
    of_a, of_b = _in_front(a, b, enough), _in_front(b, a, enough)
    if of_a or of_b:
        found = [("A", of_a)] if of_a else [("B", of_b)]
    else:
        found = [("A", _first_segment(a)), ("B", _first_segment(b))]
        (_, of_a), (_, of_b) = found
        stripped = {name.removeprefix(of_a) for name in a} & {name.removeprefix(of_b) for name in b}
        if len(stripped) < enough:
            return ""
    said = " and ".join(f"{side} has {prefix!r}" for side, prefix in found)
    options = " ".join(f"--strip {shlex.quote(prefix)}" for _side, prefix in found)
    return f"{common} of {min(len(a), len(b))} names are in both; {said} in front of them. Next: {options}"


def _in_front(longer: Collection[str], shorter: Collection[str], enough: float) -> str:
    """What stands in front of ``longer`` and not of ``shorter``."""
    wanted = set(shorter)
    samples = tuple(f".{name}" for name in list(shorter)[:_SAMPLES])
    seen: Counter[str] = Counter()
    for name in longer:
        if name.endswith(samples):
            seen.update(name[: 1 - len(sample)] for sample in samples if name.endswith(sample))
    for prefix, _count in seen.most_common(_CANDIDATES):
        if sum(name.startswith(prefix) and name.removeprefix(prefix) in wanted for name in longer) >= enough:
            return prefix
    return ""


def _first_segment(names: Collection[str]) -> str:
    seen = Counter(name.partition(".")[0] + "." for name in names if "." in name)
    return seen.most_common(1)[0][0] if seen else ""
