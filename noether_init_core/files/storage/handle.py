"""Read bytes of one stored object by position: the protocol ``Storage``, local files, and the handle for formats."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import xxhash
from isal import isal_zlib

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointUnreachableError,
)
from noether_init_core.files.content import Record
from noether_init_core.files.storage.disk import LOCAL, unreachable
from noether_init_core.links import absence, no_folder
from noether_init_core.messages import listed, near

Item = TypeVar("Item")

#: Bytes of one read into memory of the caller.
CHUNK = 4 << 20
#: Number of reading threads; a few saturate the memory.
THREADS = min(4, max(2, os.cpu_count() or 2))
#: Number of neighbouring bytes that one thread reads at a time; threads that alternate within a few MiB are slower.
GROUP = 32 << 20
_DIGEST_LENGTHS = {"xxh3_128": 32, "sha256": 64}


@runtime_checkable
class Storage(Protocol):
    """One stored object: a file, or an object in another store, such as a bucket.

    ``open_checkpoint`` accepts one in place of a path. Messages name it by its ``str()``. If it has a method ``close``,
    it is called once.
    """

    @property
    def size(self) -> int:
        """Number of bytes."""
        ...

    @property
    def version(self) -> str:
        """A string that changes whenever the bytes may have changed, such as an ETag; compared before and after
        reads."""
        ...

    def read(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each memory with the bytes that start at its offset. Several threads call this at the same time.

        Raises ``EOFError`` if the object ends too early, ``OSError`` if it cannot be read.
        """
        ...


#: Memory to fill, the offset of its first byte in the object, and the key for error messages.
Transfer = tuple[memoryview, int, str]


