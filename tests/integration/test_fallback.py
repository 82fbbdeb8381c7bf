"""Walk-back: from a broken set to the newest good one, with its reason; never to a fresh start, never from a name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import flip_tensor_bit, rewrite

from noether_init_core import (
    AmbiguousCheckpointError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointWriter,
    IncompleteSetError,
    InitializerStack,
    InitReport,
    NoGoodSetError,
    PathProvider,
    PlanError,
    StateMismatchError,
    TrainingIteration,
    bind,
)

# two sets of epoch 1, one of epoch 2
ITERATIONS = (TrainingIteration(1, 10, 100), TrainingIteration(1, 15, 150), TrainingIteration(2, 20, 200))


class Trainer:
    """The least trainer."""

    def __init__(self, value: int = -1) -> None:
        self.state: dict[str, Any] = {"value": value}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = dict(state_dict)


def bound(value: float = -1.0, *, width: int = 3) -> Any:
    """A model whose weights and moments are all one recognisable value."""
    module = torch.nn.Linear(width, 2)
    model = bind(module, name="mlp", optimizer=torch.optim.AdamW(module.parameters(), lr=0.1))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.optimizer.step()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
            model.optimizer.state[parameter]["exp_avg"].fill_(value)
    return model


def save(paths: PathProvider, value: int, iteration: TrainingIteration, **how: Any) -> Path:
    """One set, whose folder is returned."""
    return CheckpointWriter(paths, flat_names=True).save(bound(value), iteration, trainer=Trainer(value), **how).folder


def values_of(model: Any, trainer: Trainer) -> set[float]:
    """Every value in weights, moments and trainer; one only, if nothing is mixed."""
    found = {float(value) for tensor in model.state_dict().values() for value in tensor.flatten()}
    for state in model.optimizer.state.values():
        found |= {float(value) for value in state["exp_avg"].flatten()}
    return found | {float(trainer.state["value"])}


def resume(
    paths: PathProvider, tag: Any = None, *, model: Any = None, **fields: Any
) -> tuple[InitReport, Any, Trainer]:
    """Initialize with ``on_invalid: previous``; the start that is told before is the start that is used."""
    config = {"kind": "resume", "checkpoint_tag": tag, "on_invalid": "previous", **fields}
    stack = InitializerStack.from_config([config], path_provider=paths)
    start = stack.start_checkpoint()
    model, trainer = bound() if model is None else model, Trainer()
    report = stack.initialize(model, trainer=trainer)
    assert report.start == start
    return report, model, trainer


def file_of(folder: Path, part: str) -> Path:
    (found,) = folder.glob(f"*_{part}.th")
    return found


@pytest.fixture
def folders(paths: PathProvider) -> list[Path]:
    """Three sets with the values 0, 1, 2."""
    return [save(paths, value, iteration) for value, iteration in enumerate(ITERATIONS)]


def _missing(part: str) -> Callable[[Path], None]:
    return lambda folder: file_of(folder, part).unlink()


def _truncated(part: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(file_of(folder, part), file_of(folder, part).read_bytes()[:-20])


def _flipped(part: str) -> Callable[[Path], None]:
    return lambda folder: flip_tensor_bit(file_of(folder, part))


def _from_another_set(part: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        older = sorted(folder.parent.iterdir())[0]
        rewrite(file_of(folder, part), file_of(older, part).read_bytes())

    return damage


DAMAGES = {
    "manifest is no JSON": lambda folder: rewrite(folder / "manifest.json", b"{"),
    "manifest is empty": lambda folder: rewrite(folder / "manifest.json", b""),
    "manifest of another set": lambda folder: shutil.copy(
        sorted(folder.parent.iterdir())[0] / "manifest.json", folder / "manifest.json"
    ),
    **{f"{part} missing": _missing(part) for part in ("model", "optim", "trainer")},
    **{f"{part} truncated": _truncated(part) for part in ("model", "optim", "trainer")},
    **{f"{part} flipped": _flipped(part) for part in ("model", "optim")},
    **{f"{part} of another set": _from_another_set(part) for part in ("model", "optim", "trainer")},
    "garbage of the same size": lambda folder: rewrite(
        file_of(folder, "trainer"), b"\x00" * file_of(folder, "trainer").stat().st_size
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_broken_newest_set_gives_way_to_the_one_before_it(
    paths: PathProvider, folders: list[Path], damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """By default it is an error; asked for, everything comes from the set before, and everybody is told why."""
    damage(folders[2])
    model = bound()
    with pytest.raises(CheckpointError):
        InitializerStack.from_config([{"kind": "resume"}], path_provider=paths).initialize(model, trainer=Trainer())
    assert values_of(model, Trainer()) == {-1.0}

    report, model, trainer = resume(paths)
    assert report.start == ITERATIONS[1]
    assert values_of(model, trainer) == {1.0}
    ((name, reason),) = report.initializers[0].passed_over
    assert name == folders[2].name
    assert str(folders[2]) in reason
    assert json.loads(report.to_json())["initializers"][0]["passed_over"] == [[name, reason]]
    assert f"passed over {name}: {reason}" in str(report)
    assert report.lineage()[0]["origin"] == "run @ E1_U15_S150"
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any(name in message and reason in message for message in warnings)
    assert any("walked back to E1_U15_S150" in message for message in warnings)


def test_good_newest_set_is_taken_as_without_the_switch(paths: PathProvider, folders: list[Path]) -> None:
    """Nothing is passed over, nothing is reported."""
    flip_tensor_bit(file_of(folders[1], "model"))
    report, model, trainer = resume(paths)
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[2], {2.0})
    assert report.initializers[0].passed_over == ()
    assert "passed over" not in str(report)


def test_several_broken_sets_are_all_named(paths: PathProvider, folders: list[Path]) -> None:
    """The newest good one may be two steps back."""
    flip_tensor_bit(file_of(folders[2], "model"))
    rewrite(folders[1] / "manifest.json", b"{}")
    report, model, trainer = resume(paths, "latest")
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[0], {0.0})
    assert [name for name, _ in report.initializers[0].passed_over] == [folders[2].name, folders[1].name]


def test_no_good_set_is_an_error_that_lists_what_was_tried(paths: PathProvider, folders: list[Path]) -> None:
    """Never a fresh start, and nothing is changed."""
    flip_tensor_bit(file_of(folders[2], "model"))
    rewrite(folders[1] / "manifest.json", b"{}")
    file_of(folders[0], "optim").unlink()
    model, trainer = bound(), Trainer()
    configs: list[Any] = [
        [{"kind": "resume", "on_invalid": "previous"}],
        {"auto_resume": True, "on_invalid": "previous"},
    ]
    for config in configs:
        stack = InitializerStack.from_config(config, path_provider=paths)
        for call in (stack.start_checkpoint, lambda stack=stack: stack.initialize(model, trainer=trainer)):
            with pytest.raises(NoGoodSetError) as caught:
                call()
            assert list(caught.value.tried) == [folder.name for folder in folders[::-1]]
            reasons = {name: reason.partition(". Next")[0] for name, reason in caught.value.tried.items()}
            assert all(f"- {name}: {reason}\n" in str(caught.value) for name, reason in reasons.items())
            assert str(caught.value).count("Next") == 1
            assert isinstance(caught.value, CheckpointCorruptError)
    assert values_of(model, trainer) == {-1.0}


def test_not_one_readable_manifest_is_an_error(paths: PathProvider, folders: list[Path]) -> None:
    """There is not even a model's name to go by."""
    for folder in folders:
        rewrite(folder / "manifest.json", b"")
    with pytest.raises(NoGoodSetError) as caught:
        resume(paths)
    assert len(caught.value.tried) == 3
    with pytest.raises(NoGoodSetError):
        auto(paths)


