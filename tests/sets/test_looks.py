"""How often sets are looked at, and that a look which fails is never taken for a set that is not there."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core.errors import CheckpointError, CheckpointUnreachableError
from noether_init_core.files.storage.disk import LOCAL, FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import bind
from noether_init_core.paths import PathProvider
from noether_init_core.saving.retention import Retention, superfluous_sets
from noether_init_core.saving.writer import CheckpointWriter
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need
from noether_init_core.sets.health import check_file, verify_run
from noether_init_core.sets.hints import AskedBy
from noether_init_core.sets.manifest import sealed
from noether_init_core.sets.selection import Policy, find_set, newest_set, walk_back
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.stack.stack import InitializerStack
from noether_init_core.training import TrainerState

TRAINER = [Need("mlp", "trainer")]
BY_ITSELF = AskedBy("auto_resume")
LOOKS = ("list_folder", "is_folder", "size_of", "exists", "is_link", "identity_of", "changed_in", "read_bytes")


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
    writer = CheckpointWriter(paths, storage=storage, **how)
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
        lambda snapshot: walk_back(snapshot, None, lambda found: None, TRAINER, WALK, asked_by=BY_ITSELF),
        1,
    ),
    "auto_resume that walks far back": (
        lambda snapshot: walk_back(snapshot, None, _refuse, TRAINER, WALK, asked_by=BY_ITSELF),
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
    storage.listed.clear()
    storage.read.clear()
    other = save(paths, 7)
    writer.save(model, TrainingIteration(8, 8, 8))
    assert (storage.listed["sets"], dict(storage.read)) == (1, {other.folder.name: 1, "00000008_E8_U8_S8": 1})


def _looks_of_a_save(folder: Path, count: int) -> int:
    """Looks at the disk of a save beside ``count`` sets that an earlier save of the same writer has seen."""
    paths = PathProvider(folder, f"run{count}")
    for epoch in range(1, count + 1):
        _made_long_ago(save(paths, epoch))
    storage = Failing(0, errno.EIO)
    model = bind(torch.nn.Linear(1, 1), name="mlp")
    writer = CheckpointWriter(paths, keep_last=count, storage=storage)
    _made_long_ago(writer.save(model, TrainingIteration(count + 1, count + 1, count + 1)))
    before = storage.calls
    writer.save(model, TrainingIteration(count + 2, count + 2, count + 2))
    return storage.calls - before


def _made_long_ago(found: CheckpointSet) -> None:
    os.utime(found.folder, ns=(10**18 + 1, 10**18 + 1))


def test_the_looks_of_a_save_do_not_grow_with_the_sets_that_it_knows(tmp_path: Path) -> None:
    """However many are kept: one look at all, and the whole of those that go, or that are a way back."""
    few, some, many = (_looks_of_a_save(tmp_path, count) for count in (4, 8, 16))
    assert (some - few, many - some) == (0, 0)


def _remove_a_file(found: CheckpointSet) -> None:
    found.files[0].path.unlink()


def _empty_a_file(found: CheckpointSet) -> None:
    found.files[0].path.chmod(0o644)
    found.files[0].path.write_bytes(b"")


def _replace_the_manifest(found: CheckpointSet) -> None:
    path = found.folder / "manifest.json"
    path.rename(found.folder / "aside")
    path.write_bytes(b"{}")


@pytest.mark.parametrize("damage", [_remove_a_file, _empty_a_file, _replace_the_manifest])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_set_that_was_damaged_since_the_last_save_is_no_way_back(
    paths: PathProvider, damage: Callable[[CheckpointSet], None], is_old: bool
) -> None:
    """What a writer remembers of a set is confirmed before another one is removed for its sake."""
    model = bind(torch.nn.Linear(1, 1), name="mlp")
    writer = CheckpointWriter(paths, keep_last=2)
    sets = [writer.save(model, TrainingIteration(epoch, epoch, epoch)) for epoch in (6, 7)]
    if is_old:
        for found in sets:
            _made_long_ago(found)
    damage(sets[1])
    writer.save(model, TrainingIteration(8, 8, 8))
    good = [found.name for found in Snapshot(paths).readable() if Snapshot(paths).problem_of(found) is None]
    assert good == ["E8_U8_S8", "E6_U6_S6"]


def _cut(found: CheckpointSet) -> None:
    """Weights that are cut short in place: no name in the folder changes."""
    path = next(file.path for file in found.files if file.part == "model")
    path.chmod(0o644)
    os.truncate(path, 100)


class Run:
    """Saves of one writer, all of which it remembers at the next."""

    def __init__(self, folder: Path, **rules: Any) -> None:
        self.paths = PathProvider(folder, "run")
        self.writer = CheckpointWriter(self.paths, **rules)

    def save(self, epoch: int, *, nan: bool = False, **options: Any) -> CheckpointSet:
        module = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(module.weight, float("nan") if nan else 1.0)
        found = self.writer.save(bind(module, name="mlp"), TrainingIteration(epoch, epoch, epoch), **options)
        _made_long_ago(found)
        return found

    def left(self) -> list[int]:
        return sorted(int(path.name[:8]) for path in (self.paths.checkpoint_path / "sets").iterdir())


def test_sets_with_nan_are_no_way_back_for_which_a_good_one_goes(tmp_path: Path) -> None:
    """A tag holds them, and their files are whole; what a resume takes is confirmed, not they."""
    run = Run(tmp_path, keep_last=2)
    run.save(1)
    second = run.save(2)
    run.save(3, nan=True, tags=("crash",))
    _cut(second)
    run.save(4)
    assert run.left() == [1, 3, 4]


def test_the_good_best_set_stays_when_the_better_one_was_damaged(tmp_path: Path) -> None:
    """The best one is looked at again before another goes."""
    run = Run(tmp_path, retention={"last": 1, "best": {"metric": "l", "count": 1}})
    first = run.save(1, metrics={"l": 0.1})
    run.save(2, metrics={"l": 0.2})
    _cut(first)
    for epoch in (3, 4, 5):
        run.save(epoch, metrics={"l": epoch / 10})
    assert run.left() == [2, 4, 5]


def test_the_first_good_set_of_a_period_stays_when_the_one_before_was_damaged(tmp_path: Path) -> None:
    """Likewise for the rule ``every``."""
    run = Run(tmp_path, retention={"last": 1, "every": {"epoch": 4}})
    sets = [run.save(epoch) for epoch in (4, 5)]
    _cut(sets[0])
    for epoch in (6, 7):
        run.save(epoch)
    assert run.left() == [2, 3, 4]


@pytest.mark.parametrize("what", ["training", "tag"])
def test_a_set_that_was_replaced_in_place_by_another_one_stays(tmp_path: Path, what: str) -> None:
    """Names and times of the folder are the same; the manifest is of another training, or has a tag of its own."""
    run = Run(tmp_path / "a", keep_last=2)
    first = run.save(1)
    if what == "tag":
        content = json.loads((first.folder / "manifest.json").read_bytes())
        content["tags"].append("precious")
        del content["digest"]
        replacement = sealed(json.dumps(content, indent=1).encode())
    else:
        replacement = (Run(tmp_path / "b").save(1).folder / "manifest.json").read_bytes()
    path = first.folder / "manifest.json"
    path.chmod(0o644)
    path.write_bytes(replacement)
    for epoch in (2, 3, 4):
        run.save(epoch)
    assert 1 in run.left()


def test_a_writer_whose_folder_leads_elsewhere_removes_nothing_there(tmp_path: Path) -> None:
    """What it remembers is of the folder that the path led to before."""
    (tmp_path / "one").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "one")
    run = Run(tmp_path / "out", keep_last=2)
    run.save(1), run.save(2)
    shutil.copytree(tmp_path / "one", tmp_path / "other", copy_function=shutil.copy2)
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path / "other")
    run.save(3), run.save(4)
    assert run.left() == [3, 4]
    assert [path.name[:8] for path in sorted((tmp_path / "one" / "run" / "checkpoints" / "sets").iterdir())] == [
        "00000001",
        "00000002",
    ]


def _answers(paths: PathProvider) -> dict[str, Callable[[FileSystem], Any]]:
    def walked(storage: FileSystem) -> Any:
        snapshot = Snapshot(paths, storage=storage)
        return walk_back(snapshot, None, lambda found: None, TRAINER, WALK, asked_by=BY_ITSELF)[0].found.name

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
        found, said = _tried(functools.partial(ask, storage))
        assert found == "E5_U5_S5" if said is None else str(storage.failed_at) in said


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE], ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("look", ["open", "fstat"])
@pytest.mark.parametrize("name", ["mlp_cp=E6_U6_S6_model.th", "mlp_cp=E6_U6_S6_trainer.th", "digests.json"])
def test_walking_back_passes_over_no_set_whose_files_cannot_be_reached(
    paths: PathProvider, monkeypatch: pytest.MonkeyPatch, code: int, look: str, name: str
) -> None:
    """The files may be as they were written: another set would be chosen for a disk that fails for a moment."""
    path = save(paths, 6).folder / name
    real_open, real_fstat = os.open, os.fstat
    opened: set[int] = set()

    def failing_open(asked: Any, *arguments: Any, **options: Any) -> int:
        is_it = os.fspath(asked) == str(path)
        if is_it and look == "open":
            raise OSError(code, os.strerror(code), str(asked))
        descriptor = real_open(asked, *arguments, **options)
        (opened.add if is_it else opened.discard)(descriptor)
        return descriptor

    def failing_fstat(descriptor: int) -> os.stat_result:
        if descriptor in opened and look == "fstat":
            raise OSError(code, os.strerror(code))
        return real_fstat(descriptor)

    monkeypatch.setattr(os, "open", failing_open)
    monkeypatch.setattr(os, "fstat", failing_fstat)
    config = paths.output_root / "init.yaml"
    config.write_text("auto_resume: true\non_invalid: previous\n")
    model = bind(torch.nn.Linear(1, 1), name="mlp")
    stack = InitializerStack.from_file(config, path_provider=paths)
    with pytest.raises((CheckpointError, OSError), match=re.escape(os.strerror(code))) as caught:
        stack.initialize(model, trainer=TrainerState(seed=1))
    assert str(path) in str(caught.value)


def _cannot_be_read(*_arguments: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_walking_back_passes_over_no_set_whose_bytes_cannot_be_read(
    paths: PathProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that fails says nothing about the bytes: the next one may succeed."""

    def prove(found: CheckpointSet) -> str:
        with monkeypatch.context() as patch:
            if found.name == "E5_U5_S5":
                patch.setattr(os, "preadv", _cannot_be_read)
            for file in found.files:
                check_file(found, file)
        return found.name

    with pytest.raises(CheckpointUnreachableError, match="E5_U5_S5") as caught:
        walk_back(Snapshot(paths), None, prove, TRAINER, WALK, asked_by=BY_ITSELF)
    assert os.strerror(errno.EIO) in str(caught.value)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE], ids=lambda code: errno.errorcode[code])
