"""Everything that must never go wrong, as one table: what is tried, through which entry, and what it must get.

The numbers are those of the requirements, one paragraph of this file each:

 1 a pickle that calls os.system          12 files of different iterations       22 a plugin that cannot be used
 2 an unsupported global                  13 a safetensors header that lies      23 tags, unknown keys, wrong types
 3 a small file that asks for gigabytes   16 names that are no names             24 NaN, infinities, lossy casts
 4 nested tuples as keys                  17 linked folders                      25 two sources for one target
 5 deflated and oversized records         18 FIFO, device, folder                26 a pattern that backtracks
 6 duplicate entries                      19 a run that does not exist           27 a file replaced after the check
 7 a storage that is too small            20 a kind that is an import path       28 a failing initialization
 8 tensors of other kinds                 21 two distributions, one kind         29 tied weights
 9 truncation, 10 a flipped bit, 11 a set without manifest                       30 a save that fails

Later, because what they are about does not exist yet: 14 and 15 (indexes and shards of checkpoints in several files;
the index itself is refused, below), 31 (folders of torch.distributed.checkpoint), the ``transforms`` half of 25, and
regular expressions in rules (26; the patterns that exist are plain texts, which is shown). What 3, 4 and 5 may cost is
measured in ``test_cost_of_hostile_files``.

Every refusal is held to the same: the class of the error, what it says, that nothing ran, that the model, its
optimizer and the trainer are what they were, and that nothing on disk was created, changed or removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch
from support.counting import LineCounter
from support.foreign import INITIALIZER, ForeignPackages
from support.handmade import write_pickle, write_safetensors
from support.hostile import FILES, Payload
from support.world import FIRST, INPUTS, OUTPUTS, SECOND, Trainer, World, new_model

from noether_init_core import (
    AmbiguousCheckpointError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    CheckpointWriter,
    ConfigError,
    InitializerStack,
    InvalidNameError,
    KindConflictError,
    KindContractError,
    KindImportError,
    PartlyInitializedError,
    PathProvider,
    PlanError,
    StateMismatchError,
    TornSetError,
    TrainingIteration,
    UnknownKindError,
    bind,
    kinds,
    open_checkpoint,
)
from noether_init_core.files.storage.disk import FileSystem


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: ForeignPackages) -> World:
    return World(tmp_path, monkeypatch, foreign)


Action = Callable[[], object]
Refusal = tuple[int, type[Exception], str]
#: What is prepared, and returns what is tried; the number of the requirement, the error and what it says.
TABLE: dict[str, tuple[Callable[[World], Action], Refusal]] = {}


def refused(row: int, error: type[Exception], says: str) -> Callable[[Callable[[World], Action]], None]:
    """Put a row into the table. The function prepares; what it returns is tried and must be refused."""

    def add(prepare: Callable[[World], Action]) -> None:
        title = f"{row:02}-{prepare.__name__}"
        assert title not in TABLE
        TABLE[title] = prepare, (row, error, says)

    return add


# 1 to 8: files of torch.save. Each is tried through every entry that opens such a file.


def by_open_checkpoint(world: World, write: Callable[[Path], object]) -> Action:
    write(world.folder / "a.th")
    return lambda: open_checkpoint(world.folder / "a.th")


def by_file(world: World, write: Callable[[Path], object]) -> Action:
    write(world.folder / "a.th")
    return lambda: world.file(world.folder / "a.th")


def by_previous_run(world: World, write: Callable[[Path], object]) -> Action:
    write(world.legacy() / "net_cp=latest_model.th")
    return lambda: world.previous_run()


def by_optimizer(world: World, write: Callable[[Path], object]) -> Action:
    write(world.legacy() / "net_cp=latest_optim.th")
    return lambda: world.resume()


def by_trainer(world: World, write: Callable[[Path], object]) -> Action:
    write(world.legacy() / "net_cp=latest_trainer.th")
    return lambda: world.resume()


ENTRIES = [by_open_checkpoint, by_file, by_previous_run, by_optimizer, by_trainer]


def hold(world: World, attempt: Action, error: type[Exception], says: str) -> Exception:
    """The attempt is refused with this error, and nothing but the error comes of it."""
    state, disk = world.state(), world.disk()
    world.monkeypatch.chdir(world.folder)
    with pytest.raises(error, match=says) as caught:
        attempt()
    assert world.state() == state
    assert world.disk() == disk
    assert not world.marker.exists()
    return caught.value


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("title", FILES, ids=lambda title: f"{FILES[title][0]:02}-{title.replace(' ', '_')}")
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_file_is_refused_through_every_entry(world: World, title: str, entry: Any) -> None:
    """Weights, optimizer and trainer files go through one reader, whoever opens them."""
    _row, write, error, says = FILES[title]
    hold(world, entry(world, write), error, says)


@refused(4, CheckpointFormatError, "stores a part under the number 1000000, far beyond")
def numbers_of_parts_that_anybody_chose(world: World) -> Action:
    path = write_pickle(world.folder / "a.th", b"Nr\x40\x42\x0f\x00")
    return lambda: open_checkpoint(path)


# 9 to 12: sets


@refused(9, CheckpointCorruptError, f"has 300 bytes; .*{FIRST}")
def truncated_weights(world: World) -> Action:
    truncate(world.file_of("model"), 300)
    return lambda: world.previous_run()


@refused(9, CheckpointCorruptError, f"has 0 bytes; .*{FIRST}")
def empty_optimizer(world: World) -> Action:
    truncate(world.file_of("optim"), 0)
    return lambda: world.resume()


@refused(9, CheckpointCorruptError, f"has 300 bytes; .*{FIRST}")
def truncated_trainer(world: World) -> Action:
    truncate(world.file_of("trainer"), 300)
    return lambda: world.resume()


@refused(9, CheckpointFormatError, "truncated")
def truncated_file(world: World) -> Action:
    shutil.copyfile(world.file_of("model"), world.folder / "a.th")
    truncate(world.folder / "a.th", 300)
    return lambda: world.file(world.folder / "a.th")


def truncate(path: Path, length: int) -> None:
    os.chmod(path, 0o644)
    os.truncate(path, length)


def flip(path: Path, content: bytes) -> None:
    """Change one bit of the only place of the file that has this content."""
    os.chmod(path, 0o644)
    raw = bytearray(path.read_bytes())
    assert raw.count(content) == 1
    raw[raw.index(content)] ^= 1
    path.write_bytes(raw)


def bytes_of(value: torch.Tensor) -> bytes:
    return bytes(value.detach().numpy().tobytes())


@refused(10, CheckpointCorruptError, r"net_cp=E2_U20_S200_model\.th.*weight")
def flipped_bit_in_a_set(world: World) -> Action:
    flip(world.file_of("model"), bytes_of(world.good["weight"]))
    return lambda: world.previous_run()


@refused(10, CheckpointCorruptError, r"net_cp=latest_model\.th.*weight")
def flipped_bit_in_a_file_of_noether(world: World) -> Action:
    flip(world.legacy() / "net_cp=latest_model.th", bytes_of(world.good["weight"]))
    return lambda: world.previous_run()


@refused(10, CheckpointCorruptError, r"a\.th.*bias")
def flipped_bit_in_a_file(world: World) -> Action:
    shutil.copyfile(world.file_of("model"), world.folder / "a.th")
    flip(world.folder / "a.th", bytes_of(world.good["bias"]))
    return lambda: world.file(world.folder / "a.th")


@refused(10, CheckpointCorruptError, r"net_cp=E2_U20_S200_optim\.th")
def flipped_bit_in_the_optimizer(world: World) -> Action:
    with open_checkpoint(world.file_of("optim")) as reader:
        moments = [reader.read(key) for key, info in reader.tensors().items() if info.shape == (OUTPUTS, INPUTS)]
    flip(world.file_of("optim"), bytes_of(moments[0]))
    return lambda: world.resume()


@refused(10, CheckpointCorruptError, "expected xxh3_128|expected sha256")
def flipped_bit_in_safetensors_with_a_digest(world: World) -> Action:
    path = world.folder / "a.safetensors"
    safetensors.torch.save_file(world.good, path)
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    flip(path, bytes_of(world.good["weight"]))
    return lambda: world.file(path, digest=digest)


@refused(11, CheckpointNotFoundError, f"(?s){SECOND}.*(interrupted|uncommitted)")
def uncommitted_set_by_its_tag(world: World) -> Action:
    (world.set_folder() / "manifest.json").unlink()
    return lambda: world.previous_run(checkpoint_tag=str(SECOND))


@refused(11, AmbiguousCheckpointError, f"(?s)({FIRST}.*latest|latest.*{FIRST})")
def later_flat_files_beside_committed_sets(world: World) -> Action:
    for part in ("model", "optim", "trainer"):
        shutil.copyfile(world.file_of(part), world.paths.checkpoint_path / f"net_cp=latest_{part}.th")
    shutil.rmtree(world.set_folder())
    return lambda: world.previous_run()


@refused(12, TornSetError, f"(?s){FIRST}.*{SECOND}|{SECOND}.*{FIRST}")
def trainer_of_another_iteration(world: World) -> Action:
    older = world.file_of("trainer", FIRST).read_bytes()
    (world.legacy() / "net_cp=latest_trainer.th").write_bytes(older)
    return lambda: world.resume()


@refused(12, TornSetError, f"(?s){FIRST}.*{SECOND}|{SECOND}.*{FIRST}")
def optimizer_of_another_iteration(world: World) -> Action:
    older = world.file_of("optim", FIRST).read_bytes()
    (world.legacy() / "net_cp=latest_optim.th").write_bytes(older)
    return lambda: world.resume()


@refused(12, TornSetError, r"net_cp=E2_U20_S200_trainer\.th: E1_U10_S100")
def trainer_of_another_set_in_a_committed_one(world: World) -> Action:
    path = world.file_of("trainer")
    os.chmod(path, 0o644)
    path.write_bytes(world.file_of("trainer", FIRST).read_bytes())
    return lambda: world.resume()


# 13: safetensors, and what other formats there are


def entry(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[Any, int, int | None, str]] = {
    "huge header": ({"weight": entry(0, 8)}, 8, 1 << 40, "1099511627776 bytes, more than"),
    "overlap": ({"bias": entry(0, 8), "weight": entry(4, 12)}, 12, None, '"weight" overlap'),
    "hole": ({"bias": entry(0, 8), "weight": entry(12, 16)}, 16, None, '4 bytes before "weight"'),
    "trailing bytes": ({"weight": entry(0, 8)}, 24, None, "16 bytes after"),
    "duplicate keys": (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), 4, None, '"a" twice'),
    "gigabytes": ({"weight": entry(0, 1 << 33)}, 8, None, "truncated"),
}


@pytest.mark.parametrize("by", ["open_checkpoint", "file"])
@pytest.mark.parametrize("title", HEADERS, ids=lambda title: f"13-{title.replace(' ', '_')}")
def test_hostile_safetensors_are_refused(world: World, title: str, by: str) -> None:
    """The header is held against itself and against the size of the file."""
    header, size, length, says = HEADERS[title]
    path = write_safetensors(world.folder / "a.safetensors", header, bytes(size), length=length)
    attempt: Action = (lambda: world.file(path)) if by == "file" else (lambda: open_checkpoint(path))
    hold(world, attempt, CheckpointFormatError, says)


def legacy_format(path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def torchscript(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def shard_index(path: Path) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"weight": "../../x.safetensors"}}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("write", "says"),
    [
        (legacy_format, r"before torch 1\.6.*Next, with torch >= 1\.6: .*torch\.save\(torch\.load\("),
        (lambda path: path.write_bytes(pickle.dumps(Payload())), "plain pickle"),
        (torchscript, r"TorchScript archive, which holds code.*torch\.jit\.load"),
        (shard_index, "index of a sharded checkpoint"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(bytes(4096)), "zeros"),
    ],
    ids=["legacy", "pickle", "torchscript", "shard_index", "empty", "zeros"],
)
def test_other_formats_are_told_what_they_are(world: World, write: Any, says: str) -> None:
    """Through the kind: what it is, and where there is one, the call that makes a readable file of it."""
    write(world.folder / "a.th")
    hold(world, lambda: world.file(world.folder / "a.th"), CheckpointFormatError, says)


# 16: names

BAD_NAMES = ["../x", "..", "a/b", "/etc", "a\\b", "a\0b", "C:x", "x" * 300, ".hidden", "", " x", "a\nb"]
NAMED = {
    "run_id": lambda world, value: world.previous_run(run_id=value),
    "stage_name": lambda world, value: world.previous_run(stage_name=value),
    "checkpoint_tag": lambda world, value: world.previous_run(checkpoint_tag=value),
    "model_name": lambda world, value: world.previous_run(model_name=value),
    "model_info": lambda world, value: world.previous_run(model_info=value),
    "run_id of the paths": lambda world, value: PathProvider(world.folder / "out", value),
    "stage_name of the paths": lambda world, value: PathProvider(world.folder / "out", "run", value),
    "tag of a save": lambda world, value: CheckpointWriter(world.paths).save(world.model, SECOND, tags=[value]),
    "name of a model that is saved": lambda world, value: CheckpointWriter(world.paths).save(
        bind(torch.nn.Linear(1, 1), name=value), SECOND
    ),
    "info of averages": lambda world, value: CheckpointWriter(world.paths).save(
        world.model, SECOND, averages={value: {}}
    ),
}


@pytest.mark.parametrize("value", BAD_NAMES, ids=[f"16-{ascii(value)[:12]}" for value in BAD_NAMES])
@pytest.mark.parametrize("field", NAMED)
def test_names_that_would_leave_their_folder_are_refused(world: World, field: str, value: str) -> None:
    """Before any path is built of them, in configs, paths and saves alike."""
    error = hold(world, lambda: NAMED[field](world, value), ConfigError, "it must be a single folder or file name")
    assert isinstance(error, InvalidNameError) is (" of " in field)  # of a config there may be more errors than one


def test_a_tag_inside_a_file_of_config_is_refused_with_its_line(world: World) -> None:
    """The error of the name keeps the place in the file."""
    path = world.folder / "init.yaml"
    path.write_text("initializers:\n  - kind: previous_run\n    run_id: ../source\n")
    hold(
        world,
        lambda: InitializerStack.from_file(path, path_provider=world.paths),
        ConfigError,
        r"init\.yaml:3 .*run_id",
    )


# 17: links


@pytest.mark.parametrize("level", ["out", "out/source", "out/source/checkpoints", "out/source/checkpoints/sets"])
def test_linked_folders_work(world: World, level: str) -> None:
    """17: runs on a scratch disk are linked to; the root is resolved first."""
    place = world.folder / level
    moved = world.folder / "scratch"
    place.rename(moved)
    place.symlink_to(moved, target_is_directory=True)
    world.resume()
    assert torch.equal(world.model.state_dict()["weight"], world.good["weight"])


@refused(17, CheckpointCorruptError, r"net_cp=E2_U20_S200_model\.th is a link out of its folder")
def file_of_a_set_that_is_a_link_to_elsewhere(world: World) -> Action:
    shutil.move(world.file_of("model"), world.folder / "elsewhere.th")
    world.file_of("model").symlink_to(world.folder / "elsewhere.th")
    return lambda: world.previous_run()


# 18: things that are no files


@refused(18, CheckpointFormatError, "is a FIFO")
def fifo(world: World) -> Action:
    os.mkfifo(world.folder / "a.th")
    return lambda: world.file(world.folder / "a.th")


@refused(18, CheckpointFormatError, "is a device")
def device(world: World) -> Action:
    return lambda: world.file(Path("/dev/zero"))


@refused(18, CheckpointFormatError, "is a folder")
def folder(world: World) -> Action:
    return lambda: world.file(world.folder / "out")


@refused(18, CheckpointError, "(?s)net_cp=latest_model.th")
def fifo_with_the_name_of_a_checkpoint(world: World) -> Action:
    path = world.legacy() / "net_cp=latest_model.th"
    path.unlink()
    os.mkfifo(path)
    return lambda: world.previous_run()


@refused(18, CheckpointError, "manifest.json")
def fifo_with_the_name_of_a_manifest(world: World) -> Action:
    path = world.set_folder() / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    return lambda: world.previous_run()


@refused(18, ConfigError, "(?s)init.yaml")
def fifo_for_a_config(world: World) -> Action:
    os.mkfifo(world.folder / "init.yaml")
    return lambda: InitializerStack.from_file(world.folder / "init.yaml", path_provider=world.paths)


# 19: what does not exist


@refused(19, CheckpointNotFoundError, 'run "sauce" not found .*Near: source')
def missing_run(world: World) -> Action:
    return lambda: world.previous_run(run_id="sauce")


@refused(19, CheckpointNotFoundError, "no stage|does not exist|no checkpoints")
def missing_stage(world: World) -> Action:
    return lambda: world.previous_run(stage_name="train")


@refused(19, CheckpointNotFoundError, f"(?s)E9_U9_S9.*{SECOND}")
def missing_tag(world: World) -> Action:
    return lambda: world.previous_run(checkpoint_tag="E9_U9_S9")


@refused(19, CheckpointNotFoundError, "(?s)has no .*net")
def missing_model(world: World) -> Action:
    return lambda: world.previous_run(model_name="other")


@refused(19, CheckpointNotFoundError, "output root .* does not exist")
def missing_output_root(world: World) -> Action:
    return lambda: world.previous_run(output_path=str(world.folder / "nowhere"))


@refused(19, CheckpointNotFoundError, r"b\.th does not exist\. Found in .*: a\.th")
def missing_file(world: World) -> Action:
    shutil.copyfile(world.file_of("model"), world.folder / "a.th")
    return lambda: world.file(world.folder / "b.th")


# 20 to 22: kinds

DOTTED = [
    "os.system",
    "logging.os.system",
    "builtins.eval",
    "antigravity.fly",
    "noether_init_core.stack.stack.InitializerStack",
]


@pytest.mark.parametrize("kind", DOTTED, ids=[f"20-{kind}" for kind in DOTTED])
def test_a_dotted_kind_is_unknown_and_nothing_is_imported(world: World, kind: str) -> None:
    """A kind is a registered name, never a path to import."""
    assert "antigravity" not in sys.modules
    hold(world, lambda: world.start({"kind": kind, "path": "touch ran"}), UnknownKindError, f'no kind "{kind}"')
    assert "antigravity" not in sys.modules


def writes(world: World) -> str:
    """A module that leaves a mark when it is imported."""
    return f"open({str(world.marker)!r}, 'w').close()\n{INITIALIZER}"


@refused(21, KindConflictError, r"(?s)acme-init 1\.0.*other-init 2\.0")
def two_distributions_for_one_kind(world: World) -> Action:
    target = "acme:ConstantInitializer"
    world.foreign.install("acme-init", offers={"constant": target}, modules={"acme": writes(world)})
    world.foreign.install("other-init", offers={"constant": target}, version="2.0", site="other")
    return lambda: world.start({"kind": "constant"})


@refused(22, KindImportError, "(?s)broken.*acme-init")
def plugin_that_raises_on_import(world: World) -> Action:
    world.foreign.install("acme-init", offers={"broken": "acme_broken:K"}, modules={"acme_broken": "1 / 0"})
    return lambda: world.start({"kind": "broken"})


@refused(22, KindContractError, "(?s)path.*InitializerBase")
def plugin_that_is_no_initializer(world: World) -> Action:
    world.foreign.install("acme-init", offers={"path": "pathlib:Path"})
    return lambda: world.start({"kind": "path"})


def test_a_broken_plugin_keeps_its_traceback_and_hurts_no_other(world: World) -> None:
    """22: the plugin's own exception is the cause; every other kind goes on working beside it."""
    world.foreign.install("acme-init", offers={"broken": "acme_broken:K"}, modules={"acme_broken": "1 / 0"})
    with pytest.raises(KindImportError) as caught:
        world.start({"kind": "broken"})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert {"broken", "previous_run"} <= {info.name for info in kinds.installed()}
    world.previous_run()
    assert torch.equal(world.model.state_dict()["weight"], world.good["weight"])


