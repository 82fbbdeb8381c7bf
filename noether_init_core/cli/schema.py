"""``noether-init schema KIND``: the JSON schema of the config of a kind, or of whole config files."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from noether_init_core import kinds
from noether_init_core.cli.options import KIND
from noether_init_core.cli.output import show
from noether_init_core.cli.usage import plain_kinds
from noether_init_core.errors import KindError


def run(
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
        from noether_init_core.observers.loading import installed_observers

        found = {}
        for name in sorted({info.name for info in kinds.installed() if info.blocked_by is None}):
            try:
                found[name] = kinds.resolve(name).config_class.model_json_schema()
            except KindError as error:
                show(f"- {name} is left out: {error}", err=True)
        observers = sorted({info.name for info in installed_observers() if info.blocked_by is None})
        schema = schema_of_files(found, observers)
    typer.echo(json.dumps(schema, indent=2))
