"""Fixtures of the kit, and its changes to the tests that pytest has collected."""

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
from noether_init_core.testing.cases import MODEL_SEED, Case, SavedRun, new_model, new_training, saved_run
from noether_init_core.testing.checks import Checks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the expected failures of a kind as strict: if such a check passes, that is an error."""
    for item in items:
        cls = getattr(item, "cls", None)
        if isinstance(cls, type) and issubclass(cls, Checks):
            reason = cls.expected_failures.get(getattr(item, "originalname", item.name))
            if reason is not None:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(scope="session")
def _saved_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], SavedRun]:
    """A function that copies a saved run; each shape is saved only once per session."""
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
    """A folder for the cases of one test, separate from ``tmp_path``, which the author uses."""
    return tmp_path_factory.mktemp("cases")


@pytest.fixture
def source_run(case_folder: Path, _saved_once: Callable[[str, Path], SavedRun]) -> Callable[..., SavedRun]:
    """A function that makes runs on disk, each in its own folder: ``source_run("composite")``.

    Other arguments are those of ``saved_run``.
    """

    def make(shape: str = "single", **more: Any) -> SavedRun:
        folder = _another_folder(case_folder)
        return saved_run(folder, shape, **more) if more else _saved_once(shape, folder)

    return make


def _another_folder(parent: Path) -> Path:
    folder = parent / f"{len(list(parent.iterdir()))}"
    folder.mkdir()
    return folder


@pytest.fixture
def new_case(
    request: pytest.FixtureRequest, case_folder: Path, _saved_once: Callable[[str, Path], SavedRun]
) -> Callable[..., Case]:
    """A function that makes cases: ``new_case("single")``; ``model`` and ``source`` replace the new ones."""
    cls = request.cls if isinstance(request.cls, type) and issubclass(request.cls, Checks) else Checks

    def make(shape: str, model: Any = None, source: SavedRun | None = None) -> Case:
        folder, real_shape = _another_folder(case_folder), cls.real_shape(shape)
        if source is None:
            source = _saved_once(real_shape, folder)
        else:
            folder = source.paths.output_root.parent
        (folder / "config").mkdir()
        return Case(
            shape,
            new_model(real_shape, MODEL_SEED) if model is None else model,
            source,
            source.paths if cls.continues.is_open else source.paths.with_run("started"),
            folder / "config",
            **new_training(),
        )

    return make


@pytest.fixture
def broken_runs(source_run: Callable[..., SavedRun]) -> Mapping[str, SavedRun]:
    """Runs from which nothing may be loaded, by what is wrong with them.

    ``flipped bit``: one bit of the weights differs. ``truncated``: the end of the weights is missing. ``uncommitted``:
    no manifest. ``without weights``: the file of the weights was removed. ``empty``: a run folder without checkpoints.
    The plain files are broken in the same way; for ``uncommitted`` they were removed.
    """
    found = {what: source_run() for what in ("flipped bit", "truncated", "uncommitted", "without weights", "empty")}
    flipped, truncated, uncommitted, without_weights, empty = found.values()
    # flip a bit in the first float32 tensor; the older set has other values, so flip one in the middle of its file
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
    """A registry without discovery: no installed kind is known, only those that the test registers."""
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_where: ())
    kinds.clear_cache()
    yield
    kinds.clear_cache()


@pytest.fixture
def temporary_kind() -> Iterator[Callable[[str, type[InitializerBase]], None]]:
    """A function that registers kinds for one test: ``temporary_kind("mine", MyInitializer)``."""
    names: list[str] = []

    def register(name: str, cls: type[InitializerBase]) -> None:
        kinds.register(name, cls)
        names.append(name)

    yield register
    for name in names:
        kinds.unregister(name)
