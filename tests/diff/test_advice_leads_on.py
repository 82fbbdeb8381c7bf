"""What a comparison of two checkpoints advises is done here, in the situation that advises it, and leads on."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from support.advice import digests, executes, saw, typed
from support.following import advised

from noether_init_core import CheckpointWriter, PathProvider, TrainingIteration, bind, compose
from noether_init_core.diff.compare import compare_checkpoints, compare_sides
from noether_init_core.diff.sides import side_at


def saved(path: Path, prefix: str = "") -> Path:
    torch.save({prefix + name: value for name, value in torch.nn.Linear(300, 2).state_dict().items()}, path)
    return path


@executes("diff/compare.py", "Next: give two files", "Next: {}", "Next: repeat the comparison")
@executes("diff/sides.py", "Next: RUN@{}, or {} alone", "Next: give one of {}")
def test_two_checkpoints_are_given_as_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files, an option, a set of a run, the file alone, one of several runs; every file stays as it was."""
    monkeypatch.chdir(tmp_path)
    for run, names in (("one", "ab"), ("two", "cd")):
        model = compose(run, {name: bind(torch.nn.Linear(300, 2), name) for name in names})
        CheckpointWriter(PathProvider("runs", run)).save(model, TrainingIteration(1, 10, 100))
    a, b = saved(Path("a.pt")), saved(Path("b.pt"), "module.model.")
    c = saved(Path("c.pt"))
    before = digests(tmp_path)

    notes = saw(" ".join(compare_checkpoints("runs/one", "runs/two").notes))
    assert "Next: give two files" in notes
    files = [next(Path("runs", run).rglob("*_model.th")) for run in ("one", "two")]
    assert all(row.state not in ("only_a", "only_b") for row in compare_checkpoints(*files).rows)

    notes = saw(" ".join(compare_checkpoints(a, b).notes))
    options = re.search(r"Next: ((?:--strip \S+ ?)+)", notes)
    assert options is not None
    stripped = shlex.split(options[1])[1::2]
    assert all(row.state not in ("only_a", "only_b") for row in compare_checkpoints(a, b, strip=stripped).rows)
    assert typed(f"ninit diff a.pt b.pt {options[1]} || test $? = 1").returncode == 0

    first, _, second = advised(lambda: compare_checkpoints("a.pt@latest", a)).partition(", or ")
    compare_checkpoints(first.replace("RUN", "runs/one"), a)
    compare_checkpoints(second.removesuffix(" alone"), a)
    named = advised(lambda: compare_checkpoints("runs", a)).removeprefix("give one of ").split(", ")
    assert named == ["runs/one", "runs/two"]
    for name in named:
        compare_checkpoints(name, a)
    assert digests(tmp_path) == before

    sides = side_at(a), side_at(c)
    said = advised(lambda: compare_sides(*sides, advance=lambda _bytes: os.utime(c, ns=(1, 1))))
    assert said == "repeat the comparison"
    compare_sides(*sides)
    assert digests(tmp_path) == before
