"""Models with loading code load as by torch's own ``load_state_dict``, or their plan refuses them."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrizations

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, PlanError, TrainingIteration, bind

nn: Any = torch.nn


class Halves(torch.nn.Module):
    """Doubles what it loads, and computes with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and key.endswith("original")]:
            state_dict[key] = state_dict[key] * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Renames(torch.nn.Module):
    """Called its weight ``w`` before, or ``old``; a hook renames it."""

    def __init__(self, how: str = "method") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3))
        self.bias = torch.nn.Parameter(torch.randn(3))
        if how == "public":
            self.register_load_state_dict_pre_hook(
                lambda module, state, prefix, *rest: module.rename(state, prefix, *rest)
            )
        elif how == "private":
            self._register_load_state_dict_pre_hook(self.rename)
        elif how == "closure":
            own = self

            def hook(state: Any, prefix: str, *rest: Any) -> None:
                own.rename(state, prefix, *rest)

            self._register_load_state_dict_pre_hook(hook)
        elif how == "instance":
            load = self._load_from_state_dict

            def renamed(self: Any, state: Any, prefix: str, *rest: Any) -> None:
                self.rename(state, prefix)
                load(state, prefix, *rest)

            self._load_from_state_dict = types.MethodType(renamed, self)  # type: ignore[method-assign]

    def rename(self, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        for old in ("w", "old"):
            if f"{prefix}{old}" in state:
                state[f"{prefix}weight"] = state.pop(f"{prefix}{old}")


class Overrides(torch.nn.Module):
    """Adds a prefix to the names of its file, in ``load_state_dict`` itself."""

    def __init__(self, how: str = "class") -> None:
        super().__init__()
        self.body = torch.nn.Linear(3, 3)
        if how == "instance":
            load = self.load_state_dict

            def longer(state: Any, strict: bool = True, assign: bool = False) -> Any:
                return load(self.longer(state), strict, assign)

            self.load_state_dict = longer  # type: ignore[assignment, method-assign]
        self.how = how

    @staticmethod
    def longer(state: Any) -> dict[str, Any]:
        return {name if name.startswith("body.") else f"body.{name}": value for name, value in state.items()}


class OverridesClass(Overrides):
    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(self.longer(state), strict, assign)


class Stacks(torch.nn.Module):
    """Had three weights before, which it stacks; the file has another shape for its position, which it resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Parameter(torch.randn(9, 3))
        self.register_buffer("seen", torch.zeros(0))
        self.register_load_state_dict_pre_hook(self.stack)

    @staticmethod
    def stack(module: Any, state: Any, prefix: str, *_rest: Any) -> None:
        if f"{prefix}q" in state:
            state[f"{prefix}qkv"] = torch.cat([state.pop(f"{prefix}{name}") for name in "qkv"])
        if f"{prefix}seen" in state:
            module.seen.resize_(state[f"{prefix}seen"].shape)
        state.pop(f"{prefix}unused", None)


class ByValue(torch.nn.Module):
    """Looks at values while it loads, so that it cannot be rehearsed on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        scale = float(state_dict.pop(f"{prefix}scale", torch.ones(())))
        if scale < 0:
            raise ValueError("a scale is positive")
        if scale != 1.0:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}scaled") * scale
        super()._load_from_state_dict(state_dict, prefix, *rest)


def renamed(**names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        for new, old in names.items():
            new = new.replace("__", ".")
            if new in state:
                state[old] = state.pop(new)
        return state

    return change


def split(state: dict[str, Any]) -> dict[str, Any]:
    q, k, v = state.pop("0.qkv").split(3)
    return {"0.q": q, "0.k": k, "0.v": v, "0.seen": torch.arange(4.0), "0.unused": torch.ones(2)}


def by_value(state: dict[str, Any]) -> dict[str, Any]:
    return {"0.scaled": state["0.weight"] / 4, "0.scale": torch.tensor(4.0)}


def old_norm(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in state.items()
    }


def same(state: dict[str, Any]) -> dict[str, Any]:
    return state


def without_count(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def observer() -> Any:
    made = torch.ao.quantization.PerChannelMinMaxObserver()
    made(torch.randn(4, 5))
    return made


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    **{
        f"renames by {how}": (lambda how=how: nn.Sequential(nn.Linear(3, 3), Renames(how)),) * 2
        + (renamed(**{"1__weight": "1.old"}),)
        for how in ("private", "public", "closure", "instance")
    },
    "renames at the root": (lambda: Renames("private"), lambda: Renames("private"), renamed(weight="w")),
    "overrides load_state_dict": (OverridesClass, OverridesClass, renamed(body__weight="weight", body__bias="bias")),
    "load_state_dict of an instance": (
        lambda: Overrides("instance"),
        lambda: Overrides("instance"),
        renamed(body__weight="weight"),
    ),
    "below a parametrization": (
        lambda: nn.Sequential(parametrizations.orthogonal(Halves())),
        lambda: nn.Sequential(parametrizations.orthogonal(Halves())),
        same,
    ),
    "weight norm of an older torch": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))),
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))),
        old_norm,
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3))),
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3))),
        same,
    ),
    "stacks and resizes": (lambda: nn.Sequential(Stacks()), lambda: nn.Sequential(Stacks()), split),
    "an observer that resizes": (
        lambda: nn.Sequential(observer()),
        lambda: nn.Sequential(torch.ao.quantization.PerChannelMinMaxObserver()),
        same,
    ),
    "looks at values": (lambda: nn.Sequential(ByValue()), lambda: nn.Sequential(ByValue()), by_value),
    "a norm without its count": (
        lambda: nn.Sequential(nn.BatchNorm1d(3)),
        lambda: nn.Sequential(nn.BatchNorm1d(3)),
        without_count,
    ),
}


