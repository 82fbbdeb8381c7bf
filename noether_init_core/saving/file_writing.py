"""Write one file, flush it to the disk and read it back: a file of a set, a probe, or a file of weights.

Files of a set are written one after the other. If the model were trained meanwhile, weights and optimizer state could
be
of different iterations, though every file would be valid. So a ``Watch`` reads the tensors in memory twice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, cast

import attrs
import pydantic
import torch
import xxhash
from isal import isal_zlib

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointWriteError,
)
from noether_init_core.files.content import named, state_dict_of
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.plain_data import plain
from noether_init_core.files.reading import memory_of_tensor
from noether_init_core.files.storage.disk import LOCAL, FileSystem, naming
from noether_init_core.files.storage.handle import open_file
from noether_init_core.iteration import TrainingIteration
from noether_init_core.memory import examine_memory
from noether_init_core.messages import in_shell, one_line
from noether_init_core.nested import equal
from noether_init_core.probe.probe import Probe
from noether_init_core.saving.content import FileContent
from noether_init_core.sets.checkpoint_set import CheckpointSet, lies_in_a_run
from noether_init_core.sets.manifest import PROBE_NAME, FileDigests, ManifestFile, TensorDigest, digest_of, refused

# Reentrant, because a signal handler may save to another folder while this thread is saving.
_CHECKSUMS = threading.RLock()
_PROBE_FORMAT = {"format": "noether-init-probe", "format_version": 1}


def write_file(
    folder: Path, content: FileContent, storage: FileSystem, watch: Watch
) -> tuple[ManifestFile, FileDigests]:
    """Write one file of a set, flush it, and read its header back; return its entries for manifest and digests.

    ``watch`` reads the tensors in memory. Raises ``OSError``, ``CheckpointError`` if torch refuses the content, and
    ``CheckpointCorruptError`` if the file differs from the content.
    """
    name = content.name
    path = folder / str(name)
    size, digest = write_content(path, content.content, storage)
    listed, records = _prove(path, watch, content)
    tensors = {key: seen.stated for key, seen in listed.items()}
    found = {key: one.values for key, one in tensors.items() if one.values != "finite"}
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
    return head, FileDigests(tensors=tensors, buffers=content.buffers)


def write_bytes(path: Path, content: bytes, storage: FileSystem) -> str:
    """Write bytes, flush them to the disk, and return their digest. Raises ``OSError``."""
    with naming(path), storage.open_write(path) as file:
        file.write(content)
        storage.fsync(file)
    storage.make_read_only(path)
    return digest_of(content)


def write_content(path: Path, content: Any, storage: FileSystem) -> tuple[int, str]:
    """Write one object with ``torch.save`` and checksums, flush it to the disk, and return size and digest.

    Raises ``OSError``, and ``CheckpointError`` if torch refuses the content.
    """
    with naming(path), storage.open_write(path) as file:
        sink = _Sink(file)
        with _checksums():
            try:
                torch.save(content, cast(Any, sink))  # torch needs write() and flush() only
            except (RuntimeError, ValueError, TypeError) as error:
                raise CheckpointError(f"torch.save refuses {path.name}: {error}", path=path) from error
        sink.raise_error()
        storage.fsync(file)
    storage.make_read_only(path)
    return sink.size, f"xxh3_128:{sink.hash.hexdigest()}"


class _Sink:
    """The file object for ``torch.save``: writes, hashes and counts bytes.

    An error is stored instead of raised, because torch would replace it by one without the cause.
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
        """Do nothing: ``FileSystem.fsync`` flushes the file at the end."""

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _prove(path: Path, watch: Watch, content: FileContent) -> tuple[dict[str, Seen], str]:
    """Read the header back, so that a file which the reader refuses is never committed.

    The checksums that torch wrote are compared with those of the tensors in memory. So a change during the save is
    found
    now, and not when the set is loaded. Returns the tensors for the manifest, and the digest of the records.
    """
    with open_checkpoint(path) as reader:
        found = {key: (info.dtype, tuple(info.shape)) for key, info in reader.tensors().items()}
        checksums = reader.checksums()
        records = reader.digest_of_records
    listed, written = watch.listed(content), watch.all(content)
    expected = {key: (seen.stated.dtype, seen.stated.shape) for key, seen in listed.items()}
    different = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    different += sorted(written.keys() ^ checksums.keys())
    if different:
        raise CheckpointCorruptError(
            f"{path} differs from its content when read back: {', '.join(different[:5])}", path=path
        )
    if None in checksums.values():
        raise CheckpointCorruptError(
            f"{path} was written without checksums: another thread called torch.serialization.set_crc32_options "
            "during the save. Next: call it once, before training",
            path=path,
        )
    changed = [key.removeprefix("state_dict.") for key, seen in written.items() if checksums[key] != seen.crc]
    if changed:
        raise CheckpointCorruptError(
            f"{', '.join(changed[:5])} changed while {path} was written, by another thread or process. "
            "Next: save a clone(), or wait until the update has ended",
            path=path,
            key=", ".join(changed),
        )
    return listed, records


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """Make torch write a checksum of every record, whatever the program has set for its own files."""
    # In some releases of torch the option is global: without the lock, a save could restore it while another writes.
    with _CHECKSUMS:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(True)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


