"""CheckpointSet: the files of one training iteration, and how a committed set is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointUnreachableError,
    ConfigError,
    TornSetError,
)
from noether_init_core.files.checkpoint import Digests
from noether_init_core.files.storage.disk import LOCAL, FileSystem, reaching
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
# Numbers of the iteration have no leading zeros, so each iteration has exactly one name.
_SET_NAME = re.compile(r"(\d{8,18})_E(0|[1-9]\d{0,17})_U(0|[1-9]\d{0,17})_S(0|[1-9]\d{0,17})", re.ASCII)


@attrs.frozen
class CheckpointFile:
    """One file of a set. ``model`` is the name (for a submodel the path of names) in the name of the file.

    ``identity`` is the size and modification time of a flat file when it was listed, since no manifest records it.
    """

    folder: Path
    name: str
    model: str
    info: str | None
    part: Part
    identity: tuple[int, int] | None = attrs.field(default=None, eq=False)

    @cached_property
    def path(self) -> Path:
        """The path of the file."""
        return self.folder / self.name

    @property
    def stem(self) -> str:
        """Model and info in the form of a file name."""
        return stem_of(self.model, self.info)


@attrs.frozen
class Need:
    """A file that the caller needs; ``model`` None: the file of the only model that has one."""

    model: str | None
    part: Part
    info: str | None = None


@attrs.frozen
class CheckpointSet:
    """Weights, optimizer and trainer state that belong together.

    Attributes:
        folder: The folder of the files.
        name: The tag in the names of the files; for a committed set the tag of its iteration.
        tags: Every tag that it was saved under.
        iteration: None if only the files record it (a legacy tag such as ``latest``); see ``Snapshot.iteration_of``.
        sequence: The position in the order of commits, from 1; None for a legacy set.
        committed: Whether it has a manifest.
        flat_files: The files of a legacy set, in the order of ``files``; empty for a committed set.
        run_id: The run that wrote it; None if only the files record it.
        stage_name: The stage that wrote it.
        manifest: None for a legacy set.
        storage: The file operations that read the digests of tensors.
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
        """The files, sorted by model, info, part."""
        if self.manifest is None:
            return self.flat_files
        entries = self.manifest.files
        return sorted_files([CheckpointFile(self.folder, one.name, one.model, one.info, one.part) for one in entries])

    def file(self, model: str | None, part: Part, info: str | None = None) -> CheckpointFile | None:
        """Return the file of ``part`` of ``model``; None if it is not found.

        ``model`` None: the only file of this part and info; None also if there are several.
        """
        if model is not None:
            stem = stem_of(model, info)
            return next((file for file in self.files if file.part == part and file.stem == stem), None)
        found = [file for file in self.files if file.part == part and file.info == info]
        return found[0] if len(found) == 1 else None

    @cached_property
    def place(self) -> str:
        """A name that is unique among the sets of a run: the name of its folder; for flat files their tag."""
        return self.folder.name if self.committed else self.name

    def has(self, need: Need) -> bool:
        """Whether the set has this file."""
        return self.file(need.model, need.part, need.info) is not None

    def is_of(self, models: Collection[str]) -> bool:
        """Whether it has files of any of ``models`` (with or without info), or of a composite that contains one.

        True for empty ``models``.
        """
        return not models or any(
            name in (file.model, file.stem) or name.startswith(f"{file.model}.")
            for file in self.files
            for name in models
        )

    def models(self, part: Part | None = None) -> tuple[str, ...]:
        """Return the names of the models that have a file (of ``part``), sorted."""
        return tuple(sorted({file.model for file in self.files if part in (None, file.part)}))

    @cached_property
    def weighed_models(self) -> frozenset[str]:
        """Models of which a committed set has other files than optimizer state; retention counts by these."""
        files = () if self.manifest is None else self.manifest.files
        return frozenset(file.model for file in files if file.part != "optim")

    @cached_property
    def is_refused(self) -> bool:
        """Whether its manifest records values that a resume refuses."""
        return self.manifest is not None and bool(refused_by_resume(self.manifest))

    def infos(self, model: str) -> tuple[str, ...]:
        """Return the infos of further weights of ``model``, such as ``ema=0.999``, sorted."""
        return tuple(
            sorted(file.info for file in self.files if file.model == model and file.info and file.part == "model")
        )

    def file_digest(self, file: CheckpointFile) -> str | None:
        """Return the recorded digest of the complete file, ``xxh3_128:...``; None in a legacy set."""
        head = self.head_of(file)
        return None if head is None else head.digest

    def head_of(self, file: CheckpointFile) -> ManifestFile | None:
        """Return the entry of the file in the manifest; None in a legacy set."""
        files = () if self.manifest is None else self.manifest.files
        return next((entry for entry in files if entry.name == file.name), None)

    def digests_of(self, file: CheckpointFile) -> Digests | None:
        """Return the recorded digests of the file, for ``open_checkpoint``; None in a legacy set.

        Raises ``CheckpointCorruptError`` if the file with the digests of tensors is missing or damaged.
        """
        head = self.head_of(file)
        return None if head is None else Digests(head.digest, head.size, head.records, self._recorded(file).tensors)

    def buffers_of(self, file: CheckpointFile) -> tuple[str, ...] | None:
        """Return the names of tensors that are not parameters; None if not recorded. Raises as ``digests_of``."""
        return None if self.head_of(file) is None else self._recorded(file).buffers

    def _recorded(self, file: CheckpointFile) -> FileDigests:
        return self._digests.get(file.name) or FileDigests(tensors={})

    @cached_property
    def _digests(self) -> Mapping[str, FileDigests]:
        # Read lazily: the file is large, and only verification needs it.
        return {} if self.manifest is None else read_digests(self.folder, self.manifest, self.storage)


