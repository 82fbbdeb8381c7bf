"""The options that commands share, shell completion for them, and the stack and model that they select."""

from __future__ import annotations

import contextlib
import glob
import importlib
import inspect
import itertools
import os
import pkgutil
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import attrs
import typer

from noether_init_core import kinds
from noether_init_core.cli.output import show, show_text
from noether_init_core.errors import ConfigError, InitError, type_of
from noether_init_core.files.storage.disk import LOCAL, reaching
from noether_init_core.messages import listed, near, one_line
from noether_init_core.paths import PathProvider

if TYPE_CHECKING:
    from noether_init_core.stack.stack import InitializerStack

_NEXT_RUNS = "Next: --runs FOLDER --run-id ID, with the output root and the run that the config starts"

# Some shells evaluate completions, so that a name with any other character is not completed.
_HARMLESS = re.compile(r"[\w./+@%,=-]+")


def _kind_names(incomplete: str) -> Iterator[tuple[str, str]]:
    """Installed kinds that begin with ``incomplete``, with the distribution that provides each."""
    for info in kinds.installed():
        is_match = info.name.startswith(incomplete) and ("." not in info.name or "." in incomplete)
        if info.blocked_by is None and is_match and _HARMLESS.fullmatch(info.name):
            yield info.name, info.source if re.fullmatch(r"[\w. +-]+", info.source) else ""


def _configs(incomplete: str) -> Iterator[str]:
    """YAML files and folders whose names begin with ``incomplete``."""
    for entry in sorted(glob.glob(f"{glob.escape(incomplete)}*")):
        shown = f"{entry}/" if os.path.isdir(entry) else entry
        if shown.endswith(("/", ".yaml", ".yml")) and _HARMLESS.fullmatch(shown):
            yield shown


def _config(context: typer.Context, path: Path) -> Path:
    """The path, if a config can be read from it. Otherwise exits with code 2, because the command line is wrong."""
    from noether_init_core.config.document import content_of

    if not context.resilient_parsing:
        try:
            content_of(path)
        except InitError as error:
            show_text(str(error), err=True)
            raise typer.Exit(2) from error
    return path


Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML config, or hp_resolved.yaml of Noether.",
        show_default=False,
        autocompletion=_configs,
        callback=_config,
    ),
]
KIND = typer.Argument(
    metavar="KIND", help="A kind; ninit kinds lists them.", show_default=False, autocompletion=_kind_names
)
Kind = Annotated[str, KIND]
Real = Annotated[bool, typer.Option("--real", help="Build the model with values, not on the meta device.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ShowAll = Annotated[bool, typer.Option("--all", help="Show each key on its own line.")]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", help="Also write a page for a browser: one file, no network.", metavar="FILE", show_default=False
    ),
]


