"""Files that must be refused: what they claim, what they name, and how fast the refusal comes."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from support.advice import digests, typed
from support.counting import LineCounter
from support.handmade import call, integer, name, string, tensor, write_pickle, write_zip

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    InitError,
    UnsafeGlobalError,
)
from noether_init_core.files.content import ForeignObject, GlobalName
from noether_init_core.files.opening import open_checkpoint

GOOD = tensor([2, 2], [2, 1])


def under_key(opcodes: bytes) -> bytes:
    """A state dict with one key."""
    return b"}" + string("layer.weight") + opcodes + b"s"


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_call_of_os_system_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    """The name is on the error, the ways to allow it are in the text, and the command was not run."""
    marker = tmp_path / "ran"
    values = {"w": torch.ones(2), "x": _Payload(marker)}
    for value in ({"state_dict": values}, {"state_dict": {}, "x": _Payload(marker)}, _Payload(marker)):
        torch.save(value, tmp_path / "a.th", pickle_protocol=protocol)
        with pytest.raises(UnsafeGlobalError, match=r"allow_globals=.*NOETHER_INIT_ALLOW_GLOBALS=") as caught:
            open_checkpoint(tmp_path / "a.th")
        assert caught.value.names == (f"{os.system.__module__}.system",)
        assert caught.value.path == tmp_path / "a.th"
    assert not marker.exists()


def test_all_unknown_names_are_listed_once_and_none_is_imported(tmp_path: Path) -> None:
    """The error names every unknown global of the file, in their order, and imports none of their modules."""
    opcodes = b"(" + name("xml.dom.pulldom", "parse") + call("antigravity", "fly") * 2 + name("os", "system") + b"t"
    with pytest.raises(UnsafeGlobalError) as caught:
        open_checkpoint(write_pickle(tmp_path / "a.th", opcodes))
    assert caught.value.names == ("xml.dom.pulldom.parse", "antigravity.fly", "os.system")
    assert "antigravity" not in sys.modules
    assert "xml.dom.pulldom" not in sys.modules


def test_unknown_names_are_named_although_the_pickle_is_damaged_behind_them(tmp_path: Path) -> None:
    """What the file refers to says more about it than where it breaks."""
    with pytest.raises(UnsafeGlobalError) as caught:
        open_checkpoint(write_pickle(tmp_path / "a.th", call("os", "system") + b"\xff"))
    assert caught.value.names == ("os.system",)


def test_the_list_of_names_to_allow_is_never_cut(tmp_path: Path) -> None:
    """It is pasted as it stands; of a list that nobody would look through only the first are named."""
    names = [f"a.B{number}" for number in range(40)]
    opcodes = b"(" + b"".join(name(*one.split(".")) for one in names) + b"t"
    with pytest.raises(UnsafeGlobalError) as caught:
        open_checkpoint(write_pickle(tmp_path / "a.th", opcodes))
    assert f"for a config, set NOETHER_INIT_ALLOW_GLOBALS={','.join(names)} in the environment" in str(caught.value)
    opcodes = b"(" + b"".join(name("a", f"B{number}") for number in range(5_000)) + b"t"
    with pytest.raises(UnsafeGlobalError) as caught:
        open_checkpoint(write_pickle(tmp_path / "b.th", opcodes))
    assert len(caught.value.names) == 5_000
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("key", ["", "model"])
def test_a_whole_module_is_told_how_to_become_a_state_dict(tmp_path: Path, key: str) -> None:
    """To allow its classes would lead nowhere: the line that is said makes another file, which is read."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.BatchNorm1d(2))
    path = tmp_path / "module.pt"
    torch.save({key: module, "epoch": 3} if key else module, path)
    with pytest.raises(UnsafeGlobalError) as caught:
        open_checkpoint(path)
    said = str(caught.value)
    line = said[said.index("torch.save(") :]
    assert "NOETHER_INIT_ALLOW_GLOBALS" not in said
    before = path.read_bytes()
    for number in ("", ".2"):  # the second time the first file exists, and is not written over
        new = tmp_path / f"module.state_dict{number}.pt"
        loaded = f"torch.load({str(path)!r}, weights_only=False){f'[{key!r}]' if key else ''}"
        assert line == f"torch.save({loaded}.state_dict(), {str(new)!r})"
        exec(line, {"torch": torch})
        with open_checkpoint(new) as reader:
            assert list(reader.tensors()) == list(module.state_dict())
        with pytest.raises(UnsafeGlobalError) as caught:
            open_checkpoint(path)
        line = str(caught.value)[str(caught.value).index("torch.save(") :]
    assert path.read_bytes() == before


