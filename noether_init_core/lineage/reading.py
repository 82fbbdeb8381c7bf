"""``lineage_of``: the records of runs below output roots, read and put together. Nothing is created or changed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import xxhash

from noether_init_core.checkpoints.audit import stores_at
from noether_init_core.checkpoints.manifest import MAX_PROVENANCE_BYTES, PROVENANCE_NAME
from noether_init_core.checkpoints.sets import SETS_FOLDER, CheckpointSet
from noether_init_core.checkpoints.store import RunStore
from noether_init_core.errors import CheckpointError, CheckpointNotFoundError
from noether_init_core.lineage.graph import Lineage, LineageEdge, LineageNode, LineageSet, related
from noether_init_core.paths import PathProvider
from noether_init_core.provenance import History, SourceRecord, histories

__all__ = ["lineage_of"]

_CHECKPOINTS = "checkpoints"


def lineage_of(path: Path | str, roots: Sequence[Path | str] = ()) -> Lineage:
    """Ancestors and descendants of the run at ``path``, from the records beside its sets and those of other runs.

    Args:
        path: A run folder, a stage of it, its folder of checkpoints or one of its sets; or an output root, for all.
        roots: Further output roots in which descendants are looked for, beside the one that the run lies in.

    A run in which no record was kept (of Noether, of other writers) has no ancestors here, and a note says so. What
    cannot be read is in ``problems``.

    Raises ``CheckpointNotFoundError`` where there is no run.
    """
    asked = [_of_store(_as_recorded(store)) for store in stores_at(Path(path))]
    found = {one.folder: one for one in asked}
    where = [*dict.fromkeys([one.root for one in asked]), *(Path(root).resolve() for root in roots)]
    for root in where:
        try:
            found |= {one.folder: one for one in map(_of_store, stores_at(root)) if one.folder not in found}
        except CheckpointNotFoundError:
            if root not in {one.root for one in asked}:
                raise
    reader = _Reader(tuple(found.values()))
    reader.read()
    focus = reader.id_of[asked[0].folder] if len(asked) == 1 else None
    edges = tuple(reader.edges())
    return related(focus, tuple(reader.nodes.values()), edges, reader.problems)


@attrs.frozen
class _Run:
    """A folder with checkpoints."""

    folder: Path
    root: Path
    name: str
    run_id: str
    stage: str | None
    store: RunStore


def _of_store(store: RunStore) -> _Run:
    paths = store.paths
    name = paths.run_id if paths.stage_name is None else f"{paths.run_id}/{paths.stage_name}"
    name = f"debug/{name}" if paths.debug else name
    folder = store.folder.parent
    return _Run(folder, paths.output_root.resolve(), name, paths.run_id, paths.stage_name, store)


def _as_recorded(store: RunStore) -> RunStore:
    """The same folder as the stage of a run, where its sets say that it is one; the folder alone cannot tell."""
    folder = store.folder.parent
    if store.paths.stage_name is not None:
        return store
    try:
        manifests = [one.manifest for one in store.sets() if one.manifest is not None]
    except (CheckpointError, OSError):  # it is read again, and told then
        return store
    said = {(manifest.run_id, manifest.stage_name) for manifest in manifests}
    if (folder.parent.name, folder.name) in said:
        return RunStore(PathProvider(folder.parent.parent, folder.parent.name, folder.name))
    return store


class _Reader:
    """Puts the records of runs together."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        names = Counter(run.name for run in runs)
        self.id_of = {run.folder: run.name if names[run.name] == 1 else str(run.folder) for run in runs}
        self.nodes: dict[str, LineageNode] = {}
        self.problems: list[str] = []
        self._runs = runs
        self._counted: Counter[tuple[SourceRecord, str, str]] = Counter()
        self._totals: Counter[tuple[str, str]] = Counter()
        self._set_names: dict[str, set[str]] = {}

    def read(self) -> None:
        """Read every run."""
        for run in self._runs:
            self._read(run)

    def edges(self) -> Iterator[LineageEdge]:
        """Whose weights went into whom, in the order of the runs that took them."""
        for (source, target, model), tensors in self._counted.items():
            origin = dict(source.origin)
            name = self._node_of(source, target)
            from_set = _set_in(source.path)
            total = self._totals[target, model]
            is_there = self.nodes[name].type == "run"
            gone = from_set is not None and is_there and from_set not in self._set_names.get(name, set())
            yield LineageEdge(
                name,
                target,
                source.kind,
                model,
                source.file,
                origin.get("tag"),
                origin.get("iteration"),
                from_set,
                tensors,
                tensors / total if total else None,
                source.kind.rpartition(".")[2] in ("resume", "ResumeInitializer"),
                "the set is not there any more" if gone else "",
            )

    def _read(self, run: _Run) -> None:
        name = self.id_of[run.folder]
        sets: tuple[CheckpointSet, ...] = ()
        try:
            sets = run.store.sets()
            self.problems += [str(error) for error in run.store.broken()]
        except (CheckpointError, OSError) as error:
            self.problems.append(f"{run.folder}: {error}")
        resumed = {one.manifest.started_from for one in sets if one.manifest is not None and one.manifest.started_from}
        self._set_names[name] = {one.folder.name for one in sets if one.committed}
        has_record = self._record(name, sets)
        note = "" if has_record or not sets else "where its weights came from was not recorded"
        if not sets:
            note = "no set"
        self.nodes[name] = LineageNode(
            name,
            "run",
            run.run_id,
            run.stage,
            str(run.folder),
            tuple(map(_said, reversed(sets))),
            resumed=len(resumed),
            note=note,
        )

    def _record(self, name: str, sets: Sequence[CheckpointSet]) -> bool:
        """Count the sources of the newest set of each training in the folder; whether there is any record."""
        newest: dict[str | None, CheckpointSet] = {}
        for one in sets:
            if one.manifest is not None and one.manifest.provenance is not None:
                newest[one.manifest.training] = one
        for one in newest.values():
            try:
                kept = _histories_of(one)
            except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                self.problems.append(
                    f"{one.folder / PROVENANCE_NAME} tells nothing of where weights came from: {error}"
                )
                continue
            for model, history in kept.items():
                self._totals[name, model] += len(history)
                for chain in history.values():
                    self._count(name, model, chain)
        return bool(newest)

    def _count(self, name: str, model: str, chain: Sequence[tuple[SourceRecord, tuple[str, ...]]]) -> None:
        """The first of a chain is what this run read; the others are told by the runs that read them, if they are."""
        if chain:
            self._counted[chain[0][0], name, model] += 1
        for (later, _names), (earlier, _earlier_names) in itertools.pairwise(chain):
            target = self._node_of(later, name)
            # a run that is read tells it itself
            if target not in self._set_names and target not in self.id_of.values():
                self._counted[earlier, target, later.model] += 1
                self._totals[target, later.model] += 1

    def _node_of(self, source: SourceRecord, target: str) -> str:
        """Id of the node of a source; a node of its own is made for what is no run that was read."""
        origin = dict(source.origin)
        folder = _run_folder(source.path)
        if folder is not None and folder in self.id_of:
            return self.id_of[folder]
        run_id, stage = origin.get("run_id"), origin.get("stage_name")
        if run_id is None and folder is None:
            is_there = Path(source.path).is_file()
            name = source.path or source.file
            note = "" if is_there else "it is not where it was recorded"
            self.nodes.setdefault(
                name, LineageNode(name, "file" if is_there else "missing", None, None, source.path, note=note)
            )
            return name
        run_id = run_id or (folder.name if folder is not None else "unknown")
        said = run_id if stage is None else f"{run_id}/{stage}"
        moved = self._moved(said, target)
        if moved is not None:
            return moved
        name = said if said not in self.id_of.values() else f"{said} ({folder})"
        is_there = folder is not None and folder.is_dir()
        where = (
            "it lies in another output root: --root shows what it came from" if is_there else "it is not there any more"
        )
        path = str(folder) if folder is not None else source.path
        kind = "run" if is_there else "missing"
        self.nodes.setdefault(name, LineageNode(name, kind, run_id, stage, path, note=where))  # type: ignore[arg-type]
        return name

    def _moved(self, said: str, target: str) -> str | None:
        """The run of that name beside the run that recorded it: output roots are moved as a whole."""
        root = next((run.root for run in self._runs if self.id_of[run.folder] == target), None)
        for run in self._runs:
            if run.name == said and (root is None or run.root == root):
                return self.id_of[run.folder]
        return None


