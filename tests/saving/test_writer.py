"""Saving sets: what is in them, that they are all or nothing, and what Noether sees of them."""

from __future__ import annotations

import contextlib
import enum
import errno
import io
import json
import os
import shutil
import stat
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import pydantic
import pytest
import torch
import xxhash

from noether_init_core.errors import (
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointWriteError,
    ConfigError,
    InvalidNameError,
)
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import bind, compose
from noether_init_core.paths import PathProvider
from noether_init_core.saving.writer import CheckpointWriter
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need
from noether_init_core.sets.provenance import InitReport
from noether_init_core.sets.selection import find_set, newest_set
from noether_init_core.sets.snapshot import Snapshot

ONE, TWO, THREE, FOUR = (TrainingIteration(n, 10 * n, 100 * n) for n in (1, 2, 3, 4))
NAN, INF = float("nan"), float("inf")
ALL = [Need("mlp", "model"), Need("mlp", "optim"), Need("mlp", "trainer")]


class Net(torch.nn.Module):
    """Ties, a buffer and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.tied = torch.nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.register_buffer("scale", torch.linspace(0, 1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.tied(self.norm(self.first(x))) * self.scale
        return scaled


class Trainer:
    """The least trainer."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def trained(name: str = "mlp", module: torch.nn.Module | None = None) -> Any:
    """A bound network after one step of AdamW."""
    torch.manual_seed(0)
    module = Net() if module is None else module
    model = bind(module, name=name, optimizer=torch.optim.AdamW(module.parameters(), lr=0.1))
    model(torch.randn(8, 4)).square().sum().backward()
    model.optimizer.step()
    return model


def average_of(model: Any, value: float = 1.0) -> dict[str, torch.Tensor]:
    """An average of the weights in which every element has one value."""
    return {key: torch.full_like(tensor, value) for key, tensor in model.state_dict().items()}


def fill(model: Any, value: float) -> Any:
    """Give every parameter one recognisable value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def content(checkpoint_set: CheckpointSet, part: Any, model: str = "mlp", info: str | None = None) -> Any:
    file = checkpoint_set.file(model, part, info)
    assert file is not None
    return load(file.path)


def weight_of(checkpoint_set: CheckpointSet) -> float:
    value: float = content(checkpoint_set, "model")["state_dict"]["first.weight"][0, 0].item()
    return value


def digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    return PathProvider(tmp_path, "run", "train")


@pytest.fixture
def folder(paths: PathProvider) -> Path:
    return paths.checkpoint_path


@pytest.fixture
def writer(paths: PathProvider) -> CheckpointWriter:
    return CheckpointWriter(paths, flat_names=True)


# What is in a set.


def test_files_have_the_keys_of_noether(writer: CheckpointWriter, noether_runs: Path) -> None:
    """Model and optimizer files have Noether's keys in Noether's types, as torch itself reads them."""
    saved = writer.save(trained(), ONE)
    theirs = noether_runs / "mlp_train" / "train" / "checkpoints"
    model, optim, trainer = (content(saved, part) for part in ("model", "optim", "trainer"))
    real_model, real_optim = (load(theirs / f"mlp_cp=E1_U4_S32_{part}.th") for part in ("model", "optim"))
    assert set(model) == set(real_model) - {"model_config", "config_kind"}
    assert type(model["state_dict"]) is type(real_model["state_dict"]) is OrderedDict
    assert vars(model["state_dict"])["_metadata"]["norm"] == {"version": 2}
    assert (model["checkpoint_tag"], model["run_id"]) == ("E1_U10_S100", "run")
    assert model["training_iteration"] == {"epoch": 1, "update": 10, "sample": 100}
    said = {"training_iteration": {"epoch": 1, "update": 10, "sample": 100}, "run_id": "run"}
    assert optim.items() >= said.items()
    assert set(optim) == {*real_optim, "optimizer_class", *said}
    assert trainer == {"callback_state_dicts": {}, **said}


def test_what_files_say_of_themselves_is_no_obstacle_to_an_optimizer(writer: CheckpointWriter) -> None:
    """torch takes the whole content of an optimizer file as a state dict."""
    model = trained()
    stored = content(writer.save(model, ONE), "optim")
    other = trained()
    other.optimizer.load_state_dict(stored)
    assert set(other.optimizer.state_dict()) == {"state", "param_groups"}
    moments = [state["exp_avg"] for state in other.optimizer.state.values()]
    expected = [state["exp_avg"] for state in model.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, expected, strict=True))


def test_trainer_whose_own_run_id_is_another_is_refused(writer: CheckpointWriter, folder: Path) -> None:
    """There, the file says which run it belongs to; a set with two answers could not be resumed."""
    with pytest.raises(ConfigError, match=r"key run_id with 'wandb-7'.*'run'.*Next: rename the key"):
        writer.save(trained(), ONE, trainer=Trainer(run_id="wandb-7"))
    assert not folder.exists()
    assert content(writer.save(trained(), ONE, trainer=Trainer(run_id="run")), "trainer")["run_id"] == "run"


def test_model_with_the_longest_name_is_saved_and_found(writer: CheckpointWriter, paths: PathProvider) -> None:
    """The names of its files are longer than the names of folders may be."""
    saved = writer.save(bind(torch.nn.Linear(1, 1), name="m" * 200), TrainingIteration(1, 1, 1))
    assert find_set(Snapshot(paths), "latest").found == saved
    assert max(len(file.path.name) for file in saved.files) > 200


def test_weights_come_back_bit_for_bit(writer: CheckpointWriter) -> None:
    """Parameters, buffers, and the tie between two names."""
    model = trained()
    state = content(writer.save(model, ONE), "model")["state_dict"]
    expected = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert state["tied.weight"].data_ptr() == state["first.weight"].data_ptr()
    assert not any(tensor.requires_grad for tensor in state.values())


def test_optimizer_state_is_named_by_parameter(writer: CheckpointWriter) -> None:
    """Names follow torch's numbering across parameter groups, whatever the order in the model."""
    module = Net()
    groups: list[dict[str, Any]] = [
        {"params": [module.norm.bias, module.first.weight]},
        {"params": [module.first.bias], "lr": 0.5},
    ]
    saved = writer.save(bind(module, name="mlp", optimizer=torch.optim.SGD(groups, lr=0.1)), ONE)
    optim = content(saved, "optim")
    assert optim["param_idx_to_name"] == {0: "norm.bias", 1: "first.weight", 2: "first.bias"}
    assert [group["params"] for group in optim["param_groups"]] == [[0, 1], [2]]


