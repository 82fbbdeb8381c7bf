"""The file of a probe in a set: written with it, bound by a digest in its manifest, read by our own reader."""

from __future__ import annotations

from pathlib import Path

import pydantic

from noether_init_core.errors import CheckpointCorruptError, CheckpointFormatError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.plain_data import plain
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.nested import equal
from noether_init_core.probe.probe import Probe
from noether_init_core.saving.file_writing import write_content
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.manifest import PROBE_NAME

_FORMAT = {"format": "noether-init-probe", "format_version": 1}


def write_probe(folder: Path, probe: Probe, iteration: TrainingIteration, storage: FileSystem) -> str:
    """Write the file of a set, bring it onto the disk, and read it back; returns its digest, for the manifest.

    Raises ``OSError``, and ``CheckpointError`` if it cannot be written, or reads back otherwise.
    """
    path = folder / PROBE_NAME
    content = {**_FORMAT, "training_iteration": iteration.to_mapping(), **probe.model_dump()}
    content["outputs"] = list(content["outputs"])
    _size, digest = write_content(path, content, storage)
    found = _read(path, digest)
    if (found.outputs, found.models) != (probe.outputs, probe.models) or not equal(found.batch, probe.batch):
        raise CheckpointCorruptError(f"{path} reads back otherwise than it was written", path=path)
    return digest


def read_probe(found: CheckpointSet) -> Probe | None:
    """The probe of a set; None where it was saved without.

    Raises ``CheckpointCorruptError`` if the file is not the one that the manifest vouches for, other errors of the
    reader if it is gone, ``CheckpointFormatError`` for one of another release.
    """
    expected = None if found.manifest is None else found.manifest.probe
    return None if expected is None else _read(found.folder / PROBE_NAME, expected)


def _read(path: Path, digest: str) -> Probe:
    with open_checkpoint(path, digests=digest) as reader:
        reader.verify()
        content = reader.load()
    found = {key: content.get(key) for key in _FORMAT} if isinstance(content, dict) else {}
    try:
        if found != _FORMAT:
            raise ValueError(f"{found} is not {_FORMAT}. Next: pip install --upgrade noether-init-core")
        probe = Probe.model_validate(content)
        plain(probe.batch, "batch")
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise CheckpointFormatError(f"{path} is no probe: {problems}", path=path) from error
    except ValueError as error:
        raise CheckpointFormatError(f"{path} is no probe of this release: {error}", path=path) from error
    return probe
