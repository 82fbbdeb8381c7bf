"""What lies beside the weights is skipped; what is asked for, or reachable from it, and foreign is refused."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import functools
import logging
import pathlib
import re
import sys
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import omegaconf
import pytest
import torch
from support.handmade import call, name, string, tensor, write_pickle

from noether_init_core import InitializerStack, bind, open_checkpoint
from noether_init_core.errors import CheckpointCorruptError, CheckpointFormatError, PlanError, UnsafeGlobalError
from noether_init_core.files.content import ForeignObject
from noether_init_core.inspection.reading import look_at_file


class Color(enum.Enum):
    """An enumeration of one's own."""

    RED = 1


class Level(enum.IntEnum):
    """One that is a number, too."""

    HIGH = 3


@attrs.define
class Options:
    """A class of one's own with a path in it."""

    lr: float = 0.1
    path: Path = attrs.field(factory=lambda: pathlib.PosixPath("/data"))


class Outer:
    """The owner of another class, which pickle finds by getattr."""

    class Inner:
        """Has a state."""

        def __init__(self) -> None:
            self.x = 1

    def method(self) -> None:
        """A method that a list of callables may hold."""


class WithKeywords:
    """Needs keywords to be built."""

    def __new__(cls, *, a: int) -> WithKeywords:
        """Take the keyword."""
        self = super().__new__(cls)
        self.a = a
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        """Give it to pickle."""
        return (), {"a": self.a}

    a: int


class Dict(dict[str, Any]):
    """A dict of a class of one's own."""


class List(list[Any]):
    """A list of a class of one's own."""


class Set(set[Any]):
    """A set of a class of one's own."""


class Pair(collections.namedtuple("Pair", "a b")):
    """A named tuple."""


class Subclass(torch.Tensor):
    """A tensor of a class of one's own."""