@pytest.mark.parametrize(
    "tag", ["E2_U20_S200", {"epoch": 2, "update": 20, "sample": 200}, "best", "best.loss", "best_model.loss", "mine"]
)
def test_tag_that_names_one_set_is_never_walked_back_from(paths: PathProvider, folders: list[Path], tag: Any) -> None:
    """Whoever names a set wants that one; the error names the older good set."""
    newest = save(paths, 3, ITERATIONS[2], tags=("best_model.loss", "mine"))
    flip_tensor_bit(file_of(newest, "model"))
    with pytest.raises(CheckpointCorruptError):
        resume(paths, tag)
    file_of(newest, "trainer").unlink()
    with pytest.raises(CheckpointCorruptError, match="The newest older set with all its files is E2_U20_S200"):
        resume(paths, tag)


@pytest.mark.parametrize("tag", ["E9_U9_S9", "best", "best.loss", "E9", "other", {"update": 3}])
def test_tag_that_means_nothing_is_always_an_error(paths: PathProvider, folders: list[Path], tag: Any) -> None:
    """A misspelt tag must not lead to another set, whatever else is broken."""
    flip_tensor_bit(file_of(folders[2], "model"))
    with pytest.raises(CheckpointNotFoundError):
        resume(paths, tag)


def test_iteration_that_is_not_full_walks_back_within_what_it_says(paths: PathProvider, folders: list[Path]) -> None:
    """``E1`` never means a set of another epoch."""
    flip_tensor_bit(file_of(folders[1], "model"))
    report, model, trainer = resume(paths, "E1")
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[0], {0.0})
    flip_tensor_bit(file_of(folders[2], "optim"))
    with pytest.raises(NoGoodSetError) as caught:
        resume(paths, {"epoch": 2})
    assert list(caught.value.tried) == [folders[2].name]


