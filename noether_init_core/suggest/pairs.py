"""Pairs of layers: which layers of the file become which of the model, by which steps, and with which doubts. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import attrs

from noether_init_core.messages import listed
from noether_init_core.suggest.layer_names import Index, Layer, parent
from noether_init_core.surgery.fit import square_grids
from noether_init_core.surgery.steps import Concat, Interpolate, Shape, StepError, Transpose, shapes_after

# likeness from which two names are taken as the same layer
ALIKE = 0.6
# how much nearer a name must be than the next one
MARGIN = 0.1
# all layers of one shape are compared with each other; this many comparisons take about a second
MOST_COMPARISONS = 60_000

# weights of words, in tenths: generic words count little, because libraries use others for the same place; integers,
# because their sum does not depend on the order
_GENERIC = (
    "model module net network backbone base transformer bert gpt vit roberta llama layers layer blocks block h "
    "stages stage dense self final trunk body"
)
_WEIGHTS = {**dict.fromkeys(_GENERIC.split(), 1), **dict.fromkeys(("encoder", "decoder", "embed"), 5)}
# a layer has at most one concept of each line
_EXCLUSIVE = [
    frozenset(words.split())
    for words in (
        "q k v qkv kv out in gate gateup norm",
        "attn mlp",
        "token position type patch cls head",
        "encoder decoder",
    )
]

#: Whether matrices are transposed; ``square``: their shapes do not show it; ``none``: no matrices.
Flip = Literal["yes", "no", "square", "none"]
#: A ``Flip``, or the same elements in another shape.
Relation = Flip | Literal["reshape"]
Way = Literal["rename", "reshape", "split", "concat", "unstack", "stack", "interpolate"]


@attrs.frozen(eq=False)
class Pair:
    """Layers of the file that become layers of the model, in the blocks ``indices``.

    Attributes:
        dim: The dimension of split, concatenation, stack or unstack.
        doubts: Why it may be wrong; empty if names and shapes decide.
        alternatives: Other possibilities.
        why: What decided it, if that is not obvious.
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
        """The leaves that all its layers have, such as ``weight`` and ``bias``."""
        return [leaf for leaf in self.sources[0].leaves if all(leaf in one.leaves for one in self.layers)]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (*self.sources, *self.targets)

    @property
    def is_table(self) -> bool:
        """Whether it is a table of embeddings, which is never transposed."""
        return any(layer.concepts & {"embed", "head", "token"} for layer in self.layers)

    def names(self, leaf: str) -> list[tuple[list[str], list[str]]]:
        """Names in the file and in the model that belong together: per block, or of all blocks for a stack."""
        groups = [self.indices] if self.way in ("stack", "unstack") else [(index,) for index in self.indices]

        def of(layers: tuple[Layer, ...], group: tuple[Index, ...]) -> list[str]:
            return list(dict.fromkeys(layer.name(leaf, index) for layer in layers for index in group))

        return [(of(self.sources, group), of(self.targets, group)) for group in groups]

    def doubted(self, reason: str, *alternatives: str) -> Pair:
        """A copy with one more doubt."""
        return attrs.evolve(self, doubts=(*self.doubts, reason), alternatives=(*self.alternatives, *alternatives))


def likeness(one: Layer, other: Layer) -> float:
    """How similar two names are, from 0 to about 1: the weight of the concepts that both share."""
    both = sum(_WEIGHTS.get(word, 10) for word in one.concepts & other.concepts)
    total = sum(_WEIGHTS.get(word, 10) for names in (one.concepts, other.concepts) for word in names)
    score = 2 * both / total if total else 0.0
    if one.path == other.path or one.path.endswith(f".{other.path}") or other.path.endswith(f".{one.path}"):
        score = max(score, 0.5) + 0.1
    return score


