"""Which files a path on one side of a comparison means: a file, a set, a run, or a run at a tag."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.diff.values import DiffSide
from noether_init_core.errors import CheckpointError, CheckpointNotFoundError, InitError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import listed
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointSet
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.places import runs_at
from noether_init_core.sets.selection import find_set
from noether_init_core.sets.snapshot import Snapshot


@attrs.frozen
class Side:
    """One side: what is said of it, and its files by model (with the info of averages behind the name)."""

    said: DiffSide
    files: Mapping[str, Path]


def side_at(path: Path | str) -> Side:
    """The weights at ``path``.

    Args:
        path: A checkpoint file; the folder of a set; a run folder, for its newest set; a run folder, ``@`` and a tag or
            iteration, as in ``runs/pretrain@best_model.loss``.

    Raises ``CheckpointNotFoundError`` where nothing is there, or where it is several runs or stages.
    """
    path = Path(path)
    tag = None
    if not path.exists() and "@" in path.name:
        name, _, tag = path.name.rpartition("@")
        path = path.with_name(name) if name else path
    if not path.exists():
        raise CheckpointNotFoundError(f"{path} does not exist", path=path, asked=str(path))
    if path.is_file() and tag is not None:
        raise CheckpointNotFoundError(
            f"{path} is a file, and @{tag} means a set of a run. Next: RUN@{tag}, or {path} alone",
            path=path,
            asked=f"{path}@{tag}",
        )
    if path.is_file():
        parsed = parse(path.name)
        return Side(DiffSide(str(path)), {"" if parsed is None else _name(parsed.model, parsed.info): path})
    snapshot = Snapshot(_run_at(path))
    resolved = path.resolve()
    if resolved.parent.name == SETS_FOLDER:
        found = next((one for one in snapshot.sets() if one.folder.resolve() == resolved), None)
        if found is None:
            raise CheckpointError(f"{path} is no committed set. Next: noether-init verify {path}", path=path)
    else:
        selected = find_set(snapshot, tag)
        found, snapshot = selected.found, selected.snapshot
    return _of_set(snapshot, found, tag)


def known_from(metadata: Mapping[str, Any], said: DiffSide) -> DiffSide:
    """What a file says of itself, where nothing better is known."""
    run_id, iteration = metadata.get("run_id"), metadata.get("training_iteration")
    if said.run_id is not None or not isinstance(run_id, str):
        return said
    words = None
    if isinstance(iteration, Mapping):
        with suppress(InitError, TypeError, ValueError):
            words = str(TrainingIteration.from_mapping(iteration))
    return attrs.evolve(said, run_id=run_id, iteration=words)


def is_average(name: str) -> bool:
    """Whether a name in ``Side.files`` is that of an average, such as ``net (ema=0.99)``."""
    return name.endswith(")")


def _name(model: str, info: str | None) -> str:
    return model if info is None else f"{model} ({info})"


def _run_at(path: Path) -> PathProvider:
    try:
        runs = runs_at(path)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{path} holds no checkpoints: it is no file, and neither a run folder nor one of a set. "
            f"Next: noether-init inspect {shlex.quote(str(path))}",
            path=path,
            asked=str(path),
        ) from error
    if len(runs) > 1:
        names = [str(path / one.checkpoint_path.parent.relative_to(path.resolve())) for one in runs]
        raise CheckpointNotFoundError(
            f"{path} holds {len(runs)} runs or stages. Next: one of {listed(names, 8)}",
            path=path,
            asked=str(path),
            candidates=names,
        )
    return runs[0]


def _of_set(snapshot: Snapshot, found: CheckpointSet, tag: str | None) -> Side:
    iteration = snapshot.iteration_of(found)
    run_id, stage = found.run_id or snapshot.paths.run_id, found.stage_name
    name = run_id if stage is None else f"{run_id}/{stage}"
    asked = tag or ("latest" if "latest" in found.tags else found.name)
    said = DiffSide(
        str(found.folder),
        f"{name} @ {asked}" + (f" = {iteration}" if iteration is not None and str(iteration) != asked else ""),
        run_id,
        stage,
        asked,
        None if iteration is None else str(iteration),
    )
    files = {_name(file.model, file.info): file.path for file in found.files if file.part == "model"}
    if not files:
        raise CheckpointNotFoundError(f"{name} @ {asked} has no weights", path=found.folder, asked=str(found.folder))
    return Side(said, files)
