"""Rules on names: which entry of a file becomes which entry of a model. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Protocol

import attrs

__all__ = ["NameMatch", "NameRules", "NoetherSurgery", "Rename", "near"]


@attrs.frozen
class NameMatch:
    """What rules decided for one file and one model.

    Attributes:
        moves: Name in the model -> (name in the file, rule or None where the name is the same).
        removed: Name in the file that rules drop -> rule.
        kept: Name in the model that keeps its present value -> rule.
        unused_kept: Name in the file whose target keeps its own value -> rule.
        overwritten: (name in the file that loses, name that wins, their common target, rule).
        matched: Rules that matched at least one name.
    """

    moves: dict[str, tuple[str, str | None]]
    removed: dict[str, str] = attrs.Factory(dict)
    kept: dict[str, str] = attrs.Factory(dict)
    unused_kept: dict[str, str] = attrs.Factory(dict)
    overwritten: tuple[tuple[str, str, str, str], ...] = ()
    matched: frozenset[str] = frozenset()


class NameRules(Protocol):
    """Surgery on names. Both methods are pure."""

    def match(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> NameMatch:
        """Decide for one file and one model."""
        ...

    def unmatched(self, matches: Sequence[NameMatch], sources: Sequence[tuple[str, ...]]) -> list[tuple[str, bool]]:
        """Messages about rules that matched in none of the parts, each with whether it is an error."""
        ...


@attrs.frozen
class Rename:
    """Every occurrence of ``src`` in a name becomes ``dst``."""

    src: str
    dst: str


@attrs.frozen
class NoetherSurgery:
    """The four surgery fields of Noether, one after the other, on substrings, with Noether's results.

    ``keys_to_remove`` (whole names), ``patterns_to_remove``, ``patterns_to_rename`` (each sees the result of the one
    before; a name that becomes another's takes its place), ``patterns_to_instantiate`` (names of the model that keep
    their present value).
    """

    keys_to_remove: tuple[str, ...] = ()
    patterns_to_remove: tuple[str, ...] = ()
    patterns_to_rename: tuple[Rename, ...] = ()
    patterns_to_instantiate: tuple[str, ...] = ()

    def match(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> NameMatch:
        """As Noether does it; see the class."""
        current: dict[str, str] = {name: name for name in sources}
        last_rule: dict[str, str] = {}
        removed: dict[str, str] = {}
        overwritten: list[tuple[str, str, str, str]] = []
        matched: set[str] = set()
        for key in self.keys_to_remove:
            if key in current:
                removed[current.pop(key)] = rule = f"keys_to_remove: {key}"
                matched.add(rule)
        for pattern in self.patterns_to_remove:
            rule = f"patterns_to_remove: {pattern}"
            for name in [name for name in current if pattern in name]:
                removed[current.pop(name)] = rule
                matched.add(rule)
        for rename in self.patterns_to_rename:
            rule = f"patterns_to_rename: {rename.src} -> {rename.dst}"
            for name in [name for name in current if rename.src in name]:
                source = current.pop(name)
                matched.add(rule)
                target = name.replace(rename.src, rename.dst)
                if target in current:
                    overwritten.append((current[target], source, target, rule))
                    removed[current[target]] = f"{rule} (overwritten by {source})"
                    last_rule.pop(current[target], None)
                current[target] = source
                last_rule[source] = rule
        kept: dict[str, str] = {}
        for pattern in self.patterns_to_instantiate:
            rule = f"patterns_to_instantiate: {pattern}"
            for name in targets:
                if pattern in name:
                    kept.setdefault(name, rule)
                    matched.add(rule)
        unused_kept = {current[name]: rule for name, rule in kept.items() if name in current}
        known = set(targets)
        moves = {
            target: (source, last_rule.get(source))
            for target, source in current.items()
            if target in known and target not in kept
        }
        return NameMatch(moves, removed, kept, unused_kept, tuple(overwritten), frozenset(matched))

    def unmatched(self, matches: Sequence[NameMatch], sources: Sequence[tuple[str, ...]]) -> list[tuple[str, bool]]:
        """An absent key is an error, an unmatched pattern a warning, as in ``docs/noether-differences.md``."""
        matched = frozenset[str]().union(*(match.matched for match in matches))
        names = [name for part in sources for name in part]
        messages = []
        for key in self.keys_to_remove:
            if f"keys_to_remove: {key}" not in matched:
                neighbours = near(key, names)
                hint = f"; near: {', '.join(neighbours)}" if neighbours else ""
                messages.append((f"keys_to_remove: the file has no {key}{hint}", True))
        for field, patterns in (
            ("patterns_to_remove", self.patterns_to_remove),
            ("patterns_to_instantiate", self.patterns_to_instantiate),
        ):
            messages += [
                (f"{field}: {pattern} matches nothing", False)
                for pattern in patterns
                if f"{field}: {pattern}" not in matched
            ]
        messages += [
            (f"patterns_to_rename: {rename.src} matches nothing", False)
            for rename in self.patterns_to_rename
            if f"patterns_to_rename: {rename.src} -> {rename.dst}" not in matched
        ]
        return messages


def near(name: str, others: Sequence[str], most: int = 3) -> list[str]:
    """Up to ``most`` of ``others`` that look like ``name``: same leaf names first, then by similarity."""
    leaf = name.rpartition(".")[2]
    pool = [other for other in others if other.rpartition(".")[2] == leaf] or list(others)
    found = difflib.get_close_matches(name, pool[:2000], n=most, cutoff=0.5)
    return found or difflib.get_close_matches(name, list(others)[:2000], n=most, cutoff=0.5)