def make_model() -> torch.nn.Module:
    """A model with parameters, buffers, and versions of its layers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a model, with state."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return optimizer


def knot() -> types.SimpleNamespace:
    """An object that holds itself, twice."""
    found = types.SimpleNamespace()
    found.me, found.more = found, [found]
    return found


def loop() -> dict[str, Any]:
    """A plain dict that holds itself."""
    found: dict[str, Any] = {}
    found["me"] = [found]
    return found


def by_parameter() -> dict[Any, Any]:
    """A dict whose keys are parameters, as state of a whole optimizer has them, and tuples of them."""
    first, second = make_model().state_dict(keep_vars=True).values().__iter__(), 2
    parameter = next(first)
    return {parameter: second, (parameter, "a"): 3}


# What to write beside the weights -> what is listed as unread, and the error for a caller that asks for it.
BESIDE: dict[str, tuple[Callable[[], Any], str]] = {
    "namespace": (lambda: argparse.Namespace(lr=0.1), "argparse.Namespace"),
    "path": (lambda: pathlib.PosixPath("/data"), "pathlib.PosixPath"),
    "scalar of NumPy": (lambda: np.float64(3), "scalar"),
    "array of NumPy": (lambda: np.arange(5), "_reconstruct|_frombuffer"),
    "array of objects": (lambda: np.array(["a", {}], dtype=object), "_reconstruct|_frombuffer"),
    "generator of NumPy": (lambda: np.random.default_rng(0), "numpy.random"),
    "OmegaConf": (lambda: omegaconf.OmegaConf.create({"a": {"b": [1, 2]}}), "omegaconf.dictconfig.DictConfig"),
    "partial": (lambda: functools.partial(print, 1, end=""), "functools.partial"),
    "function": (lambda: torch.nn.functional.gelu, "gelu"),
    "class": (lambda: Options, "Options"),
    "method": (lambda: Outer.method, "getattr|Outer"),
    "object of an inner class": (Outer.Inner, "getattr|Inner"),
    "object with keywords": (lambda: WithKeywords(a=3), "WithKeywords|partial|newobj_ex"),
    "enumeration": (lambda: Color.RED, "Color|getattr"),
    "number of an enumeration": (lambda: Level.HIGH, "Level|getattr"),
    "class of attrs": (Options, "Options"),
    "time": (lambda: datetime.datetime(2026, 2, 19, tzinfo=datetime.UTC), "datetime.datetime"),
    "defaultdict of a partial": (lambda: collections.defaultdict(functools.partial(int, 3), {1: 2}), "partial"),
    "deque": (lambda: collections.deque([1, 2], maxlen=4), "collections.deque"),
    "set of paths": (lambda: {pathlib.PosixPath("/data")}, "pathlib.PosixPath"),
    "frozenset of members": (lambda: frozenset({Color.RED}), "Color|getattr"),
    "key": (lambda: {pathlib.PosixPath("/data"): 1}, "pathlib.PosixPath"),
    "key in a tuple": (lambda: {(1, pathlib.PosixPath("/data")): 1}, "pathlib.PosixPath"),
    "dict of a class": (lambda: Dict(a=1), "Dict"),
    "list of a class": (lambda: List([1]), "List"),
    "set of a class": (lambda: Set([1]), "Set"),
    "named tuple": (lambda: Pair(1, 2), "Pair"),
    "slice of NumPy": (lambda: slice(np.int64(1), None), "scalar"),
    "pattern": (lambda: re.compile("x"), "re._compile"),
    "decimal": (lambda: decimal.Decimal("1.5"), "decimal.Decimal"),
    "identifier": (lambda: uuid.UUID(int=3), "uuid.UUID"),
    "logger": (lambda: logging.getLogger("a"), "getLogger"),
    "object that holds itself": (knot, "types.SimpleNamespace"),
    "dict that holds itself": (loop, "it contains itself"),
    "dict by parameter": (by_parameter, "a key is a TensorInfo"),
    "whole module": (make_model, "Sequential.*with 7 tensors"),
    "whole optimizer": (lambda: trained(make_model()), "AdamW.*with 16 tensors"),
    "schedule": (lambda: torch.optim.lr_scheduler.StepLR(trained(make_model()), 3), "StepLR"),
    "tensor of a class": (lambda: torch.ones(2).as_subclass(Subclass), "Subclass, with 1 tensor"),
    "sparse tensor": (lambda: torch.eye(2).to_sparse(), "it is a sparse tensor"),
    "meta tensor": (lambda: torch.ones(2, device="meta"), "it is a meta tensor"),
    "storage": (lambda: torch.ones(2).untyped_storage(), "it is a bare storage"),
}
# How a file holds the weights, and how the kind file reads them.
LAYOUTS: dict[str, tuple[Callable[[Any, Any], Any], dict[str, Any]]] = {
    "state_dict": (lambda weights, beside: {"state_dict": weights, "beside": beside, "epoch": 3}, {}),
    "model": (
        lambda weights, beside: {"epoch": 3, "more": [beside], "beside": beside, "model": weights},
        {"source_root": "model"},
    ),
    "among them": (lambda weights, beside: {**weights, "beside": beside, "epoch": 3}, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", BESIDE, ids=lambda case: case.replace(" ", "_"))
def test_weights_are_loaded_whatever_lies_beside_them(tmp_path: Path, case: str, layout: str) -> None:
    """Nothing is allowed for them; it is listed as unread, in the report and by inspect; asked for, it is refused."""
    make, listed = BESIDE[case]
    arranged, config = LAYOUTS[layout]
    model, target, path = (
        make_model(),
        torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)),
        tmp_path / "a.pt",
    )
    for protocol in (2, 5):
        torch.save(arranged(model.state_dict(), make()), path, pickle_protocol=protocol)
        config = {"kind": "file", "path": str(path), **config}
        report = InitializerStack.from_config([config]).initialize(bind(target, name="net"))
        for key, value in model.state_dict().items():
            assert torch.equal(target.state_dict()[key], value)
        (said,) = report.initializers[0].not_restored
        assert re.search(rf"a\.pt: unread: .*(beside|more\.0).* \(.*({listed})", said)
        found = look_at_file(path)
        listing = [part for place, part in found.unread.items() if place.startswith(("beside", "more.0"))]
        assert re.search(listed, listing[0])
        assert (found.metadata["beside"], found.metadata["epoch"]) == ("<unread>", 3)
        with open_checkpoint(path) as reader:
            assert reader.metadata["epoch"] == 3
            for ask in (lambda: reader.metadata["beside"], lambda: reader.metadata.get("beside"), reader.load):
                with pytest.raises(CheckpointFormatError, match=r"beside|more\.0"):
                    ask()


def test_a_file_without_foreign_parts_has_nothing_unread(tmp_path: Path) -> None:
    """Its metadata is the plain dict of it."""
    torch.save({"state_dict": make_model().state_dict(), "a": {1, 2}, "b": torch.float32}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert dict(reader.unread) == {}
        assert type(reader.metadata) is dict


def test_what_is_allowed_is_read_even_beside_what_is_not(tmp_path: Path) -> None:
    """The names of the error are those to allow; a config that holds itself can be passed over, not read."""
    options = omegaconf.OmegaConf.create({"lr": 0.1})
    path = tmp_path / "a.pt"
    torch.save({"state_dict": make_model().state_dict(), "cfg": options, "ns": argparse.Namespace(lr=1)}, path)
    with open_checkpoint(path, allow_globals=["argparse.Namespace"]) as reader:
        assert isinstance(reader.metadata["ns"], ForeignObject)
        assert list(reader.unread) == ["cfg"]
        with pytest.raises(UnsafeGlobalError) as caught:
            reader.metadata["cfg"]
    with open_checkpoint(path, allow_globals=caught.value.names) as reader:
        assert torch.equal(reader.read("0.weight"), make_model()[0].weight)
        with pytest.raises(CheckpointFormatError, match=r"cfg.*it contains itself"):
            reader.metadata["cfg"]


# Files whose weights are foreign, or can be reached by something that is.
WEIGHT = tensor([2, 2], [2, 1])
SHARED = b"}q\x01(" + string("w") + WEIGHT + b"q\x02u"  # a dict, memoized as 1, of a tensor, memoized as 2


STORAGE = b"(" + string("storage") + name("torch", "FloatStorage") + string("0") + string("cpu") + b"K\x04tQ"


def entry(key: str, opcodes: bytes) -> bytes:
    """A key and its value."""
    return string(key) + opcodes


def both(first: bytes, second: bytes) -> bytes:
    """A file with a state dict and something beside it, in this order."""
    return b"}(" + entry("state_dict", first) + entry("x", second) + b"u"


UPDATE = call("builtins", "getattr", b"h\x01", string("update"))
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "value in the state dict": (
        both(b"}(" + entry("w", WEIGHT) + entry("n", call("a.b", "C")) + b"u", b"N"),
        "a.b.C",
        r"at state_dict\.n",
    ),
    "key in the state dict": (both(b"}(" + entry("w", WEIGHT) + call("a.b", "C") + b"Nu", b"N"), "a.b.C", "state_dict"),
    "state dict of a class": (
        both(name("a.b", "C") + b")\x81(" + entry("w", WEIGHT) + b"u", WEIGHT),
        "a.b.C",
        r"at state_dict\)",
    ),
    "state dict that a call returns": (
        both(call("a.b", "f", SHARED) + b"(" + entry("v", WEIGHT) + b"u", WEIGHT),
        "a.b.f",
        r"at state_dict\)",
    ),
    "weights in the state of an object": (
        b"}" + entry("model", name("a.b", "C") + b")\x81" + SHARED + b"b") + b"s",
        "a.b.C",
        r"at model\)",
    ),
    "state on the state dict": (
        both(SHARED + b"}" + entry("hidden", call("a.b", "C")) + b"sb", b"N"),
        "a.b.C",
        r"state_dict\.__dict__\.hidden",
    ),
    "two states on the state dict": (
        both(SHARED + b"}" + entry("hidden", call("a.b", "C")) + b"sb}b", b"N"),
        "a.b.C",
        r"state_dict\.__dict__\.hidden",
    ),
    "versions of the state dict": (
        both(SHARED + b"}" + entry("_metadata", b"}" + entry("", call("a.b", "C")) + b"s") + b"sb", b"N"),
        "a.b.C",
        "a.pt refers to",
    ),
    "call that changes the state dict": (both(SHARED, UPDATE + b"}\x85R"), "builtins.getattr", "a call that takes"),
    "call before the weights are set": (
        both(b"}q\x01", b"N") + string("y") + UPDATE + b"}\x85Rs" + string("z") + b"h\x01" + entry("w", WEIGHT) + b"ss",
        "builtins.getattr",
        "a call that takes",
    ),
    "call whose result is dropped": (both(SHARED, UPDATE + b"}\x85R0N"), "builtins.getattr", "a call that takes"),
    "call by an object that was built": (
        both(SHARED, name("functools", "partial") + name("operator", "setitem") + b"h\x01\x86\x81" + b")R"),
        "operator.setitem",
        "a call that takes",
    ),
    "call of a known name": (
        both(SHARED, call("builtins", "set", name("builtins", "map") + name("a", "f") + b"h\x01\x86\x81")),
        "builtins.map",
        "a call that takes",
    ),
    "call on a tensor": (both(SHARED, call("a.b", "zero_", b"h\x02")), "a.b.zero_", "a call that takes"),
    "call on another tensor of the storage": (both(SHARED, call("a.b", "zero_", WEIGHT)), "a.b.zero_", "a call that"),
    "call on a tensor without elements": (
        both(SHARED, call("a.b", "f", tensor([0], [1], offset=9))),
        "a.b.f",
        "a call that takes",
    ),
    "call on the storage": (both(SHARED, call("a.b", "fill_", STORAGE)), "a.b.fill_", "a call that takes"),
    "call on a holder of a tensor": (
        both(SHARED, call("a.b", "f", name("c", "D") + b")\x81}" + entry("t", WEIGHT) + b"sb")),
        "a.b.f",
        "a call that takes",
    ),
    "call by a partial": (
        both(SHARED, call("functools", "partial", name("a.b", "f"), WEIGHT) + b")R"),
        "a.b.f",
        "call",
    ),
    "call by a method": (
        both(SHARED, call("builtins", "getattr", name("c", "D") + b")\x81" + WEIGHT + b"b", string("f")) + b")R"),
        "c.D",
        "a call that takes",
    ),
    "call that builds a tensor": (
        both(
            SHARED,
            call(
                "torch._tensor",
                "_rebuild_from_type_v2",
                name("a.b", "f"),
                name("torch", "Tensor"),
                b"h\x01\x85",
                b"N",
            ),
        ),
        "a.b.f",
        "a call that takes",
    ),
    "second call beside an allowed one": (
        both(SHARED, call("ok", "f", WEIGHT) + b"0" + call("a.b", "f", WEIGHT)),
        "a.b.f",
        "a call that takes",
    ),
    "new object with the state dict": (both(SHARED, name("a.b", "C") + b"h\x01\x85\x81"), "a.b.C", "a call that takes"),
    "new object that is dropped": (both(SHARED, name("a.b", "C") + b"h\x01\x85\x810N"), "a.b.C", "a call that takes"),
    "new object with a tensor": (both(SHARED, name("a.b", "C") + WEIGHT + b"\x85\x81"), "a.b.C", "a call that takes"),
    "new object with keywords": (
        both(SHARED, name("a.b", "C") + b")}" + entry("d", b"h\x01") + b"s\x92"),
        "a.b.C",
        "a call that takes",
    ),
    "state of an object": (both(SHARED, name("a.b", "C") + b")\x81h\x01b"), "a.b.C", "an object that holds"),
    "state of an object, before": (
        both(b"}q\x01", name("a.b", "C") + b")\x81h\x01b") + b"h\x01" + entry("w", WEIGHT) + b"s0",
        "a.b.C",
        "an object that holds",
    ),
    "state of an object with the storage": (
        both(SHARED, name("a.b", "C") + b")\x81" + STORAGE + b"b"),
        "a.b.C",
        "a call that takes",
    ),
    "item of a dict of a class": (
        both(SHARED, name("a.b", "C") + b")\x81" + entry("d", b"h\x01") + b"s"),
        "a.b.C",
        "an object that holds",
    ),
    "item at an index": (both(SHARED, name("a.b", "C") + b")\x81K\x00h\x02s"), "a.b.C", "a call that takes"),
    "item of a list of a class": (both(SHARED, name("a.b", "C") + b")\x81h\x01a"), "a.b.C", "an object that holds"),
    "items of a list of a class": (both(SHARED, name("a.b", "C") + b")\x81(h\x01Ne"), "a.b.C", "an object that holds"),
    "member of a set of a class": (both(SHARED, name("a.b", "C") + b")\x81(h\x01\x90"), "a.b.C", "an object that hol"),
    "key that has the state dict": (both(SHARED, b"}" + name("a.b", "C") + b"h\x01\x85\x81Ns"), "a.b.C", "a call that"),
    "extra state of the weights": (
        both(b"}(" + entry("w", WEIGHT) + entry("_extra_state", b"}q\x03") + b"u", call("a.b", "f", b"h\x03")),
        "a.b.f",
        "a call that takes",
    ),
    "key beside the state dict": (
        b"}("
        + entry("state_dict", SHARED)
        + call("a.b", "Text", string("state_dict"))
        + b"}"
        + entry("w", WEIGHT)
        + b"su",
        "a.b.Text",
        "a.pt refers to",
    ),
    "name as a key beside the state dict": (
        both(SHARED, b"N")[:-1] + name("a.b", "KEY") + SHARED + b"u",
        "a.b.KEY",
        "a.pt",
    ),
    "key in a tuple beside the state dict": (
        both(SHARED, b"N")[:-1] + name("a", "K") + b"\x85Nu",
        "a.K",
        "a.pt refers",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "_"))
def test_what_is_asked_for_and_foreign_is_refused(tmp_path: Path, case: str) -> None:
    """By name and place, whichever opcode brings the two together, and nothing is imported."""
    opcodes, foreign, place = REFUSED[case]
    with pytest.raises(UnsafeGlobalError, match=place) as caught:
        open_checkpoint(write_pickle(tmp_path / "a.pt", opcodes), allow_globals=["ok.f"])
    assert foreign in caught.value.names
    assert "a.b" not in sys.modules


@pytest.mark.parametrize(
    "case", ["array of NumPy", "enumeration", "class of attrs", "tensor of a class", "dict of a class"]
)
def test_a_state_dict_is_asked_for_as_a_whole(tmp_path: Path, case: str) -> None:
    """A weight of a foreign class beside plain ones is refused with its key, never left out."""
    torch.save({"state_dict": {"v": torch.ones(2), "w": BESIDE[case][0]()}}, tmp_path / "a.pt")
    with pytest.raises(UnsafeGlobalError, match=r"at state_dict\.w"):
        open_checkpoint(tmp_path / "a.pt")


def test_metadata_among_the_weights_may_be_foreign(tmp_path: Path) -> None:
    """Some libraries write a ``_metadata`` of their own into the state dict; modules do not load it."""
    model, target = make_model(), torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
    written = {**model.state_dict(), "_metadata": {"activation": torch.nn.functional.gelu, "modes": (3, 3)}}
    for value in (written, {"state_dict": written}):
        torch.save(value, tmp_path / "a.pt")
        InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "a.pt")}]).initialize(
            bind(target, name="net")
        )
        assert torch.equal(target.state_dict()["0.weight"], model.state_dict()["0.weight"])
        with open_checkpoint(tmp_path / "a.pt") as reader:
            assert any(place.endswith("_metadata.activation") for place in reader.unread)


def test_weights_that_lie_in_foreign_parts_are_told_by_the_plan(tmp_path: Path) -> None:
    """Tensors beside them let the file be opened; what the model lacks is in the module, and the line leads to it."""
    model = make_model()
    path = tmp_path / "last.pt"
    torch.save({"epoch": 3, "ema": model, "optimizer": trained(make_model()).state_dict()}, path)
    with open_checkpoint(path) as reader:
        assert dict(reader.entries) == {"optimizer": 12}
        assert reader.unread["ema"].tensors == 7
        assert set(reader.values("optimizer")) == {"state", "param_groups"}
    stack = InitializerStack.from_config([{"kind": "file", "path": str(path)}])
    with pytest.raises(UnsafeGlobalError, match=r"\['ema'\]\.state_dict\(\)") as caught:
        stack.plan(bind(make_model(), name="net"))
    exec(str(caught.value)[str(caught.value).index("torch.save(") :], {"torch": torch})
    config = {"kind": "file", "path": str(tmp_path / "last.state_dict.pt")}
    target = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
    InitializerStack.from_config([config]).initialize(bind(target, name="net"))
    assert torch.equal(target.state_dict()["0.weight"], model.state_dict()["0.weight"])


def test_keys_that_are_missing_are_told_where_nothing_foreign_holds_tensors(tmp_path: Path) -> None:
    """Options beside the weights are no reason for a key that the file lacks."""
    torch.save({"state_dict": {"0.weight": torch.ones(2, 4)}, "options": argparse.Namespace()}, tmp_path / "a.pt")
    stack = InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "a.pt")}])
    with pytest.raises(PlanError, match=r"0\.bias"):
        stack.initialize(bind(make_model(), name="net"))


class Attributes(dict[str, Any]):
    """A dict of a class of one's own, as configs are."""


