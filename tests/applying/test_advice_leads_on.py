"""What a message about a model that cannot be loaded into advises is done here, and it loads then."""

from __future__ import annotations

import contextlib
import json
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.advice import digests, executes, saw
from support.following import advised, refusal
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensorMode

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind, compose
from noether_init_core.applying.places import ReadOnlyMemory, unwritable, valueless_mode


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """Loads a file with ones into a layer, as a config with further fields says."""
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "w.pt")
    before = digests(tmp_path)

    def call(module: nn.Module, **fields: Any) -> None:
        config = {"kind": "file", "path": str(tmp_path / "w.pt"), **fields}
        InitializerStack.from_config([config]).initialize(bind(module, "net"))
        assert all(bool((value == 1).all()) for value in module.state_dict().values())
        assert digests(tmp_path) == before

    return call


@executes("applying/targets.py", "pass one batch through the model")
def test_a_lazy_module_gets_its_shapes(start: Callable[..., Any]) -> None:
    """By a batch."""
    module = nn.LazyLinear(2)
    assert advised(lambda: start(module)) == "pass one batch through the model"
    module(torch.ones(1, 3))
    start(module)


@executes("applying/targets.py", "initialize the module without the hook or override that adds it")
def test_an_entry_that_a_hook_adds_is_left_out(start: Callable[..., Any]) -> None:
    """The hook is put back afterwards."""
    module = nn.Linear(3, 2)

    def add(_module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        state[f"{prefix}more"] = torch.ones(1)

    hook = module.register_state_dict_post_hook(add)
    assert "without the hook or override" in advised(lambda: start(module))
    hook.remove()
    start(module)


@executes("applying/places.py", "replace it by a clone()")
def test_memory_that_is_read_only_is_replaced(tmp_path: Path, start: Callable[..., Any]) -> None:
    """That of a file which is mapped without being writable."""
    with open(tmp_path / "w.pt", "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    module = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="not writable"):
        module.bias.data = torch.frombuffer(memory, dtype=torch.float32, count=2)
    saw(unwritable(module.bias, ReadOnlyMemory()))
    said = advised(lambda: start(module))
    assert said.startswith("replace it by a clone()")
    module.bias.data = module.bias.data.clone()
    start(module)


@executes("applying/places.py", "initialize outside of the mode")
@pytest.mark.parametrize("allows", [True, False])
def test_a_model_is_loaded_outside_of_a_mode_without_values(start: Callable[..., Any], *, allows: bool) -> None:
    """A plain model, known before a change."""
    module = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with FakeTensorMode(allow_non_fake_inputs=allows):
        saw(valueless_mode())
        assert advised(lambda: start(module)).startswith("initialize outside of the mode\n")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    start(module)


@executes("applying/places.py", "load outside of vmap and grad")
def test_a_transformed_tensor_is_loaded_before(start: Callable[..., Any]) -> None:
    """Inside torch.func it cannot be written."""
    module = nn.Linear(3, 2)
    told: list[str] = []

    def inside(values: torch.Tensor) -> torch.Tensor:
        changed = nn.Linear(3, 2, bias=False)
        del changed.bias
        changed.register_buffer("bias", values)
        saw(unwritable(values, ReadOnlyMemory()))
        told.append(refusal(lambda: start(changed)))
        return values.sum()

    torch.func.grad(inside)(torch.zeros(2))
    assert "Next: load outside of vmap and grad" in told[0]
    start(module)


@executes("applying/weights.py", "Next: module.to_empty(device='cpu')")
def test_a_model_on_the_meta_device_gets_memory(start: Callable[..., Any]) -> None:
    """For an entry that is not in the file."""
    with torch.device("meta"):
        module = nn.Linear(3, 2)
        module.register_buffer("extra", torch.ones(1))
    said = refusal(lambda: start(module, on_missing="keep"))
    call = re.search(r"module\.to_empty\(device='cpu'\)", said)
    assert call is not None
    eval(call[0], {"module": module})
    module.get_buffer("extra").fill_(1)
    start(module, on_missing="keep")


def trained(kind: Any = torch.optim.AdamW, **arguments: Any) -> Any:
    module = nn.Linear(3, 2)
    optimizer = kind(module.parameters(), lr=0.1, **arguments)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return bind(module, "net", optimizer)


@executes("applying/optimizer_state.py", "build the optimizer from model.parameters()")
def test_an_optimizer_that_is_outdated_is_built_again(tmp_path: Path) -> None:
    """A parameter was replaced after the model was bound."""
    paths = PathProvider(tmp_path, "run")
    CheckpointWriter(paths).save(trained(), TrainingIteration(1, 1, 1))
    before = digests(tmp_path)
    model = trained()
    model.module.weight = nn.Parameter(torch.zeros(2, 3))
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    call = advised(lambda: stack.initialize(model)).partition(" from ")[2]
    parameters = eval(call, {"model": model})
    model = bind(model.module, "net", torch.optim.AdamW(parameters))
    stack.initialize(model)
    assert len(model.optimizer.state) == 2
    assert digests(tmp_path) == before


class Negating(nn.Linear):
    """Files of version 1 hold the bias with the other sign."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version", 1) < 2 and f"{prefix}bias" in state_dict:
            self.translate(state_dict, f"{prefix}bias")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def translate(self, state: Any, name: str) -> None:
        state[name] = -state[name]


class Dropping(Negating):
    """Its code does not read the bias of an earlier file."""

    def translate(self, state: Any, name: str) -> None:
        del state[name]


class Adding(Negating):
    """Its code makes an entry that the class had in between."""

    def translate(self, state: Any, name: str) -> None:
        state[name.replace("bias", "shift")] = -state[name]


def initialize(folder: Path, module: nn.Module, state: Any, **fields: Any) -> None:
    torch.save(state, folder / "w.pt")
    before = digests(folder)
    InitializerStack.from_config([{"kind": "file", "path": str(folder / "w.pt"), **fields}]).initialize(
        bind(module, "net")
    )
    assert digests(folder) == before


@executes("applying/learning.py", "Next: convert the file with the code that wrote it, or keep the model's values")
@executes("applying/learning.py", "Next: convert the file with the code that wrote it")
@pytest.mark.parametrize("kind", [Dropping, Adding])
def test_a_file_that_the_loading_code_cannot_translate_is_converted(tmp_path: Path, kind: type[Negating]) -> None:
    """By a program that knows both forms; what the code would drop can be kept instead."""
    old, module = nn.Linear(3, 2), kind(3, 2)
    own = module.bias.detach().clone()
    said = advised(lambda: initialize(tmp_path, module, old.state_dict()))
    assert said.startswith("convert the file with the code that wrote it")
    if kind is Dropping:
        field = re.search(r"keep the model's values there \((\w+)\)", said)
        assert field is not None
        initialize(tmp_path, module, old.state_dict(), transforms=[{field[1]: "bias"}])
        assert torch.equal(module.bias, own)
        assert torch.equal(module.weight, old.weight)
    else:
        assert "keep" not in said
    newer = kind(3, 2)
    with torch.no_grad():
        newer.weight.copy_(old.weight)
        newer.bias.copy_(-old.bias)
    initialize(tmp_path, module, newer.state_dict())
    assert torch.equal(module.bias, -old.bias)
    assert torch.equal(module.weight, old.weight)


@executes(
    "applying/learning.py",
    "Next: keep its own values there (keep_model), or load the file into the model that saved it, and save that model",
)
def test_modules_of_different_versions_are_brought_to_one(tmp_path: Path) -> None:
    """A module that would get the weight of one and the bias of the other."""
    saved: Any = nn.ModuleDict({"a": nn.Linear(3, 2), "b": Negating(3, 2), "rest": nn.Linear(3, 2)})
    module: Any = nn.ModuleDict({"net": Negating(3, 2), "rest": nn.Linear(3, 2)})
    rules = [
        *({"from": f"{part}.{leaf}", "to": f"net.{leaf}"} for part, leaf in (("a", "bias"), ("b", "weight"))),
        *({"drop": f"{part}.{leaf}"} for part, leaf in (("b", "bias"), ("a", "weight"))),
    ]
    own = module["net"].bias.detach().clone()
    said = advised(lambda: initialize(tmp_path, module, saved.state_dict(), transforms=rules))
    field = re.search(r"keep its own values there \((\w+)\)", said)
    assert field is not None
    initialize(tmp_path, module, saved.state_dict(), transforms=[{field[1]: "net."}, *rules])
    assert torch.equal(module["net"].bias, own)
    assert torch.equal(module["rest"].weight, saved["rest"].weight)
    # the program that saved the file has the new class in both places by now
    again: Any = nn.ModuleDict({"a": Negating(3, 2), "b": Negating(3, 2), "rest": nn.Linear(3, 2)})
    again.load_state_dict(saved.state_dict())
    initialize(tmp_path, module, again.state_dict(), transforms=rules)
    assert torch.equal(module["net"].bias, -saved["a"].bias)
    assert torch.equal(module["net"].weight, saved["b"].weight)


class Doubling(nn.Linear):
    """The file holds half of its weight."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


@executes("applying/learning.py", "Next: untie it, or let one module hold both: call load_state_dict of its parts")
def test_a_tensor_with_loading_code_of_two_models_is_untied_or_held_by_one(tmp_path: Path) -> None:
    """Whose module then loads as in torch: the last of its parts writes the tensor, whatever their versions."""
    paths = PathProvider(tmp_path, "run")

    def parts(*, tied: bool) -> Any:
        made: Any = nn.ModuleDict({"a": Negating(3, 2), "b": Doubling(3, 2)})
        if tied:
            made["b"].weight = made["a"].weight
        return made

    def apart(modules: Any) -> Any:
        return compose("net", {name: bind(module, name) for name, module in modules.items()})

    source = parts(tied=True)
    CheckpointWriter(paths).save(apart(source), TrainingIteration(1, 1, 1))
    before = digests(tmp_path)
    config = {"kind": "previous_run", "run_id": "run"}
    stack = InitializerStack.from_config([config], path_provider=paths.with_run("new"))
    said = advised(lambda: stack.initialize(apart(parts(tied=True))))
    assert said.startswith("untie it, or let one module hold both: call load_state_dict of its parts, and save it")
    untied = parts(tied=False)
    stack.initialize(apart(untied))
    assert torch.equal(untied["a"].weight, source["a"].weight)
    assert torch.equal(untied["b"].weight, source["b"].weight * 2)
    assert digests(tmp_path) == before
    held = parts(tied=True)
    for name, module in held.items():
        (file,) = tmp_path.rglob(f"net.{name}_cp=*_model.th")
        module.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    one = paths.with_run("one")
    CheckpointWriter(one).save(bind(held, "net"), TrainingIteration(1, 1, 1))
    stack = InitializerStack.from_config([{**config, "run_id": "one"}], path_provider=paths.with_run("new"))
    target, truth = parts(tied=True), parts(tied=True)
    stack.initialize(bind(target, "net"))
    truth.load_state_dict(held.state_dict())
    for name, value in target.state_dict().items():
        assert torch.equal(value, truth.state_dict()[name]), name


@executes("applying/optimizer_state.py", "Next: load_optim: false")
def test_parameters_of_different_age_become_one_without_their_optimizer_state(tmp_path: Path) -> None:
    """One of both was frozen for a step, so that their counters differ."""
    paths = PathProvider(tmp_path, "run")
    source: Any = nn.ParameterDict({name: torch.ones(1, 2) for name in "qk"})
    optimizer = torch.optim.AdamW(source.parameters())
    for names in ("q", "qk"):
        optimizer.zero_grad()
        torch.stack([source[name].sum() for name in names]).sum().backward()
        optimizer.step()
    CheckpointWriter(paths).save(bind(source, "net", optimizer), TrainingIteration(1, 2, 2))
    before = digests(tmp_path)
    rule = {"from": ["q", "k"], "to": "qk", "do": [{"concat": 0}]}
    config = {"kind": "previous_run", "run_id": "run", "load_optim": True, "transforms": [rule]}

    def start(**fields: Any) -> Any:
        target: Any = nn.ParameterDict({"qk": torch.zeros(2, 2)})
        stack = InitializerStack.from_config([{**config, **fields}], path_provider=paths.with_run("new"))
        stack.initialize(bind(target, "net", torch.optim.AdamW(target.parameters())))
        return target["qk"]

    said = refusal(start)
    assert "counters that differ" in said
    field = re.search(r"Next: (load_optim): (false)", said)
    assert field is not None
    assert torch.equal(start(**{field[1]: json.loads(field[2])}), torch.cat([source["q"], source["k"]]))
    assert digests(tmp_path) == before


@executes("applying/optimizer_state.py", "Next: {}")
def test_a_field_that_contradicts_state_of_an_earlier_file_is_left(tmp_path: Path) -> None:
    """The second run had amsgrad, and the state of the first one stays for half of the parameters."""

    def model(**arguments: Any) -> Any:
        module: Any = nn.ModuleDict({"x": nn.Linear(3, 2), "y": nn.Linear(2, 2)})
        return bind(module, "net", torch.optim.AdamW(module.parameters(), lr=0.1, **arguments))

    def step(made: Any) -> None:
        made.module["y"](made.module["x"](torch.ones(1, 3))).sum().backward()
        made.optimizer.step()

    for run, is_on in (("first", False), ("second", True)):
        source = model(amsgrad=is_on)
        step(source)
        CheckpointWriter(PathProvider(tmp_path, run)).save(source, TrainingIteration(1, 1, 1))
    before = digests(tmp_path)
    first = {"kind": "previous_run", "run_id": "first", "load_optim": True}
    second = {**first, "run_id": "second", "transforms": [{"keep_model": "y."}, {"drop": "y."}]}

    def start(**fields: Any) -> Any:
        made = model()
        paths = PathProvider(tmp_path, "new")
        InitializerStack.from_config([first, {**second, **fields}], path_provider=paths).initialize(made)
        return made

    line = re.search(r"Next: (restore: \{optimizer: \{\w+: config\}\})", refusal(start))
    assert line is not None
    made = start(**yaml.safe_load(line[1]))
    assert made.optimizer.param_groups[0]["amsgrad"] is False
    step(made)
    assert {float(state["step"]) for state in made.optimizer.state.values()} == {2.0}
    assert digests(tmp_path) == before


@contextlib.contextmanager
def one_rank() -> Iterator[Any]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@executes("applying/places.py", "Next: load before the model is sharded")
@executes("applying/targets.py", "Next: load before the model is wrapped")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["fully_shard", "FullyShardedDataParallel"])
def test_a_model_is_loaded_before_it_is_sharded(start: Callable[..., Any], way: str) -> None:
    """The ranks then shard the values of the file."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    with one_rank() as mesh:

        def sharded() -> Any:
            if way == "fully_shard":
                return fully_shard(module, mesh=mesh)
            return FullyShardedDataParallel(module, device_id=torch.device("cpu"))

        module = nn.Linear(3, 2)
        early = sharded()
        if way == "fully_shard":
            saw(unwritable(early.weight, ReadOnlyMemory()))
        said = advised(lambda: start(early))
        assert said.startswith(f"load before the model is {'sharded' if way == 'fully_shard' else 'wrapped'}")
        module = nn.Linear(3, 2)
        start(module)
        found = sharded()(torch.ones(1, 3))
    assert found.tolist() == [[4.0, 4.0]]


@executes("applying/places.py", "Next: load the plain tensors first")
def test_a_wrapper_of_other_tensors_is_made_after_the_load(start: Callable[..., Any]) -> None:
    """It has no memory of its own, as quantized weights of other packages."""
    from torch.testing._internal.two_tensor import TwoTensor

    def wrap(module: nn.Module) -> None:
        module.weight = nn.Parameter(TwoTensor(module.weight.detach(), module.weight.detach().clone()))

    module = nn.Linear(3, 2)
    wrap(module)
    saw(unwritable(module.weight, ReadOnlyMemory()))
    assert advised(lambda: start(module)).startswith("load the plain tensors first")
    module = nn.Linear(3, 2)
    start(module)
    wrap(module)
    assert module(torch.ones(1, 3)).a.tolist() == [[4.0, 4.0]]


class Scaled(nn.Module):
    """A scale that the file does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = (nn.Parameter(torch.ones(2)) for _ in range(2))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Filled(Scaled):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.scale, 3)


