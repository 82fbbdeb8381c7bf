"""One browser for all tests of pages in a process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.browser import browser


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Chromium, started once."""
    with browser() as started:
        yield started
