"""The overview that ``ninit`` alone prints, and the advice after a usage error or an error of a command."""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.metadata
import itertools
import os
import re
import shlex
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import typer.core

from noether_init_core import kinds
from noether_init_core.cli.output import only_json, show, show_commands, show_json, show_text
from noether_init_core.errors import InitError, PartlyInitializedError
from noether_init_core.kinds.lookup import OBSERVERS
from noether_init_core.messages import listed, near, one_line, printable
from noether_init_core.paths import PathProvider
from noether_init_core.uris import local_path

#: If set to anything but 0, each error of a command is printed with its traceback.
TRACEBACK_VARIABLE = "NOETHER_INIT_TRACEBACK"

# Errors of a typed path or of the disk; any other OSError is a bug in this program.
_OF_PATHS = (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS)

#: The base of typer's usage errors, for which typer has no public name.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# Key under which a context keeps the words after the name of the command.
_TYPED = "noether_init_core.typed"

# Parameters whose values may look like a URI without being one.
_NO_PATHS = ("author", "model")
_MOST_NAMES = 6
_SHOWN = 8
# Limits of the search for runs: `ninit` may be typed in a home folder or on a network disk.
_MOST_ENTRIES = 500
_MOST_FOLDERS = 2_000
_DEPTH = 3
# Bytes of a module that are searched for a function named build.
_LOOKED_AT = 100_000


class Command(typer.core.TyperCommand):
    """A command that keeps what was typed, for advice, and accepts an option with one value only once.

    Where it prints JSON, nothing else reaches standard output.
    """

    def invoke(self, ctx: Any) -> Any:
        prints_json = ctx.params.get("as_json") or str(ctx.params.get("json_file")) == "-" or self.name == "schema"
        with only_json() if prints_json else contextlib.nullcontext():
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = list(args)
        ctx.meta[_TYPED] = typed
        for value in _paths_in(ctx, typed):
            local_path(value)
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            order = self.make_parser(ctx).parse_args(list(typed))[2]
            for param in order:
                if order.count(param) > 1 and _takes_one(param):
                    message = f"{param.opts[0]} was given {order.count(param)} times, and takes one value"
                    raise typer.BadParameter(f"{message}. Next: remove all but one", ctx=ctx, param_hint=param.opts[0])
        return rest


