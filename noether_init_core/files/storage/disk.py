"""File operations: every read of the disk and every change to it, as single steps.

``sets`` and ``saving`` use the disk only through a ``FileSystem``, so that a test can make any single step fail, or
list
a folder in another order. The methods raise ``OSError`` as the system does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

# Process, thread and path of every lock that is held or waited for. The process id is part of it, because a forked
# process inherits this set but does not hold the locks.
_HOLDERS: set[tuple[int, int, str]] = set()
_FICLONE = 0x40049409  # of linux/fs.h
_NO_HARDLINK = frozenset({errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS})


#: Errors of ``read_bytes`` for something that exists and is not a file that this package wrote.
_UNFIT = frozenset({errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG})


def is_out_of_reach(error: BaseException | None, *, unless_read: bool = False) -> bool:
    """Whether ``error`` was caused by an ``OSError`` that leaves unknown what exists on disk.

    Only ENOENT and ENOTDIR prove that nothing exists. After a failing disk (EIO), a lost server (ESTALE) or a missing
    permission (EACCES), nothing may be removed and no other set may be selected.

    Args:
        error: The error and its causes.
        unless_read: Whether an EIO while reading an opened file counts as damage of that file.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            if unless_read and isinstance(error, UnreadableBytesError) and error.errno == errno.EIO:
                return False
            return error.errno not in _UNFIT and not isinstance(error, FileNotFoundError | NotADirectoryError)
        error = error.__cause__
    return False


class UnreadableBytesError(OSError):
    """The file was opened, and the disk failed to read its bytes."""


