"""Optimizer state by parameter name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from noether_init_core.errors import StateMismatchError
from noether_init_core.surgery.optimizer import (
    OptimizerPolicies,
    ParameterOrigin,
    optimizer_names,
    plan_optimizer,
)
from noether_init_core.surgery.optimizer_state import apply_optimizer


class Net(torch.nn.Module):
    """Two layers of one shape, so that a match by position could swap them unnoticed."""

    name = "net"

    def __init__(self, *, swapped: bool = False) -> None:
        super().__init__()
        for layer in ("second", "first") if swapped else ("first", "second"):
            setattr(self, layer, torch.nn.Linear(3, 3))


def trained(optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **arguments: Any) -> tuple[Net, Any]:
    torch.manual_seed(0)
    net = Net()
    optimizer = optimizer_class(net.parameters(), lr=0.1, **arguments)
    for _ in range(3):
        optimizer.zero_grad()
        (net.second(net.first(torch.randn(4, 3))) ** 2).sum().backward()
        optimizer.step()
    return net, optimizer


def saved_state(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = [name for group in optimizer_names(optimizer, net) for name in group]
    return {**optimizer.state_dict(), "param_idx_to_name": dict(enumerate(names))}


def plan_for(saved: dict[str, Any], net: Net, optimizer: torch.optim.Optimizer, **more: Any) -> Any:
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    return plan_optimizer(saved, optimizer_names(optimizer, net), shapes, **more)


def same(value: Any) -> Any:
    return value


def test_state_follows_names_not_positions() -> None:
    """The same layers declared in another order get their own moments."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    other = Net(swapped=True)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    apply_optimizer(plan_for(saved, other, other_optimizer), other_optimizer, same)
    for layer in ("first", "second"):
        for leaf in ("weight", "bias"):
            mine, theirs = getattr(getattr(net, layer), leaf), getattr(getattr(other, layer), leaf)
            assert torch.equal(optimizer.state[mine]["exp_avg"], other_optimizer.state[theirs]["exp_avg"])
    assert other_optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("optimizer_class", "arguments"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.NAdam, {}),
    ],
)
def test_the_next_step_is_the_same_bit_for_bit(
    optimizer_class: type[torch.optim.Optimizer], arguments: dict[str, Any]
) -> None:
    """A restored optimizer takes the step that the original takes."""
    net, optimizer = trained(optimizer_class, **arguments)
    saved = copy.deepcopy(saved_state(net, optimizer))
    other = Net()
    other.load_state_dict(net.state_dict())
    other_optimizer = optimizer_class(other.parameters(), lr=0.7, **arguments)
    apply_optimizer(plan_for(saved, other, other_optimizer), other_optimizer, same)
    inputs = torch.randn(4, 3)
    for model, its in ((net, optimizer), (other, other_optimizer)):
        its.zero_grad()
        (model.second(model.first(inputs)) ** 2).sum().backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_moments_keep_their_dtype() -> None:
    """Moments in float32 beside bfloat16 parameters stay float32, where torch would round them."""
    net = Net().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters())
    names = [name for name, _parameter in net.named_parameters()]
    state = {
        index: {"step": torch.tensor(2.0), "exp_avg": torch.full_like(p, 1 / 3, dtype=torch.float32)}
        for index, p in enumerate(net.parameters())
    }
    groups = [{**optimizer.state_dict()["param_groups"][0]}]
    saved = {"state": state, "param_groups": groups, "param_idx_to_name": dict(enumerate(names))}
    apply_optimizer(plan_for(saved, net, optimizer), optimizer, same)
    moment = optimizer.state[net.first.weight]["exp_avg"]
    assert moment.dtype == torch.float32
    assert torch.equal(moment, torch.full((3, 3), 1 / 3))


def test_all_misfits_are_listed_and_nothing_changes() -> None:
    """New parameters, vanished ones and wrong shapes are told together; the optimizer is as it was."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    saved["param_idx_to_name"][0] = "frist.weight"
    saved["state"][1]["exp_avg"] = torch.zeros(7)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(StateMismatchError) as caught:
        plan_for(saved, net, optimizer, where="net_cp=latest_optim.th")
    assert caught.value.problems == (
        "first.weight has no state in the file; near: frist.weight",
        "first.bias: exp_avg has shape [7], the parameter [3]",
        "the file has state of frist.weight, which the optimizer has not. To leave it: on_unexpected_state: ignore",
    )
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i]["exp_avg"], before["state"][i]["exp_avg"]) for i in range(4))


def test_parameters_that_keep_their_values_start_with_fresh_state() -> None:
    """A rule that keeps a parameter of the model leaves its moments to begin anew; a rename takes its source's."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    other = Net()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    origins = {"first.weight": ParameterOrigin(("second.weight",)), "second.weight": ParameterOrigin()}
    plan = plan_for(saved, other, other_optimizer, origins=origins)
    apply_optimizer(plan, other_optimizer, same)
    assert plan.fresh == ("second.weight",)
    assert other.second.weight not in other_optimizer.state
    moved = other_optimizer.state[other.first.weight]["exp_avg"]
    assert torch.equal(moved, optimizer.state[net.second.weight]["exp_avg"])


