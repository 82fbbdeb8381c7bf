"""``noether-init validate``, ``suggest`` and ``plan``: what a config asks for, lacks, and will do to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer
from rich.console import Console

from noether_init_core.cli.files import check_page, check_plan, write_html, write_text
from noether_init_core.cli.options import AsJson, Config, Html, Real, ShowAll, Start, with_start
from noether_init_core.cli.output import show, show_json, show_text
from noether_init_core.cli.usage import how_to_see, show_traceback
from noether_init_core.errors import ConfigError, InitError
from noether_init_core.observers.loading import describe_observer

if TYPE_CHECKING:
    from noether_init_core.stack.config_files import LoadedConfig
    from noether_init_core.stack.stack import InitializerStack
    from noether_init_core.surgery.plan import LoadPlan


@attrs.frozen
class _Finding:
    """One line of ``validate``: what a key asks for, or what is wrong with it."""

    key: str
    line: int | None
    message: str
    is_problem: bool = False
    kind: str | None = None


def validate(config: Config, as_json: AsJson = False) -> None:
    """Check every entry of a config file against its kind, and what stands around them. Reads no checkpoint.

    Exit code 0: it is a config. 1: something is wrong with it; each line names file, line and key.
    """
    from noether_init_core.stack.config_files import examine_config_file

    loaded, around = examine_config_file(config)
    found = [*(_wrong("", error) for error in around), *_findings(loaded)]
    found.sort(key=lambda one: one.line or 0)
    problems = [one for one in found if one.is_problem]
    if as_json:
        data = {
            "config": config,
            "is_config": not problems,
            "auto_resume": loaded.resume is not None,
            "initializers": [{"key": one.key, "line": one.line, "kind": one.kind} for one in found if one.kind],
            "observers": list(loaded.observers),
            "problems": [{"key": one.key, "line": one.line, "message": one.message} for one in problems],
        }
        show_json("validate", data)
    else:
        for one in found:
            show_text(f"{'x' if one.is_problem else 'ok'} {one.message}")
        typer.echo(f"initializers: {len(loaded.entries)}, problems: {len(problems)}")
    if problems:
        raise typer.Exit(1)


def _findings(loaded: LoadedConfig) -> list[_Finding]:
    from noether_init_core.stack.config_files import examine_entry

    found = []
    for entry in filter(None, [*loaded.entries, loaded.resume]):
        validated, wrong = examine_entry(entry)
        found += [_wrong(entry.key_path, error) for error in wrong]
        if validated is not None and entry is loaded.resume:
            which = "good set" if getattr(validated, "on_invalid", "") == "previous" else "set"
            said = f"auto_resume: the newest {which} of this run comes before the list"
            found.append(_Finding(entry.key_path, entry.line, said))
        elif validated is not None:
            part = f" for {'.'.join(entry.submodel)}" if entry.submodel else ""
            hooks = f", {', '.join(sorted(entry.hooks))} only" if entry.hooks is not None else ""
            said = f"{entry.key_path}: {validated.kind}{part}{hooks}"
            found.append(_Finding(entry.key_path, entry.line, said, kind=validated.kind))
    for number, name in enumerate(loaded.observers):
        place, line = f"observers.{number}", loaded.document.line(("observers", number))
        try:
            found.append(_Finding(place, line, f"{place}: {name} ({describe_observer(name).source})"))
        except ConfigError as error:
            found.append(_wrong(place, loaded.document.error(str(error), ("observers", number))))
    return found


def _wrong(place: str, error: ConfigError) -> _Finding:
    return _Finding(getattr(error, "key_path", "") or place, getattr(error, "line", None), str(error), True)


@with_start
def suggest(start: Start, as_json: AsJson = False, real: Real = False) -> None:
    """Suggest transforms for each file and model of a config, from names and shapes. Nothing is applied.

    Rules and surgery fields that the config has are not looked at: the suggestion is for a config without them. Exit
    code 0: with the suggestion, the plan has no problem and nothing is unsure. 1: look at it before you paste it.
    """
    with start.build(real=real) as (stack, built):
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
                "unmatched_sources": one.unmatched_sources,
                "unmatched_targets": one.unmatched_targets,
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
    if not all(one.is_fine and one.is_sure for _number, _path, one in found):
        raise typer.Exit(1)


@with_start
def plan(
    start: Start,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the plan to a file as JSON; - prints it, and nothing else.", metavar="FILE"),
    ] = None,
    html: Html = None,
    show_all: ShowAll = False,
    real: Real = False,
) -> None:
    """Show what a config will do to a model. Only headers of files are read, and nothing is changed.

    Exit code 0: it can be done. 1: the plan or a file has problems. The model is built without memory unless --real.
    """
    check_plan(json_file)
    check_page(html)
    with start.build(real=real) as (stack, built):
        planned = stack.plan(built)
    to_stdout = str(json_file) == "-"
    if to_stdout:
        typer.echo(planned.to_json())
    else:
        if json_file is not None:
            write_text(json_file, planned.to_json() + "\n")
        _show(stack, built, planned, show_all)
    models = ", ".join(dict.fromkeys(row.model for row in planned.rows)) or "the model"
    write_html(html, planned, f"What {start.config.name} will do to {models}")
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
    if not planned.is_fine or any(error is not None for _kind, error in unplanned):
        raise typer.Exit(1)


def _show(stack: InitializerStack, model: Any, planned: LoadPlan, show_all: bool) -> None:
    from noether_init_core.render.terminal import PlanView

    if planned.origins:
        Console().print(PlanView(planned, unfolded=show_all, notes=_notes(stack, model)))
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