def test_names_with_control_characters_are_shown_escaped(tmp_path: Path) -> None:
    """A name cannot write to the terminal."""
    with pytest.raises(UnsafeGlobalError) as caught:
        open_checkpoint(write_pickle(tmp_path / "a.th", name("\x1b[2J", "f")))
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[2J.f" in str(caught.value)


@pytest.mark.parametrize("by_environment", [False, True])
def test_allowed_names_are_read_as_inert_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    """What is allowed is a record of name and arguments, and still not imported."""
    opcodes = b"}" + string("x") + call("antigravity", "fly", integer(7), GOOD) + b"}" + string("a") + b"Nsbs"
    path = write_pickle(tmp_path / "a.th", opcodes)
    if by_environment:
        monkeypatch.setenv("NOETHER_INIT_ALLOW_GLOBALS", "a.b, antigravity.fly")
    with open_checkpoint(path, allow_globals=() if by_environment else ["antigravity.fly"]) as reader:
        record = reader.load()["x"]
        assert isinstance(record, ForeignObject)
        assert (record.name, record.args[0], record.state) == ("antigravity.fly", 7, {"a": None})
        assert torch.equal(record.args[1], torch.zeros(2, 2))
        assert list(reader.tensors()) == ["x.args.1"]
    assert "antigravity" not in sys.modules


HUGE = 10**9
REFUSED_PICKLES = {
    "bytearray of a number": (call("__builtin__", "bytearray", integer(HUGE)), "bytearray"),
    "bytes of a number": (call("__builtin__", "bytes", integer(HUGE)), "bytes"),
    "tensor larger than its storage": (under_key(tensor([HUGE], [1])), "layer.weight.*does not fit into its storage"),
    "storage larger than its record": (under_key(tensor([4], [1], numel=HUGE)), "layer.weight.*needs 4000000000"),
    "storage smaller than its record": (under_key(tensor([2], [1], numel=2)), "layer.weight.*needs 8 bytes"),
    "stride of zero": (under_key(tensor([10**8, 10**8], [0, 0])), "layer.weight.*does not fit into its storage"),
    "offset behind the storage": (under_key(tensor([2], [1], offset=3)), "layer.weight.*does not fit into its storage"),
    "stride behind the storage": (under_key(tensor([2], [4])), "layer.weight.*does not fit into its storage"),
    "negative size": (under_key(tensor([-2], [1])), "layer.weight.*integers >= 0"),
    "negative stride": (under_key(tensor([2], [-1], offset=3)), "layer.weight.*integers >= 0"),
    "negative offset": (under_key(tensor([2], [1], offset=-1)), "layer.weight.*offset"),
    "sizes that overflow": (under_key(tensor([2**62, 2**62, 0], [1, 1, 1])), "layer.weight.*too large"),
    "offset that overflows": (under_key(tensor([0], [1], offset=2**80)), "layer.weight.*too large"),
    "shape without strides": (under_key(tensor([2], [])), "layer.weight.*strides"),
    "missing record": (under_key(tensor([2], [1], record="../0")), "layer.weight.*missing"),
    "meta storage": (under_key(tensor([2], [1], location="meta")), "layer.weight.*meta"),
    "untyped storage for a typed tensor": (under_key(tensor([2], [1], storage="UntypedStorage", numel=16)), "dtype"),
    "bare storage": (
        under_key(b"(" + string("storage") + name("torch", "FloatStorage") + string("0") + string("cpu") + b"K\x04tQ"),
        "layer.weight: it is a bare storage",
    ),
    "persistent id of something else": (string("module") + b"Q", "persistent id"),
    "list as a key": (b"}]Ns", "key is a list"),
    "tensor as a key": (b"}" + GOOD + b"Ns", "key is a TensorInfo"),
    "one key twice": (b"}(" + string("a") + b"K\x01" + string("a") + b"K\x02u", "one key twice"),
    "list that contains itself": (b"]q\x00h\x00a", "contains itself"),
    "dict that contains itself": (b"}q\x00" + string("a") + b"h\x00s", "contains itself"),
    "two hundred tuples in each other": (b")" + b"\x85" * 200, "nested deeper"),
    "thousands of marks": (b"(" * 5000, "nested deeper"),
    "tuples as a key, doubled fifty times": (b"})" + b"q\x00h\x00\x86" * 50 + b"Ns", "key"),
    "members of a set, doubled fifty times": (b"\x8f(" + b"K\x01" + b"q\x00h\x00\x86" * 50 + b"\x90", "key"),
    "lists doubled forty times": (b"]" + b"q\x00]q\x01h\x00ah\x01h\x00a" * 40, "far larger than the file|one object"),
    "tuples doubled forty times": (b")" + b"q\x00h\x00\x86" * 40, "far larger than the file"),
    "many empty sets": (b"(" + b"\x8f" * 600_000 + b"t", "more than .* objects by byte"),
    "one text encoded again and again": (
        b"("
        + name("_codecs", "encode")
        + b"q\x00"
        + string("a" * 1000)
        + string("latin1")
        + b"\x86q\x01R"
        + b"h\x00h\x01R" * 10_000
        + b"t",
        "copy far more",
    ),
    "codec other than latin1": (call("_codecs", "encode", string("x"), string("zip")), "encode"),
    "text outside of latin1": (call("_codecs", "encode", string("ż"), string("latin1")), "encoding"),
    "state of a list": (b"]}b", "gives a state"),
    "integer of a million bytes": (b"\x8b" + struct.pack("<i", 2000) + bytes(2000), "integer of 2000 bytes"),
    "integer of negative length": (b"\x8b" + struct.pack("<i", -1), "end behind"),
    "text longer than the file": (b"X\xff\xff\xff\x7fabc", "damaged"),
    "text of eight-byte length": (b"\x8d" + b"\xff" * 8, "end behind"),
    "text that is not UTF-8": (b"X\x02\x00\x00\x00\xff\xfe", "encoding"),
    "frame longer than the file": (b"\x95" + b"\xff" * 8 + b"N", "frame"),
    "memo that was never stored": (b"h\x05", "damaged"),
    "empty stack": (b"0", "damaged"),
    "two objects": (b"NN", "one object"),
    "nothing": (b"", "one object"),
    "data behind the end": (b"N.N", "one object"),
    "mark left open": (b"(N", "one object"),
    "opcode of old protocols": (b"I1\n", "opcode 0x49"),
    "extension registry": (b"\x82\x01", "opcode 0x82"),
    "out-of-band buffer": (b"\x97", "opcode 0x97"),
    "old protocol": (b"\x80\x01N", "protocol 1"),
    "call of a dtype": (call("torch", "float32"), "calls torch.float32"),
    "call of what was called": (call("collections", "OrderedDict") + b")R", "not a name"),
    "call without a tuple": (name("collections", "OrderedDict") + b"]R", "not a name"),
    "object of a text": (string("os") + b")\x81", "not a name"),
    "append to a tuple": (b")Na", "appends to a tuple"),
    "odd number of items": (b"}(NNNu", "sets an item"),
    "slice of lists": (call("__builtin__", "slice", b"]"), "slice"),
    "range without step": (call("__builtin__", "range", b"K\x01", b"K\x01", b"K\x00"), "range"),
    "complex of a huge integer": (call("__builtin__", "complex", integer(10**200), b"K\x00"), "complex"),
    "name without end": (b"cos", "name without end"),
    "sparse tensor": (under_key(call("torch._utils", "_rebuild_sparse_tensor", b"N")), "layer.weight: it is a sparse"),
    "properties of a tensor": (
        under_key(GOOD[:-2] + b"}" + string("fake") + b"\x88stR"),
        "layer.weight.*properties",
    ),
    "conjugate of real numbers": (under_key(GOOD[:-2] + b"}" + string("conj") + b"\x88stR"), "not complex"),
    "key that is not a string": (b"}" + string("state_dict") + b"}K\x01" + GOOD + b"ss", "is not a string"),
}


@pytest.mark.parametrize("case", REFUSED_PICKLES)
def test_hostile_pickles_are_refused_with_little_work_and_memory(tmp_path: Path, case: str) -> None:
    """Each gets the error that says what is wrong, in ten lines of Python a byte and 50 MB, whatever it asks for."""
    opcodes, message = REFUSED_PICKLES[case]
    path = write_pickle(tmp_path / "a.th", opcodes)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointFormatError, match=message) as caught:
            open_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.path == path
    assert not isinstance(caught.value, UnsafeGlobalError)
    with LineCounter() as lines, pytest.raises(CheckpointFormatError):
        open_checkpoint(path)
    assert lines.count < 20_000 + 10 * path.stat().st_size
    assert peak < 50 << 20


