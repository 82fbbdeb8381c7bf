"""What an error or a warning of a save advises is done here, and leads on: the same save works, and no set is lost."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.advice import digests, executes
from support.following import advised

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    Retention,
    TrainerState,
    TrainingIteration,
    bind,
    compose,
)
from noether_init_core.errors import CheckpointWriteError, ConfigError
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.inspection.reading import look_at_folder
from noether_init_core.memory import examine_memory
from noether_init_core.saving import file_writing
from noether_init_core.sets.health import verify_run
from noether_init_core.sets.snapshot import Snapshot

ONE = TrainingIteration(1, 10, 100)
TWO = TrainingIteration(2, 20, 200)
NAMES: dict[str, Any] = {"TrainingIteration": TrainingIteration, "bind": bind, "compose": compose, "torch": torch}


@pytest.fixture
def writer(paths: PathProvider) -> CheckpointWriter:
    """A writer of a run with one set, which must stay."""
    CheckpointWriter(paths).save(bind(linear(), "net"), ONE)
    return CheckpointWriter(paths)


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(3, 2)


def evaluated(advice: str, **names: Any) -> Any:
    """The result of an expression that an advice has, with names of the program in it."""
    return eval(advice, {**NAMES, **names})


def saves(writer: CheckpointWriter, model: Any, *arguments: Any, **options: Any) -> None:
    """Save, and show that every set from before is unchanged."""
    before = {one.folder.name: digests(one.folder) for one in Snapshot(writer.paths).sets()}
    writer.save(model, *arguments, **options)
    after = {one.folder.name: digests(one.folder) for one in Snapshot(writer.paths).sets()}
    assert before.items() < after.items()
    assert Snapshot(writer.paths).broken() == ()


@executes("saving/content.py", "Next: save(model, TrainingIteration(epoch, update, sample)) or")
def test_a_save_gets_an_iteration_in_either_way(writer: CheckpointWriter) -> None:
    """As an argument, or from the trainer."""
    model = bind(linear(), "net")
    calls = advised(lambda: writer.save(model)).split(" or ")
    assert len(calls) == 2
    for call in calls:
        names = {"model": model, "epoch": 2, "update": 20, "sample": 200, "trainer": TrainerState(seed=0)}
        evaluated(call.replace("=...", "=trainer"), **names, save=lambda *a, **k: saves(writer, *a, **k))


@executes("saving/content.py", 'Next: bind(module, name="...", optimizer=...), or compose(name, {...})')
@pytest.mark.parametrize("place", ["itself", "a submodel", "no submodel"])
def test_what_is_no_model_is_bound(writer: CheckpointWriter, place: str) -> None:
    """The calls of the message, with the values of the program."""

    class Composite:
        name = "whole"
        submodels: dict[str, Any] = {}  # noqa: RUF012 - a composite of a user

    module, wrong = linear(), Composite()
    if place == "a submodel":
        wrong.submodels = {"part": module}
    advice = advised(lambda: writer.save(module if place == "itself" else wrong, TWO))
    one, _, many = advice.partition(", or ")
    bound = evaluated(one.replace('"..."', '"part"').replace("=...", "=None"), module=module)
    made = evaluated(many.partition(" for submodels")[0].replace("...", '"part": bound'), name="whole", bound=bound)
    saves(writer, bound, TWO)
    saves(writer, made, TWO)


@executes("saving/content.py", "Next: rename one")
def test_two_submodels_of_one_path_are_renamed(writer: CheckpointWriter) -> None:
    """One of them gets another name."""
    parts = {"a": compose("a", {"b": bind(linear(), "b")}), "a.b": bind(linear(), "b")}
    with pytest.raises(ConfigError, match="have the path net"):
        save_parts(writer, parts)
    parts["c"] = parts.pop("a.b")
    saves(writer, Parts(parts), TWO)


class Parts:
    """A composite as a framework has it, which checks no names."""

    name = "net"

    def __init__(self, submodels: dict[str, Any]) -> None:
        self.submodels = submodels


def save_parts(writer: CheckpointWriter, parts: dict[str, Any]) -> None:
    writer.save(Parts(parts), TWO)


AVERAGE = linear().state_dict()


@executes("saving/content.py", "Next: pass {submodel: {info: state dict}}; submodels: ")
def test_averages_of_a_composite_are_named_by_the_submodel(writer: CheckpointWriter) -> None:
    """The submodels of the message are those that work."""
    model = compose("net", {"a": bind(linear(), "a"), "b": bind(linear(), "b")})
    advice = advised(lambda: writer.save(model, TWO, averages={"ema=0.9": AVERAGE}))
    form, _, names = advice.partition("; submodels: ")
    assert form == "pass {submodel: {info: state dict}}"
    saves(writer, model, TWO, averages={name: {"ema=0.9": AVERAGE} for name in names.split(", ")})


@executes("saving/content.py", "Next: pass its state_dict()", "Next: {}")
@pytest.mark.parametrize("what", ["a module", "a wrapped one", "without some keys", "of another model"])
def test_an_average_is_passed_in_the_form_that_is_advised(writer: CheckpointWriter, what: str) -> None:
    """The expression of the message is evaluated, or its words are followed."""
    model = linear()
    averaged: Any = torch.optim.swa_utils.AveragedModel(model)
    average: dict[str, Any] = {"weight": torch.ones(2, 3)}
    wrong = {
        "a module": averaged,
        "a wrapped one": averaged.state_dict(),
        "without some keys": average,
        "of another model": torch.nn.Linear(4, 2).state_dict(),
    }[what]
    advice = advised(lambda: writer.save(bind(model, "net"), TWO, averages={"ema=0.9": wrong}))
    if what == "a module":
        assert advice == "pass its state_dict()"
        advice = advised(lambda: writer.save(bind(model, "net"), TWO, averages={"ema=0.9": wrong.state_dict()}))
    if what == "of another model":
        assert advice == "pass the state dict of an average of this model"
        advice = 'averages={"ema=0.9": averaged.module.state_dict()}'
    given = evaluated(f"dict({advice})", averaged=averaged, model=model, average=average)
    saves(writer, bind(model, "net"), TWO, **given)


@executes("saving/content.py", "Next: add param_idx_to_name (index -> name)")
def test_an_optimizer_without_groups_names_its_parameters(writer: CheckpointWriter) -> None:
    """By index."""

    class Own:
        def state_dict(self) -> dict[str, Any]:
            return {"state": {}}

        def load_state_dict(self, state: Any) -> None:
            raise NotImplementedError

    class Model:
        name, device, is_frozen, module = "net", torch.device("cpu"), False, linear()
        optimizer: Any = Own()
        state_dict, named_parameters = module.state_dict, module.named_parameters

        def load_state_dict(self, state: Any) -> None:
            raise NotImplementedError

    model = Model()
    attribute = re.match(r"add (\w+) \(index -> name\)$", advised(lambda: writer.save(model, TWO)))
    assert attribute is not None
    setattr(model.optimizer, attribute[1], dict(enumerate(dict(model.named_parameters()))))
    saves(writer, model, TWO)


@executes("saving/content.py", "Next: build the optimizer from {}.parameters()")
def test_an_optimizer_of_other_parameters_is_built_again(writer: CheckpointWriter) -> None:
    """After the model got its final parameters."""
    net = linear()
    model = bind(net, "net", optimizer=torch.optim.AdamW(net.parameters()))
    net.weight = torch.nn.Parameter(torch.ones(2, 3))
    advice = advised(lambda: writer.save(model, TWO))
    arguments = re.match(r"build the optimizer from (net\.parameters\(\)), after", advice)
    assert arguments is not None
    optimizer = torch.optim.AdamW(evaluated(arguments[1], net=net))
    saves(writer, bind(net, "net", optimizer=optimizer), TWO)


class StateOf:
    """A trainer with a given state."""

    def __init__(self, state: dict[Any, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[Any, Any]:
        return self.state


@executes("saving/content.py", "Next: leave out the iteration, or advance the trainer first")
@executes("saving/content.py", "Next: rename the key", "Next: use string keys, or rename the entry")
@pytest.mark.parametrize(
    ("wrong", "right", "expected"),
    [
        ({"run_id": "wandb-7"}, {"wandb_run_id": "wandb-7"}, "rename the key"),
        ({"state_dict": {1: 2.0}}, {"state_dict": {"1": 2.0}}, "use string keys, or rename the entry"),
        ({"state_dict": {1: 2.0}}, {"states": {1: 2.0}}, "use string keys, or rename the entry"),
    ],
)
def test_a_state_of_a_trainer_gets_other_keys(
    writer: CheckpointWriter, wrong: dict[Any, Any], right: dict[Any, Any], expected: str
) -> None:
    """Then it is saved; the iteration that contradicts it is left out, or it is advanced."""
    model = bind(linear(), "net")
    assert advised(lambda: writer.save(model, TWO, trainer=StateOf(wrong))) == expected
    saves(writer, model, TWO, trainer=StateOf(right))
    trainer = TrainerState(seed=0)
    first = advised(lambda: writer.save(model, TrainingIteration(0, 1, 4), trainer=trainer))
    assert first == "leave out the iteration, or advance the trainer first"
    saves(writer, model, trainer=trainer)
    trainer.advance(samples=4)
    saves(writer, model, TrainingIteration(0, 1, 4), trainer=trainer)


class Own(torch.Tensor):
    """A subclass of a user."""


BOTH = torch.zeros(4)
#: A value that is refused -> what the advice makes of it; ``value`` and ``array`` are that value.
VALUES: dict[str, Any] = {
    "save value.to_dense()": torch.eye(2).to_sparse(),
    "save value.dequantize()": None,
    "save value.to_padded_tensor(0.0)": None,
    "save torch.from_numpy(array), or array.tolist()": np.arange(3.0),
    "save value.as_subclass(torch.Tensor)": torch.ones(2).as_subclass(Own),
}


def value_for(advice: str) -> Any:
    if "dequantize" in advice:
        return torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8)
    if "padded" in advice:
        return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    return VALUES[advice]


@executes("files/plain_data.py", "value.to_dense()", "value.dequantize()", "value.to_padded_tensor(0.0)")
@executes("files/plain_data.py", "save torch.from_numpy(array), or array.tolist()", "Next: save value.{}")
@pytest.mark.parametrize("advice", VALUES)
@pytest.mark.filterwarnings("ignore:.*(nested|quantized|Quantized|deprecated)")
def test_a_value_that_cannot_be_written_is_converted(writer: CheckpointWriter, advice: str) -> None:
    """By each expression that the message has."""
    value, model = value_for(advice), bind(linear(), "net")
    said = advised(lambda: writer.save(model, TWO, trainer=StateOf({"extra": value})))
    assert said == advice
    for expression in said.removeprefix("save ").split(", or "):
        converted = evaluated(expression, value=value, array=value)
        saves(writer, model, TWO, trainer=StateOf({"extra": converted}))


@executes(
    "files/plain_data.py", "save numbers, strings, lists", "save value.view(torch.uint8)", "save a clone() of one"
)
def test_other_values_are_written_as_plain_ones(writer: CheckpointWriter) -> None:
    """An object as numbers, bits of a dtype without a name as bytes, two dtypes of one memory as two tensors."""
    model = bind(linear(), "net")

    def said(**state: Any) -> str:
        return advised(lambda: writer.save(model, TWO, trainer=StateOf(state)))

    assert said(a=complex) == "save numbers, strings, lists, tuples, dicts and tensors only"
    saves(writer, model, TWO, trainer=StateOf({"a": [1, "b", (2.0,), {"c": torch.ones(2)}]}))
    bits = torch.zeros(4, dtype=torch.uint8).view(getattr(torch, "uint4"))  # noqa: B009 - mypy does not know it
    as_bytes = evaluated(said(a=bits).removeprefix("save "), value=bits)
    saves(writer, model, TWO, trainer=StateOf({"a": as_bytes}))
    whole = torch.zeros(4)
    assert said(a=whole, b=whole.view(torch.int32)) == "save a clone() of one"
    saves(writer, model, TWO, trainer=StateOf({"a": whole, "b": whole.view(torch.int32).clone()}))


@executes("saving/writer.py", "Next: CheckpointWriter(..., retention=Retention(last={}, ...))")
def test_keep_last_becomes_a_rule(paths: PathProvider) -> None:
    """Together with the rules that were given."""
    advice = advised(lambda: CheckpointWriter(paths, keep_last=3, retention={"every": {"epoch": 2}}))
    call = advice.replace("..., retention", "paths, retention").replace("...", "every={'epoch': 2}")
    made = evaluated(call, paths=paths, CheckpointWriter=CheckpointWriter, Retention=Retention)
    assert made.retention == Retention(last=3, every={"epoch": 2})


@executes("saving/writer.py", 'Next: tags=("{}",)', "Next: leave it out", "Next: choose another tag")
@executes("sets/file_names.py", "Next: choose another tag")
@pytest.mark.parametrize("wrong", ["latest", ("latest", "E1_U1_S1"), ("E1",), ("a_cp=b",)])
def test_tags_are_given_as_advised(writer: CheckpointWriter, wrong: Any) -> None:
    """As a tuple, without the one that contradicts, and with another one."""
    model = bind(linear(), "net")
    advice = advised(lambda: writer.save(model, TWO, tags=wrong))
    tags = {"leave it out": ("latest",), "choose another tag": ("other",)}.get(advice)
    given = evaluated(f"dict({advice})")["tags"] if tags is None else tags
    saves(writer, model, TWO, tags=given)


@executes("sets/file_names.py", "Next: rename the model", "Next: shorten the name of the model or the tag")
def test_a_name_that_no_file_can_have_is_changed(writer: CheckpointWriter) -> None:
    """The model is renamed, or its name or the tag gets shorter."""
    long = "a" * 120
    assert len(f"{long}_cp={'b' * 140}_model.th") > 255

    def leaf(name: str) -> Any:
        found = bind(linear(), "net")
        object.__setattr__(found, "name", name)
        return found

    assert advised(lambda: writer.save(leaf("a=b"), TWO)) == "rename the model"
    saves(writer, leaf("a_b"), TWO)
    flat = CheckpointWriter(writer.paths, flat_names=True)
    advice = advised(lambda: flat.save(leaf(long), TWO, tags=("b" * 140,)))
    assert advice == "shorten the name of the model or the tag"
    saves(flat, leaf(long), TWO, tags=("b" * 20,))
    saves(flat, leaf("a"), TWO, tags=("b" * 140,))


@executes("saving/writer.py", "Next: bind(..., optimizer=None) to confirm, or bind(..., is_frozen=False) to save it")
def test_the_optimizer_of_a_frozen_model_is_left_out_or_saved(
    writer: CheckpointWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """Either call of the warning ends it."""
    net = linear()
    optimizer = torch.optim.AdamW(net.parameters())
    writer.save(bind(net, "net", optimizer=optimizer, is_frozen=True), TWO)
    calls = re.findall(r"bind\(\.\.\., \w+=\w+\)", caplog.text.partition("Next: ")[2])
    assert len(calls) == 2
    caplog.clear()
    for call in calls:
        given = "optimizer=optimizer, " if "optimizer=" not in call else "is_frozen=True, "
        model = evaluated(call.replace("..., ", f"net, 'net', {given}"), net=net, optimizer=optimizer)
        before = digests(writer.paths.checkpoint_path / "sets")
        CheckpointWriter(writer.paths).save(model, TWO)
        assert before.items() < digests(writer.paths.checkpoint_path / "sets").items()
    assert "frozen" not in caplog.text


@executes("saving/writer.py", "Next: use another run_id for each run, or auto_resume: true to continue; after a resume")
def test_a_second_training_in_a_folder_is_told_apart(
    tmp_path: Path, writer: CheckpointWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """Another run id, auto_resume and the report each end the warning, and no set of the first one is removed."""
    before = digests(writer.paths.checkpoint_path / "sets")
    net = bind(linear(), "net")
    start = TrainerState(seed=0)
    CheckpointWriter(writer.paths, keep_last=1).save(net, trainer=start)
    assert "Next: use another run_id for each run, or auto_resume: true" in caplog.text
    caplog.clear()
    CheckpointWriter(PathProvider(tmp_path, "other")).save(net, trainer=TrainerState(seed=0))
    stack = InitializerStack.from_config({"initializers": [], "auto_resume": True}, path_provider=writer.paths)
    trainer = TrainerState(seed=0)
    report = stack.initialize(net, trainer=trainer)
    CheckpointWriter(writer.paths, report=report).save(net, trainer=trainer)
    assert "another training" not in caplog.text
    assert before.items() <= digests(writer.paths.checkpoint_path / "sets").items()


@executes("saving/writer.py", "Next: stop the run; ninit verify shows the newest finite set")
def test_the_newest_finite_set_is_shown(writer: CheckpointWriter, caplog: pytest.LogCaptureFixture) -> None:
    """By the command of the warning, with the folder of the run."""
    net = linear()
    with torch.no_grad():
        net.weight.fill_(torch.nan)
    before = digests(writer.paths.checkpoint_path / "sets")
    writer.save(bind(net, "net"), TWO)
    assert "Next: stop the run; ninit verify shows the newest finite set" in caplog.text
    states = {one.name: one.state for one in verify_run(Snapshot(writer.paths)).sets}
    assert states == {"00000001_E1_U10_S100": "good", "00000002_E2_U20_S200": "nonfinite"}
    assert before.items() <= digests(writer.paths.checkpoint_path / "sets").items()


@executes("saving/housekeeping.py", "Next: remove them if they are not needed, or use another run_id")
def test_flat_files_of_another_program_stay_until_they_are_removed(
    tmp_path: Path, paths: PathProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """The save names the file; without it, or in another run, the flat names are written."""
    folder = paths.checkpoint_path
    folder.mkdir(parents=True)
    foreign = folder / f"net_cp={TWO}_model.th"
    foreign.write_bytes(b"of another program")
    net = bind(linear(), "net")
    CheckpointWriter(paths, flat_names=True).save(net, TWO)
    assert f"{foreign} was written or changed by another program and is not replaced" in caplog.text
    assert foreign.read_bytes() == b"of another program"
    caplog.clear()
    other = PathProvider(tmp_path, "other")
    CheckpointWriter(other, flat_names=True).save(net, TWO)
    assert (other.checkpoint_path / foreign.name).is_file()
    foreign.unlink()
    before = digests(folder / "sets")
    CheckpointWriter(paths, flat_names=True).save(net, TWO)
    assert torch.load(foreign, weights_only=True)["checkpoint_tag"] == str(TWO)
    assert before.items() <= digests(folder / "sets").items()
    assert "not replaced" not in caplog.text


@executes("saving/file_writing.py", "Next: call it once, before training")
def test_the_option_of_torch_is_set_before_training(writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a save has checksums, and the option of the program stays as it was set."""
    original = torch.save

    def save(*arguments: Any) -> None:
        torch.serialization.set_crc32_options(False)
        original(*arguments)

    model = bind(linear(), "net")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert advised(lambda: writer.save(model, TWO)).startswith("call it once, before training. ")
    torch.serialization.set_crc32_options(False)
    try:
        saves(writer, model, TWO)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)


