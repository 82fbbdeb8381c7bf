"""Findings of an inspection as plain values, and their form in ``--json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from noether_init_core.paths import name_of_run

State = Literal["committed", "legacy"]


@attrs.frozen
class Content:
    """Counts of the tensors of a file.

    Attributes:
        tensors: Number of keys.
        elements: Number of elements; tied tensors count once.
        parameters: Number of elements without buffers; None if no manifest lists the buffers.
        bytes: Number of bytes; tied tensors count once.
        dtypes: dtype -> number of keys, the most frequent first.
    """

    tensors: int
    elements: int
    parameters: int | None
    bytes: int
    dtypes: Mapping[str, int]


@attrs.frozen
class FoundKey:
    """One tensor in the header; ``bytes`` is the size of its elements."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@attrs.frozen
class FoundProbe:
    """The probe of a set: the name of its model, and the paths of the recorded outputs."""

    model: str
    outputs: tuple[str, ...]
    bytes: int


@attrs.frozen
class FoundFile:
    """The findings in a file.

    Attributes:
        path: The requested path.
        bytes: Size of the file.
        file_format: ``torch`` or ``safetensors``.
        content: Counts of its tensors.
        keys: Its tensors, in the order of the file.
        tied: Groups of keys that are one tensor.
        has_checksums: Whether the file contains checksums, so that its bytes can be verified without a digest.
        run_id: The run that the file records.
        iteration: The iteration that the file records, such as ``E4_U16_S128``.
        committed: Whether it is listed in the manifest of its set.
        tags: The tags of that set.
        metadata: Its other values; long ones are cut, and a tensor is represented by dtype and shape.
        problems: Problems such as an unreadable manifest.
        unread: Place -> what was skipped there, such as an object of a foreign class.
    """

    type: str = attrs.field(default="file", init=False)
    path: Path
    bytes: int
    file_format: Literal["torch", "safetensors"]
    content: Content
    keys: tuple[FoundKey, ...]
    tied: tuple[tuple[str, ...], ...]
    has_checksums: bool
    run_id: str | None
    iteration: str | None
    committed: bool
    tags: tuple[str, ...]
    metadata: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    unread: Mapping[str, str] = attrs.Factory(dict)


@attrs.frozen
class FoundPart:
    """One file of a set; ``content`` is None if its header was not read or is unreadable."""

    name: str
    model: str
    info: str | None
    part: Literal["model", "optim", "trainer"]
    bytes: int | None
    content: Content | None = None


@attrs.frozen
class FoundSet:
    """The findings in a set.

    ``name`` is the name of its folder, for a legacy set its tag. ``bytes`` is the size of all files in the folder, for
    a legacy set of its own files. ``created`` is the time of the commit, ISO 8601.
    """

    name: str
    path: Path
    state: State
    iteration: str | None
    tags: tuple[str, ...]
    bytes: int
    files: tuple[FoundPart, ...]
    created: str | None = None
    has_probe: bool = False
    has_provenance: bool = False


@attrs.frozen
class FoundModel:
    """The weights of one model in the newest set that has them."""

    model: str
    set: str
    content: Content


@attrs.frozen
class FoundRun:
    """One run and stage, its sets newest first; ``uncommitted`` are the folders of interrupted saves."""

    run_id: str
    stage: str | None
    path: Path
    bytes: int
    sets: tuple[FoundSet, ...]
    models: tuple[FoundModel, ...]
    uncommitted: tuple[str, ...]
    problems: tuple[str, ...]


@attrs.frozen
class RunSummary:
    """A short form of a run and stage; only its newest set was read.

    ``sets`` is the number of sets, ``newest`` the iteration of the newest set, ``tags`` its tags.
    """

    run_id: str
    stage: str | None
    path: Path
    state: State | None
    sets: int
    newest: str | None
    tags: tuple[str, ...]
    models: tuple[str, ...]
    bytes: int
    uncommitted: int
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """Run and stage as one name."""
        return name_of_run(self.run_id, self.stage)


@attrs.frozen
class FoundSetFolder:
    """A single set, with the content of each file."""

    type: str = attrs.field(default="set", init=False)
    path: Path
    run_id: str | None
    stage: str | None
    set: FoundSet
    probe: FoundProbe | None
    problems: tuple[str, ...]


@attrs.frozen
class FoundRunFolder:
    """A run folder: the run itself and its stages, those that have checkpoints."""

    type: str = attrs.field(default="run", init=False)
    path: Path
    stages: tuple[FoundRun, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems of all stages."""
        return tuple(problem for one in self.stages for problem in one.problems)


@attrs.frozen
class FoundRoot:
    """An output root, its runs by name."""

    type: str = attrs.field(default="root", init=False)
    path: Path
    runs: tuple[RunSummary, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems of all runs."""
        return tuple(problem for one in self.runs for problem in one.problems)


Found = FoundFile | FoundSetFolder | FoundRunFolder | FoundRoot


def to_json_data(found: Found) -> dict[str, Any]:
    """Return the data of ``inspect --json`` (``docs/schemas/inspect.schema.json``), without format and version."""
    values = attrs.asdict(
        found,
        value_serializer=lambda _instance, _attribute, value: str(value) if isinstance(value, Path) else value,
    )
    return {**values, "problems": [*found.problems]}