@attrs.frozen
class Start:
    """The config, the model, and the run that the config starts, as typed. Each field is an option of the commands."""

    config: Config
    model: Annotated[
        str,
        typer.Option(help="module:callable that returns a module, a bound model or a composite.", show_default=False),
    ]
    app_dir: Annotated[Path, typer.Option(help="Folder to import the module from.")] = Path()
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model in checkpoints, for a plain module.", show_default="model")
    ] = None
    runs: Annotated[
        Path | None,
        typer.Option(help="Output root, for kinds that read runs.", show_default=False, metavar="FOLDER"),
    ] = None
    run_id: Annotated[
        str | None, typer.Option(help="Id of the run that the config starts.", show_default="a new one")
    ] = None
    stage_name: Annotated[str | None, typer.Option(help="Stage of that run.", show_default=False)] = None

    @contextlib.contextmanager
    def build(self, *, real: bool) -> Iterator[tuple[InitializerStack, Any]]:
        """Build the stack of the config and the model. Within the block, an error about an option names the option.

        Raises ``typer.BadParameter``, ``ConfigError`` where the user's code fails, and errors of the config and its
        kinds.
        """
        if self.runs is None and (self.run_id is not None or self.stage_name is not None):
            raise typer.BadParameter("--run-id and --stage-name need --runs FOLDER", param_hint="--runs")
        _reference(self.model)
        from noether_init_core.stack.config_files import load_config_file
        from noether_init_core.stack.stack import InitializerStack

        paths = self._paths()
        resumes = load_config_file(self.config).resume is not None
        if paths is None and resumes:
            raise ConfigError(f"auto_resume resumes this run from its own checkpoints. {_NEXT_RUNS}")
        with self._naming_options(paths):
            stack = InitializerStack.from_file(self.config, path_provider=paths)
        if paths is not None and resumes:
            show(self._decided(paths, stack.auto_resume), err=True)
        model = self.load_model(real=real)
        with self._naming_options(paths):
            yield stack, model

    def _decided(self, paths: PathProvider, decision: str) -> str:
        """What auto_resume decided; if the run has no checkpoints, also the stages or runs with a near name."""
        if self.run_id is None:
            return "auto_resume: planned as the first start of a new run; for a run with sets: --run-id ID"
        from noether_init_core.sets.places import runs, stages

        if "no checkpoints" not in decision:
            return decision
        if paths.stage_name is None and (found := stages(paths)):
            return f"{decision}. Stages with checkpoints: {listed(found)}. Next: --stage-name {shlex.quote(found[0])}"
        return decision + _near(self.run_id, runs(paths))

    def load_model(self, *, real: bool) -> Any:
        """Import the module, call the callable, and return its result as a model or a composite.

        Args:
            real: Build it with memory and values; else on torch's meta device, without either.

        An object that is a model already is not called. ``app_dir`` stays on the import path, because a model may
        import modules while it is built. Output of the user's code goes to standard error.

        Raises ``typer.BadParameter`` if the text names no model, ``ConfigError`` if the user's code fails; its
        traceback is printed and chained.
        """
        with reaching(self.app_dir):
            is_folder, folder = LOCAL.is_folder(self.app_dir), LOCAL.resolve(self.app_dir)
        if not is_folder:
            raise typer.BadParameter(f"{self.app_dir} is not a folder", param_hint="--app-dir")
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        with contextlib.redirect_stdout(sys.stderr):
            found = _imported(self.model, self.app_dir)
            return _as_model(_built(found, self.model, real), self.model, self.model_name)

    def _paths(self) -> PathProvider | None:
        if self.runs is None:
            return None
        run_id = self.run_id
        if run_id is None:
            # a fixed name keeps the output of a command equal each time; nothing is saved under it
            names = (f"new-{number}" for number in itertools.count(1))
            with reaching(self.runs):
                run_id = next(name for name in names if not LOCAL.exists(self.runs / name))
        return PathProvider(self.runs, run_id, self.stage_name)

    @contextlib.contextmanager
    def _naming_options(self, paths: PathProvider | None) -> Iterator[None]:
        """Reword errors about a value that an option set, so that they name the option."""
        try:
            yield
        except InitError as error:
            error.say(error.message.replace("or pass it to PathProvider", "or use --runs FOLDER"))
            if paths is None and "path_provider" in str(error):
                message = re.sub(r"path_provider=PathProvider\([^)]*\)", "--runs FOLDER --run-id ID", str(error))
                raise ConfigError(f"{message}\n{_NEXT_RUNS}") from error
            if paths is not None and self.run_id is None and paths.run_id in str(error):
                hint = f"{paths.run_id} is a placeholder, because --run-id was not given. Next: --run-id ID"
            elif paths is not None and not LOCAL.is_folder(paths.output_root) and "is a link to" not in str(error):
                hint = f"{paths.output_root} does not exist. Next: --runs FOLDER, with the output root"
            else:
                raise
            raise ConfigError(f"{error}\n{hint}") from error


