"""All layers of a file and a model, paired up: certain pairs first, then those that take a closer look. Pure.

Layers of equal sizes are paired by their names, with a doubt wherever no name tells.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import attrs

from noether_init_core.suggest.layer_names import (
    Index,
    Layer,
    Numbers,
    layers_of,
    meanings_of,
    numbers_out,
)
from noether_init_core.suggest.pairs import (
    ALIKE,
    ALIKE_ONCE,
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
# names of the file and of the model -> template and numbers
_Templates = tuple[Mapping[str, tuple[str, Index]], ...]


class Pairing:
    """Pairs up all layers of a file and a model. ``pairs`` is the result, ``sources`` and ``targets`` what is left."""

    def __init__(
        self,
        sources: Mapping[str, TensorSpec],
        targets: Mapping[str, TensorSpec],
        tied: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        """``tied``: name in the model -> all names of the same tensor; when one gets it, all have it."""
        self._all = sources, targets
        self._tied = tied or {}
        self.sources, self.targets = dict(sources), dict(targets)
        self.pairs: list[Pair] = []
        #: Pairs that names suggest and nothing here can make fit.
        self.unfit: list[Pair] = []

    def run(self) -> None:
        """Certain pairs first; each later attempt sees what the earlier ones have left."""
        self._same_names()
        tried: list[_Templates] = []
        numbers: Numbers
        for numbers in ("all", "segments", "none"):
            templates = tuple(numbers_out(specs, numbers) for specs in self._all)
            if self.sources and self.targets and templates not in tried:
                self._attempt(templates, all_blocks=numbers != "none")
                tried.append(templates)
        self._positions()
        self.pairs = with_flips(self.pairs)

    def left(self) -> tuple[list[Layer], list[Layer]]:
        """The layers that are in no pair, each of its own: no number counts blocks."""
        mine, its = (layers_of(specs, {name: (name, ()) for name in specs}) for specs in (self.sources, self.targets))
        return mine, its

    def _take(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            self.pairs.append(pair)
            indices = None if pair.way in ("stack", "unstack") else pair.indices
            for left, layers in ((self.sources, pair.sources), (self.targets, pair.targets)):
                for layer in layers:
                    for index in layer.shapes if indices is None else indices:
                        for leaf in pair.leaves:
                            left.pop(layer.name(leaf, index), None)
            for layer in pair.targets if self._tied else ():
                for name in layer.names(indices):
                    for other in self._tied.get(name, ()):
                        self.targets.pop(other, None)

    def _same_names(self) -> None:
        same: dict[str, TensorSpec] = {}
        for name, spec in self.sources.items():
            other = self.targets.get(name)
            shapes = None if other is None else relation(tuple(spec.shape), tuple(other.shape))
            if shapes not in (None, "reshape"):
                same[name] = spec
        templates = numbers_out(self._all[0], "all")
        meanings = meanings_of(templates)
        its = {name: self.targets[name] for name in same}
        left = [_without_numbers(name for name in (specs if same else ()) if name not in same) for specs in self._all]
        shifted = {key: (mine, left[1][key]) for key, mine in left[0].items() if key in left[1]}
        pairs = []
        for source, target in zip(*(layers_of(one, templates, meanings) for one in (same, its)), strict=True):
            flip = fit(source, target)
            if flip is not None and flip != "reshape":
                pair = Pair((source,), (target,), tuple(source.shapes), flip=flip, why="same name")
                pairs.append(self._maybe_shifted(pair, shifted) if shifted else pair)
        self._take(pairs)

    def _maybe_shifted(self, pair: Pair, shifted: Mapping[str, tuple[str, str]]) -> Pair:
        """With a doubt where file and model have siblings of other numbers: fc1, fc2 beside fc2, fc3."""
        for name in pair.sources[0].names():
            source, target = shifted.get(_NUMBER.sub("#", name), ("", ""))
            shapes = [specs[one].shape for specs, one in zip(self._all, (source, target), strict=True) if one in specs]
            if len(shapes) == 2 and tuple(shapes[0]) == tuple(shapes[1]) == tuple(self._all[0][name].shape):
                source, target, own = (one.rpartition(".")[0] or one for one in (source, target, name))
                return pair.doubted(
                    "siblings are numbered differently in file and model, so all numbers may have moved",
                    f"{source} -> {own}",
                    f"{own} -> {target}",
                )
        return pair

    def _attempt(self, templates: _Templates, *, all_blocks: bool) -> None:
        meanings = [meanings_of(found) for found in templates]
        every = [layers_of(*each) for each in zip(self._all, templates, meanings, strict=True)]
        counts = [Counter(map(_signature_of, layers)) for layers in every]
        known: tuple[int, tuple[list[Layer], list[Layer]]] = (-1, ([], []))

        def left() -> tuple[list[Layer], list[Layer]]:
            nonlocal known
            if known[0] != len(self.pairs):
                mine, its = (
                    layers_of(*each) for each in zip((self.sources, self.targets), templates, meanings, strict=True)
                )
                known = len(self.pairs), (mine, its)
            return known[1]

        if all_blocks:
            self._take(fused(*left()))
        self._take(_matched(*left(), _signature_of, lambda one: counts[0][one] == 1 == counts[1][one]))
        if all_blocks:
            self._take(stacked(*left()))
            self._take(_with_other_blocks(pair) for pair in _matched(*left(), _loose_signature, lambda _: False))

    def _positions(self) -> None:
        """Position embeddings of another number of tokens."""
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
        key = _NUMBER.sub("#", name)
        if key != name:
            found.setdefault(key, name)
    return found


def _dims(layer: Layer, index: Index) -> tuple[str, tuple[int, ...]]:
    shapes = layer.shapes[index]
    leaf = "weight" if "weight" in shapes else min(shapes)
    return leaf, tuple(sorted(size for size in shapes[leaf] if size != 1))


def _signature_of(layer: Layer) -> Hashable:
    """Equal for layers of the same blocks and sizes, in whatever order the dimensions are."""
    return frozenset((index, _dims(layer, index)) for index in layer.shapes)


def _loose_signature(layer: Layer) -> Hashable:
    """Equal for layers of the same sizes in as many numbered containers, whichever blocks there are."""
    first = next(iter(layer.shapes))
    return len(first), _dims(layer, first)


def _matched(
    sources: Sequence[Layer],
    targets: Sequence[Layer],
    signature: Callable[[Layer], Hashable],
    is_once: Callable[[Hashable], bool],
) -> list[Pair]:
    """Pairs of layers of one signature, the most alike first."""
    pairs = []
    for key, (mine, its) in _grouped(sources, targets, signature).items():
        if len(mine) * len(its) <= MOST_COMPARISONS:
            pairs += _Group(mine, its, ALIKE_ONCE if is_once(key) else ALIKE).pairs()
            continue
        # too many to compare each with each: only those whose names end alike
        for some, others in _grouped(mine, its, lambda layer: tuple(layer.path.split(".")[-2:])).values():
            if len(some) * len(others) <= MOST_COMPARISONS:
                pairs += _Group(some, others, ALIKE).pairs()
    return sorted(pairs, key=lambda pair: pair.targets[0].place)


def _grouped(
    sources: Sequence[Layer], targets: Sequence[Layer], key: Callable[[Layer], Hashable]
) -> dict[Hashable, tuple[list[Layer], list[Layer]]]:
    """Layers of the file and of the model by a key that both sides have."""
    groups: dict[Hashable, tuple[list[Layer], list[Layer]]] = {}
    for side, layers in enumerate((sources, targets)):
        for layer in layers:
            groups.setdefault(key(layer), ([], []))[side].append(layer)
    return {found: sides for found, sides in groups.items() if all(sides)}


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
        others = [
            f"{self._sources[k].path} -> {self._targets[m].path}"
            for k, m in (*((i, m) for m in range(len(self._targets))), *((k, j) for k in range(len(self._sources))))
            if (k, m) != (i, j) and self._scores.get((k, m), -1) > score - MARGIN and not self._is_nearer(k, m, i)
        ]
        doubt = _doubt(source, target)
        if score < self._enough and not others:
            pair = pair.doubted(doubt or "the shapes fit, and the names have too little in common")
        elif others:
            reason = "several have this shape, and the names fit equally well" if score > 0.05 else "paired by order"
            pair = pair.doubted(f"{reason}: no name tells which", *others[:4])
        elif doubt:
            pair = pair.doubted(doubt)
        return pair

    def _is_nearer(self, k: int, m: int, i: int) -> bool:
        """Whether the layer of the pair (k, m) that is not paired with i has a pair that it is nearer to."""
        pair = (self._by[m], m) if k == i and m in self._by else (k, self._of[k]) if k != i and k in self._of else None
        return pair is not None and self._scores[pair] >= self._scores[k, m] + MARGIN


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


def _with_other_blocks(pair: Pair) -> Pair:
    """The pair with a doubt: file and model do not have the same blocks."""
    have, want = (len(layers[0].shapes) for layers in (pair.sources, pair.targets))
    before, _, behind = pair.sources[0].template.rpartition("<")
    return pair.doubted(
        f"the file has {have} of {before}<{behind[:2]}, the model {want}: those of equal numbers are paired",
        "other blocks, such as every second: one rule for each",
    )
