"""Kills in the middle of saves: no set is torn, no acknowledged save is lost.

A helper process imports torch once and forks a child for every kill. The child saves in a loop, each iteration with
weights, optimizer state and trainer state of one recognisable value, and says through a pipe when a save begins and
when it has returned. The helper kills it with SIGKILL at a random time after a save began.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.kills import kill_once

KILLS = 100


def test_hundred_kills_tear_no_set_and_lose_no_acknowledged_save(tmp_path: Path) -> None:
    """After every kill the newest set is whole, loads, and is at least the last that was acknowledged."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(KILLS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    counted = json.loads(finished.stdout.splitlines()[-1])
    assert counted["kills"] == KILLS
    assert counted["in flight"] > KILLS / 2
    assert counted["uncommitted folders left"] > KILLS / 10
    assert counted["acknowledged"] > KILLS / 2
    assert (counted["torn"], counted["lost"], counted["torn for Noether"]) == (0, 0, 0)


class _Saves:
    """A model and its trainer that are saved with one value in every part; built before the forks, for speed."""

    def __init__(self) -> None:
        import torch

        from noether_init_core.models import bind

        self.module = torch.nn.Linear(128, 128)
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        for parameter in self.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.model = bind(self.module, name="mlp", optimizer=self.optimizer)
        self.value = torch.zeros(64)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def save(self, root: Path, number: int) -> None:
        """One set, all of whose values are ``number``."""
        import torch

        from noether_init_core.iteration import TrainingIteration
        from noether_init_core.paths import PathProvider
        from noether_init_core.saving.writer import CheckpointWriter

        self.value.fill_(number)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(number)
                self.optimizer.state[parameter]["exp_avg"].fill_(number)
        writer = CheckpointWriter(PathProvider(root, "run"), keep_last=3, flat_names=True)
        writer.save(self.model, TrainingIteration(number, number, number), trainer=self)


def _values(weights: Any, optim: Any, trainer: Any) -> set[float]:
    """Every value that the parts of a set say: one, if they belong together."""
    found = set(weights["state_dict"]["weight"].unique().tolist())
    found |= set(optim["state"][0]["exp_avg"].unique().tolist())
    found |= set(trainer["value"].unique().tolist())
    return found | {float(part["training_iteration"]["epoch"]) for part in (weights, trainer)}


def _is_torn_for_noether(folder: Path) -> bool:
    """Whether the flat names of ``latest`` are there with a trainer file but do not belong together."""
    import torch

    paths = [folder / f"mlp_cp=latest_{part}.th" for part in ("model", "optim", "trainer")]
    if not paths[2].exists():
        return False
    try:
        return len(_values(*(torch.load(path, weights_only=True) for path in paths))) != 1
    except Exception:  # any of torch's many errors: the file does not load
        return True


def _main(root: Path, kills: int) -> None:
    import torch

    from noether_init_core.errors import CheckpointError
    from noether_init_core.files.opening import open_checkpoint
    from noether_init_core.iteration import TrainingIteration
    from noether_init_core.paths import PathProvider
    from noether_init_core.sets.checkpoint_set import Need
    from noether_init_core.sets.file_names import PARTS
    from noether_init_core.sets.selection import find_set, newest_set
    from noether_init_core.sets.snapshot import Snapshot

    torch.set_num_threads(1)
    saves = _Saves()
    saves.save(root / "warm", 1)
    root = root / "killed"
    chance = random.Random(0)
    paths = PathProvider(root, "run")
    counted = dict.fromkeys(
        ("kills", "in flight", "uncommitted folders left", "acknowledged", "torn", "lost", "torn for Noether"), 0
    )
    last, zero = 0, TrainingIteration.zero()
    for _ in range(kills):
        begun, acknowledged = kill_once(
            functools.partial(saves.save, root), last + 1, chance.randint(0, 2), chance.uniform(0, 0.06)
        )
        counted["kills"] += 1
        counted["in flight"] += begun > acknowledged
        counted["acknowledged"] += acknowledged - last
        snapshot = Snapshot(paths)
        counted["uncommitted folders left"] += len(snapshot.uncommitted()) > 0
        newest = newest_set(snapshot)
        if newest is None:
            counted["lost"] += acknowledged > 0
            continue
        try:
            found = find_set(snapshot, None, [Need("mlp", "model"), Need("mlp", "optim"), Need("mlp", "trainer")]).found
            parts = []
            for part in PARTS:
                file = found.file("mlp", part)
                assert file is not None
                with open_checkpoint(file.path, digests=found.file_digest(file)) as reader:
                    reader.verify()
                    parts.append(reader.load())
            values = _values(*parts)
            counted["torn"] += found != newest or values != {float((newest.iteration or zero).epoch or 0)}
            counted["torn"] += len(snapshot.broken())
        except CheckpointError as error:
            print(error, file=sys.stderr)
            counted["torn"] += 1
        counted["torn for Noether"] += _is_torn_for_noether(snapshot.folder)
        reached = (newest.iteration or zero).epoch or 0
        counted["lost"] += reached < acknowledged
        last = max(reached, acknowledged)
    print(json.dumps(counted))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
