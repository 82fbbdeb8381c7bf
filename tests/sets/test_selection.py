"""What exists on disk and what a tag means."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.damage import rewrite

from noether_init_core.errors import (
    AmbiguousCheckpointError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointUnreachableError,
    CheckpointWriteError,
    ConfigError,
    IncompleteSetError,
    InvalidNameError,
    NoGoodSetError,
    TornSetError,
)
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, check_consistency
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.hints import AskedBy
from noether_init_core.sets.manifest import read_manifest, sealed
from noether_init_core.sets.places import runs, stages
from noether_init_core.sets.selection import Policy, find_set, newest_set, require, walk_back
from noether_init_core.sets.snapshot import Snapshot

MLP = [Need("mlp", "model"), Need("mlp", "optim"), Need("mlp", "trainer")]
WEIGHTS = [Need("mlp", "model")]


class ShuffledStorage(FileSystem):
    """Lists folders in another order each time."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def list_folder(self, folder: Path) -> list[str]:
        names = super().list_folder(folder)
        self._random.shuffle(names)
        return names


def write_flat(folder: Path, *names: str, iteration: TrainingIteration | None = None, run_id: str = "run") -> None:
    """Files with Noether's content; the iteration is that of the name unless another is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        parsed = parse(name)
        assert parsed is not None
        said = iteration or TrainingIteration.from_string(parsed.tag)
        torch.save({"state_dict": {}, "training_iteration": said.to_mapping(), "run_id": run_id}, folder / name)


def find(paths: PathProvider, tag: Any = None, needs: Sequence[Need] = ()) -> CheckpointSet:
    """The set that a tag means now."""
    return find_set(Snapshot(paths), tag, needs).found


def newest(paths: PathProvider, model: str | None = None) -> CheckpointSet | None:
    """The newest set that can be resumed."""
    return newest_set(Snapshot(paths), model)


def walked(paths: PathProvider, tag: str, model: str) -> list[str]:
    """Names of the sets that a tag leads to where each is found broken."""
    tried: list[str] = []

    def refuse(found: CheckpointSet) -> None:
        tried.append(found.place)
        raise CheckpointError("broken")

    with pytest.raises(NoGoodSetError):
        walk_back(
            Snapshot(paths), tag, refuse, [Need(model, "trainer")], Policy(walk_back=True), asked_by=AskedBy("resume")
        )
    return tried


def write_set(paths: PathProvider, epoch: int, *tags: str, model: str = "mlp") -> CheckpointSet:
    """A committed set of a tiny model without flat names."""
    from noether_init_core.models import bind
    from noether_init_core.saving.writer import CheckpointWriter

    module = torch.nn.Linear(1, 1)
    bound = bind(module, name=model, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    writer = CheckpointWriter(paths, flat_names=False)
    return writer.save(bound, TrainingIteration(epoch, epoch * 10, epoch * 100), tags=tags or ("latest",))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def folder(paths: PathProvider) -> Path:
    return paths.checkpoint_path


def legacy(noether_runs: Path, run: str, stage: str) -> PathProvider:
    return PathProvider(noether_runs, run, stage)


# What Noether wrote.


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        (None, "latest"),
        ("latest", "latest"),
        ("last", "last"),
        ("E2_U8_S64", "E2_U8_S64"),
        ({"epoch": 2, "update": 8, "sample": 64}, "E2_U8_S64"),
        ({"epoch": 1}, "E1_U4_S32"),
        ({"update": 8}, "E2_U8_S64"),
        ({"sample": 96}, "E3_U12_S96"),
        ("E4", "E4_U16_S128"),
        ("U12", "E3_U12_S96"),
        ("S32", "E1_U4_S32"),
    ],
)
def test_tag_forms_of_a_run_of_noether(noether_runs: Path, tag: Any, name: str) -> None:
    """Every form of tag finds the set that Noether means, with all parts."""
    found = find(legacy(noether_runs, "mlp_train", "train"), tag, MLP)
    assert (found.name, found.committed) == (name, False)
    assert found.file("mlp", "model", None).path.name == f"mlp_cp={name}_model.th"


@pytest.mark.parametrize("tag", ["best_model.loss.val.total", "best", "best.loss.val.total"])
def test_best_of_noether_finds_the_weights(noether_runs: Path, tag: str) -> None:
    """The best tag can be abbreviated."""
    found = find(legacy(noether_runs, "mlp_train", "train"), tag, WEIGHTS)
    assert found.name == "best_model.loss.val.total"


def test_early_exit_is_found_by_the_update_that_it_was_saved_at(noether_runs: Path) -> None:
    """A minimal or full iteration finds the file with a suffix behind the iteration where there is no plain one."""
    paths = legacy(noether_runs, "early_stop", "train")
    for tag in ({"update": 7}, {"epoch": 1}, "S28", "E1_U7_S28", {"epoch": 1, "update": 7, "sample": 28}):
        found = find(paths, tag, MLP)
        assert (found.name, found.iteration) == ("E1_U7_S28.early_exit", TrainingIteration(1, 7, 28))
    assert find(paths, "E1_U7_S28.early_exit", MLP).name == "E1_U7_S28.early_exit"


def test_minimal_tag_of_a_composite_is_one_iteration(noether_runs: Path) -> None:
    """With several matches every part comes from the newest."""
    needs = [
        Need("autoenc.encoder", "model"),
        Need("autoenc.decoder", "model"),
        Need("autoenc.encoder", "optim"),
        Need("autoenc", "trainer"),
    ]
    found = find(legacy(noether_runs, "composite", "pretrain"), {"epoch": 1}, needs)
    files = [found.file(need.model, need.part) for need in needs]
    assert [parse(file.path.name).tag for file in files if file] == ["E1_U7_S42"] * 4


def test_newest_of_a_legacy_run_is_named_by_its_iteration(noether_runs: Path) -> None:
    """Among sets of the same iteration the plain one is the newest, ``latest`` would change under our hands."""
    found = {
        run: newest(legacy(noether_runs, run, stage))
        for run, stage in [("mlp_train", "train"), ("composite", "pretrain"), ("early_stop", "train")]
    }
    assert {run: one.name for run, one in found.items() if one} == {
        "mlp_train": "E4_U16_S128",
        "composite": "E3_U12_S72",
        "early_stop": "E1_U7_S28.early_exit",
    }


def test_runs_stages_and_trainers_are_listed(noether_runs: Path) -> None:
    """What exists is found by folders and names."""
    paths = legacy(noether_runs, "composite", "pretrain")
    assert runs(paths) == ("composite", "early_stop", "mlp_train")
    assert stages(paths, "mlp_train") == ("train",)
    assert Snapshot(paths).trainer_names() == ("autoenc",)
    assert find(paths, "latest").models("model") == ("autoenc.decoder", "autoenc.encoder")
    assert find(paths, "latest").infos("autoenc.encoder") == ("ema=0.8",)


def test_iteration_of_a_named_tag_is_read_from_its_file(noether_runs: Path) -> None:
    """Trainer files say it, where there is none the weights do."""
    paths = legacy(noether_runs, "mlp_train", "train")
    assert Snapshot(paths).iteration_of(find(paths, "latest")) == TrainingIteration(4, 16, 128)
    assert Snapshot(paths).iteration_of(find(paths, "best")) == TrainingIteration(3, 12, 96)


def test_weights_without_trainer_do_not_resume_and_the_way_out_is_named(noether_runs: Path) -> None:
    """Noether's best tag holds weights only; the message leads to the set of the same iteration."""
    with pytest.raises(IncompleteSetError) as caught:
        find(legacy(noether_runs, "mlp_train", "train"), "best_model.loss.val.total", MLP)
    assert str(caught.value).startswith(
        '"best_model.loss.val.total" holds weights only. Next: resume from E3_U12_S96 (same iteration) or latest'
    )
    assert str(caught.value).endswith("; {kind: previous_run, run_id: mlp_train, stage_name: train} loads weights only")
    assert caught.value.candidates[0] == "E3_U12_S96"
    assert caught.value.missing == ("optimizer state", "trainer state")