def test_names_that_the_optimizer_brings_are_kept(writer: CheckpointWriter) -> None:
    """Noether's wrapper knows the names itself."""

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.inner = optimizer

        def state_dict(self) -> dict[str, Any]:
            return {**self.inner.state_dict(), "param_idx_to_name": {0: "from.the.wrapper"}}

    module = torch.nn.Linear(2, 2, bias=False)
    model = bind(module, name="mlp", optimizer=Wrapper(torch.optim.SGD(module.parameters(), lr=0.1)))
    assert content(writer.save(model, ONE), "optim")["param_idx_to_name"] == {0: "from.the.wrapper"}


def test_optimizer_of_other_parameters_is_refused(writer: CheckpointWriter, folder: Path) -> None:
    """Its state could not be given back to anything."""
    net, other = Net(), torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = bind(net, name="mlp", optimizer=optimizer)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    with pytest.raises(
        ConfigError, match=r"mlp\.optimizer: its parameter 0 with shape \[2, 3\] does not belong to mlp"
    ):
        writer.save(model, ONE)
    assert not folder.exists()


def test_composite_is_saved_by_path_of_names(writer: CheckpointWriter) -> None:
    """Every single model has its files, frozen ones no optimizer state, the root the trainer file."""
    linear = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    frozen = bind(linear, name="own_name", is_frozen=True, optimizer=optimizer)
    stem = trained("x")
    model = compose("auto", {"encoder": compose("inner", {"stem": stem}), "decoder": frozen, "absent": None})
    averages = {"encoder.stem": {"ema=0.9": average_of(stem)}}
    saved = writer.save(model, ONE, averages=averages)
    assert [(file.model, file.info, file.part) for file in saved.files] == [
        ("auto", None, "trainer"),
        ("auto.decoder", None, "model"),
        ("auto.encoder.stem", None, "model"),
        ("auto.encoder.stem", None, "optim"),
        ("auto.encoder.stem", "ema=0.9", "model"),
    ]
    with pytest.raises(ConfigError, match=r"'ema=0\.9' is not a submodel with averages\. .*encoder\.stem, decoder"):
        writer.save(model, ONE, averages={"ema=0.9": {}})


def test_averages_are_in_the_same_set(writer: CheckpointWriter, noether_runs: Path) -> None:
    """An EMA is found by its info, at the same iteration, with the key that Noether gives it."""
    model = trained()
    saved = writer.save(model, ONE, averages={"ema=0.9": average_of(model, 7.0)})
    average = content(saved, "model", info="ema=0.9")
    real = load(noether_runs / "mlp_train/train/checkpoints/mlp_ema=0.9_cp=E1_U4_S32_model.th")
    assert set(average) == set(real) - {"model_config", "config_kind"}
    assert average["ema"] == real["ema"] == 0.9
    assert average["state_dict"]["first.weight"].unique().tolist() == [7.0]
    assert average["training_iteration"] == ONE.to_mapping()


def test_averages_that_could_not_be_loaded_are_refused(writer: CheckpointWriter, folder: Path) -> None:
    """Keys and shapes must be those of the model; what torch's own average adds is named with the way out."""
    model = trained()
    whole = model.state_dict()
    averaged = torch.optim.swa_utils.AveragedModel(model.module)
    refused = [
        (
            averaged.state_dict(),
            r"lacks n_averaged, module\.scale, .*averages=\{\"ema=0\.9\": averaged\.module\.state_dict\(\)\}",
        ),
        ({"first.weight": whole["first.weight"]}, r"lacks scale, .* \{\*\*model\.state_dict\(\), \*\*average\}"),
        (whole | {"n_averaged": torch.zeros(())}, "the model lacks n_averaged"),
        (whole | {"first.bias": torch.zeros(5)}, r"first\.bias has another shape"),
        ([1], "a list is not a state dict"),
    ]
    for average, message in refused:
        with pytest.raises(ConfigError, match=message):
            writer.save(model, ONE, averages={"ema=0.9": average})
    assert not folder.exists()
    writer.save(model, ONE, averages={"ema=0.9": averaged.module.state_dict()})


def test_averages_may_leave_out_what_is_there_under_another_name(writer: CheckpointWriter) -> None:
    """One name of a tie is enough, and buffers that are not in state dicts are no strangers."""
    model = trained()
    model.module.register_buffer("cache", torch.zeros(2), persistent=False)
    average = average_of(model) | {"cache": torch.zeros(2)}
    del average["tied.weight"]
    saved = writer.save(model, ONE, averages={"ema=0.9": average})
    assert set(content(saved, "model", info="ema=0.9")["state_dict"]) == set(average)


def test_trainer_state_is_saved_with_what_a_trainer_file_needs(writer: CheckpointWriter) -> None:
    """The trainer's iteration is that of the set; other keys pass through."""
    trainer = Trainer(schedule={"last_epoch": 3}, milestones=Counter({2: 1}), rng=torch.get_rng_state())
    trainer.iteration = TWO  # type: ignore[attr-defined]
    saved = writer.save(trained(), trainer=trainer)
    state = content(saved, "trainer")
    assert saved.iteration == TWO
    assert state["schedule"] == {"last_epoch": 3}
    assert state["milestones"] == Counter({2: 1})
    assert torch.equal(state["rng"], torch.get_rng_state())
    assert (state["training_iteration"], state["callback_state_dicts"]) == (TWO.to_mapping(), {})


def test_trainer_at_another_iteration_is_refused(writer: CheckpointWriter, folder: Path) -> None:
    """Such a set would be torn from the beginning."""
    with pytest.raises(ConfigError, match=r"the trainer is at E1_U10_S100, but save\(\) got the iteration E2_U20_S200"):
        writer.save(trained(), TWO, trainer=Trainer(training_iteration=ONE.to_mapping()))
    assert not folder.exists()


def test_iteration_must_come_from_somewhere(writer: CheckpointWriter) -> None:
    """Without an iteration the set would have no name."""
    with pytest.raises(ConfigError, match="got no iteration, and the trainer has no iteration"):
        writer.save(trained())
    with pytest.raises(ConfigError, match="iteration E1 lacks epoch, update or sample"):
        writer.save(trained(), TrainingIteration(epoch=1))


def test_iteration_that_no_name_can_hold_is_refused(writer: CheckpointWriter, folder: Path) -> None:
    """No reader would recognise the folder as a set."""
    writer.save(trained(), TrainingIteration(0, 0, 10**18 - 1))
    with pytest.raises(ConfigError, match="a number of more than 18 digits"):
        writer.save(trained(), TrainingIteration(0, 0, 10**18))
    assert len(list((folder / "sets").iterdir())) == 1


