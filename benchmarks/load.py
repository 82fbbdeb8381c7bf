"""Loading and saving a model of 302M parameters: ours and what is used elsewhere, as ratios to a memory copy.

`make bench` runs it. Everything is measured in one process and one run, in turn and not one after the other, so that
what else the machine does falls on all alike. The files are in the page cache. Linux only, because of RssAnon.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
import safetensors.torch
import torch

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    TrainingIteration,
    bind,
    open_checkpoint,
)

BLOCKS, WIDTH = 24, 1024
ITERATION = TrainingIteration(1, 10, 100)
MIB = 1 << 20
Rows = list[tuple[str, ...]]


def build(width: int = WIDTH, blocks: int = BLOCKS) -> torch.nn.Module:
    """Blocks as in a transformer, 12 tensors each; nobody calls the module."""

    def block() -> torch.nn.Module:
        layers = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        norms = [torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)]
        return torch.nn.ModuleList([*norms, *(torch.nn.Linear(*sizes) for sizes in layers)])

    return torch.nn.ModuleList([block() for _ in range(blocks)])


class Peak:
    """The most anonymous memory while the block runs, beyond what there was before; sampled all the time."""

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no memory that can be used unseen
        self._before = self._most = anonymous_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._is_over.wait(0.0005):
            self._most = max(self._most, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.bytes = max(self._most, anonymous_bytes()) - self._before


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


def copy_by_torch(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """``copy_`` of every tensor, with torch's own threads."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def copy_by_two_threads(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """The same with two threads that do not wait for each other after every tensor."""
    pairs = [(target.numpy(), source.numpy()) for source, target in zip(sources, targets, strict=True)]

    def copy(number: int) -> None:
        for target, source in pairs[number::2]:
            np.copyto(target, source)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(copy, range(2)))


