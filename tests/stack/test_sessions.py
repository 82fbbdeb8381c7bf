"""What was selected for a start is what is loaded, or nothing is: sets that come, go and break in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import flip_tensor_bit

from noether_init_core import (
    CheckpointCorruptError,
    CheckpointWriter,
    ConfigError,
    InitError,
    InitializerBase,
    InitializerStack,
    KindConfig,
    PartlyInitializedError,
    PathProvider,
    StartConflictError,
    TornSetError,
    TrainingIteration,
    bind,
    compose,
    kinds,
)


class Trainer:
    """A trainer whose state is the update that it was saved at."""

    def __init__(self, update: int = 0) -> None:
        self.update = update

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update = state["update"]


def net(update: int) -> torch.nn.Module:
    """A model whose weights say at which update it was saved."""
    module = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(module.weight, float(update))
    return module


def save(paths: PathProvider, update: int) -> Path:
    saved = CheckpointWriter(paths).save(
        bind(net(update), name="net"), TrainingIteration(1, update, 10 * update), trainer=Trainer(update)
    )
    return saved.folder


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    """A run with sets at updates 5 and 7."""
    found = PathProvider(tmp_path, "run")
    save(found, 5)
    save(found, 7)
    return found


def newest(paths: PathProvider) -> Path:
    return max((paths.checkpoint_path / "sets").iterdir())


def retire(paths: PathProvider) -> None:
    shutil.rmtree(newest(paths))


def lose_the_manifest(paths: PathProvider) -> None:
    (newest(paths) / "manifest.json").unlink()
    shutil.rmtree(newest(paths))


def damage_the_weights(paths: PathProvider) -> None:
    (file,) = newest(paths).glob("*_model.th")
    flip_tensor_bit(file)


def write_again(paths: PathProvider) -> None:
    """The same folder and iteration, other weights."""
    folder = newest(paths)
    shutil.rmtree(folder)
    saved = (
        CheckpointWriter(paths).save(bind(net(99), name="net"), TrainingIteration(1, 7, 70), trainer=Trainer(99)).folder
    )
    if saved != folder:
        saved.rename(folder)


@pytest.mark.parametrize("change", [retire, lose_the_manifest, damage_the_weights, write_again])
@pytest.mark.parametrize("config", [{}, {"on_invalid": "previous"}])
def test_a_set_that_goes_or_breaks_after_the_start_was_told_is_an_error(
    paths: PathProvider, change: Callable[[PathProvider], None], config: dict[str, str]
) -> None:
    """No other set takes its place, though an older one is good: start and weights would be of two sets."""
    stack = InitializerStack.from_config([{"kind": "resume", **config}], path_provider=paths)
    assert stack.start_checkpoint() == TrainingIteration(1, 7, 70)
    change(paths)
    model, trainer = bind(net(0), name="net"), Trainer()
    with pytest.raises(InitError):
        stack.initialize(model, trainer=trainer)
    assert (model.module.weight[0, 0].item(), trainer.update) == (0, 0)


@pytest.mark.parametrize("config", [{}, {"on_invalid": "previous"}, {"checkpoint_tag": "E1"}])
def test_a_set_that_is_committed_after_the_start_was_told_is_left(paths: PathProvider, config: dict[str, str]) -> None:
    """Start, weights and trainer are of the set that was told."""
    stack = InitializerStack.from_config([{"kind": "resume", **config}], path_provider=paths)
    start = stack.start_checkpoint()
    save(paths, 9)
    model, trainer = bind(net(0), name="net"), Trainer()
    report = stack.initialize(model, trainer=trainer)
    assert report.start == start == TrainingIteration(1, 7, 70)
    assert (model.module.weight[0, 0].item(), trainer.update) == (7, 7)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("parts", [("optim",), ("optim", "trainer"), ("trainer",)])
def test_optimizer_state_of_flat_files_that_is_written_again_is_refused(
    tmp_path: Path, parts: tuple[str, ...], in_place: bool
) -> None:
    """Noether's optimizer files say no iteration, so that only their times tell that they are of another one."""
    paths = PathProvider(tmp_path, "flat")
    paths.checkpoint_path.mkdir(parents=True)

    def model_at(update: int) -> tuple[Any, torch.optim.Optimizer]:
        module = net(update)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        module(torch.full((1, 3), float(update))).sum().backward()
        optimizer.step()
        return bind(module, name="net", optimizer=optimizer), optimizer

    def write(update: int, parts: tuple[str, ...]) -> None:
        said = {"training_iteration": {"epoch": 1, "update": update, "sample": 10 * update}}
        model, optimizer = model_at(update)
        contents: dict[str, Any] = {
            "trainer": {**said, "callback_state_dicts": {}, "update": update},
            "model": {**said, "state_dict": model.module.state_dict()},
            "optim": optimizer.state_dict(),
        }
        for part in parts:
            path = paths.checkpoint_path / f"net_cp=latest_{part}.th"
            target = path if in_place else path.with_suffix(".partial")
            torch.save(contents[part], target)
            os.utime(target, ns=(update * 10**17, update * 10**17))  # however fast the machine is
            target.rename(path)

    write(7, ("model", "optim", "trainer"))
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    assert stack.start_checkpoint() == TrainingIteration(1, 7, 70)
    write(9, parts)
    model, optimizer = model_at(0)
    trainer = Trainer()
    if parts == ("trainer",):  # it was read before, whole
        stack.initialize(model, trainer=trainer)
        assert trainer.update == 7
        return
    with pytest.raises(TornSetError, match="was written again since it was selected"):
        stack.initialize(model, trainer=trainer)
    assert (trainer.update, optimizer.state[model.module.weight]["momentum_buffer"].abs().sum().item()) == (0, 0)