def with_start(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the options of a ``Start`` in place of its first argument, beside its own options."""
    hints = {**get_type_hints(Start, include_extras=True), **get_type_hints(command, include_extras=True)}
    options = [*inspect.signature(Start).parameters.values(), *list(inspect.signature(command).parameters.values())[1:]]

    def run(**given: Any) -> None:
        start = Start(**{field.name: given.pop(field.name) for field in attrs.fields(Start)})
        command(start, **given)

    options = [option.replace(kind=option.KEYWORD_ONLY, annotation=hints[option.name]) for option in options]
    # Python wants parameters without defaults first
    options.sort(key=lambda option: option.default is not option.empty)
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what typer reads
    run.__doc__ = command.__doc__
    return run


def _reference(reference: str) -> tuple[str, str]:
    """Module and callable of ``module:callable``. Raises ``typer.BadParameter``; imports nothing."""
    module, colon, attribute = reference.partition(":")
    if not colon or not module or not attribute:
        example = f"{module}:build" if module and not colon and module.isidentifier() else "my_package.models:build"
        raise _wrong(f"{reference!r} is not module:callable. Next: --model {example}")
    if module.endswith(".py") and module.removesuffix(".py").isidentifier():
        raise _wrong(f"{module!r} is a file, not a module. Next: --model {module.removesuffix('.py')}:{attribute}")
    if not all(part.isidentifier() for part in module.split(".")):
        raise _wrong(f"{module!r} is not a module name. Next: --model {Path(module).stem}:{attribute}")
    return module, attribute


def _imported(reference: str, app_dir: Path) -> Any:
    """The object that ``module:callable`` names. A missing import inside the user's module is not a wrong --model."""
    name, path = _reference(reference)
    try:
        found: Any = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise _failed(f"importing {name} for --model {reference}", error) from error
        parent, _, last = missing.rpartition(".")
        there = pkgutil.iter_modules([str(app_dir.joinpath(*parent.split(".")) if parent else app_dir)])
        hint = _near(last, [module.name for module in there])
        raise _wrong(f"module {missing!r} not found{hint}. Next: --app-dir FOLDER") from error
    shown = name
    for attribute in path.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            others = [other for other in dir(found) if not other.startswith("_")]
            hint = _near(attribute, others)
            if hint:
                hint += f". Next: --model {f'{shown}.'.replace(f'{name}.', f'{name}:', 1)}{near(attribute, others)[0]}"
            raise _wrong(f"{attribute!r} not found in {shown}{hint}") from error
        shown = f"{shown}.{attribute}"
    return found


def _built(found: Any, reference: str, real: bool) -> Any:
    import torch

    from noether_init_core.models import CompositeModelLike, ModelLike

    if isinstance(found, torch.nn.Module) or (
        not isinstance(found, type) and isinstance(found, ModelLike | CompositeModelLike)
    ):
        return found
    if not callable(found):
        raise _wrong(f"{reference} is {type_of(found)}, which cannot be called{_several(found)}")
    try:
        with contextlib.suppress(ValueError):  # inspect finds no signature for some callables written in C
            inspect.signature(found).bind()
    except TypeError as error:
        raise _wrong(f"{reference}: {error}. Next: write a function without arguments that calls it") from error
    try:
        with contextlib.nullcontext() if real else torch.device("meta"):
            return found()
    except (Exception, SystemExit) as error:
        hint = "" if real else ". It was built on the meta device, where tensors have no values. Next: --real"
        raise _failed(f"{reference}()", error, hint) from error


def _as_model(built: Any, reference: str, name: str | None) -> Any:
    import torch

    from noether_init_core.models import BoundModel, CompositeModelLike, ModelLike, bind

    if isinstance(built, BoundModel) and name is not None:
        return bind(built.module, name, built.optimizer, built.is_frozen, built.device)
    if isinstance(built, ModelLike | CompositeModelLike) and (name is None or not isinstance(built, torch.nn.Module)):
        return built
    if not isinstance(built, torch.nn.Module):
        raise _wrong(
            f"{reference} returned {type_of(built)}, not a module, a bound model or a composite{_several(built)}"
        )
    own = getattr(built, "name", None)
    return bind(built, name if name is not None else own if isinstance(own, str) else "model")


def _several(found: Any) -> str:
    """How to return several models as one composite; empty for an object that holds no model."""
    import torch

    from noether_init_core.models import CompositeModelLike, ModelLike

    named = found if isinstance(found, Mapping) else dict(enumerate(found)) if isinstance(found, tuple | list) else {}
    models = {
        name: one for name, one in named.items() if isinstance(one, torch.nn.Module | ModelLike | CompositeModelLike)
    }
    if not models:
        return ""
    first, value = next(iter(models.items()))
    key = first if isinstance(first, str) else "first"
    part = "bind(...)" if isinstance(value, torch.nn.Module) and not isinstance(value, ModelLike) else "..."
    return f'. Next: return compose("name", {{"{key}": {part}, ...}})'


def _failed(what: str, error: BaseException, hint: str = "") -> ConfigError:
    """Print the traceback of the user's code; returns the error that names the step that failed."""
    # the frame of this module is of no use to the user
    outer = error.__traceback__ and error.__traceback__.tb_next
    traceback.print_exception(type(error), error, outer, file=sys.stderr)
    return ConfigError(f"--model: {what} failed: {type(error).__name__}: {one_line(str(error))}{hint}")


def _wrong(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="--model")


def _near(name: str, others: Collection[str]) -> str:
    found = near(name, others)
    return f". Near: {', '.join(found)}" if found else ""
