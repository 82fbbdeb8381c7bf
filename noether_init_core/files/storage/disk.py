"""The one seam for file operations: every look at the disk and every change to it, in single steps.

``sets`` and ``saving`` do nothing on disk but through a ``FileSystem``, so that a test can let any single step fail or
list a folder in another order. The methods raise ``OSError`` as the system does.
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

# Process, thread and path of every lock that is held or waited for; a forked process holds none.
_HOLDERS: set[tuple[int, int, str]] = set()
_FICLONE = 0x40049409
_NO_HARDLINK = frozenset({errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS})


#: What ``read_bytes`` raises itself for something that is there and cannot be read as a file of ours.
_UNFIT = frozenset({errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG})


def is_out_of_reach(error: BaseException | None, *, unless_read: bool = False) -> bool:
    """Whether an ``OSError`` behind ``error`` says that a look failed, and so nothing of what is there.

    Only ENOENT and ENOTDIR mean that nothing is there. A disk that fails (EIO), a server that is gone (ESTALE) or a
    folder that is closed (EACCES) is no ground to remove anything, or to choose another set. ``unless_read``: bytes of
    a file that was opened and that the disk cannot read (EIO) do say something of the file.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            if unless_read and isinstance(error, UnreadableBytesError) and error.errno == errno.EIO:
                return False
            return error.errno not in _UNFIT and not isinstance(error, FileNotFoundError | NotADirectoryError)
        error = error.__cause__
    return False


class UnreadableBytesError(OSError):
    """Bytes of a file that was opened, and that the disk cannot give."""


class FileSystem:
    """Files on a local or mounted file system."""

    # Looking: nothing here creates or changes anything, or blocks on a FIFO. Only ENOENT and ENOTDIR mean that nothing
    # is there: every other error is raised.

    def list_folder(self, folder: Path) -> list[str]:
        """Names in the folder, in no order."""
        return os.listdir(folder)

    def is_folder(self, path: Path) -> bool:
        """Whether the path leads to a folder, symbolic links followed."""
        return _stat(path, stat.S_ISDIR) is not None

    def size_of(self, path: Path) -> int | None:
        """Bytes of a regular file, symbolic links followed; None for anything else, or nothing."""
        found = _stat(path, stat.S_ISREG)
        return None if found is None else found.st_size

    def exists(self, path: Path) -> bool:
        """Whether there is anything under this name, a dangling link included."""
        return _stat(path, follow=False) is not None

    def is_link(self, path: Path) -> bool:
        """Whether the name is a symbolic link, wherever it leads."""
        return _stat(path, stat.S_ISLNK, follow=False) is not None

    def identity_of(self, path: Path, follow: bool = False) -> tuple[int, int] | None:
        """Bytes and time of change (ns) of a regular file; None for anything else, or nothing."""
        found = _stat(path, stat.S_ISREG, follow=follow)
        return None if found is None else (found.st_size, found.st_mtime_ns)

    def changed_in(self, parent: Path, names: Sequence[str]) -> list[int | None]:
        """For each folder of these names in ``parent``, when names in it last changed (ns).

        None for anything else, a link included, or nothing. Thousands are asked for at every save, so the system does
        not look up the whole path of each.
        """
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return [_changed_at(name, descriptor) for name in names]
            finally:
                os.close(descriptor)
        return [None] * len(names)

    def resolve(self, path: Path) -> Path:
        """The path without symbolic links; it need not exist."""
        return Path(os.path.realpath(path))

    def is_same_file(self, first: Path, second: Path) -> bool:
        """Whether both names lead to one file on disk."""
        one, other = _stat(first), _stat(second)
        return one is not None and other is not None and os.path.samestat(one, other)

    def read_bytes(self, path: Path, limit: int) -> bytes:
        """The content of a regular file. Raises ``OSError`` (EFBIG) if it has more than ``limit`` bytes."""
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

    # Changing: one step each.

    def make_folder(self, folder: Path) -> None:
        """Create one folder; its parent exists, it does not."""
        folder.mkdir()

    def open_write(self, path: Path) -> BinaryIO:
        """Create a file that does not exist yet and open it for writing."""
        return open(path, "xb")

    def fsync(self, file: BinaryIO) -> None:
        """Bring the written bytes onto the disk."""
        file.flush()
        if sys.platform == "darwin":  # fsync alone leaves them in the drive's cache there
            import fcntl

            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
            return
        os.fsync(file.fileno())

    def fsync_folder(self, folder: Path) -> None:
        """Bring the names in the folder onto the disk."""
        if sys.platform == "win32":  # folders cannot be opened there
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_read_only(self, path: Path) -> None:
        """Take away the permission to write, from everybody."""
        os.chmod(path, 0o444)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, atomically; what had that name is replaced."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name; nothing happens where there is none."""
        path.unlink(missing_ok=True)

    def remove_folder(self, folder: Path) -> None:
        """Remove an empty folder."""
        folder.rmdir()

    def reflink(self, source: Path, target: Path) -> bool:
        """Create ``target`` as a copy that shares blocks until one side is written; False where that cannot be."""
        if sys.platform != "linux":
            return False
        import fcntl

        with open(source, "rb") as reading, open(target, "xb") as writing:
            try:
                fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
            except OSError:  # another file system answers in its own way; a real failure returns at the next step
                pass
            else:
                return True
        os.unlink(target)
        return False

    def hardlink(self, source: Path, target: Path) -> bool:
        """Create ``target`` as another name of the file.

        False where the file system has no such thing, or where this process may write to the file in spite of its
        mode, as root may: then a program that rewrites one name in place would rewrite the other one.
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
        """Create ``target`` as a copy of its own, writable by its owner."""
        shutil.copyfile(source, target)

    @contextlib.contextmanager
    def lock(self, path: Path, timeout: float) -> Iterator[None]:
        """Hold the lock of this name; it ends with the process.

        Raises ``TimeoutError`` after ``timeout`` seconds, and ``OSError`` (EDEADLK) at once where this very thread
        holds it already: waiting for itself, it would wait in vain.
        """
        import filelock

        # told by the thread before it waits, so that a handler of signals finds it at any moment
        holder = (os.getpid(), threading.get_ident(), os.path.realpath(path))
        if holder in _HOLDERS:
            raise OSError(
                errno.EDEADLK,
                "this very thread is in the midst of a save; a handler of signals, or a hook, must not save by itself. "
                "Next: let it set a flag, and save in the training loop where the flag is set",
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
    """The bytes that a file of ``size`` bytes has; thousands of small files are read in one step each."""
    content = os.read(descriptor, size)
    while len(content) < size:
        more = os.read(descriptor, size - len(content))
        if not more:
            break
        content += more
    return content


def _stat(path: Path, kind: Callable[[int], bool] | None = None, *, follow: bool = True) -> os.stat_result | None:
    """What is under a name, if it is of that ``kind``; None for nothing, and for a circle of links.

    Raises ``OSError`` where it cannot be told.
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


#: The disk.
LOCAL = FileSystem()
