"""Models of every shape: nested, partly absent, frozen, tied, with extra state, without memory."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from noether_init_core import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointInitializer,
    CheckpointNotFoundError,
    CheckpointWriter,
    ConfigError,
    InitializerStack,
    PartlyInitializedError,
    PathProvider,
    PlanError,
    StateMismatchError,
    TornSetError,
    TrainerState,
    TrainingIteration,
    bind,
    compose,
    open_checkpoint,
)

ITERATION = TrainingIteration(1, 5, 40)


def linear(seed: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2)


def nested(seed: int) -> tuple[list[torch.nn.Linear], Any]:
    """outer -> (inner -> (left, right), tail, none)."""
    layers = [linear(seed), linear(seed + 1), linear(seed + 2)]
    inner = compose("inner", {"left": bind(layers[0], name="l"), "right": bind(layers[1], name="r")})
    return layers, compose("outer", {"body": inner, "tail": bind(layers[2], name="t"), "none": None})


def equal(first: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = first.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    return PathProvider(tmp_path, "source")


def start(config: dict[str, Any], paths: PathProvider, model: Any, **more: Any) -> Any:
    provider = paths if config["kind"] == "resume" else paths.with_run("new")
    return InitializerStack.from_config([config], path_provider=provider).initialize(model, **more)


@pytest.mark.parametrize("kind", ["previous_run", "resume"])
def test_nested_composites_are_found_under_their_full_path(paths: PathProvider, kind: str) -> None:
    """What we saved for a composite in a composite comes back to the same leaf; None is left out."""
    source, model = nested(0)
    saved = CheckpointWriter(paths, flat_names=True).save(model, ITERATION)
    assert saved.models("model") == ("outer.body.left", "outer.body.right", "outer.tail")
    target, other = nested(10)
    start({"kind": kind, "run_id": "source"}, paths, other)
    assert all(equal(mine, theirs) for mine, theirs in zip(source, target, strict=True))


@pytest.mark.parametrize("kind", ["previous_run", "resume"])
def test_nested_composites_of_noether_are_found_under_its_names(paths: PathProvider, kind: str) -> None:
    """Noether's writer names an inner submodel after the inner composite only."""
    source, _model = nested(0)
    paths.checkpoint_path.mkdir(parents=True)
    for name, module in zip(("inner.left", "inner.right", "outer.tail"), source, strict=True):
        torch.save(
            {"state_dict": module.state_dict(), "training_iteration": ITERATION.to_mapping(), "run_id": "source"},
            paths.checkpoint_path / f"{name}_cp=latest_model.th",
        )
    trainer = {"callback_state_dicts": {}, "training_iteration": ITERATION.to_mapping()}
    torch.save(trainer, paths.checkpoint_path / "outer_cp=latest_trainer.th")
    target, other = nested(10)
    start({"kind": kind, "run_id": "source"}, paths, other)
    assert all(equal(mine, theirs) for mine, theirs in zip(source, target, strict=True))


def test_files_of_different_iterations_are_refused_as_torn(paths: PathProvider) -> None:
    """Encoder of one iteration and decoder of another, under one tag, load into nothing."""
    paths.checkpoint_path.mkdir(parents=True)
    for name, update in (("pair.a", 5), ("pair.b", 6)):
        content = {
            "state_dict": linear(0).state_dict(),
            "training_iteration": {"epoch": 1, "update": update, "sample": 9},
        }
        torch.save({**content, "run_id": "source"}, paths.checkpoint_path / f"{name}_cp=latest_model.th")
    target = [linear(5), linear(6)]
    before = [layer.weight.clone() for layer in target]
    model = compose("pair", {"a": bind(target[0], name="a"), "b": bind(target[1], name="b")})
    with pytest.raises(TornSetError) as caught:
        start({"kind": "previous_run", "run_id": "source"}, paths, model)
    assert set(caught.value.found) == {"pair.a_cp=latest_model.th", "pair.b_cp=latest_model.th"}
    assert all(torch.equal(layer.weight, old) for layer, old in zip(target, before, strict=True))


