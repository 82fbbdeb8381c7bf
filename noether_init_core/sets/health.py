"""Verify every set of a run on disk, file by file, and return the findings as values. Torch is not imported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import attrs

from noether_init_core.errors import CheckpointCorruptError, CheckpointError, TornSetError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import LOCAL, is_out_of_reach, reaching, resolved, unreachable
from noether_init_core.files.storage.handle import open_file
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import yaml_line
from noether_init_core.sets.checkpoint_set import (
    CheckpointFile,
    CheckpointSet,
    check_consistency,
    list_names,
    recorded_in,
)
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.flat_files import changed_names, flat_copies
from noether_init_core.sets.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    PROBE_NAME,
    PROVENANCE_NAME,
    in_words,
    refused,
    worth_a_look,
)
from noether_init_core.sets.places import as_recorded
from noether_init_core.sets.provenance import load_histories
from noether_init_core.sets.refusals import LaterFlatFiles, worded
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.stopwatch import Stopwatch

#: Called with the number of bytes that were verified since the last call.
Progress = Callable[[int], None]
State = Literal["good", "nonfinite", "unverifiable", "broken", "uncommitted"]
#: The note on a file without checksums.
UNVERIFIABLE = "written without checksums, so its bytes cannot be verified. Next, to load it: verify: header"


@attrs.frozen
class CheckedFile:
    """The findings in a file of a set without damage.

    Attributes:
        recorded: The iteration and the run in its header; None for a value that is not recorded.
        refused: Values that a resume refuses, in words.
        is_verifiable: Whether a digest or a checksum exists for its bytes.
    """

    recorded: tuple[TrainingIteration | None, str | None]
    refused: tuple[str, ...]
    is_verifiable: bool


@attrs.frozen
class FileHealth:
    """The result for one file. An empty ``problem`` means that none was found; ``note`` tells what was not checked.

    ``state`` is ``unverifiable`` for a file without checksums, of which only the structure was checked.
    """

    path: Path
    state: State = "good"
    tensors: int = 0
    bytes: int = 0
    problem: str = ""
    note: str = ""


@attrs.frozen
class SetHealth:
    """A set and its state.

    Attributes:
        name: The name of its folder; for flat files their tag.
        state: ``good``, ``broken``, or ``nonfinite``: verified, with values that a resume refuses. ``uncommitted``: an
            interrupted save, which is never selected. ``unverifiable``: no problem was found, but a file has neither
            checksums nor a digest.
        is_committed: Whether it has a manifest.
        iteration: In the form ``E1_U4_S32``; None if it is not recorded.
        tags: The tags that select it now. Other tags that it was saved under select a later set.
        files: Number of files.
        bytes: Total size of the files.
        run_id: The run that wrote it, as its files record; None if they do not.
        problems: Its problems.
        notes: Harmless findings.
        nonfinite: Values that a resume refuses. Without a manifest, parameters and buffers are not distinguished, and
            only NaN is refused.
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
class FlatHealth:
    """Flat files beside committed sets: copies for Noether, which noether-init-core never reads.

    Attributes:
        files: Number of flat files.
        compared: Number of copies that were compared with the digests of their set.
        problems: Damage in these.
        changed: Copies that have changed since they were written: by another program, or by damage.
    """

    files: int = 0
    compared: int = 0
    problems: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


@attrs.frozen
class RunHealth:
    """The sets of one run and stage, newest first.

    Attributes:
        folder: The folder of checkpoints.
        run_id: The run, as a config must name it.
        stage_name: The stage, as a config must name it.
        sets: Every set, including uncommitted ones.
        newest_good: The newest good set that can be resumed, else the newest good set, else the newest nonfinite one.
        use: The line of a config that starts from it; if it is None, from the newest unverifiable set. Empty if a newer
            set cannot be read.
        problems: Problems beside the sets: flat files that are later than every committed set.
        flat: The flat files beside committed sets.
    """

    folder: Path
    run_id: str
    stage_name: str | None
    sets: tuple[SetHealth, ...]
    newest_good: SetHealth | None = None
    use: str = ""
    problems: tuple[str, ...] = ()
    flat: FlatHealth = attrs.field(factory=FlatHealth)

    @property
    def problem_count(self) -> int:
        """Number of broken sets and other problems; nonfinite sets do not count, because they were written so."""
        return sum(one.state == "broken" for one in self.sets) + len(self.problems) + len(self.flat.problems)


