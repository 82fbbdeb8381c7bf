"""The plan: pure, complete, and honest about what stands in the way."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest

from noether_init_core.config.source import TransformConfig, rule_of
from noether_init_core.errors import PlanError
from noether_init_core.surgery.advice import Advice
from noether_init_core.surgery.fit import PlanPart, TargetSpec, square_grids
from noether_init_core.surgery.name_rules import NameRules, NoetherSurgery, Rename, Transforms
from noether_init_core.surgery.plan import LOADED_BEFORE, Action, LoadPlan, Origin, PlanRow
from noether_init_core.surgery.planner import Policies, plan_load
from noether_init_core.surgery.steps import Interpolate, Transpose
from noether_init_core.surgery.ties import ties


def spec(*shape: int, dtype: str = "float32", **more: object) -> TargetSpec:
    size = 4
    for length in shape:
        size *= length
    return TargetSpec(shape, dtype, size, **more)  # type: ignore[arg-type]


def plan(
    sources: dict[str, TargetSpec], targets: dict[str, TargetSpec], rules: NameRules | None = None, **more: object
) -> LoadPlan:
    part = PlanPart("net", "pretrain @ latest", ("net_cp=latest_model.th",), sources, targets)
    return plan_load("previous_run", [part], rules or NoetherSurgery(), **more)  # type: ignore[arg-type]


def codes(found: LoadPlan) -> list[str]:
    return [problem.code for problem in found.problems]


def test_every_entry_has_a_row_with_the_rule_responsible() -> None:
    """Loaded, renamed, kept, cast and removed entries each have their row, in the order of the model."""
    rules = NoetherSurgery(("old",), (), (Rename("inp.", "stem."),), ("head.",))
    found = plan(
        {"inp.w": spec(2, 3), "norm": spec(3, dtype="bfloat16"), "head.w": spec(4, 3), "old": spec(1), "same": spec(5)},
        {"stem.w": spec(2, 3), "norm": spec(3), "head.w": spec(7, 3), "same": spec(5)},
        rules,
    )
    assert found.is_fine
    assert [(row.key, row.action, row.rule) for row in found.rows] == [
        ("stem.w", "rename", "patterns_to_rename: inp. -> stem."),
        ("norm", "cast", None),
        ("head.w", "keep", "patterns_to_instantiate: head."),
        ("same", "load", None),
        ("head.w", "removed", "patterns_to_instantiate: head."),
        ("old", "removed", "keys_to_remove: old"),
    ]
    assert found.counts() == {"cast": 1, "keep": 1, "load": 1, "removed": 2, "rename": 1}
    assert found.coverage() == pytest.approx((24 + 12 + 20) / (24 + 12 + 20 + 84))


def test_the_error_names_file_model_neighbour_and_the_line_to_add() -> None:
    """A missing entry's message says where the file came from, what is near and how to keep the model's own."""
    found = plan({"blocks.0.w": spec(2)}, {"block.0.w": spec(2)}, advice=Advice(style="fields"))
    with pytest.raises(PlanError) as caught:
        found.raise_for_problems()
    assert str(caught.value) == (
        "previous_run: net <- pretrain @ latest (net_cp=latest_model.th)\n"
        "  net needs block.0.w, not found in the file. Near block.0.w, the file has: blocks.0.w. "
        "One rename fits all: patterns_to_rename: [{src: blocks., dst: block.}]\n"
        "  the file has blocks.0.w, not found in net. Near blocks.0.w, the model has: block.0.w\n"
        "Nothing was changed."
    )
    assert caught.value.plan is found


def test_a_name_that_a_rule_took_away_is_said_to_be_so() -> None:
    """The file has it, under that very name; that it was not found would send a reader to the file."""
    rules = NoetherSurgery(patterns_to_rename=(Rename("module.", ""),))
    found = plan({"b.module.weight": spec(2)}, {"b.module.weight": spec(2)}, rules, advice=Advice(style="fields"))
    assert [problem.message for problem in found.problems] == [
        "net needs b.module.weight, not found in the file after renaming: patterns_to_rename: module. ->  makes "
        "b.module.weight of the file b.weight. To keep the model's own values there add: patterns_to_instantiate: [b.]",
        "patterns_to_rename: module. ->  makes b.weight, not found in net. Near b.weight, the model has: "
        "b.module.weight",
    ]


def test_a_rule_that_names_an_entry_with_the_prefix_of_a_wrapper_is_told_how_rules_name_it() -> None:
    """Near the name that it makes would be that very name."""
    config = TransformConfig.model_validate({"from": "q.enc.bias", "to": "q.module.bias"})
    rules = Transforms([rule_of(config, "rule 0")])
    found = plan({"q.enc.bias": spec(2)}, {"q.module.bias": spec(2)}, rules)
    assert found.problems[-1].message.endswith(
        "makes q.module.bias, not found in net. In rules, leave out the prefix of a wrapper: q.bias"
    )


def test_misshaped_entries_are_told_with_both_shapes() -> None:
    """The message for a head of another size names both shapes once and the other entries beside it."""
    found = plan({"head.w": spec(10, 4), "head.b": spec(10)}, {"head.w": spec(4, 4), "head.b": spec(4)})
    assert [problem.message for problem in found.problems] == ["head.w: file [10, 4], model [4, 4]; head.b too."]


@pytest.mark.parametrize(
    ("source", "target", "cast", "fine"),
    [
        ("float32", "float64", "same_kind", True),
        ("bfloat16", "float32", "same_kind", True),
        ("float32", "float64", "none", False),
        ("int32", "int64", "same_kind", True),
        ("float32", "int64", "same_kind", False),
        ("int64", "float32", "same_kind", False),
        ("bool", "int64", "same_kind", False),
        ("float32", "int64", "any", True),
        ("complex64", "float32", "any", False),
        ("complex64", "complex128", "same_kind", True),
        ("float32", "complex64", "same_kind", False),
    ],
)
def test_casts_are_allowed_by_policy(source: str, target: str, cast: str, fine: bool) -> None:
    """Only dtypes of one kind are converted unless the config says otherwise; complex never becomes real."""
    found = plan({"w": spec(2, dtype=source)}, {"w": spec(2, dtype=target)}, policies=Policies(cast=cast))  # type: ignore[arg-type]
    assert found.is_fine is fine
    assert codes(found) == ([] if fine else ["dtype"])


def test_tied_entries_are_loaded_from_any_of_their_names() -> None:
    """One stored name serves both; two stored names must hold the same bytes."""
    targets = {"emb.w": spec(3), "head.w": spec(3, tied_to="emb.w")}
    one = plan({"head.w": spec(3)}, targets)
    assert one.is_fine
    assert [(row.key, row.sources, row.rule) for row in one.rows] == [
        ("emb.w", ("head.w",), "tied to head.w"),
        ("head.w", ("head.w",), None),
    ]
    both = plan({"emb.w": spec(3), "head.w": spec(3)}, targets)
    assert both.equal == (("net", "emb.w", "net", "head.w"),)


def test_keeping_one_name_of_a_tied_tensor_and_loading_the_other_is_a_problem() -> None:
    """The tensor cannot both keep its value and be loaded."""
    targets = {"emb.w": spec(3), "head.w": spec(3, tied_to="emb.w")}
    found = plan({"emb.w": spec(3), "head.w": spec(3)}, targets, NoetherSurgery(patterns_to_instantiate=("head.",)))
    assert codes(found) == ["tied"]


def test_a_plan_that_loads_nothing_is_a_problem() -> None:
    """Keeping every entry would be an initialization in name only."""
    found = plan({"w": spec(2)}, {"w": spec(2)}, NoetherSurgery(patterns_to_instantiate=("w",)))
    assert codes(found) == ["nothing-loaded"]


def test_non_persistent_buffers_in_a_file_are_left_out() -> None:
    """Averaged weights hold buffers that a state dict has not; they are no reason to refuse the file."""
    part = PlanPart("net", "", ("f",), {"w": spec(2), "mask": spec(2)}, {"w": spec(2)}, frozenset({"mask"}))
    found = plan_load("previous_run", [part], NoetherSurgery())
    assert found.is_fine
    assert (found.rows[1].action, found.rows[1].rule) == ("removed", "non-persistent buffer of the model")


def test_the_json_holds_every_row_and_a_version() -> None:
    """Programs get the same rows that people see."""
    found = plan({"w": spec(2)}, {"w": spec(2)})
    data = json.loads(found.to_json())
    assert data["version"] == 1
    assert [row["target"] for row in data["rows"]] == ["w"]
    assert data["counts"] == {"load": 1}


def test_a_rename_is_proposed_where_the_shapes_fit_too() -> None:
    """A weight of [in, out] under another name would not fit after the rename."""
    targets = {"inp.w": spec(4, 2), "inp.b": spec(4)}
    for shape, is_proposed in (((4, 2), True), ((2, 4), False)):
        found = plan({"stem.w": spec(*shape), "stem.b": spec(4)}, targets, advice=Advice(style="fields"))
        assert ("One rename fits all" in found.problems[0].message) is is_proposed


def test_the_line_to_keep_entries_keeps_no_others() -> None:
    """Where a part of a name would hit other entries as well, whole names are proposed."""
    targets = {"5.w": spec(4), "15.w": spec(2), "head.w": spec(2)}
    found = plan({"5.w": spec(2), "15.w": spec(2), "head.w": spec(2)}, targets, advice=Advice(style="fields"))
    assert (
        found.problems[0].message
        == "5.w: file [2], model [4]. To keep the model's own values there add: transforms: [{keep_model: '5.'}]"
    )
    found = plan(
        {"5.w": spec(2), "15.w": spec(2), "head.w": spec(7)}, targets | {"5.w": spec(2)}, advice=Advice(style="fields")
    )
    assert (
        found.problems[0].message
        == "head.w: file [7], model [2]. To keep the model's own values there add: patterns_to_instantiate: [head.]"
    )
    # transforms and the fields of Noether do not go together, so that the others have to be written anew
    rules = NoetherSurgery(patterns_to_rename=(Rename("top.", "head."),))
    advice = Advice(style="fields", fields={"patterns_to_rename": [{"src": "top.", "dst": "head."}]})
    found = plan({"5.w": spec(2), "15.w": spec(2), "top.w": spec(2)}, targets, rules, advice=advice)
    assert found.problems[0].message.endswith("  # with the other fields written as transforms")


def test_following_that_line_gives_a_plan_without_problems() -> None:
    """The proposed field keeps the one entry and loads its neighbour."""
    targets = {"5.w": spec(4), "15.w": spec(2)}
    rules = Transforms([rule_of(TransformConfig(keep_model=["5.w"]), "keep")])
    found = plan({"5.w": spec(2), "15.w": spec(2)}, targets, rules)
    assert found.is_fine
    assert [(row.key, row.action) for row in found.rows] == [("5.w", "keep"), ("15.w", "load"), ("5.w", "removed")]


def test_a_pattern_that_hits_inside_a_name_is_told() -> None:
    """``head.`` also keeps ``lm_head.w``, which the file could fill: a warning names it."""
    rules = NoetherSurgery(patterns_to_instantiate=("head.",))
    found = plan(
        {"head.w": spec(2), "lm_head.w": spec(2)}, {"head.w": spec(2), "lm_head.w": spec(2), "x": spec(1)}, rules
    )
    assert [(warning.code, warning.keys) for warning in found.warnings] == [("kept", ("lm_head.w",))]


def test_prefixes_of_wrappers_are_looked_through() -> None:
    """A compiled or data-parallel model's names fit the bare model, and the other way round."""
    found = plan({"_orig_mod.a.w": spec(2), "b.module.w": spec(3)}, {"a.w": spec(2), "module.b.w": spec(3)})
    assert found.is_fine
    assert [(row.key, row.sources, row.rule) for row in found.rows] == [
        ("a.w", ("_orig_mod.a.w",), "prefix of a wrapper"),
        ("module.b.w", ("b.module.w",), "prefix of a wrapper"),
    ]
    both = plan({"module.a.w": spec(2), "_orig_mod.a.w": spec(2)}, {"a.w": spec(2)})
    assert codes(both) == ["missing", "unexpected"]


