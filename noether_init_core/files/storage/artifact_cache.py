"""ArtifactCache: a cache of fetched files in one folder, shared by all processes of a node.

A kind that reads from a store uses it inside ``locate``: the first process fetches the file, and the others wait for
it. The cache does not use the network; the function ``download`` of the caller does. The folder holds, each named by a
digest of the key::

    <digest>-<readable tail>      an entry: complete, checked, read-only; moved into place by a rename
    <digest>.<random>.partial     a running download; one of a killed process is removed by the next fetch of its key
    <digest>.lock                 held while the key is fetched; the system releases it when its holder dies
    <digest>.verified             the digest that the entry was found to have, and the state of the file at that time
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    ConfigError,
    InitError,
)
from noether_init_core.files.storage.disk import LOCAL
from noether_init_core.files.storage.handle import Handle, LocalFile, digest_problem, open_file
from noether_init_core.messages import in_shell, logger_of, printable

CACHE_VARIABLE = "NOETHER_INIT_CACHE"
OFFLINE_VARIABLE = "NOETHER_INIT_OFFLINE"

_logger = logger_of(__name__)

_MAX_SHOWN = 120
_MAX_TAIL = 60
# Entries may be private weights, and the folder may be below one that other users can list.
_ENTRY_MODE = 0o400
_FOLDER_MODE = 0o700


def _folder(value: str | os.PathLike[str] | None) -> Path:
    if value is None:
        value = os.environ.get(CACHE_VARIABLE) or None
    if value is None:
        # The XDG specification requires that a relative path is ignored.
        below = os.environ.get("XDG_CACHE_HOME", "")
        value = Path(below if os.path.isabs(below) else "~/.cache", "noether-init-core")
    try:
        return Path(os.path.abspath(Path(value).expanduser()))
    except RuntimeError as error:  # expanduser found no home folder
        raise ConfigError(
            f"the cache folder {value} was not found: {error}. Next: set {CACHE_VARIABLE}=<absolute path of a folder>"
        ) from error


def _offline(value: bool | None) -> bool:
    if value is not None:
        return value
    text = os.environ.get(OFFLINE_VARIABLE, "")
    if text and text.lower() not in ("1", "true", "yes", "on"):
        raise ConfigError(
            f"{OFFLINE_VARIABLE}={text!r} is not 1, true, yes or on. Next: set {OFFLINE_VARIABLE}=1 to fetch nothing, "
            "or unset it to fetch missing files"
        )
    return bool(text)


@attrs.frozen
class ArtifactCache:
    """A cache of files by key, each fetched at most once for all processes and threads of a node.

    Attributes:
        folder: Folder of the cache; None: ``$NOETHER_INIT_CACHE``, else ``$XDG_CACHE_HOME/noether-init-core``, else
            ``~/.cache/noether-init-core``. The first fetch creates it, accessible to its owner only. A folder that
            other users can write to is refused, because they could change a checked file.
        offline: Whether to fetch nothing; None: ``$NOETHER_INIT_OFFLINE`` (1, true, yes or on).
        timeout: Seconds to wait for another process that fetches the same key.

    Raises ``ConfigError`` for invalid values of the environment variables.
    """

    folder: Path = attrs.field(default=None, converter=_folder)
    offline: bool = attrs.field(default=None, converter=_offline, kw_only=True)
    timeout: float = attrs.field(default=3600.0, kw_only=True)

    def get(
        self,
        key: str,
        download: Callable[[Path], object],
        *,
        digest: str | None = None,
        check: Callable[[Path], object] | None = None,
    ) -> Path:
        """Return the file of ``key``; fetch it if it is missing. Any process, rank or thread may call it, repeatedly.

        A new file becomes the entry after it was flushed to the disk and passed ``digest`` and ``check``. If anything
        fails before, even by a kill, no part of the new file is used and an older entry stays.

        An existing entry must pass ``digest`` and ``check`` as well. If it does not, it is fetched again, with a
        warning
        in the log; offline, that is an error. The digest of an unchanged entry (by size and times) is computed once.
        So pass the digest to ``Source`` too, which compares every byte on the handle that reads them.

        Without a ``digest``, the first file of a key stays, and newer versions are not searched. If content changes,
        put its version or digest into the key.

        Args:
            key: Any string that identifies the content, such as a URL. Leave out changing parts, such as tokens or
                signatures of URLs.
            download: Called with a path that it must create. No other process fetches the key at that time. If it
                fails, the next waiting caller uses its own.
            digest: Digest of the complete file: ``xxh3_128:<hex>`` or ``sha256:<hex>``.
            check: Called with the path before each use; it raises to refuse the file.

        Raises:
            CheckpointNotFoundError: Offline, and no entry was found.
            CheckpointCorruptError: The new file, or offline the entry, has another digest.
            CheckpointError: The folder or the entry cannot be used, or another process held the lock for too long.
            ConfigError: The digest is not valid.

        Errors of ``download`` and ``check`` reach the caller unchanged.
        """
        problem = "" if digest is None else digest_problem(digest)
        if problem:
            raise ConfigError(f"{self.shown(key)}: {problem}")
        self._check_folder()
        entry = self.path_of(key)
        refusal = self._refusal(key, entry, digest, check)
        if refusal is None:
            return entry
        if self.offline:
            raise refusal
        with self._locked(key):
            # While this caller waited for the lock, another one may have fetched the file.
            refusal = self._refusal(key, entry, digest, check)
            if refusal is None:
                return entry
            if not isinstance(refusal, CheckpointNotFoundError):
                _logger.warning("%s It is fetched again.", refusal)
            self._fetch(key, entry, download, digest, check)
        return entry

    def path_of(self, key: str) -> Path:
        """Return the path of the entry of ``key``, which may not exist. A file that you put there is an entry."""
        hidden = _without_secrets(key)
        tail = re.sub(r"[^A-Za-z0-9._-]+", "-", hidden.rstrip("/").rpartition("/")[2])[-_MAX_TAIL:].strip("-._")
        return self.folder / (f"{_name_of(key)}-{tail}" if tail else _name_of(key))

    @staticmethod
    def shown(key: str) -> str:
        """Return ``key`` for messages, logs and reports: shortened, without user, password, query and fragment."""
        text = printable(_without_secrets(key)).replace("\n", "\\n")
        if len(text) > _MAX_SHOWN:
            return f"{text[: _MAX_SHOWN - 43]}...{text[-40:]}"
        return text

    def _check_folder(self) -> None:
        with self._saying():
            try:
                status = os.stat(self.folder)
            except FileNotFoundError:
                return
        if not stat.S_ISDIR(status.st_mode):
            raise CheckpointError(
                f"the cache {self.folder} is not a folder. Next: set {CACHE_VARIABLE}=<a folder>", path=self.folder
            )
        if os.name != "posix":
            return
        is_foreign = status.st_uid not in (0, os.geteuid())
        if is_foreign or stat.S_IMODE(status.st_mode) & 0o022:
            whose = f"belongs to the user {status.st_uid}" if is_foreign else "is writable by other users"
            raise CheckpointError(
                f"the cache {self.folder} {whose}, who could replace checked files. "
                f"Next: set {CACHE_VARIABLE}=<a folder of your own>",
                path=self.folder,
            )

    def _refusal(
        self, key: str, entry: Path, digest: str | None, check: Callable[[Path], object] | None
    ) -> Exception | None:
        """Return the error that explains why the entry cannot be used; None if it can."""
        with self._saying():
            try:
                status = os.lstat(entry)
            except FileNotFoundError:
                return CheckpointNotFoundError(
                    f"{self.shown(key)} was not found in the cache {self.folder}, and offline mode fetches nothing. "
                    f"{self._way_out(entry)}",
                    path=entry,
                    asked=self.shown(key),
                )
        if not stat.S_ISREG(status.st_mode):
            # A link would lead out of the folder. This cache never creates one, so it does not remove it either.
            raise CheckpointFormatError(
                f"{entry}, the entry of {self.shown(key)}, is not a regular file. Next: remove it, or put the "
                "file itself there",
                path=entry,
            )
        if digest is not None:
            with contextlib.closing(open_file(entry)) as handle:
                found = self._digest_of_entry(key, handle, digest)
            if found != digest:
                way_out = f" {self._way_out(entry)}" if self.offline else ""
                return CheckpointCorruptError(
                    f"{self.shown(key)} has the digest {found} in the cache, expected {digest}: {entry} was "
                    f"changed, or the digest is of another file.{way_out}",
                    path=entry,
                )
        if check is not None:
            try:
                check(entry)
            except Exception as error:
                return error
        return None

    def _digest_of_entry(self, key: str, handle: Handle, digest: str) -> str:
        """Return the digest of the entry; if its note has ``digest`` and its state is unchanged, it is not read."""
        noted = self.folder / f"{_name_of(key)}.verified"
        with contextlib.suppress(OSError, ValueError, InitError), contextlib.closing(open_file(noted)) as note:
            if note.size < 1000 and note.read(note.size, 0).decode() == _note(handle, digest):
                return digest
        found = handle.digest(digest.partition(":")[0])
        handle.check_unchanged()
        if found == digest:
            self._note_digest(key, handle, digest)
        return found

    def _note_digest(self, key: str, handle: Handle, digest: str) -> None:
        """Write the digest and the state of the file, so that the next caller need not read it. It may be lost."""
        # The name is fixed, so that a rest of a killed process is overwritten. Two threads may mix their bytes; then
        # the
        # note does not match, and the entry is read again.
        written = self.folder / f"{_name_of(key)}.verified.partial"
        with contextlib.suppress(OSError):
            written.write_text(_note(handle, digest))
            LOCAL.rename(written, self.folder / f"{_name_of(key)}.verified")

    def _fetch(
        self,
        key: str,
        entry: Path,
        download: Callable[[Path], object],
        digest: str | None,
        check: Callable[[Path], object] | None,
    ) -> None:
        # This caller holds the lock, so every other download of the key was killed.
        self._remove_partial(f"{_name_of(key)}.")
        partial = self.folder / f"{_name_of(key)}.{secrets.token_hex(8)}.partial"
        _logger.info("%s: fetching it into %s", self.shown(key), entry)
        try:
            download(partial)
            with contextlib.closing(self._brought_onto_disk(key, partial)) as handle:
                found = digest and handle.digest(digest.partition(":")[0])
                if found != digest:
                    raise CheckpointCorruptError(
                        f"{self.shown(key)} was fetched with the digest {found}, expected {digest}; it was not kept. "
                        "Next: correct the digest if the file was replaced on purpose, or fetch it from another source",
                        path=entry,
                    )
                if check is not None:
                    check(partial)
                handle.check_unchanged()
                with self._saying():
                    LOCAL.rename(partial, entry)
                    LOCAL.fsync_folder(self.folder)
                if digest is not None:
                    self._note_digest(key, handle, digest)
        finally:
            self._remove_partial(partial.name)  # also files that a client left beside it, such as <partial>.tmp

    def _brought_onto_disk(self, key: str, partial: Path) -> Handle:
        with self._saying():
            try:
                status = os.lstat(partial)
            except FileNotFoundError:
                status = None
            # Through a second hard link, others could change the file after it was checked.
            if status is None or not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise CheckpointFormatError(
                    f"the download of {self.shown(key)} did not create a regular file without hard links at the given "
                    "path; it was not kept. Next: write the content to target in download(target)",
                    path=partial,
                )
            os.chmod(partial, _ENTRY_MODE)
            with open(partial, "rb") as file:
                LOCAL.fsync(file)
        return open_file(partial)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        import filelock

        path = self.folder / f"{_name_of(key)}.lock"
        guard = filelock.FileLock(path)
        with self._saying():
            os.makedirs(self.folder, mode=_FOLDER_MODE, exist_ok=True)
            try:
                guard.acquire(timeout=0)
            except filelock.Timeout:
                _logger.info("%s: waiting for another process or thread that fetches it", self.shown(key))
                try:
                    guard.acquire(timeout=self.timeout)
                except filelock.Timeout as error:
                    raise CheckpointError(
                        f"{self.shown(key)}: another process or thread has held the lock {path} for {self.timeout:g} "
                        f"s. Next: fuser {in_shell(path)} shows its process; end it, or set a longer timeout",
                        path=path,
                    ) from error
        try:
            yield
        finally:
            guard.release()

    def _remove_partial(self, start: str) -> None:
        with self._saying():
            for name in LOCAL.list_folder(self.folder):
                if not (name.startswith(start) and ".partial" in name):
                    continue
                path = self.folder / name
                if LOCAL.is_folder(path) and not LOCAL.is_link(path):
                    shutil.rmtree(path)
                else:
                    LOCAL.unlink(path)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        """Turn an ``OSError`` into an error that names the folder and how to choose another one."""
        try:
            yield
        except InitError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"the cache {self.folder} cannot be used: {error}. Next: set {CACHE_VARIABLE}=<a folder of your own>",
                path=self.folder,
            ) from error

    @staticmethod
    def _way_out(entry: Path) -> str:
        way = f"unset {OFFLINE_VARIABLE}" if os.environ.get(OFFLINE_VARIABLE) else "leave out offline=True"
        return f"Next: {way}, or put the file there as {entry}"


def _name_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _note(handle: Handle, digest: str) -> str:
    """Return the digest with the state of the file. A program can set back the mtime but not the ctime."""
    storage = handle.storage
    assert isinstance(storage, LocalFile)  # entries are files
    status = os.fstat(storage.descriptor)
    return f"{digest} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"


def _without_secrets(key: str) -> str:
    """Return the key without the parts of a URL that may be secret; if they are unclear, only the scheme is left."""
    head, mark, rest = key.partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][\w+.-]*", head):  # a :// further right does not start an authority
        head, mark, rest = "", "", key
        if re.match(r"[A-Za-z][\w+.-]*:/[^/]|//", key) and "@" in key:  # a misspelt URL: one slash, or no scheme
            return "..."
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    behind = rest[len(authority) :]
    is_odd = mark and not re.fullmatch(r"([^@]*@)?(\[[^\]]*\]|[^:@]*)(:[0-9]*)?", authority)
    if is_odd or ("@" in behind and (behind[0] in "?#\\" or "@" in authority or (mark and ":" in authority))):
        return f"{head}{mark}..."  # perhaps a password with a character that should be percent-encoded
    authority = authority.rpartition("@")[2]
    plain = re.sub(r"//[^/]*@", "//", re.split(r"[?#]", behind, maxsplit=1)[0])
    return head + mark + authority + re.split(r"[;&]|%3[fF]|%23", plain, maxsplit=1)[0]
