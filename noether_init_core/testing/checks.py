"""What every check uses, and the checks of weights: every shape of model, in place, on every rank, as planned."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
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
from noether_init_core.testing.cases import (
    Answer,
    Case,
    Wrong,
    closed,
    leaf_state,
    new_model,
    open_,
    with_extra_parameter,
)
from noether_init_core.testing.processes import initialized_by_ranks
from noether_init_core.testing.snapshots import differences, state_of_model, unchanged

_SEED = 5
_OPEN = open_()

Config = Mapping[str, Any]
MakeConfig = Callable[[Case], Config]
Expected = Callable[[Case], Mapping[str, Mapping[str, torch.Tensor]]]
NewCase = Callable[..., Case]


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
    #: The kind provides a plan; kinds that derive from SourceInitializer do.
    plans: ClassVar[Answer] = open_()
    #: The kind compares shapes and names of a model with its source, so that a model can be wrong.
    compares_models: ClassVar[Answer] = open_()
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

    def make(self, case: Case, config: Mapping[str, Any], **more: Any) -> InitializerStack:
        """A stack of this kind alone; ``case.paths`` is the run that is started."""
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
        """Open: the right values are loaded. Closed: an ``InitError`` is raised, and nothing has changed."""
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
        assert not changed, f"{what}: {caught.value!r} was raised after these had changed: {', '.join(changed[:5])}"
        assert isinstance(caught.value, error), f"{what}: {caught.value!r} is not a {error.__name__}"

    def everything(self, case: Case) -> dict[str, Any]:
        """Model, optimizers, trainer and callbacks, by value."""
        return {
            **state_of_model(case.model),
            "trainer": case.trainer.number,
            **{f"callback {number}": callback.number for number, callback in enumerate(case.callbacks)},
        }


class WeightChecks(Checks):
    """Values, identity, plan, ranks."""

    def test_single_model(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """Matrices, one of them square, biases and scales."""
        self.assert_shape_is_served(_OPEN, new_case("single"), make_config, expected)

    def test_composite_model(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """Two submodels, and one that is None."""
        self.assert_shape_is_served(self.composites, new_case("composite"), make_config, expected)

    def test_nested_composite(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A composite within a composite."""
        self.assert_shape_is_served(self.nested, new_case("nested"), make_config, expected)

    def test_frozen_model(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A frozen model gets its weights and stays frozen."""
        case = new_case("frozen")
        self.assert_shape_is_served(self.frozen, case, make_config, expected)
        assert case.model.is_frozen
        assert not any(parameter.requires_grad for parameter in case.model.parameters())

    def test_model_on_the_meta_device(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A model without memory gets memory for every entry."""
        self.assert_shape_is_served(self.meta_device, new_case("meta_device"), make_config, expected)

    def test_tied_weights(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """One parameter with two names stays one parameter."""
        case = new_case("tied")
        self.assert_shape_is_served(self.tied, case, make_config, expected)
        assert case.model.module.head.weight is case.model.module.embed.weight, "the weights are no longer tied"

    def test_buffers(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A model of buffers only: step counters, statistics, masks."""
        self.assert_shape_is_served(self.buffers, new_case("buffers"), make_config, expected)

    def test_tensors_stay_the_same_objects(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Identity, shape, dtype, device and flags of tensors stay: optimizers, ties and wrappers refer to them."""
        shapes = {"single": _OPEN, "nested": self.nested, "buffers": self.buffers}
        for shape in (name for name, answer in shapes.items() if answer.is_open):
            case = new_case(shape)
            before = state_of_model(case.model)
            self.initialize(case, make_config(case))
            changed = differences(before, state_of_model(case.model))
            others = [
                name for name in changed if name.startswith(("identity of", "flags of", "training of", "hooks of"))
            ]
            assert not others, f"changed: {', '.join(others)}. Write in place, under torch.no_grad()"

    def test_plan_is_what_happens(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Exactly the entries that the plan writes change; a parameter with on_missing: keep keeps its value."""
        case = new_case("single", model=with_extra_parameter(_SEED) if self.plans.is_open else None)
        stack = self.make(case, make_config(case), **({"on_missing": "keep"} if self.plans.is_open else {}))
        plan = stack.plan(case.model)
        if not self.plans.is_open:
            assert plan.rows == (), f"plans is closed ({self.plans.reason}), but the kind provides a plan"
            return
        before = state_of_model(case.model)
        report = stack.initialize(case.model, trainer=case.trainer, callbacks=case.callbacks)
        changed = set(differences(before, state_of_model(case.model)))
        written = {f"{row.model} {row.target}" for row in plan.rows if row.writes}
        entries = {f"{path} {name}" for path, leaf in leaf_models(case.model) for name in leaf.state_dict()}
        assert {name for name in changed if name in entries} == written
        assert sum((dict(one.counts).get("keep", 0) for one in report.initializers), 0) == 1, (
            "exactly one entry must be kept: extra"
        )

    def test_plan_changes_nothing(self, single: Case, single_config: Config) -> None:
        """A plan does not change the model, its optimizer or its flags."""
        with unchanged(lambda: self.everything(single), "the plan"):
            self.make(single, single_config).plan(single.model)

    def test_initializing_again_gives_the_same(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """The same stack initializes a second model to the same values."""
        case, again = new_case("single"), new_case("single")
        stack = self.make(case, make_config(case))
        stack.initialize(case.model)
        stack.initialize(again.model)
        self.assert_weights(again, {"net": leaf_state(case.model)})

    def misfits(self, new_case: NewCase, make_config: MakeConfig) -> Iterator[tuple[str, Case, InitializerBase]]:
        """Models of which only the last tensor does not fit: what is wrong, the case, and the initializer."""
        models: dict[str, Any] = {"extra is in the model and not in the source": with_extra_parameter(_SEED)}
        for shape in ((7,), (1,), (3, 1)):  # (1,) would be broadcast, and (3, 1) has as many elements
            model = new_model("single", _SEED)
            model.module.norm.weight = torch.nn.Parameter(torch.ones(shape))
            models[f"norm.weight has the shape {shape} in the model, and (3,) in the source"] = model
        model = new_model("single", _SEED)
        del model.module.coarse
        models["coarse is in the source and not in the model"] = model
        for what, model in models.items():
            case = new_case("single", model=model)
            yield what, case, self.one(case, make_config(case))

    def test_a_model_that_does_not_fit_is_left_as_it_was(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """``init_weights`` without ``check``: another shape raises an ``InitError``, and nothing changes."""
        for what, case, initializer in self.misfits(new_case, make_config):
            with self.refused(case, what) if self.compares_models.is_open else contextlib.nullcontext():
                initializer.init_weights(case.model)

    def test_check_finds_a_model_that_does_not_fit(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """``check`` raises for another shape, so that no initializer of the stack has changed anything yet."""
        for what, case, initializer in self.misfits(new_case, make_config):
            if not self.compares_models.is_open:
                initializer.check(case.model, case.trainer, case.callbacks)
                continue
            with pytest.raises(InitError):
                initializer.check(case.model, case.trainer, case.callbacks)
                pytest.fail(f"{what}, and check() did not raise")

    def test_two_ranks_agree(self, single: Case, single_config: Config, tmp_path: Path) -> None:
        """Two ranks with different global generators start at the same iteration with the same bits."""
        if not self.ranks.is_open:
            pytest.skip(f"closed: {self.ranks.reason}")
        if kinds.describe(self.kind).distribution is None:
            pytest.skip("registered in this process only: another process cannot resolve the kind")
        config = {"kind": self.kind, **single_config}
        (start, digests), (other_start, others) = initialized_by_ranks(config, single.paths, tmp_path / "meeting point")
        assert start == other_start
        different = [name for name, digest in digests.items() if others[name] != digest]
        assert not different, f"the ranks differ in {', '.join(different)}: the kind used a rank or a global generator"
