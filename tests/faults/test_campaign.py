"""The campaign itself: it goes on where it was stopped, counts processes that die, and says what must be zero."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.campaign.cells import AMOUNTS, KILLS, Cell, all_cells, run_cell
from faults.campaign.kills import METHODS
from faults.campaign.report import draw, problems, tables, write_page
from faults.campaign.subjects import FORMATS


def _counts(work: Path, name: str) -> dict[str, int]:
    counts: dict[str, int] = json.loads((work / f"{name}.json").read_text())["counts"]
    return counts


def test_a_series_goes_on_after_a_process_that_died(tmp_path: Path) -> None:
    """The fault that ended the process counts as one that crashed, and the next one is tried."""

    def run(folder: Path, so_far: Counter[str]) -> Iterator[Counter[str]]:
        for number in range(so_far["tried"], 5):
            if number == 2:
                faulthandler.disable()  # pytest has it print the stack
                os.kill(os.getpid(), signal.SIGSEGV)
            yield Counter(tried=1, detected=1)

    # every count is kept at once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("faults.campaign.cells.KEPT_SECONDS", 0.0)
        run_cell(Cell("dying", run), tmp_path)
    assert _counts(tmp_path, "dying") == {"tried": 5, "detected": 4, "crashed": 1}


def test_a_series_that_is_done_is_not_run_again(tmp_path: Path) -> None:
    """``make faults`` goes on; it does not begin anew."""
    cell = Cell("done", lambda folder, so_far: iter([Counter(tried=3)]))
    run_cell(cell, tmp_path)
    run_cell(Cell("done", lambda folder, so_far: iter([Counter(tried=1000)])), tmp_path)
    assert _counts(tmp_path, "done") == {"tried": 3}


def test_a_series_that_fails_by_itself_is_no_fault(tmp_path: Path) -> None:
    """An error of the campaign is not counted, it is shown."""

    def run(folder: Path, so_far: Counter[str]) -> Iterator[Counter[str]]:
        yield Counter(tried=1)
        os._exit(3)

    with pytest.raises(RuntimeError, match="broken"):
        run_cell(Cell("broken", run), tmp_path)


def test_the_command_counts_kills_of_ours_and_of_the_usual_ways(tmp_path: Path) -> None:
    """A few of each; a hundred of ours are tried with the writer's tests."""
    program = [sys.executable, "-m", "faults.campaign", "--work", str(tmp_path), "--only", "kills", "--scale", "0.012"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    finished = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "[3/3] kills/" in finished.stdout
    for method in METHODS:
        counts = Counter(_counts(tmp_path, f"kills__{method}".replace(" ", "_")))
        assert counts["tried"] == 6 == counts["good"] + counts["torn"] + counts["unloadable"]
    assert _counts(tmp_path, "kills__ours")["good"] == 6


def test_the_large_campaign_is_large() -> None:
    """What is promised of it: flips, blocks, kills, and every format in every kind of fault of bytes."""
    assert AMOUNTS["flips"][0] >= 10_000
    assert AMOUNTS["zeroed"][0] >= 1_000
    assert AMOUNTS["truncations"][0] == 0  # all
    assert KILLS >= 500
    names = {cell.name for cell in all_cells()}
    assert {f"bytes/{fault}/{one}/ours" for fault in AMOUNTS for one in FORMATS} <= names
    assert len(names) == len(all_cells())


def _result(**counts: int) -> dict[str, object]:
    return {"counts": {"tried": 10, **counts}, "seconds": 60.0, "done": True}


RESULTS = {
    "bytes/flips/set_resume/ours": _result(detected=9, harmless=1),
    "bytes/flips/set_resume/baseline": _result(detected=2, silent=8),
    "bytes/replaced/bare_file/ours": _result(silent=10),
    "kills/ours": _result(good=10),
    "kills/torch.save": _result(good=4, unloadable=6),
}


def test_what_is_not_zero_and_has_to_be_is_a_problem() -> None:
    """Of ours only, and not where no program could know."""
    assert problems(RESULTS) == []
    for name, key in (
        ("bytes/flips/set_resume/ours", "silent"),
        ("bytes/flips/set_resume/ours", "half changed"),
        ("bytes/replaced/bare_file/ours", "half changed"),
        ("kills/ours", "torn"),
        ("crashes/first save", "lost"),
        ("looks/retention/EIO/once", "lost"),
        ("looks/auto_resume/EIO/once", "silent"),
        ("looks/verify/EACCES/lasting", "unnamed"),
        ("headers/opcodes", "found"),
    ):
        assert problems({**RESULTS, name: _result(**{key: 1})}) == [f"{name}: {key} 1 of 10"]


def test_page_and_picture_show_the_counts(tmp_path: Path) -> None:
    """Only what stands between the marks is replaced, also the second time."""
    page = tmp_path / "faults.md"
    page.write_text("before\n<!-- campaign: begin -->\nold\n<!-- campaign: end -->\nafter\n")
    for _ in range(2):
        write_page(page, RESULTS, "2026-01-02")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| one bit flipped | our set resume | 10 | 9 | 1 | 0 | 0 | 8 | 0 |" in text
    assert "| torch.save | 10 | 0 | 4 | 6 | 0 | 0 |" in tables(RESULTS)
    assert "No unexpected result." in text
    assert "<svg" in (tmp_path / "faults.svg").read_text()[:400]
    draw(tmp_path / "faults.png", RESULTS)
    assert (tmp_path / "faults.png").stat().st_size > 10_000
