"""``noether-init plan CONFIG --model module:callable``: what a config will do to every tensor of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noether_init_core.cli.files import Html, check_page, check_plan, write_html, write_text
from noether_init_core.cli.options import Real, Start, naming_options, with_start
from noether_init_core.cli.output import show, show_text
from noether_init_core.cli.usage import how_to_see, show_traceback
from noether_init_core.errors import InitError

if TYPE_CHECKING:
    from noether_init_core.stack.stack import InitializerStack
    from noether_init_core.surgery.plan import LoadPlan


@with_start
def run(
    start: Start,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the plan to a file as JSON; - prints it, and nothing else.", metavar="FILE"),
    ] = None,
    html: Html = None,
    show_all: Annotated[bool, typer.Option("--all", help="A line for every key.")] = False,
    real: Real = False,
) -> None:
    """Show what a config will do to a model. Only headers of files are read, and nothing is changed.

    Exit code 0: it can be done. 1: the plan or a file has problems. The model is built without memory unless --real.
    """
    check_plan(json_file)
    check_page(html)
    stack, built, paths = start.build(real=real)
    with naming_options(paths):
        plan = stack.plan(built)
    to_stdout = json_file is not None and str(json_file) == "-"
    if to_stdout:
        typer.echo(plan.to_json())
    elif json_file is not None:
        write_text(json_file, plan.to_json() + "\n")
    if not to_stdout:
        _show(stack, built, plan, show_all)
    models = ", ".join(dict.fromkeys(row.model for row in plan.rows)) or "the model"
    write_html(html, plan, f"What {start.config.name} will do to {models}")
    unplanned = stack.check_unplanned(built)
    if not real and any(error is not None for _kind, error in unplanned):
        # a kind may need values; whether something is wrong shows with them
        unplanned = stack.check_unplanned(start.load_model(real=True))
    for kind, error in unplanned:
        said = f"not planned: {kind} says nothing beforehand"
        if error is not None:
            show_traceback(error)
            named = f"x {kind}: {type(error).__name__}: {error}.{how_to_see()}"
            said = f"x {error}" if isinstance(error, InitError) else named
        show_text(said, err=to_stdout)
    if not plan.is_fine or any(error is not None for _kind, error in unplanned):
        raise typer.Exit(1)


def _show(stack: InitializerStack, model: Any, plan: LoadPlan, show_all: bool) -> None:
    from rich.console import Console

    from noether_init_core.render.terminal import PlanView

    if plan.origins:
        Console().print(PlanView(plan, unfolded=show_all, notes=_notes(stack, model)))
    elif not stack.initializers or any(one.states_plan for one in stack.initializers):
        show("nothing to plan: the config has no initializers that load weights")


def _notes(stack: InitializerStack, model: Any) -> dict[tuple[int, str], str]:
    """Whether a manifest vouches for each file; none where it cannot be located again, since the plan is valid."""
    from noether_init_core.files.verification import Digests

    try:
        return {
            (number, path): "committed, digests present" if isinstance(source.digests, Digests) else "not committed"
            for number, path, source in stack.sources(model)
            if source.origin
        }
    except InitError:
        return {}
