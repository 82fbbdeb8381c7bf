"""The grammar of transforms: what is refused, at which line, with what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest

from noether_init_core import ConfigError, InitializerStack
from noether_init_core.config.source import TransformConfig, rule_of
from noether_init_core.stack.config_files import load_config_file
from noether_init_core.surgery.name_rules import Rule

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of from, from_regex, drop, keep_model, only; this has none"),
    ({"from": "a", "drop": "b"}, "this has from and drop"),
    ({"drop": "a", "to": "b"}, "to is for a rule with from, not with drop"),
    ({"keep_model": "a", "optional": True}, "optional is for a rule with from"),
    ({"from": ""}, "is empty"),
    ({"from": "a", "to": ""}, "is empty"),
    ({"from": []}, "at least 1 item"),
    ({"from": "a..b"}, "has an empty segment"),
    ({"from": "a.*"}, r"has a \*, allowed in drop, keep_model and only"),
    ({"drop": "a.<i>"}, "has a capture, allowed in from and to"),
    ({"drop": "a.b**"}, "must be a segment of its own"),
    ({"from": "a.<i", "to": "b"}, "without its counterpart"),
    ({"from": "a.<i><j>", "to": "b.<i><j>"}, "without text between them"),
    ({"from": "a.<i>.<i>", "to": "b.<i>"}, "captures <i> twice"),
    ({"from": "a.x<r..>", "to": "b.<r>"}, "must be a segment of its own"),
    ({"from": "a.<1>", "to": "b.<1>"}, "is not the name of a capture"),
    ({"from": "a.<i>", "to": "b.<j>"}, "has <j>, which 'a.<i>' does not capture: <i>"),
    ({"from": "a.<i>", "to": "b"}, "needs <i>, or several names would become one"),
    ({"from": "a.", "to": "b"}, "both or neither need a trailing dot"),
    ({"from": ["a.<i>", "b.<j>"], "to": "c.<i>", "do": [{"concat": 0}]}, "has <j>, which 'a.<i>' does not capture"),
    ({"from": ["a", "b"], "to": "c"}, "several names in from need concat or stack"),
    ({"from": "a", "to": ["b", "c"]}, "several names in to need split or unstack"),
    ({"from": "a", "to": "b", "do": [{"split": 0}]}, "split needs several names in to"),
    ({"from": "a.", "to": ["b.", "c."], "do": [{"split": 0}]}, "a trailing dot matches many names"),
    ({"from": "a", "do": ["rotate"]}, "'rotate' is not a step; write transpose"),
    ({"from": "a", "do": [{"transpose": True}]}, "transpose takes no arguments"),
    ({"from": "a", "do": [{"split": 0, "concat": 0}]}, "one step has one key, this has 2"),
    ({"from": "a", "do": [{"rotate": 1}]}, "Extra inputs are not permitted"),
    ({"from": "a", "do": [{"cast": "float33"}]}, "is not a dtype; write for example float32"),
    ({"from": "a", "do": [{"interpolate": {"grid": [14, 14]}}]}, "Field required"),
    ({"from": "a", "do": [{"slice": {"start": -1}}]}, "greater than or equal to 0"),
    ({"from_regex": "(a", "to": "b"}, "is not a regular expression of RE2: missing"),
    ({"from_regex": r"(?=a)", "to": "b"}, "no backreferences and no look-around"),
    ({"from_regex": "layer\x08", "to": "b"}, "Use single quotes"),
    ({"from_regex": r"a(?P<i>\d)", "to": "b.<j>"}, "has <j>, which"),
    ({"from": "a", "too": "b"}, "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("rule", "message"), BAD)
def test_a_rule_that_means_nothing_is_refused_with_what_to_write(rule: dict[str, Any], message: str) -> None:
    """Before anything is read; the message says what is wrong with it."""
    with pytest.raises(pydantic.ValidationError, match=message):
        TransformConfig.model_validate(rule)


def test_errors_name_file_line_and_key(tmp_path: Path) -> None:
    """As every error of a config does."""
    (tmp_path / "init.yaml").write_text(
        "initializers:\n"
        "  - kind: file\n"
        "    path: a.pt\n"
        "    transforms:\n"
        "      - {from: a., to: b.}\n"
        "      - from: h.<i>.w\n"
        "        to: blocks.<j>.w\n"
    )
    with pytest.raises(ConfigError) as caught:
        InitializerStack.from_file(tmp_path / "init.yaml")
    assert "init.yaml:6" in str(caught.value)
    assert "initializers.0.transforms.1" in str(caught.value)
    assert "'blocks.<j>.w' has <j>, which 'h.<i>.w' does not capture: <i>" in str(caught.value)


def test_yaml_scalars_become_numbers_where_numbers_are_meant(tmp_path: Path) -> None:
    """``split: 0`` in a file is a dimension, though scalars stay texts until a field says otherwise."""
    (tmp_path / "init.yaml").write_text(
        "initializers:\n"
        "  - kind: file\n"
        "    path: a.pt\n"
        "    min_coverage: 0.9\n"
        "    transforms:\n"
        "      - {from: a.<l>, to: [b.<l>, c.<l>], do: [transpose, split: {dim: 1, sizes: [2, 4]}]}\n"
        "      - {from: p, do: [interpolate: {grid: [14, 14], to_grid: [16, 16], prefix_tokens: 1}]}\n"
        "      - drop: [x., '**.y']\n"
    )
    (initializer,) = InitializerStack.from_file(tmp_path / "init.yaml").initializers
    config: Any = initializer.config
    assert config.min_coverage == {"**": 0.9}
    first = rule_of(config.transforms[0], "here")
    assert isinstance(first, Rule)
    assert [repr(step) for step in first.steps] == ["Transpose()", "Split(dim=1, sizes=(2, 4))"]
    assert first.label == "here (a.<l> -> b.<l>, c.<l>)"
    assert load_config_file(tmp_path / "init.yaml").entries[0].where("transforms", 2) == "init.yaml:8 transforms.2"


def test_two_ways_to_say_the_same_are_refused() -> None:
    """Noether's fields work on substrings, one after the other; mixed with transforms nobody could tell the result."""
    config = {
        "kind": "previous_run",
        "run_id": "a",
        "transforms": [{"drop": "x"}],
        "patterns_to_instantiate": ["head."],
    }
    with pytest.raises(ConfigError, match="transforms and patterns_to_instantiate are two ways to say the same"):
        InitializerStack.from_config([config], path_provider={"output_root": "runs", "run_id": "b"})


@pytest.mark.parametrize(
    "step", ["split", "concat", "stack", "unstack", "reshape", "slice", "pad", "interpolate", "cast"]
)
@pytest.mark.parametrize("value", [None, True])
def test_a_step_without_its_value_is_refused(step: str, value: object) -> None:
    """A forgotten value must not become another step: a square matrix would load the other way round."""
    with pytest.raises(ValueError, match=f"{step} has no value; for example {step}: "):
        TransformConfig.model_validate({"from": ["a", "b"], "to": "c", "do": [{step: value}]})
