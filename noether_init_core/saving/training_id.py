"""Which training a set belongs to, which set that went on from, and which sets it has passed over.

Two trainings can come under one run id: somebody starts again without a resume. Their sets lie in one folder, so each
manifest says its training. A training goes on when it is resumed, also from an earlier set, also by another process.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import attrs

from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.checkpoint_set import SETS_FOLDER
from noether_init_core.sets.manifest import Manifest
from noether_init_core.sets.snapshot import Snapshot


@attrs.frozen
class Start:
    """What is known of how the process began to train.

    Attributes:
        is_resumed: Whether it resumed something; None: nobody says.
        iteration: Where it started; None: nobody says.
        folder: The folder of the set that it resumed.
        passed_over: Names of the sets beside it that it found to be no use.
        training: An id for the training, should it be a new one.
    """

    is_resumed: bool | None = None
    iteration: TrainingIteration | None = None
    folder: Path | None = None
    passed_over: tuple[str, ...] = ()
    training: str | None = None

    @classmethod
    def of(cls, report: Any, trainer: Any) -> Self:
        """As the report says, else that of the trainer (``init_report``), else the trainer's lineage."""
        for one in (report, getattr(trainer, "init_report", None)):
            iteration = getattr(one, "start", None)
            if isinstance(iteration, TrainingIteration):
                parts = [part for part in getattr(one, "initializers", ()) if getattr(part, "resumed_set", None)]
                return cls(
                    is_resumed=not iteration.is_zero,
                    iteration=iteration,
                    folder=Path(parts[0].resumed_set) if parts else None,
                    passed_over=tuple(name for part in parts[:1] for name, _reason in part.passed_over),
                    training=getattr(one, "training", None) or None,
                )
        for entry in getattr(trainer, "lineage", None) or ():
            said = dict(entry)
            if said.get("set") or said.get("kind") == "resume":
                folder = Path(str(said["set"])) if said.get("set") else None
                return cls(is_resumed=True, folder=folder, passed_over=_texts(said.get("passed_over")))
        return cls()


@attrs.frozen
class Descent:
    """What a manifest says of where its set comes from: see ``Manifest``.

    ``others_up_to`` is the iteration of the newest set where that is of another training, and this one begins.
    """

    training: str | None
    started_from: str | None = None
    passed_over: tuple[str, ...] = ()
    others_up_to: TrainingIteration | None = None


class Descents:
    """Tells for each save of one writer where the set comes from.

    A resume of a set in this folder goes on with the training of that set. What was resumed from elsewhere, or not at
    all, is a new training, with the id that the report has for it. Where nobody says how the process began, it goes on
    with the training of the newest set unless it is at an earlier iteration than that. A writer whose iterations go
    back without a resume begins a new training, too: to take two trainings for one would remove sets, to take one for
    two only costs room. What was said at one save holds for later ones at which nobody says anything, such as those
    without the trainer.
    """

    def __init__(self) -> None:
        self._training: str | None = None
        self._is_new = False
        self._start: Start | None = None
        self._last: TrainingIteration | None = None

    def of_save(self, snapshot: Snapshot, iteration: TrainingIteration, start: Start) -> Descent:
        """For a save of ``iteration`` into the folder; called under its lock."""
        newest = next(_manifests(snapshot), None)
        if start.is_resumed is None and self._start is not None:
            start = self._start
        started_from = _name_in(snapshot, start.folder)
        is_behind = start.iteration is not None and iteration < start.iteration
        goes_on = bool(start.is_resumed) and (start.folder is None or started_from is not None) and not is_behind
        if not goes_on:
            started_from = None
            self._choose(iteration, start, newest)
        elif start != self._start:
            resumed = (one for one in _manifests(snapshot) if one.folder_name == started_from)
            found = newest if started_from is None else next(resumed, newest)
            self._training = found.training if found is not None else start.training or uuid.uuid4().hex
            self._is_new = False
        self._start, self._last = start, iteration
        own = next((one for one in _manifests(snapshot) if one.training == self._training), None)
        passed_over = set(own.passed_over if own is not None else ())
        if started_from is not None:
            # what was resumed can be of use after all
            passed_over = (passed_over | set(start.passed_over)) - {started_from}
        is_beside = newest is not None and newest.training != self._training and not goes_on
        return Descent(
            self._training,
            started_from,
            tuple(sorted(passed_over.intersection(folder.name for folder in snapshot.folders))) if passed_over else (),
            newest.training_iteration if is_beside and newest is not None else None,
        )

    def _choose(self, iteration: TrainingIteration, start: Start, newest: Manifest | None) -> None:
        before = self._start
        if before is not None and (start == before or (self._is_new and before.is_resumed is None)):
            if self._last is not None and iteration < self._last:
                self._training, self._is_new = uuid.uuid4().hex, True
        elif start.is_resumed is None and newest is not None and iteration >= newest.training_iteration:
            self._training, self._is_new = newest.training, False
        else:
            self._training, self._is_new = start.training or uuid.uuid4().hex, True


def _manifests(snapshot: Snapshot) -> Iterator[Manifest]:
    """Those that can be read, newest first, as they are asked for; retention keeps the others, and logs them."""
    return (found.manifest for found in snapshot.readable() if found.manifest is not None)


def _name_in(snapshot: Snapshot, folder: Path | None) -> str | None:
    """The name of a set's folder, if it is one of this folder of checkpoints."""
    resolve = snapshot.storage.resolve
    if folder is None or resolve(folder.parent) != resolve(snapshot.folder / SETS_FOLDER):
        return None
    return folder.name


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        return ()
    return tuple(str(item) for item in value)
