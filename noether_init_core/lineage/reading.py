"""``lineage_of``: the records of runs below output roots, put together. Nothing is created or changed."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

from noether_init_core.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from noether_init_core.lineage.graph import Lineage, LineageEdge, LineageNode, LineageSet, related
from noether_init_core.paths import DEBUG_FOLDER, PathProvider, name_of_run
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointSet
from noether_init_core.sets.places import CHECKPOINTS_FOLDER, as_recorded, runs_at
from noether_init_core.sets.provenance import History, SourceRecord, load_histories
from noether_init_core.sets.snapshot import Snapshot

#: The files that an entry's values came from, the latest first, and its names there.
_Chain = Sequence[tuple[SourceRecord, tuple[str, ...]]]


@attrs.frozen
class Run:
    """A folder with checkpoints, symbolic links resolved; ``name`` is its path below the output root.

    ``snapshot`` is None where it cannot be looked at, for the reason in ``problem``.
    """

    folder: Path
    root: Path
    name: str
    run_id: str
    stage: str | None
    snapshot: Snapshot | None
    problem: str


@attrs.frozen
class Records:
    """What a run recorded.

    Attributes:
        sets: Oldest first.
        trainings: For each with a record, path of a single model -> entry -> files, the latest first; and whether it is
            the newest: a run can be started anew in its folder.
        resumed: How often it was continued from a set of its own, as far as the sets that are there tell.
        note: What is not known, in words.
        problems: What could not be read.
    """

    sets: tuple[CheckpointSet, ...] = ()
    trainings: tuple[tuple[dict[str, History], bool], ...] = ()
    resumed: int = 0
    note: str = ""
    problems: tuple[str, ...] = ()


def run_at(paths: PathProvider) -> Run:
    """The run of a folder; where its sets record that it is a stage, that stage."""
    folder, problem, snapshot = paths.checkpoint_path.parent.resolve(), "", None
    try:
        snapshot = Snapshot(paths)
        folder, paths = snapshot.folder.parent, as_recorded(snapshot)
    except (CheckpointError, OSError) as error:
        problem = f"{folder}: {error}"
    name = name_of_run(paths.run_id, paths.stage_name)
    name = f"{DEBUG_FOLDER}/{name}" if paths.debug else name
    return Run(folder, paths.output_root.resolve(), name, paths.run_id, paths.stage_name, snapshot, problem)


def read_run(run: Run) -> Records:
    """Read the manifests of a run, and the newest record of each training and model."""
    if run.snapshot is None:
        return Records(note="its sets cannot be read", problems=(run.problem,))
    problems: list[str] = []
    try:
        sets = run.snapshot.sets()
        problems += map(str, run.snapshot.broken())
    except (CheckpointError, OSError) as error:
        return Records(note="its sets cannot be read", problems=(f"{run.folder}: {error}",))
    if not sets:
        return Records(note="its sets cannot be read" if problems else "no set", problems=tuple(problems))
    manifests = [one.manifest for one in sets if one.manifest is not None]
    resumed = {manifest.started_from for manifest in manifests if manifest.started_from}
    newest = manifests[-1].training if manifests else None
    found: dict[str | None, dict[str, History]] = {}
    looked: set[tuple[str | None, tuple[str, ...]]] = set()
    failed = ""
    for one in reversed(sets):
        manifest = one.manifest
        if manifest is None or manifest.provenance is None or (manifest.training, one.models()) in looked:
            continue
        looked.add((manifest.training, one.models()))
        try:
            kept = load_histories(one)
        except CheckpointCorruptError as error:
            problems.append(str(error))
            said = [f"{one.get('kind')} {one.get('model')} <- {one.get('origin')}" for one in manifest.lineage]
            failed = failed or "; ".join(said) or "no checkpoint"
            continue
        of_training = found.setdefault(manifest.training, {})
        for model, history in kept.items():
            of_training.setdefault(model, history)
    note = ""
    if failed:
        note = f"its record cannot be read; its manifest says {failed}"
    elif not found:
        note = "where its weights came from was not recorded"
    elif newest not in found:
        note = "where the weights of its newest training came from was not recorded"
    trainings = tuple((models, name == newest) for name, models in found.items())
    return Records(sets, trainings, len(resumed), note, tuple(problems))


def run_folder(path: str) -> Path | None:
    """The folder of the run (and stage) whose file lies at ``path``, links resolved; None for a file elsewhere.

    A flat file in a folder ``checkpoints`` may belong to no run: whether it does, what was recorded of it says.
    """
    parts = Path(path).parts
    depth = 4 if set_in(path) is not None else 2
    if len(parts) <= depth or parts[-depth] != CHECKPOINTS_FOLDER:
        return None
    try:
        return Path(*parts[:-depth]).resolve()
    except (OSError, ValueError, RuntimeError):  # a null byte, a circle of links
        return None


def set_in(path: str) -> str | None:
    """The folder of the set that a file lies in; None for a file elsewhere."""
    parts = Path(path).parts
    return parts[-2] if len(parts) > 4 and parts[-3] == SETS_FOLDER and parts[-4] == CHECKPOINTS_FOLDER else None


def lineage_of(path: Path | str, roots: Sequence[Path | str] = ()) -> Lineage:
    """Ancestors and descendants of the run at ``path``, from the records beside its sets and those of other runs.

    Args:
        path: A run folder, a stage of it, its folder of checkpoints or one of its sets; or an output root, for all. Of
            a run folder with several stages, what has to do with any of them.
        roots: Further output roots in which descendants are looked for, beside the one that the run lies in.

    A run in which no record was kept (of Noether, of other writers) has no ancestors here, and a note says so. What
    cannot be read is in ``problems``.

    Raises ``CheckpointNotFoundError`` where there is no run.
    """
    asked = [run_at(paths) for paths in runs_at(Path(path))]
    found = {one.folder: one for one in asked}
    own = dict.fromkeys(one.root for one in asked)
    for root in [*own, *(Path(root).resolve() for root in roots)]:
        try:
            below = runs_at(root)
        except CheckpointNotFoundError:
            if root in own:  # the run itself was found by another way
                continue
            raise
        for one in map(run_at, below):
            # a link is a second name of a run
            if one.folder not in found or one.folder == one.root / one.name:
                found[one.folder] = one
    reader = _Reader(tuple(found.values()))
    is_root = Path(path).resolve() in own
    foci = None if is_root else tuple(dict.fromkeys(reader.id_of[one.folder] for one in asked))
    edges = tuple(reader.edges())
    return related(foci, tuple(reader.nodes.values()), edges, reader.problems)


class _Reader:
    """Puts the records of runs together."""

    def __init__(self, runs: Sequence[Run]) -> None:
        names = Counter(run.name for run in runs)
        self.id_of = {run.folder: run.name if names[run.name] == 1 else str(run.folder) for run in runs}
        self.nodes: dict[str, LineageNode] = {}
        self.problems: list[str] = []
        self._ids = set(self.id_of.values())
        self._named = {(run.root, run.name): run for run in runs}
        self._root_of = {self.id_of[run.folder]: run.root for run in runs}
        self._digests: dict[str, dict[str, dict[str, str]]] = {}
        self._looked_up = functools.cache(self._look_up)
        self._others: dict[tuple[str, str, str], str] = {}
        #: entries of the model that were read, by their names there
        self._entries: dict[tuple[SourceRecord, str, str, bool], set[str]] = {}
        self._totals: dict[tuple[str, str, bool], set[str]] = {}
        read = [(run, read_run(run)) for run in runs]
        for run, records in read:
            self._take(run, records)
        for run, records in read:
            for histories, is_newest in records.trainings:
                for model, history in histories.items():
                    place = self.id_of[run.folder], model, is_newest
                    self._totals.setdefault(place, set()).update(history)
                    for entry, chain in history.items():
                        self._count(place, entry, chain)

    def edges(self) -> Iterator[LineageEdge]:
        """Whose weights went into whom, in the order of the runs that took them."""
        for (source, target, model, is_newest), entries in self._entries.items():
            if not is_newest and (source, target, model, True) in self._entries:
                continue
            origin = dict(source.origin)
            name = self._node_of(source, target)
            total = len(self._totals.get((target, model, is_newest), ()))
            from_set = set_in(source.path)
            # only a run that was read tells which of its sets are there
            is_gone = from_set is not None and name in self._ids and from_set not in self._digests[name]
            notes = ["the set is not there any more"] if is_gone else []
            notes += [] if is_newest else ["by an earlier training in the same folder"]
            yield LineageEdge(
                name,
                target,
                source.kind,
                model,
                source.file,
                origin.get("tag"),
                origin.get("iteration"),
                from_set,
                len(entries),
                len(entries) / total if total else None,
                source.kind.rpartition(".")[2] in ("resume", "ResumeInitializer"),
                "; ".join(notes),
            )

    def _take(self, run: Run, records: Records) -> None:
        name = self.id_of[run.folder]
        self.problems += records.problems
        # folder of a committed set -> name of a file -> its digest
        self._digests[name] = {
            one.folder.name: {file.name: file.digest for file in one.manifest.files}
            for one in records.sets
            if one.manifest is not None
        }
        sets = tuple(map(_said, reversed(records.sets)))
        self.nodes[name] = LineageNode(
            name, "run", run.run_id, run.stage, str(run.folder), sets, resumed=records.resumed, note=records.note
        )

    def _count(self, place: tuple[str, str, bool], entry: str, chain: _Chain) -> None:
        """The first of a chain is what this run read; the others are told by the runs that read them, if they are."""
        target, model, is_newest = place
        # several names in one file, as of parts that were put together, stand one after the other
        steps = [
            (source, [names for _, names in group]) for source, group in itertools.groupby(chain, lambda one: one[0])
        ]
        if not steps:
            return
        self._entries.setdefault((steps[0][0], target, model, is_newest), set()).add(entry)
        for number, ((later, names), (earlier, _)) in enumerate(itertools.pairwise(steps)):
            # behind what was put together the histories of its parts are mixed; only a single one has one meaning
            if sum(map(len, names)) > 1 and len(steps) > number + 2:
                return
            node = self._node_of(later, target)
            # a run that is read tells it itself
            if node not in self._ids and self._node_of(earlier, target) != node:
                self._entries.setdefault((earlier, node, later.model, True), set()).update(itertools.chain(*names))

    def _node_of(self, source: SourceRecord, target: str) -> str:
        """Id of the node of a source; a node of its own is made for what is no run that was read."""
        return self._looked_up(source, self._root_of.get(target))

    def _look_up(self, source: SourceRecord, root: Path | None) -> str:
        origin = dict(source.origin)
        run_id, stage = origin.get("run_id"), origin.get("stage_name")
        folder, from_set = run_folder(source.path), set_in(source.path)
        if folder is not None and folder in self.id_of:
            name = self.id_of[folder]
            files = self._digests[name].get(from_set or "", {})
            if _is_same(files.get(source.file), source.digest):
                return name
            # sets are numbered, so another one under the same number is of a run that was made anew
            note = "it was deleted, and a run of that name was made anew"
            return self._other(f"{name} (before)", str(folder), run_id, stage, note, is_there=False)
        is_file = _is_there(Path.is_file, source.path)
        if run_id is None and from_set is None:
            is_absolute = Path(source.path).is_absolute()
            note = "" if is_file and is_absolute else "it is not where it was recorded"
            if source.path and not is_absolute:
                note = "recorded by a relative path, so which file it was is not known"
            elif is_file and is_absolute and source.digest is None:
                note = "without a digest: whether the file is still the same is not known"
            path, key = source.path or source.file, source.digest or ""
            return self._other(f"file:{path}", path, None, None, note, is_there=is_file and is_absolute, key=key)
        run_id = folder.name if run_id is None and folder is not None else run_id
        said = name_of_run(run_id, stage)
        if folder is None:  # of a run, in the way of another kind
            note = "" if is_file else "it is not there any more"
            return self._other(said, source.path, run_id, stage, note, is_there=is_file)
        is_there = _is_there(Path.is_dir, folder)
        # output roots are moved as a whole; a set of that name with other bytes shows that it is another run
        moved = None if root is None or is_there else self._named.get((root, said))
        if moved is not None:
            files = self._digests[self.id_of[moved.folder]].get(from_set or "", {})
            if _is_same(files.get(source.file), source.digest):
                return self.id_of[moved.folder]
        note = "it lies in another output root; --root shows more" if is_there else "it is not there any more"
        return self._other(said, str(folder), run_id, stage, note, is_there=is_there)

    def _other(
        self, name: str, path: str, run_id: str | None, stage: str | None, note: str, *, is_there: bool, key: str = ""
    ) -> str:
        if (name, path, key) not in self._others:
            free = name
            while free in self.nodes:
                free = f"{free} ({key or path})"
            self._others[name, path, key] = free
            node = LineageNode(free, "file" if name.startswith("file:") else "run", run_id, stage, path, note=note)
            self.nodes[free] = node if is_there else attrs.evolve(node, type="missing")
        return self._others[name, path, key]


def _is_same(digest: str | None, recorded: str | None) -> bool:
    """Whether two digests of a file can be of the same bytes; what is not known, or of another sort, says nothing."""
    if digest is None or recorded is None or digest.partition(":")[0] != recorded.partition(":")[0]:
        return True
    return digest == recorded


def _is_there(look: Callable[[Path], bool], path: Path | str) -> bool:
    try:
        return look(Path(path))
    except (OSError, ValueError):  # too long, or a null byte: recorded paths are texts of others
        return False


def _said(one: CheckpointSet) -> LineageSet:
    manifest = one.manifest
    return LineageSet(
        one.place,
        one.tags,
        None if one.iteration is None else str(one.iteration),
        one.committed,
        None if manifest is None else manifest.created,
        None if manifest is None else sum(file.size for file in manifest.files),
    )
