"""A plan rehearses loading code on a copy: it changes neither the model nor the process, and finds what would fail."""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.advice import executes

from noether_init_core import ConfigError, InitializerStack, PlanError, bind

nn: Any = torch.nn


class Code(torch.nn.Module):
    """A linear layer whose ``code`` gets the state dict, before it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.calls: list[int] = []
        self.setup()

    def setup(self) -> None:
        """For subclasses."""

    def code(self, state: dict[str, Any], prefix: str) -> None:
        """For subclasses."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.code(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def doubled(state: dict[str, Any], prefix: str, layer: Any) -> None:
    """Code that writes a layer itself, and counts on its present values."""
    with torch.no_grad():
        layer.bias.add_(1)
    state[f"{prefix}layer.bias"] = state[f"{prefix}layer.bias"] + layer.bias.detach()


class Trainer:
    def __init__(self, model: Any) -> None:
        self.model, self.lock = model, threading.RLock()


class ByTrainer(Code):
    def setup(self) -> None:
        self.trainer: dict[str, Any] = {"lock": threading.Lock(), "all": [Trainer(self)]}

    def code(self, state: dict[str, Any], prefix: str) -> None:
        doubled(state, prefix, self.trainer["all"][0].model.layer)


class Replaces(ByTrainer):
    def code(self, state: dict[str, Any], prefix: str) -> None:
        layer = self.trainer["all"][0].model.layer
        layer.weight = torch.nn.Parameter(state[f"{prefix}layer.weight"].clone())


class ByWeakReference(Code):
    def setup(self) -> None:
        self.me = weakref.ref(self)

    def code(self, state: dict[str, Any], prefix: str) -> None:
        own = self.me()
        assert own is not None
        doubled(state, prefix, own.layer)


def hooked(make_hook: Callable[[Any], Any]) -> Callable[[], Any]:
    def made() -> Any:
        model = Code()
        model._register_load_state_dict_pre_hook(make_hook(model))
        return model

    return made


def by_object(model: Any) -> Any:
    trainer = Trainer(model)
    return lambda state, prefix, *rest: doubled(state, prefix, trainer.model.layer)


def by_partial(model: Any) -> Any:
    def hook(layer: Any, state: Any, prefix: str, *rest: Any) -> None:
        model.calls.append(1)
        doubled(state, prefix, layer())

    return functools.partial(hook, lambda: model.layer)


def by_list(model: Any) -> Any:
    actions = [lambda state, prefix: doubled(state, prefix, model.layer)]
    return lambda state, prefix, *rest: [action(state, prefix) for action in actions] and None


class ByTensorAttribute(Code):
    @property
    def weight(self) -> Any:
        return self.layer.weight

    def setup(self) -> None:
        self.weight.history = [0]

    def code(self, state: dict[str, Any], prefix: str) -> None:
        self.weight.history.append(1)
        self.calls.append(len(self.weight.history))


class ByArray(Code):
    def setup(self) -> None:
        self.array = np.zeros(2, np.float32)
        self.register_buffer("view", torch.from_numpy(self.array))

    def code(self, state: dict[str, Any], prefix: str) -> None:
        self.array += state[f"{prefix}view"].numpy()
        state[f"{prefix}view"] = torch.from_numpy(self.array * 2)


class ByGradient(Code):
    def setup(self) -> None:
        self.layer.weight.grad = torch.ones(2, 2)

    def code(self, state: dict[str, Any], prefix: str) -> None:
        assert self.layer.weight.grad is not None
        self.layer.weight.grad.zero_()


class BySlots(Code):
    __slots__ = ("factors",)

    def setup(self) -> None:
        object.__setattr__(self, "factors", [5.0])

    def code(self, state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}layer.bias"] = state[f"{prefix}layer.bias"] * self.factors[0]
        self.factors.append(1.0)


class Scratch:
    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp()

    def __del__(self) -> None:
        shutil.rmtree(self.folder)


class HoldsScratch(Code):
    def setup(self) -> None:
        self.scratch = Scratch()

    def code(self, state: dict[str, Any], prefix: str) -> None:
        self.calls.append(1)


class HoldsSparse(Code):
    def setup(self) -> None:
        self.register_buffer("graph", torch.eye(3).to_sparse(), persistent=False)
        self.other = [torch.eye(2).to_sparse().coalesce()]

    def code(self, state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}layer.bias"] = state[f"{prefix}layer.bias"] + self.other[0].values().sum().item()


