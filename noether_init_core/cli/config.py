"""The commands about a config: what it asks for, lacks, will do to a model, and what it makes of one."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer
from rich.console import Console
from rich.text import Text

from noether_init_core.cli.options import AsJson, Config, Html, Real, ShowAll, Start, with_start
from noether_init_core.cli.output import (
    check_target,
    show,
    show_json,
    show_text,
    write_html,
    write_text,
)
from noether_init_core.cli.usage import how_to_see, show_traceback
from noether_init_core.errors import CheckpointWriteError, ConfigError, InitError
from noether_init_core.kinds.lookup import OBSERVERS
from noether_init_core.messages import counted, one_line, yaml_line
from noether_init_core.progress import progress

if TYPE_CHECKING:
    from noether_init_core.saving.file_writing import WrittenFile
    from noether_init_core.sets.provenance import InitReport
    from noether_init_core.stack.config_files import LoadedConfig
    from noether_init_core.stack.stack import InitializerStack
    from noether_init_core.surgery.plan import LoadPlan

#: What stands in ``apply --out`` for the name of each model.
_PLACE = "{model}"


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
            found.append(_Finding(place, line, f"{place}: {name} ({OBSERVERS.choose(name).source})"))
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
                "coverage": one.plan.coverage(),
                "is_fine": one.plan.is_fine,
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
            show("# nothing to suggest: the config has no initializers that load weights")
    if not all(one.plan.is_fine and one.is_sure for _number, _path, one in found):
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
    check_target(json_file, "--json")
    check_target(html, "--html")
    with start.build(real=real) as (stack, built):
        planned = stack.plan(built)
    to_stdout = str(json_file) == "-"
    if to_stdout:
        typer.echo(planned.to_json())
    else:
        if json_file is not None:
            write_text(json_file, planned.to_json() + "\n")
        _show_plan(stack, built, planned, show_all)
    write_html(html, planned)
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


def _show_plan(stack: InitializerStack, model: Any, planned: LoadPlan, show_all: bool) -> None:
    from noether_init_core.render.terminal import PlanView

    if planned.origins:
        Console().print(PlanView(planned, unfolded=show_all, notes=_notes(stack, model)))
    elif not stack.initializers or any(one.states_plan for one in stack.initializers):
        show("nothing to plan: the config has no initializers that load weights")


def _notes(stack: InitializerStack, model: Any) -> dict[tuple[int, str], str]:
    """Whether a manifest vouches for each file; none where it cannot be located again, since the plan is valid."""
    from noether_init_core.files.checkpoint import Digests

    try:
        return {
            (number, path): "committed, digests present" if isinstance(source.digests, Digests) else "not committed"
            for number, path, source in stack.sources(model)
            if source.origin
        }
    except InitError:
        return {}


@with_start
def apply(
    start: Start,
    out: Annotated[
        Path,
        typer.Option(
            help="The file: .safetensors, or .th, .pt for torch. {model} in it: one for each.", metavar="FILE"
        ),
    ],
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**32 - 1, metavar="INT", help="For what the model draws when it is built."),
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there, in one step.")] = False,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Carry out what plan shows, on the CPU and without training, and write all weights of the model as one file.

    The model is built with values, so that what the config leaves fresh has some: those of --seed. FILE.report.json
    beside it says where each tensor came from. The kind file reads the file again. Exit code 1: the plan or a file has
    problems; then nothing is written.
    """
    check_target(html, "--html")
    from noether_init_core.render.terminal import PlanView
    from noether_init_core.saving.file_writing import check_place

    check_place(Path(str(out).replace(_PLACE, "model")), replace=force)
    import numpy
    import torch

    # whatever a model draws with
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    with start.build(real=True) as (stack, built):
        states = _states(built, out)
        for path in states:
            check_place(path, replace=force)
            report_path = _report_of(path)
            is_replaceable = force and report_path.is_file() and not report_path.is_symlink()
            if os.path.lexists(report_path) and not is_replaceable:
                raise CheckpointWriteError(
                    f"{report_path} is there already, and was left as it is. Next: another --out", path=report_path
                )
        plan = stack.plan(built)
        if not plan.is_fine:
            Console().print(PlanView(plan))
            show("nothing was written", err=True)
            raise typer.Exit(1)
        with progress("loading", None):
            report = stack.initialize(built, trains=False)
    for source, path in itertools.product(report.sources, states):
        if path.exists() and Path(source.path).exists() and path.samefile(source.path):
            raise ConfigError(f"{path} is what the weights were read from. Nothing was written. Next: another --out")
    written = _write(states, report, replace=force)
    fresh = report.fresh_parameters()
    if as_json:
        files = [attrs.asdict(one) for one in written]
        show_json("apply", {"files": files, "fresh": list(fresh), "report": report.to_dict()})
    else:
        _show_written(written, report, len(fresh))
    write_html(html, report)


def _states(model: Any, out: Path) -> dict[Path, Any]:
    """File -> single model, each with a name of its own."""
    from noether_init_core.models import leaf_models

    leaves = list(leaf_models(model))
    if len(leaves) > 1 and _PLACE not in str(out):
        names = ", ".join(path for path, _leaf in leaves)
        raise typer.BadParameter(
            f"the model is several: {names}. Next: --out {out.with_stem(out.stem + '-' + _PLACE)}", param_hint="--out"
        )
    return {Path(str(out).replace(_PLACE, path)): leaf for path, leaf in leaves}


def _write(states: Mapping[Path, Any], report: InitReport, *, replace: bool) -> list[WrittenFile]:
    """The weights of each model, and the report beside them. Where one cannot be written, none that is new is left."""
    from noether_init_core.saving.file_writing import write_weights

    written: list[WrittenFile] = []
    new: list[Path] = []
    try:
        for path, leaf in states.items():
            with progress(one_line(f"writing {path.name}"), None):
                # one text alone, since the library writes several in any order
                written.append(write_weights(path, leaf.state_dict(), metadata={"format": "pt"}, replace=replace))
                new.append(path)
                write_text(_report_of(path), report.to_json() + "\n")
                new.append(_report_of(path))
    except InitError:
        if not replace:  # what was there before is gone with it
            for path in new:
                path.unlink(missing_ok=True)
        raise
    return written


def _report_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.report.json")


def _show_written(written: list[WrittenFile], report: InitReport, fresh: int) -> None:
    Console().print(Text(str(report)))
    for one in written:
        show(f"{one.path}: {counted(one.tensors, 'tensor')}, {one.bytes:,} bytes, {one.digest}")
    if fresh:
        show(f"{counted(fresh, 'parameter')} fresh: not from a checkpoint, but drawn with --seed or by a kind")
    show("to start from it:")
    for one in written:
        show(f"  - {yaml_line({'kind': 'file', 'path': str(one.path), 'digest': one.digest})}")