def test_the_well_formed_neighbour_of_the_hostile_pickles_is_read(tmp_path: Path) -> None:
    """The helper that assembles them makes a readable file when its numbers are right."""
    with open_checkpoint(write_pickle(tmp_path / "a.th", under_key(GOOD))) as reader:
        reader.verify()
        assert torch.equal(reader.read("layer.weight"), torch.zeros(2, 2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.eye(2).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "nested"),
    ],
)
def test_tensors_of_other_kinds_are_refused_with_their_key(tmp_path: Path, make: Any, message: str) -> None:
    """The key stands in the error, and every such key of the file."""
    torch.save({"state_dict": {"a.w": make(), "b": torch.ones(1), "c.w": make()}}, tmp_path / "a.th")
    with pytest.raises(CheckpointFormatError, match=rf"state_dict\.a\.w: .*{message}.*; state_dict\.c\.w: "):
        open_checkpoint(tmp_path / "a.th")


class _Subclass(torch.Tensor):
    pass


def test_unknown_tensor_subclasses_are_refused_and_inert_when_allowed(tmp_path: Path) -> None:
    """A subclass is no plain tensor: its name is refused; allowed, it is a record around the plain tensor."""
    torch.save({"w": torch.ones(2).as_subclass(_Subclass)}, tmp_path / "a.th")
    with pytest.raises(UnsafeGlobalError) as caught:
        open_checkpoint(tmp_path / "a.th")
    (subclass,) = caught.value.names
    assert subclass.endswith("._Subclass")
    with open_checkpoint(tmp_path / "a.th", allow_globals=[subclass]) as reader:
        record = reader.load()["w"]
        assert record.name == subclass
        assert torch.equal(record.args[0], torch.ones(2))