def removes_itself() -> Any:
    model = Code()

    def hook(state: Any, prefix: str, *rest: Any) -> None:
        state[f"{prefix}layer.bias"] = state[f"{prefix}layer.bias"] * 2
        handle.remove()

    handle = model._register_load_state_dict_pre_hook(hook)
    return model


COPIED: dict[str, Callable[[], Any]] = {
    "an object beside a lock": ByTrainer,
    "parameters replaced": Replaces,
    "a weak reference": ByWeakReference,
    "a closure over an object": hooked(by_object),
    "a partial function": hooked(by_partial),
    "a list of closures": hooked(by_list),
    "attributes of a tensor": ByTensorAttribute,
    "an array over memory of a buffer": ByArray,
    "a gradient": ByGradient,
    "slots": BySlots,
    "an object with __del__": HoldsScratch,
    "a hook that removes itself": removes_itself,
    "sparse tensors": HoldsSparse,
}


def seeded(make: Callable[[], Any], seed: int) -> Any:
    torch.manual_seed(seed)
    return make()


def stack_for(tmp_path: Path, state: Any, **config: Any) -> InitializerStack:
    torch.save(state, tmp_path / "weights.pt")
    return InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "weights.pt"), **config}])


def facts(model: Any) -> list[Any]:
    """All that a plan must leave: objects, values, hooks and lists of a model."""
    found: list[Any] = [id(one) for one in (*model.parameters(), *model.buffers(), *model.modules())]
    found += [one.to_dense().tolist() for one in (*model.parameters(), *model.buffers())]
    found += [len(model._load_state_dict_pre_hooks), *getattr(model, "calls", ())]
    found += [list(getattr(one, "history", ())) for one in model.parameters()]
    found += [None if one.grad is None else one.grad.tolist() for one in model.parameters()]
    found += [list(getattr(model, "factors", ()))]
    return found


def assert_same(model: Any, truth: Any) -> None:
    wanted = truth.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("name", COPIED)
def test_a_plan_of_loading_code_changes_nothing(name: str, tmp_path: Path) -> None:
    """The model, and what it refers to, is as before; the load is that of torch."""
    model, truth, source = (seeded(COPIED[name], seed) for seed in (0, 0, 1))
    before = facts(model)
    stack = stack_for(tmp_path, source.state_dict())
    plan = stack.plan(bind(model, "net"))
    assert plan.is_fine, plan.problems
    assert facts(model) == before
    assert not hasattr(model, "scratch") or Path(model.scratch.folder).is_dir()
    stack.initialize(bind(model, "net"))
    truth.load_state_dict(source.state_dict())
    assert_same(model, truth)
    assert facts(model)[-3:] == facts(truth)[-3:]


THE_MODEL: list[Any] = []


def by_class(model: Any) -> Any:
    class Hook:
        def __call__(self, state: Any, prefix: str, *rest: Any) -> None:
            doubled(state, prefix, model.layer)

    return Hook()


def by_global(model: Any) -> Any:
    THE_MODEL[:] = [model]
    return lambda state, prefix, *rest: doubled(state, prefix, THE_MODEL[0].layer)


def by_global_that_replaces(model: Any) -> Any:
    THE_MODEL[:] = [model]

    def hook(state: Any, prefix: str, *rest: Any) -> None:
        THE_MODEL[0].layer.bias = torch.nn.Parameter(state[f"{prefix}layer.bias"].clone())
        THE_MODEL[0].calls.append(1)

    return hook


def by_global_and_catches(model: Any) -> Any:
    THE_MODEL[:] = [model]

    def hook(state: Any, prefix: str, *rest: Any) -> None:
        try:
            doubled(state, prefix, THE_MODEL[0].layer)
        except Exception:
            state[f"{prefix}layer.bias"] = state[f"{prefix}layer.bias"] * 0

    return hook


def by_data(model: Any) -> Any:
    THE_MODEL[:] = [model]

    def hook(state: Any, prefix: str, *rest: Any) -> None:
        THE_MODEL[0].layer.bias.data = state[f"{prefix}layer.bias"] * 2

    return hook


class Generates(Code):
    def setup(self) -> None:
        self.each = (float(number) for number in range(1, 9))

    def code(self, state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}layer.bias"] = state[f"{prefix}layer.bias"] * next(self.each)


