"""``ninit diff`` and ``ninit lineage``: how checkpoints are related, by their weights and by their origin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from noether_init_core.cli.options import AsJson, Html, ShowAll
from noether_init_core.cli.output import check_path, check_target, print_json, write_html
from noether_init_core.errors import CheckpointFormatError
from noether_init_core.files.storage.disk import LOCAL, reaching
from noether_init_core.progress import progress
from noether_init_core.render.relations import DiffView, LineageView

_SIDE = "A file, a set folder, a run folder (its newest set), or RUN@TAG."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other checkpoint, in the same form.", show_default=False)],
    strip: Annotated[
        list[str] | None,
        typer.Option(help="Prefix to remove from names on both sides, such as module.; repeatable."),
    ] = None,
    html: Html = None,
    show_all: ShowAll = False,
    exact: Annotated[bool, typer.Option("--exact", help="Exit code 1 also if values differ.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the weights of two checkpoints: names, shapes, and the drift of each tensor, ‖B − A‖ / ‖A‖.

    Bytes are not verified against digests: use ninit verify. Tensors are read in pieces, so that memory does not grow
    with the model. Exit code 0: the same names and shapes; values may differ. 1: names or shapes differ, or one side
    has NaN.
    """
    check_target(html, "--html")
    for one in (a, b):
        # RUN@TAG, unless there is a path of that name
        path = Path(one)
        with reaching(path):
            is_tagged = "@" in path.name and not LOCAL.leads_somewhere(path)
        check_path(Path(one.rpartition("@")[0]) if is_tagged else path)
    from noether_init_core.diff.compare import compare_sides
    from noether_init_core.diff.sides import side_at

    sides = side_at(a), side_at(b)
    with reaching(Path(a)):
        nbytes = sum(LOCAL.size_of(path) or 0 for side in sides for path in side.files.values())
    with progress("comparing", nbytes) as advance:
        found = compare_sides(*sides, strip=strip or (), advance=advance)
    if as_json:
        print_json(found.to_json())
    else:
        Console().print(DiffView(found, unfolded=show_all), soft_wrap=True)
    write_html(html, found)
    if not found.is_same_form or (exact and not found.is_equal):
        raise typer.Exit(1)


def lineage(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run folder, a set folder, or an output root.", show_default=False)
    ],
    roots: Annotated[
        list[Path] | None,
        typer.Option("--root", help="Another output root to search; repeatable.", show_default=False),
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Show where the weights of a run came from, and which runs started from it. Reads records only, no tensors.

    Searches the output root of the run, and those of --root. Exit code 1: a record could not be read; the rest is
    shown.
    """
    check_target(html, "--html")
    for one in (path, *(roots or ())):
        check_path(one)
        with reaching(one):
            is_folder = LOCAL.is_folder(one)
        if not is_folder:
            raise CheckpointFormatError(
                f"{one} is a file; lineage is recorded in run folders. Next: ninit lineage RUN_FOLDER", path=one
            )
    from noether_init_core.lineage import lineage_of

    found = lineage_of(path, roots or ())
    if as_json:
        print_json(found.to_json())
    else:
        Console().print(LineageView(found), soft_wrap=True)
    write_html(html, found)
    if found.problems:
        raise typer.Exit(1)
