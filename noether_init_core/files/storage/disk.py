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

from noether_init_core.errors import CheckpointUnreachableError, InitError

# Process, thread and path of every lock that is held or waited for. The process id is part of it, because a forked
# process inherits this set but does not hold the locks.
_HOLDERS: set[tuple[int, int, str]] = set()
_FICLONE = 0x40049409  # of linux/fs.h
_NO_HARDLINK = frozenset({errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS})


class UnfitFileError(OSError):
    """A file of this name exists, but this package did not write it: not a regular file, or too large."""


def is_out_of_reach(error: BaseException | None) -> bool:
    """Whether ``error`` or one of its causes is an ``OSError`` that leaves unknown what exists on disk.

    Only ENOENT and ENOTDIR prove that nothing exists. After a failing disk (EIO), a lost server (ESTALE) or a missing
    permission (EACCES), nothing may be removed and no other set may be selected.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return not isinstance(error, FileNotFoundError | NotADirectoryError | UnfitFileError)
        error = error.__cause__
    return False


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Turn each ``OSError`` of the block into ``CheckpointUnreachableError`` with the path that could not be read.

    After such an error it is unknown what exists, so no set may be selected and nothing may be removed.
    """
    try:
        yield
    except InitError:
        raise
    except OSError as error:
        raise unreachable(error, path) from error


def unreachable(error: OSError, path: Path) -> CheckpointUnreachableError:
    """Return the error for a look that failed at the path of ``error``; without one, at ``path``."""
    place = Path(error.filename) if isinstance(error.filename, str | os.PathLike) else path
    return CheckpointUnreachableError(
        f"{place} cannot be read: {error.strerror or error}. It is unknown what exists there, so nothing was "
        "selected or changed. Next: mount its disk, or change its permissions",
        path=place,
    )


class FileSystem:
    """Files on a local or mounted file system."""

    # Reading: these methods change nothing and do not block on a FIFO. ENOENT and ENOTDIR mean that nothing exists;
    # every other error is raised, with the path in ``filename``.

    def list_folder(self, folder: Path) -> list[str]:
        """Return the names in the folder, in any order."""
        return os.listdir(folder)

    def is_folder(self, path: Path) -> bool:
        """Whether the path leads to a folder, symbolic links followed."""
        return _stat(path, stat.S_ISDIR) is not None

    def is_file(self, path: Path) -> bool:
        """Whether the path leads to a regular file, symbolic links followed."""
        return _stat(path, stat.S_ISREG) is not None

    def size_of(self, path: Path) -> int | None:
        """Return the bytes of a regular file, symbolic links followed; None if there is no regular file."""
        found = _stat(path, stat.S_ISREG)
        return None if found is None else found.st_size

    def exists(self, path: Path) -> bool:
        """Whether the name exists, a dangling link included."""
        return _stat(path, follow=False) is not None

    def leads_somewhere(self, path: Path) -> bool:
        """Whether the path leads to anything, symbolic links followed; false for a dangling link."""
        return _stat(path) is not None

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
                return [_changed_at(parent / name, descriptor) for name in names]
            finally:
                os.close(descriptor)
        return [None] * len(names)

    def resolve(self, path: Path) -> Path:
        """Return the absolute path without symbolic links; its last parts need not exist."""
        try:
            return Path(os.path.realpath(path, strict=True))
        except (FileNotFoundError, NotADirectoryError):
            # Without strict, a link that cannot be read would be taken for a name that is no link.
            if path.parent == path:  # the working directory was removed
                raise
            parent = self.resolve(path.parent)
            if self.is_link(path):
                return self.resolve(parent / os.readlink(path))
            return Path(os.path.normpath(parent / path.name))

    def is_same_file(self, first: Path, second: Path) -> bool:
        """Whether both names lead to one file on disk."""
        one, other = _stat(first), _stat(second)
        return one is not None and other is not None and os.path.samestat(one, other)

    def read_bytes(self, path: Path, limit: int) -> bytes:
        """Return the content of a regular file.

        Raises ``UnfitFileError`` if it is not a regular file or has more than ``limit`` bytes, else ``OSError``.
        """
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            with naming(path):
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise UnfitFileError(errno.EINVAL, "not a regular file")
                if found.st_size > limit:
                    raise UnfitFileError(errno.EFBIG, f"{found.st_size} bytes, more than {limit}")
                return _read_all(descriptor, found.st_size)
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

    def rename_new(self, source: Path, target: Path) -> bool:
        """Rename a file, unless the new name exists; return False if it does."""
        try:
            os.link(source, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARDLINK:
                raise
            # A file system without hard links: a file that another program creates at this moment is replaced.
            if self.exists(target):
                return False
            self.rename(source, target)
            return True
        os.unlink(source)
        return True

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
                with naming(path):
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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Set the path of an ``OSError`` that has none, as those of calls on a file descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


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
    """Return the status of a name if it is of this ``kind``; else None. Raises ``OSError`` if it is unknown."""
    try:
        found = os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if kind is None or kind(found.st_mode) else None


def _changed_at(path: Path, parent: int) -> int | None:
    try:
        found = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        error.filename = str(path)
        raise
    return found.st_mtime_ns if stat.S_ISDIR(found.st_mode) else None


#: The local disk.
LOCAL = FileSystem()


def resolved(path: Path) -> Path:
    """Return ``LOCAL.resolve(path)``. Raises ``CheckpointUnreachableError`` if a part of it cannot be read."""
    with reaching(path):
        return LOCAL.resolve(path)