def initialize(tmp_path: Path, state: Any, model: torch.nn.Module, **config: Any) -> Any:
    torch.save(state, tmp_path / "weights.pt")
    stack = InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "weights.pt"), **config}])
    plan = stack.plan(bind(model, "net"))
    assert plan.is_fine, plan.problems
    stack.initialize(bind(model, "net"))
    return plan


def assert_same(model: torch.nn.Module, truth: torch.nn.Module) -> None:
    found, wanted = model.state_dict(), truth.state_dict()
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_torch(name: str, wrapper: str, tmp_path: Path) -> None:
    """The plan is fine, and bits are equal; the file may be one of a wrapped model."""
    make_source, make_target, change = CASES[name]
    torch.manual_seed(0)
    state = change(make_source().state_dict())
    target = make_target()
    truth = copy.deepcopy(target) if "instance" not in name and "closure" not in name else make_target()
    truth.load_state_dict(dict(state))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    if "instance" in name or "closure" in name:
        assert not torch.equal(before[list(before)[-1]], truth.state_dict()[list(before)[-1]])
    initialize(tmp_path, {f"{wrapper}{key}": value for key, value in state.items()}, target)
    assert_same(target, truth)


def test_the_plan_names_what_loading_code_does(tmp_path: Path) -> None:
    """Renames, computed values, entries that it drops and entries that it fills, each with the code."""
    model = nn.Sequential(Stacks(), Renames("public"), nn.BatchNorm1d(3))
    state = {
        **split(dict(model.state_dict())),
        **renamed(**{"1__weight": "1.w"})({key: one for key, one in model.state_dict().items() if key[0] == "1"}),
        **without_count({key: one for key, one in model.state_dict().items() if key[0] == "2"}),
    }
    plan = initialize(tmp_path, state, model)
    rows = {row.key: (row.action, sorted(row.sources), row.rule) for row in plan.rows}
    assert rows["0.qkv"] == ("transform", ["0.k", "0.q", "0.v"], "loading code of Stacks")
    assert rows["0.seen"] == ("transform", ["0.seen"], "loading code of Stacks")
    assert rows["0.unused"] == ("removed", ["0.unused"], "loading code of Stacks")
    assert rows["1.weight"] == ("rename", ["1.w"], "loading code of Renames")
    assert rows["1.bias"] == ("load", ["1.bias"], None)
    assert rows["2.num_batches_tracked"] == ("keep", [], "loading code of BatchNorm1d")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"1.scale": torch.tensor(-1.0)}, "ByValue at 1 fails: ValueError: a scale is positive"),
        ({"1.scale": torch.tensor(2.0)}, "ByValue at 1 fails: KeyError: '1.scaled'"),
    ],
)
def test_loading_code_that_fails_is_a_problem_of_the_plan(wrong: Any, words: str, tmp_path: Path) -> None:
    """Because of values or names: nothing is changed."""

    class Checked(ByValue):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

    model = nn.Sequential(nn.Linear(3, 3), Checked())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({**{key: value + 1 for key, value in before.items()}, **wrong}, tmp_path / "weights.pt")
    stack = InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "weights.pt")}])
    message = words.replace("ByValue", "Checked")
    assert [message in one.message for one in stack.plan(bind(model, "net")).problems] == [True]
    with pytest.raises(PlanError, match="Nothing was changed"):
        stack.initialize(bind(model, "net"))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