def test_a_trainer_file_of_another_iteration_is_refused_as_torn(paths: PathProvider) -> None:
    """Resume never pairs weights with a trainer of another iteration."""
    paths.checkpoint_path.mkdir(parents=True)
    content = {"state_dict": linear(0).state_dict(), "training_iteration": {"epoch": 1, "update": 5, "sample": 9}}
    torch.save({**content, "run_id": "source"}, paths.checkpoint_path / "net_cp=latest_model.th")
    trainer = {"callback_state_dicts": {}, "training_iteration": {"epoch": 1, "update": 6, "sample": 9}}
    torch.save(trainer, paths.checkpoint_path / "net_cp=latest_trainer.th")
    with pytest.raises(TornSetError):
        start({"kind": "resume"}, paths, bind(linear(4), name="net"))


class Tied(torch.nn.Module):
    """An embedding whose weight is also that of the head, and a mask that the state dict has not."""

    mask: torch.Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)


def test_tied_weights_stay_tied_and_conflicting_ones_are_refused(paths: PathProvider, tmp_path: Path) -> None:
    """One stored name is enough; two that differ are an error before anything changes."""
    source, target = Tied(0), Tied(1)
    wanted = source.embedding.weight.detach().clone()
    one = tmp_path / "one.pt"
    torch.save({"head.weight": wanted, "mask": torch.zeros(3)}, one)  # as averaged weights: alias and mask
    start({"kind": "file", "path": str(one)}, paths, bind(target, name="tied"))
    assert target.head.weight is target.embedding.weight
    assert torch.equal(target.embedding.weight, wanted)
    assert torch.equal(target.mask, torch.ones(3))
    two = tmp_path / "two.pt"
    torch.save({"head.weight": wanted, "embedding.weight": wanted + 1}, two)
    with pytest.raises(PlanError, match="differ in the file but are one tensor"):
        start({"kind": "file", "path": str(two)}, paths, bind(target, name="tied"))
    assert torch.equal(target.embedding.weight, wanted)


