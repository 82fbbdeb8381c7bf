"""``noether-init`` alone: what is here, and what to type next."""

from __future__ import annotations

import collections
import importlib.metadata
import itertools
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import typer

from noether_init_core.cli.output import show, show_commands, show_json
from noether_init_core.cli.usage import configs_here, plain_kinds
from noether_init_core.errors import InitError
from noether_init_core.messages import listed
from noether_init_core.paths import PathProvider

_SHOWN = 8
# A folder may hold anything; what is beyond is not looked at.
_MOST_ENTRIES = 500
_MOST_FOLDERS = 2_000
_DEPTH = 3


def show_version() -> None:
    """One line with the version."""
    typer.echo(f"noether-init-core {_version()}")


def run(*, as_json: bool) -> None:
    """Version, kinds, runs and configs below the current folder, and the next commands that fit to them."""
    names = plain_kinds()
    runs = dict(sorted(_runs()))
    configs = configs_here()
    following = _next(runs, configs)
    if as_json:
        found = [{"path": path, "newest": newest} for path, newest in runs.items()]
        commands = [command for command, _what in following]
        said = {"core": _version(), "kinds": names, "runs": found, "configs": configs, "next": commands}
        show_json("overview", said)
        return
    show_version()
    shown = [f"{path} @ {newest}" if newest else path for path, newest in runs.items()]
    for what, some in (("kinds", names), ("runs", shown), ("configs", configs)):
        if some or what == "kinds":
            show(f"{what:<7}  {listed(some, _SHOWN, none='none')}")
    show_commands(following)


def _next(runs: Mapping[str, str | None], configs: list[str]) -> list[tuple[str, str]]:
    found = []
    if runs:
        common = os.path.commonpath(list(runs))
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


def _runs() -> Iterator[tuple[str, str | None]]:
    """Folders with checkpoints some levels below, near ones first, each with the iteration of its newest set.

    A folder of source code may be named checkpoints, too.
    """
    for path in itertools.islice(_folders(), _MOST_FOLDERS):
        if os.path.isdir(path / "checkpoints"):
            yield from _run(path)


def _folders() -> Iterator[Path]:
    """Folders below the current one, level by level."""
    waiting = collections.deque([Path()])
    while waiting:
        above = waiting.popleft()
        for entry in sorted(_entries(above), key=lambda entry: entry.name):
            if entry.name != "checkpoints" and os.path.isdir(entry):  # no error where nobody may look
                path = above / entry.name
                yield path
                if len(path.parts) < _DEPTH:
                    waiting.append(path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            shown = (entry for entry in entries if not entry.name.startswith("."))
            return list(itertools.islice(shown, _MOST_ENTRIES))
    except OSError:
        return []


def _run(path: Path) -> Iterator[tuple[str, str | None]]:
    """With the iteration of the newest manifest, or else as names of flat files tell it; nothing where neither is."""
    from noether_init_core.sets.snapshot import Snapshot

    try:
        snapshot = Snapshot(PathProvider(path.resolve().parent, path.resolve().name))
        newest = snapshot.newest_folder or next(iter(snapshot.flat), None)
    except InitError:  # inspect tells it
        yield str(path), None
        return
    if newest is not None:
        yield str(path), None if newest.iteration is None else str(newest.iteration)


def _version() -> str:
    return importlib.metadata.version("noether-init-core")
