"""Optimizer state by parameter name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from noether_init_core.applying.optimizer_state import apply_optimizer, moved_value, optimizer_names
from noether_init_core.errors import StateMismatchError
from noether_init_core.surgery.optimizer_fields import OptimizerPolicies
from noether_init_core.surgery.optimizer_plan import STAYS, Moved, ParameterOrigin, plan_optimizer
from noether_init_core.surgery.steps import Cast, Concat, Pad, Reshape, Stack


class Net(torch.nn.Module):
    """Two layers of one shape, so that a match by position could swap them unnoticed."""

    name = "net"

    def __init__(self, *, swapped: bool = False) -> None:
        super().__init__()
        for layer in ("second", "first") if swapped else ("first", "second"):
            setattr(self, layer, torch.nn.Linear(3, 3))


def trained(
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **arguments: Any
) -> tuple[Net, Any]:
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
    return plan_optimizer(saved, optimizer_names(optimizer, net), shapes, optimizer.param_groups, **more)


def test_state_follows_names_not_positions() -> None:
    """The same layers declared in another order get their own moments."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    other = Net(swapped=True)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    apply_optimizer(plan_for(saved, other, other_optimizer), other_optimizer)
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
    optimizer_class: Callable[..., torch.optim.Optimizer], arguments: dict[str, Any]
) -> None:
    """A restored optimizer takes the step that the original takes."""
    net, optimizer = trained(optimizer_class, **arguments)
    saved = copy.deepcopy(saved_state(net, optimizer))
    other = Net()
    other.load_state_dict(net.state_dict())
    other_optimizer = optimizer_class(other.parameters(), lr=0.7, **arguments)
    apply_optimizer(plan_for(saved, other, other_optimizer), other_optimizer)
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
    apply_optimizer(plan_for(saved, net, optimizer), optimizer)
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
        "state of first.weight not found in the file; near: frist.weight. Next: on_missing_state: fresh",
        "first.bias: exp_avg has shape [7], the parameter [3]",
        "the file has state of frist.weight, not found in the optimizer. Next: on_unexpected_state: ignore",
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
    apply_optimizer(plan, other_optimizer)
    assert other.second.weight not in other_optimizer.state
    moved = other_optimizer.state[other.first.weight]["exp_avg"]
    assert torch.equal(moved, optimizer.state[net.second.weight]["exp_avg"])


def test_a_group_made_of_several_stored_groups_is_refused() -> None:
    """Which of two learning rates would hold cannot be told."""
    net, _optimizer = trained()
    two = torch.optim.AdamW([{"params": net.first.parameters(), "lr": 0.1}, {"params": net.second.parameters()}])
    saved = copy.deepcopy(saved_state(net, two))
    one = torch.optim.AdamW(net.parameters())
    with pytest.raises(StateMismatchError, match="several stored groups") as caught:
        plan_for(saved, net, one)
    assert caught.value.problems == (
        "group 0 holds parameters of several stored groups (first.weight of group 0, second.weight of group 1), which "
        "differ in lr. To keep those of the optimizer: restore: {optimizer: {lr: config}}",
    )


def stepped(*groups: dict[str, Any]) -> tuple[Net, Any]:
    """A net whose layers are in groups of these fields, after one step of AdamW."""
    torch.manual_seed(0)
    net = Net()
    layers = (net.first, net.second)
    optimizer = torch.optim.AdamW(
        [{"params": layer.parameters(), **fields} for layer, fields in zip(layers, groups, strict=True)]
    )
    torch.as_tensor(sum((p**2).sum() for p in net.parameters())).backward()
    optimizer.step()
    return net, optimizer


def test_every_field_that_differs_between_stored_groups_is_ambiguous() -> None:
    """The advice lists exactly these; with it the next step runs, and the optimizer's own values hold."""
    net, two = stepped({"betas": (0.5, 0.6), "amsgrad": True}, {})
    saved = copy.deepcopy(saved_state(net, two))
    one = torch.optim.AdamW(net.parameters(), betas=(0.7, 0.8))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "amsgrad: config, betas: config"),
        ({"amsgrad": "config"}, "betas: config"),
    ]
    for fields, listed in cases:
        with pytest.raises(StateMismatchError) as caught:
            plan_for(saved, net, one, policies=OptimizerPolicies(fields=fields))
        (problem,) = caught.value.problems
        assert problem.endswith(f"restore: {{optimizer: {{{listed}}}}}")
    own = OptimizerPolicies(fields={"amsgrad": "config", "betas": "config"})
    apply_optimizer(plan_for(saved, net, one, policies=own), one)
    assert (one.param_groups[0]["betas"], one.param_groups[0]["amsgrad"]) == ((0.7, 0.8), False)
    one.step()
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())