def test_tag_does_not_lead_to_a_set_that_never_had_it(paths: PathProvider) -> None:
    """How the set with the damaged manifest was tagged is not known; the newest known to be latest is meant."""
    folders = [
        save(paths, value, iteration, tags=tags)
        for value, (iteration, tags) in enumerate(zip(ITERATIONS, (("latest",), ("probe",), ("probe",)), strict=True))
    ]
    rewrite(folders[2] / "manifest.json", b"{")
    report, model, trainer = resume(paths, "latest")
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[0], {0.0})
    assert [name for name, _ in report.initializers[0].passed_over] == [folders[2].name]
    with pytest.raises(CheckpointCorruptError, match=r"older set saved as latest with all its files is E1_U10_S100"):
        InitializerStack.from_config([{"kind": "resume"}], path_provider=paths).start_checkpoint()
    # who asks for no tag, or for an iteration, wants the newest good set
    assert auto(paths)[0].start == ITERATIONS[1]
    assert resume(paths, "E1")[0].start == ITERATIONS[1]
    with pytest.raises(NoGoodSetError):
        resume(paths, "E2")


def test_behind_a_broken_set_that_has_the_tag_every_good_set_counts(paths: PathProvider) -> None:
    """The run is known to have come that far: the newest good state before it loses the least."""
    save(paths, 0, ITERATIONS[0])
    save(paths, 1, ITERATIONS[1], tags=("probe",))
    flip_tensor_bit(file_of(save(paths, 2, ITERATIONS[2]), "model"))
    rewrite(save(paths, 3, TrainingIteration(3, 30, 300), tags=("probe",)) / "manifest.json", b"{")
    report, model, trainer = resume(paths, "latest")
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[1], {1.0})
    assert len(report.initializers[0].passed_over) == 2


def test_where_only_unreadable_sets_can_have_the_tag_every_older_set_counts(paths: PathProvider) -> None:
    """Nothing else is known; sets that are newer than all of these have another tag for certain."""
    folders = [
        save(paths, value, iteration, tags=("mine",)) for value, iteration in enumerate((*ITERATIONS, ITERATIONS[2]))
    ]
    rewrite(folders[2] / "manifest.json", b"{")
    report, model, trainer = resume(paths, "latest")
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[1], {1.0})


# Models that are saved separately.


def two_models(paths: PathProvider) -> list[Path]:
    """Sets of gen at E1 and E2, the second damaged, each followed by one of disc; then a set of disc alone."""
    folders = []
    for value, iteration in enumerate((*ITERATIONS[1:], TrainingIteration(3, 30, 300))):
        for name in ("gen", "disc") if value < 2 else ("disc",):
            writer = CheckpointWriter(paths, flat_names=True)
            model = bind(bound(value).module, name=name)
            folders.append(writer.save(model, iteration, trainer=Trainer(value), optimizer=False).folder)
    flip_tensor_bit(file_of(folders[2], "model"))
    return folders


def plain(name: str) -> Any:
    return bind(torch.nn.Linear(3, 2), name=name)


def test_walk_back_of_a_model_stays_with_its_sets(paths: PathProvider) -> None:
    """Sets of the other one are neither what ``latest`` means nor passed over."""
    folders = two_models(paths)
    configs: list[Any] = [
        [{"kind": "resume", "model_name": "gen", "on_invalid": "previous", "load_optim": False}],
        {"auto_resume": {"model_name": "gen", "on_invalid": "previous", "load_optim": False}},
    ]
    for config in configs:
        model = plain("gen")
        report = InitializerStack.from_config(config, path_provider=paths).initialize(model, trainer=Trainer())
        assert report.start == ITERATIONS[1]
        assert [name for name, _ in report.initializers[0].passed_over] == [folders[2].name]
        assert values_of_weights(model) == {0.0}
    for config in ([{"kind": "resume", "model_name": "gen"}], {"auto_resume": {"model_name": "gen"}}):
        with pytest.raises(CheckpointCorruptError, match=r"older set with all its files is E1_U15_S150 \(0+1_E1"):
            InitializerStack.from_config(config, path_provider=paths).initialize(plain("gen"), trainer=Trainer())


def values_of_weights(model: Any) -> set[float]:
    return {float(value) for tensor in model.state_dict().values() for value in tensor.flatten()}


