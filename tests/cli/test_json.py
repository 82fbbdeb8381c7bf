"""What programs read: every command's JSON follows its schema, and nothing else is on standard output."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import typer.main
from support.pages import ROOT

from noether_init_core import cli

PROGRAM = Path(sys.executable).with_name("ninit")
MODEL = "--model models:build --runs runs"

#: Name of a schema -> command lines whose output follows it, with their exit codes.
LINES: dict[str, list[tuple[str, int]]] = {
    "overview": [("--json", 0)],
    "kinds": [("kinds --json", 0), ("kinds --observers --json", 0)],
    "inspect": [
        ("inspect runs --json", 0),
        ("inspect runs/pretrain --json", 0),
        ("inspect runs/pretrain/checkpoints/sets/00000002_E2_U8_S64 --json", 0),
        ("inspect runs/pretrain/checkpoints/vit_cp=latest_model.th --json", 0),
    ],
    "diff": [("diff runs/pretrain runs/finetune --json", 1), ("diff runs/pretrain@E1_U4_S32 runs/pretrain --json", 0)],
    "lineage": [("lineage runs/finetune --json", 0), ("lineage runs --json", 0)],
    "example": [("example file --print --json", 0)],
    "validate": [("validate init.yaml --json", 0), ("validate wrong.yaml --json", 1)],
    "suggest": [(f"suggest plain.yaml {MODEL} --json", 0)],
    "plan": [(f"plan init.yaml {MODEL} --json -", 0), (f"plan plain.yaml {MODEL} --json -", 1)],
    "verify": [("verify runs --json", 0), ("verify nan.pt plain.yaml --json", 1)],
    "apply": [(f"apply init.yaml {MODEL} --out start.safetensors --json", 0)],
    "new": [("new demo --dry-run --json", 0)],
    "check": [("check previous_run --json", 0)],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the transcripts, and a file with NaN."""
    folder = tmp_path_factory.mktemp("world")
    # in a process of its own: it puts the folder on the import path
    code = f"from pathlib import Path; from support.transcripts import make_world; make_world(Path({str(folder)!r}))"
    environment = {"PYTHONPATH": str(ROOT / "tests"), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    torch.save({"w": torch.tensor([1.0, float("nan")])}, folder / "nan.pt")
    return folder


def schema(name: str) -> Any:
    """A published schema."""
    folder = ROOT / "docs" if name == "plan" else ROOT / "docs" / "schemas"
    return json.loads((folder / f"{name}.schema.json").read_text())


@pytest.mark.parametrize(
    ("name", "line", "code"), [(name, line, code) for name, lines in LINES.items() for line, code in lines]
)
def test_the_output_follows_its_schema(world: Path, name: str, line: str, code: int) -> None:
    """Strict JSON on standard output, and nothing else there; the exit code is that of the same line without it."""
    done = subprocess.run([PROGRAM, *line.split()], cwd=world, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(done.stdout, parse_constant=refuse)
    found = schema(name)
    jsonschema.Draft202012Validator.check_schema(found)
    jsonschema.Draft202012Validator(found).validate(data)
    if isinstance(data, dict):
        assert data["format"] == f"noether-init-{name}"


def test_every_command_with_json_has_a_schema_and_a_row() -> None:
    """The page of JSON lists them all, and no schema is left over."""
    group: Any = typer.main.get_command(cli.app)
    with_json = {
        name
        for name, command in group.commands.items()
        if any("--json" in getattr(parameter, "opts", ()) for parameter in command.params)
    }
    assert with_json | {"overview"} == set(LINES)
    assert with_json == set(group.commands) - {"schema"}
    page = (ROOT / "docs" / "use" / "json.md").read_text()
    assert set(re.findall(r"`(?:docs/)?(\w+)\.schema\.json`", page)) == set(LINES)
    there = {path.name.removesuffix(".schema.json") for path in (ROOT / "docs" / "schemas").iterdir()}
    assert there == set(LINES) - {"plan"}


def test_errors_leave_standard_output_empty(world: Path) -> None:
    """A program that reads it finds nothing to misread."""
    for line in ("inspect absent --json", "diff absent absent --json", "lineage absent --json", "check absent --json"):
        done = subprocess.run([PROGRAM, *line.split()], cwd=world, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, ""), line
        assert done.stderr.strip(), line


LOUD = """
import atexit
import os
import sys
import threading
from noether_init_core import InitializerBase

def shout(what):
    print(what)
    sys.__stdout__.write(f"{what} past sys.stdout\\n")
    sys.__stdout__.flush()
    os.system(f"echo {what} from a child process")

def shout_late():
    threading.main_thread().join()
    shout("in a thread")

shout("at import")
atexit.register(shout, "at exit")
threading.Thread(target=shout_late).start()

class Loud(InitializerBase):
    contract = 1

    def check(self, model, trainer=None, callbacks=None):
        shout("in check")

    def init_weights(self, model):
        shout("in init_weights")

    def init_optimizer(self, model):
        shout("in init_optimizer")
"""
MODELS = "import os\nimport torch\n\ndef build():\n    os.system('echo built')\n    return torch.nn.Linear(2, 2)\n"


@pytest.mark.parametrize(
    "line",
    [
        "check loud --json",
        "schema loud",
        "validate loud.yaml --json",
        "plan loud.yaml --model loud_models:build --json -",
        "apply loud.yaml --model loud_models:build --out loud.safetensors --json",
    ],
)
def test_what_a_plugin_prints_is_not_between_the_json(tmp_path: Path, line: str) -> None:
    """By print, past ``sys.stdout`` and from a child process; at import, in a hook, by the model, and at the end."""
    info = tmp_path / "site" / "loud-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[noether_init.initializers]\nloud = loud_kind:Loud\n")
    (tmp_path / "site" / "loud_kind.py").write_text(LOUD)
    (tmp_path / "loud_models.py").write_text(MODELS)
    (tmp_path / "loud.yaml").write_text("initializers:\n  - kind: loud\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)])}
    done = subprocess.run(
        [PROGRAM, *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    assert "at import from a child process" in done.stderr
    assert "at import past sys.stdout" in done.stderr
    for late in ("at exit", "in a thread"):
        assert all(f"{late}{how}\n" in done.stderr for how in ("", " past sys.stdout", " from a child process"))
    if "apply" in line:
        assert "in init_weights\n" in done.stderr
        assert "built" in done.stderr


def test_json_is_printed_without_standard_error() -> None:
    """A job may have closed it; the same for a standard output that is closed, where nothing can be printed."""
    command = f"{shlex.quote(str(PROGRAM))} kinds --json"
    done = subprocess.run(["sh", "-c", f"{command} 2>&-"], capture_output=True, text=True, check=True)
    assert "previous_run" in {one["name"] for one in json.loads(done.stdout)}
    done = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