class FileSystem:
    """Files on a local or mounted file system."""

    # Reading: these methods change nothing and do not block on a FIFO. ENOENT and ENOTDIR mean that nothing exists;
    # every other error is raised.

    def list_folder(self, folder: Path) -> list[str]:
        """Return the names in the folder, in any order."""
        return os.listdir(folder)

    def is_folder(self, path: Path) -> bool:
        """Whether the path leads to a folder, symbolic links followed."""
        return _stat(path, stat.S_ISDIR) is not None

    def size_of(self, path: Path) -> int | None:
        """Return the bytes of a regular file, symbolic links followed; None if there is no regular file."""
        found = _stat(path, stat.S_ISREG)
        return None if found is None else found.st_size

    def exists(self, path: Path) -> bool:
        """Whether the name exists, a dangling link included."""
        return _stat(path, follow=False) is not None

    def is_link(self, path: Path) -> bool:
        """Whether the name is a symbolic link, wherever it leads."""
        return _stat(path, stat.S_ISLNK, follow=False) is not None

    def identity_of(self, path: Path, follow: bool = False) -> tuple[int, int] | None:
        """Return bytes and modification time (ns) of a regular file; None if there is no regular file."""
        found = _stat(path, stat.S_ISREG, follow=follow)
        return None if found is None else (found.st_size, found.st_mtime_ns)

    def changed_in(self, parent: Path, names: Sequence[str]) -> list[int | None]:
        """Return the modification time (ns) of each named folder in ``parent``; None if it is not a folder.

        A link counts as no folder. Every save calls this for thousands of names, so the parent is opened once and the
        names are looked up relative to it.
        """
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return [_changed_at(name, descriptor) for name in names]
            finally:
                os.close(descriptor)
        return [None] * len(names)

    def resolve(self, path: Path) -> Path:
        """Return the path without symbolic links; it need not exist."""
        return Path(os.path.realpath(path))

    def is_same_file(self, first: Path, second: Path) -> bool:
        """Whether both names lead to one file on disk."""
        one, other = _stat(first), _stat(second)
        return one is not None and other is not None and os.path.samestat(one, other)

    def read_bytes(self, path: Path, limit: int) -> bytes:
        """Return the content of a regular file. Raises ``OSError``: EFBIG if it has more than ``limit`` bytes."""
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            if found.st_size > limit:
                raise OSError(errno.EFBIG, f"{found.st_size} bytes, more than {limit}", str(path))
            try:
                return _read_all(descriptor, found.st_size)
            except OSError as error:
                raise UnreadableBytesError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(descriptor)

    # Writing: one step each.

    def make_folder(self, folder: Path) -> None:
        """Create one folder, which must not exist, in an existing parent."""
        folder.mkdir()

    def open_write(self, path: Path) -> BinaryIO:
        """Create a file that must not exist, and open it for writing."""
        return open(path, "xb")

    def fsync(self, file: BinaryIO) -> None:
        """Flush the written bytes to the disk, so that they survive a crash of the machine."""
        file.flush()
        if sys.platform == "darwin":  # on macOS, fsync leaves the bytes in the cache of the drive
            import fcntl

            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
            return
        os.fsync(file.fileno())

    def fsync_folder(self, folder: Path) -> None:
        """Flush the names in the folder to the disk; without it, a crash may undo a rename."""
        if sys.platform == "win32":  # Windows cannot open folders
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_read_only(self, path: Path) -> None:
        """Remove the write permission of all users."""
        os.chmod(path, 0o444)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file atomically; an existing file of the new name is replaced."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name; a missing name is not an error."""
        path.unlink(missing_ok=True)

    def remove_folder(self, folder: Path) -> None:
        """Remove an empty folder."""
        folder.rmdir()

    def reflink(self, source: Path, target: Path) -> bool:
        """Create ``target`` as a copy that shares blocks until one side is written; return False if unsupported."""
        if sys.platform != "linux":
            return False
        import fcntl

        with open(source, "rb") as reading, open(target, "xb") as writing:
            try:
                fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
            except (
                OSError
            ):  # file systems report a missing feature by different codes; a real failure ends the next step
                pass
            else:
                return True
        os.unlink(target)
        return False

    def hardlink(self, source: Path, target: Path) -> bool:
        """Create ``target`` as a hard link to the file; return False if that is unsupported or unsafe.

        It is unsafe if this process may write to the file despite its mode, as root may. Then a program that rewrites
        one name in place would change the other name as well.
        """
        effective = os.access in os.supports_effective_ids
        if os.access(source, os.W_OK, effective_ids=effective):
            return False
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno in _NO_HARDLINK:
                return False
            raise
        return True

    def copy(self, source: Path, target: Path) -> None:
        """Create ``target`` as an independent copy, writable by its owner."""
        shutil.copyfile(source, target)

    @contextlib.contextmanager
    def lock(self, path: Path, timeout: float) -> Iterator[None]:
        """Hold the lock at ``path`` in the block; the system releases it when the process ends.

        Raises ``TimeoutError`` after ``timeout`` seconds. Raises ``OSError`` (EDEADLK) at once if this thread already
        holds the lock, because it would wait for itself.
        """
        import filelock

        # Added before waiting, so that a signal handler that runs at any moment in this thread finds the entry.
        holder = (os.getpid(), threading.get_ident(), os.path.realpath(path))
        if holder in _HOLDERS:
            raise OSError(
                errno.EDEADLK,
                "this thread is already saving; a signal handler or a hook must not save. "
                "Next: set a flag in the handler, and save in the training loop if the flag is set",
                str(path),
            )
        _HOLDERS.add(holder)
        try:
            guard = filelock.FileLock(path, timeout=timeout)
            try:
                guard.acquire()
            except filelock.Timeout as error:
                held = f"another process or thread has held the lock for {timeout:g} s"
                raise TimeoutError(errno.ETIMEDOUT, held, str(path)) from error
            try:
                yield
            finally:
                guard.release()
        finally:
            _HOLDERS.discard(holder)


def _read_all(descriptor: int, size: int) -> bytes:
    """Read up to ``size`` bytes. One call of the system suffices for most files, which matters for thousands of
    them."""
    content = os.read(descriptor, size)
    while len(content) < size:
        more = os.read(descriptor, size - len(content))
        if not more:
            break
        content += more
    return content


def _stat(path: Path, kind: Callable[[int], bool] | None = None, *, follow: bool = True) -> os.stat_result | None:
    """Return the status of a name if it is of this ``kind``; else None, also for a loop of links.

    Raises ``OSError`` if it cannot be determined.
    """
    try:
        found = os.stat(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    return found if kind is None or kind(found.st_mode) else None


def _changed_at(name: str, parent: int) -> int | None:
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_mtime_ns if stat.S_ISDIR(found.st_mode) else None


#: The local disk.
LOCAL = FileSystem()
