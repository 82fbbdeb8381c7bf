"""The inputs of checks: tiny models of every shape, a saved run, and answers about what a kind can do."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from noether_init_core.errors import InitError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import bind, compose, leaf_models
from noether_init_core.paths import PathProvider
from noether_init_core.saving.writer import CheckpointWriter

_OLDER, _NEWEST = TrainingIteration(1, 4, 32), TrainingIteration(2, 8, 64)
_SOURCE_SEED, _OLDER_SEED = 1, 3
_NUMBER = 7
#: The seed of the model to initialize, and the number of its trainer and callback.
MODEL_SEED, _OWN_NUMBER = 2, 3

Change = Callable[[torch.nn.Module], object]


def _as_it_is(module: torch.nn.Module) -> None:
    """Change nothing."""


def _plain(**more: torch.nn.Module) -> torch.nn.Sequential:
    """A model with a matrix, a bias, and a scale."""
    return torch.nn.Sequential(OrderedDict(embed=torch.nn.Linear(4, 3), norm=torch.nn.LayerNorm(3), **more))


def _in_single_precision() -> torch.nn.Sequential:
    """A model that also has a square matrix, which fits transposed too."""
    return _plain(square=torch.nn.Linear(3, 3, bias=False))


def _with_half_precision() -> torch.nn.Sequential:
    """The same, with an entry in half precision."""
    module = _in_single_precision()
    module.coarse = torch.nn.Parameter(torch.empty(5, dtype=torch.bfloat16))
    return module


def _precise() -> torch.nn.Sequential:
    """A model with values that no float32 holds: fractions, complex numbers, large whole numbers, truth values."""
    module = _plain()
    module.fine = torch.nn.Parameter(torch.empty(3, dtype=torch.float64))
    module.wave = torch.nn.Parameter(torch.empty(2, dtype=torch.complex64))
    module.register_buffer("seen", 2**53 + torch.randint(1, 2**20, (2,)) * 2 + 1)
    module.register_buffer("chosen", torch.rand(8) < 0.5)
    return module


def _strided(*, is_dense: bool = False) -> torch.nn.Sequential:
    """A model with a transposed matrix, and two parameters within one block of memory; ``is_dense``: each by itself."""
    module, block = _plain(), torch.zeros(16)
    turned, first, second = torch.empty(4, 3).t(), block[:6].view(2, 3), block[8:14].view(3, 2)
    for name, one in {"turned": turned, "first": first, "second": second}.items():
        module.register_parameter(name, torch.nn.Parameter(torch.empty(one.shape) if is_dense else one))
    return module


def _tied() -> torch.nn.Sequential:
    """A model whose embedding and head have the same matrix."""
    embed, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    return torch.nn.Sequential(OrderedDict(embed=embed, head=head))


def _buffers() -> torch.nn.Sequential:
    """A model without parameters: running statistics, a counter, an infinite mask, and a non-persistent buffer."""
    norm = torch.nn.BatchNorm1d(3, affine=False)
    module = torch.nn.Sequential(OrderedDict(norm=norm))
    module.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.0]))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr]  # there with track_running_stats
        norm.num_batches_tracked.fill_(int(torch.randint(1, 100, ())))  # type: ignore[union-attr]
    return module


def _single(name: str, module: torch.nn.Module, **more: Any) -> Any:
    """A bound model with random values in every entry, and an optimizer after one step."""
    parameters = [one for one in module.parameters() if one.is_floating_point() or one.is_complex()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_()
    if not parameters:
        return bind(module, name=name, **more)
    # a learning rate that differs between seeds, so that a check sees whose it is
    optimizer = torch.optim.AdamW(parameters, lr=0.01 + 0.01 * float(torch.rand(())))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return bind(module, name=name, optimizer=optimizer, **more)


def _composite(change: Change = _as_it_is) -> Any:
    """Two models and one that is absent; ``change`` is for the second one."""
    decoder = _plain()
    change(decoder)
    return compose(
        "pair", {"encoder": _single("encoder", _plain()), "absent": None, "decoder": _single("decoder", decoder)}
    )


def _nested() -> Any:
    inner = compose("inner", {"first": _single("first", _plain()), "second": _single("second", _plain())})
    return compose("outer", {"inner": inner, "head": _single("head", _plain())})


def _frozen() -> Any:
    model = _single("net", _plain(), is_frozen=True)
    model.module.requires_grad_(False)
    return model


#: Shape of a single model -> function that makes its module with the global generator.
_MODULES: Mapping[str, Callable[[], torch.nn.Module]] = {
    "single": _with_half_precision,
    "single_precision": _in_single_precision,
    "meta_device": _plain,
    "tied": _tied,
    "buffers": _buffers,
    "precise": _precise,
    "strided": _strided,
}
#: Shape -> function that makes a model of that shape with the global generator.
SHAPES: Mapping[str, Callable[[], Any]] = {
    "composite": _composite,
    "nested": _nested,
    "frozen": _frozen,
    **{shape: functools.partial(lambda make: _single("net", make()), make) for shape, make in _MODULES.items()},
}


def new_model(shape: str, seed: int, *, on_meta: bool | None = None, is_dense: bool = False) -> Any:
    """A model of a shape in ``SHAPES``, with every value from ``seed``; the global generator is restored.

    Args:
        shape: A key of ``SHAPES``.
        seed: Models of different seeds differ in every entry.
        on_meta: Whether it is on the meta device, without an optimizer; None: if the shape is ``meta_device``.
        is_dense: Whether every entry is contiguous and has memory of its own, also for the shape ``strided``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if on_meta or (on_meta is None and shape == "meta_device"):
            with torch.device("meta"):
                return bind(_plain(), name="net")
        return _single("net", _strided(is_dense=True)) if is_dense and shape == "strided" else SHAPES[shape]()


