"""What names say: the layers behind keys, and how alike two of their names are. Pure.

A layer is a module (or a parameter of its own) with its tensors; the same module in every block of a model is one
layer, whose template has ``<i>`` where the number of the block stands.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import attrs

from noether_init_core.suggest.vocabulary import (
    CONCEPTS,
    EXCLUSIVE,
    HALVES,
    PLACES,
    WEIGHTS,
    concepts,
    last_segment,
    parent,
    place_of,
    simple,
    words_of,
)
from noether_init_core.surgery.fit import TensorSpec
from noether_init_core.surgery.steps import Shape

__all__ = [
    "Index",
    "Layer",
    "Meaning",
    "Numbers",
    "has_conflict",
    "layers_of",
    "likeness",
    "meanings_of",
    "numbers_out",
]

#: The numbers that stand where a template has captures.
Index = tuple[str, ...]
#: Which numbers in names count layers: all, those that are segments of their own, none.
Numbers = Literal["all", "segments", "none"]

_CAPTURES = "ijklmn"
_DIGITS = "0123456789"
_FUSED_LEAF = re.compile(r"(.+_)(weight|bias)")
# as written -> what it is; tensors under other names are layers of their own
_LEAVES = {
    **{leaf: leaf for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
    "gamma": "weight",
    "beta": "bias",
    "scale": "weight",
}


@attrs.frozen
class Meaning:
    """What the name of a module says, together with those beside it.

    Attributes:
        concepts: In words that libraries share, see ``concepts``.
        numbers: Numbers in the name that do not count blocks.
        is_gated: Whether the gate of an MLP is beside it, or it is one.
        role: Which norm of its block it is, for a norm: a place of ``PLACES``, or a number; empty where none tells.
        norms: The roles of all norms of the block, for a norm.
    """

    concepts: frozenset[str]
    numbers: tuple[int, ...] = ()
    is_gated: bool = False
    role: str = ""
    norms: tuple[str, ...] = ()


@attrs.frozen(eq=False)
class Layer:
    """The tensors of one module, or of the same module in every block.

    Attributes:
        template: What the names of its tensors begin with: ``h.<i>.ln_1.``; the whole name of a parameter on its own.
        leaves: What a tensor is (``weight``) -> how it is written (``gamma``; empty for a parameter on its own).
        shapes: Numbers -> what a tensor is -> shape.
        meaning: What the name says.
        place: Where in the state dict it first appears.
    """

    template: str
    leaves: Mapping[str, str]
    shapes: Mapping[Index, Mapping[str, Shape]]
    meaning: Meaning
    place: int

    @property
    def concepts(self) -> frozenset[str]:
        """What the name says, in words that libraries share."""
        return self.meaning.concepts

    @property
    def path(self) -> str:
        """The template without what joins it to its leaves."""
        return self.template.rstrip("._")

    def name(self, leaf: str, index: Index | None = None) -> str:
        """The name of a tensor; without ``index`` with captures."""
        name = self.template + self.leaves[leaf]
        return name if index is None else filled(name, index)

    def names(self, indices: Iterable[Index] | None = None) -> list[str]:
        """Names of all tensors, or of those of some blocks."""
        chosen = self.shapes if indices is None else indices
        return [self.name(leaf, index) for index in chosen for leaf in self.shapes.get(index, ())]


def filled(template: str, index: Index) -> str:
    """The name with the numbers of ``index``."""
    for capture, number in zip(_CAPTURES, index, strict=False):
        template = template.replace(f"<{capture}>", number)
    return template


def numbers_out(specs: Mapping[str, TensorSpec], numbers: Numbers) -> dict[str, tuple[str, Index]]:
    """Name -> its template, and the numbers of it; a number is taken out where what is below it repeats."""
    segments = {name: name.split(".") for name in specs}
    prefixes = dict.fromkeys(specs, "")
    indices: dict[str, Index] = dict.fromkeys(specs, ())
    going, position = list(specs) if numbers != "none" else [], 0
    while going:
        containers: dict[tuple[str, str], dict[str, list[str]]] = {}
        for name in going:
            segment = segments[name][position]
            stem = segment.rstrip(_DIGITS)
            if stem != segment and len(indices[name]) < len(_CAPTURES) and (numbers == "all" or not stem):
                children = containers.setdefault((prefixes[name], stem), {})
                children.setdefault(segment[len(stem) :], []).append(name)
        for (_, stem), children in containers.items():
            if _repeats(stem, children, segments, specs, position):
                for number, names in children.items():
                    for name in names:
                        segments[name][position] = f"{stem}<{_CAPTURES[len(indices[name])]}>"
                        indices[name] += (number,)
        for name in going:
            prefixes[name] += segments[name][position] + "."
        position += 1
        going = [name for name in going if len(segments[name]) > position]
    return {name: (".".join(parts), indices[name]) for name, parts in segments.items()}


def _repeats(
    stem: str,
    children: Mapping[str, list[str]],
    segments: Mapping[str, list[str]],
    specs: Mapping[str, TensorSpec],
    position: int,
) -> bool:
    """Whether the children of a container are alike. ``norm1`` and ``norm2`` are not, nor are those of a small MLP."""
    below = {
        number: {(".".join(segments[name][position + 1 :]), tuple(specs[name].shape)) for name in names}
        for number, names in children.items()
    }
    is_nested = any("." in rest for found in below.values() for rest, _ in found)
    if len(children) == 1 or (stem and not is_nested):
        return is_nested
    counts = Counter(rest for found in below.values() for rest in {rest for rest, _ in found})
    if sum(count > 1 for count in counts.values()) * 2 < len(counts):
        return False
    first, *others = below.values()
    return is_nested or all(other == first for other in others)


def meanings_of(templates: Mapping[str, tuple[str, Index]]) -> dict[str, Meaning]:
    """Module -> what its name says, beside all others of a state dict; ``templates`` are those of ``numbers_out``."""
    modules = list(
        dict.fromkeys(_split(template)[0] for template in dict.fromkeys(one for one, _ in templates.values()))
    )
    ranks, gates = _ranks(modules), _gates(modules)
    said = {module: concepts(module, ranks, gates) for module in modules}
    gated = {parent(module) for module, words in said.items() if "gate" in words}
    norms = _norms(said)
    return {
        module: Meaning(
            *((words, ()) if _halves(module, gates) else (words, _plain_numbers(module))),
            parent(module) in gated,
        )
        if module not in norms
        else attrs.evolve(norms[module], numbers=_plain_numbers(module))
        for module, words in said.items()
    }


def layers_of(
    specs: Mapping[str, TensorSpec],
    templates: Mapping[str, tuple[str, Index]],
    meanings: Mapping[str, Meaning] | None = None,
) -> list[Layer]:
    """The layers of a state dict, in order of appearance; ``templates`` are those of ``numbers_out``.

    ``specs`` may be a part of what ``templates`` has; ``meanings`` are those of all ``templates``.
    """
    if meanings is None:
        meanings = meanings_of(templates)
    written = {template for template, _ in templates.values()}
    found: dict[str, tuple[int, dict[str, str], dict[Index, dict[str, Shape]]]] = {}
    for place, (name, spec) in enumerate(specs.items()):
        template, index = templates[name]
        module, leaf = _split(template)
        kind = _LEAVES.get(leaf, "weight") if "float" in spec.dtype else f"{spec.dtype} {leaf}"
        if leaf and kind != leaf and module + kind in written:  # gamma beside weight
            kind = leaf
        _, leaves, shapes = found.setdefault(module, (place, {}, {}))
        if leaves.setdefault(kind, leaf) != leaf:  # gamma beside scale
            leaves[kind := leaf] = leaf
        shapes.setdefault(index, {})[kind] = tuple(spec.shape)
    return [Layer(module, leaves, shapes, meanings[module], place) for module, (place, leaves, shapes) in found.items()]


def _split(name: str) -> tuple[str, str]:
    module, dot, leaf = name.rpartition(".")
    if leaf in _LEAVES:
        return module + dot, leaf
    fused = _FUSED_LEAF.fullmatch(leaf)
    return (module + dot + fused[1], fused[2]) if fused else (name, "")


def _ranks(modules: Iterable[str]) -> dict[str, int]:
    """Module -> where its number comes among its siblings, from 1: some count from 0."""
    siblings: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for module in modules:
        last = last_segment(module)
        stem = last.rstrip(_DIGITS)
        if stem and stem != last:
            siblings.setdefault((parent(module), stem), []).append((int(last[len(stem) :]), module))
    return {
        module: rank if len(group) > 1 else number
        for group in siblings.values()
        for rank, (number, module) in enumerate(sorted(group), 1)
    }


def _gates(modules: Iterable[str]) -> dict[str, dict[str, str]]:
    """Parent of a gated MLP -> which of its children is what: with w3 (Llama) or v1 (DBRX), w1 is the gate."""
    children: dict[str, set[str]] = {}
    for module in modules:
        children.setdefault(parent(module), set()).add(last_segment(module))
    return {
        parent: {"w1": "gate", up: "in"}
        for parent, names in children.items()
        for up in ("v1", "w3")
        if {"w1", up} <= names and not (up == "v1" and "w3" in names)
    }


def _halves(module: str, gates: Mapping[str, Mapping[str, str]]) -> bool:
    return last_segment(module) in gates.get(parent(module), ()) or simple(last_segment(module)) in HALVES


def _plain_numbers(module: str) -> tuple[int, ...]:
    found: list[int] = []
    for segment in module.rstrip("._").split("."):
        if simple(segment) in CONCEPTS:  # the number of dense_h_to_4h is none
            number = segment[len(segment.rstrip(_DIGITS)) :]
            found += [int(number)] if number else []
        else:
            found += [int(word) for word in words_of(segment) if word.isdigit()]
    return tuple(found)


def _norms(said: Mapping[str, frozenset[str]]) -> dict[str, Meaning]:
    """The norms of blocks, with their places, seen beside the other norms of the same block."""
    blocks: dict[str, dict[str, str]] = {}
    for module, words in said.items():
        if "norm" in words and not words & {"q", "k", "v", "kv", "qkv"}:
            path = module.rstrip("._")
            block, tail = parent(module), last_segment(module)
            if ">" in path:
                before, _, behind = path.rpartition(">")
                stem, _, tail = behind.partition(".")
                block = f"{before}>{stem}"
            if tail:
                blocks.setdefault(block, {})[module] = tail
    found: dict[str, Meaning] = {}
    for block, tails in blocks.items():
        roles = _roles(tails)
        if not roles:
            if ">" in block:
                found.update((module, Meaning(said[module], norms=("",) * len(tails))) for module in tails)
            continue
        if ">" not in block and len(tails) < 3:  # the norms of a whole model
            continue
        words = concepts(block, {}) - {"head"}
        norms = tuple(dict.fromkeys(roles.values()))
        for number, (module, role) in enumerate(roles.items(), 1):
            found[module] = Meaning(words | {"norm", f"#{number}"}, role=role, norms=norms)
    return found


def _roles(tails: Mapping[str, str]) -> dict[str, str]:
    """Module -> its place in the block, in the order of these; empty where the names do not tell all places."""
    places = {module: place_of(tail) for module, tail in tails.items()}
    if all(place.startswith("#") for place in places.values()):
        if len(set(places.values())) < len(places):
            return {}
        ordered = sorted(places, key=lambda module: int(places[module][1:]))
        return {module: f"#{number}" for number, module in enumerate(ordered, 1)}
    found = set(places.values())
    if found == {"first", "attn post"} and len(places) == 2:
        # of two norms, the one behind the attention is the one before the MLP
        places = {module: "mlp" if place == "attn post" else place for module, place in places.items()}
    elif "attn post" in found and "mlp" not in found and found & {"first", "attn"}:
        return {}  # it may be the one before the MLP here, too
    places = {module: "attn" if place == "first" else place for module, place in places.items()}
    if len(set(places.values())) < len(places) or not set(places.values()) <= set(PLACES):
        return {}
    return dict(sorted(places.items(), key=lambda item: PLACES.index(item[1])))


def likeness(one: Layer, other: Layer) -> float:
    """How alike two names are, from 0 to about 1: the share of what they say that both say."""
    both = sum(WEIGHTS.get(word, 1.0) for word in one.concepts & other.concepts)
    total = sum(WEIGHTS.get(word, 1.0) for names in (one.concepts, other.concepts) for word in names)
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
        for group in (*EXCLUSIVE, numbers)
    )
