"""A local file as a ``Storage``: opened without blocking, read by position through one descriptor."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from noether_init_core.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from noether_init_core.files.storage.handle import CHUNK, Handle
from noether_init_core.messages import listed

__all__ = ["LocalFile", "LocalHandle", "open_file"]

# A FIFO must not block, and a terminal must not become ours.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)


class LocalFile:
    """A regular file under one descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def size(self) -> int:
        """Number of bytes now."""
        return os.fstat(self.descriptor).st_size

    @property
    def version(self) -> str:
        """Time of modification.

        A program that puts the time back after it has written is not found: the time of change, which it could not put
        back, also moves when our writer gives the file a further name or takes one away, as it does beside readers at
        every save.
        """
        return str(os.fstat(self.descriptor).st_mtime_ns)

    def read(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill every memory with the bytes from its offset on. Raises ``EOFError`` if the file ends before that."""
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


class LocalHandle(Handle):
    """The handle of a local file."""

    def fileno(self) -> int:
        """The open descriptor. Raises ``CheckpointError`` once the file is closed."""
        storage = self.storage
        assert isinstance(storage, LocalFile)  # it is made by open_file only
        return storage.descriptor


def open_file(path: Path) -> LocalHandle:
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
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            what = "folder" if stat.S_ISDIR(mode) else "FIFO" if stat.S_ISFIFO(mode) else "device"
            raise _not_regular(path, what)
        return LocalHandle(LocalFile(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise


def _not_regular(path: Path, what: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path} is a {what}, not a checkpoint file. Name the file itself", path=path)


def _neighbours(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in os.scandir(path.parent) if entry.name.endswith(path.suffix or ".th"))
    except OSError:
        return f", nor can its folder {path.parent} be listed"
    if not names:
        return f". The folder {path.parent} has no such file"
    return f". The folder {path.parent} has: {listed(names)}"
