"""Disks that fill up, folders that cannot be written, other writers and killed ones: really, where that can be."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from noether_init_core import (
    CheckpointFormatError,
    CheckpointWriteError,
    CheckpointWriter,
    PathProvider,
    Retention,
    TrainingIteration,
    bind,
)
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.memory import examine_memory
from noether_init_core.saving import file_writing as watch_module
from noether_init_core.sets.checkpoint_set import CheckpointSet, check_files
from noether_init_core.sets.selection import find_set, newest_set
from noether_init_core.sets.snapshot import Snapshot

NOBODY = 65534
STEPS = (
    "make_folder",
    "open_write",
    "fsync",
    "fsync_folder",
    "make_read_only",
    "rename",
    "unlink",
    "remove_folder",
    "reflink",
    "hardlink",
    "copy",
)


def at(epoch: int) -> TrainingIteration:
    return TrainingIteration(epoch, 10 * epoch, 100 * epoch)


def model_of(value: float, size: int = 4) -> Any:
    """Every weight is one recognisable value."""
    module = torch.nn.Linear(size, size)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, value)
    return bind(module, name="mlp")


def value_of(found: CheckpointSet) -> float:
    """The value in the weights, every byte of the set verified."""
    check_files(found)
    values: set[float] = set()
    for file in found.files:
        with open_checkpoint(file.path, digests=found.file_digest(file)) as reader:
            reader.verify()
            for key in reader.tensors() if file.part == "model" else ():
                values |= set(reader.read(key).flatten().tolist())
    (value,) = values
    return value


def assert_all_good(paths: PathProvider) -> dict[str, float]:
    """Every committed set is whole; returns set -> value."""
    snapshot = Snapshot(paths)
    assert snapshot.broken() == ()
    return {found.name: value_of(found) for found in snapshot.sets()}


def python(program: str, *arguments: Any, **how: Any) -> subprocess.Popen[str]:
    """A process of its own, with the same import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **how)


# Every step fails once, with retention and metrics.


class Failing(FileSystem):
    """Fails at the step with the given number, the bytes of files counted as steps, too."""

    def __init__(self, at: int | None, number: int) -> None:
        self.steps: list[str] = []
        for name in STEPS:
            setattr(self, name, functools.partial(self._step, name, at, number, getattr(super(), name)))

    def _step(self, name: str, at: int | None, number: int, call: Callable[..., Any], *arguments: Any) -> Any:
        self.steps.append(name)
        if len(self.steps) == at:
            path = next((str(one) for one in arguments if isinstance(one, Path)), None)
            raise OSError(number, os.strerror(number), *([path] if path else []))
        return call(*arguments)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_failure_of_any_step_loses_no_set_that_a_rule_keeps(tmp_path: Path, number: int) -> None:
    """A save with metrics and retention, failing once at every step: what was acknowledged is there and loads."""
    rules = Retention(last=1, every={"epoch": 3}, best={"loss": 1})
    before = PathProvider(tmp_path / "before", "run")
    for epoch, loss in ((1, 0.5), (2, 0.1), (3, 0.6), (4, 0.7), (5, 0.8)):
        CheckpointWriter(before, flat_names=epoch > 3).save(model_of(epoch), at(epoch), metrics={"loss": loss})

    def attempt(name: str, at_step: int | None) -> tuple[PathProvider, Failing, BaseException | None]:
        shutil.copytree(before.output_root, tmp_path / name)
        paths, storage = PathProvider(tmp_path / name, "run"), Failing(at_step, number)
        try:
            CheckpointWriter(paths, retention=rules, storage=storage, flat_names=True).save(
                model_of(6), at(6), metrics={"loss": 0.9}
            )
        except CheckpointWriteError as error:
            return paths, storage, error
        return paths, storage, None

    paths, dry, _ = attempt("dry", None)
    names = {one.name for one in Snapshot(paths).sets()}
    assert names == {f"E{n}_U{n}0_S{n}00" for n in (2, 3, 5, 6)}
    assert len(dry.steps) > 40
    outcomes: Counter[bool] = Counter()
    for step in range(1, len(dry.steps) + 1):
        paths, _, error = attempt(str(step), step)
        outcomes[error is None] += 1
        found = assert_all_good(paths)
        kept = {"E2_U20_S200", "E3_U30_S300", "E5_U50_S500"}
        assert kept <= set(found)
        assert all(f"E{int(value)}_" in name for name, value in found.items())
        if error is None:
            assert "E6_U60_S600" in found
        else:
            assert str(paths.checkpoint_path) in str(error)
            assert os.strerror(number) in str(error)
        CheckpointWriter(paths, retention=rules, flat_names=True).save(model_of(7), at(7), metrics={"loss": 0.95})
        found = assert_all_good(paths)
        assert {"E2_U20_S200", "E3_U30_S300", "E7_U70_S700"} <= set(found)
        assert len(found) <= 5
        assert Snapshot(paths).uncommitted() == ()
        shutil.rmtree(paths.output_root)
    # where room runs out, flat names are given up and the set is tried again, so that one failure rarely stops it
    assert outcomes[True] > 10
    assert outcomes[False] > (10 if number == errno.EIO else 0)


