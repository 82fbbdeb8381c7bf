"""Find the runs and stages at a path."""

from __future__ import annotations

import itertools
from pathlib import Path

from noether_init_core.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.paths import DEBUG_FOLDER, PathProvider, check_name, is_name
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, list_names, recorded_in
from noether_init_core.sets.snapshot import Snapshot

CHECKPOINTS_FOLDER = "checkpoints"


def runs(paths: PathProvider, storage: FileSystem = LOCAL) -> tuple[str, ...]:
    """Return the runs with checkpoints below the output root (in debug mode: below ``debug``), sorted."""
    root = _root(paths)
    return tuple(
        name
        for name in list_names(root, storage)
        # A folder such as .git cannot be a run.
        if is_name(name)
        and (
            storage.is_folder(root / name / CHECKPOINTS_FOLDER)
            # Below the output root, the folder "debug" holds the runs of debug mode, not stages.
            or ((paths.debug or name != DEBUG_FOLDER) and stages(paths, name, storage))
        )
    )


def stages(paths: PathProvider, run_id: str | None = None, storage: FileSystem = LOCAL) -> tuple[str, ...]:
    """Return the stages of a run that have checkpoints, sorted; ``run_id`` None: the run of ``paths``."""
    run = _root(paths) / (paths.run_id if run_id is None else check_name(run_id, "run_id"))
    return tuple(name for name in list_names(run, storage) if storage.is_folder(run / name / CHECKPOINTS_FOLDER))


def runs_at(path: Path) -> tuple[PathProvider, ...]:
    """Return the runs and stages at a folder: a set, a folder of checkpoints, a run, or an output root.

    Raises ``CheckpointNotFoundError`` if no run is found.
    """
    path = path.resolve()
    if path.name == SETS_FOLDER or path.parent.name == SETS_FOLDER:
        path = path.parent if path.name == SETS_FOLDER else path.parent.parent
    patterns = ["", "*", "*/*", f"{DEBUG_FOLDER}/*", f"{DEBUG_FOLDER}/*/*"]
    if path.name == CHECKPOINTS_FOLDER:
        path, patterns = path.parent, [""]
    found: dict[Path, PathProvider] = {}
    for pattern in patterns:
        for folder in sorted(path.glob(f"{pattern}/{CHECKPOINTS_FOLDER}" if pattern else CHECKPOINTS_FOLDER)):
            provider = _provider(path, folder.parent.relative_to(path).parts)
            if provider is not None and folder.is_dir():
                found[folder] = provider
    if not found:
        raise CheckpointNotFoundError(
            f"no run found at {path}: no folder named {CHECKPOINTS_FOLDER} in it or up to two levels below. "
            "Next: ninit verify PATH, with an output root, a run folder, a folder of checkpoints, or a file",
            path=path,
            asked=str(path),
        )
    return tuple(found.values())


def as_recorded(snapshot: Snapshot) -> PathProvider:
    """Return the run and stage that the sets of a folder record; if they record none, the run of the snapshot.

    A path alone does not show whether a folder is a run or a stage of a run.
    """
    paths, folder = snapshot.paths, snapshot.folder.parent
    if paths.debug:
        return paths
    try:
        recorded = next(((found.run_id, found.stage_name) for found in snapshot.readable()), None)
        if recorded is None:
            weights = (file.path for one in snapshot.flat for file in one.files if file.part == "model")
            for path in itertools.islice(weights, 1):
                with open_checkpoint(path) as reader:
                    recorded = recorded_in(reader.metadata, path)[1], None
    except (CheckpointError, OSError):
        return paths
    # a/b/checkpoints can be the run b in the output root a, or the stage b of the run a.
    if recorded is not None and (recorded[1] == folder.name or recorded == (folder.parent.name, None)):
        return PathProvider(folder.parent.parent, folder.parent.name, folder.name)
    if recorded == (folder.name, None) and paths.stage_name is not None:
        return PathProvider(folder.parent, folder.name)
    return paths


def _provider(root: Path, parts: tuple[str, ...]) -> PathProvider | None:
    """Return the run at ``parts`` below ``root``; None for a folder that cannot be a run."""
    try:
        if not parts:
            return PathProvider(root.parent, root.name or "run")
        debug = parts[0] == DEBUG_FOLDER and len(parts) > 1
        return PathProvider(root, *(parts[1:] if debug else parts), debug=debug)
    except ConfigError:  # the name of the folder is not valid, such as .git
        return None


def _root(paths: PathProvider) -> Path:
    return paths.output_root / DEBUG_FOLDER if paths.debug else paths.output_root