# The file of a probe. The manifest of its set holds its digest.


def write_probe(folder: Path, probe: Probe, iteration: TrainingIteration, storage: FileSystem) -> str:
    """Write the probe file of a set, flush it, read it back, and return its digest for the manifest.

    Raises ``OSError``, and ``CheckpointError`` if it cannot be written or differs when read back.
    """
    path = folder / PROBE_NAME
    content = {**_PROBE_FORMAT, "training_iteration": iteration.to_mapping(), **probe.model_dump()}
    content["outputs"] = list(content["outputs"])
    _size, digest = write_content(path, content, storage)
    found = _read_probe(path, digest)
    if (found.outputs, found.models) != (probe.outputs, probe.models) or not equal(found.batch, probe.batch):
        raise CheckpointCorruptError(f"{path} differs from its content when read back", path=path)
    return digest


def read_probe(found: CheckpointSet) -> Probe | None:
    """Read the probe of a set; None for a set without a probe.

    Raises ``CheckpointCorruptError`` if the file does not match the digest in the manifest, ``CheckpointNotFoundError``
    if it is missing, ``CheckpointFormatError`` for the format of another release.
    """
    expected = None if found.manifest is None else found.manifest.probe
    return None if expected is None else _read_probe(found.folder / PROBE_NAME, expected)


def _read_probe(path: Path, digest: str) -> Probe:
    with open_checkpoint(path, digests=digest) as reader:
        reader.verify()
        content = reader.load()
    found = {key: content.get(key) for key in _PROBE_FORMAT} if isinstance(content, dict) else {}
    try:
        if found != _PROBE_FORMAT:
            raise ValueError(f"{found} is not {_PROBE_FORMAT}. Next: pip install --upgrade noether-init-core")
        probe = Probe.model_validate(content)
        plain(probe.batch, "batch")
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one_line(one['msg'])}" for one in error.errors()[:5])
        raise CheckpointFormatError(f"{path} is not a probe: {problems}", path=path) from error
    except ValueError as error:
        raise CheckpointFormatError(f"{path} is not a probe of this release: {error}", path=path) from error
    return probe


# Files of weights, in common formats, written atomically.

#: Suffix -> format.
FORMATS: Mapping[str, Literal["torch", "safetensors"]] = {
    ".safetensors": "safetensors",
    ".th": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
    ".bin": "torch",
}


@attrs.frozen
class WrittenFile:
    """A file that was written; ``digest`` is that of all bytes, in the form of ``digest:`` of the kind ``file``."""

    path: Path
    format: Literal["torch", "safetensors"]
    bytes: int
    digest: str
    tensors: int


def check_place(path: Path, *, replace: bool = False) -> None:
    """Raise ``CheckpointWriteError`` for an unknown suffix, a missing folder, an existing file, or a path in a run."""
    if path.suffix.lower() not in FORMATS or not path.name:
        raise CheckpointWriteError(
            f"{path}: the suffix selects the format, and {path.suffix or 'no suffix'} is unknown; known are "
            f"{', '.join(FORMATS)}. Next: {path.with_suffix('.safetensors') if path.name else 'start.safetensors'}",
            path=path,
        )
    if not LOCAL.is_folder(path.parent):
        raise CheckpointWriteError(f"folder {path.parent} not found. Next: mkdir -p {in_shell(path.parent)}", path=path)
    if LOCAL.exists(path) and (not replace or not LOCAL.is_file(path)):
        raise CheckpointWriteError(
            f"{path} exists and was not changed. Next: choose another name, or use --force", path=path
        )
    if lies_in_a_run(path):
        raise CheckpointWriteError(f"{path} is in the folder of checkpoints of a run. Next: another folder", path=path)


def write_weights(
    path: Path, state: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None, replace: bool = False
) -> WrittenFile:
    """Write a state dict as one file atomically, and flush it to the disk.

    Args:
        path: The new file. The suffix selects the format: ``.safetensors``, or ``.th``, ``.pt``, ``.pth``, ``.ckpt``,
            ``.bin`` for a plain state dict of ``torch.save``.
        state: Name -> tensor. Other entries (extra state) are possible only in a torch file. Tensors that share memory
            are stored once in a torch file, and separately in safetensors.
        metadata: Strings for the header of a safetensors file.
        replace: Whether an existing file is replaced, atomically.

    Raises ``CheckpointWriteError`` if it cannot be written; then no file was added or changed.
    """
    check_place(path, replace=replace)
    kind = FORMATS[path.suffix.lower()]
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial{path.suffix}")
    try:
        # The mode that a new file gets here by umask. write_content makes its files read-only, as in a set.
        with temporary.open("xb") as probe:
            mode = stat.S_IMODE(os.fstat(probe.fileno()).st_mode)
        temporary.unlink()
        if kind == "safetensors":
            _write_safetensors(temporary, state, dict(metadata or {}))
        else:
            write_content(temporary, dict(state), LOCAL)
        temporary.chmod(mode)
        with contextlib.closing(open_file(temporary)) as handle:
            digest, size = handle.digest("xxh3_128"), handle.size
        with open_checkpoint(temporary) as reader:
            tensors = len(reader.tensors())
        _put(temporary, path, replace=replace)
        LOCAL.fsync_folder(path.parent)
    except CheckpointWriteError:
        raise
    except FileExistsError as error:
        message = f"{path} was created by another program meanwhile and was not changed. Next: choose another name"
        raise CheckpointWriteError(message, path=path) from error
    except Exception as error:  # safetensors raises classes of its own
        raise CheckpointWriteError(f"{path} was not written: {error}", path=path) from error
    finally:
        temporary.unlink(missing_ok=True)
    return WrittenFile(path, kind, size, digest, tensors)


