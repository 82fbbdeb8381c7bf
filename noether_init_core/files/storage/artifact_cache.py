"""ArtifactCache: files that somebody else fetches, kept once per node for all its processes.

A kind that reads from a store uses it inside ``locate``: whichever process asks first fetches, the others wait and find
the file there. Nothing here talks to a network; ``download`` of the caller does. In the folder, each named by a digest
of the key::

    <digest>-<readable tail>      an entry: complete, checked, read-only; put into place by a rename
    <digest>.<random>.partial     a download under way; one that was killed is removed by the next one of its key
    <digest>.lock                 held while the key is fetched; the system lets go of it when its holder dies
    <digest>.verified             which digest the entry was found to have, and when it was changed last
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
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
from noether_init_core.messages import printable

CACHE_VARIABLE = "NOETHER_INIT_CACHE"
OFFLINE_VARIABLE = "NOETHER_INIT_OFFLINE"

_logger = logging.getLogger(__name__)

_MAX_SHOWN = 120
_MAX_TAIL = 60
# private weights stay private in a folder that others may list, too
_ENTRY_MODE = 0o400
_FOLDER_MODE = 0o700


def _folder(value: str | os.PathLike[str] | None) -> Path:
    if value is None:
        value = os.environ.get(CACHE_VARIABLE) or None
    if value is None:
        # the XDG specification has a relative one ignored
        below = os.environ.get("XDG_CACHE_HOME", "")
        value = Path(below if os.path.isabs(below) else "~/.cache", "noether-init-core")
    try:
        return Path(os.path.abspath(Path(value).expanduser()))
    except RuntimeError as error:  # no home folder, or that of an unknown user
        raise ConfigError(
            f"the cache folder {value} cannot be found: {error}. Next: {CACHE_VARIABLE}=<a folder, in full>"
        ) from error


def _offline(value: bool | None) -> bool:
    if value is not None:
        return value
    said = os.environ.get(OFFLINE_VARIABLE, "")
    if said and said.lower() not in ("1", "true", "yes", "on"):
        raise ConfigError(
            f"{OFFLINE_VARIABLE}={said!r} says neither yes nor no. Next: {OFFLINE_VARIABLE}=1 to fetch nothing, or "
            "unset it to fetch what is absent"
        )
    return bool(said)


@attrs.frozen
class ArtifactCache:
    """Files under keys in one folder, fetched at most once, however many processes and threads of a node ask.

    Attributes:
        folder: Where they are; None: ``$NOETHER_INIT_CACHE``, else ``$XDG_CACHE_HOME/noether-init-core``, else
            ``~/.cache/noether-init-core``. It is created for its owner alone when something is fetched. One that others
            may write to is refused: they could change what was checked.
        offline: Fetch nothing; None: ``$NOETHER_INIT_OFFLINE`` (1, true, yes or on).
        timeout: Seconds to wait for another process that fetches the same key.

    Raises ``ConfigError`` for variables that make no sense.
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
        """The file of ``key``, fetched if it is not there; any process, rank and thread may ask, at any time.

        A new file becomes the entry after it was brought onto the disk and passed ``digest`` and ``check``. Whatever
        fails before that, a kill included, leaves no part of it in use, and an older entry as it was.

        An entry that is there has to pass as well. One that does not is fetched anew, with a warning in the log;
        offline that is an error. For the ``digest`` an entry is read again only if it was changed since it was found
        to have it, as size and times say. So hand the digest to ``Source`` too: there every byte is compared, on the
        handle that is read from.

        Without a ``digest``, the first file that came under a key stays: nobody asks whether there is a newer one.
        Where content changes, its version or digest belongs into the key.

        Args:
            key: Any text that stands for the content, such as a URL. What changes from day to day (a token, the
                signature of a URL) does not belong in it.
            download: Called with the path that it has to create; it may fetch in any way. Nobody else fetches the key
                meanwhile. After it has failed, the next one who waits calls its own.
            digest: Of the whole file: ``xxh3_128:<hex>`` or ``sha256:<hex>``.
            check: Called with the path of a file that is about to be used, each time; raises if it must not be.

        Raises:
            CheckpointNotFoundError: Offline, and there is no entry.
            CheckpointCorruptError: The new file, or offline the entry, has another digest.
            CheckpointError: The folder or the entry cannot be used, or another process held the lock for too long.
            ConfigError: The digest has no form that can be checked.

        What ``download`` and ``check`` raise reaches the caller as it is.
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
            # another one may have fetched it meanwhile
            refusal = self._refusal(key, entry, digest, check)
            if refusal is None:
                return entry
            if not isinstance(refusal, CheckpointNotFoundError):
                _logger.warning("%s It is fetched anew.", refusal)
            self._fetch(key, entry, download, digest, check)
        return entry

    def path_of(self, key: str) -> Path:
        """Where the entry of ``key`` is, or would be. A file that is put there by hand counts."""
        hidden = _without_secrets(key)
        tail = re.sub(r"[^A-Za-z0-9._-]+", "-", hidden.rstrip("/").rpartition("/")[2])[-_MAX_TAIL:].strip("-._")
        return self.folder / (f"{_name_of(key)}-{tail}" if tail else _name_of(key))

    @staticmethod
    def shown(key: str) -> str:
        """``key`` for messages, logs and reports: without user, password, query and fragment, and not too long."""
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
                f"the cache {self.folder} is no folder. Next: {CACHE_VARIABLE}=<a folder>", path=self.folder
            )
        if os.name != "posix":
            return
        is_foreign = status.st_uid not in (0, os.geteuid())
        if is_foreign or stat.S_IMODE(status.st_mode) & 0o022:
            whose = f"belongs to the user {status.st_uid}" if is_foreign else "can be written to by others"
            raise CheckpointError(
                f"the cache {self.folder} {whose}, who could change what was checked. Next: "
                + ("" if is_foreign else f"remove {self.folder}, of which anything may be planted, or ")
                + f"{CACHE_VARIABLE}=<a folder of your own, maybe below it>",
                path=self.folder,
            )

    def _refusal(
        self, key: str, entry: Path, digest: str | None, check: Callable[[Path], object] | None
    ) -> Exception | None:
        """Why the entry cannot be used as it is; None where it can."""
        with self._saying():
            try:
                status = os.lstat(entry)
            except FileNotFoundError:
                return CheckpointNotFoundError(
                    f"{self.shown(key)} is not in the cache {self.folder}, and offline nothing is fetched. "
                    f"{self._way_out(entry)}",
                    path=entry,
                    asked=self.shown(key),
                )
        if not stat.S_ISREG(status.st_mode):
            # a link would lead out of the folder; it is no work of ours, so it is not ours to remove
            raise CheckpointFormatError(
                f"{entry}, where {self.shown(key)} is kept, is no regular file. Next: remove it, or put the "
                "file itself there",
                path=entry,
            )
        if digest is not None:
            with contextlib.closing(open_file(entry)) as handle:
                found = self._digest_of_entry(key, handle, digest)
            if found != digest:
                way_out = f" {self._way_out(entry)}" if self.offline else ""
                return CheckpointCorruptError(
                    f"{self.shown(key)} has the digest {found} in the cache, expected was {digest}: {entry} was "
                    f"changed, or another file is asked for.{way_out}",
                    path=entry,
                )
        if check is not None:
            try:
                check(entry)
            except Exception as error:
                return error
        return None

    def _digest_of_entry(self, key: str, handle: Handle, digest: str) -> str:
        """The digest of the entry; it is not read if it had this one and was not changed since."""
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
        """Spare the next one the reading. A hint: it holds for this very state of the file, and may be lost."""
        # always the same name: what a killed process left is overwritten; a torn note only means to read again
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
        self._remove_partial(f"{_name_of(key)}.")  # of killed ones: whoever holds the lock is alone
        partial = self.folder / f"{_name_of(key)}.{secrets.token_hex(8)}.partial"
        _logger.info("%s: fetching it into %s", self.shown(key), entry)
        try:
            download(partial)
            with contextlib.closing(self._brought_onto_disk(key, partial)) as handle:
                found = digest and handle.digest(digest.partition(":")[0])
                if found != digest:
                    raise CheckpointCorruptError(
                        f"{self.shown(key)} came with the digest {found}, expected was {digest}; it was not kept. "
                        "Next: correct the digest if the file was replaced on purpose, else ask whoever offers it",
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
            self._remove_partial(partial.name)  # and what a client may have left beside it

    def _brought_onto_disk(self, key: str, partial: Path) -> Handle:
        with self._saying():
            try:
                status = os.lstat(partial)
            except FileNotFoundError:
                status = None
            # under a second name, others could change the file after it was checked
            if status is None or not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise CheckpointFormatError(
                    f"the download of {self.shown(key)} left no regular file of its own at the path that it was "
                    "given; it was not kept. Next: let download(target) write the content to target",
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
                        "s. Next: see whether it still fetches (fuser names its process); end it, or wait longer",
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
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    LOCAL.unlink(path)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        """Say which folder a failing operation was about, and where else to go."""
        try:
            yield
        except InitError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"the cache {self.folder} cannot be used: {error}. Next: {CACHE_VARIABLE}=<a folder of your own>",
                path=self.folder,
            ) from error

    @staticmethod
    def _way_out(entry: Path) -> str:
        way = f"unset {OFFLINE_VARIABLE}" if os.environ.get(OFFLINE_VARIABLE) else "leave out offline=True"
        return f"Next: {way}, or put the file there as {entry}"


def _name_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _note(handle: Handle, digest: str) -> str:
    """What a change of the file changes: no program can put back the time of change (ctime)."""
    storage = handle.storage
    assert isinstance(storage, LocalFile)  # entries are files
    status = os.fstat(storage.descriptor)
    return f"{digest} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"


def _without_secrets(key: str) -> str:
    """The key without what may be secret in a URL; where it cannot be told what is, all behind the scheme."""
    head, mark, rest = key.partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][\w+.-]*", head):  # a later :// begins no authority
        head, mark, rest = "", "", key
        if re.match(r"[A-Za-z][\w+.-]*:/[^/]|//", key) and "@" in key:  # a slash too few, or no scheme
            return "..."
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    behind = rest[len(authority) :]
    is_odd = mark and not re.fullmatch(r"([^@]*@)?(\[[^\]]*\]|[^:@]*)(:[0-9]*)?", authority)
    if is_odd or ("@" in behind and (behind[0] in "?#\\" or "@" in authority or (mark and ":" in authority))):
        return f"{head}{mark}..."  # a password with a character that it must not have as it is?
    authority = authority.rpartition("@")[2]
    plain = re.sub(r"//[^/]*@", "//", re.split(r"[?#]", behind, maxsplit=1)[0])
    return head + mark + authority + re.split(r"[;&]|%3[fF]|%23", plain, maxsplit=1)[0]
