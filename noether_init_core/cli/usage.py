"""What follows a usage error: the command to type next, made from what is there."""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, Any

import typer

from noether_init_core import kinds
from noether_init_core.cli.output import show
from noether_init_core.messages import listed

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["UsageError", "advice", "behind", "configs_here", "plain_kinds", "show_usage"]

#: The error of a command line that cannot be understood; typer shows it, and has no public name for it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_MOST_NAMES = 6
_EXAMPLE = "Example: "


def advice(error: Exception) -> str | None:
    """The next command for a usage error, in one line or two; None where its message says it already."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if "Next: " in str(getattr(error, "message", "")):
        return None
    if context is None:
        return _of_an_option(error)
    if hasattr(context.command, "commands"):
        # typer says which one was nearly typed
        near = re.search(r"Did you mean '([\w-]+)'\?", str(getattr(error, "message", "")))
        return f"Next: noether-init {near[1]} --help" if near else "Next: noether-init --help"
    example = _as_here(str(getattr(context.command, "epilog", None) or "").removeprefix(_EXAMPLE))
    if parameter is not None and type(error).__name__ == "MissingParameter":
        there = _THERE.get(str(parameter.name))
        if there is not None:
            return there(example)
    return f"Next: {example}" if example else "Next: noether-init --help"


def behind(option: str, command: str) -> str:
    """The command line with the option where it belongs."""
    if (command, option) == ("schema", "--json"):
        return "noether-init schema KIND, which prints nothing else"
    return f"noether-init {command} {option}{' FILE' if (command, option) == ('plan', '--json') else ''}"


def _of_an_option(error: Exception) -> str:
    """For an option that lacks its value: typer does not say of which command."""
    option = getattr(error, "option_name", None)
    if option is None:
        return "Next: noether-init --help"
    if option == "--json":
        return "Next: --json FILE; or --json -, which prints it, and nothing else"
    return f"Next: {option} and its value, or --help behind the command"


def _configs(example: str) -> str:
    found = configs_here()
    if found:
        return f"Configs in this folder: {listed(found, _MOST_NAMES)}. Next: {example}"
    return "No YAML file is in this folder. Next: noether-init example previous_run, which writes one and a loop"


def _kinds(example: str) -> str:
    return f"Installed kinds: {listed(plain_kinds(), _MOST_NAMES)}. Next: noether-init kinds"


def _model(example: str) -> str:
    # the command line is about this folder, or about --app-dir, which is not known yet
    modules = _modules_here()
    name = modules[0] if len(modules) == 1 else "module"
    known = f" Modules in this folder: {listed(modules, _MOST_NAMES)}." if modules else ""
    return (
        f"--model module:callable names what gives the model: a function without arguments, a class, a module."
        f"{known} Next: --model {name}:build"
    )


def _as_here(example: str) -> str:
    """The example with a config and a module of this folder, where there is no doubt."""
    configs, modules = configs_here(), _modules_here()
    if configs and "init.yaml" not in configs:
        example = example.replace("init.yaml", shlex.quote(configs[0]))
    return example.replace("models:build", f"{modules[0]}:build") if len(modules) == 1 else example


def plain_kinds() -> list[str]:
    """Names of the kinds that can be used, without dotted ones, sorted. No plugin is imported."""
    return sorted({info.name for info in kinds.installed() if info.blocked_by is None and "." not in info.name})


def configs_here() -> list[str]:
    """YAML files in the current folder, sorted."""
    return sorted(name for name in _here() if name.endswith((".yaml", ".yml")) and not name.startswith("."))


def _modules_here() -> list[str]:
    stems = (name.removesuffix(".py") for name in _here() if name.endswith(".py"))
    return sorted(stem for stem in stems if stem.isidentifier())


def _here() -> list[str]:
    try:
        return os.listdir()
    except OSError:  # the folder is gone, or may not be looked into
        return []


_THERE: dict[str, Callable[[str], str]] = {"config": _configs, "kind": _kinds, "model": _model}


def show_usage(error: Any) -> int:
    """Print a usage error as typer does, and what to type next, on standard error; returns the exit code."""
    from typer import rich_utils

    rich_utils.rich_format_error(error)
    said = advice(error)
    if said is not None:
        show(said, err=True)
    return int(error.exit_code)