def test_views_of_one_storage_cannot_ask_for_more_than_a_multiple_of_the_file(tmp_path: Path) -> None:
    """Thousands of overlapping views of one record would each get memory of their own."""
    views = [tensor([1000 - i], [1], offset=i // 2, numel=100_000) for i in range(999)]
    wide = [tensor([99_000 + i], [1], numel=100_000) for i in range(900)]
    path = write_pickle(tmp_path / "a.th", b"(" + b"".join(views + wide) + b"t", {"data/0": bytes(400_000)})
    with open_checkpoint(path) as reader, pytest.raises(CheckpointFormatError, match="16 times its size"):
        reader.load()


def small_file(path: Path) -> bytes:
    """A small file with every checksum, and what it holds."""
    torch.save({"state_dict": {"a.w": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int16)}, "run_id": "r"}, path)
    return path.read_bytes()


def loaded(path: Path) -> tuple[Any, ...]:
    """Everything that is in the file, verified."""
    with open_checkpoint(path) as reader:
        reader.verify()
        value = reader.load()
    tensors = value["state_dict"]
    return list(value), list(tensors), [(t.dtype, t.tolist()) for t in tensors.values()], value["run_id"]


def test_every_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    """Of all single-bit flips of a small file none is read as other content, and none escapes the tree of errors."""
    path = tmp_path / "a.th"
    original = small_file(path)
    expected = loaded(path)
    changed = bytearray(original)
    errors = 0
    with open(path, "r+b", buffering=0) as file:
        for index in range(len(original)):
            for bit in range(8):
                changed[index] ^= 1 << bit
                os.pwrite(file.fileno(), changed[index : index + 1], index)
                try:
                    assert loaded(path) == expected, f"byte {index} bit {bit}"
                except InitError:
                    errors += 1
                changed[index] ^= 1 << bit
            os.pwrite(file.fileno(), changed[index : index + 1], index)
    assert errors > 8 * 300  # at the least the pickle and the tensors


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    """A file cut off at any length is refused."""
    path = tmp_path / "a.th"
    original = small_file(path)
    with open(path, "r+b") as file:
        for length in range(len(original) - 1, -1, -1):
            file.truncate(length)
            with pytest.raises(CheckpointFormatError):
                open_checkpoint(path)


def attempt(path: Path) -> str | None:
    """Load the file; what our error said, if there was one. Any other exception is a failure of the test."""
    try:
        with open_checkpoint(path) as reader:
            reader.load()
    except InitError as error:
        return str(error)
    return None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_raises_nothing_but_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes are overwritten, removed and inserted at random places, with checksums off so that all of it is read."""
    path = tmp_path / "a.th"
    content = bytearray(_unchecked(tmp_path))
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(content) - 1))
        removed = data.draw(st.sampled_from([0, 1, 1, 1, 2, 8]))
        content[start : start + removed] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    said = attempt(path)
    assert said is None or str(path) in said


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    opcodes=st.lists(
        st.one_of(
            st.sampled_from([bytes([op]) for op in range(256)]),
            st.sampled_from(
                [b"}", b"]", b")", b"(", b"t", b"R", b"u", b"s", b"e", b"a", b"b", b"h\x00", b"q\x00", b"Q"]
            ),
            st.sampled_from([GOOD, string("storage"), name("collections", "OrderedDict"), name("torch", "float32")]),
        ),
        max_size=60,
    )
)
def test_random_opcodes_raise_nothing_but_our_errors(tmp_path: Path, opcodes: list[bytes]) -> None:
    """A well-formed archive around any pickle is read or refused."""
    path = write_pickle(tmp_path / "a.th", b"".join(opcodes))
    said = attempt(path)
    assert said is None or str(path) in said


def _unchecked(folder: Path) -> bytes:
    path = folder / "original.th"
    if not path.exists():
        value = {"state_dict": {"a.w": torch.arange(6.0)}, "more": [1, 2.5, "x", None, {"y": (True, b"z")}]}
        was = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(value, path)
        finally:
            torch.serialization.set_crc32_options(was)
    return path.read_bytes()


def test_fifo_folder_and_device_are_refused_without_blocking(tmp_path: Path) -> None:
    """Anything but a regular file is refused at once."""
    os.mkfifo(tmp_path / "fifo.th")
    with pytest.raises(CheckpointFormatError, match="is a FIFO"):
        open_checkpoint(tmp_path / "fifo.th")
    with pytest.raises(CheckpointFormatError, match="is a folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointFormatError, match="is a device"):
        open_checkpoint("/dev/zero")


def test_a_missing_file_names_its_neighbours_and_creates_nothing(tmp_path: Path) -> None:
    """The error lists files with the same suffix."""
    small_file(tmp_path / "there.th")
    with pytest.raises(CheckpointNotFoundError, match=r"missing\.th does not exist.*there\.th"):
        open_checkpoint(tmp_path / "missing.th")
    assert [entry.name for entry in tmp_path.iterdir()] == ["there.th"]


NOT_ARCHIVES = {
    "empty": (b"", "is empty"),
    "text": (b"hello, this is a log file of something\n", "it is text"),
    "short": (b"PK", "truncated"),
    "zeros": (bytes(4096), "zeros"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "lfs pull"),
    "safetensors": (struct.pack("<Q", 20) + b'{"w":{"dtype":"F32"}}', "safetensors"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "gunzip -c"),
    "pickle": (pickle.dumps({"a": 1}, 4), "plain pickle"),
    "noise": (bytes(range(128, 256)), "neither a zip archive nor safetensors"),
}


@pytest.mark.parametrize("case", NOT_ARCHIVES)
def test_other_files_are_told_what_they_are(tmp_path: Path, case: str) -> None:
    """The error says what the file is and what to do about it."""
    content, message = NOT_ARCHIVES[case]
    (tmp_path / "a.th").write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(tmp_path / "a.th")


def test_files_of_the_old_format_are_told_how_to_convert(tmp_path: Path) -> None:
    """The error names the old format and the call that writes the new one."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.th", _use_new_zipfile_serialization=False)
    (tmp_path / "a.tensors.th").write_bytes(b"another file")
    before = digests(tmp_path)
    with pytest.raises(CheckpointFormatError, match=r"before torch 1\.6") as caught:
        open_checkpoint(tmp_path / "a.th")
    typed(str(caught.value).partition("Next, with torch >= 1.6: ")[2])
    assert digests(tmp_path).items() > before.items()
    with open_checkpoint(tmp_path / "a.tensors.2.th") as reader:
        assert list(reader.tensors()) == ["a"]


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_are_told_how_to_convert(tmp_path: Path) -> None:
    """The error names TorchScript and the call that writes its state dict."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    before = digests(tmp_path)
    with pytest.raises(CheckpointFormatError, match="TorchScript") as caught:
        open_checkpoint(tmp_path / "a.pt")
    typed(str(caught.value).partition("Next, if you trust it: ")[2])
    assert digests(tmp_path).items() > before.items()
    with open_checkpoint(tmp_path / "a.tensors.pt") as reader:
        assert list(reader.tensors()) == ["weight", "bias"]


@pytest.mark.parametrize("view", [torch.ones(1).expand(5), torch.arange(9.0).as_strided((4, 4), (1, 1))])
def test_an_expanded_tensor_is_told_to_become_contiguous(tmp_path: Path, view: torch.Tensor) -> None:
    """Saved again it is the same; its contiguous copy is read."""
    path = tmp_path / "a.pt"
    torch.save({"a": view}, path)
    with pytest.raises(CheckpointFormatError, match=r"share memory, as after expand.* save its contiguous\(\) copy"):
        open_checkpoint(path)
    torch.save({"a": torch.load(path, weights_only=True)["a"].contiguous()}, tmp_path / "b.pt")
    with open_checkpoint(tmp_path / "b.pt") as reader:
        assert torch.equal(reader.read("a"), view)


def test_files_of_a_few_bytes_are_refused(tmp_path: Path) -> None:
    """Every first byte, alone and with each of some others: they are the beginnings of all formats that are told."""
    path = tmp_path / "a.pt"
    for first in range(256):
        for rest in (b"", b"\x00", b"\x8b", b"\xa1", b"GUF", b"\x02N.", b"\x00\x00\x00TFL3"):
            path.write_bytes(bytes([first]) + rest)
            with pytest.raises(CheckpointFormatError):
                open_checkpoint(path)


def archive(path: Path, names: list[str], *, compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive with these names and a version, good in all else."""
    contents = {"data.pkl": b"\x80\x02N.", "byteorder": b"little", "version": b"3\n"}
    with zipfile.ZipFile(path, "w", compression) as file:
        for entry in (*names, "a/version"):
            content = contents.get(entry.rpartition("/")[2].lower(), bytes(900))
            file.writestr(zipfile.ZipInfo(entry), content, compression)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/data.pkl", "a/data.pkl"], "two records"),
        (["a/data.pkl", "a/data/0", "a/data/0"], "two records"),
        (["a/data.pkl", "b/data/0"], "more than one folder"),
        (["a/data.pkl", "b/data.pkl"], "more than one folder"),
        (["data.pkl"], "never writes"),
        (["a/b/data.pkl"], r"without data\.pkl"),
        (["a/data.pkl", "a/../x"], "never writes"),
        (["a/data.pkl", "/a/x"], "never writes"),
        (["a/data.pkl", "a/x\\y"], "never writes"),
        (["a/data.pkl", "a/data/"], "never writes"),
        (["a/other"], r"without data\.pkl"),
        (["a/data.pkl", "a/DATA.pkl"], "two records.*upper or lower case"),
        (["a/Data.pkl", "a/data.pkl"], r"data\.pkl is named \"Data"),
        (["a/data.pkl", "a/data/k", "a/data/K"], "two records.*upper or lower case"),
        (["a/data.pkl", "a/data/0", "a/Data/0"], "two records.*upper or lower case"),
        (["a/data.pkl", "a/Byteorder"], "byteorder is named .Byteorder"),
        (["a/data.pkl", "a/byteorder", "a/BYTEORDER"], "two records.*upper or lower case"),
        (["a/data.pkl", "a/.data/Version"], r"\.data/version is named .\.data/Version"),
    ],
)
def test_names_that_torch_never_writes_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    """Duplicates, several folders, paths that leave the archive, and archives without a header."""
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(archive(tmp_path / "a.th", names))
    open_checkpoint(archive(tmp_path / "good.th", ["a/data.pkl", "a/data/0", "a/byteorder"])).close()


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """Only stored records are read."""
    with pytest.raises(CheckpointFormatError, match="is compressed"):
        open_checkpoint(archive(tmp_path / "a.th", ["a/data/0", "a/data.pkl"], compression=zipfile.ZIP_DEFLATED))


