"""All layers of a file and a model, paired up: certain pairs first, then those that take a closer look. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from noether_init_core.surgery.plan import TensorSpec
from noether_init_core.surgery.suggest_matching import loose_signature, matched, signature_of, with_other_blocks
from noether_init_core.surgery.suggest_names import Layer, Numbers, layers_of, numbers_out
from noether_init_core.surgery.suggest_pairs import Pair, fit, relation, with_flips
from noether_init_core.surgery.suggest_special import fused, resampled, stacked

__all__ = ["Pairing"]


class Pairing:
    """Pairs up all layers of a file and a model. ``pairs`` is the result, ``sources`` and ``targets`` what is left."""

    def __init__(self, sources: Mapping[str, TensorSpec], targets: Mapping[str, TensorSpec]) -> None:
        self._all = sources, targets
        self.sources, self.targets = dict(sources), dict(targets)
        self.pairs: list[Pair] = []
        #: Pairs that names suggest and nothing here can make fit.
        self.unfit: list[Pair] = []

    def run(self) -> None:
        """Certain pairs first; each later attempt sees what the earlier ones have left."""
        self._same_names()
        numbers: Numbers
        for numbers in ("all", "segments", "none"):
            if self.sources and self.targets:
                self._attempt(numbers)
        self._positions()
        self.pairs = with_flips(self.pairs)

    def left(self, numbers: Numbers = "none") -> tuple[list[Layer], list[Layer]]:
        """The layers that are in no pair."""
        mine, its = (numbers_out(specs, numbers) for specs in self._all)
        return layers_of(self.sources, mine), layers_of(self.targets, its)

    def _take(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            self.pairs.append(pair)
            indices = None if pair.way in ("stack", "unstack") else pair.indices
            for left, layers in ((self.sources, pair.sources), (self.targets, pair.targets)):
                for layer in layers:
                    for index in layer.shapes if indices is None else indices:
                        for leaf in pair.leaves:
                            left.pop(layer.name(leaf, index), None)

    def _same_names(self) -> None:
        same: dict[str, TensorSpec] = {}
        for name, spec in self.sources.items():
            other = self.targets.get(name)
            if other is not None and relation(tuple(spec.shape), tuple(other.shape)) in (
                "yes",
                "no",
                "square",
                "none",
            ):
                same[name] = spec
        templates = numbers_out(self._all[0], "all")
        its = {name: self.targets[name] for name in same}
        pairs = []
        for source, target in zip(layers_of(same, templates), layers_of(its, templates), strict=True):
            flip = fit(source, target)
            if flip is not None and flip != "reshape":
                pairs.append(Pair((source,), (target,), tuple(source.shapes), flip=flip, why="same name"))
        self._take(pairs)

    def _attempt(self, numbers: Numbers) -> None:
        mine, its = (numbers_out(specs, numbers) for specs in self._all)
        counts = tuple(
            Counter(map(signature_of, layers_of(specs, found)))
            for specs, found in zip(self._all, (mine, its), strict=True)
        )

        def left() -> tuple[list[Layer], list[Layer]]:
            return layers_of(self.sources, mine), layers_of(self.targets, its)

        if numbers != "none":
            self._take(fused(*left()))
        self._take(matched(*left(), signature_of, lambda one: counts[0][one] == 1 == counts[1][one]))
        if numbers != "none":
            self._take(stacked(*left()))
            self._take(with_other_blocks(pair) for pair in matched(*left(), loose_signature, lambda _: False))

    def _positions(self) -> None:
        """Position embeddings of another number of tokens, and heads of another number of classes."""
        sources, targets = self.left()
        for target in targets:
            like = [source for source in sources if "position" in source.concepts and "weight" in source.leaves]
            if "position" not in target.concepts or "weight" not in target.leaves or len(like) != 1:
                continue
            (source,) = like
            pair = resampled(source, target)
            if pair.grid is not None:
                self._take([pair])
            else:
                self.unfit.append(pair)
