"""How often sets are looked at, and that a look which fails is never taken for a set that is not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core.errors import CheckpointError
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import bind
from noether_init_core.paths import PathProvider
from noether_init_core.saving.retention import Retention
from noether_init_core.saving.writer import CheckpointWriter
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need
from noether_init_core.sets.health import verify_run
from noether_init_core.sets.selection import Policy, find_set, newest_set, walk_back
from noether_init_core.sets.snapshot import Snapshot

TRAINER = [Need("mlp", "trainer")]
LOOKS = ("list_folder", "is_folder", "size_of", "exists", "is_link", "identity_of", "read_bytes")


class Counting(FileSystem):
    """Counts listings and manifests that are read."""

    def __init__(self) -> None:
        self.listed: Counter[str] = Counter()
        self.read: Counter[str] = Counter()

    def list_folder(self, folder: Path) -> list[str]:
        self.listed[folder.name] += 1
        return super().list_folder(folder)

    def read_bytes(self, path: Path, limit: int) -> bytes:
        if path.name == "manifest.json":
            self.read[path.parent.name] += 1
        return super().read_bytes(path, limit)


class Failing(FileSystem):
    """One look fails, the others do not."""

    def __init__(self, number: int, code: int) -> None:
        self.number, self.code, self.calls = number, code, 0
        self.failed_at: Path | None = None

    def _count(self, path: Path) -> None:
        self.calls += 1
        if self.calls == self.number:
            self.failed_at = path
            raise OSError(self.code, os.strerror(self.code), str(path))


def _failing(name: str) -> Callable[..., Any]:
    def look(self: Failing, path: Path, *arguments: Any) -> Any:
        self._count(path)
        return getattr(FileSystem, name)(self, path, *arguments)

    return look


for _name in LOOKS:
    setattr(Failing, _name, _failing(_name))


def save(paths: PathProvider, epoch: int, storage: FileSystem = LOCAL, **how: Any) -> CheckpointSet:
    """One set of a tiny model."""
    model = bind(torch.nn.Linear(1, 1), name="mlp")
    writer = CheckpointWriter(paths, flat_names=False, storage=storage, **how)
    return writer.save(model, TrainingIteration(epoch, epoch, epoch))


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    """A run with five committed sets."""
    found = PathProvider(tmp_path, "run")
    for epoch in range(1, 6):
        save(found, epoch)
    return found


def _refuse(found: CheckpointSet) -> None:
    if found.name != "E2_U2_S2":
        raise CheckpointError("broken")


def _find_absent(snapshot: Snapshot) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        find_set(snapshot, "absent")


WALK = Policy(any_tag=True, walk_back=True, root="mlp", parts=("model", "optim"))
QUESTIONS: dict[str, tuple[Callable[[Snapshot], Any], int]] = {
    "latest": (lambda snapshot: find_set(snapshot, None, TRAINER), 1),
    "latest and the names of models": (lambda snapshot: (snapshot.trainer_names(), find_set(snapshot, None)), 1),
    "one field": (lambda snapshot: find_set(snapshot, "E2", TRAINER, Policy(root="mlp", parts=("model",))), 2),
    "one iteration": (lambda snapshot: find_set(snapshot, "E2_U2_S2", TRAINER), 2),
    "auto_resume": (newest_set, 1),
    "auto_resume that walks back": (
        lambda snapshot: walk_back(snapshot, None, lambda found: None, TRAINER, WALK, asked_by="auto_resume"),
        1,
    ),
    "auto_resume that walks far back": (
        lambda snapshot: walk_back(snapshot, None, _refuse, TRAINER, WALK, asked_by="auto_resume"),
        4,
    ),
    "a tag that nobody has": (_find_absent, 5),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_lists_once_and_reads_the_manifests_that_it_needs(paths: PathProvider, name: str) -> None:
    """Names are listed once; of manifests the newest is enough for most questions, and none is read twice."""
    ask, heads = QUESTIONS[name]
    storage = Counting()
    ask(Snapshot(paths, storage=storage))
    assert storage.listed["sets"] == (1 if name != "a tag that nobody has" else 2), "an error is believed on a new look"
    assert len(storage.read) == heads
    assert set(storage.read.values()) == {1}


def test_the_newest_of_many_sets_reads_one_manifest(paths: PathProvider) -> None:
    """However many there are: the folders of 1,000 others are names only."""
    newest = save(paths, 6)
    for number in range(1_000):
        (newest.folder.parent / f"00000000_E0_U0_S{number}").mkdir()
    storage = Counting()
    assert find_set(Snapshot(paths, storage=storage), None, TRAINER).found == newest
    assert (storage.listed["sets"], dict(storage.read)) == (1, {newest.folder.name: 1})


def test_a_save_with_retention_reads_each_manifest_once_and_later_saves_only_the_new_ones(
    paths: PathProvider,
) -> None:
    """The cost of a save does not grow with the sets that are kept."""
    storage = Counting()
    model = bind(torch.nn.Linear(1, 1), name="mlp")
    writer = CheckpointWriter(paths, flat_names=False, retention=Retention(last=50), storage=storage)
    writer.save(model, TrainingIteration(6, 6, 6))
    assert (storage.listed["sets"], len(storage.read), set(storage.read.values())) == (1, 6, {1})
    storage.listed.clear(), storage.read.clear()
    other = save(paths, 7)
    writer.save(model, TrainingIteration(8, 8, 8))
    assert (storage.listed["sets"], dict(storage.read)) == (1, {other.folder.name: 1, "00000008_E8_U8_S8": 1})


def _answers(paths: PathProvider) -> dict[str, Callable[[FileSystem], Any]]:
    def walked(storage: FileSystem) -> Any:
        snapshot = Snapshot(paths, storage=storage)
        return walk_back(snapshot, None, lambda found: None, TRAINER, WALK, asked_by="auto_resume")[0].found.name

    return {
        "find_set": lambda storage: find_set(Snapshot(paths, storage=storage), None, TRAINER).found.name,
        "newest_set": lambda storage: getattr(newest_set(Snapshot(paths, storage=storage)), "name", None),
        "walk_back": walked,
    }


def _tried(ask: Callable[[], Any]) -> tuple[Any, str | None]:
    """The answer, or what the error says."""
    try:
        return ask(), None
    except (CheckpointError, OSError) as error:
        return None, str(error)


def _each_look(ask: Callable[[FileSystem], Any]) -> Iterator[int]:
    counter = Failing(0, errno.EIO)
    ask(counter)
    assert counter.calls > 3
    yield from range(1, counter.calls + 1)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE], ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("question", ["find_set", "newest_set", "walk_back"])
def test_a_look_that_fails_never_chooses_another_set(paths: PathProvider, question: str, code: int) -> None:
    """Whichever look it is: the newest set, or an error that names the path; never an older set, never none."""
    ask = _answers(paths)[question]
    for number in _each_look(ask):
        storage = Failing(number, code)
        found, said = _tried(lambda storage=storage: ask(storage))
        assert found == "E5_U5_S5" if said is None else str(storage.failed_at) in said


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE], ids=lambda code: errno.errorcode[code])
def test_a_look_that_fails_in_a_save_removes_no_set(tmp_path: Path, code: int) -> None:
    """The save fails, or is committed; every set from before is there, with its manifest."""
    model = bind(torch.nn.Linear(1, 1), name="mlp")

    template = PathProvider(tmp_path / "template", "run")
    for epoch in (1, 2, 3):
        save(template, epoch)

    def prepared(folder: Path) -> PathProvider:
        shutil.copytree(template.output_root, folder)
        return PathProvider(folder, "run")

    def saving(paths: PathProvider, storage: FileSystem) -> CheckpointSet:
        writer = CheckpointWriter(paths, flat_names=False, retention=Retention(last=9), storage=storage)
        return writer.save(model, TrainingIteration(4, 4, 4))

    counter = Failing(0, code)
    saving(prepared(tmp_path / "counted"), counter)
    for number in range(1, counter.calls + 1):
        paths = prepared(tmp_path / str(number))
        storage = Failing(number, code)
        _found, said = _tried(lambda paths=paths, storage=storage: saving(paths, storage))
        assert said is None or str(storage.failed_at) in said
        assert [one.name for one in Snapshot(paths).sets()][:3] == ["E1_U1_S1", "E2_U2_S2", "E3_U3_S3"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE], ids=lambda code: errno.errorcode[code])
def test_a_look_that_fails_in_verify_is_a_problem(paths: PathProvider, code: int) -> None:
    """No set is told as a save that was never finished, and not all is good."""

    def verify(storage: FileSystem) -> Any:
        return verify_run(Snapshot(paths, storage=storage))

    for number in _each_look(verify):
        storage = Failing(number, code)
        health, said = _tried(lambda storage=storage: verify(storage))
        if said is None:
            assert "uncommitted" not in [one.state for one in health.sets]
            said = "".join(text for one in health.sets for text in (*one.problems, *one.notes))
        assert str(storage.failed_at) in said
