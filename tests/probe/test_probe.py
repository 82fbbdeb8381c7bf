"""Probing: a model that is run in passing leaves no trace, and fingerprints tell outputs apart."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import HashStore

from noether_init_core import CheckpointFormatError, ConfigError, bind, compose
from noether_init_core.probe.outputs import Compared, compare, outputs_of, tolerance_for, uncompared
from noether_init_core.probe.probe import called, quietly, repeat, take


def model(module: torch.nn.Module) -> Any:
    return bind(module, name="net")


class Calling(torch.nn.Module):
    """A module whose forward is given, with a parameter, a saved and a hidden buffer, and some submodules."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.drop = torch.nn.Dropout(0.5)
        self.norm = torch.nn.BatchNorm1d(2)
        self.function = function

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.function(self, inputs)


BATCH = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def draw(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    random.random()
    return inputs + torch.randn(2) + float(np.random.rand())


def test_random_generators_are_put_back_though_the_model_draws() -> None:
    """What it draws is the same each time, and what the process draws afterwards is what it would have drawn."""
    net = model(Calling(draw))
    before = states()
    probe = take(net, BATCH)
    assert states() == before
    torch.randn(5)
    assert repeat(net, probe) == probe.outputs
    assert probe.has_drawn
    assert not take(model(torch.nn.Linear(2, 2)), BATCH).has_drawn


def test_everything_is_put_back_if_the_model_raises() -> None:
    """Flags, buffers and generators; the error says what happened."""

    def fail(self: Any, inputs: torch.Tensor) -> None:
        self.seen += 1
        torch.randn(1)
        raise RuntimeError("no such thing")

    module = Calling(fail)
    before = states()
    with pytest.raises(
        ConfigError, match=r"net cannot be run on it: RuntimeError: no such thing\. Nothing was written"
    ):
        take(model(module), BATCH)
    assert states() == before
    assert module.training
    assert module.seen.tolist() == [0, 0, 0]


def test_train_flags_stay_as_they_were_each_by_itself() -> None:
    """Inside, all are evaluating; afterwards a frozen norm is not set to train with the rest."""
    inside: list[list[bool]] = []

    def noted(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        inside.append([one.training for one in self.modules()])
        return inputs

    module = Calling(noted)
    module.norm.eval()
    take(model(module), BATCH)
    assert inside == [[False, False, False]]
    assert [one.training for one in module.modules()] == [True, True, False]


def test_an_overridden_eval_is_not_called() -> None:
    """It might merge adapters into weights, and not undo it to the bit."""

    class Merging(torch.nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("train() or eval() was called")

    take(model(Merging(2, 2)), BATCH)


def test_dropout_and_batch_norm_evaluate() -> None:
    """Two probes of a model in train mode are the same, and running statistics stay."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.BatchNorm1d(64), torch.nn.Dropout(0.5))
    first, second = take(model(module), BATCH), take(model(module), BATCH)
    assert first.outputs == second.outputs
    assert not first.has_drawn
    assert module[1].num_batches_tracked.item() == 0


def test_there_is_no_gradient_and_no_autocast_inside() -> None:
    """Whatever surrounds the save."""
    inside: list[tuple[bool, bool]] = []

    def look(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        inside.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return inputs * self.weight

    module = Calling(look)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        take(model(module), BATCH.clone().requires_grad_())
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert inside == [(False, False)]


def test_a_pending_backward_is_not_disturbed() -> None:
    """A save between forward and backward leaves the graph as it is."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.1))
    loss = module(BATCH).sum()
    take(model(module), BATCH)
    loss.backward()
    assert module[0].weight.grad is not None


def replace(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.seen = self.seen + 1
    return inputs + self.seen[0]


def write(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.seen += 1
    return inputs + self.seen[0]


@pytest.mark.parametrize("change", [replace, write])
def test_buffers_that_the_forward_changes_are_put_back(change: Any) -> None:
    """The same tensor with the same values, so that the next probe sees what this one saw."""
    module: Any = Calling(change)
    module.seen[1:] = float("nan")
    buffer = module.seen
    probe = take(model(module), BATCH)
    assert module.seen is buffer
    assert torch.isnan(module.seen).tolist() == [False, True, True]
    assert module.seen[0] == 0
    assert repeat(model(module), probe) == probe.outputs


def test_an_output_that_is_a_buffer_is_looked_at_before_it_is_put_back() -> None:
    """The fingerprint is that of what was returned."""

    def count(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.seen

    assert take(model(Calling(count)), BATCH).outputs[0].norm == pytest.approx(math.sqrt(3))


def test_a_hidden_table_that_grows_is_put_back() -> None:
    """With the attribute that tells its size."""

    def grow(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        self.table, self.size = torch.zeros(9), 9
        return inputs

    module: Any = Calling(grow)
    module.size = 3
    take(model(module), BATCH)
    assert (module.table.shape, module.size) == ((3,), 3)


def grow_saved(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.seen = torch.zeros(9)
    return inputs


def add_saved(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.register_buffer("more", torch.zeros(1))
    return inputs


def train_itself(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.weight.add_(1)
    return inputs


def go_backward(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        (inputs * self.weight).sum().backward()
    return inputs


def test_a_gradient_that_the_forward_adds_to_is_found() -> None:
    """What was there cannot be put back."""
    module = Calling(go_backward)
    module.weight.grad = torch.ones(2)
    with pytest.raises(ConfigError, match="its forward changes the gradient of the parameter weight of a Calling"):
        take(model(module), BATCH)


@pytest.mark.parametrize("grad", [None, torch.ones(2)])
def test_a_parameter_that_the_forward_changes_is_found(grad: torch.Tensor | None) -> None:
    """The model is refused, since the old values are gone."""
    module = Calling(train_itself)
    module.weight.grad = grad
    with pytest.raises(
        ConfigError, match=r"its forward changes the parameter weight of a Calling\. The model was changed"
    ):
        take(model(module), BATCH)


class Keeping(torch.nn.Module):
    """A module that counts, draws from its own generators, and keeps tensors and containers as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.generator = torch.Generator().manual_seed(3)
        self.numpy = np.random.default_rng(4)
        self.older = np.random.RandomState(5)
        self.python = random.Random(6)
        self.count = 0
        self.mode: tuple[str, int] | None = None
        self.mean = torch.zeros(2)
        self.written = torch.zeros(2)
        self.history: list[Any] = []
        self.cache: dict[str, Any] = {"gone": 1}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = self.linear(inputs) + torch.randn(2, generator=self.generator) + self.count
        found = found + self.numpy.random() + self.older.rand() + self.python.random()
        self.count += 1
        self.mode = ("x", self.count)
        self.mean = self.mean * 0.9 + found.mean(0)
        self.written += 1
        self.history.append(self.count)
        self.cache["new"] = self.cache.pop("gone")
        self.made = True
        self.linear.weight.requires_grad_(False)
        self.linear.register_forward_hook(lambda *_arguments: None)
        return found

    def get_extra_state(self) -> dict[str, Any]:
        """What a set keeps of it."""
        return {"count": self.count, "generator": self.generator.get_state(), "history": list(self.history)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count, self.history = state["count"], state["history"]
        self.generator.set_state(state["generator"])


def kept_by(module: Keeping) -> Any:
    return (
        module.generator.get_state().tolist(),
        str(module.numpy.bit_generator.state),
        str(module.older.get_state()),
        module.python.getstate(),
        (module.count, module.mode, id(module.mean), module.mean.tolist(), module.written.tolist()),
        (id(module.history), list(module.history), str(module.cache)),
        (hasattr(module, "made"), module.linear.weight.requires_grad, len(module.linear._forward_hooks)),
        str(module.get_extra_state()),
    )


def test_attributes_and_generators_of_modules_are_put_back() -> None:
    """Counters, tensors, entries of lists and dicts, hooks; what it draws is the same each time."""
    module = Keeping()
    before = kept_by(module)
    probe = take(model(module), BATCH)
    assert kept_by(module) == before
    assert probe.has_drawn
    module.python.random()
    module.generator.manual_seed(99)
    assert repeat(model(module), probe) == probe.outputs


def test_generators_that_cannot_be_seeded_are_no_hindrance() -> None:
    """One of the system has no state; an older one over another algorithm takes no seed, and is put back, too."""
    module: Any = torch.nn.Linear(2, 2)
    module.system = random.SystemRandom()
    module.odd = np.random.RandomState(np.random.PCG64(1))
    module.register_forward_hook(lambda self, *arguments: arguments[-1] + self.system.random() + self.odd.rand())
    before = str(module.odd.get_state(legacy=False))
    take(model(module), BATCH)
    assert str(module.odd.get_state(legacy=False)) == before


def build_child(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.head = torch.nn.Linear(2, 3)
    return self.head(inputs)


def replace_child(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.norm = torch.nn.BatchNorm1d(2)
    return inputs


def replace_data(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.weight.data = self.weight.data * 2
    return inputs


def rebind(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.weight = torch.nn.Parameter(self.weight * 2)
    return inputs


def drop_gradient(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.weight.requires_grad_(False)
    self.weight.grad = None
    return inputs


def replace_data_of_a_buffer(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.seen.data = torch.ones(2, 3, dtype=torch.float64)
    return inputs


def resize(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.seen.resize_(2, 5).fill_(1)
    return inputs


def free(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.seen.untyped_storage().resize_(0)
    return inputs


def transpose(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    self.weight.data = self.weight.data.flip(0)
    self.seen.t_()
    return inputs


def make_hidden_and_saved(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    table = self.table
    del self.table
    self.table = table * 1
    self.register_buffer("other", table, persistent=False)
    return inputs


CHANGES = [
    *(build_child, replace_child, replace_data, rebind, go_backward, drop_gradient, grow_saved, add_saved),
    *(replace_data_of_a_buffer, resize, free, transpose, make_hidden_and_saved),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_its_parts_is_as_before(change: Any) -> None:
    """Children, parameters, gradients and buffers are the same objects with the same values."""
    module: Any = Calling(change)
    before = list(module.named_modules()), [(one, id(one), one.data_ptr()) for one in module.parameters()]
    values = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    probe = take(model(module), BATCH)
    assert repeat(model(module), probe) == probe.outputs
    after = list(module.named_modules()), [(one, id(one), one.data_ptr()) for one in module.parameters()]
    assert [one for one, _ in after[0]] == [one for one, _ in before[0]]
    assert all(one is two for (_, one), (_, two) in zip(after[0], before[0], strict=True))
    assert [rest for _, *rest in after[1]] == [rest for _, *rest in before[1]]
    assert values.keys() == module.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in values.items())
    assert module.weight.grad is None


def test_a_write_that_no_version_tells_is_found() -> None:
    """Through ``.data``; the error says that the model is another one now."""

    def write_data(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        self.weight.data.mul_(0.5)
        return inputs

    with pytest.raises(ConfigError, match=r"changes the parameter weight of a Calling\. The model was changed"):
        take(model(Calling(write_data)), BATCH)


def test_an_error_inside_is_not_hidden_by_a_change() -> None:
    """It goes on, with a note of what was changed."""
    module = Calling(train_itself)
    with pytest.raises(KeyError) as caught, quietly(model(module)):  # noqa: PT012 - the block is what is tested
        module(BATCH)
        raise KeyError("x")
    assert caught.value.__notes__ == [
        "net: its forward changes the parameter weight of a Calling. The model was changed. "
        "Next: build or load it again"
    ]


def test_a_change_and_an_error_are_both_told_at_a_save() -> None:
    """The error of the model is the cause."""

    def fail(self: Any, inputs: torch.Tensor) -> None:
        train_itself(self, inputs)
        raise RuntimeError("no")

    with pytest.raises(ConfigError, match=r"RuntimeError: no; net: its forward changes the parameter weight of a"):
        take(model(Calling(fail)), BATCH)


def test_what_cannot_be_put_back_leaves_the_rest_to_be_put_back() -> None:
    """Each step may fail by itself; random generators come first."""

    class Odd(list[int]):
        def clear(self) -> None:
            raise TypeError("frozen by now")

    def change(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        torch.randn(1)
        self.odd.append(1)
        self.seen += 1
        return inputs

    module: Any = Calling(change)
    module.odd = Odd()
    before = states()
    with pytest.raises(ConfigError, match="a change by its forward cannot be restored: TypeError: frozen by now"):
        take(model(module), BATCH)
    assert states() == before
    assert module.training
    assert module.seen.tolist() == [0, 0, 0]


class Counting(torch.nn.Module):
    if TYPE_CHECKING:  # TorchScript would read the annotations, and cannot tell them from text
        seen: torch.Tensor
        sums: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("sums", torch.zeros(2))
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + 1
        self.sums += 1
        return self.drop(inputs) + self.seen + self.sums


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module.eval(), BATCH)])
def test_a_scripted_module_is_as_before(make: Any) -> None:
    """Its buffers and flags are no attributes of Python."""
    module = make(Counting())
    module.train()
    before = {name: (id(tensor), tensor.tolist()) for name, tensor in module.named_buffers()}
    kept = dict(module.named_buffers())
    probe = take(model(module), BATCH)
    assert [one.training for one in module.modules()] == [True, True]
    assert {name: (id(tensor), tensor.tolist()) for name, tensor in module.named_buffers()} == before
    assert all(tensor is kept[name] for name, tensor in module.named_buffers())
    assert repeat(model(module), probe) == probe.outputs


@dataclasses.dataclass
class Data:
    logits: torch.Tensor
    loss: torch.Tensor | None = None
    name: str = "data"


@attrs.frozen
class Values:
    hidden: Any


Pair = collections.namedtuple("Pair", ["first", "second"])


def test_tensors_are_found_in_every_usual_structure() -> None:
    """Mappings, tuples, lists, dataclasses, attrs classes; numbers and texts count, None does not."""
    x = torch.zeros(1)
    nested = {"a": x, "b": [x, Pair(x, (x,))], "c": Data(x), "d": Values({"e": x}), "f": None, 3: x, "g": "text"}
    assert [one.path for one in outputs_of(collections.OrderedDict(nested))] == [
        "output.a",
        "output.b.0",
        "output.b.1.0",
        "output.b.1.1.0",
        "output.c.logits",
        "output.c.name",
        "output.d.hidden.e",
        "output.3",
        "output.g",
    ]
    assert uncompared(nested) == ()
    assert [one.path for one in outputs_of(x)] == ["output"]


def test_two_outputs_under_one_path_are_told_apart() -> None:
    """A key with a dot may look like a way."""
    x = torch.zeros(1)
    assert [one.path for one in outputs_of({"a.b": x, "a": {"b": x}})] == ["output.a.b", "output.a.b#2"]
    assert [one.path for one in outputs_of({0: x, "0": x, "0#2": x})] == ["output.0", "output.0#2", "output.0#2#2"]


@pytest.mark.parametrize("output", [None, {"a": object()}, torch.distributions.Normal(0.0, 1.0)])
def test_an_output_without_a_tensor_is_refused(output: Any) -> None:
    """There is nothing to compare."""
    with pytest.raises(ConfigError, match="without a tensor, number or string in it"):
        outputs_of(output)


def test_an_output_that_holds_itself_is_refused() -> None:
    """Instead of a recursion without end."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ConfigError, match="net cannot be run on it: RecursionError"):
        take(model(Calling(lambda _self, _inputs: endless)), BATCH)


def test_a_sparse_output_is_refused() -> None:
    """It has no plain memory."""
    with pytest.raises(ConfigError, match=r"output: a Tensor with layout torch\.sparse_coo is sparse"):
        outputs_of(torch.eye(2).to_sparse())


def test_the_same_values_are_kept_for_ever() -> None:
    """Sets of today are compared by later releases: places and digest of known values."""
    (one,) = outputs_of(torch.tensor([1.0, -2.0, 0.5, 4.0]))
    assert one.values.tolist() == [1.0, -2.0, 0.5, 4.0]
    assert one.digest == "xxh3_128:ad7676a791b136d9bd11d4d782c139e2"
    assert (one.shape, one.dtype, one.norm) == ((4,), "float32", math.sqrt(21.25))
    (many,) = outputs_of(torch.arange(1_000_000))
    assert (many.shape, many.values.shape) == ((1_000_000,), (1 << 18,))
    assert many.values[:4].tolist() == [420180, 754971, 877235, 463584]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(70_000),
        torch.randn(3, 5).t(),
        torch.randn(4).to(torch.bfloat16),
        torch.randn(4).to(torch.float8_e4m3fn),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.arange(5),
        torch.tensor([True, False]),
        torch.tensor([1.0, float("nan"), float("inf")]),
        torch.randn(4).requires_grad_(),
        torch.tensor([1e300, 1e300], dtype=torch.float64),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_the_same_tensor_is_the_same_output(tensor: torch.Tensor) -> None:
    """Whatever its dtype, shape and order in memory."""
    first, second = outputs_of(tensor), outputs_of(tensor.detach().clone())
    assert first == second
    assert compare(first, second)[0].is_same


def apart(first: torch.Tensor, second: torch.Tensor, **options: Any) -> Compared:
    (found,) = compare(outputs_of(first), outputs_of(second), **options)
    return found


@pytest.mark.parametrize("size", [7, 1000, 600_000])
@pytest.mark.parametrize("part", [5e-7, 1e-3, 0.3])
def test_the_difference_is_a_part_of_the_norm(size: int, part: float) -> None:
    """Of all values, or of as many as are kept."""
    generator = torch.Generator().manual_seed(size)
    first = torch.randn(size, generator=generator, dtype=torch.float64)
    step = torch.randn(size, generator=generator, dtype=torch.float64)
    second = first + step * part * first.norm() / step.norm()
    found = apart(first, second)
    assert not found.is_same
    assert found.difference == pytest.approx(part, rel=0.05)
    assert bool(found.problem) is (part > 1e-6)


def test_values_in_other_places_are_another_output() -> None:
    """Though norm and sum are the same."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    found = apart(values, values.flip(0))
    assert found.problem == "differs"
    assert (found.difference or 0) > 0.1


def test_nan_is_compared_by_its_places() -> None:
    """NaN in the same places is no difference, also where its bits are others; elsewhere it is one."""
    nan = float("nan")
    first, second = torch.tensor([1.0, nan, 2.0]), torch.tensor([1.0, -nan, 2.0])
    second.view(torch.int32)[1] = 0x7FC00001
    found = apart(first, second)
    assert (found.is_same, found.difference, found.problem) == (False, 0.0, "")
    assert apart(first, torch.tensor([1.0, 2.0, nan])).problem == "has NaN or infinities in other places"
    assert apart(first, torch.tensor([1.0, 2.0, 3.0])).problem == "lacks the recorded NaN or infinities"
    assert apart(torch.ones(2), torch.tensor([1.0, float("inf")])).problem == "has NaN or infinities in other places"
    assert apart(first, torch.tensor([5.0, nan, 2.0])).problem == "differs"


def test_other_shapes_and_kinds_of_numbers_are_problems() -> None:
    """No distance can be told."""
    assert apart(torch.ones(2, 3), torch.ones(3, 2)).problem == "has the shape [3, 2] instead of [2, 3]"
    found = apart(torch.ones(2), torch.ones(2, dtype=torch.int64))
    assert (found.problem, found.difference) == ("has the dtype int64 instead of float32", None)


def test_outputs_that_only_one_side_has_are_problems() -> None:
    """Both are named."""
    x = torch.ones(1)
    found = compare(outputs_of({"a": x, "b": x}), outputs_of({"a": x, "c": x}))
    assert {one.path: one.problem for one in found} == {
        "output.a": "",
        "output.b": "is no longer returned",
        "output.c": "was not returned when the set was saved",
    }


def test_whole_numbers_must_be_equal_unless_others_are_rounded() -> None:
    """A choice between near values may fall otherwise, and only then."""
    scores, choice = torch.tensor([1.0, 2.0]), torch.tensor([1])
    then = outputs_of({"scores": scores, "choice": choice})
    same = compare(then, outputs_of({"scores": scores, "choice": choice * 0}))
    assert [one.problem for one in same] == ["", "has other values"]
    rounded = compare(then, outputs_of({"scores": scores * (1 + 1e-6), "choice": choice * 0}))
    assert [(one.is_same, one.problem) for one in rounded] == [(False, ""), (False, "")]
    wrong = compare(then, outputs_of({"scores": scores * 2, "choice": choice * 0}))
    assert [one.problem for one in wrong] == ["differs", "has other values"]


def held(first: Any, second: Any, dtype: str = "float32") -> list[str]:
    """Problems of each output, measured as when it is repeated."""
    then = outputs_of(first)
    return [one.problem for one in compare(then, outputs_of(second), dtypes=[dtype])]


HIDDEN = torch.ones(12, 12).triu(1).bool()


@pytest.mark.parametrize("fill", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_constants_hide_no_other_values(fill: float, dtype: torch.dtype) -> None:
    """Masked scores are compared by what is not masked; rounding is none of it."""
    generator = torch.Generator().manual_seed(1)
    scores, others = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
    name, eps = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps
    fill = max(fill, torch.finfo(dtype).min)
    masked, wrong, rounded = (
        one.masked_fill(HIDDEN, fill).to(dtype) for one in (scores, others, scores * (1 + eps * HIDDEN.flip(0)))
    )
    assert held(masked, wrong, name) == ["differs"]
    assert not torch.equal(masked, rounded)
    assert held(masked, rounded, name) == [""]
    assert held(masked, wrong.to(torch.float32).masked_fill(HIDDEN, 0.0).to(dtype), name) == ["differs"]


@pytest.mark.parametrize("fill", [-1e4, -1e9, torch.finfo(torch.float32).min, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_rare_huge_value_hides_no_other_values(fill: float, dtype: torch.dtype, rows: int) -> None:
    """One masked logit of 64, in one row or in each; also where it is added to what it hides."""
    generator = torch.Generator().manual_seed(2)
    scores, others = torch.randn(2, rows, 64, generator=generator, dtype=torch.float64)
    name, eps = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps
    hidden = torch.zeros(64).index_fill(0, torch.tensor([5]), fill)
    for masked, wrong, rounded in (
        [one.index_fill(-1, torch.tensor([5]), fill).to(dtype) for one in (scores, others, scores * (1 + eps))],
        [(one + hidden).to(dtype) for one in (scores, others, scores * (1 + eps))],
    ):
        assert held(masked, wrong, name) == ["differs"]
        assert held(masked, rounded, name) == [""]
        # of a head that starts with zeros
        assert held(masked.where(masked.abs() > 200, 0.0), wrong, name) == ["differs"]


def test_rare_constants_hide_no_other_values() -> None:
    """Several, each repeated to the bit, with values of every magnitude between them."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4, 64, generator=generator)
    values[:, 0], values[:, 1], values[:, 2], values[0, 3] = -1e4, -1e9, -1e30, 3e6
    wrong = values.clone()
    wrong[0, 3] = 2e6
    assert held(values, wrong) == ["differs"]
    assert held(values, values * (1 + 1e-7)) == [""]
    wrong = values.clone()
    wrong[:, 4:] = wrong[:, 4:].flip(0)
    assert held(values, wrong) == ["differs"]


def test_values_of_every_magnitude_are_compared() -> None:
    """Also the middle one of three; and a value moves over a limit by rounding without a difference."""
    values = torch.cat([torch.linspace(1, 2, 50), torch.full((10,), 1e6), torch.full((10,), 1e30)])
    changed = values.clone()
    changed[55] = 0
    assert held(values, changed) == ["differs"]
    steady = torch.logspace(-3, 6, 400)
    assert held(steady, steady * (1 + 1e-7)) == [""]
    assert held(steady, steady.flip(0)) == ["differs"]


def test_noise_beside_values_is_not_taken_for_values() -> None:
    """Most entries are what is left of a sum that is zero."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(100, generator=generator)
    noise = torch.randn(2, 300, generator=generator) * 1e-7
    first, second = torch.cat([values, noise[0]]), torch.cat([values, noise[1]])
    assert held(first, second) == [""]
    # in each of two rows
    assert held(torch.stack([first, first]), torch.stack([second, second])) == [""]


def test_values_near_the_end_of_float64_are_compared() -> None:
    """Their squares are outside of it."""
    values = torch.tensor([1e300, -1e300, 5e299], dtype=torch.float64)
    assert held(values, values.flip(0)) == ["differs"]
    assert held(values, values * (1 + 1e-15)) == [""]
    assert held(values * 1.7e8, (values * 1.7e8).flip(0)) == ["differs"]
    assert outputs_of(values * 1e8)[0].norm == pytest.approx(1.5e308)


def test_many_other_whole_numbers_are_no_rounding() -> None:
    """One choice in twenty may fall otherwise, not each."""
    scores, choices = torch.ones(200), torch.arange(200)
    few, many = choices.clone(), choices.clone()
    few[:4] = 0
    few[4] = 10**12
    many[:100] += 1
    then = {"scores": scores, "choices": choices}
    assert held(then, {"scores": scores * (1 + 1e-6), "choices": few}) == ["", ""]
    assert held(then, {"scores": scores * (1 + 1e-6), "choices": many}) == ["", "has other values"]
    assert held(then, {"scores": scores * (1 + 1e-6), "choices": choices.flip(0)}) == ["", "has other values"]


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        (0.5, 0.6, "differs"),
        (0.5, 0.5 + 1e-7, ""),
        (3, 4, "has other values"),
        (10**30, 10**30 + 1, "has other values"),
        (-(2**63), 2**63, "has the dtype str instead of int64"),
        (True, False, "has other values"),
        ("yes", "no", "has other values"),
        (True, 1.0, "has the dtype float64 instead of bool"),
    ],
)
def test_numbers_and_texts_are_compared(first: Any, second: Any, problem: str) -> None:
    """As tensors are."""
    assert held(first, second) == [problem]
    assert held(first, first) == [""]


def test_an_output_of_nan_alone_is_refused() -> None:
    """Every broken model would match it."""
    with pytest.raises(ConfigError, match="all outputs of net are NaN"):
        take(model(Calling(lambda _self, inputs: inputs * float("nan"))), BATCH)


@pytest.mark.parametrize(
    ("dtypes", "devices", "expected"),
    [
        (["float32"], ["cpu"], 1e-4),
        (["float32", "float64"], ["cpu"], 1e-4),
        (["float64"], ["cuda"], 1e-6),
        (["float32"], ["cpu", "cuda"], 5e-3),
        (["float32", "bfloat16"], ["cuda"], 5e-2),
        (["float16"], ["cpu"], 1e-2),
        (["complex64"], ["cpu"], 1e-4),
        (["float8_e4m3fn"], ["cpu"], 0.2),
        (["int64"], ["cpu"], 0.0),
    ],
)
def test_the_coarsest_dtype_decides_what_is_rounding(dtypes: list[str], devices: list[str], expected: float) -> None:
    """Of output and weights, then and now; an accelerator may multiply float32 with fewer bits."""
    assert tolerance_for(dtypes, devices) == expected


@pytest.mark.parametrize(("dtype", "alike", "other"), [("float16", 5e-4, 1e-2), ("bfloat16", 2e-3, 5e-2)])
def test_half_precision_is_held_closer_where_all_is_alike(dtype: str, alike: float, other: float) -> None:
    """The same software on the same kind of processor, with the same dtypes."""
    then = outputs_of(torch.linspace(1, 2, 64).to(getattr(torch, dtype)))
    moved = outputs_of((torch.linspace(1, 2, 64) * (1 + alike * 2)).to(getattr(torch, dtype)))
    found = {is_alike: compare(then, moved, dtypes=[dtype, dtype], is_alike=is_alike)[0] for is_alike in (True, False)}
    assert [(one.problem, one.tolerance) for one in found.values()] == [("differs", alike), ("", other)]
    mixed = compare(then, moved, dtypes=[dtype, "float32"], is_alike=True)[0]
    assert (mixed.problem, mixed.tolerance) == ("", other)
    assert tolerance_for(["float32"], ["cpu"], is_alike=True) == 1e-4


def test_a_limit_that_is_given_counts() -> None:
    """For every dtype."""
    first, second = torch.ones(4), torch.ones(4) * 1.001
    assert apart(first, second).problem == "differs"
    assert apart(first, second, tolerance=0.01).problem == ""


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (BATCH, ((BATCH,), {})),
        ((BATCH, 3), ((BATCH, 3), {})),
        ([BATCH], ((BATCH,), {})),
        (
            {"inputs": BATCH, "scale": 2.5, "mode": "x", "mask": None},
            ((), {"inputs": BATCH, "scale": 2.5, "mode": "x"}),
        ),
        (({"ids": BATCH},), (({"ids": BATCH},), {})),
    ],
)
def test_a_batch_is_passed_by_its_form(batch: Any, expected: tuple[Any, Any]) -> None:
    """A dict as keywords, a list or tuple as arguments, a tensor as the only one; repeated, it is the same."""
    calls: list[Any] = []

    class Taking(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append((args, kwargs))
            return torch.zeros(1)

    probe = take(model(Taking()), batch)
    repeat(model(Taking()), probe)
    for args, kwargs in calls:
        assert str(args) == str(expected[0])
        assert {key: str(value) for key, value in kwargs.items() if value is not None} == {
            key: str(value) for key, value in expected[1].items()
        }
    assert len(calls) == 2


def test_the_batch_is_kept_as_it_was() -> None:
    """What the model or the caller writes into it later does not reach the probe."""

    def spoil(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.mul_(2)

    batch = BATCH.clone().requires_grad_()
    probe = take(model(Calling(spoil)), batch)
    assert batch.tolist() == BATCH.tolist()
    with torch.no_grad():
        batch.zero_()
    assert repeat(model(Calling(spoil)), probe) == probe.outputs
    assert probe.batch.tolist() == BATCH.tolist()
    assert not probe.batch.requires_grad


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x y": BATCH}, "net cannot be run on it: TypeError"),
        ({0: BATCH}, "net cannot be run on it: TypeError"),
        (BATCH.double(), "net cannot be run on it: RuntimeError"),
        ((BATCH, BATCH), "net cannot be run on it: TypeError"),
    ],
    ids=["words", "number", "dtype", "too many"],
)
def test_a_batch_that_the_model_cannot_be_run_on_is_refused(batch: Any, said: str) -> None:
    """With what is wrong with it."""
    with pytest.raises(ConfigError, match=said) as caught:
        take(model(torch.nn.Linear(2, 2)), batch)
    assert "Nothing was written" in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (np.zeros(3), "a NumPy array cannot be saved"),
        (object(), "a object cannot be saved"),
        (BATCH.to("meta"), "on the meta device"),
    ],
    ids=["array", "object", "meta"],
)
def test_a_batch_that_cannot_be_kept_is_refused(batch: Any, said: str) -> None:
    """As any value that could not be read again."""
    with pytest.raises(CheckpointFormatError, match=said):
        take(model(torch.nn.Linear(2, 2)), batch)


def test_a_batch_follows_the_dtype_of_the_model() -> None:
    """Loaded in another dtype, the model gets inputs of it; token numbers and inputs of other dtypes stay."""
    seen: list[torch.dtype] = []

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor, ids: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            seen.extend([x.dtype, ids.dtype, times.dtype])
            return x * self.weight

    probe = take(model(Two()), (BATCH, torch.tensor([1]), torch.zeros(1, dtype=torch.float64)))
    repeat(model(Two().to(torch.bfloat16)), probe)
    assert seen == [torch.float32, torch.int64, torch.float64, torch.bfloat16, torch.int64, torch.float64]


class Whole(torch.nn.Module):
    """A composite that can be called, as Noether's are."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "whole"
        self.submodels = {"left": bind(torch.nn.Linear(2, 2), "left"), "right": bind(torch.nn.Dropout(0.5), "right")}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.submodels["right"](self.submodels["left"](inputs))


def test_a_composite_is_called_as_a_whole() -> None:
    """Its submodels evaluate, too, and are set to train again."""
    whole = Whole()
    probe = take(whole, BATCH)
    assert probe.models == ("whole.left", "whole.right")
    assert repeat(whole, probe) == probe.outputs
    assert whole.submodels["right"].module.training


def test_what_cannot_be_called_is_told_so() -> None:
    """compose() makes a composite without a forward."""
    pair = compose("pair", {"left": bind(torch.nn.Linear(2, 2), "left")})
    with pytest.raises(ConfigError, match=r"pair is a ComposedModel without __call__, .*\. Next: define"):
        take(pair, BATCH)


def test_a_model_without_memory_or_shapes_is_refused() -> None:
    """The reason is named."""
    with pytest.raises(ConfigError, match="net cannot be run here: its weight is on the meta device"):
        take(model(torch.nn.Linear(2, 2, device="meta")), BATCH)
    with pytest.raises(ConfigError, match="net cannot be run here: its weight has no shape yet"):
        take(model(torch.nn.LazyLinear(2)), BATCH)


def test_a_compiled_module_is_called_without_its_wrapper() -> None:
    """Evaluating would compile it anew, and compiled code rounds otherwise."""

    def forbidden(graph: Any, inputs: Any) -> Any:
        raise AssertionError("it was compiled")

    module = torch.nn.Linear(2, 2)
    compiled: Any = torch.compile(module, backend=forbidden)
    assert take(model(compiled), BATCH).outputs == take(model(module), BATCH).outputs


def test_a_distributed_module_is_called_without_its_wrapper() -> None:
    """The wrapper would wait for the other ranks, and a save may be made by one alone."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        module = torch.nn.Linear(2, 2)
        wrapped = torch.nn.parallel.DistributedDataParallel(module)
        assert called(model(wrapped)) is module
        assert take(model(wrapped), BATCH).outputs == take(model(module), BATCH).outputs
        assert wrapped.training
    finally:
        torch.distributed.destroy_process_group()
