"""The conformance kit, and a store with a cache of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from store import Store

pytest_plugins = ["noether_init_core.testing"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, empty at first; a proxy is not asked."""
    monkeypatch.setenv("NOETHER_INIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NOETHER_INIT_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A running server with a publisher."""
    with Store(tmp_path / "served") as running:
        yield running
