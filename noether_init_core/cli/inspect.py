"""``noether-init inspect PATH``: what is in a file, a set, a run or an output root."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from noether_init_core.cli.files import check_path
from noether_init_core.cli.options import AsJson
from noether_init_core.cli.output import Cell, from_here, show, show_json, show_table, show_text
from noether_init_core.messages import counted
from noether_init_core.render.folding import fold_alike
from noether_init_core.render.text import amount, sizes

if TYPE_CHECKING:
    from noether_init_core.inspection.findings import (
        Content,
        FoundFile,
        FoundPart,
        FoundRoot,
        FoundRun,
        FoundSetFolder,
    )

#: What vouches for a set -> symbol and word, and their colour.
_MARKS = {"committed": ("= committed", "green"), "legacy": ("o legacy", "yellow"), None: ("- empty", "dim")}
_PARTS = {"model": "weights", "optim": "optimizer", "trainer": "trainer"}
_MOST_TIED = 5
_MOST_TEXTS = 4


def run(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A checkpoint file, a set, a run, or an output root.", show_default=False),
    ],
    unfolded: Annotated[bool, typer.Option("--all", help="A line for each key of a file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a file or a folder holds. Only headers and manifests are read, and nothing is created.

    Exit code 1: something there cannot be read, or is not as it was written; the rest is shown. Whether every byte is
    as it was written, verify says.
    """
    check_path(path)
    from noether_init_core.inspection.findings import FoundFile, FoundRunFolder, FoundSetFolder, to_json_data
    from noether_init_core.inspection.reading import look_at_file, look_at_folder

    found = look_at_folder(path) if path.is_dir() else look_at_file(path)
    if as_json:
        show_json("inspect", to_json_data(found))
    elif isinstance(found, FoundFile):
        _show_file(found, unfolded=unfolded)
    elif isinstance(found, FoundSetFolder):
        _show_set(found)
    elif isinstance(found, FoundRunFolder):
        for stage in found.stages:
            if stage is not found.stages[0]:
                show("")
            _show_stage(stage)
    else:
        _show_root(found)
    if found.problems:
        raise typer.Exit(1)


def _show_file(found: FoundFile, *, unfolded: bool) -> None:
    looks = {one.key: (one.dtype, one.shape) for one in found.keys}
    rows: list[tuple[str, ...]] = []
    if unfolded:
        rows = [(key, dtype, sizes(shape), amount(prod(shape))) for key, (dtype, shape) in looks.items()]
        show_table(("key", "dtype", "shape", "elements"), rows)
    elif looks:
        for pattern, keys in fold_alike(looks):
            dtype, shape = looks[keys[0]]
            elements = amount(len(keys) * prod(shape))
            rows.append((pattern.text(_MOST_TEXTS), str(len(keys)), dtype, sizes(shape), elements))
        show_table(("key", "keys", "dtype", "shape", "elements"), rows)
    for keys in found.tied[:_MOST_TIED]:
        show(f"tied: {' = '.join(keys)}")
    if found.tied[_MOST_TIED:]:
        show(f"tied: and {len(found.tied) - _MOST_TIED} more (--json has them)")
    if found.committed:
        show(f"committed set: {found.path.resolve().parent.name} (saved as {', '.join(found.tags)})")
    for what, said in found.facts:
        show(f"{what}: {said}")
    if found.file_format == "torch" and not found.has_checksums and found.content.bytes:
        show("no checksums: its bytes can be verified by a digest only")
    _show_problems(found.problems)
    unfolds = " (--all unfolds)" if len(rows) < len(looks) else ""
    show(f"{_said(found.content)}, {found.file_format} format{unfolds}")


