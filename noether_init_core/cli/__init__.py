"""The command ``noether-init``: one module per command, which imports what it needs when it runs.

Exit codes: 0 fine, 1 a file or config has problems, 2 usage. Torch is imported only where a plugin needs it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from noether_init_core.cli import (
    apply,
    check,
    diff,
    example,
    inspect,
    kinds,
    lineage,
    new,
    overview,
    plan,
    schema,
    suggest,
    usage,
    validate,
    verify,
)
from noether_init_core.errors import InitError

__all__ = ["app", "main"]

app = typer.Typer(
    name="noether-init",
    help="Start any PyTorch training run from any checkpoint, declared in the config.",
    epilog="Example: noether-init kinds",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("kinds", rich_help_panel="Look", epilog="Example: noether-init kinds --json")(kinds.run)
app.command("inspect", rich_help_panel="Look", epilog="Example: noether-init inspect runs/pretrain")(inspect.run)
app.command(
    "diff", rich_help_panel="Look", epilog="Example: noether-init diff runs/pretrain runs/finetune --html diff.html"
)(diff.run)
app.command(
    "lineage", rich_help_panel="Look", epilog="Example: noether-init lineage runs/finetune --html lineage.html"
)(lineage.run)
app.command("example", rich_help_panel="Decide", epilog="Example: noether-init example previous_run")(example.run)
app.command("schema", rich_help_panel="Decide", epilog="Example: noether-init schema previous_run")(schema.run)
app.command("validate", rich_help_panel="Decide", epilog="Example: noether-init validate init.yaml")(validate.run)
app.command("plan", rich_help_panel="Decide", epilog="Example: noether-init plan init.yaml --model models:build")(
    plan.run
)
app.command("suggest", rich_help_panel="Decide", epilog="Example: noether-init suggest init.yaml --model models:build")(
    suggest.run
)
app.command("verify", rich_help_panel="Do", epilog="Example: noether-init verify runs/pretrain")(verify.run)
app.command(
    "apply",
    rich_help_panel="Do",
    epilog="Example: noether-init apply init.yaml --model models:build --out start.safetensors",
)(apply.run)
app.command("new", rich_help_panel="Publish", epilog="Example: noether-init new demo")(new.run)
app.command("check", rich_help_panel="Publish", epilog="Example: noether-init check previous_run")(check.run)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Start any PyTorch training run from any checkpoint, declared in the config."""
    if version:
        overview.show_version()
    elif context.invoked_subcommand is None:
        overview.run()
    else:
        return
    raise typer.Exit


def main() -> None:
    """Run the command; an error of ours is its message on standard error and exit code 1, a wrong usage 2."""
    try:
        code = app(prog_name="noether-init", standalone_mode=False)
    except usage.UsageError as error:
        code = usage.show(error)
    except typer.Abort:
        code = 1
    except InitError as error:
        print(error, file=sys.stderr)
        code = 1
    sys.exit(code or 0)
