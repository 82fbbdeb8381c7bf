"""One file, written, brought onto the disk and read back: of a set, watched meanwhile, of a probe, or of weights alone.

Files of a set are written one after the other. Were the weights taken from one iteration and the moments from the next,
every file would be sound and the set would be torn. So the tensors in memory are looked at before and after.
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
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.files.storage.handle import open_file
from noether_init_core.iteration import TrainingIteration
from noether_init_core.memory import examine_memory
from noether_init_core.nested import equal
from noether_init_core.probe.probe import Probe
from noether_init_core.saving.content import FileContent
from noether_init_core.sets.checkpoint_set import CheckpointSet, lies_in_a_run
from noether_init_core.sets.manifest import PROBE_NAME, FileDigests, ManifestFile, TensorDigest, digest_of, refused

# a handler of signals may save to another folder in the midst of a save
_CHECKSUMS = threading.RLock()
_PROBE_FORMAT = {"format": "noether-init-probe", "format_version": 1}


def write_file(
    folder: Path, content: FileContent, storage: FileSystem, watch: Watch
) -> tuple[ManifestFile, FileDigests]:
    """Write one file of a set, bring it onto the disk, and read its header back; returns what is recorded of it.

    ``watch`` looks at the tensors in memory. Raises ``OSError``, ``CheckpointError`` if torch refuses the content, and
    ``CheckpointCorruptError`` if the file is not what was to be written.
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
    """Write bytes, and bring them onto the disk; returns their digest. Raises ``OSError``."""
    with naming(path), storage.open_write(path) as file:
        file.write(content)
        storage.fsync(file)
    storage.make_read_only(path)
    return digest_of(content)


def write_content(path: Path, content: Any, storage: FileSystem) -> tuple[int, str]:
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
            f"{path} reads back otherwise than it was written: {', '.join(different[:5])}", path=path
        )
    if None in checksums.values():
        raise CheckpointCorruptError(
            f"{path} was written without checksums: torch.serialization.set_crc32_options was called while it was "
            "written, by another thread",
            path=path,
        )
    changed = [key.removeprefix("state_dict.") for key, seen in written.items() if checksums[key] != seen.crc]
    if changed:
        raise CheckpointCorruptError(
            f"{', '.join(changed[:5])} changed while {path} was written, by another thread or process. "
            "Next: save a copy (clone), or wait for what updates it",
            path=path,
            key=", ".join(changed),
        )
    return listed, records


@contextlib.contextmanager
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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file a failing write or fsync was for; the system knows it by number only."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


# The file of a probe: bound by a digest in the manifest of its set, read by our own reader.


def write_probe(folder: Path, probe: Probe, iteration: TrainingIteration, storage: FileSystem) -> str:
    """Write the file of a set, bring it onto the disk, and read it back; returns its digest, for the manifest.

    Raises ``OSError``, and ``CheckpointError`` if it cannot be written, or reads back otherwise.
    """
    path = folder / PROBE_NAME
    content = {**_PROBE_FORMAT, "training_iteration": iteration.to_mapping(), **probe.model_dump()}
    content["outputs"] = list(content["outputs"])
    _size, digest = write_content(path, content, storage)
    found = _read_probe(path, digest)
    if (found.outputs, found.models) != (probe.outputs, probe.models) or not equal(found.batch, probe.batch):
        raise CheckpointCorruptError(f"{path} reads back otherwise than it was written", path=path)
    return digest