def test_model_config_is_stored(writer: CheckpointWriter) -> None:
    """A pydantic config as a dict with the name of its class; what has no plain form is as pydantic writes it."""

    class Config(pydantic.BaseModel):
        path: Path = Path("/data")
        sizes: tuple[int, ...] = (1, 2)
        names: frozenset[str] = frozenset({"a"})

    module = Net()
    module.model_config = Config()  # type: ignore[assignment]
    model = content(writer.save(bind(module, name="mlp"), ONE), "model")
    assert model["model_config"] == {"path": "/data", "sizes": [1, 2], "names": ["a"]}
    assert model["config_kind"] == f"{__name__}.{Config.__qualname__}"


def test_plain_module_is_refused_with_the_way_to_name_it(writer: CheckpointWriter, folder: Path) -> None:
    """Files are named after models."""
    with pytest.raises(ConfigError, match=r'bind\(module, name="\.\.\."'):
        writer.save(Net(), ONE)

    class Composite:
        name = "auto"
        submodels = MappingProxyType({"part": torch.nn.Linear(1, 1)})

    with pytest.raises(ConfigError, match=r"auto\.part: a Linear is not a model"):
        writer.save(Composite(), ONE)
    assert not folder.exists()


@pytest.mark.parametrize(
    "tag", ["a/b", "..", "", "x_cp=y", "t" * 190, "E2_U20_S200", "E2_U20_S200.best", "E10", "U3_S4"]
)
def test_tag_that_cannot_be_found_again_is_refused(writer: CheckpointWriter, folder: Path, tag: str) -> None:
    """Names that are no names, other iterations, and texts that mean a question."""
    model = trained("a_model_with_a_name_of_some_length_that_leaves_little_room")
    with pytest.raises((InvalidNameError, ConfigError)):
        writer.save(model, ONE, tags=(tag,))
    assert not folder.exists()


@pytest.mark.parametrize("info", ["ema", "ema_factor=0.9", "a/b=1", "..=1"])
def test_info_that_would_read_as_another_model_is_refused(writer: CheckpointWriter, info: str) -> None:
    """The grammar could not tell it from the model's name."""
    with pytest.raises(InvalidNameError):
        writer.save(trained(), ONE, averages={info: {}})


# Values.


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (PurePosixPath("/a/b"), "/a/b"),
        (Colour.RED, "red"),
        ((1, (2, [3])), (1, (2, [3]))),
        ({np.int64(1): {("a", 2): None}}, {1: {("a", 2): None}}),
        ({"b", "a"}, {"a", "b"}),
        (b"\x00\xff", b"\x00\xff"),
        (float("inf"), float("inf")),
        (10**40, 10**40),
    ],
)
def test_values_are_made_safe(writer: CheckpointWriter, value: Any, expected: Any) -> None:
    """NumPy scalars, paths and enumerations become plain; both readers read them as such."""
    saved = writer.save(trained(), ONE, trainer=Trainer(value=value))
    read = content(saved, "trainer")["value"]
    assert read == expected
    assert type(read) is type(expected)
    file = saved.file("mlp", "trainer")
    assert file is not None
    with open_checkpoint(file.path) as reader:
        assert reader.load()["value"] == expected


Point = type("Point", (), {})


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.zeros(2), "a NumPy array"),
        (Point(), "Point"),
        (deque([1]), r"collections\.deque"),
        (torch.float32, r"torch\.dtype"),
        (np.datetime64("2020-01-01"), r"numpy\.datetime64"),
        (print, "builtin_function_or_method"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
)
def test_value_that_could_not_be_read_again_is_refused_with_its_place(
    writer: CheckpointWriter, folder: Path, value: Any, what: str
) -> None:
    """The message leads to the object; nothing is written."""
    trainer = Trainer(callbacks=[{"x": 1}, {"inner": {"x": value}}])
    with pytest.raises(CheckpointFormatError, match=rf"trainer\.callbacks\.1\.inner\.x: .*{what}"):
        writer.save(trained(), ONE, trainer=trainer)
    assert not folder.exists()


def test_object_that_holds_itself_is_refused(writer: CheckpointWriter) -> None:
    """No endless recursion."""
    loop: dict[str, Any] = {}
    loop["x"] = loop
    with pytest.raises(CheckpointFormatError, match="nested more than"):
        writer.save(trained(), ONE, trainer=Trainer(loop=loop))


def test_view_does_not_drag_its_storage_into_the_file(writer: CheckpointWriter) -> None:
    """A slice of a large buffer, a transposed and an expanded tensor are saved as what they are."""
    large = torch.arange(1_000_000.0)
    values = {
        "slice": large[10:14],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "expanded": torch.ones(1).expand(5),
    }
    saved = writer.save(trained(), ONE, trainer=Trainer(**values))
    file = saved.file("mlp", "trainer")
    assert file is not None
    assert file.path.stat().st_size < 20_000
    read = load(file.path)
    assert all(torch.equal(read[key], values[key]) for key in values)


def test_checksums_are_written_even_where_the_program_has_switched_them_off(writer: CheckpointWriter) -> None:
    """A file without them could not be verified; the program's own choice comes back."""
    torch.serialization.set_crc32_options(False)
    try:
        saved = writer.save(trained(), ONE)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(saved.files[0].path) as reader:
        reader.verify()


# The manifest.


def test_manifest_vouches_for_every_byte(writer: CheckpointWriter) -> None:
    """Sizes and digests of files, dtype, shape and digest of every tensor."""
    saved = writer.save(trained(), ONE, tags=("latest", "best_model.loss"), averages={"ema=0.5": average_of(trained())})
    manifest = saved.manifest
    assert manifest is not None
    assert manifest.tags == ("E1_U10_S100", "latest", "best_model.loss")
    assert (manifest.sequence, manifest.run_id, manifest.stage_name) == (1, "run", "train")
    assert set(manifest.versions) == {"noether_init", "torch", "python"}
    on_disk = {path.name for path in saved.folder.iterdir()}
    assert on_disk == {"manifest.json", "digests.json", *(entry.name for entry in manifest.files)}
    digests_path = saved.folder / "digests.json"
    assert (digests_path.stat().st_size, f"xxh3_128:{digest(digests_path)}") == (
        manifest.digests_size,
        manifest.digests,
    )
    checked = 0
    for entry in manifest.files:
        path = saved.folder / entry.name
        tensors = json.loads(digests_path.read_text())["files"][entry.name]["tensors"]
        assert (path.stat().st_size, f"xxh3_128:{digest(path)}") == (entry.size, entry.digest)
        with open_checkpoint(path, digests=entry.digest) as reader:
            reader.verify()
            assert set(reader.tensors()) == set(tensors)
        if entry.part == "model":
            for key, tensor in load(path)["state_dict"].items():
                raw = tensor.contiguous().numpy().tobytes()
                assert tensors[key]["digest"] == f"xxh3_128:{xxhash.xxh3_128_hexdigest(raw)}"
                assert tensors[key]["shape"] == list(tensor.shape)
                checked += 1
    assert checked == 2 * len(Net().state_dict())


