"""``noether-init kinds``, ``schema`` and ``example``: which kinds there are, and what a config of one looks like."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import attrs
import typer
from rich.console import Console
from rich.text import Text

from noether_init_core import kinds
from noether_init_core.cli.options import KIND, AsJson, Kind
from noether_init_core.cli.output import show, show_commands, show_json, show_table, show_text
from noether_init_core.cli.usage import plain_kinds
from noether_init_core.errors import ConfigError, KindError
from noether_init_core.messages import one_line
from noether_init_core.observers.loading import installed_observers
from noether_init_core.scaffold.files import BUILT_IN, example_of


def list_kinds(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of objects.")] = False,
    observers: Annotated[
        bool, typer.Option("--observers", help="List observers instead, for observers: [...].")
    ] = False,
) -> None:
    """List the kinds that installed distributions offer. No plugin is imported."""
    found = installed_observers() if observers else kinds.installed()
    what = "observer" if observers else "kind"
    counts = Counter(info.name for info in found if info.blocked_by is None)
    conflicts = {name for name, count in counts.items() if count > 1}
    if as_json:
        rows = [
            {**attrs.asdict(info), "conflict": info.blocked_by is None and info.name in conflicts} for info in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not found:
        show(f"no {what} is installed. Next: pip install noether-init-core")
        return
    _show(what, [(_mark(info, conflicts), one_line(info.name), one_line(info.source)) for info in found])
    if conflicts:
        show(f"x what is offered more than once cannot be used; see {kinds.DENY_VARIABLE}")


def _mark(info: kinds.KindInfo, conflicts: Collection[str]) -> tuple[str, str]:
    if info.blocked_by is not None:
        return f"- {info.blocked_by}", "dim"
    return ("x conflict", "red") if info.name in conflicts else ("ok", "green")


def _show(what: str, rows: Sequence[tuple[tuple[str, str], str, str]]) -> None:
    """A table; where it does not fit, who offers a kind stands below it, so that no name is broken."""
    console = Console()
    widths = [max(map(len, column)) for column in zip(*((mark[0], *rest) for mark, *rest in rows), strict=True)]
    if sum(widths) + 4 <= console.width:
        show_table(("", what, "offered by"), rows)
        return
    for (mark, style), name, source in rows:
        # a line that is too long all the same is broken by the terminal, and copied as one
        console.print(Text(mark, style).append(f"  {name}", "not dim"), soft_wrap=True)
        console.print(Text(f"      {source}", "dim"), soft_wrap=True)


def show_schema(
    kind: Annotated[str | None, KIND] = None,
    of_all: Annotated[
        bool, typer.Option("--all", help="Of whole config files instead, with all installed kinds, for editors.")
    ] = False,
) -> None:
    """Print the JSON schema of the config of a kind. Imports that kind's plugin.

    With --all, of config files: noether-init schema --all > init.schema.json, and as the first line of a YAML file
    # yaml-language-server: $schema=init.schema.json. A kind that cannot be used is left out; standard error says why.
    """
    if of_all == (kind is not None):
        names = ", ".join(plain_kinds())
        what = "KIND and --all exclude each other" if of_all else f"no KIND was given. Installed kinds: {names}"
        raise typer.BadParameter(f"{what}. Next: noether-init schema --all, or noether-init schema previous_run")
    from noether_init_core.config.json_schema import kind_schema, schema_of_files

    if kind is not None:
        schema = kind_schema(kind, kinds.resolve(kind).config_class.model_json_schema())
    else:
        found = {}
        for name in sorted({info.name for info in kinds.installed() if info.blocked_by is None}):
            try:
                found[name] = kinds.resolve(name).config_class.model_json_schema()
            except KindError as error:
                show(f"- {name} is left out: {error}", err=True)
        observers = sorted({info.name for info in installed_observers() if info.blocked_by is None})
        schema = schema_of_files(found, observers)
    typer.echo(json.dumps(schema, indent=2))


def write_example(
    kind: Kind,
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to; made if it is not there.")] = Path(),
    only_print: Annotated[bool, typer.Option("--print", help="Print the files, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a training loop that runs, and its init.yaml, for one kind. Nothing that exists is written over.

    For the kinds of the core everything runs as it is, in seconds and without data. For others init.yaml leaves open
    what they require.
    """
    name = kinds.describe(kind).name
    schema = None if name in BUILT_IN else kinds.resolve(kind).config_class.model_json_schema()
    files, following = example_of(name, schema)
    if not only_print:
        _write(folder, files)
    if as_json:
        commands = [command for command, _what in following]
        said = {"kind": name, "folder": folder, "written": not only_print, "files": files, "next": commands}
        show_json("example", said)
        return
    for file, text in files.items():
        show_text(f"# ---- {file}\n{text}" if only_print else str(folder / file))
    into = [(f"cd {shlex.quote(str(folder))}", "")] if folder != Path() else []
    show_commands([*into, *following], narrow=0)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Write all of them, or nothing. Raises ``ConfigError`` where one of them is there."""
    there = [str(folder / name) for name in files if (folder / name).exists()]
    if there:
        raise ConfigError(
            f"{', '.join(there)}: there already, and nothing was written. "
            f"Next: another folder, as in noether-init example KIND {shlex.quote(str(folder / 'example'))}; "
            "or --print, to look"
        )
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with (folder / name).open("x", encoding="utf-8", newline="\n") as file:
                written.append(folder / name)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise ConfigError(f"{folder} cannot be written: {error.strerror}. Nothing was left there") from error