class WithMethod(torch.nn.Sequential):
    """A module that keeps one of its methods, and one with an argument."""

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__(*layers)
        self.act = self.square
        self.bound = functools.partial(self.square, 2)

    def square(self, x: Any) -> Any:
        """A method."""
        return x * x


# What shares the memory of the weights, and is no danger to them: everything as real programs write it.
SHARING: dict[str, Callable[[torch.nn.Module, torch.optim.Optimizer], Any]] = {
    "whole module": lambda model, optimizer: model,
    "module with methods": lambda model, optimizer: WithMethod(*model.children()),
    "whole optimizer": lambda model, optimizer: optimizer,
    "schedule": lambda model, optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
    "namespace with a weight": lambda model, optimizer: argparse.Namespace(classes=model.state_dict()["0.weight"]),
    "dict of a class with a weight": lambda model, optimizer: Attributes(classes=model.state_dict()["0.weight"]),
    "list of a class with a weight": lambda model, optimizer: List([model.state_dict()["0.weight"]]),
    "partial with a weight": lambda model, optimizer: functools.partial(print, model.state_dict()["0.weight"]),
}


@pytest.mark.parametrize("root", ["state_dict", "model"])
@pytest.mark.parametrize("case", SHARING, ids=lambda case: case.replace(" ", "_"))
def test_objects_that_share_the_weights_are_no_danger(tmp_path: Path, case: str, root: str) -> None:
    """The weights are loaded, and the state of the optimizer can be read, whose dicts the optimizer shares."""
    model, target = make_model(), torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
    optimizer = trained(model)
    beside = SHARING[case](model, optimizer)
    path = tmp_path / "a.pt"
    config = {"kind": "file", "path": str(path), **({} if root == "state_dict" else {"source_root": root})}
    for protocol in (2, 5):
        content = {root: model.state_dict(), "optimizer": optimizer.state_dict(), "beside": beside}
        torch.save(content, path, pickle_protocol=protocol)
        InitializerStack.from_config([config]).initialize(bind(target, name="net"))
        for key, value in model.state_dict().items():
            assert torch.equal(target.state_dict()[key], value)
        with open_checkpoint(path) as reader:
            assert set(reader.values("optimizer")) == {"state", "param_groups"}
            assert set(reader.metadata["optimizer"]) == {"state", "param_groups"}


