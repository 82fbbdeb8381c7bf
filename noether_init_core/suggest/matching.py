"""Pairs all layers of a file and a model: certain pairs first, then uncertain ones. Pure.

Layers of equal shapes are paired by their names, with a doubt if no name decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from noether_init_core.suggest.layer_names import Layer, Names
from noether_init_core.suggest.pairs import (
    ALIKE,
    MARGIN,
    MOST_COMPARISONS,
    Pair,
    Relation,
    fit,
    fused,
    has_conflict,
    likeness,
    relation,
    resampled,
    stacked,
    with_flips,
)
from noether_init_core.surgery.fit import TensorSpec

_NUMBER = re.compile("[0-9]+")


class Pairing:
    """Pairs all layers of a file and a model. ``pairs`` is the result; ``sources`` and ``targets`` are what remains."""

    def __init__(
        self, sources: Mapping[str, TensorSpec], targets: Mapping[str, TensorSpec], tied: Mapping[str, Iterable[str]]
    ) -> None:
        """``tied``: name in the model -> all names of the same tensor; a pair for one serves all."""
        self._all = sources, targets
        self._tied = tied
        self.sources, self.targets = dict(sources), dict(targets)
        self.pairs: list[Pair] = []
        #: Pairs that names suggest, but whose shapes no step fits.
        self.unfit: list[Pair] = []

    def run(self) -> None:
        """Find all pairs. Certain ones come first; each later step sees only what earlier ones left."""
        self._same_names()
        names = [Names.of(specs) for specs in self._all]
        self._take(fused(*self._left(names)))
        self._take(_matched(*self._left(names)))
        self._take(stacked(*self._left(names)))
        self._take(_matched(*self._left([Names.of(specs, are_counted=False) for specs in self._all])))
        self._positions()
        self.pairs = with_flips(self.pairs)

    def left(self) -> list[list[Layer]]:
        """The layers of file and model without a pair, each block separately."""
        return self._left([Names.of(specs, are_counted=False) for specs in (self.sources, self.targets)])

    def _left(self, names: Sequence[Names]) -> list[list[Layer]]:
        return [one.layers(specs) for one, specs in zip(names, (self.sources, self.targets), strict=True)]

    def _take(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            self.pairs.append(pair)
            for sources, targets in (names for leaf in pair.leaves for names in pair.names(leaf)):
                for name in sources:
                    self.sources.pop(name, None)
                for name in targets:
                    for other in (name, *self._tied.get(name, ())):
                        self.targets.pop(other, None)

    def _same_names(self) -> None:
        same: dict[str, TensorSpec] = {}
        for name, spec in self.sources.items():
            other = self.targets.get(name)
            if other is not None and relation(tuple(spec.shape), tuple(other.shape)) not in (None, "reshape"):
                same[name] = spec
        names = Names.of(self._all[0])
        mine, its = (_without_numbers(name for name in specs if name not in same) for specs in self._all)
        shifted = {key: (mine[key], its[key]) for key in mine.keys() & its.keys()}
        pairs = []
        for source, target in zip(
            names.layers(same), names.layers({name: self.targets[name] for name in same}), strict=True
        ):
            flip = fit(source, target)
            if flip is not None and flip != "reshape":
                pair = Pair((source,), (target,), tuple(source.shapes), flip=flip, why="same name")
                pairs.append(self._maybe_shifted(pair, shifted) if shifted else pair)
        self._take(pairs)

    def _maybe_shifted(self, pair: Pair, shifted: Mapping[str, tuple[str, str]]) -> Pair:
        """The pair, with a doubt if siblings have other numbers in file and model: fc1, fc2 beside fc2, fc3."""
        for name in pair.sources[0].names():
            names = (name, *shifted.get(_NUMBER.sub("#", name), ()))
            shapes = {tuple(specs[one].shape) for specs, one in zip((self._all[0], *self._all), names, strict=False)}
            if len(names) > 1 and len(shapes) == 1:
                own, source, target = (one.rpartition(".")[0] or one for one in names)
                return pair.doubted(
                    "siblings have other numbers in file and model, so every number may be shifted",
                    f"{source} -> {own}",
                    f"{own} -> {target}",
                )
        return pair

    def _positions(self) -> None:
        """Pair position embeddings for other numbers of tokens."""
        sources, targets = (
            [layer for layer in layers if "position" in layer.concepts and "weight" in layer.leaves]
            for layers in self.left()
        )
        if len(sources) == 1:
            for target in targets:
                pair = resampled(sources[0], target)
                if pair.grid is None or len(targets) > 1:
                    self.unfit.append(pair if pair.doubts else pair.doubted("several position embeddings fit"))
                else:
                    self._take([pair])


def _without_numbers(names: Iterable[str]) -> dict[str, str]:
    """Names with ``#`` for every number -> the first of these names."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(_NUMBER.sub("#", name), name)
    return found


def _blocks_and_sizes(layer: Layer) -> Hashable:
    """Equal for layers of the same sizes, in whatever order, in as many numbered containers."""
    index, shapes = next(iter(layer.shapes.items()))
    leaf = "weight" if "weight" in shapes else min(shapes)
    return len(index), leaf, tuple(sorted(size for size in shapes[leaf] if size != 1))