def test_flat_files_that_are_written_again_after_the_start_was_told_are_refused(tmp_path: Path) -> None:
    """Noether rewrites ``latest`` in place; the trainer's state was read before."""
    paths = PathProvider(tmp_path, "flat")
    paths.checkpoint_path.mkdir(parents=True)

    def write(update: int) -> None:
        iteration = {"epoch": 1, "update": update, "sample": 10 * update}
        name = str(paths.checkpoint_path / "net_cp=latest_{}.th")
        torch.save({"training_iteration": iteration, "callback_state_dicts": {}}, name.format("trainer"))
        torch.save({"training_iteration": iteration, "state_dict": net(update).state_dict()}, name.format("model"))

    write(7)
    stack = InitializerStack.from_config([{"kind": "resume", "load_optim": False}], path_provider=paths)
    assert stack.start_checkpoint() == TrainingIteration(1, 7, 70)
    write(9)
    model = bind(net(0), name="net")
    with pytest.raises(TornSetError, match="was written again since it was selected"):
        stack.initialize(model)
    assert model.module.weight[0, 0].item() == 0


def test_close_drops_what_was_selected(paths: PathProvider) -> None:
    """The next start is selected anew; closing twice is fine."""
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    stack.start_checkpoint()
    save(paths, 9)
    stack.close()
    stack.close()
    report = stack.initialize(bind(net(0), name="net"), trainer=Trainer())
    assert report.start == TrainingIteration(1, 9, 90)


def test_a_session_lasts_no_longer_than_a_call_of_the_stack(paths: PathProvider) -> None:
    """Neither after success nor after a failure an initializer holds anything."""
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    (initializer,) = stack.initializers
    before = dict(vars(initializer))
    stack.start_checkpoint()
    stack.plan(bind(net(0), name="net"))
    stack.initialize(bind(net(0), name="net"), trainer=Trainer())
    damage_the_weights(paths)
    with pytest.raises(CheckpointCorruptError):
        stack.initialize(bind(net(0), name="net"), trainer=Trainer())
    after = dict(vars(initializer))
    assert after.pop("session") is before.pop("session", None) is None
    assert after == before