# A disk that is full.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or mount is None:
        pytest.skip("a small file system is mounted on Linux only")
    command = [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run([shutil.which("umount") or "umount", str(folder)], check=True, capture_output=True)


def test_full_disk_keeps_every_set_that_was_acknowledged(small_disk: Path) -> None:
    """Saves go on until the disk is full; the error names it, room that is made is used again."""
    paths = PathProvider(small_disk, "run")
    acknowledged = []
    error = None
    for epoch in range(1, 30):
        try:
            saved = CheckpointWriter(paths, flat_names=False).save(model_of(epoch, size=300), at(epoch))
        except CheckpointWriteError as caught:
            error = caught
            break
        acknowledged.append(saved.name)
    assert error is not None
    assert isinstance(error, OSError)
    assert str(small_disk) in str(error)
    assert "No space left on device" in str(error)
    assert "It was not committed; earlier sets are unchanged" in str(error)
    assert len(acknowledged) > 3
    found = assert_all_good(paths)
    assert list(found) == acknowledged
    # what the failed save left is collected, and the writer tries again
    with pytest.raises(CheckpointWriteError):
        CheckpointWriter(paths, flat_names=False).save(model_of(40, size=300), at(40))
    shutil.rmtree(Snapshot(paths).sets()[0].folder)
    CheckpointWriter(paths, flat_names=False, keep_last=2).save(model_of(41, size=300), at(41))
    assert assert_all_good(paths)["E41_U410_S4100"] == 41


def test_disk_that_is_full_to_the_last_byte_keeps_the_newest_set(small_disk: Path) -> None:
    """At every amount of room that is left, from none up, the save is whole or not there; retention frees room."""
    paths = PathProvider(small_disk, "run")
    CheckpointWriter(paths, flat_names=True).save(model_of(1), at(1))
    filler = small_disk / "filler"
    outcomes: Counter[bool] = Counter()
    for number, room in enumerate((0, 4096, 8192, 12288, 16384, 24576, 32768, 65536), start=2):
        filler.unlink(missing_ok=True)
        free = os.statvfs(small_disk)
        filler.write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize - room))
        newest = newest_set(Snapshot(paths))
        assert newest is not None
        try:
            saved = CheckpointWriter(paths, keep_last=1, flat_names=True).save(model_of(number), at(number))
        except CheckpointWriteError:
            outcomes[False] += 1
            assert newest_set(Snapshot(paths)) == newest
        else:
            outcomes[True] += 1
            assert newest_set(Snapshot(paths)) == saved
        assert_all_good(paths)
    assert outcomes[True]
    assert outcomes[False]


# Folders that cannot be written.


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike those that pytest makes."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


