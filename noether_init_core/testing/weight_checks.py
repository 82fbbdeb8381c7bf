"""The checks of weights: every shape of model, in place, as planned, as reported, on every rank.

The messages are complete without the details that pytest adds and cuts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import kinds
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.messages import listed
from noether_init_core.models import leaf_models
from noether_init_core.stack.stack import InitializerStack
from noether_init_core.testing.cases import (
    MODEL_SEED,
    Case,
    add_extra_parameter,
    changed_model,
    leaf_state,
    new_model,
    open_,
)
from noether_init_core.testing.checks import Checks, Config, Expected, MakeConfig, NewCase, NewRun, explained
from noether_init_core.testing.processes import initialized_by_ranks
from noether_init_core.testing.snapshots import FIXED, differences, state_of_model, told, unchanged
from noether_init_core.testing.watching import made_initializers

_OPEN = open_()


class WeightChecks(Checks):
    """Values, identity, plan, report, ranks."""

    def test_single_model(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """Matrices, one of them square, biases, scales, and an entry in half precision."""
        self.assert_shape_is_served(_OPEN, new_case("single"), make_config, expected)
        if not self.half_precision.is_open:
            case = new_case("single", model=new_model("single", MODEL_SEED))
            with self.refused(case, f"half_precision is closed ({self.half_precision.reason}), so it must be refused"):
                self.initialize(case, make_config(case))

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
        assert not any(parameter.requires_grad for parameter in case.model.parameters()), told(
            "the frozen model is no longer frozen", "the training would change it", "leave requires_grad as it is"
        )

    def test_model_on_the_meta_device(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A model without memory gets memory for every entry, in which it can be trained."""
        case = new_case("meta_device")
        before = {name: one.requires_grad for name, one in case.model.named_parameters()}
        self.assert_shape_is_served(self.meta_device, case, make_config, expected)
        wrong = [
            name
            for name, one in case.model.named_parameters()
            if one.is_inference() or not one.is_leaf or one.requires_grad != before[name] or one.dtype != torch.float32
        ]
        assert not wrong, told(
            f"{listed(wrong)} cannot be trained as before: an inference tensor, no leaf, or another dtype",
            "the first backward pass would fail, or leave them out",
            "module.to_empty(device=...) outside of torch.inference_mode(), then copy the values in place",
        )

    def test_tied_weights(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """One parameter with two names stays one parameter."""
        case = new_case("tied")
        self.assert_shape_is_served(self.tied, case, make_config, expected)
        assert case.model.module.head.weight is case.model.module.embed.weight, told(
            "head.weight and embed.weight were one parameter, and are two",
            "the training would change one and not the other",
            "write into the existing parameters; do not assign new ones",
        )

    def test_buffers(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A model of buffers only: step counters, statistics, masks."""
        self.assert_shape_is_served(self.buffers, new_case("buffers"), make_config, expected)

    def test_other_dtypes(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """Values in float64, complex64, int64 and bool that no float32 holds."""
        self.assert_shape_is_served(self.precise, new_case("precise"), make_config, expected)

    def test_memory_of_other_layouts(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A transposed parameter, and two parameters in one block of memory, between values of somebody else."""
        case = new_case("strided")
        module, strides = case.model.module, [one.stride() for one in case.model.parameters()]
        self.assert_shape_is_served(self.strided, case, make_config, expected)
        block = torch.empty(0).set_(module.first.untyped_storage())
        assert not block[[6, 7, 14, 15]].any(), told(
            "memory around a parameter was written, which belongs to something else",
            "flat parameters, buckets and shards of wrappers have other parameters there",
            "parameter.copy_(value) writes its own elements only",
        )
        assert strides == [one.stride() for one in case.model.parameters()], told(
            "the strides of a parameter changed", "kernels rely on the layout", "parameter.copy_(value) keeps it"
        )

    def test_entries_are_matched_by_name(self, new_case: NewCase, make_config: MakeConfig, expected: Expected) -> None:
        """A model with the same modules in another order gets the same values under the same names."""

        def reverse(module: torch.nn.Module) -> None:
            for name in reversed(list(module._modules)):
                module._modules[name] = module._modules.pop(name)

        model = changed_model(self.real_shape("single"), MODEL_SEED, reverse)
        self.assert_shape_is_served(_OPEN, new_case("single", model=model), make_config, expected)

    def test_tensors_stay_the_same_objects(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Identity, shape, dtype, strides, flags, gradients of tensors stay, and modules, their modes and hooks."""
        shapes = {"single": _OPEN, "nested": self.nested, "buffers": self.buffers}
        for shape in (name for name, answer in shapes.items() if answer.is_open):
            case = new_case(shape)
            _make_unusual(case.model)
            before = state_of_model(case.model)
            self.initialize(case, make_config(case))
            others = [name for name in differences(before, state_of_model(case.model)) if name.startswith(FIXED)]
            assert not others, told(
                f"the initialization of the shape {shape} changed: {listed(others)}",
                "optimizers, ties and wrappers refer to these tensors and modules; whether they train is the user's",
                "write values in place, under torch.no_grad(), and nothing else",
            )

    def test_plan_is_what_happens(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Exactly the entries that the plan writes change; with on_missing: keep, an absent one keeps its value."""
        if not self.plans.is_open:
            case = new_case("single")
            assert self.make(case, make_config(case)).plan(case.model).rows == (), told(
                f"plans is closed ({self.plans.reason}), but the kind provides a plan",
                "the kit would not compare it with what happens",
                "plans = open_()",
            )
            return
        keeps = "on_missing" in kinds.resolve(self.kind).config_class.model_fields
        shape = self.real_shape("single")
        model = changed_model(shape, MODEL_SEED, add_extra_parameter) if keeps else None
        case = new_case("single", model=model)
        stack = self.make(case, make_config(case), **({"on_missing": "keep"} if keeps else {}))
        plan = stack.plan(case.model)
        before = state_of_model(case.model)
        report = self.start(stack, case)
        changed = set(differences(before, state_of_model(case.model)))
        written = {f"{row.model} {row.target}" for row in plan.rows if row.writes or row.action == "reset"}
        entries = {f"{path} {name}" for path, leaf in leaf_models(case.model) for name in leaf.state_dict()}
        change = "one PlanRow with the action load for each entry that init_weights() writes, and no other"
        why = "users decide by the plan, and CI does"
        assert written, told("the plan writes nothing", why, f'{change}; or plans = closed("why")')
        more, fewer = changed & entries - written, written - changed
        assert not more, told(f"not in the plan, and changed: {listed(sorted(more))}", why, change)
        assert not fewer, told(f"in the plan, and not changed: {listed(sorted(fewer))}", why, change)
        kept = sum(dict(one.counts).get("keep", 0) for one in report.initializers)
        assert kept == keeps, told(f"{kept} entries are reported as kept, and {int(keeps)} was", why, change)

    def test_report_says_what_was_loaded(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """The parameters that the report calls loaded are those of the plan, and each has a file."""
        case = new_case("single")
        config = make_config(case)
        plan = self.make(case, config).plan(case.model)
        with made_initializers() as made:
            stack = self.make(case, config)
            known = [id(unit) for unit in made]
            report = self.start(stack, case)
        hidden = [one for one in made if id(one) not in known]
        change = "self.delegates = (other,) in __init__, and leave out the hooks that only call those of the other"
        why = "what it loads would be reported as fresh, without files, plan, check and digests"
        assert not hidden, told(
            f"a hook made another initializer, {hidden[0].config.kind if hidden else ''}", why, change
        )
        for one in stack.initializers:
            secret = _initializers_in(one)
            assert not secret, told(f"{', '.join(secret)} is an initializer and is not in delegates", why, change)
        planned = sorted({row.key for row in plan.rows if row.writes and row.is_parameter and row.tied_to is None})
        loaded = sorted(report.loaded_parameters(case.model.name))
        assert loaded == planned, told(
            f"the plan loads {listed(planned)}, and the report says {listed(loaded, none='nothing')}",
            "users choose learning rates and frozen layers by what was loaded",
            "let plan() return the same rows before and after init_weights()",
        )

    def test_delegates_are_fixed(self, single: Case, single_config: Config) -> None:
        """The delegates are initializers that the constructor made, and stay the same."""
        initializer = self.one(single, single_config)
        before = initializer.delegates
        stack = InitializerStack([initializer])
        stack.plan(single.model)
        self.start(stack, single)
        is_same = isinstance(before, tuple) and initializer.delegates is before
        assert is_same, told(
            f"the delegates were {before!r}, and are {initializer.delegates!r} after an initialization",
            "the stack opens their sessions when it is built, so a later one is neither checked nor reported",
            "self.delegates = (...), a tuple, in __init__ only",
        )

    def test_plan_changes_nothing(self, single: Case, single_config: Config) -> None:
        """A plan does not change the model, its optimizer or its flags, also on the second call."""
        stack = self.make(single, single_config)
        why, change = "a plan is a question, which ninit plan asks without training", "read names and shapes only"
        with unchanged(lambda: self.everything(single), "the plan", why=why, change=change):
            first = stack.plan(single.model)
        with unchanged(lambda: self.everything(single), "the second plan", why=why, change=change):
            second = stack.plan(single.model)
        assert first.to_dict() == second.to_dict(), told("two plans of one model differ", why, "compute it anew")

    def test_initializing_again_gives_the_same(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """The same stack initializes a second model to the same values."""
        case, again = new_case("single"), new_case("single")
        stack = self.make(case, make_config(case))
        with explained(
            "the second model of one stack",
            "sweeps and tests use a stack more than once, and draws must not depend on what was drawn before",
            "keep what is known of one initialization in self.session; draw with a generator that is seeded each time",
        ):
            self.start(stack, case)
            self.start(stack, again)
            self.assert_weights(again, {"net": leaf_state(case.model)})

    def test_instances_share_nothing(
        self, new_case: NewCase, source_run: NewRun, make_config: MakeConfig, expected: Expected
    ) -> None:
        """Two initializers of different sources, made before either is used, each load their own."""
        first = new_case("single", source=source_run(self.real_shape("single"), seeds=(21, 22)))
        cases = [(case, make_config(case)) for case in (first, new_case("single"))]
        if cases[0][1] == cases[1][1]:  # the author's files of the second case replace those of the first
            del cases[0]
        stacks = [(self.make(case, config), case) for case, config in cases]
        for stack, case in stacks:
            with explained(
                "two initializers of different sources, made before either was used",
                "a stack may have two of one kind",
                "keep the config and what is read in the instance or its session, never on the class or the module",
            ):
                self.start(stack, case)
                self.assert_right(case, expected)

    def misfits(self, new_case: NewCase, make_config: MakeConfig) -> Iterator[tuple[str, Case, InitializerBase]]:
        """Models of which one late tensor does not fit: what is wrong, the case, and the initializer."""

        def with_weight(value: torch.Tensor) -> Any:
            needs_gradient = value.is_floating_point() or value.is_complex()
            parameter = torch.nn.Parameter(value, requires_grad=needs_gradient)
            return lambda module: setattr(module.norm, "weight", parameter)

        changes: dict[str, Any] = {"extra is in the model and not in the source": add_extra_parameter}
        for shape in ((7,), (1,), (3, 1)):  # (1,) would be broadcast, and (3, 1) has as many elements
            what = f"norm.weight has the shape {shape} in the model, and (3,) in the source"
            changes[what] = with_weight(torch.ones(shape))
        for dtype in (torch.int64, torch.bool):
            what = f"norm.weight is {dtype} in the model, and torch.float32 in the source, so values would be cut"
            changes[what] = with_weight(torch.ones(3, dtype=dtype))
        changes["norm.bias is in the source and not in the model"] = lambda module: setattr(module.norm, "bias", None)
        for name in ("single", *(["composite"] if self.composites.is_open else [])):
            for what, change in changes.items():
                if "values would be cut" not in what or (self.compares_models.is_open and not self.casts.is_open):
                    case = new_case(name, model=changed_model(self.real_shape(name), MODEL_SEED, change))
                    yield f"{name} model, {what}", case, self.one(case, make_config(case))

    def test_a_model_that_does_not_fit_is_left_as_it_was(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """``init_weights`` without ``check``: another shape or dtype raises an ``InitError``, and nothing changes."""
        for what, case, initializer in self.misfits(new_case, make_config):
            with self.refused(case, what) if self.compares_models.is_open else contextlib.nullcontext():
                initializer.init_weights(case.model)

    def test_check_finds_a_model_that_does_not_fit(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """``check`` raises for another shape or dtype: no initializer of the stack has changed anything yet."""
        for what, case, initializer in self.misfits(new_case, make_config):
            with self.refused(case, f"check(): {what}") if self.compares_models.is_open else contextlib.nullcontext():
                self.check(initializer, case)

    def test_two_ranks_agree(self, single: Case, single_config: Config, tmp_path: Path) -> None:
        """Two ranks with different global generators and hash seeds start at the same iteration with the same bits."""
        if not self.ranks.is_open:
            pytest.skip(f"closed: {self.ranks.reason}")
        if kinds.describe(self.kind).distribution is None:
            pytest.skip("registered in this process only: another process cannot resolve the kind")
        config = {"kind": self.kind, **single_config}
        (start, digests), (other_start, others) = initialized_by_ranks(
            self.real_shape("single"), config, single.paths, tmp_path / "meeting point"
        )
        assert start == other_start, told(
            f"one rank starts at {start}, the other at {other_start}",
            "ranks that disagree wait for each other, or train apart",
            "select by what is on the disk, and not by the rank",
        )
        different = [name for name, digest in digests.items() if others[name] != digest]
        assert not different, told(
            f"the ranks have different values of {listed(different)}",
            "every rank would train a model of its own",
            "no rank, no global generator, no hash() of a text (each process has its own seed of it: hashlib), no "
            "order of a set, no time",
        )


def _make_unusual(model: Any) -> None:
    """Set what an initialization must keep: evaluation mode, a frozen parameter, gradients, hooks."""
    for _path, leaf in leaf_models(model):
        leaf.module.norm.eval()
        leaf.module.register_forward_hook(_hook)
        for number, parameter in enumerate(leaf.parameters()):
            parameter.requires_grad_(number != 1)
            parameter.grad = torch.full_like(parameter, 0.25) if number == 2 else None


def _hook(*_arguments: object) -> None:
    """A hook of the user's."""


def _initializers_in(initializer: InitializerBase) -> list[str]:
    """The attributes that hold initializers which are not delegates."""
    known = {id(one) for one in initializer.delegates}
    found = []
    for name, value in vars(initializer).items():
        values = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else [value]
        )
        if any(isinstance(one, InitializerBase) and id(one) not in known for one in values):
            found.append(name)
    return found