@executes("applying/learning.py", "load this model by its own load_state_dict")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (hooked(by_class), "changes the model through"),
        (hooked(by_global), "changes the model through"),
        (hooked(by_global_that_replaces), "changes the model through"),
        (hooked(by_global_and_catches), "changes the model through"),
        (hooked(by_data), "changes the model through"),
        (Generates, "object of builtins.generator, which cannot be copied"),
    ],
)
def test_code_that_reaches_the_model_itself_is_refused(make: Callable[[], Any], words: str, tmp_path: Path) -> None:
    """It is stopped before it writes, and registrations are put back."""
    model, source = seeded(make, 0), seeded(make, 1)
    if THE_MODEL:
        THE_MODEL[:] = [model]
    before = facts(model)
    stack = stack_for(tmp_path, source.state_dict())
    assert [words in one.message for one in stack.plan(bind(model, "net")).problems] == [True]
    with pytest.raises(PlanError, match="Nothing was changed"):
        stack.initialize(bind(model, "net"))
    assert facts(model) == before
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.layer.weight, source.layer.weight)
    assert next(getattr(model, "each", iter([2.0]))) == 2.0


@executes("applying/learning.py", "convert the file with the code that wrote it. It ran on a copy")
def test_code_that_needs_the_very_object_is_refused(tmp_path: Path) -> None:
    """Without an initializer, it loads."""
    factors: dict[int, float] = {}

    class Registered(Code):
        def setup(self) -> None:
            factors[id(self)] = 2.0

        def code(self, state: dict[str, Any], prefix: str) -> None:
            state[f"{prefix}layer.bias"] = state[f"{prefix}layer.bias"] * factors[id(self)]

    model, source = Registered(), Registered()
    with pytest.raises(PlanError, match=r"fails: KeyError.*It ran on a copy of the model"):
        stack_for(tmp_path, source.state_dict()).initialize(bind(model, "net"))
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.layer.bias, source.layer.bias * 2)


def test_a_rehearsal_leaves_random_numbers_and_files(tmp_path: Path) -> None:
    """Those of Python, NumPy and torch; a log is written by the real load only."""

    class Draws(Code):
        def setup(self) -> None:
            self.log: Any = None

        def code(self, state: dict[str, Any], prefix: str) -> None:
            torch.rand(1)
            np.random.rand()
            random.random()
            self.log.write("loaded")
            self.log.flush()

    model = seeded(Draws, 0)
    stack = stack_for(tmp_path, seeded(Draws, 1).state_dict())
    model.log = (tmp_path / "log").open("w", encoding="utf-8")
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert stack.plan(bind(model, "net")).is_fine
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert (tmp_path / "log").read_text() == ""
    stack.initialize(bind(model, "net"))
    model.log.close()
    assert (tmp_path / "log").read_text() == "loaded"


def test_a_large_array_is_shared_and_cannot_be_changed(tmp_path: Path) -> None:
    """A copy would take its memory again; code that writes it is refused."""

    class Holds(Code):
        writes = False

        def setup(self) -> None:
            self.array = np.zeros(5 << 20, np.float32)

        def code(self, state: dict[str, Any], prefix: str) -> None:
            self.calls.append(int(self.array.sum()))
            if self.writes:
                self.array += 1

    model, source = seeded(Holds, 0), seeded(Holds, 1)
    stack = stack_for(tmp_path, source.state_dict())
    assert stack.plan(bind(model, "net")).is_fine
    Holds.writes = True
    again = stack_for(tmp_path, source.state_dict())
    assert "read-only" in again.plan(bind(model, "net")).problems[0].message
    assert not model.array.any()


# The order of torch.


class Adds(torch.nn.Module):
    """Adds what another module has by then."""

    def __init__(self, other: Any = None, factor: float = 1.0) -> None:
        super().__init__()
        self.other, self.factor = [other], factor
        self.weight = torch.nn.Parameter(torch.randn(2, 2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * self.factor
        if self.other[0] is not None:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] + self.other[0].weight.detach()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def reads_a_sibling(*, is_first: bool) -> Any:
    plain = nn.Linear(2, 2)
    return nn.Sequential(*([Adds(plain), plain] if is_first else [plain, Adds(plain)]))


def tied(*, is_first: bool) -> Any:
    code, plain = Adds(factor=2.0), nn.Linear(2, 2, bias=False)
    plain.weight = code.weight
    return nn.Sequential(*([code, plain] if is_first else [plain, code]))


def copies_afterwards() -> Any:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Adds(factor=3.0))

    def hook(module: Any, _keys: Any) -> None:
        with torch.no_grad():
            module.bias.copy_(model[1].bias + model[2].weight[0])

    model[0].register_load_state_dict_post_hook(hook)
    return model


class ByPosition(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.randn(2)), torch.nn.Parameter(torch.randn(2))

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        for own, value in zip(self.parameters(), state.values(), strict=True):
            own.data.copy_(value)