def check_file(
    found: CheckpointSet,
    file: CheckpointFile,
    *,
    verify: bool = True,
    look: bool = True,
    stopwatch: Stopwatch | None = None,
) -> CheckedFile:
    """Verify one file of a set: its structure and header, its bytes (``verify``) and its values (``look``).

    Raises ``CheckpointError`` or ``OSError`` for a damaged file.
    """
    with open_checkpoint(file.path, digests=found.digests_of(file), stopwatch=stopwatch) as reader:
        recorded = recorded_in(reader.metadata, file.path)
        # A manifest records the findings from the time of writing, so the values need not be checked again.
        head = found.head_of(file)
        looked_at = worth_a_look(file.part, reader.tensors()) if look and head is None else []
        if verify and reader.is_verifiable:
            reader.verify(look=looked_at)
        values = refused(file.part, reader.nonfinite(looked_at), None) if head is None else head.refused
        return CheckedFile(recorded, in_words(file.model, file.part, values) if look else (), reader.is_verifiable)


def verify_file(path: Path, progress: Progress | None = None) -> FileHealth:
    """Verify one file: its structure, its header, and every byte with a checksum. Problems are returned, not raised."""
    try:
        with open_checkpoint(path) as reader:
            tensors = reader.tensors()
            note = "" if reader.is_verifiable else UNVERIFIABLE
            if not note:
                reader.verify()
            elif reader.format == "safetensors":
                note = "structure only: a safetensors file has no checksums. Next: set digest: sha256:... in a config"
            nbytes = sum(info.nbytes for info in tensors.values())
            found = FileHealth(path, "unverifiable" if note else "good", len(tensors), nbytes, note=note)
    except (CheckpointError, OSError) as error:
        found = FileHealth(path, "broken", problem=str(error))
    if progress is not None:
        with contextlib.suppress(OSError):
            progress(LOCAL.size_of(path) or 0)
    return found


def bytes_to_verify(snapshot: Snapshot, *, flat: bool = False) -> int:
    """Return the largest number of bytes that ``verify_run`` reports to ``progress``."""
    files = [file.path for one in snapshot.sets() for file in one.files]
    files += [path for path, _found, _file in _copies(snapshot)] if flat else []
    with reaching(snapshot.folder):
        return sum(snapshot.storage.size_of(path) or 0 for path in files)


def verify_run(
    snapshot: Snapshot, progress: Progress | None = None, *, asked: Path | None = None, flat: bool = False
) -> RunHealth:
    """Verify every set of a run and stage: manifest, digests, checksums, structure, iterations and runs.

    Flat files beside committed sets are not read, because they are copies for Noether.

    Args:
        snapshot: The run and stage.
        progress: Called with the bytes verified since the last call.
        asked: The requested folder; if the output root is below it, ``use`` contains ``output_path``.
        flat: Whether to compare the copies for Noether with their sets, too.
    """
    report = progress or (lambda _nbytes: None)
    verified = list(_verified(snapshot, report))
    newest, chosen = _newest(verified, "good")
    if newest is None:
        newest, chosen = _newest(verified, "nonfinite")
    start, source = (newest, chosen) if newest is not None else _newest(verified, "unverifiable")
    problems: list[str] = []
    try:
        paths = as_recorded(snapshot)
    except CheckpointError as error:
        paths, problems = snapshot.paths, [str(error)]
    use = ""
    heads = [(one.sequence, head) for one, head in snapshot.heads() if isinstance(head, CheckpointError)]
    unread = (sequence for sequence, head in heads if is_out_of_reach(head))
    # A newer set that cannot be read may be good: to start from an older one would lose training.
    if start is not None and source is not None and max(unread, default=-1) <= (source.sequence or 0):
        added: dict[str, object] = {} if newest is not None else {"verify": "header"}
        # A resume needs model_name if there are trainer files of several models.
        if source.models("trainer") and len({name for _, one in verified if one for name in one.models("trainer")}) > 1:
            added["model_name"] = source.models("trainer")[0]
        root = snapshot.paths.checkpoint_path.parents[1 if paths.stage_name is None else 2]
        above = None if asked is None else resolved(asked)
        if above is not None and root != above and root.is_relative_to(above):
            added["output_path"] = str(root)
        use = _config_line(paths.run_id, paths.stage_name, start, source, added)
    committed = snapshot.newest_folder
    if committed is not None and snapshot.later_flat:
        problems.append(str(worded(LaterFlatFiles(committed, tuple(snapshot.later_flat)), snapshot)))
    return RunHealth(
        snapshot.folder,
        paths.run_id,
        paths.stage_name,
        tuple(one for one, _ in verified),
        newest,
        use,
        tuple(dict.fromkeys(problems)),
        FlatHealth() if committed is None else _verify_flat(snapshot, report, compare=flat),
    )


