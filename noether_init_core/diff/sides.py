"""The two sides of a comparison: the files with weights at a path, and their description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from noether_init_core.errors import CheckpointError, CheckpointNotFoundError
from noether_init_core.files.storage.disk import LOCAL, reaching, resolved
from noether_init_core.messages import in_shell, listed
from noether_init_core.paths import PathProvider, name_of_run
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointSet
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.places import runs_at
from noether_init_core.sets.selection import find_set
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.uris import local_path


@attrs.frozen
class DiffSide:
    """One of the two checkpoints.

    Attributes:
        path: The file, or the folder of the set.
        origin: Run, tag and iteration in words; None for a single file.
        run_id: The run that wrote it; None if unknown.
        stage: The stage that wrote it.
        tag: The requested tag.
        iteration: The iteration of the set.
        tensors: Number of compared entries.
        bytes: Size of their elements.
    """

    path: str
    origin: str | None = None
    run_id: str | None = None
    stage: str | None = None
    tag: str | None = None
    iteration: str | None = None
    tensors: int = 0
    bytes: int = 0


@attrs.frozen
class Side:
    """One side: its description, and its files by model (for an average the name with its info)."""

    description: DiffSide
    files: Mapping[str, Path]


def side_at(path: Path | str) -> Side:
    """Find the files with weights at ``path``.

    Args:
        path: A checkpoint file; the folder of a set; a run folder, for its newest set; or a run folder, ``@`` and a tag
            or iteration, as in ``runs/pretrain@best_model.loss``.

    Raises ``CheckpointNotFoundError`` if nothing is found, or several runs or stages are.
    """
    path = local_path(path)
    with reaching(path):
        path, tag = _split(path)
        if not LOCAL.exists(path):
            raise _not_found(path, "does not exist")
        is_file, place = LOCAL.is_file(path), LOCAL.resolve(path)
    if is_file and tag is not None:
        message = f"is a file, but @{tag} selects a set of a run. Next: RUN@{tag}, or {path} alone"
        raise _not_found(path, message, f"{path}@{tag}")
    if is_file:
        parsed = parse(path.name)
        return Side(DiffSide(str(path)), {"" if parsed is None else _name(parsed.model, parsed.info): path})
    snapshot = Snapshot(_run_at(path))
    if place.parent.name == SETS_FOLDER:
        folder = next((one for one in snapshot.folders if one.path == place), None)
        found = None if folder is None else snapshot.head(folder)
        if isinstance(found, CheckpointError):
            raise found
        if found is None:
            raise CheckpointError(f"{path} is not a committed set. Next: ninit verify {in_shell(path)}", path=path)
    else:
        selected = find_set(snapshot, tag)
        found, snapshot = selected.found, selected.snapshot
    return _of_set(snapshot, found, tag)


def _split(path: Path) -> tuple[Path, str | None]:
    """Return path and tag of ``RUN@TAG``; a path of that name has no tag."""
    if "@" not in path.name or LOCAL.exists(path):
        return path, None
    name, _, tag = path.name.rpartition("@")
    return path.with_name(name) if name else path, tag


def _name(model: str, info: str | None) -> str:
    return model if info is None else f"{model} ({info})"


def _not_found(path: Path, message: str, asked: str = "", candidates: Sequence[str] = ()) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"{path} {message}", path=path, asked=asked or str(path), candidates=candidates)


def _run_at(path: Path) -> PathProvider:
    runs = runs_at(path)
    if len(runs) > 1:
        names = [str(path / one.checkpoint_path.parent.relative_to(resolved(path))) for one in runs]
        raise _not_found(
            path, f"has {len(runs)} runs or stages. Next: give one of {listed(names, 8)}", candidates=names
        )
    return runs[0]


def _of_set(snapshot: Snapshot, found: CheckpointSet, tag: str | None) -> Side:
    iteration = snapshot.iteration_of(found)
    run_id, stage = found.run_id or snapshot.paths.run_id, found.stage_name
    name = name_of_run(run_id, stage)
    asked = tag or ("latest" if "latest" in found.tags else found.name)
    description = DiffSide(
        str(found.folder),
        f"{name} @ {asked}" + (f" = {iteration}" if iteration is not None and str(iteration) != asked else ""),
        run_id,
        stage,
        asked,
        None if iteration is None else str(iteration),
    )
    files = {_name(file.model, file.info): file.path for file in found.files if file.part == "model"}
    if not files:
        raise _not_found(found.folder, f"is {name} @ {asked} and has no weights")
    return Side(description, files)
