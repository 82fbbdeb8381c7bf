"""One file of a set: written, brought onto the disk, read back, and described for the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash

from noether_init_core.checkpoints.content import FileContent
from noether_init_core.checkpoints.manifest import ManifestFile, ManifestTensor
from noether_init_core.checkpoints.plain import bytes_of_tensor, tensors_in
from noether_init_core.checkpoints.storage import Storage
from noether_init_core.checkpoints.verify import Examined, examine_memory
from noether_init_core.errors import CheckpointCorruptError

__all__ = ["naming", "write_file"]

# dtype, shape, and what its bytes in memory are
_Examined = tuple[str, tuple[int, ...], Examined]


def write_file(folder: Path, content: FileContent, storage: Storage) -> ManifestFile:
    """Write one file of a set, bring it onto the disk, and read its header back; returns what the manifest says of it.

    Raises ``OSError``, and ``CheckpointCorruptError`` if the file is not what was to be written.
    """
    path = folder / str(content.name)
    # digests of tensors are taken meanwhile: the disk and torch's checksums take longer
    with ThreadPoolExecutor(1) as pool, naming(path), storage.open_write(path) as file:
        described = pool.submit(_examined, content)
        sink = _Sink(file)
        with _checksums():
            torch.save(content.content, cast(Any, sink))  # a writable object is all that torch asks for
        sink.raise_error()
        storage.fsync(file)
    storage.make_read_only(path)
    examined = described.result()
    records = _prove(path, examined)
    name = content.name
    return ManifestFile(
        name=str(name),
        model=name.model,
        info=name.info,
        part=name.part,
        size=sink.size,
        digest=f"xxh3_128:{sink.hash.hexdigest()}",
        records=records,
        buffers=content.buffers,
        tensors={
            key: ManifestTensor(dtype=dtype, shape=shape, digest=found.digest, values=found.nonfinite or "finite")
            for key, (dtype, shape, found) in examined.items()
        },
    )


class _Sink:
    """What ``torch.save`` writes to: passes bytes on, hashes and counts them.

    An error is kept instead of raised, because torch turns it into one that does not say what happened.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: Exception | None = None
        self.hash = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._file.write(view)
            except OSError as error:
                self._error = error
        self.hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: the file is flushed when it is brought onto the disk."""

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _tensors_of(content: FileContent) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by the keys that the reader gives them: those of a state dict by its own keys, without extra state."""
    if content.name.part == "model":
        state_dict = content.content["state_dict"]
        yield from ((key, value) for key, value in state_dict.items() if isinstance(value, torch.Tensor))
    else:
        yield from tensors_in(content.content)


def _examined(content: FileContent) -> dict[str, _Examined]:
    found = {}
    for key, tensor in _tensors_of(content):
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[key] = dtype, tuple(tensor.shape), examine_memory(bytes_of_tensor(tensor), dtype)
    return found


def _prove(path: Path, written: Mapping[str, _Examined]) -> str:
    """Read the header back with our own reader: a file that it cannot read must never be committed.

    The checksums that torch wrote are compared with those of the tensors in memory, so that what changed in the midst
    of the save is found now, and not when the set is needed. Returns the digest of the file's records.
    """
    from noether_init_core.checkpoints.reader import open_checkpoint

    with open_checkpoint(path) as reader:
        found = {key: (info.dtype, tuple(info.shape)) for key, info in reader.tensors.items()}
        checksums = {key: reader.checksum_of(key) for key in reader.tensors}
        records = reader.digest_of_records
    expected = {key: (dtype, shape) for key, (dtype, shape, _) in written.items()}
    different = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    if different:
        raise CheckpointCorruptError(
            f"{path} reads back otherwise than it was written: {', '.join(different[:5])}", path=path
        )
    changed = [key for key, (*_, examined) in written.items() if checksums[key] not in (None, examined.crc)]
    if changed:
        raise CheckpointCorruptError(
            f"{', '.join(changed[:5])} changed while {path} was written, by another thread or process. "
            "Next: save a copy (clone), or wait for what updates it",
            path=path,
            key=", ".join(changed),
        )
    return records


@contextmanager
def _checksums() -> Iterator[None]:
    """Have torch write a checksum of every record, whatever the program chose for its own files."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file a failing write or fsync was for; the system knows it by number only."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