def test_stored_groups_that_do_not_differ_become_one() -> None:
    """Nothing is ambiguous where all of them say the same."""
    net, two = stepped({"lr": 0.25}, {"lr": 0.25})
    one = torch.optim.AdamW(net.parameters())
    plan = plan_for(copy.deepcopy(saved_state(net, two)), net, one)
    assert plan.fields[0]["lr"] == 0.25
    assert all(state is not None for state in plan.state[0])


def test_a_field_that_needs_state_which_the_file_has_not_is_refused() -> None:
    """With amsgrad of the config, and state that was kept without, the next step would fail."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    other = torch.optim.AdamW(net.parameters(), amsgrad=True)
    assert plan_for(saved, net, other).fields[0]["amsgrad"] is False
    own = OptimizerPolicies(fields={"amsgrad": "config"})
    with pytest.raises(StateMismatchError) as caught:
        plan_for(saved, net, other, policies=own)
    assert caught.value.problems == (
        "amsgrad of the optimizer is True and needs max_exp_avg_sq, not found in the file for first.weight, "
        "first.bias, second.weight, second.bias. Next: build the optimizer without amsgrad, or load_optim: false",
    )


def test_the_first_learning_rate_goes_with_the_learning_rate() -> None:
    """A schedule sets lr from initial_lr: that of the checkpoint would undo what the config keeps."""
    net, optimizer = trained()
    optimizer.param_groups[0]["initial_lr"] = 0.4
    saved = copy.deepcopy(saved_state(net, optimizer))
    cases: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"lr": "config"}, False),
        ({"*": "config", "lr": "checkpoint"}, True),
        ({"lr": "config", "initial_lr": "checkpoint"}, True),
        ({"initial_lr": "config"}, False),
    ]
    for fields, is_taken in cases:
        fresh = torch.optim.AdamW(net.parameters(), lr=0.5)
        apply_optimizer(plan_for(saved, net, fresh, policies=OptimizerPolicies(fields=fields)), fresh)
        schedule = torch.optim.lr_scheduler.LambdaLR(fresh, lambda _epoch: 1.0)
        wanted = 0.4 if is_taken else (0.5 if "lr" in fields else 0.1)
        assert schedule.get_last_lr() == [wanted], fields


def state_of(values: dict[str, Any], shape: tuple[int, ...], *, sources: int = 1) -> dict[str, Any]:
    """A stored state of ``sources`` parameters called s0, s1, ... with the same values."""
    names = [f"s{number}" for number in range(sources)]
    groups = [{"lr": 0.1, "params": list(range(sources))}]
    return {
        "state": {number: dict(values) for number in range(sources)},
        "param_groups": groups,
        "param_idx_to_name": dict(enumerate(names)),
    }


def moved(values: dict[str, Any], before: tuple[int, ...], after: tuple[int, ...], *steps: Any, **more: Any) -> Any:
    """What becomes of the state of sources of shape ``before`` for a parameter of shape ``after``."""
    sources = more.pop("sources", 1)
    origin = ParameterOrigin(
        tuple(f"s{number}" for number in range(sources)), steps, source_shapes=(before,) * sources, **more
    )
    saved = state_of(values, before, sources=sources)
    (row,) = plan_optimizer(saved, [["p"]], {"p": after}, saved["param_groups"], origins={"p": origin}).state
    return row[0]


def test_moments_of_a_scalar_go_its_way_and_its_counter_does_not() -> None:
    """What counts is told by its key, or by having one number where the parameter has many."""
    values = {"step": torch.tensor(3.0), "exp_avg": torch.tensor(2.0)}
    state = moved(values, (), (1,), Reshape((1,)))
    assert state["step"] is values["step"]
    assert moved_value(state["exp_avg"], [values["exp_avg"]], "x").tolist() == [2.0]
    state = moved(values, (), (2,), Stack(0), sources=2)
    assert moved_value(state["step"], [values["step"]] * 2, "x") == 3.0
    assert moved_value(state["exp_avg"], [torch.tensor(1.0), torch.tensor(2.0)], "x").tolist() == [1.0, 2.0]
    state = moved({"calls": 4, "scale": torch.tensor(2.0)}, (2,), (4,), Concat(0), sources=2)
    assert moved_value(state["calls"], [4, 4], "x") == 4
    with pytest.raises(StateMismatchError, match="counters that differ"):
        moved_value(state["scale"], [torch.tensor(1.0), torch.tensor(2.0)], "x")


def fused(states: dict[int, dict[str, Any]]) -> Any:
    """The plan of a parameter that is put together from two, with a stored state of each index."""
    saved = {
        "state": states,
        "param_groups": [{"params": [0, 1, 2], "lr": 0.1}],
        "param_idx_to_name": {0: "q", 1: "k", 2: "old"},
    }
    origins = {"qk": ParameterOrigin(("q", "k"), (Concat(0),), source_shapes=((1, 2), (1, 2)))}
    return plan_optimizer(saved, [["qk"]], {"qk": (2, 2)}, [{"lr": 0.1}], origins=origins)


def test_state_is_put_together_from_states_with_the_same_keys() -> None:
    """Where one source has none, or another set of them, nobody could say what the whole has."""
    moment = torch.ones(1, 2)
    assert fused({}).state == ((None,),)
    assert fused({0: {"momentum_buffer": moment}, 1: {"momentum_buffer": moment}}).state[0][0].keys() == {
        "momentum_buffer"
    }
    # SGD keeps None until the momentum begins
    assert fused({0: {"momentum_buffer": moment}, 1: {"momentum_buffer": moment, "other": None}}).warnings == ()
    refused: tuple[dict[int, dict[str, Any]], ...] = (
        {0: {"momentum_buffer": moment}},
        {0: {"momentum_buffer": moment}, 1: {"momentum_buffer": None}},
    )
    for states in refused:
        with pytest.raises(StateMismatchError) as caught:
            fused(states)
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith("qk comes from q, k")


def test_only_state_that_is_there_is_reported_as_left() -> None:
    """A parameter that was frozen has a name in the file, and no state that somebody could miss."""
    moment = {"momentum_buffer": torch.ones(1, 2)}
    assert fused({0: moment, 1: moment}).warnings == ()
    (warning,) = fused({0: moment, 1: moment, 2: moment}).warnings
    assert "old" in warning


def test_moments_are_padded_with_zeros() -> None:
    """The value of a pad is one of the parameter."""
    state = moved({"exp_avg": torch.ones(2)}, (2,), (4,), Pad(4, 0, -3.0))
    assert moved_value(state["exp_avg"], [torch.ones(2)], "x").tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("stored", "dtypes", "wanted"),
    [
        (torch.float32, ("float32", "float32"), torch.float32),
        (torch.float32, ("float32", "bfloat16"), torch.bfloat16),
        (torch.float32, ("bfloat16", "bfloat16"), torch.float32),
        (torch.float32, ("bfloat16", "float16"), torch.float32),
    ],
)
def test_a_cast_leaves_moments_in_the_dtype_that_goes_with_the_parameter(
    stored: torch.dtype, dtypes: tuple[str, str], wanted: torch.dtype
) -> None:
    """Those in the dtype of the stored parameter get that of the model's, wherever the cast went; others stay."""
    values = torch.full((2,), 1 / 3, dtype=stored)
    value = moved({"exp_avg": values}, (2,), (2,), Cast("bfloat16"), dtypes=dtypes)["exp_avg"]
    made = moved_value(value, [values], "x") if isinstance(value, Moved) else value
    assert made.dtype == wanted
    assert torch.equal(made, values.to(wanted))


