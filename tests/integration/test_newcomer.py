"""From an empty folder to a resumed run and the page of a plan, with nothing but what the command itself says.

On the way are the wrong turns that people take. Each is answered by what to type next, costs nothing, and changes no
file.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("ninit")
ONE_SPACE = re.compile(r"[\s│╭╮╰╯─]+")

#: (what is typed, exit code, what the answer must hold: the next command last)
WRONG_TURNS = [
    # the command itself
    ("ninit run", 2, ["No such command 'run'", "Next: ninit --help"]),
    ("ninit exmaple previous_run", 2, ["Did you mean 'example'?", "Next: ninit example --help"]),
    ("ninit --json kinds", 2, ["the option comes after the command", "Next: ninit kinds --help"]),
    (
        "ninit plan init.yaml --model train:build --json",
        2,
        ["requires an argument", "Next: --json FILE, or --json -"],
    ),
    (
        "ninit plan init.yaml --model train:build --runs",
        2,
        ["requires an argument", "Next: --runs VALUE"],
    ),
    ("ninit --jsn", 2, ["No such option: --jsn", "Next: ninit --help"]),
    (
        "ninit plan init.yaml --modle train:build",
        2,
        ["No such option: --modle", "--model", "Next: ninit plan init.yaml --model train:build"],
    ),
    # a kind
    ("ninit example", 2, ["Installed kinds: file, previous_run,", "Next: ninit kinds"]),
    ("ninit example previous-run", 1, ["Near: previous_run (noether-init-core", "Next: ninit kinds"]),
    ("ninit example previous_run", 1, ["init.yaml exist; nothing was written", "ninit example previous_run"]),
    ("ninit schema previus_run", 1, ["Near: previous_run (noether-init-core", "Next: ninit kinds"]),
    # a config
    (
        "ninit plan",
        2,
        ["Configs in this folder: init.yaml", "Next: ninit plan init.yaml --model train:build"],
    ),
    (
        "ninit plan init.yml --model train:build",
        2,
        ["init.yml: does not exist", "Next: ninit validate init.yaml"],
    ),
    ("ninit plan runs --model train:build", 2, ["runs: is a folder; a config is a YAML file"]),
    (
        "ninit plan {weights} --model train:build",
        2,
        ["is not text, and a config is a YAML file", "ninit inspect"],
    ),
    ("ninit validate kind.yaml", 1, ["kind.yaml:4 initializers.0.kind", "Next: ninit kinds"]),
    (
        "ninit validate key.yaml",
        1,
        ["key.yaml:6", "Near: checkpoint_tag", "Next: ninit schema previous_run"],
    ),
    (
        "ninit validate rule.yaml",
        1,
        ["rule.yaml:8", "Near: keep_model", "Next: ninit schema previous_run"],
    ),
    ("ninit validate tab.yaml", 1, ["tab.yaml:2", "indent with spaces; YAML allows no tabs"]),
    # a model
    (
        "ninit plan init.yaml",
        2,
        ["Missing option '--model'", "ninit plan init.yaml --model train:build"],
    ),
    (
        "ninit plan init.yaml --model train {run}",
        2,
        ["is not module:callable", "Next: --model train:build"],
    ),
    ("ninit plan init.yaml --model trian:build {run}", 2, ["module 'trian' not found", "train"]),
    ("ninit plan init.yaml --model train:bild {run}", 2, ["'bild' not found in train", "build"]),
    # runs
    ("ninit plan init.yaml --model train:build", 1, ["Next: --runs FOLDER --run-id ID"]),
    (
        "ninit plan init.yaml --model train:build --runs rnus --run-id finetune",
        1,
        ["rnus does not exist", "Next: --runs FOLDER"],
    ),
    ("ninit plan typo.yaml --model train:build {run}", 1, ['"pretrian"', "pretrain"]),
    # files that would be lost
    (
        "ninit plan init.yaml --model train:build {run} --html init.yaml",
        2,
        ["init.yaml exists, was not replaced", "Next: --html init.html"],
    ),
    (
        "ninit apply init.yaml --model train:build {run} --out {weights}",
        1,
        ["exists and was not changed", "Next: choose another name"],
    ),
    # what to look at
    ("ninit inspect run", 1, ["Near: runs", "Next: ninit inspect runs"]),
    ("ninit inspect init.yaml", 1, ["is a YAML file, not a checkpoint", "Next: ninit validate init.yaml"]),
    ("ninit verify", 2, ["Missing argument", "Next: ninit verify runs/pretrain"]),
    ("ninit diff runs/pretrain", 2, ["Missing argument", "Next: ninit diff runs/pretrain runs/finetune"]),
    ("ninit lineage runs/finetun", 1, ["runs/finetun does not exist", "Next: ninit inspect runs"]),
]


def typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a line."""
    words = shlex.split(line)
    words[0] = {"python": sys.executable, "ninit": str(PROGRAM)}[words[0]]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