def patched(path: Path, original: bytes, signature: bytes, index: int, at: int, value: bytes) -> Path:
    """The file with some bytes of its n-th header of one kind changed."""
    position = -1
    for _ in range(index + 1):
        position = original.index(signature, position + 1)
    path.write_bytes(original[: position + at] + value + original[position + at + len(value) :])
    return path


CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


@pytest.mark.parametrize(
    ("signature", "index", "at", "value", "message"),
    [
        (CENTRAL, 0, 8, b"\x01", "encrypted"),
        (CENTRAL, 1, 24, struct.pack("<L", 2**31), "compressed"),
        (CENTRAL, 1, 20, struct.pack("<2L", 2**31, 2**31), "does not fit"),
        (CENTRAL, 1, 20, struct.pack("<2L", 17, 17), "another size"),
        (CENTRAL, 1, 20, struct.pack("<2L", 0xFFFFFFFF, 0xFFFFFFFF), "does not fit|missing"),
        (CENTRAL, 1, 42, struct.pack("<L", 0), "header of its record|two records|overlap"),
        (CENTRAL, 0, 42, struct.pack("<L", 7), "header of its record|begins at"),
        (LOCAL, 1, 6, b"\x08", "header of its record"),
        (LOCAL, 1, 8, b"\x08", "header of its record"),
        (LOCAL, 1, 14, b"\x01\x02\x03\x04", "another size or checksum"),
        (LOCAL, 1, 22, struct.pack("<L", 15), "another size or checksum"),
        (LOCAL, 1, 28, struct.pack("<H", 5), "overlap"),
        (LOCAL, 1, 30, b"b", "header of its record"),
        (END, 0, 4, b"\x01", "one part of"),
        (END, 0, 8, b"\x01", "one part of"),
        (END, 0, 10, b"\x02", "one part of"),
        (END, 0, 16, b"\x00\x00\x00\x00", "is not where its end record states"),
        (END, 0, 20, b"\x05", "truncated, or data was appended"),
    ],
)
def test_headers_that_do_not_add_up_are_refused(
    tmp_path: Path, signature: bytes, index: int, at: int, value: bytes, message: str
) -> None:
    """Flags, sizes, sums and places in the list of records and in the records' own headers have to agree."""
    records = {"data.pkl": b"\x80\x02" + under_key(GOOD) + b".", "data/0": bytes(16), "byteorder": b"little"}
    original = write_zip(tmp_path / "good.th", records).read_bytes()
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(patched(tmp_path / "a.th", original, signature, index, at, value))


