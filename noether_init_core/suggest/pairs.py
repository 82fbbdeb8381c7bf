"""Pairs of layers: what becomes what, how, and why that may be wrong. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import attrs

from noether_init_core.messages import listed
from noether_init_core.suggest.layer_names import Index, Layer
from noether_init_core.surgery.steps import Interpolate, Shape

__all__ = [
    "ALIKE",
    "ALIKE_ONCE",
    "MARGIN",
    "MOST_COMPARISONS",
    "Flip",
    "Pair",
    "Relation",
    "fit",
    "is_head",
    "listed_paths",
    "relation",
    "with_flips",
]

# names that are this much alike are about the same layer: where its shape is found once on either side, and where not
ALIKE_ONCE, ALIKE = 0.55, 0.6
# by how much a name has to be nearer than the next one
MARGIN = 0.1
# layers of one shape are compared each with each; this many comparisons take about a second
MOST_COMPARISONS = 60_000

#: Whether matrices are transposed; ``square``: their shapes cannot tell; ``none``: there are no matrices.
Flip = Literal["yes", "no", "square", "none"]
#: The same, or the tensor has the same elements in another shape.
Relation = Flip | Literal["reshape"]
Way = Literal["rename", "reshape", "split", "concat", "unstack", "stack", "interpolate"]


@attrs.frozen(eq=False)
class Pair:
    """Layers of the file that become layers of the model, in the blocks ``indices``.

    Attributes:
        dim: Along which dimension it is split, concatenated, stacked or unstacked.
        doubts: Why it may be wrong; none where names and shapes tell.
        alternatives: What else it may be.
        why: What decided it, where that is not plain.
        grid: The step of ``interpolate``.
    """

    sources: tuple[Layer, ...]
    targets: tuple[Layer, ...]
    indices: tuple[Index, ...]
    way: Way = "rename"
    flip: Flip = "none"
    dim: int = 0
    doubts: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    why: str = ""
    grid: Interpolate | None = None

    @property
    def leaves(self) -> list[str]:
        """What every layer of it has, such as ``weight`` and ``bias``."""
        return [leaf for leaf in self.sources[0].leaves if all(leaf in one.leaves for one in self.layers)]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (*self.sources, *self.targets)

    def doubted(self, reason: str, *alternatives: str) -> Pair:
        """The same with one more doubt."""
        return attrs.evolve(self, doubts=(*self.doubts, reason), alternatives=(*self.alternatives, *alternatives))


def is_head(layer: Layer) -> bool:
    """Whether the name is that of what classifies."""
    return "head" in layer.concepts and "<" not in layer.template


def listed_paths(layers: Iterable[Layer]) -> str:
    """Their paths, not too many."""
    return listed((layer.path for layer in layers), 4)


def relation(source: Shape, target: Shape) -> Relation | None:
    """How the shape of a tensor of the file goes together with that of the model; None where it does not."""
    if source == target:
        return "none" if len(source) != 2 else "square" if source[0] == source[1] else "no"
    if len(source) == len(target) == 2 and source == target[::-1]:
        return "yes"
    if source and target and [n for n in source if n != 1] == [n for n in target if n != 1]:
        return "reshape"
    return None


def fit(source: Layer, target: Layer) -> Relation | None:
    """How the shapes of all blocks that both have go together: or None where they do not."""
    found: set[Relation] = set()
    for index, shapes in source.shapes.items():
        others = target.shapes.get(index)
        for leaf in shapes if others is not None else ():
            if others is None or leaf not in others:
                continue
            one = relation(shapes[leaf], others[leaf])
            if one is None:
                return None
            found.add(one)
    if {"yes", "no"} <= found or ("reshape" in found and found & {"yes", "no", "square"}):
        return None
    order: tuple[Relation, ...] = ("reshape", "yes", "no", "square", "none")
    return next((one for one in order if one in found), None)


def _is_telling(pair: Pair) -> bool:
    """Whether a pair says how matrices are laid out: tables of embeddings are never transposed."""
    return pair.flip in ("yes", "no") and not any(layer.concepts & {"embed", "head", "token"} for layer in pair.layers)


def _last(pair: Pair) -> Hashable:
    return tuple(layers[0].path.rpartition(".")[2] for layers in (pair.sources, pair.targets))


def _block(pair: Pair) -> str:
    return pair.sources[0].template.rpartition("<")[0]


def with_flips(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, those of square matrices with what others say: of the same last name, of the same block, all."""
    telling = [pair for pair in pairs if _is_telling(pair)]
    witnesses: dict[Hashable, list[Pair]] = {}
    for pair in telling:
        for scope in (("last", _last(pair)), ("block", _block(pair)), ("all", "")):
            witnesses.setdefault(scope, []).append(pair)
    found = []
    for pair in pairs:
        if pair.flip != "square":
            found.append(pair)
            continue
        if any(layer.concepts & {"embed", "head", "token"} for layer in pair.layers):
            found.append(attrs.evolve(pair, flip="no"))
            continue
        scopes: tuple[Hashable, ...] = (("last", _last(pair)), ("block", _block(pair)), ("all", ""))
        seen: list[Pair] = next((witnesses[scope] for scope in scopes if scope in witnesses), [])
        found.append(_flipped(pair, seen))
    return found


def _flipped(pair: Pair, seen: Sequence[Pair]) -> Pair:
    shape = next(iter(pair.sources[0].shapes.values())).get("weight", ())
    is_conv = pair.dim == -1  # [d, 3 d] beside squares: what is fused is as Conv1D has it
    cannot_tell = f"shapes cannot tell whether {pair.sources[0].path} {list(shape)} is transposed"
    flips = Counter(one.flip for one in seen)
    if not flips:
        flipped = attrs.evolve(pair, flip="yes" if is_conv else "no")
        if _is_moved(pair):
            return flipped
        return flipped.doubted(cannot_tell, "the same rule " + ("without" if is_conv else "with") + " transpose")
    flip = flips.most_common(1)[0][0]
    flipped = attrs.evolve(pair, flip=flip)
    if len(flips) > 1:
        return flipped.doubted(
            f"{cannot_tell}, and others differ: most are" + ("" if flip == "yes" else " not"),
            "the same rule " + ("without" if flip == "yes" else "with") + " transpose",
        )
    if flip == "no":
        return flipped
    witness = min(one.sources[0].path for one in seen)
    return attrs.evolve(
        flipped, why=f"transposed as {witness} is: the shape of {pair.sources[0].path} {list(shape)} cannot tell"
    )


def _is_moved(pair: Pair) -> bool:
    """Whether the name is the same behind a prefix, so that nothing speaks for another layout."""
    mine, its = (f".{layers[0].path}" for layers in (pair.sources, pair.targets))
    return mine.endswith(its) or its.endswith(mine)
