"""Which training a set belongs to: what retention removes after a restart, a second start, and a walk-back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
import torch
from support.damage import flip_tensor_bit, rewrite

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    InitReport,
    PathProvider,
    TrainerState,
    TrainingIteration,
    bind,
)
from noether_init_core.saving.content import Start
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.manifest import Manifest, read_manifest
from noether_init_core.sets.snapshot import Snapshot

FRESH = TrainingIteration.zero()


def at(epoch: int) -> TrainingIteration:
    return TrainingIteration(epoch, 10 * epoch, 100 * epoch)


def bound() -> Any:
    module = torch.nn.Linear(2, 1)
    return bind(module, name="mlp", optimizer=torch.optim.SGD(module.parameters()))


MODEL = bound()


class Trainer:
    """A trainer of somebody else, which takes a lineage and keeps no report."""

    lineage: tuple[Any, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def sets(paths: PathProvider) -> dict[int, str]:
    """Sequence -> epoch of every set that is there."""
    return {one.sequence or 0: one.name.split("_")[0] for one in Snapshot(paths).sets()}


def manifest_of(one: CheckpointSet) -> Manifest:
    assert one.manifest is not None
    return one.manifest


def save(writer: CheckpointWriter, *epochs: int, trainer: Any = None) -> list[Manifest]:
    return [manifest_of(writer.save(MODEL, at(epoch), trainer=trainer)) for epoch in epochs]


def resume(paths: PathProvider, trainer: Any = None, **config: Any) -> InitReport:
    """Go on as another process would, from the newest good set if the config says no other."""
    configs: Any = [{"kind": "resume", **config}] if config else {"auto_resume": True, "on_invalid": "previous"}
    stack = InitializerStack.from_config(configs, path_provider=paths)
    return stack.initialize(bound(), trainer=trainer or Trainer())


def damage(one: Manifest, paths: PathProvider) -> str:
    """Flip a bit of a set's weights; its name."""
    folder = paths.checkpoint_path / "sets" / f"{one.sequence:08d}_{one.training_iteration}"
    flip_tensor_bit(next(folder.glob("*_model.th")))
    return folder.name


# Two trainings under one run id.


