"""Random models with hooks, parametrizations, views and extra state load as by torch, or their plan refuses them."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn.utils import parametrizations

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind
from noether_init_core.errors import CheckpointFormatError, InitError, PartlyInitializedError

nn: Any = torch.nn
EXAMPLES = int(os.environ.get("NOETHER_INIT_EXAMPLES", "120"))


class Leaf(torch.nn.Module):
    """A weight and a buffer, with the habits that are switched on."""

    _version = 2

    def __init__(self, habits: tuple[str, ...]) -> None:
        super().__init__()
        self.habits = habits
        self.weight = torch.nn.Parameter(torch.randn(3, 3))
        self.register_buffer("mean", torch.randn(3))
        if "scratch" in habits:
            self.register_buffer("scratch", torch.randn(2), persistent=False)
        if "view" in habits:
            self.register_buffer("row", self.weight.detach()[1])
        if "columns" in habits:
            whole = torch.randn(3, 4)
            self.left, self.right = (torch.nn.Parameter(half) for half in (whole[:, :2], whole[:, 2:]))
        if "grown" in habits:
            self.register_buffer("grown", torch.zeros(0))
        if "hides" in habits:
            self.register_state_dict_post_hook(self._hide)
        if "shows copies" in habits:
            self._register_state_dict_hook(self._copies)
        if "renames on save" in habits:
            self.register_state_dict_post_hook(self._rename_saved)
        if habits_before(habits):
            own = self
            if "closure" in habits:
                self._register_load_state_dict_pre_hook(lambda state, prefix, *rest: own._before(state, prefix))
            else:
                self.register_load_state_dict_pre_hook(lambda module, *rest: module._before(*rest))
        if "after" in habits:
            self.register_load_state_dict_post_hook(self._after)
        self.cache: Any = None

    @staticmethod
    def _hide(module: Any, state: Any, prefix: str, _metadata: Any) -> None:
        state.pop(f"{prefix}mean", None)

    @staticmethod
    def _copies(module: Any, state: Any, prefix: str, _metadata: Any) -> None:
        for key in [key for key in state if key.startswith(prefix) and isinstance(state[key], torch.Tensor)]:
            state[key] = state[key].clone()

    @staticmethod
    def _rename_saved(module: Any, state: Any, prefix: str, _metadata: Any) -> None:
        state[f"{prefix}kernel"] = state.pop(f"{prefix}weight")

    @staticmethod
    def _after(module: Any, _keys: Any) -> None:
        module.cache = module.weight.detach().sum()

    def _before(self, state: Any, prefix: str, *_rest: Any) -> None:
        if "renames on save" in self.habits and f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")
        if "old names" in self.habits and f"{prefix}w" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}w")
        if "scales" in self.habits and f"{prefix}weight" in state:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        if "by value" in self.habits and f"{prefix}weight" in state and float(state[f"{prefix}weight"].sum()) > 0:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].flip(0)
        if "fills" in self.habits:
            state.setdefault(f"{prefix}mean", torch.full((3,), 5.0))
        if "grown" in self.habits and f"{prefix}grown" in state:
            self.grown = torch.zeros(state[f"{prefix}grown"].shape)
        if "drops" in self.habits:
            state.pop(f"{prefix}mean", None)
        if "refuses" in self.habits and float(state.get(f"{prefix}mean", torch.ones(1))[0]) > 0:
            raise ValueError("a mean below zero is needed")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def habits_before(habits: tuple[str, ...]) -> bool:
    return not {"renames on save", "old names", "scales", "by value", "fills", "grown", "drops", "refuses"}.isdisjoint(
        habits
    )


class Versioned(Leaf):
    """Was transposed before version 2."""

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if (metadata.get("version") or 1) < 2 and f"{prefix}weight" in state:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].t()
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Extra(Leaf):
    """Extra state, in a value or a tensor; it needs a number."""

    def __init__(self, habits: tuple[str, ...], value: Any = 1) -> None:
        super().__init__(habits)
        self.value = value

    def get_extra_state(self) -> Any:
        return torch.tensor([self.value]) if "in a tensor" in self.habits else {"value": self.value}

    def set_extra_state(self, state: Any) -> None:
        self.value = int(state[0]) if "in a tensor" in self.habits else int(state["value"])
        if "writes" in self.habits:
            with torch.no_grad():
                self.mean.fill_(self.value)


class Wrapper(torch.nn.Module):
    """Holds a module, and may override what a root overrides."""

    def __init__(self, module: torch.nn.Module, habits: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.habits = module, habits
        self.scale = torch.nn.Parameter(torch.randn(1))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        if "adds a note" in self.habits:
            state["_note"] = {"by": "Wrapper"}
        return state

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        state = {key: value for key, value in state.items() if key != "_note" or "adds a note" not in self.habits}
        if "bare names" in self.habits:
            state = {
                key if key.startswith(("module.", "scale")) else f"module.{key}": one for key, one in state.items()
            }
        return super().load_state_dict(state, strict, assign)


class Plain(torch.nn.Module):
    """Holds a module without any code."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.inner = module
        self.scale = torch.nn.Parameter(torch.randn(1))


