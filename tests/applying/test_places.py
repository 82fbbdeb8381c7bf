"""Memory that tensors share, and tensors that cannot be written in place: known before anything changes."""

from __future__ import annotations

import contextlib
import mmap
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch.testing._internal.two_tensor import TwoTensor

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PartlyInitializedError,
    PathProvider,
    PlanError,
    TrainingIteration,
    bind,
    compose,
)
from noether_init_core.errors import CheckpointFormatError, ConfigError

INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009  # torch does not declare it
View = Callable[[torch.Tensor], torch.Tensor]


def module_of(**tensors: torch.Tensor) -> torch.nn.Module:
    """A module with parameters of these names; those whose name begins with ``buffer`` are buffers."""
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        if name.startswith("buffer") or not tensor.is_floating_point():
            module.register_buffer(name, tensor)
        else:
            module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return module


def stack_for(tmp_path: Path, state: dict[str, torch.Tensor], **config: Any) -> InitializerStack:
    torch.save(state, tmp_path / "weights.pt")
    return InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "weights.pt"), **config}])


def refused(tmp_path: Path, module: torch.nn.Module, state: dict[str, torch.Tensor], words: str, **config: Any) -> None:
    """The plan says so, and the start changes nothing."""
    stack = stack_for(tmp_path, state, **config)
    plan = stack.plan(bind(module, "net"))
    assert any(words in problem.message for problem in plan.problems), plan.problems
    with pytest.raises(PlanError, match="Nothing was changed"):
        stack.initialize(bind(module, "net"))


OVERLAPS: dict[str, dict[str, View]] = {
    "three views": {"a": lambda b: b[0::3], "b": lambda b: b[1::3], "c": lambda b: b[3:4]},
    "four views, the first and the last": {
        "a": lambda b: b[0::4],
        "b": lambda b: b[1::4],
        "c": lambda b: b[2::4],
        "d": lambda b: b[8:10],
    },
    "a parameter and a buffer": {"a": lambda b: b[:6], "buffer": lambda b: b[5:]},
    "a row and a column": {"a": lambda b: b.view(3, 4)[1], "b": lambda b: b.view(3, 4)[:, 2]},
    "another dtype": {"a": lambda b: b[:2], "b": lambda b: b.view(torch.int32)[1:2]},
}
DISJOINT: dict[str, dict[str, View]] = {
    "three views": {"a": lambda b: b[0::3], "b": lambda b: b[1::3], "c": lambda b: b[2:3]},
    "columns": {"a": lambda b: b.view(3, 4)[:, :2], "b": lambda b: b.view(3, 4)[:, 2:]},
    "a transposed view": {"a": lambda b: b[:6].view(2, 3).t(), "buffer": lambda b: b[6:]},
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_views_that_overlap_are_refused(name: str, tmp_path: Path) -> None:
    """Whichever is written last would overwrite the other."""
    base = torch.arange(12.0)
    module = module_of(**{key: view(base) for key, view in OVERLAPS[name].items()})
    state = {key: value.clone() + 1 for key, value in module.state_dict().items()}
    refused(tmp_path, module, state, "as another view of it")
    assert torch.equal(base, torch.arange(12.0))


@pytest.mark.parametrize("name", DISJOINT)
def test_views_that_do_not_overlap_load(name: str, tmp_path: Path) -> None:
    """Also if their elements lie between each other."""
    module = module_of(**{key: view(torch.arange(12.0)) for key, view in DISJOINT[name].items()})
    state = {key: value.clone() * 2 + 1 for key, value in module.state_dict().items()}
    stack_for(tmp_path, state).initialize(bind(module, "net"))
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])