# 23: configs

CONFIGS: dict[str, tuple[str, str]] = {
    "tag that builds an object": (
        "initializers:\n  - kind: !!python/object/apply:os.system ['touch ran']\n",
        r"init\.yaml:2 .*(tag|python)",
    ),
    "tag on the whole": ("!!python/object/new:os.system [touch ran]\n", r"init\.yaml:1"),
    "unknown key": (
        "initializers:\n  - kind: previous_run\n    run_id: source\n    runid: source\n",
        r"init\.yaml:4 initializers\.0\.runid",
    ),
    "unknown key at the root": ("initialisers: []\n", r"init\.yaml:1.*initialisers"),
    "wrong type": (
        "initializers:\n  - kind: previous_run\n    run_id: source\n    load_optim: [1]\n",
        r"init\.yaml:4 initializers\.0\.load_optim",
    ),
    "wrong choice": (
        "initializers:\n  - kind: previous_run\n    run_id: source\n    verify: off\n",
        r"init\.yaml:4 initializers\.0\.verify",
    ),
    "key twice": ("initializers:\n  - kind: file\n    path: a\n    path: b\n", r"init\.yaml:4 .*path"),
    "no YAML": ("initializers: [\n", r"init\.yaml:\d"),
    "kind that is a path": ("initializers:\n  - kind: os.system\n", r"init\.yaml:2 initializers\.0\.kind"),
    "billion laughs": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True))
        + "initializers: *i\n",
        "init.yaml",
    ),
}


