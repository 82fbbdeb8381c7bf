"""Saves that end at every possible point: the machine goes down, or an operation fails.

After each of them a program that starts again has to find a whole set, never an older one than the last that was
acknowledged, and the next save has to work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import attrs

from faults.campaign.disk import CHANGING, LOOKING, Disk, Quick, Recorder, crashes
from faults.campaign.saves import Numbered, found_by_us, is_torn_for_noether
from faults.campaign.subjects import digest_of
from noether_init_core import PathProvider
from noether_init_core.errors import CheckpointWriteError
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.sets.snapshot import Snapshot

__all__ = ["ERRORS", "SCENARIOS", "Failing", "Scenario", "failures", "replay"]

WIDTH = 4
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


@attrs.frozen
class Scenario:
    """What is there before a save, and how the save is called."""

    sets_before: int
    arguments: Mapping[str, Any] = attrs.Factory(dict)
    leftover: bool = False
    same_iteration: bool = False

    def prepare(self, root: Path) -> Numbered:
        """The folder as it is before the save."""
        root.mkdir(parents=True)
        numbered = Numbered(WIDTH)
        for number in range(1, self.sets_before + 1):
            numbered.save(root, number, **{**self.arguments, "keep_last": None, "storage": Quick()})
        if self.leftover:
            folder = root / "run" / "checkpoints" / "sets" / f"{self.sets_before + 1:08d}_E7_U7_S7"
            folder.mkdir()
            (folder / "mlp_cp=E7_U7_S7_model.th").write_bytes(b"half")
            (folder / "manifest.json.tmp").write_bytes(b"{")
        return numbered

    def save(self, numbered: Numbered, root: Path, number: int, storage: FileSystem) -> None:
        """The save that does not come to its end."""
        at = self.sets_before if self.same_iteration else None
        numbered.save(root, number, storage=storage, iteration=at, **self.arguments)


SCENARIOS: Mapping[str, Scenario] = {
    "first save": Scenario(0),
    "third save": Scenario(2),
    "with retention": Scenario(4, {"keep_last": 2}),
    "same iteration again": Scenario(2, same_iteration=True),
    "after a kill": Scenario(2, leftover=True),
    "best tag and average": Scenario(3, {"keep_last": 1, "tags": ("latest", "best_model.loss.val"), "averages": True}),
}


def replay(
    scenario: Scenario,
    root: Path,
    *,
    start: int = 0,
    every: int = 1,
    storage: type[Recorder] = Recorder,
    acknowledged_only: bool = False,
) -> Iterator[Counter[str]]:
    """Record one save, then start again from everything that a crash in it may leave on the disk.

    One counter for each disk, from number ``start`` on; ``every`` takes each n-th only. ``acknowledged_only``: crashes
    after the save has returned.
    """
    numbered = scenario.prepare(root / "recorded")
    recorder = storage(root / "recorded")
    number = scenario.sets_before + 1
    scenario.save(numbered, root / "recorded", number, recorder)
    if recorder.now.signature() != Disk.of(recorder.root).signature():
        raise AssertionError("the recording lacks a change: something happened on disk outside of the storage")
    acknowledged_at = len(recorder.operations)
    for index, crash in enumerate(crashes(recorder, random.Random(0))):
        if index < start or index % every or (acknowledged_only and crash.done < acknowledged_at):
            continue
        folder = root / "replayed"
        folder.mkdir()
        crash.disk.write(folder)
        acknowledged = number if crash.done == acknowledged_at else scenario.sets_before
        counted = Counter(tried=1, **{"process killed": int(crash.killed), "machine crashed": int(not crash.killed)})
        counted["operations"] = int(index == 0) * acknowledged_at
        _look(folder, counted, acknowledged, number)
        torn = "torn for Noether" if crash.killed else "torn for Noether after a crash of the machine"
        counted[torn] += is_torn_for_noether(folder)
        _save_again(numbered, folder, number + 1, counted)
        shutil.rmtree(folder)
        yield counted


def _look(root: Path, counted: Counter[str], acknowledged: int, newest: int) -> int | None:
    found = found_by_us(root, WIDTH)
    counted[found.problem or "good"] += 1
    if not found.problem:
        counted["lost"] += (found.number or 0) < acknowledged
        counted["from the future"] += (found.number or 0) > newest
    return found.number


def _save_again(numbered: Numbered, root: Path, number: int, counted: Counter[str]) -> None:
    """The next save has to succeed and to be found."""
    numbered.save(root, number, keep_last=2, storage=Quick())
    snapshot = Snapshot(PathProvider(root, "run"))
    found = found_by_us(root, WIDTH)
    counted["next save not found"] += found.number != number or bool(snapshot.broken()) or bool(snapshot.uncommitted())


class Failing(Quick):
    """Fails at the call with the given number, and with ``lasting`` at every later one that changes something."""

    def __init__(self, at: int, code: int, *, lasting: bool) -> None:
        self.at, self.code, self.lasting, self.calls = at, code, lasting, 0

    def step(self, path: Path | None, *, changes: bool = True) -> None:
        """Count one call; fail if it is its turn."""
        self.calls += 1
        if self.calls == self.at or (self.lasting and changes and self.at and self.calls > self.at):
            raise OSError(self.code, os.strerror(self.code), *([str(path)] if path else []))

    def open_write(self, path: Path) -> BinaryIO:
        self.step(path)
        return cast(BinaryIO, _FailingFile(super().open_write(path), self))

    def fsync(self, file: BinaryIO) -> None:
        self.step(None)  # as the system, which knows the file by number only
        super().fsync(file)

    @contextlib.contextmanager
    def lock(self, path: Path, timeout: float) -> Iterator[None]:
        self.step(path)
        with super().lock(path, timeout):
            yield


def _failing_method(name: str) -> Callable[..., Any]:
    original, changes = getattr(Quick, name), name in CHANGING

    def method(self: Failing, *arguments: Any) -> Any:
        self.step(next((path for path in arguments[::-1] if isinstance(path, Path)), None), changes=changes)
        return original(self, *arguments)

    return method


for _name in (LOOKING | CHANGING) - set(vars(Failing)):
    setattr(Failing, _name, _failing_method(_name))


class _FailingFile:
    def __init__(self, file: BinaryIO, storage: Failing) -> None:
        self._file, self._storage = file, storage

    def write(self, data: Any) -> int:
        self._storage.step(None)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def failures(
    scenario: Scenario, root: Path, error: str, *, lasting: bool, start: int = 0, every: int = 1
) -> Iterator[Counter[str]]:
    """Let every call of one save fail, one after the other; one counter for each."""
    numbered = scenario.prepare(root / "before")
    number = scenario.sets_before + 1
    counting = Failing(0, 0, lasting=False)
    shutil.copytree(root / "before", root / "counting")
    scenario.save(numbered, root / "counting", number, counting)
    for at in range(1 + start, counting.calls + 1):
        if (at - 1) % every:
            continue
        folder = root / "failing"
        # linked names stay linked
        folder.mkdir()
        Disk.of(root / "before").write(folder)
        numbered.become(number)
        state = digest_of({"network": numbered.network.state_dict(), "optimizer": numbered.optimizer.state_dict()})
        counted = Counter(tried=1)
        raised = in_doubt = False
        try:
            scenario.save(numbered, folder, number, Failing(at, ERRORS[error], lasting=lasting))
        except CheckpointWriteError as caught:
            raised, in_doubt = True, "unknown whether it is committed" in str(caught)
            in_doubt &= "not committed" not in str(caught)
        except Exception as caught:
            raised = True
            counted["foreign error"] += 1
            counted[f"foreign error: {type(caught).__name__}"] += 1
        counted["reported" if raised else "returned"] += 1
        after = digest_of({"network": numbered.network.state_dict(), "optimizer": numbered.optimizer.state_dict()})
        counted["half changed"] += after != state
        found = _look(folder, counted, scenario.sets_before if raised else number, number)
        counted["in doubt"] += in_doubt
        counted["wrongly reported"] += raised and found == number and not in_doubt
        counted["torn for Noether"] += is_torn_for_noether(folder)
        _save_again(numbered, folder, number + 1, counted)
        shutil.rmtree(folder)
        yield counted