def test_columns_of_a_large_matrix_load(tmp_path: Path) -> None:
    """The three parts of a fused weight with more than 65,536 elements each."""
    base = torch.zeros(300, 900)
    module = module_of(**{name: base[:, 300 * n : 300 * n + 300] for n, name in enumerate("qkv")})
    state = {name: torch.full((300, 300), float(n)) for n, name in enumerate("qkv", 1)}
    stack_for(tmp_path, state).initialize(bind(module, "net"))
    assert [float(part.unique()) for part in base.split(300, 1)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("first", "second", "is_fine"),
    [
        (slice(0, 6), slice(4, 12), False),
        (slice(0, 12, 2), slice(2, 3), False),
        (slice(0, 6), slice(6, 12), True),
        (slice(0, 12, 2), slice(1, 12, 2), True),
        (slice(0, 6), slice(0, 6), True),
    ],
)
def test_views_of_two_submodels(first: slice, second: slice, is_fine: bool, tmp_path: Path) -> None:
    """An overlap of two submodels is refused as within one; the same tensor in both is a tie."""
    base, paths = torch.arange(12.0), PathProvider(tmp_path, "source")

    def pair(one: torch.Tensor, two: torch.Tensor) -> Any:
        return compose("pair", {"one": bind(module_of(w=one), "one"), "two": bind(module_of(w=two), "two")})

    CheckpointWriter(paths).save(pair(base[first] + 1, base[second] + 1), TrainingIteration(0, 1, 8))
    stack = InitializerStack.from_config(
        [{"kind": "previous_run", "run_id": "source"}], path_provider=paths.with_run("new")
    )
    model = pair(base[first], base[second])
    assert stack.plan(model).is_fine == is_fine
    if is_fine:
        stack.initialize(model)
        wanted = torch.arange(12.0)
        wanted[first] = torch.arange(12.0)[first] + 1
        wanted[second] = torch.arange(12.0)[second] + 1
        assert torch.equal(base, wanted)
        return
    with pytest.raises(PlanError, match=r"shares memory with w of pair\.(one|two)"):
        stack.initialize(model)
    assert torch.equal(base, torch.arange(12.0))


def wrapped_in_vmap(check: Callable[[torch.Tensor], None]) -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        check(x)
        return x

    torch.func.vmap(inside)(torch.ones(2, 3))


def mapped(tmp_path: Path) -> torch.Tensor:
    (tmp_path / "zeros").write_bytes(bytes(8192))
    with (tmp_path / "zeros").open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return torch.from_numpy(np.frombuffer(content, np.float32, 3, offset=4096))


def freed() -> torch.Tensor:
    made = torch.ones(3)
    made.untyped_storage().resize_(0)
    return made


def inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


UNWRITABLE: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "expanded": (lambda: torch.ones(1).expand(3), "is expanded"),
    "a sliding window": (lambda: torch.ones(4).as_strided((2, 3), (1, 1)), "is expanded"),
    "freed": (freed, "its storage was freed"),
    "inference": (inference, "was made in inference mode"),
    "wrapper": (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "is a TwoTensor without memory of its own"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "has the layout sparse_coo"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "has the layout sparse_csr"),
    "mkldnn": (lambda: torch.eye(3).to_mkldnn(), "has the layout _mkldnn"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is a nested tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "has the layout jagged",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_tensor_that_cannot_be_written_is_refused_by_the_plan(name: str, tmp_path: Path) -> None:
    """In the second of two buffers: the first one is unchanged. What rules keep does not matter."""
    make, words = UNWRITABLE[name]
    module = module_of(buffer_a=torch.zeros(2), buffer_b=make())
    state = {"buffer_a": torch.ones(2), "buffer_b": torch.ones(3, 3) if make().dim() == 2 else torch.ones(3)}
    refused(tmp_path, module, state, words)
    assert torch.equal(module.get_buffer("buffer_a"), torch.zeros(2))
    stack_for(tmp_path, state, transforms=[{"keep_model": "buffer_b"}]).initialize(bind(module, "net"))
    assert torch.equal(module.get_buffer("buffer_a"), torch.ones(2))


@pytest.mark.filterwarnings("ignore:The given")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not list the permissions of memory")
def test_read_only_memory_is_refused(tmp_path: Path) -> None:
    """A write would end the process. An array that only NumPy protects is written, as by torch."""
    refused(tmp_path, module_of(buffer=mapped(tmp_path)), {"buffer": torch.ones(3)}, "in memory that is read-only")
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    module = module_of(buffer=torch.from_numpy(array))
    stack_for(tmp_path, {"buffer": torch.ones(3)}).initialize(bind(module, "net"))
    assert array.tolist() == [1.0, 1.0, 1.0]


def test_a_tensor_inside_vmap_is_refused(tmp_path: Path) -> None:
    """It is no tensor of its own there."""
    wrapped_in_vmap(
        lambda x: refused(tmp_path, module_of(buffer=x), {"buffer": torch.ones(3)}, "inside a transformation")
    )


class Subclass(torch.Tensor):
    """Plain memory with another class."""


WRITABLE: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]] = {
    "conjugated": (lambda: torch.full((3,), 1j).conj(), torch.tensor([1j, 2, 3])),
    "negated": (lambda: torch.full((3,), 1j).conj().imag, torch.tensor([1.0, 2, 3])),
    "not a leaf": (lambda: torch.ones(3, requires_grad=True) * 2, torch.tensor([1.0, 2, 3])),
    "subclass": (lambda: torch.ones(3).as_subclass(Subclass), torch.tensor([1.0, 2, 3])),
    "torch.nn.Buffer": (lambda: torch.nn.Buffer(torch.ones(3)), torch.tensor([1.0, 2, 3])),
}


