"""The tutorial for authors, typed in: every file written, every command run, every output compared."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from support.pages import ROOT, Block, blocks_of, matches
from support.wheels import Environment

PAGE = ROOT / "docs" / "write" / "tutorial.md"
# What needs an index without it: the builder is in the environment.
INSTEAD = {"python -m build": "python -m build --no-isolation"}


@attrs.define
class Shell:
    """Commands one after the other, in the environment of the core's wheel."""

    environment: Environment
    folder: Path

    def run(self, command: str) -> str:
        """What it printed, on either stream; ``cd`` holds for those that follow."""
        if command.startswith("cd "):
            self.folder = (self.folder / command.removeprefix("cd ")).resolve(strict=True)
            return ""
        done = subprocess.run(
            ["bash", "-c", INSTEAD.get(command, command)],
            cwd=self.folder,
            env=self.environment.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        # tables are padded to their width
        return re.sub(r" +$", "", done.stdout, flags=re.MULTILINE)


@pytest.fixture
def shell(environment: Environment, tmp_path: Path) -> Iterator[Shell]:
    """A shell in an empty folder; what the page installs is taken out again."""
    yield Shell(environment, tmp_path)
    environment.pip("uninstall", "--yes", "noether-init-demo")


def commands_of(block: Block) -> list[tuple[str, str]]:
    """The commands of a console block, each with the lines that it prints."""
    assert block.text.startswith("$ ")
    parts = block.text.removeprefix("$ ").split("\n$ ")
    return [(command, output) for command, _, output in (part.partition("\n") for part in parts)]


def test_every_command_of_the_tutorial_prints_what_it_shows(shell: Shell, tmp_path: Path) -> None:
    """In order; files are those that the page shows."""
    count = 0
    for block in blocks_of(PAGE.read_text()):
        if block.caption is not None:
            path = tmp_path / block.caption
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(block.text)
        elif block.language == "console" and "no-run" not in block.marks:
            for command, expected in commands_of(block):
                printed = shell.run(command)
                assert matches(expected, printed), f"{PAGE.name}:{block.line} $ {command}\n{printed}"
                count += 1
    assert count > 20


def test_files_of_the_tutorial_are_clean(tmp_path: Path) -> None:
    """The package that the page ends with passes the same linters as the one that it begins with."""
    for block in blocks_of(PAGE.read_text()):
        if block.caption is not None and block.caption.startswith("demo/"):
            path = tmp_path / block.caption
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(block.text)
    for command in (
        ["ruff", "check", "--isolated", "--no-cache"],
        ["ruff", "format", "--isolated", "--no-cache", "--diff"],
        [
            "mypy",
            "--strict",
            "--no-warn-unused-configs",
            "--cache-dir",
            ROOT / ".mypy_cache" / "scaffold",
            "src",
            "tests",
        ],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path / "demo",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
