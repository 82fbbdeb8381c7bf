"""The pass that compares bytes and looks at values: what it finds, what it leaves alone, how much memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import attrs
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from noether_init_core import CheckpointWriter, PathProvider, TrainingIteration, bind
from noether_init_core.errors import CheckpointCorruptError, CheckpointError, StateMismatchError
from noether_init_core.files import content as contents, reading, verification
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage import handle as handles
from noether_init_core.files.storage.handle import open_file
from noether_init_core.memory import can_be_nonfinite, nonfinite

FLOATS = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
COMPLEX = [torch.complex64, torch.complex128]
NAN, INF = float("nan"), float("inf")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def expected(tensor: torch.Tensor) -> str | None:
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    if bool(torch.isnan(wide).any()):
        return "NaN"
    return "infinities" if bool(torch.isinf(wide).any()) else None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_every_pattern_of_sixteen_bits_is_judged_as_torch_judges_it(dtype: torch.dtype) -> None:
    """All 65,536 numbers, each alone."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    wrong = [number for number in numbers.split(1) if nonfinite(raw(number), name_of(dtype)) != expected(number)]
    assert wrong == []


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if dtype.itemsize == 1], ids=name_of)
def test_every_pattern_of_eight_bits_is_judged_as_torch_judges_it(dtype: torch.dtype) -> None:
    """All 256 numbers, each alone and beside ordinary ones."""
    ordinary = torch.tensor([1.0, -1.0, 0.5]).to(dtype)
    for number in torch.arange(256).to(torch.uint8).view(dtype).split(1):
        assert nonfinite(raw(number), name_of(dtype)) == expected(number)
        both = torch.cat([ordinary.view(torch.uint8), number.view(torch.uint8)]).view(dtype)
        assert nonfinite(raw(both), name_of(dtype)) == expected(number)


def test_the_scale_format_has_one_nan() -> None:
    """All bits set, which is no sign but the exponent."""
    assert [nonfinite(memoryview(bytes([number])), "float8_e8m0fnu") for number in (0, 127, 254, 255)] == [
        None,
        None,
        None,
        "NaN",
    ]


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.lists(st.floats(width=32), min_size=1, max_size=20),
    dtype=st.sampled_from([*FLOATS[:4], *COMPLEX]),
)
def test_values_are_judged_as_torch_judges_them(numbers: list[float], dtype: torch.dtype) -> None:
    """NaN before infinities, whatever stands around them, in either part of a complex number."""
    tensor = torch.tensor(numbers).to(dtype)
    if dtype.is_complex:
        tensor = torch.complex(tensor.real, tensor.real.flip(0))
    assert nonfinite(raw(tensor), name_of(dtype)) == expected(tensor)


