"""Saving with a probe: what is in the set, that it is bound to the manifest, and that nothing else is another one."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from support.handmade import write_pickle

from noether_init_core import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    CheckpointWriter,
    ConfigError,
    PathProvider,
    TrainingIteration,
    UnsafeGlobalError,
    bind,
    compose,
    open_checkpoint,
)
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.probe.probe import repeat
from noether_init_core.saving.file_writing import read_probe
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.health import verify_run
from noether_init_core.sets.manifest import PROBE_NAME, read_manifest, sealed
from noether_init_core.sets.selection import find_set
from noether_init_core.sets.snapshot import Snapshot

BATCH = {"input": torch.arange(6.0).reshape(2, 3)}


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return bind(torch.nn.Linear(3, 2), name="net")


def at(epoch: int) -> TrainingIteration:
    return TrainingIteration(epoch, epoch, epoch)


def newest(paths: PathProvider) -> Any:
    """As another process finds it."""
    return find_set(Snapshot(paths), "latest").found


def test_the_probe_is_read_again_and_holds(paths: PathProvider) -> None:
    """Batch, outputs, names and device come back; the same weights make the same bits of it."""
    CheckpointWriter(paths).save(model(), at(1), probe=BATCH)
    probe = read_probe(newest(paths))
    assert probe is not None
    assert (probe.model, probe.models, probe.device, probe.dtype) == ("net", ("net",), "cpu", "float32")
    assert torch.equal(probe.batch["input"], BATCH["input"])
    assert [(one.path, one.shape) for one in probe.outputs] == [("output", (2, 2))]
    assert repeat(model(), probe) == probe.outputs
    assert repeat(model(1), probe) != probe.outputs


def test_a_save_without_a_probe_is_as_before(paths: PathProvider) -> None:
    """The same files, and a manifest without it."""
    saved = CheckpointWriter(paths).save(model(), at(1))
    assert sorted(path.name for path in saved.folder.iterdir()) == [
        "digests.json",
        "manifest.json",
        "net_cp=E1_U1_S1_model.th",
        "net_cp=E1_U1_S1_trainer.th",
    ]
    assert read_manifest(saved.folder / "manifest.json").probe is None
    assert read_probe(newest(paths)) is None


def test_a_probe_changes_no_other_file(tmp_path: Path) -> None:
    """Weights and trainer state are the same bytes with it and without."""
    with_it, without = (
        CheckpointWriter(PathProvider(tmp_path / name, "run")).save(model(), at(1), probe=probe)
        for name, probe in (("a", BATCH), ("b", None))
    )
    assert with_it.manifest is not None
    assert without.manifest is not None
    assert with_it.manifest.files == without.manifest.files
    assert with_it.files[0].path.read_bytes() == without.files[0].path.read_bytes()


def test_the_manifest_vouches_for_it_and_noether_does_not_see_it(paths: PathProvider) -> None:
    """A digest of all its bytes; no file of weights has such a name, and no flat name is made of it."""
    saved = CheckpointWriter(paths).save(model(), at(1), probe=BATCH)
    digest = read_manifest(saved.folder / "manifest.json").probe
    with open_checkpoint(saved.folder / PROBE_NAME, digests=digest) as reader:
        assert reader.verify().by == "xxh3_128"
    assert parse(PROBE_NAME) is None
    assert [path.name for path in paths.checkpoint_path.iterdir() if "probe" in path.name] == []
    assert (saved.folder / PROBE_NAME).stat().st_mode & 0o222 == 0
    # plain data, so that the usual loader reads it too
    assert torch.load(saved.folder / PROBE_NAME, weights_only=True)["format"] == "noether-init-probe"


def test_a_manifest_of_an_earlier_release_has_none(paths: PathProvider) -> None:
    """Without the key it is a set like any other."""
    saved = CheckpointWriter(paths).save(model(), at(1))
    change_manifest(saved.folder, lambda manifest: manifest.pop("probe"))
    assert read_probe(newest(paths)) is None


def change_manifest(folder: Path, change: Any) -> None:
    """Written anew as our writer would, with the digest of itself."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("digest")
    change(manifest)
    path.write_bytes(sealed(json.dumps(manifest, indent=1).encode()))


def unlock(path: Path) -> Path:
    path.chmod(0o644)
    return path


