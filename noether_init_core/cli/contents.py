"""``ninit inspect`` and ``ninit verify``: what a file, a set, a run or an output root holds, and its health."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from noether_init_core.cli.options import AsJson
from noether_init_core.cli.output import (
    Cell,
    check_path,
    show,
    show_json,
    show_table,
    show_text,
)
from noether_init_core.errors import CheckpointError
from noether_init_core.files.formats.others import NEXT_COPY
from noether_init_core.files.storage.disk import LOCAL, reaching, resolved
from noether_init_core.messages import counted, listed, one_line
from noether_init_core.paths import name_of_run
from noether_init_core.progress import progress
from noether_init_core.render.folding import fold_alike
from noether_init_core.render.text import amount, from_here, sizes

if TYPE_CHECKING:
    from noether_init_core.inspection.findings import (
        Content,
        FoundFile,
        FoundPart,
        FoundRoot,
        FoundRun,
        FoundSetFolder,
    )
    from noether_init_core.sets.health import FileHealth, FlatHealth, RunHealth, SetHealth

#: State of a set or a file -> symbol and word, and their colour.
_MARKS = {
    "committed": ("= committed", "green"),
    "legacy": ("o legacy", "yellow"),
    None: ("- empty", "dim"),
    "good": ("= good", "green"),
    "unverifiable": ("? unverifiable", "yellow"),
    "nonfinite": ("! nonfinite", "yellow"),
    "broken": ("x broken", "red"),
    "uncommitted": ("- uncommitted", "dim"),
}
_PARTS = {"model": "weights", "optim": "optimizer", "trainer": "trainer"}
_MOST_TIED = 5
_MOST_TEXTS = 4
_LONGEST_FACT = 200
_MOST_UNREAD = 8


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A checkpoint file, a set folder, a run folder, or an output root.", show_default=False
        ),
    ],
    unfolded: Annotated[bool, typer.Option("--all", help="Show each key on its own line.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a file or a folder holds. Reads only headers and manifests, and creates nothing.

    Exit code 1: a file cannot be read, or is inconsistent; the rest is shown. Bytes are not verified: use ninit verify.
    """
    check_path(path)
    from noether_init_core.inspection.findings import FoundFile, FoundRunFolder, FoundSetFolder, to_json_data
    from noether_init_core.inspection.reading import look_at_file, look_at_folder

    with reaching(path):
        is_folder = LOCAL.is_folder(path)
    found = look_at_folder(path) if is_folder else look_at_file(path)
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
        show(f"tied: and {len(found.tied) - _MOST_TIED} more (--json lists all)")
    if found.committed:
        show(f"committed set: {resolved(found.path).parent.name} (saved as {', '.join(found.tags)})")
    for what, value in _facts(found):
        if value not in (None, ""):
            show(f"{what}: {one_line(str(value), _LONGEST_FACT)}")
    if found.unread:
        parts = listed([f"{place} ({part})" for place, part in found.unread.items()], _MOST_UNREAD)
        show_text(one_line(f"unread: {parts}"))
    if found.file_format == "torch" and not found.has_checksums and found.content.bytes:
        show("no checksums in the file: only a digest can verify its bytes")
    _show_problems(found.problems)
    unfolds = " (--all unfolds)" if len(rows) < len(looks) else ""
    show(f"{_summary(found.content)}, {found.file_format} format{unfolds}")


def _facts(found: FoundFile) -> Iterator[tuple[str, Any]]:
    """What the file records besides tensors: run, iteration, and of a loop seed, names, and place in the data.

    The file may come from any program, so that a value of any type is expected under each key.
    """
    metadata = found.metadata
    if found.file_format == "safetensors":
        yield from ((f"metadata {key}", text) for key, text in metadata.items())
        return
    state = _mapping(metadata, "trainer_state")
    loader = _mapping(state, "loader")
    yield "run", metadata.get("run_id")
    yield "iteration", ", ".join(f"{name} {count}" for name, count in _mapping(metadata, "training_iteration").items())
    yield "seed", state.get("seed")
    yield "with state", ", ".join(_mapping(state, "stateful"))
    yield "callbacks", ", ".join(_mapping(metadata, "callback_state_dicts"))
    yield "data", f"{loader['batch']} batches of this epoch consumed" if "batch" in loader else None
    known = {"run_id", "training_iteration", "checkpoint_tag", "trainer_state", "callback_state_dicts"}
    yield "other keys", listed([key for key in metadata if key not in known], 8)


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _show_set(found: FoundSetFolder) -> None:
    one = found.set
    run = name_of_run(found.run_id, found.stage)
    show(f"set {one.name} of run {run}, committed {one.created or ''}".rstrip())
    rows = []
    for file in one.files:
        content = file.content
        numbers = ("?", "?") if content is None else (str(content.tensors), amount(content.elements))
        size = "missing" if file.bytes is None else f"{file.bytes:,}"
        rows.append((file.model, _named(_PARTS[file.part], file.info), *numbers, size, file.name))
    show_table(("model", "part", "tensors", "elements", "bytes", "file"), rows)
    show(f"tags: {', '.join(one.tags)}")
    for file in one.files:
        if file.part == "model" and file.info is None and file.content is not None:
            show(f"weights of {file.model}: {_summary(file.content)}")
    if found.probe is not None:
        outputs = ", ".join(found.probe.outputs[:_MOST_TIED])
        show(f"probe of {found.probe.model}: {outputs}, {found.probe.bytes:,} bytes")
    else:
        show("probe: none")
    show(f"origin of the weights: {'recorded' if one.has_provenance else 'not recorded'}")
    _show_problems(found.problems)
    show(f"{counted(len(one.files), 'file')}, {one.bytes:,} bytes in all")