SAVE_AS_NOBODY = """
import os, sys, tempfile, torch
from noether_init_core import CheckpointWriter, PathProvider, Snapshot, TrainingIteration, bind, newest_set
with tempfile.TemporaryDirectory() as folder:  # imports all that saving needs while it may still be read
    warm = PathProvider(folder, "run")
    CheckpointWriter(warm).save(bind(torch.nn.Linear(2, 2), name="mlp"), TrainingIteration(1, 10, 100))
    newest_set(Snapshot(warm))
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
paths = PathProvider(sys.argv[1], "run")
try:
    CheckpointWriter(paths).save(bind(torch.nn.Linear(2, 2), name="mlp"), TrainingIteration(2, 20, 200))
    print("saved")
except Exception as error:
    print(type(error).__name__, isinstance(error, OSError), error)
print(newest_set(Snapshot(paths)).name)
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="users are those of POSIX")
@pytest.mark.parametrize("which", ["sets", "checkpoints", "everything"])
def test_folder_that_another_user_may_not_write_is_named(open_folder: Path, which: str) -> None:
    """Nothing is changed, and what is there can still be read."""
    paths = PathProvider(open_folder, "run")
    CheckpointWriter(paths, flat_names=True).save(model_of(1), at(1))
    folders = {"checkpoints": paths.checkpoint_path, "sets": paths.checkpoint_path / "sets"}
    for folder in [*folders.values(), *(paths.checkpoint_path / "sets").iterdir()]:
        folder.chmod(0o777)
    (paths.checkpoint_path / ".noether-init.lock").chmod(0o666)
    for folder in folders.values() if which == "everything" else [folders[which]]:
        folder.chmod(0o555)
    if which == "everything":
        (paths.checkpoint_path / ".noether-init.lock").unlink()
    listing = sorted(open_folder.rglob("*"))
    child = python(SAVE_AS_NOBODY, open_folder, NOBODY, cwd="/")
    out, errors = child.communicate(timeout=900)
    assert child.returncode == 0, errors
    said, newest = out.splitlines()
    assert newest.startswith("E")
    if which == "checkpoints":
        # the set itself can be committed there; only Noether's names cannot be refreshed, which is a warning
        assert (said, newest) == ("saved", "E2_U20_S200")
        return
    assert said.startswith("CheckpointWriteError True E2_U20_S200 of run run was not saved: ")
    assert "Permission denied" in said
    assert str(folders["checkpoints"]) in said
    assert newest == "E1_U10_S100"
    assert sorted(open_folder.rglob("*")) == listing


# Others at the same time, and others that are dead.


SAVE_MANY = """
import sys, torch
from noether_init_core import CheckpointWriter, PathProvider, TrainingIteration, bind
paths, own = PathProvider(sys.argv[1], "run"), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for update in range(8):
    module = torch.nn.Linear(2, 2)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 100 * own + update)
    model, iteration = bind(module, name="mlp"), TrainingIteration(own, update, 0)
    saved = CheckpointWriter(paths).save(model, iteration, tags=(f"of{own}",))
    print(saved.sequence, saved.name, 100 * own + update, flush=True)
"""


def test_two_processes_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    """Every acknowledged save of both is there, whole, with a sequence of its own; each tag means its last."""
    children = [python(SAVE_MANY, tmp_path, own, stdin=subprocess.PIPE) for own in (1, 2)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    acknowledged: dict[int, tuple[str, float]] = {}
    for child in children:
        out, errors = child.communicate(timeout=900)
        assert child.returncode == 0, errors
        for line in out.splitlines():
            sequence, name, value = line.split()
            assert int(sequence) not in acknowledged
            acknowledged[int(sequence)] = name, float(value)
    paths = PathProvider(tmp_path, "run")
    found = {one.sequence or 0: (one.name, value_of(one)) for one in Snapshot(paths).sets()}
    assert found == acknowledged
    assert sorted(found) == list(range(1, 17))
    for own in (1, 2):
        assert value_of(find_set(Snapshot(paths), f"of{own}").found) == 100 * own + 7


HOLD_LOCK = """
import sys, time
from pathlib import Path
from noether_init_core.files.storage.disk import LOCAL
with LOCAL.lock(Path(sys.argv[1]), 10):
    print("held", flush=True)
    time.sleep(600)