@pytest.mark.parametrize("name", WRITABLE)
def test_unusual_tensors_with_memory_of_their_own_are_loaded(name: str, tmp_path: Path) -> None:
    """The values are those of the file, whatever bits torch keeps beside the memory."""
    make, value = WRITABLE[name]
    module = module_of(buffer=make())
    stack_for(tmp_path, {"buffer": value}).initialize(bind(module, "net"))
    assert torch.equal(module.get_buffer("buffer").detach().as_subclass(torch.Tensor).resolve_conj(), value)


@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.bits8, INT4])
def test_a_dtype_that_torch_cannot_convert_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """``cast: any`` allows what torch can do; the same dtype on both sides needs no conversion."""
    module = module_of(buffer=torch.zeros(3, dtype=torch.uint8).view(dtype))
    state = {"buffer": torch.ones(3, dtype=torch.bool)}
    refused(tmp_path, module, state, "cast: any does not allow", cast="any")
    if dtype is not INT4:
        same = {"buffer": torch.full((3,), 7, dtype=torch.uint8).view(dtype)}
        stack_for(tmp_path, same).initialize(bind(module, "net"))
        assert module.get_buffer("buffer").view(torch.uint8).tolist() == [7, 7, 7]


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested", "ignore:torch.quantize")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "a tensor with the layout torch.sparse_coo cannot be saved"),
        (lambda: torch.eye(3).to_mkldnn(), "a tensor with the layout torch._mkldnn cannot be saved"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "a nested tensor cannot be saved"),
        (lambda: torch.zeros(3, dtype=torch.uint8).view(INT4), "a tensor of torch.int4 cannot be saved"),
        (lambda: torch.quantize_per_tensor(torch.eye(3), 1.0, 0, torch.qint8), "a quantized tensor cannot be saved"),
    ],
)
def test_tensors_without_plain_memory_are_not_saved(
    make: Callable[[], torch.Tensor], words: str, tmp_path: Path
) -> None:
    """The error names the entry, and nothing is committed."""
    module = module_of(buffer=torch.zeros(2))
    module.register_buffer("odd", make())
    with pytest.raises(CheckpointFormatError, match=re.escape(f"net.state_dict.odd: {words}")):
        CheckpointWriter(PathProvider(tmp_path, "run")).save(bind(module, "net"), TrainingIteration(0, 1, 8))


def test_an_untied_file_is_refused_by_the_plan_of_a_tied_model(tmp_path: Path) -> None:
    """The two entries differ, so one of them would be lost; equal ones load."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model[1].weight = model[0].weight
    refused(tmp_path, model, state, "differ in the file but are one tensor")
    stack_for(tmp_path, {name: state["0.weight"].clone() for name in state}).initialize(bind(model, "net"))
    assert torch.equal(model.state_dict()["1.weight"], state["0.weight"])


@contextlib.contextmanager
def one_rank(tmp_path: Path) -> Iterator[Any]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    """One DTensor after plain ones, FSDP2 and FSDP: nothing is written before."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    def model() -> Any:
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    state = {name: torch.full_like(value, 7.0) for name, value in model().state_dict().items()}
    with one_rank(tmp_path) as mesh:
        one = model()
        one[1].weight = torch.nn.Parameter(distribute_tensor(one[1].weight.data, mesh, [Shard(0)]))
        refused(tmp_path, one, state, "1.weight is sharded over ranks (DTensor), which is not supported")
        assert not (one[0].weight == 7).any()
        refused(tmp_path, fully_shard(model(), mesh=mesh), state, "is sharded over ranks")
        wrapped = FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=True)
        with pytest.raises(ConfigError, match="wrapped in FullyShardedDataParallel, which is not supported"):
            stack_for(tmp_path, state).plan(bind(wrapped, "net"))


def test_an_error_while_weights_are_written_says_how_many_tensors_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part is complete, and some of the second may be."""
    paths = PathProvider(tmp_path, "source")

    def pair() -> Any:
        return compose("pair", {name: bind(torch.nn.Linear(2, 2), name) for name in ("one", "two")})

    CheckpointWriter(paths).save(pair(), TrainingIteration(0, 1, 8))
    stack = InitializerStack.from_config(
        [{"kind": "previous_run", "run_id": "source"}], path_provider=paths.with_run("new")
    )
    from noether_init_core.files.opening import FileCheckpoint

    copy_into, calls = FileCheckpoint.copy_into, []

    def fails(self: Any, copies: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        copy_into(self, copies)

    monkeypatch.setattr(FileCheckpoint, "copy_into", fails)
    with pytest.raises(PartlyInitializedError, match="Written before: 2 tensors, and maybe some of 2 others"):
        stack.initialize(pair())
