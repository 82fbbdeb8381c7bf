"""``noether-init verify PATH``: every set or file below a path, verified in full; what is wrong, and what to use."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noether_init_core.errors import CheckpointNotFoundError

if TYPE_CHECKING:
    from noether_init_core.checkpoints.audit import AuditedFile, AuditedStore

__all__ = ["run"]

JSON_VERSION = 1
_MARKS = {
    "good": ("= good", "green"),
    "nonfinite": ("! nonfinite", "yellow"),
    "broken": ("x broken", "red"),
    "uncommitted": ("- uncommitted", "dim"),
}
_PATIENCE_S = 1.0


def run(
    path: Annotated[
        Path,
        typer.Argument(help="A file, a folder of checkpoints, a run folder, or an output root.", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object.")] = False,
) -> None:
    """Verify every set: digests, checksums, structure, iterations. Changes nothing.

    Exit code 0: all is as it was written. 1: something is broken, or cannot be chosen from. Sets with NaN are marked,
    and unfinished saves, which nobody ever picks, are listed; neither is a problem.
    """
    from noether_init_core.checkpoints.audit import audit_file, audit_store, bytes_of, stores_at

    if not path.exists():
        raise CheckpointNotFoundError(f"{path} does not exist. Next: noether-init", path=path, asked=str(path))
    files: list[AuditedFile] = []
    audited: list[AuditedStore] = []
    if path.is_dir():
        stores = stores_at(path)
        with _progress(sum(bytes_of(store) for store in stores)) as advance:
            audited = [audit_store(store, advance) for store in stores]
    else:
        with _progress(path.stat().st_size) as advance:
            files = [audit_file(path, advance)]
    problems = sum(one.problem_count for one in audited) + sum(bool(one.problem) for one in files)
    if as_json:
        typer.echo(json.dumps(_as_data(path, audited, files, problems), indent=1))
    else:
        _show(audited, files, problems)
    if problems:
        raise typer.Exit(1)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error, for those who have waited for a second."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=total)
    timer = threading.Timer(_PATIENCE_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done: bar.advance(task, done)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def _show(audited: Sequence[AuditedStore], files: Sequence[AuditedFile], problems: int) -> None:
    for store in audited:
        _show_store(store)
    for file in files:
        note = f" ({file.note})" if file.note else ""
        good = f"= {file.path}: {file.tensors} tensors, {file.bytes:,} bytes{note}"
        typer.echo(f"x {file.problem}" if file.problem else good)
    sets = sum(one.state != "uncommitted" for store in audited for one in store.sets)
    counted = f"sets: {sets}" if audited else f"files: {len(files)}"
    typer.echo(f"{counted}, problems: {problems}")


def _show_store(store: AuditedStore) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from noether_init_core.checkpoints.usable import summary

    title = f"{store.run_id}/{store.stage_name}" if store.stage_name is not None else store.run_id
    table = Table(box=None, pad_edge=False, header_style="bold", title=Text(title), title_justify="left")
    # the folder of a committed set has its iteration in its name
    with_iterations = any(one.iteration is not None and one.iteration not in one.name for one in store.sets)
    for column in ("", "set", *(["iteration"] if with_iterations else []), "tags", "files", "bytes"):
        is_number = column in ("files", "bytes")
        table.add_column(column, overflow="fold", no_wrap=column != "tags", justify="right" if is_number else "left")
    for one in store.sets:
        mark, style = _MARKS[one.state]
        numbers = [str(one.files), f"{one.bytes:,}"] if one.files else ["", ""]
        iteration = [one.iteration or "unknown"] if with_iterations else []
        table.add_row(
            Text(mark, style), *(Text(cell) for cell in (one.name, *iteration, ", ".join(one.tags), *numbers))
        )
    if store.sets:
        Console().print(table)
    else:
        typer.echo(f"{title}\nno sets")
    for one in store.sets:
        for problem in one.problems:
            typer.echo(f"x {one.name}: {_short(problem, store.folder, one.name)}")
        if one.nonfinite:
            typer.echo(f"! {one.name}: {summary(one.nonfinite)}; a resume refuses it (on_nonfinite: error)")
        for note in one.notes:
            typer.echo(f"- {one.name}: {note}")
        if one.state == "uncommitted":
            typer.echo(f"- {one.name}: a save that was never finished; never picked")
    if any(one.state in ("good", "nonfinite") and not one.is_committed for one in store.sets):
        typer.echo("no manifests: every file was compared with the checksums inside it")
    for problem in store.problems:
        typer.echo(f"x {problem}")
    if store.newest_good is not None and store.newest_good.state == "nonfinite":
        typer.echo(f"no finite set. To start from {store.newest_good.name} all the same:\n  {store.use}")
    elif store.newest_good is not None:
        typer.echo(f"newest good set: {store.newest_good.name}. To start from it:\n  {store.use}")
    elif store.sets:
        typer.echo("no good set")
    typer.echo("")


def _short(text: str, folder: Path, name: str) -> str:
    """Without the folders that the line has named already."""
    from noether_init_core.checkpoints.sets import SETS_FOLDER

    return text.replace(f"{folder / SETS_FOLDER / name}/", "").replace(f"{folder}/", "")


def _as_data(
    path: Path, audited: Sequence[AuditedStore], files: Sequence[AuditedFile], problems: int
) -> dict[str, Any]:
    import attrs

    def plain(_instance: Any, _attribute: Any, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    return {
        "version": JSON_VERSION,
        "path": str(path),
        "problems": problems,
        "runs": [attrs.asdict(one, value_serializer=plain) for one in audited],
        "files": [attrs.asdict(one, value_serializer=plain) for one in files],
    }