def test_complex_moments_do_not_become_real() -> None:
    """Half of each value would be gone, silently."""
    with pytest.raises(StateMismatchError, match=r"complex64 do not fit torch\.float32"):
        moved_value(Moved((None,), dtype="float32"), [torch.tensor([1 + 2j])], "x")
    wider = moved_value(Moved((None,), dtype="complex128"), [torch.tensor([1 + 2j])], "x")
    assert wider.tolist() == [1 + 2j]


def test_state_that_stays_is_left_as_it_is() -> None:
    """Neither deleted nor replaced, also where the optimizer loads its state itself."""

    class Own(torch.optim.AdamW):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)

    for kind in (torch.optim.AdamW, Own):
        net, optimizer = trained(kind)
        saved = copy.deepcopy(saved_state(net, optimizer))
        mine = {name: optimizer.state[p]["exp_avg"].fill_(7.0) for name, p in net.named_parameters()}
        origins = {f"first.{leaf}": ParameterOrigin(stays=True) for leaf in ("weight", "bias")}
        plan = plan_for(saved, net, optimizer, origins=origins)
        assert plan.state[0][:2] == (STAYS, STAYS)
        apply_optimizer(plan, optimizer)
        assert optimizer.state[net.first.weight]["exp_avg"].unique().tolist() == [7.0]
        assert torch.equal(optimizer.state[net.second.weight]["exp_avg"], saved["state"][2]["exp_avg"])
        assert mine["first.bias"].unique().tolist() == [7.0]


