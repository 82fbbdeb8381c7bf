"""Shell completion, by the protocol that shells use: what Tab offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("ninit")


def offered(folder: Path, words: str, *, shell: str = "bash") -> list[str]:
    """What is offered for the last of ``words``, which may be empty."""
    environment = {
        **os.environ,
        "_NINIT_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "_TYPER_COMPLETE_ARGS": words,
    }
    done = subprocess.run([PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1] if shell == "bash" else done.stdout.splitlines()


def test_commands_and_options_are_offered(tmp_path: Path) -> None:
    """All of them, and those that begin as what is typed."""
    assert {"kinds", "plan", "apply", "lineage"} <= set(offered(tmp_path, "ninit "))
    assert offered(tmp_path, "ninit li") == ["lineage"]
    assert "--html" in offered(tmp_path, "ninit plan --h")


@pytest.mark.parametrize("command", ["example", "check"])
def test_installed_kinds_are_offered(tmp_path: Path, command: str) -> None:
    """By their short names; Noether's dotted ones once a dot is typed."""
    assert offered(tmp_path, f"ninit {command} re") == ["resume"]
    assert {"file", "previous_run", "resume"} <= set(offered(tmp_path, f"ninit {command} "))
    dotted = offered(tmp_path, f"ninit {command} noether.core")
    assert "noether.core.initializers.ResumeInitializer" in dotted


def test_configs_are_offered_and_folders_on_the_way(tmp_path: Path) -> None:
    """YAML files only."""
    (tmp_path / "configs").mkdir()
    for name in ("init.yaml", "other.yml", "train.py", ".hidden.yaml", "configs/tune.yaml"):
        (tmp_path / name).touch()
    assert offered(tmp_path, "ninit plan ") == ["configs/", "init.yaml", "other.yml"]
    assert offered(tmp_path, "ninit plan i") == ["init.yaml"]
    assert offered(tmp_path, "ninit suggest configs/") == ["configs/tune.yaml"]
    assert offered(tmp_path, "ninit plan nowhere/") == [""]


def test_zsh_and_fish_are_served_too(tmp_path: Path) -> None:
    """With the distribution of each kind as its description."""
    assert "resume" in "".join(offered(tmp_path, "ninit example re", shell="zsh"))
    fish = {**os.environ, "_NINIT_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    fish["_TYPER_COMPLETE_ARGS"] = "ninit example re"
    done = subprocess.run([PROGRAM], cwd=tmp_path, env=fish, capture_output=True, text=True, check=False)
    assert done.stdout.split()[0] == "resume"


def test_names_that_a_shell_would_evaluate_are_not_offered(tmp_path: Path) -> None:
    """A file may be called anything; pressing Tab runs nothing."""
    for name in (
        "a$(touch PWNED).yaml",
        "b`touch PWNED`.yaml",
        "c\\$(touch PWNED).yaml",
        "d;x.yaml",
        "e f.yaml",
        "g.yaml",
    ):
        (tmp_path / name).touch()
    for shell in ("bash", "zsh"):
        assert "".join(offered(tmp_path, "ninit validate ", shell=shell)).count("yaml") == 1
