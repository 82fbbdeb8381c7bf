"""Suggested rules: right where they are said to be sure, proven by the plan, and unsure where nothing tells."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from support.counting import LineCounter

from noether_init_core.config.source import TransformConfig, rule_of
from noether_init_core.suggest.rules import Suggestion
from noether_init_core.suggest.suggest import suggest
from noether_init_core.surgery.fit import PlanPart, TargetSpec
from noether_init_core.surgery.name_rules import Transforms
from noether_init_core.surgery.plan import LoadPlan
from noether_init_core.surgery.planner import Policies, plan_load
from noether_init_core.surgery.steps import Transpose

Specs = dict[str, TargetSpec]
BLOCKS = 2


def specs(shapes: Mapping[str, Sequence[int]]) -> Specs:
    return {name: TargetSpec(tuple(shape), "float32", 4 * math.prod(shape)) for name, shape in shapes.items()}


def blocks(prefix: str, shapes: Mapping[str, Sequence[int]], count: int = BLOCKS) -> Specs:
    """The same entries in every block; ``<i>`` of ``prefix`` is its number."""
    return specs(
        {f"{prefix.replace('<i>', str(i))}{name}": shape for i in range(count) for name, shape in shapes.items()}
    )


def affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def of_module(module: torch.nn.Module) -> Specs:
    return specs({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})


def renamed(entries: Specs, *pairs: tuple[str, str]) -> Specs:
    """The entries under names in which each pattern is replaced, one after the other."""
    found = {}
    for name, spec in entries.items():
        for pattern, text in pairs:
            name = re.sub(pattern, text, name)
        found[name] = spec
    return found


def planned(sources: Specs, targets: Specs, fields: Mapping[str, Any]) -> LoadPlan:
    """The plan of what a config says, read as an initializer reads it."""
    rules = [
        rule_of(TransformConfig.model_validate(rule), f"transforms.{number}")
        for number, rule in enumerate(fields.get("transforms", []))
    ]
    transforms = Transforms(rules, source_root=fields.get("source_root", ""), target_root=fields.get("target_root", ""))
    return plan_load("file", [PlanPart("net", "", (), sources, targets)], transforms)


def moves(plan: LoadPlan) -> dict[str, tuple[Any, ...]]:
    """Target -> sources, part and steps; a transposed vector is that vector."""
    return {
        row.key: (
            row.sources,
            row.part if row.parts > 1 else 0,
            tuple(step for step in row.steps if step != Transpose() or any(len(s) > 1 for s in row.source_shapes)),
        )
        for row in plan.rows
        if row.writes
    }


def pasted(sources: Specs, targets: Specs) -> tuple[Suggestion, LoadPlan]:
    """The suggestion, and the plan of its YAML; both agree, whatever they are."""
    found = suggest(sources, targets, model="net")
    plan = planned(sources, targets, yaml.safe_load(found.to_yaml()) or {})
    assert moves(plan) == moves(found.plan)
    assert plan.is_fine == found.plan.is_fine
    assert yaml.safe_load(found.to_yaml()) == (found.config() or None)
    return found, plan


def sure_targets(found: Suggestion) -> set[str]:
    unsure = {name for one in found.unsure for name in one.targets}
    return {row.key for row in found.plan.rows if row.writes} - unsure


WIDTH = 16
GPT2 = {
    **specs({"wte.weight": (40, WIDTH), "wpe.weight": (12, WIDTH)}),
    **blocks(
        "h.<i>.",
        {
            **affine("ln_1", WIDTH),
            "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
            "attn.c_attn.bias": (3 * WIDTH,),
            **affine("attn.c_proj", WIDTH, WIDTH),
            **affine("ln_2", WIDTH),
            "mlp.c_fc.weight": (WIDTH, 64),
            "mlp.c_fc.bias": (64,),
            "mlp.c_proj.weight": (64, WIDTH),
            "mlp.c_proj.bias": (WIDTH,),
        },
    ),
    **specs(affine("ln_f", WIDTH)),
}
PLAIN_GPT = {
    **specs({"embed.weight": (40, WIDTH), "positions.weight": (12, WIDTH)}),
    **blocks(
        "blocks.<i>.",
        {
            **affine("norm1", WIDTH),
            **affine("norm2", WIDTH),
            **{
                name: shape
                for part in ("q", "k", "v", "proj")
                for name, shape in affine(f"attn.{part}", WIDTH, WIDTH).items()
            },
            **affine("mlp.fc", 64, WIDTH),
            **affine("mlp.proj", WIDTH, 64),
        },
    ),
    **specs(affine("norm", WIDTH)),
}
GPT2_RULES = [
    {"from": "wte.", "to": "embed."},
    {"from": "wpe.", "to": "positions."},
    {"from": "h.<i>.ln_<n>.", "to": "blocks.<i>.norm<n>."},
    {
        "from": "h.<i>.attn.c_attn.<leaf>",
        "to": ["blocks.<i>.attn.q.<leaf>", "blocks.<i>.attn.k.<leaf>", "blocks.<i>.attn.v.<leaf>"],
        "do": ["transpose", {"split": 0}],
    },
    {"from": "h.<i>.<part>.c_<n>.<leaf>", "to": "blocks.<i>.<part>.<n>.<leaf>", "do": ["transpose"]},
    {"from": "ln_f.", "to": "norm."},
]
FUSED = blocks("<i>.", {**affine("qkv", 24, 8), **affine("out", 8, 8)})
SEPARATE = blocks("<i>.", {**affine("q", 8, 8), **affine("k", 8, 8), **affine("v", 8, 8), **affine("out", 8, 8)})
SPLIT = {"from": "<x>.qkv.<leaf>", "to": ["<x>.q.<leaf>", "<x>.k.<leaf>", "<x>.v.<leaf>"], "do": [{"split": 0}]}
FUSE = {"from": ["<x>.q.<leaf>", "<x>.k.<leaf>", "<x>.v.<leaf>"], "to": "<x>.qkv.<leaf>", "do": [{"concat": 0}]}


@pytest.mark.parametrize(
    ("sources", "targets", "rules"),
    [
        pytest.param(GPT2, PLAIN_GPT, GPT2_RULES, id="GPT-2 into a plain model"),
        pytest.param(FUSED, SEPARATE, [SPLIT], id="split"),
        pytest.param(SEPARATE, FUSED, [FUSE], id="fuse"),
        pytest.param(
            specs({"cls_token": (1, 1, 12), "pos_embed": (1, 197, 12)}),
            specs({"cls_token": (1, 1, 12), "pos_embed": (1, 257, 12)}),
            [
                {
                    "from": "pos_embed",
                    "do": [{"interpolate": {"grid": [14, 14], "to_grid": [16, 16], "prefix_tokens": 1}}],
                }
            ],
            id="another grid",
        ),
        pytest.param(
            specs({**affine("body", 8, 6), **affine("norm", 8), **affine("head", 10, 8)}),
            specs({**affine("body", 8, 6), **affine("norm", 8), **affine("head", 4, 8)}),
            [{"keep_model": "head."}],
            id="another head",
        ),
        pytest.param(
            {f"module._orig_mod.{name}": spec for name, spec in GPT2.items()}, PLAIN_GPT, GPT2_RULES, id="wrapped"
        ),
    ],
)
def test_what_is_suggested_is_what_was_written_by_hand(
    sources: Specs, targets: Specs, rules: list[dict[str, Any]]
) -> None:
    """For the real surgeries, pasting the suggestion moves the same entries in the same way, and nothing is unsure."""
    found, plan = pasted(sources, targets)
    by_hand = planned(sources, targets, {"transforms": rules})
    assert plan.is_fine, plan.problems
    assert moves(plan) == moves(by_hand)
    assert plan.coverage() == by_hand.coverage() == found.plan.coverage()
    assert found.unsure == ()
    assert found.unmatched_sources == found.unmatched_targets == ()


def test_gpt2_is_one_rule_for_all_blocks() -> None:
    """No block has a rule of its own; the square matrix's rule says which sibling decided that it is transposed."""
    found = suggest(GPT2, PLAIN_GPT)
    assert [one.to_yaml() for one in found.rules] == [
        "{from: h.<i>.attn.c_attn.<leaf>, to: [blocks.<i>.attn.q.<leaf>, blocks.<i>.attn.k.<leaf>, "
        "blocks.<i>.attn.v.<leaf>], do: [transpose, {split: 0}]}",
        "{from: wte., to: embed.}",
        "{from: wpe., to: positions.}",
        "{from: h.<i>.ln_<n>., to: blocks.<i>.norm<n>.}",
        "{from: h.<i>.attn.c_proj., to: blocks.<i>.attn.proj., do: [transpose]}",
        "{from: h.<i>.mlp.c_fc., to: blocks.<i>.mlp.fc., do: [transpose]}",
        "{from: h.<i>.mlp.c_proj., to: blocks.<i>.mlp.proj., do: [transpose]}",
        "{from: ln_f., to: norm.}",
    ]
    reasons = {one.config["from"]: one.reason for one in found.rules}
    assert reasons["h.<i>.attn.c_proj."] == (
        "transposed like h.<i>.mlp.c_proj: the shape of h.<i>.attn.c_proj [16, 16] does not decide"
    )