def commands_in(text: str) -> list[str]:
    """Lines that can be typed: those that are indented by two spaces below ``next:``."""
    return re.findall(r"^  ((?:python|ninit) \S.*)$", text.split("next:")[1], re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a newcomer has after the first step and the first run, and configs with a slip each."""
    here = tmp_path_factory.mktemp("newcomer")
    assert typed("ninit example previous_run", here).returncode == 0
    assert typed("python train.py --run-id pretrain --config scratch.yaml --classes 10", here).returncode == 0
    text = (here / "init.yaml").read_text()
    (here / "kind.yaml").write_text(text.replace("previous_run", "previous-run"))
    (here / "key.yaml").write_text(text.replace("checkpoint_tag", "checkpoint_tga"))
    (here / "rule.yaml").write_text(text.replace("keep_model", "keep_modle"))
    (here / "typo.yaml").write_text(text.replace("pretrain", "pretrian"))
    (here / "tab.yaml").write_text("initializers:\n\t- kind: resume\n")
    return here


def test_there_are_at_least_twenty_wrong_turns() -> None:
    """All different."""
    assert len({line for line, _code, _said in WRONG_TURNS}) == len(WRONG_TURNS) >= 20


@pytest.mark.parametrize(("line", "code", "said"), WRONG_TURNS, ids=[line for line, _code, _said in WRONG_TURNS])
def test_a_wrong_turn_is_answered_by_what_to_type_next(folder: Path, line: str, code: int, said: list[str]) -> None:
    """In one message without a traceback; no file is changed, none comes to be."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    weights = str(max(folder.glob("runs/pretrain/checkpoints/sets/*/net_cp=*_model.th")).relative_to(folder))
    done = typed(line.replace("{weights}", weights).replace("{run}", "--runs runs --run-id finetune"), folder)
    answer = ONE_SPACE.sub(" ", f"{done.stdout} {done.stderr}")
    assert done.returncode == code, answer
    place = 0
    for words in said:
        assert words in answer[place:], answer
        place = answer.index(words, place)
    assert "Traceback" not in answer
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    assert after == before


def test_the_way_from_an_empty_folder_to_a_resumed_run_and_a_page(tmp_path: Path) -> None:
    """Every line that is typed was said by the command before it."""
    start = typed("ninit", tmp_path)
    assert start.returncode == 0
    assert any(line.startswith("ninit example ") for line in re.findall(r"ninit \S.*", start.stdout))
    helped = typed("ninit --help", tmp_path)
    assert "example" in helped.stdout
    example = re.findall(r"Example: (ninit example \S+)", typed("ninit example --help", tmp_path).stdout)
    written = typed(example[0], tmp_path)
    first, plan, train, look = commands_in(written.stdout)
    assert typed(first, tmp_path).returncode == 0
    planned = typed(plan, tmp_path)
    assert planned.returncode == 0, planned.stderr
    decided = "auto_resume: finetune has no checkpoints, the initializers of the config apply\n"
    assert planned.stderr == f"{decided}page: plan.html\n"
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    words = [sys.executable, *shlex.split(train)[1:]]
    with subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as training:
        assert training.stdout is not None
        assert any(line.startswith("epoch 2") for line in training.stdout)
        training.send_signal(signal.SIGINT)
    again = typed(train.replace("100", "8"), tmp_path)
    assert again.returncode == 0, again.stderr
    assert re.search(r"^start E[1-9]\d*_U\d+_S\d+ .*resumed", again.stdout)
    assert "finetune" in typed(look, tmp_path).stdout
