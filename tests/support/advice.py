"""Does what a message advises: pastes a line into the config that failed, and compares files before and after."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["digests", "fixes_of", "pasted"]

_PLACE = re.compile(r"(?:(?P<inside>\w+) of )?(?P<path>[\w.]+), (?P<file>[\w.]+):(?P<line>\d+)$")


def digests(folder: Path) -> dict[str, str]:
    """Relative path of each file below ``folder`` -> digest of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fixes_of(output: str) -> list[str]:
    """The lines that a plan on a wide terminal marks with ``fix:``."""
    return [line.partition("fix: ")[2] for line in output.splitlines() if line.strip().startswith("fix: ")]


def pasted(config: Path, line: str) -> None:
    """Add a line to the config file, at the place that its comment names; without one, at the root.

    A field that is there already gets the new value; an item is appended to its list.
    """
    # as the project reads it: every scalar is a text
    document, added = (yaml.load(text, Loader=yaml.BaseLoader) for text in (config.read_text(), line))
    comment = line.partition("  # ")[2]
    place = _PLACE.search(comment)
    target: Any = document
    if place is not None:
        assert place["file"] == config.name
        assert int(place["line"]) <= len(config.read_text().splitlines())
        for key in place["path"].split("."):
            target = target[int(key) if isinstance(target, list) else key]
    if isinstance(added, list):
        assert place is not None, line
        rules = target[place["inside"]]
        target[place["inside"]] = [*added, *rules] if comment.startswith("first in ") else [*rules, *added]
    else:
        assert isinstance(added, Mapping), line
        target.update(added)
    config.write_text(yaml.safe_dump(document, sort_keys=False))
