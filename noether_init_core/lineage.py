"""Lineage: which runs and files gave weights to which runs, read from the records beside sets. Nothing is written."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from noether_init_core.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from noether_init_core.files.storage.disk import LOCAL, resolved, unreachable
from noether_init_core.paths import DEBUG_FOLDER, PathProvider, name_of_run
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.places import as_recorded, run_folder_of, runs_at, set_in
from noether_init_core.sets.provenance import History, SourceRecord, load_histories
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.shown import Shown
from noether_init_core.uris import local_path

LINEAGE_VERSION = 1

Relation = Literal["focus", "ancestor", "descendant", "other"]

#: The files that an entry's values came from, the latest first, and the names of the entry in each file.
_Chain = Sequence[tuple[SourceRecord, tuple[str, ...]]]


@attrs.frozen
class LineageSet:
    """One set of checkpoints of a run. ``bytes`` is the total size of its files, None if no manifest records it."""

    name: str
    tags: tuple[str, ...]
    iteration: str | None
    committed: bool
    created: str | None
    bytes: int | None


@attrs.frozen
class LineageNode:
    """A run (and stage), or a file.

    Attributes:
        id: The name that edges use. For a run, its path below the output root (``pretrain/stage``), or the path of its
            folder if two output roots have runs of one name. For a file, ``file:`` and its path.
        type: ``missing`` for a run or file that was recorded and is no longer at the recorded path.
        run_id: None for a file.
        stage: Name of the stage; None for a run without stages, and for a file.
        path: The path of the run folder or file; for a missing one, the recorded path.
        sets: The sets of the run, newest first.
        relation: The relation to the requested run.
        resumed: Number of times that the run was resumed from one of its own sets, counted in the sets on disk.
        note: A remark for people; may be empty.
    """

    id: str
    type: Literal["run", "file", "missing"]
    run_id: str | None
    stage: str | None
    path: str
    sets: tuple[LineageSet, ...] = ()
    relation: Relation = "other"
    resumed: int = 0
    note: str = ""


@attrs.frozen
class LineageEdge:
    """A record that weights of ``source`` were loaded into ``target``.

    Attributes:
        source: Id of the node that the weights came from.
        target: Id of the run that loaded them.
        kind: The kind of the initializer that loaded them.
        model: Path of names of the single model, such as ``autoenc.encoder``.
        file: Name of the file that was read.
        tag: The requested tag; None if the request was not a tag.
        iteration: The iteration of the selected set; None if it was not recorded.
        from_set: Name of the folder of the selected set.
        tensors: Number of entries of the model that came from the source and were not overwritten since. For a missing
            target, only the entries that other runs took from it are counted.
        share: ``tensors`` divided by the number of entries of the model, from 0 to 1; None for a missing target.
        is_resume: Whether training was resumed, that is with optimizer and iteration.
        note: A remark for people; may be empty.
    """

    source: str
    target: str
    kind: str
    model: str
    file: str
    tag: str | None
    iteration: str | None
    from_set: str | None
    tensors: int | None
    share: float | None
    is_resume: bool = False
    note: str = ""


@attrs.frozen(repr=False)
class Lineage(Shown):
    """Runs and files, and which gave weights to which; pure data.

    ``str(lineage)`` is what ``ninit lineage`` prints.

    Attributes:
        focus: Id of the requested run; None if an output root or a run with several stages was requested.
        nodes: The requested run with its ancestors and descendants, ancestors first; all nodes of an output root.
        edges: The edges between these nodes.
        problems: One sentence for each run or record that could not be read. The other runs are complete.
    """

    focus: str | None
    nodes: tuple[LineageNode, ...]
    edges: tuple[LineageEdge, ...]
    problems: tuple[str, ...] = ()

    def node(self, name: str) -> LineageNode:
        """Return the node with the id ``name``. Raises ``KeyError``."""
        return {node.id: node for node in self.nodes}[name]

    def to_dict(self) -> dict[str, Any]:
        """Return the lineage as plain data that follows ``docs/schemas/lineage.schema.json``."""
        return {"format": "noether-init-lineage", "version": LINEAGE_VERSION, **attrs.asdict(self)}

    def to_json(self) -> str:
        """Return ``to_dict()`` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def related(
    foci: Sequence[str] | None,
    nodes: Sequence[LineageNode],
    edges: Sequence[LineageEdge],
    problems: Sequence[str] = (),
) -> Lineage:
    """Keep ``foci`` with ancestors (also those that a cycle makes descendants) and descendants; None keeps all."""
    if foci is None:
        return Lineage(None, tuple(nodes), tuple(edges), tuple(problems))
    ancestors = _reached(foci, [(edge.target, edge.source) for edge in edges])
    descendants = _reached(foci, [(edge.source, edge.target) for edge in edges]) - ancestors
    groups: dict[Relation, Collection[str]] = {"ancestor": ancestors, "focus": foci, "descendant": descendants}
    kept = [attrs.evolve(node, relation=name) for name, ids in groups.items() for node in nodes if node.id in ids]
    ids = {node.id for node in kept}
    between = tuple(edge for edge in edges if edge.source in ids and edge.target in ids)
    return Lineage(foci[0] if len(foci) == 1 else None, tuple(kept), between, tuple(problems))


