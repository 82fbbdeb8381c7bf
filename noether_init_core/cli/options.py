"""What the commands that need a config and a model are told, and what they make of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from noether_init_core.cli.completion import configs
from noether_init_core.cli.models import check_reference, load_model
from noether_init_core.errors import ConfigError, InitError

if TYPE_CHECKING:
    from noether_init_core.paths import PathProvider
    from noether_init_core.stack.stack import InitializerStack

__all__ = [
    "AppDir",
    "Config",
    "Model",
    "ModelName",
    "Real",
    "RunId",
    "Runs",
    "StageName",
    "naming_options",
    "stack_and_model",
]


def _config(context: typer.Context, path: Path) -> Path:
    """The path, if it can be that of a config; else the command line is wrong, and not the config."""
    from noether_init_core.config.yaml_text import check_is_text

    if not context.resilient_parsing:
        try:
            check_is_text(path)
        except InitError as error:
            typer.echo(error, err=True)
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
Model = Annotated[
    str, typer.Option(help="module:callable that gives a module, a bound model or a composite.", show_default=False)
]
AppDir = Annotated[Path, typer.Option(help="Folder to import the module from.")]
ModelName = Annotated[
    str | None, typer.Option(help="Name of a plain module in checkpoint files.", show_default="model")
]
Runs = Annotated[Path | None, typer.Option(help="Output root, for kinds that read from runs.", show_default=False)]
RunId = Annotated[str | None, typer.Option(help="The run that the config starts.", show_default="a new one")]
StageName = Annotated[str | None, typer.Option(help="The stage that it starts.", show_default=False)]
Real = Annotated[bool, typer.Option("--real", help="Build the model with values, not on the meta device.")]


def stack_and_model(
    config: Path,
    model: str,
    *,
    app_dir: Path,
    model_name: str | None,
    runs: Path | None,
    run_id: str | None,
    stage_name: str | None,
    real: bool,
) -> tuple[InitializerStack, Any, PathProvider | None]:
    """The stack of the config, the model, and the run. Raises ``typer.BadParameter`` and errors of ours."""
    if runs is None and (run_id is not None or stage_name is not None):
        raise typer.BadParameter("--run-id and --stage-name are names below --runs FOLDER", param_hint="--runs")
    check_reference(model)
    from noether_init_core.stack.config_files import load_config_file
    from noether_init_core.stack.stack import InitializerStack

    paths = _paths(runs, run_id, stage_name)
    if paths is not None and paths.run_id_is_generated and load_config_file(config).resume is not None:
        typer.echo("auto_resume: as at the first start of a new run; for a run that has sets: --run-id ID", err=True)
    with naming_options(paths):
        # nothing will be saved below it, so that it need not be found again
        known = None if paths is None else attrs.evolve(paths, run_id_is_generated=False)
        stack = InitializerStack.from_file(config, path_provider=known)
    return stack, load_model(model, app_dir=app_dir, name=model_name, real=real), paths


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