@pytest.mark.parametrize("title", CONFIGS, ids=lambda title: f"23-{title.replace(' ', '_')}")
def test_hostile_configs_are_refused_with_line_and_path_of_the_key(world: World, title: str) -> None:
    """YAML is read as text and structure; no tag is ever followed."""
    text, says = CONFIGS[title]
    path = world.folder / "init.yaml"
    path.write_text(text)
    with LineCounter() as lines:
        hold(world, lambda: InitializerStack.from_file(path, path_provider=world.paths), ConfigError, says)
    assert lines.count < 5_000_000


@refused(23, ConfigError, "runid")
def unknown_key_from_python(world: World) -> Action:
    return lambda: world.previous_run(runid="source")


# 24: values


def values(world: World, **tensors: torch.Tensor) -> Path:
    """A file of the model's weights with some of them replaced."""
    path = world.folder / "values.th"
    torch.save({**world.good, **tensors}, path)
    return path


@refused(24, PlanError, "bias holds NaN")
def nan_in_a_parameter(world: World) -> Action:
    path = values(world, bias=torch.tensor([1.0, float("nan")]))
    return lambda: world.file(path)


@refused(24, PlanError, "bias holds infinities")
def infinity_in_a_parameter(world: World) -> Action:
    path = values(world, bias=torch.tensor([1.0, float("-inf")]))
    return lambda: world.file(path)


