"""ArtifactCache: fetched once, by whomever; checked before it is used; never half a file, never a secret."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings, strategies as st

from noether_init_core import (
    ArtifactCache,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    ConfigError,
)

KEY = "https://store.example/models/encoder.pt"
CONTENT = bytes(range(256)) * 4096  # one mebibyte
KILLS = 60


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def writing(content: bytes = CONTENT, calls: list[Path] | None = None) -> Callable[[Path], None]:
    """A download that writes ``content``, and notes where."""

    def download(target: Path) -> None:
        if calls is not None:
            calls.append(target)
        target.write_bytes(content)

    return download


def refusing(target: Path) -> None:
    raise AssertionError(f"{target} was asked for, though it should be there")


def names(cache: ArtifactCache) -> list[str]:
    """What lies in the folder besides locks and notes."""
    return sorted(path.name for path in cache.folder.iterdir() if path.suffix not in (".lock", ".verified"))


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOETHER_INIT_CACHE", "NOETHER_INIT_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> ArtifactCache:
    return ArtifactCache(tmp_path / "cache", offline=False)


# What one process sees.


def test_a_file_is_fetched_once_and_found_afterwards(cache: ArtifactCache) -> None:
    """The second call finds the entry, which only its owner can read and nobody write."""
    calls: list[Path] = []
    path = cache.get(KEY, writing(calls=calls))
    assert path.read_bytes() == CONTENT
    assert cache.get(KEY, refusing) == path == cache.path_of(KEY)
    assert len(calls) == 1
    assert calls[0].parent == path.parent
    assert names(cache) == [path.name]
    assert re.fullmatch(r"[0-9a-f]{40}-encoder\.pt", path.name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_a_hit_writes_nothing(cache: ArtifactCache) -> None:
    """A folder that came ready-made and read-only serves: without a lock, offline or not."""
    path = cache.path_of(KEY)
    cache.folder.mkdir(mode=0o700)
    path.write_bytes(CONTENT)
    before = cache.folder.stat().st_mtime_ns
    assert cache.get(KEY, refusing) == path
    assert ArtifactCache(cache.folder, offline=True).get(KEY, refusing) == path
    assert cache.folder.stat().st_mtime_ns == before
    assert [entry.name for entry in cache.folder.iterdir()] == [path.name]


def test_what_fails_before_the_end_leaves_nothing(cache: ArtifactCache) -> None:
    """A failing download, an interrupt, another digest, a failing check: the error arrives, no file stays."""

    def breaking(error: BaseException) -> Callable[[Path], None]:
        def download(target: Path) -> None:
            target.write_bytes(CONTENT[:100])
            target.with_name(f"{target.name}.aria2").write_bytes(b"of the client")
            raise error

        return download

    def check(path: Path) -> None:
        assert path.read_bytes() == CONTENT
        raise LookupError("not signed")

    with pytest.raises(ConnectionResetError, match="by peer"):
        cache.get(KEY, breaking(ConnectionResetError("by peer")))
    with pytest.raises(KeyboardInterrupt):
        cache.get(KEY, breaking(KeyboardInterrupt()))
    wanted = sha256(b"another")
    with pytest.raises(CheckpointCorruptError) as caught:
        cache.get(KEY, writing(), digest=wanted)
    assert wanted in str(caught.value)
    assert sha256(CONTENT) in str(caught.value)
    with pytest.raises(LookupError, match="not signed"):
        cache.get(KEY, writing(), check=check)
    assert names(cache) == []
    assert cache.get(KEY, writing(), digest=sha256(CONTENT)).read_bytes() == CONTENT


@pytest.mark.parametrize("how", ["nothing", "folder", "link", "second name"])
def test_what_is_no_file_of_its_own_is_not_taken(how: str, cache: ArtifactCache, tmp_path: Path) -> None:
    """A download that leaves nothing, a folder, a link or a further name of a foreign file is refused."""
    foreign = tmp_path / "foreign"
    foreign.write_bytes(CONTENT)
    foreign.chmod(0o644)

    def download(target: Path) -> None:
        if how == "folder":
            (target / "inner").mkdir(parents=True)
        elif how == "link":
            target.symlink_to(foreign)
        elif how == "second name":
            os.link(foreign, target)

    with pytest.raises(
        CheckpointFormatError, match=r"did not create a regular file .* Next: write the content to target"
    ):
        cache.get(KEY, download)
    assert names(cache) == []
    assert foreign.read_bytes() == CONTENT
    assert stat.S_IMODE(foreign.stat().st_mode) == 0o644


# Entries that no longer fit.


def test_an_entry_with_another_digest_is_fetched_anew(cache: ArtifactCache, caplog: pytest.LogCaptureFixture) -> None:
    """The log names both digests; without a digest the entry stays what it was."""
    path = cache.get(KEY, writing(b"old"))
    assert cache.get(KEY, refusing).read_bytes() == b"old"
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY, writing(b"new"), digest=sha256(b"new")) == path
    assert path.read_bytes() == b"new"
    (record,) = caplog.records
    assert sha256(b"old") in record.getMessage()
    assert sha256(b"new") in record.getMessage()


def test_an_entry_stays_where_the_new_file_cannot_be_had(cache: ArtifactCache) -> None:
    """A failing download, and one with a wrong digest, leave the older entry in place."""
    path = cache.get(KEY, writing(b"old"))

    def fail(target: Path) -> None:
        raise ConnectionRefusedError("server down")

    with pytest.raises(ConnectionRefusedError):
        cache.get(KEY, fail, digest=sha256(b"new"))
    with pytest.raises(CheckpointCorruptError):
        cache.get(KEY, writing(b"wrong"), digest=sha256(b"new"))
    assert path.read_bytes() == b"old"
    assert names(cache) == [path.name]


def test_offline_an_entry_with_another_digest_is_an_error(cache: ArtifactCache) -> None:
    """Both digests, the file and the ways out are named; the entry stays."""
    path = cache.get(KEY, writing(b"old"), digest=sha256(b"old"))
    offline = ArtifactCache(cache.folder, offline=True)
    with pytest.raises(CheckpointCorruptError) as caught:
        offline.get(KEY, refusing, digest=sha256(b"new"))
    for part in (sha256(b"old"), sha256(b"new"), str(path), "Next: leave out offline=True, or put the file there as"):
        assert part in str(caught.value)
    assert offline.get(KEY, refusing, digest=sha256(b"old")).read_bytes() == b"old"


@pytest.mark.parametrize("algorithm", ["sha256", "xxh3_128"])
def test_a_changed_entry_is_noticed_though_its_times_were_put_back(algorithm: str, cache: ArtifactCache) -> None:
    """One flipped byte, same size, same time of modification: fetched anew, offline an error."""
    import xxhash

    digest = sha256(CONTENT) if algorithm == "sha256" else f"xxh3_128:{xxhash.xxh3_128_hexdigest(CONTENT)}"
    path = cache.get(KEY, writing(), digest=digest)
    assert cache.get(KEY, refusing, digest=digest) == path

    def flip() -> None:
        status = path.stat()
        path.chmod(0o600)
        with open(path, "r+b") as file:
            file.seek(1000)
            file.write(b"\xff")
        path.chmod(0o400)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_mtime_ns == status.st_mtime_ns

    flip()
    with pytest.raises(CheckpointCorruptError, match="was changed"):
        ArtifactCache(cache.folder, offline=True).get(KEY, refusing, digest=digest)
    assert cache.get(KEY, writing(), digest=digest).read_bytes() == CONTENT


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what was read as Linux tells it")
def test_an_unchanged_entry_is_not_read_again(cache: ArtifactCache) -> None:
    """What was found to have its digest once is not read for it by the next process, unless the note is no good."""

    def read_meanwhile(action: Callable[[], object]) -> int:
        def so_far() -> int:
            return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

        before = so_far()
        action()
        return so_far() - before

    digest = sha256(CONTENT)
    cache.get(KEY, writing(), digest=digest)
    assert read_meanwhile(lambda: cache.get(KEY, refusing, digest=digest)) < 10_000
    (note,) = cache.folder.glob("*.verified")
    for wrong in (b"", b"\xff" * 100, note.read_bytes().replace(b"sha256", b"sha512"), b"x" * 5000):
        note.write_bytes(wrong)
        assert read_meanwhile(lambda: cache.get(KEY, refusing, digest=digest)) > len(CONTENT)
        assert read_meanwhile(lambda: cache.get(KEY, refusing, digest=digest)) < 10_000


def test_the_check_of_the_caller_is_asked_each_time(cache: ArtifactCache) -> None:
    """An entry that does not pass is fetched anew; offline its error arrives as it is."""
    wanted = b"old"

    def check(path: Path) -> None:
        if path.read_bytes() != wanted:
            raise LookupError(f"{path} is not signed by this key")

    path = cache.get(KEY, writing(b"old"), check=check)
    assert cache.get(KEY, refusing, check=check) == path
    wanted = b"new"
    with pytest.raises(LookupError, match=re.escape(str(path))):
        ArtifactCache(cache.folder, offline=True).get(KEY, refusing, check=check)
    assert path.read_bytes() == b"old"
    assert cache.get(KEY, writing(b"new"), check=check).read_bytes() == b"new"


# Where, and whether at all.


def test_the_folder_comes_from_the_argument_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argument, NOETHER_INIT_CACHE, XDG_CACHE_HOME where it is absolute, the home folder; empty is unset."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ArtifactCache().folder == tmp_path / ".cache" / "noether-init-core"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert ArtifactCache().folder == tmp_path / ".cache" / "noether-init-core"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ArtifactCache().folder == tmp_path / "xdg" / "noether-init-core"
    monkeypatch.setenv("NOETHER_INIT_CACHE", "")
    assert ArtifactCache().folder == tmp_path / "xdg" / "noether-init-core"
    monkeypatch.setenv("NOETHER_INIT_CACHE", "~/mine")
    assert ArtifactCache().folder == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    assert ArtifactCache("here").folder == tmp_path / "here"
    monkeypatch.setenv("NOETHER_INIT_CACHE", "~no-such-user/cache")
    with pytest.raises(ConfigError, match="Next: set NOETHER_INIT_CACHE="):
        ArtifactCache()


@pytest.mark.parametrize(
    ("value", "expected"), [("", False), ("1", True), ("true", True), ("YES", True), ("On", True), (None, False)]
)
def test_the_environment_says_whether_anything_is_fetched(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1, true, yes and on in any case; the argument is stronger."""
    if value is not None:
        monkeypatch.setenv("NOETHER_INIT_OFFLINE", value)
    assert ArtifactCache().offline is expected
    assert ArtifactCache(offline=not expected).offline is not expected


