"""What the example trains: handwritten digits, a small network, augmentation, a log of losses; no checkpoints."""

from __future__ import annotations

import functools
import json
import os
import random
from pathlib import Path

import numpy
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

__all__ = ["TASKS", "LossLog", "Network", "accuracy", "augment", "training_data"]

TASKS = {"digit": 10, "parity": 2}
TRAINING_IMAGES = 1400


@functools.cache
def _images_and_digits() -> tuple[Tensor, Tensor]:
    """All 1797 images, float32 ``[N, 1, 8, 8]`` from 0 to 1, mixed once, and their digits."""
    found = load_digits()
    order = numpy.random.RandomState(0).permutation(len(found.target))
    images = torch.from_numpy(found.images[order]).float()[:, None] / 16
    return images, torch.from_numpy(found.target[order]).long()


def _labels(digits: Tensor, task: str) -> Tensor:
    return digits % 2 if task == "parity" else digits


def training_data(task: str, images: int = TRAINING_IMAGES) -> TensorDataset:
    """Images and labels to train on."""
    found, digits = _images_and_digits()
    return TensorDataset(found[:images], _labels(digits[:images], task))


def accuracy(network: nn.Module, task: str) -> float:
    """Share of the 397 images held back that the network gets right, from 0 to 1. Draws no random numbers."""
    images, digits = _images_and_digits()
    network.eval()
    with torch.no_grad():
        guesses = network(images[TRAINING_IMAGES:]).argmax(dim=1)
    return float((guesses == _labels(digits[TRAINING_IMAGES:], task)).float().mean())


def augment(images: Tensor) -> Tensor:
    """Shift, contrast and noise, each from another of the three global generators that a resume has to restore."""
    shifts = numpy.random.randint(-1, 2, size=(len(images), 2)).tolist()
    shifted = torch.stack([torch.roll(image, shift, dims=(1, 2)) for image, shift in zip(images, shifts, strict=True)])
    return shifted * random.uniform(0.8, 1.2) + 0.1 * torch.randn_like(images)


class Network(nn.Module):
    """Two convolutions and a hidden layer, with BatchNorm and dropout; ``head`` depends on the task."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(24 * 16, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.2)),
        )
        self.head = nn.Linear(48, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, ``[N, classes]``."""
        logits: Tensor = self.head(self.trunk(images))
        return logits

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy."""
        return functional.cross_entropy(self(images), labels)


class LossLog:
    """One line per update: which process made it, and its loss. A process that is killed leaves whole lines behind.

    An update that was made again after a kill has two lines.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab", buffering=0)
        self.file.write(b"" if path.stat().st_size == 0 else b"\n")

    def write(self, update: int, loss: float) -> None:
        """Append in one call to the system, so that a kill cannot split the line."""
        self.file.write(json.dumps({"process": os.getpid(), "update": update, "loss": loss}).encode() + b"\n")

    @staticmethod
    def read(path: Path) -> list[dict[str, float]]:
        """The whole lines of a log, which another process may be writing to; none where there is no file."""
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.splitlines() if line]