class WithExtraState(torch.nn.Module):
    """A module that keeps a number outside its tensors."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.number = number

    def get_extra_state(self) -> dict[str, Any]:
        return {"number": self.number, "tensor": torch.full((2,), float(self.number))}

    def set_extra_state(self, state: Any) -> None:
        self.number = int(state["tensor"][0]) + state["number"]


def test_extra_state_of_modules_comes_along(paths: PathProvider) -> None:
    """State that is no tensor is handed to the module that it belongs to, with real tensors in it."""
    CheckpointWriter(paths, flat_names=True).save(bind(WithExtraState(4), name="net"), ITERATION)
    target = WithExtraState(1)
    start({"kind": "previous_run", "run_id": "source"}, paths, bind(target, name="net"))
    assert target.number == 8


def test_frozen_models_get_weights_and_keep_their_optimizer(paths: PathProvider) -> None:
    """A frozen submodel is loaded, its optimizer is neither saved nor asked for."""
    source = linear(0)
    for parameter in source.parameters():
        parameter.requires_grad = False
    optimizer = torch.optim.AdamW(source.parameters())
    saved = CheckpointWriter(paths, flat_names=True).save(bind(source, name="net", optimizer=optimizer), ITERATION)
    assert saved.models("optim") == ()
    target = linear(1)
    target.requires_grad_(False)
    model = bind(target, name="net", optimizer=torch.optim.AdamW(target.parameters()))
    report = start({"kind": "resume"}, paths, model)
    assert equal(source, target)
    assert report.start == ITERATION


def test_a_tensor_without_memory_that_something_refers_to_weakly_is_refused(paths: PathProvider) -> None:
    """torch could not give it memory; the error comes before anything has changed."""
    CheckpointWriter(paths).save(bind(torch.nn.Linear(2, 2), name="net"), ITERATION)
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    reference = weakref.ref(module.bias)
    with pytest.raises(PlanError, match="bias cannot get memory"):
        start({"kind": "previous_run", "run_id": "source"}, paths, bind(module, name="net"))
    assert reference() is module.bias
    assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("verify", ["full", "header", "none"])
def test_a_model_without_memory_is_read_into_fresh_memory(paths: PathProvider, verify: str) -> None:
    """Parameters and buffers of a model on the meta device get memory; objects, ties and gradients stay as they are."""
    source: Any = torch.nn.Sequential(Tied(0), torch.nn.BatchNorm1d(3))
    source[1].running_mean.fill_(4)
    CheckpointWriter(paths, flat_names=True).save(bind(source, name="net"), ITERATION)
    with torch.device("meta"):
        module: Any = torch.nn.Sequential(Tied(1), torch.nn.BatchNorm1d(3))
    module[0].mask = torch.ones(3)
    module[1].bias.requires_grad = False
    before = dict(module.named_parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    config = {"kind": "previous_run", "run_id": "source", "verify": verify}
    stack = InitializerStack.from_config([config], path_provider=paths.with_run("n"))
    assert stack.plan(bind(module, name="net")).is_fine
    stack.initialize(bind(module, name="net"))
    assert equal(source, module)
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert module[0].head.weight is module[0].embedding.weight
    assert [name for name, parameter in module.named_parameters() if not parameter.requires_grad] == ["1.bias"]
    module[0].embedding.weight.sum().backward()
    optimizer.step()
    assert torch.equal(module[0].head.weight, source[0].head.weight - 1)
    again = torch.nn.Sequential(Tied(2), torch.nn.BatchNorm1d(3))
    start(config, paths, bind(again, name="net"))
    assert equal(source, again)  # what was written to the model never reached the file


def test_memory_that_a_file_cannot_give_is_asked_for(paths: PathProvider) -> None:
    """A buffer that no file has, and an entry that is kept, would stay without values: both are named."""
    CheckpointWriter(paths, flat_names=True).save(bind(Tied(0), name="net"), ITERATION)
    with torch.device("meta"):
        module = Tied(1)
    with pytest.raises(PlanError, match="mask would stay there") as caught:
        start({"kind": "previous_run", "run_id": "source"}, paths, bind(module, name="net"))
    (problem,) = caught.value.problems
    assert problem.startswith("net is on the meta device, and mask would stay there")
    assert module.embedding.weight.is_meta
    CheckpointWriter(paths.with_run("other"), flat_names=True).save(bind(linear(0), name="net"), ITERATION)
    with torch.device("meta"):
        layer = torch.nn.Linear(3, 2)
    config = {"kind": "previous_run", "run_id": "other", "patterns_to_instantiate": ["bias"]}
    with pytest.raises(PlanError, match="bias would stay there"):
        start(config, paths, bind(layer, name="net"))
    assert layer.weight.is_meta


def test_a_model_without_memory_can_have_another_dtype(paths: PathProvider) -> None:
    """What the file holds in another dtype is cast on its way, mapped or not."""
    CheckpointWriter(paths, flat_names=True).save(bind(linear(0), name="net"), ITERATION)
    for verify in ("full", "none"):
        with torch.device("meta"):
            module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
        start({"kind": "previous_run", "run_id": "source", "verify": verify}, paths, bind(module, name="net"))
        assert torch.equal(module.weight, linear(0).weight.bfloat16())


def test_file_reads_a_bare_state_dict_and_checks_its_digest(paths: PathProvider, tmp_path: Path) -> None:
    """``kind: file`` opens what torch.save wrote; a digest that differs stops it."""
    source, target = linear(0), linear(1)
    path = tmp_path / "weights.pt"
    torch.save(source.state_dict(), path)
    start({"kind": "file", "path": str(path)}, paths, bind(target, name="net"))
    assert equal(source, target)
    before = target.weight.clone()
    with pytest.raises(CheckpointCorruptError, match="has the digest"):
        start({"kind": "file", "path": str(path), "digest": "sha256:" + "0" * 64}, paths, bind(target, name="net"))
    assert torch.equal(target.weight, before)
    with pytest.raises(CheckpointNotFoundError, match=r"weight\.pt does not exist\. Found in .*: weights\.pt"):
        start({"kind": "file", "path": str(tmp_path / "weight.pt")}, paths, bind(target, name="net"))
    two = compose("pair", {"a": bind(linear(0), name="a"), "b": bind(linear(1), name="b")})
    with pytest.raises(ConfigError, match="Next: submodel: a"):
        start({"kind": "file", "path": str(path)}, paths, two)


def test_the_source_run_can_live_under_another_output_root(paths: PathProvider, tmp_path: Path) -> None:
    """``output_path`` names the root; without a path provider it is enough together with ``run_id``."""
    CheckpointWriter(paths, flat_names=True).save(bind(linear(0), name="net"), ITERATION)
    config = {"kind": "previous_run", "run_id": "source", "output_path": str(tmp_path)}
    target = linear(1)
    elsewhere = PathProvider(tmp_path / "elsewhere", "new")
    InitializerStack.from_config([config], path_provider=elsewhere).initialize(bind(target, name="net"))
    assert equal(target, linear(0))
    InitializerStack.from_config([config]).initialize(bind(linear(2), name="net"))
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ConfigError, match="path_provider"):
        InitializerStack.from_config([{"kind": "previous_run", "run_id": "source"}])


def test_a_debug_run_is_sought_outside_debug_where_it_is_absent(tmp_path: Path) -> None:
    """A debug run warm-starts from an ordinary one, and from a debug one of that name first."""
    CheckpointWriter(PathProvider(tmp_path, "source"), flat_names=True).save(bind(linear(0), name="net"), ITERATION)
    config = {"kind": "previous_run", "run_id": "source"}
    target = linear(5)
    debug = PathProvider(tmp_path, "new", debug=True)
    InitializerStack.from_config([config], path_provider=debug).initialize(bind(target, name="net"))
    assert equal(target, linear(0))
    CheckpointWriter(PathProvider(tmp_path, "source", debug=True), flat_names=True).save(
        bind(linear(1), name="net"), ITERATION
    )
    InitializerStack.from_config([config], path_provider=debug).initialize(bind(target, name="net"))
    assert equal(target, linear(1))


def test_the_stored_model_config_comes_without_the_keys_to_pop(paths: PathProvider) -> None:
    """A model can be rebuilt from the stored config without keys that the new class does not take."""
    module = linear(0)
    module.model_config = {"width": 3, "obsolete": True}  # type: ignore[assignment]
    CheckpointWriter(paths, flat_names=True).save(bind(module, name="net"), ITERATION)
    config = {"kind": "previous_run", "run_id": "source", "pop_ckpt_kwargs_keys": ["obsolete"]}
    initializer = InitializerStack.from_config([config], path_provider=paths.with_run("new")).initializers[0]
    assert isinstance(initializer, CheckpointInitializer)
    assert initializer.stored_model_config("net") == {"width": 3}
    config["pop_ckpt_kwargs_keys"] = ["obsolet"]
    initializer = InitializerStack.from_config([config], path_provider=paths.with_run("new")).initializers[0]
    assert isinstance(initializer, CheckpointInitializer)
    with pytest.raises(ConfigError, match="it has width, obsolete"):
        initializer.stored_model_config("net")


def test_a_committed_file_that_was_rewritten_is_refused(paths: PathProvider) -> None:
    """Another checkpoint written in place over a committed file is whole by itself, but not what was committed."""
    saved = CheckpointWriter(paths, flat_names=True).save(bind(linear(0), name="net"), ITERATION)
    file = saved.file("net", "model")
    assert file is not None
    content = torch.load(file.path, weights_only=True)
    content["state_dict"]["weight"] += 1
    size = file.path.stat().st_size
    file.path.chmod(0o644)
    with file.path.open("wb") as stream:
        torch.save(content, stream)
    assert file.path.stat().st_size == size
    with open_checkpoint(file.path) as reader:
        reader.verify()
    target = linear(3)
    before = target.weight.clone()
    with pytest.raises(CheckpointCorruptError, match=r"net_cp=E1_U5_S40_model\.th is damaged") as caught:
        start({"kind": "previous_run", "run_id": "source"}, paths, bind(target, name="net"))
    assert caught.value.key == "weight"
    assert torch.equal(target.weight, before)


def test_file_reads_safetensors_for_a_model_and_for_a_submodel(paths: PathProvider, tmp_path: Path) -> None:
    """The same kind, the same plan and the same errors as for files of torch; a digest is checked."""
    source, target = linear(0), linear(1)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(source.state_dict(), path, {"format": "pt"})
    start({"kind": "file", "path": str(path)}, paths, bind(target, name="net"))
    assert equal(source, target)
    layers, model = nested(10)
    start({"kind": "file", "path": str(path), "submodel": "body.right"}, paths, model)
    assert equal(layers[1], source)
    assert not equal(layers[0], source)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(CheckpointCorruptError, match="expected sha256:00"):
        start({"kind": "file", "path": str(path), "digest": "sha256:" + "0" * 64}, paths, bind(target, name="net"))
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_file_names_what_differs_between_safetensors_and_model(paths: PathProvider, tmp_path: Path) -> None:
    """Names and shapes that do not fit are told, an index of shards too, and nothing is changed."""
    target = linear(1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"net.weight": torch.ones(2, 3), "bias": torch.ones(5)}, path)
    with pytest.raises(PlanError, match=r"(?s)weight.*net\.weight.*bias: file \[5\], model \[2\]"):
        start({"kind": "file", "path": str(path)}, paths, bind(target, name="net"))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"weight": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(CheckpointFormatError, match="index of a sharded checkpoint"):
        start({"kind": "file", "path": str(index)}, paths, bind(target, name="net"))
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def flat_run(paths: PathProvider, *, optim_update: int, optim_run: str) -> None:
    """Flat files as of one save, but for the optimizer's."""
    module = linear(0)
    model = bind(module, name="net", optimizer=torch.optim.AdamW(module.parameters()))
    for update in (5, 6):
        CheckpointWriter(paths, flat_names=True).save(model, TrainingIteration(1, update, update * 8))
    optim = torch.load(paths.checkpoint_path / "net_cp=latest_optim.th", weights_only=True)
    assert optim["training_iteration"] == {"epoch": 1, "update": 6, "sample": 48}
    optim["training_iteration"]["update"] = optim_update
    optim["run_id"] = optim_run
    torch.save(optim, paths.checkpoint_path / "net_cp=latest_optim.th")
    import shutil

    shutil.rmtree(paths.checkpoint_path / "sets")


