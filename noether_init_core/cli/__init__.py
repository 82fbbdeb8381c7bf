"""The command ``ninit``: a module for the commands about one thing, which imports what it needs when it runs.

``options``, ``output`` and ``usage`` are shared by them.

Exit codes: 0 fine, 1 a file or config has problems, 2 usage. Torch is imported only where a
model, a tensor or a plugin needs it.
"""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from noether_init_core.cli import config, contents, kinds, relations, usage
from noether_init_core.cli.output import show, show_text

__all__ = ["COMMANDS", "app", "main"]

app = typer.Typer(
    name="ninit",
    help="Start any PyTorch training run from any checkpoint, declared in the config.",
    epilog="Example: ninit example previous_run",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
#: (panel, name, function, an example that can be typed), in the order in which they are listed.
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
    """The docstring, a line for each paragraph: terminals have widths of their own."""
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
    as_json: Annotated[bool, typer.Option("--json", help="Without a command: what is here, for programs.")] = False,
) -> None:
    """Start any PyTorch training run from any checkpoint, declared in the config."""
    if version:
        show(f"noether-init-core {usage.version()}")
    elif context.invoked_subcommand is None:
        usage.overview(as_json=as_json)
    elif as_json:
        raise typer.BadParameter(
            f"it belongs behind the command. Next: ninit {context.invoked_subcommand} --help",
            param_hint="--json",
        )
    else:
        return
    raise typer.Exit


def main() -> None:
    """Run the command; a wrong usage is exit code 2, an error of ours or of a plugin its message and exit code 1.

    Messages go to standard error. A fault of this program is raised.
    """
    for stream in (sys.stdout, sys.stderr):
        # what a terminal cannot show is spelt out
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="ninit", standalone_mode=False)
    except usage.UsageError as error:
        code = usage.show_usage(error)
    except typer.Abort:
        code = 1
    except Exception as error:
        said = usage.explained(error)
        if said is None:
            raise
        usage.show_traceback(error)
        show_text(said, err=True)
        code = 1
    sys.exit(code or 0)