def _histories_of(one: CheckpointSet) -> dict[str, History]:
    """Where tensors came from. Raises ``ValueError`` or its kin for what is no record, or not as it was written."""
    assert one.manifest is not None
    content = (one.folder / PROVENANCE_NAME).read_bytes()
    if len(content) > MAX_PROVENANCE_BYTES:
        raise ValueError(f"it has {len(content):,} bytes")
    if f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}" != one.manifest.provenance:
        raise ValueError("its digest is not the one in the manifest")
    return histories(json.loads(content))


def _said(one: CheckpointSet) -> LineageSet:
    manifest = one.manifest
    return LineageSet(
        one.folder.name if one.committed else one.name,
        one.tags,
        None if one.iteration is None else str(one.iteration),
        one.committed,
        None if manifest is None else manifest.created,
        None if manifest is None else sum(file.size for file in manifest.files),
    )


def _run_folder(path: str) -> Path | None:
    """The folder of the run (and stage) that a file lies in, links resolved; None for any other file."""
    parts = Path(path).parts
    if _CHECKPOINTS not in parts:
        return None
    at = len(parts) - 1 - parts[::-1].index(_CHECKPOINTS)
    return Path(*parts[:at]).resolve() if at else None


def _set_in(path: str) -> str | None:
    parts = Path(path).parts
    return parts[-2] if len(parts) > 2 and parts[-3] == SETS_FOLDER else None
