"""A model of a disk and a storage that records what a save does to it, for crashes of the whole machine.

What the model promises a program is what POSIX promises, and no more:

- The bytes of a file are on the disk once the file has been fsynced. Later ones may be missing, half there, or zeros.
- A name (created, renamed, linked, removed) is on the disk once its folder has been fsynced. Until then each may be
  there or not, in any combination. A rename is there as a whole or not at all.

Folders and files are numbered as a file system numbers them, so that two names of one file stay one file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import attrs

from noether_init_core.files.storage.disk import FileSystem

__all__ = ["CHANGING", "LOOKING", "Crash", "Disk", "Operation", "Quick", "Recorder", "crashes"]

Data = Literal["all", "fsynced", "half", "zeros"]
_DATA: tuple[Data, ...] = ("all", "fsynced", "half", "zeros")

#: Methods of ``FileSystem`` that change nothing, and those that do. A new method has to be put into one of them.
LOOKING = frozenset(
    {
        "list_folder", "is_folder", "is_file", "leads_somewhere", "size_of", "exists", "is_link", "identity_of",
        "changed_in", "resolve", "is_same_file", "read_bytes",
    }
)  # fmt: skip
CHANGING = frozenset(
    {
        "make_folder", "open_write", "fsync", "fsync_folder", "make_read_only", "rename", "rename_new", "unlink",
        "remove_folder", "reflink", "hardlink", "copy", "lock",
    }
)  # fmt: skip


@attrs.frozen
class Operation:
    """One change.

    Attributes:
        kind: ``names`` changes entries of folders, ``write`` bytes of a file; ``fsync`` and ``fsync_folder`` change
            nothing but what is safe.
        node: The file or folder.
        names: For each entry the folder, the name, and what it leads to from now on.
        offset: Where ``data`` is written.
        data: The bytes.
    """

    kind: Literal["names", "write", "fsync", "fsync_folder"]
    node: int = -1
    names: tuple[tuple[int, str, int | None], ...] = ()
    offset: int = 0
    data: bytes = b""


class Disk:
    """Folders and files by number; the folder given is number 0."""

    def __init__(self) -> None:
        self.entries: dict[int, dict[str, int]] = {0: {}}
        self.contents: dict[int, bytearray] = {}

    @classmethod
    def of(cls, root: Path) -> Disk:
        """What is below a real folder; links stay links, the file of the lock is left out."""
        disk, known = cls(), dict[tuple[int, int], int]()

        def visit(folder: Path, number: int) -> None:
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if entry.name.endswith(".lock"):
                    continue
                if entry.is_dir():
                    disk.entries[number][entry.name] = child = disk.number()
                    disk.entries[child] = {}
                    visit(Path(entry.path), child)
                    continue
                status = entry.stat()
                key = status.st_dev, status.st_ino
                if key not in known:
                    known[key] = disk.number()
                    disk.contents[known[key]] = bytearray(Path(entry.path).read_bytes())
                disk.entries[number][entry.name] = known[key]

        visit(root, 0)
        return disk

    def number(self) -> int:
        """A number that is not used yet."""
        return 1 + max(itertools.chain(self.entries, self.contents), default=0)

    def copy(self) -> Disk:
        """Another disk with the same on it."""
        other = Disk()
        other.entries = {number: dict(names) for number, names in self.entries.items()}
        other.contents = {number: bytearray(data) for number, data in self.contents.items()}
        return other

    def carry_out(self, operation: Operation) -> None:
        """Change what is on the disk."""
        for folder, name, node in operation.names:
            if node is None:
                self.entries[folder].pop(name, None)
            else:
                self.entries[folder][name] = node
        if operation.kind == "write":
            content = self.contents[operation.node]
            content.extend(bytes(max(0, operation.offset - len(content))))
            content[operation.offset : operation.offset + len(operation.data)] = operation.data

    def tree(self) -> dict[str, Any]:
        """Path -> number of the file, for every file that a name leads to; folders have ``None``."""
        found: dict[str, Any] = {}

        def visit(number: int, path: str) -> None:
            for name, node in sorted(self.entries[number].items()):
                found[path + name] = node if node in self.contents else None
                if node in self.entries:
                    visit(node, f"{path}{name}/")

        visit(0, "")
        return found

    def signature(self) -> str:
        """Equal for disks on which a program finds the same."""
        hasher, seen = hashlib.blake2b(), dict[int, int]()
        for path, node in self.tree().items():
            hasher.update(path.encode() + b"\0")
            if node is not None:
                hasher.update(seen.setdefault(node, len(seen)).to_bytes(4))
                hasher.update(hashlib.blake2b(self.contents[node]).digest())
        return hasher.hexdigest()

    def write(self, root: Path) -> None:
        """Make it real, in an empty folder."""
        written: dict[int, Path] = {}
        for path, node in self.tree().items():
            target = root / path
            if node is None:
                target.mkdir()
            elif node in written:
                os.link(written[node], target)
            else:
                target.write_bytes(self.contents[node])
                written[node] = target


class _File:
    """A file that is being written; everything else than ``write`` is that of the real one."""

    def __init__(self, file: BinaryIO, written: Callable[[int, bytes], None]) -> None:
        self._file = file
        self._written = written

    def write(self, data: Any) -> int:
        offset = self._file.tell()
        count = self._file.write(data)
        self._written(offset, bytes(memoryview(data).cast("B")[:count]))
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Quick(FileSystem):
    """Does not wait for the disk: what has reached it is a question for the model. Links as for an ordinary user."""

    def fsync(self, file: BinaryIO) -> None:
        file.flush()

    def fsync_folder(self, folder: Path) -> None:
        pass

    def hardlink(self, source: Path, target: Path) -> bool:
        os.link(source, target)
        return True


class Recorder(Quick):
    """Does everything below ``root`` as it should be done, and writes it down."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.before = Disk.of(self.root)
        self.now = self.before.copy()
        self.operations: list[Operation] = []
        self._files: dict[int, int] = {}

    def _add(self, operation: Operation) -> None:
        self.operations.append(operation)
        self.now.carry_out(operation)

    def _node(self, path: Path) -> int:
        number = 0
        for name in path.relative_to(self.root).parts:
            number = self.now.entries[number][name]
        return number

    def _name(self, path: Path, node: int | None, *more: tuple[Path, int | None]) -> None:
        changes = [(path, node), *more]
        self._add(Operation("names", names=tuple((self._node(one.parent), one.name, to) for one, to in changes)))

    def _new_file(self, path: Path) -> int:
        node = self.now.number()
        self.now.contents[node] = bytearray()
        self._name(path, node)
        return node

    def make_folder(self, folder: Path) -> None:
        super().make_folder(folder)
        node = self.now.number()
        self.now.entries[node] = {}
        self._name(folder, node)

    def open_write(self, path: Path) -> BinaryIO:
        file = super().open_write(path)
        node = self._new_file(path)
        self._files[file.fileno()] = node
        return cast(BinaryIO, _File(file, lambda at, data: self._add(Operation("write", node, offset=at, data=data))))

    def fsync(self, file: BinaryIO) -> None:
        super().fsync(file)
        self._add(Operation("fsync", self._files[file.fileno()]))

    def fsync_folder(self, folder: Path) -> None:
        super().fsync_folder(folder)
        self._add(Operation("fsync_folder", self._node(folder)))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        node = self._node(source)
        # two names of one file: the system does nothing at all
        if self.now.entries[self._node(target.parent)].get(target.name) != node:
            self._name(source, None, (target, node))

    def rename_new(self, source: Path, target: Path) -> bool:
        if self.exists(target):
            return False
        self.rename(source, target)
        return True

    def unlink(self, path: Path) -> None:
        was_there = self.exists(path)
        super().unlink(path)
        if was_there:
            self._name(path, None)

    def remove_folder(self, folder: Path) -> None:
        super().remove_folder(folder)
        self._name(folder, None)

    def reflink(self, source: Path, target: Path) -> bool:
        """Never: a copy is the harder case, its bytes are not safe."""
        return False

    def hardlink(self, source: Path, target: Path) -> bool:
        done = super().hardlink(source, target)
        if done:
            self._name(target, self._node(source))
        return done

    def copy(self, source: Path, target: Path) -> None:
        super().copy(source, target)
        node = self._new_file(target)
        self._add(Operation("write", node, data=bytes(self.now.contents[self._node(source)])))


