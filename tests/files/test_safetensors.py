"""Files of the safetensors format: what other software wrote is read, what nobody should write is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from support.counting import LineCounter
from support.handmade import write_safetensors

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    InitError,
    StateMismatchError,
)
from noether_init_core.files.formats.safetensors import DTYPES
from noether_init_core.files.opening import open_checkpoint

# Written by mlx.core.save_safetensors of MLX 0.32.4 on Linux. It does not align tensors to the size of their elements.
MLX = (
    b'\x1d\x01\x00\x00\x00\x00\x00\x00{"__metadata__":{"step":"3"},"layer.half":{"data_offsets":[0,2],"dtype":"BF16",'
    b'"shape":[1]},"layer.mask":{"data_offsets":[2,3],"dtype":"BOOL","shape":[1]},"layer.steps":{"data_offsets":[3,9],'
    b'"dtype":"I16","shape":[3]},"layer.weight":{"data_offsets":[9,25],"dtype":"F32","shape":[2,2]}}'
    b"\x00?\x01\x07\x00\x08\x00\t\x00\x00\x00\x80?\x00\x00\x00@\x00\x00@@\x00\x00\x80@"
)
ALL_DTYPES = sorted(set(DTYPES.values()))


def entry(begin: int, end: int, *, dtype: str = "F32", shape: list[Any] | None = None) -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def some(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of any dtype with bytes that differ."""
    itemsize = getattr(torch, dtype).itemsize
    count = int(np.prod(shape)) * itemsize
    raw = torch.arange(count, dtype=torch.uint8) % (2 if dtype == "bool" else 251)
    return raw.view(getattr(torch, dtype)).reshape(shape)


def same(first: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes."""
    return (
        first.dtype is other.dtype
        and first.shape == other.shape
        and bytes(first.contiguous().view(torch.uint8).numpy().data)
        == bytes(other.contiguous().view(torch.uint8).numpy().data)
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_what_safetensors_wrote_is_read_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    """Every dtype that both sides have, from the library's own writer for torch."""
    tensors = {"a.w": some(dtype, (3, 4)), "b": some(dtype, (2,)), "none": some(dtype, (0, 2))}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path / "a.safetensors") as reader:
        reader.verify()
        loaded = reader.load()
        assert loaded.keys() == reader.tensors().keys() == tensors.keys()
        for key, tensor in tensors.items():
            info = reader.tensors()[key]
            assert (info.dtype, info.shape, info.nbytes) == (dtype, tuple(tensor.shape), tensor.nbytes)
            assert info.contiguous is not None
            assert same(reader.read(key), tensor)
            assert same(loaded[key], tensor)
        assert dict(reader.metadata) == {"format": "pt"}
        assert reader.extra_state == {}
        assert reader.format == "safetensors"


def test_what_numpy_wrote_is_read(tmp_path: Path) -> None:
    """The library's writer for NumPy, with a scalar and without metadata."""
    arrays = {"w": np.arange(6, dtype=np.float64).reshape(2, 3), "count": np.array(7, dtype=np.int64)}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as reader:
        assert {key: value.numpy().tolist() for key, value in reader.load().items()} == {
            "w": [[0, 1, 2], [3, 4, 5]],
            "count": 7,
        }
        assert reader.tensors()["count"].shape == ()
        assert dict(reader.metadata) == {}


def test_what_mlx_wrote_is_read_although_it_is_not_aligned(tmp_path: Path) -> None:
    """A writer that shares no code with the library, whose float32 begins at an odd byte."""
    (tmp_path / "a.safetensors").write_bytes(MLX)
    with open_checkpoint(tmp_path / "a.safetensors") as reader:
        target = torch.zeros(2, 2)
        reader.copy_into([("layer.weight", None, target)])
        assert target.tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert reader.read("layer.steps").tolist() == [7, 8, 9]
        assert reader.read("layer.half").tolist() == [0.5]
        assert reader.read("layer.mask").tolist() == [True]
        assert reader.metadata == {"step": "3"}


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    """Either format is read under the suffix of the other."""
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.th")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    for name, expected in (("a.th", "safetensors"), ("b.safetensors", "torch")):
        with open_checkpoint(tmp_path / name) as reader:
            assert reader.format == expected
            assert torch.equal(reader.read("w"), torch.ones(2))