@attrs.frozen
class SetFolder:
    """A folder below ``sets``, with the fields of its name. It is a set only if it contains a manifest.

    A run may have thousands, and most are never read, so path and iteration are computed at the first access.
    """

    parent: Path
    name: str
    sequence: int
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, parent: Path, name: str) -> SetFolder | None:
        """Parse the name of a folder; None if it is not the name of a set."""
        matched = _SET_NAME.fullmatch(name)
        if matched is None:
            return None
        sequence, *numbers = map(int, matched.groups())
        return cls(parent, name, sequence, tuple(numbers))

    @cached_property
    def path(self) -> Path:
        """The path of the folder."""
        return self.parent / self.name

    @cached_property
    def manifest_path(self) -> Path:
        """The path of its manifest, which may not exist."""
        return self.path / MANIFEST_NAME

    @cached_property
    def iteration(self) -> TrainingIteration:
        """The iteration of the set, with all three fields."""
        return TrainingIteration(*self.numbers)

    def is_committed(self, storage: FileSystem = LOCAL) -> bool:
        """Whether a manifest exists, even a damaged one.

        Raises ``CheckpointUnreachableError`` if the disk fails, and if the name is a link that leads nowhere.
        """
        with reaching(self.manifest_path):
            if storage.exists(self.manifest_path):
                return True
        refuse_dangling(self.path, storage)
        return False


def set_folders(
    checkpoints: Path, storage: FileSystem = LOCAL, known: Mapping[str, SetFolder] | None = None
) -> list[SetFolder]:
    """Return the folders of sets, sorted by sequence, then iteration.

    It lists one folder and nothing else: reading a manifest later shows whether a name is a folder and a committed set.
    ``known``: folders by name from an earlier listing, which are reused.

    Raises ``CheckpointUnreachableError`` if ``sets`` cannot be read; a missing folder is an empty result.
    """
    parent, known = checkpoints / SETS_FOLDER, known or {}
    names = list_names(parent, storage)
    if not names:
        check_reachable(parent, storage)
    found = (known.get(name) or SetFolder.of(parent, name) for name in names)
    # Two folders can have one sequence, if writers on two machines did not see each other's lock, or if a folder was
    # copied back. Then the later iteration counts as newer.
    return sorted(filter(None, found), key=lambda folder: (folder.sequence, folder.numbers, folder.name))


