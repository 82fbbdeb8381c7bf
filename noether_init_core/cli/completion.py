"""What a shell offers when Tab is pressed. Nothing of a plugin is imported, and nothing is ever raised to a shell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["configs", "kind_names"]


def kind_names(incomplete: str) -> Iterator[tuple[str, str]]:
    """Installed kinds that begin so, with the distribution that offers them."""
    from noether_init_core import kinds

    for info in kinds.installed():
        if info.blocked_by is None and info.name.startswith(incomplete) and ("." not in info.name or "." in incomplete):
            yield info.name, info.source


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
        if is_meant and shown.startswith(incomplete) and not entry.name.startswith("."):
            yield shown
