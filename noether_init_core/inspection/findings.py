"""What was found: plain values, and how ``--json`` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from noether_init_core.paths import name_of_run

State = Literal["committed", "legacy"]


@attrs.frozen
class Content:
    """The tensors of a file, in numbers.

    Attributes:
        tensors: Number of keys.
        elements: Of all tensors, tied ones once.
        parameters: Elements without those of buffers; None where the file alone cannot tell (no manifest, or one of
            another writer).
        bytes: Of all tensors, tied ones once.
        dtypes: dtype -> number of keys, the most frequent first.
    """

    tensors: int
    elements: int
    parameters: int | None
    bytes: int
    dtypes: Mapping[str, int]


@attrs.frozen
class FoundKey:
    """One tensor as the header has it; ``bytes`` are those of its elements."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@attrs.frozen
class FoundProbe:
    """A probe beside a set: the model that it is of, and the outputs that were recorded."""

    model: str
    outputs: tuple[str, ...]
    bytes: int


@attrs.frozen
class FoundFile:
    """A file.

    Attributes:
        path: As it was asked for.
        bytes: Of the whole file.
        file_format: ``torch`` or ``safetensors``.
        content: Its tensors, in numbers.
        keys: Each of them, in the order of the file.
        tied: Keys that are one tensor, together.
        has_checksums: Whether its bytes can be verified by the file alone.
        run_id: The run that it says it is of.
        iteration: The iteration that it says it is of, ``E4_U16_S128`` where it is a whole one.
        committed: Whether it lies in a set with a manifest that lists it.
        tags: Those of that set.
        metadata: What it says besides tensors; long values are cut, a tensor is its dtype and shape.
        problems: What is wrong around it, such as an unreadable manifest.
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


@attrs.frozen
class FoundPart:
    """One file of a set; ``content`` is None where its header was not read, or cannot be."""

    name: str
    model: str
    info: str | None
    part: Literal["model", "optim", "trainer"]
    bytes: int | None
    content: Content | None = None


@attrs.frozen
class FoundSet:
    """A set.

    ``name`` is that of its folder, for a legacy set its tag. ``bytes`` are those of all files in the folder, for a
    legacy set of its own. ``created`` is when it was committed, ISO 8601.
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
    """One run and stage, its sets newest first; ``uncommitted`` are saves that were never finished."""

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
    """A run and stage in a line; only its newest set was looked into.

    ``sets`` is their number, ``newest`` the iteration of the newest, ``tags`` its tags.
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
        """Run and stage as they are written."""
        return name_of_run(self.run_id, self.stage)


@attrs.frozen
class FoundSetFolder:
    """A set by itself, with the content of each file."""

    type: str = attrs.field(default="set", init=False)
    path: Path
    run_id: str | None
    stage: str | None
    set: FoundSet
    probe: FoundProbe | None
    problems: tuple[str, ...]


@attrs.frozen
class FoundRunFolder:
    """A run: itself and its stages, as many as have checkpoints."""

    type: str = attrs.field(default="run", init=False)
    path: Path
    stages: tuple[FoundRun, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Those of all stages."""
        return tuple(problem for one in self.stages for problem in one.problems)


@attrs.frozen
class FoundRoot:
    """An output root, its runs by name."""

    type: str = attrs.field(default="root", init=False)
    path: Path
    runs: tuple[RunSummary, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Those of all runs."""
        return tuple(problem for one in self.runs for problem in one.problems)


Found = FoundFile | FoundSetFolder | FoundRunFolder | FoundRoot


def to_json_data(found: Found) -> dict[str, Any]:
    """What ``inspect --json`` prints, by ``docs/schemas/inspect.schema.json``, without format and version."""
    values = attrs.asdict(
        found,
        value_serializer=lambda _instance, _attribute, value: str(value) if isinstance(value, Path) else value,
    )
    return {**values, "problems": [*found.problems]}