def test_best_of_a_composite_without_its_trainer_is_incomplete(noether_runs: Path) -> None:
    """A composite whose own name stands on the trainer file only is not taken for a misspelt model."""
    with pytest.raises(
        IncompleteSetError, match=r"holds weights only\. Next: resume from E1_U6_S36 \(same iteration\)"
    ):
        find(legacy(noether_runs, "composite", "pretrain"), "best", [Need("autoenc", "trainer")])


@pytest.mark.parametrize("tag", [None, "latest", {"epoch": 1}, "best", "E1"])
def test_order_of_a_listing_changes_nothing(noether_runs: Path, tag: Any) -> None:
    """Every answer is the same whatever order the folder lists its entries in."""
    paths = PathProvider(noether_runs, "composite", "pretrain")
    needs = [Need("autoenc.encoder", "model")]
    expected = find(paths, tag, needs), Snapshot(paths).sets(), newest(paths)
    for seed in range(5):
        shuffled = Snapshot(paths, storage=ShuffledStorage(seed))
        assert (find_set(shuffled, tag, needs).found, shuffled.sets(), newest_set(shuffled)) == expected


# Messages.


def test_missing_run_names_near_runs_and_creates_nothing(noether_runs: Path, tmp_path: Path) -> None:
    """Looking at a run that does not exist leaves the disk as it was."""
    shutil.copytree(noether_runs / "early_stop", tmp_path / "early_stop")
    before = listing(tmp_path)
    paths = PathProvider(tmp_path, "early_stopp", "train")
    with pytest.raises(CheckpointNotFoundError, match=r'run "early_stopp" not found .* Near: early_stop') as caught:
        find(paths, "latest", MLP)
    assert caught.value.candidates == ("early_stop",)
    assert (newest(paths), Snapshot(paths).sets(), Snapshot(paths).tags(), Snapshot(paths).uncommitted()) == (
        None,
        (),
        (),
        (),
    )
    assert listing(tmp_path) == before


def test_missing_stage_names_the_stages(noether_runs: Path) -> None:
    """A run whose checkpoints are in stages says so, with the line to add."""
    with pytest.raises(CheckpointNotFoundError) as caught:
        find(PathProvider(noether_runs, "early_stop"), None, MLP)
    assert str(caught.value) == (
        'run "early_stop" itself has no checkpoints; stage "train" has 4 sets. Next: stage_name: train'
    )
    with pytest.raises(CheckpointNotFoundError, match=r'has no stage "trian"; .* Did you mean: stage_name: train'):
        find(PathProvider(noether_runs, "early_stop", "trian"), None, MLP)


def test_superfluous_stage_is_pointed_out(paths: PathProvider, folder: Path) -> None:
    """A stage that does not exist, in a run with checkpoints of its own."""
    write_flat(folder, "mlp_cp=E1_U1_S1_model.th")
    staged = attrs.evolve(paths, stage_name="train")
    with pytest.raises(CheckpointNotFoundError, match=r"the run itself has 1 set \(without stage_name\)"):
        find(staged, None, WEIGHTS)


def test_missing_tag_names_near_tags(noether_runs: Path) -> None:
    """The likeliest misspelling first, then what exists."""
    paths = legacy(noether_runs, "mlp_train", "train")
    with pytest.raises(CheckpointNotFoundError, match=r'has no checkpoint "latst"\. Near: latest') as caught:
        find(paths, "latst", MLP)
    assert caught.value.asked == "latst"
    assert set(caught.value.candidates) == set(Snapshot(paths).tags())
    with pytest.raises(CheckpointNotFoundError, match='has no checkpoint "Ensemble"'):
        find(paths, "Ensemble", MLP)
    with pytest.raises(CheckpointNotFoundError, match='has no checkpoint "E9"'):
        find(paths, {"epoch": 9}, MLP)


