"""``noether-init apply CONFIG --model module:callable --out FILE``: what a config makes of a model, as a file."""

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

from noether_init_core.cli.files import check_page, write_html, write_text
from noether_init_core.cli.options import AsJson, Html, Start, with_start
from noether_init_core.cli.output import progress, show, show_json
from noether_init_core.errors import CheckpointWriteError, ConfigError, InitError
from noether_init_core.messages import counted, one_line, yaml_line

if TYPE_CHECKING:
    from noether_init_core.saving.weights_file import WrittenFile
    from noether_init_core.sets.provenance import InitReport

_PLACE = "{model}"


@with_start
def run(
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
    check_page(html)
    from noether_init_core.render.terminal import PlanView
    from noether_init_core.saving.weights_file import check_place

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
            _check_report(_report_of(path), replace=force)
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
        _show(written, report, len(fresh))
    write_html(html, report, f"What {start.config.name} made of the model")


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
    from noether_init_core.saving.weights_file import write_weights

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


def _check_report(path: Path, *, replace: bool) -> None:
    if os.path.lexists(path) and (not replace or path.is_symlink() or not path.is_file()):
        raise CheckpointWriteError(f"{path} is there already, and was left as it is. Next: another --out", path=path)


def _show(written: list[WrittenFile], report: InitReport, fresh: int) -> None:
    from noether_init_core.render.terminal import ReportView

    Console().print(ReportView(report))
    for one in written:
        show(f"{one.path}: {counted(one.tensors, 'tensor')}, {one.bytes:,} bytes, {one.digest}")
    if fresh:
        show(f"{counted(fresh, 'parameter')} fresh: not from a checkpoint, but drawn with --seed or by a kind")
    show("to start from it:")
    for one in written:
        show(f"  - {yaml_line({'kind': 'file', 'path': str(one.path), 'digest': one.digest})}")