class Counts(torch.nn.Module):
    """Extra state that must be a number."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.value = value

    def get_extra_state(self) -> Any:
        return {"value": self.value}

    def set_extra_state(self, state: Any) -> None:
        self.value = int(state["value"])
        with torch.no_grad():
            self.linear.weight.fill_(self.value)


def test_extra_state_that_is_refused_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    """Its code runs as torch runs it: before the entries of inner modules are loaded."""
    model = nn.Sequential(nn.Linear(2, 2), Counts(1))
    source = nn.Sequential(nn.Linear(2, 2), Counts("many"))
    before = {key: value.clone() for key, value in model.state_dict().items() if "extra" not in key}
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    stack = InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "weights.pt")}])
    assert "Counts at 1 fails: ValueError" in stack.plan(bind(model, "net")).problems[0].message
    with pytest.raises(PlanError, match="Nothing was changed"):
        stack.initialize(bind(model, "net"))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    source[1].value = 7
    initialize(tmp_path, source.state_dict(), model)
    assert model[1].value == 7
    assert torch.equal(model[1].linear.weight, source[1].linear.weight)


class Adapter(torch.nn.Module):
    """Saves its adapter only; a hook before a load may supply the base."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.base, self.lora = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(1))
        self.register_state_dict_post_hook(self.leave_out)
        if how == "supplies":
            self.register_load_state_dict_pre_hook(self.supply)
        elif how == "only looks":
            self.register_load_state_dict_pre_hook(lambda *rest: None)

    @staticmethod
    def leave_out(module: Any, state: Any, prefix: str, _metadata: Any) -> None:
        for name in ("base.weight", "base.bias", "scale"):
            del state[f"{prefix}{name}"]

    @staticmethod
    def supply(module: Any, state: Any, prefix: str, *_rest: Any) -> None:
        for name, value in module.base.named_parameters():
            state.setdefault(f"{prefix}base.{name}", value.detach())
        state.setdefault(f"{prefix}scale", module.scale)


@pytest.mark.parametrize("how", ["supplies", "only looks", "no hook"])
def test_an_adapter_loads_what_its_file_has(how: str, tmp_path: Path) -> None:
    """The base stays as it is, and is loaded with a persistent buffer where the file has them, as by torch."""
    source, model = Adapter(how), Adapter(how)
    base = model.base.weight.detach().clone()
    plan = initialize(tmp_path, source.state_dict(), model)
    assert torch.equal(model.lora.weight, source.lora.weight)
    assert torch.equal(model.base.weight, base)
    assert {row.key: row.rule for row in plan.rows if row.action == "keep"} == {
        "base.weight": "not in state_dict()",
        "base.bias": "not in state_dict()",
        "scale": "not in state_dict()",
    }
    assert plan.coverage() == 0.5
    whole = {**source.state_dict(), **{f"base.{key}": one for key, one in source.base.state_dict().items()}}
    plan = initialize(tmp_path, {**whole, "scale": torch.full((1,), 3.0)}, model)
    assert torch.equal(model.base.weight, source.base.weight)
    assert torch.equal(model.get_buffer("scale"), torch.full((1,), 3.0))
    assert plan.coverage() == 1.0


class Labelled(torch.nn.Linear):
    """Puts something that is no tensor into its state dict, and takes it out."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().state_dict(*args, **kwargs), "_metadata": {"version": "1", "args": [object]}, "epoch": 3}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        kept = {key: value for key, value in state.items() if key not in ("_metadata", "epoch")}
        return super().load_state_dict(kept, strict, assign)


def test_entries_that_are_no_tensors_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a save, in a load of a file that has them, and into a model without them."""
    paths = PathProvider(tmp_path, "source")
    source, model = Labelled(2, 2), Labelled(2, 2)
    written = CheckpointWriter(paths).save(bind(source, "net"), TrainingIteration(0, 1, 8))
    assert "_metadata, epoch of state_dict() are neither tensors nor extra state" in caplog.text
    file = written.folder / "net_cp=E0_U1_S8_model.th"
    assert list(torch.load(file, weights_only=True)["state_dict"]) == ["weight", "bias"]
    config = [{"kind": "previous_run", "run_id": "source"}]
    InitializerStack.from_config(config, path_provider=paths.with_run("new")).initialize(bind(model, "net"))
    assert torch.equal(model.weight, source.weight)
    entries = {**torch.nn.Linear.state_dict(source), "epoch": 3, "_metadata": {"version": "1"}}
    plain = torch.nn.Linear(2, 2)
    plan = initialize(tmp_path, {"state_dict": entries}, plain)
    assert torch.equal(plain.weight, source.weight)
    assert [one.message for one in plan.warnings] == [
        "epoch, _metadata of the file: neither tensor nor extra state, left out"
    ]
    initialize(tmp_path, {"state_dict": entries}, model)
