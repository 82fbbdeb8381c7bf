"""What a folder holds: a set, a run with its stages, or the runs of an output root."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import CheckpointError, CheckpointNotFoundError, InitError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.inspection.files import content_of
from noether_init_core.inspection.findings import (
    Content,
    FoundModel,
    FoundPart,
    FoundProbe,
    FoundRoot,
    FoundRun,
    FoundRunFolder,
    FoundSet,
    FoundSetFolder,
    RunSummary,
)
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import (
    SETS_FOLDER,
    CheckpointFile,
    CheckpointSet,
    check_files,
    load_set,
    said_by,
    set_folders,
)
from noether_init_core.sets.flat_sets import legacy_sets
from noether_init_core.sets.health import stores_at
from noether_init_core.sets.manifest import MANIFEST_NAME, PROBE_NAME
from noether_init_core.sets.selection import newest_flat
from noether_init_core.sets.store import RunStore

__all__ = ["look_at_folder"]

_CHECKPOINTS = "checkpoints"
#: Sets that are asked whether their folder is a stage or a run.
_ASKED = 5


def look_at_folder(path: Path) -> FoundSetFolder | FoundRunFolder | FoundRoot:
    """A set, a run (or one stage, or its folder of checkpoints), or an output root.

    A folder whose folders have checkpoints is an output root where these say that they are runs, else a run with
    stages.

    Raises ``CheckpointNotFoundError`` where it is none of them.
    """
    given, path = path, path.resolve()
    if path.parent.name == SETS_FOLDER and path.parents[1].name == _CHECKPOINTS:
        return _look_at_set(path, given)
    if path.name == SETS_FOLDER and path.parent.name == _CHECKPOINTS:
        path = path.parent
    if path.name == _CHECKPOINTS:
        return FoundRunFolder(given, (_look_at_run(_as_recorded(_store(path.parent))),))
    stages = [one.parent for one in sorted(path.glob(f"*/{_CHECKPOINTS}")) if one.is_dir() and _has_name(one.parent)]
    own = [path] if (path / _CHECKPOINTS).is_dir() else []
    if own or (stages and not _are_runs(stages)):
        stores = [_as_recorded(_store(folder)) for folder in own]
        stores += [RunStore(PathProvider(path.parent, path.name or "run", folder.name)) for folder in stages]
        return FoundRunFolder(given, tuple(map(_look_at_run, stores)))
    try:
        found = stores_at(path)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{path} holds no run: there is no folder named checkpoints in it, nor one or two levels below. "
            "Next: noether-init inspect PATH, with an output root, a run folder, a set or a file",
            path=path,
            asked=str(path),
        ) from error
    return FoundRoot(given, tuple(sorted(map(_summary, found), key=lambda one: (one.run_id, one.stage or ""))))


def _has_name(folder: Path) -> bool:
    return not folder.name.startswith(".")


def _store(folder: Path) -> RunStore:
    return RunStore(PathProvider(folder.parent, folder.name or "run"))


def _as_recorded(store: RunStore) -> RunStore:
    """The same folder as the stage of a run, where its sets say that it is one; the folder alone cannot tell."""
    folder = store.paths.checkpoint_path.parent.resolve()
    if _is_stage(folder, _said(store)):
        return RunStore(PathProvider(folder.parent.parent, folder.parent.name, folder.name))
    return store


def _are_runs(folders: Sequence[Path]) -> bool:
    """Whether folders with checkpoints are runs, and not stages of the folder above: what the first of them says."""
    for folder in folders[:_ASKED]:
        said = _said(_store(folder))
        if said is not None:
            return not _is_stage(folder, said)
    return False


def _is_stage(folder: Path, said: tuple[str, str | None] | None) -> bool:
    """By what its sets say; the run above may have been renamed since."""
    return said is not None and (said[1] == folder.name or said == (folder.parent.name, None))


def _said(store: RunStore) -> tuple[str, str | None] | None:
    """Run and stage that the newest readable set says it is of; a legacy file says no stage."""
    try:
        folders = [one for one in set_folders(store.folder, store.storage) if one.is_committed()]
        for folder in reversed(folders[-_ASKED:]):
            try:
                found = load_set(folder, store.storage)
            except CheckpointError:
                continue
            return None if found.run_id is None else (found.run_id, found.stage_name)
        for one in legacy_sets(store.folder, store.storage)[:1]:
            with open_checkpoint(one.files[0].path) as reader:
                run_id = said_by(reader.metadata, one.files[0].path)[1]
            return None if run_id is None else (run_id, None)
    except (InitError, OSError):  # it is read again, and told then
        pass
    return None


def _look_at_run(store: RunStore) -> FoundRun:
    problems: list[str] = []
    sets: tuple[CheckpointSet, ...] = ()
    uncommitted: tuple[str, ...] = ()
    try:
        sets = store.sets()[::-1]
        uncommitted = store.uncommitted()
        problems += [str(error) for error in store.broken()]
    except (CheckpointError, OSError) as error:
        problems.append(str(error))
    found = tuple(_found(one, store, problems) for one in sets)
    paths = store.paths
    return FoundRun(
        paths.run_id,
        paths.stage_name,
        paths.checkpoint_path.parent,
        sum(one.bytes for one in found),
        found,
        tuple(_models(sets, problems)),
        uncommitted,
        tuple(dict.fromkeys(problems)),
    )


def _models(sets: Sequence[CheckpointSet], problems: list[str]) -> Iterator[FoundModel]:
    """The plain weights of each model, as the newest set has them: one header for each model."""
    seen = set()
    for one in sets:
        for file in one.files:
            if file.part == "model" and file.info is None and file.model not in seen:
                seen.add(file.model)
                content = _content(one, file, problems)
                if content is not None:
                    yield FoundModel(file.model, one.folder.name if one.committed else one.name, content)


def _content(one: CheckpointSet, file: CheckpointFile, problems: list[str]) -> Content | None:
    try:
        with open_checkpoint(file.path) as reader:
            return content_of(reader.tensors(), one.committed_file(file))
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _found(one: CheckpointSet, store: RunStore, problems: list[str]) -> FoundSet:
    iteration = one.iteration
    if iteration is None:
        try:
            iteration = store.iteration_of(one)
        except CheckpointError as error:
            problems.append(str(error))
    sizes = {file.path: store.storage.size_of(file.path) for file in one.files}
    manifest = one.manifest
    return FoundSet(
        one.folder.name if one.committed else one.name,
        one.folder,
        "committed" if one.committed else "legacy",
        None if iteration is None else str(iteration),
        one.tags,
        _bytes_in(one.folder) if one.committed else sum(size or 0 for size in sizes.values()),
        tuple(FoundPart(file.path.name, file.model, file.info, file.part, sizes[file.path]) for file in one.files),
        None if manifest is None else manifest.created,
        manifest is not None and manifest.probe is not None,
        manifest is not None and manifest.provenance is not None,
    )


def _bytes_in(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return 0


def _look_at_set(path: Path, given: Path) -> FoundSetFolder:
    checkpoints = path.parents[1]
    store = _as_recorded(_store(checkpoints.parent))
    folder = next((one for one in set_folders(checkpoints, store.storage) if one.path.name == path.name), None)
    if folder is None or not folder.is_committed():
        there = [one.path.name for one in set_folders(checkpoints, store.storage) if one.is_committed()]
        why = f"has no {MANIFEST_NAME}: a save that was never finished" if folder else "is no set by its name"
        raise CheckpointNotFoundError(
            f"{path} {why}; it is never picked. Sets: {', '.join(there[-5:]) or 'none'}. "
            f"Next: noether-init inspect {checkpoints.parent}",
            path=path,
            asked=str(path),
            candidates=there,
        )
    one = load_set(folder, store.storage)
    problems: list[str] = []
    try:
        check_files(one, store.storage)
    except CheckpointError as error:
        problems.append(str(error))
    found = _found(one, store, problems)
    contents = {file.path.name: _content(one, file, problems) for file in one.files if file.path.exists()}
    files = tuple(attrs.evolve(part, content=contents.get(part.name)) for part in found.files)
    return FoundSetFolder(
        given,
        one.run_id,
        one.stage_name,
        attrs.evolve(found, files=files),
        _probe(path / PROBE_NAME, problems) if found.has_probe else None,
        tuple(dict.fromkeys(problems)),
    )


def _probe(path: Path, problems: list[str]) -> FoundProbe | None:
    """From the header. ``noether_init_core.saving.probe_file`` reads it in full, with torch."""
    try:
        with open_checkpoint(path) as reader:
            said = reader.metadata
            outputs = [one.get("path") for one in _list(said.get("outputs")) if isinstance(one, dict)]
            return FoundProbe(str(said.get("model")), tuple(map(str, outputs)), path.stat().st_size)
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _summary(store: RunStore) -> RunSummary:
    """A run in a line. Its newest set is looked into, of the others only the names."""
    store = store if store.paths.stage_name is not None else _as_recorded(store)
    paths = store.paths
    problems: list[str] = []
    newest: CheckpointSet | None = None
    number = uncommitted = nbytes = 0
    iteration, state = None, None
    try:
        folders = set_folders(store.folder, store.storage)
        committed = [one for one in folders if one.is_committed()]
        uncommitted = len(folders) - len(committed)
        if committed:
            state, number, iteration = "committed", len(committed), committed[-1].iteration
            nbytes = sum(_bytes_in(one.path) for one in committed)
            newest = load_set(committed[-1], store.storage)
            check_files(newest, store.storage)
        else:
            legacy = legacy_sets(store.folder, store.storage)
            state, number = "legacy" if legacy else None, len(legacy)
            nbytes = sum(store.storage.size_of(file.path) or 0 for one in legacy for file in one.files)
            unreadable: list[tuple[str, CheckpointError]] = []
            newest = newest_flat(store.snapshot, (), unreadable) or next(iter(legacy), None)
            problems += [str(error) for _name, error in unreadable]
            iteration = None if newest is None else store.iteration_of(newest)
    except (CheckpointError, OSError) as error:
        problems.append(str(error))
    return RunSummary(
        f"debug/{paths.run_id}" if paths.debug else paths.run_id,
        paths.stage_name,
        paths.checkpoint_path.parent,
        state,  # type: ignore[arg-type]  # two texts
        number,
        None if iteration is None else str(iteration),
        () if newest is None else newest.tags,
        () if newest is None else newest.models("model"),
        nbytes,
        uncommitted,
        tuple(dict.fromkeys(problems)),
    )
