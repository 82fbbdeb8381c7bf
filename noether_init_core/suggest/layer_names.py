"""Interprets the names of a state dict: the concepts of words, and the layers behind keys. Pure.

A layer is a module (or a single parameter) with its tensors. The same module in every block of a model is one layer;
its template has ``<i>`` in place of the number of the block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import attrs

from noether_init_core.surgery.fit import TensorSpec
from noether_init_core.surgery.steps import Shape

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

# concept -> its names in libraries, in lower case and without underscores
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
# the two halves of a gated layer: their numbers are no order
HALVES = frozenset({"wi0", "wi1"})
# the norms of a block, in the order in which it uses them
PLACES = ("attn", "attn post", "cross", "cross post", "mlp", "mlp post")
_NORM_WORDS = frozenset({"ln", "norm", "layer", "layernorm", "rms", "rmsnorm", "bn", "batchnorm", "batch"})
# these name a classifier only at the top level of a model
_HEADS = frozenset({"fc", "output", "cls"})


def words_of(segment: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(re.sub("<.>", "", segment))]


def parent(module: str) -> str:
    return module.rstrip("._").rpartition(".")[0]


def last_segment(module: str) -> str:
    return module.rstrip("._").rpartition(".")[2]


def simple(segment: str) -> str:
    return segment.replace("_", "").lower()


def place_of(tail: str) -> str:
    """Where in its block a norm is used, as far as its name ``tail`` shows it.

    Returns one of ``PLACES``, ``first`` for names such as ``pre_norm``, or ``#2`` for a name with only that number.
    Empty if the name shows no place, or both attention and MLP.
    """
    words = words_of(tail)
    found = {concept for word in words for concept in CONCEPTS.get(word, (word,))} | set(words)
    if "feedforward" in "".join(words):
        found.add("mlp")
    behind = " post" if found & {"post", "after"} else ""
    is_attn = bool(found & {"attn", "sa"})
    if is_attn and "mlp" in found:
        return ""
    if found & {"cross", "encoder"}:
        return f"cross{behind}"
    if is_attn or "mlp" in found:
        return f"{'attn' if is_attn else 'mlp'}{behind}"
    if found & {"final", "output"}:
        return "mlp"
    if found & {"pre", "before", "input"}:
        return "first"
    if behind:
        return "attn post"
    others = [word for word in words if word not in _NORM_WORDS]
    return f"#{others[0]}" if len(others) == 1 and others[0].isdigit() and "." not in tail else ""


def concepts(module: str, rank: int | None = None, gate: str = "") -> frozenset[str]:
    """The concepts in a name, in words shared by libraries; a number becomes ``#1``.

    Args:
        module: Template of a layer.
        rank: The number to use for the one in its last segment.
        gate: Its half of a gated MLP, if its siblings show that it is one.
    """
    path = module.rstrip("._")
    segments = [segment for segment in path.split(".") if segment and not re.fullmatch("<.>", segment)]
    found: set[str] = set()
    for place, segment in enumerate(segments, 1):
        is_last = place == len(segments)
        if is_last and gate:
            found |= {"mlp", gate}
        elif simple(segment) in CONCEPTS:
            found.update(CONCEPTS[simple(segment)])
        else:
            for word in words_of(segment):
                number = word if rank is None or not is_last else rank
                found.update((f"#{number}",) if word.isdigit() else CONCEPTS.get(word, (word,)))
    last = simple(segments[-1]) if segments else ""
    if len(segments) == 1 and last in _HEADS:
        return frozenset({"head"})
    if "norm" in found and "<" in path and "final" in found:
        found = found - {"final"} | {"#2"}
    if "#1" not in found and "#2" not in found and {"norm"} < found and not found & {"q", "k"}:
        # in a block of two norms, the one of attention is the first, and that of the MLP the second
        if "attn" in found:
            found = found - {"attn", "out"} | {"#1"}
        elif "mlp" in found or ("out" in found and "<" in path):
            found = found - {"mlp", "out"} | {"#2"}
    if "out" in found and "<" in path and not found & {"attn", "mlp", "patch"} and "output" in path.split("."):
        found.add("mlp")
    return frozenset(found)


#: The numbers in place of the captures of a template.
Index = tuple[str, ...]
_CAPTURES = "ijklmn"
_DIGITS = "0123456789"
# h.<i> and attn.norm; without a block number, the parent and the last segment
_IN_BLOCK = re.compile(r"(?:(.*>[^.]*|.*)\.)?([^>]+)")
_FUSED_LEAF = re.compile(r"(.+_)(weight|bias)")
# name as written -> its role; a tensor with another name is a layer of its own
_LEAVES = {
    **{leaf: leaf for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
    "gamma": "weight",
    "beta": "bias",
    "scale": "weight",
}


@attrs.frozen
class Meaning:
    """The meaning of the name of a module, judged together with its siblings.

    Attributes:
        concepts: Its concepts, see ``concepts``.
        numbers: Numbers in the name that do not count blocks.
        is_gated: Whether it is the gate of an MLP, or has one as a sibling.
        role: For a norm, its place in the block: one of ``PLACES``, or a number; empty if unknown.
        norms: For a norm, the roles of all norms of the block.
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
        template: The prefix of its tensors: ``h.<i>.ln_1.``; for a single parameter, its whole name.
        leaves: Role of a tensor (``weight``) -> its name (``gamma``; empty for a single parameter).
        shapes: Numbers -> role of a tensor -> shape.
        meaning: The meaning of the name.
        place: Position in the state dict of its first tensor.
    """

    template: str
    leaves: dict[str, str]
    shapes: dict[Index, dict[str, Shape]]
    meaning: Meaning
    place: int

    @property
    def concepts(self) -> frozenset[str]:
        """The concepts in the name, in words shared by libraries."""
        return self.meaning.concepts

    @property
    def path(self) -> str:
        """The template without the dot before its leaves."""
        return self.template.rstrip("._")

    @property
    def label(self) -> str:
        """The path for messages; a placeholder for a layer that is the whole model."""
        return self.path or "(root)"

    def name(self, leaf: str, index: Index = ()) -> str:
        """The name of a tensor in a block; without ``index``, with captures."""
        name = self.template + self.leaves[leaf]
        for capture, number in zip(_CAPTURES, index, strict=False):
            name = name.replace(f"<{capture}>", number)
        return name

    def names(self) -> list[str]:
        """Names of all tensors."""
        return [self.name(leaf, index) for index, shapes in self.shapes.items() for leaf in shapes]


def numbers_out(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[str, Index]]:
    """Name -> its template and numbers; a number is replaced where the names below it repeat."""
    segments = {name: name.split(".") for name in specs}
    prefixes = dict.fromkeys(specs, "")
    indices: dict[str, Index] = dict.fromkeys(specs, ())
    for position in range(max(map(len, segments.values()), default=0)):
        going = [name for name in specs if len(segments[name]) > position]
        containers: dict[tuple[str, str], dict[str, list[str]]] = {}
        for name in going:
            segment = segments[name][position]
            stem = segment.rstrip(_DIGITS)
            if stem != segment and len(indices[name]) < len(_CAPTURES):
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
    return {name: (".".join(parts), indices[name]) for name, parts in segments.items()}


def _repeats(
    stem: str,
    children: Mapping[str, list[str]],
    segments: Mapping[str, list[str]],
    specs: Mapping[str, TensorSpec],
    position: int,
) -> bool:
    """Whether the children of a container are equal. Those of ``norm1`` and ``norm2``, or of a small MLP, are not."""
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


@attrs.frozen
class Names:
    """The names of a state dict, each interpreted together with all others.

    Attributes:
        templates: Name -> its template, and the numbers that were replaced.
        meanings: Module -> the meaning of its name.
    """

    templates: Mapping[str, tuple[str, Index]]
    meanings: Mapping[str, Meaning]

    @classmethod
    def of(cls, specs: Mapping[str, TensorSpec], *, are_counted: bool = True) -> Names:
        """Interpret all names of a state dict; with ``are_counted``, replace the numbers of blocks."""
        templates = numbers_out(specs) if are_counted else {name: (name, ()) for name in specs}
        modules = list(dict.fromkeys(_split(template)[0] for template, _ in templates.values()))
        ranks, gates = _ranks(modules), _gates(modules)
        meanings = {module: concepts(module, ranks.get(module), gates.get(module, "")) for module in modules}
        gated = {parent(module) for module, words in meanings.items() if "gate" in words}
        norms = _norms(meanings)
        return cls(
            templates,
            {
                module: attrs.evolve(
                    norms.get(module) or Meaning(words),
                    numbers=() if module in gates or simple(last_segment(module)) in HALVES else _numbers_in(module),
                    is_gated=parent(module) in gated,
                )
                for module, words in meanings.items()
            },
        )

    def layers(self, specs: Mapping[str, TensorSpec]) -> list[Layer]:
        """The layers of the state dict or a part of it, in order of appearance."""
        written = {template for template, _ in self.templates.values()}
        found: dict[str, Layer] = {}
        for place, (name, spec) in enumerate(specs.items()):
            template, index = self.templates[name]
            module, leaf = _split(template)
            kind = _LEAVES.get(leaf, "weight") if "float" in spec.dtype else f"{spec.dtype} {leaf}"
            if leaf and kind != leaf and module + kind in written:  # gamma beside weight
                kind = leaf
            layer = found.setdefault(module, Layer(module, {}, {}, self.meanings[module], place))
            if layer.leaves.setdefault(kind, leaf) != leaf:  # gamma beside scale
                layer.leaves[kind := leaf] = leaf
            layer.shapes.setdefault(index, {})[kind] = tuple(spec.shape)
        return list(found.values())


def _split(name: str) -> tuple[str, str]:
    module, dot, leaf = name.rpartition(".")
    if leaf in _LEAVES:
        return module + dot, leaf
    fused = _FUSED_LEAF.fullmatch(leaf)
    return (module + dot + fused[1], fused[2]) if fused else (name, "")


def _ranks(modules: Iterable[str]) -> dict[str, int]:
    """Module -> the rank of its number among its siblings, from 1, because some libraries count from 0."""
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


def _gates(modules: Iterable[str]) -> dict[str, str]:
    """Module of a gated MLP -> its half: if w3 (Llama) or v1 (DBRX) is a sibling, w1 is the gate."""
    children: dict[str, dict[str, str]] = {}
    for module in modules:
        children.setdefault(parent(module), {})[last_segment(module)] = module
    found: dict[str, str] = {}
    for names in children.values():
        up = names.get("w3", names.get("v1"))
        if up and "w1" in names:
            found |= {names["w1"]: "gate", up: "in"}
    return found


def _numbers_in(module: str) -> tuple[int, ...]:
    """The numbers in a name; the 4 of dense_h_to_4h does not count."""
    found: list[str] = []
    for segment in module.rstrip("._").split("."):
        words = [segment[len(segment.rstrip(_DIGITS)) :]] if simple(segment) in CONCEPTS else words_of(segment)
        found += [word for word in words if word.isdigit()]
    return tuple(map(int, found))


def _norms(meanings: Mapping[str, frozenset[str]]) -> dict[str, Meaning]:
    """The norms of blocks with their places, judged together with the other norms of the same block."""
    blocks: dict[str, dict[str, str]] = {}
    for module, words in meanings.items():
        if "norm" in words and not words & {"q", "k", "v", "kv", "qkv"}:
            place = _IN_BLOCK.fullmatch(module.rstrip("._"))
            if place is not None:
                blocks.setdefault(place[1] or "", {})[module] = place[2]
    found: dict[str, Meaning] = {}
    for block, tails in blocks.items():
        roles = _roles(tails)
        if not roles:
            if ">" in block:
                found.update((module, Meaning(meanings[module], norms=("",) * len(tails))) for module in tails)
            continue
        if ">" not in block and len(tails) < 3:  # the norms of a whole model
            continue
        words = concepts(block) - {"head"}
        norms = tuple(dict.fromkeys(roles.values()))
        for number, (module, role) in enumerate(roles.items(), 1):
            found[module] = Meaning(words | {"norm", f"#{number}"}, role=role, norms=norms)
    return found


def _roles(tails: Mapping[str, str]) -> dict[str, str]:
    """Module -> its place in the block, in order; empty if the names do not show all places."""
    places = {module: place_of(tail) for module, tail in tails.items()}
    found = set(places.values())
    if all(place.startswith("#") for place in found):
        ordered = sorted(places, key=lambda module: int(places[module][1:]))
        return {module: f"#{number}" for number, module in enumerate(ordered, 1)} if len(found) == len(places) else {}
    if found == {"first", "attn post"} and len(places) == 2:
        # in a block of two norms, the one after attention comes before the MLP
        places = {module: "mlp" if place == "attn post" else place for module, place in places.items()}
    elif "attn post" in found and "mlp" not in found and found & {"first", "attn"}:
        return {}  # with other counts it may come before the MLP, too
    places = {module: "attn" if place == "first" else place for module, place in places.items()}
    if len(set(places.values())) < len(places) or not set(places.values()) <= set(PLACES):
        return {}
    return dict(sorted(places.items(), key=lambda item: PLACES.index(item[1])))
