"""The cells of the campaign: what is tried, how often, and where its counts are kept, so that it can be stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from faults.campaign.crashes import ERRORS, SCENARIOS, failures, replay
from faults.campaign.damage import FAULTS, tally
from faults.campaign.headers import TARGETS
from faults.campaign.kills import METHODS, kills
from faults.campaign.looks import QUESTIONS, SERIES, looking_failures
from faults.campaign.readings import HOW, reading_failures
from faults.campaign.subjects import FORMATS, build

__all__ = ["Cell", "all_cells", "run_cell"]

#: How many of each fault, in a network of which width for sets and for single files. 0: all that there are.
AMOUNTS = {
    "flips": (10_000, 32, 32),
    "truncations": (0, 8, 8),
    "zeroed": (1_000, 640, 1_100),
    "stale": (1_000, 640, 1_100),
    "appended": (1_000, 8, 8),
    "replaced": (0, 8, 8),
}
KILLS = 500
KILLS_WIDTH = 384
#: The two largest readers get twice the time.
HEADER_SECONDS = {**dict.fromkeys(TARGETS, 60), "archive": 120, "opcodes": 120}
#: How often counts are brought onto the disk.
KEPT_SECONDS = 0.5


@attrs.frozen
class Cell:
    """One series of faults; ``run(folder, counts so far)`` yields a counter for each."""

    name: str
    run: Callable[[Path, Counter[str]], Iterator[Counter[str]]]


def all_cells(scale: float = 1.0) -> list[Cell]:
    """Everything, or with ``scale`` that part of what is done by numbers or by time."""
    cells = [
        Cell(f"bytes/{fault}/{format_name}/{who}", _bytes(fault, format_name, who == "baseline", scale))
        for fault in FAULTS
        for format_name in FORMATS
        for who in (("ours",) if format_name == "manifest" else ("ours", "baseline"))
    ]
    cells += [Cell(f"kills/{method}", _kills(method, scale)) for method in METHODS]
    every = max(1, round(1 / scale))
    cells += [Cell(f"crashes/{name}", _crashes(name, every)) for name in SCENARIOS]
    cells += [
        Cell(f"failures/{name}/{error}/{mode}", _failures(name, error, mode == "lasting", every))
        for name in SCENARIOS
        for error in ERRORS
        for mode in ("once", "lasting")
    ]
    cells += [
        Cell(f"looks/{name}/{code}/{mode}", _looks(name, code, mode, every))
        for name in QUESTIONS
        for code, mode in SERIES
    ]
    cells += [Cell(f"reads/{format_name}/{how}", _reads(format_name, how)) for format_name in FORMATS for how in HOW]
    cells += [Cell(f"headers/{target}", _headers(target, scale)) for target in TARGETS]
    return cells


def run_cell(cell: Cell, work: Path) -> None:
    """Run to the end from where it was stopped, in a process of its own; its counts are in a file of the cell.

    A process that dies by itself (some libraries are killed by some files) counts as one ``crashed``.
    """
    path = work / (cell.name.replace("/", "__").replace(" ", "_") + ".json")
    while not _is_done(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads in the process: the child uses none
            child = os.fork()
        if child == 0:
            code = 1
            try:
                _work(cell, path)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
            state = _state(path)
            state["counts"]["tried"] = state["counts"].get("tried", 0) + 1
            state["counts"]["crashed"] = state["counts"].get("crashed", 0) + 1
            _keep(path, state)
        elif status:
            raise RuntimeError(f"{cell.name} ended with status {status}; its message is above")


def _work(cell: Cell, path: Path) -> None:
    state = _state(path)
    counts, begin, kept = Counter(state["counts"]), time.monotonic(), time.monotonic()
    # kills go to a real disk, where a save waits for it; the rest is faster in memory
    memory = Path("/dev/shm")
    is_in_memory = memory.is_dir() and not cell.name.startswith("kills/")
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if is_in_memory else path.parent))
    try:
        for counted in cell.run(folder / "cell", counts.copy()):
            counts.update(counted)
            if time.monotonic() - kept > KEPT_SECONDS:
                kept = time.monotonic()
                _keep(path, {**state, "counts": dict(counts)})
        seconds = state["seconds"] + time.monotonic() - begin
        _keep(path, {"counts": dict(counts), "seconds": seconds, "done": True})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _state(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"counts": {}, "seconds": 0.0, "done": False}


def _is_done(path: Path) -> bool:
    return bool(_state(path)["done"])


def _keep(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(state))
    temporary.replace(path)


def _bytes(fault: str, format_name: str, is_baseline: bool, scale: float) -> Callable[..., Iterator[Counter[str]]]:
    def run(folder: Path, so_far: Counter[str]) -> Iterator[Counter[str]]:
        amount, width_of_set, width_of_file = AMOUNTS[fault]
        is_set = format_name in ("set_previous_run", "set_resume", "flat_resume")
        width = width_of_set if is_set or format_name == "manifest" else width_of_file
        subject = build(format_name, folder, width)
        contents, others = [path.read_bytes() for path in subject.files], [path.read_bytes() for path in subject.others]
        if scale < 1 and fault in ("truncations", "replaced"):
            amount = max(5, int(scale * sum(map(len, contents)))) if fault == "truncations" else 0
        else:
            amount = max(1, int(scale * amount)) if amount else 0
        damages = FAULTS[fault](contents, others, amount)
        for _, verdict in tally(subject, damages, baseline=is_baseline, start=so_far["tried"]):
            counted = Counter({"tried": 1, verdict.outcome: 1})
            counted["half changed"] += verdict.half_changed
            counted["foreign error"] += verdict.foreign_error and not is_baseline
            yield counted

    return run


def _kills(method: str, scale: float) -> Callable[..., Iterator[Counter[str]]]:
    return lambda folder, so_far: kills(
        method, folder, max(0, int(scale * KILLS) - so_far["tried"]), KILLS_WIDTH, seed=so_far["tried"]
    )


def _crashes(name: str, every: int) -> Callable[..., Iterator[Counter[str]]]:
    return lambda folder, so_far: replay(SCENARIOS[name], folder, start=every * so_far["tried"], every=every)


def _failures(name: str, error: str, lasting: bool, every: int) -> Callable[..., Iterator[Counter[str]]]:
    return lambda folder, so_far: failures(
        SCENARIOS[name], folder, error, lasting=lasting, start=every * so_far["tried"], every=every
    )


def _looks(name: str, code: str, mode: str, every: int) -> Callable[..., Iterator[Counter[str]]]:
    return lambda folder, so_far: looking_failures(name, folder, code, mode, start=every * so_far["tried"], every=every)


def _reads(format_name: str, how: str) -> Callable[..., Iterator[Counter[str]]]:
    return lambda folder, so_far: reading_failures(build(format_name, folder, 32), how, start=so_far["tried"])


def _headers(target: str, scale: float) -> Callable[..., Iterator[Counter[str]]]:
    """One counter at the end: the fuzzer keeps its own."""

    def run(folder: Path, so_far: Counter[str]) -> Iterator[Counter[str]]:
        seconds = max(3, int(scale * HEADER_SECONDS[target]))
        folder.mkdir(parents=True)
        program = [sys.executable, "-m", "faults.campaign.fuzzing", target, str(seconds), str(folder)]
        finished = subprocess.run(program, capture_output=True, text=True, check=False)
        state = json.loads((folder / "counted.json").read_text())
        counted = Counter(tried=state["tried"], accepted=state["accepted"], found=state["found"], seconds=seconds)
        ended = list(folder.glob("ended-*"))
        counted["found"] += len(ended)
        for place in [*state["places"], *(f"ended the process: {path.read_bytes()[:200]!r}" for path in ended)]:
            counted[f"place: {place}"] += 1
        if finished.returncode and not ended:
            raise RuntimeError(finished.stderr[-2000:])
        kept = Path("build/found")
        for path in [*folder.glob("found-*"), *ended]:
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept / f"{target}-{path.name}")
        yield counted

    return run
