"""``resume`` against Noether's recorded starts, callback states and resumed trainings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.ground_truth import (
    bind_target,
    decode,
    digest,
    digests,
    encode,
    expected,
    file_digests,
    models_module,
    paths_for,
    record_id,
    records,
    runs_folder,
)

from noether_init_core import (
    CheckpointNotFoundError,
    ConfigError,
    IncompleteSetError,
    InitializerStack,
    TrainingIteration,
)

MODEL_NAMES = {"mlp_train": "mlp", "composite": "autoenc", "early_stop": "mlp"}

# Where Noether raised, or where its answer hung on the order of the directory listing.
START_DIFFERENT: dict[tuple[str, str], Any] = {
    ("mlp_train", "{'epoch': 2, 'update': 8, 'sample': 64}"): "E2_U8_S64",
    ("mlp_train", "{'epoch': 2, 'update': 8}"): ConfigError,
    ("mlp_train", "{}"): ConfigError,
    ("mlp_train", "{'epoch': '2'}"): "E2_U8_S64",
    ("composite", "{'epoch': 0}"): "E0_U3_S18",
    ("composite", "{'epoch': 1}"): "E1_U7_S42",
    ("composite", "{'epoch': 2}"): "E2_U11_S66",
    ("composite", "{'epoch': 1, 'update': 6, 'sample': 36}"): "E1_U6_S36",
    ("early_stop", "{'epoch': 1}"): "E1_U7_S28",
}


def resume_config(run: str, tag: Any, **more: Any) -> dict[str, Any]:
    stage = expected(run)["stage_name"]
    base = {"kind": "resume", "run_id": run, "stage_name": stage, "model_name": MODEL_NAMES[run], "checkpoint_tag": tag}
    return {**base, **more}


@pytest.mark.parametrize(("run", "record"), records("start_checkpoint"), ids=record_id)
def test_start_checkpoint_of_every_tag_form(run: str, record: dict[str, Any]) -> None:
    """Training starts where Noether said; open tags mean the newest match, missing ones say what exists."""
    config = resume_config(run, record["tag"], model_name=record.get("model_name", MODEL_NAMES[run]))
    if "stage" in record:
        config["stage_name"] = record["stage"]
    different = START_DIFFERENT.get((run, str(record["tag"])))
    if isinstance(different, type) or (different is None and record["result"] is None):
        with pytest.raises(different or CheckpointNotFoundError):
            InitializerStack.from_config([config], path_provider=paths_for(run)).start_checkpoint()
        return
    wanted = TrainingIteration.from_string(different) if different else TrainingIteration(**record["result"])
    stack = InitializerStack.from_config([config], path_provider=paths_for(run))
    assert stack.start_checkpoint() == wanted
    assert stack.start_checkpoint() == wanted


def test_a_best_tag_names_the_tags_that_can_be_resumed() -> None:
    """A set with weights only is refused, with the tag of the same iteration that has all parts."""
    if runs_folder() is None:
        pytest.skip("the folder shared/noether_runs is absent")
    stack = InitializerStack.from_config(
        [resume_config("mlp_train", "best_model.loss.val.total")], path_provider=paths_for("mlp_train")
    )
    with pytest.raises(IncompleteSetError, match="E3_U12_S96") as caught:
        stack.start_checkpoint()
    assert "E3_U12_S96" in caught.value.candidates
    assert "previous_run" in str(caught.value)


class RecordedCallback:
    """A stateful callback with the interface of Noether's."""

    def __init__(self, key: str, state: dict[str, Any]) -> None:
        self.checkpoint_key = key
        self.state = state
        self.times_loaded = 0

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict
        self.times_loaded += 1


class ExponentialAverage:
    """A callback that reads the averaged weights of ``latest`` at resumption, as Noether's EMA callback does."""

    def __init__(self, file_name: str) -> None:
        self.file_name = file_name
        self.weights: dict[str, torch.Tensor] = {}

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state_dict: Any) -> None:
        raise AssertionError("a callback without state was handed one")

    def resume_from_checkpoint(self, resumption_paths: Any, model: Any) -> None:
        file = resumption_paths.checkpoint_path / self.file_name
        self.weights = torch.load(file, weights_only=True)["state_dict"]