def has_conflict(one: Layer, other: Layer) -> bool:
    """Whether the names have two concepts that exclude each other."""
    numbers = frozenset(word for word in one.concepts | other.concepts if word.startswith("#"))
    mine, its = one.meaning, other.meaning
    are_named = mine.role and its.role and mine.role[0] != "#" != its.role[0]
    if are_named and (set(mine.norms) == set(its.norms) or len(mine.norms) != len(its.norms)):
        # places decide before numbers, unless both blocks have equally many norms at other places
        if mine.role != its.role:
            return True
        numbers = frozenset()
    return any(
        (left := one.concepts & group) and (right := other.concepts & group) and not left & right
        for group in (*_EXCLUSIVE, numbers)
    )


def is_head(layer: Layer) -> bool:
    """Whether the name is that of a classifier."""
    return "head" in layer.concepts and "<" not in layer.template


def relation(source: Shape, target: Shape) -> Relation | None:
    """How a shape in the file fits one in the model; None if it does not."""
    if source == target:
        return "none" if len(source) != 2 else "square" if source[0] == source[1] else "no"
    if len(source) == len(target) == 2 and source == target[::-1]:
        return "yes"
    if source and target and [n for n in source if n != 1] == [n for n in target if n != 1]:
        return "reshape"
    return None


def fit(source: Layer, target: Layer) -> Relation | None:
    """How the shapes of all common blocks fit; None if they do not."""
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


def _scopes(pair: Pair) -> tuple[Hashable, ...]:
    """Groups of matrices that are probably transposed alike, nearest first: same last name, same block, all."""
    lasts = tuple(layers[0].path.rpartition(".")[2] for layers in (pair.sources, pair.targets))
    return lasts, pair.sources[0].template.rpartition("<")[0], None


