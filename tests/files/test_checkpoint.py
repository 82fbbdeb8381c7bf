"""The interface of checkpoints: trees, boxes, pieces, shares of verification, objects of a store, classes of others."""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import msgspec
import pytest
import torch
import xxhash
from safetensors.torch import save_file
from support.average import Average

from noether_init_core import Checkpoint, Storage, open_checkpoint
from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    StateMismatchError,
)
from noether_init_core.files.checkpoint import Digests, Verified
from noether_init_core.files.content import Box
from noether_init_core.files.reading import read_tensor
from noether_init_core.files.storage.handle import open_file


@attrs.frozen
class Written:
    """A tensor as a manifest describes it."""

    dtype: str
    shape: tuple[int, ...]
    digest: str
    values: Literal["finite", "infinities", "NaN"] | None


class InMemory:
    """An object of a store, kept as bytes."""

    def __init__(self, content: bytes) -> None:
        self.content, self.version = content, "1"

    def __str__(self) -> str:
        return "memory://weights"

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        for offset, target in ranges:
            found = self.content[offset : offset + len(target)]
            if len(found) < len(target):
                raise EOFError(f"ends at byte {len(self.content)}")
            target[:] = found


@pytest.fixture
def average(tmp_path: Path) -> Average:
    """The mean of two files, one of which holds NaN in ``b``."""
    torch.save(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.0, 2.0]), "c": torch.ones(2)}, tmp_path / "1.pt"
    )
    torch.save({"a": torch.ones(2, 3), "b": torch.tensor([float("nan"), 0.0]), "c": torch.ones(2)}, tmp_path / "2.pt")
    return Average(open_checkpoint(tmp_path / "1.pt"), open_checkpoint(tmp_path / "2.pt"))


def test_a_class_that_only_lists_and_reads_is_a_whole_checkpoint(average: Average) -> None:
    """Values, copies, comparisons and near names follow from ``entries``, ``tensors`` and ``read``."""
    checkpoint: Checkpoint = average
    with checkpoint:
        expected = (torch.arange(6.0).reshape(2, 3) + 1) / 2
        assert torch.equal(checkpoint.load()["a"], expected)
        assert torch.equal(checkpoint.materialize({"x": [checkpoint.values()["a"]]})["x"][0], expected)
        assert checkpoint.nonfinite(["a", "b"]) == {"b": "NaN"}
        assert (checkpoint.is_same("a", "a"), checkpoint.is_same("a", "b")) == (True, False)
        whole, row = torch.zeros(2, 3), torch.zeros(1, 2)
        checkpoint.copy_into([("a", None, whole), ("a", ((1, 2), (1, 3)), row)])
        assert torch.equal(whole, expected)
        assert torch.equal(row, expected[1:, 1:])
        with pytest.raises(CheckpointNotFoundError, match=r"tensor 'A' not found in average\. Near: a"):
            checkpoint.read("A")
        assert (checkpoint.format, checkpoint.is_verifiable, checkpoint.mapped(["a"])) == ("Average", False, {})
        assert repr(checkpoint) == "<Average 'average': 3 tensors>"


def test_two_computed_tensors_that_look_alike_are_two(average: Average) -> None:
    """Leaves are told apart by their keys, since they have no bytes."""
    values = average.values()
    assert values["b"] != values["c"]
    found = average.read_all(values.values(), verify=False)
    assert found[values["c"]].tolist() == [1, 1]
    assert len(found) == 3


def test_what_a_class_of_others_has_verified_is_its_own_claim(average: Average) -> None:
    """The class is named; nothing of ours has compared anything."""
    assert average.verify() == Verified("unverifiable", claimed_by="support.average.Average")


def test_a_copy_that_cannot_succeed_changes_nothing(average: Average) -> None:
    """Shapes are compared before the first tensor is written."""
    good, wrong = torch.zeros(2, 3), torch.zeros(4)
    with pytest.raises(StateMismatchError, match=r"all targets are unchanged: b: checkpoint \[2\], target \[4\]"):
        average.copy_into([("a", None, good), ("b", None, wrong)])
    assert not good.any()