def _paths_in(context: Any, words: list[str]) -> Iterator[str]:
    """The typed values that may be paths. Nothing is checked; a wrong line is reported when it is parsed."""
    try:
        values = _values(context, words)
    except UsageError:
        return
    for name, value in values.items():
        if name not in _NO_PATHS:
            yield from [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []


def _takes_one(param: Any) -> bool:
    return param.param_type_name == "option" and not (param.multiple or param.count or _is_flag(param))


def _is_flag(param: Any) -> bool:
    return getattr(param, "is_flag", False) is True


def advice(error: Exception) -> str | None:
    """The next command for a usage error, in one or two lines; None where the message names it already."""
    context, message = getattr(error, "ctx", None), str(getattr(error, "message", ""))
    if "Next: " in message:
        return None
    if context is None:
        # an option without its value: typer does not pass on the command that it belongs to
        option = getattr(error, "option_name", None)
        if option == "--json":
            return "Next: --json FILE, or --json - to print the JSON"
        following = "ninit --help" if option is None else f"{option} VALUE, or --help after the command"
        return f"Next: {following}"
    if hasattr(context.command, "commands"):
        # typer's message names the nearest command
        nearest = re.search(r"Did you mean '([\w-]+)'\?", message)
        return f"Next: ninit {nearest[1]} --help" if nearest else "Next: ninit --help"
    example = _with_typed(error, context, _as_here(context.command.epilog.removeprefix("Example: ")))
    missing = getattr(error, "param", None) if type(error).__name__ == "MissingParameter" else None
    return _of_missing(missing and missing.name, example) or f"Next: {example}"


def _with_typed(error: Any, context: Any, example: str) -> str:
    """The typed line, with words of the example in place of what is missing or wrong."""
    typed: list[str] = list(context.meta.get(_TYPED, ()))
    wrong_name, nearest = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if wrong_name and nearest:
        option = next(iter(near(wrong_name, nearest, 1)), nearest[0])
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
    """Parameter -> the value typed for it; nothing is converted or checked."""
    values, _rest, order = context.command.make_parser(context).parse_args(list(words))
    typed = {param.name: values.get(param.name) for param in order}
    return {name: value for name, value in typed.items() if isinstance(value, str | bool | list | tuple) and value}


def _of_missing(parameter: str | None, example: str) -> str | None:
    """Values for a parameter that was not given; None where none is known."""
    if parameter == "config":
        found = listed(configs_here(), _MOST_NAMES)
        if found:
            return f"Configs in this folder: {found}. Next: {example}"
        return "No YAML file found in this folder. Next: ninit example previous_run"
    if parameter == "kind":
        return f"Installed kinds: {listed(plain_kinds(), _MOST_NAMES)}. Next: ninit kinds"
    if parameter == "model":
        return f"The callable takes no arguments and returns the model. Next: {example}"
    return None


def _as_here(example: str) -> str:
    """The example with a config and a module of this folder, if only one fits."""
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
    """Names of the kinds that can be used, without dotted ones, sorted. Imports no plugin."""
    return sorted({info.name for info in kinds.installed() if info.blocked_by is None and "." not in info.name})


def configs_here() -> list[str]:
    """YAML files in the current folder, sorted."""
    return sorted([*glob.glob("*.yaml"), *glob.glob("*.yml")])


def _modules_here() -> list[str]:
    stems = (name.removesuffix(".py") for name in glob.glob("*.py"))
    return sorted(stem for stem in stems if stem.isidentifier())


def show_usage(error: Any) -> int:
    """Print a usage error and the next command on standard error; returns the exit code."""
    from typer import rich_utils

    error.message = printable(error.message)
    rich_utils.rich_format_error(error)
    following = advice(error)
    if following is not None:
        show(following, err=True)
    return int(error.exit_code)


def explained(error: Exception) -> str | None:
    """The message for an expected error; None for a bug in this program, which needs its traceback."""
    if isinstance(error, PartlyInitializedError) and isinstance(error.__cause__, Exception):
        where = _of_a_plugin(error.__cause__)
        return str(error) if where is None else f"{error}\n{where}"
    if isinstance(error, InitError):
        return str(error)
    message = _of_a_plugin(error)
    if message is None and isinstance(error, OSError) and error.errno in _OF_PATHS:
        # an OSError without a file name comes from standard output, such as a full disk behind a pipe
        what = "the output cannot be written" if error.filename is None else one_line(str(error.filename)[:200])
        return f"{what}: {error.strerror}"
    return message


def show_traceback(error: Exception) -> None:
    """Print the traceback and its causes on standard error, if ``NOETHER_INIT_TRACEBACK`` is set."""
    if _is_wanted():
        show_text("".join(traceback.format_exception(error)).rstrip("\n"), err=True)


def how_to_see() -> str:
    """The end of a message about a plugin: how to see its traceback; empty if it is shown already."""
    return "" if _is_wanted() else f" Its traceback: {TRACEBACK_VARIABLE}=1 before the command"


def _is_wanted() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def _of_a_plugin(error: Exception) -> str | None:
    """Which plugin failed and where, if the deepest frame of ours or of a plugin belongs to a plugin."""
    infos = [*kinds.installed(), *OBSERVERS.all()]
    provided_by = {info.target.partition(":")[0].partition(".")[0]: info.source for info in infos}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == "noether_init_core":
            return None
        if package in provided_by:
            where = f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname}"
            message = f"{provided_by[package]} failed: {type(error).__name__}: {one_line(str(error))} ({where})."
            return printable(f"{message}{how_to_see()}")
    return None


def overview(*, as_json: bool) -> None:
    """Print version, kinds, runs and configs at or below the current folder, and the next commands."""
    names = plain_kinds()
    runs = dict(sorted(_runs()))
    configs = configs_here()
    following = _next(runs, configs)
    if as_json:
        found = [{"path": path, "newest": newest} for path, newest in runs.items()]
        commands = [command for command, _what in following]
        data = {"core": version(), "kinds": names, "runs": found, "configs": configs, "next": commands}
        show_json("overview", data)
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
        found.append((f"ninit inspect {shlex.quote(str(root))}", "list the saved sets"))
    if configs:
        chosen = shlex.quote("init.yaml" if "init.yaml" in configs else configs[0])
        found.append((f"ninit validate {chosen}", "check it without a model"))
        found.append((f"ninit plan {chosen} --model module:callable", "show what it will do to a model"))
    if not runs and not configs:
        found.append(("ninit example previous_run", "write a training loop and its config"))
    found.append(("ninit kinds", "list every kind and its distribution"))
    found.append(("ninit --help", "list all commands"))
    return found[:3]


def _runs() -> Iterator[tuple[str, str | None]]:
    """Folders with checkpoints a few levels below, near ones first, each with the iteration of its newest set.

    The iteration is that of the newest manifest, or else of the newest flat files. A folder without either is left out,
    because a folder of source code may also be named checkpoints.
    """
    for path in itertools.islice(_folders(), _MOST_FOLDERS):
        if os.path.isdir(path / "checkpoints"):
            from noether_init_core.sets.snapshot import Snapshot

            try:
                snapshot = Snapshot(PathProvider(path.resolve().parent, path.resolve().name))
                newest = snapshot.newest_folder or next(iter(snapshot.flat), None)
            except InitError:  # ninit inspect shows the error; the overview only lists the run
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
    return [path for path in shown if os.path.isdir(path)]  # unlike Path.is_dir(), it raises nothing without permission


def version() -> str:
    """The version of noether-init-core."""
    return importlib.metadata.version("noether-init-core")
