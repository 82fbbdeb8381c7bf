"""``noether-init`` alone: what is here, and what to type next."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import attrs
import typer

from noether_init_core import kinds
from noether_init_core.errors import one_line

__all__ = ["run", "show_version"]

JSON_VERSION = 1
_SHOWN = 8
# A folder may hold anything; what is beyond is not looked at.
_MOST_ENTRIES = 500
_DEPTH = 3


@attrs.frozen
class _Run:
    """A folder with checkpoints, as seen from here, and the iteration of its newest committed set."""

    path: str
    newest: str | None


def show_version() -> None:
    """One line with the version."""
    typer.echo(f"noether-init-core {_version()}")


def run(*, as_json: bool) -> None:
    """Version, kinds, runs and configs below the current folder, and the next commands that fit to them."""
    names = sorted({info.name for info in kinds.installed() if "." not in info.name and info.blocked_by is None})
    runs = list(_runs(Path(), _DEPTH))
    configs = sorted(entry.name for entry in _entries(Path()) if entry.name.endswith((".yaml", ".yml")))
    following = _next(runs, configs)
    if as_json:
        said = {
            "format": "noether-init-overview",
            "version": JSON_VERSION,
            "core": _version(),
            "kinds": names,
            "runs": [attrs.asdict(one) for one in runs],
            "configs": configs,
            "next": [command for command, _what in following],
        }
        typer.echo(json.dumps(said, indent=1))
        return
    show_version()
    typer.echo(f"kinds    {_some(names)}")
    if runs:
        typer.echo(f"runs     {_some([f'{one.path} @ {one.newest}' if one.newest else one.path for one in runs])}")
    if configs:
        typer.echo(f"configs  {_some(configs)}")
    typer.echo("\nnext:")
    width = max(len(command) for command, _what in following)
    for command, what in following:
        typer.echo(f"  {command:<{width}}   {what}" if width < 50 else f"  {command}\n      {what}")


def _next(runs: list[_Run], configs: list[str]) -> list[tuple[str, str]]:
    found = []
    if runs:
        common = os.path.commonpath([one.path for one in runs])
        root = Path(common) if len(runs) > 1 else Path(common).parent
        found.append((f"noether-init inspect {shlex.quote(str(root))}", "what was saved"))
    if configs:
        chosen = shlex.quote("init.yaml" if "init.yaml" in configs else configs[0])
        found.append((f"noether-init validate {chosen}", "what it asks for, and what is wrong with it"))
        found.append((f"noether-init plan {chosen} --model module:callable", "what it will do to a model"))
    if not runs and not configs:
        found.append(("noether-init example previous_run", "a loop that runs, and its config, to begin with"))
    found.append(("noether-init kinds", "every kind, and who offers it"))
    found.append(("noether-init --help", "all commands"))
    return found[:3]


def _runs(folder: Path, depth: int) -> Iterator[_Run]:
    """Folders with checkpoints up to so many levels below; a folder of source code may be named checkpoints too."""
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if entry.name in (".", "checkpoints") or not entry.is_dir():
            continue
        checkpoints = path / "checkpoints"
        if checkpoints.is_dir():
            newest = _newest(checkpoints)
            if newest is not None or any(one.name.endswith(".th") for one in _entries(checkpoints)):
                yield _Run(str(path), newest)
        if depth > 1:
            yield from _runs(path, depth - 1)


def _newest(checkpoints: Path) -> str | None:
    """By the names of sets alone."""
    from noether_init_core.checkpoints.sets import SETS_FOLDER, set_folders

    if not (checkpoints / SETS_FOLDER).is_dir():
        return None
    committed = [one for one in set_folders(checkpoints) if one.committed]
    return str(committed[-1].iteration) if committed else None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            shown = (entry for entry in entries if not entry.name.startswith("."))
            return list(itertools.islice(shown, _MOST_ENTRIES))
    except OSError:
        return []


def _version() -> str:
    return importlib.metadata.version("noether-init-core")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return one_line(", ".join(names[:_SHOWN]) + more or "none")