@refused(24, PlanError, "bias holds infinities|bias holds NaN")
def both_infinities_in_half_precision(world: World) -> Action:
    path = values(world, bias=torch.tensor([float("inf"), float("-inf")]).half())
    return lambda: world.file(path)


@refused(24, PlanError, "(?s)bias.*complex64")
def complex_to_real(world: World) -> Action:
    path = values(world, bias=torch.ones(OUTPUTS, dtype=torch.complex64))
    return lambda: world.file(path)


@refused(24, PlanError, "(?s)count.*float32.*int64")
def float_to_integer(world: World) -> Action:
    world.model.module.register_buffer("count", torch.tensor(3))
    path = values(world, count=torch.tensor(2.5))
    return lambda: world.file(path)


@refused(24, PlanError, "bias holds NaN")
def nan_in_safetensors(world: World) -> Action:
    path = world.folder / "values.safetensors"
    safetensors.torch.save_file({**world.good, "bias": torch.full((OUTPUTS,), float("nan"))}, path)
    return lambda: world.file(path)


def test_infinities_in_buffers_are_loaded(world: World) -> None:
    """24: masks hold infinities."""
    world.model.module.register_buffer("mask", torch.zeros(2))
    world.file(values(world, mask=torch.tensor([0.0, float("-inf")])))
    assert world.model.module.mask.tolist() == [0.0, float("-inf")]


