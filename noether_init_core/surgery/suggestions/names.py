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

from noether_init_core.surgery.plan import TensorSpec
from noether_init_core.surgery.steps import Shape

__all__ = ["Index", "Layer", "Numbers", "concepts", "has_conflict", "layers_of", "likeness", "numbers_out"]

#: The numbers that stand where a template has captures.
Index = tuple[str, ...]
#: Which numbers in names count layers: all, those that are segments of their own, none.
Numbers = Literal["all", "segments", "none"]

_CAPTURES = "ijklmn"
_NUMBERED = re.compile(r"(.*?)(\d+)")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_FUSED_LEAF = re.compile(r"(.+_)(weight|bias)")
# as written -> what it is; tensors under other names are layers of their own
_LEAVES = {
    **{leaf: leaf for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
    "gamma": "weight",
    "beta": "bias",
    "scale": "weight",
}

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
    "mlp in": "fc fc1 cfc linear1 lin1 w1 up upproj wi intermediate densehto4h",
    "mlp gate": "gateproj gate wgate",
    "mlp gateup": "gateupproj gateup",
    "norm": "ln norm layernorm rmsnorm lnorm bn batchnorm normalization",
    "conv": "convolution",
    "vision": "visual",
    "norm #1": "inputlayernorm layernormbefore attentionnorm attnnorm selfattnlayernorm salayernorm normattn lnattn",
    "norm #2": "postattentionlayernorm layernormafter ffnnorm mlpnorm outputlayernorm normmlp lnmlp lnffn",
    "norm final": "lnf normf finalnorm finallayernorm lnfinal",
    "embed token": "wte embed embedtokens tokembeddings wordembeddings tokenembedding tokenembeddings embedding emb "
    "tokemb embedtoken",
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
_CONCEPTS = {name: tuple(concept.split()) for concept, names in _NAMES.items() for name in names.split()}
# at the top of a model, alone, these are what classifies
_HEADS = frozenset({"fc", "output", "cls"})
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


@attrs.frozen(eq=False)
class Layer:
    """The tensors of one module, or of the same module in every block.

    Attributes:
        template: What the names of its tensors begin with: ``h.<i>.ln_1.``; the whole name of a parameter on its own.
        leaves: What a tensor is (``weight``) -> how it is written (``gamma``; empty for a parameter on its own).
        shapes: Numbers -> what a tensor is -> shape.
        concepts: What the name says, see ``concepts``.
        numbers: Numbers in the name that do not count blocks, as they are written.
        place: Where in the state dict it first appears.
    """

    template: str
    leaves: Mapping[str, str]
    shapes: Mapping[Index, Mapping[str, Shape]]
    concepts: frozenset[str]
    numbers: tuple[int, ...]
    place: int

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
            numbered = _NUMBERED.fullmatch(segments[name][position])
            if numbered and len(indices[name]) < len(_CAPTURES) and (numbers == "all" or not numbered[1]):
                children = containers.setdefault((prefixes[name], numbered[1]), {})
                children.setdefault(numbered[2], []).append(name)
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


def layers_of(specs: Mapping[str, TensorSpec], templates: Mapping[str, tuple[str, Index]]) -> list[Layer]:
    """The layers of a state dict, in order of appearance; ``templates`` are those of ``numbers_out``."""
    found: dict[str, tuple[int, dict[str, str], dict[Index, dict[str, Shape]]]] = {}
    for place, (name, spec) in enumerate(specs.items()):
        template, index = templates[name]
        module, leaf = _split(template)
        kind = _LEAVES.get(leaf, "weight") if "float" in spec.dtype else f"{spec.dtype} {leaf}"
        _, leaves, shapes = found.setdefault(module, (place, {}, {}))
        if leaves.setdefault(kind, leaf) != leaf:  # gamma beside weight
            leaves[kind := leaf] = leaf
        shapes.setdefault(index, {})[kind] = tuple(spec.shape)
    ranks = _ranks(found)
    gated = {module.rstrip("._")[:-2] for module in found if module.rstrip("._").endswith(".w3")}
    return [
        Layer(module, leaves, shapes, concepts(module, ranks, gated), _plain_numbers(module), place)
        for module, (place, leaves, shapes) in found.items()
    ]


def _split(name: str) -> tuple[str, str]:
    module, dot, leaf = name.rpartition(".")
    if leaf in _LEAVES:
        return module + dot, leaf
    fused = _FUSED_LEAF.fullmatch(leaf)
    return (module + dot + fused[1], fused[2]) if fused else (name, "")


def _words(segment: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(re.sub("<.>", "", segment))]


def _stem(module: str) -> tuple[str, str]:
    parent, _, last = module.rstrip("._").rpartition(".")
    return parent, re.sub(r"\d+$", "", last)


def _ranks(modules: Iterable[str]) -> dict[str, int]:
    """Module -> where its number comes among its siblings, from 1: some count from 0."""
    siblings: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for module in modules:
        number = re.search(r"[^.\d](\d+)[._]?$", module)
        if number:
            siblings.setdefault(_stem(module), []).append((int(number[1]), module))
    return {
        module: rank if len(group) > 1 else number
        for group in siblings.values()
        for rank, (number, module) in enumerate(sorted(group), 1)
    }


def _plain_numbers(module: str) -> tuple[int, ...]:
    last = module.rstrip("._").rpartition(".")[2]
    return () if _simple(last) in _CONCEPTS else tuple(int(word) for word in _words(last) if word.isdigit())


def _simple(segment: str) -> str:
    return segment.replace("_", "").lower()


def concepts(module: str, ranks: Mapping[str, int], gated: Iterable[str] = ()) -> frozenset[str]:
    """What a name says, in words that libraries share; numbers as ``#1``.

    Args:
        module: Template of a layer.
        ranks: Module -> the number that stands for its own.
        gated: Parents with a ``w3``: there ``w1`` is the gate.
    """
    path = module.rstrip("._")
    segments = [segment for segment in path.split(".") if segment and not re.fullmatch("<.>", segment)]
    said: list[str] = []
    for number, segment in enumerate(segments):
        simple = _simple(segment)
        is_last = number == len(segments) - 1
        if simple in _CONCEPTS:
            said += _CONCEPTS[simple]
            continue
        for word in _words(segment):
            if word.isdigit():
                said.append(f"#{ranks.get(module, word) if is_last else word}")
            else:
                said += _CONCEPTS.get(word, (word,))
    last = _simple(segments[-1]) if segments else ""
    if len(segments) == 1 and last in _HEADS:
        said = ["head"]
    if path[:-2] in gated and last in ("w1", "w3"):
        said = [*(word for word in said if word not in ("in", "w", "#3")), "mlp", "gate" if last == "w1" else "in"]
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
    for group in (*_EXCLUSIVE, frozenset(word for word in one.concepts | other.concepts if word.startswith("#"))):
        mine, its = one.concepts & group, other.concepts & group
        if mine and its and not mine & its:
            return True
    return False
