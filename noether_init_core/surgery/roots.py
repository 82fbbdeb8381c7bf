"""Finds the parts of a file that hold the entries of a model, for a config whose ``source_root`` is another. Pure."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Protocol

import attrs

from noether_init_core.messages import listed, near
from noether_init_core.surgery.advice import Advice, is_sayable
from noether_init_core.surgery.name_rules import NameMatch, NameRules, Transforms
from noether_init_core.surgery.wrappers import bare_names, below

# Weights lie a few levels deep; a hostile file may have names of thousands of segments.
_LONGEST, _DEEPEST = 256, 4
_MOST_TRIED = 4
_MOST_NAMED = 2_000
_DOT = re.compile(r"\.")
_AVERAGES = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow|polyak)(?:[._]|$)", re.IGNORECASE)


class Shaped(Protocol):
    """A tensor of which only the shape matters."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Part(Protocol):
    """What is known of a file and a model; a part of a plan has it."""

    @property
    def sources(self) -> Mapping[str, Shaped]: ...
    @property
    def targets(self) -> Mapping[str, Shaped]: ...
    @property
    def loaded(self) -> frozenset[str]: ...
    @property
    def beside(self) -> tuple[str, ...]: ...


@attrs.frozen
class Root:
    """A part of a file, and how well it fits a model.

    Attributes:
        name: What its names begin with, without the dot behind it; empty for the complete file.
        named: How many entries of the model it has by name.
        fitting: How many of them have the shape of the model, too.
    """

    name: str
    named: int
    fitting: int

    @property
    def is_average(self) -> bool:
        """Whether it is an average of weights, by its name."""
        return is_average(self.name)


def is_average(name: str) -> bool:
    """Whether a name is that of an average of weights, such as ``model_ema``."""
    return _AVERAGES.search(name) is not None


def fitting_roots(
    sources: Mapping[str, Shaped], targets: Mapping[str, Shaped], target_root: str = "", asked: str = ""
) -> list[Root]:
    """The parts of a file that fit a model best, all of them equally well; empty if none has half of the entries.

    A part is left out if an entry of the model lies elsewhere in the file. The complete file comes first, then names
    similar to ``asked``, and averages of weights last.
    """
    wanted = below(Transforms(target_root=target_root).target_root, bare_names(targets))
    found: dict[str, set[str]] = {}
    for name in bare_names(sources):
        starts = [0] if len(name) > _LONGEST else [0, *(dot.end() for dot in islice(_DOT.finditer(name), _DEEPEST))]
        for at in starts:
            if name[at:] in wanted:
                found.setdefault(name[:at], set()).add(name[at:])
    most = max(map(len, found.values()), default=0)
    if not wanted or 2 * most < len(wanted):
        return []
    likely = [root for root, names in found.items() if len(names) == most and not _lost(root, names, found)]
    if len(likely) > _MOST_TRIED:
        return []
    roots = [_tried(root.rstrip("."), sources, targets, target_root) for root in likely]
    best = max(((root.fitting, root.named) for root in roots), default=(0, 0))
    roots = [root for root in roots if (root.fitting, root.named) == best and 2 * best[0] >= best[1] > 0]
    similar = near(asked, [root.name for root in roots], _MOST_TRIED) if asked and roots else []

    def order(root: Root) -> tuple[bool, int, bool]:
        rank = similar.index(root.name) if root.name in similar else len(similar)
        return bool(root.name), rank, root.is_average

    return sorted((root for root in roots if not root.name or is_sayable(root.name)), key=order)


def _lost(root: str, names: set[str], found: Mapping[str, set[str]]) -> bool:
    """Whether a root leaves out an entry of the model that another part of the file has."""
    return any(not other.startswith(root) and not its <= names for other, its in found.items()) if root else False


