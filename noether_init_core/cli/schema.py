"""``noether-init schema KIND``: the JSON schema of the config of a kind."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from noether_init_core import kinds

__all__ = ["run"]


def run(kind: Annotated[str, typer.Argument(help="A kind; see: noether-init kinds.", show_default=False)]) -> None:
    """Print the JSON schema of the config of a kind. Imports that kind's plugin."""
    schema = kinds.resolve(kind).config_class.model_json_schema()
    schema["properties"]["kind"]["const"] = kind
    typer.echo(json.dumps(schema, indent=2))