def test_best_is_that_of_the_models_that_are_asked_for(paths: PathProvider) -> None:
    """Another model in the run may have a best tag of its own."""
    write_set(paths, 1, "latest", "best_model.loss", model="enc")
    write_set(paths, 2, "latest", "best_model.accuracy", model="dec")
    write_set(paths, 3, "latest", model="third")
    assert find(paths, "best", [Need("enc", "model")]).sequence == 1
    assert find(paths, "best", [Need("dec", "model")]).sequence == 2
    assert find(paths, "best.loss", [Need("enc", "model")]).sequence == 1
    with pytest.raises(CheckpointNotFoundError, match="No set of these models was saved under a best_model"):
        find(paths, "best", [Need("third", "model")])
    with pytest.raises(AmbiguousCheckpointError):
        find(paths, "best")


def test_another_set_of_the_model_is_advised_before_a_model_of_a_near_name(paths: PathProvider) -> None:
    """The weights of the model itself exist; those of the other one would not fit."""
    write_set(paths, 1, "latest", model="dec")
    write_set(paths, 2, "latest", model="enc")
    with pytest.raises(CheckpointNotFoundError, match=r"Next: .*checkpoint_tag: E1_U10_S100"):
        find(paths, "E2_U20_S200", [Need("dec", "model")])


def test_a_missing_best_and_a_number_say_what_they_would_mean(paths: PathProvider, folder: Path) -> None:
    """Best is no misspelling of latest, and a bare number is no iteration."""
    write_flat(folder, "mlp_cp=E1_U1_S1_model.th")
    with pytest.raises(CheckpointNotFoundError, match=r"No set was saved under a best_model\.\* tag\. Found: E1_U1_S1"):
        find(paths, "best", WEIGHTS)
    with pytest.raises(CheckpointNotFoundError, match=r"An iteration is written E4, U4 or \{epoch: 4\}\. Found"):
        find(paths, "4", WEIGHTS)


def test_an_absent_run_and_an_absent_root_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root is named in full where it is not there; for a run that is not there, how to list the others."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError) as caught:
        find(PathProvider("out", "killed"), None, WEIGHTS)
    assert f"({tmp_path / 'out'}). Next: set output_path to the folder of the runs" in str(caught.value)
    (tmp_path / "out" / "other" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointNotFoundError) as caught:
        find(PathProvider("out", "killed"), None, WEIGHTS)
    assert str(caught.value).startswith('run "killed" not found below out. Found')
    assert str(caught.value).endswith(". Next: ninit inspect out")


def test_missing_model_and_info_name_what_there_is(noether_runs: Path) -> None:
    """A wrong model name or info is answered with the right ones."""
    paths = legacy(noether_runs, "mlp_train", "train")
    with pytest.raises(CheckpointNotFoundError, match=r'no weights of "other"; .* another name: model_name: mlp'):
        find(paths, "latest", [Need("other", "model")])
    with pytest.raises(CheckpointNotFoundError, match=r'no trainer state of "other"; .* another name: model_name: mlp'):
        find(paths, "latest", [Need("other", "trainer")])
    with pytest.raises(CheckpointNotFoundError, match=r'no weights of "mpl"; .* Next: model_name: mlp'):
        find(paths, "latest", [Need("mpl", "model")])
    with pytest.raises(CheckpointNotFoundError, match=r'model_info "ema=0.99"; .* Next: model_info: ema=0.9') as caught:
        find(paths, "latest", [Need("mlp", "model", "ema=0.99")])
    assert caught.value.candidates == ("ema=0.9",)


def test_need_without_a_model_is_that_of_the_only_one(noether_runs: Path) -> None:
    """The only trainer file needs no name; of two models one must be said."""
    paths = legacy(noether_runs, "composite", "pretrain")
    trainer = find(paths, "latest", [Need(None, "trainer")]).file(None, "trainer")
    assert trainer is not None
    assert trainer.model == "autoenc"
    with pytest.raises(
        AmbiguousCheckpointError, match=r"weights of several models: autoenc\.decoder, autoenc\.encoder"
    ) as caught:
        find(paths, "latest", [Need(None, "model")])
    assert caught.value.candidates == ("autoenc.decoder", "autoenc.encoder")


@pytest.mark.parametrize("tag", ["../E1_U1_S1", "a/b", "", ".hidden", "a\0b", "x" * 300])
def test_tag_that_is_no_name_is_refused(paths: PathProvider, tag: str) -> None:
    """Nothing is looked up outside the folder."""
    with pytest.raises(InvalidNameError):
        find(paths, tag)


@pytest.mark.parametrize("tag", [{}, {"epoch": 1, "update": 2}, {"step": 3}, {"epoch": -1}])
def test_mapping_that_is_no_iteration_is_refused(paths: PathProvider, tag: dict[str, int]) -> None:
    """One field or all three."""
    with pytest.raises(ConfigError):
        find(paths, tag)


# Legacy folders.


def test_minimal_tag_takes_the_newest_match_that_has_what_is_needed(paths: PathProvider, folder: Path) -> None:
    """A newer match without a trainer file is passed over for a resume, not for a warm start."""
    for update in (1, 2, 10):
        write_flat(folder, f"mlp_cp=E1_U{update}_S{update}_model.th")
    write_flat(folder, "mlp_cp=E1_U2_S2_trainer.th", "mlp_cp=E1_U1_S1_trainer.th")
    assert find(paths, {"epoch": 1}, WEIGHTS).name == "E1_U10_S10"
    assert find(paths, {"epoch": 1}, [*WEIGHTS, Need(None, "trainer")]).name == "E1_U2_S2"