def test_a_group_made_of_several_stored_groups_is_refused() -> None:
    """Which of two learning rates would hold cannot be told."""
    net, _optimizer = trained()
    two = torch.optim.AdamW([{"params": net.first.parameters(), "lr": 0.1}, {"params": net.second.parameters()}])
    saved = copy.deepcopy(saved_state(net, two))
    one = torch.optim.AdamW(net.parameters())
    with pytest.raises(StateMismatchError, match="several stored groups"):
        plan_for(saved, net, one)


def test_files_without_names_are_matched_by_position_with_a_warning() -> None:
    """A state dict that plain torch wrote fits an optimizer of the same groups; otherwise it is refused."""
    net, optimizer = trained()
    plan = plan_for(copy.deepcopy(optimizer.state_dict()), net, optimizer, where="x.th")
    assert plan.warnings == ("x.th records no names of parameters; they are matched by position",)
    smaller = torch.optim.AdamW(net.first.parameters())
    with pytest.raises(StateMismatchError, match="no names"):
        plan_for(copy.deepcopy(optimizer.state_dict()), net, smaller, where="x.th")


def test_fields_of_groups_can_stay_as_configured() -> None:
    """As in Noether's wrapper, the learning rate of the config holds and only the state is restored."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    other_optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    apply_optimizer(plan_for(saved, net, other_optimizer), other_optimizer, same, keep_fields=True)
    assert other_optimizer.param_groups[0]["lr"] == 0.5
    assert net.first.weight in other_optimizer.state


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    """Parameters that the model has not cannot be named."""
    with pytest.raises(StateMismatchError, match="not parameters of the model"):
        optimizer_names(torch.optim.SGD(Net().parameters(), lr=0.1), Net())


def test_the_state_of_another_class_of_optimizer_is_refused() -> None:
    """By the recorded class, and in files that record none by the fields of the groups."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    sgd = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    with pytest.raises(StateMismatchError, match="another class of optimizer"):
        plan_for(saved, net, sgd, current=sgd.param_groups)
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(StateMismatchError, match="another class of optimizer"):
        plan_for(saved, net, adam, current=adam.param_groups)
    recorded = {**saved, "optimizer_class": "torch.optim.adamw.AdamW"}
    with pytest.raises(
        StateMismatchError, match=r"of a torch\.optim\.adamw\.AdamW, the optimizer is a torch\.optim\.sgd"
    ):
        plan_for(recorded, net, sgd, current=sgd.param_groups, optimizer_class="torch.optim.sgd.SGD")
    again = torch.optim.AdamW(net.parameters())
    plan_for(recorded, net, again, current=again.param_groups, optimizer_class="torch.optim.adamw.AdamW")


def test_groups_that_differ_do_not_share_one_stored_group() -> None:
    """A learning rate that the script sets for one group would silently become that of the other."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    two = torch.optim.AdamW([{"params": net.first.parameters(), "lr": 1e-5}, {"params": net.second.parameters()}])
    with pytest.raises(StateMismatchError, match="groups 0 and 1 of the optimizer differ in lr"):
        plan_for(saved, net, two, current=two.param_groups)
    other = torch.optim.AdamW([{"params": net.first.parameters(), "eps": 1e-3}, {"params": net.second.parameters()}])
    with pytest.raises(StateMismatchError, match="groups 0 and 1 of the optimizer differ in eps"):
        plan_for(saved, net, other, current=other.param_groups)
    own = OptimizerPolicies(fields={"eps": "config"})
    assert "eps" not in plan_for(saved, net, other, current=other.param_groups, policies=own).fields[0]
    alike = torch.optim.AdamW([{"params": net.first.parameters()}, {"params": net.second.parameters()}])
    assert plan_for(saved, net, alike, current=alike.param_groups).fields[1]["lr"] == 0.1


def test_state_is_found_under_another_name_of_a_shared_parameter() -> None:
    """A module registered twice has parameters of two names; the file may know the second one."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    saved["param_idx_to_name"] = {
        index: name.replace("first", "alias") for index, name in saved["param_idx_to_name"].items()
    }
    aliases = {"first.weight": ("first.weight", "alias.weight"), "first.bias": ("first.bias", "alias.bias")}
    plan = plan_for(saved, net, optimizer, aliases=aliases)
    assert all(state is not None for state in plan.state[0])


def test_an_optimizer_that_refuses_its_state_is_put_back() -> None:
    """State and fields are as before when the optimizer's own code raises."""

    class Refusing(torch.optim.SGD):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            raise RuntimeError("not this one")

    net, optimizer = trained(torch.optim.SGD, momentum=0.9)
    saved = copy.deepcopy(saved_state(net, optimizer))
    other = Refusing(net.parameters(), lr=0.5, momentum=0.9)
    with pytest.raises(RuntimeError, match="not this one"):
        apply_optimizer(plan_for(saved, net, other), other, same)
    assert other.param_groups[0]["lr"] == 0.5
    assert not other.state


def test_moments_of_another_shape_are_refused_and_factors_are_not() -> None:
    """A first moment has the shape of its parameter; row and column factors of Adafactor have not."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    saved["state"][0]["exp_avg"] = torch.zeros(1, 3)
    saved["state"][2]["exp_avg_sq"] = torch.zeros(9)
    with pytest.raises(StateMismatchError) as caught:
        plan_for(saved, net, optimizer)
    assert caught.value.problems == (
        "first.weight: exp_avg has shape [1, 3], the parameter [3, 3]",
        "second.weight: exp_avg_sq has shape [9], the parameter [3, 3]",
    )
