"""Lineage: runs and files, and whose weights went into whom, from the records beside sets. Nothing is changed."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from noether_init_core.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from noether_init_core.paths import DEBUG_FOLDER, PathProvider, name_of_run
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointSet
from noether_init_core.sets.places import CHECKPOINTS_FOLDER, as_recorded, runs_at
from noether_init_core.sets.provenance import History, SourceRecord, load_histories
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.shown import Shown
from noether_init_core.uris import local_path

LINEAGE_VERSION = 1

Relation = Literal["focus", "ancestor", "descendant", "other"]

#: The files that an entry's values came from, the latest first, and its names there.
_Chain = Sequence[tuple[SourceRecord, tuple[str, ...]]]


@attrs.frozen
class LineageSet:
    """One set of checkpoints of a run; ``bytes`` are those of its files, None where a manifest does not say them."""

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
        id: Its name in edges: ``pretrain``, ``pretrain/stage``, the path below the output root; ``file:`` and the path
            of a file; of what is not there any more what was recorded of it. Two runs of one name in two output roots
            have the root in front.
        type: ``missing`` for a run or file that was recorded and is not where it was.
        run_id: None for a file.
        stage: Its stage, where it has one.
        path: Where it is, or was when it was recorded.
        sets: Its sets, newest first.
        relation: How it stands to the run that was asked for.
        resumed: How often the run was continued from a set of its own, as far as the sets that are there tell.
        note: What there is to know besides, in words; empty for nothing.
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
    """Weights of ``source`` went into ``target``.

    Attributes:
        source: Id of the node that they came from.
        target: Id of the run that took them.
        kind: The kind of initializer.
        model: Path of names of the single model.
        file: Name of the file that was read.
        tag: The tag that was asked for, where it was one.
        iteration: The iteration of the set that it meant.
        from_set: Name of that set's folder.
        tensors: How many entries of the model came from there, and are not loaded over since. Where the target is not
            there any more: how many of those that others took from it.
        share: The same as a share of all entries of the model, from 0 to 1; None where the target is not there.
        is_resume: Whether training was continued: optimizer and iteration came along.
        note: What there is to know besides, in words; empty for nothing.
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
    """Runs, files, and whose weights went into whom; pure data.

    ``str(lineage)`` is what ``ninit lineage`` prints.

    Attributes:
        focus: Id of the run that was asked for; None where it was an output root, or a run with several stages.
        nodes: Those that have to do with what was asked for, ancestors first; all of an output root.
        edges: Between them.
        problems: What could not be read, a sentence each; the rest is there all the same.
    """

    focus: str | None
    nodes: tuple[LineageNode, ...]
    edges: tuple[LineageEdge, ...]
    problems: tuple[str, ...] = ()

    def node(self, name: str) -> LineageNode:
        """The node of that id. Raises ``KeyError``."""
        return {node.id: node for node in self.nodes}[name]

    def to_dict(self) -> dict[str, Any]:
        """The lineage as plain data, by ``docs/schemas/lineage.schema.json``."""
        return {"format": "noether-init-lineage", "version": LINEAGE_VERSION, **attrs.asdict(self)}

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)


def related(
    foci: Sequence[str] | None,
    nodes: Sequence[LineageNode],
    edges: Sequence[LineageEdge],
    problems: Sequence[str] = (),
) -> Lineage:
    """The lineage of nodes: ancestors and descendants, and the edges between those; of all for None.

    What is both, in a circle, is an ancestor.
    """
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
    """Ancestors and descendants of the run at ``path``, from the records beside its sets and those of other runs.

    Args:
        path: A run folder, a stage of it, its folder of checkpoints or one of its sets; or an output root, for all. Of
            a run folder with several stages, what has to do with any of them.
        roots: Further output roots in which descendants are looked for, beside the one that the run lies in.

    A run in which no record was kept (of Noether, of other writers) has no ancestors here, and a note says so. What
    cannot be read is in ``problems``.

    Raises ``CheckpointNotFoundError`` where there is no run.
    """
    asked = [_run_at(paths) for paths in runs_at(local_path(path))]
    found = {one.folder: one for one in asked}
    own = dict.fromkeys(one.root for one in asked)
    for root in [*own, *(local_path(root).resolve() for root in roots)]:
        try:
            below = runs_at(root)
        except CheckpointNotFoundError:
            if root in own:  # the run itself was found by another way
                continue
            raise
        for one in map(_run_at, below):
            # a link is a second name of a run
            if one.folder not in found or one.folder == one.root / one.name:
                found[one.folder] = one
    reader = _Reader(found.values())
    is_root = Path(path).resolve() in own
    foci = None if is_root else tuple(dict.fromkeys(reader.id_of[one.folder] for one in asked))
    edges = tuple(reader.edges())  # which may make further nodes
    return related(foci, tuple(reader.nodes.values()), edges, reader.problems)


@attrs.frozen
class _Run:
    """A folder with checkpoints, symbolic links resolved, and the run that its sets record.

    ``name`` is its path below the output root. ``snapshot`` is None where it cannot be looked at, for the reason in
    ``problem``.
    """

    folder: Path
    paths: PathProvider
    root: Path
    name: str
    snapshot: Snapshot | None
    problem: str


