"""``noether-init inspect PATH``: the sets of a run, the runs of an output root, or the tensors of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
        _file(path)
    else:
        raise CheckpointNotFoundError(f"{path} does not exist. Next: noether-init", path=path, asked=str(path))


def _folder(path: Path) -> None:
    from noether_init_core.checkpoints.store import RunStore
    from noether_init_core.paths import PathProvider

    path = path.resolve()
    if path.name == "checkpoints":
        path = path.parent
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
            "= committed" if found.committed else "o legacy",
            str(iteration) if iteration is not None else "unknown",
            ", ".join(found.tags),
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
    Console().print(table)
    typer.echo(f"{len(tensors)} tensors, {total:,} bytes, {reader.format} format")
