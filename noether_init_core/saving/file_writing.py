"""One file of a set: written, brought onto the disk, read back, and described for the manifest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash

from noether_init_core.errors import CheckpointCorruptError, CheckpointError
from noether_init_core.files.storage.disk import Storage
from noether_init_core.saving.concurrent_changes import Seen, Watch
from noether_init_core.saving.content import FileContent
from noether_init_core.sets.manifest import FileDigests, ManifestFile, TensorDigest, digest_of
from noether_init_core.sets.nonfinite_sets import refused

__all__ = ["naming", "write_bytes", "write_content", "write_file"]

# a handler of signals may save to another folder in the midst of a save
_CHECKSUMS = threading.RLock()


def write_file(folder: Path, content: FileContent, storage: Storage, watch: Watch) -> tuple[ManifestFile, FileDigests]:
    """Write one file of a set, bring it onto the disk, and read its header back; returns what is recorded of it.

    ``watch`` looks at the tensors in memory. Raises ``OSError``, ``CheckpointError`` if torch refuses the content, and
    ``CheckpointCorruptError`` if the file is not what was to be written.
    """
    name = content.name
    path = folder / str(name)
    size, digest = write_content(path, content.content, storage)
    listed, records = _prove(path, watch, content)
    found = {key: seen.examined.nonfinite for key, seen in listed.items() if seen.examined.nonfinite is not None}
    head = ManifestFile(
        name=str(name),
        model=name.model,
        info=name.info,
        part=name.part,
        size=size,
        digest=digest,
        records=records,
        refused=refused(name.part, found, content.buffers),
    )
    tensors = {
        key: TensorDigest(
            dtype=seen.dtype,
            shape=seen.shape,
            digest=seen.examined.digest,
            values=seen.examined.nonfinite or "finite",
        )
        for key, seen in listed.items()
    }
    return head, FileDigests(tensors=tensors, buffers=content.buffers)


def write_bytes(path: Path, content: bytes, storage: Storage) -> str:
    """Write bytes, and bring them onto the disk; returns their digest. Raises ``OSError``."""
    with naming(path), storage.open_write(path) as file:
        file.write(content)
        storage.fsync(file)
    storage.make_read_only(path)
    return digest_of(content)


def write_content(path: Path, content: Any, storage: Storage) -> tuple[int, str]:
    """Write one object as ``torch.save`` does, with checksums, and bring it onto the disk; returns size and digest.

    Raises ``OSError``, and ``CheckpointError`` if torch refuses the content.
    """
    with naming(path), storage.open_write(path) as file:
        sink = _Sink(file)
        with _checksums():
            try:
                torch.save(content, cast(Any, sink))  # a writable object is all that torch asks for
            except (RuntimeError, ValueError, TypeError) as error:
                raise CheckpointError(f"torch.save refuses {path.name}: {error}", path=path) from error
        sink.raise_error()
        storage.fsync(file)
    storage.make_read_only(path)
    return sink.size, f"xxh3_128:{sink.hash.hexdigest()}"


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


def _prove(path: Path, watch: Watch, content: FileContent) -> tuple[dict[str, Seen], str]:
    """Read the header back with our own reader: a file that it cannot read must never be committed.

    The checksums that torch wrote are compared with those of the tensors in memory, so that what changed in the midst
    of the save is found now, and not when the set is needed. Returns what the manifest says of the tensors, and the
    digest of the file's records.
    """
    from noether_init_core.files.opening import open_checkpoint

    with open_checkpoint(path) as reader:
        found = {key: (info.dtype, tuple(info.shape)) for key, info in reader.tensors().items()}
        checksums = reader.checksums()
        records = reader.digest_of_records
    listed, written = watch.listed(content), watch.all(content)
    expected = {key: (seen.dtype, seen.shape) for key, seen in listed.items()}
    different = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    different += sorted(written.keys() ^ checksums.keys())
    if different:
        raise CheckpointCorruptError(
            f"{path} reads back otherwise than it was written: {', '.join(different[:5])}", path=path
        )
    if None in checksums.values():
        raise CheckpointCorruptError(
            f"{path} was written without checksums: torch.serialization.set_crc32_options was called while it was "
            "written, by another thread",
            path=path,
        )
    changed = [key.removeprefix("state_dict.") for key, seen in written.items() if checksums[key] != seen.examined.crc]
    if changed:
        raise CheckpointCorruptError(
            f"{', '.join(changed[:5])} changed while {path} was written, by another thread or process. "
            "Next: save a copy (clone), or wait for what updates it",
            path=path,
            key=", ".join(changed),
        )
    return listed, records


@contextmanager
def _checksums() -> Iterator[None]:
    """Have torch write a checksum of every record, whatever the program chose for its own files."""
    # Some releases of torch have one choice for all threads: nobody may put it back while another one writes.
    with _CHECKSUMS:
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
