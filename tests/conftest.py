"""Fixtures that every part of the tests shares."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.advice import watched
from support.foreign import ForeignPackages

from noether_init_core import PathProvider

# the tests of the part that needs no torch run without it, too: `make test-pythons`
pytest_plugins = ["noether_init_core.testing"] if find_spec("torch") else []

# how long an example takes depends on the machine and its load
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


#: Files that take longest. They begin first, so that at the end no worker waits for another one.
LONGEST = {
    "test_demo.py",
    "test_kit.py",
    "test_new_package.py",
    "test_newcomer.py",
    "test_signed_store.py",
    "test_tutorial.py",
    "test_wheels.py",
    "test_writer_kills.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--shuffle=SEED`` finds tests that only pass because of the ones before them."""
    parser.addoption("--shuffle", metavar="SEED", help="run the files, and the tests of each file, in a random order")


def pytest_report_header(config: pytest.Config) -> str | None:
    """The seed, which gives the same order again."""
    seed = config.getoption("--shuffle")
    return f"shuffled: --shuffle={seed}" if seed else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; shuffled, if asked, alike in every worker. The tests of a file stay together."""
    if seed := config.getoption("--shuffle"):
        # a generator of its own: the tests draw the same numbers in every order
        generator = random.Random(seed)
        places = {path: generator.random() for path in sorted({item.path for item in items})}
        generator.shuffle(items)
        items.sort(key=lambda item: places[item.path])
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def noether_runs() -> Path:
    """The folder of checkpoints that Noether wrote; tests that need it are skipped where it is absent."""
    for parent in Path(__file__).resolve().parents:
        folder = parent / "shared" / "noether_runs"
        if folder.is_dir():
            return folder
    pytest.skip("the folder shared/noether_runs is absent")


@pytest.fixture(autouse=True)
def advice_that_is_executed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test with ``executes`` must be given the advice that it names."""
    yield from watched(getattr(request, "function", advice_that_is_executed), monkeypatch)


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    """The folders of a run without stages."""
    return PathProvider(tmp_path, "run")


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForeignPackages]:
    """Installs distributions of strangers for one test."""
    packages = ForeignPackages(tmp_path, monkeypatch)
    yield packages
    packages.forget()
