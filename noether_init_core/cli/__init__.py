"""The command ``ninit``: one module for each group of commands, which imports what it needs when a command runs.

``options``, ``output`` and ``usage`` are shared by all commands.

Exit codes: 0 no problem, 1 a file or a config has problems, 2 wrong usage. Torch is imported only where a model, a
tensor or a plugin needs it.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from noether_init_core.cli import config, contents, kinds, relations, usage
from noether_init_core.cli.output import leave_stdout_to_json, show, show_text

__all__ = ["COMMANDS", "app", "main"]

app = typer.Typer(
    name="ninit",
    help="Start any PyTorch training run from any checkpoint, declared in the config.",
    epilog="Example: ninit example previous_run",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
#: (panel, name, function, an example that can be typed), in the order in which ``ninit --help`` lists them.
COMMANDS: tuple[tuple[str, str, Callable[..., None], str], ...] = (
    ("Look", "kinds", kinds.list_kinds, "ninit kinds --json"),
    ("Look", "inspect", contents.inspect, "ninit inspect runs/pretrain"),
    ("Look", "diff", relations.diff, "ninit diff runs/pretrain runs/finetune"),
    ("Look", "lineage", relations.lineage, "ninit lineage runs/finetune"),
    ("Decide", "example", kinds.write_example, "ninit example previous_run"),
    ("Decide", "schema", kinds.show_schema, "ninit schema previous_run"),
    ("Decide", "validate", config.validate, "ninit validate init.yaml"),
    ("Decide", "suggest", config.suggest, "ninit suggest init.yaml --model models:build"),
    ("Decide", "plan", config.plan, "ninit plan init.yaml --model models:build"),
    ("Do", "verify", contents.verify, "ninit verify runs/pretrain"),
    ("Do", "apply", config.apply, "ninit apply init.yaml --model models:build --out start.safetensors"),
    ("Publish", "new", kinds.new, "ninit new demo"),
    ("Publish", "check", kinds.check, "ninit check previous_run"),
)


def _help_of(function: Callable[..., None]) -> str:
    """The docstring with each paragraph on one line, because each terminal wraps it at its own width."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for _panel, _name, _function, _example in COMMANDS:
    app.command(
        _name, cls=usage.Command, rich_help_panel=_panel, help=_help_of(_function), epilog=f"Example: {_example}"
    )(_function)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Without a command: print the overview as JSON.")] = False,
) -> None:
    """Start any PyTorch training run from any checkpoint, declared in the config."""
    if version:
        show(f"noether-init-core {usage.version()}")
    elif context.invoked_subcommand is None:
        usage.overview(as_json=as_json)
    elif as_json:
        raise typer.BadParameter(
            f"the option comes after the command. Next: ninit {context.invoked_subcommand} --help",
            param_hint="--json",
        )
    else:
        return
    raise typer.Exit


def main() -> None:
    """Run the command line in ``sys.argv`` and exit with its code.

    A usage error is exit code 2. An error of ours or of a plugin is printed on standard error, with exit code 1. Any
    other exception is a bug in this program, and is raised.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when the process began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # stays open until the process ends
    for stream in (sys.stdout, sys.stderr):
        # a terminal in ASCII or Latin-1 must not turn a message into a UnicodeEncodeError
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="ninit", standalone_mode=False)
    except usage.UsageError as error:
        code = usage.show_usage(error)
    except typer.Abort:
        code = 1
    except Exception as error:
        message = usage.explained(error)
        if message is None:
            raise
        usage.show_traceback(error)
        show_text(message, err=True)
        code = 1
    finally:
        leave_stdout_to_json()
    sys.exit(code or 0)