def test_plain_tag_is_preferred_to_a_suffixed_one_of_its_iteration(paths: PathProvider, folder: Path) -> None:
    """The suffix decides only where there is nothing else."""
    write_flat(folder, "mlp_cp=E1_U1_S1.a_model.th", "mlp_cp=E1_U1_S1_model.th", iteration=TrainingIteration(1, 1, 1))
    assert find(paths, "E1", WEIGHTS).name == "E1_U1_S1"
    assert find(paths, "E1_U1_S1", WEIGHTS).name == "E1_U1_S1"


def test_info_that_the_grammar_cannot_tell_is_found_by_the_whole_name(paths: PathProvider, folder: Path) -> None:
    """Infos of Noether's documentation, without ``=`` or with ``_`` in the key."""
    write_flat(folder, "mlp_ema_cp=E1_U1_S1_model.th", "mlp_ema_factor=0.9_cp=E1_U1_S1_model.th")
    found = find(paths, "E1", [Need("mlp", "model", "ema"), Need("mlp", "model", "ema_factor=0.9")])
    files = [found.file("mlp", "model", info) for info in ("ema", "ema_factor=0.9")]
    assert [file.path.name for file in files if file] == [
        "mlp_ema_cp=E1_U1_S1_model.th",
        "mlp_ema_factor=0.9_cp=E1_U1_S1_model.th",
    ]


def test_foreign_and_averaged_files_are_no_checkpoints_of_the_model(paths: PathProvider, folder: Path) -> None:
    """An EMA file or another model's file at a later iteration is not a match of this model."""
    write_flat(folder, "mlp_cp=E1_U1_S1_model.th", "mlp_ema=0.9_cp=E1_U2_S2_model.th")
    write_flat(folder, "netE9_U9_S9_cp=E1_U3_S3_model.th", iteration=TrainingIteration(1, 3, 3))
    assert find(paths, "E1", WEIGHTS).name == "E1_U1_S1"
    with pytest.raises(CheckpointNotFoundError):
        find(paths, "E9", WEIGHTS)


def test_several_best_metrics_must_be_told_apart(paths: PathProvider, folder: Path) -> None:
    """``best`` alone is refused where it could be either."""
    for metric in ("loss", "accuracy"):
        write_flat(folder, f"mlp_cp=best_model.{metric}_model.th", iteration=TrainingIteration(1, 1, 1))
    with pytest.raises(AmbiguousCheckpointError) as caught:
        find(paths, "best", WEIGHTS)
    assert caught.value.candidates == ("best_model.accuracy", "best_model.loss")
    assert find(paths, "best.accuracy", WEIGHTS).name == "best_model.accuracy"
    with pytest.raises(CheckpointNotFoundError):
        find(paths, "best.f1", WEIGHTS)


def test_newest_of_a_legacy_folder_goes_by_the_iteration_inside(paths: PathProvider, folder: Path) -> None:
    """``latest`` written after the last numbered set is the newest."""
    write_flat(folder, "mlp_cp=E9_U9_S9_trainer.th", "mlp_cp=E9_U9_S9_model.th")
    write_flat(folder, "mlp_cp=latest_trainer.th", iteration=TrainingIteration(10, 10, 10))
    write_flat(folder, "mlp_cp=E11_U11_S11_model.th")
    last = newest(paths)
    assert last is not None
    assert last.name == "latest"


def test_malformed_iteration_in_a_file_is_refused(paths: PathProvider, folder: Path) -> None:
    """The file is named."""
    folder.mkdir(parents=True)
    path = folder / "mlp_cp=latest_trainer.th"
    torch.save({"training_iteration": {"epoch": -3}, "callback_state_dicts": {}}, path)
    with pytest.raises(CheckpointFormatError, match=r"training_iteration is .*not an iteration: epoch") as caught:
        Snapshot(paths).iteration_of(find(paths, "latest"))
    assert caught.value.path == path


def test_fifo_with_the_name_of_a_checkpoint_is_ignored_and_named(paths: PathProvider, folder: Path) -> None:
    """Nothing waits for somebody to write into it."""
    write_flat(folder, "mlp_cp=latest_trainer.th", iteration=TrainingIteration(1, 1, 1))
    os.mkfifo(folder / "mlp_cp=latest_model.th")
    (folder / "mlp_cp=latest_optim.th").mkdir()
    with pytest.raises(IncompleteSetError, match=r"Not regular files, ignored: mlp_cp=latest_model\.th") as caught:
        find(paths, "latest", MLP)
    assert caught.value.missing == ("optimizer state", "weights")


def test_debug_runs_are_apart(tmp_path: Path) -> None:
    """The folder of debug runs is no run."""
    write_flat(tmp_path / "debug" / "trial" / "checkpoints", "mlp_cp=E1_U1_S1_model.th")
    write_flat(tmp_path / "real" / "checkpoints", "mlp_cp=E1_U1_S1_model.th")
    assert runs(PathProvider(tmp_path, "real")) == ("real",)
    assert runs(PathProvider(tmp_path, "trial", debug=True)) == ("trial",)


# Committed sets.


def test_tag_means_the_last_set_that_was_saved_with_it(paths: PathProvider) -> None:
    """Sequence decides, not the iteration: a run that went back to an earlier epoch goes on from there."""
    write_set(paths, 1, "latest", "best_model.loss")
    write_set(paths, 3)
    again = write_set(paths, 2)
    assert find(paths, None, MLP) == again
    assert newest(paths) == again
    assert find(paths, "best", MLP).iteration == TrainingIteration(1, 10, 100)
    assert find(paths, {"epoch": 3}, MLP).sequence == 2
    assert [one.sequence for one in Snapshot(paths).sets()] == [1, 2, 3]