def changed_model(shape: str, seed: int, change: Change) -> Any:
    """A model of a shape whose module ``change`` changed before it got an optimizer; of a composite, the last one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if shape == "composite":
            return _composite(change)
        module = _MODULES[shape]()
        change(module)
        return _single("net", module)


def add_extra_parameter(module: torch.nn.Module) -> None:
    """Add a parameter ``extra``, which is in no source."""
    module.register_parameter("extra", torch.nn.Parameter(torch.empty(3)))


def leaf_state(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the state dict of a single model, with memory of its own."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Counter:
    """A callback whose state is one number."""

    checkpoint_key = "counter"

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.number = state_dict["number"]


class NumberedTrainer:
    """A trainer whose state is one number, and the states of its callbacks."""

    def __init__(self, number: int = 0, callbacks: tuple[Counter, ...] = ()) -> None:
        self.number = number
        self.callbacks = callbacks

    def state_dict(self) -> dict[str, Any]:
        states = {callback.checkpoint_key: callback.state_dict() for callback in self.callbacks}
        return {"number": self.number, "callback_state_dicts": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.number = state_dict["number"]


def new_training() -> dict[str, Any]:
    """A trainer and callbacks as they are before an initialization."""
    return {"trainer": NumberedTrainer(_OWN_NUMBER), "callbacks": [Counter(_OWN_NUMBER)]}


@attrs.frozen(eq=False)
class SavedRun:
    """A run on disk, and the same weights as plain files.

    Attributes:
        paths: The folders of the run. It has two committed sets with different weights; a kind should use the newest.
        iteration: Of the newest set.
        state: Path of a single model (``net``, ``pair.encoder``) -> name -> tensor, of the newest set.
        optimizer: Path of a single model -> state dict of its optimizer.
        number: The state of the trainer and of the callback in the newest set.
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
        """The plain file of the single model; for a composite, that of the first model."""
        return next(iter(self.files.values()))


@attrs.frozen(eq=False)
class Case:
    """The input of one initialization.

    Attributes:
        shape: A key of ``SHAPES``.
        model: The model to initialize; it differs from the source in every entry.
        source: A run on disk of a model of the same shape.
        paths: The run that is started; that of the source for kinds that continue a run.
        folder: An empty folder for files of a config.
        trainer: The trainer to initialize, with another number than that of the source.
        callbacks: One callback, also with another number.
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
        error: The class of the error; ``InitError`` for any of its subclasses.
        message: A part of the message, such as the wrong name; empty for any message.
    """

    what: str
    config: Mapping[str, Any]
    error: type[InitError] = InitError
    message: str = ""


@attrs.frozen
class Answer:
    """Whether a kind can do something. ``reason`` is why not, for readers of the tests."""

    is_open: bool
    reason: str = ""


def open_() -> Answer:
    """The kind can do it; the kit checks that it does it right."""
    return Answer(True)


def closed(reason: str) -> Answer:
    """The kind cannot do it; the kit checks that it refuses, or does not change what it does not restore.

    Raises ``ValueError`` without a reason.
    """
    if not reason.strip():
        raise ValueError('closed("...") needs a reason: why the kind cannot do it')
    return Answer(False, reason)


def saved_run(
    folder: Path,
    shape: str = "single",
    run_id: str = "source",
    *,
    seeds: tuple[int, int] = (_OLDER_SEED, _SOURCE_SEED),
    change: Callable[[Any], object] = _as_it_is,
) -> SavedRun:
    """Save a run with two sets, and its weights as plain files, below ``folder``, which must not hold one already.

    Args:
        folder: Gets the folders ``runs`` and ``files``.
        shape: A key of ``SHAPES``.
        run_id: The id of the run.
        seeds: Of the values of the older set, and of the newest.
        change: Function that changes each model before it is saved.
    """
    paths = PathProvider(folder / "runs", run_id)
    for seed, iteration in zip(seeds, (_OLDER, _NEWEST), strict=True):
        model = new_model(shape, seed, on_meta=False, is_dense=True)
        change(model)
        number = _NUMBER if iteration == _NEWEST else _NUMBER + 1
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
