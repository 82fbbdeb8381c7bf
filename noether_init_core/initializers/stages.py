"""The stages of a load, each a frozen value that holds the one before: opened, planned, verified, applied."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.applying.targets import ModelTargets, left_without_memory, on_meta
from noether_init_core.errors import PlanError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.initializers.location import Source
from noether_init_core.initializers.models import Leaf
from noether_init_core.initializers.outcome import LoadedFile
from noether_init_core.messages import listed
from noether_init_core.surgery.plan import LoadPlan

__all__ = ["Applied", "OpenFile", "Opened", "Planned", "Verified", "check_memory"]


@attrs.frozen(eq=False)
class OpenFile:
    """A file that a kind located, and the open checkpoint."""

    source: Source
    reader: Checkpoint


@attrs.frozen(eq=False)
class Opened:
    """The files with the weights of every single model below ``model`` are open; they belong together."""

    model: Any
    leaves: tuple[Leaf, ...]
    weights: Mapping[str, OpenFile]

    @property
    def metadata(self) -> dict[Path, Mapping[str, Any]]:
        """What the header of each file holds besides tensors."""
        return {file.source.location: file.reader.metadata for file in self.weights.values()}


@attrs.frozen(eq=False)
class Planned:
    """What will be done to the tensors, which are those of ``signature``."""

    opened: Opened
    plan: LoadPlan
    targets: Mapping[str, ModelTargets]
    signature: tuple[Any, ...]


@attrs.frozen(eq=False)
class Verified:
    """The plan has no problems, every byte that it reads is verified, and the values are fine."""

    planned: Planned


@attrs.frozen(eq=False)
class Applied:
    """The weights were written."""

    planned: Planned
    files: Mapping[str, LoadedFile]


def check_memory(leaf: Leaf, planned: Planned) -> None:
    """A model on the meta device gets memory, but only for what the file holds."""
    plan, targets = planned.plan, planned.targets[leaf.path]
    without = left_without_memory(leaf.model, plan.rows_of(leaf.path), targets)
    if without:
        raise PlanError(
            f"{leaf.path} is on the meta device, and {listed(without)} would stay there: the file does not have them, "
            "or they are kept. Next: module.to_empty(device='cpu'), then fill these, or build the module on the CPU",
            plan=plan,
            problems=[f"{key} is on the meta device" for key in without],
        )
    held = [name for name, tensor in on_meta(targets).items() if weakref.getweakrefs(tensor)]
    if held:
        raise PlanError(
            f"{leaf.path} is on the meta device, and {held[0]} cannot be given memory: something holds a weak "
            "reference to it. Next: module.to_empty(device='cpu')",
            plan=plan,
            problems=[f"{key} is held by a weak reference" for key in held],
        )