def test_lineage_is_kept_in_the_manifest(paths: PathProvider) -> None:
    """From the report, or from the trainer that carried it over."""

    class Report:
        def lineage(self) -> list[dict[str, Any]]:
            return [{"kind": "previous_run", "run_id": "parent", "path": Path("/x")}]

    saved = CheckpointWriter(paths, report=Report(), flat_names=True).save(trained(), ONE)
    assert saved.manifest is not None
    assert saved.manifest.lineage == ({"kind": "previous_run", "run_id": "parent", "path": "/x"},)
    trainer = Trainer()
    trainer.lineage = ({"kind": "resume"},)  # type: ignore[attr-defined]
    saved = CheckpointWriter(paths, flat_names=True).save(trained(), TWO, trainer=trainer)
    assert saved.manifest is not None
    assert saved.manifest.lineage == ({"kind": "resume"},)


def test_what_is_returned_is_what_is_found(writer: CheckpointWriter, paths: PathProvider) -> None:
    """The set that save returns equals the one that the store reads."""
    saved = writer.save(trained(), ONE)
    assert find_set(Snapshot(paths), None, ALL).found == saved
    assert newest_set(Snapshot(paths)) == saved


# Flat names.


def test_every_flat_file_is_read_by_torch_with_the_content_of_the_set(writer: CheckpointWriter, folder: Path) -> None:
    """Under each tag, Noether finds every part."""
    saved = writer.save(trained(), ONE, tags=("latest", "best_model.loss"), averages={"ema=0.9": average_of(trained())})
    flat = {path.name for path in folder.glob("*.th")}
    assert flat == {
        name
        for tag in ("E1_U10_S100", "latest", "best_model.loss")
        for name in (
            f"mlp_cp={tag}_model.th",
            f"mlp_cp={tag}_optim.th",
            f"mlp_cp={tag}_trainer.th",
            f"mlp_ema=0.9_cp={tag}_model.th",
        )
    }
    for name in flat:
        source = next(
            path
            for path in saved.folder.iterdir()
            if name.split("_cp=")[0] == path.name.split("_cp=")[0]
            and name.rsplit("_", 1)[1] == path.name.rsplit("_", 1)[1]
        )
        assert digest(folder / name) == digest(source)
        assert isinstance(load(folder / name), dict)


def test_writing_in_place_onto_a_rewritten_name_leaves_the_set_intact(
    writer: CheckpointWriter, folder: Path, paths: PathProvider
) -> None:
    """Noether saves onto ``latest`` and ``last`` in place; these names are copies."""
    saved = writer.save(trained(), ONE, tags=("latest", "last", "best_model.loss"))
    before = {path: digest(path) for path in saved.folder.iterdir()}
    for tag in ("latest", "last", "best_model.loss"):
        for part in ("model", "optim", "trainer"):
            torch.save({"other": torch.zeros(1000)}, folder / f"mlp_cp={tag}_{part}.th")
    assert {path: digest(path) for path in saved.folder.iterdir()} == before
    assert find_set(Snapshot(paths), "latest", ALL).found == saved


def test_writing_in_place_onto_the_name_of_an_iteration_leaves_the_set_intact(
    writer: CheckpointWriter, folder: Path, paths: PathProvider
) -> None:
    """Who may write onto a read-only file, as root may, gets copies; for others the write fails."""
    saved = writer.save(trained(), ONE)
    before = {path: digest(path) for path in saved.folder.iterdir()}
    for part in ("model", "optim", "trainer"):
        with contextlib.suppress(PermissionError, RuntimeError):
            torch.save({"other": torch.zeros(1000)}, folder / f"mlp_cp=E1_U10_S100_{part}.th")
    assert {path: digest(path) for path in saved.folder.iterdir()} == before
    assert find_set(Snapshot(paths), "E1_U10_S100", ALL).found == saved


def test_hard_links_are_made_only_where_the_mode_protects_the_file(tmp_path: Path) -> None:
    """A file that this process may write to would be rewritten under both names."""
    source = tmp_path / "source"
    source.write_bytes(b"x")
    assert not FileSystem().hardlink(source, tmp_path / "link")
    source.chmod(0o444)
    is_protected = True
    with contextlib.suppress(PermissionError), source.open("r+b"):
        is_protected = False
    assert FileSystem().hardlink(source, tmp_path / "link") == is_protected
    assert (tmp_path / "link").exists() == is_protected


