"""CheckpointWriter: saves sets, each as a whole or not at all."""

from __future__ import annotations

import datetime
import errno
import functools
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from noether_init_core.errors import CheckpointCorruptError, CheckpointError, CheckpointWriteError, ConfigError
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import listed
from noether_init_core.models import leaf_models
from noether_init_core.paths import PathProvider
from noether_init_core.probe.probe import Probe, take
from noether_init_core.saving.content import Descent, Descents, FileContent, Start, contents_of, iteration_for
from noether_init_core.saving.file_writing import Watch, naming, write_bytes, write_file, write_probe
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

logger = logging.getLogger(__name__)

LOCK_NAME = ".noether-init.lock"
LOCK_TIMEOUT_S = 600.0
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class CheckpointWriter:
    """Saves models, optimizers and the trainer of one run as committed sets.

    A set is written to a folder of its own, brought onto the disk, read back, and then committed by renaming its
    manifest into place. A process that is killed before that leaves the sets from before, and an uncommitted folder
    that the next save removes. In a distributed run one rank may call it, with full tensors.

    Tensors in CPU memory that change while a set is written are found out, and the set is not committed. Those of other
    devices are copied when the save begins, one after the other: do not train meanwhile.

    Args:
        path_provider: The folders of the run; anything with ``output_root``, ``run_id`` and ``stage_name``.
        report: The report of the initialization; where every tensor came from is kept beside every set
            (``provenance.json``), and its lineage in every manifest, with the training that goes
            on or begins, and the sets that it has passed over. None: what the trainer that is saved knows of it.
        flat_names: Whether Noether shall find the files under its own names as well, which takes the room twice.
        keep_last: How many sets that can be resumed stay, of this training; None keeps all. The set to walk back to,
            the current set of every tag, and the sets of another training under this run id stay in any case. Short for
            ``retention=Retention(last=keep_last)``.
        retention: Which sets stay, where more than their age decides: a ``Retention``, or its fields as a mapping.
        storage: The file operations.
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
            raise ConfigError("keep_last and retention were both given; say keep_last as retention's last")
        self.paths = PathProvider.of(path_provider)
        self.report = report
        self._told: tuple[Any, bytes] | None = None
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
        """Save one set and commit it under ``tags`` and the tag of its iteration; returns the committed set.

        When this returns, the set is on the disk. The same iteration may be saved again: the later set is meant then.
        NaN is saved as it is, since who looks for its cause wants it, but a resume refuses it: a warning says so at the
        first such save, and retention does not count the set.

        Args:
            model: A model, or a composite of which every single model is saved.
            iteration: How far training has come, all three fields; None: ``trainer.iteration``.
            tags: Such as ``latest``, ``last``, ``best_model.loss.val``. A tag means the last set saved with it.
            optimizer: Whether optimizer state is saved, of models that have an optimizer and are not frozen.
            trainer: Anything whose ``state_dict()`` is a dict of plain data and tensors. Without one, the trainer
                file holds the iteration only.
            averages: Further weights, by info: ``{"ema=0.999": state_dict}``; for a composite by submodel first.
            metrics: Values of this iteration, such as ``{"loss.val": 0.41}``; they are recorded in the manifest, and
                ``Retention(best=...)`` compares them.
            probe: A small batch: a tensor; a list or tuple of arguments; a dict of keywords. The model is run on it
                now, evaluating, and leaves no trace: train flags, buffers and random generators are put back. Batch
                and values of what comes out are kept in the set. The observer ``probe`` repeats it when the
                set is loaded. The process must be able to run the whole model by itself.

        Raises:
            ConfigError: The model, iteration, tags, metrics or optimizer cannot be saved, or the model cannot be run
                on the probe. Nothing was written.
            CheckpointFormatError: A value could not be read again; its place is named. Nothing was written.
            CheckpointWriteError: The disk is full, read-only, failing or not mounted, another process holds the lock,
                this thread is in the midst of a save, or tensors changed meanwhile. The set was not committed (but for
                a disk that fails in the very last step: the message says so); the sets from before are untouched.
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
                    logger.warning("the disk is full: flat names for Noether were removed, to have room for the set")
                    snapshot = self._cleaned()
                    committed = commit(snapshot)
                self._tell_of_refused_values(committed)
                self._follow_up(snapshot, committed)
        return committed

    def _cleaned(self) -> Snapshot:
        """What is there, without the leftovers of saves that were cut short."""
        snapshot = Snapshot(self.paths, storage=self.storage, memory=self._memory)
        collect_leftovers(snapshot)
        return snapshot

    def _frozen(self, model: Any) -> tuple[str, ...]:
        """Models whose optimizer is left out because they are frozen."""
        frozen = tuple(path for path, leaf in leaf_models(model) if leaf.is_frozen and leaf.optimizer is not None)
        self._warn_once(
            f"the optimizer of {', '.join(frozen)} is not saved, since the model is frozen: it could not be resumed "
            "unfrozen. Next: optimizer=None if that is meant, or is_frozen=False in bind(...) to save it all the same"
            if frozen
            else ""
        )
        return frozen

    def _tell_of_another_training(self, checkpoints: Path, iteration: TrainingIteration, descent: Descent) -> None:
        """Refusing to save would lose the work of this run; removing the sets would lose that of the other."""
        if descent.others_up_to is None:
            return
        self._warn_once(
            f"{checkpoints} has sets up to {descent.others_up_to} already, and this run, which was not resumed from "
            f"them as far as is known, saves from {iteration} on. They stay and take room: retention counts and "
            "removes only sets of this training. Tags that it does not save itself (E.., best) will mean them. "
            "Next: a run_id of its own for each run, or auto_resume: true to go on; "
            "CheckpointWriter(report=...) tells of a resume"
        )

    def _tell_of_refused_values(self, committed: CheckpointSet) -> None:
        refused = refused_by_resume(committed.manifest) if committed.manifest is not None else ()
        if refused:
            self._warn_once(
                f"{committed.name} of run {committed.run_id} is saved, but a resume will refuse it: "
                f"{listed(refused, 3)} (on_nonfinite: error). Retention does not count such sets, and keeps the newest "
                "that are finite. Next: stop the run; ninit verify names the newest finite set",
                once="a resume will refuse it",
            )

    def _warn_once(self, text: str, once: str = "") -> None:
        key = once or text.partition(",")[0]
        if text and key not in self._warned:
            self._warned.add(key)
            logger.warning("%s", text)

    def _make_folders(self, folder: Path) -> None:
        """Create the folder and its parents, so that they survive a power failure."""
        missing = []
        while not self.storage.is_folder(folder):
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            try:
                self.storage.make_folder(folder)
            except FileExistsError:  # another writer was faster
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
        """Write the files, then the manifest that ``describe`` makes of them; renaming that into place commits."""
        storage = self.storage
        sequence = snapshot.folders[-1].sequence + 1 if snapshot.folders else 1
        folder = snapshot.folder / SETS_FOLDER / f"{sequence:08d}_{iteration}"
        storage.make_folder(folder)
        storage.fsync_folder(folder.parent)
        # tensors are looked at meanwhile: the disk and torch's checksums take longer
        with Watch(contents) as watch:
            written = [write_file(folder, content, storage, watch) for content in contents]
            changed = watch.changed()
        if changed:
            raise CheckpointCorruptError(
                f"{', '.join(changed[:5])} changed while the set was written, by another thread or process: its files "
                "would be of two moments. Next: save a copy (clone), or wait for what updates it",
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
            f"{folder} is written, and may or may not be committed: after a power failure it may be gone. "
            "Next: save again, or look: ninit inspect"
        )
        try:
            with naming(folder / MANIFEST_NAME):
                storage.rename(temporary, folder / MANIFEST_NAME)
        except OSError:
            # over a network a rename can report an error and have worked
            if _is_there(temporary, storage):
                raise
            with _as_write_error(f"{iteration} of run {self.paths.run_id}", folder, unconfirmed):
                raise
        with _as_write_error(f"{iteration} of run {self.paths.run_id}", folder, unconfirmed):
            storage.fsync_folder(folder)
            return snapshot.add(folder.name)

    def _follow_up(self, snapshot: Snapshot, committed: CheckpointSet) -> None:
        """The set is committed: whatever fails here is no reason to tell the caller that it is lost."""
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
            # each on its own: on a full disk, the removal of old sets is what makes room again
            try:
                if is_wanted:
                    step()
            except (CheckpointError, OSError) as error:
                logger.warning(
                    "%s is committed, but %s failed: %s. The next save tries again", committed.folder, what, error
                )

    def _metrics(self, metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
        """The metrics as they are recorded. A rule for a metric that is never given would keep nothing."""
        values = checked_metrics(metrics)
        if metrics:
            for rule in self.retention.best:
                if rule.metric not in values:
                    given = ", ".join(values)
                    logger.warning("the best sets by %s are to be kept, but this save gives %s", rule.metric, given)
        return values

    def _provenance(self, trainer: Any) -> bytes | None:
        """Where the tensors came from, as the report says, or that of the trainer; the same for every set."""
        report = self.report if self.report is not None else getattr(trainer, "init_report", None)
        tell = getattr(report, "provenance", None)
        if not callable(tell):
            return None
        if self._told is None or self._told[0] is not report:
            self._told = report, json.dumps(tell(), indent=0, default=str).encode()
        return self._told[1]

    def _lineage(self, trainer: Any) -> tuple[dict[str, Any], ...]:
        found = self.report.lineage() if self.report is not None else getattr(trainer, "lineage", None) or ()
        entries = [json.loads(json.dumps(dict(entry), default=str)) for entry in found]
        for entry in entries:
            if isinstance(entry.get("set"), str):  # where it lies on this machine is of no use on another
                entry["set"] = Path(entry["set"]).name
        return tuple(entries)


def _all_tags(iteration: TrainingIteration, tags: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise ConfigError(f'tags must be a sequence of texts: tags=("{tags}",)')
    for tag in tags:
        check_tag(tag)
        said = iteration_of_tag(tag)
        if said is not None and said != iteration:
            raise ConfigError(f"tag {tag!r} says another iteration than the {iteration} that is saved")
        if said is None and Query.of(tag).iteration is not None:
            raise ConfigError(f"tag {tag!r} would be read as a question for an iteration. Choose another tag")
    return tuple(dict.fromkeys((str(iteration), *tags)))


@contextmanager
def _as_write_error(
    what: str, folder: Path, outcome: str = "It was not committed; the sets from before are untouched"
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
