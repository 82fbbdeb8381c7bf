"""Find the runs and stages at a path."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from noether_init_core.errors import CheckpointError, CheckpointNotFoundError, CheckpointUnreachableError, ConfigError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import LOCAL, FileSystem, is_out_of_reach, reaching, resolved
from noether_init_core.paths import DEBUG_FOLDER, PathProvider, check_name, is_name
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointSet, list_names, recorded_in
from noether_init_core.sets.snapshot import Snapshot

CHECKPOINTS_FOLDER = "checkpoints"


def runs(paths: PathProvider, storage: FileSystem = LOCAL) -> tuple[str, ...]:
    """Return the runs with checkpoints below the output root (in debug mode: below ``debug``), sorted.

    A folder that cannot be read may be a run, so it is one of them.
    """
    root = _root(paths)
    return tuple(
        name
        for name in list_names(root, storage)
        # A folder such as .git cannot be a run.
        if is_name(name)
        and (
            _may_have_checkpoints(root / name, storage)
            # Below the output root, the folder "debug" holds the runs of debug mode, not stages.
            or ((paths.debug or name != DEBUG_FOLDER) and stages(paths, name, storage))
        )
    )


def stages(paths: PathProvider, run_id: str | None = None, storage: FileSystem = LOCAL) -> tuple[str, ...]:
    """Return the stages of a run that have checkpoints, sorted; ``run_id`` None: the run of ``paths``."""
    run = _root(paths) / (paths.run_id if run_id is None else check_name(run_id, "run_id"))
    return tuple(name for name in list_names(run, storage) if _may_have_checkpoints(run / name, storage))


def _may_have_checkpoints(folder: Path, storage: FileSystem) -> bool:
    try:
        return storage.is_folder(folder / CHECKPOINTS_FOLDER)
    except OSError:
        return True


def runs_at(path: Path, unreadable: dict[Path, CheckpointError] | None = None) -> tuple[PathProvider, ...]:
    """Return the runs and stages at a folder: a set, a folder of checkpoints, a run, or an output root.

    Args:
        path: The folder.
        unreadable: Receives the error of each folder below that cannot be read, by its folder of checkpoints. It may
            be a run, so it is one of the results. None: such an error is raised.

    Raises ``CheckpointNotFoundError`` if no run is found, ``CheckpointUnreachableError`` if ``path`` cannot be read.
    """
    path = resolved(path)
    if path.name == SETS_FOLDER or path.parent.name == SETS_FOLDER:
        path = path.parent if path.name == SETS_FOLDER else path.parent.parent
    is_itself = path.name == CHECKPOINTS_FOLDER
    path = path.parent if is_itself else path
    found: dict[Path, PathProvider] = {}
    errors: dict[Path, CheckpointError] = {}
    for folder in [path] if is_itself else _folders_below(path, errors):
        checkpoints, error = folder / CHECKPOINTS_FOLDER, errors.get(folder)
        provider = _provider(path, folder.relative_to(path).parts)
        if provider is None or checkpoints in found:
            continue
        try:
            with reaching(checkpoints):
                is_run = LOCAL.is_folder(checkpoints)
        except CheckpointUnreachableError as failed:
            is_run, error = True, failed
        if error is not None:
            if unreadable is None or folder == path:
                raise error
            unreadable[checkpoints] = error
        if is_run or error is not None:
            found[checkpoints] = provider
    if not found:
        raise CheckpointNotFoundError(
            f"no run found at {path}: no folder named {CHECKPOINTS_FOLDER} in it or up to two levels below. "
            "Next: ninit verify PATH, with an output root, a run folder, a folder of checkpoints, or a file",
            path=path,
            asked=str(path),
        )
    return tuple(found.values())


def _folders_below(path: Path, errors: dict[Path, CheckpointError]) -> Iterator[Path]:
    """Yield ``path`` and what is one and two levels below, in ``debug`` also three; ``errors``: of what is unreadable.

    What is in a folder of checkpoints is left out. Files are included: a later look shows what they are.
    """

    def below(folders: Iterable[Path]) -> list[Path]:
        names: list[Path] = []
        for folder in folders:
            if folder.name == CHECKPOINTS_FOLDER:
                continue
            try:
                names += [folder / name for name in list_names(folder, LOCAL)]
            except CheckpointUnreachableError as error:
                errors[folder] = error
        return names

    first = below([path])
    second = below(first)
    return iter([path, *first, *second, *below(one for one in second if one.parent.name == DEBUG_FOLDER)])


def as_recorded(snapshot: Snapshot) -> PathProvider:
    """Return the run and stage that the sets of a folder record; if they record none, the run of the snapshot.

    A path alone does not show whether a folder is a run or a stage of a run.

    Raises ``CheckpointUnreachableError`` if the newest record cannot be read.
    """
    paths, folder = snapshot.paths, snapshot.folder.parent
    if paths.debug:
        return paths
    recorded: tuple[str | None, str | None] | None = None
    try:
        for _folder, found in snapshot.heads():
            if isinstance(found, CheckpointSet):
                recorded = found.run_id, found.stage_name
                break
            if is_out_of_reach(found):
                raise found
        if recorded is None:
            weights = (file.path for one in snapshot.flat for file in one.files if file.part == "model")
            for path in itertools.islice(weights, 1):
                with open_checkpoint(path) as reader:
                    recorded = recorded_in(reader.metadata, path)[1], None
    except CheckpointError as error:
        if is_out_of_reach(error):
            raise
        return paths
    # a/b/checkpoints can be the run b in the output root a, or the stage b of the run a.
    if recorded is not None and (recorded[1] == folder.name or recorded == (folder.parent.name, None)):
        return PathProvider(folder.parent.parent, folder.parent.name, folder.name)
    if recorded == (folder.name, None) and paths.stage_name is not None:
        return PathProvider(folder.parent, folder.name)
    return paths


def run_folder_of(path: str) -> Path | None:
    """Return the folder of the run that may have written the file at ``path``, links resolved; else None."""
    parts = Path(path).parts
    depth = 4 if set_in(path) is not None else 2
    if len(parts) <= depth or parts[-depth] != CHECKPOINTS_FOLDER:
        return None
    folder = Path(*parts[:-depth])
    try:
        return LOCAL.resolve(folder)
    except OSError:  # a look at the folder itself reports it
        return folder
    except ValueError:  # a null byte
        return None


def set_in(path: str) -> str | None:
    """Return the name of the folder of the set that a file lies in; None for a file that lies in no set."""
    parts = Path(path).parts
    return parts[-2] if len(parts) > 4 and parts[-3] == SETS_FOLDER and parts[-4] == CHECKPOINTS_FOLDER else None


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