@pytest.mark.parametrize("value", ["0", "maybe", "offline"])
def test_another_word_for_offline_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to guess what was meant."""
    monkeypatch.setenv("NOETHER_INIT_OFFLINE", value)
    with pytest.raises(ConfigError, match=f"NOETHER_INIT_OFFLINE='{value}' is not 1, true, yes or on.* unset it"):
        ArtifactCache()
    assert ArtifactCache(offline=True).offline is True


def test_offline_and_absent_says_what_to_do(cache: ArtifactCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked, where it was looked for, the variable, and the path for a file that is brought by hand."""
    monkeypatch.setenv("NOETHER_INIT_OFFLINE", "1")
    with pytest.raises(CheckpointNotFoundError) as caught:
        ArtifactCache(cache.folder).get(KEY, refusing)
    path = cache.path_of(KEY)
    assert str(caught.value) == (
        f"{KEY} was not found in the cache {cache.folder}, and offline mode fetches nothing. "
        f"Next: unset NOETHER_INIT_OFFLINE, or put the file there as {path}"
    )
    assert (caught.value.asked, caught.value.path) == (KEY, path)
    assert not cache.folder.exists()
    cache.folder.mkdir(mode=0o700)
    path.write_bytes(CONTENT)
    assert ArtifactCache(cache.folder).get(KEY, refusing, digest=sha256(CONTENT)) == path