def plain_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state of the ground truth whose tensors are empty ones."""
    return {
        key: torch.empty(0) if isinstance(value, dict) and "__tensor__" in value else value
        for key, value in state.items()
    }


@pytest.mark.parametrize(("run", "record"), records("resume_callbacks"), ids=record_id)
def test_callback_states_are_the_recorded_ones(run: str, record: dict[str, Any]) -> None:
    """Callbacks get Noether's states by key; the averaged weights are those of the resumed tag, not of latest."""
    tag = record["tag"]
    callbacks: list[Any] = [RecordedCallback(key, plain_state(decode(state))) for _cls, key, state in record["before"]]
    ema_name = {"mlp_train": "mlp_ema=0.9", "composite": "autoenc.encoder_ema=0.8"}[run]
    average = ExponentialAverage(f"{ema_name}_cp=latest_model.th")
    module = models_module().build(run)
    stack = InitializerStack.from_config([resume_config(run, tag)], path_provider=paths_for(run))
    stack.initializers[0].init_callbacks([*callbacks, average], bind_target(module, MODEL_NAMES[run]))
    after = [[key, encode(callback.state)] for callback in callbacks for key in [callback.checkpoint_key]]
    assert after == [[key, encode(decode(state))] for _cls, key, state in record["after"]]
    ema_of_tag = f"{ema_name}_cp={tag}_model.th"
    recorded = next(iter(record["ema_after"].values()))
    if isinstance(tag, str) and f"{expected(run)['checkpoint_dir']}/{ema_of_tag}" in expected(run)["files"]:
        recorded = file_digests(run, ema_of_tag)
    assert {name: digest(tensor) for name, tensor in average.weights.items()} == recorded


