"""Which training a set belongs to, which set that went on from, and which sets it has passed over.

Two trainings can come under one run id: somebody starts again without a resume. Their sets lie in one folder, so each
manifest says its training. A training goes on when it is resumed, also from an earlier set, also by another process.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs

from noether_init_core.errors import CheckpointError
from noether_init_core.files.storage.disk import Storage
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointSet, SetFolder, load_set, set_folders
from noether_init_core.sets.manifest import Manifest

__all__ = ["Descent", "Descents", "Start"]


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
        self._saved: CheckpointSet | None = None

    def of_save(self, checkpoints: Path, iteration: TrainingIteration, start: Start, storage: Storage) -> Descent:
        """For a save of ``iteration`` into the folder; called under its lock."""
        folders = [folder for folder in set_folders(checkpoints, storage) if folder.is_committed(storage)]
        newest = next(self._manifests(folders, storage), None)
        if start.is_resumed is None and self._start is not None:
            start = self._start
        started_from = _name_in(checkpoints, start.folder, storage)
        is_behind = start.iteration is not None and iteration < start.iteration
        goes_on = bool(start.is_resumed) and (start.folder is None or started_from is not None) and not is_behind
        if not goes_on:
            started_from = None
            self._choose(iteration, start, newest)
        elif start != self._start:
            resumed = [folder for folder in folders if folder.path.name == started_from]
            found = next(self._manifests(resumed, storage), newest)
            self._training = found.training if found is not None else start.training or uuid.uuid4().hex
            self._is_new = False
        self._start, self._last = start, iteration
        own = next((one for one in self._manifests(folders, storage) if one.training == self._training), None)
        passed_over = set(own.passed_over if own is not None else ())
        if started_from is not None:
            # what was resumed can be of use after all
            passed_over = (passed_over | set(start.passed_over)) - {started_from}
        is_beside = newest is not None and newest.training != self._training and not goes_on
        return Descent(
            self._training,
            started_from,
            tuple(sorted(passed_over & {folder.path.name for folder in folders})),
            newest.training_iteration if is_beside and newest is not None else None,
        )

    def saved(self, committed: CheckpointSet) -> None:
        """The set was committed; its manifest need not be read again for the next one."""
        self._saved = committed

    def _choose(self, iteration: TrainingIteration, start: Start, newest: Manifest | None) -> None:
        before = self._start
        if before is not None and (start == before or (self._is_new and before.is_resumed is None)):
            if self._last is not None and iteration < self._last:
                self._training, self._is_new = uuid.uuid4().hex, True
        elif start.is_resumed is None and newest is not None and iteration >= newest.training_iteration:
            self._training, self._is_new = newest.training, False
        else:
            self._training, self._is_new = start.training or uuid.uuid4().hex, True

    def _manifests(self, folders: Sequence[SetFolder], storage: Storage) -> Iterator[Manifest]:
        """Those that can be read, newest first, as they are asked for."""
        for folder in reversed(folders):
            try:
                is_known = self._saved is not None and self._saved.folder == folder.path
                manifest = (self._saved if is_known and self._saved else load_set(folder, storage)).manifest
            except CheckpointError:
                continue  # retention keeps it, and says so in the log
            if manifest is not None:
                yield manifest


def _name_in(checkpoints: Path, folder: Path | None, storage: Storage) -> str | None:
    """The name of a set's folder, if it is one of this folder of checkpoints."""
    if folder is None or storage.resolve(folder.parent) != storage.resolve(checkpoints / SETS_FOLDER):
        return None
    return folder.name


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        return ()
    return tuple(str(item) for item in value)