def test_a_digest_that_cannot_be_checked_is_refused_at_once(cache: ArtifactCache) -> None:
    """Before anything is fetched."""
    with pytest.raises(ConfigError, match="md5:aa"):
        cache.get(KEY, refusing, digest="md5:aa")


def test_a_folder_that_others_may_write_to_is_refused(cache: ArtifactCache) -> None:
    """With another folder as the way on; one that others may only list is fine, as entries are the owner's alone."""
    cache.folder.mkdir()
    cache.folder.chmod(0o770)
    with pytest.raises(CheckpointError, match=r"writable by other users, .* Next: set NOETHER_INIT_CACHE="):
        cache.get(KEY, refusing)
    cache.folder.chmod(0o755)
    assert cache.get(KEY, writing()).read_bytes() == CONTENT


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    """A file in the place of the folder, or of one above it."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"is not a folder\. Next: set NOETHER_INIT_CACHE="):
        ArtifactCache(tmp_path / "file", offline=False).get(KEY, refusing)
    with pytest.raises(CheckpointError, match=r"cannot be used: .*Next: set NOETHER_INIT_CACHE="):
        ArtifactCache(tmp_path / "file" / "below", offline=False).get(KEY, refusing)


def test_an_entry_that_is_a_link_is_refused(cache: ArtifactCache, tmp_path: Path) -> None:
    """Nothing outside the folder is read, changed or removed through it."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"outside")
    cache.folder.mkdir(mode=0o700)
    cache.path_of(KEY).symlink_to(outside)
    for digest in (None, sha256(b"outside"), sha256(b"new")):
        with pytest.raises(CheckpointFormatError, match=r"not a regular file\. Next: remove it"):
            cache.get(KEY, writing(b"new"), digest=digest)
    assert outside.read_bytes() == b"outside"
    assert cache.path_of(KEY).is_symlink()


