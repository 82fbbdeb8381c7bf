"""A full check of everything that is there: every set of a run, file by file, as values. Torch is not needed."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import attrs
import xxhash

from noether_init_core.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    TornSetError,
)
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import Storage
from noether_init_core.files.storage.local import open_file
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.checkpoint_set import (
    CheckpointFile,
    CheckpointSet,
    SetFolder,
    check_consistency,
    list_names,
    load_set,
    said_by,
    set_folders,
)
from noether_init_core.sets.flat_health import AuditedFlat, audit_flat
from noether_init_core.sets.manifest import MANIFEST_NAME, MAX_PROVENANCE_BYTES, PROBE_NAME, PROVENANCE_NAME
from noether_init_core.sets.nonfinite_sets import not_looked_at, refused_values
from noether_init_core.sets.places import runs_at
from noether_init_core.sets.store import RunStore

__all__ = [
    "AuditedFile",
    "AuditedSet",
    "AuditedStore",
    "Progress",
    "audit_file",
    "audit_store",
    "bytes_of",
    "stores_at",
]

#: Called with the number of bytes that have been verified since the last call.
Progress = Callable[[int], None]
State = Literal["good", "nonfinite", "unverifiable", "broken", "uncommitted"]
#: Of a file without checksums.
UNVERIFIABLE = "written without checksums, so its bytes cannot be verified. In a config: verify: header"


@attrs.frozen
class AuditedFile:
    """A file and what is wrong with it: nothing, where ``problem`` is empty. ``note`` says what was not checked.

    ``state`` is ``unverifiable`` for a file without checksums, of which only the structure was checked.
    """

    path: Path
    state: State = "good"
    tensors: int = 0
    bytes: int = 0
    problem: str = ""
    note: str = ""


@attrs.frozen
class AuditedSet:
    """A set and its state.

    Attributes:
        name: Its folder's name; in a folder without manifests the tag of its files.
        state: ``nonfinite``: as it was written, with values that a resume refuses; ``uncommitted``: a save that was
            never finished, which no reader ever picks; ``unverifiable``: nothing is wrong that could be seen, but some
            file has neither checksums nor a digest.
        is_committed: Whether a manifest vouches for it.
        iteration: As ``E1_U4_S32``; None where nobody says it.
        tags: The tags that mean it now. A later set has taken over the others that it was saved under.
        files: How many files it has.
        bytes: The bytes of them.
        run_id: The run that wrote it, as its files say; None where they do not.
        problems: What is wrong with it.
        notes: What is odd about it, and harms nobody.
        nonfinite: Which values a resume refuses. Where no manifest tells parameters from buffers, only NaN is.
    """

    name: str
    state: State
    is_committed: bool = True
    iteration: str | None = None
    tags: tuple[str, ...] = ()
    files: int = 0
    bytes: int = 0
    run_id: str | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()


@attrs.frozen
class AuditedStore:
    """The sets of one run and stage, newest first.

    Attributes:
        folder: The folder of checkpoints.
        run_id: The run, as a config has to name it.
        stage_name: The stage, likewise.
        sets: Every set, the uncommitted ones too.
        newest_good: The newest set that is good and can be resumed; failing that, the newest that is good; failing
            that, the newest that is nonfinite.
        use: The line of a config that starts from it; where no set is whole, from the newest that cannot be verified.
        problems: What is wrong beside the sets: flat files that are later than every committed set.
        flat: The flat files beside committed sets.
    """

    folder: Path
    run_id: str
    stage_name: str | None
    sets: tuple[AuditedSet, ...]
    newest_good: AuditedSet | None = None
    use: str = ""
    problems: tuple[str, ...] = ()
    flat: AuditedFlat = attrs.field(factory=AuditedFlat)

    @property
    def problem_count(self) -> int:
        """How many sets are broken, and other problems; sets that are nonfinite are as they were written."""
        return sum(one.state == "broken" for one in self.sets) + len(self.problems) + len(self.flat.problems)


def stores_at(path: Path) -> tuple[RunStore, ...]:
    """The runs and stages at a folder; see ``runs_at``."""
    return tuple(map(RunStore, runs_at(path)))


def audit_file(path: Path, progress: Progress | None = None) -> AuditedFile:
    """Verify one file: its structure, its header, and every byte that has a checksum."""
    try:
        with open_checkpoint(path) as reader:
            tensors = reader.tensors()
            note = "" if reader.is_verifiable else UNVERIFIABLE
            if not note:
                reader.verify()
            elif reader.format == "safetensors":
                note = "structure only: a safetensors file carries no checksums. In a config: digest: sha256:..."
            nbytes = sum(info.nbytes for info in tensors.values())
            found = AuditedFile(path, "unverifiable" if note else "good", len(tensors), nbytes, note=note)
    except (CheckpointError, OSError) as error:
        found = AuditedFile(path, "broken", problem=str(error))
    if progress is not None:
        progress(_size(path))
    return found


def bytes_of(store: RunStore) -> int:
    """How many bytes ``audit_store`` will report to its progress."""
    return sum(store.storage.size_of(file.path) or 0 for one in store.sets() for file in one.files)


def audit_store(
    store: RunStore, progress: Progress | None = None, *, asked: Path | None = None, flat: bool = False
) -> AuditedStore:
    """Verify every set of a run and stage: manifest, digests, checksums, structure, iterations and runs.

    Beside committed sets the flat files are not read: they are copies for Noether, which no reader of ours takes.

    Args:
        store: The run and stage.
        progress: Called as bytes are verified.
        asked: The folder that was asked for; where the output root lies below it, ``use`` says ``output_path``.
        flat: Whether copies that our saves wrote are compared with their sets, too.
    """
    folders = [one for one in set_folders(store.folder, store.storage) if store.storage.is_folder(one.path)]
    flat_files = AuditedFlat()
    if any(folder.is_committed(store.storage) for folder in folders):
        flat_files = audit_flat(store, compare=flat, progress=progress)
        audited = _committed(store, folders, progress)
    else:
        unfinished = [_unfinished(folder) for folder in folders]
        audited = [*((one, None) for one in unfinished), *_legacy(store, progress)]
    newest, chosen = _newest(audited, "good")
    if newest is None:
        newest, chosen = _newest(audited, "nonfinite")
    usable, source = (newest, chosen) if newest is not None else _newest(audited, "unverifiable")
    run_id, stage_name = _place(store, {one.run_id for one, _ in audited})
    use = ""
    if usable is not None and source is not None:
        more = ", verify: header" if newest is None else ""
        # a resume asks which model is meant where there are trainer files of several
        if source.models("trainer") and len({name for _, one in audited if one for name in one.models("trainer")}) > 1:
            more += f", model_name: {source.models('trainer')[0]}"
        root = store.paths.checkpoint_path.parents[1 if stage_name is None else 2]
        if asked is not None and root != asked.resolve() and root.is_relative_to(asked.resolve()):
            more += f", output_path: {_quoted(root)}"
        use = _config_line(run_id, stage_name, usable, source, more)
    sets = tuple(one for one, _ in audited)
    return AuditedStore(store.folder, run_id, stage_name, sets, newest, use, tuple(_beside(store)), flat_files)


def _newest(
    audited: list[tuple[AuditedSet, CheckpointSet | None]], state: State
) -> tuple[AuditedSet, CheckpointSet] | tuple[None, None]:
    """The newest set of this state that can be resumed; failing that, the newest of it."""
    found = [(one, source) for one, source in audited if one.state == state and source is not None]
    return next((pair for pair in found if pair[1].models("trainer")), next(iter(found), (None, None)))


def _quoted(path: Path) -> str:
    """As a YAML scalar inside a flow mapping."""
    text = str(path)
    return text if re.fullmatch(r"[\w./-]+", text) else json.dumps(text)


def _committed(
    store: RunStore, folders: list[SetFolder], progress: Progress | None
) -> list[tuple[AuditedSet, CheckpointSet | None]]:
    audited: list[tuple[AuditedSet, CheckpointSet | None]] = []
    newer: list[CheckpointSet] = []
    for folder in reversed(folders):
        if not folder.is_committed(store.storage):
            audited.append((_unfinished(folder), None))
            continue
        try:
            found = load_set(folder, store.storage)
        except (CheckpointError, OSError) as error:
            iteration = str(folder.iteration)
            audited.append((AuditedSet(folder.path.name, "broken", True, iteration, problems=(str(error),)), None))
            continue
        # a tag that a set of another model took over still means this one of its own
        taken = {tag for one in newer if one.is_of(found.models()) for tag in one.tags}
        tags = tuple(tag for tag in found.tags if tag not in taken)
        newer.append(found)
        surplus = set(list_names(folder.path, store.storage)) - {file.path.name for file in found.files}
        has_probe = found.manifest is not None and found.manifest.probe is not None
        known = {MANIFEST_NAME, PROVENANCE_NAME, *([PROBE_NAME] if has_probe else [])}
        notes = [f"{name} is not in the manifest" for name in sorted(surplus - known)]
        notes += _note_on_provenance(found, folder.path, store.storage)
        notes += _note_on_probe(found, folder.path)
        audited.append((_audit(store, found, folder.path.name, tags, progress, notes), found))
    return audited


def _note_on_provenance(found: CheckpointSet, folder: Path, storage: Storage) -> list[str]:
    """It tells where tensors came from, and no weight depends on it: a damaged one is a note, and no problem."""
    expected = None if found.manifest is None else found.manifest.provenance
    if expected is None:
        return []
    try:
        content = storage.read_bytes(folder / PROVENANCE_NAME, MAX_PROVENANCE_BYTES)
    except (OSError, ValueError) as error:
        return [f"{PROVENANCE_NAME} cannot be read: {error}"]
    same = f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}" == expected
    return [] if same else [f"{PROVENANCE_NAME} is not as it was written; where the weights came from is not known"]


def _note_on_probe(found: CheckpointSet, folder: Path) -> list[str]:
    """Only who asks for the comparison needs it: a damaged one is a note, and no problem."""
    expected = None if found.manifest is None else found.manifest.probe
    if expected is None:
        return []
    try:
        with contextlib.closing(open_file(folder / PROBE_NAME)) as handle:
            handle.check_digest(expected)
    except CheckpointError as error:
        return [f"no model can be held to its probe: {error}"]
    return []


def _legacy(store: RunStore, progress: Progress | None) -> list[tuple[AuditedSet, CheckpointSet | None]]:
    """By the iteration that files say, the latest first; sets of which it is not known come before them."""
    audited: list[tuple[AuditedSet, CheckpointSet | None]] = [
        (_audit(store, found, found.name, found.tags, progress, []), found) for found in store.sets()
    ]

    def age(pair: tuple[AuditedSet, CheckpointSet | None]) -> tuple[int, ...]:
        if pair[0].iteration is None:
            return (1,)
        iteration = TrainingIteration.from_string(pair[0].iteration)
        return (0, *(value or 0 for value in (iteration.epoch, iteration.update, iteration.sample)))

    # of one iteration the plain name comes first, so that its line does not depend on what latest means tomorrow
    audited.sort(key=lambda pair: pair[0].name != pair[0].iteration)
    return sorted(audited, key=age, reverse=True)


def _audit(
    store: RunStore,
    found: CheckpointSet,
    name: str,
    tags: tuple[str, ...],
    progress: Progress | None,
    notes: list[str],
) -> AuditedSet:
    problems: list[str] = []
    unverified: list[str] = []
    said: dict[str, tuple[TrainingIteration | None, str | None]] = {}
    nonfinite: list[str] = []
    total = 0
    for file in found.files:
        size = store.storage.size_of(file.path)
        total += size or 0
        refused: list[str] = []
        problem = _problem_of(found, file, size, said, unverified, refused)
        if problem:
            problems.append(problem)
        if file.info is None:
            nonfinite += refused
        else:
            notes += [f"{text} ({file.info}), which a resume does not look at" for text in refused]
        if progress is not None and size:
            progress(size)
    try:
        check_consistency(said, found)
    except TornSetError as error:
        problems.append(str(error))
    iteration = found.iteration or next((one for one, _run in said.values() if one is not None), None)
    return AuditedSet(
        name,
        "broken" if problems else "unverifiable" if unverified else "nonfinite" if nonfinite else "good",
        found.committed,
        str(iteration) if iteration is not None else None,
        tags,
        len(found.files),
        total,
        found.run_id or next((run_id for _iteration, run_id in said.values() if run_id is not None), None),
        tuple(problems),
        (*notes, *(f"{name} was {UNVERIFIABLE}" for name in unverified)),
        tuple(nonfinite),
    )


def _problem_of(
    found: CheckpointSet,
    file: CheckpointFile,
    size: int | None,
    said: dict[str, tuple[TrainingIteration | None, str | None]],
    unverified: list[str],
    refused: list[str],
) -> str:
    """What is wrong with one file of a set.

    What its header says goes to ``said``, its name perhaps to ``unverified``, bad values to ``refused``.
    """
    expected = next(
        (one.size for one in (found.manifest.files if found.manifest else ()) if one.name == file.path.name), size
    )
    if size is None:
        return f"{file.path} is missing or no regular file"
    if size != expected:
        return f"{file.path} has {size} bytes; {expected} bytes were written"
    try:
        with open_checkpoint(file.path, digests=found.digest_of(file)) as reader:
            # Optimizer files say nothing. Noether saves averages at times of their own.
            if file.part != "optim" and (found.committed or file.info is None):
                said[file.path.name] = said_by(reader.metadata, file.path)
            committed = found.committed_file(file)
            looked_at = not_looked_at(file, committed, reader.tensors())
            if reader.is_verifiable:
                reader.verify(look=looked_at)
            else:
                unverified.append(file.path.name)
            refused += refused_values(file, committed, reader.nonfinite(looked_at))
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def _unfinished(folder: SetFolder) -> AuditedSet:
    return AuditedSet(folder.path.name, "uncommitted", False, str(folder.iteration))


def _place(store: RunStore, said: set[str | None]) -> tuple[str, str | None]:
    """Run and stage: what lies one level below a folder is a run or a stage, which only its files know."""
    parent = store.paths.checkpoint_path.parent
    if parent.name in said:
        return parent.name, None
    if parent.parent.name in said:
        return parent.parent.name, parent.name
    return store.paths.run_id, store.paths.stage_name


def _beside(store: RunStore) -> Iterator[str]:
    try:
        store.newest()
    except AmbiguousCheckpointError as error:
        yield str(error)
    except (CheckpointError, OSError):
        return  # that a set is broken is said of the set


def _config_line(run_id: str, stage_name: str | None, audited: AuditedSet, found: CheckpointSet, added: str) -> str:
    if found.models("trainer"):
        kind, more = "resume", ""
    else:
        kind, more = "previous_run", f", model_name: {found.files[0].model}"
    stage = f", stage_name: {stage_name}" if stage_name is not None else ""
    tag = (
        audited.name
        if not found.committed
        else next((tag for tag in (found.name, *audited.tags) if tag in audited.tags), "")
    )
    also = ", on_nonfinite: warn" if audited.state == "nonfinite" else ""
    if tag:
        return f"- {{kind: {kind}, run_id: {run_id}{stage}{more}, checkpoint_tag: {tag}{also}{added}}}"
    # every tag of it means a later set by now
    chosen = "checkpoint_tag: latest, on_invalid: previous"
    return f"- {{kind: {kind}, run_id: {run_id}{stage}{more}, {chosen}{also}{added}}}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
