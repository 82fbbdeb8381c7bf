"""The commands about a config: ``validate``, ``suggest``, ``plan`` and ``apply``."""

from __future__ import annotations

import itertools
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
    print_json,
    show,
    show_json,
    show_text,
    write_html,
    write_text,
)
from noether_init_core.cli.usage import how_to_see, show_traceback
from noether_init_core.errors import CheckpointWriteError, ConfigError, InitError
from noether_init_core.files.storage.disk import LOCAL, reaching
from noether_init_core.kinds.lookup import OBSERVERS
from noether_init_core.messages import counted, one_line, yaml_line
from noether_init_core.progress import progress

if TYPE_CHECKING:
    from noether_init_core.saving.file_writing import WrittenFile
    from noether_init_core.sets.provenance import InitReport
    from noether_init_core.stack.config_files import LoadedConfig
    from noether_init_core.stack.stack import InitializerStack
    from noether_init_core.surgery.plan import LoadPlan

#: ``apply --out`` replaces it by the path of each model.
_PLACE = "{model}"


@attrs.frozen
class _Finding:
    """One line of ``validate``: what a key declares, or what is wrong with it."""

    key: str
    line: int | None
    message: str
    is_problem: bool = False
    kind: str | None = None


def validate(config: Config, as_json: AsJson = False) -> None:
    """Check every entry of a config file against its kind, and the keys outside them. Reads no checkpoint.

    Exit code 0: the config is valid. 1: it has problems; each line names file, line and key.
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
            message = f"auto_resume: the newest {which} of this run comes before the list"
            found.append(_Finding(entry.key_path, entry.line, message))
        elif validated is not None:
            part = f" for {'.'.join(entry.submodel)}" if entry.submodel else ""
            hooks = f", {', '.join(sorted(entry.hooks))} only" if entry.hooks is not None else ""
            message = f"{entry.key_path}: {validated.kind}{part}{hooks}"
            found.append(_Finding(entry.key_path, entry.line, message, kind=validated.kind))
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
    """Suggest transforms for each file and model of a config, from names and shapes. Changes nothing.

    Transforms and other rules that the config already has are ignored: the suggestion replaces them. Exit code 0: with
    the suggestion the plan has no problem, and nothing is marked unsure. 1: check the suggestion before you paste it.
    """
    with start.build(real=real) as (stack, built):
        found = stack.suggest(built)
    if as_json:
        data: list[dict[str, Any]] = [
            {
                "initializer": number,
                "place": one.place,
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
            place = f"{one.place or f'initializers.{number}'}, {path}"
            show(f"# for {place}" + (f"; the rules are relative to {one.within}" if one.within else ""))
            show_text(str(one))
        if not found:
            show("# nothing to suggest: no initializer of the config loads weights")
    if not all(one.plan.is_fine and one.is_sure for _number, _path, one in found):
        raise typer.Exit(1)


@with_start
def plan(
    start: Start,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the plan to FILE as JSON; - prints only the JSON.", metavar="FILE"),
    ] = None,
    html: Html = None,
    show_all: ShowAll = False,
    real: Real = False,
) -> None:
    """Show what a config will do to a model. Reads only headers of files, and changes nothing.

    Exit code 0: the plan has no problem. 1: the plan or a file has problems. The model is built on the meta device,
    without memory, unless --real is given.
    """
    check_target(json_file, "--json")
    check_target(html, "--html")
    with start.build(real=real) as (stack, built):
        planned = stack.plan(built)
    if not real:
        # this model is on the meta device because the command built it there
        kept = tuple(problem for problem in planned.problems if problem.code != "memory")
        planned = attrs.evolve(planned, problems=kept)
    to_stdout = str(json_file) == "-"
    if to_stdout:
        print_json(planned.to_json())
    else:
        if json_file is not None:
            write_text(json_file, planned.to_json() + "\n")
        _show_plan(stack, built, planned, show_all)
    write_html(html, planned)
    unplanned = stack.check_unplanned(built)
    if not real and any(error is not None for _kind, error in unplanned):
        # check() of a kind may read values, which a meta model does not hold: try a real model before failing
        unplanned = stack.check_unplanned(start.load_model(real=True))
    for kind, error in unplanned:
        message = f"not planned: {kind} provides no plan"
        if error is not None:
            show_traceback(error)
            named = f"x {kind}: {type(error).__name__}: {one_line(str(error))}.{how_to_see()}"
            message = f"x {error}" if isinstance(error, InitError) else named
        show_text(message, err=to_stdout)
    if not planned.is_fine or any(error is not None for _kind, error in unplanned):
        raise typer.Exit(1)


def _show_plan(stack: InitializerStack, model: Any, planned: LoadPlan, show_all: bool) -> None:
    from noether_init_core.render.terminal import PlanView

    if planned.origins:
        Console().print(PlanView(planned, unfolded=show_all, notes=_notes(stack, model)))
    elif not stack.initializers or any(one.states_plan for one in stack.initializers):
        show("nothing to plan: no initializer of the config loads weights")


def _notes(stack: InitializerStack, model: Any) -> dict[tuple[int, str], str]:
    """Whether each file belongs to a committed set; empty where a source cannot be located a second time."""
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
            help="File to write: .safetensors, .th or .pt. With {model} in its name: one per model.", metavar="FILE"
        ),
    ],
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**32 - 1, metavar="INT", help="Seed for building the model."),
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists, atomically.")] = False,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Carry out a plan on the CPU, without training, and write all weights of the model to one file.

    Weights that the config does not load are drawn with --seed. FILE.report.json records where each tensor came from.
    To start from FILE, use the kind file. Exit code 1: the plan or a file has problems, and nothing was written.
    """
    check_target(html, "--html")
    from noether_init_core.render.terminal import PlanView
    from noether_init_core.saving.file_writing import check_place

    check_place(Path(str(out).replace(_PLACE, "model")), replace=force)
    import numpy
    import torch

    # a model may draw its first values with any of the three generators
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    with start.build(real=True) as (stack, built):
        states = _states(built, out)
        for path in states:
            check_place(path, replace=force)
            report_path = _report_of(path)
            with reaching(report_path):
                is_replaceable = force and LOCAL.is_file(report_path) and not LOCAL.is_link(report_path)
                is_taken = LOCAL.exists(report_path) and not is_replaceable
            if is_taken:
                raise CheckpointWriteError(
                    f"{report_path} exists and was not replaced. Next: another --out", path=report_path
                )
        plan = stack.plan(built)
        if not plan.is_fine:
            Console().print(PlanView(plan))
            show("no file was written", err=True)
            raise typer.Exit(1)
        with progress("loading", None):
            report = stack.initialize(built, trains=False)
    for source, path in itertools.product(report.sources, states):
        with reaching(path):
            is_source = LOCAL.is_same_file(path, Path(source.path))
        if is_source:
            raise ConfigError(
                f"{path} is the file that the weights were read from; it was not replaced. Next: another --out"
            )
    written = _write(states, report, replace=force)
    fresh = report.fresh_parameters()
    if as_json:
        files = [attrs.asdict(one) for one in written]
        show_json("apply", {"files": files, "fresh": list(fresh), "report": report.to_dict()})
    else:
        _show_written(written, report, len(fresh))
    write_html(html, report)