def in_turn(
    measured: dict[str, Callable[[], float | None]], rounds: int, done: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of every round of each; a function that measures itself returns them."""
    times: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(rounds + 1):
        for name, function in measured.items():
            gc.collect()
            began = time.perf_counter()
            own = function()
            elapsed = time.perf_counter() - began
            if number:  # the first round warms up
                times[name].append(elapsed if own is None else own)
            done()
    return times


def table_of(times: dict[str, list[float]], copies: list[str], peaks: dict[str, int] | None = None) -> Rows:
    """Median and minimum, each with its ratio to the better memory copy, and the peak of memory."""
    by_median = min(statistics.median(times[name]) for name in copies)
    by_minimum = min(min(times[name]) for name in copies)
    rows: Rows = []
    for name, seconds in times.items():
        median, minimum = statistics.median(seconds), min(seconds)
        extra = "" if not peaks or name not in peaks else f"{peaks[name] / MIB:.0f} MiB"
        figures = (f"{median * 1e3:.0f} ms", f"{median / by_median:.2f}")
        rows.append((name, *figures, f"{minimum * 1e3:.0f} ms", f"{minimum / by_minimum:.2f}", extra))
    return rows


def measure_loading(folder: Path, rounds: int, done: Callable[[], None]) -> Rows:
    module = build()
    state = module.state_dict()
    paths = PathProvider(folder, "trained")
    CheckpointWriter(paths, flat_names=False).save(bind(module, name="net"), ITERATION)
    bare, safe = folder / "bare.pt", folder / "model.safetensors"
    torch.save(state, bare)
    safetensors.torch.save_model(module, str(safe))
    sources, targets = [torch.randn_like(tensor) for tensor in state.values()], list(state.values())
    model = bind(module, name="net")

    def ours(config: dict[str, Any]) -> None:
        InitializerStack.from_config([config], path_provider=paths.with_run("new")).initialize(model)

    def ours_on_meta(config: dict[str, Any]) -> float:
        with torch.device("meta"):
            fresh = bind(build(), name="net")
        stack = InitializerStack.from_config([config], path_provider=paths.with_run("new"))
        began = time.perf_counter()
        stack.initialize(fresh)
        return time.perf_counter() - began

    def by_torch(**options: Any) -> None:
        module.load_state_dict(torch.load(bare, weights_only=True, **options))

    committed = {"kind": "previous_run", "run_id": "trained"}
    file = {"kind": "file", "path": str(bare)}
    copies = ["memory copy, torch's threads", "memory copy, two threads"]
    measured: dict[str, Callable[[], float | None]] = {
        copies[0]: lambda: copy_by_torch(sources, targets),
        copies[1]: lambda: copy_by_two_threads(sources, targets),
        "**ours**, committed set, defaults": lambda: ours(committed),
        "**ours**, bare .pt, defaults": lambda: ours(file),
        "**ours**, bare .pt, `verify: none`": lambda: ours({**file, "verify": "none"}),
        "**ours**, meta device, `verify: none`": lambda: ours_on_meta({**file, "verify": "none"}),
        "**ours**, meta device, defaults": lambda: ours_on_meta(committed),
        "**ours**, safetensors, defaults": lambda: ours({"kind": "file", "path": str(safe)}),
        "`torch.load` + `load_state_dict`": lambda: by_torch(),
        "`torch.load(mmap=True)` + `load_state_dict`": lambda: by_torch(mmap=True),
        "`safetensors.torch.load_model`": lambda: safetensors.torch.load_model(module, str(safe)) and None,
    }
    times = in_turn(measured, rounds, done)
    peaks = {}
    for name, function in measured.items():
        with Peak() as peak:
            function()
        peaks[name] = peak.bytes - (sum(tensor.nbytes for tensor in targets) if "meta device, defaults" in name else 0)
        done()
    return table_of(times, copies, peaks)


def measure_resuming(folder: Path, rounds: int, done: Callable[[], None]) -> Rows:
    module = build()
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    paths = PathProvider(folder, "resumed")
    saved = CheckpointWriter(paths, flat_names=False).save(bind(module, name="net", optimizer=optimizer), ITERATION)
    files = {part: saved.file("net", part) for part in ("model", "optim")}
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    sources = [*map(torch.clone, module.state_dict().values()), *map(torch.clone, moments)]
    targets = [*module.state_dict().values(), *moments]

    def into_fresh() -> None:
        count = len(targets) - len(moments)
        copy_by_torch(sources[:count], targets[:count])
        [source.clone() for source in sources[count:]]

    def ours() -> float:
        model = bind(module, name="net", optimizer=torch.optim.AdamW(module.parameters()))
        stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
        began = time.perf_counter()
        stack.initialize(model)
        return time.perf_counter() - began

    def by_torch() -> float:
        other = torch.optim.AdamW(module.parameters())
        began = time.perf_counter()
        module.load_state_dict(torch.load(files["model"].path, weights_only=True)["state_dict"])
        state = torch.load(files["optim"].path, weights_only=True)
        other.load_state_dict({key: state[key] for key in ("state", "param_groups")})
        return time.perf_counter() - began

    copies = ["memory copy, torch's threads", "memory copy, two threads"]
    measured: dict[str, Callable[[], float | None]] = {
        copies[0]: lambda: copy_by_torch(sources, targets),
        copies[1]: lambda: copy_by_two_threads(sources, targets),
        "memory copy of the weights, `clone` of the moments": into_fresh,
        "**ours**, `resume`, defaults": ours,
        "`torch.load` + `load_state_dict`, weights and optimizer": by_torch,
    }
    times = in_turn(measured, rounds, done)
    peaks = {}
    own = sum(tensor.nbytes for tensor in moments)
    for name, function in list(measured.items())[3:]:
        with Peak() as peak:
            function()
        peaks[name] = peak.bytes - own
        done()
    return table_of(times, copies, peaks)


def measure_saving(folder: Path, rounds: int, done: Callable[[], None]) -> Rows:
    module = build()
    model = bind(module, name="net")
    content = {"state_dict": module.state_dict()}

    def by_torch() -> float:
        path = folder / "plain.th"
        began = time.perf_counter()
        with path.open("xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        elapsed = time.perf_counter() - began
        path.unlink()
        os.sync()
        return elapsed

    def ours(flat_names: bool) -> float:
        paths = PathProvider(folder, "saved")
        writer = CheckpointWriter(paths, flat_names=flat_names)
        began = time.perf_counter()
        writer.save(model, ITERATION)
        elapsed = time.perf_counter() - began
        shutil.rmtree(folder / "saved")
        os.sync()
        return elapsed

    measured: dict[str, Callable[[], float | None]] = {
        "`torch.save` + fsync": by_torch,
        "**ours**, a committed set": lambda: ours(False),
        "**ours**, with flat names for Noether": lambda: ours(True),
    }
    return table_of(in_turn(measured, rounds, done), ["`torch.save` + fsync"])


def measure_header(folder: Path, rounds: int) -> Rows:
    path = folder / "many.pt"
    torch.save({f"layers.{number}.weight": torch.zeros(1) for number in range(100_000)}, path)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        open_checkpoint(path).close()
        seconds.append(time.perf_counter() - began)
    return [("header of 100,000 keys", f"{statistics.median(seconds):.2f} s", f"{min(seconds):.2f} s")]


def markdown(title: str, header: tuple[str, ...], rows: Rows) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main() -> None:
    """Measure, print tables and write them as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", choices=["load", "resume", "save", "header"], action="append")
    parser.add_argument("--folder", type=Path, help="where the files are made; about 9 GB, a folder of its own")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    console = rich.console.Console()
    loads = [os.getloadavg()[0]]
    times = ("what", "median", "ratio", "minimum", "ratio", "memory beyond it")
    sections: list[tuple[str, str, tuple[str, ...], Callable[[Path], Rows]]] = [
        ("load", "Into an existing model of 302M parameters (288 tensors, 1.21 GB)", times,
         lambda folder: measure_loading(folder, options.rounds, watch)),
        ("resume", "Weights and AdamW moments (3.63 GB)", times,
         lambda folder: measure_resuming(folder, max(3, options.rounds // 2), watch)),
        ("save", "Saving the weights (1.21 GB), on the disk when it returns", times,
         lambda folder: measure_saving(folder, max(3, options.rounds // 2), watch)),
        ("header", "Headers", ("what", "median", "minimum"), lambda folder: measure_header(folder, 5)),
    ]  # fmt: skip

    def watch() -> None:
        loads.append(os.getloadavg()[0])

    parts = []
    for name, title, header, measure in sections:
        if options.only and name not in options.only:
            continue
        with tempfile.TemporaryDirectory(prefix="noether-init-bench-", dir=options.folder) as folder:
            rows = measure(Path(folder))
        table = rich.table.Table(*header, title=title, box=rich.box.SIMPLE)
        for row in rows:
            table.add_row(*(cell.replace("**", "").replace("`", "") for cell in row))
        console.print(table)
        parts.append(markdown(title, header, rows))
    said = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}; load average of the "
        f"machine meanwhile {min(loads):.1f} to {max(loads):.1f}, this benchmark included. Ratios are to the faster "
        "memory copy (of saving: to `torch.save`); *memory beyond it* is the peak of anonymous memory beyond the model "
        "and its optimizer state."
    )
    console.print(said.replace("*", "").replace("`", ""))
    options.out.write_text("# Loading and saving, measured\n\n" + said + "\n\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