def test_a_look_at_flat_names_that_fails_is_told_with_its_path(paths: PathProvider, code: int) -> None:
    """The record of flat names, and the flat names, are looked at where they lie beside committed sets."""
    save(paths, 6, flat_names=True)

    def ask(storage: FileSystem) -> str:
        return find_set(Snapshot(paths, storage=storage), None, TRAINER).found.name

    for number in _each_look(ask):
        storage = Failing(number, code)
        try:
            said = ask(storage)
        except CheckpointError as error:
            said = str(error)
        assert said == "E6_U6_S6" or str(storage.failed_at) in said


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
        _found, said = _tried(functools.partial(saving, paths, storage))
        assert said is None or str(storage.failed_at) in said
        assert [one.name for one in Snapshot(paths).sets()][:3] == ["E1_U1_S1", "E2_U2_S2", "E3_U3_S3"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE], ids=lambda code: errno.errorcode[code])
def test_a_look_that_fails_in_verify_is_a_problem(paths: PathProvider, code: int) -> None:
    """No set is told as a save that was never finished, and not all is good."""

    def verify(storage: FileSystem) -> Any:
        return verify_run(Snapshot(paths, storage=storage))

    for number in _each_look(verify):
        storage = Failing(number, code)
        health, said = _tried(functools.partial(verify, storage))
        if said is None:
            assert "uncommitted" not in [one.state for one in health.sets]
            said = "".join(text for one in health.sets for text in (*one.problems, *one.notes))
        assert str(storage.failed_at) in said