def test_auto_resume_asks_which_model_is_meant_and_takes_the_answer(paths: PathProvider) -> None:
    """The newest set of that model, though another model has been saved since; the error says the line that works."""
    folders = two_models(paths)
    for on_invalid in ("error", "previous"):
        stack = InitializerStack.from_config({"auto_resume": True, "on_invalid": on_invalid}, path_provider=paths)
        with pytest.raises(AmbiguousCheckpointError, match=r"Next: .* auto_resume: \{model_name: disc\}$"):
            stack.start_checkpoint()
    shutil.rmtree(folders[2])
    for name, start, value in (("gen", ITERATIONS[1], 0.0), ("disc", TrainingIteration(3, 30, 300), 2.0)):
        config = {"auto_resume": {"model_name": name, "load_optim": False}}
        model = plain(name)
        stack = InitializerStack.from_config(config, path_provider=paths)
        assert stack.initialize(model, trainer=Trainer()).start == start
        assert values_of_weights(model) == {value}


@pytest.mark.parametrize("on_invalid", ["error", "previous"])
def test_name_of_a_model_that_no_set_has_is_no_fresh_start(paths: PathProvider, on_invalid: str) -> None:
    """It may be misspelt, and then training from the beginning would lose everything."""
    two_models(paths)
    config = {"auto_resume": {"model_name": "gem", "on_invalid": on_invalid}}
    stack = InitializerStack.from_config(config, path_provider=paths)
    with pytest.raises(CheckpointNotFoundError, match=r'no trainer state of "gem"; it has trainer state of disc'):
        stack.start_checkpoint()
    fresh = InitializerStack.from_config(config, path_provider=PathProvider(paths.output_root, "new"))
    assert fresh.start_checkpoint().is_zero


def test_model_that_does_not_fit_is_no_broken_set(paths: PathProvider, folders: list[Path]) -> None:
    """An older set would fit as little; the plan says what is wrong."""
    model = bound(width=4)
    with pytest.raises(PlanError, match="weight"):
        resume(paths, model=model)


def diverged(part: str, value: float = float("nan")) -> Any:
    """A model with one such value in its weights, a buffer, its moments, or its average."""
    model = bound(3)
    model.module.register_buffer("mask", torch.zeros(2))
    parameter = next(iter(model.parameters()))
    with torch.no_grad():
        if part == "buffer":
            model.module.mask[0] = value
        else:
            (parameter if part == "model" else model.optimizer.state[parameter]["exp_avg"])[0, 0] = value
    return model


def with_mask(value: float = -1.0) -> Any:
    model = bound(value)
    model.module.register_buffer("mask", torch.zeros(2))
    return model


NAN_PLACES = [("model", "NaN"), ("model", "inf"), ("optim", "NaN"), ("optim", "inf"), ("buffer", "NaN")]


@pytest.mark.parametrize(("part", "value"), NAN_PLACES)
def test_nan_gives_way_to_the_newest_finite_set(paths: PathProvider, part: str, value: str) -> None:
    """A run that diverged goes on from before, and says why; without the switch it is an error as ever."""
    finite = CheckpointWriter(paths, flat_names=True).save(with_mask(2.0), ITERATIONS[2], trainer=Trainer(2)).folder
    names = []
    for number in (3, 4):
        iteration = TrainingIteration(number, 10 * number, 100 * number)
        saved = CheckpointWriter(paths, flat_names=True).save(
            diverged(part, float(value)), iteration, trainer=Trainer(number)
        )
        names.append(saved.folder.name)
    with pytest.raises((PlanError, StateMismatchError), match=r"NaN|infinities"):
        InitializerStack.from_config([{"kind": "resume"}], path_provider=paths).initialize(
            with_mask(), trainer=Trainer()
        )
    for report in (resume(paths, model=with_mask())[0], auto(paths, model=with_mask())[0]):
        assert report.start == ITERATIONS[2]
        assert report.initializers[0].resumed_set == str(finite)
        assert [name for name, _ in report.initializers[0].passed_over] == names[::-1]
        reason = report.initializers[0].passed_over[0][1]
        assert ("holds NaN" if value == "NaN" else "holds infinities") in reason
        assert "on_nonfinite: warn" in reason