def test_a_damaged_probe_is_refused_by_its_digest_and_noted_by_verify(paths: PathProvider) -> None:
    """Weights do not depend on it: the set is good, with a note."""
    saved = CheckpointWriter(paths).save(model(), at(1), probe=BATCH)
    assert verify_run(Snapshot(paths)).sets[0].notes == ()
    path = unlock(saved.folder / PROBE_NAME)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"probe\.th has the digest"):
        read_probe(newest(paths))
    (audited,) = verify_run(Snapshot(paths)).sets
    assert audited.state == "good"
    assert len(audited.notes) == 1
    assert audited.notes[0].startswith("its probe cannot be repeated: ")
    path.unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"probe\.th does not exist"):
        read_probe(newest(paths))
    assert len(verify_run(Snapshot(paths)).sets[0].notes) == 1


def test_a_probe_that_no_manifest_knows_is_noted(paths: PathProvider) -> None:
    """And never read."""
    saved = CheckpointWriter(paths).save(model(), at(1))
    (saved.folder / PROBE_NAME).write_bytes(b"hello")
    assert read_probe(newest(paths)) is None
    assert verify_run(Snapshot(paths)).sets[0].notes == ("probe.th is not in the manifest",)


def put(saved: Any, content: Any) -> None:
    """Another content in the place of the probe, with a manifest that vouches for it."""
    import xxhash

    path = unlock(saved.folder / PROBE_NAME)
    torch.save(content, path)
    vouch(saved, f"xxh3_128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}")


def vouch(saved: Any, digest: str) -> None:
    change_manifest(saved.folder, lambda manifest: manifest.update(probe=digest))


def test_a_hostile_probe_runs_nothing(paths: PathProvider, tmp_path: Path) -> None:
    """Though the manifest vouches for it: the reader calls nothing that a file names."""
    import xxhash

    saved = CheckpointWriter(paths).save(model(), at(1), probe=BATCH)
    marker = tmp_path / "ran"
    path = unlock(saved.folder / PROBE_NAME)
    path.unlink()
    write_pickle(path, f"cos\nsystem\n(Vtouch {marker}\ntR.".encode())
    vouch(saved, f"xxh3_128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}")
    with pytest.raises(UnsafeGlobalError, match=r"os\.system"):
        read_probe(newest(paths))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda content: content.update(format_version=2),
            "not a probe of this release: .*'format_version': 2}.* is not",
        ),
        (lambda content: content.update(format="other"), "not a probe of this release: .*'format': 'other'.* is not"),
        (
            lambda content: content["outputs"][0].update(values=[1.0]),
            r"is not a probe: outputs\.0\.values: .*of Tensor",
        ),
        (lambda content: content["outputs"][0].update(values=torch.zeros(5)), r"not a float32 tensor of shape \[4\]"),
        (lambda content: content["outputs"][0].update(dtype="int64"), r"not a int64 tensor of shape \[4\]"),
        (lambda content: content["outputs"][0].pop("values"), r"is not a probe: outputs\.0\.values"),
        (lambda content: content["outputs"][0].pop("digest"), r"is not a probe: outputs\.0\.digest"),
        (lambda content: content["outputs"][0].update(shape=[-1]), r"is not a probe: outputs\.0\.shape"),
        (lambda content: content.update(outputs=[]), "is not a probe: outputs: "),
        (lambda content: content["outputs"].append(content["outputs"][0]), "two outputs have the same path"),
        (
            lambda content: content.update(batch=[torch.float32]),
            r"is not a probe .*: batch\.0: a torch\.dtype",
        ),
    ],
)
def test_a_probe_of_another_form_is_refused(paths: PathProvider, change: Any, said: str) -> None:
    """Of a newer release, or made by somebody."""
    saved = CheckpointWriter(paths).save(model(), at(1), probe=BATCH)
    content = torch.load(saved.folder / PROBE_NAME, weights_only=True)
    change(content)
    put(saved, content)
    with pytest.raises(CheckpointFormatError, match=said):
        read_probe(newest(paths))


def test_keys_that_a_later_release_adds_are_no_error(paths: PathProvider) -> None:
    """In the file and in each output."""
    saved = CheckpointWriter(paths).save(model(), at(1), probe=BATCH)
    content = torch.load(saved.folder / PROBE_NAME, weights_only=True)
    content["more"] = content["outputs"][0]["more"] = 1
    put(saved, content)
    probe = read_probe(newest(paths))
    assert probe is not None
    assert repeat(model(), probe) == probe.outputs


@pytest.mark.parametrize(
    ("made", "probe"),
    [
        (model(), torch.zeros(2, 5)),
        (model(), object()),
        (bind(torch.nn.ModuleList([torch.nn.Linear(3, 2)]), name="net"), BATCH["input"]),
        (compose("pair", {"left": model()}), BATCH["input"]),
    ],
    ids=["shape", "object", "no forward", "composite"],
)
def test_a_probe_that_cannot_be_run_is_refused_before_anything_is_written(
    paths: PathProvider, made: Any, probe: Any
) -> None:
    """Not even a folder is there."""
    with pytest.raises((ConfigError, CheckpointFormatError)):
        CheckpointWriter(paths).save(made, at(1), probe=probe)
    assert list(paths.output_root.iterdir()) == []


