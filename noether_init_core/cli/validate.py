"""``noether-init validate CONFIG``: what a config asks for, and everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noether_init_core.errors import ConfigError
from noether_init_core.observers.loading import describe_observer

__all__ = ["run"]


def run(
    config: Annotated[Path, typer.Argument(help="A YAML file: ours, or hp_resolved.yaml.", show_default=False)],
) -> None:
    """Check every entry of a config file against its kind, and what stands around them. Reads no checkpoint."""
    from noether_init_core.config.files import examine_config_file, problems_of, validate_entry

    loaded, found_around = examine_config_file(config)
    lines = [(_line(error), f"x {error}") for error in found_around]
    problems = len(found_around)
    for entry in [*loaded.entries, *([loaded.resume] if loaded.resume is not None else [])]:
        found = problems_of(entry)
        problems += len(found)
        lines += [(_line(error), f"x {error}") for error in found]
        if not found and entry is not loaded.resume:
            part = f" for {'.'.join(entry.submodel)}" if entry.submodel else ""
            hooks = f", {', '.join(sorted(entry.hooks))} only" if entry.hooks is not None else ""
            lines.append((entry.line or 0, f"ok {entry.key_path}: {validate_entry(entry).kind}{part}{hooks}"))
    for name in loaded.observers:
        try:
            lines.append((0, f"ok observers: {name} ({describe_observer(name).source})"))
        except ConfigError as error:
            problems += 1
            lines.append((0, f"x observers: {error}"))
    for _number, text in sorted(lines, key=lambda one: one[0]):
        typer.echo(text)
    if loaded.resume is not None and not problems_of(loaded.resume):
        which = "good set" if getattr(validate_entry(loaded.resume), "on_invalid", "") == "previous" else "set"
        typer.echo(f"ok auto_resume: the newest {which} of this run comes before the list")
    typer.echo(f"initializers: {len(loaded.entries)}, problems: {problems}")
    if problems:
        raise typer.Exit(1)


def _line(error: ConfigError) -> int:
    return getattr(error, "line", None) or 0