def test_same_iteration_saved_twice_means_the_later_set(paths: PathProvider) -> None:
    """A repeated save wins under every form of the iteration."""
    write_set(paths, 1)
    write_set(paths, 1)
    assert [find(paths, tag, MLP).sequence for tag in ("E1_U10_S100", {"epoch": 1}, "S100", None)] == [2, 2, 2, 2]


def test_models_that_are_saved_separately_at_one_iteration_are_both_found(paths: PathProvider) -> None:
    """Generator and discriminator have sets of their own; the newest of a full iteration that has the model counts."""
    generator, discriminator = write_set(paths, 1, model="gen"), write_set(paths, 1, model="disc")
    for tag in ("E1_U10_S100", {"epoch": 1}):
        assert find(paths, tag, [Need("gen", "model"), Need("gen", "trainer")]) == generator
        assert find(paths, tag, [Need("disc", "model")]) == discriminator
    assert find(paths, "E1_U10_S100") == discriminator
    with pytest.raises(CheckpointNotFoundError, match=r'"E1_U10_S100" .*has no weights of "other"') as caught:
        find(paths, "E1_U10_S100", [Need("other", "model")])
    assert "checkpoint_tag: E1_U10_S100" not in str(caught.value)


def test_tag_that_another_model_took_over_means_the_newest_set_of_the_model(paths: PathProvider, folder: Path) -> None:
    """``latest`` of each model, also where the other one has been saved since; without a name it is the last of all."""
    write_set(paths, 1, model="gen"), write_set(paths, 1, model="disc")
    generator = write_set(paths, 2, "latest", "best_model.loss", model="gen")
    write_set(paths, 3, "mine", model="gen")
    discriminator = write_set(paths, 4, "latest", "best_model.loss", model="disc")
    for tag in (None, "latest", "best", "best.loss"):
        assert find(paths, tag, [Need("gen", "model"), Need("gen", "trainer")]) == generator
        assert find(paths, tag, [Need("disc", "model")]) == discriminator
        assert find(paths, tag) == discriminator
    assert walked(paths, "latest", "gen") == [generator.folder.name, "00000001_E1_U10_S100"]
    newest_of_gen = newest(paths, "gen")
    assert newest_of_gen is not None
    assert newest_of_gen.tags == ("E3_U30_S300", "mine")
    assert newest(paths) == discriminator
    with pytest.raises(CheckpointNotFoundError, match=r'"latest" .* has no weights of "gem"; .*Next: model_name: gen'):
        find(paths, "latest", [Need("gem", "model")])
    (generator.folder / generator.files[0].path.name).unlink()
    with pytest.raises(CheckpointCorruptError, match=r"The newest older set with all its files is E1_U10_S100 \(0+1_"):
        find(paths, "latest", [Need("gen", "model")])


def test_set_of_unknown_models_may_be_the_one_that_was_asked_for(paths: PathProvider) -> None:
    """The only ``latest`` of gen is damaged: that, and not its absence from the set of another model, is the error."""
    generator = write_set(paths, 1, model="gen")
    write_set(paths, 2, model="disc")
    rewrite(generator.folder / "manifest.json", b"{")
    with pytest.raises(CheckpointCorruptError, match="cannot be read as a manifest"):
        find(paths, "latest", [Need("gen", "model")])
    assert find(paths, "latest", [Need("disc", "model")]).sequence == 2


def test_set_of_a_whole_that_lacks_a_part_is_not_replaced_by_an_older_one(paths: PathProvider) -> None:
    """The newest latest set of the composite has no encoder; an older encoder would be of another iteration."""
    from noether_init_core.models import bind, compose
    from noether_init_core.saving.writer import CheckpointWriter

    parts = [bind(torch.nn.Linear(1, 1), name=name) for name in ("encoder", "decoder")]
    writer = CheckpointWriter(paths, flat_names=False)
    for epoch, chosen in ((1, parts), (2, parts[1:])):
        whole = compose("autoenc", {part.name: part for part in chosen})
        writer.save(whole, TrainingIteration(epoch, epoch * 10, epoch * 100))
    with pytest.raises(CheckpointNotFoundError, match=r'has no weights of "autoenc\.encoder"'):
        find(paths, "latest", [Need("autoenc.encoder", "model")])


def test_newest_set_of_a_model_is_meant_even_where_it_lacks_a_part(paths: PathProvider) -> None:
    """A repeated save without optimizer is not silently replaced by the one before it, whose weights are others."""
    from noether_init_core.models import bind
    from noether_init_core.saving.writer import CheckpointWriter

    write_set(paths, 1)
    CheckpointWriter(paths, flat_names=False).save(
        bind(torch.nn.Linear(1, 1), name="mlp"), TrainingIteration(1, 10, 100)
    )
    with pytest.raises(IncompleteSetError, match="has no optimizer state"):
        find(paths, "E1_U10_S100", MLP)


def test_optimizer_that_was_left_out_for_a_frozen_model_is_explained(paths: PathProvider) -> None:
    """The message says why there is no optimizer state, and how to resume without."""
    from noether_init_core.models import bind
    from noether_init_core.saving.writer import CheckpointWriter

    module = torch.nn.Linear(1, 1)
    frozen = bind(module, name="mlp", optimizer=torch.optim.SGD(module.parameters(), lr=0.1), is_frozen=True)
    CheckpointWriter(paths, flat_names=False).save(frozen, TrainingIteration(1, 10, 100))
    with pytest.raises(IncompleteSetError, match=r"mlp was frozen at the save.*load_optim: false"):
        find(paths, "latest", MLP)


def test_flat_files_beside_committed_sets_are_not_read(paths: PathProvider, folder: Path) -> None:
    """Their tags do not exist, their models neither."""
    write_set(paths, 2, "last")
    write_flat(folder, "mlp_cp=E1_U1_S1_model.th", "other_cp=E1_U1_S1_trainer.th")
    assert Snapshot(paths).tags() == ("E2_U20_S200", "last")
    assert Snapshot(paths).trainer_names() == ("mlp",)
    with pytest.raises(CheckpointNotFoundError, match=r'no checkpoint "latest"\. .*Found: last, E2_U20_S200'):
        find(paths, "latest", WEIGHTS)
    with pytest.raises(CheckpointNotFoundError, match="Flat files with this tag are not read"):
        find(paths, "E1_U1_S1", WEIGHTS)