def parametrized(kind: str) -> torch.nn.Module:
    linear = torch.nn.Linear(3, 3)
    if kind == "weight norm":
        return parametrizations.weight_norm(linear)
    if kind == "orthogonal":
        return parametrizations.orthogonal(Versioned(()))
    return parametrizations.spectral_norm(linear)


HABITS = (
    *("scratch", "view", "columns", "grown", "hides", "shows copies", "renames on save", "closure", "after"),
    *("old names", "scales", "by value", "fills", "drops", "refuses"),
)
LEAVES = ("plain", "leaf", "leaf", "leaf", "versioned", "extra", "norm", "weight norm", "orthogonal", "spectral norm")
CHANGES = ("old name", "missing", "unexpected", "no count", "old norm", "no versions", "grown", "bare", "other shape")


@attrs.frozen
class Case:
    """One model, and what is changed in its file."""

    leaves: tuple[tuple[str, tuple[str, ...]], ...]
    wrapper: tuple[str, tuple[str, ...]]
    is_tied: bool
    changes: tuple[str, ...]
    on_meta: bool
    kind: str

    def build(self, value: Any = 1) -> torch.nn.Module:
        """The model; ``value`` is its extra state."""
        made: Any = []
        for kind, habits in self.leaves:
            if kind == "plain":
                made.append(torch.nn.Linear(3, 3))
            elif kind == "norm":
                made.append(torch.nn.BatchNorm1d(3))
            elif kind in ("leaf", "versioned"):
                made.append((Leaf if kind == "leaf" else Versioned)(habits))
            elif kind == "extra":
                made.append(Extra(habits, value))
            else:
                made.append(parametrized(kind))
        plain = [type(one.weight) is torch.nn.Parameter for one in made[:2]]
        is_stored_as_it_is = all(
            kind != "versioned" and {"scales", "by value", "renames on save"}.isdisjoint(habits)
            for kind, habits in self.leaves[:2]
        )
        if (
            self.is_tied
            and is_stored_as_it_is
            and plain == [True, True]
            and made[0].weight.shape == made[1].weight.shape
        ):
            made[1].weight = made[0].weight
        module: torch.nn.Module = torch.nn.Sequential(*made)
        kind, habits = self.wrapper
        if kind != "none":
            module = Wrapper(module, habits) if kind == "wrapper" else Plain(module)
        return module

    def changed(self, state: Any) -> Any:
        """The state dict as the file holds it."""
        metadata = getattr(state, "_metadata", None)
        for change in self.changes:
            names = [name for name in state if isinstance(state[name], torch.Tensor)]
            if change == "old name":
                state = {name[:-6] + "w" if name.endswith(".weight") else name: one for name, one in state.items()}
            elif change == "missing":
                state = {name: one for name, one in state.items() if name != names[0]}
            elif change == "unexpected":
                state = {**state, "surplus": torch.ones(1)}
            elif change == "no count":
                state = {name: one for name, one in state.items() if "num_batches" not in name}
            elif change == "old norm":
                pairs = (
                    ("parametrizations.weight.original0", "weight_g"),
                    ("parametrizations.weight.original1", "weight_v"),
                )
                for new, old in pairs:
                    state = {name.replace(new, old): one for name, one in state.items()}
            elif change == "no versions":
                metadata = None
            elif change == "grown":
                state = {name: torch.ones(4) if name.endswith("grown") else one for name, one in state.items()}
            elif change == "bare":
                state = {name.removeprefix("module."): one for name, one in state.items()}
            elif change == "other shape":
                state = {name: torch.ones(7) if name == names[-1] else one for name, one in state.items()}
        made: Any = type(metadata)(state) if metadata is not None else dict(state)
        if metadata is not None:
            made._metadata = metadata
        return made


habits = st.lists(st.sampled_from((*HABITS, "in a tensor", "writes")), max_size=2, unique=True).map(tuple)
cases = st.builds(
    Case,
    st.lists(st.tuples(st.sampled_from(LEAVES), habits), min_size=1, max_size=3).map(tuple),
    st.tuples(
        st.sampled_from(["none", "wrapper", "plain"]),
        st.lists(st.sampled_from(["adds a note", "bare names"]), max_size=1).map(tuple),
    ),
    st.booleans(),
    st.lists(st.sampled_from(CHANGES), max_size=2, unique=True).map(tuple),
    st.sampled_from([False, False, False, True]),
    st.sampled_from(["file", "file", "previous_run"]),
)
SEEN: Counter[str] = Counter()


