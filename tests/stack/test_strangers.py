"""Kinds of others: one that states a plan of its own from public values, and ones that delegate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch

import noether_init_core
from noether_init_core import (
    CheckpointWriter,
    ConfigError,
    InitializerBase,
    InitializerStack,
    KindConfig,
    LoadedFile,
    LoadPlan,
    Origin,
    Outcome,
    PathProvider,
    PlanError,
    PlanRow,
    Problem,
    StartConflictError,
    TrainingIteration,
    bind,
    kinds,
)

ITERATION = TrainingIteration(1, 7, 70)


def net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def bound(module: torch.nn.Module) -> Any:
    return bind(module, name="net", optimizer=torch.optim.AdamW(module.parameters(), lr=0.1))


@pytest.fixture
def run(tmp_path: Path) -> PathProvider:
    """A run with one set that has weights, optimizer state and the state of a trainer."""
    paths = PathProvider(tmp_path, "source")
    model = bound(net(3))
    model.module(torch.randn(8, 3)).sum().backward()
    model.optimizer.step()
    CheckpointWriter(paths).save(model, ITERATION)
    return paths


def previous_run(run: PathProvider, **keys: Any) -> InitializerBase:
    return kinds.create({"kind": "previous_run", "run_id": run.run_id, **keys}, path_provider=run.with_run("new"))


class Stating(InitializerBase):
    """Loads ``state`` and says so, with values from the public front alone."""

    contract: ClassVar[int] = 1

    def __init__(self, file: Path, state: dict[str, torch.Tensor], like: LoadPlan) -> None:
        super().__init__(KindConfig(kind="stating"))
        self.file, self.state, self.like = file, state, like

    def plan(self, model: Any) -> LoadPlan:
        own = model.state_dict()
        rows = tuple(
            PlanRow(
                model.name,
                name,
                (name,),
                "load",
                tuple(value.shape),
                str(value.dtype).removeprefix("torch."),
                value.nbytes,
                source_shapes=(tuple(value.shape),),
            )
            for name, value in self.state.items()
            if name in own
        )
        problems = tuple(
            Problem("missing", f"{name} is not in the file", model.name) for name in own if name not in self.state
        )
        return LoadPlan("stating", rows, problems, origins=self.like.origins)

    def init_weights(self, model: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.state[name])

    def outcome(self) -> Outcome:
        file = LoadedFile(self.file, origin={"run_id": "source"})
        return attrs.evolve(super().outcome(), files={"net": file}, restored=("nothing else",), not_restored=("ema",))


class Delegating(InitializerBase):
    """Leaves everything to others."""

    contract: ClassVar[int] = 1

    def __init__(self, *delegates: InitializerBase) -> None:
        super().__init__(KindConfig(kind="delegating"))
        self.delegates = delegates


def test_values_of_a_plan_are_public() -> None:
    """What a plan and an outcome are made of stands at the front."""
    assert {"LoadPlan", "LoadedFile", "Outcome", "PlanRow", "Problem"} <= set(noether_init_core.__all__)


def test_a_kind_that_states_its_plan_is_reported_like_previous_run(run: PathProvider) -> None:
    """Counts, coverage, loaded parameters, sources and what its outcome says."""
    reference = InitializerStack([previous_run(run)])
    expected_plan = reference.plan(bound(net(1)))
    expected = reference.initialize(bound(net(1)))
    target, state = bound(net(2)), net(9).state_dict()
    stack = InitializerStack([Stating(Path(expected.sources[0].path), state, expected_plan)])
    plan = stack.plan(target)
    assert plan.counts() == expected_plan.counts()
    assert [(row.model, row.target, row.action) for row in plan.rows] == [
        (row.model, row.target, row.action) for row in expected_plan.rows
    ]
    report = stack.initialize(target)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    first, own = expected.initializers[0], report.initializers[0]
    assert (own.counts, own.coverage, own.origins) == (first.counts, first.coverage, first.origins)
    assert (own.restored, own.not_restored) == (("nothing else",), ("ema",))
    assert report.loaded_parameters() == expected.loaded_parameters() != ()
    assert report.fresh_parameters() == ()
    assert [(one.path, one.origin) for one in report.sources] == [(expected.sources[0].path, (("run_id", "source"),))]


def test_problems_of_a_stated_plan_stop_everything_before_a_change(run: PathProvider) -> None:
    """They are raised as those of ``previous_run``: the initializer before it has not written either."""
    state = net(9).state_dict()
    del state["1.bias"]
    model = bound(net(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    like = LoadPlan("stating", (), origins=(Origin("stating", "net", files=("x.pt",)),))
    stack = InitializerStack([previous_run(run), Stating(Path("x.pt"), state, like)])
    with pytest.raises(PlanError, match=r"1\.bias is not in the file") as caught:
        stack.initialize(model)
    assert caught.value.problems == ("1.bias is not in the file",)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("depth", [1, 2])
def test_a_kind_that_only_delegates_does_and_reports_what_its_delegate_does(run: PathProvider, depth: int) -> None:
    """Plan, weights, optimizer state, counts, provenance; also through another one that delegates."""
    expected_model, model = bound(net(1)), bound(net(1))
    reference = InitializerStack([previous_run(run, load_optim=True)])
    expected = reference.initialize(expected_model)
    wrapped = previous_run(run, load_optim=True)
    for _ in range(depth):
        wrapped = Delegating(wrapped)
    stack = InitializerStack([wrapped])
    assert stack.plan(bound(net(1))).to_dict() == reference.plan(bound(net(1))).to_dict()
    report = stack.initialize(model)
    assert all(torch.equal(value, expected_model.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.optimizer.state_dict()["state"][0]["step"] == 1
    first, own = expected.initializers[0], report.initializers[0]
    assert attrs.evolve(own, kind=first.kind, distribution=first.distribution) == first
    assert (report.tensors, report.sources) == (expected.tensors, expected.sources)
    assert all(one.session is None for one in (wrapped, *wrapped.delegates))


def test_a_problem_of_a_delegate_is_found_before_anything_changes(run: PathProvider) -> None:
    """With the error that the delegate raises by itself."""
    module = torch.nn.Linear(5, 5)
    model, before = bind(module, name="net"), module.weight.clone()
    with pytest.raises(PlanError) as expected:
        InitializerStack([previous_run(run)]).initialize(model)
    with pytest.raises(PlanError) as caught:
        InitializerStack([Delegating(previous_run(run))]).initialize(model)
    assert str(caught.value) == str(expected.value)
    assert torch.equal(module.weight, before)


def test_a_delegate_sees_what_the_one_before_it_will_have_loaded(tmp_path: Path) -> None:
    """Two files that together fill the model, within one kind."""
    state = net(5).state_dict()
    torch.save(state, tmp_path / "all.pt")
    torch.save({name: value for name, value in net(6).state_dict().items() if name[0] == "1"}, tmp_path / "half.pt")
    both = [kinds.create({"kind": "file", "path": str(tmp_path / f"{name}.pt")}) for name in ("all", "half")]
    model = bound(net(1))
    report = InitializerStack([Delegating(*both)]).initialize(model)
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])
    assert torch.equal(model.state_dict()["1.weight"], net(6).state_dict()["1.weight"])
    assert {one.name: report.sources[one.source].file for one in report.tensors if one.source is not None} == {
        "0.weight": "all.pt",
        "0.bias": "all.pt",
        "1.weight": "half.pt",
        "1.bias": "half.pt",
    }


def test_delegates_that_lead_back_are_refused(run: PathProvider) -> None:
    """With the way that they lead, when the stack is built."""
    outer = Delegating()
    outer.delegates = (Delegating(outer),)
    with pytest.raises(ConfigError, match="in a circle: delegating -> delegating -> delegating"):
        InitializerStack([outer])


def test_a_kind_that_neither_loads_nor_delegates_is_refused() -> None:
    """It would do nothing, and the training would start from random weights."""
    with pytest.raises(ConfigError, match=r"Delegating\) implements no init_weights and has no delegates"):
        InitializerStack([Delegating()])


def test_a_hook_called_alone_calls_that_of_the_delegates(run: PathProvider) -> None:
    """Outside of a stack each opens and closes a session of its own."""
    model, expected = bound(net(1)), bound(net(1))
    previous_run(run).init_weights(expected)
    wrapped = Delegating(previous_run(run))
    wrapped.init_weights(model)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert wrapped.session is wrapped.delegates[0].session is None


def test_two_delegates_cannot_both_continue_a_run(run: PathProvider) -> None:
    """Also where they are of one kind; which starts there are is on the exception."""
    resume = {"kind": "resume", "run_id": run.run_id, "model_name": "net"}
    both = [kinds.create(resume, path_provider=run.with_run("new")) for _ in range(2)]
    starts = {"0: resume": str(ITERATION), "1: resume": str(ITERATION)}
    with pytest.raises(StartConflictError, match="more than one delegate of delegating continues a run") as caught:
        InitializerStack([Delegating(*both)]).start_checkpoint()
    assert caught.value.starts == starts


def test_a_delegate_whose_hook_is_called_by_hand_loads_once_and_is_reported(run: PathProvider) -> None:
    """The kind overrides init_weights; files and parameters are those that the delegate reports by itself."""
    calls: list[Any] = []

    class ByHand(Delegating):
        contract: ClassVar[int] = 1

        def init_weights(self, model: Any) -> None:
            for one in self.delegates:
                calls.append(one)
                one.init_weights(model)

    expected = InitializerStack([previous_run(run)]).initialize(bound(net(1)))
    delegate = previous_run(run)
    report = InitializerStack([ByHand(delegate)]).initialize(bound(net(1)))
    assert calls == [delegate]
    assert report.loaded_parameters() == expected.loaded_parameters() != ()
    assert report.sources == expected.sources


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_delegate_may_be_shared(run: PathProvider, is_nested: bool) -> None:
    """By two kinds of one stack, and by two delegates of one kind."""
    delegate, model = previous_run(run), bound(net(1))
    both = [Delegating(delegate), Delegating(delegate)]
    report = InitializerStack([Delegating(*both)] if is_nested else both).initialize(model)
    assert report.loaded_parameters() == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert delegate.session is None
