"""Fixtures of tests that install what they test."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.wheels import Environment, build_core, clean_environment


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the core, and the wheel that was built from it."""
    return build_core(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A clean virtual environment with the core installed from its wheel."""
    return clean_environment(tmp_path_factory.mktemp("clean"), built)
