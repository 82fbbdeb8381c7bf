"""What a resumed run takes from its checkpoint, piece by piece, and how checkpoint and script differ. Values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from noether_init_core.messages import yaml_field

Side = Literal["checkpoint", "config"]


@attrs.frozen
class ScheduleChoice:
    """How a learning rate schedule starts.

    Attributes:
        side: ``checkpoint``: as it was saved. ``config``: that of the script, after as many steps. ``skip``: that of
            the script, at its beginning. ``fields``: the saved one, with some settings of the script.
        fields: These settings, such as ``T_max``.
        steps: The number of steps, for checkpoints that do not record it; None: as recorded.
    """

    side: Literal["checkpoint", "config", "skip", "fields"] = "checkpoint"
    fields: tuple[str, ...] = ()
    steps: int | None = None


@attrs.frozen
class Restore:
    """The pieces of a checkpoint that a training loop takes; by default all.

    Attributes:
        schedule: How the only schedule starts; None without that choice.
        schedules: Name -> how that schedule starts.
        scaler: Whether gradient scalers take their state.
        rng: Whether random generators take their state.
        data: Whether the position in the data is taken; if not, the epoch begins anew, in the script's order.
        iteration: Whether the iteration is taken; if not, it is zero.
        stateful: Names of other objects that do not take their state.
        optimizer: Field of the groups of optimizers -> whose value is used, as far as it was chosen.
    """

    schedule: ScheduleChoice | None = None
    schedules: Mapping[str, ScheduleChoice] = attrs.Factory(dict)
    scaler: bool = True
    rng: bool = True
    data: bool = True
    iteration: bool = True
    stateful: frozenset[str] = frozenset()
    optimizer: Mapping[str, Side] = attrs.Factory(dict)

    @property
    def is_whole(self) -> bool:
        """Whether a training loop takes everything."""
        return attrs.evolve(self, optimizer={}) == Restore()


@attrs.frozen
class Difference:
    """A value that differs between checkpoint and script.

    Attributes:
        what: Its name: ``schedule.T_max``, ``batch_size``.
        checkpoint: The value in the checkpoint, as text.
        now: The value in the script, as text.
        taken: Whose value is used.
        line: The line of ``restore`` that takes the other one; empty if no line does.
    """

    what: str
    checkpoint: str
    now: str
    taken: Side = "checkpoint"
    line: str = ""

    def __str__(self) -> str:
        other = f" Next, to change that: {self.line}" if self.line else ""
        return f"{self.what}: {self.checkpoint} in the checkpoint, {self.now} now; {self.taken} is used.{other}"


def restore_line(**pieces: Any) -> str:
    """The line of a config that restores ``pieces`` in this way: ``restore: {schedule: config}``."""
    return yaml_field("restore", pieces)


@attrs.frozen
class TrainerFindings:
    """What a trainer tells about a checkpoint before it is loaded.

    Attributes:
        differences: What differs between checkpoint and script.
        fields: Id of an optimizer -> fields of its groups that schedules of the script set, so that its state from the
            checkpoint must not replace them.
    """

    differences: tuple[Difference, ...] = ()
    fields: Mapping[int, frozenset[str]] = attrs.Factory(dict)
