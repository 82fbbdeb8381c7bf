"""Which set ``previous_run`` takes where only some sets that a tag could mean have optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import (
    CheckpointWriter,
    IncompleteSetError,
    InitializerStack,
    LocateQuery,
    PathProvider,
    SourceInitializer,
    TrainingIteration,
    bind,
)


def model_of(value: float, *, has_optimizer: bool = True, is_frozen: bool = False) -> Any:
    """A model whose weights are ``value``, and whose optimizer has state."""
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, value)
    return bind(module, "net", optimizer if has_optimizer else None, is_frozen)


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    """A run whose second set of epoch 10, and whose set of epoch 11, have no optimizer state."""
    paths = PathProvider(tmp_path, "old")
    writer = CheckpointWriter(paths)
    writer.save(model_of(1), TrainingIteration(10, 1, 1))
    writer.save(model_of(2, has_optimizer=False), TrainingIteration(10, 2, 2))
    writer.save(model_of(3, has_optimizer=False), TrainingIteration(11, 3, 3))
    return paths


def stack_for(paths: PathProvider, **config: Any) -> InitializerStack:
    entry = {"kind": "previous_run", "run_id": "old", "load_optim": True, **config}
    return InitializerStack.from_config([entry], path_provider=PathProvider(paths.output_root, "new"))


@pytest.mark.parametrize("tag", ["E10", {"epoch": 10}])
@pytest.mark.parametrize(
    ("config", "model", "value"),
    [
        ({}, {}, 1),
        ({"load_optim": False}, {}, 2),
        ({}, {"is_frozen": True}, 2),
    ],
)
def test_newest_match_that_has_what_is_needed_is_taken(
    paths: PathProvider, tag: Any, config: dict[str, Any], model: dict[str, Any], value: float
) -> None:
    """Optimizer state is needed where the config asks for it and the model has an optimizer that is trained."""
    stack, started = stack_for(paths, checkpoint_tag=tag, **config), model_of(0, **model)
    assert stack.plan(started).problems == ()
    stack.initialize(started)
    assert started.weight.unique().tolist() == [value]


@pytest.mark.parametrize("tag", ["E11", "latest", "E10_U2_S2"])
def test_state_that_no_match_has_is_a_problem_of_the_plan(paths: PathProvider, tag: str) -> None:
    """The plan of the weights is there beside it, and the advice names the set that has everything."""
    stack, started = stack_for(paths, checkpoint_tag=tag), model_of(0)
    plan = stack.plan(started)
    assert [problem.code for problem in plan.problems] == ["optimizer"]
    assert len(plan.rows) == 2
    with pytest.raises(
        IncompleteSetError, match=r"has no optimizer state\. Next: resume from E10_U1_S1, with "
    ) as caught:
        stack.initialize(started)
    assert caught.value.candidates == ("E10_U1_S1",)
    assert started.weight.unique().tolist() == [0]


def test_advice_does_not_name_the_set_that_failed(tmp_path: Path) -> None:
    """An iteration that was saved again without state is meant by its name, so that the name is no advice."""
    paths = PathProvider(tmp_path, "old")
    writer = CheckpointWriter(paths)
    writer.save(model_of(1), TrainingIteration(10, 1, 1))
    writer.save(model_of(2, has_optimizer=False), TrainingIteration(10, 1, 1))
    with pytest.raises(
        IncompleteSetError, match=r"Next: checkpoint_tag: U1 \(in initializers\.0\) selects 0{7}1"
    ) as caught:
        stack_for(paths, checkpoint_tag="E10_U1_S1").initialize(model_of(0))
    assert "resume from" not in str(caught.value)
    started = model_of(0)
    stack_for(paths, checkpoint_tag="U1").initialize(started)
    assert started.weight.unique().tolist() == [1]


def test_files_of_a_model_that_is_not_known_yet_are_found(paths: PathProvider) -> None:
    """Whether it has an optimizer cannot be told; its weights are located all the same."""
    initializer = stack_for(paths, checkpoint_tag="E10").initializers[0]
    assert isinstance(initializer, SourceInitializer)
    found = initializer.locate(LocateQuery("net"))
    assert found is not None
    assert found.origin["iteration"] == "E10_U2_S2"