class Handle:
    """An open object: verification and reading use the same handle, so the same bytes.

    Attributes:
        advance: Called with the number of bytes of every read, by the thread that reads; None: nothing is called.
    """

    def __init__(self, storage: Storage, path: Path | None = None) -> None:
        self.path = Path(str(storage)) if path is None else path
        self.size = storage.size
        self.advance: Callable[[int], None] | None = None
        self._storage: Storage | None = storage
        self._version = storage.version

    @property
    def storage(self) -> Storage:
        """The open storage. Raises ``CheckpointError`` after ``close``."""
        if self._storage is None:
            raise CheckpointError(f"{self.path}: the checkpoint is closed. Next: open_checkpoint again", path=self.path)
        return self._storage

    def check_unchanged(self) -> None:
        """Raise ``CheckpointCorruptError`` if the object was modified since it was opened.

        One open file serves from check to load, so *replacing* the file is harmless. A file that is rewritten in place,
        as Noether rewrites ``latest``, would be verified in one state and loaded in another.
        """
        try:
            is_same = self._storage is None or (self._storage.size, self._storage.version) == (self.size, self._version)
        except OSError as error:
            raise CheckpointUnreachableError(f"{self.path} is no longer accessible: {error}", path=self.path) from error
        if not is_same:
            raise CheckpointCorruptError(
                f"{self.path} was modified while it was in use. Next: start again after the run that writes it has "
                "ended, or select a checkpoint that is never overwritten (E.._U.._S..)",
                path=self.path,
            )

    def check_record(self, record: Record, data: bytes) -> None:
        """Raise ``CheckpointCorruptError`` if ``data`` does not match the checksum of the record."""
        if record.crc is not None and isal_zlib.crc32(data) != record.crc:
            raise self.damage({record.name: []})

    def damage(self, keys: Mapping[str, Sequence[str]]) -> CheckpointCorruptError:
        """Return the error for damaged records; ``keys``: name of a record -> the keys whose bytes are in it."""
        parts = (f"{listed(names, 10)} ({record})" if names else record for record, names in keys.items())
        return CheckpointCorruptError(
            f"{self.path} is damaged: the bytes of {listed(parts, 20, separator='; ')} are not those that were "
            "written. Next: copy the file again from where it was written, or take an older checkpoint",
            path=self.path,
            key=", ".join(name for names in keys.values() for name in names),
        )

    def close(self) -> None:
        """Close the storage; a repeated call does nothing."""
        storage, self._storage = self._storage, None
        close = getattr(storage, "close", None)
        if close is not None:
            close()

    def read(self, length: int, offset: int) -> bytes:
        """Return exactly ``length`` bytes; the caller has checked them against ``size``."""
        return self.read_many([(offset, length)])[0]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range (offset, length); the caller has checked them against ``size``."""
        buffers = [(offset, bytearray(length)) for offset, length in ranges]
        self._fill([(offset, memoryview(buffer)) for offset, buffer in buffers])
        return [bytes(buffer) for _offset, buffer in buffers]

    def read_into(self, target: memoryview, offset: int, key: str = "") -> None:
        """Fill ``target`` with the bytes from ``offset`` on; ``key`` names the tensor in error messages.

        Raises ``CheckpointCorruptError`` if the file was truncated since it was opened, and ``CheckpointError`` if it
        cannot be read.
        """
        self._fill([(offset, target)], key)

    def _fill(self, ranges: Sequence[tuple[int, memoryview]], key: str = "") -> None:
        storage = self.storage
        try:
            storage.read(ranges)
        except EOFError as error:
            raise CheckpointCorruptError(
                f"{self.path} {error}"
                + (f", within {key!r}" if key else "")
                + f", though it had {self.size} bytes when it was opened: it was truncated meanwhile",
                path=self.path,
                key=key,
            ) from error
        except OSError as error:
            begin = ranges[0][0]
            message = f"{self.path} cannot be read at byte {begin}: {error}"
            raise CheckpointUnreachableError(message, path=self.path) from error
        if self.advance is not None:
            self.advance(sum(target.nbytes for _offset, target in ranges))

    def read_all(self, transfers: Iterable[Transfer]) -> None:
        """Fill every target; large amounts are read by several threads."""

        def read(group: Sequence[Transfer]) -> None:
            for piece in group:
                self.read_into(*piece)

        pieces = [
            (target[start : start + GROUP], offset + start, key)
            for target, offset, key in transfers
            for start in range(0, target.nbytes, GROUP)
        ]
        pieces.sort(key=lambda piece: piece[1])
        by_threads([(piece[0].nbytes, piece) for piece in pieces], read)

    def check_digest(self, digest: str) -> None:
        """Compare the complete object with ``xxh3_128:<hex>`` or ``sha256:<hex>``.

        Raises ``CheckpointCorruptError`` for another digest, ``CheckpointError`` for an invalid ``digest``.
        """
        problem = digest_problem(digest)
        if problem:
            raise CheckpointError(problem, path=self.path)
        found = self.digest(digest.partition(":")[0])
        if found != digest:
            raise CheckpointCorruptError(
                f"{self.path} has the digest {found}, expected {digest}: "
                "it is damaged, or another file. Next: copy it again, or take an older checkpoint",
                path=self.path,
            )

    def digest(self, algorithm: str) -> str:
        """Return ``<algorithm>:<hex>`` of the complete object; the algorithm is ``xxh3_128`` or ``sha256``."""
        state = hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()
        buffer = memoryview(bytearray(min(CHUNK, self.size)))
        for offset in range(0, self.size, CHUNK):
            chunk = buffer[: min(CHUNK, self.size - offset)]
            self.read_into(chunk, offset)
            state.update(chunk)
        return f"{algorithm}:{state.hexdigest()}"


def digest_problem(digest: str) -> str:
    """Return what is wrong with the form of a digest; empty for a valid one."""
    algorithm, _, expected = digest.partition(":")
    if len(expected) == _DIGEST_LENGTHS.get(algorithm) and set(expected) <= set("0123456789abcdef"):
        return ""
    return (
        f"{digest!r} is not a valid digest. Next: write xxh3_128:<32 hexadecimal digits> or "
        "sha256:<64 hexadecimal digits>, in lower case"
    )


def by_threads(items: Iterable[tuple[int, Item]], work: Callable[[list[Item]], None]) -> None:
    """Call ``work`` for groups of neighbouring items, in several threads if there are several groups.

    Each item is given with its number of bytes. A group has at least ``GROUP // 4`` bytes. The largest group goes
    first,
    so that no thread works alone at the end. The first error is raised.
    """
    groups: list[list[Item]] = []
    sizes: list[int] = []
    for nbytes, item in items:
        if not groups or sizes[-1] >= GROUP // 4:
            groups.append([])
            sizes.append(0)
        groups[-1].append(item)
        sizes[-1] += nbytes
    largest_first = [groups[number] for number in sorted(range(len(groups)), key=lambda number: -sizes[number])]
    if len(groups) < 2:
        for group in groups:
            work(group)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for _done in pool.map(work, largest_first):
            pass


# O_NONBLOCK: opening a FIFO must not wait for a writer. O_NOCTTY: a terminal must not become that of the process.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)


class LocalFile:
    """A regular file under one descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def size(self) -> int:
        """Current number of bytes."""
        return os.fstat(self.descriptor).st_size

    @property
    def version(self) -> str:
        """Time of modification (mtime).

        A program that sets the mtime back after writing is not detected. The ctime would detect it, but it also changes
        when a writer adds or removes a hard link, as every save of this package does while others read.
        """
        return str(os.fstat(self.descriptor).st_mtime_ns)

    def read(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each memory with the bytes that start at its offset. Raises ``EOFError`` if the file ends too early."""
        for offset, target in ranges:
            done, length = 0, len(target)
            while done < length:
                count = os.preadv(self.descriptor, [target[done : done + CHUNK]], offset + done)
                if count == 0:
                    raise EOFError(f"ends at byte {offset + done}")
                done += count

    def close(self) -> None:
        """Close the descriptor; called once."""
        os.close(self.descriptor)


def open_file(path: Path) -> Handle:
    """Open a regular file, symbolic links followed; anything else is refused without blocking.

    Raises ``CheckpointNotFoundError``, ``CheckpointFormatError`` for another type of file, else ``CheckpointError``.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except (FileNotFoundError, NotADirectoryError) as error:
        absent = absence(path)
        raise CheckpointNotFoundError(
            f"{path} {absent if 'Next: ' in absent else absent + _neighbours(path)}", path=path, asked=str(path)
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in {errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP}:
            raise _not_regular(path, "device or socket") from error
        if isinstance(error, OSError):
            raise unreachable(error, path) from error
        raise CheckpointError(f"{path} cannot be opened: {error}", path=path) from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            what = "folder" if stat.S_ISDIR(mode) else "FIFO" if stat.S_ISFIFO(mode) else "device"
            raise _not_regular(path, what)
        return Handle(LocalFile(descriptor), path)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise unreachable(error, path) from error
        raise


def _not_regular(path: Path, what: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path} is a {what}, not a checkpoint file. Next: give the file itself", path=path)


def _neighbours(path: Path) -> str:
    try:
        names = sorted(name for name in LOCAL.list_folder(path.parent) if name.endswith(path.suffix or ".th"))
    except FileNotFoundError:
        return f": {no_folder(path.parent)}"
    except OSError:
        return f", and its folder {path.parent} cannot be listed"
    names = list(dict.fromkeys([*near(path.name, names), *names]))
    if not names:
        return f". The folder {path.parent} has no {path.suffix or '.th'} file"
    return f". Found in {path.parent}: {listed(names)}"
