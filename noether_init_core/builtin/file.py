"""The kind ``file``: weights from any file that a reader opens."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pydantic

from noether_init_core.config.base import KindConfig
from noether_init_core.errors import CheckpointNotFoundError
from noether_init_core.files.storage.handle import digest_problem
from noether_init_core.initializers.base import LocateQuery, Source, SourceInitializerConfig
from noether_init_core.initializers.source import SourceInitializer
from noether_init_core.messages import listed


class FileInitializerConfig(SourceInitializerConfig):
    """The config of ``file``."""

    default_kind: ClassVar[str | None] = "file"

    path: Path = pydantic.Field(
        description="The file: .th, .pt, .pth, .ckpt or .bin as torch.save writes it, or .safetensors."
    )
    digest: str | None = pydantic.Field(
        default=None,
        description="Expected digest of the whole file: xxh3_128:... or sha256:...; it takes verify: full.",
    )

    @pydantic.field_validator("digest")
    @classmethod
    def _check_digest(cls, value: str | None, info: pydantic.ValidationInfo) -> str | None:
        if value is None:
            return None
        problem = digest_problem(value)
        verify = info.data.get("verify", "full")
        if not problem and verify != "full":
            problem = (
                f"a digest is compared by verify: full, the default; verify: {verify} would ignore it. "
                "Leave out one of the two"
            )
        if problem:
            raise ValueError(problem)
        return value


class FileInitializer(SourceInitializer):
    """Weights of one single model from one file; a relative path is meant from the working folder.

    A composite needs ``submodel``, since one file holds one model.
    """

    config_class: ClassVar[type[KindConfig]] = FileInitializerConfig
    contract: ClassVar[int] = 1
    one_model: ClassVar[bool] = True
    config: FileInitializerConfig

    def locate(self, query: LocateQuery) -> Source | None:
        """The file, for weights only. Raises ``CheckpointNotFoundError`` with what is in its folder."""
        if query.part != "model":
            return None
        try:
            path = self.config.path.expanduser()
        except RuntimeError as error:  # of an unknown user
            path = self.config.path
            raise CheckpointNotFoundError(
                f"path: {path} cannot be found: {error}. Next: the path in full", path=path, asked=str(path)
            ) from error
        if not path.exists():
            folder = path.parent
            if folder.is_dir():
                there = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
                raise CheckpointNotFoundError(
                    f"there is no file {path.name} in {folder}; there are: {listed(there, 8, none='no files')}",
                    path=path,
                    asked=path.name,
                    candidates=there,
                )
            raise CheckpointNotFoundError(f"there is no folder {folder}", path=path, asked=str(path))
        return Source(path, digests=self.config.digest)
