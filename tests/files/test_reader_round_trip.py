"""What torch.save writes is what the reader loads: any plain object, any tensor, every protocol."""

from __future__ import annotations

import collections
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from noether_init_core.errors import CheckpointFormatError
from noether_init_core.files.content import ITEMSIZES, TensorInfo
from noether_init_core.files.opening import open_checkpoint

PROTOCOLS = (2, 3, 4, 5)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**600), 2**600),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.complex_numbers(allow_nan=False, allow_infinity=False),
)
keys = st.one_of(
    st.text(max_size=8),
    st.integers(-5, 300),
    st.booleans(),
    st.none(),
    st.binary(max_size=3),
    st.tuples(st.integers(0, 9), st.text(max_size=3)),
    st.frozensets(st.integers(0, 9), max_size=3),
)
ranges = st.builds(range, st.integers(-9, 9), st.integers(-9, 99), st.integers(1, 9))


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of the values, lazy operations carried out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 calls itself experimental, once
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().tobytes()


def assert_same(actual: Any, expected: Any) -> None:
    """Equal in types and order, tensors in dtype, shape and bits; kinds of dict count as dict, sizes as tuple."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert not actual.is_conj()
        assert not actual.is_neg()
        assert bits(actual) == bits(expected)
    elif isinstance(expected, dict):
        assert type(actual) is dict
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is (tuple if isinstance(expected, tuple) else list)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(actual) is type(expected)
        assert actual == expected
        if isinstance(expected, float):
            assert math.copysign(1, actual) == math.copysign(1, expected)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype; dense, transposed, strided, with an offset, channels last, scalar or empty."""
    dtype = getattr(torch, draw(st.sampled_from(sorted(ITEMSIZES))))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    values = torch.tensor(list(raw), dtype=torch.uint8)
    if dtype == torch.bool:
        values = values % 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 calls itself experimental
        tensor = values.view(dtype).reshape(shape)
        how = draw(st.sampled_from(["dense", "transposed", "narrow", "strided", "scalar", "row"]))
        if how == "transposed":
            tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
        elif how == "narrow" and shape and shape[-1] > 1:
            tensor = tensor.narrow(-1, 1, shape[-1] - 1)
        elif how == "strided" and shape:
            tensor = tensor[::2]
        elif how == "scalar" and tensor.numel():
            tensor = tensor.reshape(-1)[-1]
        elif how == "row" and shape and shape[0]:
            tensor = tensor[-1]
    return tensor


leaves = st.one_of(scalars, tensors(), ranges, st.sets(st.integers(0, 99), max_size=4), st.just(slice(1, None, 2)))
objects = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=4).map(collections.OrderedDict),
        st.dictionaries(st.text(max_size=5), inner, max_size=4).map(lambda d: collections.defaultdict(list, d)),
    ),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=objects, protocol=st.sampled_from(PROTOCOLS))