# Keys.

KEYS = st.one_of(
    st.text(st.characters(), max_size=300),
    st.lists(st.sampled_from(["..", "/", "a", "\\", "\0", "~", "C:", "\n", "?", "é", ".pt", "http://"])).map("".join),
)


@settings(deadline=None)
@given(KEYS, KEYS)
def test_any_text_is_a_key_of_its_own(first: str, second: str) -> None:
    """Every key leads to one name right in the folder, different keys to different ones."""
    cache = ArtifactCache("/cache", offline=True)
    for key in (first, second):
        path = cache.path_of(key)
        assert path.parent == cache.folder
        assert path == Path(os.path.normpath(path))
        assert re.fullmatch(r"[0-9a-f]{40}(-[A-Za-z0-9]([A-Za-z0-9._-]{0,58}[A-Za-z0-9])?)?", path.name), path.name
        assert ArtifactCache.shown(key).isprintable()
        assert len(ArtifactCache.shown(key)) <= 120
    assert (cache.path_of(first) == cache.path_of(second)) == (first == second)


@pytest.mark.parametrize(
    "key", ["", "../../etc/passwd", "/abs/olute", "a" * 5000, "\ud800", "https://h/" + "/.." * 900]
)
def test_odd_keys_are_kept_apart_and_inside_the_folder(key: str, cache: ArtifactCache) -> None:
    """Each can be fetched and found, and makes nothing outside the folder."""
    path = cache.get(key, writing(key.encode("utf-8", "replace") + b"!"))
    assert cache.get(key, refusing).read_bytes() == key.encode("utf-8", "replace") + b"!"
    assert path.parent == cache.folder
    assert sorted(entry.name for entry in cache.folder.parent.iterdir()) == ["cache"]


SECRET = st.text("abcXYZ019:@/?#&=+ é", min_size=1, max_size=12).map(lambda text: f"s3cr3t{text}s3cr3t")


@pytest.mark.parametrize(
    "key",
    [
        "https:/user:s3cr3t@h/a?x=http://b",
        "user:s3cr3t@h/a?x=https://b",
        "https://h/a;token=s3cr3t",
        "https://h/a%3Ftoken=s3cr3t",
        "https://h/a&token=s3cr3t",
    ],
)
def test_odd_spellings_hide_as_much(key: str, tmp_path: Path) -> None:
    """A slash too few, a scheme that comes later, other separators than those of the standard."""
    assert "s3cr3t" not in ArtifactCache.shown(key) + ArtifactCache(tmp_path / "c").path_of(key).name


@settings(deadline=None)
@given(SECRET, SECRET, SECRET, SECRET, st.sampled_from(["host", "host:8080", "[::1]:80"]), st.booleans())
def test_what_is_secret_in_a_url_is_never_shown(
    user: str, password: str, query: str, fragment: str, host: str, is_nested: bool
) -> None:
    """Neither in words nor in file names; the rest of the URL stays readable."""
    login = f"{quote(user, safe='')}:{quote(password, safe='')}@"
    url = f"https://{login}{host}/models/encoder.pt?token={quote(query, safe='/?')}#{quote(fragment, safe='/?')}"
    key = f"https://mirror/{url}" if is_nested else url
    cache = ArtifactCache("/cache", offline=True)
    assert "s3cr3t" not in ArtifactCache.shown(key) + str(cache.path_of(key))
    assert ArtifactCache.shown(key).endswith(f"{host}/models/encoder.pt")
    assert cache.path_of(key).name.endswith("-encoder.pt")


