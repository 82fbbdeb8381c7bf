"""docs/plan.schema.json is what ``LoadPlan.to_dict`` gives, no more and no less."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from noether_init_core.surgery.fit import PlanPart, TargetSpec
from noether_init_core.surgery.name_rules import NoetherSurgery, Rename, Rule, Transforms
from noether_init_core.surgery.patterns import parse_glob, parse_pattern
from noether_init_core.surgery.plan import LoadPlan
from noether_init_core.surgery.planner import Policies, plan_load
from noether_init_core.surgery.steps import (
    Cast,
    Concat,
    Interpolate,
    Pad,
    Reshape,
    Slice,
    Split,
    Stack,
    Step,
    Transpose,
    Unstack,
)

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "plan.schema.json").read_text())


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


def spec(*shape: int, dtype: str = "float32", **more: Any) -> TargetSpec:
    return TargetSpec(shape, dtype, 4, **more)


def move(source: str | list[str], target: str | list[str], *steps: Step) -> Rule:
    def patterns(texts: str | list[str]) -> Any:
        return tuple(map(parse_pattern, [texts] if isinstance(texts, str) else texts))

    return Rule("from", patterns(source), f"rule {source}", patterns(target), steps)


RULES = [
    move("qkv", ["q", "k", "v"], Transpose(), Split(0)),
    move(["a.<i>", "b.<i>"], "ab.<i>", Concat(0)),
    move(["c.0", "c.1"], "c", Stack(0)),
    move("d", ["d.0", "d.1"], Unstack(0)),
    move("e", "e", Reshape((3, 2))),
    move("f", "f", Slice(0, 0, 1), Pad(4, 0, 0.0)),
    move("g", "g", Interpolate((2, 2), (3, 3), 1)),
    move("h", "h", Cast("float16")),
    move("odd", ["odd.0", "odd.1"], Split(0)),
    Rule("keep_model", (parse_glob("head"),), "keep"),
    Rule("drop", (parse_glob("old"),), "drop"),
    move("moved", "new"),
    move("astray", "nowhere"),
    move("nothing", "there"),
]
SOURCES = {
    **{
        name: spec(2, 3)
        for name in ("a.0", "b.0", "c.0", "c.1", "e", "f", "same", "old", "shape", "extra", "astray", "moved")
    },
    "qkv": spec(3, 6),
    "d": spec(2, 3),
    "g": spec(1, 5, 2),
    "h": spec(2),
    "odd": spec(3),
    "wide": spec(2, dtype="float64"),
    "state": spec(dtype="object"),
}
TARGETS = {
    **{name: spec(2, 3) for name in ("q", "k", "v", "same", "new")},
    "ab.0": spec(4, 3),
    "c": spec(2, 2, 3),
    "d.0": spec(3),
    "d.1": spec(3),
    "e": spec(3, 2),
    "f": spec(4, 3),
    "g": spec(1, 10, 2),
    "h": spec(2, dtype="float16"),
    "odd.0": spec(1),
    "odd.1": spec(2),
    "wide": spec(2),
    "tied": spec(2, 3, tied_to="same"),
    "head": spec(1),
    "shape": spec(9, 9),
    "lost": spec(1),
    "state": spec(dtype="object", is_parameter=False),
}


def plans() -> Iterator[LoadPlan]:
    part = PlanPart("net", "pretrain @ latest", ("net.th",), SOURCES, TARGETS, resettable=frozenset({"lost"}))
    yield plan_load("file", [part], Transforms(RULES), policies=Policies(min_coverage={"**": 1.0}))
    yield plan_load("file", [part], Transforms(RULES), policies=Policies("reset", "ignore", "keep"))
    yield plan_load("file", [part], Transforms(RULES, source_root="sub.", target_root="sub.", warns=True))
    renamed = NoetherSurgery(("old",), ("astray",), (Rename("extra", "lost"),), ("head",))
    yield plan_load("previous_run", [part], renamed, policies=Policies("keep", "ignore", "pad"))
    yield LoadPlan.merged([])


def test_plans_of_every_sort_are_what_the_schema_says(validator: jsonschema.Draft202012Validator) -> None:
    """Every action and every step occurs, with problems, warnings and rows of every kind."""
    actions, steps, codes = set(), set(), set()
    for plan in plans():
        data = json.loads(plan.to_json())
        assert [error.message for error in validator.iter_errors(data)] == []
        actions |= {row["action"] for row in data["rows"]}
        steps |= {step["step"] for row in data["rows"] for step in row["steps"]}
        codes |= {problem["code"] for problem in data["problems"]}
    assert actions == set(SCHEMA["$defs"]["action"]["enum"])
    assert steps == {one["properties"]["step"]["const"] for one in SCHEMA["$defs"]["step"]["oneOf"]}
    assert codes >= {"missing", "mismatch", "step", "unexpected", "unmatched-rule", "coverage"}


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field of the plan, by path; of each list the items that differ in their fields."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield (*path, key)
            yield from places(value, (*path, key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from places(value, (*path, number))


def test_a_changed_field_name_is_noticed(validator: jsonschema.Draft202012Validator) -> None:
    """Wherever it is, but for objects whose keys are data: counts by action and coverage by module."""
    data = json.loads(next(plans()).to_json())
    tried = 0
    seen = set()
    for *path, name in places(data):
        shape = tuple("#" if isinstance(one, int) else one for one in (*path, name))
        owner = data
        for one in path:
            owner = owner[one]
        shape = (*shape, owner.get("step"))
        if path == ["coverage_by_module"] or shape in seen:
            continue
        seen.add(shape)
        changed = copy.deepcopy(data)
        owner = changed
        for one in path:
            owner = owner[one]
        owner[f"{name}_"] = owner.pop(name)
        assert not validator.is_valid(changed), shape
        tried += 1
    assert tried > 50