def test_verify_advises_no_older_set_than_one_that_cannot_be_read(paths: PathProvider) -> None:
    """It may be good; an older one that cannot be read is no obstacle."""

    class Denied(FileSystem):
        name = "E5_U5_S5"

        def read_bytes(self, path: Path, limit: int) -> bytes:
            if self.name in str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return super().read_bytes(path, limit)

    storage = Denied()
    health = verify_run(Snapshot(paths, storage=storage))
    assert health.newest_good is not None
    assert (health.newest_good.iteration, health.use) == ("E4_U4_S4", "")
    storage.name = "E3_U3_S3"
    assert "E5_U5_S5" in verify_run(Snapshot(paths, storage=storage)).use


def test_a_tag_stays_with_the_older_set_when_the_newer_one_was_removed_by_hand(tmp_path: Path) -> None:
    """However many sets lie between: what a writer remembers of a holder is looked at before another one goes."""
    run = Run(tmp_path, keep_last=50)
    run.save(1, tags=("best",))
    newer = [run.save(epoch, tags=("best",) if epoch == 25 else ()) for epoch in range(2, 51)][23]
    (newer.folder / "manifest.json").unlink()
    for epoch in range(51, 55):
        run.save(epoch, tags=())
    assert [found.sequence for found in Snapshot(run.paths).readable() if "best" in found.tags] == [1]


def test_one_set_that_is_not_as_remembered_lets_all_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of every set were cut: which may go is decided twice, not once for each of them."""
    run = Run(tmp_path, keep_last=30)
    for found in [run.save(epoch) for epoch in range(1, 31)]:
        _cut(found)
    decided = []

    def counted(*arguments: Any) -> Any:
        decided.append(superfluous_sets(*arguments))
        return decided[-1]

    monkeypatch.setattr("noether_init_core.saving.housekeeping.superfluous_sets", counted)
    run.save(31)
    assert len(decided) <= 2
    run.save(32)
    assert {31, 32} <= set(run.left())
