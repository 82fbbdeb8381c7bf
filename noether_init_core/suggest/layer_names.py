"""What names say, whichever library wrote them: the meaning of words, and the layers behind keys. Pure.

A layer is a module (or a parameter of its own) with its tensors; the same module in every block of a model is one
layer, whose template has ``<i>`` where the number of the block stands.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import attrs

from noether_init_core.surgery.fit import TensorSpec
from noether_init_core.surgery.steps import Shape

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

# concepts: what they are called, without underscores and in small letters
_NAMES = {
    "attn": "attn attention selfattn selfattention mha multiheadattention msa",
    "cross attn": "crossattn crossattention encoderattn encdecattention multiheadattn",
    "mlp": "mlp ffn ff feedforward densereludense ffw",
    "qkv": "cattn qkv qkvproj wqkv inproj querykeyvalue toqkv",
    "kv": "kv kvproj wkv tokv",
    "q": "q query qproj wq toq qlin queryproj",
    "k": "k key kproj wk tok klin keyproj",
    "v": "v value vproj wv tov vlin valueproj",
    "out": "proj projection outproj oproj o wo output out cproj toout outlin",
    "mlp out": "fc2 linear2 lin2 w2 downproj down dense4htoh",
    "mlp in": "fc fc1 cfc linear1 lin1 w1 up upproj wi wi1 intermediate densehto4h",
    "mlp gate": "gateproj gate wgate wi0",
    "mlp gateup": "gateupproj gateup",
    "norm": "ln norm layernorm rmsnorm lnorm bn batchnorm normalization",
    "conv": "convolution",
    "vision": "visual",
    "norm #1": "inputlayernorm layernormbefore attentionnorm attnnorm selfattnlayernorm salayernorm normattn lnattn",
    "norm #2": "postattentionlayernorm layernormafter ffnnorm mlpnorm outputlayernorm normmlp lnmlp lnffn",
    "norm final": "lnf normf finalnorm finallayernorm lnfinal",
    "embed token": "wte embed embedtokens tokembeddings wordembeddings tokenembedding tokenembeddings embedding emb "
    "tokemb embedtoken tok",
    "embed": "embeddings",
    "embed position": "wpe posembed positions positionembeddings positionembedding posembedding posembeddings posemb "
    "positionalembedding embedpositions pos",
    "embed type": "tokentypeembeddings segmentembeddings typeembeddings segments",
    "embed patch": "patchembed patchembeddings patchembedding",
    "cls": "clstoken classtoken classembedding",
    "head": "head classifier lmhead classhead logits score",
    "encoder": "enc",
    "decoder": "dec",
}
CONCEPTS = {name: tuple(concept.split()) for concept, names in _NAMES.items() for name in names.split()}
# the two halves of a gated layer: their numbers say nothing of an order
HALVES = frozenset({"wi0", "wi1"})
# the norms of a block, in the order in which it uses them
PLACES = ("attn", "attn post", "cross", "cross post", "mlp", "mlp post")
_NORM_WORDS = frozenset({"ln", "norm", "layer", "layernorm", "rms", "rmsnorm", "bn", "batchnorm", "batch"})
# at the top of a model, alone, these are what classifies
_HEADS = frozenset({"fc", "output", "cls"})


def words_of(segment: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(re.sub("<.>", "", segment))]


def parent(module: str) -> str:
    return module.rstrip("._").rpartition(".")[0]


def last_segment(module: str) -> str:
    return module.rstrip("._").rpartition(".")[2]


def place_of(tail: str) -> str:
    """Which norm of a block a name below it means, as far as it says so."""
    words = [word for segment in tail.split(".") for word in words_of(segment)]
    said = {concept for word in words for concept in CONCEPTS.get(word, (word,))} | set(words)
    if "feedforward" in "".join(words):
        said.add("mlp")
    behind = " post" if said & {"post", "after"} else ""
    is_attn = bool(said & {"attn", "sa"})
    if is_attn and "mlp" in said:
        return ""
    if said & {"cross", "encoder", "enc"}:
        return f"cross{behind}"
    if is_attn or "mlp" in said:
        return f"{'attn' if is_attn else 'mlp'}{behind}"
    if said & {"final", "output"}:
        return "mlp"
    if said & {"pre", "before", "input"}:
        return "first"
    if behind:
        return "attn post"
    others = [word for word in words if word not in _NORM_WORDS]
    return f"#{others[0]}" if len(others) == 1 and others[0].isdigit() and len(tail.split(".")) == 1 else ""


def simple(segment: str) -> str:
    return segment.replace("_", "").lower()


def concepts(
    module: str, ranks: Mapping[str, int], gates: Mapping[str, Mapping[str, str]] | None = None
) -> frozenset[str]:
    """What a name says, in words that libraries share; numbers as ``#1``.

    Args:
        module: Template of a layer.
        ranks: Module -> the number that stands for its own.
        gates: Parents of gated MLPs -> which of their children is what.
    """
    path = module.rstrip("._")
    gate = (gates or {}).get(parent(module), {}).get(last_segment(module))
    segments = [segment for segment in path.split(".") if segment and not re.fullmatch("<.>", segment)]
    said: list[str] = []
    for number, segment in enumerate(segments):
        joined = simple(segment)
        is_last = number == len(segments) - 1
        if is_last and gate:
            said += ["mlp", gate]
            continue
        if joined in CONCEPTS:
            said += CONCEPTS[joined]
            continue
        for word in words_of(segment):
            if word.isdigit():
                said.append(f"#{ranks.get(module, word) if is_last else word}")
            else:
                said += CONCEPTS.get(word, (word,))
    last = simple(segments[-1]) if segments else ""
    if len(segments) == 1 and last in _HEADS:
        said = ["head"]
    if last == "embeddings" and "token" not in said:
        said.append("token")
    found = set(said)
    if "norm" in found and "<" in path and "final" in found:
        found = found - {"final"} | {"#2"}
    if "#1" not in found and "#2" not in found and {"norm"} < found and not found & {"q", "k"}:
        # the norm that belongs to attention is the first of a block, that of the MLP the second
        if "attn" in found:
            found = found - {"attn", "out"} | {"#1"}
        elif "mlp" in found or ("out" in found and "<" in path):
            found = found - {"mlp", "out"} | {"#2"}
    if "out" in found and "<" in path and not found & {"attn", "mlp", "patch"} and "output" in path.split("."):
        found.add("mlp")
    return frozenset(found)


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
