"""Runs with many sets: a save with retention, and questions: ``python benchmarks/sets.py``; writes benchmarks/sets.md.

A save beside 300 kept sets and one beside 3 alternate in the same process, each with retention that keeps as many, so
that each removes one. Questions are asked beside 10,000 sets, with a warm cache, each by a stack or a command made
anew.
The writer wrote the newest of them and the one in the middle; the others are copies under other iterations and
numbers, with manifests of their own. Nothing waits for the disk while sets are made.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import torch

from noether_init_core import (
    CheckpointNotFoundError,
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    TrainerState,
    TrainingIteration,
    bind,
)

FEW, MANY = 3, 300
GOAL_OF_SAVES, GOAL_OF_NEWEST, GOAL_OF_QUESTIONS = 1.2, 0.1, 1.0


def model() -> Any:
    """The smallest model that can be saved; what is measured is not its bytes."""
    return bind(torch.nn.Linear(1, 1), name="net")


def at(number: int) -> TrainingIteration:
    """The iteration of the set with this number."""
    return TrainingIteration(number, number, number)


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def fill(paths: PathProvider, count: int) -> None:
    """``count`` sets with model and trainer, by the writer, without waiting for the disk."""
    writer, saved = CheckpointWriter(paths, flat_names=False), model()
    trainer = TrainerState(seed=1)
    with patch.object(os, "fsync", lambda _file: None):
        for number in range(1, count + 1):
            trainer.advance(1, end_of_epoch=True)
            writer.save(saved, at(number), trainer=trainer)


def fill_with_copies(paths: PathProvider, count: int) -> None:
    """``count`` sets, of which the writer writes the middle one and the newest, in a run of the same name elsewhere."""
    target = paths.checkpoint_path / "sets"
    target.mkdir(parents=True)
    scratch = PathProvider(paths.output_root / "scratch", paths.run_id)
    trainer = TrainerState(seed=1)
    written = {}
    for number in range(1, count + 1):
        trainer.advance(1, end_of_epoch=True)
        if number in (count // 2, count):
            with patch.object(os, "fsync", lambda _file: None):
                written[number] = CheckpointWriter(scratch).save(model(), at(number), trainer=trainer)
    for number in range(1, count + 1):
        found = written.get(number, written[count // 2])
        folder, manifest = target / f"{number:08d}_{at(number)}", found.manifest
        assert manifest is not None
        folder.mkdir()
        files = []
        for file in manifest.files:
            name = file.name.replace(found.name, str(at(number)))
            os.link(found.folder / file.name, folder / name)
            files.append(msgspec.structs.replace(file, name=name))
        os.link(found.folder / "digests.json", folder / "digests.json")
        update = {
            "sequence": number,
            "iteration": at(number).to_mapping(),
            "tags": (str(at(number)), "latest"),
            "files": tuple(files),
        }
        (folder / "manifest.json").write_bytes(msgspec.structs.replace(manifest, **update).to_bytes())


def saves(folder: Path, rounds: int) -> str:
    """The table of saves with retention."""
    writers = {}
    for count in (FEW, MANY):
        paths = PathProvider(folder, f"kept{count}")
        fill(paths, count)
        writers[count] = CheckpointWriter(paths, flat_names=False, keep_last=count)
    saved = model()
    taken: dict[int, list[float]] = {FEW: [], MANY: []}
    for number in range(MANY + 1, MANY + 1 + rounds):
        for count, writer in writers.items():
            taken[count].append(seconds(functools.partial(writer.save, saved, at(number))))
    few, many = (statistics.median(taken[count][1:]) for count in (FEW, MANY))
    rows = [f"| {FEW} | {1000 * few:.1f} ms | 1 |", f"| {MANY} | {1000 * many:.1f} ms | {many / few:.2f} |"]
    return "\n".join(["| kept sets | a save with retention | ratio |", "|---|---:|---:|", *rows])


def questions(folder: Path, count: int, rounds: int) -> str:
    """The table of questions beside ``count`` sets."""
    old, new = PathProvider(folder, "old"), PathProvider(folder, "new")
    fill_with_copies(old, count)
    middle = count // 2

    def start(**config: Any) -> object:
        config = {"kind": "resume", "run_id": "old", "model_name": "net", **config}
        return InitializerStack.from_config([config], path_provider=new).start_checkpoint()

    def auto_resume(text: str) -> object:
        (folder / "init.yaml").write_text(f"auto_resume: true\n{text}")
        return InitializerStack.from_file(folder / "init.yaml", path_provider=old).start_checkpoint()

    def missing(tag: Any) -> None:
        try:
            start(checkpoint_tag=tag)
        except CheckpointNotFoundError:
            return
        raise AssertionError(f"{tag} was found")

    numbers = iter(range(count + 1, 2 * count))
    asked: dict[str, Callable[[], object]] = {
        "`resume`, `latest`": start,
        "`auto_resume`": lambda: auto_resume(""),
        "`auto_resume`, `on_invalid: previous`": lambda: auto_resume("on_invalid: previous\n"),
        "`resume`, the tag of an iteration": lambda: start(checkpoint_tag=str(at(middle))),
        "`resume`, `{epoch: n}`": lambda: start(checkpoint_tag={"epoch": middle}),
        "`resume`, an iteration that was not saved": lambda: missing({"epoch": 3 * count}),
        "`resume`, a tag that was not saved": lambda: missing("best_model.loss"),
        "`inspect` of the run, the whole command": lambda: subprocess.run(
            [sys.executable, "-m", "noether_init_core", "inspect", str(old.run_output_path)],
            check=True,
            stdout=subprocess.DEVNULL,
        ),
        "a save, `keep_last` as many": lambda: CheckpointWriter(old, flat_names=False, keep_last=count).save(
            model(), at(next(numbers))
        ),
    }
    lines = [f"| beside {count:,} sets | seconds |", "|---|---:|"]
    for title, ask in asked.items():
        ask()
        lines.append(f"| {title} | {statistics.median(seconds(ask) for _ in range(rounds)):.3f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main(count: int, rounds: int, target: Path) -> None:
    """Measure and write the page."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        first = saves(Path(folder), 5 * rounds)
        print(first, flush=True)
        second = questions(Path(folder), count, rounds)
    target.write_text(
        f"# Runs with many sets\n\n{(__doc__ or '').partition(chr(10))[2].strip()}\n\n{first}\n\n"
        f"Goal: a ratio of at most {GOAL_OF_SAVES}.\n\n{second}\n\n"
        f"Goals: the newest set in at most {GOAL_OF_NEWEST} s, every question in at most {GOAL_OF_QUESTIONS} s.\n"
    )
    print(f"{target} was written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    chosen = parser.parse_args()
    main(chosen.sets, chosen.rounds, chosen.out)