def test_the_config_can_allow_what_is_refused(world: World) -> None:
    """24: unless the config says otherwise."""
    world.file(values(world, bias=torch.tensor([1.0, float("nan")])), on_nonfinite="ignore")
    assert torch.isnan(world.model.module.bias[1])
    world.model.module.register_buffer("count", torch.tensor(3))
    world.file(values(world, count=torch.tensor(2.0)), cast="any")
    assert world.model.module.count.item() == 2


# 25 and 26: rules


def test_two_sources_for_one_target_are_visible_in_plan_and_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """25: Noether's four fields let the later one win; the plan and the log name both."""
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    paths = PathProvider(world.folder / "out", "double")
    CheckpointWriter(paths, flat_names=False).save(bind(source, name="net"), SECOND)
    target = bind(torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)}), name="net")
    config = {"kind": "previous_run", "run_id": "double", "patterns_to_rename": [{"src": "a.", "dst": "b."}]}
    stack = InitializerStack.from_config([config], path_provider=world.paths.with_run("new"))
    caplog.set_level(logging.WARNING)
    plan = stack.plan(target)
    stack.initialize(target)
    for said in ([warning.message for warning in plan.warnings], caplog.messages):
        assert any("a.weight" in message and "both become b.weight" in message for message in said)


def test_a_pattern_is_a_text_and_cannot_backtrack(world: World) -> None:
    """26: what would take a backtracking engine years matches nothing at once, and the log says so."""
    module = torch.nn.ModuleDict({"a" * 60: torch.nn.Linear(1, 1)})
    CheckpointWriter(PathProvider(world.folder / "out", "long")).save(bind(module, name="net"), SECOND)
    config = {"kind": "previous_run", "run_id": "long", "patterns_to_remove": ["(a+)+$", "(a|aa)*b"]}
    stack = InitializerStack.from_config([config], path_provider=world.paths.with_run("new"))
    plan = stack.plan(bind(module, name="net"))
    assert [row.action for row in plan.rows] == ["load", "load"]