"""


def test_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it lives the others wait, and say so in the end; once it is killed the next save goes through."""
    paths = PathProvider(tmp_path, "run")
    CheckpointWriter(paths, flat_names=True).save(model_of(1), at(1))
    lock = paths.checkpoint_path / ".noether-init.lock"
    child = python(HOLD_LOCK, lock)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        monkeypatch.setattr("noether_init_core.saving.writer.LOCK_TIMEOUT_S", 0.2)
        with pytest.raises(CheckpointWriteError, match="another process or thread has held the lock") as caught:
            CheckpointWriter(paths, flat_names=True).save(model_of(2), at(2))
        assert caught.value.path == lock
        assert list(assert_all_good(paths)) == ["E1_U10_S100"]
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert lock.exists()
    CheckpointWriter(paths, flat_names=True).save(model_of(3), at(3))
    assert assert_all_good(paths) == {"E1_U10_S100": 1, "E3_U30_S300": 3}


def test_write_that_fails_in_the_middle_of_each_file_is_no_set(tmp_path: Path) -> None:
    """The bytes themselves fail to get to the disk, of every file of a set and of its manifest."""

    class HalfFile:
        def __init__(self, file: BinaryIO, room: int) -> None:
            self._file, self._room = file, room

        def write(self, data: Any) -> int:
            size = len(memoryview(data).cast("B"))
            self._room -= size
            if self._room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> HalfFile:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    class HalfStorage(FileSystem):
        def __init__(self, which: int) -> None:
            self._left = which

        def open_write(self, path: Path) -> BinaryIO:
            file = super().open_write(path)
            self._left -= 1
            return file if self._left >= 0 else HalfFile(file, 100)  # type: ignore[return-value]

    paths = PathProvider(tmp_path, "run")
    CheckpointWriter(paths, flat_names=True).save(model_of(1), at(1))
    names = ["mlp_cp=E2_U20_S200_model.th", "mlp_cp=E2_U20_S200_trainer.th", "digests.json", "manifest.json.tmp"]
    for which, name in enumerate(names):
        with pytest.raises(CheckpointWriteError, match="No space left on device") as caught:
            CheckpointWriter(paths, storage=HalfStorage(which), flat_names=True).save(model_of(2), at(2))
        assert caught.value.path is not None
        assert caught.value.path.name == name
        assert assert_all_good(paths) == {"E1_U10_S100": 1}


def test_weights_that_change_in_the_midst_of_a_save_are_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread trains on: file and digests would be of two moments, and the set could never be loaded."""
    paths = PathProvider(tmp_path, "run")
    CheckpointWriter(paths, flat_names=True).save(model_of(1), at(1))
    model = model_of(2)
    examined = threading.Event()

    def look(data: memoryview, dtype: str) -> Any:
        found = examine_memory(data, dtype)
        if len(data) == model.weight.nbytes:
            examined.set()
        return found

    class TrainsOn(FileSystem):
        def open_write(self, path: Path) -> BinaryIO:
            file = super().open_write(path)
            if path.name.endswith("_model.th"):
                original = file.write
                changed: list[bool] = []

                def write(data: Any) -> int:
                    if not changed:
                        assert examined.wait(60)
                        changed.append(True)
                        with torch.no_grad():
                            model.weight.add_(1)
                    return original(data)

                file.write = write  # type: ignore[method-assign]
            return file

    monkeypatch.setattr(watch_module, "examine_memory", look)
    with pytest.raises(CheckpointWriteError, match=r"weight changed while .* was written, by another thread"):
        CheckpointWriter(paths, storage=TrainsOn(), flat_names=True).save(model, at(2))
    assert set(assert_all_good(paths).values()) == {1.0}


def test_channels_last_weights_that_change_in_the_midst_of_a_save_are_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of another order than the contiguous one are compared as they lie in the file."""
    paths = PathProvider(tmp_path, "run")
    convolution: Any = torch.nn.Conv2d(3, 8, 3, bias=False)
    module: Any = convolution.to(memory_format=torch.channels_last)
    CheckpointWriter(paths, flat_names=True).save(bind(module, "net"), at(1))
    looked_at = threading.Event()

    def look(data: memoryview, dtype: str) -> Any:
        found = examine_memory(data, dtype)
        looked_at.set()
        return found

    class TrainsOn(FileSystem):
        def open_write(self, path: Path) -> BinaryIO:
            file = super().open_write(path)
            if path.name.endswith("_model.th"):
                assert looked_at.wait(60)
                with torch.no_grad():
                    module.weight.add_(1)
            return file

    monkeypatch.setattr(watch_module, "examine_memory", look)
    with pytest.raises(CheckpointWriteError, match=r"^E2_.*weight.* changed while .*_model\.th was written"):
        CheckpointWriter(paths, storage=TrainsOn(), flat_names=True).save(bind(module, "net"), at(2))
    assert [found.name for found in Snapshot(paths).sets()] == [str(at(1))]


