"""Names that others chose (keys, files, texts in metadata) cannot act on a terminal or look like lines of ours."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import yaml

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind, cli

#: A line feed, an escape sequence, a bell, a mark that turns the direction of text, a carriage return, YAML.
NAMES = (
    "a\nx forged line",
    "b\x1b[2Jgone",
    "c\x07bell",
    "d\u202eturned",
    "e\rx forged line",
    'f"quoted',
    "g'quoted",
    "h #comment",
    "i: value",
    "j\u2028x forged line",
    "k\x00null",
    "l\ud800alone",
    "m\u2066isolated\u2069",
    "n\x9b2J",
    "o" * 300,
)
MODELS = f"""
import torch
from noether_init_core import bind

NAMES = {NAMES!r}


def network(names):
    module = torch.nn.Module()
    for name in names:
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
    return bind(module, name="net")


def same():
    return network(NAMES)


def other():
    return network([name + "2" for name in NAMES])
"""


@attrs.frozen
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Call the console script's function, in a folder with models and files of hostile names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "hostile_models", raising=False)
    Path("hostile_models.py").write_text(MODELS, "utf-8")
    torch.save({name: torch.ones(2) for name in NAMES}, "same.pt")
    torch.save({name: torch.full((2,), 3.0) for name in NAMES[:5]}, "other.pt")
    Path("init.yaml").write_text("initializers:\n  - {kind: file, path: same.pt}\n")

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["ninit", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        result = Result(int(ended.value.code or 0), captured.out, captured.err)
        for text in (result.out, result.err):
            lines = text.split("\n")
            assert [line for line in lines if not line.isprintable()] == []
            assert [line for line in lines if line.lstrip(" x").startswith("forged")] == []
        return result

    return call


def spelt(name: str) -> str:
    """A name as it is shown: what a terminal would act on is an escape."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


@pytest.mark.parametrize("more", [(), ("--all",)])
def test_inspect_spells_them_out(invoke: Invoke, more: tuple[str, ...]) -> None:
    """In the table of a file; its JSON has them exactly."""
    shown = invoke("inspect", "same.pt", *more)
    assert shown.code == 0
    if more:
        assert [line.partition("  ")[0][:60] for line in shown.out.splitlines()[1 : len(NAMES) + 1]] == [
            spelt(name)[:60] for name in NAMES
        ]
    data = json.loads(invoke("inspect", "same.pt", "--json").out)
    assert [one["key"] for one in data["keys"]] == list(NAMES)


def test_inspect_spells_out_what_a_file_says(invoke: Invoke) -> None:
    """Run, iteration and names of callbacks of a trainer file; the path itself."""
    metadata = {"run_id": NAMES[0], "training_iteration": {NAMES[1]: NAMES[4]}, "callback_state_dicts": {NAMES[9]: {}}}
    torch.save({"state_dict": {"w": torch.ones(1)}, **metadata, NAMES[2]: 1}, "a\nx forged line.pt")
    shown = invoke("inspect", "a\nx forged line.pt")
    assert "run: a\\nx forged line" in shown.out.splitlines()
    assert "callbacks: j\\u2028x forged line" in shown.out.splitlines()


def test_diff_spells_them_out(invoke: Invoke) -> None:
    """In folded lines, in those that moved most, line by line; JSON has them exactly."""
    for more in ((), ("--all",)):
        shown = invoke("diff", "same.pt", "other.pt", *more)
        assert shown.code == 1
    assert sum(spelt(name)[:60] in shown.out for name in NAMES) == len(NAMES)
    data = json.loads(invoke("diff", "same.pt", "other.pt", "--json").out)
    assert [row["key"] for row in data["rows"]] == list(NAMES)


@pytest.mark.parametrize("model", ["same", "other"])
def test_plan_spells_them_out(invoke: Invoke, model: str) -> None:
    """In lines and in what is wrong with them; JSON has them exactly."""
    shown = invoke("plan", "init.yaml", "--model", f"hostile_models:{model}", "--all")
    assert shown.code == int(model == "other")
    assert "b\\x1b[2Jgone" in shown.out
    data = json.loads(invoke("plan", "init.yaml", "--model", f"hostile_models:{model}", "--json", "-").out)
    targets = [row["target"] for row in data["rows"] if row["target"] is not None]
    assert sorted(targets) == sorted(name + ("2" if model == "other" else "") for name in NAMES)


def test_what_suggest_prints_is_the_yaml_that_was_meant(invoke: Invoke) -> None:
    """Read back it names the keys, and nothing in them is a comment, a mapping or another line."""
    shown = invoke("suggest", "init.yaml", "--model", "hostile_models:other")
    suggested: Any = yaml.safe_load(shown.out.partition("\ncoverage")[0])
    data = json.loads(invoke("suggest", "init.yaml", "--model", "hostile_models:other", "--json").out)
    (expected,) = [one["config"] for one in data["suggestions"]]
    assert suggested == expected
    assert expected


def test_verify_spells_out_paths_and_keys(invoke: Invoke) -> None:
    """Of files that are fine, absent or damaged."""
    name = "a\nx forged line\x1b[2J.pt"
    Path("same.pt").rename(name)
    assert "= good a\\nx forged line\\x1b[2J.pt" in invoke("verify", name).out
    content = bytearray(Path(name).read_bytes())
    content[content.index(b"\x00\x00\x80\x3f")] ^= 1
    Path(name).write_bytes(content)
    assert invoke("verify", name).code == 1
    assert invoke("verify", "b\nx forged line").code == 1


def test_lineage_spells_out_what_was_recorded(invoke: Invoke) -> None:
    """A run that was started from a file of such a name."""
    name = "a\nx forged line\x1b[2J.pt"
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, name)
    model, paths = bind(torch.nn.Linear(2, 2), name="net"), PathProvider("runs", "warm")
    stack = InitializerStack.from_config([{"kind": "file", "path": str(Path(name).resolve())}])
    CheckpointWriter(paths, report=stack.initialize(model)).save(model, TrainingIteration(1, 1, 1))
    shown = invoke("lineage", "runs/warm")
    assert shown.code == 0
    assert "a\\nx forged line\\x1b[2J.pt" in shown.out
    assert name in invoke("lineage", "runs/warm", "--json").out.encode().decode("unicode_escape")


def test_apply_spells_them_out_and_writes_them_exactly(invoke: Invoke) -> None:
    """Report and file to start from; an out of such a name is a path in quotes."""
    done = invoke("apply", "init.yaml", "--model", "hostile_models:same", "--out", "a: #b\x1b.pt")
    assert done.code == 0
    line = next(line for line in done.out.splitlines() if line.startswith("  - {"))
    assert yaml.safe_load(line)[0]["path"] == "a: #b\x1b.pt"
    assert list(torch.load("a: #b\x1b.pt", weights_only=True)) == list(NAMES)


def test_validate_and_usage_spell_out_what_was_typed(invoke: Invoke) -> None:
    """A kind, a key, a path and an option."""
    Path("wrong.yaml").write_text('initializers:\n  - {kind: "a\\nx forged line", "b\\e[2J": 1}\n')
    assert invoke("validate", "wrong.yaml").code == 1
    for arguments in (
        ("inspect", "n\nx forged line"),
        ("schema", "k\x1b\nx forged line"),
        ("validate", "c\nx forged line"),
    ):
        assert invoke(*arguments).code in (1, 2)