def with_flips(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, with each square matrix transposed like those whose shapes decide."""
    telling: dict[Hashable, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.flip in ("yes", "no") and not pair.is_table:
            for scope in _scopes(pair):
                telling[scope].append(pair)
    return [
        _flipped(pair, next((telling[scope] for scope in _scopes(pair) if scope in telling), []))
        if pair.flip == "square"
        else pair
        for pair in pairs
    ]


def _flipped(pair: Pair, seen: Sequence[Pair]) -> Pair:
    if pair.is_table:
        return attrs.evolve(pair, flip="no")
    flips = Counter(one.flip for one in seen)
    # without other matrices: [d, 3 d] beside squares is the layout of Conv1D
    flip = flips.most_common(1)[0][0] if flips else "yes" if pair.dim == -1 else "no"
    pair = attrs.evolve(pair, flip=flip)
    shown = f"{pair.sources[0].label} {list(next(iter(pair.sources[0].shapes.values())).get('weight', ()))}"
    cannot_tell = f"shapes do not decide whether {shown} is transposed"
    other = f"the same rule {'without' if flip == 'yes' else 'with'} transpose"
    if len(flips) > 1:
        return pair.doubted(f"{cannot_tell}, and others differ: most are{'' if flip == 'yes' else ' not'}", other)
    if not flips:
        return pair if _is_moved(pair) else pair.doubted(cannot_tell, other)
    if flip == "no":
        return pair
    witness = min(one.sources[0].label for one in seen)
    return attrs.evolve(pair, why=f"transposed like {witness}: the shape of {shown} does not decide")


def _is_moved(pair: Pair) -> bool:
    """Whether the names differ only in a prefix, so that another layout is improbable."""
    mine, its = (f".{layers[0].path}" for layers in (pair.sources, pair.targets))
    return mine.endswith(its) or its.endswith(mine)


# fused layer -> its parts, in the order in which libraries concatenate them
_FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gateup": ("gate", "in")}


def fused(sources: Sequence[Layer], targets: Sequence[Layer]) -> list[Pair]:
    """Pairs of one fused projection on one side and several projections on the other."""
    pairs = []
    ways: tuple[tuple[Way, Sequence[Layer], Sequence[Layer]], ...]
    ways = ("split", sources, targets), ("concat", targets, sources)
    taken: set[Layer] = set()
    for way, ones, others in ways:
        found = _projections(others)
        for one, kind in ((one, kind) for one in ones for kind in _FUSED if kind in one.concepts):
            fits = [
                (likeness(one, whole), parts, *ways_to_fit)
                for whole, parts in found[kind]
                if whole.shapes.keys() == one.shapes.keys() and (ways_to_fit := _fit_fused(one, parts)) is not None
            ]
            if not fits:
                continue
            (score, parts, dim, flip), *rest = sorted(fits, key=lambda fit: -fit[0])
            mine, its = ((one,), parts) if way == "split" else (parts, (one,))
            pair = Pair(mine, its, tuple(one.shapes), way, flip, dim)
            if near := [listed(part.label for part in fit[1]) for fit in rest if fit[0] > score - MARGIN]:
                pair = pair.doubted("several projections fit equally well", *near[:4])
            if kind == "qkv" and (reason := _may_be_in_turns(one, parts)):
                pair = pair.doubted(reason, _regrouped(pair, one, parts))
            if taken.isdisjoint(pair.layers):
                pairs.append(pair)
                taken.update(pair.layers)
    return pairs


def _may_be_in_turns(one: Layer, parts: Sequence[Layer]) -> str:
    """Why q, k and v may be interleaved within the fused layer; empty if that is improbable."""
    for index in one.shapes:
        if len({sum(map(math.prod, part.shapes[index].values())) for part in parts}) > 1:
            return (
                "q, k and v have different sizes (grouped queries), and some models store them group by group, "
                "q, q, .., k, v, which shapes do not show"
            )
    name = next((name for name in ("query_key_value", "wqkv") if name in one.template), "")
    return name and f"{name} often holds q, k and v head by head, which shapes do not show"


def _regrouped(pair: Pair, one: Layer, parts: Sequence[Layer]) -> str:
    """What to do for interleaved parts: steps if the parts have one size, which is all that reshape can do."""
    index = next(iter(one.shapes))
    whole = one.shapes[index].get("weight", ())
    sizes = {part.shapes[index].get("weight", ()) for part in parts}
    if len(whole) != 2 or len(sizes) > 1 or pair.flip == "yes" or pair.dim != 0:
        return "interleaved: reorder the rows in Python, torch.save them under the model's names, and load that file"
    rows, columns = whole
    step, rows = ("concat", rows) if pair.way == "concat" else ("split", -1)
    steps = f"{{reshape: [h, -1, {columns}]}}, {{{step}: 1}}, {{reshape: [{rows}, {columns}]}}"
    return f"head by head, of h heads, for the weight: do: [{steps}]"


def _projections(layers: Sequence[Layer]) -> Mapping[str, list[tuple[Layer, tuple[Layer, ...]]]]:
    """Sibling layers that could form a fused one: that one and its parts."""
    parents: dict[str, dict[str, Layer]] = defaultdict(dict)
    for layer in layers:
        for part in layer.concepts & {"q", "k", "v", "gate", "in"}:
            parents[parent(layer.template)].setdefault(part, layer)
    found: dict[str, list[tuple[Layer, tuple[Layer, ...]]]] = defaultdict(list)
    for by_part in parents.values():
        for kind, names in _FUSED.items():
            parts = tuple(by_part[name] for name in names if name in by_part)
            if len(parts) < len(names) or any(part.shapes.keys() != parts[0].shapes.keys() for part in parts):
                continue
            meaning = attrs.evolve(parts[0].meaning, concepts=parts[0].concepts - {names[0]} | {kind})
            found[kind].append((attrs.evolve(parts[0], meaning=meaning), parts))
    return found


def _fit_fused(one: Layer, parts: Sequence[Layer]) -> tuple[int, Flip] | None:
    """The dimension of concatenation, and whether the parts are transposed; None if the shapes do not fit."""
    ways: list[tuple[int, Flip]] = [(0, "no"), (0, "yes"), (-1, "no"), (-1, "yes")]
    for index, shapes in one.shapes.items():
        for leaf, whole in shapes.items():
            those = [part.shapes[index].get(leaf, ()) for part in parts]
            if len(whole) not in (1, 2) or any(len(shape) != len(whole) for shape in those):
                return None
            ways = [way for way in ways if _joined(those, *way) == whole]
    for dim in (0, -1):
        flips = [flip for found, flip in ways if found == dim]
        if len(flips) > 1:
            # the layout of Linear is [3 d, d], that of Conv1D [d, 3 d]; the parts are squares in both
            return dim, "no" if dim == 0 else "square"
        if flips:
            return dim, flips[0]
    return None


def _joined(shapes: Sequence[Shape], dim: int, flip: Flip) -> Shape | None:
    """The shape of the fused layer; with ``flip``, its parts are transposed and it is not."""
    try:
        return shapes_after([Transpose(), Concat(dim)] if flip == "yes" else [Concat(dim)], shapes, 1)[1][0]
    except StepError:
        return None


def stacked(sources: Sequence[Layer], targets: Sequence[Layer]) -> list[Pair]:
    """Pairs of one tensor for all blocks on one side, and one tensor for each block on the other."""
    pairs: list[Pair] = []
    ways: tuple[tuple[Way, Sequence[Layer], Sequence[Layer]], ...]
    ways = ("unstack", sources, targets), ("stack", targets, sources)
    for way, ones, others in ways:
        blocks = [other for other in others if other.template.count("<") == 1]
        for one in ones:
            fits = [(likeness(one, other), other) for other in blocks if _is_stack(one, other)]
            fits.sort(key=lambda fit: -fit[0])
            if not fits or fits[0][0] < ALIKE:
                continue
            (score, other), *rest = fits
            mine, its = ((one,), (other,)) if way == "unstack" else ((other,), (one,))
            pair = Pair(mine, its, tuple(sorted(other.shapes, key=lambda index: int(index[0]))), way)
            near = [fit[1].label for fit in rest if fit[0] > score - MARGIN]
            pairs.append(pair.doubted("several layers fit equally well", listed(near, 4)) if near else pair)
    return pairs


def _is_stack(one: Layer, other: Layer) -> bool:
    whole, count = one.shapes.get(()), len(other.shapes)
    return (
        whole is not None
        and one.leaves.keys() == other.leaves.keys()
        and {int(index[0]) for index in other.shapes} == set(range(count))
        and all(
            whole.get(leaf) == (count, *shape) for shapes in other.shapes.values() for leaf, shape in shapes.items()
        )
        and not has_conflict(one, other)
    )


def resampled(source: Layer, target: Layer) -> Pair:
    """A pair of position embeddings for other numbers of tokens; without a grid if none fits."""
    have, want = source.shapes[()]["weight"], target.shapes[()]["weight"]
    pair = Pair((source,), (target,), ((),), "interpolate")
    shown = f"{source.label} is {list(have)}, {target.label} {list(want)}"
    if len(have) < 2 or len(have) != len(want) or (*have[:-2], have[-1]) != (*want[:-2], want[-1]):
        return pair.doubted(f"{shown}: they differ in more than the tokens", f"keep_model: {target.name('weight')}")
    grids = square_grids(have, want)
    others = (f"keep_model: {target.name('weight')}", "do: [interpolate: ...] with the right grids")
    if not grids:
        return pair.doubted(f"{shown}: no square grids with 0, 1 or 2 other tokens fit", *others)
    pair = attrs.evolve(pair, grid=grids[0])
    if len(grids) > 1:
        fits = ", ".join(str(grid.prefix_tokens) for grid in grids)
        pair = pair.doubted(f"{shown}: grids with {fits} other tokens fit", *others)
    if len(have) == 2:
        pair = pair.doubted(f"{shown}: it may be a table for text, which has no grid", *others)
    if likeness(source, target) < ALIKE:
        pair = pair.doubted("the names have little in common", *others)
    return pair
