"""CheckpointWriter: saves sets atomically; a set is committed completely or not at all."""

from __future__ import annotations

import datetime
import errno
import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from noether_init_core.errors import CheckpointCorruptError, CheckpointError, CheckpointWriteError, ConfigError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import LOCAL, FileSystem, is_out_of_reach, naming
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import listed, logger_of
from noether_init_core.models import leaf_models
from noether_init_core.paths import PathProvider
from noether_init_core.probe.probe import Probe, take
from noether_init_core.saving.content import Descent, Descents, FileContent, Start, contents_of, iteration_for
from noether_init_core.saving.file_writing import Watch, write_bytes, write_file, write_probe
from noether_init_core.saving.housekeeping import (
    collect_leftovers,
    give_room,
    refresh_flat_names,
    remove_orphans,
    retire_sets,
)
from noether_init_core.saving.retention import Retention, checked_metrics
from noether_init_core.sets.checkpoint_set import SETS_FOLDER, CheckpointSet, check_reachable
from noether_init_core.sets.file_names import CheckpointFileName, Query, check_tag, iteration_of_tag
from noether_init_core.sets.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    PROVENANCE_NAME,
    Manifest,
    digests_to_bytes,
    refused_by_resume,
)
from noether_init_core.sets.snapshot import Memory, Snapshot

logger = logger_of(__name__)