def test_values_that_are_loaded_anyway_are_not_walked_back_from(paths: PathProvider) -> None:
    """Infinities in a buffer, NaN in an optimizer or an average that nobody loads, and what the config lets pass."""
    CheckpointWriter(paths, flat_names=True).save(with_mask(0.0), ITERATIONS[0], trainer=Trainer(0))
    average = {
        "ema=0.9": {key: torch.full_like(value, float("nan")) for key, value in with_mask().state_dict().items()}
    }
    saves: list[tuple[Any, dict[str, Any]]] = [
        (diverged("buffer", float("-inf")), {}),
        (diverged("optim"), {"load_optim": False}),
        (diverged("model"), {"on_nonfinite": "warn"}),
        (diverged("optim"), {"on_nonfinite": "ignore"}),
        (diverged("model"), {"verify": "none"}),
    ]
    for number, (model, config) in enumerate(saves, start=3):
        iteration = TrainingIteration(number, 10 * number, 100 * number)
        CheckpointWriter(paths, flat_names=True).save(model, iteration, trainer=Trainer(number), averages=average)
        report, _, _ = resume(paths, model=with_mask(), **config)
        assert (report.start, report.initializers[0].passed_over) == (iteration, ()), config


def test_nan_in_every_set_is_an_error_that_names_each(paths: PathProvider) -> None:
    """Never a fresh start, and never NaN."""
    for iteration in ITERATIONS[:2]:
        CheckpointWriter(paths, flat_names=True).save(diverged("model"), iteration, trainer=Trainer(0))
    with pytest.raises(NoGoodSetError, match="weight of mlp holds NaN") as caught:
        resume(paths, model=with_mask())
    assert len(caught.value.tried) == 2


def test_nan_in_flat_files_is_looked_for_too(paths: PathProvider, folders: list[Path]) -> None:
    """There is no manifest that says what was found when they were saved."""
    nan = bound(float("nan"))
    CheckpointWriter(paths, flat_names=True).save(nan, TrainingIteration(3, 30, 300), trainer=Trainer(3))
    make_legacy(paths)
    report, model, trainer = resume(paths)
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[2], {2.0})
    assert [name for name, _ in report.initializers[0].passed_over] == ["latest", "E3_U30_S300"]


def test_set_of_a_newer_release_is_no_broken_set(paths: PathProvider, folders: list[Path]) -> None:
    """It is good, and the next step is an upgrade."""
    manifest = folders[2] / "manifest.json"
    rewrite(manifest, manifest.read_bytes().replace(b'"format_version": 2', b'"format_version": 99'))
    with pytest.raises(CheckpointFormatError, match="pip install --upgrade"):
        resume(paths)


def test_unfinished_save_is_no_broken_set(paths: PathProvider, folders: list[Path]) -> None:
    """It was never acknowledged; there is nothing to pass over."""
    (folders[2].parent / "00000004_E3_U30_S300").mkdir()
    report, _model, _trainer = resume(paths)
    assert (report.start, report.initializers[0].passed_over) == (ITERATIONS[2], ())


def test_older_set_without_the_optimizer_is_passed_over(paths: PathProvider) -> None:
    """Walking back must not lose a part; without ``load_optim`` it is none."""
    first = save(paths, 0, ITERATIONS[0])
    second = save(paths, 1, ITERATIONS[1], optimizer=False)
    flip_tensor_bit(file_of(save(paths, 2, ITERATIONS[2]), "model"))
    report, model, trainer = resume(paths)
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[0], {0.0})
    assert report.initializers[0].passed_over[1] == (second.name, "it was saved without optimizer state of mlp")
    report, _, _ = resume(paths, load_optim=False)
    assert report.start == ITERATIONS[1]
    flip_tensor_bit(file_of(first, "model"))
    with pytest.raises(NoGoodSetError, match="saved without optimizer state"):
        resume(paths)


def test_set_that_was_saved_without_a_part_is_not_broken(paths: PathProvider, folders: list[Path]) -> None:
    """The set that is meant lacks the optimizer because nobody saved it: that is for people to decide."""
    save(paths, 3, TrainingIteration(3, 30, 300), optimizer=False)
    with pytest.raises(IncompleteSetError):
        resume(paths)


def test_averages_are_verified_too(paths: PathProvider, folders: list[Path]) -> None:
    """A callback reads them from the set that is resumed."""
    average = {"ema=0.9": {key: value.clone() for key, value in bound(3).state_dict().items()}}
    newest = save(paths, 3, TrainingIteration(3, 30, 300), averages=average)
    (file,) = newest.glob("*ema=0.9*")
    flip_tensor_bit(file)
    assert resume(paths)[0].start == ITERATIONS[2]


def test_verify_header_finds_what_a_header_shows(paths: PathProvider, folders: list[Path]) -> None:
    """The proof is as deep as ``verify`` says: a truncated file shows, a flipped bit of a tensor does not."""
    flip_tensor_bit(file_of(folders[2], "model"))
    assert resume(paths, verify="header")[0].start == ITERATIONS[2]
    file_of(folders[2], "trainer").unlink()
    assert resume(paths, verify="header")[0].start == ITERATIONS[1]


