"""``ninit example``: what it writes runs, survives being killed, and can be planned as it is."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from noether_init_core import kinds
from noether_init_core.scaffold.package import BUILT_IN, example_of

PROGRAM = Path(sys.executable).with_name("ninit")


def typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a line."""
    words = shlex.split(line)
    words[0] = {"python": sys.executable, "ninit": str(PROGRAM)}[words[0]]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_everything_that_it_says_to_type_works(kind: str, tmp_path: Path) -> None:
    """In the order in which it says so; the run is killed on the way and goes on where it was."""
    written = typed(f"ninit example {kind}", tmp_path)
    assert (written.returncode, written.stderr) == (0, "")
    commands = [command for command, _what in example_of(kind)[1]]
    assert re.findall(r"^  (\S.*)$", written.stdout.split("next:")[1], re.MULTILINE) == commands
    first, plan, train, look = commands
    done = typed(first, tmp_path)
    assert done.returncode == 0, done.stderr
    without_run = typed(plan.split(" --run-id")[0], tmp_path)
    assert without_run.returncode == 0, without_run.stderr
    assert without_run.stderr == (
        "auto_resume: planned as the first start of a new run; for a run with sets: --run-id ID\n"
    )
    planned = typed(plan, tmp_path)
    decided, page = planned.stderr.splitlines()
    assert re.fullmatch(r"auto_resume: \w+ has no checkpoints, the initializers of the config apply", decided)
    assert page == "page: plan.html"
    assert planned.stdout == without_run.stdout
    assert planned.returncode == 0, planned.stderr
    assert kind in planned.stdout
    assert "<!doctype html>" in (tmp_path / "plan.html").read_text()[:40]
    words = [sys.executable, *shlex.split(train)[1:]]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        start = killed.stdout.readline()
        assert any("loss" in line for line in killed.stdout)  # what it prints after a save
        killed.kill()
    again = typed(train.replace("100", "12"), tmp_path)
    assert again.returncode == 0, again.stderr
    expected = "E4_U32_S1024" if kind == "resume" else "E0_U0_S0"
    assert start.startswith(f"start {expected}")
    assert "auto_resume: resumed from E" in again.stdout
    assert "epoch 12" in again.stdout
    assert typed(look, tmp_path).returncode == 0


def test_nothing_that_exists_is_written_over(tmp_path: Path) -> None:
    """Not even in part."""
    (tmp_path / "init.yaml").write_text("mine")
    refused = typed("ninit example resume", tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("init.yaml exists; nothing was written. Next: ninit example resume example")
    assert [path.name for path in tmp_path.iterdir()] == ["init.yaml"]
    assert (tmp_path / "init.yaml").read_text() == "mine"
    elsewhere = typed("ninit example resume 'a folder'", tmp_path)
    assert elsewhere.returncode == 0
    assert "  cd 'a folder'\n" in elsewhere.stdout


def test_it_can_be_looked_at_first(tmp_path: Path) -> None:
    """--print writes no file; --json is one object, and says the same."""
    shown = typed("ninit example file --print", tmp_path)
    assert "# ---- init.yaml\n# Weights of one model from one file" in shown.stdout
    said = json.loads(typed("ninit example file --print --json", tmp_path).stdout)
    assert (said["format"], said["version"], said["written"]) == ("noether-init-example", 1, False)
    assert said["files"] == example_of("file")[0]
    assert list(tmp_path.iterdir()) == []


def test_a_kind_of_others_gets_a_config_with_what_it_requires_left_open(tmp_path: Path) -> None:
    """Validation names each key that is to be filled in; filled in, everything that is said to type works."""
    written = typed("ninit example random", tmp_path)
    assert written.returncode == 0, written.stderr
    text = (tmp_path / "init.yaml").read_text()
    required = kinds.resolve("random").config_class.model_json_schema()["required"]
    assert [name for name in required if name != "kind"] == ["rules"]
    refused = typed("ninit validate init.yaml", tmp_path)
    assert refused.returncode == 1
    assert "init.yaml:5 initializers.0.rules" in refused.stdout
    (tmp_path / "init.yaml").write_text(text.replace("rules:", "rules: [{match: '**', init: zeros_}]"))
    commands = [command for command, _what in example_of("random")[1]]
    for command in (*commands[:2], f"{commands[2]} --epochs 1"):
        done = typed(command, tmp_path)
        assert done.returncode == 0, done.stderr
    again = typed(f"{commands[2]} --epochs 2", tmp_path)
    assert again.stdout.startswith("start E1_U8_S256  (auto_resume: resumed from E1_U8_S256)")


def test_an_unknown_kind_is_named_with_those_near_to_it(tmp_path: Path) -> None:
    """The next command is there."""
    refused = typed("ninit example resum", tmp_path)
    assert refused.returncode == 1
    assert 'no kind "resum". Near: resume (noether-init-core' in refused.stderr
    missing = typed("ninit example", tmp_path)
    assert missing.returncode == 2
    assert "Installed kinds: file, previous_run" in missing.stderr


@pytest.mark.parametrize(
    "arguments", ["example previous_run --print", "kinds", "--help", "", "example --help", "schema --help"]
)
def test_torch_is_not_imported(arguments: str, tmp_path: Path) -> None:
    """What needs no tensors answers at once."""
    code = (
        "import sys\nsys.argv = ['ninit', *sys.argv[1:]]\nfrom noether_init_core import cli\n"
        "try:\n    cli.main()\nfinally:\n    assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *shlex.split(arguments)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