class Asking(Trainer):
    """Asks a stack for its plan while it takes its state; meanwhile another process has committed a set."""

    stack: InitializerStack
    model: Any
    paths: PathProvider

    def load_state_dict(self, state: dict[str, Any]) -> None:
        save(self.paths, 9)
        self.stack.plan(self.model)


@pytest.mark.parametrize("which", ["the same stack", "another stack"])
def test_a_question_during_an_initialization_is_refused_and_loads_nothing_else(paths: PathProvider, which: str) -> None:
    """It would end the session; the next hook would select another set than the one that was started from."""
    resume = kinds.create({"kind": "resume"}, path_provider=paths)
    stack = InitializerStack([resume])
    trainer, module = Asking(), net(0)
    trainer.stack = stack if which == "the same stack" else InitializerStack([resume])
    trainer.model, trainer.paths = bind(module, name="net"), paths
    stack.start_checkpoint()
    with pytest.raises(PartlyInitializedError, match="called again") as caught:
        stack.initialize(trainer.model, trainer=trainer)
    assert isinstance(caught.value.__cause__, ConfigError)
    assert module.weight.unique().tolist() == [0.0]
    assert resume.session is None


def test_a_submodel_that_an_earlier_kind_replaces_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    """What was open for the model from before must not be written into it."""
    paths = PathProvider(tmp_path, "run")
    CheckpointWriter(paths).save(compose("whole", {"a": bind(net(3), name="a")}), TrainingIteration(1, 3, 30))

    class Whole:
        name = "whole"

        def __init__(self) -> None:
            self.submodels: dict[str, Any] = {"a": bind(net(0), name="a")}

    class Swap(InitializerBase):
        def init_weights(self, model: Any) -> None:
            model.submodels["a"] = bind(net(1), name="a")

        def init_optimizer(self, model: Any) -> None:
            """Nothing."""

    whole = Whole()
    previous = kinds.create({"kind": "previous_run", "run_id": "run"}, path_provider=paths.with_run("new"))
    InitializerStack([Swap(KindConfig(kind="swap")), previous]).initialize(whole)
    assert whole.submodels["a"].weight.unique().tolist() == [3.0]


def test_a_file_that_cannot_be_closed_leaves_no_session_behind(
    paths: PathProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call selects anew."""
    initializer: Any = kinds.create({"kind": "previous_run", "run_id": "run"}, path_provider=paths.with_run("new"))
    with monkeypatch.context() as patch:
        opened = initializer.open

        def failing(source: Any) -> Any:
            reader = opened(source)
            close = reader.close

            def fails() -> None:
                close()
                raise OSError("the disk is gone")

            patch.setattr(reader, "close", fails, raising=False)
            return reader

        patch.setattr(initializer, "open", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            initializer.plan(bind(net(0), name="net"))
    assert initializer.session is None
    save(paths, 9)
    module = net(0)
    initializer.init_weights(bind(module, name="net"))
    assert module.weight.unique().tolist() == [9.0]


def test_a_retry_does_not_load_another_set_of_the_same_iteration(paths: PathProvider) -> None:
    """The caller was told of one set; after a failure another one of that iteration is another start."""
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    told = stack.start_checkpoint()
    with pytest.raises(InitError):
        stack.initialize(bind(torch.nn.Linear(5, 5), name="net"), trainer=Trainer())
    CheckpointWriter(paths).save(bind(net(70), name="net"), told, trainer=Trainer(7))
    module = net(0)
    with pytest.raises(StartConflictError, match="of another set"):
        stack.initialize(bind(module, name="net"), trainer=Trainer())
    assert module.weight.unique().tolist() == [0.0]
    assert stack.start_checkpoint() == told
    stack.initialize(bind(module, name="net"), trainer=Trainer())
    assert module.weight.unique().tolist() == [70.0]