def test_huge_finite_values_are_finite() -> None:
    """Their sum overflows, they do not."""
    for dtype in FLOATS:
        largest = torch.full((1000,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
        signs = torch.where(torch.arange(1000) % 3 == 0, -1.0, 1.0)
        for tensor in (largest, (largest.double() * signs).to(dtype)):
            assert nonfinite(raw(tensor), name_of(dtype)) is None
    assert not can_be_nonfinite("int64")
    assert not can_be_nonfinite("bool")


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=name_of)
def test_a_nan_is_found_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """First, last, on either side of the border of two pieces and of two groups; in its own tensor only."""
    monkeypatch.setattr(verification, "BUFFER", 1 << 10)
    monkeypatch.setattr(verification, "GROUP", 4 << 10)
    monkeypatch.setattr(handles, "GROUP", 4 << 10)
    count = (10 << 10) // dtype.itemsize + 3
    edge = (1 << 10) // dtype.itemsize
    for position in (0, count - 1, edge - 1, edge, 4 * edge - 1, 4 * edge):
        tensor = torch.ones(count).to(dtype)
        tensor.view(torch.uint8)  # contiguous
        spoiled = torch.ones(count)
        spoiled[position] = NAN
        path = tmp_path / "a.pt"
        torch.save({"before": torch.ones(7), "a": spoiled.to(dtype), "good": tensor}, path)
        with open_checkpoint(path) as reader:
            reader.verify(look=["before", "a", "good"])
            monkeypatch.setattr(verification, "nonfinite", _never)  # everything is known already
            assert reader.nonfinite(["before", "a", "good"]) == {"a": "NaN"}
            monkeypatch.undo()
            monkeypatch.setattr(verification, "BUFFER", 1 << 10)
            monkeypatch.setattr(verification, "GROUP", 4 << 10)
            monkeypatch.setattr(handles, "GROUP", 4 << 10)
        with open_checkpoint(path) as reader:  # without a verification before
            assert reader.nonfinite(["good", "a"]) == {"a": "NaN"}


def _never(data: Any, dtype: str) -> Any:
    raise AssertionError("looked at twice")


def test_views_are_judged_by_their_own_elements(tmp_path: Path) -> None:
    """A NaN in a gap of a view, or in another view of the storage, is not its own."""
    base = torch.arange(24.0).reshape(4, 6)
    base[0, 1] = NAN
    base[3, 5] = INF
    views = {
        "odd": base[:, 1::2],
        "even": base[:, ::2],
        "turned": base.t(),
        "row": base[1],
        "last": base[3, 4:],
        "repeated": base[1:2].expand(3, 6),
        "whole": base,
    }
    path = tmp_path / "a.pt"
    torch.save(views, path)
    with open_checkpoint(path) as reader:
        reader.verify(look=list(views))
        found = reader.nonfinite(list(views))
    assert found == {key: what for key, view in views.items() if (what := expected(view)) is not None}
    assert found == {"odd": "NaN", "turned": "NaN", "last": "infinities", "whole": "NaN"}


def committed(folder: Path) -> tuple[Path, Any]:
    """A small committed set; the file of its weights and what the manifest says of it."""
    torch.manual_seed(0)
    convolution: Any = torch.nn.Conv2d(2, 3, 2)
    module: Any = torch.nn.Sequential(convolution.to(memory_format=torch.channels_last), torch.nn.Linear(3, 2))
    saved = CheckpointWriter(PathProvider(folder, "run")).save(bind(module, name="net"), TrainingIteration(1, 1, 1))
    file = saved.file("net", "model")
    assert file is not None
    return file.path, saved.digests_of(file)


def test_every_flipped_bit_of_the_tensors_of_a_committed_set_is_found_and_named(tmp_path: Path) -> None:
    """By digests of tensors, and by checksums where a tensor lies in another order than its digest is of."""
    path, entry = committed(tmp_path)
    content = path.read_bytes()
    with open_checkpoint(path, digests=entry) as reader:
        reader.verify()
        places = {key: (info.pieces[0].offset, info.nbytes) for key, info in reader.tensors().items()}
        assert reader.tensors()["0.weight"].contiguous is None
    path.unlink()
    for key, (offset, size) in places.items():
        for bit in range(8 * size):
            at = offset + bit // 8
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit % 8)]) + content[at + 1 :])
            with (
                open_checkpoint(path, digests=entry) as reader,
                pytest.raises(CheckpointCorruptError) as caught,
            ):
                reader.verify()
            assert (caught.value.path, caught.value.key) == (path, key)


def test_no_flipped_bit_of_a_committed_file_changes_what_is_read(tmp_path: Path) -> None:
    """Anywhere in the file: found, or harmless, since it lies where nothing is read."""
    path, entry = committed(tmp_path)
    content = path.read_bytes()
    with open_checkpoint(path) as reader:
        good = reader.load()
    path.unlink()
    found = harmless = 0
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            with open_checkpoint(path, digests=entry) as reader:
                reader.verify()
                value = reader.load()
        except CheckpointError:
            found += 1
        else:
            harmless += 1
            assert repr(value) == repr(good)
    assert found > harmless
    assert harmless > 0


