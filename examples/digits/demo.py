"""Kill a training run where it hurts, start it again unedited, and compare with a run that was never interrupted.

Every run here is a process of its own that runs ``train.py``; this file only watches, kills, compares and draws. Exit
code 0 means: both kills hit what they were meant to hit, and not one number differs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from digits import TASKS, LossLog, Network
from pages import write_pages
from picture import Attempt, draw

from noether_init_core import InitializerStack, PathProvider, Snapshot, bind, newest_set

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
MARKER = ".noether-init-demo"
BATCHES_PER_EPOCH = 28
UPDATES_PER_SAVE = 12
MOST_ATTEMPTS = 12


def main(output: Path, epochs: int) -> int:
    """Run the whole demonstration; returns the exit code."""
    if output.exists() and any(output.iterdir()) and not (output / MARKER).exists():
        print(f"{output} holds something else than this demonstration. Next: --output with another folder")
        return 2
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARKER).touch()
    began = time.monotonic()

    print(f"1. {epochs} epochs without interruption, in the background")
    whole, killed = PathProvider(output, "uninterrupted"), PathProvider(output, "killed")
    background = Training(whole, epochs)

    print(
        "2. the same, killed in the middle of an epoch and in the middle of a save, started again unedited", flush=True
    )
    try:
        attempts = train_and_kill(killed, epochs)
    except BaseException:
        background.kill()
        raise
    background.finish()
    for attempt in attempts:
        print(f"   {attempt}")

    print("3. compared at the end: every tensor and number of weights, EMA, optimizer and trainer")
    equal, total = compare(final_state(whole), final_state(killed))
    redone = compare_losses(LossLog.read(whole.run_output_path / "losses.jsonl"), attempts)

    print("4. another task, even or odd, from 150 images: the trunk from the run above, a head of its own", flush=True)
    warm_start(output)

    print("5. pages to look at, one file each: what will happen, what happened, how far it moved, where it came from")
    for page in write_pages(output, HERE / "warm_start.yaml"):
        print(f"   {page}")

    draw(output / "demo", LossLog.read(whole.run_output_path / "losses.jsonl"), attempts, equal, total)
    print(f"picture: {output / 'demo.png'} and .svg; {time.monotonic() - began:.0f} s in all")
    return 0 if equal == total > 0 and redone else 1


class Training:
    """A process that runs ``train.py``."""

    def __init__(self, paths: PathProvider, epochs: int, *options: str) -> None:
        self.paths = paths
        self.output = paths.output_root / f"{paths.run_id}.log"
        command = [sys.executable, "train.py", "--output-root", str(paths.output_root.resolve())]
        command += ["--run-id", paths.run_id, "--epochs", str(epochs), *options]
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(command, cwd=HERE, stdout=file, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        """Wait for the end."""
        if self.process.wait() != 0:
            raise SystemExit(f"train.py failed:\n{self.output.read_text()}")

    def kill(self) -> bool:
        """Send SIGKILL; False if the process came to its end before."""
        self.process.send_signal(signal.SIGKILL)
        code = self.process.wait()
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"train.py failed:\n{self.output.read_text()}")
        return code != 0

    @property
    def lines(self) -> list[dict[str, float]]:
        """What this process has logged."""
        lines = LossLog.read(self.paths.run_output_path / "losses.jsonl")
        return [line for line in lines if line["process"] == self.process.pid]

    @property
    def is_saving(self) -> bool:
        """Whether there is a set that is not committed yet."""
        return uncommitted(self.paths) is not None


def uncommitted(paths: PathProvider) -> str | None:
    """The name of a set without manifest."""
    sets = paths.checkpoint_path / "sets"
    for name in sorted(os.listdir(sets)) if sets.is_dir() else ():
        if not (sets / name / "manifest.json").exists():
            return name
    return None


def train_and_kill(paths: PathProvider, epochs: int) -> list[Attempt]:
    """Start and kill until one kill hit the middle of an epoch and one the middle of a save; then to the end."""
    attempts: list[Attempt] = []
    wanted = ["epoch", "save"]
    updates = epochs * BATCHES_PER_EPOCH
    while wanted:
        if len(attempts) == MOST_ATTEMPTS:
            raise SystemExit(f"no kill hit the middle of {wanted[0]} in {MOST_ATTEMPTS} attempts")
        newest = newest_set(Snapshot(paths))
        done = 0 if newest is None or newest.iteration is None else int(newest.iteration.update or 0)
        target = max(done, updates // 3 if wanted[0] == "epoch" else updates * 2 // 3)
        while wanted[0] == "epoch" and (target % UPDATES_PER_SAVE != 4 or not 0 < target % BATCHES_PER_EPOCH < 20):
            target += 1  # well between two saves and two epochs, since the process goes on until the signal arrives
        training = Training(paths, epochs)
        while training.process.poll() is None:
            made = training.lines
            if made and made[-1]["update"] >= target and (wanted[0] == "epoch" or training.is_saving):
                break
            time.sleep(0.0005)
        if not training.kill():
            raise SystemExit(f"the run came to its end before the kill in the middle of {wanted[0]}")
        update, torn = int(training.lines[-1]["update"]), uncommitted(paths)
        hit = "save" if torn is not None else "epoch" if update % BATCHES_PER_EPOCH else "end of an epoch"
        place = {"save": "in the middle of a save", "epoch": "in the middle of an epoch"}.get(hit, f"at the {hit}")
        attempts.append(Attempt(training.lines, place, torn))
        if hit in wanted:
            wanted.remove(hit)
    training = Training(paths, epochs)
    training.finish()
    return [*attempts, Attempt(training.lines, None)]


def final_state(paths: PathProvider) -> dict[str, Any]:
    """Every value of the newest set by its place, read by plain torch: model, EMA, optimizer, trainer."""
    newest = newest_set(Snapshot(paths))
    if newest is None:
        raise SystemExit(f"{paths.run_id} has no committed set")
    state: dict[str, Any] = {}
    for file in newest.files:
        part = {"model": "weights and buffers", "optim": "optimizer", "trainer": "trainer"}[file.part]
        content = torch.load(file.path, weights_only=True)
        content.pop("run_id", None)
        state |= dict(leaves(content, f"EMA ({file.info})" if file.info else part))
    return state


def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The tensors, numbers and texts in nested dicts and lists, each by its place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, f"{place}/{number}")
    else:
        yield place, value


def compare(expected: dict[str, Any], found: dict[str, Any]) -> tuple[int, int]:
    """Print a table by part; returns how many tensors are equal, and how many there are."""
    rows: dict[str, list[int]] = {}
    different = sorted(place for place in {*expected, *found} if not same(expected.get(place), found.get(place)))
    for place in {**expected, **found}:
        row = rows.setdefault(place.split("/")[0], [0, 0, 0, 0])
        column = 0 if isinstance(expected.get(place, found.get(place)), torch.Tensor) else 2
        row[column] += 1
        row[column + 1] += place in different
    print(f"   {'':22}{'tensors':>9}{'differ':>9}{'numbers':>11}{'differ':>9}")
    for part, (tensors, bad_tensors, numbers, bad_numbers) in rows.items():
        print(f"   {part:22}{tensors:>9}{bad_tensors:>9}{numbers:>11}{bad_numbers:>9}")
    for place in different[:10]:
        print(f"   differs: {place}")
    total = sum(row[0] for row in rows.values())
    wrong = sum(row[1] for row in rows.values())
    print(f"{wrong} of {total} tensors differ")
    if any(row[3] for row in rows.values()):
        print("numbers differ")
        return 0, total
    return total - wrong, total


def same(first: Any, other: Any) -> bool:
    """Whether two values have the same type, shape and bits."""
    if isinstance(first, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (first.dtype, first.shape) == (other.dtype, other.shape)
        return alike and first.numpy().tobytes() == other.numpy().tobytes()
    return type(first) is type(other) and bool(first == other)


def compare_losses(whole: list[dict[str, float]], attempts: list[Attempt]) -> bool:
    """Whether each update had the same loss in every process that made it."""
    expected = {line["update"]: line["loss"] for line in whole}
    lines = [line for attempt in attempts for line in attempt.lines]
    different = [line["update"] for line in lines if expected.get(line["update"]) != line["loss"]]
    complete = {line["update"] for line in lines} == expected.keys()
    again = len(lines) - len(expected)
    print(f"{len(different)} of {len(lines)} losses differ ({again} updates were made again after a kill)")
    return complete and not different


def warm_start(output: Path) -> None:
    """Train the second task twice, from the first run and from nothing, and print what it brings."""
    warm, fresh = PathProvider(output, "parity_warm"), PathProvider(output, "parity_from_scratch")
    plan = InitializerStack.from_file(HERE / "warm_start.yaml", path_provider=warm).plan(
        bind(Network(TASKS["parity"]), name="digits")
    )
    counts = plan.counts()
    print(f"   plan: {counts.get('load', 0)} tensors loaded, {counts.get('keep', 0)} fresh (head)")
    few = ("--task", "parity", "--images", "150")
    runs = [
        Training(warm, 8, *few, "--config", str(HERE / "warm_start.yaml")),
        Training(fresh, 8, *few, "--config", str(HERE / "init.yaml")),
    ]
    for training in runs:
        training.finish()
    print(f"   {'accuracy after updates':26}" + "".join(f"{update:>9}" for update in (6, 12, 18, 24)))
    for training, name in zip(runs, ("warm start", "from scratch"), strict=True):
        found = re.findall(r"accuracy (\S+%)", training.output.read_text())
        print(f"   {name:26}" + "".join(f"{value:>9}" for value in found[1::2]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="a folder of its own, replaced each time"
    )
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    sys.exit(main(arguments.output, arguments.epochs))
