"""The kind ``folder``: weights of every single model from a file of its name."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from noether_init_core import (
    CheckpointNotFoundError,
    KindConfig,
    LocateQuery,
    Source,
    SourceInitializer,
    SourceInitializerConfig,
)


class FolderConfig(SourceInitializerConfig):
    """The config of ``folder``."""

    folder: Path = Field(description="Where the files are.")


class FolderInitializer(SourceInitializer):
    """``encoder`` of the composite ``pair`` is read from ``pair.encoder.pt``."""

    config_class: ClassVar[type[KindConfig]] = FolderConfig
    contract: ClassVar[int] = 1
    config: FolderConfig

    def locate(self, query: LocateQuery) -> Source | None:
        if query.part != "model":
            return None
        path = self.config.folder / f"{query.model_name}.pt"
        if not path.is_file():
            there = sorted(found.name for found in self.config.folder.glob("*.pt"))
            raise CheckpointNotFoundError(
                f"{self.config.folder} has no {path.name}; it has {', '.join(there) or 'no file'}. "
                "Next: name the folder that has it",
                path=path,
                candidates=there,
            )
        return Source(path)