def read_probe(found: CheckpointSet) -> Probe | None:
    """The probe of a set; None where it was saved without.

    Raises ``CheckpointCorruptError`` if the file is not the one that the manifest vouches for, other errors of the
    reader if it is gone, ``CheckpointFormatError`` for one of another release.
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
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise CheckpointFormatError(f"{path} is no probe: {problems}", path=path) from error
    except ValueError as error:
        raise CheckpointFormatError(f"{path} is no probe of this release: {error}", path=path) from error
    return probe


# Weights by themselves: in a format that everybody reads; there as a whole, or not at all.

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
    """A file that is on the disk; ``digest`` is that of all its bytes, as ``digest:`` of the kind ``file`` takes it."""

    path: Path
    format: Literal["torch", "safetensors"]
    bytes: int
    digest: str
    tensors: int


def check_place(path: Path, *, replace: bool = False) -> None:
    """Raise ``CheckpointWriteError`` for an unknown suffix, where there is no folder, and where a file is there."""
    if path.suffix.lower() not in FORMATS or not path.name:
        raise CheckpointWriteError(
            f"{path}: the suffix says the format, and {path.suffix or 'none'} is not known. There are: "
            f"{', '.join(FORMATS)}. Next: {path.with_suffix('.safetensors') if path.name else 'start.safetensors'}",
            path=path,
        )
    if not path.parent.is_dir():
        raise CheckpointWriteError(f"there is no folder {path.parent}. Next: mkdir -p {path.parent}", path=path)
    if os.path.lexists(path) and (not replace or not path.is_file()):
        raise CheckpointWriteError(
            f"{path} is there already, and was left as it is. Next: another name, or --force", path=path
        )
    if lies_in_a_run(path):
        raise CheckpointWriteError(f"{path} lies among checkpoints of a run. Next: a file in another folder", path=path)


def write_weights(
    path: Path, state: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None, replace: bool = False
) -> WrittenFile:
    """Write a state dict as one file, and bring it onto the disk.

    Args:
        path: Where to. Its suffix says the format: ``.safetensors``, or ``.th``, ``.pt``, ``.pth``, ``.ckpt``, ``.bin``
            for a plain state dict as ``torch.save`` writes it.
        state: Name -> tensor. Other entries (extra state) can be in a file of torch only. Tensors that share memory
            are stored once by torch, and each by itself in safetensors.
        metadata: Texts for the header of a safetensors file.
        replace: Whether a file that is there is replaced, in one step.

    Raises ``CheckpointWriteError`` where it cannot be written; then nothing is there that was not there before.
    """
    check_place(path, replace=replace)
    kind = FORMATS[path.suffix.lower()]
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial{path.suffix}")
    try:
        # what another program would give a new file here; writers give files of theirs other rights
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
        raise CheckpointWriteError(f"{path} came to be meanwhile, and was left as it is", path=path) from error
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
            f"{', '.join(others[:5])} {'are no tensors' if others[1:] else 'is no tensor'}, and a safetensors file has "
            f"nothing else. Next: a name that ends in .th",
            path=path,
        )
    # tied tensors share memory, which the format does not know; each gets its own bytes
    # what is conjugated or negated only in name has other bytes in memory than values
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
    """Give the file its name: in one step, and never over another one that came meanwhile, unless that is wanted."""
    if replace:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        check_place(path)  # a file system without links
        os.rename(temporary, path)


@attrs.frozen
class Seen:
    """A tensor when it was looked at. The CRC-32 is that of its bytes as they lie in memory and in a file."""

    stated: TensorDigest
    crc: int


class Watch:
    """Looks at every tensor of a save in a thread of its own: once, and again when all were looked at.

    What is the same in both looks had these values at the moment between them. So if the files hold what the first look
    saw, all of them together are the state of that one moment. A context manager; it ends with the block.
    """

    def __init__(self, contents: Sequence[FileContent]) -> None:
        self._tensors = {content: named(content.content, torch.Tensor) for content in contents}
        self._stopped = False
        # tied tensors are one object, and are looked at once
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
        """The tensors of one file that a manifest lists, by the names that the reader gives them."""
        self._first[content].result()
        state_dict = state_dict_of(content.content, torch.Tensor)
        if state_dict is None:
            return self.all(content)
        return {key: self._seen[id(value)] for key, value in state_dict.items() if isinstance(value, torch.Tensor)}

    def all(self, content: FileContent) -> dict[str, Seen]:
        """All tensors of one file, by their paths in the whole object."""
        self._first[content].result()
        return {path: self._seen[id(tensor)] for path, tensor in self._tensors[content].items()}

    def changed(self) -> list[str]:
        """Those tensors that were not the same in both looks: file and path. To be asked when all is written."""
        assert self._second is not None
        return self._second.result()

    def _look(self, content: FileContent) -> None:
        for tensor in self._tensors[content].values():
            if self._stopped:
                return
            if id(tensor) in self._seen:
                continue
            dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            # before the look: what changes between both is found by the second one
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
