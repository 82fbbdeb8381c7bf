"""``ninit suggest``: what it prints can be pasted, and then the plan has no problem."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from noether_init_core import cli

MODELS = """
import torch


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)
        self.q, self.k, self.v = (torch.nn.Linear(4, 4) for _ in range(3))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(4, 3)
"""

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """The console script in a folder with a module and a file whose names are others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "suggest_models.py").write_text(MODELS)
    state: dict[str, torch.Tensor] = {"classifier.weight": torch.randn(10, 4), "classifier.bias": torch.randn(10)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        state |= {f"{prefix}.ln.weight": torch.ones(4), f"{prefix}.ln.bias": torch.zeros(4)}
        state |= {f"{prefix}.attn.qkv.weight": torch.randn(12, 4), f"{prefix}.attn.qkv.bias": torch.randn(12)}
    torch.save(state, tmp_path / "a.pt")
    (tmp_path / "init.yaml").write_text("initializers:\n  - kind: file\n    path: a.pt\n")

    def run(*arguments: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ninit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int | None)
        return ended.value.code or 0, capsys.readouterr().out

    yield run
    sys.modules.pop("suggest_models", None)


def test_what_is_suggested_can_be_pasted_as_it_is(call: Call, tmp_path: Path) -> None:
    """The plan fails and names the command; with its output in the config the plan is fine."""
    arguments = ("init.yaml", "--model", "suggest_models:Net")
    code, out = call("plan", *arguments)
    assert code == 1
    assert "ninit suggest" in out
    code, out = call("suggest", *arguments)
    assert out.startswith("# for initializers.0, init.yaml:2, model\n")
    pasted = "\n".join(f"    {line}" for line in out.splitlines())
    config = (tmp_path / "init.yaml").read_text() + pasted + "\n"
    assert yaml.safe_load(config)["initializers"][0]["transforms"]
    (tmp_path / "init.yaml").write_text(config)
    code, out = call("plan", *arguments)
    assert code == 0
    assert "coverage 90.1 %" in out


def test_where_no_rule_is_found_it_says_what_to_write_by_hand(call: Call, tmp_path: Path) -> None:
    """Names and shapes that say nothing: the output is no advice to run the same command, and is YAML as it stands."""
    torch.save({f"zz{n}.weight": torch.zeros(n + 20) for n in range(4)}, tmp_path / "a.pt")
    arguments = ("init.yaml", "--model", "suggest_models:Net")
    code, out = call("suggest", *arguments)
    assert code == 1
    assert "no rule was found" in out
    assert "#   - {from: zz0.weight, to: blocks.0.norm.weight}\n" in out
    assert "no rule is needed" not in out
    assert "ninit suggest" not in out
    assert yaml.safe_load(out) == {"transforms": [{"keep_model": "head."}]}


def test_a_config_that_fits_needs_no_rule(call: Call, tmp_path: Path) -> None:
    """That is said only where every element is loaded."""
    torch.save({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, tmp_path / "a.pt")
    (tmp_path / "suggest_models.py").write_text("import torch\n\n\ndef Net():\n    return torch.nn.Linear(4, 3)\n")
    code, out = call("suggest", "init.yaml", "--model", "suggest_models:Net")
    assert (code, out) == (
        0,
        "# for initializers.0, init.yaml:2, model\n# no rule is needed\n# coverage 100.0 %, no problem\n",
    )


def test_json_is_for_programs(call: Call) -> None:
    """The same rules, with what is unsure and what stays unmatched."""
    code, out = call("suggest", "init.yaml", "--model", "suggest_models:Net", "--json")
    (found,) = json.loads(out)["suggestions"]
    assert (found["initializer"], found["model"], found["is_fine"]) == (0, "model", True)
    assert code == (0 if found["is_sure"] else 1)
    assert {"keep_model": "head."} in found["config"]["transforms"]


def test_a_config_without_files_has_nothing_to_suggest(call: Call, tmp_path: Path) -> None:
    """And that is fine."""
    (tmp_path / "init.yaml").write_text("initializers: []\n")
    assert call("suggest", "init.yaml", "--model", "suggest_models:Net") == (
        0,
        "# nothing to suggest: no initializer of the config loads weights\n",
    )