def test_square_matrices_under_their_own_names_are_transposed_with_their_siblings() -> None:
    """Conv1D and Linear under equal names: what is not square decides for what is."""
    linear = renamed(GPT2)
    for name, spec in GPT2.items():
        if ".c_" in name and len(spec.shape) == 2:
            linear[name] = attrs.evolve(spec, shape=spec.shape[::-1])
    found, plan = pasted(GPT2, linear)
    assert plan.coverage() == 1.0
    transposed = {row.key for row in plan.rows if row.steps == (Transpose(),) and len(row.shape) == 2}
    assert transposed == {name for name, spec in GPT2.items() if ".c_" in name and len(spec.shape) == 2}
    assert found.is_sure


def test_square_matrices_alone_are_unsure() -> None:
    """Where every matrix is square, shapes cannot tell whether they are transposed, and the suggestion says so."""
    found, _ = pasted(specs({"attn.c_proj.weight": (8, 8)}), specs({"attention.out_proj.weight": (8, 8)}))
    assert found.plan.is_fine
    assert [one.reason for one in found.unsure] == ["shapes do not decide whether attn.c_proj [8, 8] is transposed"]
    assert found.unsure[0].alternatives == ("the same rule with transpose",)


@pytest.mark.parametrize(
    ("before", "after", "config"),
    [
        ("model.", "", {"source_root": "model"}),
        ("", "backbone.", {"transforms": [{"from": "<rest..>", "to": "backbone.<rest..>"}]}),
    ],
)
def test_one_moved_prefix_is_one_line(before: str, after: str, config: dict[str, Any]) -> None:
    """Everything below another prefix needs the root, or one rule for the rest of all names."""
    sources, targets = ({f"{prefix}{name}": spec for name, spec in GPT2.items()} for prefix in (before, after))
    found, plan = pasted(sources, targets)
    assert found.config() == config
    assert plan.coverage() == 1.0
    assert found.is_sure