_Verified = tuple[SetHealth, CheckpointSet | None]


def _newest(verified: Sequence[_Verified], state: State) -> tuple[SetHealth, CheckpointSet] | tuple[None, None]:
    """Return the newest set of this state that can be resumed; else the newest set of this state."""
    found = [(one, source) for one, source in verified if one.state == state and source is not None]
    return next((pair for pair in found if pair[1].models("trainer")), next(iter(found), (None, None)))


def _verified(snapshot: Snapshot, progress: Progress) -> Iterator[_Verified]:
    """Yield the sets, newest first: committed sets by sequence, flat files by iteration."""
    unfinished = set(snapshot.uncommitted())
    for folder in reversed(snapshot.folders):
        found = snapshot.head(folder)
        if isinstance(found, CheckpointSet):
            yield _verify_set(snapshot, found, progress, _notes(found)), found
        elif found is not None:
            yield SetHealth(folder.name, "broken", True, str(folder.iteration), problems=(str(found),)), None
        elif folder.name in unfinished:
            yield SetHealth(folder.name, "uncommitted", False, str(folder.iteration)), None
    if snapshot.newest_folder is None:
        flat = [(_verify_set(snapshot, found, progress, []), found) for found in snapshot.sets()]
        # For one iteration, the plain name comes before latest: the advised line must select the same set later, too.
        flat.sort(key=lambda pair: pair[0].name != pair[0].iteration)
        yield from sorted(flat, key=lambda pair: _age(pair[0]), reverse=True)


def _age(one: SetHealth) -> tuple[int, ...]:
    """Return the sort key of a set; a set without a known iteration counts as newest."""
    if one.iteration is None:
        return (1,)
    iteration = TrainingIteration.from_string(one.iteration)
    return (0, *(value or 0 for value in (iteration.epoch, iteration.update, iteration.sample)))


def _notes(found: CheckpointSet) -> list[str]:
    """Return notes on other files in the folder of a set, which are harmless because no weights depend on them."""
    manifest, storage = found.manifest, found.storage
    if manifest is None:
        return []
    known = {MANIFEST_NAME, DIGESTS_NAME, PROVENANCE_NAME, *(file.name for file in found.files)}
    known |= set() if manifest.probe is None else {PROBE_NAME}
    notes = [f"{name} is not in the manifest" for name in list_names(found.folder, storage) if name not in known]
    try:
        load_histories(found)
    except CheckpointError as error:
        notes.append(str(error))
    if manifest.probe is not None:
        try:
            with contextlib.closing(open_file(found.folder / PROBE_NAME)) as handle:
                handle.check_digest(manifest.probe)
        except CheckpointError as error:
            notes.append(f"its probe cannot be repeated: {error}")
    return notes


