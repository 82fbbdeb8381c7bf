"""The field ``restore`` of configs: what is taken from a checkpoint, from the script, or left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pydantic

from noether_init_core.restore import Restore, ScheduleChoice, restore_line

Side = Literal["checkpoint", "config"]
Taken = Literal["checkpoint", "skip"]
Fields = dict[str, Side]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def _schedule(value: Any) -> Any:
    """Check the mapping of one schedule: settings, all from the config, and ``steps``."""
    if not isinstance(value, Mapping):
        return value
    for name, one in value.items():
        is_number = isinstance(one, int) and not isinstance(one, bool)
        if name == "steps":
            if not is_number or one < 0:
                raise ValueError(f"steps is the number of steps of the schedule in the checkpoint, not {one!r}")
        elif one != "config":
            raise ValueError(f"{name}: write config, or leave it out to take the setting of the checkpoint")
    if not value:
        raise ValueError("write config for the whole schedule, or a setting such as {T_max: config}")
    return value


Schedule = Annotated[
    Literal["checkpoint", "config", "skip"] | dict[str, Literal["config"] | int], pydantic.BeforeValidator(_schedule)
]


def _choice(value: Any) -> ScheduleChoice:
    if isinstance(value, str):
        return ScheduleChoice(value)  # type: ignore[arg-type]  # pydantic has checked it
    fields = tuple(name for name in value if name != "steps")
    return ScheduleChoice("fields" if fields else "config", fields, value.get("steps"))


class OptimizerRestoreConfig(_Strict):
    """What an optimizer takes from a checkpoint."""

    optimizer: Taken | Fields = pydantic.Field(
        default="checkpoint",
        description="State of the optimizer: checkpoint, skip, or field of its groups (lr, weight_decay; * for all "
        "others) -> checkpoint or config.",
    )

    @property
    def fields(self) -> Mapping[str, Side]:
        """Field of the optimizer's groups -> whose value is used."""
        return self.optimizer if isinstance(self.optimizer, dict) else {}


class RestoreConfig(OptimizerRestoreConfig):
    """What a resumed run takes from its checkpoint; by default everything."""

    schedule: Schedule = pydantic.Field(
        default="checkpoint",
        description="The learning rate schedule: checkpoint, config (the script's, after as many steps), skip (the "
        "script's from its beginning), or settings to take from the script ({T_max: config}). steps: their number, "
        "for checkpoints that do not record it.",
    )
    schedules: dict[str, Schedule] = pydantic.Field(
        default={}, description="The same for each of several schedules, by the name in TrainerState."
    )
    scaler: Taken = pydantic.Field(default="checkpoint", description="State of gradient scalers.")
    rng: Taken = pydantic.Field(default="checkpoint", description="State of random generators.")
    data: Taken = pydantic.Field(
        default="checkpoint", description="Position in the data; skip begins the epoch anew, in the script's order."
    )
    iteration: Literal["checkpoint", "zero"] = pydantic.Field(
        default="checkpoint", description="The training iteration; zero counts from the beginning."
    )
    callbacks: Taken | dict[str, Taken] = pydantic.Field(
        default="checkpoint", description="States of callbacks: checkpoint, skip, or key of a callback -> the same."
    )
    stateful: dict[str, Taken] = pydantic.Field(
        default={}, description="Other objects in TrainerState, by name -> checkpoint or skip."
    )

    @pydantic.model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.schedules and self.schedule != "checkpoint":
            raise ValueError("schedule and schedules are both given; schedules has a choice for each name")
        if self.iteration == "zero" and self.data == "checkpoint":
            line = restore_line(iteration="zero", data="skip")
            raise ValueError(
                f"iteration: zero begins with epoch 0, and the data of the checkpoint do not. Next: {line}"
            )
        return self

    @property
    def value(self) -> Restore:
        """The pieces that a training loop takes."""
        return Restore(
            schedule=None if self.schedule == "checkpoint" else _choice(self.schedule),
            schedules={name: _choice(one) for name, one in self.schedules.items()},
            scaler=self.scaler == "checkpoint",
            rng=self.rng == "checkpoint",
            data=self.data == "checkpoint",
            iteration=self.iteration == "checkpoint",
            stateful=frozenset(name for name, taken in self.stateful.items() if taken == "skip"),
            optimizer=self.fields,
        )

    def takes_callback(self, key: str) -> bool:
        """Whether the callback with this key takes its state."""
        return (self.callbacks if isinstance(self.callbacks, str) else self.callbacks.get(key)) != "skip"
