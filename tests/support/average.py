"""A checkpoint that computes its tensors: what a class of others needs at least."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from noether_init_core import BaseCheckpoint, Checkpoint
from noether_init_core.files.checkpoint import Key
from noether_init_core.files.content import Box, TensorInfo


class Average(BaseCheckpoint):
    """The mean of checkpoints with equal keys, computed when it is read."""

    def __init__(self, *parts: Checkpoint) -> None:
        self.path = Path("average")
        self._parts = parts
        self._tensors = {key: TensorInfo(info.shape, info.dtype) for key, info in parts[0].tensors().items()}

    @property
    def entries(self) -> Mapping[str, int]:
        return {"": len(self._tensors)}

    def tensors(self, entry: str | None = None) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, key: Key, box: Box | None = None) -> torch.Tensor:
        asked = self.key_of(key)
        return torch.stack([part.read(asked, box) for part in self._parts]).mean(0)

    def close(self) -> None:
        for part in self._parts:
            part.close()
