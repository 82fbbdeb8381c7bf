"""Clean environments with wheels of strangers, for tests of the kit."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.wheels import ROOT, Environment, build_core, build_wheel, clean_environment

PACKAGES = Path(__file__).parent / "packages"
RANDOM = ROOT / "plugins" / "noether-init-random"
collect_ignore = ["packages"]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels of the core and of the strangers."""
    folder = build_core(tmp_path_factory.mktemp("wheels"))
    for project in [*sorted(PACKAGES.iterdir()), RANDOM]:
        build_wheel(project, folder)
    return folder


@pytest.fixture(scope="session")
def strangers(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the core and the strangers, none of them editable."""
    environment = clean_environment(tmp_path_factory.mktemp("strangers"), wheels)
    environment.pip("install", "--no-index", "--find-links", wheels, "acme-good", "acme-faulty", RANDOM.name)
    return environment
