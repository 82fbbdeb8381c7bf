"""Flat names for Noether beside committed sets: what the writer replaces and removes, and what it never does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import bind
from noether_init_core.paths import PathProvider
from noether_init_core.saving.writer import CheckpointWriter
from noether_init_core.sets.snapshot import Snapshot

FOREIGN = b"the only copy of a save of another program"


def save(paths: PathProvider, epoch: int, *, storage: FileSystem | None = None, **options: Any) -> None:
    """One set of a tiny model, with flat names."""
    module = torch.nn.Linear(1, 1)
    model = bind(module, name="mlp", optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    tags = options.pop("tags", ("latest", "last", "best_model.loss"))
    writer = CheckpointWriter(paths, flat_names=True, storage=storage or FileSystem(), **options)
    writer.save(model, TrainingIteration(epoch, epoch, epoch), tags=tags)


def write(path: Path) -> None:
    """As another program does: into a new file, or in place."""
    path.unlink(missing_ok=True)
    path.write_bytes(FOREIGN)


def write_in_place(path: Path) -> None:
    if path.exists():
        path.chmod(0o644)
        path.write_bytes(FOREIGN.ljust(path.stat().st_size, b"."))
    else:
        path.write_bytes(FOREIGN)


def link(path: Path) -> None:
    """A link to a file elsewhere, which may be the only name that anybody knows."""
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    elsewhere.write_bytes(FOREIGN)
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)


def dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent / "nowhere")


def state_of(path: Path) -> tuple[Any, ...]:
    found = path.lstat()
    return found.st_ino, found.st_mtime_ns, path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("make", [write, write_in_place, link, dangling])
@pytest.mark.parametrize("part", ["model", "optim", "trainer"])
@pytest.mark.parametrize("tag", ["latest", "best_model.loss", "E2_U2_S2"])
def test_a_file_of_another_program_stays(
    paths: PathProvider,
    caplog: pytest.LogCaptureFixture,
    tag: str,
    part: str,
    make: Callable[[Path], None],
) -> None:
    """Whatever it is, and whether or not a file of ours was there; the other tags are refreshed."""
    save(paths, 1)
    foreign = paths.checkpoint_path / f"mlp_cp={tag}_{part}.th"
    make(foreign)
    before = state_of(foreign)
    save(paths, 2)
    save(paths, 3, keep_last=1)
    assert state_of(foreign) == before
    assert str(foreign) in caplog.text
    last = torch.load(paths.checkpoint_path / "mlp_cp=last_model.th")
    assert last["training_iteration"]["epoch"] == 3
    assert [one.name for one in Snapshot(paths).sets()][-1] == "E3_U3_S3"


def test_the_files_of_a_tag_stay_together(paths: PathProvider) -> None:
    """Our trainer file beside weights of another program would be one set for Noether, so none of them is written."""
    folder = paths.checkpoint_path
    folder.mkdir(parents=True)
    write(folder / "mlp_cp=latest_model.th")
    save(paths, 1)
    assert sorted(path.name for path in folder.glob("*_cp=latest_*")) == ["mlp_cp=latest_model.th"]


class Meanwhile(FileSystem):
    """Another program writes a file right before a step of ours."""

    def __init__(self, step: str, path: Path) -> None:
        self.step, self.path = step, path

    def _meet(self, step: str, target: Path) -> None:
        if step == self.step and (step != "rename_new" or target == self.path):
            self.step = ""
            write(self.path)

    def copy(self, source: Path, target: Path) -> None:
        self._meet("copy", target)
        super().copy(source, target)

    def rename(self, source: Path, target: Path) -> None:
        if target.name == ".noether-init-flat.json":
            self._meet("rename", target)
        super().rename(source, target)

    def rename_new(self, source: Path, target: Path) -> bool:
        self._meet("rename_new", target)
        return super().rename_new(source, target)

    def reflink(self, source: Path, target: Path) -> bool:
        return False


@pytest.mark.parametrize("step", ["copy", "rename", "rename_new"])
@pytest.mark.parametrize("part", ["model", "optim", "trainer"])
def test_a_file_that_is_written_while_ours_is_prepared_stays(paths: PathProvider, step: str, part: str) -> None:
    """Up to the last step: a name is given only where there is none."""
    save(paths, 1)
    path = paths.checkpoint_path / f"mlp_cp=latest_{part}.th"
    save(paths, 2, storage=Meanwhile(step, path), tags=("latest",))
    assert path.read_bytes() == FOREIGN
    assert not list(paths.checkpoint_path.glob("*.tmp"))


class KilledError(BaseException):
    """The process ends here: nothing is cleaned up."""


class Killed(FileSystem):
    """Ends at the step with this number, and does nothing from then on."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def _step(self) -> None:
        self.steps += 1
        if self.at and self.steps >= self.at:
            raise KilledError


def _killed(name: str) -> Callable[..., Any]:
    def step(self: Killed, *arguments: Any) -> Any:
        self._step()
        return getattr(FileSystem, name)(self, *arguments)

    return step


for _name in ("open_write", "rename", "rename_new", "unlink", "remove_folder", "hardlink", "copy", "make_folder"):
    setattr(Killed, _name, _killed(_name))


def test_copies_that_a_kill_leaves_are_collected(tmp_path: Path) -> None:
    """After a kill at any step and two saves, each flat file is a copy of a set that is there."""

    def leftovers(paths: PathProvider) -> list[str]:
        there = {f"E{n}_U{n}_S{n}" for n in (int(one.name[1]) for one in Snapshot(paths).sets())}
        tags = {path.name.partition("_cp=")[2].rpartition("_")[0] for path in paths.checkpoint_path.glob("*.th")}
        temporary = [path.name for path in paths.checkpoint_path.glob("*.tmp")]
        return [*(tags - there - {"latest", "last"}), *temporary]

    def attempt(at: int) -> Killed:
        paths, storage = PathProvider(tmp_path / str(at), "run"), Killed(at)
        for epoch in (1, 2, 3):
            save(paths, epoch, keep_last=2, tags=("latest",))
        with contextlib.suppress(KilledError):
            save(paths, 4, storage=storage, keep_last=2, tags=("latest",))
        for epoch in (5, 6, 7):
            save(paths, epoch, keep_last=2, tags=("latest",))
        assert leftovers(paths) == [], at
        latest = torch.load(paths.checkpoint_path / "mlp_cp=latest_model.th")
        assert latest["training_iteration"]["epoch"] == 7, at
        return storage

    steps = attempt(0).steps
    assert steps > 30
    for at in range(1, steps + 1):
        attempt(at)