def test_copies_go_into_existing_memory_also_with_a_cast(tmp_path: Path) -> None:
    """The same dtype, another dtype, memory that is not contiguous; a wrong shape changes nothing."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0), "c": torch.arange(6.0).reshape(2, 3)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as reader:
        a, b, c = torch.zeros(2, 3), torch.zeros(4, dtype=torch.float64), torch.zeros(3, 2).t()
        with pytest.raises(StateMismatchError, match=r"b: checkpoint \[4\], target \[3\]"):
            reader.copy_into([("a", None, a), ("b", None, torch.zeros(3))])
        assert not a.any()
        where = a.data_ptr()
        reader.copy_into([("a", None, a), ("b", None, b), ("c", None, c)])
        assert a.data_ptr() == where
        assert torch.equal(a, tensors["a"])
        assert torch.equal(b, tensors["b"].double())
        assert torch.equal(c, tensors["c"])


def test_the_surface_is_that_of_the_other_format(tmp_path: Path) -> None:
    """Near names, foreign tensors, and reading after closing get the same errors."""
    safetensors.torch.save_file({"head.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    safetensors.torch.save_file({"other": torch.ones(9)}, tmp_path / "b.safetensors")
    with open_checkpoint(tmp_path / "b.safetensors") as other:
        foreign = other.tensors()["other"]
    reader = open_checkpoint(tmp_path / "a.safetensors")
    assert repr(reader).endswith("1 tensors>")
    with pytest.raises(CheckpointNotFoundError, match=r"Near: head\.weight"):
        reader.read("head.weigth")
    with pytest.raises(CheckpointError, match="is not a tensor of"):
        reader.read(foreign)
    assert torch.equal(reader.read(reader.tensors()["head.weight"]), torch.ones(3))
    assert torch.equal(reader.materialize({"x": [reader.tensors()["head.weight"]]})["x"][0], torch.ones(3))
    reader.close()
    reader.close()
    with pytest.raises(CheckpointError, match="closed"):
        reader.read("head.weight")
    assert list(reader.tensors()) == ["head.weight"]


def test_full_without_a_digest_says_once_that_there_are_no_checksums(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The format carries none: the structure is all that can be checked, and the log says it, once per open file."""
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    caplog.set_level(logging.INFO, "noether_init_core")
    with open_checkpoint(tmp_path / "a.safetensors") as reader:
        assert caplog.messages == []
        reader.verify()
        reader.verify()
    assert len(caplog.messages) == 1
    assert "has no checksums" in caplog.messages[0]
    assert "xxh3_128:" in caplog.messages[0]


