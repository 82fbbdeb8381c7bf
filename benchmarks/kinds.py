"""Discovery with very many distributions: ``kinds.resolve`` against one scan by the standard library, and the command.

``make bench`` runs it. The distributions are made up, with long descriptions, each with a kind of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rich.box
import rich.console
import rich.table

import noether_init_core.kinds.contract  # noqa: F401 - the first resolution imports it
from noether_init_core import kinds

COUNT = 300
PLUGIN = """
from noether_init_core import InitializerBase
class K(InitializerBase):
    def init_weights(self, model): pass
    def init_optimizer(self, model): pass
"""


def install(folder: Path, count: int) -> None:
    """Lay out distributions as pip would."""
    for number in range(count):
        info = folder / f"dummy_{number}-1.{number}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: dummy-{number}\nVersion: 1.{number}\n\n"
        (info / "METADATA").write_text(metadata + "long description\n" * 500)
        (info / "entry_points.txt").write_text(f"[{kinds.GROUP}]\ndummy_{number} = dummy_{number}:K\n")
        (folder / f"dummy_{number}.py").write_text(PLUGIN)


def milliseconds(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median and least."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken), min(taken)


def resolve() -> None:
    """As the first use in a process: nothing of an earlier scan is left, but the plugin has been imported."""
    kinds.clear_cache()
    kinds.resolve(f"dummy_{COUNT // 2}")


def list_anew() -> object:
    """Scan the entry points again, and list the kinds."""
    kinds.clear_cache()
    return kinds.installed()


def main() -> None:
    """Measure, print, and write as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install(folder, COUNT)
        sys.path.insert(0, name)
        resolve()
        imported = [module for module in sys.modules if module.startswith("dummy_")]
        assert imported == [f"dummy_{COUNT // 2}"], imported
        scan = milliseconds(lambda: importlib.metadata.entry_points(group=kinds.GROUP), options.rounds)
        first = milliseconds(resolve, options.rounds)
        again = milliseconds(lambda: kinds.resolve(f"dummy_{COUNT // 2}"), options.rounds)
        listed = milliseconds(list_anew, options.rounds)
        command = [sys.executable, "-c", "from noether_init_core.cli import main; main()", "kinds"]
        environment = {**os.environ, "PYTHONPATH": name}
        run = milliseconds(
            lambda: subprocess.run(command, env=environment, capture_output=True, check=True),
            max(5, options.rounds // 3),
        )
    started = milliseconds(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True), options.rounds)
    imported_front = [sys.executable, "-c", "import noether_init_core"]
    front = milliseconds(lambda: subprocess.run(imported_front, check=True), options.rounds)
    header = ("what", "median", "least", "against a scan", "target")
    rows = [
        ("importlib.metadata.entry_points, one scan", *_shown(scan, scan), ""),
        ("kinds.resolve, first use", *_shown(first, scan), "at most 1.3"),
        ("kinds.resolve, again", *_shown(again, scan), ""),
        ("kinds.installed, first use", *_shown(listed, scan), ""),
        ("ninit kinds, the whole command", *_shown(run, scan)[:2], "", "under 400 ms"),
    ]
    median, least = (f"{taken - alone:.2f} ms" for taken, alone in zip(front, started, strict=True))
    rows.append(("import noether_init_core, beyond the interpreter", median, least, "", "under 150 ms"))
    table = rich.table.Table(*header, title=f"{COUNT} distributions with a kind each", box=rich.box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)
    lines = [f"# {COUNT} distributions with a kind each; one plugin module is imported", ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]
    options.out.write_text("\n".join([*lines, ""]))


def _shown(taken: tuple[float, float], scan: tuple[float, float]) -> tuple[str, str, str]:
    return f"{taken[0]:.2f} ms", f"{taken[1]:.2f} ms", f"{taken[0] / scan[0]:.2f}"


if __name__ == "__main__":
    main()