def test_the_trees_of_a_file_of_another_program_are_told_apart(tmp_path: Path) -> None:
    """Weights by their own keys, optimizer state by dotted paths, and leaves of its tree can be read."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 3}
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.entries == {"model_state_dict": 2, "optimizer_state_dict": 6}
        assert list(checkpoint.tensors("model_state_dict")) == ["weight", "bias"]
        assert list(checkpoint.tensors("optimizer_state_dict"))[:2] == ["state.0.step", "state.0.exp_avg"]
        assert next(iter(checkpoint.tensors())) == "model_state_dict.weight"
        state = checkpoint.values("optimizer_state_dict")
        moment = state["state"][0]["exp_avg"]
        assert torch.equal(checkpoint.read(moment), optimizer.state_dict()["state"][0]["exp_avg"])
        other = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
        other.load_state_dict(checkpoint.materialize(state))
        assert repr(other.state_dict()) == repr(optimizer.state_dict())
        with pytest.raises(
            CheckpointNotFoundError, match=r"tree 'model' not found in .*\. Found: model_state_dict, opt"
        ):
            checkpoint.tensors("model")
    with open_checkpoint(path, entry="model_state_dict") as checkpoint:
        assert list(checkpoint.tensors()) == list(checkpoint.values()) == ["weight", "bias"]
        assert checkpoint.metadata.keys() == {"optimizer_state_dict", "epoch"}
        assert checkpoint.versions == {"": {"version": 1}}
    with pytest.raises(CheckpointNotFoundError, match="tree 'ema' not found"):
        open_checkpoint(path, entry="ema")


def test_entries_count_tensors_that_lie_in_no_tree(tmp_path: Path) -> None:
    """A bare state dict is one tree without a name, and so is what lies beside trees."""
    for content, entries in (
        ({"w": torch.ones(1), "b": torch.ones(1)}, {"": 2}),
        ({"state_dict": {"w": torch.ones(1)}, "more": [torch.ones(1)] * 2}, {"state_dict": 1, "more": 2}),
        ({"scale": torch.ones(1), "net": {"w": torch.ones(1)}}, {"": 1, "net": 1}),
        ([torch.ones(1)], {"": 1}),
        ({"epoch": 3}, {"": 0}),
    ):
        torch.save(content, tmp_path / "a.pt")
        with open_checkpoint(tmp_path / "a.pt") as checkpoint:
            assert checkpoint.entries == entries


@pytest.mark.parametrize("layout", ["plain", "turned", "gaps", "repeated"])
def test_every_box_of_every_layout_is_what_indexing_gives(tmp_path: Path, layout: str) -> None:
    """Read, and copied into a tensor of the shape of the box."""
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensor = {
        "plain": base,
        "turned": base.permute(2, 0, 1),
        "gaps": base[::2, 1:, ::3],
        "repeated": base[:1].expand(2, 4, 5),
    }[layout]
    torch.save({"a": tensor}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        ranges = (itertools.combinations(range(size + 1), 2) for size in tensor.shape)
        for box in itertools.product(*ranges):
            expected = tensor[tuple(slice(*ends) for ends in box)]
            assert torch.equal(checkpoint.read("a", box), expected)
            target = torch.zeros(expected.shape)
            checkpoint.copy_into([("a", box, target)])
            assert torch.equal(target, expected)
        assert checkpoint.read("a", ((0, 0), (0, 1), (0, 1))).shape == (0, 1, 1)
        with pytest.raises(ValueError, match="is not a box of a tensor of the shape"):
            checkpoint.read("a", ((0, 1), (0, 1), (0, 6)))


def test_a_tensor_of_several_pieces_is_put_together(tmp_path: Path) -> None:
    """Each piece from its own place, in every box; what the pieces leave out is refused."""
    tensor = torch.arange(35.0).reshape(7, 5)
    torch.save({"a": tensor}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        info = checkpoint.tensors()["a"]
        boxes: list[Box] = [((0, 3), (0, 5)), ((3, 7), (0, 2)), ((3, 7), (2, 5))]
        pieces = tuple(msgspec.structs.replace(info.part(box).pieces[0], box=box) for box in boxes)
        parted = attrs.evolve(info, pieces=pieces)
        assert torch.equal(checkpoint.read(parted), tensor)
        for box in itertools.product(*(itertools.combinations(range(size + 1), 2) for size in tensor.shape)):
            assert torch.equal(checkpoint.read(parted, box), tensor[tuple(slice(*ends) for ends in box)])
        target = torch.zeros(7, 5, dtype=torch.float64)
        checkpoint.copy_into([(parted, None, target)])
        assert torch.equal(target, tensor.double())
        assert checkpoint.nonfinite([parted]) == {}
        with pytest.raises(CheckpointCorruptError, match=r"do not cover its shape \[7, 5\]"):
            checkpoint.read(attrs.evolve(info, pieces=pieces[:2]))
        archived = attrs.evolve(info, pieces=(msgspec.structs.replace(info.pieces[0], container="torch_zip"),))
        with pytest.raises(ValueError, match="not resolved yet"):
            checkpoint.read(archived, ((0, 1), (0, 1)))


def test_nonfinite_values_in_one_of_several_pieces_are_found(tmp_path: Path) -> None:
    """A tensor in pieces is looked at as a whole."""
    tensor = torch.zeros(4, 4)
    tensor[3, 3] = float("inf")
    torch.save({"a": tensor}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        info = checkpoint.tensors()["a"]
        halves: list[Box] = [((0, 2), (0, 4)), ((2, 4), (0, 4))]
        parted = attrs.evolve(
            info, pieces=tuple(msgspec.structs.replace(info.part(box).pieces[0], box=box) for box in halves)
        )
        assert checkpoint.nonfinite([parted]) == {parted: "infinities"}


def test_shares_of_verification_cover_every_record_once(tmp_path: Path) -> None:
    """A flipped bit is found by exactly one of n ranks, and all shares together read the bytes once."""
    path = tmp_path / "a.pt"
    torch.save({f"w{n}": torch.full((n,), float(n)) for n in range(1, 40)}, path)
    content = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        whole = checkpoint.verify().nbytes
    for of in (1, 2, 3, 7, 100):
        found = []
        for part in range(of):
            with open_checkpoint(path) as checkpoint:
                found.append(checkpoint.verify(part=(part, of)).nbytes)
        assert sum(found) == whole
        assert max(found) < whole / of + 3000  # the header is one record
    at = content.index(torch.full((20,), 20.0).numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    keys = []
    for part in range(4):
        with open_checkpoint(path) as checkpoint:
            try:
                checkpoint.verify(part=(part, 4))
            except CheckpointCorruptError as error:
                keys.append(error.key)
    assert keys == ["w20"]


def test_only_the_records_of_the_keys_are_verified(tmp_path: Path) -> None:
    """Damage elsewhere does not count until it is asked for; what was compared is not read again."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.full((8,), 1.5), "b": torch.full((9,), 2.5)}, path)
    content = path.read_bytes()
    at = content.index(torch.full((9,), 2.5).numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.verify(["a"]) == Verified("crc32", 32)
        assert checkpoint.verify(["a"]) == Verified("crc32", 0)
        with pytest.raises(CheckpointCorruptError) as caught:
            checkpoint.verify()
    assert caught.value.key == "b"


def test_an_object_of_a_store_is_screened_and_read_like_a_file(tmp_path: Path) -> None:
    """By its bytes alone: verified, copied, and refused when it changes or becomes shorter."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(5.0)}, path)
    stored = InMemory(path.read_bytes())
    assert isinstance(stored, Storage)
    with open_checkpoint(stored) as checkpoint:
        assert checkpoint.verify().by == "crc32"
        target = torch.zeros(5)
        checkpoint.copy_into([("a", None, target)])
        assert target.tolist() == [0, 1, 2, 3, 4]
        assert checkpoint.mapped(["a"]) == {}
        assert str(checkpoint.path) == "memory:/weights"
        stored.version = "2"
        with pytest.raises(CheckpointCorruptError, match="was modified while it was in use"):
            checkpoint.copy_into([("a", None, target)])
    stored = InMemory(path.read_bytes())
    with open_checkpoint(stored) as checkpoint:
        stored.content = stored.content[:200]
        with pytest.raises(CheckpointCorruptError, match="ends at byte 200"):
            checkpoint.read("a")


def test_a_local_file_is_a_storage_too(tmp_path: Path) -> None:
    """The built-in store has the methods that a private one needs."""
    torch.save({"a": torch.arange(5.0)}, tmp_path / "a.pt")
    handle = open_file(tmp_path / "a.pt")
    assert isinstance(handle.storage, Storage)
    with open_checkpoint(handle.storage) as checkpoint:
        assert read_tensor(handle, checkpoint.tensors()["a"]).tolist() == [0, 1, 2, 3, 4]


def test_a_state_dict_without_tensors_is_a_tree(tmp_path: Path) -> None:
    """What lies beside it is metadata, as with any other state dict."""
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert (dict(checkpoint.tensors()), checkpoint.values(), checkpoint.metadata) == ({}, {}, {"epoch": 3})
        assert checkpoint.entries == {"state_dict": 0}


def test_digests_of_a_manifest_hold_whichever_tree_is_meant(tmp_path: Path) -> None:
    """They speak of the keys that the writer listed; a rank with no share of the bytes compares the header too."""
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"a": torch.ones(3)}, "ema": {"a": torch.zeros(3)}}, path)
    with open_checkpoint(path) as checkpoint:
        digest = f"xxh3_128:{xxhash.xxh3_128_hexdigest(torch.ones(3).numpy().tobytes())}"
        written = Written(
            dtype="float32",
            shape=(3,),
            digest=digest,
            values="finite",
        )
        digests = Digests(None, path.stat().st_size, checkpoint.digest_of_records, {"a": written})
    for entry in (None, "ema", "state_dict", ""):
        with open_checkpoint(path, entry=entry, digests=digests) as checkpoint:
            assert checkpoint.verify().by == "xxh3_128"
    with (
        open_checkpoint(path, digests=attrs.evolve(digests, tensors={"b": written})) as checkpoint,
        pytest.raises(CheckpointCorruptError, match="a, b differ from the manifest"),
    ):
        checkpoint.verify([])


def test_a_tree_that_is_not_selected_lists_its_tensors_only(tmp_path: Path) -> None:
    """Extra state of modules is no tensor, whichever tree it lies in."""
    average = {"weight": torch.ones(2), "head._extra_state": {"count": 1}}
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "average": average}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert list(reader.tensors("average")) == ["weight"]
    with open_checkpoint(tmp_path / "a.pt", entry="average") as reader:
        assert (list(reader.tensors()), reader.extra_state) == (["weight"], {"head._extra_state": {"count": 1}})


def test_a_file_with_another_digest_is_refused_each_time(tmp_path: Path) -> None:
    """The search for damaged keys, which finds none in another file, does not count as a comparison."""
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt", digests=f"sha256:{'0' * 64}") as reader:
        for _ in range(2):
            with pytest.raises(CheckpointCorruptError, match="expected sha256:000"):
                reader.verify()


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_closed_checkpoint_is_gone_with_its_last_name(tmp_path: Path, name: str) -> None:
    """No circle of references keeps a header of a hundred thousand tensors until the garbage is collected."""
    state = {"a": torch.ones(2)}
    if name.endswith(".pt"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    gc.collect()
    gc.disable()
    try:
        with open_checkpoint(tmp_path / name) as checkpoint:
            checkpoint.verify()
        gone = weakref.ref(checkpoint)
        del checkpoint
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_copy_in_another_process_opens_the_same_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It has a handle of its own, the tree and the digests of the original, and needs no working folder."""
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.arange(3.0), "b": torch.ones(2)}
    save_file(state, name) if name.endswith("safetensors") else torch.save({"ema": state, "n": 1}, name)
    entry = None if name.endswith("safetensors") else "ema"
    with open_checkpoint(name, entry=entry, digests=f"sha256:{0:064}") as reader:
        copies = [copy.copy(reader), copy.deepcopy(reader)]
        (other,) = in_new_process(_read_in_process, reader, tmp_path.parent)
    assert other == [[0.0, 1.0, 2.0], [1.0, 1.0]]
    for one in copies:
        assert list(one.tensors()) == ["a", "b"]
        assert torch.equal(one.read("a"), state["a"])
        with pytest.raises(CheckpointCorruptError):
            one.verify()
        one.close()
    with pytest.raises(CheckpointError, match="is closed"):
        pickle.dumps(reader)