@executes("applying/weights.py", "Next: fill them in reset_parameters, or build the module with values and on_missing")
@pytest.mark.parametrize("way", ["fill them in reset_parameters", "build the module with values"])
def test_what_reset_parameters_forgets_gets_a_value(tmp_path: Path, way: str) -> None:
    """Of a module on the meta device."""
    state, config = {"weight": torch.full((2,), 7.0)}, {"on_missing": "reset"}
    with torch.device("meta"):
        module: Scaled = Scaled()
    said = refusal(lambda: initialize(tmp_path, module, state, **config))
    assert way in said
    if way == "build the module with values":
        field = re.search(r"and (on_missing: keep)", said)
        assert field is not None
        module, config = Scaled(), yaml.safe_load(field[1])
    else:
        with torch.device("meta"):
            module = Filled()
    initialize(tmp_path, module, state, **config)
    assert module.weight.tolist() == [7, 7]
    assert module.scale.tolist() == ([1, 1] if config["on_missing"] == "keep" else [3, 3])


class Masked(nn.Module):
    """A mask that no file has."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("mask", torch.ones(2), persistent=False)


class MaskedWithReset(Masked):
    def reset_parameters(self) -> None:
        self.mask.fill_(1)


class MaskedWithInit(Masked):
    def _init_weights(self, module: Masked) -> None:
        module.mask.fill_(1)


@executes(
    "applying/weights.py", "Next: on_missing: reset, with reset_parameters in their modules, _init_weights in the"
)
@pytest.mark.parametrize("way", ["reset_parameters", "_init_weights", "reset=function", "to_empty"])
def test_a_buffer_that_no_file_has_gets_its_values_by_code(tmp_path: Path, way: str) -> None:
    """Of the module, of the model, or of the caller; or it is filled by hand."""
    state = {"weight": torch.full((2,), 7.0)}
    with torch.device("meta"):
        module = Masked()
    said = refusal(lambda: initialize(tmp_path, module, state))
    assert way in said
    field = re.search(r"Next: (on_missing: reset), with", said)
    assert field is not None
    if way == "to_empty":
        call = re.search(r"module\.to_empty\(device='cpu'\)", said)
        assert call is not None
        eval(call[0], {"module": module})
        module.mask.fill_(1)
        initialize(tmp_path, module, state)
    else:
        with torch.device("meta"):
            module = {"reset_parameters": MaskedWithReset, "_init_weights": MaskedWithInit}.get(way, Masked)()
        reset = (lambda one: one.mask.fill_(1)) if way == "reset=function" else None
        config = {"kind": "file", "path": str(tmp_path / "w.pt"), **yaml.safe_load(field[1])}
        InitializerStack.from_config([config]).initialize(bind(module, "net", reset=reset))
    assert module.weight.tolist() == [7, 7]
    assert module.mask.tolist() == [1, 1]