def _show_stage(one: FoundRun) -> None:
    show(name_of_run(one.run_id, one.stage))
    if one.sets:
        with_probes = any(found.has_probe for found in one.sets)
        rows: list[tuple[Cell, ...]] = []
        for found in one.sets:
            # each set has its iteration as a tag, which the column before shows already
            tags = ", ".join(tag for tag in found.tags if tag != found.iteration)
            parts = [_models(found.files, part) for part in _PARTS]
            probe = ["yes" if found.has_probe else "no"] if with_probes else []
            iteration = found.iteration or "unknown"
            rows.append((_MARKS[found.state], iteration, tags, *parts, *probe, f"{found.bytes:,}"))
        probe = ["probe"] if with_probes else []
        show_table(("", "iteration", "tags", *_PARTS.values(), *probe, "bytes"), rows)
    for model in one.models:
        show(f"weights of {model.model}: {_summary(model.content)}")
    for name in one.uncommitted:
        show(f"- {name}: uncommitted; it is never selected")
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
            show(f"- {one.name}: {counted(one.uncommitted, 'unfinished save')}, never selected")
    _show_problems(found.problems)
    first = shlex.quote(str(from_here(found.runs[0].path)))
    show(f"{counted(len(found.runs), 'run')}. Next: ninit inspect {first}")


def _show_problems(problems: Iterable[str]) -> None:
    for problem in problems:
        show_text(f"x {problem}")


def _models(files: Sequence[FoundPart], part: str) -> str:
    return ", ".join(dict.fromkeys(_named(file.model, file.info) for file in files if file.part == part))


def _named(name: str, info: str | None) -> str:
    return f"{name} ({info})" if info else name


def _summary(content: Content) -> str:
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


def verify(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Checkpoint files, set folders, run folders, or output roots.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
    flat: Annotated[
        bool, typer.Option("--flat", help="Also compare flat files (copies for Noether) with their sets.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 also for files that have no checksums.")
    ] = False,
) -> None:
    """Verify files and sets: digests, checksums, structure, iterations. Changes nothing.

    Exit code 0: no damage was found; a file without checksums is marked unverifiable (1 with --strict). 1: a file is
    broken, or no set can be selected. Sets with NaN and unfinished saves are listed, and are not problems. Flat files
    beside committed sets are copies for Noether; without --flat they are counted and not read.
    """
    if not all(paths):
        raise typer.BadParameter("it is empty. Next: ninit verify .", param_hint="PATH")
    from noether_init_core.sets.health import FileHealth, RunHealth, bytes_to_verify, verify_file, verify_run
    from noether_init_core.sets.places import runs_at
    from noether_init_core.sets.snapshot import Snapshot

    files: list[FileHealth] = []
    runs: list[RunHealth] = []
    for path in map(Path, dict.fromkeys(paths)):
        try:
            check_path(path)
            with reaching(path):
                is_folder, nbytes = LOCAL.is_folder(path), LOCAL.size_of(path) or 0
            if is_folder:
                unreadable: dict[Path, CheckpointError] = {}
                at_path = runs_at(path, unreadable)
                found = [Snapshot(run) for run in at_path if run.checkpoint_path not in unreadable]
                with progress("verifying", sum(bytes_to_verify(one, flat=flat) for one in found)) as advance:
                    runs += [verify_run(snapshot, advance, asked=path, flat=flat) for snapshot in found]
                for one in at_path:
                    folder = one.checkpoint_path
                    if folder in unreadable:
                        error_of = (str(unreadable[folder]),)
                        runs.append(RunHealth(folder, one.run_id, one.stage_name, (), problems=error_of))
            else:
                with progress("verifying", nbytes) as advance:
                    files.append(verify_file(path, advance))
        except CheckpointError as error:
            if len(paths) == 1:
                raise
            files.append(FileHealth(path, "broken", problem=str(error)))
    problems = sum(one.problem_count for one in runs) + sum(bool(one.problem) for one in files)
    states = [one.state for one in files] + [one.state for run in runs for one in run.sets]
    counts = {"problems": problems, "unverifiable": states.count("unverifiable")}
    if as_json:
        health = {"runs": [attrs.asdict(one) for one in runs], "files": [attrs.asdict(one) for one in files]}
        show_json("verify", {"paths": paths, **counts, **health})
    else:
        for run in runs:
            _show_run(run)
        for file in files:
            _show_file_health(file)
        sets = sum(one.state != "uncommitted" for run in runs for one in run.sets)
        counted_parts = ([f"sets: {sets}"] if runs else []) + ([f"files: {len(files)}"] if files else [])
        counted_parts += [f"unverifiable: {counts['unverifiable']}"] if counts["unverifiable"] else []
        show(", ".join([*counted_parts, f"problems: {problems}"]))
    if problems or (strict and counts["unverifiable"]):
        raise typer.Exit(1)