def _tried(name: str, sources: Mapping[str, Shaped], targets: Mapping[str, Shaped], target_root: str) -> Root:
    """How well a root fits, by the rules that apply below it."""
    match = Transforms(source_root=name, target_root=target_root).match(tuple(sources), tuple(targets))
    pairs = [(taken.sources[0], target) for target, taken in match.moves.items() if target in targets]
    fitting = sum(tuple(sources[source].shape) == tuple(targets[target].shape) for source, target in pairs)
    return Root(name, len(pairs), fitting)


def present_roots(sources: Iterable[str], asked: str, most: int = 3) -> tuple[list[str], dict[str, int]]:
    """What names of a file begin with: those similar to ``asked``, nearest first; and all first parts with counts."""
    names = list(bare_names(sources))
    counts = Counter(name.partition(".")[0] for name in names if "." in name)
    deeper: dict[str, int] = defaultdict(int)
    for name in names:
        parts = name.split(".", _DEEPEST)[:-1]
        for depth in range(1, len(parts) + 1):
            deeper[".".join(parts[:depth])] += 1
        if len(deeper) > _MOST_NAMED:
            break
    known = [name for name, count in deeper.items() if count > 1 and is_sayable(name)]
    return near(asked, known, most), dict(counts)


def roots_for(part: Part, target_root: str = "", asked: str = "") -> list[Root]:
    """``fitting_roots`` for what no earlier initializer loads."""
    return fitting_roots(part.sources, _unloaded(part), target_root, asked)


def other_root(rules: NameRules, match: NameMatch, part: Part, advice: Advice) -> str:
    """The end of a message with the part of the file that fits a model better; empty without one.

    ``match``: the result of ``rules``, whose ``source_root``, if any, does not fit.
    """
    roots = rules.given if isinstance(rules, Transforms) else {}
    # rules and fields of the config are relative to the root that it has
    if advice.fields or advice.style == "rules":
        return ""
    found = roots_for(part, roots.get("target_root", ""), roots.get("source_root", ""))
    if not found or found[0].named <= len(match.moves):
        return ""
    return f". {told(found, part)}. Next: {advice.root([root.name for root in found])}"


def wrong_root(rules: NameRules, part: Part, advice: Advice | None) -> str:
    """The message about a ``source_root`` that no name of the file begins with, and the roots that there are."""
    given = rules.given if isinstance(rules, Transforms) else {}
    asked = ".".join(filter(None, given.get("source_root", "").split(".")))
    message = f"source_root: {asked}: no name of the file begins with it"
    if asked in part.beside:
        return f"{message}. {asked} lies beside the state dict of the file, and a config cannot select it yet"
    similar, counts = present_roots(part.sources, asked)
    first = dict.fromkeys([*similar, *counts])
    has = listed([f"{name} ({counts[name]} entries)" if name in counts else name for name in first])
    message += f". The file has {has}" if has else ". Its names have no part that they begin with"
    # rules of the config tell which names they are for
    has_rules = isinstance(rules, Transforms) and bool(rules.rules)
    found = [] if has_rules else roots_for(part, given.get("target_root", ""), asked)
    if found:
        message += f". {told(found, part)}"
    names = [root.name for root in found] or similar[:1]
    if advice is None or not names:
        return message
    if not names[0]:
        return f"{message}. Next: remove source_root: {asked}"
    return f"{message}. Next: {advice.root(names)}"


def told(roots: Sequence[Root], part: Part) -> str:
    """How well equally good roots fit, in words: ``15 of 15 entries fit below model``."""
    first, *others = roots
    fit = f"{first.fitting} of {len(_unloaded(part))} entries{' each' * bool(others)} fit"
    if not first.name:
        return f"{fit} without it"
    averages = [root.name for root in roots if root.is_average]
    named = f" ({', '.join(averages)}: {'averages' if averages[1:] else 'an average'} of weights, by the name)"
    return f"{fit} below {' and below '.join(root.name for root in roots)}{named if averages else ''}"


def _unloaded(part: Part) -> Mapping[str, Shaped]:
    if not part.loaded:
        return part.targets
    return {name: spec for name, spec in part.targets.items() if name not in part.loaded}
