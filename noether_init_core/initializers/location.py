"""Where the weights or state of one model lie: what a kind is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from noether_init_core.files.verification import Digests

__all__ = ["LocateQuery", "Part", "Source"]

Part = Literal["model", "optim", "trainer"]


@attrs.frozen(eq=False)
class LocateQuery:
    """What ``SourceInitializer.locate`` is asked for.

    Attributes:
        model_name: The name in the files; for a submodel the path of names, such as ``autoenc.encoder``.
        path: The path of names of the single model in the model that is initialized.
        part: ``model`` for weights, ``optim`` for optimizer state, ``trainer`` for the trainer's state.
        model: The single model; None where it is not known yet.
    """

    model_name: str
    path: str = ""
    part: Part = "model"
    model: Any = None


@attrs.frozen
class Source:
    """Where weights or state lie.

    Attributes:
        location: The file.
        digests: The digest of the whole file, as ``xxh3_128:...`` or ``sha256:...``, or all that is known of it; with
            ``verify: full`` the bytes are compared with them on the handle that they are read from.
        entry: Which tree of the file; None for the state dict.
        origin: Where it came from, for people and reports: run_id, stage_name, tag, iteration.
    """

    location: Path = attrs.field(converter=Path)
    digests: Digests | str | None = attrs.field(default=None, repr=lambda found: repr(found)[:80])
    entry: str | None = None
    origin: Mapping[str, str] = attrs.Factory(dict)

    @property
    def digest(self) -> str | None:
        """The digest of the whole file, where it is known."""
        return self.digests.file if isinstance(self.digests, Digests) else self.digests

    def describe(self) -> str:
        """The origin in words."""
        if not self.origin:
            return str(self.location)
        run = "/".join(self.origin[key] for key in ("run_id", "stage_name") if key in self.origin)
        tag, iteration = self.origin.get("tag"), self.origin.get("iteration")
        words = [run, f"@ {tag}" if tag else "", f"= {iteration}" if iteration and iteration != tag else ""]
        return " ".join(word for word in words if word)