def _verify_set(snapshot: Snapshot, found: CheckpointSet, progress: Progress, notes: list[str]) -> SetHealth:
    problems: list[str] = []
    unverified: list[str] = []
    nonfinite: list[str] = []
    recorded: dict[str, tuple[TrainingIteration | None, str | None]] = {}
    total = 0
    for file in found.files:
        try:
            size = snapshot.storage.size_of(file.path)
        except OSError as error:
            problems.append(str(unreachable(error, file.path)))
            continue
        head = found.head_of(file)
        total += size or 0
        progress(size or 0)
        if size is None:
            problems.append(f"{file.path} is missing or not a regular file")
            continue
        if head is not None and size != head.size:
            problems.append(f"{file.path} has {size} bytes; {head.size} bytes were written")
            continue
        try:
            # The digest of the file also covers bytes between records, which no checksum does. If it matches, comparing
            # the checksums would only read the file again.
            is_whole = head is not None and _is_whole(file.path, head.digest)
            checked = check_file(found, file, verify=not is_whole)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        if head is not None and not is_whole:
            notes.append(
                f"{file.path} has changed bytes, all of them outside its tensors and records, so it still "
                "loads as it was saved. Next: copy the file again if you have a copy"
            )
        recorded[file.name] = checked.recorded
        if not checked.is_verifiable:
            unverified.append(file.name)
        if file.info is None:
            nonfinite += checked.refused
        else:
            notes += [f"{text} ({file.info}), which a resume ignores" for text in checked.refused]
    try:
        check_consistency(recorded, found)
    except TornSetError as error:
        problems.append(str(error))
    iteration = found.iteration or next((one for one, _run in recorded.values() if one is not None), None)
    return SetHealth(
        found.place,
        "broken" if problems else "unverifiable" if unverified else "nonfinite" if nonfinite else "good",
        found.committed,
        str(iteration) if iteration is not None else None,
        snapshot.selected_by[found.place],
        len(found.files),
        total,
        found.run_id or next((run_id for _iteration, run_id in recorded.values() if run_id is not None), None),
        tuple(dict.fromkeys(problems)),
        (*notes, *(f"{name} was {UNVERIFIABLE}" for name in unverified)),
        tuple(nonfinite),
    )


def _is_whole(path: Path, digest: str) -> bool:
    """Whether all bytes of a file match its digest, including bytes between its records. Raises ``OSError``."""
    with contextlib.closing(open_file(path)) as handle:
        try:
            handle.check_digest(digest)
        except CheckpointCorruptError:
            return False
    return True


def _config_line(
    run_id: str, stage_name: str | None, health: SetHealth, found: CheckpointSet, added: dict[str, object]
) -> str:
    """Return the entry of a config that starts from the set."""
    entry: dict[str, object] = {"kind": "resume" if found.models("trainer") else "previous_run", "run_id": run_id}
    if stage_name is not None:
        entry["stage_name"] = stage_name
    if not found.models("trainer"):
        entry["model_name"] = found.files[0].model
    tags = [tag for tag in (found.name, *health.tags) if tag in health.tags or not found.committed]
    entry["checkpoint_tag"] = tags[0] if tags else "latest"
    if not tags:  # all its tags select later sets, so it can only be reached by walking back from these
        entry["on_invalid"] = "previous"
    if health.state == "nonfinite":
        entry["on_nonfinite"] = "warn"
    return f"- {yaml_line({**entry, **added})}"


def _copies(snapshot: Snapshot) -> Iterator[tuple[Path, CheckpointSet, CheckpointFile]]:
    """Yield each unchanged flat copy of a readable set, with the set and the original file."""
    copies = flat_copies(snapshot.folder, snapshot.storage)
    sets = {one.folder.name: one for one in snapshot.readable()} if copies else {}
    for name, of in sorted(copies.items(), key=lambda item: (item[1], item[0])):
        found, parsed = sets.get(of), parse(name)
        if found is not None and parsed is not None:
            own = str(attrs.evolve(parsed, tag=found.name))
            yield from ((snapshot.folder / name, found, file) for file in found.files if file.name == own)


def _verify_flat(snapshot: Snapshot, progress: Progress, *, compare: bool) -> FlatHealth:
    """Count the flat files; with ``compare``, compare the copies in the record with their sets.

    A hard link to a committed file was verified with its set. For a file that another program has written or rewritten,
    there is no digest.
    """
    storage = snapshot.storage
    count = sum(parse(name) is not None for name in list_names(snapshot.folder, storage))
    if not compare:
        return FlatHealth(count)
    compared, problems = 0, []
    for path, found, file in _copies(snapshot):
        compared += 1
        try:
            if storage.is_same_file(path, file.path):
                continue
            progress(storage.size_of(path) or 0)
            with contextlib.closing(open_file(path)) as handle:
                handle.check_digest(str(found.file_digest(file)))
        except (CheckpointError, OSError) as error:
            if is_out_of_reach(error):
                problems.append(str(error) if isinstance(error, CheckpointError) else str(unreachable(error, path)))
                continue
            problems.append(
                f"{path} is damaged: it is a copy of {file.name} of {found.folder.name} for Noether and has "
                "other bytes. noether-init-core does not read it. Next: remove it, or copy the file of the set there"
            )
    return FlatHealth(count, compared, tuple(problems), changed_names(snapshot.folder, storage))
