"""Verification, reading and copying of files that are well-formed; and what each does when bytes are not."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from support.counting import LineCounter, bytes_asked_for
from support.handmade import integer, string, tensor, write_large, write_pickle, write_zip

from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    StateMismatchError,
)
from noether_init_core.files import verification
from noether_init_core.files.checkpoint import Verified
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage import handle as handles


def save(path: Path, **tensors: torch.Tensor) -> Path:
    """A model file with these tensors."""
    torch.save({"state_dict": tensors, "run_id": "r"}, path)
    return path


def flip(path: Path, content: bytes, needle: bytes) -> None:
    """Write the content with one bit changed in the middle of ``needle``."""
    at = content.index(needle) + len(needle) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])


def test_a_flipped_bit_is_named_with_file_and_every_key_of_the_record(tmp_path: Path) -> None:
    """Tied keys share the record, so both are named; tensors outside of the state dict have their path."""
    weight, other = torch.full((64,), 1.5), torch.full((64,), 2.5)
    path = tmp_path / "a.th"
    torch.save({"state_dict": {"good": torch.ones(3), "a": weight, "tied": weight}, "more": {"x": [other]}}, path)
    content = path.read_bytes()
    flip(path, content, weight.numpy().tobytes())
    with open_checkpoint(path) as reader:
        with pytest.raises(CheckpointCorruptError, match=r"a\.th is damaged.* of a, tied \(data/1\)") as caught:
            reader.verify()
        assert (caught.value.path, caught.value.key) == (path, "a, tied")
        with pytest.raises(CheckpointCorruptError):
            reader.verify()
    flip(path, content, other.numpy().tobytes())
    with open_checkpoint(path) as reader, pytest.raises(CheckpointCorruptError) as caught:
        reader.verify()
    assert caught.value.key == "more.x.0"


def test_all_damaged_records_are_reported_together(tmp_path: Path) -> None:
    """One error says everything that is wrong."""
    path = save(tmp_path / "a.th", a=torch.full((8,), 1.5), b=torch.full((8,), 2.5), c=torch.full((8,), 3.5))
    for value in (1.5, 3.5):
        flip(path, path.read_bytes(), torch.full((8,), value).numpy().tobytes())
    with open_checkpoint(path) as reader, pytest.raises(CheckpointCorruptError) as caught:
        reader.verify()
    assert caught.value.key == "a, c"


def test_verification_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a full verification, or a digest, bytes are not read again for it."""
    path = save(tmp_path / "a.th", a=torch.ones(100))
    asked = []
    original = verification.examine

    def counted(handle: Any, stretches: Any) -> Any:
        asked.append(len(stretches))
        return original(handle, stretches)

    monkeypatch.setattr(verification, "examine", counted)
    with open_checkpoint(path) as reader:
        assert reader.verify().nbytes > 400
        assert reader.verify() == Verified("crc32", 0)
        assert len(asked) == 1
    with open_checkpoint(path, digests="sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()) as reader:
        assert reader.verify().nbytes == path.stat().st_size
        assert reader.verify() == Verified("sha256", 0)


def test_records_larger_than_the_pieces_of_verification_are_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of pieces, taken by two threads and combined, are the sum of the record; a flip in any is found."""
    monkeypatch.setattr(verification, "BUFFER", 1000)
    monkeypatch.setattr(verification, "GROUP", 3001)
    monkeypatch.setattr(handles, "GROUP", 3001)
    generator = torch.Generator().manual_seed(0)
    path = save(tmp_path / "a.th", **{str(n): torch.rand(n, generator=generator) for n in (0, 1, 7, 900, 2500, 5000)})
    content = path.read_bytes()
    with open_checkpoint(path) as reader:
        reader.verify()
        places = {key: reader.read(key).numpy().tobytes() for key in ("7", "900", "5000")}
    for key, raw in places.items():
        at = content.index(raw)
        for position in {at, at + len(raw) // 2, at + len(raw) - 1}:
            path.write_bytes(content[:position] + bytes([content[position] ^ 128]) + content[position + 1 :])
            with open_checkpoint(path) as reader, pytest.raises(CheckpointCorruptError) as caught:
                reader.verify()
            assert caught.value.key == key


def test_files_without_checksums_need_the_header_mode(tmp_path: Path) -> None:
    """``full`` refuses them and names ``verify: header``; with that they are read, as they are with a digest."""
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "a.th", a=torch.ones(3))
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(path) as reader:
        with pytest.raises(CheckpointFormatError, match=r"written without checksums.*verify: header"):
            reader.verify()
        assert reader.read("a").tolist() == [1, 1, 1]
    with open_checkpoint(path, digests="xxh3_128:" + xxhash.xxh3_128_hexdigest(path.read_bytes())) as reader:
        reader.verify()


def test_digests_are_checked_over_the_whole_file(tmp_path: Path) -> None:
    """A right one passes, a wrong one is damage, one that cannot be checked is an error of its own."""
    path = save(tmp_path / "a.th", a=torch.arange(3_000_000))
    content = path.read_bytes()
    for digest in (
        "sha256:" + hashlib.sha256(content).hexdigest(),
        "xxh3_128:" + xxhash.xxh3_128_hexdigest(content),
    ):
        with open_checkpoint(path, digests=digest) as reader:
            assert reader.verify() == Verified(digest.partition(":")[0], len(content))
        wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
        with open_checkpoint(path, digests=wrong) as reader, pytest.raises(CheckpointCorruptError, match=digest):
            reader.verify()
    for digest in ("md5:" + 32 * "0", "sha256:", "sha256:" + 64 * "G", "xxh3_128"):
        with (
            open_checkpoint(path, digests=digest) as reader,
            pytest.raises(CheckpointError, match="not a valid digest"),
        ):
            reader.verify()


def test_read_gives_fresh_tensors_that_own_their_memory(tmp_path: Path) -> None:
    """Two reads share nothing, and the file may be closed and removed."""
    path = save(tmp_path / "a.th", a=torch.arange(4.0))
    with open_checkpoint(path) as reader:
        first, second = reader.read("a"), reader.read(reader.tensors()["a"])
    path.unlink()
    first.add_(1)
    assert (first.tolist(), second.tolist()) == ([1, 2, 3, 4], [0, 1, 2, 3])
    assert not first.requires_grad


def test_an_unknown_key_names_its_neighbours(tmp_path: Path) -> None:
    """Of a misspelt key the near ones are named, and stand on the error."""
    with open_checkpoint(save(tmp_path / "a.th", **{"head.weight": torch.ones(1)})) as reader:
        with pytest.raises(CheckpointNotFoundError, match=r"Near: head\.weight") as caught:
            reader.read("head.wieght")
        assert tuple(caught.value.candidates) == ("head.weight",)
        with pytest.raises(CheckpointNotFoundError, match=r"Found: head\.weight"):
            reader.copy_into([("x", None, torch.ones(1))])


def test_an_info_of_another_file_is_refused(tmp_path: Path) -> None:
    """It would read other bytes, or none."""
    with open_checkpoint(save(tmp_path / "b.th", a=torch.ones(1000))) as other:
        info = other.tensors()["a"]
    with (
        open_checkpoint(save(tmp_path / "a.th", a=torch.ones(2))) as reader,
        pytest.raises(CheckpointError, match="other"),
    ):
        reader.read(info)


def test_copy_into_fills_every_kind_of_target(tmp_path: Path) -> None:
    """Same dtype directly, other dtypes cast, strided ones by element; parameters keep their place and gradient."""
    weight = torch.arange(12.0).reshape(3, 4)
    path = save(tmp_path / "a.th", weight=weight, transposed=weight.t(), scalar=torch.tensor(7), empty=torch.ones(0, 2))
    targets = {
        "weight": torch.nn.Parameter(torch.zeros(3, 4)),
        "transposed": torch.zeros(4, 3),
        "scalar": torch.tensor(0),
        "empty": torch.ones(0, 2),
    }
    memory = targets["weight"].data_ptr()
    with open_checkpoint(path) as reader:
        reader.copy_into([(key, None, tensor) for key, tensor in targets.items()])
        assert targets["weight"].data_ptr() == memory
        assert targets["weight"].requires_grad
        assert torch.equal(targets["weight"], weight)
        assert torch.equal(targets["transposed"], weight.t())
        assert targets["scalar"].item() == 7
        half, strided, double = torch.zeros(3, 4).bfloat16(), torch.zeros(4, 3).t(), torch.zeros(3, 8)[:, ::2]
        for target in (half, strided, double):
            reader.copy_into([("weight", None, target)])
            assert torch.equal(target.float(), weight)
        with pytest.raises(StateMismatchError, match=r"weight: checkpoint \[3, 4\], target \[4, 3\]") as caught:
            reader.copy_into(
                [
                    ("scalar", None, torch.tensor(0)),
                    ("weight", None, torch.zeros(4, 3)),
                    ("empty", None, torch.zeros(1)),
                ]
            )
        assert len(caught.value.problems) == 2
        with pytest.raises(StateMismatchError, match="meta"):
            reader.copy_into([("weight", None, torch.empty(3, 4, device="meta"))])


def test_a_single_element_with_a_stride_is_read_and_filled(tmp_path: Path) -> None:
    """A dimension of one element may have any stride, in the file and in the target."""
    path = save(tmp_path / "a.th", a=torch.arange(6.0)[4::2], b=torch.arange(6.0).bfloat16()[1::9])
    targets = {"a": torch.zeros(9)[3::7], "b": torch.zeros(9).bfloat16()[8::7]}
    assert targets["a"].stride() == (7,)
    with open_checkpoint(path) as reader:
        assert reader.tensors()["b"].stride == (9,)
        reader.copy_into([(key, None, tensor) for key, tensor in targets.items()])
        assert (reader.read("a").tolist(), reader.read("b").tolist()) == ([4], [1])
    assert (targets["a"].tolist(), targets["b"].tolist()) == ([4], [1])


def test_a_failing_copy_has_changed_nothing(tmp_path: Path) -> None:
    """A wrong shape is found before the first tensor is touched."""
    path = save(tmp_path / "a.th", a=torch.ones(2), b=torch.ones(2))
    a = torch.zeros(2)
    with open_checkpoint(path) as reader, pytest.raises(StateMismatchError):
        reader.copy_into([("a", None, a), ("b", None, torch.zeros(3))])
    assert a.tolist() == [0, 0]


def test_large_tensors_are_copied_by_two_threads_without_a_second_copy(tmp_path: Path) -> None:
    """All bytes arrive, over the borders of chunks; memory on top stays small."""
    generator = torch.Generator().manual_seed(1)
    value = {"a": torch.rand(6_000_001, generator=generator), "b": torch.rand(999, generator=generator)}
    path = save(tmp_path / "a.th", **value)
    targets = {"a": torch.zeros(6_000_001), "b": torch.zeros(999)}
    tracemalloc.start()
    try:
        with open_checkpoint(path) as reader:
            reader.verify()
            reader.copy_into([(key, None, tensor) for key, tensor in targets.items()])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(torch.equal(targets[key], value[key]) for key in value)
    assert peak < 8 << 20


def test_a_file_that_is_cut_off_after_it_was_opened_is_damage(tmp_path: Path) -> None:
    """A short read is an error with the key, never a tensor with old or empty memory."""
    path = save(tmp_path / "a.th", a=torch.ones(50_000))
    with open_checkpoint(path) as reader:
        os.truncate(path, 20_000)
        with pytest.raises(CheckpointCorruptError, match=r"'a'.*truncated") as caught:
            reader.read("a")
        assert caught.value.key == "a"
        with pytest.raises(CheckpointCorruptError):
            reader.copy_into([("a", None, torch.zeros(50_000))])
        with pytest.raises(CheckpointCorruptError):
            reader.verify()


def test_a_file_that_is_replaced_after_it_was_opened_is_read_as_it_was(tmp_path: Path) -> None:
    """Checked and read through one handle."""
    path = save(tmp_path / "a.th", a=torch.ones(5))
    with open_checkpoint(path) as reader:
        reader.verify()
        os.replace(save(tmp_path / "b.th", a=torch.zeros(5)), path)
        assert reader.read("a").tolist() == [1] * 5


def test_a_closed_reader_says_so(tmp_path: Path) -> None:
    """Metadata stays, bytes are gone, and closing again does nothing."""
    reader = open_checkpoint(save(tmp_path / "a.th", a=torch.ones(5)))
    reader.close()
    reader.close()
    assert reader.metadata == {"run_id": "r"}
    with pytest.raises(CheckpointError, match="closed"):
        reader.read("a")


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    """No descriptor is left behind by an error."""
    path = write_pickle(tmp_path / "a.th", b"\xff")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        with pytest.raises(CheckpointFormatError):
            open_checkpoint(path)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    """Opening, metadata and verification do not import torch."""
    path = save(tmp_path / "a.th", a=torch.ones(5))
    code = (
        "import sys; from noether_init_core.files.opening import open_checkpoint\n"
        f"r = open_checkpoint({str(path)!r}); r.verify(); "
        "print(r.tensors()['a'].shape, r.metadata, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout == "(5,) {'run_id': 'r'} False\n"


def test_storages_of_more_than_four_gigabytes_are_found(tmp_path: Path) -> None:
    """Sizes and places beyond 32 bits stand in extra fields, as torch writes them; the file here is mostly a hole."""
    size = (4 << 30) + 16
    header = (
        b"\x80\x02}("
        + string("large")
        + tensor([4], [1], numel=size // 4, offset=size // 4 - 4)
        + string("behind")
        + tensor([1], [1], numel=1, record="1")
        + b"u."
    )
    write_large(tmp_path / "a.th", size, header, torch.tensor([1.0, 2.0, 3.0, 4.0]).numpy().tobytes())
    before = bytes_asked_for()
    with open_checkpoint(tmp_path / "a.th") as reader:
        assert reader.read("large").tolist() == [1, 2, 3, 4]
        assert reader.read("behind").tolist() == [0]
    assert bytes_asked_for() - before < 1_000_000


def test_a_header_of_many_keys_takes_few_lines_a_key(tmp_path: Path) -> None:
    """Fewer than 1,000 lines of Python for each key."""
    opcodes = b"}(" + b"".join(
        string(f"layers.{n}.weight") + tensor([4], [1], record=str(n)) for n in range(4_000)
    ) + b"u"  # fmt: skip
    path = write_pickle(tmp_path / "a.th", opcodes, {f"data/{n}": bytes(16) for n in range(4_000)})
    with LineCounter() as lines, open_checkpoint(path) as reader:
        assert len(reader.tensors()) == 4_000
    assert lines.count < 1_000 * 4_000


def test_archives_of_other_writers_are_read(tmp_path: Path) -> None:
    """Sizes and checksums in the records' own headers, no byte order, another folder: all the format allows."""
    content = pickle.dumps({"a": [1, 2], "b": 2.5}, 3)
    path = write_zip(tmp_path / "a.pt", {"version": b"3\n", "data.pkl": content}, folder="ünï code/")
    with open_checkpoint(path) as reader:
        reader.verify()
        assert reader.load() == {"a": [1, 2], "b": 2.5}
        assert "0 tensors" in repr(reader)
    assert integer(255) == b"\x8a\x02\xff\x00"