@settings(deadline=None)
@given(SECRET, SECRET)
def test_a_secret_with_characters_that_it_must_not_have_is_not_shown_either(user: str, password: str) -> None:
    """Where it cannot be told what belongs to the password, nothing behind the scheme is shown."""
    shown = ArtifactCache.shown(f"https://{user.replace('/', '')}:{password}@host/models/encoder.pt")
    assert "s3cr3t" not in shown
    assert shown in ("https://host/models/encoder.pt", "https://...")


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("https://host/pkg@1.2/x.pt?list=a@b", "https://host/pkg@1.2/x.pt"),
        ("https://host?token=a@b", "https://..."),
        ("s3://bucket/a/b.pt", "s3://bucket/a/b.pt"),
        ("sha256:abcd", "sha256:abcd"),
        ("user:word@host/path", "host/path"),
        ("two\nlines\x1b[31m", "two\\nlines\\x1b[31m"),
        ("https://host/" + "a" * 200 + "/x.pt", "https://host/" + "a" * 64 + "..." + "a" * 35 + "/x.pt"),
    ],
)
def test_keys_are_shown_readably(key: str, shown: str) -> None:
    """What is no secret stays, on one line of bearable length."""
    assert ArtifactCache.shown(key) == shown


def test_errors_and_logs_show_no_secret(cache: ArtifactCache, caplog: pytest.LogCaptureFixture) -> None:
    """Offline, with a wrong digest, with nothing downloaded: the key appears without its secrets."""
    key = "https://me:s3cr3t@host/encoder.pt?token=s3cr3t"
    caplog.set_level(logging.DEBUG)
    errors = []
    for use in (
        lambda: ArtifactCache(cache.folder, offline=True).get(key, refusing),
        lambda: cache.get(key, writing(), digest=sha256(b"another")),
        lambda: cache.get(key, lambda target: None),
        lambda: cache.get(key, refusing, digest="md5:aa"),
    ):
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            use()
        errors.append(str(caught.value))
    cache.get(key, writing(b"old"))
    cache.get(key, writing(b"new"), digest=sha256(b"new"))
    text = "\n".join([*errors, caplog.text, *(path.name for path in cache.folder.iterdir())])
    assert text.count("https://host/encoder.pt") >= 6
    assert "s3cr3t" not in text


# Several at once.


def test_threads_that_ask_at_once_cause_one_download(cache: ArtifactCache) -> None:
    """All get the same file; the download is called once."""
    calls: list[Path] = []
    together = threading.Barrier(8)

    def ask(_: int) -> bytes:
        together.wait()
        return cache.get(KEY, writing(calls=calls)).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {CONTENT}
    assert len(calls) == 1


def test_processes_that_ask_at_once_cause_one_download(tmp_path: Path) -> None:
    """Six processes start together; one fetches, all read the same bytes."""
    askers = [_start("ask", tmp_path / "cache", tmp_path / "log", tmp_path / "go") for _ in range(6)]
    for asker in askers:
        assert asker.stdout is not None
        assert asker.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    results = [asker.communicate(timeout=900) for asker in askers]
    assert [asker.returncode for asker in askers] == [0] * 6, results
    assert {output for output, _ in results} == {f"{sha256(CONTENT)}\n"}
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_whoever_waits_fetches_when_the_first_one_fails(cache: ArtifactCache) -> None:
    """The error is that of the first alone; the second one's own download is called."""
    begun, may_fail = threading.Event(), threading.Event()

    def failing(target: Path) -> None:
        begun.set()
        assert may_fail.wait(60)
        raise ConnectionResetError("by peer")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, KEY, failing)
        assert begun.wait(60)
        second = pool.submit(cache.get, KEY, writing())
        may_fail.set()
        assert second.result(60).read_bytes() == CONTENT
        assert isinstance(first.exception(60), ConnectionResetError)


def test_waiting_too_long_names_the_lock(cache: ArtifactCache) -> None:
    """Another key is not held up meanwhile."""
    begun, may_end = threading.Event(), threading.Event()

    def slow(target: Path) -> None:
        begun.set()
        assert may_end.wait(60)
        target.write_bytes(CONTENT)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get, KEY, slow)
        try:
            assert begun.wait(60)
            hasty = ArtifactCache(cache.folder, offline=False, timeout=0.1)
            with pytest.raises(CheckpointError, match=r"has held the lock .* for 0\.1 s\. Next: ") as caught:
                hasty.get(KEY, refusing)
            assert hasty.get("another key", writing(b"other")).read_bytes() == b"other"
        finally:
            may_end.set()
        assert first.result(60).read_bytes() == CONTENT
    (lock,) = (path for path in cache.folder.glob("*.lock") if cache.path_of(KEY).name.startswith(path.stem))
    assert caught.value.path == lock
    assert str(lock) in str(caught.value)


