"""The JSON schema of whole config files: editors that follow it and the command agree on what is a config."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support.foreign import ForeignPackages
from support.pages import Block, blocks_of, pages

from noether_init_core.config.base import schema_of_files
from noether_init_core.stack.config_files import examine_config_file, examine_entry

PROGRAM = Path(sys.executable).with_name("ninit")


@pytest.fixture(scope="module")
def validator() -> Any:
    """What an editor makes of ``ninit schema --all``."""
    done = subprocess.run([PROGRAM, "schema", "--all"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def wrong(validator: Any, config: Any) -> list[str]:
    """What an editor would underline."""
    return [error.message for error in validator.iter_errors(config)]


def is_config(text: str, folder: Path) -> bool:
    """What the command says."""
    (folder / "init.yaml").write_text(text)
    loaded, found = examine_config_file(folder / "init.yaml")
    entries = filter(None, [*loaded.entries, loaded.resume])
    return not found and not any(examine_entry(entry)[1] for entry in entries)


def documented() -> list[Block]:
    """Every config in the documentation that is whole, and names installed kinds."""
    found = []
    for page in pages():
        for block in blocks_of(page.read_text()):
            is_ours = not any(words in block.text for words in ("kind: demo", "???"))
            value = yaml.safe_load(block.text) if block.language == "yaml" and is_ours else None
            if isinstance(value, dict) and {"initializers", "auto_resume"} & set(value):
                found.append(block)
    return found


def test_every_config_in_the_documentation_is_judged_as_the_command_judges_it(validator: Any, tmp_path: Path) -> None:
    """The right ones pass; of the wrong ones (misspelt kinds and keys) none does."""
    verdicts = [
        (not wrong(validator, yaml.safe_load(block.text)), is_config(block.text, tmp_path)) for block in documented()
    ]
    assert all(ours == theirs for ours, theirs in verdicts)
    assert {True, False} == {ours for ours, _theirs in verdicts}
    assert len(verdicts) >= 8


RULES = [
    "{from: a.<i>., to: b.<i>.}",
    "{from: [q.<x>, k.<x>], to: qk.<x>, do: [concat: 0]}",
    "{from: qkv.<x>, to: [q.<x>, k.<x>, v.<x>], do: [transpose, split: 0]}",
    "{from: w, to: [a, b], do: [split: {dim: 0, sizes: [1, 2]}]}",
    "{from_regex: 'layer(?P<i>[0-9]+)', to: blocks.<i>, optional: true}",
    "{from: w, do: [{reshape: [2, -1]}, {slice: {dim: 0, stop: 4}}, {pad: {size: 8}}, {cast: float32}]}",
    "{from: p, do: [interpolate: {grid: [14, 14], to_grid: [16, 16], prefix_tokens: 1}]}",
    "{keep_model: head.}",
    "{drop: [a., '**.b']}",
    "{only: encoder.}",
]


@pytest.mark.parametrize("rule", RULES)
def test_every_form_of_a_rule_passes(validator: Any, tmp_path: Path, rule: str) -> None:
    """Short forms too: one name without a list, transpose without a mapping."""
    text = f"initializers:\n  - kind: previous_run\n    run_id: a\n    transforms:\n      - {rule}\n"
    assert is_config(text, tmp_path)
    assert wrong(validator, yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "initializers:\n  - {kind: previous-run, run_id: a}\n",
        "initializers:\n  - {run_id: a}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, checkpont_tag: b}\n",
        "initializers:\n  - {kind: previous_run, run_id: [a]}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, verify: fully}\n",
        "initializers:\n  - {kind: file}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, transforms: [{keep_modle: head.}]}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, transforms: [{from: a, do: [transpos]}]}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, transforms: [{from: a, do: [{split: 0, concat: 0}]}]}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, transforms: [{from: a, do: [{pad: {}}]}]}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, transforms: [{from: a, drop: b}]}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, transforms: [{optional: true}]}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, min_coverage: 2}\n",
        "initializers: {kind: file}\n",
        "initialisers: []\n",
        "auto_resume: {run_id: other}\n",
        "auto_resume: perhaps\n",
        "initializers: []\non_invalid: previous\n",
        "auto_resume: true\non_invalid: maybe\n",
        "observers: [timing]\n",
    ],
)
def test_what_is_no_config_fails_on_both_sides(validator: Any, tmp_path: Path, text: str) -> None:
    """An editor underlines what the command would refuse."""
    assert not is_config(text, tmp_path)
    assert wrong(validator, yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "auto_resume: true\n",
        "auto_resume: {on_invalid: previous, verify: header}\n",
        "auto_resume: true\non_invalid: previous\nobservers: [timing, probe]\ninitializers: []\n",
        "initializers:\n  - {kind: resume, run_id: a, checkpoint_tag: {epoch: 4}}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, min_coverage: {encoder.: 0.9}}\n",
        "initializers:\n  - {kind: previous_run, run_id: a, min_coverage: 0.9}\n",
        "initializers:\n  - {kind: previous_run, run_id: 20260219, stage_name: true}\n",
    ],
)
def test_frames_that_are_configs_pass_on_both_sides(validator: Any, tmp_path: Path, text: str) -> None:
    """Everything that stands around the list."""
    assert is_config(text, tmp_path)
    assert wrong(validator, yaml.safe_load(text)) == []


def test_two_kinds_with_definitions_of_one_name_do_not_meet() -> None:
    """Each kind refers to its own."""
    step = {"type": "object", "required": ["size"]}
    schemas = {
        name: {
            "type": "object",
            "properties": {"kind": {"type": "string"}, "step": {"$ref": "#/$defs/Step"}},
            "$defs": {"Step": {**step, "properties": {"size": {"type": of}}}},
        }
        for name, of in (("a/b", "string"), ("c", "integer"))
    }
    validator = jsonschema.Draft202012Validator(schema_of_files(schemas, ["timing"]))
    assert (
        wrong(validator, {"initializers": [{"kind": "a/b", "step": {"size": "x"}}, {"kind": "c", "step": {"size": 1}}]})
        == []
    )
    assert wrong(validator, {"initializers": [{"kind": "a/b", "step": {"size": [1]}}]})
    assert wrong(validator, {"initializers": [{"kind": "c", "step": {"size": "x"}}]})


def test_a_kind_that_cannot_be_used_is_left_out_and_named(
    foreign: ForeignPackages, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One broken distribution costs nobody the completion of the others."""
    from noether_init_core import cli

    foreign.install("acme-broken", offers={"broken": "acme_broken:Kind"}, modules={"acme_broken": "1 / 0"})
    monkeypatch.setattr(sys, "argv", ["ninit", "schema", "--all"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert "- broken was left out" in printed.err
    kinds = json.loads(printed.out)["properties"]["initializers"]["items"]["properties"]["kind"]["enum"]
    assert "broken" not in kinds
    assert "file" in kinds


@pytest.mark.parametrize(("arguments", "said"), [([], "no KIND was given"), (["file", "--all"], "were both given")])
def test_one_of_kind_and_all_is_needed(arguments: list[str], said: str) -> None:
    """The next command is named."""
    done = subprocess.run([PROGRAM, "schema", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
