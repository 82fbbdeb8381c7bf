"""Modules that hand out copies, have hooks, or have loading code of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import (
    CheckpointWriter,
    ConfigError,
    InitializerStack,
    PathProvider,
    PlanError,
    TrainingIteration,
    bind,
    compose,
)


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    return PathProvider(tmp_path, "source")


def warm_start(paths: PathProvider, saved: Any, target: Any, **config: Any) -> Any:
    CheckpointWriter(paths).save(saved, TrainingIteration(0, 1, 8))
    stack = InitializerStack.from_config(
        [{"kind": "previous_run", "run_id": "source", **config}], path_provider=paths.with_run("new")
    )
    return stack.initialize(target)


class Copies(torch.nn.Module):
    """A state dict of copies, by an override or by a hook."""

    def __init__(self, *, hooked: bool) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.hooked = hooked
        if hooked:
            self._register_state_dict_hook(
                lambda module, state, prefix, metadata: {name: value.clone() for name, value in state.items()}
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return state if self.hooked else {name: value.detach().clone() for name, value in state.items()}


@pytest.mark.parametrize("hooked", [False, True])
def test_weights_reach_the_module_and_not_a_copy(paths: PathProvider, hooked: bool) -> None:
    """The registered parameter is written, whatever ``state_dict`` hands out."""
    source, target = Copies(hooked=hooked), Copies(hooked=hooked)
    warm_start(paths, bind(source, "net"), bind(target, "net"))
    assert torch.equal(source.layer.weight, target.layer.weight)


class TensorState(torch.nn.Module):
    """Extra state in a tensor, and a cache that follows the weights."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.value = value
        self.refreshed = 0
        self.cache = torch.empty(0)
        self.register_load_state_dict_post_hook(self.refresh)

    @staticmethod
    def refresh(module: Any, incompatible: Any) -> None:
        module.refreshed += 1
        module.cache = module.layer.weight.detach().clone()

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.value])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.value = int(state[0])


def test_extra_state_in_a_tensor_is_set_and_hooks_after_loading_run(paths: PathProvider) -> None:
    """As after torch's own loading: the module has its state, and its cache is that of the new weights."""
    source, target = TensorState(7), TensorState(0)
    warm_start(paths, bind(source, "net"), bind(target, "net"))
    assert target.value == 7
    assert target.refreshed == 1
    assert torch.equal(target.cache, source.layer.weight)


class Doubling(torch.nn.Module):
    """Stores half of its weight, and doubles what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3))
        self.head = torch.nn.Linear(3, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_loading_code_of_a_module_runs_on_the_planned_tensors(paths: PathProvider) -> None:
    """Only below that module; what the config keeps is kept there, too."""
    sources: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), Doubling())
    targets: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), Doubling())
    head = targets[1].head.weight.detach().clone()
    warm_start(paths, bind(sources, "net"), bind(targets, "net"), patterns_to_instantiate=["1.head."])
    assert torch.equal(targets[1].weight, sources[1].weight * 2)
    assert torch.equal(targets[1].head.weight, head)
    assert torch.equal(targets[0].weight, sources[0].weight)


def tied_to_doubling(order: str, *, how: str = "object") -> torch.nn.Module:
    """A module with loading code, and one without that shares its weight, before or after it."""
    doubling, plain = Doubling(), torch.nn.Linear(3, 1, bias=False)
    if how == "module":
        return torch.nn.ModuleDict({"a": doubling, "b": torch.nn.ModuleDict({"c": doubling})})
    plain.weight = doubling.weight if how == "object" else torch.nn.Parameter(doubling.weight.detach())
    return torch.nn.ModuleDict({name: {"code": doubling, "plain": plain}[name] for name in order.split()})


@pytest.mark.parametrize("order", ["code plain", "plain code"])
@pytest.mark.parametrize("how", ["object", "memory", "module"])
def test_tensor_that_loading_code_shares_with_others_has_the_value_of_torch(
    paths: PathProvider, order: str, how: str
) -> None:
    """The module that torch loads last decides."""
    source, target, truth = (tied_to_doubling(order, how=how) for _number in range(3))
    warm_start(paths, bind(source, "net"), bind(target, "net"))
    truth.load_state_dict(dict(source.state_dict()))
    for name, value in truth.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


@pytest.mark.parametrize("order", [("code", "plain"), ("plain", "code")])
def test_loading_code_of_one_submodel_is_not_undone_by_another(paths: PathProvider, order: tuple[str, str]) -> None:
    """Whichever of them is written first."""

    def pair() -> tuple[Doubling, Any]:
        doubling, plain = Doubling(), torch.nn.Linear(3, 1, bias=False)
        plain.weight = doubling.weight
        parts = {"code": bind(torch.nn.Sequential(doubling), "code"), "plain": bind(plain, "plain")}
        return doubling, compose("pair", {name: parts[name] for name in order})

    (source, saved), (target, model) = pair(), pair()
    warm_start(paths, saved, model)
    assert torch.equal(target.weight, source.weight * 2)


def test_tensor_of_two_modules_with_different_loading_code_has_the_value_of_the_last(paths: PathProvider) -> None:
    """As in torch; with two files for it, the plan refuses."""

    class Tripling(Doubling):
        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 1.5
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def both(other: type[Doubling]) -> Any:
        modules: Any = torch.nn.Sequential(Doubling(), other())
        modules[1].weight = modules[0].weight
        return modules

    def apart(modules: Any) -> Any:
        return compose("pair", {"one": bind(modules[0], "one"), "two": bind(modules[1], "two")})

    for other in (Tripling, Doubling):
        source, target, truth = both(other), both(other), both(other)
        warm_start(paths, bind(source, "net"), bind(target, "net"))
        truth.load_state_dict(dict(source.state_dict()))
        assert torch.equal(target[0].weight, truth[0].weight)
    target = both(Tripling)
    before = target[0].weight.detach().clone()
    with pytest.raises(
        PlanError, match=r"weight of pair\.one and weight of pair\.two are one tensor, and Doubling and"
    ):
        warm_start(paths, apart(both(Tripling)), apart(target))
    assert torch.equal(target[0].weight, before)


def test_meta_model_with_a_tensor_that_loading_code_shares_gets_its_value(paths: PathProvider) -> None:
    """It has no memory before; it is one tensor afterwards as well."""
    source, truth = tied_to_doubling("plain code"), tied_to_doubling("plain code")
    with torch.device("meta"):
        target = tied_to_doubling("plain code")
    warm_start(paths, bind(source, "net"), bind(target, "net"))
    truth.load_state_dict(dict(source.state_dict()))
    assert target["plain"].weight is target["code"].weight
    assert torch.equal(target["plain"].weight, truth["code"].weight)


class SameMemory(torch.nn.Module):
    """Two parameters over the same memory, which is no tie by identity."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a = torch.nn.Linear(2, 2, bias=False)
        self.b = torch.nn.Linear(2, 2, bias=False)
        if tied:
            self.b.weight = torch.nn.Parameter(self.a.weight.detach())


