"""``noether-init`` alone: what is here, and what to type next."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import typer

from noether_init_core import kinds

__all__ = ["run", "show_version"]

_SHOWN = 10


def show_version() -> None:
    """One line with the version."""
    typer.echo(f"noether-init-core {_version()}")


def run() -> None:
    """Version, kinds, runs below the current folder, and the next commands."""
    show_version()
    names = sorted({info.name for info in kinds.installed() if "." not in info.name})
    typer.echo(f"kinds: {_some(names)}")
    runs = _runs()
    if runs:
        typer.echo(f"runs below this folder: {_some(runs)}")
    typer.echo("\nnext:")
    typer.echo("  noether-init kinds                 every kind, and who offers it")
    typer.echo("  noether-init inspect PATH          a run folder, an output root, or a file")
    typer.echo("  noether-init validate init.yaml    what a config asks for, and what is wrong with it")


def _version() -> str:
    return importlib.metadata.version("noether-init-core")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more or "none"


def _runs() -> list[str]:
    from noether_init_core.checkpoints.store import RunStore
    from noether_init_core.paths import PathProvider

    store = RunStore(PathProvider(Path.cwd(), "run"))
    return [
        name
        for name in store.runs()
        # a folder of source code may be named checkpoints too
        if any(
            next(folder.glob("*.th"), None) is not None or (folder / "sets").is_dir()
            for folder in (Path(name, *stage, "checkpoints") for stage in [(), *((one,) for one in store.stages(name))])
        )
    ]