def test_a_killed_process_does_not_block_the_one_that_waits(tmp_path: Path) -> None:
    """Killed in the midst of its download: the next one gets the lock, fetches, and clears up."""
    cache = ArtifactCache(tmp_path / "cache", offline=False)
    holder = _start("hold", cache.folder)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "half\n"
    assert [name.endswith(".partial") for name in names(cache)] == [True]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.get, KEY, writing())
        assert not waiting.done()
        holder.kill()
        assert waiting.result(60).read_bytes() == CONTENT
    holder.communicate()
    assert names(cache) == [cache.path_of(KEY).name]


def test_kills_at_any_moment_leave_no_half_file_in_use(tmp_path: Path) -> None:
    """After each kill the entry is absent or whole; then it can be fetched, and nothing is left over."""
    helper = _start("kills", tmp_path / "cache")
    output, errors = helper.communicate(timeout=900)
    assert helper.returncode == 0, errors
    counted = json.loads(output)
    assert counted["absent"] + counted["whole"] == KILLS
    assert counted["wrong"] == 0
    assert counted["absent"] > KILLS / 4
    assert counted["partial files left"] > KILLS / 8
    assert counted["fetched afterwards"] == counted["absent"]
    assert counted["left at the end"] == 0


# The other processes.


def _start(task: str, *arguments: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, task, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _ask(folder: Path, log: Path, go: Path) -> None:
    """Ask for the key as soon as ``go`` exists; a download adds a line to ``log``."""

    def download(target: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        target.write_bytes(CONTENT)

    print("ready", flush=True)
    while not go.exists():
        os.sched_yield()
    print(sha256(ArtifactCache(folder).get(KEY, download, digest=sha256(CONTENT)).read_bytes()))


def _hold(folder: Path) -> None:
    """Begin a download and never end it."""

    def download(target: Path) -> None:
        target.write_bytes(CONTENT[:1000])
        print("half", flush=True)
        signal.pause()

    ArtifactCache(folder).get(KEY, download)


def _parts_until_killed(cache: ArtifactCache, key: str, pipe: int, pause_after: int | None) -> None:
    """The child: tells through the pipe of every step, so that it can be killed soon after any of them.

    After step ``pause_after`` it waits to be killed.
    """
    steps = itertools.count(1)

    def step(_path: Path | None = None) -> None:
        os.write(pipe, b".")
        if next(steps) == pause_after:
            signal.pause()

    def download(target: Path) -> None:
        with open(target, "xb") as file:
            for start in range(0, len(CONTENT), len(CONTENT) // 8):
                file.write(CONTENT[start : start + len(CONTENT) // 8])
                file.flush()
                step()

    cache.get(key, download, digest=sha256(CONTENT), check=step)
    step()


def _kills(folder: Path) -> None:
    """Kill a child right after one of its steps, or soon after one, in turn; look, fetch again, and count the findings.

    How far it comes after a step depends on the machine, so that half of the children wait.
    """
    counted = dict.fromkeys(
        ("absent", "whole", "wrong", "partial files left", "fetched afterwards", "left at the end"), 0
    )
    chance = random.Random(0)
    cache, offline = ArtifactCache(folder, offline=False), ArtifactCache(folder, offline=True)
    for number in range(KILLS):
        key = f"{KEY}-{number}"
        reading, writing_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _parts_until_killed(cache, key, writing_end, None if number % 2 else 1 + number % 10)
            finally:
                os._exit(1)
        os.close(writing_end)
        for _ in range(1 + number % 10):
            os.read(reading, 1)
        for _ in range(chance.randrange(200)):
            os.sched_yield()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        counted["partial files left"] += any(path.suffix == ".partial" for path in folder.iterdir())
        for digest in (None, sha256(CONTENT)):
            with contextlib.suppress(CheckpointNotFoundError):
                counted["wrong"] += offline.get(key, refusing, digest=digest).read_bytes() != CONTENT
        is_there = offline.path_of(key).exists()
        counted["whole" if is_there else "absent"] += 1
        calls: list[Path] = []
        counted["wrong"] += cache.get(key, writing(calls=calls), digest=sha256(CONTENT)).read_bytes() != CONTENT
        counted["fetched afterwards"] += len(calls)
        counted["left at the end"] += any(".partial" in path.name for path in folder.iterdir())
    print(json.dumps(counted))


if __name__ == "__main__":
    {"ask": _ask, "hold": _hold, "kills": _kills}[sys.argv[1]](*map(Path, sys.argv[2:]))
