"""``lineage_of``: the records of runs below output roots, put together. Nothing is created or changed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from noether_init_core.errors import CheckpointNotFoundError
from noether_init_core.lineage.graph import Lineage, LineageEdge, LineageNode, LineageSet, related
from noether_init_core.lineage.records import Records, Run, read_run, run_at, run_folder, set_in
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.places import runs_at
from noether_init_core.sets.provenance import SourceRecord

__all__ = ["lineage_of"]

#: The files that an entry's values came from, the latest first, and its names there.
_Chain = Sequence[tuple[SourceRecord, tuple[str, ...]]]


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
        self._known: dict[tuple[SourceRecord, Path | None], str] = {}
        self._others: dict[tuple[str, str, str], str] = {}
        #: entries of the model that were read, by their names there
        self._entries: dict[tuple[SourceRecord, str, str, bool], set[str]] = {}
        self._totals: dict[tuple[str, str, bool], set[str]] = {}
        read = [(run, read_run(run)) for run in runs]
        for run, records in read:
            self._take(run, records)
        for run, records in read:
            for training in records.trainings:
                for model, history in training.histories.items():
                    place = self.id_of[run.folder], model, training.is_newest
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
            notes = [self._note_on(source, name), "" if is_newest else "by an earlier training in the same folder"]
            yield LineageEdge(
                name,
                target,
                source.kind,
                model,
                source.file,
                origin.get("tag"),
                origin.get("iteration"),
                set_in(source.path),
                len(entries),
                len(entries) / total if total else None,
                source.kind.rpartition(".")[2] in ("resume", "ResumeInitializer"),
                "; ".join(filter(None, notes)),
            )

    def _take(self, run: Run, records: Records) -> None:
        name = self.id_of[run.folder]
        self.problems += records.problems
        self._digests[name] = records.digests()
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

    def _note_on(self, source: SourceRecord, name: str) -> str:
        """What became of the set that was read, where its run is there."""
        from_set = set_in(source.path)
        if from_set is None or name not in self._ids:
            return ""
        files = self._digests[name].get(from_set)
        if files is None:
            return "the set is not there any more"
        return ""

    def _node_of(self, source: SourceRecord, target: str) -> str:
        """Id of the node of a source; a node of its own is made for what is no run that was read."""
        place = source, self._root_of.get(target)
        if place not in self._known:
            self._known[place] = self._look_up(source, place[1])
        return self._known[place]

    def _look_up(self, source: SourceRecord, root: Path | None) -> str:
        origin = dict(source.origin)
        run_id, stage = origin.get("run_id"), origin.get("stage_name")
        folder = run_folder(source.path)
        if folder is not None and folder in self.id_of:
            name = self.id_of[folder]
            files = self._digests[name].get(set_in(source.path) or "")
            if files is None or _is_same(files.get(source.file), source.digest):
                return name
            # sets are numbered, so another one under the same number is of a run that was made anew
            note = "it was deleted, and a run of that name was made anew"
            return self._other(f"{name} (before)", str(folder), run_id, stage, note, is_there=False)
        if run_id is None and set_in(source.path) is None:
            is_there = _is_there(source.path, is_folder=False) and Path(source.path).is_absolute()
            note = "" if is_there else "it is not where it was recorded"
            if source.path and not Path(source.path).is_absolute():
                note = "recorded by a relative path, so which file it was is not known"
            elif is_there and source.digest is None:
                note = "without a digest: whether the file is still the same is not known"
            path = source.path or source.file
            key = source.digest or ""
            return self._other(f"file:{path}", path, None, None, note, is_file=True, is_there=is_there, key=key)
        if folder is None:  # of a run, in the way of another kind
            is_there = _is_there(source.path, is_folder=False)
            note = "" if is_there else "it is not there any more"
            said = str(run_id) if stage is None else f"{run_id}/{stage}"
            return self._other(said, source.path, run_id, stage, note, is_there=is_there)
        run_id = folder.name if run_id is None else run_id
        said = run_id if stage is None else f"{run_id}/{stage}"
        is_there = _is_there(str(folder), is_folder=True)
        if not is_there:
            moved = self._moved(source, said, root)
            if moved is not None:
                return moved
        note = "it lies in another output root; --root shows more" if is_there else "it is not there any more"
        return self._other(said, str(folder), run_id, stage, note, is_there=is_there)

    def _other(
        self,
        name: str,
        path: str,
        run_id: str | None,
        stage: str | None,
        note: str,
        *,
        is_file: bool = False,
        is_there: bool,
        key: str = "",
    ) -> str:
        if (name, path, key) not in self._others:
            free = name
            while free in self.nodes:
                free = f"{free} ({key or path})"
            self._others[name, path, key] = free
            node = LineageNode(free, "file" if is_file else "run", run_id, stage, path, note=note)
            self.nodes[free] = node if is_there else attrs.evolve(node, type="missing")
        return self._others[name, path, key]

    def _moved(self, source: SourceRecord, said: str, root: Path | None) -> str | None:
        """The run of that name beside the run that recorded it: output roots are moved as a whole.

        A set of that name with other bytes shows that it is another run.
        """
        run = None if root is None else self._named.get((root, said))
        if run is None:
            return None
        name = self.id_of[run.folder]
        files = self._digests[name].get(set_in(source.path) or "", {})
        return name if _is_same(files.get(source.file), source.digest) else None


def _is_same(digest: str | None, recorded: str | None) -> bool:
    """Whether two digests of a file can be of the same bytes; what is not known, or of another sort, says nothing."""
    if digest is None or recorded is None or digest.partition(":")[0] != recorded.partition(":")[0]:
        return True
    return digest == recorded


def _is_there(path: str, *, is_folder: bool) -> bool:
    try:
        return Path(path).is_dir() if is_folder else Path(path).is_file()
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
