"""The kind ``file``: weights from any file that a reader opens."""

from __future__ import annotations

from typing import ClassVar

import pydantic

from noether_init_core.config.base import KindConfig
from noether_init_core.config.source import LocalPath, SourceInitializerConfig
from noether_init_core.files.storage.handle import digest_problem
from noether_init_core.initializers.base import LocateQuery, Source
from noether_init_core.initializers.source import SourceInitializer


class FileInitializerConfig(SourceInitializerConfig):
    """The config of ``file``."""

    kind: str = "file"
    path: LocalPath = pydantic.Field(
        description="The file: .th, .pt, .pth, .ckpt or .bin as torch.save writes it, or .safetensors."
    )
    digest: str | None = pydantic.Field(
        default=None,
        description="Expected digest of the whole file: xxh3_128:... or sha256:...; it takes verify: full.",
    )

    @pydantic.field_validator("digest")
    @classmethod
    def _check_digest(cls, value: str | None, info: pydantic.ValidationInfo) -> str | None:
        problem, verify = "" if value is None else digest_problem(value), info.data.get("verify", "full")
        if value is not None and not problem and verify != "full":
            problem = (
                f"a digest is compared by verify: full, the default; verify: {verify} would ignore it. "
                "Leave out one of the two"
            )
        if problem:
            raise ValueError(problem)
        return value


class FileInitializer(SourceInitializer):
    """Weights of one single model from one file; a relative path starts at the working folder.

    A composite needs ``submodel``, because one file holds one model.
    """

    config_class: ClassVar[type[KindConfig]] = FileInitializerConfig
    contract: ClassVar[int] = 1
    one_model: ClassVar[bool] = True
    config: FileInitializerConfig

    def locate(self, query: LocateQuery) -> Source | None:
        """The file, for weights only; ``open`` checks whether it exists."""
        if query.part != "model":
            return None
        return Source(self.config.path, digests=self.config.digest)
