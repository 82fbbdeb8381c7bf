"""What a kind changes after weights were loaded is not reported as loaded; and a subclass is named by its class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from noether_init_core import (
    CheckpointWriter,
    InitializerBase,
    InitializerStack,
    KindConfig,
    PathProvider,
    TrainingIteration,
    bind,
    compose,
    kinds,
)
from noether_init_core.builtin.previous_run import PreviousRunInitializer, PreviousRunInitializerConfig


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(2, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.tied = torch.nn.Linear(2, 2)
        self.tied.weight = self.body.weight


Change = Callable[[Any], None]


class Subclass(PreviousRunInitializer):
    """Changes the model after its base class loaded it."""

    def __init__(self, change: Change, paths: PathProvider) -> None:
        super().__init__(PreviousRunInitializerConfig(run_id="source"), path_provider=paths)
        self.change = change

    def init_weights(self, model: Any, model_name: str | None = None) -> None:
        super().init_weights(model)
        self.change(model.module)


class Delegating(InitializerBase):
    """Changes the model after its delegates loaded it, or between two of them."""

    contract: ClassVar[int] = 1

    def __init__(self, change: Change, paths: PathProvider, *, again: bool = False) -> None:
        super().__init__(KindConfig(kind="delegating"))
        self.change, self.again = change, again
        config = {"kind": "previous_run", "run_id": "source"}
        self.delegates = tuple(kinds.create(config, path_provider=paths) for _ in range(1 + again))

    def init_weights(self, model: Any) -> None:
        self.delegates[0].init_weights(model)
        self.change(model.module)
        if self.again:
            self.delegates[1].init_weights(model)


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    paths = PathProvider(tmp_path, "source")
    CheckpointWriter(paths).save(bind(Net(), "net"), TrainingIteration(1, 1, 1))
    return paths.with_run("new")


def in_place(module: Any) -> None:
    with torch.no_grad():
        module.head.weight.mul_(2)


def past_the_counter(module: Any) -> None:
    module.head.weight.data[0] = 0.0  # torch counts no change of the parameter here


def by_numpy(module: Any) -> None:
    module.head.weight.detach().numpy()[0, 0] += 1


def replaced(module: Any) -> None:
    module.head.weight = torch.nn.Parameter(module.head.weight.detach() * 2)


def other_values(module: Any) -> None:
    module.head.weight.data = module.head.weight.detach() * 2


@pytest.mark.parametrize("kind", [Subclass, Delegating])
@pytest.mark.parametrize("change", [in_place, past_the_counter, by_numpy, replaced, other_values])
def test_what_a_kind_changes_afterwards_is_not_loaded(paths: PathProvider, kind: Any, change: Change) -> None:
    """No file, no digest, not among the loaded parameters; by each way to change values."""
    module = Net()
    report = InitializerStack([kind(change, paths)]).initialize(bind(module, "net"))
    records = {record.name: record for record in report.tensors}
    (own,) = report.initializers
    assert report.fresh_parameters() == ("head.weight",)
    assert (records["head.weight"].source, records["head.weight"].digests) == (None, ())
    assert records["head.weight"].rule == f"changed afterwards by {own.kind}"
    assert records["head.bias"].source == 0
    assert records["tied.weight"].source == 0
    assert own.counts == {"load": 10, "changed": 1}
    assert own.coverage == pytest.approx(1 - 4 / 18)
    assert "10 loaded, 1 changed after they were loaded" in str(report)
    saved = CheckpointWriter(paths, report=report).save(bind(module, "net"), TrainingIteration(1, 1, 1))
    kept = json.loads((saved.folder / "provenance.json").read_text())
    assert [one["name"] for one in kept["tensors"] if one["source"] is None] == ["head.weight"]


def nothing(_module: Any) -> None:
    return


@pytest.mark.parametrize("kind", [Subclass, Delegating])
def test_a_kind_that_changes_nothing_afterwards_is_believed(paths: PathProvider, kind: Any) -> None:
    """Its own code alone is no reason for doubt."""
    (own,) = InitializerStack([kind(nothing, paths)]).initialize(bind(Net(), "net")).initializers
    assert (own.counts, own.coverage) == ({"load": 11}, 1.0)


def test_what_a_later_delegate_loads_again_is_loaded(paths: PathProvider) -> None:
    """The values in the end decide."""
    report = InitializerStack([Delegating(in_place, paths, again=True)]).initialize(bind(Net(), "net"))
    assert report.fresh_parameters() == ()


def test_what_a_later_initializer_loads_again_is_loaded(paths: PathProvider) -> None:
    """And a tied tensor under each of its names, in a submodel of a composite, is changed."""

    module = Net()

    def tied(_part: Any) -> None:
        module.tied.weight.data.zero_()

    model = compose("pair", {"net": bind(module, "net"), "other": bind(Net(), "other")})
    config = {"kind": "previous_run", "run_id": "source", "model_name": "net", "submodel": "net"}
    whole = InitializerStack.from_config([config], path_provider=paths)
    assert "net.body.weight" in whole.initialize(model).loaded_parameters()

    kinds.register("tests.changing", changing(tied))
    try:
        own = {**config, "kind": "tests.changing"}
        report = InitializerStack.from_config([own], path_provider=paths).initialize(model)
        assert {record.name for record in report.tensors if "tests.changing" in (record.rule or "")} == {
            "body.weight",
            "tied.weight",
        }
        again = InitializerStack.from_config([own, config], path_provider=paths).initialize(model)
        assert "net.body.weight" in again.loaded_parameters()
    finally:
        kinds.unregister("tests.changing")


def changing(change: Change) -> type[InitializerBase]:
    class Registered(PreviousRunInitializer):
        contract: ClassVar[int] = 1

        def init_weights(self, model: Any, model_name: str | None = None) -> None:
            super().init_weights(model)
            change(model)

    return Registered


def test_a_subclass_is_named_by_its_class(paths: PathProvider) -> None:
    """Not by the kind of its base class, whose distribution has not written it; a registered class by its kind."""
    report = InitializerStack([Subclass(nothing, paths)]).initialize(bind(Net(), "net"))
    (own,) = report.initializers
    name = f"{__name__}.Subclass"
    assert (own.kind, own.distribution, report.sources[0].kind) == (name, "", name)
    config = {"kind": "previous_run", "run_id": "source"}
    report = InitializerStack.from_config([config], path_provider=paths).initialize(bind(Net(), "net"))
    (own,) = report.initializers
    assert (own.kind, own.distribution.split()[0]) == ("previous_run", "noether-init-core")
    kinds.register("tests.mine", changing(nothing))
    try:
        report = InitializerStack.from_config([{**config, "kind": "tests.mine"}], path_provider=paths).initialize(
            bind(Net(), "net")
        )
        assert report.initializers[0].kind == "tests.mine"
    finally:
        kinds.unregister("tests.mine")