@pytest.mark.parametrize(("update", "run"), [(5, "source"), (6, "other")])
def test_an_optimizer_file_of_another_iteration_or_run_is_refused_as_torn(
    paths: PathProvider, update: int, run: str
) -> None:
    """Files that were copied while training went on do not make a set."""
    flat_run(paths, optim_update=update, optim_run=run)
    target = linear(3)
    before = target.weight.clone()
    model = bind(target, name="net", optimizer=torch.optim.AdamW(target.parameters()))
    with pytest.raises(TornSetError, match=r"net_cp=latest_optim\.th"):
        start({"kind": "resume", "checkpoint_tag": "latest"}, paths, model)
    assert torch.equal(target.weight, before)


def test_a_resume_without_the_trainer_that_was_saved_is_refused(paths: PathProvider) -> None:
    """The loop would start again from zero with trained weights."""
    module = linear(0)
    state = TrainerState(seed=0)
    state.advance(samples=8)
    CheckpointWriter(paths, flat_names=True).save(bind(module, name="net"), trainer=state)
    with pytest.raises(StateMismatchError, match="no trainer was given"):
        start({"kind": "resume"}, paths, bind(linear(1), name="net"))
    report = start({"kind": "resume"}, paths, bind(linear(1), name="net"), trainer=TrainerState(seed=0))
    assert report.initializers[0].restored == ("trainer",)
    assert str(report).splitlines()[1].endswith("(2 loaded; trainer)")


