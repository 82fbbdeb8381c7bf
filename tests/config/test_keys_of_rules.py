"""What is said of a misspelt key in a rule or a step, and of a value that is no rule; what is advised is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.advice import executes
from support.following import refusal

from noether_init_core import InitializerStack, bind
from noether_init_core.errors import ConfigError
from noether_init_core.messages import yaml_line

RULE = "{from: a, to: b, "


@pytest.mark.parametrize(
    ("transforms", "key", "words"),
    [
        ("[{keep: x}]", "0.keep", "Near: keep_model."),
        ("[{regex: x}]", "0.regex", "Near: from_regex."),
        ("[{drops: x}]", "0.drops", "Near: drop."),
        ("[{match: x}]", "0.match", "a rule has: from, from_regex, to, do, optional, drop, keep_model, only."),
        (f"[{RULE}do: [{{interpolte: 1}}]}}]", "0.do.0.interpolte", "Near: interpolate."),
        (f"[{RULE}do: [{{iterpolate: 1}}]}}]", "0.do.0.iterpolate", "Near: interpolate."),
        (f"[{RULE}do: [{{from_rgex: 1}}]}}]", "0.do.0.from_rgex", "steps are: transpose, split, "),
        (f"[{RULE}do: [{{split: {{dim: 0, size: [1]}}}}]}}]", "0.do.0.split.size", "Near: sizes."),
        (f"[{RULE}do: [{{cast: {{keep_model: 1}}}}]}}]", "0.do.0.cast", "should be a valid string"),
    ],
)
def test_near_names_are_those_of_the_place(tmp_path: Path, transforms: str, key: str, words: str) -> None:
    """Of the rule, of the steps, or of the one step; a word of a name is near, and a far name is not offered."""
    config = tmp_path / "init.yaml"
    config.write_text(f"initializers:\n- kind: file\n  path: a.pt\n  transforms: {transforms}\n")
    with pytest.raises(ConfigError) as caught:
        InitializerStack.from_file(config)
    assert f"init.yaml:4 initializers.0.transforms.{key}: " in str(caught.value)
    assert words in str(caught.value)
    assert ("from_regex" in str(caught.value)) == ("from_regex" in words)


def loaded(path: Path, transforms: Any) -> torch.nn.Linear:
    """A layer that is loaded by rules."""
    module = torch.nn.Linear(3, 2)
    entry = {"kind": "file", "path": str(path), "transforms": transforms}
    InitializerStack.from_config([entry]).initialize(bind(module, "net"))
    return module


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights under another name, transposed, and something that no model has."""
    state = {"w": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(2), "more": torch.ones(1)}
    torch.save(state, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@executes("stack/config_files.py", "Next: do: [{}]")
@pytest.mark.parametrize("key", ["transpose", "transposed"])
def test_a_step_in_the_place_of_a_rule_goes_into_do(file: Path, key: str) -> None:
    """The line has the name of the step, and is written beside from."""
    rule, drop = {"from": "w", "to": "weight"}, {"drop": "more"}
    said = refusal(lambda: loaded(file, [{**rule, key: True}, drop]))
    line = said.rpartition("Next: ")[2]
    assert line == "do: [transpose]"
    module = loaded(file, [{**rule, **yaml.safe_load(line)}, drop])
    assert torch.equal(module.weight, torch.arange(6.0).reshape(3, 2).T)


@executes("config/source.py", "Next: - {}, or - {}")
@pytest.mark.parametrize("is_alone", [False, True])
def test_a_text_in_the_place_of_a_rule_is_written_as_one(file: Path, *, is_alone: bool) -> None:
    """As a move or as a drop, with the text as the name in the file; in a list, or in place of the list."""
    kept = {"keep_model": "weight"}
    lines = []
    for name in ("w", "more"):
        said = refusal(lambda: loaded(file, name if is_alone else [name, kept]))  # noqa: B023
        assert "pydantic" not in said
        assert "instance of" not in said
        lines.append(said.partition("Next: - ")[2].split(", or - "))
    (move, _), (_, drop) = lines
    rules = [yaml.safe_load(move.replace("'...'", "weight")), yaml.safe_load(drop)]
    assert rules == [{"from": "w", "to": "weight"}, {"drop": "more"}]
    module = loaded(file, [{**rules[0], "do": ["transpose"]}, rules[1]])
    assert torch.equal(module.weight, torch.arange(6.0).reshape(3, 2).T)


@pytest.mark.parametrize("value", [None, ["w"], "", 3])
def test_other_values_in_the_place_of_a_rule_are_told_what_a_rule_is(value: Any) -> None:
    """In our words, with the place and the value."""
    with pytest.raises(ConfigError) as caught:
        InitializerStack.from_config([{"kind": "file", "path": "a.pt", "transforms": [value]}])
    shown = yaml_line(value)
    assert f"initializers.0.transforms.0: {shown} is not a rule, which is a mapping with one of" in str(caught.value)


def test_one_rule_without_a_list_is_shown_as_a_list(file: Path) -> None:
    """For the rules, and for the steps of a rule."""
    rule = {"from": "w", "to": "weight"}
    for transforms, shown in (({"drop": "w"}, "[{drop: w}]"), ([{**rule, "do": {"split": 0}}], "[{split: 0}]")):
        with pytest.raises(ConfigError) as caught:
            loaded(file, transforms)
        assert str(caught.value).endswith(f"Input should be a valid list: {shown}")
