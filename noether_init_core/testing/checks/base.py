"""What every check uses: what the author of a kind answers and gives, and how an initialization is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch

from noether_init_core import kinds
from noether_init_core.errors import InitError, PartlyInitializedError
from noether_init_core.files.storage.artifact_cache import CACHE_VARIABLE
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.models import leaf_models
from noether_init_core.nested import equal
from noether_init_core.sets.provenance import InitReport
from noether_init_core.stack.stack import InitializerStack
from noether_init_core.testing.cases import Answer, Case, Wrong, closed, open_
from noether_init_core.testing.snapshots import differences, state_of_model

MakeConfig = Callable[[Case], Mapping[str, Any]]
Expected = Callable[[Case], Mapping[str, Mapping[str, torch.Tensor]]]
NewCase = Callable[..., Case]


class Checks:
    """What the author of a kind says, and what the checks make of it."""

    #: The kind, as configs name it.
    kind: ClassVar[str]
    #: The distribution that registers it; None for one that is registered in this process only.
    distribution: ClassVar[str | None]
    #: Name of a check -> why it fails at present. One that passes all the same is an error.
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
    #: A plan says beforehand what will happen; kinds that derive from SourceInitializer have one.
    plans: ClassVar[Answer] = open_()
    #: Shapes and names of a model are compared with something, so that a model can be wrong.
    compares_models: ClassVar[Answer] = open_()
    #: Some configs can only be found wrong by ``check``; closed: there is none.
    can_be_wrong: ClassVar[Answer] = open_()
    #: Every rank of a distributed run may use it.
    ranks: ClassVar[Answer] = open_()
    restores_optimizer: ClassVar[Answer] = closed("it brings weights only")
    restores_trainer: ClassVar[Answer] = closed("it brings weights only")
    restores_callbacks: ClassVar[Answer] = closed("it brings weights only")
    #: Training goes on at the iteration of the source.
    continues: ClassVar[Answer] = closed("training starts at zero")
    needs_path_provider: ClassVar[Answer] = closed("it reads from no run")

    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a kind fetches is not left to other tests, and never in the cache of whoever runs them."""
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))

    @pytest.fixture
    def make_config(self) -> MakeConfig:
        """Gives the config, without its kind, that initializes ``case.model`` from ``case.source``."""
        raise NotImplementedError(
            f"{type(self).__name__} needs a fixture make_config: a callable that takes a Case and returns a config "
            "without its kind"
        )

    @pytest.fixture
    def wrong_configs(self, make_config: MakeConfig) -> Sequence[Wrong]:
        """Configs that are valid by themselves and must be refused by ``check``."""
        return ()

    @pytest.fixture
    def secrets(self) -> Sequence[str]:
        """Texts that the config leads to and that nobody may read in a report, a log or a representation."""
        return ()

    @pytest.fixture
    def expected(self) -> Expected:
        """Gives what the model must hold afterwards: path of a single model -> name -> tensor."""
        return lambda case: case.source.state

    # How the checks use it

    def make(self, case: Case, config: Mapping[str, Any], **more: Any) -> InitializerStack:
        """The stack of the kind alone; ``case.paths`` is the run that is started."""
        return InitializerStack.from_config([{"kind": self.kind, **config, **more}], path_provider=case.paths)

    def one(self, case: Case, config: Mapping[str, Any]) -> InitializerBase:
        """The initializer alone."""
        return kinds.create({"kind": self.kind, **config}, path_provider=case.paths)

    def initialize(self, case: Case, config: Mapping[str, Any]) -> InitReport:
        """Initialize the model, the trainer and the callbacks of the case."""
        return self.make(case, config).initialize(case.model, trainer=case.trainer, callbacks=case.callbacks)

    def assert_weights(self, case: Case, expected: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Every entry of the state dict holds the expected bits, in the dtype of the model."""
        for path, leaf in leaf_models(case.model):
            state, wanted = leaf.state_dict(), expected[path]
            assert set(state) == set(wanted), f"names of {path}"
            for name, value in state.items():
                assert not value.is_meta, f"{path}: {name} is still on the meta device"
                right = wanted[name].to(value.dtype)
                assert equal(value, right), f"{path}: {name} holds {value.tolist()}, not {right.tolist()}"

    def assert_shape_is_served(self, answer: Answer, case: Case, make_config: MakeConfig, expected: Expected) -> None:
        """Open: the right values arrive. Closed: it is refused by an error of ours, and nothing has changed."""
        if answer.is_open:
            self.initialize(case, make_config(case))
            self.assert_weights(case, expected(case))
            return
        with self.refused(case, f"{case.shape} is closed ({answer.reason}), so the kind must refuse it"):
            self.initialize(case, make_config(case))

    @contextlib.contextmanager
    def refused(self, case: Case, what: str, error: type[InitError] = InitError) -> Iterator[None]:
        """The block must raise before anything of the case has changed."""
        before = self.everything(case)
        with pytest.raises(Exception) as caught:
            yield
            pytest.fail(f"{what}: nothing was raised")
        assert not isinstance(caught.value, PartlyInitializedError), (
            f"{what}: {caught.value} Raise in check(), before anything has changed"
        )
        changed = differences(before, self.everything(case))
        assert not changed, f"{what}: {caught.value!r} was raised, but these had changed: {', '.join(changed[:5])}"
        assert isinstance(caught.value, error), f"{what}: {caught.value!r} is no {error.__name__}"

    def everything(self, case: Case) -> dict[str, Any]:
        """Model, optimizers, trainer and callbacks, by value."""
        return {
            **state_of_model(case.model),
            "trainer": case.trainer.number,
            **{f"callback {number}": callback.number for number, callback in enumerate(case.callbacks)},
        }