@executes("files/storage/disk.py", "Next: set a flag in the handler, and save in the training loop if the flag is set")
def test_a_handler_sets_a_flag(paths: PathProvider) -> None:
    """A save within a save is refused; the loop saves after it."""
    model = bind(linear(), "net")
    flags: list[bool] = []
    advice: list[str] = []

    def handler() -> None:
        if not advice:
            advice.append(advised(lambda: CheckpointWriter(paths).save(model, TWO)))
        flags.append(True)

    class Interrupted(FileSystem):
        def make_folder(self, path: Path) -> None:
            super().make_folder(path)
            if path.parent.name == "sets":
                handler()

    CheckpointWriter(paths, storage=Interrupted()).save(model, ONE)
    assert advice[0].startswith("set a flag in the handler, and save in the training loop if the flag is set")
    assert flags == [True]
    saves(CheckpointWriter(paths), model, TWO)


@executes("saving/writer.py", "Next: save again, or check it with ninit inspect")
def test_a_set_of_which_it_is_unknown_whether_it_is_committed(paths: PathProvider) -> None:
    """It can be looked at, and a second save of the same iteration is committed beside it."""

    class Fails(FileSystem):
        def fsync_folder(self, folder: Path) -> None:
            if (folder / "manifest.json").exists() and folder.parent.name == "sets":
                raise OSError(5, "Input/output error", str(folder))
            super().fsync_folder(folder)

    model = bind(linear(), "net")
    with pytest.raises(CheckpointWriteError, match=r"Next: save again, or check it with ninit inspect") as refused:
        CheckpointWriter(paths, storage=Fails()).save(model, ONE)
    assert refused.value.path is not None
    assert look_at_folder(refused.value.path)
    saves(CheckpointWriter(paths), model, ONE)


