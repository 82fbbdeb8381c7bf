"""``noether-init inspect PATH``: the sets of a run, the runs of an output root, or the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noether_init_core.cli.asked_path import absent, text_instead
from noether_init_core.errors import CheckpointNotFoundError

if TYPE_CHECKING:
    from noether_init_core.checkpoints.store import RunStore

__all__ = ["run"]


def run(
    path: Annotated[
        Path, typer.Argument(help="A run folder, an output root, or a checkpoint file.", show_default=False)
    ],
) -> None:
    """Show what a folder or a file holds. Only headers are read, and nothing is created."""
    if path.is_dir():
        _folder(path)
    elif path.exists():
        error = text_instead(path)
        if error is not None:
            raise error
        _file(path)
    else:
        raise absent(path)


def _folder(path: Path) -> None:
    from noether_init_core.checkpoints.store import RunStore
    from noether_init_core.paths import PathProvider

    path = path.resolve()
    if path.name == "sets" and path.parent.name == "checkpoints":
        path = path.parent
    if path.name == "checkpoints":
        path = path.parent
    if path.parent.name == "sets" and path.parents[1].name == "checkpoints":
        run = path.parents[2]
        raise CheckpointNotFoundError(
            f"{path} is a set of run {run.name}. Next: noether-init inspect {_short(run)}", path=path, asked=str(path)
        )
    below = RunStore(PathProvider(path, "run"))
    own = RunStore(PathProvider(path.parent, path.name or "run"))
    if own.folder.is_dir():
        _sets(own, path.name)
    stages = own.stages()
    for stage in stages:
        _sets(RunStore(PathProvider(path.parent, path.name, stage)), f"{path.name}/{stage}")
    if stages or own.folder.is_dir():
        return
    runs = below.runs()
    if not runs:
        raise CheckpointNotFoundError(
            f"{path} holds no run: there is no folder named checkpoints in it, nor one or two levels below. "
            "Next: noether-init inspect PATH, with an output root, a run folder or a file",
            path=path,
            asked=str(path),
        )
    for name in runs:
        stages = below.stages(name)
        typer.echo(f"{name}{': stages ' + ', '.join(stages) if stages else ''}")
    typer.echo(f"\n{len(runs)} runs. Next: noether-init inspect {path / runs[0]}")


def _sets(store: RunStore, title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", title=Text(title), title_justify="left")
    for column in ("", "iteration", "tags", "weights", "optimizer", "trainer"):
        table.add_column(column, overflow="fold", no_wrap=column in ("", "iteration"))
    for found in reversed(store.sets()):
        iteration = store.iteration_of(found)
        weights = [
            f"{file.model} ({file.info})" if file.info else file.model for file in found.files if file.part == "model"
        ]
        cells = [
            "committed" if found.committed else "legacy",
            str(iteration) if iteration is not None else "unknown",
            # the tag of its own iteration stands in the column before
            ", ".join(tag for tag in found.tags if tag != str(iteration)),
            ", ".join(weights),
            ", ".join(found.models("optim")),
            ", ".join(found.models("trainer")),
        ]
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)
    for name in store.uncommitted():
        typer.echo(f"- {name}: uncommitted, never picked")
    broken = store.broken()
    for error in broken:
        typer.echo(f"x {error}")
    if broken:
        raise typer.Exit(1)


def _file(path: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from noether_init_core.checkpoints.reader import open_checkpoint

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "dtype", "shape"):
        table.add_column(column, overflow="fold")
    with open_checkpoint(path) as reader:
        tensors = reader.tensors
        for key, info in tensors.items():
            shape = ", ".join(str(size) for size in info.shape)
            table.add_row(Text(str(key)), Text(info.dtype), Text(f"[{shape}]"))
        total = sum(info.nbytes for info in tensors.values())
        facts = _facts(reader.metadata)
    Console().print(table)
    for fact in facts:
        typer.echo(fact)
    typer.echo(f"{len(tensors)} tensors, {total:,} bytes, {reader.format} format")


def _facts(metadata: Mapping[str, Any]) -> list[str]:
    """What a file says besides tensors, a line each: run, iteration, and of a loop seed, names, place in the data.

    The file may be anybody's, so nothing is taken for granted.
    """
    state = _mapping(metadata, "trainer_state")
    loader = _mapping(state, "loader")
    said = {
        "run": metadata.get("run_id"),
        "iteration": ", ".join(f"{name} {count}" for name, count in _mapping(metadata, "training_iteration").items()),
        "seed": state.get("seed"),
        "with state": ", ".join(map(str, _mapping(state, "stateful"))),
        "callbacks": ", ".join(map(str, _mapping(metadata, "callback_state_dicts"))),
        "data": f"{loader['batch']} batches of this epoch are consumed" if "batch" in loader else None,
    }
    return [_printable(f"{name}: {value}") for name, value in said.items() if value not in (None, "")]


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _printable(text: str) -> str:
    shown = text if len(text) <= 200 else text[:197] + "..."
    return "".join(character if character.isprintable() else "?" for character in shown)


def _short(path: Path) -> Path:
    """Below the current folder as it is seen from there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