LOCK_NAME = ".noether-init.lock"
LOCK_TIMEOUT_S = 600.0
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class CheckpointWriter:
    """Saves models, optimizers and the trainer of one run as committed sets.

    A set is written to a new folder, flushed to the disk, read back, and then committed by renaming its manifest. If
    the process is killed before the rename, all earlier sets stay, and the next save removes the uncommitted folder. In
    a distributed run, one rank calls it, with full tensors. Several processes may save into one run: a lock serializes
    their saves.

    If tensors in CPU memory change during a save, the set is not committed. Tensors of other devices are copied at the
    start of a save, one after the other, so do not train during that time.

    Args:
        path_provider: The folders of the run; any object with ``output_root``, ``run_id`` and ``stage_name``.
        report: The report of the initialization. Every set gets the origin of each tensor (``provenance.json``). Every
            manifest gets the lineage, the training that is continued or started, and the sets passed over. None: the
            report of the trainer, if it has one.
        flat_names: Whether to write the files under Noether's names too. They are reflinks or hard links if that is
            safe, else copies.
        keep_last: Number of newest good sets of this training to keep; None keeps all. Short for
            ``retention=Retention(last=keep_last)``; see there for the sets that always stay.
        retention: The rules for the sets to keep: a ``Retention``, or its fields as a mapping.
        storage: The file operations.

    Raises ``ConfigError`` for ``keep_last`` with ``retention``, and for invalid values.
    """

    def __init__(
        self,
        path_provider: Any,
        *,
        report: Any = None,
        flat_names: bool = False,
        keep_last: int | None = None,
        retention: Retention | Mapping[str, Any] | None = None,
        storage: FileSystem = LOCAL,
    ) -> None:
        if keep_last is not None and retention is not None:
            raise ConfigError(
                "keep_last and retention cannot be combined. Next: CheckpointWriter(..., "
                f"retention=Retention(last={keep_last!r}, ...))"
            )
        self.paths = PathProvider.of(path_provider)
        self.report = report
        self._dumped: tuple[Any, bytes] | None = None
        self.flat_names = flat_names
        self.retention = Retention(last=keep_last) if retention is None else Retention.of(retention)
        self.storage = storage
        self._descents = Descents()
        self._memory = Memory()
        self._warned: set[str] = set()

    def save(
        self,
        model: Any,
        iteration: TrainingIteration | None = None,
        *,
        tags: Sequence[str] = ("latest",),
        optimizer: bool = True,
        trainer: Any = None,
        averages: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        probe: Any = None,
    ) -> CheckpointSet:
        """Save one set, commit it under ``tags`` and the tag of its iteration, and return it.

        On return, the set is flushed to the disk. An iteration may be saved again; its tag then selects the later set.
        NaN is saved unchanged, because it helps to find the cause. A resume refuses such a set, retention does not
        count
        it, and the first such save logs a warning.

        Args:
            model: A model, or a composite; every single model of it is saved.
            iteration: The current iteration with all three fields; None: ``trainer.iteration``.
            tags: Tags such as ``latest``, ``last``, ``best_model.loss.val``. A tag selects the last set saved with it.
            optimizer: Whether to save the optimizer state of models that have an optimizer and are not frozen.
            trainer: Any object whose ``state_dict()`` returns a dict of plain data and tensors. Without a trainer, the
                set gets the trainer state that this training has saved at this iteration before. Without that, its
                trainer file holds the iteration only.
            averages: Further weights by info: ``{"ema=0.999": state_dict}``; for a composite
                ``{submodel: {"ema=0.999": state_dict}}``.
            metrics: Metrics of this iteration, such as ``{"loss.val": 0.41}``. They are recorded in the manifest, and
                ``Retention(best=...)`` compares them.
            probe: A small batch: a tensor, a list or tuple of arguments, or a dict of keyword arguments. The model is
                run on it in evaluation mode; train flags, buffers and random generators are restored. The set stores
                batch and outputs, and the observer ``probe`` repeats the run when the set is loaded. This process must
                be able to run the complete model.

        Raises:
            ConfigError: The model, iteration, tags, metrics or optimizer cannot be saved, or the model cannot be run
                on the probe. Nothing was written.
            CheckpointFormatError: A value could not be read again; the message names its place. Nothing was written.
            CheckpointWriteError: The disk is full, read-only, failing or not mounted; another process holds the lock;
                this thread is already saving; or tensors changed during the save. The set was not committed, and
                earlier sets are unchanged. Only if the last step fails may the set be committed; the message says so.
        """
        full = iteration_for(iteration, trainer)
        all_tags = _all_tags(full, tags)
        values = self._metrics(metrics)
        contents = contents_of(model, full, self.paths.run_id, optimizer=optimizer, trainer=trainer, averages=averages)
        for content in contents:
            for tag in all_tags if self.flat_names else ():
                CheckpointFileName(content.name.model, content.name.info, tag, content.name.part).checked()
        taken = None if probe is None else take(model, probe)
        lineage = self._lineage(trainer)
        frozen = self._frozen(model) if optimizer else ()
        with _as_write_error(f"{full} of run {self.paths.run_id}", self.paths.checkpoint_path):
            checkpoints = self.storage.resolve(self.paths.checkpoint_path)
            check_reachable(self.paths.checkpoint_path, self.storage)
            check_reachable(checkpoints / SETS_FOLDER, self.storage)
            self._make_folders(checkpoints / SETS_FOLDER)
            with self.storage.lock(checkpoints / LOCK_NAME, LOCK_TIMEOUT_S):
                snapshot = self._cleaned()
                descent = self._descents.of_save(snapshot, full, Start.of(self.report, trainer))
                self._tell_of_another_training(checkpoints, full, descent)
                if trainer is None:
                    contents[-1] = _with_saved_state(contents[-1], snapshot, full, descent.training)
                describe = functools.partial(
                    Manifest,
                    iteration=full.to_mapping(),
                    tags=all_tags,
                    run_id=self.paths.run_id,
                    stage_name=self.paths.stage_name,
                    created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    metrics=values,
                    frozen=frozen,
                    training=descent.training,
                    started_from=descent.started_from,
                    passed_over=descent.passed_over,
                    lineage=lineage,
                    versions=_versions(),
                )
                commit = functools.partial(self._commit, full, contents, describe, self._provenance(trainer), taken)
                try:
                    committed = commit(snapshot)
                except OSError as error:
                    if error.errno not in _NO_ROOM or not give_room(snapshot):
                        raise
                    logger.warning("the disk is full: flat names for Noether were removed to free space for the set")
                    snapshot = self._cleaned()
                    committed = commit(snapshot)
                self._tell_of_refused_values(committed)
                self._follow_up(snapshot, committed)
        return committed

    def _cleaned(self) -> Snapshot:
        """Return a snapshot of the folder, after removing the leftovers of interrupted saves."""
        snapshot = Snapshot(self.paths, storage=self.storage, memory=self._memory)
        collect_leftovers(snapshot)
        return snapshot

    def _frozen(self, model: Any) -> tuple[str, ...]:
        """Return the paths of frozen models with an optimizer, which is not saved, and log a warning once."""
        frozen = tuple(path for path, leaf in leaf_models(model) if leaf.is_frozen and leaf.optimizer is not None)
        self._warn_once(
            f"the optimizer of {', '.join(frozen)} is not saved, because the model is frozen; a resume could not "
            "unfreeze it. Next: bind(..., optimizer=None) to confirm, or bind(..., is_frozen=False) to save it"
            if frozen
            else ""
        )
        return frozen

    def _tell_of_another_training(self, checkpoints: Path, iteration: TrainingIteration, descent: Descent) -> None:
        """Warn once about sets of another training in the folder.

        Refusing to save would lose the work of this run, and removing those sets would lose that of the other.
        """
        if descent.others_up_to is None:
            return
        self._warn_once(
            f"{checkpoints} already has sets up to {descent.others_up_to} of another training; this run saves from "
            f"{iteration} on and was not resumed from them, as far as is known. They stay on disk: retention counts "
            "and removes only sets of this training. Tags that this run does not save (E.., best) select them. "
            "Next: use another run_id for each run, or auto_resume: true to continue; after a resume in code, pass "
            "CheckpointWriter(report=...)"
        )

    def _tell_of_refused_values(self, committed: CheckpointSet) -> None:
        refused = refused_by_resume(committed.manifest) if committed.manifest is not None else ()
        if refused:
            self._warn_once(
                f"{committed.name} of run {committed.run_id} is saved, but a resume will refuse it: "
                f"{listed(refused, 3)} (on_nonfinite: error). Retention does not count such sets and keeps the newest "
                "finite ones. Next: stop the run; ninit verify shows the newest finite set",
                once="a resume will refuse it",
            )

    def _warn_once(self, text: str, once: str = "") -> None:
        key = once or text.partition(",")[0]
        if text and key not in self._warned:
            self._warned.add(key)
            logger.warning("%s", text)

    def _make_folders(self, folder: Path) -> None:
        """Create the folder and its parents, and flush each new name, so that they survive a power failure."""
        missing = []
        while not self.storage.is_folder(folder):
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            try:
                self.storage.make_folder(folder)
            except FileExistsError:  # another writer created it meanwhile
                if not self.storage.is_folder(folder):
                    raise
            self.storage.fsync_folder(folder.parent)

    def _commit(
        self,
        iteration: TrainingIteration,
        contents: Sequence[FileContent],
        describe: Callable[..., Manifest],
        provenance: bytes | None,
        probe: Probe | None,
        snapshot: Snapshot,
    ) -> CheckpointSet:
        """Write the files and a temporary manifest, flush them, and commit by renaming the manifest.

        All bytes and names reach the disk before the rename. So after a power failure, a folder with a manifest is
        complete.
        """
        storage = self.storage
        sequence = snapshot.folders[-1].sequence + 1 if snapshot.folders else 1
        folder = snapshot.folder / SETS_FOLDER / f"{sequence:08d}_{iteration}"
        storage.make_folder(folder)
        storage.fsync_folder(folder.parent)
        # A thread reads the tensors in memory while they are written, which takes longer, so it costs little time.
        with Watch(contents) as watch:
            written = [write_file(folder, content, storage, watch) for content in contents]
            changed = watch.changed()
        if changed:
            raise CheckpointCorruptError(
                f"{', '.join(changed[:5])} changed while the set was written, by another thread or process: its files "
                "would mix two states. Next: save a clone(), or wait until the update has ended",
                path=folder,
                key=", ".join(changed),
            )
        files = tuple(head for head, _digests in written)
        digests = digests_to_bytes({head.name: found for head, found in written})
        seen = {(content.name.model, content.name.part) for content in contents if content.name.info is None}
        before = next((one.manifest.seen for one in snapshot.readable() if one.manifest is not None), ())
        manifest = describe(
            sequence=sequence,
            seen=tuple(sorted(seen.union(before))),
            files=files,
            digests=write_bytes(folder / DIGESTS_NAME, digests, storage),
            digests_size=len(digests),
            provenance=None if provenance is None else write_bytes(folder / PROVENANCE_NAME, provenance, storage),
            probe=None if probe is None else write_probe(folder, probe, iteration, storage),
        )
        temporary = folder / f"{MANIFEST_NAME}.tmp"
        with naming(temporary), storage.open_write(temporary) as file:
            file.write(manifest.to_bytes())
            storage.fsync(file)
        storage.fsync_folder(folder)
        unconfirmed = (
            f"{folder} is written, and it is unknown whether it is committed: a power failure may remove it. "
            "Next: save again, or check it with ninit inspect"
        )
        try:
            with naming(folder / MANIFEST_NAME):
                storage.rename(temporary, folder / MANIFEST_NAME)
        except OSError:
            # On a network file system, a rename can succeed and still report an error.
            if _is_there(temporary, storage):
                raise
            with _as_write_error(f"{iteration} of run {self.paths.run_id}", folder, unconfirmed):
                raise
        with _as_write_error(f"{iteration} of run {self.paths.run_id}", folder, unconfirmed):
            storage.fsync_folder(folder)
            return snapshot.add(folder.name)

    def _follow_up(self, snapshot: Snapshot, committed: CheckpointSet) -> None:
        """Update flat names and remove old sets; failures are logged, because the set is already committed."""
        training = committed.manifest.training if committed.manifest is not None else None
        steps: tuple[tuple[bool, str, Callable[[], None]], ...] = (
            (True, "the removal of flat names of removed sets", lambda: remove_orphans(snapshot)),
            (self.flat_names, "the flat names for Noether", lambda: refresh_flat_names(snapshot, committed)),
            (
                not self.retention.keeps_all,
                "the removal of old sets",
                lambda: retire_sets(snapshot, self.retention, training),
            ),
        )
        for is_wanted, what, step in steps:
            # A failure must not skip the later steps: on a full disk, the removal of old sets frees space.
            try:
                if is_wanted:
                    step()
            except (CheckpointError, OSError) as error:
                logger.warning(
                    "%s is committed, but %s failed: %s. The next save repeats it", committed.folder, what, error
                )

    def _metrics(self, metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
        """Return the metrics for the manifest; warn if a ``best`` rule needs a metric that this save lacks."""
        values = checked_metrics(metrics)
        if metrics:
            for rule in self.retention.best:
                if rule.metric not in values:
                    given = ", ".join(values)
                    logger.warning("retention needs the metric %s, but this save has only %s", rule.metric, given)
        return values

    def _provenance(self, trainer: Any) -> bytes | None:
        """Return the origin of the tensors from the report, or from that of the trainer, as JSON.

        It is the same for every set of a report, so it is computed once.
        """
        report = self.report if self.report is not None else getattr(trainer, "init_report", None)
        provenance = getattr(report, "provenance", None)
        if not callable(provenance):
            return None
        if self._dumped is None or self._dumped[0] is not report:
            self._dumped = report, json.dumps(provenance(), indent=0, default=str).encode()
        return self._dumped[1]

    def _lineage(self, trainer: Any) -> tuple[dict[str, Any], ...]:
        found = self.report.lineage() if self.report is not None else getattr(trainer, "lineage", None) or ()
        entries = [json.loads(json.dumps(dict(entry), default=str)) for entry in found]
        for entry in entries:
            if isinstance(entry.get("set"), str):  # an absolute path would be wrong on another machine
                entry["set"] = Path(entry["set"]).name
        return tuple(entries)


def _with_saved_state(
    file: FileContent, snapshot: Snapshot, iteration: TrainingIteration, training: str | None
) -> FileContent:
    """Return a trainer file without state, with the state that this iteration was saved with before, if there is one.

    A second save of an iteration, such as that of the best weights, is newer than the first one, so a resume selects
    it. Without the state, schedules and the order of the data would start again from zero.
    """
    sets = (one for one in snapshot.readable() if one.manifest is not None and one.manifest.training == training)
    for one in sets:
        before = one.file(file.name.model, "trainer")
        if one.iteration == iteration and before is not None:
            try:
                with open_checkpoint(before.path, digests=one.digests_of(before)) as reader:
                    reader.verify()
                    return attrs.evolve(file, content={**file.content, **reader.load()})
            except CheckpointError as error:
                if is_out_of_reach(error):
                    raise
                logger.warning("%s is saved without trainer state: %s", iteration, error)
    return file


def _all_tags(iteration: TrainingIteration, tags: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise ConfigError(f'tags must be a sequence of strings. Next: tags=("{tags}",)')
    for tag in tags:
        check_tag(tag)
        tagged = iteration_of_tag(tag)
        if tagged is not None and tagged != iteration:
            raise ConfigError(f"tag {tag!r} is another iteration than {iteration}, which is saved. Next: leave it out")
        if tagged is None and Query.of(tag).iteration is not None:
            raise ConfigError(f"tag {tag!r} would be read as a query for an iteration. Next: choose another tag")
    return tuple(dict.fromkeys((str(iteration), *tags)))


@contextmanager
def _as_write_error(
    what: str, folder: Path, outcome: str = "It was not committed; earlier sets are unchanged"
) -> Iterator[None]:
    try:
        yield
    except CheckpointWriteError:
        raise
    except CheckpointError as error:
        raise CheckpointWriteError(f"{what} was not saved: {error}. {outcome}", path=error.path) from error
    except OSError as error:
        path = Path(error.filename) if isinstance(error.filename, str | os.PathLike) else folder
        raise CheckpointWriteError(
            f"{what} was not saved: {path}: {error.strerror or error}. {outcome}", path=path
        ) from error


def _is_there(path: Path, storage: FileSystem) -> bool:
    try:
        return storage.exists(path)
    except OSError:
        return False


@functools.cache
def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("noether-init-core")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        own = "source tree"
    return {"noether_init": own, "torch": str(torch.__version__), "python": platform.python_version()}