def _reached(starts: Sequence[str], steps: Iterable[tuple[str, str]]) -> set[str]:
    following: dict[str, list[str]] = {}
    for source, target in steps:
        following.setdefault(source, []).append(target)
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        for name in following.get(waiting.pop(), ()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found - set(starts)


def lineage_of(path: Path | str, roots: Sequence[Path | str] = ()) -> Lineage:
    """Return the ancestors and descendants of the run at ``path``, from the records beside the sets of all runs.

    It only reads, so it may be called while runs save, and repeated.

    Args:
        path: A run folder, a stage, a folder of checkpoints or a set; or an output root, for all runs below it. For a
            run folder with several stages, the relations of all stages are returned.
        roots: Further output roots to search for descendants. The output root of ``path`` is always searched.

    Sets of other writers, such as Noether, have no records, so their runs have no ancestors here and get a note. What
    cannot be read is listed in ``problems``.

    Raises ``CheckpointNotFoundError`` if no run is found at ``path`` or below one of ``roots``.
    """
    unreadable: dict[Path, CheckpointError] = {}
    asked = [_run_at(paths, unreadable) for paths in runs_at(local_path(path), unreadable)]
    found = {one.folder: one for one in asked}
    own = dict.fromkeys(one.root for one in asked)
    for root in [*own, *(resolved(local_path(root)) for root in roots)]:
        try:
            below = runs_at(root, unreadable)
        except CheckpointNotFoundError:
            # The path itself is a run, so only relatives are lost. A root that the caller named must have runs.
            if root in own:
                continue
            raise
        for one in (_run_at(paths, unreadable) for paths in below):
            # A symbolic link is a second name of a run; the name without the link wins, in any order of listing.
            is_better = one.folder == one.root / one.name and not found.get(one.folder, one).problem
            if one.folder not in found or is_better:
                found[one.folder] = one
    reader = _Reader(found.values())
    is_root = resolved(Path(path)) in own
    foci = None if is_root else tuple(dict.fromkeys(reader.id_of[one.folder] for one in asked))
    edges = tuple(reader.edges())  # before reader.nodes is read: it adds nodes for missing runs and files
    return related(foci, tuple(reader.nodes.values()), edges, reader.problems)


@attrs.frozen
class _Run:
    """A folder with checkpoints, links resolved, and the run that its sets record; ``name``: path below the root.

    If the folder cannot be read, ``snapshot`` is None and ``problem`` gives the reason.
    """

    folder: Path
    paths: PathProvider
    root: Path
    name: str
    snapshot: Snapshot | None
    problem: str


def _run_at(paths: PathProvider, unreadable: Mapping[Path, CheckpointError]) -> _Run:
    folder, snapshot = resolved(paths.checkpoint_path.parent), None
    problem = str(unreadable.get(paths.checkpoint_path, ""))
    try:
        snapshot = Snapshot(paths)
        folder, paths = snapshot.folder.parent, as_recorded(snapshot)
    except CheckpointError as error:
        problem = problem or f"{folder}: {error}"
    name = name_of_run(paths.run_id, paths.stage_name)
    name = f"{DEBUG_FOLDER}/{name}" if paths.debug else name
    return _Run(folder, paths, resolved(paths.output_root), name, snapshot, problem)


class _Reader:
    """Joins the records of runs to nodes and edges."""

    def __init__(self, runs: Collection[_Run]) -> None:
        names = Counter(run.name for run in runs)
        self.id_of = {run.folder: run.name if names[run.name] == 1 else str(run.folder) for run in runs}
        self.nodes: dict[str, LineageNode] = {}
        self.problems: list[str] = []
        self._ids = set(self.id_of.values())
        self._named: dict[tuple[Path | None, str], _Run] = {(run.root, run.name): run for run in runs}
        self._root_of = {self.id_of[run.folder]: run.root for run in runs}
        self._digests: dict[str, dict[str, dict[str, str]]] = {}
        self._node_of = functools.cache(self._look_up)
        self._others: dict[tuple[str, str, str], str] = {}
        #: (source, id of the target, model, whether by its newest training) -> entries of the model that were read
        self._entries: dict[tuple[SourceRecord, str, str, bool], set[str]] = {}
        self._totals: dict[tuple[str, str, bool], set[str]] = {}
        for run, trainings in [(run, self._read(run)) for run in runs]:
            for histories, is_newest in trainings:
                for model, history in histories.items():
                    place = self.id_of[run.folder], model, is_newest
                    self._totals.setdefault(place, set()).update(history)
                    for entry, chain in history.items():
                        self._count(place, entry, chain)

    def edges(self) -> Iterator[LineageEdge]:
        """Yield the edges in the order of the runs that loaded the weights."""
        for (source, target, model, is_newest), entries in self._entries.items():
            if not is_newest and (source, target, model, True) in self._entries:
                continue
            origin = dict(source.origin)
            name = self._node_of(source, target)
            total = len(self._totals.get((target, model, is_newest), ()))
            from_set = set_in(source.path)
            # Which sets exist is known only for runs that were read.
            is_gone = from_set is not None and name in self._ids and from_set not in self._digests[name]
            notes = ["the set was deleted"] if is_gone else []
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

    def _read(self, run: _Run) -> list[tuple[dict[str, History], bool]]:
        """Add the node of a run from its manifests; return the newest record of each training and model.

        Returns for each training with a record: path of a single model -> entry -> files, the latest first; and
        whether it is the newest one. A folder has several trainings if its run was started again from zero.
        """
        sets: tuple[CheckpointSet, ...] = ()
        problems = [run.problem] if run.problem else []
        if run.snapshot is not None:
            try:
                sets = run.snapshot.sets()
                problems += map(str, run.snapshot.broken())
            except (CheckpointError, OSError) as error:
                problems.append(f"{run.folder}: {error}")
        note = "" if sets else "its sets cannot be read" if problems else "no set"
        manifests = [one.manifest for one in sets if one.manifest is not None]
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
                recorded = [f"{one.get('kind')} {one.get('model')} <- {one.get('origin')}" for one in manifest.lineage]
                failed = failed or "; ".join(recorded) or "no checkpoint"
                continue
            found[manifest.training] = {**kept, **found.get(manifest.training, {})}
        if failed:
            note = f"its record cannot be read; its manifest lists {failed}"
        elif sets and newest not in found:
            of = "the weights of its newest training" if found else "its weights"
            note = f"the origin of {of} was not recorded"
        self.problems += problems
        name = self.id_of[run.folder]
        # folder of a committed set -> name of a file -> its digest
        self._digests[name] = {
            one.folder.name: {file.name: file.digest for file in one.manifest.files}
            for one in sets
            if one.manifest is not None
        }
        self.nodes[name] = LineageNode(
            name,
            "run",
            run.paths.run_id,
            run.paths.stage_name,
            str(run.folder),
            tuple(map(_lineage_set, reversed(sets))),
            resumed=len({manifest.started_from for manifest in manifests if manifest.started_from}),
            note=note,
        )
        return [(models, training == newest) for training, models in found.items()]

    def _count(self, place: tuple[str, str, bool], entry: str, chain: _Chain) -> None:
        """Count the first file of a chain for this run, and later ones only for runs that cannot be read themselves."""
        target, model, is_newest = place
        # An entry that was joined from parts has several names in one file; these follow each other in the chain.
        steps = [
            (source, [names for _, names in group]) for source, group in itertools.groupby(chain, lambda one: one[0])
        ]
        if not steps:
            return
        self._entries.setdefault((steps[0][0], target, model, is_newest), set()).add(entry)
        for number, ((later, names), (earlier, _)) in enumerate(itertools.pairwise(steps)):
            # Beyond a joined entry, the histories of its parts are mixed, and nothing tells them apart.
            if sum(map(len, names)) > 1 and len(steps) > number + 2:
                return
            node = self._node_of(later, target)
            # A run that was read has its own record; counting it here too would count it twice.
            if node not in self._ids and self._node_of(earlier, target) != node:
                self._entries.setdefault((earlier, node, later.model, True), set()).update(itertools.chain(*names))

    def _look_up(self, source: SourceRecord, target: str) -> str:
        """Return the id of the node of a source; add a node if the source is not one of the runs that were read."""
        origin = dict(source.origin)
        run_id, stage = origin.get("run_id"), origin.get("stage_name")
        folder = run_folder_of(source.path)
        if folder is not None and folder in self.id_of:
            name = self.id_of[folder]
            if self._has(name, source):
                return name
            # Sets are numbered. Other bytes under the same number belong to a new run in the same folder.
            note = "it was deleted, and a new run of that name was started"
            return self._other(f"{name} (before)", str(folder), run_id, stage, note, is_there=False)
        # Recorded paths are foreign text; a relative one would be looked up in the current folder.
        is_file = os.path.isabs(source.path) and self._is(LOCAL.is_file, source.path)
        if run_id is None and set_in(source.path) is None:
            note = "" if is_file else "not found at the recorded path"
            if is_file and source.digest is None:
                note = "no digest was recorded, so the file may have changed"
            path, key = source.path or source.file, source.digest or ""
            return self._other(f"file:{path}", path, None, None, note, is_there=is_file, key=key)
        run_id = folder.name if run_id is None and folder is not None else run_id
        name = name_of_run(run_id, stage)
        if folder is None:  # another kind recorded a run with files in a layout of its own
            note = "" if is_file else "no longer at the recorded path"
            return self._other(name, source.path, run_id, stage, note, is_there=is_file)
        is_there = self._is(LOCAL.is_folder, folder)
        # An output root may have been moved with all its runs. A set of that name with other bytes is another run.
        moved = None if is_there else self._named.get((self._root_of.get(target), name))
        if moved is not None and self._has(self.id_of[moved.folder], source):
            return self.id_of[moved.folder]
        note = "in another output root; --root reads it too" if is_there else "no longer at the recorded path"
        return self._other(name, str(folder), run_id, stage, note, is_there=is_there)

    def _is(self, look: Callable[[Path], bool], path: Path | str) -> bool:
        """Return the result of a look at a recorded path; if it fails, add a problem: the path may exist."""
        try:
            return look(Path(path))
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no file can have this name
                return False
            self.problems.append(str(unreachable(error, Path(path))))
        except ValueError:  # a null byte
            return False
        return True

    def _has(self, name: str, source: SourceRecord) -> bool:
        """Whether a run that was read can be the run of the source: the digest of the file does not differ."""
        files = self._digests[name].get(set_in(source.path) or "", {})
        digest, recorded = files.get(source.file), source.digest
        # A missing digest, or one of another algorithm, proves nothing.
        if digest is None or recorded is None:
            return True
        return digest.partition(":")[0] != recorded.partition(":")[0] or digest == recorded

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


def _lineage_set(one: CheckpointSet) -> LineageSet:
    manifest = one.manifest
    return LineageSet(
        one.place,
        one.tags,
        None if one.iteration is None else str(one.iteration),
        one.committed,
        None if manifest is None else manifest.created,
        None if manifest is None else sum(file.size for file in manifest.files),
    )