def test_appended_and_prepended_bytes_are_refused(tmp_path: Path) -> None:
    """A file is an archive from its first byte to its last one."""
    original = small_file(tmp_path / "good.th")
    for content in (original + b"\0", original + original, b"\0" * 8 + original, b"PK" + original):
        (tmp_path / "a.th").write_bytes(content)
        with pytest.raises(CheckpointFormatError):
            open_checkpoint(tmp_path / "a.th")


@pytest.mark.parametrize(("order", "message"), [(b"big", "big-endian"), (b"middle", "byte order"), (b"", "byte order")])
def test_other_byte_orders_are_refused(tmp_path: Path, order: bytes, message: str) -> None:
    """Only files of little-endian machines are read."""
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(write_pickle(tmp_path / "a.th", b"}", {"byteorder": order}))


@pytest.mark.parametrize("record", ["version", ".data/version"])
@pytest.mark.parametrize("version", [b"3\n", b"1", b"10\n", b"0\n", b"11\n", b"99\n", b"-1", b"", b"three"])
def test_the_version_of_the_format_is_one_that_torch_reads(tmp_path: Path, version: bytes, record: str) -> None:
    """It stands in either of two records, and what torch refuses is refused."""
    path = write_zip(tmp_path / "a.th", {"data.pkl": b"\x80\x02}.", "byteorder": b"little", record: version})
    try:
        torch.load(path, weights_only=True)
    except RuntimeError:
        with pytest.raises(CheckpointFormatError, match="the version of its format is"):
            open_checkpoint(path)
    else:
        open_checkpoint(path).close()


