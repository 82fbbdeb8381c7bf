"""A real browser for the tests of pages: Chromium, headless, without network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Opened", "browser", "opened"]

_OPTIONS = (
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_READY = "html[data-ready=yes]"

#: A page as Playwright gives it.
Opened = Any


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium. Where there is none the test is skipped; with ``NEEDS_BROWSER`` set it fails."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        if os.environ.get("NEEDS_BROWSER"):
            pytest.fail("no Chromium here. Next: make browser")
        pytest.skip("no Chromium here; make browser installs it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(_OPTIONS))
        yield started
        started.close()


@contextmanager
def opened(started: Any, file: Path, **options: Any) -> Iterator[Opened]:
    """A page of ours, drawn. Anything in its console, an error, or a request for another file fails the test."""
    said: list[str] = []
    context = started.new_context(**{"viewport": {"width": 1240, "height": 900}, **options})
    page = context.new_page()
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    address = file.resolve().as_uri()
    page.on("request", lambda request: said.append(f"asked for {request.url}") if request.url != address else None)
    page.goto(address)
    page.wait_for_selector(_READY, state="attached")
    yield page
    context.close()
    assert said == []