@executes("saving/file_writing.py", "Next: choose a name that ends in .th", "Next: choose another name")
def test_a_file_of_weights_gets_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is not a tensor the format of torch, and a name of its own where another program wrote meanwhile."""
    write_weights = file_writing.write_weights
    state = {**linear().state_dict(), "_extra_state": 3}
    refused = advised(lambda: write_weights(tmp_path / "a.safetensors", state))
    suffix = re.search(r"choose a name that ends in (\.th)", refused)
    assert suffix is not None
    assert list(tmp_path.iterdir()) == []
    assert write_weights((tmp_path / "a").with_suffix(suffix[1]), state).format == "torch"
    put = file_writing._put

    def meanwhile(temporary: Path, path: Path, *, replace: bool) -> None:
        path.write_bytes(b"of another program")
        put(temporary, path, replace=replace)

    with monkeypatch.context() as patch:
        patch.setattr(file_writing, "_put", meanwhile)
        assert advised(lambda: write_weights(tmp_path / "b.th", state)).startswith("choose another name")
    advice = advised(lambda: write_weights(tmp_path / "b.th", state))
    assert advice == "choose another name, or use --force"
    before = digests(tmp_path)
    write_weights(tmp_path / "c.th", state)
    assert before.items() < digests(tmp_path).items()
    assert (tmp_path / "b.th").read_bytes() == b"of another program"


@executes("saving/file_writing.py", "Next: pip install --upgrade noether-init-core")
def test_a_probe_of_a_newer_release_names_the_way_to_read_it(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This release refuses it; the release that wrote it, which the command would install, reads it."""
    newer = {name: 99 if isinstance(value, int) else value for name, value in file_writing._PROBE_FORMAT.items()}
    with monkeypatch.context() as patch:
        patch.setattr(file_writing, "_PROBE_FORMAT", newer)
        found = writer.save(bind(linear(), "net"), TWO, probe=torch.ones(1, 3))
        assert file_writing.read_probe(found) is not None
    advice = advised(lambda: file_writing.read_probe(found))
    assert advice == "pip install --upgrade noether-init-core"
    monkeypatch.setattr(file_writing, "_PROBE_FORMAT", newer)
    assert file_writing.read_probe(found) is not None


