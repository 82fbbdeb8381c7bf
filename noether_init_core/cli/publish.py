"""``noether-init new`` and ``check``: a package with a new kind, and what can be seen of a kind without running it."""

from __future__ import annotations

import datetime
import importlib.metadata
import inspect
import re
import shlex
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from noether_init_core import kinds
from noether_init_core.cli.options import AsJson, Kind
from noether_init_core.cli.output import show, show_commands, show_json
from noether_init_core.errors import KindImportError
from noether_init_core.scaffold.files import Base, check_absent, render, write_folder
from noether_init_core.scaffold.naming import Names, check_free, names_of

if TYPE_CHECKING:
    from noether_init_core.kinds.contract import Finding

_CORE = "noether-init-core"


def new(
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
    names = names_of(name, kind=kind, distribution=distribution)
    check_free(names)
    folder = into / names.folder
    check_absent(folder)
    core = importlib.metadata.version(_CORE)
    files = render(names, base, author=author, year=datetime.date.today().year, core=core)
    if not dry_run:
        write_folder(folder, files)
    following = _following(names, folder)
    if as_json:
        said = {
            **attrs.asdict(names),
            "folder": folder,
            "base": base.value,
            "written": not dry_run,
            "files": list(files),
            "next": [command for command, _what in following],
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
    branches = {Path(): Tree(Text(f"{folder}/"))}
    for file in map(Path, files):
        for above in reversed(file.parents[:-1]):
            if above not in branches:
                branches[above] = branches[above.parent].add(Text(f"{above.name}/"))
        branches[file.parent].add(Text(file.name))
    Console(soft_wrap=True).print(branches[Path()])


def check(kind: Kind, as_json: AsJson = False) -> None:
    """Look at an installed kind without running it: nothing of it is called, it is only imported.

    What is marked x breaks the contract: the kind cannot be used. What is marked ! will trouble users or the author.
    """
    import torch  # noqa: F401 - so that the import of the kind is timed without it

    from noether_init_core.initializers.base import InitializerBase
    from noether_init_core.kinds import contract

    began = time.perf_counter()
    info, loaded = _load(kind, as_json=as_json)
    seconds = time.perf_counter() - began
    advice = [*_of_distribution(info)]
    if isinstance(loaded, type) and issubclass(loaded, InitializerBase):
        problems = [*filter(None, [contract.newer(loaded)]), *contract.examine(loaded)]
        advice += contract.advice(loaded) if not problems else ()
    else:
        what = "a class" if isinstance(loaded, type) else f"of type {type(loaded).__qualname__}"
        said = f"{info.target} is {what}, and no subclass of InitializerBase"
        problems = [contract.Finding(said, "let the entry point name the class: package.module:ClassName")]
    if as_json:
        _show_json(info, problems, advice)
    else:
        _show(info, loaded, seconds, problems, advice)
    if problems:
        raise typer.Exit(1)


def _load(kind: str, *, as_json: bool) -> tuple[kinds.KindInfo, object]:
    """The plugin's own traceback is what its author needs."""
    try:
        return kinds.load(kind)
    except KindImportError as error:
        info = kinds.describe(kind)
        if ":" not in info.target:
            error.add(f"\nThe entry point has no colon. Write: {kind} = package.module:ClassName")
        if as_json:
            from noether_init_core.kinds.contract import Finding

            fix = "mend what was raised, or the entry point: package.module:ClassName"
            _show_json(info, [Finding(error.message, fix)], [])
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__, file=sys.stderr)
        raise


def _of_distribution(info: kinds.KindInfo) -> Iterator[Finding]:
    """What the metadata should say."""
    from noether_init_core.kinds.contract import Finding

    if info.distribution in (None, _CORE):
        return
    distribution = importlib.metadata.distribution(str(info.distribution))
    requirements = [re.split(r"[ ;\[<>=!~(]", line)[0] for line in distribution.requires or ()]
    if _CORE not in [name.lower().replace("_", "-") for name in requirements]:
        ours = importlib.metadata.version(_CORE).rsplit(".", 1)[0]
        yield Finding(
            f"{info.distribution} does not require {_CORE}, so that pip may leave it out, or keep one that is too old",
            f'dependencies = ["{_CORE}>={ours}"] in pyproject.toml',
        )
    if "Requires-Python" not in distribution.metadata:
        yield Finding(
            f"{info.distribution} does not say which versions of Python it runs on",
            'requires-python = ">=3.11" in pyproject.toml',
        )


def _show_json(info: kinds.KindInfo, problems: Sequence[Finding], advice: Sequence[Finding]) -> None:
    found = [*(("problem", one) for one in problems), *(("advice", one) for one in advice)]
    data = {
        "kind": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "target": info.target,
        "findings": [{"severity": how, "message": one.message, "fix": one.fix} for how, one in found],
    }
    show_json("check", data)


def _show(
    info: kinds.KindInfo, loaded: object, seconds: float, problems: Sequence[Finding], advice: Sequence[Finding]
) -> None:
    show(f"{info.name}  {info.source}  {info.target}")
    try:
        file = inspect.getsourcefile(loaded)  # type: ignore[arg-type]  # anything may be behind an entry point
    except TypeError:
        file = None
    show(f"   imported in {seconds * 1000:.0f} ms, torch apart" + (f", from {file}" if file else ""))
    for number, finding in enumerate([*problems, *advice]):
        show(f" {'x' if number < len(problems) else '!'} {finding.message}")
        show(f"   fix: {finding.fix}")
    if not problems and not advice:
        show(" = nothing to mend that can be seen without running it")
    show(f"problems: {len(problems)}, advice: {len(advice)}")
    if not problems:
        show("Next: the rest shows when it runs: python -m pytest, with noether_init_core.testing")