def test_what_the_file_makes_and_drops_is_listed(tmp_path: Path) -> None:
    """An object whose result is popped, and a name that is only looked up, which imports its module."""
    opcodes = both(SHARED, name("a.b", "C") + b")\x810" + name("d", "e") + b"0N")
    with open_checkpoint(write_pickle(tmp_path / "a.pt", opcodes)) as reader:
        assert {place: str(part) for place, part in reader.unread.items()} == {
            "<dropped>.a.b.C": "a.b.C",
            "<dropped>.d.e": "d.e",
        }


def test_optimizer_values_that_a_call_takes_are_refused(tmp_path: Path) -> None:
    """Also where only they are asked for, by their tree or as a value; the weights are loaded."""
    moments = tensor([4], [1], record="1")
    opcodes = b"}(" + entry("state_dict", SHARED) + entry("optimizer", b"}(" + entry("m", moments) + b"u")
    opcodes += entry("x", call("a.b", "zero_", tensor([2], [1], record="1"))) + b"u"
    with open_checkpoint(write_pickle(tmp_path / "a.pt", opcodes, {"data/1": bytes(16)})) as reader:
        assert list(reader.tensors()) == ["w"]
        for ask in (lambda: reader.metadata["optimizer"], lambda: reader.values("optimizer")):
            with pytest.raises(UnsafeGlobalError, match=r"a\.b\.zero_ \(at a call that takes"):
                ask()


