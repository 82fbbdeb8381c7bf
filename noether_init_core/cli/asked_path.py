"""What is said of a path that cannot be what was meant: one that is absent, or a text."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path

from noether_init_core.errors import CheckpointFormatError, CheckpointNotFoundError

__all__ = ["absent", "text_instead"]

_SHOWN = 8
_LOOKED_AT = 512
_CONFIGS = (".yaml", ".yml")


def absent(path: Path) -> CheckpointNotFoundError:
    """The error for a path that does not exist: what is near to it, and what is there."""
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    asked = path.relative_to(folder).parts[0] if path.is_relative_to(folder) and path != folder else path.name
    try:
        there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        there = []
    near = difflib.get_close_matches(asked, there, n=3, cutoff=0.5)
    more = f" and {len(there) - _SHOWN} more" if there[_SHOWN:] else ""
    said = f"Near: {', '.join(str(folder / name) for name in near)}. " if near else ""
    where = "this folder" if folder == Path() else str(folder)
    said += f"In {where} there are: {', '.join(there[:_SHOWN])}{more}" if there else f"In {where} there is nothing"
    following = near[0] if near else ""
    return CheckpointNotFoundError(
        f"{path} does not exist. {said}. Next: noether-init inspect {shlex.quote(str(folder / following))}",
        path=path,
        asked=str(path),
        candidates=near or there,
    )


def text_instead(path: Path) -> CheckpointFormatError | None:
    """The error for a config or another text where a checkpoint is expected; None for anything else."""
    if path.suffix.lower() not in _CONFIGS or not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(_LOOKED_AT)
    if b"\0" in head:
        return None
    return CheckpointFormatError(
        f"{path} is text, no checkpoint. If it is a config, noether-init validate {shlex.quote(str(path))} checks it",
        path=path,
    )