def test_tag_with_a_suffix_is_one_more_tag_of_the_set(paths: PathProvider) -> None:
    """An early exit is committed under its own tag and found by it and by its iteration."""
    saved = write_set(paths, 1, "E1_U10_S100.early_exit")
    assert [find(paths, tag, MLP) for tag in ("E1_U10_S100.early_exit", "E1_U10_S100", "E1")] == [saved] * 3


def test_further_needs_of_a_set_are_answered_like_those_of_a_search(paths: PathProvider) -> None:
    """A set that was found before is asked for more."""
    saved = write_set(paths, 1)
    require(Snapshot(paths), saved, MLP)
    with pytest.raises(CheckpointNotFoundError, match=r'"E1_U10_S100" .*has no weights of "other"'):
        require(Snapshot(paths), saved, [Need("other", "model")])


@pytest.mark.parametrize(
    ("name", "iteration"),
    [("mlp_cp=E3_U30_S300_model.th", None), ("mlp_cp=latest_trainer.th", TrainingIteration(3, 30, 300))],
)
def test_later_flat_files_stop_every_automatic_choice(
    paths: PathProvider, folder: Path, name: str, iteration: TrainingIteration | None
) -> None:
    """Another program has gone on from our set; both are named, and naming one set still works."""
    write_set(paths, 1, "latest", "last", "best_model.loss")
    write_set(paths, 2, "latest", "last")
    write_flat(folder, name, iteration=iteration)
    for tag in (None, "latest", "last", {"epoch": 2}, "E2"):
        with pytest.raises(AmbiguousCheckpointError, match=r"E3_U30_S300.*00000002_E2_U20_S200") as caught:
            find(paths, tag, WEIGHTS)
        assert caught.value.candidates[0] == "E2_U20_S200"
    with pytest.raises(AmbiguousCheckpointError):
        newest(paths)
    assert find(paths, "E2_U20_S200", MLP).sequence == 2
    assert find(paths, "best", MLP).sequence == 1


def test_flat_files_of_an_older_branch_are_no_later_files(paths: PathProvider, folder: Path) -> None:
    """After a return to an earlier epoch, the flat names of the later committed set are still ours."""
    write_set(paths, 3)
    write_flat(folder, "mlp_cp=E3_U30_S300_model.th")
    write_set(paths, 2)
    assert find(paths, None, MLP).sequence == 2