def test_second_training_leaves_the_sets_of_the_first(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody said anything of a start; going back to an earlier iteration says enough."""
    first = save(CheckpointWriter(paths, keep_last=2), 1, 2, 3)
    second = save(CheckpointWriter(paths, keep_last=2), 1, 4, 5, 6)
    assert sets(paths) == {2: "E2", 3: "E3", 6: "E5", 7: "E6"}
    assert {one.training for one in first}.isdisjoint({one.training for one in second})
    assert len({one.training for one in second}) == 1
    assert caplog.text.count("already has sets up to E3_U30_S300") == 1
    assert "They stay on disk" in caplog.text


@pytest.mark.parametrize("told", ["report", "trainer"])
def test_fresh_start_is_another_training_even_if_it_saves_later_for_the_first_time(
    paths: PathProvider, caplog: pytest.LogCaptureFixture, told: str
) -> None:
    """A report says it, and so does a trainer that was initialized without a single file."""
    save(CheckpointWriter(paths, keep_last=2), 1, 2)
    trainer = TrainerState()
    report = InitializerStack.from_config([], path_provider=paths).initialize(bound(), trainer=trainer)
    writer = CheckpointWriter(paths, keep_last=2, report=report if told == "report" else None)
    for epoch in (2, 3, 4, 5):
        if told == "report":
            save(writer, epoch)
        else:
            trainer.advance(samples=100, end_of_epoch=True)
            writer.save(MODEL, trainer=trainer)
    assert list(sets(paths))[:2] == [1, 2]
    assert {5, 6} <= set(sets(paths))
    assert caplog.text.count("already has sets up to E2_U20_S200") == 1


def test_writers_of_one_start_go_on_with_one_training(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """A new writer for each save, with the same report or with none, is no new training."""
    report = InitReport(FRESH)
    for epoch in (1, 2, 3, 3, 4):
        save(CheckpointWriter(paths, keep_last=2, report=report), epoch)
    assert sets(paths) == {4: "E3", 5: "E4"}
    for epoch in (4, 5, 6):
        save(CheckpointWriter(paths, keep_last=2), epoch)
    assert sets(paths) == {7: "E5", 8: "E6"}
    assert caplog.text == ""


def test_process_that_resumes_goes_on_with_the_training(paths: PathProvider, caplog: pytest.LogCaptureFixture) -> None:
    """However often it is killed; also after another training began under the run id."""
    (first,) = save(CheckpointWriter(paths, keep_last=2), 5)
    trainings = set()
    for epoch in (1, 2, 3):
        report = resume(paths) if epoch > 1 else InitReport(FRESH)
        trainings |= {one.training for one in save(CheckpointWriter(paths, keep_last=2, report=report), epoch)}
    assert sets(paths) == {1: "E5", 3: "E2", 4: "E3"}
    assert len(trainings) == 1
    assert first.training not in trainings
    (again,) = save(CheckpointWriter(paths, report=resume(paths, checkpoint_tag="E5")), 6)
    assert (again.training, again.started_from) == (first.training, "00000001_E5_U50_S500")
    assert caplog.text.count("of another training; this run saves") == 1


def test_resume_from_another_run_is_a_new_training(paths: PathProvider) -> None:
    """Started again unedited, it resumes there again: the sets of its first life are not its own."""
    other = PathProvider(paths.output_root, "other")
    (origin,) = save(CheckpointWriter(other), 3)
    report = resume(paths, run_id="other", checkpoint_tag="latest")
    first = save(CheckpointWriter(paths, keep_last=2, report=report), 4, 5)
    report = resume(paths, run_id="other", checkpoint_tag="latest")
    second = save(CheckpointWriter(paths, keep_last=2, report=report), 6, 7, 8)
    assert sets(paths) == {1: "E4", 2: "E5", 4: "E7", 5: "E8"}
    assert len({origin.training, *(one.training for one in first), *(one.training for one in second)}) == 3
    assert second[0].started_from is None


def test_writer_whose_iterations_go_back_begins_another_training(paths: PathProvider) -> None:
    """The cell of a notebook that trains was run again, the one that makes the writer was not."""
    writer = CheckpointWriter(paths, keep_last=2)
    save(writer, 1, 2, 3)
    save(writer, 1, 4, 5, 6)
    assert sets(paths) == {2: "E2", 3: "E3", 6: "E5", 7: "E6"}


def test_report_of_a_later_start_than_what_is_saved_says_nothing_of_it(paths: PathProvider) -> None:
    """A report that is left over from before: what is at an earlier iteration does not come from there."""
    first = save(CheckpointWriter(paths, keep_last=2), 4, 5)
    second = save(CheckpointWriter(paths, keep_last=2, report=resume(paths)), 1, 2, 3)
    assert {1: "E4", 2: "E5"}.items() <= sets(paths).items()
    assert first[0].training not in {one.training for one in second}


def test_writer_follows_what_its_trainer_says_of_a_new_start(paths: PathProvider) -> None:
    """The same writer after a second initialization, at the same iteration."""
    writer, trainer = CheckpointWriter(paths, keep_last=2), TrainerState()
    stack = InitializerStack.from_config([], path_provider=paths)
    trainings = []
    for _ in range(2):
        stack.initialize(bound(), trainer=trainer)
        trainings += [manifest_of(writer.save(MODEL, at(0), trainer=trainer)).training for _ in range(2)]
    assert trainings[0] == trainings[1] != trainings[2] == trainings[3]


@pytest.mark.parametrize("first", [True, False])
def test_save_without_the_trainer_is_of_the_same_training(
    paths: PathProvider, caplog: pytest.LogCaptureFixture, first: bool
) -> None:
    """Only some saves of a loop are given the trainer, which alone knows of the start."""
    save(CheckpointWriter(paths), 2)
    trainer = Trainer()
    trainer.lineage = resume(paths).lineage()  # type: ignore[assignment]
    writer, said = CheckpointWriter(paths), []
    for epoch, is_given in enumerate((first, not first, first), start=3):
        (saved,) = save(writer, epoch, trainer=trainer if is_given else None)
        said.append((saved.training, saved.started_from))
    assert len({training for training, _ in said}) == 1
    assert said[-1][1] == "00000001_E2_U20_S200"
    fresh = PathProvider(paths.output_root, "fresh")
    state = TrainerState()
    InitializerStack.from_config([], path_provider=fresh).initialize(bound(), trainer=state)
    writer = CheckpointWriter(fresh)
    trainings = {save(writer, 0)[0].training, manifest_of(writer.save(MODEL, trainer=state)).training}
    assert len(trainings) == 1
    assert caplog.text == ""


def test_sets_of_earlier_releases_are_one_training_that_can_go_on(paths: PathProvider) -> None:
    """Their manifests say no training; a resume, or a save that nobody explains, goes on with them."""
    writer = CheckpointWriter(paths)
    save(writer, 1, 2)
    for one in Snapshot(paths).sets():
        older = msgspec.structs.replace(manifest_of(one), training=None)
        rewrite(one.folder / "manifest.json", older.to_bytes())
    save(CheckpointWriter(paths, keep_last=2, report=resume(paths)), 3)
    save(CheckpointWriter(paths, keep_last=2), 4)
    assert sets(paths) == {3: "E3", 4: "E4"}
    assert {manifest_of(one).training for one in Snapshot(paths).sets()} == {None}


# Walk-back.


@pytest.mark.parametrize("told", ["report", "trainer", "lineage"])
def test_set_that_was_passed_over_does_not_count(paths: PathProvider, told: str) -> None:
    """From E5, behind a damaged E6: until there are two newer good sets, E5 stays; then both go."""
    saved = save(CheckpointWriter(paths, keep_last=2), 4, 5, 6)
    name = damage(saved[-1], paths)
    trainer: Any = TrainerState() if told == "trainer" else Trainer()
    report = resume(paths, trainer)
    assert report.start == at(5)
    writer = CheckpointWriter(paths, keep_last=2, report=report if told == "report" else None)

    def save_next(epoch: int) -> Manifest:
        if told != "trainer":
            return save(writer, epoch, trainer=trainer)[0]
        trainer.advance(samples=100, end_of_epoch=True)
        return manifest_of(writer.save(MODEL, trainer=trainer))

    again = save_next(6)
    assert again.passed_over == (name,)
    assert again.started_from == "00000002_E5_U50_S500"
    assert again.training == saved[0].training
    assert sets(paths) == {2: "E5", 3: "E6", 4: "E6"}
    save_next(7)
    assert sets(paths) == {4: "E6", 5: "E7"}


def test_later_process_knows_what_an_earlier_one_passed_over(paths: PathProvider) -> None:
    """It resumed from a good set and passed over nothing itself; the damage does not show in the size of a file."""
    saved = save(CheckpointWriter(paths, keep_last=3), 4, 5, 6)
    name = damage(saved[-1], paths)
    save(CheckpointWriter(paths, keep_last=3, report=resume(paths)), 6)
    report = resume(paths)
    assert (report.start, report.initializers[0].passed_over) == (at(6), ())
    (later,) = save(CheckpointWriter(paths, keep_last=3, report=report), 7)
    assert later.passed_over == (name,)
    assert sets(paths) == {2: "E5", 3: "E6", 4: "E6", 5: "E7"}
    (last,) = save(CheckpointWriter(paths, keep_last=3, report=resume(paths)), 8)
    assert sets(paths) == {4: "E6", 5: "E7", 6: "E8"}
    assert last.passed_over == (name,)
    assert save(CheckpointWriter(paths), 9)[0].passed_over == ()


def test_set_that_is_resumed_after_all_counts_again(paths: PathProvider) -> None:
    """A disk that was out of reach for a while is back."""
    saved = save(CheckpointWriter(paths), 5, 6)
    name = damage(saved[-1], paths)
    (again,) = save(CheckpointWriter(paths, report=resume(paths)), 6)
    assert again.passed_over == (name,)
    start = InitReport(at(6), (attrs.evolve(resume(paths).initializers[0], resumed_set=str(_folder(paths, name))),))
    (after,) = save(CheckpointWriter(paths, report=start), 7)
    assert (after.started_from, after.passed_over) == (name, ())


def _folder(paths: PathProvider, name: str) -> Path:
    return paths.checkpoint_path / "sets" / name


def test_set_that_was_gone_back_to_on_purpose_stays_for_a_while(paths: PathProvider) -> None:
    """E4 and E5 are newer than E3, but what is trained now comes from E3."""
    save(CheckpointWriter(paths, keep_last=3), 3, 4, 5)
    writer = CheckpointWriter(paths, keep_last=2, report=resume(paths, checkpoint_tag="E3"))
    save(writer, 4)
    assert sets(paths) == {1: "E3", 3: "E5", 4: "E4"}
    save(writer, 5)
    assert sets(paths) == {4: "E4", 5: "E5"}


def test_names_of_another_folder_are_no_names_of_this_one(paths: PathProvider) -> None:
    """A walk-back in another run passes over a set whose name a set here may have, too."""
    other = PathProvider(paths.output_root, "other")
    saved = save(CheckpointWriter(other), 1, 2)
    damage(saved[-1], other)
    report = resume(paths, run_id="other", on_invalid="previous")
    assert [name for name, _ in report.initializers[0].passed_over] == ["00000002_E2_U20_S200"]
    writer = CheckpointWriter(paths, report=report)
    assert [(one.started_from, one.passed_over) for one in save(writer, 1, 2, 3)] == [(None, ())] * 3


def test_lineage_in_a_manifest_names_the_set_without_the_path_of_a_machine(paths: PathProvider) -> None:
    """A manifest is read on other machines."""
    save(CheckpointWriter(paths), 1)
    (saved,) = save(CheckpointWriter(paths, report=resume(paths)), 2)
    assert saved.lineage[0]["set"] == "00000001_E1_U10_S100"
    assert str(paths.output_root) not in saved.to_bytes().decode()
    assert read_manifest(_folder(paths, "00000002_E2_U20_S200") / "manifest.json") == saved


@pytest.mark.parametrize(
    ("lineage", "expected"),
    [
        ((), Start()),
        (({"kind": "previous_run", "file": "x"},), Start()),
        (({"kind": "resume"},), Start(is_resumed=True)),
        (
            ({"kind": "my.Resume", "set": "/a/b", "passed_over": ["c"]},),
            Start(is_resumed=True, folder=Path("/a/b"), passed_over=("c",)),
        ),
        (({"kind": "resume", "passed_over": "c"},), Start(is_resumed=True)),
    ],
)
def test_what_a_lineage_says_of_the_start(lineage: Any, expected: Start) -> None:
    """A set, or the kind, says that something was resumed; nothing else says anything."""
    trainer = Trainer()
    trainer.lineage = lineage
    assert Start.of(None, trainer) == expected
    assert Start.of(object(), trainer) == expected
