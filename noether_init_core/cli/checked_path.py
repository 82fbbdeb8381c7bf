"""A path that was typed and cannot be a checkpoint: absent, or a text."""

from __future__ import annotations

import shlex
from pathlib import Path

from noether_init_core.errors import CheckpointFormatError, CheckpointNotFoundError
from noether_init_core.messages import listed, near

__all__ = ["check_path"]

_LOOKED_AT = 512


def check_path(path: Path) -> None:
    """Raise where ``path`` cannot be what was meant, with what is near to it and the next command.

    Raises ``CheckpointNotFoundError`` for an absent path, ``CheckpointFormatError`` for a config or another text.
    """
    if not path.exists():
        folder = next((parent for parent in path.parents if parent.is_dir()), Path())
        asked = path.relative_to(folder).parts[0] if path.is_relative_to(folder) and path != folder else path.name
        try:
            there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        except OSError:
            there = []
        found = near(asked, there, cutoff=0.5)
        nearest = f"Near: {', '.join(str(folder / name) for name in found)}. " if found else ""
        where = "this folder" if folder == Path() else str(folder)
        following = shlex.quote(str(folder / (found[0] if found else "")))
        raise CheckpointNotFoundError(
            f"{path} does not exist. {nearest}In {where} there are: {listed(there, 8, none='no files')}. "
            f"Next: noether-init inspect {following}",
            path=path,
            asked=str(path),
            candidates=found or there,
        )
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
        with path.open("rb") as file:
            if b"\0" in file.read(_LOOKED_AT):
                return
        raise CheckpointFormatError(
            f"{path} is text, no checkpoint. If it is a config: noether-init validate {shlex.quote(str(path))}",
            path=path,
        )
