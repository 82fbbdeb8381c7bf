"""One open regular file: opened without blocking, read by position, until it is closed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import attrs

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
)

__all__ = ["GROUP", "FileHandle", "Transfer", "by_threads", "grouped", "open_file"]

Item = TypeVar("Item")

#: Bytes of one read into memory of the caller.
CHUNK = 4 << 20
#: How many threads read at once; a few are as fast as the memory.
THREADS = min(4, max(2, os.cpu_count() or 2))
#: Neighbouring bytes that one thread takes at a time: threads that take turns within a few megabytes are slower.
GROUP = 32 << 20
_DIGEST_LENGTHS = {"xxh3_128": 32, "sha256": 64}
# A FIFO must not block, and a terminal must not become ours.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)


@attrs.frozen
class Transfer:
    """Bytes of the file from ``offset`` on that are to fill ``target``; ``key`` is named if that fails."""

    target: memoryview
    offset: int
    key: str = ""


class FileHandle:
    """A regular file under one descriptor, so that what was checked is what is read."""

    def __init__(self, descriptor: int, path: Path, size: int, modified: int) -> None:
        self._descriptor: int | None = descriptor
        self._modified = modified
        self.path = path
        self.size = size

    def check_unchanged(self) -> None:
        """Raise ``CheckpointCorruptError`` if the file was written to since it was opened.

        One open file serves from check to load, so a file that is *replaced* meanwhile does no harm. One that is
        rewritten in place, as Noether rewrites ``latest``, would be verified in one state and loaded in another.

        Looked at are size and time of modification. A program that puts the time back after it has written is not
        found: the time of change, which it could not put back, also moves when our writer gives the file a further
        name or takes one away, as it does beside readers at every save.
        """
        if self._descriptor is None:
            return
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
            raise CheckpointCorruptError(
                f"{self.path} was written to while it was in use. Next: start again when the run that writes it is "
                "done, or take a checkpoint that is not written over (E.._U.._S..)",
                path=self.path,
            )

    def close(self) -> None:
        """Close the file; repeating it does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def fileno(self) -> int:
        """The open descriptor. Raises ``CheckpointError`` once the file is closed."""
        if self._descriptor is None:
            raise CheckpointError(f"{self.path}: the reader is closed. Next: open_checkpoint again", path=self.path)
        return self._descriptor

    def read(self, length: int, offset: int, key: str = "") -> bytes:
        """Exactly ``length`` bytes. The caller has checked that the file has them."""
        if self._descriptor is not None and length <= CHUNK:
            with contextlib.suppress(OSError):  # the longer way reports it
                data = os.pread(self._descriptor, length, offset)
                if len(data) == length:
                    return data
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset, key)
        return bytes(buffer)

    def read_into(self, target: memoryview, offset: int, key: str = "") -> None:
        """Fill ``target``. Raises ``CheckpointCorruptError`` if the file has become shorter than it was."""
        descriptor = self._descriptor
        if descriptor is None:
            raise CheckpointError(f"{self.path}: the reader is closed. Next: open_checkpoint again", path=self.path)
        done, length = 0, len(target)
        while done < length:
            try:
                count = os.preadv(descriptor, [target[done : done + CHUNK]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read at byte {offset + done}: {error}", path=self.path
                ) from error
            if count == 0:
                raise CheckpointCorruptError(
                    f"{self.path} ends at byte {offset + done}"
                    + (f", within {key!r}" if key else "")
                    + f", though it had {self.size} bytes when it was opened: it was cut off meanwhile",
                    path=self.path,
                    key=key,
                )
            done += count

    def read_all(self, transfers: Iterable[Transfer]) -> None:
        """Carry out the transfers, large amounts with several threads."""

        def read(group: Sequence[Transfer]) -> None:
            for piece in group:
                self.read_into(piece.target, piece.offset, piece.key)

        pieces = sorted(_pieces(transfers), key=lambda piece: piece.offset)
        by_threads(grouped(pieces, lambda piece: len(piece.target)), read)

    def check_digest(self, digest: str) -> None:
        """Compare the whole file with ``xxh3_128:<hex>`` or ``sha256:<hex>``."""
        problem = digest_problem(digest)
        if problem:
            raise CheckpointError(problem, path=self.path)
        found = self.digest(digest.partition(":")[0])
        if found != digest:
            raise CheckpointCorruptError(
                f"{self.path} has the digest {found}, expected was {digest}: "
                "it is damaged, or another file. Next: copy it again, or take an older checkpoint",
                path=self.path,
            )

    def digest(self, algorithm: str) -> str:
        """``<algorithm>:<hex>`` of the whole file; the algorithm is ``xxh3_128`` or ``sha256``."""
        state = _hasher(algorithm)
        buffer = memoryview(bytearray(min(CHUNK, self.size)))
        for offset in range(0, self.size, CHUNK):
            chunk = buffer[: min(CHUNK, self.size - offset)]
            self.read_into(chunk, offset)
            state.update(chunk)
        return f"{algorithm}:{state.hexdigest()}"


def digest_problem(digest: str) -> str:
    """What is wrong with the form of a digest; empty where it can be checked."""
    algorithm, _, expected = digest.partition(":")
    if len(expected) == _DIGEST_LENGTHS.get(algorithm) and set(expected) <= set("0123456789abcdef"):
        return ""
    return (
        f"{digest!r} is no digest that can be checked. Write xxh3_128:<32 hexadecimal digits> or "
        "sha256:<64 hexadecimal digits>, in small letters"
    )


def open_file(path: Path) -> FileHandle:
    """Open a regular file, symbolic links followed; anything else is refused without blocking."""
    try:
        descriptor = os.open(path, _FLAGS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(
            f"{path} does not exist{_neighbours(path)}", path=path, asked=str(path)
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in {errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP}:
            raise _not_regular(path, "device or socket") from error
        raise CheckpointError(f"{path} cannot be opened: {error}", path=path) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            what = "folder" if stat.S_ISDIR(status.st_mode) else "FIFO" if stat.S_ISFIFO(status.st_mode) else "device"
            raise _not_regular(path, what)
    except BaseException:
        os.close(descriptor)
        raise
    return FileHandle(descriptor, path, status.st_size, status.st_mtime_ns)


class _Hasher(Protocol):
    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def _hasher(algorithm: str) -> _Hasher:
    if algorithm == "sha256":
        return hashlib.sha256()
    import xxhash

    return xxhash.xxh3_128()


def _not_regular(path: Path, what: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path} is a {what}, not a checkpoint file. Name the file itself", path=path)


def _neighbours(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in os.scandir(path.parent) if entry.name.endswith(path.suffix or ".th"))
    except OSError:
        return f", nor can its folder {path.parent} be listed"
    if not names:
        return f". The folder {path.parent} has no such file"
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f". The folder {path.parent} has: {listed}"


def grouped(items: Iterable[Item], size: Callable[[Item], int]) -> list[list[Item]]:
    """Neighbours together, at least ``GROUP // 4`` bytes each; the largest first, so that no thread is left alone."""
    groups: list[list[Item]] = []
    sizes: list[int] = []
    for item in items:
        if not groups or sizes[-1] >= GROUP // 4:
            groups.append([])
            sizes.append(0)
        groups[-1].append(item)
        sizes[-1] += size(item)
    return [groups[number] for number in sorted(range(len(groups)), key=lambda number: -sizes[number])]


def by_threads(groups: Iterable[Item], work: Callable[[Item], None]) -> None:
    """``work`` for each, with several threads where there are several; the first error is raised."""
    left = deque(groups)

    def run() -> None:
        while True:
            try:
                group = left.popleft()
            except IndexError:
                return
            work(group)

    if len(left) < 2:
        run()
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for result in [pool.submit(run) for _ in range(THREADS)]:
            result.result()


def _pieces(transfers: Iterable[Transfer]) -> Iterable[Transfer]:
    for transfer in transfers:
        for start in range(0, len(transfer.target), GROUP):
            yield Transfer(transfer.target[start : start + GROUP], transfer.offset + start, transfer.key)