def test_another_good_file_in_place_of_the_committed_one_is_refused(tmp_path: Path) -> None:
    """Whatever differs: a value, a name, a shape, or only what stands beside the tensors."""
    path, entry = committed(tmp_path)
    content = torch.load(path, weights_only=True)
    path.chmod(0o644)
    for change in ("value", "name", "shape", "metadata"):
        other = {**content, "state_dict": dict(content["state_dict"])}
        if change == "value":
            other["state_dict"]["1.bias"] = other["state_dict"]["1.bias"] + 1
        elif change == "name":
            other["state_dict"]["1.sham"] = other["state_dict"].pop("1.bias")
        elif change == "shape":
            other["state_dict"]["1.weight"] = other["state_dict"]["1.weight"].reshape(3, 2)
        else:
            other["run_id"] = "nur"
        torch.save(other, path)
        with open_checkpoint(path) as reader:
            reader.verify()
        with (
            open_checkpoint(path, digests=entry) as reader,
            pytest.raises(
                CheckpointCorruptError, match=r"is damaged|not the file that was committed|its manifest records"
            ),
        ):
            reader.verify()


def test_a_set_of_an_earlier_release_is_checked_by_the_digest_of_the_file(tmp_path: Path) -> None:
    """Where the manifest says nothing of records, every byte of the file counts."""
    path, entry = committed(tmp_path)
    older = attrs.evolve(entry, records=None)
    with open_checkpoint(path, digests=older) as reader:
        reader.verify()
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(CheckpointError), open_checkpoint(path, digests=older) as reader:
        reader.verify()


def test_what_the_writer_found_in_values_is_what_a_look_would_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a committed file the manifest tells; of one whose manifest does not, the bytes are looked at again."""
    torch.manual_seed(0)
    convolution: Any = torch.nn.Conv2d(2, 3, 2)
    module: Any = torch.nn.Sequential(convolution.to(memory_format=torch.channels_last), torch.nn.Linear(3, 2))
    module.register_buffer("mask", torch.tensor([-INF, 1.0]))
    module.register_buffer("count", torch.tensor([3]))
    with torch.no_grad():
        module[0].weight[1, 1, 0, 1] = NAN
        module[1].bias[1] = NAN
        module[1].bias[0] = INF
    saved = CheckpointWriter(PathProvider(tmp_path, "run")).save(bind(module, name="net"), TrainingIteration(1, 1, 1))
    file = saved.file("net", "model")
    assert file is not None
    entry: Any = saved.digests_of(file)
    said = {key: tensor.values for key, tensor in entry.tensors.items()}
    assert said == {
        "0.weight": "NaN",
        "0.bias": "finite",
        "1.weight": "finite",
        "1.bias": "NaN",
        "mask": "infinities",
        "count": "finite",
    }
    silent = {key: msgspec.structs.replace(tensor, values=None) for key, tensor in entry.tensors.items()}
    for told, looks in ((entry, 1), (attrs.evolve(entry, tensors=silent), 5)):
        look = unittest.mock.Mock(wraps=nonfinite)
        with open_checkpoint(file.path, digests=told) as reader, monkeypatch.context() as patch:
            patch.setattr(verification, "nonfinite", look)
            reader.verify(look=list(reader.tensors()))
            found = reader.nonfinite(list(reader.tensors()))
        assert found == {key: what for key, what in said.items() if what != "finite"}
        assert look.call_count == looks, "0.weight lies in another order than its digest is of, and is looked at"


def test_read_all_reads_verifies_and_looks_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is read once, lands in memory of its own, and is compared."""
    values = {"a": torch.randn(300_000), "b": torch.randn(5, 3).t(), "n": torch.tensor([1.0, NAN]), "e": torch.ones(0)}
    path = tmp_path / "a.pt"
    torch.save(values, path)
    with open_checkpoint(path) as reader:
        before = path.stat().st_size
        read = []
        original = type(reader._handle).read_into

        def counted(handle: Any, target: Any, offset: int, key: str = "") -> None:
            read.append(len(target))
            original(handle, target, offset, key)

        monkeypatch.setattr(type(reader._handle), "read_into", counted)
        infos = [reader.tensors()[key] for key in values]
        found = reader.read_all(infos)
        assert sum(read) < before + 100
        assert reader.nonfinite(values) == {"n": "NaN"}
        monkeypatch.undo()
        for key, value in values.items():
            assert torch.equal(found[reader.tensors()[key]], value) or key == "n"
        assert found[infos[0]].untyped_storage().nbytes() == 1_200_000
    content = path.read_bytes()
    at = content.index(values["a"].numpy().tobytes()) + 1_000_000
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with open_checkpoint(path) as reader:
        with pytest.raises(CheckpointCorruptError) as caught:
            reader.read_all(reader.tensors().values())
        assert caught.value.key == "a"
        assert len(reader.read_all(reader.tensors().values(), verify=False, look=False)) == 4