def test_a_step_between_two_files_of_a_set_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is what was in memory when it was written, and the set would be torn: moments of a later step."""
    paths = PathProvider(tmp_path, "run")
    module = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    moment = optimizer.state[module.weight]["exp_avg"]
    CheckpointWriter(paths, flat_names=True).save(bind(module, "net", optimizer=optimizer), at(1))
    stepped = threading.Event()
    written = threading.Event()

    def look(data: memoryview, dtype: str) -> Any:
        if bytes(data) == bytes(moment.numpy().reshape(-1).view("u1")) and not stepped.is_set():
            # the weights were looked at and are written; then comes the step, and the moments are those after it
            assert written.wait(60)
            with torch.no_grad():
                module.weight.add_(1)
                moment.add_(1)
            stepped.set()
        return examine_memory(data, dtype)

    class TellsWhenWritten(FileSystem):
        def fsync(self, file: BinaryIO) -> None:
            super().fsync(file)
            if file.name.endswith("_model.th"):
                written.set()

        def open_write(self, path: Path) -> BinaryIO:
            if path.name.endswith("_optim.th"):
                assert stepped.wait(60)
            return super().open_write(path)

    monkeypatch.setattr(watch_module, "examine_memory", look)
    with pytest.raises(
        CheckpointWriteError, match=r"weight of net_cp=E2_.* changed while the set was written"
    ) as caught:
        CheckpointWriter(paths, storage=TellsWhenWritten(), flat_names=True).save(
            bind(module, "net", optimizer=optimizer), at(2)
        )
    assert "exp_avg" not in str(caught.value)
    assert [found.name for found in Snapshot(paths).sets()] == [str(at(1))]


def test_extra_state_that_changes_in_the_midst_of_a_save_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that stand in no list of the manifest are compared as well."""

    class WithState(torch.nn.Linear):
        inner = torch.zeros(5)

        def get_extra_state(self) -> Any:
            return {"inner": [self.inner]}

        def set_extra_state(self, state: Any) -> None:
            self.inner = state["inner"][0]

    looked_at = threading.Event()

    def look(data: memoryview, dtype: str) -> Any:
        found = examine_memory(data, dtype)
        if len(data) == 20:
            looked_at.set()
        return found

    class Changes(FileSystem):
        def open_write(self, path: Path) -> BinaryIO:
            if path.name.endswith("_model.th"):
                file = super().open_write(path)
                assert looked_at.wait(60)
                module.inner.add_(1)
                return file
            return super().open_write(path)

    module = WithState(2, 2)
    paths = PathProvider(tmp_path, "run")
    CheckpointWriter(paths, flat_names=True).save(bind(module, "net"), at(1))
    monkeypatch.setattr(watch_module, "examine_memory", look)
    with pytest.raises(CheckpointWriteError, match=r"_extra_state\.inner\.0 .*changed while"):
        CheckpointWriter(paths, storage=Changes(), flat_names=True).save(bind(module, "net"), at(2))


