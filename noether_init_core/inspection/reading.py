"""Inspect a file by its header and manifest, or a folder: a set, a run, or an output root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import attrs

from noether_init_core.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointUnreachableError,
)
from noether_init_core.files.content import TensorInfo
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import LOCAL, reaching, resolved
from noether_init_core.inspection.findings import (
    Content,
    FoundFile,
    FoundKey,
    FoundModel,
    FoundPart,
    FoundProbe,
    FoundRoot,
    FoundRun,
    FoundRunFolder,
    FoundSet,
    FoundSetFolder,
    RunSummary,
    State,
)
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import in_shell, listed
from noether_init_core.paths import DEBUG_FOLDER, PathProvider
from noether_init_core.sets.checkpoint_set import (
    SETS_FOLDER,
    CheckpointFile,
    CheckpointSet,
    SetFolder,
    list_names,
    load_set,
    recorded_in,
)
from noether_init_core.sets.flat_files import check_headers
from noether_init_core.sets.manifest import MANIFEST_NAME, PROBE_NAME
from noether_init_core.sets.places import CHECKPOINTS_FOLDER, as_recorded, runs_at
from noether_init_core.sets.snapshot import Snapshot

_LONGEST = 2_000
_MOST_ITEMS = 100
_DEEPEST = 6


def look_at_file(path: Path) -> FoundFile:
    """Inspect a file by its header, and by the manifest of its set if it has one. No bytes of tensors are read.

    Raises errors of ``open_checkpoint``.
    """
    problems: list[str] = []
    around, file, buffers = None, None, None
    with reaching(path):
        folder, size = LOCAL.resolve(path).parent, LOCAL.size_of(path) or 0
    found = SetFolder.of(folder.parent, folder.name) if folder.parent.name == SETS_FOLDER else None
    try:
        if found is not None and found.is_committed():
            around = load_set(found)
            file = next((one for one in around.files if one.name == path.name), None)
            buffers = None if file is None else around.buffers_of(file)
    except CheckpointError as error:  # the file itself may still be readable
        problems.append(str(error))
    with open_checkpoint(path) as reader:
        metadata, tensors = reader.metadata, reader.tensors()
        run_id, iteration = None, None
        try:
            iteration, run_id = recorded_in(metadata, path)
        except CheckpointError as error:
            problems.append(str(error))
        return FoundFile(
            path,
            size,
            reader.format,
            content_of(tensors, buffers),
            tuple(FoundKey(str(key), info.dtype, info.shape, info.nbytes) for key, info in tensors.items()),
            tuple(_tied(tensors)),
            reader.is_verifiable,
            run_id,
            None if iteration is None else str(iteration),
            file is not None,
            () if around is None or file is None else around.tags,
            {str(key): _shown(metadata, key) for key in metadata},
            tuple(problems),
            {place: str(part) for place, part in islice(reader.unread.items(), _MOST_ITEMS)},
        )


def _shown(metadata: Mapping[Any, Any], key: Any) -> Any:
    try:
        return _plain(metadata[key])
    except CheckpointFormatError:  # a part of it was skipped, and is listed as unread
        return "<unread>"


def content_of(tensors: Mapping[str, TensorInfo], buffers: Collection[str] | None = None) -> Content:
    """Count tensors; ``buffers``: keys that are not parameters, None if unknown."""
    # Reversed, so that the first key of a tied tensor stays; it decides whether the tensor counts as a buffer.
    once = {(info.shape, info.pieces): (key, info) for key, info in reversed(list(tensors.items()))}.values()
    return Content(
        len(tensors),
        sum(prod(info.shape) for _key, info in once),
        None if buffers is None else sum(prod(info.shape) for key, info in once if key not in buffers),
        sum(info.nbytes for _key, info in once),
        dict(Counter(info.dtype for info in tensors.values()).most_common()),
    )


def _tied(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, ...]]:
    groups: dict[object, list[str]] = {}
    for key, info in tensors.items():
        if info.nbytes:
            groups.setdefault((info.shape, info.pieces), []).append(str(key))
    return (tuple(keys) for keys in groups.values() if len(keys) > 1)


def _plain(value: Any, depth: int = 0) -> Any:
    """Convert a value to JSON data; values that are long or deep are cut, because files may be hostile."""
    if value is None or isinstance(value, bool | int):
        # Many JSON readers lose digits beyond 2**53, and Python refuses to print integers of thousands of digits.
        return value if value is None or abs(value) < 1 << 53 else "a large number"
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, TensorInfo):
        return {"dtype": value.dtype, "shape": list(value.shape)}
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {_cut(str(key)): _plain(one, depth + 1) for key, one in islice(value.items(), _MOST_ITEMS)}
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in islice(value, _MOST_ITEMS)]
    return f"<{type(value).__name__}>"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


T = TypeVar("T")


def look_at_folder(path: Path) -> FoundSetFolder | FoundRunFolder | FoundRoot:
    """Inspect a folder: a set, a run (or one stage, or its folder of checkpoints), or an output root.

    If the subfolders of a folder have checkpoints that record them as stages of one run, the folder is that run.
    Otherwise it is an output root.

    Raises ``CheckpointNotFoundError`` if no run is found at the path.
    """
    place = resolved(path)
    unreadable: dict[Path, CheckpointError] = {}
    runs = [_Run(paths, unreadable.get(paths.checkpoint_path)) for paths in runs_at(place, unreadable)]
    if place.parent.name == SETS_FOLDER and place.parents[1].name == CHECKPOINTS_FOLDER:
        return runs[0].set_at(place, path)
    while place.name in (SETS_FOLDER, CHECKPOINTS_FOLDER):
        place = place.parent
    of_run = [one for one in runs if place in (one.folder, one.folder.parent if one.paths.stage_name else None)]
    if of_run:
        # What cannot be read may be a stage.
        of_run[0].problems += [str(unreadable[at]) for at in unreadable if at not in {one.place for one in of_run}]
        return FoundRunFolder(path, tuple(one.found() for one in of_run))
    return FoundRoot(
        path, tuple(sorted((one.summary() for one in runs), key=lambda one: (one.run_id, one.stage or "")))
    )


class _Run:
    """Inspects one run and stage; ``problems`` collects problems of reading."""

    def __init__(self, paths: PathProvider, problem: CheckpointError | None = None) -> None:
        self.problems = [] if problem is None else [str(problem)]
        self.place = paths.checkpoint_path
        self.folder = self.place.parent
        self.snapshot = self._tried(lambda: Snapshot(paths))
        snapshot = self.snapshot
        self.paths = (self._tried(lambda: as_recorded(snapshot)) if snapshot else None) or paths

    def found(self) -> FoundRun:
        """Inspect all sets."""
        sets: tuple[CheckpointSet, ...] = ()
        uncommitted: tuple[str, ...] = ()
        if self.snapshot is not None:
            sets = (self._tried(self.snapshot.sets) or ())[::-1]
            uncommitted = self._tried(self.snapshot.uncommitted) or ()
            self.problems += map(str, self._tried(self.snapshot.broken) or ())
        for one in sets:
            self._check(one)
        found = tuple(map(self._set, sets))
        models = tuple(self._models(sets))
        return FoundRun(
            self.paths.run_id,
            self.paths.stage_name,
            self.folder,
            sum(one.bytes for one in found),
            found,
            models,
            uncommitted,
            tuple(dict.fromkeys(self.problems)),
        )

    def summary(self) -> RunSummary:
        """Inspect the newest set; of others only names and sizes of files are read."""
        newest: CheckpointSet | None = None
        state: State | None = None
        number = unfinished = nbytes = 0
        iteration: TrainingIteration | None = None
        if self.snapshot is not None:
            # An output root may have many runs with thousands of sets, so manifests of older sets are not read.
            committed = [one for one in self.snapshot.folders if one.is_committed()]
            unfinished = len(self.snapshot.folders) - len(committed)
            if committed:
                state, number, iteration = "committed", len(committed), committed[-1].iteration
                nbytes = sum(
                    size for one in committed for size in (self._tried(partial(_sizes_in, one.path)) or {}).values()
                )
                head = self.snapshot.head(committed[-1])
                newest = head if isinstance(head, CheckpointSet) else None
                problem = head if newest is None else self.snapshot.problem_of(newest)
                self.problems += [str(problem)] if problem is not None else []
            elif flat := self._tried(lambda: self.snapshot.flat if self.snapshot else ()):
                unreadable: list[tuple[str, CheckpointError]] = []
                state, number = "legacy", len(flat)
                newest = self.snapshot.newest_flat((), unreadable) or flat[0]
                self._check(newest)
                self.problems += [str(error) for _name, error in unreadable]
                nbytes = sum(size for one in flat for size in self._sizes(one).values())
                iteration = self._iteration_of(newest)
        return RunSummary(
            f"{DEBUG_FOLDER}/{self.paths.run_id}" if self.paths.debug else self.paths.run_id,
            self.paths.stage_name,
            self.folder,
            state,
            number,
            None if iteration is None else str(iteration),
            () if newest is None else newest.tags,
            () if newest is None else newest.models("model"),
            nbytes,
            unfinished,
            tuple(dict.fromkeys(self.problems)),
        )

    def set_at(self, path: Path, given: Path) -> FoundSetFolder:
        """Inspect one committed set with the content of each file. Raises ``CheckpointNotFoundError``."""
        if self.snapshot is None:
            raise CheckpointUnreachableError(self.problems[0], path=path)
        folders = self.snapshot.folders
        folder = next((one for one in folders if one.path.name == path.name), None)
        if folder is None or not folder.is_committed():
            there = [one.name for one in folders if one.is_committed()]
            why = f"has no {MANIFEST_NAME}: an interrupted save" if folder else "does not have the name of a set"
            raise CheckpointNotFoundError(
                f"{path} {why}; it is never selected. Sets: {listed(there[:-6:-1], none='none')}. "
                f"Next: ninit inspect {in_shell(self.folder)}",
                path=path,
                asked=str(path),
                candidates=there,
            )
        one = load_set(folder)
        problem = self.snapshot.problem_of(one)
        self.problems += [str(problem)] if problem is not None else []
        found = self._set(one)
        sizes = self._sizes(one)
        contents = {file.name: self._content(one, file) for file in one.files if file.name in sizes}
        files = tuple(attrs.evolve(part, content=contents.get(part.name)) for part in found.files)
        return FoundSetFolder(
            given,
            one.run_id,
            one.stage_name,
            attrs.evolve(found, files=files),
            self._tried(lambda: _probe(path / PROBE_NAME)) if found.has_probe else None,
            tuple(dict.fromkeys(self.problems)),
        )

    def _set(self, one: CheckpointSet) -> FoundSet:
        iteration = self._iteration_of(one)
        manifest = one.manifest
        there = self._sizes(one)
        return FoundSet(
            one.place,
            one.folder,
            "committed" if one.committed else "legacy",
            None if iteration is None else str(iteration),
            one.tags,
            sum(there.values()),
            tuple(FoundPart(file.name, file.model, file.info, file.part, there.get(file.name)) for file in one.files),
            None if manifest is None else manifest.created,
            manifest is not None and manifest.probe is not None,
            manifest is not None and manifest.provenance is not None,
        )

    def _models(self, sets: Sequence[CheckpointSet]) -> Iterator[FoundModel]:
        """Yield the plain weights of each model in the newest set that has them, reading one header for each."""
        newest: dict[str, tuple[CheckpointSet, CheckpointFile]] = {}
        for one in sets:
            for file in one.files:
                if file.part == "model" and file.info is None:
                    newest.setdefault(file.model, (one, file))
        for model, (one, file) in newest.items():
            content = self._content(one, file)
            if content is not None:
                yield FoundModel(model, one.place, content)

    def _check(self, one: CheckpointSet) -> None:
        """Add a problem if files of a set without a manifest are of different iterations."""
        if not one.committed:
            self._tried(partial(check_headers, one))

    def _content(self, one: CheckpointSet, file: CheckpointFile) -> Content | None:
        def look() -> Content:
            with open_checkpoint(file.path) as reader:
                return content_of(reader.tensors(), one.buffers_of(file))

        return self._tried(look)

    def _iteration_of(self, one: CheckpointSet) -> TrainingIteration | None:
        return self._tried(lambda: self.snapshot.iteration_of(one) if self.snapshot else None)

    def _sizes(self, one: CheckpointSet) -> Mapping[str, int]:
        """Return name -> bytes of the regular files of a set; for a committed set of all files in its folder."""
        if one.committed:
            return self._tried(partial(_sizes_in, one.folder)) or {}
        sizes = {file.name: self._tried(partial(LOCAL.size_of, file.path)) for file in one.files}
        return {name: size for name, size in sizes.items() if size is not None}

    def _tried(self, look: Callable[[], T]) -> T | None:
        """Return the result of ``look``; if it fails, add the problem and return None."""
        try:
            return look()
        except (CheckpointError, OSError) as error:
            self.problems.append(str(error))
            return None


def _sizes_in(folder: Path) -> Mapping[str, int]:
    sizes = {name: LOCAL.size_of(folder / name) for name in list_names(folder, LOCAL)}
    return {name: size for name, size in sizes.items() if size is not None}


def _probe(path: Path) -> FoundProbe:
    """Read the header of a probe; ``saving.file_writing.read_probe`` reads all of it and needs torch."""
    with open_checkpoint(path) as reader:
        metadata = reader.metadata
        outputs = metadata.get("outputs")
        paths = [one.get("path") for one in outputs if isinstance(one, dict)] if isinstance(outputs, list) else []
        return FoundProbe(str(metadata.get("model")), tuple(map(str, paths)), LOCAL.size_of(path) or 0)
