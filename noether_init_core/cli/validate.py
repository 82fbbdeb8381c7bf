"""``noether-init validate CONFIG``: what a config asks for, and everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["run"]


def run(
    config: Annotated[Path, typer.Argument(help="A YAML file: ours, or hp_resolved.yaml.", show_default=False)],
) -> None:
    """Check every entry of a config file against its kind. Reads no checkpoint."""
    from noether_init_core.config.files import load_config_file, problems_of, validate_entry

    loaded = load_config_file(config)
    lines: list[tuple[int, str]] = []
    problems = 0
    for entry in loaded.entries:
        found = problems_of(entry)
        problems += len(found)
        lines += [(getattr(error, "line", None) or 0, f"x {error}") for error in found]
        if not found:
            part = f" for {'.'.join(entry.submodel)}" if entry.submodel else ""
            hooks = f", {', '.join(sorted(entry.hooks))} only" if entry.hooks is not None else ""
            lines.append((entry.line or 0, f"ok {entry.key_path}: {validate_entry(entry).kind}{part}{hooks}"))
    for _line, text in sorted(lines, key=lambda one: one[0]):
        typer.echo(text)
    if loaded.auto_resume:
        which = "good set" if loaded.on_invalid == "previous" else "set"
        typer.echo(f"ok auto_resume: the newest {which} of this run comes before the list")
    typer.echo(f"initializers: {len(loaded.entries)}, problems: {problems}")
    if problems:
        raise typer.Exit(1)