def test_unreadable_flat_copy_does_not_stop_the_run(
    paths: PathProvider, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy that a power failure cut short says nothing about the committed sets."""
    write_set(paths, 1)
    (folder / "mlp_cp=latest_trainer.th").write_bytes(b"")
    last = newest(paths)
    assert last is not None
    assert last.sequence == 1
    assert "latest beside committed sets cannot be read" in caplog.text


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/sets"])
@pytest.mark.parametrize("what", ["link", "loop", "file"])
def test_folder_out_of_reach_is_not_an_empty_one(tmp_path: Path, place: str, what: str) -> None:
    """A disk that is not mounted, or a file in the way: neither a fresh start nor new folders behind the link."""
    from noether_init_core.models import bind
    from noether_init_core.saving.writer import CheckpointWriter

    paths, path = PathProvider(tmp_path, "run"), tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if what == "file":
        path.write_text("x")
    else:
        path.symlink_to(path if what == "loop" else tmp_path / "scratch" / "run")
    words = {"link": "is a link to", "loop": "is a link to|levels of symbolic links", "file": "is not a folder"}[what]
    with pytest.raises(CheckpointUnreachableError, match=words) as caught:
        Snapshot(paths)
    assert caught.value.path is not None
    assert caught.value.path.is_relative_to(path), "the first part of the path that cannot be read"
    with pytest.raises(CheckpointWriteError, match=str(path)):
        CheckpointWriter(paths).save(bind(torch.nn.Linear(1, 1), name="mlp"), TrainingIteration(1, 1, 1))
    assert not (tmp_path / "scratch").exists()


def test_set_without_a_trainer_file_is_broken(paths: PathProvider) -> None:
    """Every set of ours has one: a manifest that lists none was edited, and the older set must not be taken instead."""
    write_set(paths, 1)
    path = write_set(paths, 2).folder / "manifest.json"
    for kept in ([], ["model"], ["trainer"]):
        values = json.loads(path.read_text())
        values["files"] = [entry for entry in values["files"] if entry["part"] in kept]
        del values["digest"]
        rewritten = path.with_name("rewritten")
        rewritten.write_bytes(sealed(json.dumps(values).encode()))
        with pytest.raises(CheckpointCorruptError, match=r"weights and a trainer file, because every set has both"):
            read_manifest(rewritten)
    rewritten.replace(path)
    with pytest.raises(CheckpointCorruptError, match=r"checkpoint_tag: E1_U10_S100"):
        newest(paths)
    assert len(Snapshot(paths).broken()) == 1


class Meanwhile(FileSystem):
    """Something happens right after a folder was listed, once."""

    def __init__(self, folder: Path, happens: Callable[[], object]) -> None:
        self.folder, self.happens = folder, [happens]

    def list_folder(self, folder: Path) -> list[str]:
        names = super().list_folder(folder)
        if folder == self.folder and self.happens:
            self.happens.pop()()
        return names


def test_save_between_two_looks_is_no_other_program(paths: PathProvider, folder: Path) -> None:
    """The flat names of a set that was committed after the sets were listed are not those of somebody else."""
    from noether_init_core.models import bind
    from noether_init_core.saving.writer import CheckpointWriter

    first = write_set(paths, 1)

    def save() -> None:
        CheckpointWriter(paths).save(bind(torch.nn.Linear(1, 1), name="mlp"), TrainingIteration(2, 20, 200))

    asked: list[Callable[[Snapshot], Any]] = [newest_set, lambda racing: find_set(racing, None, WEIGHTS).found]
    for ask in asked:
        found = ask(Snapshot(paths, storage=Meanwhile(folder / "sets", save)))
        assert found.iteration.epoch in (1, 2)
    assert newest(paths) != first


@pytest.mark.parametrize("tag", [None, "E1", "walk back"])
def test_set_that_vanished_between_two_looks_is_no_error(paths: PathProvider, folder: Path, tag: str | None) -> None:
    """Retention may remove every set that was listed; a newer one is there then, and is taken."""
    old = [write_set(paths, 1), write_set(paths, 1)]
    new = []

    def retire() -> None:
        new.append(write_set(paths, 1))
        for one in old:
            shutil.rmtree(one.folder)

    racing = Snapshot(paths, storage=Meanwhile(folder / "sets", retire))
    policy = Policy(walk_back=tag == "walk back")
    assert find_set(racing, None if policy.walk_back else tag, MLP, policy).found == new[0]
    assert newest_set(Snapshot(paths, storage=Meanwhile(folder / "sets", lambda: None))) == new[0]


class CommittedMeanwhile(FileSystem):
    """A writer renames the manifest into place right after a reader looked for it."""

    def read_bytes(self, path: Path, limit: int) -> bytes:
        try:
            return super().read_bytes(path, limit)
        except FileNotFoundError:
            path.with_name("hidden").rename(path)
            raise


@pytest.mark.parametrize("policy", [Policy(), Policy(walk_back=True)], ids=["error", "previous"])
@pytest.mark.parametrize("tag", [None, {"epoch": 2}, "E2_U20_S200"])
def test_set_that_is_committed_between_two_looks_is_no_broken_one(
    paths: PathProvider, policy: Policy, tag: Any
) -> None:
    """It is the newest from then on: neither an error nor passed over."""
    write_set(paths, 1)
    manifest = write_set(paths, 2).folder / "manifest.json"
    manifest.rename(manifest.with_name("hidden"))
    selected = find_set(Snapshot(paths, storage=CommittedMeanwhile()), tag, MLP, policy)
    assert selected.found.sequence == 2
    assert selected.passed_over == ()


def test_uncommitted_set_is_named_and_never_picked(paths: PathProvider, folder: Path) -> None:
    """A newer folder without a manifest is as if it were not there, until it is asked for."""
    committed = write_set(paths, 1)
    unfinished = folder / "sets" / "00000002_E2_U20_S200"
    shutil.copytree(committed.folder, unfinished)
    (unfinished / "manifest.json").unlink()
    assert Snapshot(paths).uncommitted() == ("00000002_E2_U20_S200",)
    assert find(paths, None, MLP) == committed
    assert newest(paths) == committed
    for tag in ("E2_U20_S200", "E2"):
        with pytest.raises(CheckpointNotFoundError, match=r"00000002_E2_U20_S200"):
            find(paths, tag, MLP)


def test_first_save_that_never_finished_is_no_checkpoint(paths: PathProvider, folder: Path) -> None:
    """The run has nothing to resume, and the message says why."""
    (folder / "sets" / "00000001_E1_U1_S1").mkdir(parents=True)
    assert newest(paths) is None
    with pytest.raises(CheckpointNotFoundError, match="Uncommitted, never selected: 00000001_E1_U1_S1"):
        find(paths, None, MLP)


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest", "json", "fifo", "renamed"])
def test_broken_newest_set_is_an_error_that_names_the_older_good_one(
    paths: PathProvider, folder: Path, damage: str
) -> None:
    """Never a silent step back; the older set is still found under its own name."""
    good = write_set(paths, 1)
    broken = write_set(paths, 2)
    weights, manifest = broken.files[0].path, broken.folder / "manifest.json"
    if damage == "truncated":
        os.chmod(weights, 0o644)
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "missing":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text("{}")
    elif damage == "json":
        manifest.write_text('{"format": ' + "[" * 100_000)
    elif damage == "fifo":
        manifest.unlink()
        os.mkfifo(manifest)
    else:
        broken.folder.rename(folder / "sets" / "00000009_E2_U20_S200")
    for tag in (None, "latest", {"epoch": 2}, "E2_U20_S200"):
        with pytest.raises(CheckpointCorruptError, match=r"Next: .*checkpoint_tag: E1_U10_S100"):
            find(paths, tag, MLP)
    with pytest.raises(CheckpointCorruptError):
        newest(paths)
    assert find(paths, "E1_U10_S100", MLP) == good
    assert len(Snapshot(paths).broken()) == 1


@pytest.mark.parametrize(("version", "next_step"), [(3, "pip install --upgrade noether-init-core"), (1, "kind: file")])
def test_manifest_of_another_release_is_refused_by_its_version(
    paths: PathProvider, version: int, next_step: str
) -> None:
    """It is not guessed at, and the message says what can be done with it."""
    manifest = write_set(paths, 1).folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', f'"format_version": {version}'))
    with pytest.raises(CheckpointFormatError, match=f"format version {version}.*{next_step}"):
        find(paths, None)


@pytest.mark.parametrize("damage", ["gone", "cut short", "flipped"])
def test_digests_that_are_not_as_they_were_written_break_the_set(paths: PathProvider, damage: str) -> None:
    """The manifest is bound to the digests beside it; without them the bytes of tensors could be any."""
    saved = write_set(paths, 1)
    path = saved.folder / "digests.json"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        rewrite(path, content[:-1] if damage == "cut short" else content.replace(b"xxh3_128:", b"xxh3_129:"))
    if damage != "flipped":
        with pytest.raises(CheckpointCorruptError, match=r"digests\.json"):
            find(paths, None)
    fresh = Snapshot(paths).sets()[0]
    with pytest.raises(CheckpointCorruptError, match=r"digests\.json (cannot be read|was changed)"):
        fresh.digests_of(fresh.files[0])


@pytest.mark.parametrize("entry", ["../outside_cp=latest_model.th", "/etc/mlp_cp=latest_model.th", "..", "notes.txt"])
def test_manifest_entry_that_is_no_plain_name_is_refused(paths: PathProvider, entry: str) -> None:
    """An entry cannot lead out of its folder, whoever wrote the manifest."""
    manifest = write_set(paths, 1).folder / "manifest.json"
    values = json.loads(manifest.read_text().replace("mlp_cp=E1_U10_S100_model.th", entry))
    del values["digest"]
    manifest.write_bytes(sealed(json.dumps(values).encode()))
    with pytest.raises(CheckpointCorruptError, match=r"files\.0"):
        find(paths, None)


@pytest.mark.parametrize("name", ['"latest"', '"created"', '"digest": "', "\n}"])
def test_manifest_with_one_flipped_bit_never_means_an_older_set(paths: PathProvider, name: str) -> None:
    """Not even where the bit makes another tag of ``latest``: the set before has that tag, too."""
    write_set(paths, 1)
    manifest = write_set(paths, 2).folder / "manifest.json"
    whole = manifest.read_bytes()
    start = whole.rindex(name.encode())
    for bit in range(8 * start, 8 * min(start + len(name) + 3, len(whole))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"Next: .*checkpoint_tag: E1_U10_S100"):
            find(paths, None, MLP)


def test_file_of_a_set_that_is_a_link_to_elsewhere_is_refused(paths: PathProvider, tmp_path: Path) -> None:
    """Also a symbolic link with the right name leaves the folder."""
    path = write_set(paths, 1).files[0].path
    shutil.move(path, tmp_path / "elsewhere.th")
    path.symlink_to(tmp_path / "elsewhere.th")
    with pytest.raises(CheckpointCorruptError, match="is a link out of its folder"):
        find(paths, None)


@pytest.mark.parametrize("linked", ["run", "run/checkpoints", "run/checkpoints/sets"])
def test_linked_folders_work(paths: PathProvider, tmp_path: Path, linked: str) -> None:
    """Runs on a scratch disk behind a symbolic link are read and written."""
    write_set(paths, 1)
    scratch = tmp_path / "scratch"
    shutil.move(tmp_path / linked, scratch)
    (tmp_path / linked).symlink_to(scratch, target_is_directory=True)
    second = write_set(paths, 2)
    assert find(paths, None, MLP) == second
    assert [one.iteration.epoch for one in Snapshot(paths).sets() if one.iteration] == [1, 2]


def test_reading_changes_nothing_on_disk(paths: PathProvider, tmp_path: Path) -> None:
    """Every question leaves names and times of change as they were."""
    write_set(paths, 1)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    find(paths, None, MLP)
    newest(paths)
    Snapshot(paths).sets()
    Snapshot(paths).broken()
    with pytest.raises(CheckpointNotFoundError):
        find(paths, "nothing")
    with pytest.raises(CheckpointNotFoundError):
        find(PathProvider(tmp_path, "absent", "stage"), None)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# Torn sets.


def test_files_of_different_iterations_are_torn() -> None:
    """Every file and what it says is named."""
    checkpoint_set = CheckpointSet(Path("x"), "latest", ("latest",), None, None, False, ())
    one, two = TrainingIteration(1, 1, 1), TrainingIteration(2, 2, 2)
    check_consistency({"a": (one, "run"), "b": (one, None), "c": (None, "run")}, checkpoint_set)
    with pytest.raises(
        TornSetError, match=r"mixes files of different iterations: a: E1_U1_S1 .*; b: E2_U2_S2"
    ) as caught:
        check_consistency({"a": (one, "run"), "b": (two, None)}, checkpoint_set)
    assert caught.value.found == {"a": "E1_U1_S1 of run run", "b": "E2_U2_S2"}


def test_file_that_contradicts_its_name_is_torn() -> None:
    """The iteration in the name counts as one more voice."""
    two = TrainingIteration(2, 2, 2)
    checkpoint_set = CheckpointSet(Path("x"), "E1_U1_S1", ("E1_U1_S1",), TrainingIteration(1, 1, 1), None, False, ())
    with pytest.raises(TornSetError, match="the set is E1_U1_S1"):
        check_consistency({"a": (two, "run"), "b": (two, "run")}, checkpoint_set)


def test_files_of_different_runs_are_torn() -> None:
    """A run id that was used twice mixes two runs."""
    checkpoint_set = CheckpointSet(Path("x"), "latest", ("latest",), None, None, False, ())
    one = TrainingIteration(1, 1, 1)
    with pytest.raises(TornSetError, match="different runs: a: E1_U1_S1 of run first; b: E1_U1_S1 of run second"):
        check_consistency({"a": (one, "first"), "b": (one, "second")}, checkpoint_set)


def test_of_two_sets_of_one_sequence_the_further_one_is_newer(paths: PathProvider) -> None:
    """Writers that did not see each other; as text, E2 would come after E10."""
    further = write_set(paths, 10, "latest")
    shutil.move(paths.checkpoint_path / "sets", paths.checkpoint_path / "sets.aside")
    earlier = write_set(paths, 2, "latest")
    shutil.move(paths.checkpoint_path / "sets.aside" / further.folder.name, further.folder)
    assert (earlier.sequence, further.sequence) == (1, 1)
    assert [found.name for found in Snapshot(paths).sets()] == [earlier.name, further.name]
    last = newest(paths)
    assert last is not None
    assert last.name == further.name
    assert find(paths, "latest").name == further.name