def test_entries_that_cannot_be_written_are_a_problem() -> None:
    """An expanded parameter is found before anything is written."""
    found = plan({"w": spec(3)}, {"w": spec(3, unwritable="is expanded")})
    assert codes(found) == ["unwritable"]


def test_rows_of_merged_plans_keep_their_initializer_and_file() -> None:
    """Each row says which initializer it is of, its number in the stack, and its file."""
    targets = {"body": spec(2), "head": spec(2)}
    keep = Policies(on_missing="keep")
    plans = [
        plan_load(
            kind, [PlanPart("net", kind, (f"{kind}.th",), {name: spec(2)}, targets)], NoetherSurgery(), policies=keep
        )
        for kind, name in (("first", "body"), ("second", "head"))
    ]
    merged = LoadPlan.merged(plans, [0, 2])
    assert merged.origins == (
        Origin("first", "net", 0, "first", ("first.th",)),
        Origin("second", "net", 2, "second", ("second.th",)),
    )
    assert [(row.key, row.action, merged.origins[row.origin].files) for row in merged.rows] == [
        ("body", "load", ("first.th",)),
        ("head", "load", ("second.th",)),
    ]
    assert [row["origin"] for row in merged.to_dict()["rows"]] == [0, 1]


def test_memory_that_submodels_share_counts_once() -> None:
    """In the coverage and in the totals, also where another submodel's row of it is the one that loads."""
    shared = spec(6, identity="memory")
    parts = [
        PlanPart("pair.a", "", ("a.th",), {"w": spec(6)}, {"w": shared, "own": spec(2)}),
        PlanPart("pair.b", "", ("b.th",), {}, {"w": shared}),
    ]
    found = plan_load("previous_run", parts, NoetherSurgery(), policies=Policies(on_missing="keep"))
    assert found.coverage() == 0.75
    assert found.to_dict()["totals"]["parameters"] == 8
    assert [row["counted"] for row in found.to_dict()["rows"]] == [True, True, False]