def _read_in_process(reader: Any, folder: Path) -> list[list[float]]:
    os.chdir(folder)
    with reader:
        return [reader.read(key).tolist() for key in reader.tensors()]


def in_new_process(function: Any, *arguments: Any) -> list[Any]:
    """What a function of this module returns in a process that shares nothing with this one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return [pool.apply_async(function, arguments).get(timeout=300)]


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_copy_of_a_file_that_was_written_again_is_refused(tmp_path: Path, name: str) -> None:
    """Other bytes under the same name are not the checkpoint that was opened; a moved copy of the same bytes is."""
    path, save = tmp_path / name, torch.save if name.endswith("pt") else save_file
    save({"a": torch.zeros(3)}, path)
    with open_checkpoint(path) as reader:
        text = pickle.dumps(reader)
    content = path.read_bytes()
    path.unlink()
    save({"a": torch.ones(3)}, path)
    with pytest.raises(CheckpointCorruptError, match="it was written again since"):
        pickle.loads(text)
    path.write_bytes(content)
    if name.endswith("pt"):  # its checksums prove that the bytes are the same
        with pickle.loads(text) as again:
            assert again.read("a").tolist() == [0.0] * 3
    else:
        with pytest.raises(CheckpointCorruptError, match="it was written again since"):
            pickle.loads(text)


def test_a_folder_that_is_not_there_is_told_with_near_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is shown with the folder that it starts at; near files come first."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoints/first").mkdir(parents=True)
    for name in ("a.pt", "b.pt", "weights.pt"):
        Path(f"checkpoints/{name}").touch()
    there = re.escape(str(tmp_path))
    for path, said in (
        ("chekpoints/w.pt", rf"w\.pt does not exist: folder chekpoints does not exist in {there}\. Near: checkpoints$"),
        ("checkpoints/frist/x/w.pt", r"folder checkpoints/frist does not exist in .*\. Near: checkpoints/first$"),
        (tmp_path / "quite" / "other.pt", rf"folder {there}/quite does not exist in {there}$"),
        ("checkpoints/weight.pt", r"does not exist\. Found in checkpoints: weights\.pt, a\.pt, b\.pt$"),
    ):
        with pytest.raises(CheckpointNotFoundError, match=said):
            open_checkpoint(path)
