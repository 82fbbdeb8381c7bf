"""What words in names of modules mean, whichever library wrote them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "CONCEPTS",
    "EXCLUSIVE",
    "HALVES",
    "PLACES",
    "WEIGHTS",
    "concepts",
    "last_segment",
    "parent",
    "place_of",
    "simple",
    "words_of",
]

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
# words that say little: another library's name for the same place
_GENERIC = (
    "model module net network backbone base transformer bert gpt vit roberta llama layers layer blocks block h "
    "stages stage dense self final trunk body"
)
WEIGHTS = {
    **dict.fromkeys(_GENERIC.split(), 0.1),
    **dict.fromkeys(("encoder", "decoder", "embed"), 0.5),
}
# of each set, a layer is at most one
EXCLUSIVE = tuple(
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
