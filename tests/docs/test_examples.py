"""Every example of the site and of the README runs, and prints what the page says that it prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.pages import ROOT, blocks_of, matches, pages, run_page

from noether_init_core import kinds

PAGES = pages()
IDS = [str(path.relative_to(ROOT)) for path in PAGES]


@pytest.fixture
def restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes back what a page changes: modules, import path, environment, registered kinds, random generators."""
    environment = dict(os.environ)
    monkeypatch.setattr(sys, "path", list(sys.path))
    registered = {info.name for info in kinds.installed() if info.distribution is None}
    with torch.random.fork_rng(devices=[]):
        yield
    os.environ.clear()
    os.environ.update(environment)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    for info in kinds.installed():
        if info.distribution is None and info.name not in registered:
            kinds.unregister(info.name)
    monkeypatch.undo()
    kinds.clear_cache()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_examples_print_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: None
) -> None:
    """The blocks of a page run in order in an empty folder, and each output that is shown is the real one."""
    monkeypatch.chdir(tmp_path)
    for block, printed, shown in run_page(page.read_text(), page.name, tmp_path):
        place = f"{page.relative_to(ROOT)}:{block.line}"
        if shown is None:
            assert printed == "", f"{place} prints, but the page does not show it"
        else:
            assert matches(shown.text, printed), f"{place} printed:\n{printed}\nthe page shows:\n{shown.text}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_a_block_that_does_not_run_says_why(page: Path) -> None:
    """Only a comment with the reason right before a block keeps it from running; the other way round, too."""
    for block in blocks_of(page.read_text()):
        assert ("no-run" in block.marks) == (block.reason is not None), f"{page.name}:{block.line}"


def test_the_runner_notices_another_output() -> None:
    """The comparison is of whole outputs, with ``...`` for parts that differ from run to run."""
    assert matches("a ... c\n", "a b c\n")
    assert not matches("a ... c\n", "a b c d\n")
    assert not matches("a b", "a.b")
