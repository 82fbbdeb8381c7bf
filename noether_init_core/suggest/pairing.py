"""All layers of a file and a model, paired up: certain pairs first, then those that take a closer look. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from noether_init_core.suggest.layer_names import Index, Layer, Numbers, layers_of, meanings_of, numbers_out
from noether_init_core.suggest.matching import loose_signature, matched, signature_of, with_other_blocks
from noether_init_core.suggest.pairs import Pair, fit, relation, with_flips
from noether_init_core.suggest.special import fused, resampled, stacked
from noether_init_core.surgery.plan import TensorSpec

__all__ = ["Pairing"]

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
        counts = [Counter(map(signature_of, layers)) for layers in every]
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
        self._take(matched(*left(), signature_of, lambda one: counts[0][one] == 1 == counts[1][one]))
        if all_blocks:
            self._take(stacked(*left()))
            self._take(with_other_blocks(pair) for pair in matched(*left(), loose_signature, lambda _: False))

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
