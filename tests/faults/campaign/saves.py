"""Saves whose every value is one number, so that a glance at what was loaded tells whether it belongs together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from faults.campaign.subjects import Trainer
from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind
from noether_init_core.errors import CheckpointNotFoundError, InitError
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.sets.snapshot import Snapshot

__all__ = ["BASELINES", "Found", "Numbered", "found_by_torch", "found_by_us", "is_torn_for_noether"]

PARTS = ("model", "optim", "trainer")


class Numbered:
    """A network, its optimizer and a trainer, all of whose values are one number."""

    def __init__(self, width: int) -> None:
        self.network = torch.nn.utils.skip_init(torch.nn.Linear, width, width)
        self.optimizer = torch.optim.AdamW(self.network.parameters())
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.model = bind(self.network, name="mlp", optimizer=self.optimizer)
        self.trainer = Trainer()
        self.become(-1)

    def become(self, number: int) -> None:
        """Set every value."""
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.fill_(number)
                for key in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][key].fill_(number)
        self.trainer.state = {"value": torch.full((64,), float(number))}

    def values(self) -> set[float]:
        """Every value: one, if everything belongs together."""
        tensors = [*self.network.parameters(), self.trainer.state["value"]]
        for state in self.optimizer.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        return {value for tensor in tensors for value in tensor.detach().unique().tolist()}

    def save(
        self,
        root: Path,
        number: int,
        *,
        storage: FileSystem = LOCAL,
        keep_last: int | None = None,
        tags: Sequence[str] = ("latest",),
        averages: bool = False,
        iteration: int | None = None,
    ) -> None:
        """A set of ours."""
        self.become(number)
        at = number if iteration is None else iteration
        writer = CheckpointWriter(PathProvider(root, "run"), keep_last=keep_last, storage=storage, flat_names=True)
        writer.save(
            self.model,
            TrainingIteration(at, at, at),
            tags=tags,
            trainer=self.trainer,
            averages={"ema=0.9": self.network.state_dict()} if averages else None,
        )

    def contents(self, number: int) -> dict[str, Any]:
        """What the files of the baselines hold."""
        self.become(number)
        return {
            "model": {"state_dict": self.network.state_dict()},
            "optim": self.optimizer.state_dict(),
            "trainer": dict(self.trainer.state),
        }


def save_in_place(numbered: Numbered, root: Path, number: int) -> None:
    """``torch.save`` onto the final names, as Noether and most scripts do."""
    root.mkdir(parents=True, exist_ok=True)
    for part, content in numbered.contents(number).items():
        torch.save(content, root / f"latest_{part}.th")


def save_renamed(numbered: Numbered, root: Path, number: int) -> None:
    """Each file under a temporary name, fsynced, then renamed."""
    root.mkdir(parents=True, exist_ok=True)
    for part, content in numbered.contents(number).items():
        temporary, path = root / f"latest_{part}.tmp", root / f"latest_{part}.th"
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


BASELINES = {"torch.save": save_in_place, "temp + fsync + rename": save_renamed}


@attrs.frozen
class Found:
    """What a program finds when it starts again.

    ``number``: of the whole set that was loaded, None where there is none; ``problem``: ``unloadable`` or ``torn``.
    """

    number: int | None
    problem: str = ""
    text: str = ""


def found_by_us(root: Path, width: int) -> Found:
    """Resume into a fresh process, the public way."""
    fresh = Numbered(width)
    try:
        stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=PathProvider(root, "run"))
        stack.initialize(fresh.model, trainer=fresh.trainer)
    except CheckpointNotFoundError as error:
        if not Snapshot(PathProvider(root, "run")).sets():
            return Found(None)
        return Found(None, "unloadable", str(error))
    except InitError as error:
        return Found(None, "unloadable", str(error))
    return _whole(fresh.values())


def found_by_torch(root: Path) -> Found:
    """``torch.load`` of the three files of the baselines."""
    try:
        parts = {part: torch.load(root / f"latest_{part}.th", weights_only=True) for part in PARTS}
    except Exception as error:  # any of torch's many errors
        return Found(None, "unloadable", str(error))
    return _whole(_values(parts))


def is_torn_for_noether(root: Path) -> bool:
    """Whether the flat names of ``latest`` are there with a trainer file but do not belong together."""
    folder = root / "run" / "checkpoints"
    paths = {part: folder / f"mlp_cp=latest_{part}.th" for part in PARTS}
    if not paths["trainer"].exists():
        return False
    try:
        return len(_values({part: torch.load(path, weights_only=True) for part, path in paths.items()})) != 1
    except Exception:  # any of torch's many errors: the file does not load
        return True


def _values(parts: Mapping[str, Any]) -> set[float]:
    tensors = [*parts["model"]["state_dict"].values(), parts["trainer"]["value"]]
    for state in parts["optim"]["state"].values():
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    return {value for tensor in tensors for value in tensor.unique().tolist()}


def _whole(values: set[float]) -> Found:
    if len(values) != 1:
        return Found(None, "torn", f"values {sorted(values)}")
    return Found(int(values.pop()))
