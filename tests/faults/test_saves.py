"""Saves that end early: crashes of the machine at every point, and operations that fail."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import pytest

from faults.campaign.crashes import ERRORS, SCENARIOS, Failing, failures, replay
from faults.campaign.disk import CHANGING, LOOKING, Disk, Operation, Recorder, crashes, volatile, waiting
from noether_init_core.files.storage.disk import FileSystem

#: Each n-th disk or call: coprime to the number of data variants, so that all of them come up.
EVERY = {"first save": 37, "with retention": 113, "best tag and average": 211}


@pytest.mark.parametrize("name", list(EVERY))
def test_after_a_crash_anywhere_the_newest_acknowledged_set_is_there_and_whole(name: str, tmp_path: Path) -> None:
    """Names and bytes that were not fsynced may be there or not; the set is, and the next save works."""
    found = sum(replay(SCENARIOS[name], tmp_path, every=EVERY[name]), Counter[str]())
    assert found["good"] == found["tried"] > 15
    assert found["process killed"] > 0
    problems = ("torn", "unloadable", "lost", "from the future", "next save not found", "torn for Noether")
    assert [found[problem] for problem in problems] == [0] * len(problems)


class ForgetsFiles(Recorder):
    """Does not bring the bytes of files onto the disk."""

    def fsync(self, file: BinaryIO) -> None:
        file.flush()


class ForgetsFolders(Recorder):
    """Does not bring names onto the disk."""

    def fsync_folder(self, folder: Path) -> None:
        pass


@pytest.mark.parametrize(("storage", "problem"), [(ForgetsFiles, "unloadable"), (ForgetsFolders, "lost")])
def test_the_replay_notices_a_missing_fsync(storage: type[Recorder], problem: str, tmp_path: Path) -> None:
    """Both kinds are needed, and the model of the disk knows it."""
    found = sum(
        replay(SCENARIOS["third save"], tmp_path, storage=storage, acknowledged_only=True, every=5), Counter[str]()
    )
    assert found[problem] > 0


class ForgetsNamesOfTheSet(Recorder):
    """Brings the names of a set onto the disk with that of its manifest, and not before."""

    def fsync_folder(self, folder: Path) -> None:
        if folder.parent.name != "sets" or self.exists(folder / "manifest.json"):
            super().fsync_folder(folder)


def recorded_save(root: Path, storage: type[Recorder]) -> tuple[Recorder, int]:
    """What a save changed, and the number of the change that commits."""
    scenario = SCENARIOS["third save"]
    numbered = scenario.prepare(root)
    recorder = storage(root)
    scenario.save(numbered, root, 3, recorder)
    (commit,) = [
        number
        for number, operation in enumerate(recorder.operations)
        if operation.kind == "names" and any(name == "manifest.json" for _folder, name, _node in operation.names)
    ]
    return recorder, commit


def test_every_name_of_a_set_is_on_the_disk_before_its_manifest_commits(tmp_path: Path) -> None:
    """Else a crash could leave the manifest and not what it vouches for."""
    recorder, commit = recorded_save(tmp_path / "runs", Recorder)
    assert not waiting(recorder.operations[:commit])
    assert not volatile(recorder.before, recorder.operations[:commit])


def test_the_model_of_the_disk_knows_a_manifest_whose_files_have_no_names(tmp_path: Path) -> None:
    """A writer that forgets the names of the set leaves it so, in some crash after the commit."""
    recorder, commit = recorded_save(tmp_path / "runs", ForgetsNamesOfTheSet)
    after = (set(one.disk.tree()) for one in crashes(recorder, random.Random(0)) if one.done == commit + 1)
    newest = "run/checkpoints/sets/00000003_"
    names = [{name.rpartition("/")[2] for name in tree if name.startswith(newest)} for tree in after]
    assert any("manifest.json" in tree and not any(name.endswith(".th") for name in tree) for tree in names)


@pytest.mark.parametrize("error", list(ERRORS))
@pytest.mark.parametrize("name", ["first save", "with retention"])
def test_a_failing_operation_is_reported_or_harmless(name: str, error: str, tmp_path: Path) -> None:
    """The sets from before are whole, an error is ours and true, and the next save works."""
    for lasting in (False, True):
        found = sum(
            failures(SCENARIOS[name], tmp_path / str(lasting), error, lasting=lasting, every=23), Counter[str]()
        )
        assert found["good"] == found["tried"] > 5
        assert found["reported"] > 0
        assert found["returned"] > 0
        problems = ("lost", "wrongly reported", "foreign error", "half changed", "next save not found")
        assert [found[problem] for problem in problems] == [0] * len(problems)


def test_every_operation_of_the_storage_is_known_to_the_faults() -> None:
    """A new one would neither be recorded nor fail."""
    methods = {name for name, _ in inspect.getmembers(FileSystem, inspect.isfunction) if not name.startswith("_")}
    assert methods == LOOKING | CHANGING
    assert methods <= set(vars(Failing))
    assert CHANGING - {"make_read_only", "lock"} <= set(vars(Recorder))


def test_a_name_and_its_bytes_reach_the_disk_each_by_its_own_fsync(tmp_path: Path) -> None:
    """What may be there after a crash: with neither, anything; with both, the file."""

    def after(*steps: str) -> set[bytes | None]:
        folder = tmp_path / "-".join(["none", *steps])
        folder.mkdir()
        recorder = Recorder(folder)
        with recorder.open_write(folder / "file") as file:
            file.write(b"four")
            if "file" in steps:
                recorder.fsync(file)
        if "folder" in steps:
            recorder.fsync_folder(folder)
        last = [crash.disk for crash in crashes(recorder, random.Random(0)) if crash.done == len(recorder.operations)]
        return {bytes(disk.contents[disk.tree()["file"]]) if "file" in disk.tree() else None for disk in last}

    assert after() == {None, b"", b"fo", b"\0\0\0\0", b"four"}
    assert after("folder") == {b"", b"fo", b"\0\0\0\0", b"four"}
    assert after("file") == {None, b"four"}
    assert after("file", "folder") == {b"four"}


def test_a_rename_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """The old name and the new one never both, never neither."""
    (tmp_path / "old").write_bytes(b"x")
    recorder = Recorder(tmp_path)
    recorder.rename(tmp_path / "old", tmp_path / "new")
    assert {tuple(crash.disk.tree()) for crash in crashes(recorder, random.Random(0))} == {("old",), ("new",)}
    assert recorder.now.signature() == Disk.of(tmp_path).signature()


def test_links_stay_links_on_the_modelled_disk(tmp_path: Path) -> None:
    """Two names of one file share its bytes, also when it is made real again."""
    (tmp_path / "made").mkdir()
    (tmp_path / "real").mkdir()
    first = tmp_path / "made" / "first"
    first.write_bytes(b"x")
    recorder = Recorder(tmp_path / "made")
    recorder.hardlink(first, tmp_path / "made" / "second")
    assert [operation.kind for operation in recorder.operations] == ["names"]
    assert isinstance(recorder.operations[0], Operation)
    recorder.now.write(tmp_path / "real")
    assert (tmp_path / "real" / "first").samefile(tmp_path / "real" / "second")