def test_damage_between_start_and_initialize_is_an_error_not_another_start(
    paths: PathProvider, folders: list[Path]
) -> None:
    """Whoever built a schedule from the start must not get another one."""
    stack = InitializerStack.from_config([{"kind": "resume", "on_invalid": "previous"}], path_provider=paths)
    assert stack.start_checkpoint() == ITERATIONS[2]
    flip_tensor_bit(file_of(folders[2], "model"))
    model, trainer = bound(), Trainer()
    with pytest.raises(CheckpointCorruptError):
        stack.initialize(model, trainer=trainer)
    assert values_of(model, trainer) == {-1.0}


def test_the_run_goes_on_from_there(paths: PathProvider, folders: list[Path]) -> None:
    """The next save is the newest set again; the broken one is no longer in the way."""
    flip_tensor_bit(file_of(folders[2], "model"))
    assert resume(paths)[0].start == ITERATIONS[1]
    save(paths, 5, ITERATIONS[2])
    config = [{"kind": "resume"}]
    model, trainer = bound(), Trainer()
    report = InitializerStack.from_config(config, path_provider=paths).initialize(model, trainer=trainer)
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[2], {5.0})


# auto_resume.


def auto(paths: PathProvider, *, model: Any = None, **more: Any) -> tuple[InitReport, Any, Trainer]:
    """Initialize with ``auto_resume`` and ``on_invalid: previous``."""
    config = {"auto_resume": True, "on_invalid": "previous", "initializers": [], **more}
    model, trainer = bound() if model is None else model, Trainer()
    return InitializerStack.from_config(config, path_provider=paths).initialize(model, trainer=trainer), model, trainer


def test_auto_resume_walks_back_if_asked(paths: PathProvider, tmp_path: Path) -> None:
    """A fresh run, a good one, a broken one, from a file as well; the default stays an error."""
    report, _, _ = auto(paths)
    assert report.start.is_zero
    assert report.auto_resume == "auto_resume: run has no checkpoints, the initializers of the config apply"
    (paths.checkpoint_path / "sets" / "00000001_E1_U10_S100").mkdir(parents=True)
    assert auto(paths)[0].start.is_zero
    folders = [save(paths, value, iteration, tags=("mine",)) for value, iteration in enumerate(ITERATIONS)]
    assert auto(paths)[0].start == ITERATIONS[2]
    flip_tensor_bit(file_of(folders[2], "optim"))
    report, model, trainer = auto(paths)
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[1], {1.0})
    assert str(report).startswith("start E1_U15_S150  (auto_resume: resumed from the newest good set)")
    assert [name for name, _ in report.initializers[0].passed_over] == [folders[2].name]
    file = tmp_path / "init.yaml"
    file.write_text("auto_resume: true\non_invalid: previous\ninitializers: []\n")
    assert InitializerStack.from_file(file, path_provider=paths).start_checkpoint() == ITERATIONS[1]
    with pytest.raises(CheckpointCorruptError):
        InitializerStack.from_config({"auto_resume": True}, path_provider=paths).initialize(bound(), trainer=Trainer())


def _changes_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    rewrite(manifest, manifest.read_bytes().replace(b'"latest"', b'"lattst"'))


