"""Hand-made files that torch reads in its own way: what ours is not sure to read alike is refused."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.handmade import call, name, string, tensor, write_pickle

from noether_init_core.errors import CheckpointFormatError
from noether_init_core.files.opening import open_checkpoint

RECORDS = {"data/0": struct.pack("<4f", 1, 2, 3, 4), "data/1": struct.pack("<4f", 5, 6, 7, 8)}
PLAIN, OTHER = tensor([4], [1]), tensor([4], [1], record="1")
#: The arguments of a tensor, without the call.
ARGUMENTS = PLAIN[PLAIN.index(b"(") : -1]


def items(**values: bytes) -> bytes:
    """A dict of opcodes."""
    return b"}(" + b"".join(string(key) + value for key, value in values.items()) + b"u"


def weights(opcodes: bytes) -> bytes:
    """A state dict with one key."""
    return items(w=opcodes)


def with_properties(properties: bytes, record: str = "0", storage: str = "FloatStorage", numel: int = 4) -> bytes:
    """A tensor with conj or neg."""
    return tensor([numel], [1], record=record, storage=storage, numel=numel)[:-2] + properties + b"tR"


def of_type(state: bytes, kind: bytes = name("torch", "Tensor"), function: bytes | None = None) -> bytes:
    """A tensor that was written with its class and its attributes."""
    function = name("torch._utils", "_rebuild_tensor_v2") if function is None else function
    return call("torch._tensor", "_rebuild_from_type_v2", function, kind, ARGUMENTS, state)


def parameter(*state: bytes, requires_grad: bytes = b"\x88", of: bytes = PLAIN) -> bytes:
    """A parameter, with attributes if ``state`` is given."""
    function = "_rebuild_parameter_with_state" if state else "_rebuild_parameter"
    return call("torch._utils", function, of, requires_grad, call("collections", "OrderedDict"), *state)


# Files, and what ours says of them; None: both read the same.
FILES: dict[str, tuple[bytes, str | None]] = {
    "plain": (weights(PLAIN), None),
    "negated": (weights(with_properties(items(neg=b"\x88"))), None),
    "negated by a number": (weights(with_properties(items(neg=b"K\x01"))), "not both True or False"),
    "negated by a float": (weights(with_properties(items(neg=b"G" + struct.pack(">d", 1)))), "not both True or False"),
    "conjugated by a number": (
        weights(with_properties(items(conj=b"K\x02"), storage="ComplexFloatStorage", numel=2)),
        "not both True or False",
    ),
    "not negated by None": (weights(with_properties(items(neg=b"N"))), "not both True or False"),
    "attribute": (weights(of_type(items(no_decay=b"\x88"))), None),
    "attribute in a pair": (weights(of_type(items(no_decay=b"\x88") + b"N\x86")), None),
    "no attributes": (weights(of_type(b"N")), None),
    "data as an attribute": (weights(of_type(items(data=OTHER))), "sets the attribute data"),
    "data as a slot": (weights(of_type(b"N" + items(data=OTHER) + b"\x86")), "sets the attribute data"),
    "real as an attribute": (weights(of_type(items(tag=b"N", real=OTHER))), "sets the attribute real"),
    "gradient as an attribute": (weights(of_type(items(grad=OTHER))), "sets the attribute grad"),
    "class as an attribute": (weights(of_type(items(__class__=name("torch", "Tensor")))), "sets the attribute __class"),
    "attributes in a list": (weights(of_type(b"]")), "attributes are not a dict"),
    "attributes in a triple": (weights(of_type(b"NNN\x87")), "attributes are not a dict"),
    "tensor built by something else": (
        weights(of_type(b"N", function=name("collections", "OrderedDict"))),
        "is built by collections.OrderedDict",
    ),
    "tensor of a class that is none": (
        weights(of_type(b"N", kind=name("collections", "OrderedDict"))),
        "class collections.OrderedDict",
    ),
    "parameter": (weights(parameter()), None),
    "parameter with an attribute": (weights(parameter(items(no_decay=b"\x88"))), None),
    "parameter with data": (weights(parameter(items(data=OTHER))), "sets the attribute data"),
    "parameter with a slot": (weights(parameter(items(a=b"N") + items(data=OTHER) + b"\x86")), "sets the attribute da"),
    "whole numbers that learn": (
        weights(parameter(of=tensor([4], [1], storage="IntStorage"))),
        "requires gradients",
    ),
    "parameter that may learn": (weights(parameter(requires_grad=b"K\x01")), "requires gradients"),
    "storage of another type before": (
        items(x=tensor([4], [1], storage="IntStorage"), state_dict=weights(PLAIN)),
        "used as int32 before, and as float32 here",
    ),
    "storage of another type behind": (
        items(state_dict=weights(PLAIN), x=tensor([4], [1], storage="IntStorage")),
        None,
    ),
    "storage of the same size in a type": (
        items(
            state_dict=items(
                a=tensor([4], [1], storage="HalfStorage", record="h"),
                b=tensor([4], [1], storage="ShortStorage", record="h"),
            )
        ),
        "used as float16 before, and as int16 here",
    ),
    "counter of pairs": (call("collections", "Counter", b"]" + string("w") + PLAIN + b"\x86a"), "Counter is called"),
    "ordered dict of pairs": (call("collections", "OrderedDict", b"]" + string("w") + PLAIN + b"\x86a"), None),
}


def as_torch(path: Path) -> Mapping[str, Any] | None:
    """The state dict that torch reads; None if it refuses the file."""
    try:
        found = torch.load(path, weights_only=True)
    except Exception:
        return None
    return found.get("state_dict", found) if isinstance(found, dict) else None


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.replace(" ", "_"))
def test_a_file_is_read_as_torch_reads_it_or_refused(tmp_path: Path, case: str) -> None:
    """Never other values than torch has, and no values where torch has none."""
    opcodes, says = FILES[case]
    path = write_pickle(tmp_path / "a.pt", opcodes, {**RECORDS, "data/h": bytes(8)})
    if says is not None:
        with pytest.raises(CheckpointFormatError, match=says):
            open_checkpoint(path)
        return
    expected = as_torch(path)
    assert expected is not None
    with open_checkpoint(path) as reader:
        assert list(reader.tensors()) == list(expected)
        for key, value in expected.items():
            assert torch.equal(reader.read(key), value.detach())
            assert reader.read(key).dtype is value.dtype