def _show_set(found: FoundSetFolder) -> None:
    one = found.set
    run = found.run_id if found.stage is None else f"{found.run_id}/{found.stage}"
    show(f"set {one.name} of run {run}, committed {one.created or ''}".rstrip())
    rows = []
    for file in one.files:
        content = file.content
        numbers = ("?", "?") if content is None else (str(content.tensors), amount(content.elements))
        size = "gone" if file.bytes is None else f"{file.bytes:,}"
        rows.append((file.model, _named(_PARTS[file.part], file.info), *numbers, size, file.name))
    show_table(("model", "part", "tensors", "elements", "bytes", "file"), rows)
    show(f"tags: {', '.join(one.tags)}")
    for file in one.files:
        if file.part == "model" and file.info is None and file.content is not None:
            show(f"weights of {file.model}: {_said(file.content)}")
    if found.probe is not None:
        outputs = ", ".join(found.probe.outputs[:_MOST_TIED])
        show(f"probe: of {found.probe.model}: {outputs}, {found.probe.bytes:,} bytes")
    else:
        show("probe: none")
    show(f"where weights came from: {'recorded' if one.has_provenance else 'not recorded'}")
    _show_problems(found.problems)
    show(f"{len(one.files)} files, {one.bytes:,} bytes in all")


def _show_stage(one: FoundRun) -> None:
    show(one.run_id if one.stage is None else f"{one.run_id}/{one.stage}")
    if one.sets:
        with_probes = any(found.has_probe for found in one.sets)
        rows: list[tuple[Cell, ...]] = []
        for found in one.sets:
            # the tag of its own iteration stands in the column before
            tags = ", ".join(tag for tag in found.tags if tag != found.iteration)
            parts = [_models(found.files, part) for part in ("model", "optim", "trainer")]
            probe = ["yes" if found.has_probe else "no"] if with_probes else []
            iteration = found.iteration or "unknown"
            rows.append((_MARKS[found.state], iteration, tags, *parts, *probe, f"{found.bytes:,}"))
        probe = ["probe"] if with_probes else []
        show_table(("", "iteration", "tags", "weights", "optimizer", "trainer", *probe, "bytes"), rows)
    for model in one.models:
        show(f"weights of {model.model}: {_said(model.content)}")
    for name in one.uncommitted:
        show(f"- {name}: uncommitted, never picked")
    _show_problems(one.problems)
    show(f"{counted(len(one.sets), 'set')}, {one.bytes:,} bytes" if one.sets else "no sets")


def _show_root(found: FoundRoot) -> None:
    rows = []
    for one in found.runs:
        tags = ", ".join(tag for tag in one.tags if tag != one.newest)
        newest = one.newest or ("unknown" if one.sets else "")
        numbers = str(one.sets), f"{one.bytes:,}"
        rows.append((_MARKS[one.state], one.name, newest, tags, ", ".join(one.models), *numbers))
    show_table(("", "run", "newest", "tags", "models", "sets", "bytes"), rows)
    for one in found.runs:
        if one.uncommitted:
            show(f"- {one.name}: {counted(one.uncommitted, 'save')} never finished, never picked")
    _show_problems(found.problems)
    first = shlex.quote(str(from_here(found.runs[0].path)))
    show(f"{counted(len(found.runs), 'run')}. Next: noether-init inspect {first}")


def _show_problems(problems: Iterable[str]) -> None:
    for problem in problems:
        show_text(f"x {problem}")


def _models(files: Sequence[FoundPart], part: str) -> str:
    return ", ".join(dict.fromkeys(_named(file.model, file.info) for file in files if file.part == part))


def _named(name: str, info: str | None) -> str:
    return f"{name} ({info})" if info else name


def _said(content: Content) -> str:
    """``40 tensors (float32), 57.1 k parameters, 228,312 bytes``."""
    if content.parameters is None:
        numbers = f"{amount(content.elements)} elements"
    else:
        numbers = f"{amount(content.parameters)} parameters"
        buffers = content.elements - content.parameters
        numbers += f" and {amount(buffers)} elements of buffers" if buffers else ""
    many = len(content.dtypes) > 1
    dtypes = ", ".join(f"{number} {dtype}" if many else dtype for dtype, number in content.dtypes.items())
    tensors = counted(content.tensors, "tensor") + (f" ({dtypes})" if dtypes else "")
    return f"{tensors}, {numbers}, {content.bytes:,} bytes"