def test_tensors_are_compared_without_being_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bytes are equal, NaN included; shape and dtype count; a difference in the last piece is seen."""
    monkeypatch.setattr(contents, "_BOX", 1000)
    base = torch.randn(30, 40)
    base[3, 4] = NAN
    other = base.clone()
    other[29, 39] += 1
    tensors = {
        "a": base,
        "b": base.clone(),
        "c": other,
        "d": base.double(),
        "e": base.reshape(40, 30).clone(),
        "t": base.t().contiguous().t(),
    }
    torch.save(tensors, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert [key for key in tensors if reader.is_same("a", key)] == ["a", "b", "t"]


@pytest.mark.parametrize("source", ["plain", "turned", "gaps", "repeated"])
@pytest.mark.parametrize("target", ["plain", "turned", "gaps", "half"])
def test_copies_in_chunks_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str) -> None:
    """Every layout in the file into every layout in memory, many chunks each."""
    monkeypatch.setattr(contents, "_BOX", 64)
    base = torch.arange(7 * 11 * 5.0).reshape(7, 11, 5)
    sources = {
        "plain": base,
        "turned": base.permute(2, 0, 1),
        "gaps": base[::2, 1:9:3],
        "repeated": base[:1].expand(4, 11, 5),
    }
    value = sources[source]
    targets = {
        "plain": torch.zeros(value.shape),
        "turned": torch.zeros(value.shape[::-1]).permute(2, 1, 0),
        "gaps": torch.zeros([2 * size for size in value.shape])[::2, ::2, ::2],
        "half": torch.zeros(value.shape, dtype=torch.float16),
    }
    torch.save({"a": value}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        reader.copy_into([("a", None, targets[target])])
    assert torch.equal(targets[target].float(), value)


def test_what_goes_through_staging_buffers_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers that feed a CUDA device, here with the CPU in its place: unpinned, and every copy waits."""
    monkeypatch.setattr(reading, "CHUNK", 4096)
    values = {"a": torch.randn(5000), "b": torch.randn(3, 7), "c": torch.arange(9000), "n": torch.tensor(2.5)}
    path = tmp_path / "a.pt"
    torch.save(values, path)
    targets = {"a": torch.zeros(5000), "b": torch.zeros(3, 7).bfloat16(), "c": torch.zeros(9000).long()}
    targets["n"] = torch.tensor(0.0)
    with open_checkpoint(path) as reader:
        sources = [(key, reader.tensors()[key], targets[key]) for key in values]
        reading.copy_staged(reader._handle, sources, torch.device("cpu"))
    assert all(torch.equal(targets[key], values[key].to(targets[key].dtype)) for key in values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_targets_are_filled(tmp_path: Path) -> None:
    """Through pinned buffers, with and without a cast."""
    values = {"a": torch.randn(3_000_000), "b": torch.randn(64, 64)}
    torch.save(values, tmp_path / "a.pt")
    targets = {"a": torch.zeros(3_000_000, device="cuda"), "b": torch.zeros(64, 64, device="cuda").bfloat16()}
    with open_checkpoint(tmp_path / "a.pt") as reader:
        reader.copy_into([(key, None, tensor) for key, tensor in targets.items()])
    assert torch.equal(targets["a"].cpu(), values["a"])
    assert torch.equal(targets["b"].cpu(), values["b"].bfloat16())


def test_memory_that_was_taken_away_is_never_written_to(tmp_path: Path) -> None:
    """A target whose storage is shorter than its shape is refused, and no other target changes."""
    torch.save({"a": torch.ones(1000), "b": torch.ones(2)}, tmp_path / "a.pt")
    gone, there = torch.zeros(1000), torch.zeros(2)
    gone.untyped_storage().resize_(0)
    with open_checkpoint(tmp_path / "a.pt") as reader:
        with pytest.raises(StateMismatchError, match="was freed"):
            reader.copy_into([("b", None, there), ("a", None, gone)])
        short = verification.Stretch("x", 0, 10, target=memoryview(bytearray(9)))
        with pytest.raises(ValueError, match="9 bytes of memory for 10 bytes"):
            verification.examine(reader._handle, [short])
    assert there.tolist() == [0, 0]


def test_mapped_tensors_never_change_the_file(tmp_path: Path) -> None:
    """They are copied where they are written to; two keys of one record do not share memory."""
    weight = torch.randn(100)
    path = tmp_path / "a.pt"
    torch.save({"a": weight, "tied": weight, "turned": torch.randn(3, 2).t(), "empty": torch.ones(0)}, path)
    content = path.read_bytes()
    with open_checkpoint(path) as reader:
        found = reader.mapped(list(reader.tensors()))
    assert set(found) == {"a"}
    assert torch.equal(found["a"], weight)
    found["a"].add_(1)
    assert torch.equal(found["a"], weight + 1)
    assert path.read_bytes() == content


def test_parts_of_all_sizes_are_read_as_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches smaller and larger than the buffer, with and without memory of the caller, in any order."""
    monkeypatch.setattr(verification, "BUFFER", 128)
    monkeypatch.setattr(verification, "GROUP", 1024)
    monkeypatch.setattr(handles, "GROUP", 1024)
    generator = np.random.default_rng(0)
    content = generator.integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(content)
    import xxhash
    from isal import isal_zlib

    handle = open_file(tmp_path / "a")
    stretches, memory, offset = [], {}, 5
    while offset < 19_000:
        size = int(generator.choice([0, 1, 7, 100, 128, 129, 700, 1024, 2500]))
        data = content[offset : offset + size]
        kind = int(generator.integers(4))
        target = memoryview(bytearray(len(data))) if kind in (2, 3) else None
        stretch = verification.Stretch(
            str(offset),
            offset,
            len(data),
            isal_zlib.crc32(data) if kind in (0, 2) else None,
            f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}" if kind in (1, 3) else None,
            target=target,
        )
        stretches.append(stretch)
        memory[stretch] = (target, data)
        offset += size + int(generator.integers(40))
    generator.shuffle(stretches)
    assert len(stretches) > 20
    assert verification.examine(handle, stretches)[0] == []
    assert all(target is None or bytes(target) == data for target, data in memory.values())
    handle.close()


MEMORY = """
import sys
from pathlib import Path
import torch
from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind, open_checkpoint

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

folder = Path(sys.argv[1])
module = torch.nn.ModuleList([torch.nn.Linear(3000, 3000) for _ in range(4)])
for parameter in module.parameters():
    parameter.data.fill_(1.5)
paths = PathProvider(folder, "run")
CheckpointWriter(paths, flat_names=False).save(bind(module, name="net"), TrainingIteration(1, 1, 1))
half = {key: value.to(torch.float64) for key, value in module.state_dict().items()}
torch.save(half, folder / "double.pt")
del half

import threading
over, peak = threading.Event(), [0]
def watch():
    while not over.wait(0.0005):
        peak[0] = max(peak[0], anonymous())
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
for config in (
    {"kind": "previous_run", "run_id": "run"},
    {"kind": "file", "path": str(folder / "double.pt")},
    {"kind": "previous_run", "run_id": "run", "verify": "none"},
):
    for parameter in module.parameters():
        parameter.data.zero_()
    InitializerStack.from_config([config], path_provider=paths.with_run("new")).initialize(bind(module, name="net"))
    assert all(bool((parameter == 1.5).all()) for parameter in module.parameters())
over.set()
thread.join()
print((peak[0] - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_loading_takes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """144 MB from a set, and as 288 MB of another dtype: the anonymous memory beyond the model stays far below."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert int(result.stdout) < 64