def test_a_file_without_a_version_is_refused(tmp_path: Path) -> None:
    """As by torch."""
    with zipfile.ZipFile(tmp_path / "a.th", "w") as file:
        file.writestr(zipfile.ZipInfo("a/data.pkl"), b"\x80\x02}.")
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "a.th", weights_only=True)
    with pytest.raises(CheckpointFormatError, match="no record named version"):
        open_checkpoint(tmp_path / "a.th")


def test_a_symbolic_link_to_a_file_is_read(tmp_path: Path) -> None:
    """Scratch disks are linked to; the link is followed."""
    small_file(tmp_path / "a.th")
    (tmp_path / "link.th").symlink_to(tmp_path / "a.th")
    assert loaded(tmp_path / "link.th") == loaded(tmp_path / "a.th")


def test_a_damaged_header_is_reported_as_damage(tmp_path: Path) -> None:
    """A flipped bit in a class name is no unsafe name: the checksum of the header is looked at first."""
    original = small_file(tmp_path / "a.th")
    (tmp_path / "a.th").write_bytes(original.replace(b"FloatStorage", b"GloatStorage"))
    with pytest.raises(CheckpointCorruptError, match=r"data\.pkl"):
        open_checkpoint(tmp_path / "a.th")


def test_known_classes_as_values_are_inert_names(tmp_path: Path) -> None:
    """A dtype that is a value stands in the metadata as its name and is loaded as itself; a class stays a name."""
    torch.save({"dtype": torch.bfloat16, "device": torch.device("cuda", 1), "kind": dict}, tmp_path / "a.th")
    with open_checkpoint(tmp_path / "a.th") as reader:
        assert reader.metadata["dtype"] == GlobalName("torch.bfloat16")
        assert reader.metadata["device"].args == ("cuda", 1)
        assert reader.load() == {
            "dtype": torch.bfloat16,
            "device": torch.device("cuda", 1),
            "kind": GlobalName("builtins.dict"),
        }
