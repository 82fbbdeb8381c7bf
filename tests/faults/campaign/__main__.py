"""Runs the campaign, or goes on with one that was stopped, and writes its tables and its picture.

``--work`` holds the counts of every series; remove it to begin anew. ``--scale 0.01`` tries everything in small.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path


def main() -> int:
    """The command line; 1 if something went wrong that must not."""
    parser = argparse.ArgumentParser(prog="python -m faults.campaign", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/faults"), help="counts, kept between runs")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="series at one time")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the numbers and times")
    parser.add_argument("--only", default="", help="series whose name contains this")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are written; the picture beside it")
    arguments = parser.parse_args()
    # before the import: every process of the campaign uses one core
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from faults.campaign.cells import all_cells
    from faults.campaign.report import problems, write_page

    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    arguments.work.mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in all_cells(arguments.scale) if arguments.only in cell.name]
    begin = time.monotonic()
    failed = _run(cells, arguments.work, arguments.jobs)
    results = {}
    for cell in all_cells(arguments.scale):
        with contextlib.suppress(FileNotFoundError):
            state = json.loads(_path(arguments.work, cell.name).read_text())
            if state["done"]:
                results[cell.name] = state
    print(f"{len(results)} series done, {(time.monotonic() - begin) / 60:.1f} minutes this time")
    if arguments.page is not None:
        write_page(arguments.page, results, datetime.date.today().isoformat())
    found = problems(results)
    for line in found:
        print(f"PROBLEM {line}")
    return 1 if found or failed else 0


def _path(work: Path, name: str) -> Path:
    return work / (name.replace("/", "__").replace(" ", "_") + ".json")


def _run(cells: list, work: Path, jobs: int) -> list[str]:  # type: ignore[type-arg]
    """Each series in a process of its own, ``jobs`` at one time, so that none sees what another left behind."""
    from faults.campaign.cells import run_cell

    waiting, running, failed, done = list(cells), dict[int, tuple[str, float]](), list[str](), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            cell = waiting.pop(0)
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run_cell(cell, work)
                    code = 0
                except Exception as error:
                    print(f"{cell.name}: {error}", file=sys.stderr)
                finally:
                    os._exit(code)
            running[child] = cell.name, time.monotonic()
        child, status = os.wait()
        name, began = running.pop(child)
        done += 1
        counts = json.loads(_path(work, name).read_text())["counts"] if _path(work, name).exists() else {}
        shown = ", ".join(f"{key} {value}" for key, value in counts.items() if value)
        print(f"[{done}/{len(cells)}] {name}: {shown or 'nothing'} ({time.monotonic() - began:.0f} s)", flush=True)
        if status:
            failed.append(name)
            print(f"FAILED {name}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
