"""``ninit diff``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.counting import LineCounter

from noether_init_core.diff.compare import CheckpointDiff, DiffRow, State
from noether_init_core.diff.sides import DiffSide
from noether_init_core.render.relations import DiffView

PROGRAM = Path(sys.executable).with_name("ninit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of twelve layers, and one that has another head."""
    here = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    first = {f"blocks.{number}.{name}.weight": torch.randn(8, 8) for number in range(12) for name in ("q", "v")}
    moved = {key: value + (0.1 if ".q." in key else 0) for key, value in first.items()}
    torch.save(first, here / "a.pt")
    torch.save(moved, here / "b.pt")
    torch.save({**moved, "head.weight": torch.ones(2, 8)}, here / "c.pt")
    torch.save({**moved, "blocks.3.q.weight": torch.full((8, 8), float("nan"))}, here / "d.pt")
    (here / "init.yaml").write_text("initializers: []\n")
    return here


def diff(folder: Path, *arguments: str, width: int = 80) -> subprocess.CompletedProcess[str]:
    """The command, in the folder, at a width."""
    environment = {"COLUMNS": str(width), "PATH": "/usr/bin:/bin", "NO_COLOR": "1"}
    words = [str(PROGRAM), "diff", *arguments]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_layers_are_folded_and_the_drift_is_a_range(folder: Path) -> None:
    """One line for what moved, one for what did not, and those that moved most."""
    done = diff(folder, "a.pt", "b.pt")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["A  a.pt   24 tensors", "B  b.pt   24 tensors"]
    assert lines[2].startswith(" = equal    blocks.{0..11}.v.weight")
    assert lines[3].startswith(" ~ changed  blocks.{0..11}.q.weight")
    assert "drift 0.0" in lines[3]
    assert "moved most" in lines
    assert lines[-1].startswith("drift 0.0")
    everything = diff(folder, "a.pt", "b.pt", "--all").stdout
    assert sum(line.startswith((" = ", " ~ ")) for line in everything.splitlines()) == 24


def test_another_form_is_exit_code_1(folder: Path) -> None:
    """A name on one side, NaN; other values alone are none."""
    more = diff(folder, "b.pt", "c.pt")
    assert (more.returncode, " + only in B  head.weight" in more.stdout) == (1, True)
    broken = diff(folder, "b.pt", "d.pt")
    assert broken.returncode == 1
    assert " ! nonfinite  blocks.3.q.weight" in broken.stdout
    assert "NaN or infinite: A 0  B 64" in broken.stdout
    assert diff(folder, "d.pt", "d.pt").returncode == 0


def test_exact_takes_other_values_for_a_fault(folder: Path) -> None:
    """For scripts that ask whether two files are the same."""
    assert diff(folder, "a.pt", "b.pt", "--exact").returncode == 1
    assert diff(folder, "a.pt", "a.pt", "--exact").returncode == 0


def test_names_are_shown_as_text(folder: Path) -> None:
    """Control characters and braces are spelt out, with and without --all."""
    torch.save({"a\x1b[31m\n.{b}": torch.ones(1)}, folder / "odd.pt")
    for option in ((), ("--all",)):
        shown = diff(folder, "odd.pt", "odd.pt", *option).stdout
        assert "\x1b" not in shown
        assert "a\\x1b[31m\\n" in shown


@pytest.mark.parametrize("state", ["changed", "shape"])
def test_names_that_fold_into_nothing_are_as_many_lines_as_can_be_read(state: State) -> None:
    """Ten thousand of them, of the same shapes or of as many, in few lines of Python each, and how many are left."""
    rows = [
        DiffRow("", f"layer{number}x{number % 977}.w{number % 41}", state, (number,), (number + 1,))
        for number in range(10_000)
    ]
    with LineCounter() as work:
        (lines,) = DiffView(CheckpointDiff(DiffSide("a"), DiffSide("b"), tuple(rows))).models().values()
    assert work.count < 400 * len(rows)
    assert len(lines) == 21
    assert lines[-1].name.endswith(" more keys (--all shows them)")


def test_help_needs_no_torch() -> None:
    """Nor do errors of usage."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom noether_init_core.cli import app\n"
        "done = CliRunner().invoke(app, ['diff', '--help'])\nassert done.exit_code == 0, done.output\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_and_page_say_the_same(folder: Path) -> None:
    """The page is written beside what is printed."""
    done = diff(folder, "a.pt", "b.pt", "--json", "--html", "diff.html")
    data = json.loads(done.stdout)
    assert (data["format"], data["version"], data["counts"]) == ("noether-init-diff", 1, {"changed": 12, "equal": 12})
    assert done.stderr == "page: diff.html\n"
    assert "a.pt against b.pt" in (folder / "diff.html").read_text()


def test_no_line_is_wider_than_a_narrow_terminal(folder: Path) -> None:
    """At 60 columns."""
    shown = diff(folder, "a.pt", "c.pt", width=60).stdout
    assert max(map(len, shown.splitlines())) <= 60


def test_wrong_sides_name_the_next_command(folder: Path) -> None:
    """Nothing there, a config, one side only."""
    absent = diff(folder, "a.pt", "e.pt")
    assert absent.returncode == 1
    assert "e.pt does not exist. Near: " in absent.stderr
    assert "ninit validate init.yaml" in diff(folder, "a.pt", "init.yaml").stderr
    missing = diff(folder, "a.pt")
    assert missing.returncode == 2
    assert "Next: ninit diff a.pt runs/finetune" in missing.stderr