def test_parameters_over_the_same_memory_must_agree_in_the_file(paths: PathProvider) -> None:
    """Otherwise the one that is written last would win."""
    target = SameMemory(tied=True)
    before = target.a.weight.detach().clone()
    with pytest.raises(PlanError, match="differ in the file but are one tensor"):
        warm_start(paths, bind(SameMemory(tied=False), "net"), bind(target, "net"))
    assert torch.equal(target.a.weight, before)


def test_submodels_that_share_a_parameter_must_agree(paths: PathProvider) -> None:
    """Two files for one tensor: refused where they differ, and where one submodel keeps it."""

    def pair(*, tied: bool) -> tuple[torch.nn.Linear, Any]:
        first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        if tied:
            second.weight = first.weight
        return first, compose("pair", {"first": bind(first, "a"), "second": bind(second, "b")})

    _source, saved = pair(tied=False)
    target, model = pair(tied=True)
    before = target.weight.detach().clone()
    with pytest.raises(PlanError, match=r"pair\.first and weight of pair\.second|are one tensor"):
        warm_start(paths, saved, model)
    assert torch.equal(target.weight, before)
    source, saved = pair(tied=True)
    warm_start(paths, saved, model)
    assert torch.equal(target.weight, source.weight)


def test_a_lazy_module_is_told_to_see_a_batch_first(paths: PathProvider) -> None:
    """Without shapes there is nothing to plan."""
    CheckpointWriter(paths).save(bind(torch.nn.Linear(2, 2), "net"), TrainingIteration(0, 1, 8))
    stack = InitializerStack.from_config(
        [{"kind": "previous_run", "run_id": "source"}], path_provider=paths.with_run("new")
    )
    with pytest.raises(ConfigError, match="pass one batch through"):
        stack.initialize(bind(torch.nn.LazyLinear(2), "net"))


def test_values_that_do_not_fit_the_target_dtype_are_refused(paths: PathProvider) -> None:
    """A number that becomes infinite, or another integer, is not the number that was saved."""

    class Numbers(torch.nn.Module):
        def __init__(self, *, small: bool) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3,), 1e6 if not small else 1.0))
            self.register_buffer("index", torch.tensor([3, 70000 if not small else 7]))

    target = Numbers(small=True).half()
    with pytest.raises(PlanError, match="float16"):
        warm_start(paths, bind(Numbers(small=False), "net"), bind(target, "net"))
    assert torch.equal(target.weight, torch.ones(3).half())
    narrow = Numbers(small=True)
    narrow.index = narrow.index.to(torch.int8)
    wide = Numbers(small=False)
    with torch.no_grad():
        wide.weight.fill_(2.0)
    with pytest.raises(PlanError, match="int8"):
        warm_start(paths, bind(wide, "net"), bind(narrow, "net"))
    warm_start(paths, bind(Numbers(small=True), "net"), bind(narrow, "net"))
    assert narrow.index.tolist() == [3, 7]


