"""Distributions of strangers, laid out on disk as pip would lay them out, for tests of entry points."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from noether_init_core import kinds

__all__ = ["INITIALIZER", "ForeignPackages"]

#: The source of a working kind of a stranger.
INITIALIZER = """
from noether_init_core.config.base import KindConfig
from noether_init_core.initializers.base import InitializerBase

class ConstantConfig(KindConfig):
    value: float = 0.0

class ConstantInitializer(InitializerBase):
    config_class = ConstantConfig

    def init_weights(self, model):
        for parameter in model.parameters():
            parameter.data.fill_(self.config.value)

    def init_optimizer(self, model):
        pass
"""


class ForeignPackages:
    """Installs distributions into a folder on ``sys.path`` and takes their modules out again at the end."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._modules_before = set(sys.modules)

    def install(
        self,
        name: str,
        *,
        offers: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
        version: str = "1.0",
        site: str = "site",
    ) -> Path:
        """Write the metadata and the modules of a distribution; return the folder of its metadata."""
        folder = self.folder / site
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nName: body\n")
        lines = [f"{kind} = {target}" for kind, target in (offers or {}).items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{kinds.GROUP}]", *lines, ""]))
        for module, source in (modules or {}).items():
            (folder / f"{module}.py").write_text(source)
        if str(folder) not in sys.path:
            self._monkeypatch.syspath_prepend(folder)
        kinds.clear_cache()
        return info

    def forget(self) -> None:
        """Drop the modules that were imported since, so that the next test imports its own."""
        for module in set(sys.modules) - self._modules_before:
            file = getattr(sys.modules[module], "__file__", None)
            if file is not None and Path(file).is_relative_to(self.folder):
                del sys.modules[module]
        kinds.clear_cache()