def test_asking_for_an_optimizer_that_is_not_there_is_refused(paths: PathProvider) -> None:
    """``load_optim: true`` with a model that has no optimizer would silently do nothing."""
    CheckpointWriter(paths, flat_names=True).save(bind(linear(0), name="net"), ITERATION)
    with pytest.raises(ConfigError, match="has no optimizer to load into"):
        start({"kind": "previous_run", "run_id": "source", "load_optim": True}, paths, bind(linear(1), name="net"))


def test_another_name_than_the_only_trainer_file_is_told(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """Resume takes the only model there is, and says so where it is called otherwise."""
    CheckpointWriter(paths, flat_names=True).save(bind(linear(0), name="disc"), ITERATION)
    start({"kind": "resume"}, paths, bind(linear(1), name="gen"))
    said = "the model is called gen, and the only trainer file, of disc, is used. Next: model_name: disc (in "
    assert f"resume: {said}initializers.0), if that is right" in caplog.text
    assert caplog.text.count(said) == 1
    caplog.clear()
    stack = InitializerStack.from_config({"auto_resume": True, "initializers": []}, path_provider=paths)
    model = bind(linear(1), name="gen")
    stack.plan(model)
    stack.sources(model)
    assert caplog.text.count("the only trainer file") == 1
    assert "Next: auto_resume: {model_name: disc}, if that is right" in caplog.text


def test_a_file_that_is_rewritten_between_check_and_load_is_refused(paths: PathProvider) -> None:
    """A live run saves over ``latest`` in place: what was verified is not what would be loaded."""
    paths.checkpoint_path.mkdir(parents=True)
    path = paths.checkpoint_path / "net_cp=latest_model.th"
    content = {"state_dict": linear(0).state_dict(), "training_iteration": {"epoch": 1, "update": 5, "sample": 9}}
    torch.save(content, path)
    target = linear(3)
    before = target.weight.clone()
    config = {"kind": "previous_run", "run_id": "source"}
    initializer = InitializerStack.from_config([config], path_provider=paths.with_run("new")).initializers[0]
    model = bind(target, name="net")
    with initializer.in_session():
        initializer.check(model)
        time_before = path.stat().st_mtime_ns
        torch.save({**content, "state_dict": linear(1).state_dict()}, path)
        if path.stat().st_mtime_ns == time_before:  # a coarse clock
            os.utime(path, ns=(time_before, time_before + 10**7))
        with pytest.raises(PartlyInitializedError, match="was modified while it was in use"):
            initializer.init_weights(model)
    assert torch.equal(target.weight, before)


def test_a_path_of_an_unknown_user_is_not_found() -> None:
    """Not a bare error of pathlib."""
    stack = InitializerStack.from_config([{"kind": "file", "path": "~nosuchuser/x.pt"}])
    with pytest.raises(CheckpointNotFoundError, match=r"~nosuchuser/x\.pt does not exist"):
        stack.initialize(bind(torch.nn.Linear(2, 2), "net"))


def test_views_that_share_memory_otherwise_than_as_one_tensor_are_refused(tmp_path: Path) -> None:
    """Transposed and overlapping views: the last one written would silently win; separate columns are fine."""

    def module(*views: torch.Tensor) -> torch.nn.Module:
        found = torch.nn.Module()
        for number, view in enumerate(views):
            found.register_buffer(f"v{number}", view)
        return found

    base = torch.zeros(4, 4)
    flat = base.view(-1)[:9]
    three = flat[0::3], flat[3:4], flat[1::3]
    for views in ((base, base.t()), (base[:3], base[2:]), (base, base[1]), three):
        target = module(*views)
        torch.save({name: torch.ones_like(value) for name, value in target.state_dict().items()}, tmp_path / "a.pt")
        stack = InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "a.pt")}])
        with pytest.raises(PlanError, match="v0 shares memory with v1, as another view of it"):
            stack.initialize(bind(target, name="net"))
        assert not base.any()
    target = module(base[:, :2], base[:, 2:])
    torch.save({"v0": torch.ones(4, 2), "v1": torch.full((4, 2), 2.0)}, tmp_path / "a.pt")
    InitializerStack.from_config([{"kind": "file", "path": str(tmp_path / "a.pt")}]).initialize(
        bind(target, name="net")
    )
    assert base.tolist() == [[1.0, 1.0, 2.0, 2.0]] * 4
