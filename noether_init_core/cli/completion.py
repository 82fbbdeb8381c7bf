"""What a shell offers when Tab is pressed. Nothing of a plugin is imported, and nothing is ever raised to a shell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["configs", "kind_names"]

# Shells evaluate parts of what they are offered; a name with anything else is typed by hand.
_HARMLESS = re.compile(r"[\w./+@%,=-]+")


def kind_names(incomplete: str) -> Iterator[tuple[str, str]]:
    """Installed kinds that begin so, with the distribution that offers them."""
    from noether_init_core import kinds

    for info in kinds.installed():
        is_meant = info.name.startswith(incomplete) and ("." not in info.name or "." in incomplete)
        if info.blocked_by is None and is_meant and _HARMLESS.fullmatch(info.name):
            described = info.source if re.fullmatch(r"[\w. +-]+", info.source) else ""
            yield info.name, described


def configs(incomplete: str) -> Iterator[str]:
    """YAML files and folders that begin so."""
    parent = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    try:
        entries = sorted(parent.iterdir())
    except OSError:
        return
    for entry in entries:
        shown = f"{entry}/" if entry.is_dir() else str(entry)
        is_meant = entry.is_dir() or entry.suffix in (".yaml", ".yml")
        is_meant = is_meant and shown.startswith(incomplete) and not entry.name.startswith(".")
        if is_meant and _HARMLESS.fullmatch(shown):
            yield shown
