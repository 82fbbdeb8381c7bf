"""Layers of equal sizes, paired by their names, with a doubt wherever no name tells. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import attrs

from noether_init_core.suggest.layer_names import Index, Layer, has_conflict, likeness
from noether_init_core.suggest.pairs import Pair, Relation, fit

__all__ = [
    "ALIKE",
    "ALIKE_ONCE",
    "MARGIN",
    "MOST_COMPARISONS",
    "loose_signature",
    "matched",
    "signature_of",
    "with_other_blocks",
]

# names that are this much alike are about the same layer: where its shape is found once on either side, and where not
ALIKE_ONCE, ALIKE = 0.55, 0.6
# by how much a name has to be nearer than the next one
MARGIN = 0.1
# layers of one shape are compared each with each; this many comparisons take about a second
MOST_COMPARISONS = 60_000


def _dims(layer: Layer, index: Index) -> tuple[str, tuple[int, ...]]:
    shapes = layer.shapes[index]
    leaf = "weight" if "weight" in shapes else min(shapes)
    return leaf, tuple(sorted(size for size in shapes[leaf] if size != 1))


def signature_of(layer: Layer) -> Hashable:
    """Equal for layers of the same blocks and sizes, in whatever order the dimensions are."""
    return frozenset((index, _dims(layer, index)) for index in layer.shapes)


def loose_signature(layer: Layer) -> Hashable:
    """Equal for layers of the same sizes in as many numbered containers, whichever blocks there are."""
    first = next(iter(layer.shapes))
    return len(first), _dims(layer, first)


def matched(
    sources: Sequence[Layer],
    targets: Sequence[Layer],
    signature: Callable[[Layer], Hashable],
    is_once: Callable[[Hashable], bool],
) -> list[Pair]:
    """Pairs of layers of one signature, the most alike first."""
    groups: dict[Hashable, tuple[list[Layer], list[Layer]]] = {}
    for side, layers in enumerate((sources, targets)):
        for layer in layers:
            groups.setdefault(signature(layer), ([], []))[side].append(layer)
    pairs = []
    for key, (mine, its) in groups.items():
        if mine and its and len(mine) * len(its) <= MOST_COMPARISONS:
            pairs += _Group(mine, its, ALIKE_ONCE if is_once(key) else ALIKE).pairs()
        elif mine and its:
            # too many to compare each with each: only those whose names end alike
            tails: dict[str, tuple[list[Layer], list[Layer]]] = {}
            for side, layers in enumerate((mine, its)):
                for layer in layers:
                    tail = ".".join(layer.path.split(".")[-2:])
                    tails.setdefault(tail, ([], []))[side].append(layer)
            for some, others in tails.values():
                if some and others and len(some) * len(others) <= MOST_COMPARISONS:
                    pairs += _Group(some, others, ALIKE).pairs()
    return sorted(pairs, key=lambda pair: pair.targets[0].place)


class _Group:
    """Layers of one signature."""

    def __init__(self, sources: Sequence[Layer], targets: Sequence[Layer], enough: float) -> None:
        self._sources, self._targets, self._enough = sources, targets, enough
        self._fits: dict[tuple[int, int], Relation] = {}
        self._scores: dict[tuple[int, int], float] = {}
        for i, source in enumerate(sources):
            for j, target in enumerate(targets):
                relation = None if has_conflict(source, target) else fit(source, target)
                if relation is not None:
                    self._fits[i, j] = relation
                    # equal leaves speak for it: a norm with a bias is not one without
                    missing = len(source.leaves.keys() ^ target.leaves.keys())
                    self._scores[i, j] = likeness(source, target) - 0.1 * missing
        self._of: dict[int, int] = {}
        self._by: dict[int, int] = {}

    def pairs(self) -> list[Pair]:
        alike = [pair for pair, score in self._scores.items() if score > 0.05]
        for i, j in sorted(alike, key=lambda pair: (-self._scores[pair], abs(pair[0] - pair[1]), pair)):
            self._put(i, j)
        mine = [i for i in range(len(self._sources)) if i not in self._of]
        its = [j for j in range(len(self._targets)) if j not in self._by and any((i, j) in self._fits for i in mine)]
        mine = [i for i in mine if any((i, j) in self._fits for j in its)]
        if len(mine) == len(its):
            for i, j in zip(mine, its, strict=True):
                self._put(i, j)
        return [self._pair(i, j) for i, j in self._of.items()]

    def _put(self, i: int, j: int) -> None:
        if i not in self._of and j not in self._by and (i, j) in self._fits:
            self._of[i], self._by[j] = j, i

    def _pair(self, i: int, j: int) -> Pair:
        source, target, relation = self._sources[i], self._targets[j], self._fits[i, j]
        indices = tuple(index for index in source.shapes if index in target.shapes)
        pair = Pair((source,), (target,), indices)
        if relation == "reshape":
            pair = attrs.evolve(pair, way="reshape")
        else:
            pair = attrs.evolve(pair, flip=relation)
        score = self._scores[i, j]
        others = [f"{source.path} -> {self._targets[k].path}" for k in self._rivals(i, j, score)]
        others += [f"{self._sources[k].path} -> {target.path}" for k in self._rival_sources(i, j, score)]
        doubt = _doubt(source, target)
        if score < self._enough and not others:
            pair = pair.doubted(doubt or "the shapes fit, and the names have too little in common")
        elif others:
            reason = "several have this shape, and the names fit equally well" if score > 0.05 else "paired by order"
            pair = pair.doubted(f"{reason}: no name tells which", *others[:4])
        elif doubt:
            pair = pair.doubted(doubt)
        return pair

    def _rivals(self, i: int, j: int, score: float) -> list[int]:
        """Other targets as near to the source, which no other source is nearer to."""
        return [
            k
            for k in range(len(self._targets))
            if k != j
            and self._scores.get((i, k), -1) > score - MARGIN
            and not (k in self._by and self._scores[self._by[k], k] >= self._scores[i, k] + MARGIN)
        ]

    def _rival_sources(self, i: int, j: int, score: float) -> list[int]:
        return [
            k
            for k in range(len(self._sources))
            if k != i
            and self._scores.get((k, j), -1) > score - MARGIN
            and not (k in self._of and self._scores[k, self._of[k]] >= self._scores[k, j] + MARGIN)
        ]


def _doubt(source: Layer, target: Layer) -> str:
    """Why two layers may not be the same, although their names are alike; empty for nothing."""
    mine, its = source.meaning, target.meaning
    shared = min(len(mine.numbers), len(its.numbers))
    if shared and mine.numbers[-shared:] != its.numbers[-shared:]:
        return "they are numbered differently, so they are paired by order"
    if "in" in mine.concepts & its.concepts and mine.is_gated != its.is_gated:
        return "only one of them has a gate beside it: no name tells which half it is"
    counts = len(mine.norms), len(its.norms)
    if counts[0] != counts[1] and (min(counts) > 0 or max(counts) > 2):
        return f"blocks have {counts[0]} norms in the file and {counts[1]} in the model: names may mean other places"
    if not any(counts) or _below_blocks(source) == _below_blocks(target):
        return ""
    if set(mine.norms) == set(its.norms) and mine.role:
        return ""
    if max(counts) > 2:
        return f"of {counts[0]} norms of a block, names do not tell for certain which is which"
    if mine.role and its.role and mine.role[0] != "#" != its.role[0]:
        return "the norms of a block are named after different places"
    return ""


def _below_blocks(layer: Layer) -> str:
    return layer.path.rpartition(">")[2]


def with_other_blocks(pair: Pair) -> Pair:
    """The pair with a doubt: file and model do not have the same blocks."""
    have, want = (len(layers[0].shapes) for layers in (pair.sources, pair.targets))
    before, _, behind = pair.sources[0].template.rpartition("<")
    return pair.doubted(
        f"the file has {have} of {before}<{behind[:2]}, the model {want}: those of equal numbers are paired",
        "other blocks, such as every second: one rule for each",
    )
