"""``noether-init inspect PATH``: what is in a file, a set, a run or an output root."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from noether_init_core.cli.asked_path import absent, text_instead
from noether_init_core.messages import one_line, printable

if TYPE_CHECKING:
    from noether_init_core.inspection.findings import (
        Content,
        Found,
        FoundFile,
        FoundPart,
        FoundRoot,
        FoundRun,
        FoundRunFolder,
        FoundSetFolder,
    )

__all__ = ["run"]

# symbol, word and colour of what vouches for a set
_MARKS = {"committed": ("=", "green"), "legacy": ("o", "yellow"), None: ("-", "dim")}
_MOST_TIED = 5
_MOST_TEXTS = 4
_NARROW = 80
# rich takes a quarter of a millisecond for each
_MOST_IN_TABLE = 2_000


def run(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A checkpoint file, a set, a run, or an output root.", show_default=False),
    ],
    unfolded: Annotated[bool, typer.Option("--all", help="A line for each key of a file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object.")] = False,
) -> None:
    """Show what a file or a folder holds. Only headers and manifests are read, and nothing is created.

    Exit code 1: something there cannot be read, or is not as it was written; the rest is shown. Whether every byte is
    as it was written, verify says.
    """
    if not path.exists():
        raise absent(path)
    error = text_instead(path)
    if error is not None:
        raise error
    found = _look(path)
    if as_json:
        from noether_init_core.inspection.findings import to_json_data

        typer.echo(json.dumps(to_json_data(found), indent=1))
    else:
        _show(found, unfolded=unfolded)
    if found.problems:
        raise typer.Exit(1)


def _look(path: Path) -> Found:
    if path.is_dir():
        from noether_init_core.inspection.runs import look_at_folder

        return look_at_folder(path)
    from noether_init_core.inspection.files import look_at_file

    return look_at_file(path)


def _show(found: Found, *, unfolded: bool) -> None:
    from noether_init_core.inspection.findings import FoundFile, FoundRunFolder, FoundSetFolder

    if isinstance(found, FoundFile):
        _show_file(found, unfolded=unfolded)
    elif isinstance(found, FoundSetFolder):
        _show_set(found)
    elif isinstance(found, FoundRunFolder):
        _show_run(found)
    else:
        _show_root(found)


def _show_file(found: FoundFile, *, unfolded: bool) -> None:
    from noether_init_core.render.folding import fold_alike
    from noether_init_core.render.words import amount

    looks = {one.key: (one.dtype, one.shape) for one in found.keys}
    lines = len(looks)
    if unfolded:
        rows = [(key, dtype, _shape(shape), amount(prod(shape))) for key, (dtype, shape) in looks.items()]
        _print(("key", "dtype", "shape", "elements"), rows)
    elif looks:
        table = []
        for pattern, keys in fold_alike(looks):
            dtype, shape = looks[keys[0]]
            elements = amount(len(keys) * prod(shape))
            table.append((pattern.text(_MOST_TEXTS), str(len(keys)), dtype, _shape(shape), elements))
        _print(("key", "keys", "dtype", "shape", "elements"), table)
        lines = len(table)
    for keys in found.tied[:_MOST_TIED]:
        typer.echo(one_line(f"tied: {' = '.join(keys)}"))
    if found.tied[_MOST_TIED:]:
        typer.echo(f"tied: and {len(found.tied) - _MOST_TIED} more (--json has them)")
    if found.committed:
        typer.echo(one_line(f"committed set: {found.path.resolve().parent.name} ({', '.join(found.tags)})"))
    for what, said in found.facts:
        typer.echo(one_line(f"{what}: {said}"))
    if found.file_format == "torch" and not found.has_checksums and found.content.bytes:
        typer.echo("no checksums: its bytes can be verified by a digest only")
    _show_problems(found.problems)
    unfolds = " (--all unfolds)" if lines < len(looks) else ""
    typer.echo(f"{_said(found.content)}, {found.file_format} format{unfolds}")


def _show_set(found: FoundSetFolder) -> None:
    from noether_init_core.render.words import amount

    one = found.set
    run = found.run_id if found.stage is None else f"{found.run_id}/{found.stage}"
    typer.echo(one_line(f"set {one.name} of run {run}, committed {one.created or ''}".rstrip()))
    rows = []
    for file in one.files:
        content = file.content
        numbers = ("?", "?") if content is None else (str(content.tensors), amount(content.elements))
        rows.append((file.model, _part(file), *numbers, "gone" if file.bytes is None else f"{file.bytes:,}", file.name))
    _print(("model", "part", "tensors", "elements", "bytes", "file"), rows)
    typer.echo(one_line(f"tags: {', '.join(one.tags)}"))
    for file in one.files:
        if file.part == "model" and file.info is None and file.content is not None:
            typer.echo(one_line(f"weights of {file.model}: {_said(file.content)}"))
    if found.probe is not None:
        outputs = ", ".join(found.probe.outputs[:_MOST_TIED])
        typer.echo(one_line(f"probe: of {found.probe.model}: {outputs}, {found.probe.bytes:,} bytes"))
    else:
        typer.echo("probe: none")
    typer.echo(f"where weights came from: {'recorded' if one.has_provenance else 'not recorded'}")
    _show_problems(found.problems)
    typer.echo(f"{len(one.files)} files, {one.bytes:,} bytes in all")


def _show_run(found: FoundRunFolder) -> None:
    for number, one in enumerate(found.stages):
        if number:
            typer.echo("")
        _show_stage(one)


def _show_stage(one: FoundRun) -> None:
    typer.echo(one_line(one.run_id if one.stage is None else f"{one.run_id}/{one.stage}"))
    if one.sets:
        with_probes = any(found.has_probe for found in one.sets)
        rows: list[tuple[str | tuple[str, str], ...]] = []
        for found in one.sets:
            # the tag of its own iteration stands in the column before
            tags = ", ".join(tag for tag in found.tags if tag != found.iteration)
            weights = [f"{file.model} ({file.info})" if file.info else file.model for file in _of(found.files, "model")]
            optimizers = [file.model for file in _of(found.files, "optim")]
            trainers = [file.model for file in _of(found.files, "trainer")]
            probe = ["yes" if found.has_probe else "no"] if with_probes else []
            rows.append(
                (
                    _marked(found.state),
                    found.iteration or "unknown",
                    tags,
                    ", ".join(dict.fromkeys(weights)),
                    ", ".join(optimizers),
                    ", ".join(trainers),
                    *probe,
                    f"{found.bytes:,}",
                )
            )
        probe = ["probe"] if with_probes else []
        _print(("", "iteration", "tags", "weights", "optimizer", "trainer", *probe, "bytes"), rows)
    for model in one.models:
        typer.echo(one_line(f"weights of {model.model}: {_said(model.content)}"))
    for name in one.uncommitted:
        typer.echo(one_line(f"- {name}: uncommitted, never picked"))
    _show_problems(one.problems)
    typer.echo(f"{_counted(len(one.sets), 'set')}, {one.bytes:,} bytes" if one.sets else "no sets")


def _show_root(found: FoundRoot) -> None:
    rows = []
    for one in found.runs:
        tags = ", ".join(tag for tag in one.tags if tag != one.newest)
        models = ", ".join(one.models)
        rows.append(
            (
                _marked(one.state),
                one.name,
                one.newest or ("unknown" if one.sets else ""),
                tags,
                models,
                str(one.sets),
                f"{one.bytes:,}",
            )
        )
    _print(("", "run", "newest", "tags", "models", "sets", "bytes"), rows)
    for one in found.runs:
        if one.uncommitted:
            typer.echo(one_line(f"- {one.name}: {_counted(one.uncommitted, 'save')} never finished, never picked"))
    _show_problems(found.problems)
    first = shlex.quote(str(_from_here(found.runs[0].path)))
    typer.echo(f"{_counted(len(found.runs), 'run')}. Next: noether-init inspect {first}")


def _show_problems(problems: Iterable[str]) -> None:
    for problem in problems:
        typer.echo(f"x {printable(problem)}")


def _of(files: Sequence[FoundPart], part: str) -> list[FoundPart]:
    return [file for file in files if file.part == part]


def _part(file: FoundPart) -> str:
    name = {"model": "weights", "optim": "optimizer", "trainer": "trainer"}[file.part]
    return f"{name} ({file.info})" if file.info else name


def _from_here(path: Path) -> Path:
    """Below the current folder as it is seen from there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