def test_a_digest_covers_every_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a digest one flipped bit of the data is refused; the right file passes without a word."""
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(200)}, path)
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    caplog.set_level(logging.INFO, "noether_init_core")

    def check() -> None:
        with open_checkpoint(path, digests=digest) as reader:
            reader.verify()

    check()
    assert caplog.messages == []
    with open(path, "r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x01")
    with pytest.raises(CheckpointCorruptError, match="is damaged, or another file"):
        check()


W = entry(0, 8)
DEEP = b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
REFUSED: dict[str, tuple[dict[str, Any] | bytes, int, str]] = {
    "one key twice": (b'{"w":%s,"w":%s}' % ((json.dumps(W).encode(),) * 2), 8, 'has the key "w" twice'),
    "one field twice": (b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, '"dtype" twice'),
    "one key of the metadata twice": (b'{"__metadata__":{"a":"b","a":"c"}}', 0, '"a" twice'),
    "two metadata": (b'{"__metadata__":{},"__metadata__":{}}', 0, '"__metadata__" twice'),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, '"b" overlap'),
    "the same bytes": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlap"),
    "an empty tensor within another": ({"a": entry(0, 8), "b": entry(4, 4)}, 8, "overlap"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, '4 bytes before "b"'),
    "hole at the start": ({"a": entry(4, 8)}, 8, '4 bytes before "a"'),
    "trailing bytes": ({"w": W}, 9, "1 bytes after its last tensor"),
    "trailing bytes of nothing": ({}, 3, "3 bytes after"),
    "cut off": ({"w": W}, 7, "truncated: 1 bytes of its tensors"),
    "offsets far behind the file": ({"w": entry(0, 1 << 40)}, 8, "truncated"),
    "terabytes": ({"w": entry(0, 1 << 42, shape=[1 << 40])}, 8, "truncated"),
    "offsets in the wrong order": ({"w": {**W, "data_offsets": [8, 0]}}, 8, "needs 8 bytes"),
    "negative offsets": ({"w": {**W, "data_offsets": [-8, 0]}}, 8, "data_offsets"),
    "offsets with a point": ({"w": {**W, "data_offsets": [0.0, 8.0]}}, 8, "data_offsets"),
    "offsets that are true": ({"w": {**entry(0, 1, dtype="U8"), "data_offsets": [False, True]}}, 1, "data_offsets"),
    "three offsets": ({"w": {**W, "data_offsets": [0, 8, 8]}}, 8, "data_offsets"),
    "offset of many digits": (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,' + b"9" * 9000 + b"]}}", 8, "read"),
    "offset that overflows": ({"w": {**W, "data_offsets": [1 << 64, (1 << 64) + 8]}}, 8, "data_offsets"),
    "shape that is larger": ({"w": {**W, "shape": [3]}}, 8, "needs 12 bytes for F32"),
    "shape that overflows": ({"w": {**W, "shape": [1 << 40, 1 << 40]}}, 8, r"more than 2\*\*58 elements"),
    "shape that overflows to nothing": (
        {"w": {**entry(0, 0), "shape": [1 << 57, 1 << 57, 0]}},
        0,
        r"more than 2\*\*58 elements",
    ),
    "negative shape": ({"w": {**W, "shape": [-1, -2]}}, 8, "shape"),
    "shape with a point": ({"w": {**W, "shape": [2.0]}}, 8, "shape"),
    "shape that is a number": ({"w": {**W, "shape": 2}}, 8, "shape"),
    "too many dimensions": ({"w": {**W, "shape": [2] + [1] * 100}}, 8, "at most 64"),
    "unknown dtype": ({"w": {**W, "dtype": "Q4_K"}}, 8, 'dtype "Q4_K"'),
    "dtype that torch lacks": ({"w": entry(0, 3, dtype="F6_E2M3", shape=[4])}, 3, 'dtype "F6_E2M3"'),
    "dtype that is no text": ({"w": {**W, "dtype": ["F32"]}}, 8, "dtype"),
    "half a byte": ({"w": entry(0, 2, dtype="F4", shape=[3])}, 2, "4-bit elements"),
    "scalar of half a byte": ({"w": entry(0, 1, dtype="F4", shape=[])}, 1, "4-bit elements"),
    "missing field": ({"w": {"dtype": "F32", "shape": [2]}}, 8, "must have exactly dtype, shape and data_offsets"),
    "surplus field": ({"w": {**W, "compression": "zstd"}}, 8, 'it has .*"compression"'),
    "tensor that is a text": ({"w": "F32"}, 8, "it has str"),
    "metadata with a number": ({"__metadata__": {"step": 3}, "w": W}, 8, "from text to text"),
    "metadata that is a list": ({"__metadata__": ["a"], "w": W}, 8, "from text to text"),
    "key of a million letters": ({"k" * 1_000_000: W}, 8, "1000000 characters"),
    "spaces first": (b" " + json.dumps({"w": W}).encode(), 8, "safetensors"),
    "no JSON": (b'{"w"', 8, "cannot be read"),
    "not a number": (b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8, "shape"),
    "list for a header": (b'["w"]', 0, "safetensors"),
    "something behind the object": (b'{"w":1}{', 8, "cannot be read"),
    "zero behind the object": (json.dumps({"w": W}).encode() + b"\0", 8, "cannot be read"),
    "no UTF-8": (b'{"\xff\xfe":{}}', 8, "UTF-8"),
    "half a surrogate": (b'{"\\ud800":' + json.dumps(W).encode() + b"}", 8, "UTF-8"),
    "lists nested deep": (DEEP, 0, "cannot be read|safetensors"),
    "millions of lists": (b'{"w":[' + b"[]," * 4_100_000 + b"[]]}", 0, "far more lists"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_headers_are_refused_before_anything_is_allocated(tmp_path: Path, case: str) -> None:
    """The error says what is wrong with which key; each costs less than 1,000 lines, small files less than 1 MB."""
    header, size, message = REFUSED[case]
    path = write_safetensors(tmp_path / "a.safetensors", header, bytes(size))
    small = path.stat().st_size < 20_000
    open_nothing(tmp_path)
    tracemalloc.start()
    try:
        with LineCounter() as lines, pytest.raises(CheckpointFormatError, match=message) as caught:
            open_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.path == path
    assert len(str(caught.value)) < 1000
    assert lines.count < 1_000
    assert peak < (1 << 20 if small else 50 << 20)


def open_nothing(folder: Path) -> None:
    """Import what the reader imports at first use, so that a measurement afterwards is of the file."""
    open_checkpoint(write_safetensors(folder / "nothing.safetensors", {})).close()


@pytest.mark.parametrize("length", [100_000_001, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_huge_header_is_refused_unread(tmp_path: Path, length: int) -> None:
    """The stated length is not believed, whether the file has that many bytes or not."""
    path = write_safetensors(tmp_path / "a.safetensors", {"w": W}, bytes(8), length=length)
    with pytest.raises(CheckpointFormatError, match=f"{length} bytes, more than 100000000"):
        open_checkpoint(path)
    os.truncate(path, 200 << 20)  # a hole, no blocks on disk
    with pytest.raises(CheckpointFormatError, match="more than 100000000"):
        open_checkpoint(path)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    """A header of some megabytes that the file does not have is not waited for."""
    path = write_safetensors(tmp_path / "a.safetensors", {"w": W}, bytes(8), length=90_000_000)
    with pytest.raises(CheckpointFormatError, match=r"truncated: it has .* states a header of 90000000 bytes"):
        open_checkpoint(path)


def test_well_formed_neighbours_of_the_hostile_headers_are_read(tmp_path: Path) -> None:
    """Any order of keys, spaces behind the header, empty tensors between others, unusual names, no tensors at all."""
    header = {"b": entry(4, 12), "a": entry(0, 4), "empty": entry(4, 4), "": entry(12, 12), "ä \x1b": entry(12, 16)}
    path = tmp_path / "a.safetensors"
    data = struct.pack("<4f", 1, 2, 3, 4)
    with open_checkpoint(write_safetensors(path, json.dumps(header).encode() + b"   ", data)) as reader:
        assert {key: value.tolist() for key, value in reader.load().items()} == {
            "b": [2, 3],
            "a": [1],
            "empty": [],
            "": [],
            "ä \x1b": [4],
        }
    for nothing in ({}, {"__metadata__": {"a": "b"}}):
        with open_checkpoint(write_safetensors(path, nothing)) as reader:
            assert reader.load() == {}
            assert reader.metadata == nothing.get("__metadata__", {})


def test_names_with_control_characters_are_shown_escaped(tmp_path: Path) -> None:
    """A key cannot write to the terminal."""
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(write_safetensors(tmp_path / "a.safetensors", {"\x1b[2J": {**W, "dtype": "\x1b[2J"}}))
    assert "\x1b" not in str(caught.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    """A file cut off at any length is refused."""
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int16)}, path)
    with open(path, "r+b") as file:
        for length in range(path.stat().st_size - 1, -1, -1):
            file.truncate(length)
            with pytest.raises(CheckpointFormatError):
                open_checkpoint(path)


def test_every_flipped_bit_of_the_header_is_an_error_or_a_readable_header(tmp_path: Path) -> None:
    """No flip escapes the tree of errors; what is still read keeps every byte inside the file."""
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a.w": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int16)}, path, {"x": "y"})
    changed = bytearray(path.read_bytes())
    length = 8 + struct.unpack("<Q", changed[:8])[0]
    errors = 0
    with open(path, "r+b", buffering=0) as file:
        for index in range(length):
            for bit in range(8):
                changed[index] ^= 1 << bit
                os.pwrite(file.fileno(), changed[index : index + 1], index)
                try:
                    with open_checkpoint(path) as reader:
                        assert sum(info.nbytes for info in reader.tensors().values()) == 28
                        assert sorted(reader.tensors()) == as_the_library(path)
                        reader.load()
                except InitError:
                    errors += 1
                changed[index] ^= 1 << bit
            os.pwrite(file.fileno(), changed[index : index + 1], index)
    assert errors > 4 * length


def as_the_library(path: Path) -> list[str]:
    """The keys that the safetensors library finds; it raises for files that it refuses."""
    with safetensors.safe_open(str(path), framework="numpy") as file:
        return sorted(file.keys())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_raises_nothing_but_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes are overwritten, removed and inserted at random places. What we accept, the library accepts."""
    content = bytearray(MLX)
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(content) - 1))
        removed = data.draw(st.sampled_from([0, 1, 1, 1, 2, 8]))
        syntax = st.sampled_from([b"[", b"{", b'"', b",", b"0", b"9" * 5])
        content[start : start + removed] = data.draw(st.one_of(st.binary(max_size=8), syntax))
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    said = None
    try:
        with open_checkpoint(path) as reader:
            reader.verify()
            reader.load()
            assert sorted(reader.tensors()) == as_the_library(path)
    except InitError as error:
        said = str(error)
    assert said is None or str(path) in said