SAVE_IN_HANDLER = """
import os, signal, sys, time, torch
from pathlib import Path
from noether_init_core import CheckpointWriteError, CheckpointWriter, PathProvider, TrainingIteration, bind
from noether_init_core.files.storage.disk import FileSystem

paths = PathProvider(Path(sys.argv[1]), "run")
model = bind(torch.nn.Linear(2, 2), "net")
outcome = []
waits = []
time.sleep = waits.append  # whoever waits for a lock asks again after a while

def handler(number, frame):
    try:
        CheckpointWriter(paths).save(model, TrainingIteration(2, 2, 2))
    except CheckpointWriteError as error:
        outcome.append(f"{len(waits)} waits: {error}")

class Interrupted(FileSystem):
    def fsync(self, file):
        if file.name.endswith("_model.th"):
            os.kill(os.getpid(), signal.SIGTERM)
        super().fsync(file)

signal.signal(signal.SIGTERM, handler)
CheckpointWriter(paths, storage=Interrupted()).save(model, TrainingIteration(1, 1, 1))
print(*outcome)
CheckpointWriter(paths).save(model, TrainingIteration(3, 3, 3))
"""


def test_a_save_in_a_handler_of_signals_is_refused_at_once(tmp_path: Path) -> None:
    """It would wait for itself. The save that it came in the midst of is finished, and the next one works."""
    child = python(SAVE_IN_HANDLER, tmp_path)
    output, errors = child.communicate(timeout=900)
    assert child.returncode == 0, errors
    assert output.startswith("0 waits: E2_U2_S2 of run run was not saved")
    assert "this thread is already saving" in output
    assert "set a flag" in output
    assert [found.name for found in Snapshot(PathProvider(tmp_path, "run")).sets()] == ["E1_U1_S1", "E3_U3_S3"]


def test_two_threads_of_one_process_wait_for_each_other(tmp_path: Path) -> None:
    """Only a thread that waits for itself is told so; a link to the folder is the same folder."""
    real = PathProvider(tmp_path / "real", "run")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    inside, others = threading.Event(), list[threading.Thread]()

    class Slow(FileSystem):
        def make_read_only(self, path: Path) -> None:
            inside.set()
            if not others:
                thread = threading.Thread(
                    target=CheckpointWriter(PathProvider(tmp_path / "link", "run"), flat_names=True).save,
                    args=(model_of(2), at(2)),
                )
                others.append(thread)
                thread.start()
            super().make_read_only(path)

    CheckpointWriter(real, storage=Slow(), flat_names=True).save(model_of(1), at(1))
    others[0].join(60)
    assert assert_all_good(real) == {"E1_U10_S100": 1, "E2_U20_S200": 2}


def test_writers_in_two_threads_write_checksums_whatever_torch_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some releases of torch keep that choice for the whole process: nobody puts it back while another one writes."""
    option = {"crc": False}
    monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: option["crc"])
    monkeypatch.setattr(torch.serialization, "set_crc32_options", lambda value: option.update(crc=value))
    original = torch.save
    seen: list[bool] = []
    first_is_in, go_on = threading.Event(), threading.Event()

    def save(*arguments: Any) -> None:
        if threading.current_thread().name == "first" and not first_is_in.is_set():
            first_is_in.set()
            go_on.wait(2)  # as long as the other one may take to come in, if nothing holds it up
        seen.append(option["crc"])
        original(*arguments)
        seen.append(option["crc"])

    monkeypatch.setattr(torch, "save", save)

    def write(name: str) -> None:
        CheckpointWriter(PathProvider(tmp_path, name), flat_names=True).save(model_of(1), at(1))
        go_on.set()

    threads = [threading.Thread(target=write, args=(name,), name=name) for name in ("first", "second")]
    threads[0].start()
    assert first_is_in.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert seen == [True] * 8
    assert option["crc"] is False
    for name in ("first", "second"):
        assert assert_all_good(PathProvider(tmp_path, name)) == {"E1_U10_S100": 1}


def test_a_file_without_checksums_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may have its own way with torch's choice; then nothing proves the bytes."""
    original = torch.save

    def save(*arguments: Any) -> None:
        torch.serialization.set_crc32_options(False)
        original(*arguments)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(CheckpointWriteError, match="written without checksums"):
        CheckpointWriter(PathProvider(tmp_path, "run"), flat_names=True).save(model_of(1), at(1))
    assert Snapshot(PathProvider(tmp_path, "run")).sets() == ()


