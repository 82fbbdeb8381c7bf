"""The right numbers arrive, in models of every shape, in place, on every rank, and as the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import kinds
from noether_init_core.errors import InitError
from noether_init_core.models import leaf_models
from noether_init_core.testing.cases import open_
from noether_init_core.testing.checks.base import Checks, Expected, MakeConfig, NewCase
from noether_init_core.testing.models import leaf_state, new_model, with_extra_parameter
from noether_init_core.testing.processes import initialized_by_ranks
from noether_init_core.testing.snapshots import differences, state_of_model, unchanged

_SEED = 5
_OPEN = open_()


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
        """A frozen model gets its weights, and stays frozen."""
        case = new_case("frozen")
        self.assert_shape_is_served(self.frozen, case, make_config, expected)
        assert case.model.is_frozen
        assert not any(parameter.requires_grad for parameter in case.model.parameters())

    def test_model_on_the_meta_device(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A model without memory gets some, for every entry."""
        self.assert_shape_is_served(self.meta_device, new_case("meta_device"), make_config, expected)

    def test_tied_weights(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """One parameter of two names stays one."""
        case = new_case("tied")
        self.assert_shape_is_served(self.tied, case, make_config, expected)
        assert case.model.module.head.weight is case.model.module.embed.weight, "the weights are no longer tied"

    def test_buffers(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A model of buffers alone: numbers of steps, statistics, masks."""
        self.assert_shape_is_served(self.buffers, new_case("buffers"), make_config, expected)

    def test_tensors_stay_the_same_objects(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Optimizers, ties and wrappers hold on to the tensors: identity, shape, dtype, device and flags stay."""
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
        """Exactly the entries that the plan writes change; a parameter that is to be kept keeps its value."""
        case = new_case("single", model=with_extra_parameter(_SEED) if self.plans.is_open else None)
        stack = self.make(case, make_config(case), **({"on_missing": "keep"} if self.plans.is_open else {}))
        plan = stack.plan(case.model)
        if not self.plans.is_open:
            assert plan.rows == (), f"plans is closed ({self.plans.reason}), but there is a plan"
            return
        before = state_of_model(case.model)
        report = stack.initialize(case.model, trainer=case.trainer, callbacks=case.callbacks)
        changed = set(differences(before, state_of_model(case.model)))
        written = {f"{row.model} {row.target}" for row in plan.rows if row.writes}
        entries = {f"{path} {name}" for path, leaf in leaf_models(case.model) for name in leaf.state_dict()}
        assert {name for name in changed if name in entries} == written
        assert sum((dict(one.counts).get("keep", 0) for one in report.initializers), 0) == 1, "one entry is kept: extra"

    def test_plan_changes_nothing(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """A plan is a look: the model, its optimizer and its flags stay."""
        case = new_case("single")
        with unchanged(lambda: self.everything(case), "the plan"):
            self.make(case, make_config(case)).plan(case.model)

    def test_initializing_again_gives_the_same(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """The same stack initializes a second model to the same values; nothing is used up."""
        case, again = new_case("single"), new_case("single")
        stack = self.make(case, make_config(case))
        stack.initialize(case.model)
        stack.initialize(again.model)
        self.assert_weights(again, {"net": leaf_state(case.model)})

    def test_a_model_that_does_not_fit_is_left_as_it_was(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """``init_weights`` alone, called without ``check``: another shape is an error of ours, and nothing changes."""
        for what, model in _misfits().items():
            case = new_case("single", model=model)
            initializer = self.one(case, make_config(case))
            if not self.compares_models.is_open:
                initializer.init_weights(case.model)
                continue
            with self.refused(case, what):
                initializer.init_weights(case.model)

    def test_check_finds_a_model_that_does_not_fit(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """``check`` raises for another shape, so that nothing of the whole stack has changed by then."""
        for what, model in _misfits().items():
            case = new_case("single", model=model)
            initializer = self.one(case, make_config(case))
            if not self.compares_models.is_open:
                initializer.check(case.model, case.trainer, case.callbacks)
                continue
            with pytest.raises(InitError):
                initializer.check(case.model, case.trainer, case.callbacks)
                pytest.fail(f"{what}, and check() has not found it")

    def test_two_ranks_agree(self, new_case: NewCase, make_config: MakeConfig, tmp_path: Path) -> None:
        """Two ranks, each with another global generator, start at the same iteration with the same bits."""
        if not self.ranks.is_open:
            pytest.skip(f"closed: {self.ranks.reason}")
        if kinds.describe(self.kind).distribution is None:
            pytest.skip("registered in this process only: another process has no such kind")
        case = new_case("single")
        config = {"kind": self.kind, **make_config(case)}
        (start, digests), (other_start, others) = initialized_by_ranks(config, case.paths, tmp_path / "meeting point")
        assert start == other_start
        different = [name for name, digest in digests.items() if others[name] != digest]
        assert not different, f"the ranks differ in {', '.join(different)}: a rank or a global generator was used"


def _misfits() -> dict[str, Any]:
    """Models whose last tensor does not fit, so that everything before it does; what is wrong -> the model."""
    found: dict[str, Any] = {"extra is in the model and not in the source": with_extra_parameter(_SEED)}
    for shape in ((7,), (1,), (3, 1)):  # the second one would be broadcast, the third one has as many elements
        model = new_model("single", _SEED)
        model.module.norm.weight = torch.nn.Parameter(torch.ones(shape))
        found[f"norm.weight has the shape {shape} in the model, and (3,) in the source"] = model
    model = new_model("single", _SEED)
    del model.module.coarse
    found["coarse is in the source and not in the model"] = model
    return found
