"""What one run recorded: its sets, and where the weights of each training in its folder came from. Only reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs

from noether_init_core.errors import CheckpointCorruptError, CheckpointError
from noether_init_core.paths import DEBUG_FOLDER, PathProvider
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointSet
from noether_init_core.sets.places import CHECKPOINTS_FOLDER, as_recorded
from noether_init_core.sets.provenance import History, load_histories
from noether_init_core.sets.snapshot import Snapshot

__all__ = ["Records", "Run", "Training", "read_run", "run_at", "run_folder", "set_in"]


@attrs.frozen
class Run:
    """A folder with checkpoints, symbolic links resolved; ``name`` is its path below the output root.

    ``snapshot`` is None where it cannot be looked at, for the reason in ``problem``.
    """

    folder: Path
    root: Path
    name: str
    run_id: str
    stage: str | None
    snapshot: Snapshot | None
    problem: str


@attrs.frozen
class Training:
    """Where the weights of one training came from: path of a single model -> entry -> files, the latest first."""

    histories: dict[str, History]
    is_newest: bool


@attrs.frozen
class Records:
    """What a run recorded.

    Attributes:
        sets: Oldest first.
        trainings: Those with a record, the newest first: a run can be started anew in its folder.
        resumed: How often it was continued from a set of its own, as far as the sets that are there tell.
        note: What is not known, in words.
        problems: What could not be read.
    """

    sets: tuple[CheckpointSet, ...] = ()
    trainings: tuple[Training, ...] = ()
    resumed: int = 0
    note: str = ""
    problems: tuple[str, ...] = ()

    def digests(self) -> dict[str, dict[str, str]]:
        """Folder of a committed set -> name of a file -> its digest."""
        return {
            one.folder.name: {file.name: file.digest for file in one.manifest.files}
            for one in self.sets
            if one.manifest is not None
        }


def run_at(paths: PathProvider) -> Run:
    """The run of a folder; where its sets record that it is a stage, that stage."""
    folder, problem, snapshot = paths.checkpoint_path.parent.resolve(), "", None
    try:
        snapshot = Snapshot(paths)
        folder, paths = snapshot.folder.parent, as_recorded(snapshot)
    except (CheckpointError, OSError) as error:
        problem = f"{folder}: {error}"
    name = paths.run_id if paths.stage_name is None else f"{paths.run_id}/{paths.stage_name}"
    name = f"{DEBUG_FOLDER}/{name}" if paths.debug else name
    return Run(folder, paths.output_root.resolve(), name, paths.run_id, paths.stage_name, snapshot, problem)


def read_run(run: Run) -> Records:
    """Read the manifests of a run, and the newest record of each training and model."""
    if run.snapshot is None:
        return Records(note="its sets cannot be read", problems=(run.problem,))
    problems: list[str] = []
    try:
        sets = run.snapshot.sets()
        problems += map(str, run.snapshot.broken())
    except (CheckpointError, OSError) as error:
        return Records(note="its sets cannot be read", problems=(f"{run.folder}: {error}",))
    if not sets:
        return Records(note="its sets cannot be read" if problems else "no set", problems=tuple(problems))
    manifests = [one.manifest for one in sets if one.manifest is not None]
    resumed = {manifest.started_from for manifest in manifests if manifest.started_from}
    newest = manifests[-1].training if manifests else None
    found: dict[str | None, dict[str, History]] = {}
    looked: set[tuple[str | None, tuple[str, ...]]] = set()
    failed = ""
    for one in reversed(sets):
        manifest = one.manifest
        if manifest is None or manifest.provenance is None or (manifest.training, one.models()) in looked:
            continue
        looked.add((manifest.training, one.models()))
        try:
            kept = load_histories(one)
        except CheckpointCorruptError as error:
            problems.append(str(error))
            failed = failed or _in_words(manifest.lineage)
            continue
        of_training = found.setdefault(manifest.training, {})
        for model, history in kept.items():
            of_training.setdefault(model, history)
    note = ""
    if failed:
        note = f"its record cannot be read; its manifest says {failed}"
    elif not found:
        note = "where its weights came from was not recorded"
    elif newest not in found:
        note = "where the weights of its newest training came from was not recorded"
    trainings = tuple(Training(models, name == newest) for name, models in found.items())
    return Records(sets, trainings, len(resumed), note, tuple(problems))


def _in_words(lineage: Sequence[dict[str, object]]) -> str:
    said = [f"{one.get('kind')} {one.get('model')} <- {one.get('origin')}" for one in lineage]
    return "; ".join(said) or "no checkpoint"


def run_folder(path: str) -> Path | None:
    """The folder of the run (and stage) whose file lies at ``path``, links resolved; None for a file elsewhere.

    A flat file in a folder ``checkpoints`` may belong to no run: whether it does, what was recorded of it says.
    """
    parts = Path(path).parts
    depth = 4 if set_in(path) is not None else 2
    if len(parts) <= depth or parts[-depth] != CHECKPOINTS_FOLDER:
        return None
    try:
        return Path(*parts[:-depth]).resolve()
    except (OSError, ValueError, RuntimeError):  # a null byte, a circle of links
        return None


def set_in(path: str) -> str | None:
    """The folder of the set that a file lies in; None for a file elsewhere."""
    parts = Path(path).parts
    return parts[-2] if len(parts) > 4 and parts[-3] == SETS_FOLDER and parts[-4] == CHECKPOINTS_FOLDER else None