def values_of(module: torch.nn.Module) -> dict[str, Any]:
    """Every registered tensor, whether it is listed or not, and what code keeps beside them."""
    found: dict[str, Any] = {
        name: tensor.detach()
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        if "scratch" not in name
    }
    for path, one in module.named_modules():
        if isinstance(one, Extra):
            found[f"{path}.value"] = torch.tensor(one.value)
        if isinstance(one, Leaf) and one.cache is not None:
            found[f"{path}.cache"] = one.cache
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names with other values."""
    names = one.keys() | other.keys()
    return [
        name for name in sorted(names) if not (name in one and name in other and torch.equal(one[name], other[name]))
    ]


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases)
def loads_as_torch_or_refuses(case: Case) -> None:
    """Equal bits after a plan that is fine; no change after another."""
    torch.manual_seed(0)
    source = case.build(7)
    first = {name: value.clone() for name, value in values_of(case.build()).items()}

    def twin() -> torch.nn.Module:
        made = case.build()
        with torch.no_grad():
            for name, tensor in (*made.named_parameters(), *made.named_buffers()):
                if name in first:
                    tensor.copy_(first[name])
        return made

    with tempfile.TemporaryDirectory() as folder:
        paths = PathProvider(folder, "source")
        state = case.changed(source.state_dict())
        config: dict[str, Any] = {"kind": "previous_run", "run_id": "source"}
        if case.kind == "previous_run":
            written = _saved(paths, source)
            if written is None:
                return
            state = torch.load(written, weights_only=True)["state_dict"]
        else:
            path = Path(folder) / "a.pt"
            torch.save({"state_dict": state}, path)
            config = {"kind": "file", "path": str(path)}
            state = torch.load(path, weights_only=True)["state_dict"]
        truth = _loaded(twin, state)
        # views of one tensor become tensors of their own there
        if case.on_meta and not any("view" in habits for _kind, habits in case.leaves):
            with torch.device("meta"):
                try:
                    target = case.build()
                except RuntimeError:  # torch's orthogonal() computes with values
                    return
        else:
            target = twin()
        before = {name: value.clone() for name, value in values_of(target).items()}
        stack = InitializerStack.from_config([config], path_provider=paths.with_run("new"))
        error: InitError | None = None
        try:
            is_fine = stack.plan(bind(target, "net")).is_fine
        except InitError:
            is_fine = False
        try:
            stack.initialize(bind(target, "net"))
        except InitError as raised:
            error = raised
        assert not isinstance(error, PartlyInitializedError), (error, case)
        SEEN["loaded" if error is None else "refused"] += 1
        SEEN["refused, though torch loads"] += error is not None and truth is not None
        SEEN["loaded on meta"] += error is None and case.on_meta
        if error is not None:
            assert not is_fine, (error, case)
            assert case.on_meta or same(values_of(target), before) == [], case
            return
        assert is_fine, case
        assert truth is not None, f"torch refuses it: {case}"
        assert same(values_of(target), truth) == [], case


def _saved(paths: PathProvider, source: torch.nn.Module) -> Path | None:
    """The file of a save; None if the save refuses the model."""
    try:
        written = CheckpointWriter(paths).save(bind(source, "net"), TrainingIteration(0, 1, 8))
    except CheckpointFormatError:
        SEEN["not saved"] += 1
        return None
    return next(written.folder.glob("*model.th"))


def _loaded(twin: Callable[[], torch.nn.Module], state: Any) -> dict[str, Any] | None:
    """The values after torch's own load, or None if it refuses.

    Where the project takes more than torch does, torch is helped: the prefix of a wrapper is added. Names may be
    missing that are another name of a tensor that is there, or that the state dict of the model leaves out. If code
    needs one of the latter, it gets the model's own value.
    """
    metadata = getattr(state, "_metadata", None)
    known = twin().state_dict()
    with_prefix: Any = {name if name in known else f"module.{name}": value for name, value in state.items()}
    for with_own, one, strict in itertools.product((False, True), (state, with_prefix), (True, False)):
        made = twin()
        given: Any = OrderedDict((name, value) for name, value in one.items() if isinstance(value, torch.Tensor | dict))
        given.pop("_note", None)
        if with_own:
            given.update((name, value.clone()) for name, value in made.named_buffers() if name not in known)
        if metadata is not None:
            start = "" if one is state else "module."
            given._metadata = OrderedDict((f"{start}{name}".strip("."), value) for name, value in metadata.items())
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError, ValueError, TypeError, KeyError):
            warnings.simplefilter("ignore")
            found = made.load_state_dict(given, strict=strict)
            if not found.unexpected_keys and set(found.missing_keys) <= _optional(made, given):
                return values_of(made)
    return None


def _optional(model: torch.nn.Module, state: Any) -> set[str]:
    """Names of the model that a file may leave out: they are not listed, or another name of the tensor is there."""
    listed = model.state_dict(keep_vars=True)
    places: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(tensor), []).append(name)
    tied = {name for names in places.values() if any(one in state for one in names) for name in names}
    return {name for name in values_of(model) if name not in listed} | tied


def test_a_model_loads_as_by_torch_or_is_refused_before_it_changes() -> None:
    """Of random models and files; loads and refusals are among them, also on the meta device."""
    with torch.random.fork_rng():
        loads_as_torch_or_refuses()
    assert min(SEEN[name] for name in ("loaded", "refused")) > 10
    assert SEEN["loaded on meta"] > 0
