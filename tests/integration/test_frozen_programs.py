"""What PyInstaller is told, so that a frozen program finds kinds; PyInstaller itself is not needed here."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

from support.foreign import INITIALIZER, ForeignPackages

import noether_init_core
from noether_init_core import kinds
from noether_init_core.__pyinstaller import hook_folders
from noether_init_core.kinds.lookup import OBSERVERS

PACKAGE = Path(noether_init_core.__file__).parent


def _hook() -> dict[str, Any]:
    """The names that the hook defines, run as PyInstaller runs it."""
    (folder,) = hook_folders()
    return runpy.run_path(str(Path(folder) / "hook-noether_init_core.py"))


def test_every_kind_and_observer_that_is_installed_goes_into_a_frozen_program(foreign: ForeignPackages) -> None:
    """Its module is a hidden import, and the metadata of its distribution is copied; a stranger's, too."""
    info = foreign.install(
        "acme-init", offers={"acme": "acme_kind:ConstantInitializer"}, modules={"acme_kind": INITIALIZER}
    )
    hook = _hook()
    offered = [*kinds.installed(), *OBSERVERS.all()]
    assert {"acme", "file", "previous_run", "random", "resume", "timing"} <= {one.name for one in offered}
    assert {one.target.partition(":")[0] for one in offered} <= set(hook["hiddenimports"])
    assert (str(info), "acme_init-1.0.dist-info") in hook["datas"]
    copied = {target.partition("-")[0] for source, target in hook["datas"] if target.endswith(".dist-info")}
    assert copied == {one.distribution.replace("-", "_") for one in offered if one.distribution is not None}


def test_the_front_finds_its_names_in_a_frozen_program() -> None:
    """Its stub is data, and every module that the stub names is a hidden import that exists."""
    hook = _hook()
    assert (str(PACKAGE / "__init__.pyi"), "noether_init_core") in hook["datas"]
    assert all(Path(source).exists() for source, _target in hook["datas"])
    homes = {getattr(noether_init_core, name).__module__ for name in ("InitializerStack", "CheckpointWriter", "bind")}
    assert homes <= set(hook["hiddenimports"])
    assert [name for name in hook["hiddenimports"] if importlib.util.find_spec(name) is None] == []


def test_of_a_distribution_that_is_found_twice_the_first_one_is_frozen(foreign: ForeignPackages) -> None:
    """As a kind comes from the first one on the import path."""
    foreign.install("acme-init", offers={"acme": "older:K"}, version="1.0", site="later")
    first = foreign.install("acme-init", offers={"acme": "newer:K"}, version="2.0", site="sooner")
    hook = _hook()
    assert [source for source, target in hook["datas"] if target.startswith("acme_init")] == [str(first)]
    assert {"newer", "older"} & set(hook["hiddenimports"]) == {"newer"}


def test_a_distribution_without_kinds_is_not_frozen_for_us(foreign: ForeignPackages) -> None:
    """Other packages are the business of the program."""
    foreign.install("acme-tools")
    assert not any(target.startswith("acme_tools") for _source, target in _hook()["datas"])
