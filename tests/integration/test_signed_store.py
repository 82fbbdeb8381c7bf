"""The example of a private store, installed from its own wheel, against a real server that does whatever it can."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import traceback
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from support.wheels import ROOT, run_process

from noether_init_core import (
    ArtifactCache,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    ConfigError,
    InitError,
    InitializerStack,
    bind,
    kinds,
)

PROJECT = ROOT / "examples" / "signed_store"
NAME = "probe-v1.pt"
TOKEN = "s3cr3t-t0ken"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages, with what the wheel of the example holds, its metadata included."""
    folder = tmp_path_factory.mktemp("signed-store")
    run_process(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist", where=PROJECT)
    (wheel,) = (folder / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def package(site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The installed package, with a cache of its own and no proxy; gone again afterwards."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("NOETHER_INIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NOETHER_INIT_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    kinds.clear_cache()
    yield importlib.import_module("noether_init_signed_store")
    for name in [name for name in sys.modules if name.partition(".")[0] == "noether_init_signed_store"]:
        del sys.modules[name]
    kinds.clear_cache()


@pytest.fixture
def new_store(package: Any, tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Starts servers, each with a publisher of its own."""
    spec = importlib.util.spec_from_file_location("signed_store_for_tests", PROJECT / "tests" / "store.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    running: list[Any] = []

    def start() -> Any:
        running.append(module.Store(tmp_path / f"served-{len(running)}").__enter__())
        return running[-1]

    yield start
    for store in running:
        store.stop()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file with the weights of some network."""
    torch.save(torch.nn.Linear(40, 20).state_dict(), tmp_path / "published.pt")
    return tmp_path / "published.pt"


@pytest.fixture
def store(new_store: Callable[[], Any], published: Path) -> Any:
    """A server where the file is published under ``NAME``."""
    running = new_store()
    running.put(published, NAME)
    return running


@pytest.fixture
def cache(package: Any, tmp_path: Path) -> Path:
    """The folder of the cache, that the kind finds by its variable."""
    return tmp_path / "cache"


def load(config: dict[str, Any], published: Path) -> Any:
    """Initialize a network; it must get the published values. Returns the report."""
    network = torch.nn.Linear(40, 20)
    report = InitializerStack.from_config([config]).initialize(bind(network, "probe"))
    expected = torch.load(published, weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    return report


def refused(config: dict[str, Any], error: type[InitError], message: str) -> InitError:
    """Try to initialize a network; the error must come, say the next step, and leave the values as they were."""
    network = torch.nn.Linear(40, 20)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(error, match=message) as caught:
        InitializerStack.from_config([config]).initialize(bind(network, "probe"))
    assert "Next: " in str(caught.value) or "Add: " in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    return caught.value


def entry(cache: Path, ending: str = NAME) -> Path:
    """The one entry of the cache whose name ends so."""
    (found,) = cache.glob(f"*-{ending}")
    return found


# As it should be.


def test_the_second_start_asks_nobody(store: Any, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request for the statement, one for the file; afterwards the cache serves, server or not, offline or not."""
    load(store.config(NAME), published)
    assert store.paths == [f"/{NAME}.json", f"/{NAME}"]
    load(store.config(NAME), published)
    store.stop()
    load(store.config(NAME), published)
    monkeypatch.setenv("NOETHER_INIT_OFFLINE", "1")
    load(store.config(NAME), published)
    assert len(store.paths) == 2


def test_processes_that_start_at_once_cause_one_download(
    store: Any, published: Path, site: Path, tmp_path: Path
) -> None:
    """Three processes as ``torchrun`` would start them: two requests in all, the same weights in each."""
    (tmp_path / "config.json").write_text(json.dumps([store.config(NAME)]))
    program = """
import json, os, sys, torch
from pathlib import Path
from noether_init_core import InitializerStack, bind
network = torch.nn.Linear(40, 20)
stack = InitializerStack.from_config(json.loads(Path("config.json").read_text()))
print("ready", flush=True)
while not Path("go").exists():
    os.sched_yield()
stack.initialize(bind(network, "probe"))
expected = torch.load("published.pt", weights_only=True)
print(all(torch.equal(value, expected[name]) for name, value in network.state_dict().items()))
"""
    paths = [str(site), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    starting = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in starting:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    results = [process.communicate(timeout=900) for process in starting]
    assert [output for output, _ in results] == ["True\n"] * 3, results
    assert store.paths == [f"/{NAME}.json", f"/{NAME}"]


def test_a_plan_is_made_from_the_file_and_changes_nothing(store: Any) -> None:
    """It is fetched for its header, as a start would."""
    network = torch.nn.Linear(40, 20)
    before = network.weight.clone()
    plan = InitializerStack.from_config([store.config(NAME)]).plan(bind(network, "probe"))
    assert plan.counts() == {"load": 2}
    assert torch.equal(network.weight, before)


def test_the_examples_own_tests_pass_against_its_wheel(package: Any, site: Path, tmp_path: Path) -> None:
    """Its conformance tests among them, in a process that has the wheel and not the sources."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'own'}"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


# A server that lies, and a network that breaks.


def test_nothing_is_fetched_on_the_word_of_another_key(store: Any, new_store: Callable[[], Any], cache: Path) -> None:
    """The signature comes first: the file is not even asked for."""
    other = new_store()
    error = refused({**store.config(NAME), "public_key": other.public_key}, CheckpointError, "is not signed by")
    assert type(error).__name__ == "SignatureError"
    assert store.paths == [f"/{NAME}.json"]
    assert list(cache.glob("*.json")) == []


def test_a_genuine_statement_about_another_file_is_refused(store: Any, tmp_path: Path) -> None:
    """Who has no key can only replay what the publisher has signed: here, an older file under this name."""
    torch.save(torch.nn.Linear(40, 20).state_dict(), tmp_path / "other.pt")
    store.put(tmp_path / "other.pt", "probe-v0.pt")
    for ending in ("", ".json"):
        (store.folder / f"{NAME}{ending}").write_bytes((store.folder / f"probe-v0.pt{ending}").read_bytes())
    error = refused(store.config(NAME), CheckpointError, "genuine statement, but about 'probe-v0.pt'")
    assert type(error).__name__ == "SignatureError"
    assert store.paths == [f"/{NAME}.json"]


def sends(
    content: bytes, *, code: int = 200, length: int | None = None, location: str | None = None, uri: str | None = None
) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that may claim another length than it has, or none, and then ends."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        if location is not None:
            handler.send_header("Location", location)
        if uri is not None:
            handler.send_header("URI", uri)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def endless(handler: BaseHTTPRequestHandler) -> None:
    """Zeros, for as long as somebody reads."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"\0" * 65536)
    except OSError:
        handler.close_connection = True


def babble(handler: BaseHTTPRequestHandler) -> None:
    """No HTTP."""
    handler.wfile.write(b"\xff\x00 good morning\r\n\r\n")


def cut_chunk(handler: BaseHTTPRequestHandler) -> None:
    """A chunked answer that ends in the midst of a chunk."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"1000\r\nonly this")
    handler.close_connection = True


FILE, STATEMENT = f"/{NAME}", f"/{NAME}.json"


@pytest.mark.parametrize(
    ("path", "answer", "error", "message"),
    [
        (FILE, sends(b"\0" * 1000), CheckpointCorruptError, r"ended after 1000 of \d+ bytes"),
        (FILE, sends(b"\0" * 1000, length=100_000), CheckpointCorruptError, r"ended after 1000 of \d+ bytes"),
        (FILE, sends(b""), CheckpointCorruptError, r"ended after 0 of \d+ bytes"),
        (FILE, endless, CheckpointCorruptError, r"has more than the \d+ bytes"),
        (FILE, cut_chunk, CheckpointError, "cannot be fetched: IncompleteRead"),
        (FILE, babble, CheckpointError, "cannot be fetched"),
        (FILE, sends(b"", code=404), CheckpointNotFoundError, f"there is no http://.*/{NAME} .*404"),
        (STATEMENT, sends(b"", code=404), CheckpointNotFoundError, f"there is no http://.*/{NAME}.json .*404"),
        (STATEMENT, sends(b"", code=403), CheckpointError, "answers 403 to .*token: NAME_OF_A_VARIABLE"),
        (FILE, sends(b"", code=503), CheckpointError, "answers 503 to .*try again later"),
        (STATEMENT, sends(b"<html>log in</html>"), CheckpointFormatError, "is not a signed statement"),
        (STATEMENT, endless, CheckpointCorruptError, "has more than the 4096 bytes"),
        (FILE, sends(b"", code=302, location="ftp://127.0.0.1/w.pt"), CheckpointError, "by another protocol"),
        (FILE, sends(b"", code=302, location="https://127.0.0.1:9/w.pt"), CheckpointError, "by another protocol"),
        (FILE, sends(b"", code=302, location=FILE), CheckpointError, "answers 302"),
    ],
)
def test_what_a_server_may_do_instead(
    path: str,
    answer: Callable[[BaseHTTPRequestHandler], None],
    error: type[InitError],
    message: str,
    store: Any,
    published: Path,
    cache: Path,
) -> None:
    """A clear error, an unchanged model, nothing of the file kept; and when the server is well again, it works."""
    store.answers[path] = answer
    refused(store.config(NAME), error, message)
    assert list(cache.glob(f"*-{NAME}")) == []
    assert [name for name in os.listdir(cache) if ".partial" in name] == []
    del store.answers[path]
    load(store.config(NAME), published)


def test_other_bytes_of_the_same_length_are_refused(store: Any, cache: Path) -> None:
    """Both digests are named; nothing is kept."""
    content = bytearray((store.folder / NAME).read_bytes())
    content[-200] ^= 1
    (store.folder / NAME).write_bytes(content)
    refused(store.config(NAME), CheckpointCorruptError, "was fetched with the digest sha256:.*, expected sha256:")
    assert list(cache.glob(f"*-{NAME}")) == []


def test_a_server_that_falls_silent_is_given_up(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time limit, not never."""
    gone = threading.Event()

    def silent(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.flush()
        gone.wait(60)

    store.answers[FILE] = silent
    monkeypatch.setattr("noether_init_signed_store.fetching.TIMEOUT", 0.2)
    try:
        refused(store.config(NAME), CheckpointError, "cannot be fetched: .*timed out")
    finally:
        gone.set()


def test_a_server_that_is_down_is_named(store: Any) -> None:
    """The address, the reason, the next step."""
    store.stop()
    refused(
        store.config(NAME), CheckpointError, f"{store.url}/{NAME}.json cannot be fetched: .*refused. Next: see whether"
    )


def test_offline_without_a_cache_says_where_the_file_would_go(
    store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing, the variable, the path."""
    monkeypatch.setenv("NOETHER_INIT_OFFLINE", "1")
    message = (
        f"{NAME}.json was not found in the cache {cache}, .*unset NOETHER_INIT_OFFLINE, or put the file .* {cache}"
    )
    refused(store.config(NAME), CheckpointNotFoundError, message)
    assert store.paths == []


# A cache that somebody changed.


def _flip(path: Path) -> None:
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_changed_file_in_the_cache_is_fetched_anew(
    store: Any, published: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning; offline it is an error that names both digests."""
    load(store.config(NAME), published)
    _flip(entry(cache))
    monkeypatch.setenv("NOETHER_INIT_OFFLINE", "1")
    refused(store.config(NAME), CheckpointCorruptError, "has the digest sha256:.* expected sha256:.*was changed")
    monkeypatch.delenv("NOETHER_INIT_OFFLINE")
    with caplog.at_level(logging.WARNING):
        load(store.config(NAME), published)
    assert "It is fetched again." in caplog.text
    assert store.paths == [STATEMENT, FILE, FILE]


def test_a_note_that_lies_about_a_changed_file_helps_nobody(store: Any, published: Path, cache: Path) -> None:
    """Who can write to the folder can make the cache believe in a whole other file; the core compares what it reads."""
    load(store.config(NAME), published)
    path = entry(cache)
    path.unlink()
    torch.save(torch.nn.Linear(40, 20).state_dict(), path)
    (note,) = cache.glob("*.verified")
    status = path.stat()
    digest = note.read_text().split()[0]
    note.write_text(f"{digest} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n")
    refused(store.config(NAME), CheckpointCorruptError, f"{path} has the digest sha256:.*, expected {digest}")
    assert store.paths == [STATEMENT, FILE]


def test_a_changed_statement_in_the_cache_is_not_believed(
    store: Any, published: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, too, the signature is checked; with the server it is fetched anew."""
    load(store.config(NAME), published)
    _flip(entry(cache, f"{NAME}.json"))
    monkeypatch.setenv("NOETHER_INIT_OFFLINE", "1")
    refused(store.config(NAME), CheckpointError, "is not signed by|is not a signed statement")
    monkeypatch.delenv("NOETHER_INIT_OFFLINE")
    load(store.config(NAME), published)
    assert store.paths == [STATEMENT, FILE, STATEMENT]


# Secrets.


@pytest.mark.parametrize(
    "header",
    [
        {"location": "http://user:s3cr3t@127.0.0.1/w.pt"},
        {"location": "http://[::1/w.pt?sig=s3cr3t"},
        {"location": "file:///w.pt?sig=s3cr3t"},
        {"uri": "file:///w.pt?sig=s3cr3t"},
    ],
)
def test_the_secret_of_a_redirect_is_not_told(store: Any, published: Path, header: dict[str, Any]) -> None:
    """Neither in the message nor in the traceback, whatever the address is."""
    store.answers[FILE] = sends(b"", code=302, **header)
    error = refused(store.config(NAME), CheckpointError, "leads to")
    assert "s3cr3t" not in "".join(traceback.format_exception(error))


def test_the_token_reaches_the_server_and_nothing_else(
    store: Any, published: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No report, dump, pickle, log, error or file name has it; a start from the cache does without."""
    monkeypatch.setenv("STORE_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    config = store.config(NAME, token="STORE_TOKEN")
    store.answers[STATEMENT] = sends(b"", code=401)
    error = refused(config, CheckpointError, "answers 401")
    del store.answers[STATEMENT]
    report = load(config, published)
    assert store.requests == [(STATEMENT, f"Bearer {TOKEN}")] * 2 + [(FILE, f"Bearer {TOKEN}")]
    validated = kinds.validate(config)
    seen = [
        str(error),
        str(report),
        repr(report),
        report.to_json(),
        repr(validated),
        validated.model_dump_json(),
        repr(pickle.dumps(validated)),
        caplog.text,
        *os.listdir(cache),
    ]
    assert [text for text in seen if TOKEN in text] == []
    monkeypatch.delenv("STORE_TOKEN")
    load(config, published)


def test_a_token_that_is_not_set_is_named(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is asked for."""
    monkeypatch.delenv("STORE_TOKEN", raising=False)
    refused(store.config(NAME, token="STORE_TOKEN"), ConfigError, "the environment variable STORE_TOKEN is not set")
    monkeypatch.setenv("STORE_TOKEN", f"{TOKEN}\nand more")
    caught = refused(store.config(NAME, token="STORE_TOKEN"), ConfigError, "STORE_TOKEN holds characters")
    assert TOKEN not in f"{caught!r}{caught.__cause__!r}"
    assert store.paths == []


def test_the_token_does_not_follow_a_redirect(
    store: Any, new_store: Callable[[], Any], published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server that the first one points to gets the request without it."""
    monkeypatch.setenv("STORE_TOKEN", TOKEN)
    other = new_store()
    other.put(published, NAME)
    store.answers[FILE] = sends(b"", code=302, location=f"{other.url}{FILE}?signed=elsewhere")
    other.answers[f"{FILE}?signed=elsewhere"] = sends((other.folder / NAME).read_bytes())
    load(store.config(NAME, token="STORE_TOKEN"), published)
    assert store.requests[-1] == (FILE, f"Bearer {TOKEN}")
    assert other.requests == [(f"{FILE}?signed=elsewhere", None)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": f"https://me:{TOKEN}@host/models"}, "url: no user, password, query or fragment belongs here"),
        ({"url": f"https://host/models?token={TOKEN}"}, "url: no user, password, query or fragment belongs here"),
        ({"token": TOKEN}, "token: write the name of an environment variable"),
        ({"url": "http://host/models", "token": "STORE_TOKEN"}, "token: over http everybody on the way"),
        ({"url": "ftp://host/models"}, "url: write https://host/path"),
        ({"name": "../w.pt"}, "name: "),
        ({"public_key": "AAAA"}, "public_key: is no Ed25519 key"),
        ({"verify": "header"}, "verify: what was signed is the digest of all bytes"),
    ],
)
def test_a_config_that_cannot_be_meant_is_an_error(fields: dict[str, Any], message: str, store: Any) -> None:
    """With the place; and what may have been a secret is not repeated, not even by the cause."""
    with pytest.raises(ConfigError, match=f"initializers.0.{message}") as caught:
        InitializerStack.from_config([{**store.config(NAME), **fields}])
    assert TOKEN not in str(caught.value)
    assert TOKEN not in str(caught.value.__cause__)


def test_the_cache_is_that_of_the_core(store: Any, published: Path, cache: Path) -> None:
    """Another kind, or a person with a file at hand, finds the entry under the key that the example documents."""
    load(store.config(NAME), published)
    statement = json.loads(entry(cache, f"{NAME}.json").read_text())
    assert ArtifactCache().path_of(f"{store.url}{FILE}#sha256:{statement['sha256']}") == entry(cache)