# 27 to 29: between check and end


@pytest.mark.parametrize("suffix", ["th", "safetensors"])
def test_a_file_replaced_after_the_check_does_not_count(world: World, suffix: str) -> None:
    """27: what was checked is what is loaded, through one open handle."""
    path, other = world.folder / f"a.{suffix}", world.folder / "other"
    save: Any = torch.save if suffix == "th" else safetensors.torch.save_file
    save(world.good, path)
    save({key: torch.full_like(value, float("nan")) for key, value in world.good.items()}, other)
    initializer = kinds.create({"kind": "file", "path": str(path)})
    with initializer.in_session():
        initializer.check(world.model)
        os.replace(other, path)
        initializer.init_weights(world.model)
    assert torch.equal(world.model.state_dict()["weight"], world.good["weight"])


@refused(28, PlanError, r"(?s)weight.*bias")
def shapes_that_do_not_fit(world: World) -> Action:
    path = values(world, weight=torch.ones(9, 9), bias=torch.ones(9))
    return lambda: world.file(path)


@refused(28, StateMismatchError, "(?s)exp_avg|optimizer|param")
def optimizer_that_does_not_fit(world: World) -> Action:
    world.model.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    return lambda: world.resume()


@refused(28, StateMismatchError, "(?s)steps|SGD|momentum|AdamW")
def optimizer_of_another_class(world: World) -> Action:
    world.model = bind(world.model.module, name="net", optimizer=torch.optim.SGD(world.model.module.parameters(), lr=1))
    return lambda: world.resume()


