"""Code of others that fails: one message says who and where, and its traceback can be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.foreign import ForeignPackages

PROGRAM = Path(sys.executable).with_name("ninit")
KINDS = """
import pydantic
from noether_init_core import InitializerBase, InitializerConfig, SourceInitializer, SourceInitializerConfig


class Locates(SourceInitializer):
    config_class = SourceInitializerConfig

    def locate(self, query):
        return self._deep(30)

    def _deep(self, levels):
        if levels:
            return self._deep(levels - 1)
        raise RuntimeError("no such \\x1b[2Jbucket")


class Checks(InitializerBase):
    config_class = InitializerConfig

    def check(self, model, trainer=None, callbacks=None):
        raise KeyError("gone")

    def init_weights(self, model):
        raise KeyError("asked")

    def init_optimizer(self, model):
        pass


class Writes(Checks):
    def check(self, model, trainer=None, callbacks=None):
        pass


class Begins(Checks):
    def __init__(self, config, **keywords):
        raise PermissionError(13, "Permission denied", "/a/token")


class Validated(InitializerConfig):
    @pydantic.field_validator("run_id")
    @classmethod
    def _known(cls, value):
        return {}[value]


class Validates(Checks):
    config_class = Validated
"""
MODELS = "import torch\n\n\ndef build():\n    return torch.nn.Linear(2, 2)\n"


@pytest.fixture
def folder(tmp_path: Path, foreign: ForeignPackages) -> Path:
    """A model, and a distribution whose kinds fail at different moments."""
    kinds = {name.lower(): f"acme_kinds:{name}" for name in ("Locates", "Checks", "Writes", "Begins", "Validates")}
    foreign.install("acme-init", offers=kinds, modules={"acme_kinds": KINDS})
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path


def typed(folder: Path, foreign: ForeignPackages, line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the command makes of a line, where the distribution is installed."""
    environment = {**os.environ, "PYTHONPATH": str(foreign.folder / "site"), **variables}
    return subprocess.run(
        [PROGRAM, *line.split()], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("entry", "message", "place"),
    [
        ("locates", "acme-init 1.0 failed: RuntimeError: no such \\x1b[2Jbucket", "Locates._deep"),
        (
            "begins, run_id: a",
            "acme-init 1.0 failed: PermissionError: [Errno 13] Permission denied: '/a/token'",
            "__init__",
        ),
        ("validates, run_id: a", "acme-init 1.0 failed: KeyError: 'a'", "Validated._known"),
    ],
)
def test_one_line_says_who_failed_and_where(
    entry: str, message: str, place: str, folder: Path, foreign: ForeignPackages
) -> None:
    """However deep it was; the traceback is there for the asking."""
    (folder / "init.yaml").write_text(f"initializers:\n  - {{kind: {entry}}}\n")
    line = "plan init.yaml --model models:build"
    done = typed(folder, foreign, line)
    assert (done.returncode, done.stdout) == (1, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith(message)
    assert "acme_kinds.py:" in said
    assert f"{place})." in said
    assert said.endswith("Its traceback: NOETHER_INIT_TRACEBACK=1 before the command")
    whole = typed(folder, foreign, line, NOETHER_INIT_TRACEBACK="1")
    assert whole.returncode == 1
    assert whole.stderr.startswith("Traceback (most recent call last):")
    assert whole.stderr.splitlines()[-1].startswith(message)
    assert "before the command" not in whole.stderr


def test_what_a_check_raises_is_told_by_plan_and_by_apply(folder: Path, foreign: ForeignPackages) -> None:
    """The kind has no plan; nothing is written."""
    (folder / "init.yaml").write_text("initializers:\n  - kind: checks\n")
    planned = typed(folder, foreign, "plan init.yaml --model models:build")
    assert (planned.returncode, planned.stderr) == (1, "")
    assert planned.stdout.splitlines()[-1] == (
        "x checks: KeyError: 'gone'. Its traceback: NOETHER_INIT_TRACEBACK=1 before the command"
    )
    whole = typed(folder, foreign, "plan init.yaml --model models:build", NOETHER_INIT_TRACEBACK="1")
    assert 'raise KeyError("gone")' in whole.stderr
    assert whole.stdout.splitlines()[-1] == "x checks: KeyError: 'gone'."
    applied = typed(folder, foreign, "apply init.yaml --model models:build --out start.th")
    assert (applied.returncode, applied.stdout) == (1, "")
    assert applied.stderr.startswith("acme-init 1.0 failed: KeyError: 'gone' (")
    assert "asked" not in applied.stderr
    assert not (folder / "start.th").exists()


def test_a_hook_that_fails_in_apply_leaves_no_file(folder: Path, foreign: ForeignPackages) -> None:
    """What failed, with the class of the error, and what was done before it; the cause is in the traceback."""
    (folder / "init.yaml").write_text("initializers:\n  - kind: writes\n")
    line = "apply init.yaml --model models:build --out start.th"
    applied = typed(folder, foreign, line)
    assert (applied.returncode, applied.stdout) == (1, "")
    assert applied.stderr.startswith("init_weights of writes failed: KeyError: 'asked'\nDone before it: nothing.")
    assert applied.stderr.splitlines()[-1].startswith("acme-init 1.0 failed: KeyError: 'asked' (")
    assert 'raise KeyError("asked")' in typed(folder, foreign, line, NOETHER_INIT_TRACEBACK="1").stderr
    assert [path.name for path in folder.glob("*start*")] == []


def test_an_error_of_ours_has_a_traceback_only_where_that_is_asked_for(folder: Path, foreign: ForeignPackages) -> None:
    """0 is the same as not set."""
    (folder / "init.yaml").write_text("initializers:\n  - kind: nothing_like_it\n")
    line = "plan init.yaml --model models:build"
    said = typed(folder, foreign, line, NOETHER_INIT_TRACEBACK="0").stderr
    assert "Traceback" not in said
    whole = typed(folder, foreign, line, NOETHER_INIT_TRACEBACK="1").stderr
    assert whole.startswith("Traceback (most recent call last):")
    assert whole.endswith(said)
