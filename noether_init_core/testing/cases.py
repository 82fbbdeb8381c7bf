"""What a check works on: a model, a run on disk that it may be initialized from, and what a kind can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from noether_init_core.errors import InitError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import leaf_models
from noether_init_core.paths import PathProvider
from noether_init_core.saving.writer import CheckpointWriter
from noether_init_core.testing.models import Counter, NumberedTrainer, leaf_state, new_model

_OLDER, _NEWEST = TrainingIteration(1, 4, 32), TrainingIteration(2, 8, 64)
_SOURCE_SEED, _OLDER_SEED = 1, 3
_NUMBER = 7


@attrs.frozen(eq=False)
class SavedRun:
    """A run on disk, and the same weights as plain files.

    Attributes:
        paths: The folders of the run. It has two committed sets with other weights each; the newest is meant.
        iteration: Of the newest set.
        state: Path of a single model (``net``, ``pair.encoder``) -> name -> tensor, of the newest set.
        optimizer: Path of a single model -> state dict of its optimizer.
        number: What the trainer and the callback of the newest set hold.
        files: Path of a single model -> a file with its state dict as ``torch.save`` writes it.
    """

    paths: PathProvider
    iteration: TrainingIteration
    state: Mapping[str, Mapping[str, torch.Tensor]] = attrs.field(repr=False)
    optimizer: Mapping[str, Mapping[str, Any]] = attrs.field(repr=False)
    number: int
    files: Mapping[str, Path]

    @property
    def run_id(self) -> str:
        """The id of the run."""
        return self.paths.run_id

    @property
    def file(self) -> Path:
        """The plain file of a single model; of several, that of the first."""
        return next(iter(self.files.values()))


@attrs.frozen(eq=False)
class Case:
    """One initialization that a check makes.

    Attributes:
        shape: ``single``, ``composite``, ``nested``, ``frozen``, ``meta_device``, ``tied`` or ``buffers``.
        model: The model to initialize; it differs from the source in every entry.
        source: A run on disk of a model of the same shape.
        paths: The run that is started; the source's own for kinds that continue one.
        folder: An empty folder for whatever a config needs.
        trainer: The trainer that is initialized, with another number than the source's.
        callbacks: One callback, likewise.
    """

    shape: str
    model: Any
    source: SavedRun
    paths: PathProvider
    folder: Path
    trainer: NumberedTrainer
    callbacks: list[Counter]


@attrs.frozen(eq=False)
class Wrong:
    """A config that must be refused before anything changes.

    Attributes:
        what: What is wrong, in a few words.
        config: The config, without its kind.
        error: The class of the error; ``InitError`` where any of ours will do.
        message: A part of the message, such as the name that is wrong; empty: any.
    """

    what: str
    config: Mapping[str, Any]
    error: type[InitError] = InitError
    message: str = ""


@attrs.frozen
class Answer:
    """Whether a kind can do something. ``reason`` says why not, for people who read the tests."""

    is_open: bool
    reason: str = ""


def open_() -> Answer:
    """The kind can do it; the kit looks whether it does it right."""
    return Answer(True)


def closed(reason: str) -> Answer:
    """The kind does not do it; the kit looks whether it refuses, or leaves alone what it does not restore.

    Raises ``ValueError`` without a reason.
    """
    if not reason.strip():
        raise ValueError('closed("...") needs the reason: readers want to know why the kind cannot do it')
    return Answer(False, reason)


def saved_run(folder: Path, shape: str = "single", run_id: str = "source") -> SavedRun:
    """Save a run with two sets, and its weights as plain files, below ``folder``. Not twice into one folder."""
    paths = PathProvider(folder / "runs", run_id)
    for seed, iteration in ((_OLDER_SEED, _OLDER), (_SOURCE_SEED, _NEWEST)):
        model = new_model(shape, seed, on_meta=False)
        number = _NUMBER if seed == _SOURCE_SEED else _NUMBER + 1
        trainer = NumberedTrainer(number, (Counter(number),))
        CheckpointWriter(paths, flat_names=False).save(model, iteration, trainer=trainer)
    files = {}
    for path, leaf in leaf_models(model):
        files[path] = folder / "files" / f"{path}.pt"
        files[path].parent.mkdir(exist_ok=True)
        torch.save(leaf.state_dict(), files[path])
    leaves = dict(leaf_models(model))
    return SavedRun(
        paths,
        _NEWEST,
        {path: leaf_state(leaf) for path, leaf in leaves.items()},
        {path: leaf.optimizer.state_dict() for path, leaf in leaves.items() if leaf.optimizer is not None},
        _NUMBER,
        files,
    )
