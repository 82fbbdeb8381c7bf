"""``noether-init verify PATH``: every set or file below a path, verified in full; what is wrong, and what to use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from noether_init_core.cli.files import check_path
from noether_init_core.cli.options import AsJson
from noether_init_core.cli.output import Cell, from_here, progress, show, show_json, show_table, show_text
from noether_init_core.errors import CheckpointError
from noether_init_core.messages import listed, one_line

if TYPE_CHECKING:
    from noether_init_core.sets.health import FileHealth, FlatHealth, RunHealth

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
    as_json: AsJson = False,
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
    from noether_init_core.sets.health import FileHealth, bytes_to_verify, verify_file, verify_run
    from noether_init_core.sets.places import runs_at
    from noether_init_core.sets.snapshot import Snapshot

    files: list[FileHealth] = []
    runs: list[RunHealth] = []
    for path in map(Path, dict.fromkeys(paths)):
        try:
            check_path(path)
            if path.is_dir():
                found = [Snapshot(run) for run in runs_at(path)]
                with progress("verifying", sum(bytes_to_verify(one, flat=flat) for one in found)) as advance:
                    runs += [verify_run(one, advance, asked=path, flat=flat) for one in found]
            else:
                with progress("verifying", path.stat().st_size) as advance:
                    files.append(verify_file(path, advance))
        except CheckpointError as error:
            if len(paths) == 1:
                raise
            files.append(FileHealth(path, "broken", problem=str(error)))
    problems = sum(one.problem_count for one in runs) + sum(bool(one.problem) for one in files)
    states = [one.state for one in files] + [one.state for run in runs for one in run.sets]
    unverifiable = states.count("unverifiable")
    if as_json:
        data = {
            "paths": paths,
            "problems": problems,
            "unverifiable": unverifiable,
            "runs": [attrs.asdict(one) for one in runs],
            "files": [attrs.asdict(one) for one in files],
        }
        show_json("verify", data)
    else:
        for run in runs:
            _show_run(run)
        for file in files:
            _show_file(file)
        sets = sum(one.state != "uncommitted" for run in runs for one in run.sets)
        said = ([f"sets: {sets}"] if runs else []) + ([f"files: {len(files)}"] if files else [])
        said += [f"unverifiable: {unverifiable}"] if unverifiable else []
        show(", ".join([*said, f"problems: {problems}"]))
    if problems or (strict and unverifiable):
        raise typer.Exit(1)


def _show_file(file: FileHealth) -> None:
    mark = _MARKS[file.state][0]
    note = f" ({file.note})" if file.note else ""
    good = f"{mark} {file.path}: {file.tensors} tensors, {file.bytes:,} bytes{note}"
    show_text(f"{mark} {file.problem}" if file.problem else one_line(good))


def _show_run(run: RunHealth) -> None:
    name = f"{run.run_id}/{run.stage_name}" if run.stage_name is not None else run.run_id
    # the folder of a committed set has its iteration in its name
    with_iterations = any(one.iteration is not None and one.iteration not in one.name for one in run.sets)
    rows: list[tuple[Cell, ...]] = []
    for one in run.sets:
        numbers = (str(one.files), f"{one.bytes:,}") if one.files else ("", "")
        iteration = [one.iteration or "unknown"] if with_iterations else []
        rows.append((_MARKS[one.state], one.name, *iteration, ", ".join(one.tags), *numbers))
    show(f"{name}  {from_here(run.folder)}")
    if rows:
        show_table(("", "set", *(["iteration"] if with_iterations else []), "tags", "files", "bytes"), rows)
    else:
        show("no sets")
    for one in run.sets:
        for problem in one.problems:
            show_text(f"x {one.name}: {_short(problem, run.folder, one.name)}")
        if one.nonfinite:
            show(f"! {one.name}: {listed(one.nonfinite, 3)}; a resume refuses it (on_nonfinite: error)")
        for note in one.notes:
            show(f"- {one.name}: {note}")
        if one.state == "uncommitted":
            show(f"- {one.name}: a save that was never finished; never picked")
    if run.flat.files:
        show(_flat_words(run.flat))
    for name in run.flat.changed:
        show(f"- {name} was written over since our save: by another program, or it is damaged")
    for problem in run.flat.problems:
        show_text(f"x {_short(problem, run.folder, '')}")
    if any(one.state in ("good", "nonfinite") and not one.is_committed for one in run.sets):
        show("no manifests: every file was compared with the checksums inside it")
    for problem in run.problems:
        show_text(f"x {problem}")
    if run.newest_good is not None and run.newest_good.state == "nonfinite":
        show_text(f"no finite set. To start from {run.newest_good.name} all the same:\n  {run.use}")
    elif run.newest_good is not None:
        show_text(f"newest good set: {run.newest_good.name}. To start from it:\n  {run.use}")
    elif run.use:
        show_text(f"no set could be verified. To start from the newest all the same:\n  {run.use}")
    elif run.sets:
        show("no good set")
    show("")


def _short(text: str, folder: Path, name: str) -> str:
    """Without the folders that the line has named already."""
    from noether_init_core.sets.checkpoint_set import SETS_FOLDER

    return text.replace(f"{folder / SETS_FOLDER / name}/", "").replace(f"{folder}/", "")


def _flat_words(flat: FlatHealth) -> str:
    if flat.compared == 0:
        return (
            f"- {flat.files} flat files were not read: they are copies for Noether (--flat compares those of our saves)"
        )
    good, rest = flat.compared - len(flat.problems), flat.files - flat.compared
    words = f"- of {flat.files} flat files, {good} are the same as in their sets"
    return words + (f"; {rest} were not read: no save of ours left them so" if rest else "")
