"""The one place that puts a new package on disk."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from noether_init_core.errors import ConfigError


def check_absent(folder: Path) -> None:
    """Raise ``ConfigError`` where ``folder`` exists, be it as a file or as a link to nothing, or has no parent."""
    if not folder.parent.is_dir():
        raise ConfigError(f"--into {folder.parent} is no folder. Next: mkdir -p {folder.parent}, or another --into")
    if os.path.lexists(folder):
        raise ConfigError(
            f"{folder} exists, and nothing was changed in it. Next: another name, or --into another folder"
        )


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Write ``files`` (path with ``/`` -> text) as the new ``folder``: all of them, or nothing.

    They are written into a hidden folder beside it, which gets the name at the end. Only a kill leaves that one behind.
    Raises ``ConfigError`` where ``folder`` exists or cannot be written.
    """
    check_absent(folder)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        for name, text in files.items():
            path = partial.joinpath(*name.split("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        check_absent(folder)  # somebody may have made it meanwhile
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} could not be written, and nothing is left behind: {error}. Next: --into another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