def test_flat_names_of_a_set_that_was_removed_by_hand_go_with_the_next_save(
    writer: CheckpointWriter, folder: Path, paths: PathProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """They are copies, which stop no run: the newest committed set is meant, and a warning says so."""
    first = writer.save(trained(), ONE, tags=("latest", "last"))
    removed = writer.save(trained(), THREE, tags=("latest", "last")).folder
    shutil.rmtree(removed)
    snapshot = Snapshot(paths)
    assert newest_set(snapshot) == first
    assert find_set(snapshot, "latest").found == first
    said = [record.message for record in caplog.records if "copies of a removed set" in record.message]
    assert len(said) == 1
    assert removed.name in said[0]
    assert first.folder.name in said[0]
    flat = folder / "mlp_cp=latest_trainer.th"
    flat.write_bytes(flat.read_bytes())  # as another program would have
    with pytest.raises(AmbiguousCheckpointError, match=r"their set was removed.*E1_U10_S100"):
        newest_set(Snapshot(paths))
    flat.unlink()
    again = writer.save(trained(), TWO)
    assert newest_set(Snapshot(paths)) == again
    assert {path.name.split("_cp=")[1].rsplit("_", 1)[0] for path in folder.glob("*.th")} == {
        "E1_U10_S100",
        "E2_U20_S200",
        "latest",
    }


def test_flat_files_of_another_program_stay(writer: CheckpointWriter, folder: Path, paths: PathProvider) -> None:
    """A name of a removed set that was rewritten since is not ours to remove; nor is one that we never wrote."""
    writer.save(trained(), ONE)
    shutil.rmtree(writer.save(trained(), THREE).folder)
    rewritten, foreign = folder / "mlp_cp=E3_U30_S300_model.th", folder / "mlp_cp=E4_U40_S400_model.th"
    for path in (rewritten, foreign):
        path.unlink(missing_ok=True)
        torch.save({"state_dict": {}}, path)
    writer.save(trained(), TWO)
    assert rewritten.exists()
    assert foreign.exists()
    assert not (folder / "mlp_cp=E3_U30_S300_trainer.th").exists()
    with pytest.raises(AmbiguousCheckpointError, match=r"remove \*_cp=E4_U40_S400_\*\.th, \*_cp=E3_U30_S300_\*\.th"):
        newest_set(Snapshot(paths))


@pytest.mark.parametrize(
    "record", [b"", b"[", b"[]", b'{"../../precious.th": ["gone", 1, 1]}', b'{"a_cp=b_model.th": 3}']
)
def test_damaged_record_of_flat_names_removes_nothing(
    writer: CheckpointWriter, folder: Path, paths: PathProvider, record: bytes
) -> None:
    """It is advice for tidying up, nothing more."""
    writer.save(trained(), ONE)
    names = {path.name for path in folder.glob("*.th")}
    (folder / ".noether-init-flat.json").write_bytes(record)
    saved = writer.save(trained(), TWO)
    assert {path.name for path in folder.glob("*.th")} >= names
    assert newest_set(Snapshot(paths)) == saved


def test_files_of_a_set_are_read_only(writer: CheckpointWriter, folder: Path) -> None:
    """A program that rewrites the name of an iteration in place fails loudly; copies can be rewritten."""
    saved = writer.save(trained(), ONE)
    assert {stat.S_IMODE(file.path.stat().st_mode) for file in saved.files} == {0o444}
    assert stat.S_IMODE((folder / "mlp_cp=latest_model.th").stat().st_mode) & stat.S_IWUSR


def test_flat_names_can_be_switched_off(paths: PathProvider, folder: Path) -> None:
    """Then only sets are written."""
    CheckpointWriter(paths, flat_names=False).save(trained(), ONE)
    assert sorted(path.name for path in folder.iterdir()) == [".noether-init.lock", "sets"]


def test_flat_names_of_the_set_before_do_not_stay(writer: CheckpointWriter, folder: Path) -> None:
    """A variant or optimizer that the new set lacks would belong to another iteration; files of others stay."""
    writer.save(trained(), ONE, averages={"ema=0.9": average_of(trained())})
    torch.save({}, folder / "mlp_ema=0.5_cp=latest_model.th")
    writer.save(trained(), TWO, optimizer=False)
    latest = sorted(path.name for path in folder.glob("*_cp=latest_*"))
    assert latest == ["mlp_cp=latest_model.th", "mlp_cp=latest_trainer.th", "mlp_ema=0.5_cp=latest_model.th"]


def test_trainer_name_is_gone_while_other_names_change(paths: PathProvider, folder: Path) -> None:
    """At every step of a refresh: while there is a trainer file, all names of the tag are of its iteration."""
    seen: list[set[int]] = []

    class Watching(FileSystem):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            self._look()

        def unlink(self, path: Path) -> None:
            super().unlink(path)
            self._look()

        def _look(self) -> None:
            if (folder / "mlp_cp=latest_trainer.th").exists():
                model = load(folder / "mlp_cp=latest_model.th")["training_iteration"]["epoch"]
                trainer = load(folder / "mlp_cp=latest_trainer.th")["training_iteration"]["epoch"]
                seen.append({model, trainer, *([trainer] if (folder / "mlp_cp=latest_optim.th").exists() else [-1])})

    writer = CheckpointWriter(paths, storage=Watching(), flat_names=True)
    for iteration in (ONE, TWO, THREE):
        writer.save(trained(), iteration)
    assert {1} in seen
    assert {3} in seen
    assert all(len(iterations) == 1 for iterations in seen)


def test_failure_after_the_commit_is_no_lost_checkpoint(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """The set is on the disk; that Noether's names are old is a warning."""

    class NoCopies(FileSystem):
        def copy(self, source: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

        def reflink(self, source: Path, target: Path) -> bool:
            return False

    saved = CheckpointWriter(paths, storage=NoCopies(), flat_names=True).save(trained(), ONE)
    assert newest_set(Snapshot(paths)) == saved
    assert "is committed, but the flat names" in caplog.text


def test_full_disk_takes_the_flat_names_before_it_refuses_a_set(
    paths: PathProvider, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Copies for Noether can be made again, a set cannot; files of others are no room to be had."""

    class Small(FileSystem):
        """Room for a number of names with weights."""

        def open_write(self, path: Path) -> BinaryIO:
            if path.name.endswith("_model.th") and len(list(folder.rglob("*_model.th"))) > 5:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return super().open_write(path)

    CheckpointWriter(paths, flat_names=True).save(trained(), ONE)
    CheckpointWriter(paths, flat_names=True).save(trained(), TWO)
    foreign = folder / "other_cp=latest_model.th"
    torch.save({"state_dict": {}}, foreign)
    saved = CheckpointWriter(paths, storage=Small(), flat_names=True).save(trained(), THREE)
    assert "flat names for Noether were removed" in caplog.text
    assert newest_set(Snapshot(paths)) == saved
    assert [one.sequence for one in Snapshot(paths).sets()] == [1, 2, 3]
    assert {path.name for path in folder.glob("*_model.th")} == {
        foreign.name,
        "mlp_cp=E3_U30_S300_model.th",
        "mlp_cp=latest_model.th",
    }
    for number in range(2):
        torch.save({"state_dict": {}}, folder / f"more{number}_cp=latest_model.th")
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        CheckpointWriter(paths, flat_names=False, storage=Small()).save(trained(), FOUR)
    assert newest_set(Snapshot(paths)) == saved


def test_full_disk_at_the_flat_names_leaves_no_half_copy_and_retires_sets(
    paths: PathProvider, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a disk that is full once would stay full: the removal of old sets is what makes room again."""

    class FullForCopies(FileSystem):
        def copy(self, source: Path, target: Path) -> None:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

        def reflink(self, source: Path, target: Path) -> bool:
            return False

    for iteration in (ONE, TWO, THREE):
        CheckpointWriter(paths, keep_last=2, flat_names=False).save(trained(), iteration)
    saved = CheckpointWriter(paths, keep_last=2, storage=FullForCopies(), flat_names=True).save(trained(), FOUR)
    assert [one.sequence for one in Snapshot(paths).sets()] == [3, 4]
    assert newest_set(Snapshot(paths)) == saved
    assert "the flat names for Noether failed" in caplog.text
    assert not list(folder.glob(".noether-init-flat*.tmp"))
    (folder / ".noether-init-flat.tmp").write_bytes(b"half")
    CheckpointWriter(paths, flat_names=False).save(trained(), FOUR)
    assert not list(folder.glob(".noether-init-flat*.tmp"))


def test_file_system_without_links_gets_copies(paths: PathProvider, folder: Path) -> None:
    """Neither reflinks nor hardlinks are needed."""

    class NoLinks(FileSystem):
        def hardlink(self, source: Path, target: Path) -> bool:
            return False

        def reflink(self, source: Path, target: Path) -> bool:
            return False

    saved = CheckpointWriter(paths, storage=NoLinks(), flat_names=True).save(trained(), ONE)
    names = [file.path.name for file in saved.files]
    assert [digest(folder / name) for name in names] == [digest(saved.folder / name) for name in names]
    assert not any((folder / name).samefile(saved.folder / name) for name in names)


# Failure.


class Failing(FileSystem):
    """Fails at the step with the given number; counts the steps that change something."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps: list[str] = []

    def _step(self, name: str, path: Path | None) -> None:
        self.steps.append(name)
        if len(self.steps) == self.at:
            raise OSError(errno.EIO, "Input/output error", *([str(path)] if path else []))

    def make_folder(self, folder: Path) -> None:
        self._step("make_folder", folder)
        super().make_folder(folder)

    def open_write(self, path: Path) -> BinaryIO:
        self._step("open_write", path)
        return super().open_write(path)

    def fsync(self, file: BinaryIO) -> None:
        self._step("fsync", None)  # as the system, which knows the file by number only
        super().fsync(file)

    def fsync_folder(self, folder: Path) -> None:
        self._step("fsync_folder", folder)
        super().fsync_folder(folder)

    def make_read_only(self, path: Path) -> None:
        self._step("make_read_only", path)
        super().make_read_only(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step(f"rename {target.name}", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step("unlink", path)
        super().unlink(path)

    def remove_folder(self, folder: Path) -> None:
        self._step("remove_folder", folder)
        super().remove_folder(folder)

    def hardlink(self, source: Path, target: Path) -> bool:
        self._step("hardlink", target)
        return super().hardlink(source, target)

    def copy(self, source: Path, target: Path) -> None:
        self._step("copy", target)
        super().copy(source, target)

    @contextlib.contextmanager
    def lock(self, path: Path, timeout: float) -> Iterator[None]:
        self._step("lock", path)
        with super().lock(path, timeout):
            yield


def test_failure_at_any_single_step_keeps_the_sets_from_before(tmp_path: Path) -> None:
    """Each step of a save with retention fails once: the newest set is the old or the new one, whole and loadable."""

    model = trained()
    before = PathProvider(tmp_path / "before", "run")
    for number, iteration in enumerate((ONE, TWO, THREE)):
        CheckpointWriter(before, flat_names=True).save(fill(model, number), iteration)
    unfinished = before.checkpoint_path / "sets" / "00000004_E4_U40_S400"
    unfinished.mkdir()
    (unfinished / "mlp_cp=E4_U40_S400_model.th").write_bytes(b"half")

    def history(root: Path) -> PathProvider:
        shutil.copytree(before.output_root, root)
        return PathProvider(root, "run")

    dry = Failing()
    CheckpointWriter(history(tmp_path / "dry"), keep_last=1, storage=dry, flat_names=True).save(fill(model, 9), FOUR)
    commit = dry.steps.index("rename manifest.json") + 1
    assert len(dry.steps) > 30
    outcomes = Counter[bool]()
    for at in range(1, len(dry.steps) + 1):
        paths = history(tmp_path / str(at))
        error = None
        try:
            CheckpointWriter(paths, keep_last=1, storage=Failing(at), flat_names=True).save(fill(model, 9), FOUR)
        except CheckpointWriteError as caught:
            error = caught
        saved = error is None
        if error is not None:
            assert error.path is not None
            assert str(error.path) in str(error)
            assert at <= commit + 1, dry.steps[at - 1]
        outcomes[saved] += 1
        newest = newest_set(Snapshot(paths))
        assert newest is not None
        assert newest.iteration == (FOUR if saved or at > commit else THREE)
        assert weight_of(newest) == (9 if newest.iteration == FOUR else 2)
        assert Snapshot(paths).broken() == ()
        again = CheckpointWriter(paths, keep_last=1, flat_names=True).save(fill(model, 11), FOUR)
        assert weight_of(find_set(Snapshot(paths), None, ALL).found) == 11
        assert find_set(Snapshot(paths), "E4", ALL).found == again
        assert Snapshot(paths).uncommitted() == ()
    assert min(outcomes[True], outcomes[False]) > 10


def test_failure_after_the_rename_of_the_manifest_does_not_claim_that_nothing_was_committed(
    paths: PathProvider,
) -> None:
    """The set is there, but a power failure could take it back; both are said."""

    class LastStep(FileSystem):
        def fsync_folder(self, folder: Path) -> None:
            if (folder / "manifest.json").exists():
                raise OSError(errno.EIO, "Input/output error", str(folder))
            super().fsync_folder(folder)

    with pytest.raises(CheckpointWriteError, match=r"unknown whether it is committed.*ninit inspect") as caught:
        CheckpointWriter(paths, storage=LastStep(), flat_names=True).save(trained(), ONE)
    assert "was not committed" not in str(caught.value)
    newest = newest_set(Snapshot(paths))
    assert newest is not None
    assert newest.iteration == ONE


def test_disk_that_fills_up_in_the_middle_of_a_file_is_named(paths: PathProvider) -> None:
    """The error is that of the system, with the file, not one of torch."""

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    class FullStorage(FileSystem):
        def open_write(self, path: Path) -> BinaryIO:
            return io.BufferedWriter(Full(path, "xb"), buffer_size=1)

    saved = CheckpointWriter(paths, flat_names=True).save(fill(trained(), 1), ONE)
    with pytest.raises(CheckpointWriteError, match=r"mlp_cp=E2_U20_S200_model\.th: No space left on device") as caught:
        CheckpointWriter(paths, storage=FullStorage(), flat_names=True).save(fill(trained(), 2), TWO)
    assert isinstance(caught.value, OSError)
    assert newest_set(Snapshot(paths)) == saved
    assert weight_of(saved) == 1


def test_file_that_our_reader_cannot_read_is_never_committed(paths: PathProvider, folder: Path) -> None:
    """A write that the disk garbled shows before the commit."""

    class Garbling(FileSystem):
        def make_read_only(self, path: Path) -> None:
            if path.name.endswith("_optim.th"):
                os.truncate(path, 500)
            super().make_read_only(path)

    with pytest.raises(CheckpointWriteError, match=r"_optim\.th"):
        CheckpointWriter(paths, storage=Garbling(), flat_names=True).save(trained(), ONE)
    assert newest_set(Snapshot(paths)) is None
    assert not list(folder.glob("*.th"))


def test_leftovers_of_a_killed_save_are_collected_by_the_next(writer: CheckpointWriter, paths: PathProvider) -> None:
    """They never become part of a set, and their sequence is no obstacle."""
    writer.save(trained(), ONE)
    leftover = paths.checkpoint_path / "sets" / "00000007_E2_U20_S200"
    leftover.mkdir()
    (leftover / "mlp_cp=E2_U20_S200_model.th").write_bytes(b"half")
    (leftover / "manifest.json.tmp").write_bytes(b"{")
    saved = writer.save(trained(), TWO)
    assert not leftover.exists()
    assert newest_set(Snapshot(paths)) == saved
    assert Snapshot(paths).uncommitted() == ()


@pytest.mark.parametrize("is_committed", [False, True])
def test_set_behind_a_link_is_never_removed(
    paths: PathProvider, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_committed: bool
) -> None:
    """What a link leads to is not ours, be it a set that was archived or a folder with other things."""
    writer = CheckpointWriter(paths, keep_last=1, flat_names=True)
    folder = writer.save(trained(), ONE).folder
    elsewhere = tmp_path / "elsewhere"
    if is_committed:
        shutil.move(folder, elsewhere)
        folder.symlink_to(elsewhere)
    else:
        elsewhere.mkdir()
        (elsewhere / "precious.txt").write_text("x")
        folder.with_name("00000009_E9_U9_S9").symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    for iteration in (TWO, THREE, FOUR):
        writer.save(trained(), iteration)
    assert sorted(elsewhere.iterdir()) == before
    assert is_committed or "00000009_E9_U9_S9 has no manifest and is a link to" in caplog.text


def test_run_that_begins_anew_in_an_old_folder_is_told(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """Under a run id that was used before, tags of the earlier run would be taken for those of this one."""
    CheckpointWriter(paths, flat_names=True).save(trained(), THREE)
    writer = CheckpointWriter(paths, flat_names=True)
    writer.save(trained(), ONE)
    writer.save(trained(), TWO)
    assert caplog.text.count("already has sets up to E3_U30_S300") == 1
    assert "use another run_id" in caplog.text


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("weight", NAN, "first.weight of mlp holds NaN"),
        ("weight", INF, "first.weight of mlp holds infinities"),
        ("buffer", NAN, "scale of mlp holds NaN"),
        ("buffer", -INF, ""),
        ("moment", NAN, "state.0.exp_avg of the optimizer of mlp holds NaN"),
        ("moment", INF, "state.0.exp_avg of the optimizer of mlp holds infinities"),
        ("option", INF, ""),
        ("average", NAN, ""),
        ("trainer", NAN, ""),
    ],
)
def test_values_that_a_resume_refuses_are_told_once(
    writer: CheckpointWriter, caplog: pytest.LogCaptureFixture, place: str, value: float, said: str
) -> None:
    """The tensor, the iteration and what follows, at the first such save; masks and losses may be infinite."""
    model = trained()
    writer.save(model, ONE)
    averages = trainer = None
    with torch.no_grad():
        if place == "weight":
            model.module.first.weight[0, 0] = value
        elif place == "buffer":
            model.module.scale[1] = value
        elif place == "moment":
            model.optimizer.state[next(iter(model.parameters()))]["exp_avg"][0, 0] = value
        elif place == "option":
            model.optimizer.param_groups[0]["limit"] = torch.tensor(value)
        elif place == "average":
            averages = {"ema=0.9": {**average_of(model), "scale": torch.full((4,), value)}}
        else:
            trainer = Trainer(best=torch.tensor(value))
    for iteration in (TWO, THREE):
        writer.save(model, iteration, averages=averages, trainer=trainer)
    if not said:
        assert caplog.text == ""
        return
    assert caplog.text.count("a resume will refuse it") == 1
    # a tied weight has two names
    assert f"E2_U20_S200 of run run is saved, but a resume will refuse it: {said}" in caplog.text
    assert "(on_nonfinite: error)" in caplog.text


def test_diverged_run_keeps_its_finite_sets(paths: PathProvider) -> None:
    """As many as asked for, and the newest set for those who look for the cause."""
    writer = CheckpointWriter(paths, keep_last=3, flat_names=True)
    for epoch in range(1, 9):
        model = fill(trained(), NAN) if epoch > 4 else trained()
        saved = writer.save(model, TrainingIteration(epoch, 10 * epoch, 100 * epoch), tags=())
        assert find_set(Snapshot(paths), saved.name).found == saved
    assert [one.iteration.epoch for one in Snapshot(paths).sets() if one.iteration] == [2, 3, 4, 8]


@pytest.mark.parametrize("said_by", ["report", "lineage", "nothing needed"])
def test_run_that_went_back_on_purpose_is_not_warned(
    paths: PathProvider, caplog: pytest.LogCaptureFixture, said_by: str
) -> None:
    """A resume from an earlier set is in the report and in the lineage of the trainer."""
    CheckpointWriter(paths, flat_names=True).save(trained(), THREE)
    trainer = Trainer()
    trainer.lineage = ({"kind": "resume"},) if said_by == "lineage" else ()  # type: ignore[attr-defined]
    report = InitReport(ONE) if said_by == "report" else None
    iteration = FOUR if said_by == "nothing needed" else TWO
    CheckpointWriter(paths, report=report, flat_names=True).save(trained(), iteration, trainer=trainer)
    assert caplog.text == ""


def test_optimizer_of_a_frozen_model_is_left_out_with_a_word(
    writer: CheckpointWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """Thawed later, the run could not be resumed; who has no optimizer there, or wants none, is not bothered."""
    model = trained()
    model.module.requires_grad_(False)
    writer.save(model, ONE, optimizer=False)
    writer.save(bind(model.module, name="mlp"), ONE)
    assert caplog.text == ""
    saved = [writer.save(model, iteration) for iteration in (ONE, TWO)]
    assert caplog.text.count("the optimizer of mlp is not saved, because the model is frozen") == 1
    assert saved[0].manifest is not None
    assert saved[0].manifest.frozen == ("mlp",)


def test_writers_at_the_same_time_take_turns(paths: PathProvider) -> None:
    """Two threads with writers of their own: every save is a whole set with a sequence of its own."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            module = torch.nn.Linear(2, 2)
            for update in range(4):
                CheckpointWriter(paths, flat_names=True).save(
                    bind(module, name="mlp"), TrainingIteration(number, update, update)
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [one.sequence for one in Snapshot(paths).sets()] == list(range(1, 9))
    assert Snapshot(paths).broken() == ()


# Retention.


def test_retention_keeps_what_is_needed(paths: PathProvider, folder: Path) -> None:
    """The newest, one to walk back to, and the set of every named tag; flat names of the others go too."""
    writer = CheckpointWriter(paths, keep_last=1, flat_names=True)
    for epoch in range(1, 7):
        tags = ("latest", "best_model.loss") if epoch == 2 else ("latest",)
        writer.save(trained(), TrainingIteration(epoch, epoch, epoch), tags=tags)
    epochs = [one.iteration.epoch for one in Snapshot(paths).sets() if one.iteration]
    assert epochs == [2, 5, 6]
    assert sorted({path.name.split("_")[1] for path in folder.glob("*_cp=E*")} | set()) == ["cp=E2", "cp=E5", "cp=E6"]
    assert len(list((folder / "sets").iterdir())) == 3
    writer.save(trained(), TrainingIteration(7, 7, 7), tags=("latest", "best_model.loss"))
    assert [one.iteration.epoch for one in Snapshot(paths).sets() if one.iteration] == [6, 7]


def test_retention_of_an_iteration_saved_twice_keeps_its_flat_names(paths: PathProvider, folder: Path) -> None:
    """They belong to the later set by then."""
    writer = CheckpointWriter(paths, keep_last=2, report=InitReport(ONE), flat_names=True)
    for iteration in (ONE, TWO, ONE):
        saved = writer.save(trained(), iteration)
    assert [one.sequence for one in Snapshot(paths).sets()] == [2, 3]
    for file in saved.files:
        assert digest(folder / file.path.name) == digest(file.path)


@pytest.mark.parametrize("flat_names", [True, False])
@pytest.mark.parametrize("replaced", ["in place", "by renaming"])
def test_retention_leaves_flat_files_of_another_program(
    paths: PathProvider, folder: Path, flat_names: bool, replaced: str
) -> None:
    """Noether's own file of an iteration may be the only copy there is, also where a set of ours had the name once."""
    CheckpointWriter(paths, flat_names=flat_names, report=InitReport(ONE)).save(trained(), ONE)
    theirs = [folder / "mlp_cp=E1_U10_S100_model.th", folder / "mlp_ema=0.9_cp=E1_U10_S100_model.th"]
    for path in theirs:
        if replaced == "by renaming":
            (folder / "new").write_bytes(b"their weights")
            (folder / "new").rename(path)
        else:
            path.unlink(missing_ok=True)
            path.write_bytes(b"their weights")
    writer = CheckpointWriter(paths, flat_names=flat_names, keep_last=1)
    for iteration in (TWO, THREE, FOUR):
        writer.save(trained(), iteration)
    assert [one.name[:2] for one in Snapshot(paths).sets()] == ["E3", "E4"]
    assert [path.read_bytes() for path in theirs] == [b"their weights"] * 2
    assert not (folder / "mlp_cp=E1_U10_S100_trainer.th").exists()
    assert not list(folder.glob("*_cp=E2_*"))


def test_retention_without_the_record_removes_only_names_of_the_very_files(paths: PathProvider, folder: Path) -> None:
    """A hard link would keep the bytes on the disk; of a copy nobody knows whose it is."""
    writer = CheckpointWriter(paths, keep_last=1, flat_names=True)
    first = writer.save(trained(), ONE)
    (folder / ".noether-init-flat.json").unlink()
    flat = folder / "mlp_cp=E1_U10_S100_model.th"
    flat.unlink()
    flat.hardlink_to(first.folder / flat.name)
    copied = folder / "mlp_cp=E1_U10_S100_trainer.th"
    whole = copied.read_bytes()
    copied.unlink()
    copied.write_bytes(whole)
    for iteration in (TWO, THREE):
        writer.save(trained(), iteration)
    assert not first.folder.exists()
    assert not flat.exists()
    assert copied.read_bytes() == whole


def test_flat_latest_of_each_model_stays_until_that_model_is_saved_again(paths: PathProvider, folder: Path) -> None:
    """Models that are saved separately have a latest set each, for Noether too."""
    writer = CheckpointWriter(paths, keep_last=1, flat_names=True)
    parts = {name: bind(torch.nn.Linear(1, 1), name=name) for name in ("gen", "disc")}
    saved = {}
    for iteration in (ONE, TWO, THREE):
        for name in ("gen", "disc") if iteration != THREE else ("disc",):
            saved[name] = writer.save(parts[name], iteration)
    # E1 means the set of disc for who names no model, and must not mean that of gen later
    assert [(one.models(), one.name[:2]) for one in Snapshot(paths).sets()] == [
        (("gen",), "E1"),
        (("disc",), "E1"),
        (("gen",), "E2"),
        (("disc",), "E2"),
        (("disc",), "E3"),
    ]
    latest = {path.name: digest(path) for path in folder.glob("*_cp=latest_*")}
    assert latest == {
        file.path.name.replace(one.name, "latest"): digest(file.path) for one in saved.values() for file in one.files
    }


@pytest.mark.parametrize("keep_last", [0, -1, "3", 1.5])
def test_retention_of_nothing_is_refused(paths: PathProvider, keep_last: Any) -> None:
    """At least one set stays."""
    with pytest.raises(ConfigError, match="keep_last"):
        CheckpointWriter(paths, keep_last=keep_last, flat_names=True)


def test_same_iteration_may_be_saved_again(writer: CheckpointWriter, paths: PathProvider, folder: Path) -> None:
    """The later set is meant, in our store and under the flat names."""
    writer.save(fill(trained(), 1), ONE)
    writer.save(fill(trained(), 2), ONE)
    assert weight_of(find_set(Snapshot(paths), "E1", ALL).found) == 2
    assert load(folder / "mlp_cp=E1_U10_S100_model.th")["state_dict"]["first.weight"][0, 0] == 2
    assert not list(folder.glob(".noether-init-flat*.tmp"))