class ByPrefix(Adds):
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.factor *= 2 if prefix.startswith("0") else 5
        super()._load_from_state_dict(state_dict, prefix, *rest)


def twice() -> Any:
    module = ByPrefix()
    return nn.Sequential(module, module)


class Doubles(torch.nn.Parameter):
    """Stores the double of what is copied into it."""

    def copy_(self, value: Any, non_blocking: bool = False) -> Any:
        return super().copy_(value * 2)


class DoublesByFunction(torch.nn.Parameter):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            with torch._C.DisableTorchFunctionSubclass():
                return func(args[0], args[1] * 2)
        return super().__torch_function__(func, types, args, kwargs or {})


def with_parameter(kind: Any) -> Any:
    model = nn.Linear(2, 2)
    model.weight = kind(torch.randn(2, 2))
    return model


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(reads_a_sibling, is_first=False),
        functools.partial(reads_a_sibling, is_first=True),
        functools.partial(tied, is_first=False),
        functools.partial(tied, is_first=True),
        copies_afterwards,
        ByPosition,
        twice,
        functools.partial(with_parameter, Doubles),
        functools.partial(with_parameter, DoublesByFunction),
    ],
)
def test_a_model_with_loading_code_is_loaded_in_the_order_of_torch(make: Callable[[], Any], tmp_path: Path) -> None:
    """Also entries of modules without such code, whatever order the file has."""
    model, truth, source = seeded(make, 0), seeded(make, 0), seeded(make, 1)
    state = dict(reversed(source.state_dict().items()))
    stack_for(tmp_path, state).initialize(bind(model, "net"))
    truth.load_state_dict(dict(state))
    assert_same(model, truth)


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = torch.nn.Parameter(torch.full((2,), 5.0)), torch.nn.Parameter(torch.randn(2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}x" in state_dict:
            state_dict[f"{prefix}y"] = state_dict[f"{prefix}y"] * state_dict[f"{prefix}x"]
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.parametrize("config", [{"on_missing": "keep"}, {"transforms": [{"keep_model": "x"}]}])
def test_kept_entries_are_absent_as_without_strict(config: Any, tmp_path: Path) -> None:
    """So that the code computes nothing with them."""
    model, truth = Scaled(), Scaled()
    state = {"y": torch.ones(2), **({"x": torch.ones(2) * 3} if "transforms" in config else {})}
    stack_for(tmp_path, state, **config).initialize(bind(model, "net"))
    truth.load_state_dict({"y": torch.ones(2)}, strict=False)
    assert_same(model, truth)


class Replacing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = torch.nn.Parameter(torch.randn(2)), torch.nn.Parameter(torch.randn(2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.w = torch.nn.Parameter(state_dict[f"{prefix}w"].clone() * 2)
        self.v = torch.nn.Parameter(state_dict[f"{prefix}v"].clone() * 2)


@executes("applying/learning.py", "let the code leave it, or load it from the file")
def test_code_that_replaces_what_the_plan_keeps_is_refused(tmp_path: Path) -> None:
    """Its own value could not be put back into another parameter."""
    model = Replacing()
    before = model.w
    stack = stack_for(tmp_path, Replacing().state_dict(), transforms=[{"keep_model": "w"}])
    with pytest.raises(PlanError, match="changes w, which the plan keeps"):
        stack.initialize(bind(model, "net"))
    assert model.w is before
    source = Replacing()
    stack_for(tmp_path, source.state_dict()).initialize(bind(model, "net"))
    assert torch.equal(model.w, source.w * 2)


# What depends on values.


class Newer(Code):
    def setup(self) -> None:
        self.register_buffer("version", torch.tensor(3))

    def code(self, state: dict[str, Any], prefix: str) -> None:
        try:
            version = int(state[f"{prefix}version"])
        except Exception:
            version = 0
        if version > 2:
            raise ValueError("the file is too new")


class LooksForMeta(Code):
    def code(self, state: dict[str, Any], prefix: str) -> None:
        if not state[f"{prefix}layer.weight"].is_meta:
            del state[f"{prefix}layer.weight"]


class DoublesOnValues(Code):
    def code(self, state: dict[str, Any], prefix: str) -> None:
        if state[f"{prefix}layer.weight"].data_ptr():
            state[f"{prefix}layer.weight"] = state[f"{prefix}layer.weight"] * 2


def checks_afterwards() -> Any:
    model = Code()

    def hook(module: Any, _keys: Any) -> None:
        if float(module.layer.weight.detach().sum()) != 12345:
            raise ValueError("a bad sum of metadata")

    model.register_load_state_dict_post_hook(hook)
    return model


def reports_more() -> Any:
    model = nn.Linear(2, 2)
    model.register_load_state_dict_post_hook(lambda _module, keys: keys.missing_keys.append("more"))
    return model


def returns_a_value() -> Any:
    model = nn.Linear(2, 2)
    model.register_load_state_dict_post_hook(lambda _module, keys: keys)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Newer, "the file is too new"),
        (LooksForMeta, "reports missing entries: layer.weight"),
        (DoublesOnValues, "does something else with values"),
        (checks_afterwards, "a bad sum of metadata"),
        (reports_more, "reports missing entries: more"),
        (returns_a_value, "not expected to return new values"),
    ],
)
def test_what_fails_by_values_fails_before_a_change(make: Callable[[], Any], words: str, tmp_path: Path) -> None:
    """Also if the code hides it on the meta device, or if a hook after the load finds it."""
    model, source = seeded(make, 0), seeded(make, 1)
    before = facts(model)
    with pytest.raises(PlanError, match=words) as caught:
        stack_for(tmp_path, source.state_dict()).initialize(bind(model, "net"))
    assert "Nothing was changed" in str(caught.value)
    assert facts(model) == before