class Migrating(torch.nn.Module):
    """Before version 2, it stored half of its weight."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3))
        self.head = torch.nn.Linear(3, 2)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        if (local_metadata.get("version") or 1) < 2:
            for name in ("weight", "head.weight"):
                state_dict[prefix + name] = state_dict[prefix + name] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Older(Migrating):
    """The same module, as it was."""

    _version = 1


def nested(inner: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleDict({"stem": torch.nn.Linear(2, 2), "block": torch.nn.Sequential(inner)})


@pytest.mark.parametrize("saved", [Migrating, Older])
@pytest.mark.parametrize("kind", ["file", "bare file", "previous_run", "resume"])
def test_a_module_is_told_the_version_that_was_saved(
    paths: PathProvider, tmp_path: Path, saved: type[Migrating], kind: str
) -> None:
    """As after ``torch.load`` and ``load_state_dict``: what is current stays, what is older is translated once."""
    source, target, truth = nested(saved()), nested(Migrating()), nested(Migrating())
    written = CheckpointWriter(paths).save(bind(source, "net"), TrainingIteration(0, 1, 8))
    file = written.folder / "net_cp=E0_U1_S8_model.th"
    config: dict[str, Any] = {"kind": "file", "path": str(file)}
    if kind == "bare file":
        config["path"] = str(tmp_path / "bare.pt")
        torch.save(source.state_dict(), config["path"])
    elif kind != "file":
        config = {"kind": kind, "run_id": "source"}
    InitializerStack.from_config([config], path_provider=paths).initialize(bind(target, "net"))
    truth.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    for name, value in truth.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    factor = 1 if saved is Migrating else 2
    assert torch.equal(target["block"][0].weight, source["block"][0].weight * factor)


@pytest.mark.parametrize(("saved", "factor"), [(Migrating, 1), (Older, 2)])
def test_the_version_follows_a_module_that_is_renamed(paths: PathProvider, saved: type[Migrating], factor: int) -> None:
    """Its entries are in the form of the module that saved them, wherever surgery puts them."""
    source, target = nested(saved()), torch.nn.ModuleDict({"net": torch.nn.ModuleDict({"tail": Migrating()})})
    warm_start(
        paths,
        bind(source, "net"),
        bind(target, "net"),
        transforms=[{"from": "block.0.<rest..>", "to": "net.tail.<rest..>"}, {"drop": "stem.**"}],
    )
    assert torch.equal(target["net"]["tail"].weight, source["block"][0].weight * factor)
    assert torch.equal(target["net"]["tail"].head.bias, source["block"][0].head.bias)


@pytest.mark.parametrize("kept", ["block.0.head.weight", "block.0."])
def test_what_is_kept_is_not_translated(paths: PathProvider, kept: str) -> None:
    """The model's own values are current already, whatever version the file is of."""
    source, target = nested(Older()), nested(Migrating())
    before = {name: value.clone() for name, value in target.state_dict().items()}
    warm_start(paths, bind(source, "net"), bind(target, "net"), patterns_to_instantiate=[kept])
    assert torch.equal(target["block"][0].head.weight, before["block.0.head.weight"])
    expected = before["block.0.weight"] if kept == "block.0." else source["block"][0].weight * 2
    assert torch.equal(target["block"][0].weight, expected)


def test_a_module_put_together_from_two_versions_is_refused(paths: PathProvider) -> None:
    """Told one version, it would translate entries of the other one wrongly; nothing is changed."""
    source = torch.nn.ModuleDict({"old": Older(), "new": Migrating()})
    target: Any = torch.nn.ModuleDict({"one": Migrating()})
    before = target["one"].weight.detach().clone()
    rules = [
        {"from": "old.weight", "to": "one.weight"},
        {"from": "new.head.<rest..>", "to": "one.head.<rest..>"},
        {"drop": "old.head.**"},
        {"drop": "new.weight"},
    ]
    with pytest.raises(PlanError, match=r"one has loading code.*old \{'version': 1\}, new \{'version': 2\}"):
        warm_start(paths, bind(source, "net"), bind(target, "net"), transforms=rules)
    assert torch.equal(target["one"].weight, before)


def test_a_file_without_versions_is_translated_as_torch_does(paths: PathProvider, tmp_path: Path) -> None:
    """Safetensors files carry none: torch takes them for the oldest, and so do we; what is kept stays current."""
    from safetensors.torch import save_file

    source, target, truth = nested(Migrating()), nested(Migrating()), nested(Migrating())
    save_file({name: value.contiguous() for name, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    stack = InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "w.safetensors")}])
    stack.initialize(bind(target, "net"))
    truth.load_state_dict(dict(source.state_dict()))
    assert torch.equal(target["block"][0].weight, truth["block"][0].weight)
    assert torch.equal(target["block"][0].weight, source["block"][0].weight * 2)
