"""Advice keeps what was typed, and what is decided without a question is said."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.advice import fixes_of, pasted
from support.command import Invoke, Result, console

from noether_init_core import CheckpointWriter, PathProvider, TrainerState, bind

TRAIN = "import torch\n\n\ndef build():\n    return torch.nn.Linear(3, 2)\n"


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Invoke]:
    """The console script in a folder with a config, two modules and a run."""
    with console(tmp_path, monkeypatch, capsys, columns=200, advice_train=TRAIN, advice_other="") as call:
        Path("init.yaml").write_text("auto_resume: true\ninitializers: []\n")
        model = bind(torch.nn.Linear(3, 2), name="model")
        state = TrainerState(seed=0)
        CheckpointWriter(PathProvider("runs", "finetune")).save(model, trainer=state)
        CheckpointWriter(PathProvider("runs", "staged", "train")).save(model, trainer=state)
        yield call


@pytest.mark.parametrize(
    ("typed", "following"),
    [
        ("plan init.yaml --run-id a", "plan init.yaml --model advice_train:build --run-id a"),
        ("plan --model advice_other:make", "plan init.yaml --model advice_other:make"),
        ("plan init.yaml --modle x:y --all", "plan init.yaml --model x:y --all"),
        ("plan init.yaml --model=x:y --run-id a", "plan init.yaml --model x:y --runs FOLDER --run-id a"),
        (
            "apply init.yaml --seed 3 --force --model x:y --runs 'a b'",
            "apply init.yaml --model x:y --out start.safetensors --runs 'a b' --seed 3 --force",
        ),
        ("apply init.yaml --seed x --model x:y --out a.pt", "apply init.yaml --model x:y --out a.pt"),
        ("diff a b --html", None),
    ],
)
def test_advice_after_a_wrong_line_is_that_line_mended(invoke: Invoke, typed: str, following: str | None) -> None:
    """What was typed stays; what is missing or wrong is as in the example, or the kind of value that is expected."""
    result = invoke(*shlex.split(typed))
    assert result.code == 2
    said = result.err.splitlines()[-1].split("Next: ")[1]
    assert said == (f"ninit {following}" if following else "--html VALUE, or --help after the command")


def test_a_name_that_is_nearly_right_is_advised(invoke: Invoke) -> None:
    """Of the module that was typed."""
    result = invoke("plan", "init.yaml", "--model", "advice_train:biuld", "--runs", "runs")
    assert result.code == 2
    assert "'biuld' not found in advice_train. Near: build. Next: --model advice_train:build" in result.err


@pytest.mark.parametrize(
    "typed",
    [
        ("plan", "init.yaml", "--model", "advice_train:build", "--model=advice_train:build"),
        ("plan", "init.yaml", "--model", "advice_train:build", "--runs", "runs", "--runs", "others"),
        ("apply", "init.yaml", "--model", "advice_train:build", "--out", "a.pt", "--seed", "1", "--seed", "2"),
    ],
)
def test_an_option_with_one_value_is_given_once(invoke: Invoke, typed: tuple[str, ...]) -> None:
    """Neither of two wins without a word."""
    result = invoke(*typed)
    assert (result.code, result.out) == (2, "")
    assert "was given 2 times, and takes one value. Next: remove all but one" in result.err


def test_an_option_with_several_values_and_a_flag_may_be_repeated(invoke: Invoke) -> None:
    """They say the same twice, or more."""
    result = invoke("lineage", "runs/finetune", "--root", "runs", "--root", "runs", "--json", "--json")
    assert result.code == 0, result.err


def plan(invoke: Invoke, run_id: str, *more: str) -> Result:
    return invoke("plan", "init.yaml", "--model", "advice_train:build", "--runs", "runs", "--run-id", run_id, *more)


def test_plan_says_what_auto_resume_decided(invoke: Invoke) -> None:
    """A run id that is misspelt is no first start without a word; near ones, and stages, are named."""
    fresh = "has no checkpoints, the initializers of the config apply"
    misspelt = plan(invoke, "fintune")
    assert misspelt.code == 0
    assert misspelt.err == f"auto_resume: fintune {fresh}. Near: finetune\n"
    assert plan(invoke, "another-one").err == f"auto_resume: another-one {fresh}\n"
    assert plan(invoke, "staged").err == (
        f"auto_resume: staged {fresh}. Stages with checkpoints: train. Next: --stage-name train\n"
    )
    assert plan(invoke, "staged", "--stage-name", "train").err == "auto_resume: resumed from E0_U0_S0\n"
    resumed = plan(invoke, "finetune", "--json", "-")
    assert resumed.err == "auto_resume: resumed from E0_U0_S0\n"
    assert resumed.out.startswith("{")


WIDER = "import torch\n\n\ndef build():\n    return torch.nn.ModuleDict(CONTENT)\n"


def test_a_fix_below_auto_resume_is_a_line_that_works_there(invoke: Invoke, tmp_path: Path) -> None:
    """The fix is the whole line, since there is no list to put a rule into."""
    Path("advice_train.py").write_text(
        WIDER.replace("CONTENT", '{"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 3)}')
    )
    state, model = (
        TrainerState(seed=0),
        bind(torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2)}), "model"),
    )
    CheckpointWriter(PathProvider("runs", "wider")).save(model, trainer=state)
    refused = plan(invoke, "wider")
    assert refused.code == 1
    fix = next(line.split("fix: ")[1] for line in refused.out.splitlines() if "fix: " in line)
    assert fix == "auto_resume: {transforms: [{keep_model: b.}]}  # only until the next save"
    (tmp_path / "init.yaml").write_text(f"{fix}\ninitializers: []\n")
    mended = plan(invoke, "wider")
    assert mended.code == 0, mended.out
    # after the next save, as the comment says: with the line, what was trained since would be left out
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 3)})
    state.advance(samples=1)
    CheckpointWriter(PathProvider("runs", "wider")).save(bind(layers, "model"), trainer=state)
    assert "o keep     b.*" in plan(invoke, "wider").out
    (tmp_path / "init.yaml").write_text("auto_resume: true\ninitializers: []\n")
    later = plan(invoke, "wider")
    assert later.code == 0, later.out
    assert "keep" not in later.out


def test_a_kept_head_of_a_resume_is_for_one_start(invoke: Invoke, tmp_path: Path) -> None:
    """An entry of kind resume applies at each start of its run, so that it may keep what is fresh only once."""
    Path("advice_train.py").write_text(
        WIDER.replace("CONTENT", '{"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 3)}')
    )
    state = TrainerState(seed=0)
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2)})
    CheckpointWriter(PathProvider("runs", "wider")).save(bind(layers, "model"), trainer=state)
    config = tmp_path / "init.yaml"
    config.write_text("initializers:\n  - {kind: resume, load_optim: false}\n")
    refused = plan(invoke, "wider")
    (fix,) = fixes_of(refused.out)
    line = "transforms: [{keep_model: b.}]  # only until the next save, in initializers.0, init.yaml:2"
    assert fix == line
    before = config.read_text()
    pasted(config, fix)
    assert plan(invoke, "wider").code == 0
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 3)})
    state.advance(samples=1)
    CheckpointWriter(PathProvider("runs", "wider")).save(bind(layers, "model"), trainer=state)
    assert "o keep     b.*" in plan(invoke, "wider").out
    config.write_text(before)
    later = plan(invoke, "wider")
    assert later.code == 0, later.out
    assert "keep" not in later.out
    # another run is the origin of one start only, after which its own sets are resumed
    config.write_text("initializers:\n  - {kind: resume, load_optim: false, run_id: wider, checkpoint_tag: E0_U0_S0}\n")
    (fix,) = fixes_of(plan(invoke, "other").out)
    assert fix == "transforms: [{keep_model: b.}]  # in initializers.0, init.yaml:2"


@pytest.mark.parametrize("built", ["{'left': LINEAR, 'right': LINEAR}", "(LINEAR, LINEAR)", "[LINEAR]"])
def test_several_models_are_a_composite(invoke: Invoke, tmp_path: Path, built: str) -> None:
    """How to make one is said; for other things it is not."""
    text = TRAIN.replace("torch.nn.Linear(3, 2)", built.replace("LINEAR", "torch.nn.Linear(3, 2)"))
    (tmp_path / "advice_train.py").write_text(text)
    (tmp_path / "init.yaml").write_text("initializers: []\n")
    refused = invoke("plan", "init.yaml", "--model", "advice_train:build")
    assert refused.code == 2
    key = "left" if "left" in built else "first"
    assert f'Next: return compose("name", {{"{key}": bind(...), ...}})' in refused.err


def test_a_kind_that_is_written_and_not_installed_is_found_beside(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after it was made, from both folders; a kind of nobody is as before."""
    assert invoke("new", "advised").code == 0
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "pyproject.toml").write_text("[project\n")
    for arguments in (("check", "advised"), ("schema", "advised"), ("example", "advised")):
        refused = invoke(*arguments)
        assert refused.code == 1
        assert "advised/pyproject.toml declares it, and that project is not installed." in refused.err
        assert "Next: python -m pip install './advised[test]'\n" in refused.err
    assert "pyproject.toml" not in invoke("check", "another").err
    monkeypatch.chdir(tmp_path / "advised")
    assert "Next: python -m pip install '.[test]'\n" in invoke("check", "advised").err


