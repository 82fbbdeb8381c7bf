"""The file of a probe in a set: written with it, bound by a digest in its manifest, read by our own reader."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import attrs
import pydantic
import torch

from noether_init_core.errors import CheckpointCorruptError, CheckpointFormatError, type_of
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.nested import equal
from noether_init_core.probe.outputs import MOST_VALUES, Output
from noether_init_core.probe.probe import Probe, check_batch
from noether_init_core.saving.file_writing import write_content
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.manifest import PROBE_NAME, Digest

FORMAT = "noether-init-probe"
FORMAT_VERSION = 1
_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, set)

_Count = Annotated[int, pydantic.Field(ge=0)]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class _Output(_Model):
    path: str
    shape: tuple[_Count, ...]
    dtype: str
    digest: Digest
    values: Any

    @pydantic.model_validator(mode="after")
    def _has_its_values(self) -> Self:
        count = 0 if self.dtype == "str" else min(math.prod(self.shape), MOST_VALUES)
        is_tensor = isinstance(self.values, torch.Tensor) and self.values.shape == (count,)
        if not is_tensor or self.dtype not in ("str", str(self.values.dtype).removeprefix("torch.")):
            raise ValueError(f"values is no {self.dtype} tensor of shape [{count}]")
        return self


class _Content(_Model):
    format: Literal["noether-init-probe"]
    format_version: int
    model: str
    models: tuple[str, ...]
    device: str
    dtype: str | None
    has_drawn: bool
    uncompared: tuple[str, ...]
    computed_by: str
    outputs: Annotated[tuple[_Output, ...], pydantic.Field(min_length=1)]

    @pydantic.field_validator("outputs")
    @classmethod
    def _each_once(cls, outputs: tuple[_Output, ...]) -> tuple[_Output, ...]:
        if len({one.path for one in outputs}) < len(outputs):
            raise ValueError("two have one path")
        return outputs


def write_probe(folder: Path, probe: Probe, iteration: TrainingIteration, storage: FileSystem) -> str:
    """Write the file of a set, bring it onto the disk, and read it back; returns its digest, for the manifest.

    Raises ``OSError``, and ``CheckpointError`` if it cannot be written, or reads back otherwise.
    """
    path = folder / PROBE_NAME
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "training_iteration": iteration.to_mapping(),
        **attrs.asdict(probe, filter=lambda attribute, _value: attribute.name not in ("batch", "outputs")),
        "outputs": [attrs.asdict(output) for output in probe.outputs],
        "batch": probe.batch,
    }
    _size, digest = write_content(path, content, storage)
    found = _read(path, digest)
    if (found.outputs, found.models) != (probe.outputs, probe.models) or not equal(found.batch, probe.batch):
        raise CheckpointCorruptError(f"{path} reads back otherwise than it was written", path=path)
    return digest


def read_probe(found: CheckpointSet) -> Probe | None:
    """The probe of a set; None where it was saved without.

    Raises ``CheckpointCorruptError`` if the file is not the one that the manifest vouches for, other errors of the
    reader if it is gone, ``CheckpointFormatError`` for one of a newer release.
    """
    expected = None if found.manifest is None else found.manifest.probe
    return None if expected is None else _read(found.folder / PROBE_NAME, expected)


def _read(path: Path, digest: str) -> Probe:
    with open_checkpoint(path, digests=digest) as reader:
        reader.verify()
        content = reader.load()
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointFormatError(
            f"{path} has format version {version}, this release reads up to {FORMAT_VERSION}. "
            "Next: pip install --upgrade noether-init-core",
            path=path,
        )
    try:
        said = _Content.model_validate(content)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise CheckpointFormatError(f"{path} is no probe: {problems}", path=path) from error
    batch = content.get("batch")
    problem = _problem_in(batch, "batch") or check_batch(batch)
    if problem:
        raise CheckpointFormatError(f"{path} is no probe: {problem}", path=path)
    outputs = tuple(Output(**dict(one)) for one in said.outputs)
    fields = said.model_dump(exclude={"format", "format_version", "outputs"})
    return Probe(batch=batch, outputs=outputs, **fields)


def _problem_in(value: Any, place: str) -> str:
    """What in a batch is neither a tensor nor plain data, in words; empty where nothing is."""
    if isinstance(value, dict):
        return next(filter(None, (_problem_in(item, f"{place}.{key}") for key, item in value.items())), "")
    if type(value) in (list, tuple):
        return next(filter(None, (_problem_in(item, f"{place}.{number}") for number, item in enumerate(value))), "")
    return "" if isinstance(value, torch.Tensor) or type(value) in _PLAIN else f"{place} is {type_of(value)}"