@attrs.frozen(eq=False)
class Crash:
    """What may be on the disk after a crash.

    ``done``: how many operations the program had made. ``killed``: whether the program was killed and the machine
    went on, so that all of them are there.
    """

    done: int
    killed: bool
    disk: Disk


def crashes(recorder: Recorder, chance: random.Random, *, most: int = 8) -> Iterator[Crash]:
    """After every operation, what may be on the disk: all combinations of names in the air where these are few.

    With more than five of them: all, none, every beginning, and by chance ``most`` combinations, as many with one left
    out and as many with one alone. Bytes in the air: all, none, half, zeros, and by chance for each file. No disk comes
    twice.
    """
    seen = set[tuple[bool, str]]()
    for done in range(len(recorder.operations) + 1):
        operations = recorder.operations[:done]
        names, files = waiting(operations), volatile(recorder.before, operations)
        everything = frozenset(names)
        for kept, how in _combinations(names, files, chance, most):
            disk = _after(recorder, operations, everything - kept, how)
            killed = kept == everything and not how
            # whether the save was acknowledged is another question, though the disk is the same
            key = done == len(recorder.operations), disk.signature()
            if key not in seen or killed:
                seen.add(key)
                yield Crash(done, killed, disk)


def _combinations(
    waiting: Sequence[int], volatile: Sequence[int], chance: random.Random, most: int
) -> Iterator[tuple[frozenset[int], Mapping[int, Data]]]:
    """Which names are there, and which bytes are not all there."""

    def by_chance() -> dict[int, Data]:
        return {node: chance.choice(_DATA) for node in volatile}

    data: list[Mapping[int, Data]] = [{}]
    if volatile:
        data += [dict.fromkeys(volatile, how) for how in _DATA[1:]]
    if len(volatile) > 1:
        data += [by_chance(), by_chance()]
    if len(waiting) <= 5:
        names = [
            frozenset(chosen)
            for size in range(len(waiting), -1, -1)
            for chosen in itertools.combinations(waiting, size)
        ]
        yield from itertools.product(names, data)
        return
    everything = frozenset(waiting)
    yield from itertools.product((everything, frozenset()), data)
    some = [frozenset(waiting[:size]) for size in range(len(waiting))]
    some += [everything - {number} for number in chance.sample(waiting, min(most, len(waiting)))]
    some += [frozenset({number}) for number in chance.sample(waiting, min(most, len(waiting)))]
    some += [frozenset(number for number in waiting if chance.random() < 0.5) for _ in range(most)]
    yield from ((names, by_chance()) for names in some)


