"""Layers that are more than renamed: fused projections, stacked blocks, other grids of position embeddings. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import attrs

from noether_init_core.suggest.layer_names import Layer, has_conflict, likeness
from noether_init_core.suggest.pairs import ALIKE, ALIKE_ONCE, MARGIN, Flip, Pair, listed_paths
from noether_init_core.surgery.problems import square_grids
from noether_init_core.surgery.steps import Shape

__all__ = ["fused", "resampled", "stacked"]

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