def test_a_prefix_and_a_fresh_head() -> None:
    """What is outside the prefix keeps a rule of its own, so that the prefix becomes a rule, too."""
    found, plan = pasted(
        GPT2, {**{f"backbone.{name}": spec for name, spec in GPT2.items()}, **specs(affine("head", 3, 16))}
    )
    assert found.config() == {
        "transforms": [{"from": "<rest..>", "to": "backbone.<rest..>"}, {"keep_model": "head."}],
    }
    assert plan.is_fine
    assert {row.key for row in plan.rows if row.action == "keep"} == {"head.weight", "head.bias"}


def test_a_head_of_another_name_is_dropped_and_the_models_is_kept() -> None:
    """The file's classifier is not loaded into a head of another size."""
    found, plan = pasted(
        specs({**affine("classifier", 10, 8), "body.weight": (8, 4)}),
        specs({**affine("head", 4, 8), "body.weight": (8, 4)}),
    )
    assert found.config() == {"transforms": [{"drop": "classifier."}, {"keep_model": "head."}]}
    assert plan.is_fine
    assert found.rules[1].reason == "a fresh head: the file has [10, 8]"


def test_exchanged_submodules_are_found_by_their_names() -> None:
    """encoder_a and encoder_b become branch_a and branch_b, in whatever order they stand."""
    found, plan = pasted(
        specs({**affine("encoder_a.fc", 5, 4), **affine("encoder_b.fc", 5, 4)}),
        specs({**affine("branch_b.fc", 5, 4), **affine("branch_a.fc", 5, 4)}),
    )
    assert moves(plan) == {
        f"branch_{side}.fc.{leaf}": ((f"encoder_{side}.fc.{leaf}",), 0, ())
        for side in "ab"
        for leaf in ("weight", "bias")
    }
    assert found.is_sure


def test_layers_that_only_order_tells_are_unsure() -> None:
    """first and second may be alpha and beta, or the other way round: it is suggested, and said, with what else."""
    found, _ = pasted(
        specs(affine("first", 6, 5) | affine("second", 6, 5)), specs(affine("alpha", 6, 5) | affine("beta", 6, 5))
    )
    assert found.config()["transforms"] == [{"from": "first.", "to": "alpha."}, {"from": "second.", "to": "beta."}]
    assert sure_targets(found) == set()
    assert found.unsure[0].what == "first -> alpha"
    assert found.unsure[0].reason == "paired by order: names do not decide"
    assert found.unsure[0].alternatives == ("first -> beta", "second -> alpha")
    assert found.to_yaml().startswith("transforms:\n  # unsure: paired by order")


def test_equal_names_stay_as_they_are() -> None:
    """Names and shapes cannot tell that a model uses two submodules the other way round: no rule, nothing unsure."""
    pair = specs({**affine("first", 6, 6), **affine("second", 6, 6)})
    found, plan = pasted(pair, pair)
    assert found.to_yaml() == ""
    assert plan.counts() == {"load": 4}


def test_numbers_that_begin_elsewhere_are_unsure() -> None:
    """ln_0 and ln_1 become norm1 and norm2 by order, never ln_1 norm1 for sure."""
    found, plan = pasted(
        specs({"a.ln_0.weight": (4,), "a.ln_1.weight": (4,)}), specs({"a.norm1.weight": (4,), "a.norm2.weight": (4,)})
    )
    assert {key: sources for key, (sources, *_) in moves(plan).items()} == {
        "a.norm1.weight": ("a.ln_0.weight",),
        "a.norm2.weight": ("a.ln_1.weight",),
    }
    assert sure_targets(found) == set()


def test_siblings_whose_numbers_moved_are_unsure() -> None:
    """fc1, fc2 for fc2, fc3: whether one or both moved, no name tells, neither of fc1 nor of fc2."""
    found, _ = pasted(
        specs(dict.fromkeys(("fc1.weight", "fc2.weight"), (4, 4, 1, 1))),
        specs(dict.fromkeys(("fc2.weight", "fc3.weight"), (4, 4, 1, 1))),
    )
    assert sure_targets(found) == set()
    assert [(one.what, one.alternatives) for one in found.unsure] == [
        ("fc2 -> fc2", ("fc1 -> fc2", "fc2 -> fc3")),
        ("fc1 -> fc3", ()),
    ]