def waiting(operations: Sequence[Operation]) -> list[int]:
    """The changes of names whose folders were not fsynced afterwards."""
    safe = set[int]()
    found = []
    for number in range(len(operations) - 1, -1, -1):
        operation = operations[number]
        if operation.kind == "fsync_folder":
            safe.add(operation.node)
        elif operation.kind == "names" and not {folder for folder, _, _ in operation.names} <= safe:
            found.append(number)
    return found[::-1]


def volatile(before: Disk, operations: Sequence[Operation]) -> list[int]:
    """The files that were written after their last fsync."""
    found = dict[int, None]()
    for operation in operations:
        if operation.kind == "write" and operation.data:
            found[operation.node] = None
        elif operation.kind == "fsync":
            found.pop(operation.node, None)
    return list(found)


def _after(
    recorder: Recorder, operations: Sequence[Operation], dropped: frozenset[int], how: Mapping[int, Data]
) -> Disk:
    disk = recorder.before.copy()
    for node in recorder.now.entries:
        disk.entries.setdefault(node, {})
    for node in recorder.now.contents:
        disk.contents.setdefault(node, bytearray())
    safe = {node: bytes(content) for node, content in disk.contents.items()}
    for number, operation in enumerate(operations):
        if number not in dropped:
            disk.carry_out(operation)
        if operation.kind == "fsync":
            safe[operation.node] = bytes(disk.contents[operation.node])
    for node, choice in how.items():
        full, held = disk.contents[node], safe[node]
        if choice == "zeros":
            disk.contents[node] = bytearray(held) + bytes(max(0, len(full) - len(held)))
        elif choice == "half":
            disk.contents[node] = full[: len(held) + (len(full) - len(held)) // 2]
        elif choice == "fsynced":
            disk.contents[node] = bytearray(held)
    return disk
