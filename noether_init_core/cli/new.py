"""``noether-init new NAME``: a package with a kind whose tests pass as they are."""

from __future__ import annotations

import datetime
import importlib.metadata
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from noether_init_core.cli.output import AsJson, show_commands, show_json
from noether_init_core.scaffold.files import Base

if TYPE_CHECKING:
    from noether_init_core.scaffold.naming import Names


def run(
    name: Annotated[str, typer.Argument(help="Of the new package, such as demo: a folder demo.", show_default=False)],
    kind: Annotated[
        str | None, typer.Option(help="What configs call it.", show_default="the name, with _ for -")
    ] = None,
    distribution: Annotated[
        str | None, typer.Option(help="What pip calls it.", show_default="noether-init-NAME")
    ] = None,
    base: Annotated[
        Base, typer.Option(help="source: weights of a file that the kind locates; plain: everything by hand.")
    ] = Base.SOURCE,
    into: Annotated[Path, typer.Option(help="The folder that the new one is made in.")] = Path(),
    author: Annotated[
        str | None,
        typer.Option(
            help="For pyproject.toml and LICENSE: 'Jane Doe' or 'Jane Doe <jane@example.org>'.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a package with a new kind: class, config, tests, conformance kit, CI. It is complete, or not there at all.

    A folder that exists is refused. So are names that cannot work, and a kind that an installed distribution offers.
    """
    from noether_init_core.scaffold.files import check_absent, render, write_folder
    from noether_init_core.scaffold.naming import check_free, names_of

    names = names_of(name, kind=kind, distribution=distribution)
    check_free(names)
    folder = into / names.folder
    check_absent(folder)
    core = importlib.metadata.version("noether-init-core")
    files = render(names, base, author=author, year=datetime.date.today().year, core=core)
    if not dry_run:
        write_folder(folder, files)
    following = _following(names, folder)
    if as_json:
        said = {
            "folder": str(folder),
            "distribution": names.distribution,
            "package": names.package,
            "kind": names.kind,
            "base": base.value,
            "written": not dry_run,
            "files": list(files),
            "next": [command for command, _ in following],
        }
        show_json("new", said)
        return
    _show_tree(folder, files)
    if dry_run:
        typer.echo(f"\n{len(files)} files; nothing was written (--dry-run)")
    else:
        show_commands(following)


def _following(names: Names, folder: Path) -> list[tuple[str, str]]:
    """The next commands, each with what it is for."""
    return [
        (f"cd {shlex.quote(str(folder))}", f"the kind itself is src/{names.package}/kind.py"),
        ("python -m pip install '.[test]'", f"registers {names.kind}, and installs pytest"),
        ("python -m pytest", "all of it passes as it is"),
        ("noether-init kinds", f"{names.kind}, offered by {names.distribution} 0.1.0"),
        (f"noether-init check {names.kind}", "what can be seen without running it"),
    ]


def _show_tree(folder: Path, files: Iterable[str]) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(f"{folder}/"))
    branches = {"": tree}
    for file in files:
        parent = ""
        *folders, name = file.split("/")
        for one in folders:
            path = f"{parent}/{one}"
            if path not in branches:
                branches[path] = branches[parent].add(Text(f"{one}/"))
            parent = path
        branches[parent].add(Text(name))
    Console(soft_wrap=True).print(tree)
