"""The flat files beside committed sets: how many there are, and whether our copies are still those of their sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from noether_init_core.errors import CheckpointError
from noether_init_core.files.storage.local import open_file
from noether_init_core.sets.checkpoint_set import CheckpointSet, list_names, load_set, set_folders
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.flat_copies import changed_names, flat_copies
from noether_init_core.sets.store import RunStore

__all__ = ["AuditedFlat", "audit_flat", "flat_bytes"]


@attrs.frozen
class AuditedFlat:
    """Flat files beside committed sets: copies for Noether, which no reader of ours takes.

    Attributes:
        files: How many there are.
        compared: How many of them were compared with the digests of the set that they are copies of.
        problems: What is wrong with those.
        changed: Names that a save of ours wrote and that are other files by now: another program's, or damaged.
    """

    files: int = 0
    compared: int = 0
    problems: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


def audit_flat(store: RunStore, *, compare: bool, progress: Callable[[int], None] | None = None) -> AuditedFlat:
    """Count the flat files; with ``compare``, read those that the record of our saves calls ours.

    A name that is another name of a committed file has been verified with its set. One that another program has
    written, or has rewritten since, is nothing that we could vouch for.
    """
    names = _names(store)
    if not compare:
        return AuditedFlat(len(names))
    compared, problems = 0, []
    for path, size, target in _copies(store):
        found, name = target
        file = next((file for file in found.files if file.path.name == name), None)
        digest = None if file is None else found.digest_of(file)
        if file is None or digest is None:
            continue
        compared += 1
        if store.storage.is_same_file(path, file.path):
            continue
        try:
            handle = open_file(path)
            try:
                handle.check_digest(digest)
            finally:
                handle.close()
        except (CheckpointError, OSError):
            problems.append(
                f"{path} is damaged: it is a copy of {file.path.name} of {found.folder.name} for Noether, and has "
                "other bytes. No reader of ours takes it. Next: remove it, or copy the file of the set there"
            )
        if progress is not None:
            progress(size)
    return AuditedFlat(len(names), compared, tuple(problems), changed_names(store.folder, store.storage))


def flat_bytes(store: RunStore) -> int:
    """How many bytes ``audit_flat(compare=True)`` may report to its progress."""
    return sum(size for _path, size, _target in _copies(store))


def _names(store: RunStore) -> list[str]:
    return [name for name in list_names(store.folder, store.storage) if parse(name) is not None]


def _copies(store: RunStore) -> Iterator[tuple[Path, int, tuple[CheckpointSet, str]]]:
    """Each copy that is ours and whose set can be read, with the set and the file's name there."""
    copies = flat_copies(store.folder, store.storage)
    for folder in set_folders(store.folder, store.storage):
        names = sorted(name for name, of in copies.items() if of == folder.path.name)
        if not names or not folder.is_committed(store.storage):
            continue
        try:
            found = load_set(folder, store.storage)
        except CheckpointError:
            continue  # that the set is broken is said of the set
        for name in names:
            parsed = parse(name)
            if parsed is not None:
                own = str(attrs.evolve(parsed, tag=str(folder.iteration)))
                yield store.folder / name, store.storage.size_of(store.folder / name) or 0, (found, own)