def test_a_plan_that_a_kind_builds_itself_has_an_origin() -> None:
    """Rows alone are enough: they are of that kind, for their model, and of no file."""
    found = LoadPlan("average", (PlanRow("net", "w", ("w",), "load", (2,), "float32", 8),))
    assert found.origins == (Origin("average", "net"),)
    assert (found.is_fine, found.coverage(), found.to_dict()["totals"]["bytes_loaded"]) == (True, 1.0, 8)
    with pytest.raises(ValueError, match="a row has an origin that is not among the 1 of the plan"):
        LoadPlan("average", (attrs.evolve(found.rows[0], origin=1),), origins=found.origins)


def test_ties_across_submodels_must_agree() -> None:
    """One tensor in two submodels: both files must hold the same bytes, and it cannot be kept in one of them."""
    parts = [
        PlanPart(name, "", (f"{name}.th",), {"w": spec(2)}, {"w": spec(2, identity="memory")})
        for name in ("pair.a", "pair.b")
    ]
    found = plan_load("previous_run", parts, NoetherSurgery())
    assert found.is_fine
    assert found.equal == (("pair.a", "w", "pair.b", "w"),)


def test_a_single_token_is_no_grid() -> None:
    """Interpolating to or from it is not what a position embedding is for."""
    assert square_grids((5, 8), (10, 8)) == [Interpolate((2, 2), (3, 3), 1)]
    assert square_grids((5, 8), (2, 8)) == square_grids((2, 8), (5, 8)) == []


