"""``noether-init suggest CONFIG --model module:callable``: rules to paste where names or shapes differ."""

from __future__ import annotations

from typing import Any

import typer

from noether_init_core.cli.options import Real, Start, naming_options, with_start
from noether_init_core.cli.output import AsJson, show, show_json, show_text


@with_start
def run(
    start: Start,
    as_json: AsJson = False,
    real: Real = False,
) -> None:
    """Suggest transforms for each file and model of a config, from names and shapes. Nothing is applied.

    Rules and surgery fields that the config has are not looked at: the suggestion is for a config without them. Exit
    code 0: with the suggestion, the plan has no problem and nothing is unsure. 1: look at it before you paste it.
    """
    stack, built, paths = start.build(real=real)
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
        show_json("suggest", {"suggestions": data})
    else:
        for number, path, one in found:
            show(f"# for initializers.{number}, {path}")
            show_text(str(one))
        if not found:
            show("nothing to suggest: the config has no initializers that load weights")
    if not all(one.is_fine and one.is_sure for _, _, one in found):
        raise typer.Exit(1)