def _run_at(paths: PathProvider) -> _Run:
    folder, problem, snapshot = paths.checkpoint_path.parent.resolve(), "", None
    try:
        snapshot = Snapshot(paths)
        folder, paths = snapshot.folder.parent, as_recorded(snapshot)
    except (CheckpointError, OSError) as error:
        problem = f"{folder}: {error}"
    name = name_of_run(paths.run_id, paths.stage_name)
    name = f"{DEBUG_FOLDER}/{name}" if paths.debug else name
    return _Run(folder, paths, paths.output_root.resolve(), name, snapshot, problem)


def _run_folder(path: str) -> Path | None:
    """The folder of the run (and stage) whose file lies at ``path``, links resolved; None for a file elsewhere.

    A flat file in a folder ``checkpoints`` may belong to no run: whether it does, what was recorded of it says.
    """
    parts = Path(path).parts
    depth = 4 if _set_in(path) is not None else 2
    if len(parts) <= depth or parts[-depth] != CHECKPOINTS_FOLDER:
        return None
    try:
        return Path(*parts[:-depth]).resolve()
    except (OSError, ValueError, RuntimeError):  # a null byte, a circle of links
        return None


def _set_in(path: str) -> str | None:
    """The folder of the set that a file lies in; None for a file elsewhere."""
    parts = Path(path).parts
    return parts[-2] if len(parts) > 4 and parts[-3] == SETS_FOLDER and parts[-4] == CHECKPOINTS_FOLDER else None


class _Reader:
    """Puts the records of runs together."""

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
        #: entries of the model that were read, by their names there
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
        """Whose weights went into whom, in the order of the runs that took them."""
        for (source, target, model, is_newest), entries in self._entries.items():
            if not is_newest and (source, target, model, True) in self._entries:
                continue
            origin = dict(source.origin)
            name = self._node_of(source, target)
            total = len(self._totals.get((target, model, is_newest), ()))
            from_set = _set_in(source.path)
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

    def _read(self, run: _Run) -> list[tuple[dict[str, History], bool]]:
        """Read the manifests of a run, which become a node, and the newest record of each training and model.

        For each training with a record: path of a single model -> entry -> files, the latest first; and whether it is
        the newest, since a run can be started anew in its folder.
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
                said = [f"{one.get('kind')} {one.get('model')} <- {one.get('origin')}" for one in manifest.lineage]
                failed = failed or "; ".join(said) or "no checkpoint"
                continue
            found[manifest.training] = {**kept, **found.get(manifest.training, {})}
        if failed:
            note = f"its record cannot be read; its manifest says {failed}"
        elif sets and newest not in found:
            of = "the weights of its newest training" if found else "its weights"
            note = f"where {of} came from was not recorded"
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
            tuple(map(_said, reversed(sets))),
            resumed=len({manifest.started_from for manifest in manifests if manifest.started_from}),
            note=note,
        )
        return [(models, training == newest) for training, models in found.items()]

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

    def _look_up(self, source: SourceRecord, target: str) -> str:
        """Id of the node of a source; a node of its own is made for what is no run that was read."""
        origin = dict(source.origin)
        run_id, stage = origin.get("run_id"), origin.get("stage_name")
        folder = _run_folder(source.path)
        if folder is not None and folder in self.id_of:
            name = self.id_of[folder]
            if self._has(name, source):
                return name
            # sets are numbered, so another one under the same number is of a run that was made anew
            note = "it was deleted, and a run of that name was made anew"
            return self._other(f"{name} (before)", str(folder), run_id, stage, note, is_there=False)
        is_file = os.path.isabs(source.path) and os.path.isfile(source.path)  # recorded paths are texts of others
        if run_id is None and _set_in(source.path) is None:
            note = "" if is_file else "it is not where it was recorded"
            if is_file and source.digest is None:
                note = "without a digest: whether the file is still the same is not known"
            path, key = source.path or source.file, source.digest or ""
            return self._other(f"file:{path}", path, None, None, note, is_there=is_file, key=key)
        run_id = folder.name if run_id is None and folder is not None else run_id
        said = name_of_run(run_id, stage)
        if folder is None:  # of a run, in the way of another kind
            note = "" if is_file else "it is not there any more"
            return self._other(said, source.path, run_id, stage, note, is_there=is_file)
        is_there = os.path.isdir(folder)
        # output roots are moved as a whole; a set of that name with other bytes shows that it is another run
        moved = None if is_there else self._named.get((self._root_of.get(target), said))
        if moved is not None and self._has(self.id_of[moved.folder], source):
            return self.id_of[moved.folder]
        note = "it lies in another output root; --root shows more" if is_there else "it is not there any more"
        return self._other(said, str(folder), run_id, stage, note, is_there=is_there)

    def _has(self, name: str, source: SourceRecord) -> bool:
        """Whether a run that was read can be that of the source: no digest of the file there is another one."""
        files = self._digests[name].get(_set_in(source.path) or "", {})
        digest, recorded = files.get(source.file), source.digest
        # what is not known, or of another sort, says nothing
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
