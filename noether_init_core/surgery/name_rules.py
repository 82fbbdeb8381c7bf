"""Rules on names: which entry of a file becomes which entry of a model. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import attrs

from noether_init_core import messages
from noether_init_core.surgery.plan import Problem
from noether_init_core.surgery.steps import Shape, Step

#: Segments that wrappers of modules put into names.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})
# The search for near names takes time by the product of their lengths.
_LONGEST = 256
_NUMBER = re.compile(r"\d+")
_WRAPPER = re.compile("|".join(sorted(WRAPPERS)))


@attrs.frozen
class Taken:
    """Where the value of one entry of a model comes from.

    ``steps`` are carried out on the tensors of ``sources``, and ``part`` of the ``parts`` tensors that they make is
    taken. ``rule`` is None where the name is the same on both sides.
    """

    sources: tuple[str, ...]
    rule: str | None = None
    steps: tuple[Step, ...] = ()
    part: int = 0
    parts: int = 1


@attrs.define
class NameMatch:
    """What rules decided for one file and one model.

    Attributes:
        moves: Name in the model -> where its value comes from.
        removed: Name in the file that rules drop -> rule.
        kept: Name in the model that keeps its present value -> rule.
        unused_kept: Name in the file whose target keeps its own value -> that target.
        overwritten: (name in the file that loses, name that wins, their common target, rule).
        matched: Rules that matched at least one name.
        problems: Why the rules cannot be followed; of no model yet.
        outside: Names of the file outside of what the rules are about.
        astray: Name in the file -> (name that it would get, which the model has not; the rule, or empty).
        shadowed: Rule -> rules that took names before it that it would have matched.
        said: Name -> how rules say it, below roots and without wrappers, where that differs.
    """

    moves: dict[str, Taken] = attrs.Factory(dict)
    removed: dict[str, str] = attrs.Factory(dict)
    kept: dict[str, str] = attrs.Factory(dict)
    unused_kept: dict[str, str] = attrs.Factory(dict)
    overwritten: tuple[tuple[str, str, str, str], ...] = ()
    matched: set[str] = attrs.Factory(set)
    problems: tuple[Problem, ...] = ()
    outside: frozenset[str] = frozenset()
    astray: dict[str, tuple[str, str]] = attrs.Factory(dict)
    shadowed: defaultdict[str, set[str]] = attrs.field(factory=lambda: defaultdict(set))
    said: dict[str, str] = attrs.Factory(dict)


class NameRules(Protocol):
    """Surgery on names. Both methods are pure."""

    def match(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> NameMatch:
        """Decide for one file and one model."""
        ...

    def unmatched(
        self, matches: Sequence[NameMatch], sources: Sequence[str], targets: Sequence[str]
    ) -> list[tuple[str, bool]]:
        """Messages about rules that matched in none of the parts, each with whether it is an error.

        ``sources`` and ``targets`` are the names of all files and models.
        """
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
    unmatched_is_error: bool = False

    def match(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> NameMatch:
        """As Noether does it; see the class.

        Names that differ only in the segments that wrappers of modules add, ``module.`` (DistributedDataParallel),
        ``_orig_mod.`` (torch.compile) and ``_fsdp_wrapped_module.``, are matched where nothing else decided about them
        and exactly one name fits on each side.
        """
        match = NameMatch()
        current: dict[str, str] = {name: name for name in sources}
        last_rule: dict[str, str] = {}
        for key in self.keys_to_remove:
            if key in current:
                match.removed[current.pop(key)] = rule = f"keys_to_remove: {key}"
                match.matched.add(rule)
        for pattern in self.patterns_to_remove:
            rule = f"patterns_to_remove: {pattern}"
            for name in [name for name in current if pattern in name]:
                match.removed[current.pop(name)] = rule
                match.matched.add(rule)
        for rename in self.patterns_to_rename:
            rule = f"patterns_to_rename: {rename.src} -> {rename.dst}"
            for name in [name for name in current if rename.src in name]:
                source = current.pop(name)
                match.matched.add(rule)
                target = name.replace(rename.src, rename.dst)
                if target in current:
                    match.overwritten += ((current[target], source, target, rule),)
                    match.removed[current[target]] = f"{rule} (overwritten by {source})"
                    last_rule.pop(current[target], None)
                current[target] = source
                last_rule[source] = rule
        for pattern in self.patterns_to_instantiate:
            rule = f"patterns_to_instantiate: {pattern}"
            for name in targets:
                if pattern in name:
                    match.kept.setdefault(name, rule)
                    match.matched.add(rule)
        match.unused_kept = {current[name]: name for name in match.kept if name in current}
        wanted = [name for name in targets if name not in match.kept]
        match.moves = {
            name: Taken((current[name],), last_rule.get(current[name])) for name in wanted if name in current
        }
        known = set(targets)
        left = _by_bare_name(name for name, source in current.items() if name == source and name not in known)
        missing = _by_bare_name(name for name in wanted if name not in match.moves)
        for bare in missing.keys() & left.keys():
            if len(missing[bare]) == len(left[bare]) == 1:
                match.moves[missing[bare][0]] = Taken((left[bare][0],), "prefix of a wrapper")
        match.astray = {
            source: (name, last_rule[source])
            for name, source in current.items()
            if source in last_rule and name not in known
        }
        return match

    def unmatched(
        self, matches: Sequence[NameMatch], sources: Sequence[str], targets: Sequence[str]
    ) -> list[tuple[str, bool]]:
        """An absent key is an error, an unmatched pattern a warning, as in ``docs/noether-differences.md``."""
        matched = set[str]().union(*(match.matched for match in matches))
        messages = []
        for key in self.keys_to_remove:
            if f"keys_to_remove: {key}" not in matched:
                close = ", ".join(near(key, sources))
                messages.append(
                    (f"keys_to_remove: the file has no {key}" + (f"; near: {close}" if close else ""), True)
                )
        patterns = [
            *((f"patterns_to_remove: {pattern}", "") for pattern in self.patterns_to_remove),
            *((f"patterns_to_instantiate: {pattern}", "") for pattern in self.patterns_to_instantiate),
            *((f"patterns_to_rename: {rename.src}", f" -> {rename.dst}") for rename in self.patterns_to_rename),
        ]
        unmatched = [said for said, rest in patterns if said + rest not in matched]
        return messages + [(f"{said} matches nothing", self.unmatched_is_error) for said in unmatched]


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Name without the segments of wrappers -> name. Where two would be one, both stay as they are."""
    names = tuple(names)
    if not any(map(_WRAPPER.search, names)):
        return dict(zip(names, names, strict=True))
    return {(bare if len(those) == 1 else name): name for bare, those in _by_bare_name(names).items() for name in those}