def test_optimizer_and_trainer_values_that_are_foreign_stay_refused(tmp_path: Path) -> None:
    """A learning rate of NumPy is a part of what a resume asks for: it is named with its place."""
    optimizer = trained(make_model())
    optimizer.param_groups[0]["lr"] = np.float64(0.1)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert len(reader.tensors()) == 12
        for ask in (lambda: reader.metadata["param_groups"], reader.values, reader.load):
            with pytest.raises(UnsafeGlobalError, match=r"at param_groups\.0\.lr"):
                ask()
        assert set(reader.metadata["state"]) == {0, 1, 2, 3}


# Bombs, in the state of an object that nobody asks for.
BOMBS = {
    "lists doubled forty times": (b"(]q\x05" + b"](h\x05h\x05eq\x05" * 40 + b"t", "far larger than the file"),
    "tuples doubled forty times": (b")" + b"q\x05h\x05\x86" * 40, "far larger than the file"),
    "arguments doubled forty times": (
        b"()" + (b"q\x05" + name("a.b", "C") + b"h\x05h\x05\x86\x81") * 40 + b"t",
        "far larger than the file",
    ),
    "gigabyte": (call("builtins", "bytearray", b"J\x00\xca\x9a\x3b"), "bytearray"),
    "many marks": (b"(" * 5000, "nested deeper"),
    "tuples as a key": (b"})" + b"\x85" * 400 + b"Ns", "a key is a tuple nested deeper"),
    "many empty sets": (b"(" + b"\x8f" * 200_000 + b"t", "more than .* objects by byte"),
    "tensor of gigabytes": (tensor([10**9], [1]), "does not fit into its storage"),
    "missing record": (tensor([2], [1], record="9"), "missing"),
    "one key twice": (b"}(" + string("a") + b"N" + string("a") + b"Nu", "one key twice"),
    "two states": (name("a.b", "C") + b")\x81NbK\x01bK\x02b", "two states"),
    "persistent id": (string("module") + b"Q", "persistent id"),
}


@pytest.mark.parametrize("case", BOMBS, ids=lambda case: case.replace(" ", "_"))
def test_inert_values_have_the_bounds_of_all_values(tmp_path: Path, case: str) -> None:
    """A file that is refused for its bounds or its damage is refused wherever in it that lies."""
    opcodes, says = BOMBS[case]
    opcodes = both(SHARED, name("a.b", "C") + b")\x81" + opcodes + b"b")
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(write_pickle(tmp_path / "a.pt", opcodes))
    assert re.search(says, str(caught.value.__cause__))


def test_storages_of_inert_values_are_verified(tmp_path: Path) -> None:
    """Every record of the file is compared with its checksum, whoever uses it."""
    torch.save({"state_dict": {"w": torch.ones(2)}, "model": torch.nn.Linear(3, 3)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    with open_checkpoint(tmp_path / "a.pt") as reader:
        record = reader._content.records["data/1"]
    content[record.offset] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with open_checkpoint(tmp_path / "a.pt") as reader, pytest.raises(CheckpointCorruptError, match="data/"):
        reader.verify()
