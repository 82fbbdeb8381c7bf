"""The page of differences names every record of Noether whose result is another one here."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from support.pages import ROOT

PAGE = (ROOT / "docs" / "noether-differences.md").read_text()


def load(name: str) -> ModuleType:
    """A module of ``tests/noether``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "noether" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(section: str) -> set[tuple[str, str]]:
    """(run, record or tag) of each row below the heading ``section``."""
    lines = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    return {(run, record) for run, record, *_rest in cells}


@pytest.mark.parametrize(
    ("section", "module", "table"),
    [("Weights", "test_previous_run", "DIFFERENT"), ("Where training starts", "test_resume", "START_DIFFERENT")],
)
def test_every_different_record_has_its_row(section: str, module: str, table: str) -> None:
    """The rows are exactly the records that the tests treat as different."""
    different = set(getattr(load(module), table))
    assert different
    assert rows(section) == different
