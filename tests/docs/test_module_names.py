"""Pages for maintainers name modules; every one of them exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.pages import ROOT

PAGES = sorted((ROOT / "docs" / "maintain").glob("*.md"))
PACKAGES = (ROOT, ROOT / "noether_init_core", *ROOT.glob("plugins/*/src/*"))
NAMED = re.compile(r"`((?:[\w-]+/)*\w+\.py)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    """A module is named from the root of the project, of the package, or of a plugin's package."""
    named = set(NAMED.findall(page.read_text()))
    assert [name for name in sorted(named) if not any((folder / name).is_file() for folder in PACKAGES)] == []


def test_the_pages_name_modules() -> None:
    """The search above finds something."""
    assert len({name for page in PAGES for name in NAMED.findall(page.read_text())}) > 20