def _show_file_health(file: FileHealth) -> None:
    mark = _MARKS[file.state][0]
    note = f" ({file.note})" if file.note else ""
    good = f"{mark} {file.path}: {file.tensors} tensors, {file.bytes:,} bytes{note}"
    show_text(f"{mark} {file.problem}" if file.problem else one_line(good))


def _show_run(run: RunHealth) -> None:
    # the folder of a committed set has its iteration in its name
    with_iterations = any(one.iteration is not None and one.iteration not in one.name for one in run.sets)
    rows: list[tuple[Cell, ...]] = []
    for one in run.sets:
        numbers = (str(one.files), f"{one.bytes:,}") if one.files else ("", "")
        iteration = [one.iteration or "unknown"] if with_iterations else []
        rows.append((_MARKS[one.state], one.name, *iteration, ", ".join(one.tags), *numbers))
    show(f"{name_of_run(run.run_id, run.stage_name)}  {from_here(run.folder)}")
    if rows:
        show_table(("", "set", *(["iteration"] if with_iterations else []), "tags", "files", "bytes"), rows)
    else:
        show("no sets")
    # what starts a run comes before what mends a file
    can_start = run.newest_good is not None and bool(run.use)
    for one in run.sets:
        _show_set_health(one, run.folder, with_mend=not can_start)
    _show_flat(run.flat)
    _show_problems(_short(problem, run.folder, "") for problem in run.flat.problems)
    if any(one.state in ("good", "nonfinite") and not one.is_committed for one in run.sets):
        show("no manifests: each file was verified with the checksums inside it")
    _show_problems(run.problems)
    if run.newest_good is not None and not run.use:
        show(f"newest good set that could be read: {run.newest_good.name}")
    elif run.newest_good is not None and run.newest_good.state == "nonfinite":
        show_text(f"every good set holds NaN or infinity. To start from {run.newest_good.name} anyway:\n  {run.use}")
    elif run.newest_good is not None:
        show_text(f"newest good set: {run.newest_good.name}. To start from it:\n  {run.use}")
        newest = next(one for one in run.sets if one.state != "uncommitted")
        if newest.state == "broken" and "kind: resume" in run.use:
            show("  # a resume goes back to it by itself with on_invalid: previous")
    elif run.use:
        show_text(f"no set could be verified. To start from the newest anyway:\n  {run.use}")
    elif run.sets:
        show("no good set")
    if can_start and any(NEXT_COPY in problem for one in run.sets for problem in one.problems):
        show("  # to mend a damaged file, copy it again from where it was written")
    show("")


def _show_set_health(one: SetHealth, folder: Path, *, with_mend: bool) -> None:
    problems = one.problems if with_mend else [problem.partition(f". {NEXT_COPY}")[0] for problem in one.problems]
    _show_problems(f"{one.name}: {_short(problem, folder, one.name)}" for problem in problems)
    if one.nonfinite:
        show(f"! {one.name}: {listed(one.nonfinite, 3)}; a resume refuses it (on_nonfinite: error)")
    for note in one.notes:
        show(f"- {one.name}: {note}")
    if one.state == "uncommitted":
        show(f"- {one.name}: an unfinished save; it is never selected")


def _short(text: str, folder: Path, name: str) -> str:
    """The text without the folders that the line names already."""
    from noether_init_core.sets.checkpoint_set import SETS_FOLDER

    return text.replace(f"{folder / SETS_FOLDER / name}/", "").replace(f"{folder}/", "")


def _show_flat(flat: FlatHealth) -> None:
    good, rest = flat.compared - len(flat.problems), flat.files - flat.compared
    if flat.compared:
        left = f"; {rest} were not read: the last writer was another program" if rest else ""
        show(f"- of {flat.files} flat files, {good} are the same as in their sets{left}")
    elif flat.files:
        reason = "they are copies for Noether (--flat compares those of our saves)"
        show(f"- {flat.files} flat files were not read: {reason}")
    for name in flat.changed:
        show(f"- {name} was changed after our save: another program wrote it, or it is damaged")