@refused(28, PartlyInitializedError, "trainer")
def trainer_that_raises(world: World) -> Action:
    class Stubborn(Trainer):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            if state["number"]:
                self.number = -1
                raise RuntimeError("the trainer cannot load this")
            super().load_state_dict(state)

    world.trainer = Stubborn()
    return lambda: world.resume()


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.last = torch.nn.Linear(2, 2, bias=False)
        self.last.weight = self.first.weight


@pytest.mark.parametrize("suffix", ["th", "safetensors"])
def test_tied_weights(world: World, suffix: str) -> None:
    """29: one stored name is enough; two that differ are refused."""
    path = world.folder / f"a.{suffix}"
    save: Any = torch.save if suffix == "th" else safetensors.torch.save_file
    module = Tied()
    world.model = bind(module, name="net", optimizer=torch.optim.AdamW(module.parameters()))
    save({"first.weight": torch.ones(2, 2), "last.weight": torch.zeros(2, 2)}, path)
    hold(world, lambda: world.file(path), PlanError, "differ in the file but are one tensor")
    save({"last.weight": torch.ones(2, 2)}, path)
    world.file(path)
    assert module.first.weight is module.last.weight
    assert torch.equal(module.first.weight, torch.ones(2, 2))


# 30: saves


class FailingStorage(FileSystem):
    """A disk that fails at one kind of operation."""

    def __init__(self, operation: str, number: int) -> None:
        self.operation = operation
        self.number = number

    def _fail(self, operation: str, path: Path) -> None:
        if operation == self.operation:
            raise OSError(self.number, os.strerror(self.number), str(path))

    def open_write(self, path: Path) -> BinaryIO:
        self._fail("open_write", path)
        return super().open_write(path)

    def make_folder(self, folder: Path) -> None:
        self._fail("make_folder", folder)
        super().make_folder(folder)

    def fsync(self, file: BinaryIO) -> None:
        self._fail("fsync", Path(file.name))
        super().fsync(file)

    def rename(self, source: Path, target: Path) -> None:
        self._fail("rename", target)
        super().rename(source, target)