def test_numbers_of_parents_that_differ_are_unsure() -> None:
    """A layer of the first block for one of the third is paired by order only."""
    found, _ = pasted(specs({"fc1.linear.weight": (4, 5)}), specs({"fc3.linear.weight": (4, 5)}))
    assert sure_targets(found) == set()


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("names", [("w1", "v1", "w2"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo")])
def test_the_halves_of_gated_layers_find_each_other(names: tuple[str, ...], back: bool) -> None:
    """DBRX, Llama and T5 name the gate first: w1 is gate_proj, and v1, w3 or wi_1 is up_proj."""
    sources = blocks("h.<i>.ffn.", {f"{name}.weight": (16, 8) for name in names[:2]} | {f"{names[2]}.weight": (8, 16)})
    parts = {"gate_proj.weight": (16, 8), "up_proj.weight": (16, 8), "down_proj.weight": (8, 16)}
    targets = blocks("model.layers.<i>.mlp.", parts)
    truth = dict(zip(targets, sources, strict=True))
    if back:
        sources, targets, truth = targets, sources, {source: target for target, source in truth.items()}
    found, plan = pasted(sources, targets)
    assert {key: sources for key, (sources, *_) in moves(plan).items()} == {key: (one,) for key, one in truth.items()}
    assert found.is_sure


def test_a_layer_beside_a_gate_and_one_without_are_unsure() -> None:
    """Which of gate_proj and up_proj a plain fc1 is, no name tells."""
    found, _ = pasted(
        blocks("h.<i>.mlp.", {"fc1.weight": (16, 8)}),
        blocks("h.<i>.mlp.", {"gate_proj.weight": (16, 8), "up_proj.weight": (16, 8)}),
    )
    assert sure_targets(found) == set()


GEMMA = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
BART = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")


def norms(prefix: str, names: Sequence[str]) -> Specs:
    return blocks(prefix, {f"{name}.weight": (8,) for name in names})


@pytest.mark.parametrize(
    ("mine", "its", "truth", "is_sure"),
    [
        pytest.param(
            GEMMA, ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"), (0, 1, 2, 3), True, id="four"
        ),
        pytest.param(GEMMA, ("attn_norm", "ffn_norm"), (0, 2), False, id="four for two"),
        pytest.param(GEMMA, ("norm1", "norm2", "norm3", "norm4"), (0, 1, 2, 3), False, id="four by number"),
        pytest.param(GEMMA[:2], ("attn_norm", "ffn_norm"), (0, 1), True, id="Llama"),
        pytest.param(GEMMA[1::2], ("attn_norm", "ffn_norm"), (0, 1), False, id="behind and before"),
        pytest.param(BART, ("norm1", "norm2", "norm3"), (0, 1, 2), False, id="BART's decoder"),
        pytest.param(BART[::2], ("norm1", "norm2"), (0, 1), True, id="BART's encoder"),
        pytest.param(BART, BART[::-1], (2, 1, 0), True, id="equal names"),
        pytest.param(("a_norm", "b_norm", "c_norm"), ("norm1", "norm2", "norm3"), None, False, id="unknown"),
    ],
)
def test_norms_find_their_place_in_the_block(
    mine: Sequence[str], its: Sequence[str], truth: Sequence[int] | None, is_sure: bool
) -> None:
    """A norm is what it is among the norms of its block: post_attention_layernorm is not always before the MLP."""
    found, plan = pasted(norms("model.layers.<i>.", mine), norms("blk.<i>.", its))
    if truth is not None:
        assert {key: sources for key, (sources, *_) in moves(plan).items()} == {
            f"blk.{i}.{name}.weight": (f"model.layers.{i}.{mine[number]}.weight",)
            for i in range(BLOCKS)
            for name, number in zip(its, truth, strict=True)
        }
    assert sure_targets(found) == ({row.key for row in plan.rows if row.writes} if is_sure else set())


@pytest.mark.parametrize("order", ["reversed", "by name", "bias first"])
def test_the_order_of_entries_changes_no_rule(order: str) -> None:
    """Files list a bias before its weight, or blocks as text sorts them: the rules are the same."""

    def ordered(entries: Specs) -> Specs:
        if order == "reversed":
            return dict(reversed(entries.items()))
        return dict(
            sorted(entries.items(), key=lambda item: item[0] if order == "by name" else not item[0].endswith("s"))
        )

    expected = sorted(one.to_yaml() for one in suggest(GPT2, PLAIN_GPT).rules)
    for sources, targets in (
        (ordered(GPT2), PLAIN_GPT),
        (GPT2, ordered(PLAIN_GPT)),
        (ordered(GPT2), ordered(PLAIN_GPT)),
    ):
        assert sorted(one.to_yaml() for one in suggest(sources, targets).rules) == expected


def test_rules_are_not_merged_where_one_would_take_more() -> None:
    """ln_<n> would also take ln_3, which goes elsewhere: then each number keeps its rule, or the plan is the same."""
    sources = blocks("h.<i>.", {**affine("ln_1", 8), **affine("ln_2", 9), **affine("ln_3", 10)})
    targets = blocks("b.<i>.", {**affine("norm1", 8), **affine("norm2", 9), **affine("other", 10)})
    found, plan = pasted(sources, targets)
    assert plan.coverage() == 1.0
    assert {key: one for key, ((one,), *_) in moves(plan).items()} == {
        name: name.replace("b.", "h.", 1).replace("norm", "ln_").replace("other", "ln_3") for name in targets
    }
    assert found.plan.is_fine


def test_two_copies_for_one_model_are_unsure() -> None:
    """Where two parts of the file fit equally well, one is taken, and the other is named."""
    found, _ = pasted(
        {**blocks("left.<i>.", affine("fc", 5, 4)), **blocks("right.<i>.", affine("fc", 5, 4))},
        blocks("tower.<i>.", affine("fc", 5, 4)),
    )
    assert sure_targets(found) == set()
    assert found.config()["source_root"] == "left"
    assert found.unsure[0].alternatives == ("source_root: right",)
    assert found.plan.is_fine


def test_uneven_projections_are_split_by_their_sizes() -> None:
    """Grouped queries: keys and values have fewer rows, the rule says how many, and that they may stand in groups."""
    found, plan = pasted(
        blocks("h.<i>.attn.", affine("qkv", 32, 16)),
        blocks("h.<i>.attn.", affine("q_proj", 16, 16) | affine("k_proj", 8, 16) | affine("v_proj", 8, 16)),
    )
    assert found.rules[0].config["do"] == [{"split": {"dim": 0, "sizes": [16, 8, 8]}}]
    assert plan.coverage() == 1.0
    assert sure_targets(found) == set()
    assert "grouped queries" in found.unsure[0].reason


@pytest.mark.parametrize("way", ["into conv", "between conv"])
def test_fused_projections_of_conv1d(way: str) -> None:
    """Parts of [in, out] are put together along the last dimension, parts of Linear are transposed afterwards."""
    conv = blocks("h.<i>.", {"attn.c_attn.weight": (8, 24), "attn.c_attn.bias": (24,), "mlp.c_fc.weight": (8, 32)})
    rows = (8, 32) if way == "between conv" else (32, 8)
    parts = {name: shape for part in "qkv" for name, shape in affine(f"attn.{part}", 8, 8).items()}
    found, plan = pasted(blocks("h.<i>.", {**parts, "mlp.fc1.weight": rows}), conv)
    assert plan.coverage() == 1.0
    expected = [{"concat": -1}] if way == "between conv" else [{"concat": 0}, "transpose"]
    assert found.rules[0].config["do"] == expected
    assert found.is_sure


def test_projections_that_may_be_interleaved_are_unsure() -> None:
    """GPT-NeoX stores query_key_value head by head, which no shape shows."""
    found, _ = pasted(
        blocks("h.<i>.attention.", affine("query_key_value", 24, 8)),
        blocks("h.<i>.attention.", affine("query", 8, 8) | affine("key", 8, 8) | affine("value", 8, 8)),
    )
    assert found.plan.is_fine
    assert sure_targets(found) == set()
    assert "head by head" in found.unsure[0].reason
    assert "reshape: [h, -1, 8]" in found.unsure[0].alternatives[0]


@pytest.mark.parametrize("back", [False, True])
def test_projections_in_groups_are_unsure(back: bool) -> None:
    """InternLM2 stores q, q, .., k, v for every key head, which the sizes do not show."""
    fused = specs({"wqkv.weight": (48, 32)})
    parts = specs({"wq.weight": (32, 32), "wk.weight": (8, 32), "wv.weight": (8, 32)})
    found, _ = pasted(parts, fused) if back else pasted(fused, parts)
    assert found.plan.is_fine
    assert sure_targets(found) == set()
    assert "q, q, .., k, v" in found.unsure[0].reason
    assert "load that file" in found.unsure[0].alternatives[0]


@pytest.mark.parametrize("back", [False, True])
def test_the_steps_named_for_heads_in_turns_do_that(back: bool) -> None:
    """With the number of heads filled in, the alternative for query_key_value moves head by head, bit for bit."""
    fused = specs({"query_key_value.weight": (24, 8)})
    parts = specs({f"{name}.weight": (8, 8) for name in ("query", "key", "value")})
    sources, targets = (parts, fused) if back else (fused, parts)
    found, _ = pasted(sources, targets)
    (alternative,) = found.unsure[0].alternatives
    steps = yaml.safe_load(alternative.partition("do: ")[2].replace("[h,", "[2,"))
    (rule,) = found.config()["transforms"]
    plan = planned(sources, targets, {"transforms": [{**rule, "do": steps}]})
    assert plan.is_fine, plan.problems
    whole = torch.arange(24 * 8, dtype=torch.float32).reshape(24, 8)
    heads = whole.reshape(2, 3, 4, 8)
    values = {f"{name}.weight": heads[:, at].reshape(8, 8) for at, name in enumerate(("query", "key", "value"))}
    one = {"query_key_value.weight": whole}
    made = plan.transformed(values if back else one)
    wanted = one if back else values
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("back", [False, True])
def test_stacked_blocks(back: bool) -> None:
    """One tensor for all blocks becomes one for each, and the other way round."""
    stacked = specs({"layers.mlp.weight": (3, 8, 4), "layers.mlp.bias": (3, 8)})
    separate = blocks("layers.<i>.", affine("mlp", 8, 4), 3)
    found, plan = pasted(separate, stacked) if back else pasted(stacked, separate)
    assert plan.coverage() == 1.0
    assert [one.config["do"] for one in found.rules] == [[{"stack" if back else "unstack": 0}]] * 2
    assert found.is_sure


@pytest.mark.parametrize(
    ("have", "want", "prefix", "is_sure"),
    [
        ((1, 16, 8), (1, 25, 8), 0, True),
        ((1, 17, 8), (1, 26, 8), 1, True),
        ((1, 18, 8), (1, 27, 8), 2, True),
        ((17, 8), (26, 8), 1, False),
        ((1, 17, 8), (1, 27, 8), None, False),
        ((1, 17, 8), (1, 26, 9), None, False),
    ],
)
def test_position_embeddings_of_another_grid(
    have: tuple[int, ...], want: tuple[int, ...], prefix: int | None, is_sure: bool
) -> None:
    """Square grids with 0, 1 or 2 other tokens are found; a table that may be of text, or no grid, is unsure."""
    found, plan = pasted(
        specs({"embeddings.position_embeddings": have, "w": (3,)}), specs({"pos_embed": want, "w": (3,)})
    )
    assert found.is_sure is is_sure
    if prefix is None:
        assert not plan.is_fine
        assert found.unmatched_targets == ("pos_embed",)
        assert "keep_model: pos_embed" in found.unsure[0].alternatives
    else:
        step = found.rules[0].config["do"][0]["interpolate"]
        assert (step["grid"], step["to_grid"], step.get("prefix_tokens", 0)) == ([4, 4], [5, 5], prefix)
        assert plan.coverage() == 1.0


@pytest.mark.parametrize("uneven", [False, True])
def test_a_block_may_lack_a_leaf_of_a_reshaped_layer(uneven: bool) -> None:
    """A 1x1 convolution for a linear layer, of which only some blocks have a bias: each entry finds its own."""
    sources = specs({"h.0.mix.weight": (4, 8), "h.0.mix.bias": (4,), "h.1.mix.weight": (4 + 2 * uneven, 8)})
    targets = specs({f"blocks.{name[2:]}": (*spec.shape, 1, 1)[: 4 if len(spec.shape) > 1 else 1]
                     for name, spec in sources.items()})  # fmt: skip
    found, plan = pasted(sources, targets)
    assert found.plan.is_fine
    assert {key: sources for key, (sources, *_) in moves(plan).items()} == {
        name: (f"h.{name.removeprefix('blocks.')}",) for name in targets
    }


def test_a_vocabulary_of_another_size_is_left_to_the_reader() -> None:
    """Nothing is loaded into it without a word: it stays unmatched, with what could be done."""
    found, plan = pasted(specs({"wte.weight": (40, 16)}), specs({"embed.weight": (44, 16)}))
    assert not plan.is_fine
    assert found.unmatched_targets == ("embed.weight",)
    assert [one.what for one in found.unsure] == ["wte -> embed"]
    assert found.unsure[0].alternatives[0] == "keep_model: embed.weight"


def test_blocks_that_only_the_file_has_are_said() -> None:
    """Of four blocks, a model of two gets the first two, unsure, and the others stay unmatched."""
    found, _ = pasted(blocks("h.<i>.", affine("mlp", 8, 4), 4), blocks("blocks.<i>.", affine("mlp", 8, 4), 2))
    assert found.plan.coverage() == 1.0
    assert found.unsure[0].reason == "the file has 4 of h.<i>, the model 2: blocks of equal numbers are paired"
    assert found.unmatched_sources == ("h.2.mlp.weight", "h.2.mlp.bias", "h.3.mlp.weight", "h.3.mlp.bias")


def test_tied_heads_come_with_their_embedding() -> None:
    """A head that is the embedding's tensor is neither kept nor missing."""
    head = TargetSpec((40, 16), "float32", 2560, tied_to="wte.weight")
    found, plan = pasted(specs({"embed.weight": (40, 16)}), {**specs({"wte.weight": (40, 16)}), "lm_head.weight": head})
    assert found.config() == {"transforms": [{"from": "embed.", "to": "wte."}]}
    assert plan.coverage() == 1.0


@pytest.mark.parametrize("name", ["tok", "foo"])
@pytest.mark.parametrize("first", ["embedding", "head"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_one_table_for_embedding_and_head(name: str, first: str, is_tied: bool) -> None:
    """GPT-2's file has wte alone: a tied head comes with it, another one is kept as fresh, and named."""
    names = [f"{name}.weight", "head.weight"] if first == "embedding" else ["head.weight", f"{name}.weight"]
    second = TargetSpec((40, 16), "float32", 2560, tied_to=names[0] if is_tied else None)
    targets = {names[0]: TargetSpec((40, 16), "float32", 2560), names[1]: second}
    found, plan = pasted(specs({"transformer.wte.weight": (40, 16)}), targets)
    assert plan.is_fine
    assert found.config()["transforms"][0] == {"from": "transformer.wte.", "to": f"{name}."}
    assert found.unmatched_sources == found.unmatched_targets == ()
    if is_tied:
        assert plan.coverage() == 1.0
        assert len(found.rules) == 1
        assert found.is_sure is (name == "tok")
    else:
        assert found.config()["transforms"][1:] == [{"keep_model": "head."}]
        (unsure,) = [one for one in found.unsure if one.what == "head"]
        assert unsure.targets == ("head.weight",)
        assert unsure.alternatives == (f"tie head to {name} in the model", "transformer.wte -> head")
        assert found.rules[1].doubts


def test_buffers_that_models_compute_are_dropped() -> None:
    """Causal masks and frequencies of older files need no word of the reader."""
    found, plan = pasted(
        {**GPT2, **specs({f"h.{i}.attn.bias": (1, 1, 12, 12) for i in range(2)} | {"rotary.inv_freq": (4,)})}, GPT2
    )
    assert [one.config for one in found.rules] == [{"drop": "h.*.attn.bias"}, {"drop": "rotary.inv_freq"}]
    assert plan.is_fine


def test_names_that_no_rule_can_say_stay_unmatched() -> None:
    """Signs of patterns, empty segments and line breaks are in no rule, and raise nothing."""
    odd = specs({"a<b.weight": (3, 4), "a*.x": (2,), "..": (1,), "a\nb": (3,)})
    found = suggest(odd, specs({"b.weight": (3, 4)}))
    assert found.rules == ()
    assert found.unmatched_sources == tuple(odd)
    assert found.unmatched_targets == ("b.weight",)
    assert suggest({}, {}).rules == ()


@pytest.mark.parametrize(
    "prefix",
    ["0" * 20_000 + "1" + "x" * 20_000, "a." * 500, "a." * 1200, "1." * 2000, "9" * 6000 + ".", "_" * 50_000],
    ids=["digits", "deep", "deeper", "numbers", "one number", "underscores"],
)
def test_names_of_absurd_length_stay_unmatched(prefix: str) -> None:
    """They are named, not shown in full, and take neither time nor stack; what else there is, is suggested."""
    sources, targets = (specs({f"{prefix}{letter}{number}.weight": (4, 4) for number in range(300)}) for letter in "ab")
    with LineCounter() as lines:
        found = suggest({**sources, **specs({"x.wte.weight": (5, 4)})}, {**targets, **specs({"embed.weight": (5, 4)})})
    assert lines.count < 100_000
    assert found.config() == {"transforms": [{"from": "x.wte.", "to": "embed."}]}
    assert found.unmatched_sources == tuple(sources)
    assert found.unmatched_targets == tuple(targets)
    assert not found.plan.is_fine
    assert len(str(found)) < 5000


def test_a_layer_that_is_the_whole_model_has_a_label() -> None:
    """A doubt about it names both sides."""
    found = suggest(specs(affine("model", 4, 4)), specs({"weight": (4, 4), "bias": (4,)}))
    assert all(one.what.strip(" ->:") and not one.what.endswith("-> ") for one in found.unsure)
    unfit = suggest(specs({"weight": (4, 4)}), specs({"weight": (5, 4)}))
    assert [one.what for one in unfit.unsure] == ["(root) -> (root)"]


def test_what_is_printed_is_yaml() -> None:
    """Doubts, what is unmatched and problems are comments."""
    found = suggest(
        specs({"a.w": (6, 5), "b.w": (6, 5), "x.y": (9,)}), specs({"c.w": (6, 5), "d.w": (6, 5), "z.v": (8,)})
    )
    assert found.unsure
    assert yaml.safe_load(str(found)) == (found.config() or None)


def test_no_rule_was_found_where_the_policy_lets_everything_be() -> None:
    """The plan is fine, nothing is loaded, and it is not said that no rule is needed."""
    same = specs({"same.weight": (4, 4)})
    policies = Policies(on_missing="keep", on_unexpected="ignore")
    found = suggest(same | specs({"zzz.foo": (7,)}), same | specs({"qqq.bar": (3, 2)}), policies=policies)
    assert found.plan.is_fine
    assert "no rule was found" in str(found)
    assert "no rule is needed" not in str(found)


def library(kind: str, config: str, **fields: Any) -> Specs:
    """The entries of a small model of transformers; no values are made."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return of_module(getattr(transformers, kind)(getattr(transformers, config)(**fields)))


def small_bert() -> Specs:
    return library(
        "BertModel", "BertConfig", vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=12,
    )  # fmt: skip


BERT_TO_PLAIN = (
    (r"encoder\.layer", "blocks"), (r"attention\.self", "attn"), (r"attention\.output\.dense", "attn.proj"),
    (r"attention\.output\.LayerNorm", "norm1"), (r"intermediate\.dense", "mlp.fc1"),
    (r"(\d+)\.output\.dense", r"\1.mlp.fc2"), (r"output\.LayerNorm", "norm2"),
    (r"embeddings\.word_embeddings", "tok_embed"), (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.token_type_embeddings", "type_embed"), (r"embeddings\.LayerNorm", "embed_norm"),
    ("query", "q"), ("key", "k"), ("value", "v"),
)  # fmt: skip
LLAMA_TO_PLAIN = (
    (r"^model\.", ""), ("embed_tokens", "tok_embeddings"), ("self_attn", "attention"), ("([qkvo])_proj", r"w\1"),
    (r"mlp\.gate_proj", "feed_forward.w1"), (r"mlp\.down_proj", "feed_forward.w2"),
    (r"mlp\.up_proj", "feed_forward.w3"), ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("lm_head", "output"),
)  # fmt: skip


def small_llama() -> Specs:
    return library(
        "LlamaForCausalLM", "LlamaConfig", vocab_size=40, hidden_size=16, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    ("model", "pairs"), [(small_llama, LLAMA_TO_PLAIN), (small_bert, BERT_TO_PLAIN)], ids=["llama", "bert"]
)
def test_models_of_transformers_under_other_names(model: Any, pairs: Any, back: bool) -> None:
    """Llama and BERT, as transformers names them and as others do: every entry finds its own, for sure."""
    entries = model()
    other = renamed(entries, *pairs)
    truth = dict(zip(other, entries, strict=True))
    if back:
        entries, other, truth = other, entries, {source: target for target, source in truth.items()}
    found, plan = pasted(entries, other)
    assert plan.coverage() == 1.0
    assert {key: sources for key, (sources, *_) in moves(plan).items()} == {key: (one,) for key, one in truth.items()}
    assert found.is_sure
    assert not any(step for _, _, step in moves(plan).values())


def test_a_vision_transformer_of_transformers_fits_the_names_of_timm() -> None:
    """Fused attention, another grid, a head of another size: all but the head is loaded."""
    sources = library(
        "ViTForImageClassification", "ViTConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, image_size=28, patch_size=7, num_labels=5,
    )  # fmt: skip
    targets = {
        **specs({"cls_token": (1, 1, 16), "pos_embed": (1, 26, 16), "patch_embed.proj.weight": (16, 3, 7, 7)}),
        **specs({"patch_embed.proj.bias": (16,)}),
        **blocks(
            "blocks.<i>.",
            {
                **affine("norm1", 16), **affine("attn.qkv", 48, 16), **affine("attn.proj", 16, 16),
                **affine("norm2", 16), **affine("mlp.fc1", 64, 16), **affine("mlp.fc2", 16, 64),
            },
        ),
        **specs({**affine("norm", 16), **affine("head", 7, 16)}),
    }  # fmt: skip
    found, plan = pasted(sources, targets)
    assert plan.is_fine
    assert {row.key for row in plan.rows if row.target and not row.writes} == {"head.weight", "head.bias"}
    assert found.is_sure
    taken = {key: tuple(re.sub(r"^vit\.", "", one) for one in sources) for key, (sources, *_) in moves(plan).items()}
    assert taken["blocks.1.attn.qkv.bias"] == tuple(f"layers.1.attention.{part}_proj.bias" for part in "qkv")
    assert taken["blocks.0.norm2.weight"] == ("layers.0.layernorm_after.weight",)
    assert taken["norm.weight"] == ("layernorm.weight",)
    assert taken["pos_embed"] == ("embeddings.position_embeddings",)
    assert "to_grid: [5, 5]" in found.to_yaml()


WORDS = st.sampled_from("stem tower conv lift mix gain left right alpha beta inner outer fuse gather".split())  # noqa: SIM905
PATHS = st.lists(WORDS, min_size=1, max_size=3).map(".".join)


@st.composite
def models(draw: st.DrawFn, *, distinct: bool) -> tuple[Specs, Specs, dict[str, str]]:
    """A model, the same under other names and in another order, and which name is which.

    With ``distinct`` every layer has sizes of its own, none square; else all have the same.
    """
    count = draw(st.integers(1, 6))
    mine = draw(st.lists(PATHS, min_size=count, max_size=count, unique=True))
    its = draw(st.lists(PATHS, min_size=count, max_size=count, unique=True))
    repeats = draw(st.integers(1, 3))
    source: dict[str, tuple[int, ...]] = {}
    target: dict[str, tuple[int, ...]] = {}
    truth: dict[str, str] = {}
    for number, (one, other) in enumerate(zip(mine, its, strict=True)):
        shape = (7 + 2 * number, 40 + 2 * number) if distinct else (7, 40)
        for block in range(repeats):
            for leaf, size in (("weight", shape), ("bias", shape[:1])):
                source[f"h.{block}.{one}.{leaf}"] = size
                target[f"blocks.{block}.{other}.{leaf}"] = size
                truth[f"blocks.{block}.{other}.{leaf}"] = f"h.{block}.{one}.{leaf}"
    order = draw(st.permutations(list(target)))
    return specs(source), specs({name: target[name] for name in order}), truth


@settings(deadline=None, max_examples=150)
@given(models(distinct=True))
def test_with_shapes_of_their_own_everything_is_right(given_models: tuple[Specs, Specs, dict[str, str]]) -> None:
    """Whatever the names and the order, layers of sizes of their own find each other, and the plan is fine."""
    sources, targets, truth = given_models
    _, plan = pasted(sources, targets)
    assert plan.is_fine, plan.problems
    assert {key: sources for key, (sources, *_) in moves(plan).items()} == {key: (one,) for key, one in truth.items()}


@settings(deadline=None, max_examples=150)
@given(models(distinct=False))
def test_unrelated_names_of_one_shape_are_never_sure(given_models: tuple[Specs, Specs, dict[str, str]]) -> None:
    """What is said to be sure has at least a word in common."""
    sources, targets, _ = given_models
    found, plan = pasted(sources, targets)
    for key in sure_targets(found):
        (source,) = moves(plan)[key][0]
        assert set(source.split(".")[2:-1]) & set(key.split(".")[2:-1]), (source, key)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(PATHS, min_size=1, max_size=8, unique=True),
    st.sets(WORDS, max_size=6),
    st.sampled_from(["", "model.", "net.body."]),
    st.randoms(use_true_random=False),
)
def test_what_is_sure_is_right_when_words_are_exchanged(
    paths: list[str], unknown: set[str], prefix: str, random: Any
) -> None:
    """Layers of one shape, some words written in a new way everywhere: sure pairs are the true ones."""
    its = [".".join(f"new{word}" if word in unknown else word for word in path.split(".")) for path in paths]
    truth = {f"{prefix}{other}.weight": f"{one}.weight" for one, other in zip(paths, its, strict=True)}
    order = random.sample(list(truth), len(truth))
    found, plan = pasted(specs({f"{path}.weight": (7, 40) for path in paths}), specs(dict.fromkeys(order, (7, 40))))
    taken = moves(plan)
    assert {key: taken[key][0] for key in sure_targets(found)} == {key: (truth[key],) for key in sure_targets(found)}


@given(
    st.dictionaries(PATHS, st.lists(st.integers(1, 3), max_size=3)),
    st.dictionaries(PATHS, st.lists(st.integers(1, 3), max_size=3)),
)
def test_any_names_and_shapes_give_a_suggestion(mine: dict[str, list[int]], its: dict[str, list[int]]) -> None:
    """Whatever there is on either side, the YAML says what the plan was made with, and what is left is named."""
    found, plan = pasted(specs(mine), specs(its))
    written = {row.key for row in plan.rows if row.writes}
    kept = {row.key for row in plan.rows if row.action == "keep"}
    assert written | kept | set(found.unmatched_targets) == its.keys()


def test_thousands_of_entries_take_few_lines_each() -> None:
    """A model of 200 blocks under other names: five rules."""
    parts = [("ln_1", "norm1"), ("attn.c_attn", "attn.qkv"), ("attn.c_proj", "attn.proj"),
             ("ln_2", "norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")]  # fmt: skip
    sources = {
        name: spec
        for number, (part, _) in enumerate(parts)
        for name, spec in blocks("transformer.h.<i>.", affine(part, 8 + number, 20), 200).items()
    }
    targets = {
        name: spec
        for number, (_, part) in enumerate(parts)
        for name, spec in blocks("blocks.<i>.", affine(part, 8 + number, 20), 200).items()
    }
    with LineCounter() as lines:
        found = suggest(sources, targets)
    assert lines.count < 1_000 * len(targets)
    assert found.plan.coverage() == 1.0
    assert len(found.rules) == 5
