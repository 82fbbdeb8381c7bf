"""The options that commands share, what a shell offers for them, and what they make: a stack and a model."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import attrs
import typer

from noether_init_core.cli.models import check_reference, load_model
from noether_init_core.cli.output import show, show_text
from noether_init_core.errors import ConfigError, InitError

if TYPE_CHECKING:
    from noether_init_core.paths import PathProvider
    from noether_init_core.stack.stack import InitializerStack

# Shells evaluate parts of what they are offered; a name with anything else is typed by hand.
_HARMLESS = re.compile(r"[\w./+@%,=-]+")


def kind_names(incomplete: str) -> Iterator[tuple[str, str]]:
    """Installed kinds that begin so, with the distribution that offers them."""
    from noether_init_core import kinds

    for info in kinds.installed():
        is_meant = info.name.startswith(incomplete) and ("." not in info.name or "." in incomplete)
        if info.blocked_by is None and is_meant and _HARMLESS.fullmatch(info.name):
            described = info.source if re.fullmatch(r"[\w. +-]+", info.source) else ""
            yield info.name, described


def configs(incomplete: str) -> Iterator[str]:
    """YAML files and folders that begin so."""
    parent = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    try:
        entries = sorted(parent.iterdir())
    except OSError:
        return
    for entry in entries:
        shown = f"{entry}/" if entry.is_dir() else str(entry)
        is_meant = entry.is_dir() or entry.suffix in (".yaml", ".yml")
        is_meant = is_meant and shown.startswith(incomplete) and not entry.name.startswith(".")
        if is_meant and _HARMLESS.fullmatch(shown):
            yield shown


def _config(context: typer.Context, path: Path) -> Path:
    """The path, if it can be that of a config; else the command line is wrong, and not the config."""
    from noether_init_core.config.document import check_is_text

    if not context.resilient_parsing:
        try:
            check_is_text(path)
        except InitError as error:
            show_text(str(error), err=True)
            raise typer.Exit(2) from error
    return path


Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file: ours, or Noether's hp_resolved.yaml.",
        show_default=False,
        autocompletion=configs,
        callback=_config,
    ),
]
KIND = typer.Argument(
    metavar="KIND", help="A kind; see: noether-init kinds.", show_default=False, autocompletion=kind_names
)
Kind = Annotated[str, KIND]
Real = Annotated[bool, typer.Option("--real", help="Build the model with values, not on the meta device.")]


@attrs.frozen
class Start:
    """The config, the model, and the run that the config starts, as they were typed. Each field is an option."""

    config: Config
    model: Annotated[
        str,
        typer.Option(help="module:callable that gives a module, a bound model or a composite.", show_default=False),
    ]
    app_dir: Annotated[Path, typer.Option(help="Folder to import the module from.")] = Path()
    model_name: Annotated[
        str | None, typer.Option(help="Name of a plain module in checkpoint files.", show_default="model")
    ] = None
    runs: Annotated[
        Path | None, typer.Option(help="Output root, for kinds that read from runs.", show_default=False)
    ] = None
    run_id: Annotated[str | None, typer.Option(help="The run that the config starts.", show_default="a new one")] = None
    stage_name: Annotated[str | None, typer.Option(help="The stage that it starts.", show_default=False)] = None

    def build(self, *, real: bool) -> tuple[InitializerStack, Any, PathProvider | None]:
        """The stack of the config, the model, and the run. Raises ``typer.BadParameter`` and errors of ours."""
        if self.runs is None and (self.run_id is not None or self.stage_name is not None):
            raise typer.BadParameter("--run-id and --stage-name are names below --runs FOLDER", param_hint="--runs")
        check_reference(self.model)
        from noether_init_core.stack.config_files import load_config_file
        from noether_init_core.stack.stack import InitializerStack

        paths = _paths(self.runs, self.run_id, self.stage_name)
        if paths is not None and paths.run_id_is_generated and load_config_file(self.config).resume is not None:
            show("auto_resume: as at the first start of a new run; for a run that has sets: --run-id ID", err=True)
        with naming_options(paths):
            # nothing will be saved below it, so that it need not be found again
            known = None if paths is None else attrs.evolve(paths, run_id_is_generated=False)
            stack = InitializerStack.from_file(self.config, path_provider=known)
        return stack, self.load_model(real=real), paths

    def load_model(self, *, real: bool) -> Any:
        """Build the model, with values or on the meta device."""
        return load_model(self.model, app_dir=self.app_dir, name=self.model_name, real=real)


def with_start(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the options of a ``Start`` in the place of its first argument, beside its own options."""
    hints = {**get_type_hints(Start, include_extras=True), **get_type_hints(command, include_extras=True)}
    options = [*inspect.signature(Start).parameters.values(), *list(inspect.signature(command).parameters.values())[1:]]

    def run(**given: Any) -> None:
        start = Start(**{field.name: given.pop(field.name) for field in attrs.fields(Start)})
        command(start, **given)

    options = [option.replace(kind=option.KEYWORD_ONLY, annotation=hints[option.name]) for option in options]
    options.sort(key=lambda option: option.default is not option.empty)  # what is required stands first
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {option.name: option.annotation for option in options}
    run.__doc__ = command.__doc__
    return run


def _paths(runs: Path | None, run_id: str | None, stage_name: str | None) -> PathProvider | None:
    from noether_init_core.paths import PathProvider

    if runs is None:
        return None
    if run_id is not None:
        return PathProvider(runs, run_id, stage_name)
    # the same one each time, so that reports are the same
    names = (f"new-{number}" for number in itertools.count(1))
    unused = next(name for name in names if not (runs / name).exists())
    return PathProvider(runs, unused, stage_name, run_id_is_generated=True)


@contextlib.contextmanager
def naming_options(paths: PathProvider | None) -> Iterator[None]:
    """Errors about what this command is told by an option name the option."""
    try:
        yield
    except InitError as error:
        hint = ""
        if paths is None and "path_provider" in str(error):
            hint = "Next: --runs FOLDER --run-id ID, with the output root and the run that the config starts"
        elif paths is not None and paths.run_id_is_generated and paths.run_id in str(error):
            hint = f"{paths.run_id} is a new run, made up since none was given. Next: --run-id ID"
        elif paths is not None and not paths.output_root.is_dir():
            hint = f"{paths.output_root} does not exist. Next: --runs FOLDER, with the output root"
        if not hint:
            raise
        raise ConfigError(f"{error}\n{hint}") from error
