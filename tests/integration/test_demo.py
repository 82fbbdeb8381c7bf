"""The demonstration, with real processes and real kills, in a small version."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

DEMO = Path(__file__).resolve().parents[2] / "examples" / "digits" / "demo.py"


def run_demo(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the demonstration as a user does."""
    command = [sys.executable, str(DEMO), "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Killed in the middle of an epoch and of a save, no tensor and no loss differs, and the picture says so."""
    output = tmp_path / "demo"
    finished = run_demo(output, "--epochs", "3")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    compared = re.search(r"^0 of (\d+) tensors differ$", finished.stdout, re.MULTILINE)
    assert compared is not None
    assert int(compared[1]) > 100
    assert re.search(r"^0 of \d+ losses differ", finished.stdout, re.MULTILINE)
    assert "killed in the middle of an epoch" in finished.stdout
    assert re.search(r"killed in the middle of a save, which left \d{8}_E\S+ without manifest", finished.stdout)
    assert "21 tensors loaded, 2 fresh (head)" in finished.stdout
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert xml.etree.ElementTree.parse(output / "demo.svg").getroot().tag.endswith("svg")
    assert f"{compared[1]} of {compared[1]} tensors equal" in (output / "demo.svg").read_text()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    """Only a folder of an earlier demonstration is replaced."""
    (tmp_path / "precious.txt").write_text("mine")
    finished = run_demo(tmp_path)
    assert finished.returncode == 2
    assert "holds something else" in finished.stdout
    assert (tmp_path / "precious.txt").read_text() == "mine"
