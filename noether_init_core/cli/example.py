"""``noether-init example KIND``: a loop that runs and its config, written into a folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from noether_init_core import kinds
from noether_init_core.cli.options import Kind
from noether_init_core.cli.output import AsJson, show_commands, show_json, show_text
from noether_init_core.errors import ConfigError
from noether_init_core.scaffold.files import BUILT_IN, example_of


def run(
    kind: Kind,
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to; made if it is not there.")] = Path(),
    only_print: Annotated[bool, typer.Option("--print", help="Print the files, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a training loop that runs, and its init.yaml, for one kind. Nothing that exists is written over.

    For the kinds of the core everything runs as it is, in seconds and without data. For others init.yaml leaves open
    what they require.
    """
    info = kinds.describe(kind)
    schema = None
    if info.name not in BUILT_IN:
        schema = kinds.resolve(kind).config_class.model_json_schema()
    files, following = example_of(info.name, schema)
    if not only_print:
        _write(folder, files)
    if as_json:
        said = {
            "kind": info.name,
            "folder": str(folder),
            "written": not only_print,
            "files": files,
            "next": [command for command, _what in following],
        }
        show_json("example", said)
        return
    for name, text in files.items():
        show_text(f"# ---- {name}\n{text}" if only_print else str(folder / name))
    into = [(f"cd {shlex.quote(str(folder))}", "")] if folder != Path() else []
    show_commands([*into, *following], narrow=0)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Write all of them, or nothing. Raises ``ConfigError`` where one of them is there."""
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise ConfigError(
            f"{', '.join(str(folder / name) for name in there)}: there already, and nothing was written. "
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