@executes("applying/learning.py", "let it decide by names and shapes")
def test_code_that_decides_by_shapes_is_planned(tmp_path: Path) -> None:
    """Names and shapes are the same on the meta device, but values are not."""

    class DoublesByShape(Code):
        def code(self, state: dict[str, Any], prefix: str) -> None:
            if state[f"{prefix}layer.weight"].shape == (2, 2):
                state[f"{prefix}layer.weight"] = state[f"{prefix}layer.weight"] * 2

    with pytest.raises(PlanError, match="does something else with values"):
        stack_for(tmp_path, DoublesOnValues().state_dict()).initialize(bind(DoublesOnValues(), "net"))
    model, source = DoublesByShape(), DoublesByShape()
    stack_for(tmp_path, source.state_dict()).initialize(bind(model, "net"))
    assert torch.equal(model.layer.weight, source.layer.weight * 2)


@executes("applying/targets.py", "rename it")
def test_a_buffer_with_the_name_of_extra_state_is_refused(tmp_path: Path) -> None:
    """torch would not load it."""
    model = nn.Linear(2, 2)
    model.register_buffer("_extra_state", torch.zeros(2))
    with pytest.raises(ConfigError, match="torch uses that name"):
        stack_for(tmp_path, nn.Linear(2, 2).state_dict()).plan(bind(model, "net"))
    model.register_buffer("state", model._buffers.pop("_extra_state"))
    stack_for(tmp_path, {**model.state_dict(), "state": torch.ones(2)}).initialize(bind(model, "net"))
    assert model.state.tolist() == [1, 1]


# What the plan tells.


class Ignores(torch.nn.Module):
    """Doubles w, leaves v, and swaps a and b."""

    def __init__(self) -> None:
        super().__init__()
        for name in "wvabp":
            self.register_parameter(name, torch.nn.Parameter(torch.randn(2)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        with torch.no_grad():
            self.w.copy_(state_dict[f"{prefix}w"] * 2)
            self.a.copy_(state_dict[f"{prefix}b"])
            self.b.copy_(state_dict[f"{prefix}a"])
            self.p.copy_(state_dict[f"{prefix}p"])


def test_the_plan_tells_what_code_does_to_entries_that_fit(tmp_path: Path) -> None:
    """Entries are not shown as loaded by their own names if the code makes something else of them."""
    model: Any = Ignores()
    source: Any = Ignores()
    stack = stack_for(tmp_path, source.state_dict())
    plan = stack.plan(bind(model, "net"))
    assert plan.is_fine, plan.problems
    rows = {row.key: (row.action, row.sources, row.rule) for row in plan.rows if row.target is not None}
    rule = "loading code of Ignores"
    assert rows == {
        "w": ("transform", ("w",), rule),
        "v": ("keep", (), rule),
        "a": ("rename", ("b",), rule),
        "b": ("rename", ("a",), rule),
        "p": ("load", ("p",), None),
    }
    assert [(row.key, row.action, row.rule) for row in plan.rows if row.target is None] == [("v", "removed", rule)]
    kept = model.v.detach().clone()
    stack.initialize(bind(model, "net"))
    assert torch.equal(model.w, source.w * 2)
    assert torch.equal(model.v, kept)
    assert torch.equal(model.a, source.b)
    assert torch.equal(model.b, source.a)