def _write_safetensors(path: Path, state: Mapping[str, Any], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"{', '.join(others[:5])} {'are not tensors' if others[1:] else 'is not a tensor'}, and a safetensors file "
            "holds only tensors. Next: choose a name that ends in .th",
            path=path,
        )
    # save_file refuses tensors that share memory, so a tied tensor is cloned. Conjugation and negation are lazy in
    # torch: the bytes in memory of such a view are not its values.
    apart = {name: value.detach().resolve_conj().resolve_neg().contiguous() for name, value in state.items()}
    seen: set[int] = set()
    for name, value in apart.items():
        place = value.untyped_storage().data_ptr()
        if place in seen:
            apart[name] = value.clone()
        seen.add(place)
    save_file(apart, path, metadata=metadata)
    with path.open("rb+") as file:
        LOCAL.fsync(file)


def _put(temporary: Path, path: Path, *, replace: bool) -> None:
    """Give the file its name atomically; unless ``replace``, a file that was created meanwhile is not overwritten."""
    if replace:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without hard links. Between the check and the rename another program could create the file.
        check_place(path)
        os.rename(temporary, path)


@attrs.frozen
class Seen:
    """The state of a tensor when it was read. The CRC-32 is of its bytes in memory order, as torch writes them."""

    stated: TensorDigest
    crc: int


class Watch:
    """Reads every tensor of a save twice in a separate thread: all of them once, and then all of them again.

    A tensor that is equal in both reads had this value at the moment between the two passes. So if the files match the
    first pass, all files together are the state of that one moment. Use it as a context manager.
    """

    def __init__(self, contents: Sequence[FileContent]) -> None:
        self._tensors = {content: named(content.content, torch.Tensor) for content in contents}
        self._stopped = False
        # plain() makes tied tensors one object, which is read once.
        self._seen: dict[int, Seen] = {}
        self._pool = ThreadPoolExecutor(1)
        self._first: dict[FileContent, Future[None]] = {}
        self._second: Future[list[str]] | None = None

    def __enter__(self) -> Self:
        self._first = {content: self._pool.submit(self._look, content) for content in self._tensors}
        self._second = self._pool.submit(self._look_again)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped = True
        self._pool.shutdown(cancel_futures=True)

    def listed(self, content: FileContent) -> dict[str, Seen]:
        """Return the tensors of one file that a manifest lists, by the names that the reader gives them."""
        self._first[content].result()
        state_dict = state_dict_of(content.content, torch.Tensor)
        if state_dict is None:
            return self.all(content)
        return {key: self._seen[id(value)] for key, value in state_dict.items() if isinstance(value, torch.Tensor)}

    def all(self, content: FileContent) -> dict[str, Seen]:
        """Return all tensors of one file, by their paths in the complete object."""
        self._first[content].result()
        return {path: self._seen[id(tensor)] for path, tensor in self._tensors[content].items()}

    def changed(self) -> list[str]:
        """Return path and file of each tensor that differs between both passes. Call it after all files are written."""
        assert self._second is not None
        return self._second.result()

    def _look(self, content: FileContent) -> None:
        for tensor in self._tensors[content].values():
            if self._stopped:
                return
            if id(tensor) in self._seen:
                continue
            dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            # Computed before the examination below; the second pass finds a change between the two.
            as_it_lies = None if tensor.is_contiguous() else _checksum(tensor)
            digest, crc, found = examine_memory(memory_of_tensor(tensor.contiguous()), dtype)
            stated = TensorDigest(dtype=dtype, shape=shape, digest=digest, values=found or "finite")
            self._seen[id(tensor)] = Seen(stated, crc if as_it_lies is None else as_it_lies)

    def _look_again(self) -> list[str]:
        changed: dict[int, str] = {}
        compared: set[int] = set()
        for content, tensors in self._tensors.items():
            for path, tensor in tensors.items():
                if self._stopped:
                    return []
                if id(tensor) in self._seen and id(tensor) not in compared:
                    compared.add(id(tensor))
                    if _checksum(tensor) != self._seen[id(tensor)].crc:
                        changed[id(tensor)] = f"{path.removeprefix('state_dict.')} of {content.name}"
        return list(changed.values())


def _checksum(tensor: torch.Tensor) -> int:
    return int(isal_zlib.crc32(memory_of_tensor(tensor)))