def test_any_object_of_plain_values_and_tensors_comes_back(tmp_path: Path, value: Any, protocol: int) -> None:
    """Whatever is nested in whatever: it loads equal to what was saved, and to what verifies."""
    path = tmp_path / "a.pt"
    torch.save(value, path, pickle_protocol=protocol)
    with open_checkpoint(path) as reader:
        reader.verify()
        assert_same(reader.load(), value)
        for key, info in reader.tensors().items():
            assert info.nbytes == math.prod(info.shape) * ITEMSIZES[info.dtype]
            assert tuple(reader.read(key).shape) == info.shape


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", sorted(ITEMSIZES))
def test_every_dtype_comes_back_in_every_protocol(tmp_path: Path, dtype: str, protocol: int) -> None:
    """The name of the dtype, its size and the bits are kept; so the table of sizes is torch's."""
    kind = getattr(torch, dtype)
    assert kind.itemsize == ITEMSIZES[dtype]
    raw = torch.tensor([0, 1] * 24, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = raw.view(kind).reshape(3, -1)
        torch.save({"a": tensor, "b": tensor[1:]}, tmp_path / "a.pt", pickle_protocol=protocol)
    with open_checkpoint(tmp_path / "a.pt") as reader:
        reader.verify()
        assert reader.tensors()["a"].dtype == dtype
        assert_same(reader.load(), {"a": tensor, "b": tensor[1:]})


def test_the_table_of_dtypes_lacks_only_quantized_and_sub_byte_ones() -> None:
    """A dtype that a new torch brings is noticed here."""
    existing = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    sub_byte = {f"{sign}int{number}" for sign in ("", "u") for number in range(1, 8)}
    quantized = {"qint8", "qint32", "quint8", "quint4x2", "quint2x4"}
    assert set(ITEMSIZES) | sub_byte | quantized == existing


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_kinds_of_python_values_come_back(tmp_path: Path, protocol: int) -> None:
    """Sets, bytes in every form, counters and sizes, which each protocol writes in its own way."""
    value = {
        "bytes": [b"", b"abc", bytes(range(256)), b"x" * 1000],
        "arrays": [bytearray(), bytearray(b"\x00\xff")],
        "sets": [set(), {1, "a", (2, 3)}, frozenset(), frozenset({b"x"})],
        "numbers": [0, -1, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**31, 2**63, -(2**2000), 1e-300, -0.0],
        "texts": ["", "x" * 300, "żółć", "\U0001f600", "a\nb\0", "\ud800"],
        "others": [torch.Size([1, 2]), 1 - 2j, slice(None), range(5), torch.Size([])],
        "shared": [[1]] * 3,
        (1, ("a", None)): collections.Counter("aab"),
        None: {True: {1.5: {}}},
    }
    torch.save(value, tmp_path / "a.pt", pickle_protocol=protocol)
    with open_checkpoint(tmp_path / "a.pt") as reader:
        loaded = reader.load()
    assert_same(loaded, value)
    assert loaded["shared"][0] is loaded["shared"][2]


def test_infinities_and_nan_come_back(tmp_path: Path) -> None:
    """Floats outside of the numbers are kept."""
    torch.save([math.inf, -math.inf, math.nan], tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        first, second, third = reader.load()
    assert (first, second, math.isnan(third)) == (math.inf, -math.inf, True)


def test_lazy_conjugates_and_negations_are_carried_out(tmp_path: Path) -> None:
    """A tensor whose stored bytes are those before a lazy operation is read as it was seen."""
    base = torch.tensor([1 + 2j, 3 - 4j])
    value = {"plain": base, "conjugate": base.conj(), "both": base.clone().conj().imag}
    torch.save(value, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert reader.tensors()["conjugate"].pieces[0].is_conjugated
        assert reader.tensors()["both"].pieces[0].is_negated
        assert_same(reader.load(), value)
        target = {"conjugate": torch.zeros(2, dtype=torch.complex64), "both": torch.zeros(2)}
        reader.copy_into([(key, None, tensor) for key, tensor in target.items()])
        assert_same(target, {"conjugate": base.conj(), "both": base.conj().imag})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_parameters_buffers_and_attributes_come_back_as_plain_tensors(tmp_path: Path, protocol: int) -> None:
    """Whether it was a parameter, and what Python code attached to it, is left behind."""
    parameter = torch.nn.Parameter(torch.ones(2))
    marked = torch.nn.Parameter(torch.ones(3))
    marked.note = "x"  # type: ignore[attr-defined]
    tensor = torch.ones(4)
    tensor.note = "x"  # type: ignore[attr-defined]
    value = {"p": parameter, "m": marked, "t": tensor, "b": torch.nn.Buffer(torch.ones(5)), "f": torch.ones(1)}
    value["alias"] = parameter.detach()
    torch.save(value, tmp_path / "a.pt", pickle_protocol=protocol)
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert reader.tensors()["p"] == reader.tensors()["alias"], "one tensor, though only one name is a parameter"
        loaded = reader.load()
        assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in loaded.values())
        assert_same(loaded, value)


def test_tied_weights_have_equal_infos_and_stay_tied_when_loaded(tmp_path: Path) -> None:
    """Two keys of one tensor are recognised; another view of the same storage is another tensor."""
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save(
        {"state_dict": {"a": weight, "b": weight.view(2, 3), "c": weight.t(), "d": weight[1:]}}, tmp_path / "a.pt"
    )
    with open_checkpoint(tmp_path / "a.pt") as reader:
        infos = reader.tensors()
        assert infos["a"] == infos["b"]
        assert (infos["c"].stride, infos["c"].contiguous, infos["d"].pieces[0].offset) == (
            (1, 3),
            None,
            infos["a"].pieces[0].offset + 12,
        )
        loaded = reader.load()["state_dict"]
        assert loaded["a"] is loaded["b"]
        assert_same(loaded["c"], weight.t())
        assert loaded["d"].untyped_storage().nbytes() == 12  # memory of its own, not that of the whole storage


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": torch.ones(2), "steps": 3}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("not used")


@pytest.mark.parametrize("is_bare", [True, False])
def test_extra_state_of_modules_stands_beside_the_tensors(tmp_path: Path, is_bare: bool) -> None:
    """It is no tensor of the state dict, keeps its values, and its tensors can be read."""
    state = _Net().state_dict()
    torch.save(state if is_bare else {"state_dict": state, "epoch": 1}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert set(reader.tensors()) == {"inner.weight", "inner.bias"}
        assert reader.metadata == ({} if is_bare else {"epoch": 1})
        extra = reader.extra_state["_extra_state"]
        assert isinstance(extra["scale"], TensorInfo)
        assert_same(reader.materialize(extra), {"scale": torch.ones(2), "steps": 3})


def test_tensors_of_other_objects_are_found_by_dotted_path(tmp_path: Path) -> None:
    """Positions and keys are joined by dots; equal paths are told apart; an object that is no dict has a name."""
    value = {"state": {0: {"exp_avg": torch.ones(1)}}, "a": {"b": torch.ones(2)}, "a.b": torch.ones(3), "n": [1]}
    torch.save(value, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        shapes = {key: info.shape for key, info in reader.tensors().items()}
        assert shapes == {"state.0.exp_avg": (1,), "a.b": (2,), "a.b#2": (3,)}
        assert reader.metadata["n"] == [1]
        assert reader.metadata["state"][0]["exp_avg"] is reader.tensors()["state.0.exp_avg"]
    torch.save([torch.ones(1), (torch.ones(2),)], tmp_path / "b.pt")
    with open_checkpoint(tmp_path / "b.pt") as reader:
        assert list(reader.tensors()) == ["object.0", "object.1.0"]
        assert list(reader.metadata) == ["object"]


def test_versions_of_modules_are_those_that_torch_saved(tmp_path: Path) -> None:
    """``_metadata`` of the state dict, in the reader and in what ``load`` and ``materialize`` give."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    torch.save({"state_dict": module.state_dict(), "ema": {"inner": module.state_dict()}}, tmp_path / "a.pt")
    truth = torch.load(tmp_path / "a.pt", weights_only=True)
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert dict(reader.versions) == {"": {"version": 1}, "0": {"version": 1}, "1": {"version": 2}}
        loaded = reader.load()
        assert loaded["state_dict"]._metadata == truth["state_dict"]._metadata
        assert reader.materialize(reader.metadata["ema"])["inner"]._metadata == truth["ema"]["inner"]._metadata
        loaded["state_dict"]._metadata["1"]["version"] = 0
        assert reader.versions["1"] == {"version": 2}
    torch.save(dict(module.state_dict()), tmp_path / "bare.pt")
    with open_checkpoint(tmp_path / "bare.pt") as reader:
        assert reader.versions == {}


@pytest.mark.parametrize("metadata", [[1], {1: {}}, {"": 1}, {"": {"version": torch.zeros(1)}}, {"": {"of": {1, 2}}}])
def test_versions_that_are_no_plain_data_are_refused(tmp_path: Path, metadata: Any) -> None:
    """Torch could not use them either, and nobody else may be handed what was not looked at."""
    state = torch.nn.Linear(2, 2).state_dict()
    state._metadata = metadata  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointFormatError, match="_metadata of a state dict"):
        open_checkpoint(tmp_path / "a.pt")
