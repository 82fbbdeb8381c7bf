"""``noether-init verify PATH``: every set or file below a path, verified in full; what is wrong, and what to use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noether_init_core.cli.asked_path import absent, text_instead
from noether_init_core.cli.progress import progress
from noether_init_core.errors import CheckpointError

if TYPE_CHECKING:
    from noether_init_core.sets.health import AuditedFile, AuditedStore

__all__ = ["run"]

JSON_VERSION = 1
_MARKS = {
    "good": ("= good", "green"),
    "unverifiable": ("? unverifiable", "yellow"),
    "nonfinite": ("! nonfinite", "yellow"),
    "broken": ("x broken", "red"),
    "uncommitted": ("- uncommitted", "dim"),
}


def run(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Files, folders of checkpoints, run folders, or output roots.",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object.")] = False,
    flat: Annotated[
        bool, typer.Option("--flat", help="Compare the flat files that our saves wrote for Noether with their sets.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 also for what cannot be verified: files without checksums.")
    ] = False,
) -> None:
    """Verify every set: digests, checksums, structure, iterations. Changes nothing.

    Exit code 0: all is as it was written, or cannot be verified for want of checksums (1 with --strict). 1: something
    is broken, or cannot be chosen from. Sets with NaN are marked, and unfinished saves, which nobody ever picks, are
    listed; neither is a problem. Flat files beside committed sets are copies for Noether; without --flat they are
    counted and not read.
    """
    if not all(paths):
        raise typer.BadParameter("it is empty. For the working folder: .", param_hint="PATH")
    files: list[AuditedFile] = []
    audited: list[AuditedStore] = []
    for path in map(Path, dict.fromkeys(paths)):
        try:
            _verify(path, audited, files, flat=flat)
        except CheckpointError as error:
            if len(paths) == 1:
                raise
            files.append(_unusable(path, error))
    problems = sum(one.problem_count for one in audited) + sum(bool(one.problem) for one in files)
    states = [one.state for one in files] + [one.state for store in audited for one in store.sets]
    unverifiable = states.count("unverifiable")
    if as_json:
        typer.echo(json.dumps(_as_data(paths, audited, files, problems, unverifiable), indent=1))
    else:
        _show(audited, files, problems, unverifiable)
    if problems or (strict and unverifiable):
        raise typer.Exit(1)


def _verify(path: Path, audited: list[AuditedStore], files: list[AuditedFile], *, flat: bool) -> None:
    """Verify what is at one path. Raises ``CheckpointError`` where nothing is that could be verified."""
    from noether_init_core.sets.flat_health import flat_bytes
    from noether_init_core.sets.health import audit_file, audit_store, bytes_of, stores_at

    if not path.exists():
        raise absent(path)
    if path.is_dir():
        stores = stores_at(path)
        total = sum(bytes_of(store) + (flat_bytes(store) if flat else 0) for store in stores)
        with progress("verifying", total) as advance:
            audited += [audit_store(store, advance, asked=path, flat=flat) for store in stores]
        return
    error = text_instead(path)
    if error is not None:
        raise error
    with progress("verifying", path.stat().st_size) as advance:
        files.append(audit_file(path, advance))


def _unusable(path: Path, error: CheckpointError) -> AuditedFile:
    from noether_init_core.sets.health import AuditedFile

    return AuditedFile(path, "broken", problem=str(error))


def _show(audited: Sequence[AuditedStore], files: Sequence[AuditedFile], problems: int, unverifiable: int) -> None:
    for store in audited:
        _show_store(store)
    for file in files:
        mark = _MARKS[file.state][0]
        note = f" ({file.note})" if file.note else ""
        good = f"{mark} {file.path}: {file.tensors} tensors, {file.bytes:,} bytes{note}"
        typer.echo(f"{mark} {file.problem}" if file.problem else good)
    sets = sum(one.state != "uncommitted" for store in audited for one in store.sets)
    counted = ([f"sets: {sets}"] if audited else []) + ([f"files: {len(files)}"] if files else [])
    if unverifiable:
        counted.append(f"unverifiable: {unverifiable}")
    typer.echo(", ".join([*counted, f"problems: {problems}"]))


def _show_store(store: AuditedStore) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from noether_init_core.sets.nonfinite_sets import summary

    title = f"{store.run_id}/{store.stage_name}" if store.stage_name is not None else store.run_id
    title += f"  {_from_here(store.folder)}"
    table = Table(box=None, pad_edge=False, header_style="bold")
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
    typer.echo(title)  # not the table's, which would break it to its own width
    if store.sets:
        Console().print(table)
    else:
        typer.echo("no sets")
    for one in store.sets:
        for problem in one.problems:
            typer.echo(f"x {one.name}: {_short(problem, store.folder, one.name)}")
        if one.nonfinite:
            typer.echo(f"! {one.name}: {summary(one.nonfinite)}; a resume refuses it (on_nonfinite: error)")
        for note in one.notes:
            typer.echo(f"- {one.name}: {note}")
        if one.state == "uncommitted":
            typer.echo(f"- {one.name}: a save that was never finished; never picked")
    if store.flat.files:
        typer.echo(_flat_words(store))
    for name in store.flat.changed:
        typer.echo(f"- {name} was written over since our save: by another program, or it is damaged")
    for problem in store.flat.problems:
        typer.echo(f"x {_short(problem, store.folder, '')}")
    if any(one.state in ("good", "nonfinite") and not one.is_committed for one in store.sets):
        typer.echo("no manifests: every file was compared with the checksums inside it")
    for problem in store.problems:
        typer.echo(f"x {problem}")
    if store.newest_good is not None and store.newest_good.state == "nonfinite":
        typer.echo(f"no finite set. To start from {store.newest_good.name} all the same:\n  {store.use}")
    elif store.newest_good is not None:
        typer.echo(f"newest good set: {store.newest_good.name}. To start from it:\n  {store.use}")
    elif store.use:
        typer.echo(f"no set could be verified. To start from the newest all the same:\n  {store.use}")
    elif store.sets:
        typer.echo("no good set")
    typer.echo("")


def _short(text: str, folder: Path, name: str) -> str:
    """Without the folders that the line has named already."""
    from noether_init_core.sets.checkpoint_set import SETS_FOLDER

    return text.replace(f"{folder / SETS_FOLDER / name}/", "").replace(f"{folder}/", "")


def _flat_words(store: AuditedStore) -> str:
    flat = store.flat
    if flat.compared == 0:
        return (
            f"- {flat.files} flat files were not read: they are copies for Noether (--flat compares those of our saves)"
        )
    good = flat.compared - len(flat.problems)
    rest = flat.files - flat.compared
    words = f"- of {flat.files} flat files, {good} are the same as in their sets"
    return words + (f"; {rest} were not read: no save of ours left them so" if rest else "")


def _from_here(path: Path) -> Path:
    """Below the current folder as it is seen from there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _as_data(
    paths: Sequence[str],
    audited: Sequence[AuditedStore],
    files: Sequence[AuditedFile],
    problems: int,
    unverifiable: int,
) -> dict[str, Any]:
    import attrs

    def plain(_instance: Any, _attribute: Any, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    return {
        "format": "noether-init-verify",
        "version": JSON_VERSION,
        "paths": list(paths),
        "problems": problems,
        "unverifiable": unverifiable,
        "runs": [attrs.asdict(one, value_serializer=plain) for one in audited],
        "files": [attrs.asdict(one, value_serializer=plain) for one in files],
    }