def tied(model: str, name: str, action: Action, **changes: Any) -> PlanRow:
    """A row of an entry that is one tensor with every other."""
    return attrs.evolve(PlanRow(model, name, (name,), action, (2,), "float32", 8, identity="memory"), **changes)


@pytest.mark.parametrize(
    ("rows", "problems"),
    [
        (
            [tied("a", "w", "load"), tied("a", "v", "keep")],
            ["v is kept, but it is the same tensor as w, which is loaded"],
        ),
        (
            [tied("a", "v", "keep"), tied("a", "w", "load")],
            ["v is kept, but it is the same tensor as w, which is loaded"],
        ),
        (
            [tied("a", "w", "reset"), tied("a", "v", "keep")],
            ["v is kept, but it is the same tensor as w, which is reset"],
        ),
        (
            [tied("a", "v", "keep"), tied("a", "w", "reset")],
            ["v is kept, but it is the same tensor as w, which is reset"],
        ),
        ([tied("a", "w", "load"), tied("a", "u", "keep")], []),  # no rule of the config keeps u
        ([tied("a", "v", "keep"), tied("a", "w", "load", rule=LOADED_BEFORE)], []),
        (
            [tied("a", "w", "load"), tied("b", "u", "keep")],
            ["u of b is kept, but it is the same tensor as w of a, which is loaded"],
        ),
        ([tied("a", "w", "reset"), tied("b", "v", "keep")], []),
        (
            [tied("a", "w", "load"), tied("b", "w", "transform", steps=(Transpose(),))],
            ["w of a and w of b are one tensor, and transforms compute it twice. Next: drop one"],
        ),
        (
            [tied("a", "w", "transform", steps=(Transpose(),)), tied("b", "w", "load")],
            ["w of a and w of b are one tensor, and transforms compute it twice. Next: drop one"],
        ),
        (
            [
                tied("a", name, "transform", sources=("x",), steps=(Transpose(),), part=part)
                for part, name in enumerate("wv")
            ],
            ["w and v are one tensor, and transforms compute it twice. Next: drop one"],
        ),
        ([tied("a", name, "transform", sources=("x",), steps=(Transpose(),)) for name in "wv"], []),
    ],
)
def test_one_tensor_has_one_origin(rows: list[PlanRow], problems: list[str]) -> None:
    """Rules of the config may not keep it under one name and load it under another, nor make it twice."""
    equal, found = ties(rows, {(model, "v") for model in "ab"})
    assert [problem.message for problem in found] == problems
    assert equal == ()


def test_the_line_that_keeps_a_module_is_said_below_the_target_root() -> None:
    """One module, not its entries: others of the same module are none of those that are kept."""
    targets = {"net.stem.w": spec(2), "net.head.w": spec(2), "net.head.b": spec(2)}
    part = PlanPart("net", "file", ("a.pt",), {"stem.w": spec(2)}, targets)
    found = plan_load("file", [part], Transforms(target_root="net."), advice=Advice())
    (problem,) = found.problems
    assert problem.message.endswith("To keep the model's own values there add: - keep_model: head.")
