"""``noether-init validate CONFIG``: what a config asks for, and everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noether_init_core.errors import ConfigError

__all__ = ["run"]


def run(
    config: Annotated[Path, typer.Argument(help="A YAML file: ours, or hp_resolved.yaml.", show_default=False)],
) -> None:
    """Check every entry of a config file against its kind. Reads no checkpoint."""
    from noether_init_core.config.files import load_config_file, validate_entry

    loaded = load_config_file(config)
    problems = 0
    for entry in loaded.entries:
        try:
            validated = validate_entry(entry)
        except ConfigError as error:
            problems += 1
            typer.echo(f"x {error}")
            continue
        part = f" for {'.'.join(entry.submodel)}" if entry.submodel else ""
        hooks = f", {', '.join(sorted(entry.hooks))} only" if entry.hooks is not None else ""
        typer.echo(f"= {entry.key_path}: {validated.kind}{part}{hooks}")
    if loaded.auto_resume:
        which = "good set" if loaded.on_invalid == "previous" else "set"
        typer.echo(f"= auto_resume: the newest {which} of this run comes before the list")
    typer.echo(f"initializers: {len(loaded.entries)}, problems: {problems}")
    if problems:
        raise typer.Exit(1)