class PlainTrainer:
    """A trainer with the interface of Noether's: its state dict holds those of its callbacks."""

    def __init__(self, callbacks: list[Any]) -> None:
        self.callbacks = callbacks
        self.iteration: dict[str, int] = {"epoch": 0, "update": 0, "sample": 0}

    def state_dict(self) -> dict[str, Any]:
        return {
            "callback_state_dicts": {callback.checkpoint_key: callback.state_dict() for callback in self.callbacks},
            "training_iteration": dict(self.iteration),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for callback in self.callbacks:
            if callback.checkpoint_key in state_dict["callback_state_dicts"]:
                callback.load_state_dict(state_dict["callback_state_dicts"][callback.checkpoint_key])
        self.iteration = state_dict["training_iteration"]


def test_callbacks_that_the_trainer_loaded_are_not_loaded_twice() -> None:
    """A trainer that restores its callbacks itself does so once."""
    if runs_folder() is None:
        pytest.skip("the folder shared/noether_runs is absent")
    callback = RecordedCallback("best_ckpt", {"best_metric_value": float("inf"), "tolerance_counter": 0})
    trainer = PlainTrainer([callback])
    model = bind_target(models_module().build("composite"), "autoenc")
    stack = InitializerStack.from_config([resume_config("composite", "latest")], path_provider=paths_for("composite"))
    report = stack.initialize(model, trainer=trainer, callbacks=[callback])
    assert callback.times_loaded == 1
    assert callback.state["tolerance_counter"] == 6
    assert trainer.iteration == {"epoch": 3, "update": 12, "sample": 72} == report.start.to_mapping()


def resumable(record: dict[str, Any]) -> bool:
    """Records that a plain loop over the data in order can repeat from the files that are there."""
    return not record.get("shuffle") and record["kind"] in ("finished_run", "crash", "sigterm")


def resume_tag(run: str, record: dict[str, Any]) -> Any:
    """The tag here: interrupted runs were resumed from a ``latest`` that was later overwritten."""
    if record["kind"] == "finished_run":
        return record["tag"]
    return str(TrainingIteration(**record["start"]))


def twin(run: str, start: TrainingIteration) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The module and optimizers of ``run`` with the tensors of Noether's files at ``start``, read by torch alone."""
    root = runs_folder()
    assert root is not None
    folder = root / expected(run)["checkpoint_dir"]
    (moments,) = folder.glob(f"*_cp={start}[_.]*optim.th")
    tag = moments.name.partition("_cp=")[2].removesuffix("_optim.th")
    models = models_module()
    module = models.build(run, seed=6)
    parts = getattr(module, "submodels", {"": module})
    for key, part in parts.items():
        name = f"{MODEL_NAMES[run]}.{key}" if key else MODEL_NAMES[run]
        part.load_state_dict(torch.load(folder / f"{name}_cp={tag}_model.th", weights_only=True)["state_dict"])
    optimizers = models.make_optimizers(run, module)
    ((key, (optimizer, _clip, _clipped)),) = optimizers.items()
    stored = torch.load(moments, weights_only=True)
    places = {name: place for place, name in stored["param_idx_to_name"].items()}
    names = {id(parameter): name for name, parameter in parts[key].named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = {number: stored["state"][places[name]] for number, name in enumerate(order)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return module, optimizers


@pytest.mark.parametrize(
    ("run", "record"), [(run, record) for run, record in records("resume_training") if resumable(record)], ids=record_id
)
def test_resumed_training_is_that_of_a_twin_and_the_recorded_one(run: str, record: dict[str, Any]) -> None:
    """Training on gives bit for bit what a twin with Noether's tensors gives, and Noether's losses to 1e-5.

    The last bits of the recorded losses are those of another processor, so only the twin is compared exactly.
    """
    truth = expected(run)
    models = models_module()
    module = models.build(run, seed=5)
    optimizers = models.make_optimizers(run, module)
    model = bind_target(module, MODEL_NAMES[run], {key: entry[0] for key, entry in optimizers.items()})
    tag = resume_tag(run, record)
    stack = InitializerStack.from_config([resume_config(run, tag)], path_provider=paths_for(run))
    if record["exception"] is not None and tag == "best_model.loss.val.total":
        with pytest.raises(IncompleteSetError):
            stack.initialize(model)
        return
    if run == "mlp_train" and record["kind"] == "sigterm":
        with pytest.raises(CheckpointNotFoundError, match="E2_U10_S80"):  # that folder was not kept
            stack.initialize(model)
        return
    report = stack.initialize(model, trainer=PlainTrainer([]))
    start = report.start.update
    assert start is not None
    if not (isinstance(tag, dict) and len(tag) == 1 and (run, str(tag)) in START_DIFFERENT) and "start" in record:
        assert report.start == TrainingIteration(**record["start"])
    end, rates = truth["training"]["end"]["update"], truth["training"]["lr_per_update"]
    losses = models.reference_train(run, module, optimizers, start, end, rates)
    other, other_optimizers = twin(run, report.start)
    assert losses == models.reference_train(run, other, other_optimizers, start, end, rates)
    assert digests(module) == digests(other)
    wanted = [tuple(pair) for pair in truth["training"]["losses"] if pair[0] > start]
    assert [update for update, _loss in losses] == [update for update, _loss in wanted]
    assert [loss for _update, loss in losses] == pytest.approx([loss for _update, loss in wanted], rel=1e-5)


@pytest.mark.parametrize("run", ["mlp_train", "composite"])
def test_without_its_moments_training_goes_elsewhere(run: str) -> None:
    """The comparison above would notice an optimizer that was not restored."""
    if runs_folder() is None:
        pytest.skip("the folder shared/noether_runs is absent")
    truth = expected(run)
    models = models_module()
    module = models.build(run, seed=5)
    optimizers = models.make_optimizers(run, module)
    model = bind_target(module, MODEL_NAMES[run], {key: entry[0] for key, entry in optimizers.items()})
    tag = {"mlp_train": "E2_U8_S64", "composite": "E1_U6_S36"}[run]
    config = resume_config(run, tag, load_optim=False)
    start = InitializerStack.from_config([config], path_provider=paths_for(run)).initialize(model).start.update
    models.reference_train(run, module, optimizers, start, start + 2, truth["training"]["lr_per_update"])
    config = resume_config(run, tag)
    other = models.build(run, seed=5)
    other_optimizers = models.make_optimizers(run, other)
    model = bind_target(other, MODEL_NAMES[run], {key: entry[0] for key, entry in other_optimizers.items()})
    InitializerStack.from_config([config], path_provider=paths_for(run)).initialize(model)
    models.reference_train(run, other, other_optimizers, start, start + 2, truth["training"]["lr_per_update"])
    assert digests(module) != digests(other)


def every_optimizer_file() -> list[tuple[str, str]]:
    return [
        (run, name)
        for run in ("mlp_train", "composite", "early_stop")
        for name in expected(run).get("files", {})
        if name.endswith("_optim.th")
    ]


@pytest.mark.parametrize(("run", "file"), every_optimizer_file(), ids=str)
def test_every_optimizer_file_gives_its_moments(run: str, file: str) -> None:
    """The optimizer holds the moments of the file, each beside the parameter that the file names."""
    record = expected(run)["files"][file]
    tag = file.partition("_cp=")[2].removesuffix("_optim.th")
    models = models_module()
    module = models.build(run, seed=5)
    optimizers = models.make_optimizers(run, module)
    (key, (optimizer, _clip, _clipped)) = next(iter(optimizers.items()))
    model = bind_target(module, MODEL_NAMES[run], {key: optimizer})
    InitializerStack.from_config([resume_config(run, tag)], path_provider=paths_for(run)).initialize(model)
    owner = module.encoder if run == "composite" else module
    names = {id(parameter): name for name, parameter in owner.named_parameters()}
    state = {names[id(parameter)]: encode(values) for parameter, values in optimizer.state.items()}
    wanted = {record["param_idx_to_name"][index]: values for index, values in record["state"].items()}
    assert state == wanted
    stored_fields = [{**group, "params": None} for group in decode(record["param_groups"])]
    fields = [{**group, "params": None} for group in encode([{**g, "params": None} for g in optimizer.param_groups])]
    assert fields == stored_fields
