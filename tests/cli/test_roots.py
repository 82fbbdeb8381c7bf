"""Files whose weights lie below an entry: ``plan`` and ``suggest`` name the line that selects it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.advice import executes, fixes_of, pasted
from support.command import Result, run_command

MODEL = ("--model", "roots_model:build")
Invoke = Callable[..., Result]


class Net(torch.nn.Module):
    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.stem, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, classes)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))


STATE = Net().state_dict()
WRAPPED = {f"module.{name}": tensor for name, tensor in STATE.items()}
_NETWORK = Net()
_OPTIMIZER = torch.optim.AdamW(_NETWORK.parameters())
for _parameter in _NETWORK.parameters():
    _parameter.grad = torch.ones_like(_parameter)
_OPTIMIZER.step()
BESIDE = {"optimizer": _OPTIMIZER.state_dict(), "epoch": 3}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module of a model, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "900")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "roots_net", sys.modules[__name__])
    Path("roots_model.py").write_text(
        "from roots_net import Net\nfrom noether_init_core import bind\n\n\n"
        "def build():\n    return bind(Net(), name='net')\n"
    )
    return tmp_path


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """The console script."""
    return lambda *arguments: run_command(monkeypatch, capsys, *arguments)


def plan(invoke: Invoke) -> Result:
    """The plan as a table; its messages as they are, with their marks, are in the JSON."""
    invoke("plan", "init.yaml", *MODEL, "--json", "-")
    return invoke("plan", "init.yaml", *MODEL)


def config(here: Path, content: Any, **fields: Any) -> Path:
    torch.save(content, "w.pt")
    path = here / "init.yaml"
    path.write_text(yaml.safe_dump({"initializers": [{"kind": "file", "path": "w.pt", **fields}]}))
    return path


@executes("surgery/roots.py", "Next: {}")
@pytest.mark.parametrize(
    ("content", "line"),
    [
        *(
            ({name: STATE, **BESIDE}, f"source_root: {name}")
            for name in ("model", "model_state_dict", "net", "params_ema", "teacher")
        ),
        ({"model": STATE, "ema": STATE, **BESIDE}, "source_root: model  # or ema,"),
        ({"ema": WRAPPED, "model": WRAPPED, **BESIDE}, "source_root: model  # or ema,"),
        ({"model": WRAPPED, "model_ema": STATE}, "source_root: model  # or model_ema,"),
        ({"weights": {f"net.{name}": one for name, one in STATE.items()}, "ema": STATE}, "source_root: weights.net  #"),
        ({f"module.{part}.{name}": one for part in "ab" for name, one in STATE.items()}, "source_root: a  # or b,"),
    ],
)
def test_the_entry_that_fits_is_the_fix(invoke: Invoke, here: Path, content: Any, line: str) -> None:
    """It is the first fix of the plan and what suggest drafts; pasted, everything is loaded."""
    path = config(here, content)
    refused = plan(invoke)
    assert refused.code == 1
    first = fixes_of(refused.out)[0]
    assert first.startswith(line)
    suggested = invoke("suggest", "init.yaml", *MODEL)
    assert yaml.safe_load(suggested.out) == {"source_root": first.split()[1]}
    roots = re.findall(r"or ([\w.]+),", first)
    assert suggested.code == bool(roots)
    for root in roots:
        assert f"below {root}" in refused.out
        assert f"or: source_root: {root}" in suggested.out
    averages = [root for root in (first.split()[1], *roots) if "ema" in root]
    assert [f"({root}: an average of weights, by the name)" for root in averages if root not in refused.out] == []
    pasted(path, first)
    mended = plan(invoke)
    assert mended.code == 0, mended.out
    assert "coverage 100 %" in mended.out or "10 of 10 keys loaded" in mended.out
    assert invoke("suggest", "init.yaml", *MODEL).code == 0


@executes("surgery/roots.py", "Next: {}")
@pytest.mark.parametrize("asked", ["modle", "model.x", "modle.", "state_dict_ema"])
def test_a_wrong_root_is_replaced_by_one_of_the_file(invoke: Invoke, here: Path, asked: str) -> None:
    """All roots of the file are named, and nothing advises to keep the values of the model."""
    path = config(here, {"ema": STATE, "model": STATE, **BESIDE}, source_root=asked)
    refused = plan(invoke)
    assert refused.code == 1
    assert f"source_root: {asked.rstrip('.')}: no name of the file begins with it. The file has " in refused.out
    for has in ("model (10 entries)", "ema (10 entries)", "optimizer (30 entries)"):
        assert has in refused.out
    assert "keep_model" not in refused.out
    (fix,) = fixes_of(refused.out)
    assert fix.startswith("source_root: model  # or ema,")
    assert yaml.safe_load(invoke("suggest", "init.yaml", *MODEL).out) == {"source_root": "model"}
    pasted(path, fix)
    assert plan(invoke).code == 0


@executes("surgery/roots.py", "Next: {}")
def test_a_wrong_root_above_rules_gets_the_near_one(invoke: Invoke, here: Path) -> None:
    """The names differ, so that only the spelling shows which root is meant."""
    renamed = {f"net.layer.{name}": tensor for name, tensor in STATE.items()}
    rules = [{"from": "layer.<rest..>", "to": "<rest..>"}]
    path = config(here, {"weights": renamed, **BESIDE}, source_root="weight.net", transforms=rules)
    refused = plan(invoke)
    fixes = fixes_of(refused.out)
    assert any(fix.startswith("source_root: weights.net") for fix in fixes)
    pasted(path, next(fix for fix in fixes if fix.startswith("source_root: ")))
    assert plan(invoke).code == 0


@executes("surgery/roots.py", "Next: remove source_root: {}")
def test_a_root_that_is_not_needed_is_removed(invoke: Invoke, here: Path) -> None:
    """The state dict of a file is read without naming it."""
    path = config(here, {"state_dict": STATE}, source_root="state_dict")
    refused = plan(invoke)
    assert fixes_of(refused.out) == ["remove source_root: state_dict"]
    document = yaml.safe_load(path.read_text())
    del document["initializers"][0]["source_root"]
    path.write_text(yaml.safe_dump(document))
    assert plan(invoke).code == 0


def test_an_entry_beside_the_state_dict_is_not_replaced_by_another(invoke: Invoke, here: Path) -> None:
    """It cannot be selected; the weights of the state dict are others, and are not offered in its place."""
    config(here, {"state_dict": STATE, "state_dict_ema": STATE}, source_root="state_dict_ema.")
    refused = plan(invoke)
    assert refused.code == 1
    assert "state_dict_ema lies beside the state dict of the file, and a config cannot select it yet" in refused.out
    assert not fixes_of(refused.out)
    suggested = invoke("suggest", "init.yaml", *MODEL)
    assert suggested.code == 1
    assert yaml.safe_load(suggested.out) is None
    assert "a config cannot select it yet" in suggested.out


def test_a_plan_that_loads_nothing_names_the_root(invoke: Invoke, here: Path) -> None:
    """Also where policies leave no single problem."""
    path = config(here, {"model": STATE, **BESIDE}, on_missing="keep", on_unexpected="ignore")
    refused = plan(invoke)
    (fix,) = fixes_of(refused.out)
    assert fix.startswith("source_root: model")
    pasted(path, fix)
    assert plan(invoke).code == 0


def test_a_fix_has_the_names_that_rules_see(invoke: Invoke, here: Path) -> None:
    """Rules do not see the prefixes of wrappers, so that no line of a plan has them."""
    renamed = {f"module.old.{name}": tensor for name, tensor in STATE.items() if "head" not in name}
    path = config(here, {"model": renamed, "more": {"module.x": torch.ones(3)}})
    for _ in range(4):
        planned = plan(invoke)
        if planned.code == 0:
            break
        fix = fixes_of(planned.out)[0]
        assert "module" not in fix
        pasted(path, fix)
    assert planned.code == 0, planned.out


def test_a_root_with_other_names_below_it_is_tried(invoke: Invoke, here: Path) -> None:
    """The draft has the root of the weights, whatever the optimizer has of the same shapes."""
    renamed = {name.replace("blocks.", "layers."): tensor for name, tensor in STATE.items()}
    config(here, {"net": renamed, "ema": renamed, **BESIDE})
    suggested = invoke("suggest", "init.yaml", *MODEL)
    document = yaml.safe_load(suggested.out)
    assert document["source_root"] == "net"
    assert document["transforms"] == [{"from": "layers.", "to": "blocks."}]
    assert "or: source_root: ema" in suggested.out
