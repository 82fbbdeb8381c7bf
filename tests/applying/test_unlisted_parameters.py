"""Parameters that a model's state dict leaves out: they count, and the plan names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    PlanError,
    TrainingIteration,
    bind,
    compose,
)


class Adapter(torch.nn.Module):
    """A frozen base with 110 elements and an adapter with 12, of which only the adapter is saved."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.base, self.lora = torch.nn.Linear(10, 10), torch.nn.Linear(3, 3)
        self.how = how
        if how == "hook":
            self.register_state_dict_post_hook(lambda module, state, prefix, metadata: self._leave_out(state, prefix))
        if how == "tied":
            self.again = self.lora

    @staticmethod
    def _leave_out(state: Any, prefix: str = "") -> None:
        for name in [name for name in state if name.startswith((f"{prefix}base.", f"{prefix}again."))]:
            del state[name]

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        """Without the base where that is overridden, and without the second name of what is tied."""
        state = super().state_dict(*arguments, **keywords)
        if self.how in ("override", "tied"):
            self._leave_out(state)
        return state


def config(tmp_path: Path, model: torch.nn.Module, **fields: Any) -> list[dict[str, Any]]:
    torch.save(dict(model.state_dict()), tmp_path / "adapter.pt")
    return [{"kind": "file", "path": str(tmp_path / "adapter.pt"), **fields}]


@pytest.mark.parametrize("how", ["override", "hook", "tied"])
def test_parameters_that_the_state_dict_leaves_out_count(how: str, tmp_path: Path) -> None:
    """12 of 122 elements come from the file, whatever the state dict lists; a second name of one counts once."""
    source, model = Adapter(how), Adapter(how)
    stack = InitializerStack.from_config(config(tmp_path, source))
    plan = stack.plan(bind(model, "net"))
    assert plan.coverage() == 12 / 122
    kept = {row.target: row.rule for row in plan.rows if row.action == "keep"}
    assert kept == {"base.weight": "not in state_dict()", "base.bias": "not in state_dict()"}
    assert [(one.code, one.keys) for one in plan.warnings] == [("unlisted", ("base.weight", "base.bias"))]
    base = model.base.weight.detach().clone()
    report = stack.initialize(bind(model, "net"))
    assert torch.equal(model.lora.weight, source.lora.weight)
    assert torch.equal(model.base.weight, base)
    assert [one.coverage for one in report.initializers] == [12 / 122]


@pytest.mark.parametrize(
    ("least", "is_met"), [(1.0, False), (0.09, True), ({"lora.": 1.0}, True), ({"base.": 0.1}, False)]
)
def test_min_coverage_counts_them(least: Any, is_met: bool, tmp_path: Path) -> None:
    """Also by the name of what is left out; nothing is loaded where the share is not met."""
    source, model = Adapter("override"), Adapter("override")
    stack = InitializerStack.from_config(config(tmp_path, source, min_coverage=least))
    before = model.lora.weight.detach().clone()
    if is_met:
        stack.initialize(bind(model, "net"))
        assert torch.equal(model.lora.weight, source.lora.weight)
        return
    with pytest.raises(PlanError, match="min_coverage"):
        stack.initialize(bind(model, "net"))
    assert torch.equal(model.lora.weight, before)


def test_a_part_of_a_composite_counts_its_own(tmp_path: Path) -> None:
    """The other part has none that are left out."""
    source = Adapter("hook")
    both = compose("both", {"a": bind(Adapter("hook"), "a"), "b": bind(torch.nn.Linear(2, 2), "b")})
    stack = InitializerStack.from_config(config(tmp_path, source, submodel="a"))
    assert stack.plan(both).coverage() == 12 / 122


def test_a_parameter_that_another_part_lists_is_loaded_there(tmp_path: Path) -> None:
    """It has one row, and no warning says that it keeps its value."""
    hidden = Adapter("hook")
    listing = torch.nn.Module()
    listing.base = hidden.base
    both = compose("both", {"one": bind(hidden, "one"), "two": bind(listing, "two")})
    CheckpointWriter(PathProvider(tmp_path, "run")).save(both, TrainingIteration(1, 1, 1))
    saved = hidden.base.weight.detach().clone()
    torch.nn.init.zeros_(hidden.base.weight)
    stack = InitializerStack.from_config(
        [{"kind": "previous_run", "run_id": "run"}], path_provider=PathProvider(tmp_path, "new")
    )
    plan = stack.plan(both)
    assert (plan.is_fine, plan.coverage(), [one.code for one in plan.warnings]) == (True, 1.0, [])
    stack.initialize(both)
    assert torch.equal(hidden.base.weight, saved)