@executes("saving/writer.py", "Next: save a clone(), or wait until the update has ended")
@executes("saving/file_writing.py", "Next: save a clone(), or wait until the update has ended")
@pytest.mark.parametrize("moment", ["while a file is written", "between two files"])
def test_weights_that_change_are_saved_as_a_clone(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A clone that nothing changes is saved although the update goes on; so are the weights after the update."""
    net, looked_at = linear(), threading.Event()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    between, written, changed = moment == "between two files", threading.Event(), threading.Event()

    def look(data: memoryview, dtype: str) -> Any:
        found = examine_memory(data, dtype)
        if len(data) == net.weight.nbytes:
            if between and looked_at.is_set() and not changed.is_set():  # the moments, after the weights
                changed.set()
                assert written.wait(60)
                with torch.no_grad():
                    net.weight.add_(1)
            looked_at.set()
        return found

    class Updating(FileSystem):
        def open_write(self, path: Path) -> Any:
            file = super().open_write(path)
            if path.name.endswith("_model.th") and not between:
                assert looked_at.wait(60)
                with torch.no_grad():
                    net.weight.add_(1)
            return file

        def fsync(self, file: Any) -> None:
            super().fsync(file)
            written.set()

    monkeypatch.setattr(file_writing, "examine_memory", look)
    updating = CheckpointWriter(writer.paths, storage=Updating())
    advice = advised(lambda: updating.save(bind(net, "net", optimizer=optimizer), TWO))
    assert advice.startswith("save a clone(), or wait until the update has ended")
    clone = linear()
    clone.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
    saves(updating, bind(clone, "net"), TWO)
    saves(writer, bind(net, "net", optimizer=optimizer), TWO)
