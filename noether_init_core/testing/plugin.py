"""Fixtures of the kit, and what it does to the tests that pytest has collected."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from noether_init_core import kinds
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.paths import PathProvider
from noether_init_core.testing.cases import Case, Counter, NumberedTrainer, SavedRun, new_model, saved_run
from noether_init_core.testing.checks import Checks

_MODEL_SEED = 2
_OWN_NUMBER = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expected failures become strict: one that passes is an error."""
    for item in items:
        cls = getattr(item, "cls", None)
        if isinstance(cls, type) and issubclass(cls, Checks):
            reason = cls.expected_failures.get(getattr(item, "originalname", item.name))
            if reason is not None:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(scope="session")
def _saved_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], SavedRun]:
    """Gives a copy of a saved run: each shape is saved once."""
    made: dict[str, tuple[Path, SavedRun]] = {}

    def copied(shape: str, folder: Path) -> SavedRun:
        if shape not in made:
            original = tmp_path_factory.mktemp(f"saved-{shape}")
            made[shape] = original, saved_run(original, shape)
        original, run = made[shape]
        shutil.copytree(original, folder, dirs_exist_ok=True)
        return attrs.evolve(
            run,
            paths=PathProvider(folder / "runs", run.run_id),
            files={path: folder / file.relative_to(original) for path, file in run.files.items()},
        )

    return copied


@pytest.fixture
def case_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the cases of one test, apart from ``tmp_path``, which is the author's."""
    return tmp_path_factory.mktemp("cases")


@pytest.fixture
def source_run(case_folder: Path, _saved_once: Callable[[str, Path], SavedRun]) -> Callable[..., SavedRun]:
    """Makes runs on disk: ``source_run("composite")``; each call gives another one, in a folder of its own."""

    def make(shape: str = "single") -> SavedRun:
        return _saved_once(shape, _another_folder(case_folder))

    return make


def _another_folder(parent: Path) -> Path:
    folder = parent / f"{len(list(parent.iterdir()))}"
    folder.mkdir()
    return folder


@pytest.fixture
def new_case(
    request: pytest.FixtureRequest, case_folder: Path, _saved_once: Callable[[str, Path], SavedRun]
) -> Callable[..., Case]:
    """Makes cases: ``new_case("single")``; a model given as ``model`` is used instead of a new one."""
    cls = request.cls
    continues = isinstance(cls, type) and issubclass(cls, Checks) and cls.continues.is_open

    def make(shape: str, model: Any = None) -> Case:
        folder = _another_folder(case_folder)
        (folder / "config").mkdir()
        source = _saved_once(shape, folder)
        return Case(
            shape,
            new_model(shape, _MODEL_SEED) if model is None else model,
            source,
            source.paths if continues else source.paths.with_run("started"),
            folder / "config",
            NumberedTrainer(_OWN_NUMBER),
            [Counter(_OWN_NUMBER)],
        )

    return make


@pytest.fixture
def broken_runs(source_run: Callable[..., SavedRun]) -> Mapping[str, SavedRun]:
    """Runs that nothing may be loaded from, by what is wrong with them.

    ``flipped bit``: one bit of the weights' data. ``truncated``: the end of the weights is missing. ``uncommitted``: no
    manifest. ``without weights``: the file of the weights is gone. ``empty``: a run folder without checkpoints. Plain
    files are broken alike (``uncommitted``: they are gone).
    """
    found = {what: source_run() for what in ("flipped bit", "truncated", "uncommitted", "without weights", "empty")}
    flipped, truncated, uncommitted, without_weights, empty = found.values()
    # the first tensor of this dtype; of the older set, with other values, somewhere in the middle of the file
    needle = next(one for one in flipped.state["net"].values() if one.dtype == torch.float32).numpy().tobytes()
    for path in _weights(flipped):
        data = bytearray(path.read_bytes())
        place = data.find(needle)
        data[place if place >= 0 else len(data) // 2] ^= 0x40
        _rewrite(path, bytes(data))
    for path in _weights(truncated):
        _rewrite(path, path.read_bytes()[:-100])
    for path in (
        *uncommitted.paths.checkpoint_path.glob("sets/*/manifest.json"),
        *uncommitted.files.values(),
        *_weights(without_weights),
        *empty.files.values(),
    ):
        path.unlink()
    shutil.rmtree(empty.paths.checkpoint_path)
    return found


def _weights(run: SavedRun) -> list[Path]:
    return [*sorted(run.paths.checkpoint_path.glob("sets/*/*_model.th")), *run.files.values()]


def _rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.fixture
def isolated_kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry with discovery switched off: no installed kind is known, only what the test registers."""
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_where: ())
    kinds.clear_cache()
    yield
    kinds.clear_cache()


@pytest.fixture
def temporary_kind() -> Iterator[Callable[[str, type[InitializerBase]], None]]:
    """Registers kinds for one test: ``temporary_kind("mine", MyInitializer)``; they are taken back at its end."""
    names: list[str] = []

    def register(name: str, cls: type[InitializerBase]) -> None:
        kinds.register(name, cls)
        names.append(name)

    yield register
    for name in names:
        kinds.unregister(name)