BROKEN = {
    **{f"{part} flipped": _flipped(part) for part in ("model", "optim")},
    "trainer garbage": DAMAGES["garbage of the same size"],
    "model missing": _missing("model"),
    "model truncated": _truncated("model"),
    "manifest changed": _changes_manifest,
    "torn": _from_another_set("trainer"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("tag", [None, "latest", "E2", {"epoch": 2}, "E2_U20_S200"])
def test_error_of_a_broken_set_names_the_newest_older_one_and_the_ways_on(
    paths: PathProvider, folders: list[Path], damage: Callable[[Path], Any], tag: Any
) -> None:
    """Whatever is damaged, and only what leads somewhere: ``E2`` has no older set to walk back to."""
    damage(folders[2])
    with pytest.raises(CheckpointError) as caught:
        InitializerStack.from_config([{"kind": "resume", "checkpoint_tag": tag}], path_provider=paths).initialize(
            bound(), trainer=Trainer()
        )
    said = str(caught.value)
    assert said.count(f"The newest older set with all its files is E1_U15_S150 ({folders[1].name}). Next: ") == 1
    assert "checkpoint_tag: E1_U15_S150 (in initializers.0); " in said
    assert said.count("Next") == 1
    # what mends the file comes last
    last, found, mend = said.rpartition("; copy the file again from where it was written")
    assert "copy the file again" not in last
    assert (last if found else mend).endswith(f"ninit verify {paths.checkpoint_path} shows the state of every set")
    assert ("on_invalid: previous (in initializers.0) continues" in said) == (tag in (None, "latest"))
    assert resume(paths, "E1_U15_S150")[0].start == ITERATIONS[1]


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_error_of_auto_resume_advises_what_auto_resume_can_be_told(
    paths: PathProvider, folders: list[Path], damage: Callable[[Path], Any]
) -> None:
    """A tag would be ignored there; what is advised works."""
    damage(folders[2])
    with pytest.raises(CheckpointError) as caught:
        InitializerStack.from_config({"auto_resume": True}, path_provider=paths).initialize(bound(), trainer=Trainer())
    said = str(caught.value)
    assert said.count(f"The newest older set with all its files is E1_U15_S150 ({folders[1].name}). Next: ") == 1
    assert "on_invalid: previous (beside auto_resume) continues from the newest good set; ninit verify " in said
    assert said.count("Next") == 1
    assert "checkpoint_tag" not in said
    assert "kind: file" not in said
    for config in ({"auto_resume": True, "on_invalid": "previous"}, {"auto_resume": {"on_invalid": "previous"}}):
        stack = InitializerStack.from_config(config, path_provider=paths)
        assert stack.initialize(bound(), trainer=Trainer()).start == ITERATIONS[1]


def test_older_set_of_the_same_iteration_is_not_advised_by_its_name(paths: PathProvider, folders: list[Path]) -> None:
    """That name means the broken one."""
    flip_tensor_bit(file_of(save(paths, 3, ITERATIONS[2]), "model"))
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    with pytest.raises(CheckpointCorruptError, match=r"on_invalid: previous \(in initializers.0\)") as caught:
        stack.initialize(bound(), trainer=Trainer())
    assert "is E2_U20_S200 (00000003_E2_U20_S200). Next" in str(caught.value)
    assert "checkpoint_tag" not in str(caught.value)
    assert caught.value.key != ""


def test_a_broken_only_set_leaves_nothing_but_to_look(paths: PathProvider) -> None:
    """No tag is advised that does not exist."""
    flip_tensor_bit(file_of(save(paths, 0, ITERATIONS[0]), "model"))
    again = "No older set was found. Next: copy the file again from where it was written; "
    for config, words in (
        ([{"kind": "resume"}], f"{again}ninit verify"),
        ({"auto_resume": True}, f"{again}a new run_id starts a new training; ninit verify"),
    ):
        with pytest.raises(CheckpointCorruptError, match=words):
            InitializerStack.from_config(config, path_provider=paths).initialize(bound(), trainer=Trainer())


def test_a_broken_set_that_was_removed_by_hand_is_gone(paths: PathProvider, folders: list[Path]) -> None:
    """The copies for Noether that it leaves behind stop neither ``resume`` nor ``auto_resume``."""
    shutil.rmtree(folders[2])
    for config in ([{"kind": "resume"}], {"auto_resume": True}, {"auto_resume": True, "on_invalid": "previous"}):
        model, trainer = bound(), Trainer()
        report = InitializerStack.from_config(config, path_provider=paths).initialize(model, trainer=trainer)
        assert (report.start, values_of(model, trainer)) == (ITERATIONS[1], {1.0})


def test_later_files_of_another_program_are_told_what_works_under_auto_resume(
    paths: PathProvider, folders: list[Path]
) -> None:
    """Remove them, or write a resume in place of auto_resume."""
    for part in ("model", "trainer"):
        shutil.copy(file_of(folders[0], part), paths.checkpoint_path / f"mlp_cp=E5_U50_S500_{part}.th")
    with pytest.raises(AmbiguousCheckpointError) as caught:
        InitializerStack.from_config({"auto_resume": True}, path_provider=paths)
    assert str(caught.value).endswith(
        "Next: remove *_cp=E5_U50_S500_*.th if they are not needed; or, to resume the committed set, "
        "replace auto_resume by the initializer - {kind: resume, checkpoint_tag: E2_U20_S200}"
    )


def test_auto_resume_takes_fields_of_resume(paths: PathProvider, folders: list[Path], tmp_path: Path) -> None:
    """All that errors advise; the decision stays that of auto_resume."""
    newest = save(paths, 3, TrainingIteration(3, 30, 300), tags=("mine",))
    model = bound(float("nan"))
    CheckpointWriter(paths, flat_names=True).save(model, TrainingIteration(4, 40, 400), trainer=Trainer(4))
    with pytest.raises(PlanError, match=r"on_nonfinite: warn(.|\n)*auto_resume: \{key: value\}"):
        InitializerStack.from_config({"auto_resume": True}, path_provider=paths).initialize(bound(), trainer=Trainer())
    file = tmp_path / "init.yaml"
    file.write_text("auto_resume:\n  on_nonfinite: warn\n  load_optim: false\n  verify: header\n")
    stack = InitializerStack.from_file(file, path_provider=paths)
    report = stack.initialize(bound(), trainer=Trainer())
    assert (report.start.epoch, report.auto_resume) == (4, "auto_resume: resumed from E4_U40_S400")
    assert report.initializers[0].restored == ("trainer",)
    shutil.rmtree(newest.parent / "00000005_E4_U40_S400")
    flip_tensor_bit(file_of(newest, "model"))
    config = {"auto_resume": {"on_invalid": "previous", "load_optim": False}}
    report = InitializerStack.from_config(config, path_provider=paths).initialize(bound(), trainer=Trainer())
    assert report.start == ITERATIONS[2]
    assert str(report).splitlines()[0].endswith("(auto_resume: resumed from the newest good set)")


# Folders without manifests.


def make_legacy(paths: PathProvider) -> Path:
    """The flat files alone, as another program would have written them."""
    shutil.rmtree(paths.checkpoint_path / "sets")
    return paths.checkpoint_path


def test_flat_latest_gives_way_to_the_newest_complete_iteration(paths: PathProvider, folders: list[Path]) -> None:
    """Torn, truncated or flipped: the plain files of an iteration are complete, and vouch for their iteration."""
    folder = make_legacy(paths)
    latest = folder / "mlp_cp=latest_model.th"
    whole = latest.read_bytes()
    for content in (whole[:-50], (folder / "mlp_cp=E1_U10_S100_model.th").read_bytes()):
        rewrite(latest, content)
        report, model, trainer = resume(paths)
        assert (report.start, values_of(model, trainer)) == (ITERATIONS[2], {2.0})
        assert [name for name, _ in report.initializers[0].passed_over] == ["latest"]
        report, model, trainer = auto(paths)
        assert (report.start, values_of(model, trainer)) == (ITERATIONS[2], {2.0})
    flip_tensor_bit(folder / "mlp_cp=E2_U20_S200_optim.th")
    for report, model, trainer in (resume(paths), auto(paths)):
        assert (report.start, values_of(model, trainer)) == (ITERATIONS[1], {1.0})


def test_broken_flat_files_name_the_older_ones_and_the_ways_on(paths: PathProvider, folders: list[Path]) -> None:
    """As committed sets do: for a tag and for auto_resume, whether the trainer or the weights are broken."""
    folder = make_legacy(paths)
    rewrite(folder / "mlp_cp=latest_trainer.th", b"nothing at all")
    with pytest.raises(CheckpointFormatError, match=r"is E2_U20_S200. Next: .*on_invalid: previous \(beside auto"):
        InitializerStack.from_config({"auto_resume": True}, path_provider=paths)
    flip_tensor_bit(folder / "mlp_cp=E2_U20_S200_model.th")
    stack = InitializerStack.from_config([{"kind": "resume", "checkpoint_tag": "U20"}], path_provider=paths)
    with pytest.raises(CheckpointCorruptError, match=r"is E1_U15_S150. Next: .*checkpoint_tag: E1_U15_S150 \(in "):
        stack.initialize(bound(), trainer=Trainer())


def test_flat_files_that_lack_a_part_or_are_later_are_passed_over(paths: PathProvider, folders: list[Path]) -> None:
    """Weights alone are no set to go on from, and files of an earlier life of the run are none either."""
    folder = make_legacy(paths)
    for part in ("model", "optim", "trainer"):
        shutil.copy(folder / f"mlp_cp=E1_U15_S150_{part}.th", folder / f"mlp_cp=latest_{part}.th")
    flip_tensor_bit(folder / "mlp_cp=latest_model.th")
    (folder / "mlp_cp=E1_U15_S150_optim.th").unlink()
    report, model, trainer = resume(paths)
    assert (report.start, values_of(model, trainer)) == (ITERATIONS[0], {0.0})
    assert dict(report.initializers[0].passed_over)["E1_U15_S150"] == "it was saved without optimizer state of mlp"
    for part in ("model", "optim", "trainer"):
        (folder / f"mlp_cp=latest_{part}.th").write_bytes(b"nothing")
    with pytest.raises(NoGoodSetError) as caught:
        resume(paths)
    assert list(caught.value.tried) == ["latest"]


def test_later_flat_files_beside_committed_sets_stay_an_error(paths: PathProvider, folders: list[Path]) -> None:
    """Another program has gone on: no walk-back decides between the two."""
    flip_tensor_bit(file_of(folders[2], "model"))
    for part in ("model", "optim", "trainer"):
        flat = paths.checkpoint_path / f"mlp_cp=E5_U50_S500_{part}.th"
        shutil.copy(file_of(folders[0], part), flat)
    with pytest.raises(AmbiguousCheckpointError):
        resume(paths)
