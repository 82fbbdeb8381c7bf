"""What is here, and what to type next: by itself, after a wrong command line, and after a command that failed."""

from __future__ import annotations

import errno
import glob
import importlib.metadata
import itertools
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import typer.core

from noether_init_core import kinds
from noether_init_core.cli.output import show, show_commands, show_json
from noether_init_core.errors import InitError, PartlyInitializedError
from noether_init_core.kinds.lookup import OBSERVERS
from noether_init_core.messages import listed, near, one_line, printable
from noether_init_core.paths import PathProvider

#: Set to anything but 0, every error of a command comes with its traceback.
TRACEBACK_VARIABLE = "NOETHER_INIT_TRACEBACK"

# What is wrong with a path that was typed, or with the disk, and not with this program.
_OF_PATHS = (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS)

#: The error of a command line that cannot be understood; typer shows it, and has no public name for it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# Where a context keeps the words behind the name of the command.
_TYPED = "noether_init_core.typed"

_MOST_NAMES = 6
_SHOWN = 8
# A folder may hold anything; what is beyond is not looked at.
_MOST_ENTRIES = 500
_MOST_FOLDERS = 2_000
_DEPTH = 3
# Of a module, in bytes.
_LOOKED_AT = 100_000


class Command(typer.core.TyperCommand):
    """A command that remembers what was typed, for advice, and takes an option with one value only once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = list(args)
        ctx.meta[_TYPED] = typed
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            order = self.make_parser(ctx).parse_args(list(typed))[2]
            for param in order:
                if order.count(param) > 1 and _takes_one(param):
                    message = f"{param.opts[0]} takes one value, and was given {order.count(param)} times"
                    raise typer.BadParameter(
                        f"{message}. Next: leave out all but one", ctx=ctx, param_hint=param.opts[0]
                    )
        return rest


def _takes_one(param: Any) -> bool:
    return param.param_type_name == "option" and not (param.multiple or param.count or _is_flag(param))


def _is_flag(param: Any) -> bool:
    return getattr(param, "is_flag", False) is True


def advice(error: Exception) -> str | None:
    """The next command for a usage error, in one line or two; None where its message says it already."""
    context, message = getattr(error, "ctx", None), str(getattr(error, "message", ""))
    if "Next: " in message:
        return None
    if context is None:
        # an option that lacks its value: typer does not say of which command
        option = getattr(error, "option_name", None)
        if option == "--json":
            return "Next: --json FILE; or --json -, which prints it, and nothing else"
        said = "ninit --help" if option is None else f"{option} and its value, or --help behind the command"
        return f"Next: {said}"
    if hasattr(context.command, "commands"):
        # typer says which one was nearly typed
        meant = re.search(r"Did you mean '([\w-]+)'\?", message)
        return f"Next: ninit {meant[1]} --help" if meant else "Next: ninit --help"
    example = _with_typed(error, context, _as_here(context.command.epilog.removeprefix("Example: ")))
    missing = getattr(error, "param", None) if type(error).__name__ == "MissingParameter" else None
    return _of_missing(missing and missing.name, example) or f"Next: {example}"


def _with_typed(error: Any, context: Any, example: str) -> str:
    """The line that was typed, with what the example has in the place of what is missing or wrong."""
    typed: list[str] = list(context.meta.get(_TYPED, ()))
    wrong_name, meant = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if wrong_name and meant:
        option = next(iter(near(wrong_name, meant, 1)), meant[0])
        typed = [option + word.removeprefix(wrong_name) if word.split("=")[0] == wrong_name else word for word in typed]
    try:
        given, shown = (_values(context, words) for words in (typed, shlex.split(example)[2:]))
    except UsageError:
        return example
    if not given:
        return example
    words = ["ninit", context.command.name]
    for param in sorted(context.command.params, key=lambda one: one.param_type_name != "argument"):
        is_wrong = param is getattr(error, "param", None) or getattr(error, "param_hint", None) in param.opts
        value = None if is_wrong else given.get(param.name)
        if value is None and (param.required or is_wrong):
            absent = param.metavar or "VALUE" if param.name not in given and not _is_flag(param) else None
            value = shown.get(param.name, absent)
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is True:
                words.append(param.opts[0])
            elif isinstance(one, str):
                words += [*(param.opts[:1] if param.param_type_name == "option" else ()), shlex.quote(one)]
    return " ".join(words)


def _values(context: Any, words: list[str]) -> dict[str, Any]:
    """What words behind the name of a command say, by the name of the parameter; nothing is converted or checked."""
    values, _rest, order = context.command.make_parser(context).parse_args(list(words))
    said = {param.name: values.get(param.name) for param in order}
    return {name: value for name, value in said.items() if isinstance(value, str | bool | list | tuple) and value}


def _of_missing(parameter: str | None, example: str) -> str | None:
    """What could stand for a parameter that was not given; None where nothing is known of it."""
    if parameter == "config":
        found = listed(configs_here(), _MOST_NAMES)
        if found:
            return f"Configs in this folder: {found}. Next: {example}"
        return "No YAML file is in this folder. Next: ninit example previous_run, which writes one and a loop"
    if parameter == "kind":
        return f"Installed kinds: {listed(plain_kinds(), _MOST_NAMES)}. Next: ninit kinds"
    if parameter == "model":
        said = "names what gives the model: a function without arguments, a class, a module"
        return f"--model module:callable {said}. Next: {example}"
    return None


def _as_here(example: str) -> str:
    """The example with a config and a module of this folder, where there is no doubt."""
    configs, modules = configs_here(), _modules_here()
    if configs and "init.yaml" not in configs:
        example = example.replace("init.yaml", shlex.quote(configs[0]))
    having = modules if len(modules) == 1 else [name for name in modules if _defines_build(name)]
    model = f"{having[0]}:build" if having else "module:callable" if modules else "models:build"
    return example.replace("models:build", model)


def _defines_build(module: str) -> bool:
    try:
        with open(f"{module}.py", "rb") as file:
            return re.search(rb"^(def|class) build\b", file.read(_LOOKED_AT), re.MULTILINE) is not None
    except OSError:
        return False


def plain_kinds() -> list[str]:
    """Names of the kinds that can be used, without dotted ones, sorted. No plugin is imported."""
    return sorted({info.name for info in kinds.installed() if info.blocked_by is None and "." not in info.name})


def configs_here() -> list[str]:
    """YAML files in the current folder, sorted."""
    return sorted([*glob.glob("*.yaml"), *glob.glob("*.yml")])


def _modules_here() -> list[str]:
    stems = (name.removesuffix(".py") for name in glob.glob("*.py"))
    return sorted(stem for stem in stems if stem.isidentifier())


def show_usage(error: Any) -> int:
    """Print a usage error as typer does, and what to type next, on standard error; returns the exit code."""
    from typer import rich_utils

    rich_utils.rich_format_error(error)
    said = advice(error)
    if said is not None:
        show(said, err=True)
    return int(error.exit_code)


def explained(error: Exception) -> str | None:
    """What went wrong, for people; None where only the traceback can say it."""
    if isinstance(error, PartlyInitializedError) and isinstance(error.__cause__, Exception):
        where = _of_a_plugin(error.__cause__)
        return str(error) if where is None else f"{error}\n{where}"
    if isinstance(error, InitError):
        return str(error)
    told = _of_a_plugin(error)
    if told is None and isinstance(error, OSError) and error.errno in _OF_PATHS:
        # without a name it is about standard output
        what = "the output cannot be written" if error.filename is None else one_line(str(error.filename)[:200])
        return f"{what}: {error.strerror}"
    return told


def show_traceback(error: Exception) -> None:
    """Print it on standard error, with all causes, where that was asked for."""
    if _is_wanted():
        traceback.print_exception(error, file=sys.stderr)


def how_to_see() -> str:
    """Ends a message about code of others; empty where the traceback is shown anyway."""
    return "" if _is_wanted() else f" Its traceback: {TRACEBACK_VARIABLE}=1 before the command"


def _is_wanted() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def _of_a_plugin(error: Exception) -> str | None:
    """Who failed and where, if the deepest code that belongs to anybody is that of an installed kind or observer."""
    infos = [*kinds.installed(), *OBSERVERS.all()]
    offered_by = {info.target.partition(":")[0].partition(".")[0]: info.source for info in infos}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == "noether_init_core":
            return None
        if package in offered_by:
            where = f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname}"
            said = f"{offered_by[package]} failed: {type(error).__name__}: {error} ({where})."
            return printable(f"{said}{how_to_see()}")
    return None


def overview(*, as_json: bool) -> None:
    """Version, kinds, runs and configs below the current folder, and the next commands that fit to them."""
    names = plain_kinds()
    runs = dict(sorted(_runs()))
    configs = configs_here()
    following = _next(runs, configs)
    if as_json:
        found = [{"path": path, "newest": newest} for path, newest in runs.items()]
        commands = [command for command, _what in following]
        said = {"core": version(), "kinds": names, "runs": found, "configs": configs, "next": commands}
        show_json("overview", said)
        return
    show(f"noether-init-core {version()}")
    shown = [f"{path} @ {newest}" if newest else path for path, newest in runs.items()]
    for what, some in (("kinds", names), ("runs", shown), ("configs", configs)):
        if some or what == "kinds":
            show(f"{what:<7}  {listed(some, _SHOWN, none='none')}")
    show_commands(following)


def _next(runs: Mapping[str, str | None], configs: list[str]) -> list[tuple[str, str]]:
    found = []
    if runs:
        common = os.path.commonpath(list(runs))
        root = Path(common) if len(runs) > 1 else Path(common).parent
        found.append((f"ninit inspect {shlex.quote(str(root))}", "what was saved"))
    if configs:
        chosen = shlex.quote("init.yaml" if "init.yaml" in configs else configs[0])
        found.append((f"ninit validate {chosen}", "what it asks for, and what is wrong with it"))
        found.append((f"ninit plan {chosen} --model module:callable", "what it will do to a model"))
    if not runs and not configs:
        found.append(("ninit example previous_run", "a loop that runs, and its config, to begin with"))
    found.append(("ninit kinds", "every kind, and who offers it"))
    found.append(("ninit --help", "all commands"))
    return found[:3]


def _runs() -> Iterator[tuple[str, str | None]]:
    """Folders with checkpoints some levels below, near ones first, each with the iteration of its newest set.

    That is the iteration of the newest manifest, or else what names of flat files tell. A folder without either is
    none: one of source code may be named checkpoints, too.
    """
    for path in itertools.islice(_folders(), _MOST_FOLDERS):
        if os.path.isdir(path / "checkpoints"):
            from noether_init_core.sets.snapshot import Snapshot

            try:
                snapshot = Snapshot(PathProvider(path.resolve().parent, path.resolve().name))
                newest = snapshot.newest_folder or next(iter(snapshot.flat), None)
            except InitError:  # inspect tells it
                yield str(path), None
                continue
            if newest is not None:
                yield str(path), None if newest.iteration is None else str(newest.iteration)


def _folders() -> Iterator[Path]:
    """Folders below the current one, level by level."""
    level = [Path()]
    for _ in range(_DEPTH):
        below = (path for above in level for path in _folders_in(above))
        level = list(itertools.islice(below, _MOST_FOLDERS))
        yield from level


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_ENTRIES)]
    except OSError:
        return []
    shown = (folder / name for name in sorted(names) if not name.startswith(".") and name != "checkpoints")
    return [path for path in shown if os.path.isdir(path)]  # no error where nobody may look


def version() -> str:
    """That of the core."""
    return importlib.metadata.version("noether-init-core")
