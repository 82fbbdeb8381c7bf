"""Fixtures that every part of the tests shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.foreign import ForeignPackages

pytest_plugins = ["noether_init_core.testing"]

# how long an example takes depends on the machine and its load
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--backwards`` finds tests that only pass because of the ones before them."""
    parser.addoption("--backwards", action="store_true", help="run the tests in the opposite order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Turn the order round, where that is asked for."""
    if config.getoption("--backwards"):
        items.reverse()


@pytest.fixture(scope="session")
def noether_runs() -> Path:
    """The folder of checkpoints that Noether wrote; tests that need it are skipped where it is absent."""
    for parent in Path(__file__).resolve().parents:
        folder = parent / "shared" / "noether_runs"
        if folder.is_dir():
            return folder
    pytest.skip("the folder shared/noether_runs is absent")


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForeignPackages]:
    """Installs distributions of strangers for one test."""
    packages = ForeignPackages(tmp_path, monkeypatch)
    yield packages
    packages.forget()