def _matched(sources: Sequence[Layer], targets: Sequence[Layer]) -> list[Pair]:
    """Pairs of layers of equal shapes, the most similar names first."""
    pairs = []
    for mine, its in _grouped(sources, targets, _blocks_and_sizes):
        if len(mine) * len(its) <= MOST_COMPARISONS:
            pairs += _most_alike(mine, its)
            continue
        # too many to compare all: compare only those whose names end in the same two segments
        for some, others in _grouped(mine, its, lambda layer: tuple(layer.path.split(".")[-2:])):
            if len(some) * len(others) <= MOST_COMPARISONS:
                pairs += _most_alike(some, others)
    return sorted(pairs, key=lambda pair: pair.targets[0].place)


def _grouped(
    sources: Sequence[Layer], targets: Sequence[Layer], key: Callable[[Layer], Hashable]
) -> list[tuple[list[Layer], list[Layer]]]:
    """For each key of both, the layers of the file and those of the model."""
    groups: dict[Hashable, tuple[list[Layer], list[Layer]]] = {}
    for side, layers in enumerate((sources, targets)):
        for layer in layers:
            groups.setdefault(key(layer), ([], []))[side].append(layer)
    return [sides for sides in groups.values() if all(sides)]


def _most_alike(sources: Sequence[Layer], targets: Sequence[Layer]) -> list[Pair]:
    """Pairs of layers of one size: fitting pairs with the most similar names first, then the rest by order."""
    fits: dict[tuple[int, int], Relation] = {}
    scores: dict[tuple[int, int], float] = {}
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            relation = None if has_conflict(source, target) else fit(source, target)
            if relation is not None:
                fits[i, j] = relation
                # prefer equal leaves: a norm with a bias is not one without
                missing = len(source.leaves.keys() ^ target.leaves.keys())
                scores[i, j] = likeness(source, target) - 0.1 * missing
    target_of: dict[int, int] = {}
    source_of: dict[int, int] = {}

    def put(pairs: Iterable[tuple[int, int]]) -> None:
        for i, j in pairs:
            if i not in target_of and j not in source_of and (i, j) in fits:
                target_of[i], source_of[j] = j, i

    def order(pair: tuple[int, int]) -> tuple[object, ...]:
        i, j = pair
        return sources[i].shapes.keys() != targets[j].shapes.keys(), -scores[pair], abs(i - j), pair

    put(sorted((pair for pair, score in scores.items() if score > 0.05), key=order))
    lone = [pair for pair in fits if pair[0] not in target_of and pair[1] not in source_of]
    mine, its = (sorted({pair[side] for pair in lone}) for side in (0, 1))
    if len(mine) == len(its):
        put(zip(mine, its, strict=True))

    def is_rival(pair: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether another pair fits as well, and its other layer has no nearer partner."""
        i, j = other
        own = (source_of.get(j, -1), j) if i == pair[0] else (i, target_of.get(i, -1))
        score = scores.get(other, -math.inf)
        return other != pair and score > scores[pair] - MARGIN and scores.get(own, -math.inf) < score + MARGIN

    pairs = []
    for i, j in target_of.items():
        others = [*((i, m) for m in range(len(targets))), *((k, j) for k in range(len(sources)))]
        rivals = [f"{sources[k].label} -> {targets[m].label}" for k, m in others if is_rival((i, j), (k, m))]
        pairs.append(_paired(sources[i], targets[j], fits[i, j], scores[i, j], rivals))
    return pairs


def _paired(source: Layer, target: Layer, relation: Relation, score: float, rivals: Sequence[str]) -> Pair:
    indices = tuple(index for index in source.shapes if index in target.shapes)
    if relation == "reshape":
        pair = Pair((source,), (target,), indices, "reshape")
    else:
        pair = Pair((source,), (target,), indices, flip=relation)
    doubt = _doubt(source, target)
    if rivals:
        reason = "several layers have this shape, and the names fit equally well" if score > 0.05 else "paired by order"
        pair = pair.doubted(f"{reason}: names do not decide", *rivals[:4])
    elif doubt or score < ALIKE:
        pair = pair.doubted(doubt or "the shapes fit, and the names have too little in common")
    if source.shapes.keys() == target.shapes.keys():
        return pair
    before, _, behind = source.template.rpartition("<")
    return pair.doubted(
        f"the file has {len(source.shapes)} of {before}<{behind[:2]}, the model {len(target.shapes)}: "
        "blocks of equal numbers are paired",
        "other blocks, such as every second: one rule for each",
    )


def _doubt(source: Layer, target: Layer) -> str:
    """Why two layers may differ although their names are similar; empty if there is no doubt."""
    mine, its = source.meaning, target.meaning
    shared = min(len(mine.numbers), len(its.numbers))
    if shared and mine.numbers[-shared:] != its.numbers[-shared:]:
        return "their numbers differ, so they are paired by order"
    if "in" in mine.concepts & its.concepts and mine.is_gated != its.is_gated:
        return "only one of them has a gate as a sibling: names do not decide which half it is"
    counts = len(mine.norms), len(its.norms)
    if counts[0] != counts[1] and (min(counts) > 0 or max(counts) > 2):
        return (
            f"blocks have {counts[0]} norms in the file and {counts[1]} in the model: equal names may be other places"
        )
    if not any(counts) or _below_blocks(source) == _below_blocks(target):
        return ""
    if set(mine.norms) == set(its.norms) and mine.role:
        return ""
    if max(counts) > 2:
        return f"names do not decide for certain which of the {counts[0]} norms of a block is which"
    if mine.role and its.role and mine.role[0] != "#" != its.role[0]:
        return "the norms of a block are named after different places"
    return ""


def _below_blocks(layer: Layer) -> str:
    return layer.path.rpartition(">")[2]
