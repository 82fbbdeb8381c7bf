"""Sets of files of one training iteration: the values, and how a committed one is read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    ConfigError,
    TornSetError,
)
from noether_init_core.files.checkpoint import Digests
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.file_names import Part, stem_of
from noether_init_core.sets.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    FileDigests,
    Manifest,
    ManifestFile,
    read_digests,
    read_manifest,
    refused_by_resume,
)

SETS_FOLDER = "sets"
# iterations without leading zeros
_SET_NAME = re.compile(r"(\d{8,18})_E(0|[1-9]\d{0,17})_U(0|[1-9]\d{0,17})_S(0|[1-9]\d{0,17})", re.ASCII)


@attrs.frozen
class CheckpointFile:
    """One file; ``model`` is the name (for a submodel the path of names) that stands in the file's name.

    ``identity`` is that of a flat file when it was listed: no manifest says what was written.
    """

    folder: Path
    name: str
    model: str
    info: str | None
    part: Part
    identity: tuple[int, int] | None = attrs.field(default=None, eq=False)

    @cached_property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.name

    @property
    def stem(self) -> str:
        """Model and info as they stand in the name."""
        return stem_of(self.model, self.info)


@attrs.frozen
class Need:
    """A file that the caller needs; ``model`` None: that of the only model that has such a file."""

    model: str | None
    part: Part
    info: str | None = None


@attrs.frozen
class CheckpointSet:
    """Weights, optimizer and trainer state that belong together.

    Attributes:
        folder: Where the files are.
        name: The tag in the files' names; for a committed set that of its iteration.
        tags: Every tag that it was saved under.
        iteration: None where only the files know it (a legacy tag such as ``latest``); ``Snapshot.iteration_of`` looks.
        sequence: The place in the order of commits, from 1; None for a legacy set.
        committed: Whether a manifest vouches for it.
        flat_files: Those of a legacy set, in the order of ``files``; a manifest names those of a committed one.
        run_id: The run that wrote it; None where only the files know.
        stage_name: Its stage.
        manifest: None for a legacy set.
        storage: Where digests of tensors are read.
    """

    folder: Path
    name: str
    tags: tuple[str, ...]
    iteration: TrainingIteration | None
    sequence: int | None
    committed: bool
    flat_files: tuple[CheckpointFile, ...] = ()
    run_id: str | None = None
    stage_name: str | None = None
    manifest: Manifest | None = attrs.field(default=None, repr=False, eq=False)
    storage: FileSystem = attrs.field(default=LOCAL, repr=False, eq=False)

    @cached_property
    def files(self) -> tuple[CheckpointFile, ...]:
        """Its files, by model, info, part."""
        if self.manifest is None:
            return self.flat_files
        entries = self.manifest.files
        return sorted_files([CheckpointFile(self.folder, one.name, one.model, one.info, one.part) for one in entries])

    def file(self, model: str | None, part: Part, info: str | None = None) -> CheckpointFile | None:
        """The file of ``part`` of ``model``; None where there is none.

        ``model`` None: the only one of that part and info, None also where there are several.
        """
        if model is not None:
            stem = stem_of(model, info)
            return next((file for file in self.files if file.part == part and file.stem == stem), None)
        found = [file for file in self.files if file.part == part and file.info == info]
        return found[0] if len(found) == 1 else None

    @cached_property
    def place(self) -> str:
        """The name that no other set of its folder has: that of its own folder; of flat files their tag."""
        return self.folder.name if self.committed else self.name

    def has(self, need: Need) -> bool:
        """Whether the file is there."""
        return self.file(need.model, need.part, need.info) is not None

    def is_of(self, models: Collection[str]) -> bool:
        """Whether it is a set of any of ``models`` (with or without info), or of a whole that they are parts of.

        Of no models every set is.
        """
        return not models or any(
            name in (file.model, file.stem) or name.startswith(f"{file.model}.")
            for file in self.files
            for name in models
        )

    def models(self, part: Part | None = None) -> tuple[str, ...]:
        """Names of the models that have a file (of ``part``), sorted."""
        return tuple(sorted({file.model for file in self.files if part in (None, file.part)}))

    @cached_property
    def weighed_models(self) -> frozenset[str]:
        """Models of which a committed set has more than the optimizer; sets of others are saved by themselves."""
        files = () if self.manifest is None else self.manifest.files
        return frozenset(file.model for file in files if file.part != "optim")

    @cached_property
    def is_refused(self) -> bool:
        """Whether its manifest tells of values that a resume refuses."""
        return self.manifest is not None and bool(refused_by_resume(self.manifest))

    def infos(self, model: str) -> tuple[str, ...]:
        """Variants of the weights of ``model``, sorted; the plain weights are not among them."""
        return tuple(
            sorted(file.info for file in self.files if file.model == model and file.info and file.part == "model")
        )

    def file_digest(self, file: CheckpointFile) -> str | None:
        """The digest of the whole file that the manifest vouches for, as ``xxh3_128:...``; None in a legacy set."""
        head = self.head_of(file)
        return None if head is None else head.digest

    def head_of(self, file: CheckpointFile) -> ManifestFile | None:
        """What the manifest says of the file; None in a legacy set."""
        files = () if self.manifest is None else self.manifest.files
        return next((entry for entry in files if entry.name == file.name), None)

    def digests_of(self, file: CheckpointFile) -> Digests | None:
        """What was recorded of the file, for ``open_checkpoint``; None in a legacy set.

        Raises ``CheckpointCorruptError`` if the digests of its tensors are gone, or not as they were written.
        """
        head = self.head_of(file)
        return None if head is None else Digests(head.digest, head.size, head.records, self._recorded(file).tensors)

    def buffers_of(self, file: CheckpointFile) -> tuple[str, ...] | None:
        """Names of its tensors that are no parameters; None where nobody recorded them. Raises as ``digests_of``."""
        return None if self.head_of(file) is None else self._recorded(file).buffers

    def _recorded(self, file: CheckpointFile) -> FileDigests:
        return self._digests.get(file.name) or FileDigests(tensors={})

    @cached_property
    def _digests(self) -> Mapping[str, FileDigests]:
        # they are large, and needed only where files are verified
        return {} if self.manifest is None else read_digests(self.folder, self.manifest, self.storage)


@attrs.frozen
class SetFolder:
    """A folder below ``sets``, and what its name says. Only a manifest in it makes it a set.

    There may be thousands, of which few are looked at: path and iteration are made when they are asked for.
    """

    parent: Path
    name: str
    sequence: int
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, parent: Path, name: str) -> SetFolder | None:
        """What the name says; None if it is not that of a set."""
        matched = _SET_NAME.fullmatch(name)
        if matched is None:
            return None
        sequence, *numbers = map(int, matched.groups())
        return cls(parent, name, sequence, tuple(numbers))

    @cached_property
    def path(self) -> Path:
        """The folder."""
        return self.parent / self.name

    @cached_property
    def manifest_path(self) -> Path:
        """Where its manifest is, if it has one."""
        return self.path / MANIFEST_NAME

    @cached_property
    def iteration(self) -> TrainingIteration:
        """The iteration of the set, all three fields said."""
        return TrainingIteration(*self.numbers)

    def is_committed(self, storage: FileSystem = LOCAL) -> bool:
        """Whether it has a manifest, be it a damaged one. Raises ``CheckpointNotFoundError`` if that cannot be told."""
        with reaching(self.manifest_path):
            return storage.exists(self.manifest_path)


def set_folders(
    checkpoints: Path, storage: FileSystem = LOCAL, known: Mapping[str, SetFolder] | None = None
) -> list[SetFolder]:
    """Folders of sets in the order of their sequence, of one sequence in that of their iteration.

    One listing: whether a name is a folder, and a committed set, is known when its manifest is read. ``known``: folders
    by name, as an earlier listing found them.

    Raises ``CheckpointNotFoundError`` if ``sets`` cannot be reached, which is not the same as that there are none.
    """
    parent, known = checkpoints / SETS_FOLDER, known or {}
    names = list_names(parent, storage)
    if not names:
        check_reachable(parent, storage)
    found = (known.get(name) or SetFolder.of(parent, name) for name in names)
    # two of one sequence: writers that did not see each other, or a folder copied back; further training came later
    return sorted(filter(None, found), key=lambda folder: (folder.sequence, folder.numbers, folder.name))


def load_set(folder: SetFolder, storage: FileSystem = LOCAL) -> CheckpointSet:
    """Read a committed set's manifest.

    Raises ``CheckpointCorruptError`` if the manifest is not that of this folder, ``CheckpointFormatError`` if another
    release wrote it. The files are not looked at.
    """
    manifest = read_manifest(folder.manifest_path, storage)
    if manifest.folder_name != folder.name:
        raise CheckpointCorruptError(
            f"{folder.manifest_path} is the manifest of set {manifest.sequence}, {manifest.training_iteration}; "
            "the folder has another name",
            path=folder.path,
        )
    return CheckpointSet(
        folder=folder.path,
        name=folder.name.partition("_")[2],
        tags=manifest.tags,
        iteration=folder.iteration,
        sequence=folder.sequence,
        committed=True,
        run_id=manifest.run_id,
        stage_name=manifest.stage_name,
        manifest=manifest,
        storage=storage,
    )


def check_files(checkpoint_set: CheckpointSet, storage: FileSystem = LOCAL) -> None:
    """Check that every file of a committed set lies in its folder, with the size that was written.

    Raises ``CheckpointCorruptError`` naming the first that does not.
    """
    manifest, folder = checkpoint_set.manifest, checkpoint_set.folder
    if manifest is None:
        return
    for name, expected in [*((one.name, one.size) for one in manifest.files), (DIGESTS_NAME, manifest.digests_size)]:
        path = folder / name
        with reaching(path):
            itself = storage.identity_of(path)
            size = storage.size_of(path) if itself is None else itself[0]
            is_link = itself is None and storage.is_link(path)
            leads_out = is_link and storage.resolve(path).parent != storage.resolve(folder)
        if leads_out:
            raise CheckpointCorruptError(f"{path} leads out of its folder, to {storage.resolve(path)}", path=path)
        if size != expected:
            state = "is missing or no regular file" if size is None else f"has {size} bytes"
            raise CheckpointCorruptError(f"{path} {state}; {expected} bytes were written", path=path)


def check_consistency(
    found: Mapping[str, tuple[TrainingIteration | None, str | None]], checkpoint_set: CheckpointSet
) -> None:
    """Check that files of one set say one iteration and one run, that of the set where it is known.

    Args:
        found: What the header of each file says: file name -> (iteration, run id); None where it does not say.
        checkpoint_set: The set that the files were taken from.

    Raises ``TornSetError`` naming every file and what it says.
    """
    iterations = {iteration for iteration, _ in found.values() if iteration is not None}
    runs = {run_id for _, run_id in found.values() if run_id is not None}
    if checkpoint_set.iteration is not None:
        iterations.add(checkpoint_set.iteration)
    if checkpoint_set.run_id is not None:
        runs.add(checkpoint_set.run_id)
    if len(iterations) <= 1 and len(runs) <= 1:
        return
    says = {
        name: " of ".join(
            filter(None, (str(iteration) if iteration else "", f"run {run_id}" if run_id is not None else ""))
        )
        or "nothing"
        for name, (iteration, run_id) in sorted(found.items())
    }
    own = f" (the set is {checkpoint_set.iteration})" if checkpoint_set.iteration is not None else ""
    different = "iterations" if len(iterations) > 1 else "runs"
    raise TornSetError(
        f'"{checkpoint_set.name}"{own} mixes files of different {different}: '
        + "; ".join(f"{name}: {text}" for name, text in says.items())
        + ". A save was probably cut short. Next: take another set",
        path=checkpoint_set.folder,
        found=says,
    )


def said_by(metadata: Mapping[str, Any], path: Path) -> tuple[TrainingIteration | None, str | None]:
    """The iteration and the run id that a file says it is of; None where it says nothing.

    Raises ``CheckpointFormatError`` for an iteration that is none.
    """
    iteration, run_id = metadata.get("training_iteration"), metadata.get("run_id")
    if iteration is not None:
        try:
            iteration = TrainingIteration.from_mapping(iteration)
        except (ConfigError, TypeError, AttributeError) as error:
            raise CheckpointFormatError(
                f"{path}: training_iteration is {iteration!r}, which is no iteration: {error}", path=path
            ) from error
    return iteration, run_id if isinstance(run_id, str) else None


def check_reachable(folder: Path, storage: FileSystem) -> None:
    """Tell a folder that does not exist yet from one that is out of reach, such as behind a disk that is not mounted.

    Raises ``CheckpointNotFoundError`` if the folder, or the nearest thing above it that exists, is a link that leads
    nowhere, or no folder.
    """
    for place in (folder, *folder.parents):
        with reaching(place):
            if storage.is_folder(place):
                return
            is_link, is_there = storage.is_link(place), storage.exists(place)
        if is_link:
            raise CheckpointNotFoundError(
                f"{place} is a link to {storage.resolve(place)}, which is no folder that can be reached: whether there "
                "are checkpoints cannot be told. Next: mount the disk that it is on, or remove the link",
                path=place,
            )
        if is_there:
            raise CheckpointNotFoundError(f"{place} is no folder. Next: move what is there out of the way", path=place)


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Name the path of a look that failed: nothing is known of what is there, and nothing may follow from it.

    Raises ``CheckpointNotFoundError`` for every ``OSError``.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointNotFoundError(
            f"{path} cannot be reached: {error.strerror or error}. What is there cannot be told, so nothing was chosen "
            "or changed. Next: mount the disk that it is on, or change its permissions",
            path=path,
        ) from error


def lies_in_a_run(path: Path) -> bool:
    """Whether a file would lie where the sets of a run are; a folder that is only named checkpoints is anybody's."""
    return any(one.name == "checkpoints" and (one / SETS_FOLDER).is_dir() for one in path.resolve().parents)


def list_names(folder: Path, storage: FileSystem) -> list[str]:
    """Names in the folder, sorted; none where there is no such folder."""
    with reaching(folder):
        try:
            return sorted(storage.list_folder(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []


def sorted_files(files: Sequence[CheckpointFile]) -> tuple[CheckpointFile, ...]:
    """The files by model, info, part."""
    return tuple(sorted(files, key=lambda file: (file.model, file.info or "", file.part)))