def _by_bare_name(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        bare = name
        if _WRAPPER.search(name):
            bare = ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)
        found.setdefault(bare, []).append(name)
    return found


def single_rename(missing: Mapping[str, Shape], unexpected: Mapping[str, Shape]) -> tuple[str, str] | None:
    """The one replacement ``(src, dst)`` in names of the file that yields every missing name, with its shape."""
    first = next(iter(unexpected)).split(".")
    for wanted in [name for name in missing if name.rpartition(".")[2] == first[-1]][:20]:
        other = wanted.split(".")
        shared = 0
        while shared < min(len(first), len(other)) and first[-1 - shared] == other[-1 - shared]:
            shared += 1
        src, dst = (
            ".".join(segments[: len(segments) - shared]) + ("." if len(segments) > shared else "")
            for segments in (first, other)
        )
        if src and {name.replace(src, dst): shape for name, shape in unexpected.items()}.items() >= missing.items():
            return src, dst
    return None


def near(name: str, others: Sequence[str], most: int = 3) -> list[str]:
    """Up to ``most`` of ``others`` that look like ``name``: those of the same leaf name before others.

    Of names that differ in numbers only, such as those of layers, the first stands for all.
    """
    folded: dict[str, str] = {}
    for other in others:
        if len(other) <= _LONGEST:
            folded.setdefault(_NUMBER.sub("#", other), other)
    known = list(folded.values())
    leaf = name.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == leaf]
    return messages.near(name, same, most, cutoff=0.5) or messages.near(name, known, most, cutoff=0.5)
