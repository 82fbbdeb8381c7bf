"""Pairs of layers: what becomes what, how, and why that may be wrong. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import attrs

from noether_init_core.messages import listed
from noether_init_core.suggest.layer_names import Index, Layer
from noether_init_core.surgery.fit import square_grids
from noether_init_core.surgery.steps import Interpolate, Shape

# names that are this much alike are about the same layer: where its shape is found once on either side, and where not
ALIKE_ONCE, ALIKE = 0.55, 0.6
# by how much a name has to be nearer than the next one
MARGIN = 0.1
# layers of one shape are compared each with each; this many comparisons take about a second
MOST_COMPARISONS = 60_000

# words that say little: another library's name for the same place
_GENERIC = (
    "model module net network backbone base transformer bert gpt vit roberta llama layers layer blocks block h "
    "stages stage dense self final trunk body"
)
_WEIGHTS = {
    **dict.fromkeys(_GENERIC.split(), 0.1),
    **dict.fromkeys(("encoder", "decoder", "embed"), 0.5),
}
# of each set, a layer is at most one
_EXCLUSIVE = tuple(
    map(
        frozenset,
        (
            {"q", "k", "v", "qkv", "kv", "out", "in", "gate", "gateup", "norm"},
            {"attn", "mlp"},
            {"token", "position", "type", "patch", "cls", "head"},
            {"encoder", "decoder"},
        ),
    )
)

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


def likeness(one: Layer, other: Layer) -> float:
    """How alike two names are, from 0 to about 1: the share of what they say that both say."""
    both = sum(_WEIGHTS.get(word, 1.0) for word in one.concepts & other.concepts)
    total = sum(_WEIGHTS.get(word, 1.0) for names in (one.concepts, other.concepts) for word in names)
    score = 2 * both / total if total else 0.0
    if one.path == other.path or one.path.endswith(f".{other.path}") or other.path.endswith(f".{one.path}"):
        score = max(score, 0.5) + 0.1
    return score


def has_conflict(one: Layer, other: Layer) -> bool:
    """Whether the names say different things of what a layer can be only one of."""
    numbers = frozenset(word for word in one.concepts | other.concepts if word.startswith("#"))
    mine, its = one.meaning, other.meaning
    are_named = mine.role and its.role and mine.role[0] != "#" != its.role[0]
    if are_named and (set(mine.norms) == set(its.norms) or len(mine.norms) != len(its.norms)):
        # places say more than numbers do, unless the blocks have as many norms at other places
        if mine.role != its.role:
            return True
        numbers = frozenset()
    return any(
        (left := one.concepts & group) and (right := other.concepts & group) and not left & right
        for group in (*_EXCLUSIVE, numbers)
    )


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


# what is fused -> its parts, in the order in which libraries put them together
_FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gateup": ("gate", "in")}


def fused(sources: Sequence[Layer], targets: Sequence[Layer]) -> list[Pair]:
    """One projection on one side, several on the other."""
    pairs = []
    for way, ones, others in (("split", sources, targets), ("concat", targets, sources)):
        found = _projections(others)
        for one in ones:
            for kind in _FUSED:
                if kind not in one.concepts:
                    continue
                fits = [
                    (likeness(one, whole), parts, *fit)
                    for whole, parts in found.get(kind, ())
                    if whole.shapes.keys() == one.shapes.keys() and (fit := _fit_fused(one, parts)) is not None
                ]
                fits.sort(key=lambda fit: -fit[0])
                if not fits:
                    continue
                score, parts, dim, flip = fits[0]
                mine, its = ((one,), parts) if way == "split" else (parts, (one,))
                pair = Pair(mine, its, tuple(one.shapes), "split" if way == "split" else "concat", flip, dim)
                near = [fit for fit in fits[1:] if fit[0] > score - MARGIN]
                if near:
                    pair = pair.doubted(
                        "several projections fit equally well", *(listed_paths(fit[1]) for fit in near[:4])
                    )
                reason = _by_head(one, kind, parts)
                pairs.append(pair.doubted(reason, _regrouped(pair, one, parts)) if reason else pair)
    taken: set[int] = set()
    kept = []
    for pair in pairs:
        layers = {id(layer) for layer in pair.layers}
        if not layers & taken:
            kept.append(pair)
            taken |= layers
    return kept


def _by_head(one: Layer, kind: str, parts: Sequence[Layer]) -> str:
    """Why the parts may stand in turns within the fused layer; empty where they hardly do."""
    if kind != "qkv":
        return ""
    for index in one.shapes:
        sizes = [sum(math.prod(shape) for shape in part.shapes[index].values()) for part in parts]
        if len(set(sizes)) > 1:
            return (
                "q, k and v have different sizes (grouped queries), and some models store them group by group, "
                "q, q, .., k, v, which shapes cannot tell"
            )
    for name in ("query_key_value", "wqkv"):
        if name in one.template:
            return f"{name} often holds q, k and v head by head, which shapes cannot tell"
    return ""


def _regrouped(pair: Pair, one: Layer, parts: Sequence[Layer]) -> str:
    """What to do for parts in turns: steps where the parts are of one size, which is what reshape can do."""
    index = next(iter(one.shapes))
    whole = one.shapes[index].get("weight", ())
    sizes = {part.shapes[index].get("weight", ()) for part in parts}
    if len(whole) != 2 or len(sizes) > 1 or pair.flip == "yes" or pair.dim != 0:
        return "in turns: order the rows in Python, torch.save them under the model's names, and load that file"
    if pair.way == "concat":
        steps = f"{{reshape: [h, -1, {whole[1]}]}}, {{concat: 1}}, {{reshape: [{whole[0]}, {whole[1]}]}}"
    else:
        steps = f"{{reshape: [h, -1, {whole[1]}]}}, {{split: 1}}, {{reshape: [-1, {whole[1]}]}}"
    return f"head by head, of h heads, for the weight: do: [{steps}]"


def _projections(layers: Sequence[Layer]) -> dict[str, list[tuple[Layer, tuple[Layer, ...]]]]:
    """Layers that stand beside each other and would make a fused one, as that one and its parts."""
    parents: dict[str, dict[str, Layer]] = defaultdict(dict)
    for layer in layers:
        for part in ("q", "k", "v", "gate", "in"):
            if part in layer.concepts:
                parents[layer.path.rpartition(".")[0]].setdefault(part, layer)
    found: dict[str, list[tuple[Layer, tuple[Layer, ...]]]] = {}
    for by_part in parents.values():
        for kind, names in _FUSED.items():
            parts = tuple(by_part[name] for name in names if name in by_part)
            if len(parts) < len(names) or any(part.shapes.keys() != parts[0].shapes.keys() for part in parts):
                continue
            whole = attrs.evolve(
                parts[0], meaning=attrs.evolve(parts[0].meaning, concepts=parts[0].concepts - {names[0]} | {kind})
            )
            found.setdefault(kind, []).append((whole, parts))
    return found


def _fit_fused(one: Layer, parts: Sequence[Layer]) -> tuple[int, Flip] | None:
    """Along which dimension they are put together, and whether they are transposed on the way."""
    ways: set[tuple[int, Flip]] = {(0, "no"), (0, "yes"), (-1, "no"), (-1, "yes")}
    for index, shapes in one.shapes.items():
        for leaf, whole in shapes.items():
            if any(leaf not in part.shapes[index] for part in parts):
                return None
            those = [part.shapes[index][leaf] for part in parts]
            if len(whole) == 1 and all(len(shape) == 1 for shape in those):
                if sum(shape[0] for shape in those) != whole[0]:
                    return None
            elif len(whole) == 2 and all(len(shape) == 2 for shape in those):
                ways = {way for way in ways if _joined(those, *way) == whole}
            else:
                return None
    for dim in (0, -1):
        flips = {flip for found, flip in ways if found == dim}
        if len(flips) == 1:
            return dim, flips.pop()
        if flips:
            # [3 d, d] is how Linear has it, and the parts are squares; [d, 3 d] is how Conv1D has it
            return dim, "no" if dim == 0 else "square"
    return None


def _joined(shapes: Sequence[Shape], dim: int, flip: Flip) -> Shape | None:
    """The shape of the fused layer: flipped, its parts are transposed where it is not."""
    turned = [shape[::-1] if flip == "yes" else shape for shape in shapes]
    rests = {shape[1 + dim] if dim == -1 else shape[1] for shape in turned}
    if len(rests) != 1:
        return None
    total, rest = sum(shape[dim] for shape in turned), rests.pop()
    return (total, rest) if dim == 0 else (rest, total)


def stacked(sources: Sequence[Layer], targets: Sequence[Layer]) -> list[Pair]:
    """All blocks in one tensor on one side, one tensor each on the other."""
    pairs: list[Pair] = []
    for way, ones, others in (("unstack", sources, targets), ("stack", targets, sources)):
        by_shape: dict[Hashable, list[Layer]] = {}
        for other in others:
            if other.template.count("<") == 1:
                leaf, shape = next(iter(next(iter(other.shapes.values())).items()))
                by_shape.setdefault((leaf, (len(other.shapes), *shape)), []).append(other)
        for one in ones:
            near_ones = [other for key in one.shapes.get((), {}).items() for other in by_shape.get(key, ())]
            fits = sorted(
                ((likeness(one, other), other) for other in near_ones if _is_stack(one, other)),
                key=lambda fit: -fit[0],
            )
            if not fits or fits[0][0] < ALIKE_ONCE:
                continue
            other = fits[0][1]
            pair = Pair(
                *(((one,), (other,)) if way == "unstack" else ((other,), (one,))),
                indices=tuple(sorted(other.shapes, key=lambda index: int(index[0]))),
                way="unstack" if way == "unstack" else "stack",
            )
            near = [fit[1] for fit in fits[1:] if fit[0] > fits[0][0] - MARGIN]
            pairs.append(pair.doubted("several layers fit equally well", listed_paths(near)) if near else pair)
    return pairs


def _is_stack(one: Layer, other: Layer) -> bool:
    count = len(other.shapes)
    return (
        all(len(index) == 1 for index in other.shapes)
        and {int(index[0]) for index in other.shapes} == set(range(count))
        and one.leaves.keys() == other.leaves.keys()
        and not has_conflict(one, other)
        and all(
            one.shapes[()].get(leaf) == (count, *shape)
            for shapes in other.shapes.values()
            for leaf, shape in shapes.items()
        )
    )


def resampled(source: Layer, target: Layer) -> Pair:
    """A position embedding for another number of tokens; without a grid where none fits."""
    have, want = source.shapes[()]["weight"], target.shapes[()]["weight"]
    pair = Pair((source,), (target,), ((),), "interpolate")
    shown = f"{source.path} is {list(have)}, {target.path} {list(want)}"
    if len(have) < 2 or len(have) != len(want) or (*have[:-2], have[-1]) != (*want[:-2], want[-1]):
        return pair.doubted(f"{shown}: they differ in more than the tokens", f"keep_model: {target.name('weight')}")
    grids = square_grids(have, want)
    others = (f"keep_model: {target.name('weight')}", "do: [interpolate: ...] with the grids that are meant")
    if not grids:
        return pair.doubted(f"{shown}: no square grids with 0, 1 or 2 other tokens fit", *others)
    pair = attrs.evolve(pair, grid=grids[0])
    if len(grids) > 1:
        fits = ", ".join(str(grid.prefix_tokens) for grid in grids)
        pair = pair.doubted(f"{shown}: grids with {fits} other tokens fit", *others)
    if len(have) == 2:
        pair = pair.doubted(f"{shown}: a table may be of text, where no grid is", *others)
    if likeness(source, target) < ALIKE:
        pair = pair.doubted("the names have little in common", *others)
    return pair