def test_a_file_that_is_replaced_after_opening_does_not_count(tmp_path: Path) -> None:
    """What was screened is what is read: the name may lead elsewhere by then."""
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "b.safetensors")
    with open_checkpoint(path) as reader:
        os.replace(tmp_path / "b.safetensors", path)
        assert torch.equal(reader.read("w"), torch.ones(2))


def test_a_file_that_is_cut_off_after_opening_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """Bytes are read and not mapped, so a missing one is an exception."""
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(100_000)}, path)
    with open_checkpoint(path) as reader:
        os.truncate(path, 5000)
        with pytest.raises(CheckpointCorruptError, match="'w'"):
            reader.read("w")


def test_a_header_of_many_keys_takes_few_lines_a_key(tmp_path: Path) -> None:
    """Fewer than 60 lines of Python for each key."""
    header = {f"model.layers.{i}.self_attn.q_proj.weight": entry(4 * i, 4 * i + 4) for i in range(20_000)}
    path = write_safetensors(tmp_path / "a.safetensors", header, bytes(80_000))
    with LineCounter() as lines, open_checkpoint(path) as reader:
        assert len(reader.tensors()) == 20_000
    assert lines.count < 60 * 20_000


def test_opening_and_looking_needs_no_torch(tmp_path: Path) -> None:
    """Torch is imported when the first tensor is read."""
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    code = (
        "import sys; from noether_init_core.files.opening import open_checkpoint\n"
        f"r = open_checkpoint({str(tmp_path / 'a.safetensors')!r}); r.verify(); print(list(r.tensors()), r.metadata)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['w'] {}\nFalse\n"


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_the_index_of_a_sharded_checkpoint_is_told_what_it_is(tmp_path: Path, name: str) -> None:
    """The error says index, shards, and what can be read instead."""
    index = {"metadata": {"total_size": 8}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / name).write_text(json.dumps(index, indent=2))
    with pytest.raises(CheckpointFormatError, match=r"index of a sharded checkpoint.*open one of the shards"):
        open_checkpoint(tmp_path / name)