class Failing(FileSystem):
    """A disk that takes everything but the probe."""

    def open_write(self, path: Path) -> BinaryIO:
        if path.name == PROBE_NAME:
            raise OSError(errno.EIO, "the disk failed", str(path))
        return super().open_write(path)


def test_a_disk_that_fails_at_the_probe_commits_nothing(paths: PathProvider) -> None:
    """The set from before is the newest one, and the next save clears up."""
    CheckpointWriter(paths).save(model(), at(1), probe=BATCH)
    with pytest.raises(CheckpointWriteError, match="the disk failed"):
        CheckpointWriter(paths, storage=Failing()).save(model(), at(2), probe=BATCH)
    assert newest(paths).name == "E1_U1_S1"
    CheckpointWriter(paths).save(model(), at(3), probe=BATCH)
    assert [path.name for path in sorted((paths.checkpoint_path / "sets").iterdir())] == [
        "00000001_E1_U1_S1",
        "00000002_E3_U3_S3",
    ]


def test_retention_removes_it_with_its_set(paths: PathProvider) -> None:
    """Nothing is left behind."""
    writer = CheckpointWriter(paths, keep_last=1)
    for epoch in range(1, 5):
        writer.save(model(epoch), at(epoch), probe=BATCH)
    sets = paths.checkpoint_path / "sets"
    assert len(list(sets.iterdir())) == 2
    assert len(list(sets.rglob(PROBE_NAME))) == 2


@pytest.mark.parametrize("is_full", [False, True])
def test_retention_removes_a_set_whose_probe_became_a_folder(paths: PathProvider, is_full: bool) -> None:
    """It keeps neither its own set nor others; what a link in it leads to stays."""
    elsewhere = paths.output_root / "elsewhere"
    elsewhere.mkdir(parents=True)
    (elsewhere / "kept").write_text("")
    writer = CheckpointWriter(paths, keep_last=1)
    saved = writer.save(model(), at(1), probe=BATCH)
    path = saved.folder / PROBE_NAME
    path.unlink()
    path.mkdir()
    if is_full:
        (path / "inner").mkdir()
        (path / "inner" / "file").write_text("")
        (path / "link").symlink_to(elsewhere)
    for epoch in range(2, 5):
        writer.save(model(epoch), at(epoch))
    sets = paths.checkpoint_path / "sets"
    assert [one.name for one in sorted(sets.iterdir())] == ["00000003_E3_U3_S3", "00000004_E4_U4_S4"]
    assert (elsewhere / "kept").exists()


def test_a_set_that_cannot_be_removed_does_not_keep_others(paths: PathProvider) -> None:
    """They go at once, and it goes when it can."""

    class Sticky(FileSystem):
        def remove_folder(self, folder: Path) -> None:
            if folder.name == "00000001_E1_U1_S1":
                raise OSError(errno.EBUSY, "it is in use", str(folder))
            super().remove_folder(folder)

    for epoch in range(1, 5):
        CheckpointWriter(paths).save(model(epoch), at(epoch))
    CheckpointWriter(paths, storage=Sticky(), keep_last=1).save(model(), at(5))
    sets = paths.checkpoint_path / "sets"
    left = sorted(one.name for one in sets.iterdir())
    assert left == ["00000001_E1_U1_S1", *left[1:]]
    assert "00000002_E2_U2_S2" not in left
    CheckpointWriter(paths, keep_last=1).save(model(), at(6))
    assert "00000001_E1_U1_S1" not in [one.name for one in sets.iterdir()]


class Training:
    """A small training with dropout, whose bits depend on every random number."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.module = torch.nn.Sequential(
            torch.nn.Linear(3, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 2)
        )
        self.optimizer = torch.optim.AdamW(self.module.parameters())

    def step(self) -> None:
        self.module(torch.randn(8, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_training_goes_on_with_the_same_bits(paths: PathProvider) -> None:
    """Saved with a probe after every step, a run ends as one that never saves."""
    ends = []
    for saves in (False, True):
        training = Training()
        for number in range(1, 5):
            training.step()
            if saves:
                bound = bind(training.module, "net", training.optimizer)
                CheckpointWriter(paths).save(bound, at(number), probe=BATCH)
        ends.append([tensor.clone() for tensor in training.module.state_dict().values()])
    assert all(map(torch.equal, *ends))