class StateOf:
    """A trainer with a given state."""

    def __init__(self, state: dict[Any, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[Any, Any]:
        return self.state


@pytest.mark.parametrize(
    "state",
    [
        {"state_dict": {"a": torch.ones(2), "of": {"b": torch.ones(3)}}},
        {"a.b": torch.ones(2), "a": {"b": torch.zeros(3)}},
        {"a": {0: torch.ones(2), "0": torch.zeros(3)}},
        {"a": {1.5: [torch.ones(1)], (1, "x"): torch.ones(2), None: {"": torch.ones(3)}}},
        {"": {"a": torch.ones(2)}, "a": torch.ones(3)},
    ],
)
def test_states_with_keys_of_every_kind_are_saved_and_read(tmp_path: Path, state: dict[Any, Any]) -> None:
    """Writer and reader name tensors by one function, also where two paths look the same."""
    paths = PathProvider(tmp_path, "run")
    found = CheckpointWriter(paths, flat_names=True).save(model_of(1), at(1), trainer=StateOf(state))
    file = found.file("mlp", "trainer")
    assert file is not None
    with open_checkpoint(file.path, digests=found.digests_of(file)) as reader:
        reader.verify()
        loaded = reader.load()
    truth = torch.load(file.path, weights_only=True)
    assert repr(loaded) == repr(dict(truth))
    assert {key: repr(loaded[key]) for key in state} == {key: repr(value) for key, value in state.items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"state_dict": {0: torch.ones(2)}}, r"trainer\.state_dict: the key 0 is not a string"),
        (
            {"a": (weights := torch.ones(2)), "b": [weights.view(torch.int32)]},
            r"trainer\.b\.0: a torch\.int32 in the same memory as trainer\.a",
        ),
    ],
)
def test_states_that_no_file_can_hold_are_refused_beforehand(
    tmp_path: Path, state: dict[Any, Any], message: str
) -> None:
    """With the place, and before a folder is made."""
    paths = PathProvider(tmp_path, "run")
    with pytest.raises(CheckpointFormatError, match=message):
        CheckpointWriter(paths, flat_names=True).save(model_of(1), at(1), trainer=StateOf(state))
    assert not paths.checkpoint_path.exists()


def test_versions_of_modules_that_could_not_be_read_are_refused_beforehand(tmp_path: Path) -> None:
    """The reader refuses a state dict whose ``_metadata`` holds tensors, so none is written."""
    module = torch.nn.Linear(2, 2)
    module._register_state_dict_hook(lambda module, state, prefix, metadata: metadata.update(scale=torch.ones(1)))
    with pytest.raises(CheckpointFormatError, match=r"_metadata.*other than a dict of plain values"):
        CheckpointWriter(PathProvider(tmp_path, "run"), flat_names=True).save(bind(module, "net"), at(1))


def test_what_torch_itself_refuses_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare error of torch says neither which file nor that nothing was lost."""

    def save(*arguments: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(CheckpointWriteError, match=r"torch\.save refuses mlp_cp=E1.*no such luck.*not committed"):
        CheckpointWriter(PathProvider(tmp_path, "run"), flat_names=True).save(model_of(1), at(1))