def _marked(state: str | None) -> tuple[str, str]:
    symbol, style = _MARKS[state]
    return f"{symbol} {state or 'empty'}", style


def _said(content: Content) -> str:
    """``40 tensors (float32), 57.1 k parameters, 228,312 bytes``."""
    from noether_init_core.render.words import amount

    if content.parameters is None:
        numbers = f"{amount(content.elements)} elements"
    else:
        numbers = f"{amount(content.parameters)} parameters"
        buffers = content.elements - content.parameters
        numbers += f" and {amount(buffers)} elements of buffers" if buffers else ""
    return f"{_counted(content.tensors, 'tensor')}{_dtypes(content.dtypes)}, {numbers}, {content.bytes:,} bytes"


def _dtypes(dtypes: Mapping[str, int]) -> str:
    if not dtypes:
        return ""
    shown = [f"{number} {dtype}" for dtype, number in dtypes.items()] if len(dtypes) > 1 else [*dtypes]
    return f" ({', '.join(shown)})"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _shape(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _print(columns: Sequence[str], rows: Iterable[Sequence[str | tuple[str, str]]]) -> None:
    """A table without lines; a cell may be a text and its colour."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [[(cell, "") if isinstance(cell, str) else cell for cell in row] for row in rows]
    if len(lines) > _MOST_IN_TABLE:
        texts = [tuple(columns), *(tuple(one_line(text) for text, _style in line) for line in lines)]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        padded = ("  ".join(map(str.ljust, text, widths)).rstrip() for text in texts)
        typer.echo("\n".join(padded))
        return
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        is_number = column in ("keys", "elements", "tensors", "bytes", "sets")
        # a short name is not broken for the sake of tags
        is_short = column == "run" and all(len(line[number][0]) <= console.width // 3 for line in lines)
        table.add_column(
            column,
            overflow="fold",
            no_wrap=is_number or is_short or column in ("", "iteration", "newest", "dtype"),
            justify="right" if is_number else "left",
        )
    is_narrow = columns[0] == "" and console.width < _NARROW
    for line in lines:
        # on a narrow terminal the symbol has to do; what it means stands below
        shown = [(line[0][0][:1], line[0][1]), *line[1:]] if is_narrow else line
        table.add_row(*(Text(one_line(text), style) for text, style in shown))
    console.print(table)
    if is_narrow:
        typer.echo(", ".join(dict.fromkeys(line[0][0] for line in lines)))
