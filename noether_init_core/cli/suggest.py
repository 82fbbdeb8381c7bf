"""``noether-init suggest CONFIG --model module:callable``: rules to paste where names or shapes differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from noether_init_core.cli.options import (
    AppDir,
    Config,
    Model,
    ModelName,
    Real,
    RunId,
    Runs,
    StageName,
    naming_options,
    stack_and_model,
)

__all__ = ["run"]

JSON_VERSION = 1


def run(
    config: Config,
    model: Model,
    app_dir: AppDir = Path(),
    model_name: ModelName = None,
    runs: Runs = None,
    run_id: RunId = None,
    stage_name: StageName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the suggestions as JSON.")] = False,
    real: Real = False,
) -> None:
    """Suggest transforms for each file and model of a config, from names and shapes. Nothing is applied.

    Rules and surgery fields that the config has are not looked at: the suggestion is for a config without them. Exit
    code 0: with the suggestion, the plan has no problem and nothing is unsure. 1: look at it before you paste it.
    """
    stack, built, paths = stack_and_model(
        config,
        model,
        app_dir=app_dir,
        model_name=model_name,
        runs=runs,
        run_id=run_id,
        stage_name=stage_name,
        real=real,
    )
    with naming_options(paths):
        found = stack.suggest(built)
    if as_json:
        data: list[dict[str, Any]] = [
            {
                "initializer": number,
                "model": path,
                "config": one.config(),
                "coverage": one.coverage,
                "is_fine": one.is_fine,
                "is_sure": one.is_sure,
                "unsure": [{"what": doubt.what, "reason": doubt.reason} for doubt in one.unsure],
                "unmatched_sources": list(one.unmatched_sources),
                "unmatched_targets": list(one.unmatched_targets),
            }
            for number, path, one in found
        ]
        said = {"format": "noether-init-suggest", "version": JSON_VERSION, "suggestions": data}
        typer.echo(json.dumps(said, indent=1))
    else:
        for number, path, one in found:
            typer.echo(f"# for initializers.{number}, {path}")
            typer.echo(str(one))
        if not found:
            typer.echo("nothing to suggest: the config has no initializers that load weights")
    if not all(one.is_fine and one.is_sure for _, _, one in found):
        raise typer.Exit(1)