def test_state_that_stays_has_to_go_with_the_fields_that_its_group_takes() -> None:
    """A second checkpoint with amsgrad would have the next step look for state that the first one has not."""
    net, with_it = trained(amsgrad=True)
    saved = copy.deepcopy(saved_state(net, with_it))
    net, optimizer = trained()
    plan = plan_for(saved, net, optimizer, origins={"first.weight": ParameterOrigin(stays=True)})
    with pytest.raises(StateMismatchError, match=r"Next: restore: \{optimizer: \{amsgrad: config\}\}"):
        apply_optimizer(plan, optimizer)
    assert optimizer.param_groups[0]["amsgrad"] is False


def test_files_without_names_are_matched_by_position_with_a_warning() -> None:
    """A state dict that plain torch wrote fits an optimizer of the same groups; otherwise it is refused."""
    net, optimizer = trained()
    plan = plan_for(copy.deepcopy(optimizer.state_dict()), net, optimizer, where="x.th")
    assert plan.warnings == ("x.th records no parameter names; parameters were matched by position",)
    smaller = torch.optim.AdamW(net.first.parameters())
    with pytest.raises(StateMismatchError, match="no parameter names"):
        plan_for(copy.deepcopy(optimizer.state_dict()), net, smaller, where="x.th")


def test_fields_of_groups_can_stay_as_configured() -> None:
    """As in Noether's wrapper, the learning rate of the config holds and only the state is restored."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    other_optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    policies = OptimizerPolicies(fields={"*": "config"})
    apply_optimizer(plan_for(saved, net, other_optimizer, policies=policies), other_optimizer)
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
        plan_for(saved, net, sgd)
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(StateMismatchError, match="another class of optimizer"):
        plan_for(saved, net, adam)
    recorded = {**saved, "optimizer_class": "torch.optim.adamw.AdamW"}
    with pytest.raises(
        StateMismatchError, match=r"of a torch\.optim\.adamw\.AdamW, the optimizer is a torch\.optim\.sgd"
    ):
        plan_for(recorded, net, sgd, optimizer_class="torch.optim.sgd.SGD")
    again = torch.optim.AdamW(net.parameters())
    plan_for(recorded, net, again, optimizer_class="torch.optim.adamw.AdamW")


def test_groups_that_differ_do_not_share_one_stored_group() -> None:
    """A learning rate that the script sets for one group would silently become that of the other."""
    net, optimizer = trained()
    saved = copy.deepcopy(saved_state(net, optimizer))
    two = torch.optim.AdamW([{"params": net.first.parameters(), "lr": 1e-5}, {"params": net.second.parameters()}])
    with pytest.raises(StateMismatchError, match="groups 0 and 1 of the optimizer differ in lr"):
        plan_for(saved, net, two)
    other = torch.optim.AdamW([{"params": net.first.parameters(), "eps": 1e-3}, {"params": net.second.parameters()}])
    with pytest.raises(StateMismatchError, match="groups 0 and 1 of the optimizer differ in eps"):
        plan_for(saved, net, other)
    own = OptimizerPolicies(fields={"eps": "config"})
    assert "eps" not in plan_for(saved, net, other, policies=own).fields[0]
    alike = torch.optim.AdamW([{"params": net.first.parameters()}, {"params": net.second.parameters()}])
    assert plan_for(saved, net, alike).fields[1]["lr"] == 0.1


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_optimizer_that_refuses_its_state_is_put_back(error: type[BaseException]) -> None:
    """State and fields are as before when the optimizer's own code raises, or is interrupted."""

    class Refusing(torch.optim.SGD):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            raise error("not this one")

    net, optimizer = trained(torch.optim.SGD, momentum=0.9)
    saved = copy.deepcopy(saved_state(net, optimizer))
    other = Refusing(net.parameters(), lr=0.5, momentum=0.9)
    with pytest.raises(error, match="not this one"):
        apply_optimizer(plan_for(saved, net, other), other)
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