def _states(model: Any, out: Path) -> dict[Path, Any]:
    """File -> single model; raises ``typer.BadParameter`` for several models and one name."""
    from noether_init_core.models import leaf_models

    leaves = list(leaf_models(model))
    if len(leaves) > 1 and _PLACE not in str(out):
        names = ", ".join(path for path, _leaf in leaves)
        raise typer.BadParameter(
            f"the composite has several models: {names}. Next: --out {out.with_stem(out.stem + '-' + _PLACE)}",
            param_hint="--out",
        )
    return {Path(str(out).replace(_PLACE, path)): leaf for path, leaf in leaves}


def _write(states: Mapping[Path, Any], report: InitReport, *, replace: bool) -> list[WrittenFile]:
    """Write the weights of each model, and a report beside each file. If one fails, remove the new files."""
    from noether_init_core.saving.content import weights_of
    from noether_init_core.saving.file_writing import write_weights

    written: list[WrittenFile] = []
    new: list[Path] = []
    try:
        for path, leaf in states.items():
            with progress(one_line(f"writing {path.name}"), None):
                # one metadata entry alone: safetensors writes several in any order, which would change the digest
                written.append(
                    write_weights(path, weights_of(path.name, leaf), metadata={"format": "pt"}, replace=replace)
                )
                new.append(path)
                write_text(_report_of(path), report.to_json() + "\n")
                new.append(_report_of(path))
    except InitError:
        if not replace:  # with --force an earlier file may already be replaced; removing the new one would lose both
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
        show(f"{counted(fresh, 'parameter')} fresh: not from a checkpoint; drawn with --seed or by a kind")
    show("to start from it:")
    for one in written:
        show(f"  - {yaml_line({'kind': 'file', 'path': str(one.path), 'digest': one.digest})}")