def test_a_page_is_advised_only_where_it_can_be_written(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the distribution of pages the command that example says to type works, too."""
    assert "--html plan.html" in invoke("example", "previous_run", "--print").out
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "noether_init_pages" else find_spec(name, *more),
    )
    shown = invoke("example", "previous_run", "--print").out
    assert "--run-id finetune\n" in shown
    assert "--html" not in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auto_resume: true\n", "auto_resume resumes this run from its own checkpoints"),
        ("initializers: [{kind: resume}]\n", "resume needs --runs FOLDER --run-id ID, or output_path and run_id"),
    ],
)
def test_a_missing_output_root_is_said_in_options(invoke: Invoke, tmp_path: Path, text: str, message: str) -> None:
    """Nobody at a shell can give a path_provider."""
    (tmp_path / "init.yaml").write_text(text)
    result = invoke("plan", "init.yaml", "--model", "advice_train:build")
    assert result.code == 1
    assert message in result.err
    assert "PathProvider" not in result.err
    assert "Next: --runs FOLDER --run-id ID" in result.err


def test_an_output_root_that_is_not_there_is_said_in_options(invoke: Invoke, tmp_path: Path) -> None:
    """The message of the kind speaks to programs, too."""
    (tmp_path / "init.yaml").write_text("initializers: [{kind: previous_run, run_id: finetune}]\n")
    result = invoke("plan", "init.yaml", "--model", "advice_train:build", "--runs", "rnus")
    assert result.code == 1
    assert " to the folder of the runs, or use --runs FOLDER\n" in result.err
    assert "PathProvider" not in result.err
