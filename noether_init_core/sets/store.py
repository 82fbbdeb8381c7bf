"""RunStore: a facade over ``Snapshot`` and ``find_set`` until its last callers use these themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from noether_init_core.files.storage.disk import LOCAL, Storage
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider
from noether_init_core.sets import looking, places
from noether_init_core.sets.checkpoint_set import CheckpointFile, CheckpointSet, Need, check_consistency
from noether_init_core.sets.refusals import AskedBy
from noether_init_core.sets.selection import older_good
from noether_init_core.sets.snapshot import Snapshot

__all__ = ["CheckpointFile", "CheckpointSet", "Need", "RunStore", "check_consistency"]


class RunStore:
    """The checkpoints of one run and stage; everything is looked up anew at each call."""

    def __init__(self, paths: PathProvider, *, storage: Storage = LOCAL, asked_by: AskedBy = "tag") -> None:
        self.paths = PathProvider.of(paths)
        self.storage = storage
        self.asked_by = asked_by

    @property
    def snapshot(self) -> Snapshot:
        """What is there now."""
        return Snapshot(self.paths, storage=self.storage)

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints, symbolic links resolved."""
        return self.snapshot.folder

    def runs(self) -> tuple[str, ...]:
        """Runs below the output root."""
        return places.runs(self.paths, self.storage)

    def stages(self, run_id: str | None = None) -> tuple[str, ...]:
        """Stages of the run."""
        return places.stages(self.paths, run_id, self.storage)

    def sets(self) -> tuple[CheckpointSet, ...]:
        """Every set, oldest first."""
        return self.snapshot.sets()

    def broken(self) -> tuple[Exception, ...]:
        """What is wrong with sets that cannot be used."""
        return self.snapshot.broken()

    def uncommitted(self) -> tuple[str, ...]:
        """Folders of sets that were never finished."""
        return self.snapshot.uncommitted()

    def tags(self) -> tuple[str, ...]:
        """Every tag, sorted."""
        return self.snapshot.tags()

    def trainer_names(self) -> tuple[str, ...]:
        """Models that have trainer files, sorted."""
        return self.snapshot.trainer_names()

    def newest(self, model: str | None = None) -> CheckpointSet | None:
        """``newest_set``."""
        return looking.newest_set(self.snapshot, model, asked_by=self.asked_by)

    def find(
        self, tag: str | Mapping[str, Any] | TrainingIteration | None, needs: Sequence[Need] = ()
    ) -> CheckpointSet:
        """``find_set``."""
        return looking.find_set(self.snapshot, tag, needs, asked_by=self.asked_by).found

    def is_begun(self) -> bool:
        """Whether there is a set to resume the run from."""
        return self.snapshot.is_begun()

    def older_good(self, checkpoint_set: CheckpointSet) -> CheckpointSet | None:
        """The newest older set whose files are there."""
        return older_good(self.snapshot, checkpoint_set)

    def require(self, checkpoint_set: CheckpointSet, needs: Sequence[Need]) -> None:
        """Make sure that a set has further files."""
        looking.require(self.snapshot, checkpoint_set, needs, asked_by=self.asked_by)

    def iteration_of(self, checkpoint_set: CheckpointSet) -> TrainingIteration | None:
        """The iteration of a set."""
        return self.snapshot.iteration_of(checkpoint_set)