def load_set(folder: SetFolder, storage: FileSystem = LOCAL) -> CheckpointSet:
    """Read the manifest of a committed set; its other files are not read.

    Raises ``CheckpointCorruptError`` if the manifest is damaged or of another folder, ``CheckpointFormatError`` if
    another release wrote it.
    """
    manifest = read_manifest(folder.manifest_path, storage)
    # The name decides the order of commits, so a folder that was renamed or copied by hand is refused.
    if manifest.folder_name != folder.name:
        raise CheckpointCorruptError(
            f"{folder.manifest_path} is the manifest of set {manifest.folder_name}, not of the folder that it is in. "
            f"Next: rename the folder to {manifest.folder_name} if it was renamed by hand",
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
    """Check that every file of a committed set is in its folder, with the recorded size.

    Raises ``CheckpointCorruptError``, which names the first file that is not.
    """
    manifest, folder = checkpoint_set.manifest, checkpoint_set.folder
    if manifest is None:
        return
    for name, expected in [*((one.name, one.size) for one in manifest.files), (DIGESTS_NAME, manifest.digests_size)]:
        path = folder / name
        with reaching(path):
            # One lstat suffices for a regular file. A link must lead to the same folder: a target elsewhere may belong
            # to another run, and change at any time.
            itself = storage.identity_of(path)
            size = storage.size_of(path) if itself is None else itself[0]
            is_link = itself is None and storage.is_link(path)
            leads_out = is_link and storage.resolve(path).parent != storage.resolve(folder)
        if leads_out:
            raise CheckpointCorruptError(f"{path} is a link out of its folder, to {storage.resolve(path)}", path=path)
        if size != expected:
            state = "is missing or not a regular file" if size is None else f"has {size} bytes"
            raise CheckpointCorruptError(f"{path} {state}; {expected} bytes were written", path=path)


def check_consistency(
    found: Mapping[str, tuple[TrainingIteration | None, str | None]], checkpoint_set: CheckpointSet
) -> None:
    """Check that all files of a set record one iteration and one run, and those of the set if they are known.

    Args:
        found: File name -> (iteration, run id) from the header of the file; None for a value that is not recorded.
        checkpoint_set: The set that the files belong to.

    Raises ``TornSetError``, which lists every file with its iteration and run.
    """
    iterations = {iteration for iteration, _ in found.values() if iteration is not None}
    runs = {run_id for _, run_id in found.values() if run_id is not None}
    if checkpoint_set.iteration is not None:
        iterations.add(checkpoint_set.iteration)
    if checkpoint_set.run_id is not None:
        runs.add(checkpoint_set.run_id)
    if len(iterations) <= 1 and len(runs) <= 1:
        return
    recorded = {
        name: " of ".join(
            filter(None, (str(iteration) if iteration else "", f"run {run_id}" if run_id is not None else ""))
        )
        or "nothing recorded"
        for name, (iteration, run_id) in sorted(found.items())
    }
    own = f" (the set is {checkpoint_set.iteration})" if checkpoint_set.iteration is not None else ""
    different = "iterations" if len(iterations) > 1 else "runs"
    raise TornSetError(
        f'"{checkpoint_set.name}"{own} mixes files of different {different}: '
        + "; ".join(f"{name}: {text}" for name, text in recorded.items())
        + ". A save was probably interrupted. Next: take another set",
        path=checkpoint_set.folder,
        found=recorded,
    )


def recorded_in(metadata: Mapping[str, Any], path: Path) -> tuple[TrainingIteration | None, str | None]:
    """Return the iteration and the run id in the metadata of a file; None for a value that is not recorded.

    Raises ``CheckpointFormatError`` for an invalid iteration.
    """
    iteration, run_id = metadata.get("training_iteration"), metadata.get("run_id")
    if iteration is not None:
        try:
            iteration = TrainingIteration.from_mapping(iteration)
        except (ConfigError, TypeError, AttributeError) as error:
            raise CheckpointFormatError(
                f"{path}: training_iteration is {iteration!r}, not an iteration: {error}", path=path
            ) from error
    return iteration, run_id if isinstance(run_id, str) else None


def check_reachable(folder: Path, storage: FileSystem) -> None:
    """Accept a folder that does not exist yet; refuse one that is unreachable, such as on a disk that is not mounted.

    Raises ``CheckpointUnreachableError`` if the folder, or the nearest existing parent, is a dangling link, not a
    folder, or cannot be read.
    """
    for place in (folder, *folder.parents):
        with reaching(place):
            if storage.is_folder(place):
                return
            is_link, is_there = storage.is_link(place), storage.exists(place)
        if is_link:
            raise CheckpointUnreachableError(
                f"{place} is a link to {storage.resolve(place)}, which is not a reachable folder, so it is unknown "
                "whether there are checkpoints. Next: mount its disk, or remove the link",
                path=place,
            )
        if is_there:
            raise CheckpointUnreachableError(f"{place} is not a folder. Next: move this file away", path=place)


def refuse_dangling(path: Path, storage: FileSystem) -> None:
    """Raise ``CheckpointUnreachableError`` for a link that leads nowhere, as on a disk that is not mounted.

    Its set may be the newest one, so it is not passed over as absent.
    """
    with reaching(path):
        is_dangling = storage.is_link(path) and not storage.leads_somewhere(path)
        target = storage.resolve(path) if is_dangling else path
    if is_dangling:
        raise CheckpointUnreachableError(
            f"{path} is a link to {target}, which does not exist, so it is unknown what is there. "
            "Next: mount its disk, or remove the link",
            path=path,
        )


def lies_in_a_run(path: Path) -> bool:
    """Whether a path is in the folder of checkpoints of a run; a folder ``checkpoints`` without ``sets`` does not
    count."""
    with reaching(path):
        parents = LOCAL.resolve(path).parents
        return any(one.name == "checkpoints" and LOCAL.is_folder(one / SETS_FOLDER) for one in parents)


def list_names(folder: Path, storage: FileSystem) -> list[str]:
    """Return the names in the folder, sorted; empty if the folder does not exist."""
    with reaching(folder):
        try:
            return sorted(storage.list_folder(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []


def sorted_files(files: Sequence[CheckpointFile]) -> tuple[CheckpointFile, ...]:
    """Return the files sorted by model, info, part."""
    return tuple(sorted(files, key=lambda file: (file.model, file.info or "", file.part)))