@pytest.mark.parametrize(
    ("operation", "number"),
    [
        ("open_write", errno.ENOSPC),
        ("open_write", errno.EROFS),
        ("make_folder", errno.EACCES),
        ("fsync", errno.EIO),
        ("fsync", errno.ENOSPC),
        ("rename", errno.EIO),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else f"30-{value}",
)
def test_a_save_that_fails_leaves_the_set_before_it(world: World, operation: str, number: int) -> None:
    """Disk full, I/O error, read-only folder: the error names the path, and the previous set is the one that loads."""
    writer = CheckpointWriter(world.paths, storage=FailingStorage(operation, number))
    with pytest.raises(CheckpointWriteError, match=os.strerror(number)) as caught:
        writer.save(world.model, TrainingIteration(3, 30, 300), trainer=world.trainer)
    assert str(world.paths.checkpoint_path) in str(caught.value)
    report = world.resume()
    assert report.start == SECOND
    assert torch.equal(world.model.state_dict()["weight"], world.good["weight"])
    assert world.trainer.number == 8


# The table


@pytest.mark.parametrize("title", TABLE)
def test_hostile_input_is_refused(world: World, title: str) -> None:
    """Each row of the table: refused as it says, and nothing else happened."""
    prepare, (_row, error, says) = TABLE[title]
    hold(world, prepare(world), error, says)


def test_the_run_that_the_table_damages_is_good_before(world: World) -> None:
    """What is refused is refused for the damage: without it, every entry loads."""
    report = world.resume()
    assert report.start == SECOND
    assert world.trainer.number == 8
    for load in (world.previous_run, lambda: world.file(world.file_of("model"))):
        world.model = new_model(3)
        load()
        assert torch.equal(world.model.state_dict()["weight"], world.good["weight"])
    world.legacy()
    world.model = new_model(4)
    world.resume()
    assert torch.equal(world.model.state_dict()["weight"], world.good["weight"])
