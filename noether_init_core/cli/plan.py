"""``noether-init plan CONFIG --model module:callable``: what a config will do to every tensor of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noether_init_core.cli.models import check_reference, load_model
from noether_init_core.errors import ConfigError, InitError

if TYPE_CHECKING:
    from noether_init_core.paths import PathProvider
    from noether_init_core.render.terminal import Origin
    from noether_init_core.stack import InitializerStack
    from noether_init_core.surgery.plan import LoadPlan

__all__ = ["run"]


def run(
    config: Annotated[
        Path, typer.Argument(help="A YAML file: ours, or Noether's hp_resolved.yaml.", show_default=False)
    ],
    model: Annotated[
        str,
        typer.Option(help="module:callable that gives a module, a bound model or a composite.", show_default=False),
    ],
    app_dir: Annotated[Path, typer.Option(help="Folder to import the module from.")] = Path(),
    model_name: Annotated[
        str | None, typer.Option(help="Name of a plain module in checkpoint files.", show_default="model")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Output root, for kinds that read from runs.", show_default=False)
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(help="The run that the config starts.", show_default="a new one")
    ] = None,
    stage_name: Annotated[str | None, typer.Option(help="The stage that it starts.", show_default=False)] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the plan to a file as JSON; - prints it, and nothing else.", metavar="FILE"),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="A line for every key.")] = False,
    real: Annotated[bool, typer.Option("--real", help="Build the model with values, not on the meta device.")] = False,
) -> None:
    """Show what a config will do to a model. Only headers of files are read, and nothing is changed.

    Exit code 0: it can be done. 1: the plan or a file has problems. The model is built without memory unless --real.
    """
    if runs is None and (run_id is not None or stage_name is not None):
        raise typer.BadParameter("--run-id and --stage-name are names below --runs FOLDER", param_hint="--runs")
    check_reference(model)
    from noether_init_core.stack import InitializerStack

    paths = _paths(runs, run_id, stage_name)
    with _with_options(paths):
        stack = InitializerStack.from_file(config, path_provider=paths)
    built = load_model(model, app_dir=app_dir, name=model_name, real=real)
    with _with_options(paths):
        plan = stack.plan(built)
    to_stdout = json_file is not None and str(json_file) == "-"
    if to_stdout:
        typer.echo(plan.to_json())
    elif json_file is not None:
        try:
            json_file.write_text(plan.to_json() + "\n")
        except OSError as error:
            raise typer.BadParameter(f"{json_file} cannot be written: {error.strerror}", param_hint="--json") from error
    if not to_stdout:
        _show(stack, built, plan, show_all)
    if not plan.is_fine:
        raise typer.Exit(1)


def _paths(runs: Path | None, run_id: str | None, stage_name: str | None) -> PathProvider | None:
    from noether_init_core.paths import PathProvider

    if runs is None:
        return None
    return PathProvider.generate(runs, stage_name) if run_id is None else PathProvider(runs, run_id, stage_name)


@contextlib.contextmanager
def _with_options(paths: PathProvider | None) -> Iterator[None]:
    """Errors about what this command is told by an option name the option."""
    try:
        yield
    except InitError as error:
        hint = ""
        if paths is None and "path_provider" in str(error):
            hint = "On the command line: --runs FOLDER, and --run-id ID of the run that the config starts"
        elif paths is not None and paths.run_id_is_generated and paths.run_id in str(error):
            hint = f"{paths.run_id} is a new run, made up since none was given. Next: --run-id ID"
        if not hint:
            raise
        raise ConfigError(f"{error}\n{hint}") from error


def _show(stack: InitializerStack, model: Any, plan: LoadPlan, show_all: bool) -> None:
    from rich.console import Console

    from noether_init_core.initializers.source import SourceInitializer
    from noether_init_core.render.terminal import PlanView

    if plan.origins:
        Console().print(PlanView(plan, unfolded=show_all, notes=_notes(stack, model)))
    without = [one.config.kind for one in stack.initializers if not isinstance(one, SourceInitializer)]
    if without:
        typer.echo(f"not planned, these kinds say nothing beforehand: {', '.join(without)}")
    elif not plan.origins:
        typer.echo("nothing to plan: the config has no initializers that load weights")


def _notes(stack: InitializerStack, model: Any) -> dict[Origin, str]:
    """Whether a manifest vouches for each file. What cannot be told again has no note: the plan stands without it."""
    from noether_init_core.initializers.checkpoint import CheckpointInitializer

    found: dict[Origin, str] = {}
    for initializer in stack.initializers:
        if not isinstance(initializer, CheckpointInitializer):
            continue
        try:
            leaves = initializer.leaves(model)
            initializer.before_locating(leaves)
            for leaf in leaves:
                located = (initializer.locate(name, "model") for name in leaf.file_names)
                source = next((one for one in located if one is not None), None)
                if source is not None:
                    is_committed = source.committed is not None
                    note = "committed, digests present" if is_committed else "not committed"
                    found[leaf.path, source.describe(), source.path.name] = note
        except InitError:
            continue
        finally:
            initializer.release()
    return found
