"""What every check of the kit uses: the declarations of the author, the fixtures, and helpers.

The messages are complete without the details that pytest adds and cuts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import numpy as np
import pytest
import torch

from noether_init_core import kinds
from noether_init_core.errors import InitError, PartlyInitializedError
from noether_init_core.files.storage.artifact_cache import CACHE_VARIABLE
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.messages import listed
from noether_init_core.models import leaf_models
from noether_init_core.nested import equal
from noether_init_core.sets.provenance import InitReport
from noether_init_core.stack.members import prepare
from noether_init_core.stack.stack import InitializerStack
from noether_init_core.testing.cases import (
    MODEL_SEED,
    Answer,
    Case,
    SavedRun,
    Wrong,
    closed,
    new_model,
    new_training,
    open_,
)
from noether_init_core.testing.process_state import GENERATORS, state_of_process
from noether_init_core.testing.snapshots import differences, said, state_of_model, told, values_of_model

_SEED = 5

Config = Mapping[str, Any]
MakeConfig = Callable[[Case], Config]
Expected = Callable[[Case], Mapping[str, Mapping[str, torch.Tensor]]]
NewCase = Callable[..., Case]
NewRun = Callable[..., SavedRun]


class Checks:
    """The declarations of the author of a kind, and helpers for the checks."""

    #: The kind, as named in configs.
    kind: ClassVar[str]
    #: The distribution that registers it; None for one that is registered in this process only.
    distribution: ClassVar[str | None]
    #: Name of a check -> why it fails at present. If such a check passes, that is an error.
    expected_failures: ClassVar[Mapping[str, str]] = {}

    #: Composites of several submodels, some of which may be None.
    composites: ClassVar[Answer] = open_()
    #: Composites within composites.
    nested: ClassVar[Answer] = open_()
    #: Models that are frozen.
    frozen: ClassVar[Answer] = open_()
    #: Models on the meta device, which get memory.
    meta_device: ClassVar[Answer] = open_()
    #: Parameters with two names.
    tied: ClassVar[Answer] = open_()
    #: Models that have buffers and no parameter.
    buffers: ClassVar[Answer] = open_()
    #: Models with entries in half precision (bfloat16); if closed, the other checks use models without such entries.
    half_precision: ClassVar[Answer] = open_()
    #: Models with float64, complex64, int64 and bool entries.
    precise: ClassVar[Answer] = open_()
    #: Models with transposed parameters, and with several parameters in one block of memory.
    strided: ClassVar[Answer] = open_()
    #: The kind provides a plan; kinds that derive from SourceInitializer do.
    plans: ClassVar[Answer] = open_()
    #: The kind compares shapes and names of a model with its source, so that a model can be wrong.
    compares_models: ClassVar[Answer] = open_()
    #: Damaged bytes are found, by a checksum or a digest.
    verifies: ClassVar[Answer] = open_()
    #: The values are drawn, from a seed of the config or from the global generators; none is in a source.
    draws: ClassVar[Answer] = closed("the values come from the source")
    #: Values of another kind of dtype are converted on purpose: float to int, int to float.
    casts: ClassVar[Answer] = closed("values of another kind of dtype are refused")
    #: Some wrong configs are found only by ``check``.
    can_be_wrong: ClassVar[Answer] = open_()
    #: Every rank of a distributed run may use it.
    ranks: ClassVar[Answer] = open_()
    restores_optimizer: ClassVar[Answer] = closed("it restores weights only")
    restores_trainer: ClassVar[Answer] = closed("it restores weights only")
    restores_callbacks: ClassVar[Answer] = closed("it restores weights only")
    #: Training continues at the iteration of the source.
    continues: ClassVar[Answer] = closed("training starts at zero")
    needs_path_provider: ClassVar[Answer] = closed("it reads no run")

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        for name, value in vars(cls).copy().items():
            if isinstance(getattr(Checks, name, None), Answer):
                setattr(cls, name, answer_of(name, value))

    @classmethod
    def real_shape(cls, shape: str) -> str:
        """The shape that is used for ``shape``: without half precision, if the kind refuses that."""
        return shape if cls.half_precision.is_open or shape != "single" else "single_precision"

    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give each test its own cache, so that it neither fills the user's cache nor finds files of another test."""
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))

    @pytest.fixture
    def make_config(self) -> MakeConfig:
        """A function that returns the config, without its kind, to initialize ``case.model`` from ``case.source``."""
        raise NotImplementedError(
            f"{type(self).__name__} needs a fixture make_config: a callable that takes a Case and returns a config "
            "without its kind"
        )

    @pytest.fixture
    def wrong_configs(self, make_config: MakeConfig) -> Sequence[Wrong]:
        """Configs that are valid by themselves and that ``check`` must refuse."""
        return ()

    @pytest.fixture
    def secrets(self) -> Sequence[str]:
        """Secret texts behind the config, which must not occur in a report, a log or a representation."""
        return ()

    @pytest.fixture
    def expected(self) -> Expected:
        """A function that returns the expected values: path of a single model -> name -> tensor."""
        return lambda case: case.source.state

    @pytest.fixture
    def single(self, new_case: NewCase) -> Case:
        """A case of one single model."""
        return new_case("single")

    @pytest.fixture
    def single_config(self, single: Case, make_config: MakeConfig) -> Config:
        """The config, without its kind, for the case of one single model."""
        return make_config(single)

    # Helpers of the checks

    def make(
        self, case: Case, config: Mapping[str, Any], *, observers: Sequence[Any] = (), **more: Any
    ) -> InitializerStack:
        """A stack of this kind alone; ``case.paths`` is the run that is started."""
        configs = [{"kind": self.kind, **config, **more}]
        return InitializerStack.from_config(configs, path_provider=case.paths, observers=observers)

    def one(self, case: Case, config: Mapping[str, Any]) -> InitializerBase:
        """The initializer alone."""
        return kinds.create({"kind": self.kind, **config}, path_provider=case.paths)

    def initialize(self, case: Case, config: Mapping[str, Any], *, observers: Sequence[Any] = ()) -> InitReport:
        """Initialize the model, the trainer and the callbacks of the case."""
        return self.start(self.make(case, config, observers=observers), case)

    def start(self, stack: InitializerStack, case: Case) -> InitReport:
        """Initialize the case with a stack; for a kind that draws, from equal states of the global generators."""
        if self.draws.is_open:
            seed_generators(_SEED)
        return stack.initialize(case.model, trainer=case.trainer, callbacks=case.callbacks)

    def check(self, initializer: InitializerBase, case: Case) -> None:
        """Do what a stack does before the first change: ``check`` of the kind and its delegates, and their plans."""
        stack = InitializerStack([initializer])
        with stack._in_sessions():
            tuple(prepare(stack._members, case.model, (case.trainer, case.callbacks)))

    def again(self, case: Case) -> Case:
        """The case with a new model, trainer and callbacks, as the first ones were."""
        return attrs.evolve(case, model=new_model(self.real_shape(case.shape), MODEL_SEED), **new_training())

    def assert_weights(self, case: Case, expected: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Every entry of the state dict holds the expected bits, in the dtype of the model."""
        for path, leaf in leaf_models(case.model):
            state, wanted = leaf.state_dict(), expected[path]
            assert set(state) == set(wanted), told(
                f"the names of the entries of {path} changed: {listed(set(state) ^ set(wanted))}",
                "optimizers, wrappers and later checkpoints refer to entries by name",
                "write into the existing parameters and buffers",
            )
            for name, value in state.items():
                assert not value.is_meta, told(
                    f"{path}: {name} is still on the meta device",
                    "the training cannot start without values",
                    'give it memory and a value, or refuse such models and declare meta_device = closed("why")',
                )
                right = wanted[name].to(value.dtype)
                assert equal(value, right), told(
                    f"{path}: {name} has {_short(value)}, and {_short(right)} is right",
                    "the training would start from other weights, without an error",
                    "copy each entry by its name, bit for bit, in its dtype and strides; or return other values from "
                    "the fixture expected",
                )

    def assert_drawn(self, case: Case) -> None:
        """At least one entry has another value than before, and every value is finite."""
        fresh = dict(leaf_models(self.again(case).model))
        changed = False
        for path, leaf in leaf_models(case.model):
            for name, value in leaf.state_dict().items():
                old = fresh[path].state_dict()[name]
                changed = changed or value.is_meta is not old.is_meta or not equal(value, old)
                # masks may be infinite
                assert value.is_meta or not value.is_floating_point() or not value.isnan().any(), told(
                    f"{path}: {name} was drawn as {_short(value)}",
                    "NaN spreads to every weight in the first step",
                    "draw finite values",
                )
        assert changed, told(
            f"no entry of {case.model.name} changed",
            "the training would start from other weights than the config says, without an error",
            "draw the parameters in place, or raise an InitError in check()",
        )

    def assert_shape_is_served(self, answer: Answer, case: Case, make_config: MakeConfig, expected: Expected) -> None:
        """Open: the right values are loaded. Closed: an ``InitError`` is raised, and nothing has changed."""
        if not answer.is_open:
            with self.refused(case, f"the shape {case.shape} is closed ({answer.reason}), so it must be refused"):
                self.initialize(case, make_config(case))
            return
        with explained(
            f"the shape {case.shape}",
            "users have such models",
            f'serve it, or refuse it with an InitError in check() and declare {case.shape} = closed("why")',
        ):
            self.initialize(case, make_config(case))
        self.assert_right(case, expected)

    def assert_right(self, case: Case, expected: Expected) -> None:
        """The expected weights; for a kind that draws, new values."""
        if self.draws.is_open:
            self.assert_drawn(case)
        else:
            self.assert_weights(case, expected(case))

    @contextlib.contextmanager
    def refused(self, case: Case, what: str, error: type[InitError] = InitError) -> Iterator[None]:
        """The block must raise before anything of the case has changed."""
        before = self.everything(case)
        try:
            yield
        except Exception as caught:
            self.assert_early(caught, what, differences(before, self.everything(case)), error)
            return
        raise AssertionError(
            told(
                f"{what}: nothing was raised",
                "the training would start from other weights than the config asks for",
                "compare names, shapes and dtypes of the model with the source in check(), and raise an InitError",
            )
        )

    def assert_early(
        self, caught: Exception, what: str, changed: Sequence[str], error: type[InitError] = InitError
    ) -> None:
        """Assert that an error is of the right class, and was raised before anything had changed."""
        assert not changed, told(
            f"{what}: {said(caught)} was raised after these had changed: {listed(changed)}",
            "a failed initialization must leave everything as it was, so that the caller can go on",
            "read and verify everything in check(), before the first change",
        )
        assert not isinstance(caught, PartlyInitializedError), told(
            f"{what}: it was found only after the checks: {said(caught)}",
            "other initializers of the stack may have changed the model by then",
            "raise it in check() already",
        )
        assert isinstance(caught, error), told(
            f"{what}: {said(caught)} is not a {error.__name__}",
            "callers could not tell it from a bug",
            f"raise a subclass of {error.__name__} from it, such as CheckpointError or PlanError",
        )

    def everything(self, case: Case) -> dict[str, Any]:
        """Model, optimizers, trainer and callbacks, by value and by identity."""
        return state_of_model(case.model) | self._state_beside(case)

    def results(self, case: Case) -> dict[str, Any]:
        """Model, optimizers, trainer and callbacks, by value."""
        return values_of_model(case.model) | self._state_beside(case)

    def process(self) -> dict[str, Any]:
        """What all code in this process shares; without the global generators for a kind that draws."""
        state = state_of_process()
        return {name: value for name, value in state.items() if not (self.draws.is_open and name in GENERATORS)}

    def _state_beside(self, case: Case) -> dict[str, Any]:
        numbers = {f"callback {number}": callback.number for number, callback in enumerate(case.callbacks)}
        return {"trainer": case.trainer.number, **numbers}


@contextlib.contextmanager
def explained(what: str, why: str, change: str) -> Iterator[None]:
    """Turn any error of the block into a failed check that says what was tried, why it matters and what to change."""
    try:
        yield
    except Exception as error:
        seen = str(error).partition(". Why it matters: ")[0] if isinstance(error, AssertionError) else said(error)
        raise AssertionError(told(f"{what}: {seen}", why, change)) from error


def answer_of(name: str, value: object) -> Answer:
    """The answer for a declaration; True and False count as one. Raises ``TypeError`` for anything else."""
    if isinstance(value, bool):
        return open_() if value else closed(f"declared as {name} = False")
    if not isinstance(value, Answer):
        raise TypeError(f'{name} = {value!r} is not an answer. Next: {name} = open_(), or {name} = closed("why not")')
    return value


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _short(value: torch.Tensor) -> str:
    text = str(value.tolist())
    return text if len(text) <= 120 else f"{text[:120]}..."
