"""What an error or a note on sets advises is done here, and leads on; what must stay is compared byte by byte."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.advice import digests, executes, saw, typed
from support.following import advised, refusal

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, TrainingIteration, bind
from noether_init_core.diff.sides import side_at
from noether_init_core.errors import CheckpointError, CheckpointNotFoundError
from noether_init_core.inspection.reading import look_at_folder
from noether_init_core.sets import manifest as manifest_module
from noether_init_core.sets.flat_files import check_as_listed
from noether_init_core.sets.health import verify_file, verify_run
from noether_init_core.sets.places import runs_at
from noether_init_core.sets.selection import find_set
from noether_init_core.sets.snapshot import Snapshot

ONE, TWO = TrainingIteration(1, 10, 100), TrainingIteration(2, 20, 200)


class At:
    """A trainer at an iteration."""

    def __init__(self, iteration: TrainingIteration) -> None:
        self.iteration = iteration

    def state_dict(self) -> dict[str, Any]:
        return {"training_iteration": self.iteration.to_mapping()}


def model(name: str = "net") -> Any:
    module = torch.nn.Linear(3, 2)
    return bind(module, name, optimizer=torch.optim.AdamW(module.parameters()))


@pytest.fixture
def run(paths: PathProvider) -> PathProvider:
    """A run with two sets."""
    for iteration in (ONE, TWO):
        CheckpointWriter(paths).save(model(), trainer=At(iteration))
    return paths


def start(paths: PathProvider, entry: str = "kind: resume", name: str = "net") -> int:
    """Start with one initializer, in the form of a config; return the update of the start."""
    fields = {"run_id": paths.run_id, **yaml.safe_load("{" + entry + "}")}
    stack = InitializerStack.from_config([fields], path_provider=PathProvider(paths.output_root, "new"))
    trainer = TrainerState()
    stack.initialize(model(name), trainer=trainer)
    return trainer.update


@executes("sets/checkpoint_set.py", "Next: rename the folder to {} if it was renamed by hand")
def test_a_folder_that_was_renamed_by_hand_gets_its_name_again(run: PathProvider) -> None:
    """Then the set is resumed; nothing else has changed."""
    sets = run.checkpoint_path / "sets"
    before = digests(sets)
    (sets / f"00000002_{TWO}").rename(sets / f"00000007_{TWO}")
    advice = advised(lambda: start(run))
    name = re.match(r"rename the folder to (\S+) if it was renamed by hand", saw(broken(run)).partition("Next: ")[2])
    assert name is not None, advice
    (sets / f"00000007_{TWO}").rename(sets / name[1])
    assert start(run) == 20
    assert digests(sets) == before


def broken(paths: PathProvider) -> str:
    """What is wrong with the sets of a run."""
    return "\n".join(str(error) for error in Snapshot(paths).broken())


@executes("sets/checkpoint_set.py", "Next: mount its disk, or remove the link", "Next: move this file away")
@pytest.mark.parametrize("is_link", [True, False], ids=["a link", "a file"])
def test_what_hides_the_checkpoints_is_moved_away(tmp_path: Path, run: PathProvider, is_link: bool) -> None:
    """A link to a disk that is absent, and a file in the place of the folder; both ways of the link are done."""
    hidden = tmp_path / "hidden"
    run.checkpoint_path.rename(hidden)
    before = digests(hidden)
    for way in range(2 if is_link else 1):
        if is_link:
            run.checkpoint_path.symlink_to(tmp_path / "absent")
            assert advised(lambda: start(run)).startswith("mount its disk, or remove the link")
        else:
            run.checkpoint_path.write_text("a file")
            assert advised(lambda: start(run)).startswith("move this file away")
        if way == 1:
            hidden.rename(tmp_path / "absent")
            assert start(run) == 20
            (tmp_path / "absent").rename(hidden)
        elif is_link:
            run.checkpoint_path.unlink()
            with pytest.raises(CheckpointNotFoundError):
                start(run)
        else:
            run.checkpoint_path.rename(tmp_path / "moved")
            hidden.rename(run.checkpoint_path)
            assert start(run) == 20
            run.checkpoint_path.rename(hidden)
    assert digests(hidden) == before


def flat_run(paths: PathProvider, *, torn: bool = False) -> None:
    """Files as Noether writes them: two iterations, and ``latest`` of which a file may be of another iteration."""
    folder = paths.checkpoint_path
    folder.mkdir(parents=True)
    module = model()
    for tag, iteration in ((str(ONE), ONE), (str(TWO), TWO), ("latest", TWO)):
        content = {"training_iteration": iteration.to_mapping(), "checkpoint_tag": tag, "run_id": paths.run_id}
        other = {**content, "training_iteration": (ONE if torn and tag == "latest" else iteration).to_mapping()}
        torch.save({"state_dict": module.state_dict(), **other}, folder / f"net_cp={tag}_model.th")
        state = {
            **module.optimizer.state_dict(),
            "param_idx_to_name": {0: "weight", 1: "bias"},
        }
        torch.save(state, folder / f"net_cp={tag}_optim.th")
        torch.save({"callback_state_dicts": {}, **content}, folder / f"net_cp={tag}_trainer.th")


@executes("sets/checkpoint_set.py", "Next: take another set")
def test_another_set_than_a_torn_one_is_taken(paths: PathProvider) -> None:
    """It is resumed, and the files of the torn one stay."""
    flat_run(paths, torn=True)
    before = digests(paths.output_root)
    entry = "kind: previous_run, model_name: net, checkpoint_tag: "
    assert "Next: take another set" in refusal(lambda: start(paths, entry + "latest"))
    assert start(paths, entry + str(ONE)) == 0
    # a resume knows the other sets, and names one in its only advice
    said = refusal(lambda: start(paths, "kind: resume, checkpoint_tag: latest"))
    assert said.count("Next") == 1
    line = re.search(r"; (checkpoint_tag: \S+) \(in initializers\.0\)", said)
    assert line is not None
    assert start(paths, f"kind: resume, {line[1]}") == 20
    assert digests(paths.output_root) == before


@executes("sets/flat_files.py", "Next: take another set")
def test_another_set_is_taken_if_the_average_is_of_another_iteration(paths: PathProvider) -> None:
    """No average of the iteration of ``latest`` exists; that of an iteration is loaded."""
    flat_run(paths)
    folder = paths.checkpoint_path
    for tag in (str(ONE), "latest"):
        shutil.copy(folder / f"net_cp={ONE}_model.th", folder / f"net_ema=0.9_cp={tag}_model.th")
    before = digests(paths.output_root)
    entry = "kind: previous_run, model_name: net, model_info: ema=0.9, checkpoint_tag: "
    assert advised(lambda: start(paths, entry + "latest")).startswith("take another set")
    assert start(paths, entry + str(ONE)) == 0
    assert digests(paths.output_root) == before


@executes("sets/flat_files.py", "Next: start again")
def test_a_start_after_a_file_was_written_again_is_repeated(paths: PathProvider) -> None:
    """The second look lists the file as it is now."""
    flat_run(paths)
    listed = Snapshot(paths).flat[0].files[0]
    content = torch.load(listed.path, weights_only=True)
    listed.path.unlink()
    torch.save({**content, "more": 1}, listed.path)
    assert advised(lambda: check_as_listed(listed)) == "start again"
    check_as_listed(Snapshot(paths).flat[0].files[0])
    assert start(paths, f"kind: resume, checkpoint_tag: {TWO}") == 20


@executes("sets/health.py", "Next, to load it: verify: header", "Next: set digest: sha256:... in a config")
def test_a_file_that_cannot_be_verified_is_loaded_as_advised(tmp_path: Path, paths: PathProvider) -> None:
    """A torch file without checksums by its header, a safetensors file by the digest that a config has."""
    import hashlib

    from safetensors.torch import save_file

    state = torch.nn.Linear(3, 2).state_dict()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    save_file(state, tmp_path / "b.safetensors")
    before = digests(tmp_path)

    def loaded(name: str, more: str = "") -> None:
        stack = InitializerStack.from_config(
            [{"kind": "file", "path": str(tmp_path / name), **yaml.safe_load("{" + more + "}")}], path_provider=paths
        )
        stack.initialize(model())

    note = saw(verify_file(tmp_path / "a.pt").note)
    with pytest.raises(CheckpointError, match="checksums"):
        loaded("a.pt")
    loaded("a.pt", note.partition("Next, to load it: ")[2])
    field = saw(verify_file(tmp_path / "b.safetensors").note).partition("Next: set ")[2].removesuffix(" in a config")
    digest = hashlib.sha256((tmp_path / "b.safetensors").read_bytes()).hexdigest()
    loaded("b.safetensors", field.replace("sha256:...", f"'sha256:{digest}'"))
    with pytest.raises(CheckpointError, match="digest"):
        loaded("b.safetensors", field.replace("sha256:...", f"'sha256:{'0' * 64}'"))
    assert digests(tmp_path) == before


@executes("sets/health.py", "Next: copy the file again if you have a copy")
def test_bytes_outside_of_the_records_are_copied_again(tmp_path: Path, run: PathProvider) -> None:
    """Until then the set is loaded as it was saved; after it, nothing is noted."""
    found = Snapshot(run).sets()[-1]
    path = next(file.path for file in found.files if file.part == "model")
    shutil.copy(path, tmp_path / "copy.th")
    whole = path.read_bytes()
    path.chmod(0o600)
    # the modification time in the last entry of the directory of the archive, which nothing reads
    at = whole.rindex(b"PK\x01\x02") + 12
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    notes = " ".join(note for one in verify_run(Snapshot(run)).sets for note in (*one.notes, *one.problems))
    assert "Next: copy the file again if you have a copy" in saw(notes)
    assert start(run) == 20
    shutil.copy(tmp_path / "copy.th", path)
    assert [one.state for one in verify_run(Snapshot(run)).sets] == ["good", "good"]
    assert [one.notes for one in verify_run(Snapshot(run)).sets] == [(), ()]


@executes("sets/health.py", "Next: remove it, or copy the file of the set there")
@pytest.mark.parametrize("way", ["remove it", "copy the file of the set there"])
def test_a_damaged_copy_for_noether_is_removed_or_copied(paths: PathProvider, way: str) -> None:
    """The set has all its bytes before and after, and nothing is noted any more."""
    CheckpointWriter(paths, flat_names=True).save(model(), trainer=At(ONE))
    found = Snapshot(paths).sets()[0]
    file = next(file for file in found.files if file.part == "model")
    copy = paths.checkpoint_path / "net_cp=latest_model.th"
    status, content = copy.stat(), copy.read_bytes()
    copy.chmod(0o600)
    with copy.open("rb+") as opened:
        opened.seek(len(content) // 2)
        opened.write(bytes([content[len(content) // 2] ^ 1]))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = digests(found.folder)
    flat = verify_run(Snapshot(paths), flat=True).flat
    said = saw(" ".join(flat.problems))
    assert f"Next: {'remove it, or copy the file of the set there'}" in said
    assert str(copy) in said
    copy.unlink()
    if way != "remove it":
        shutil.copy(file.path, copy)
    assert verify_run(Snapshot(paths), flat=True).flat.problems == ()
    assert digests(found.folder) == before
    assert start(paths) == 10


@executes("sets/manifest.py", "Next: take an older checkpoint", "Next: {}", "pip install --upgrade noether-init-core")
@pytest.mark.parametrize("version", ["damaged", 0, 99])
def test_a_manifest_that_is_refused_leads_to_another_set(
    run: PathProvider, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older set is resumed, a file of the set is read, or the release that wrote it is installed."""
    path = Snapshot(run).folders[-1].manifest_path
    path.chmod(0o600)
    text = path.read_text()
    if version == "damaged":
        path.write_text(text.replace('"run_id": "run"', '"run_id": "rum"').replace('"run_id":"run"', '"run_id":"rum"'))
        assert path.read_text() != text
    else:
        path.unlink()
        number = manifest_module.FORMAT_VERSION
        path.write_text(re.sub(rf'("format_version": ?){number}\b', rf"\g<1>{version}", text))
        assert json.loads(path.read_text())["format_version"] == version
    before = digests(run.output_root)
    said = saw(broken(run)).partition("Next: ")[2]
    if version == "damaged":
        assert said.startswith("take an older checkpoint")
        assert start(run, f"kind: resume, checkpoint_tag: {ONE}") == 10
    elif version == 0:
        kind = re.search(r"or read one of its files with (kind: file)$", said)
        assert kind is not None
        file = next(path.parent.glob("*_model.th"))
        stack = InitializerStack.from_config(
            [{**yaml.safe_load(kind[1]), "path": str(file)}], path_provider=PathProvider(run.output_root, "new")
        )
        stack.initialize(model())
    else:
        assert said == "pip install --upgrade noether-init-core"
        monkeypatch.setattr(manifest_module, "FORMAT_VERSION", version)
        assert said not in broken(run)
    assert digests(run.output_root) == before


@executes("sets/places.py", "Next: ninit verify PATH, with an output root, a run folder, a folder of checkpoints, or a")
def test_verify_gets_each_kind_of_path(tmp_path: Path, run: PathProvider) -> None:
    """Each that the message names, and every file stays as it was."""
    (tmp_path / "empty").mkdir()
    command = advised(lambda: runs_at(tmp_path / "empty")).partition(", with")[0]
    before = digests(run.output_root)
    file = next((run.checkpoint_path / "sets").glob("*/*_model.th"))
    for path in (run.output_root, run.run_output_path, run.checkpoint_path, file):
        assert command.startswith("ninit verify PATH")
        typed(command.replace("PATH", f"'{path}'"))
    assert digests(run.output_root) == before


@executes("sets/refusals.py", "Next: ninit inspect {}", "Next: resume from {}")
@executes("sets/refusals.py", "Next, if it is the same model under another name: {}", "Next: {}{}")
@executes("sets/refusals.py", "Next: select one, such as {}")
def test_a_refused_selection_names_what_can_be_selected(run: PathProvider) -> None:
    """Commands are typed, lines are put into the entry; then it starts, and every file stays as it was."""
    root = run.output_root
    elsewhere = PathProvider(root, "other")
    CheckpointWriter(elsewhere).save(model("a"), trainer=At(ONE))
    CheckpointWriter(elsewhere).save(model("b"), trainer=At(TWO))
    before = digests(root)
    typed(advised(lambda: start(PathProvider(root, "rum"))))

    def entry(text: str) -> str:
        return text.partition(". ")[0].partition(" (")[0].partition("; ")[0]

    said = advised(
        lambda: start(run, "kind: previous_run, model_name: encoder", "encoder"),
        "if it is the same model under another name: ",
    )
    assert start(run, f"kind: previous_run, {entry(said)}", "encoder") == 0
    said = advised(lambda: start(elsewhere, f"kind: previous_run, model_name: a, checkpoint_tag: {TWO}", "a"))
    assert start(elsewhere, f"kind: previous_run, model_name: a, {entry(said)}", "a") == 0
    said = advised(lambda: start(elsewhere, "kind: resume", "c"))
    line = said.removeprefix("select one, such as ").removesuffix(" (in initializers.0)")
    assert start(elsewhere, f"kind: resume, {line}", "c") >= 10
    weights = PathProvider(root, "weights")
    assert digests(root) == before

    CheckpointWriter(weights).save(model(), trainer=At(ONE))
    CheckpointWriter(weights).save(model(), trainer=At(TWO), optimizer=False)
    before = digests(root)
    said = advised(lambda: start(weights, "kind: resume, checkpoint_tag: latest"))
    match = re.match(r"resume from .* with (checkpoint_tag: \S+) \(in initializers\.0\)", said)
    assert match is not None
    assert start(weights, f"kind: resume, {match[1]}") == 10
    match = re.search(r"; \{(kind: previous_run, run_id: weights)\} \(in initializers\.0\) loads weights only", said)
    assert match is not None
    assert start(weights, f"{match[1]}, model_name: net, checkpoint_tag: latest") == 0
    assert digests(root) == before


@executes("sets/refusals.py", "Next: ninit verify {}")
def test_the_command_for_a_run_without_a_good_set_shows_each(run: PathProvider) -> None:
    """All are damaged: verify shows so, and nothing is removed."""
    for folder in Snapshot(run).folders:
        file = next(folder.path.glob("*_model.th"))
        file.chmod(0o600)
        file.write_bytes(b"damaged")
    before = digests(run.output_root)
    said = advised(lambda: start(run, "kind: resume, on_invalid: previous"))
    assert said.startswith("ninit verify ")
    typed(f"{said} || test $? = 1")
    assert digests(run.output_root) == before


@executes("inspection/reading.py", "Next: ninit inspect {}")
@executes("diff/sides.py", "Next: ninit verify {}")
def test_a_set_that_was_never_committed_is_looked_at(run: PathProvider) -> None:
    """The commands of both messages end well and change nothing."""
    folder = Snapshot(run).folders[-1]
    folder.manifest_path.unlink()
    before = digests(run.output_root)
    typed(advised(lambda: look_at_folder(folder.path)))
    done = advised(lambda: side_at(folder.path))
    assert done.startswith("ninit verify ")
    typed(f"{done} || test $? = 1")
    assert digests(run.output_root) == before
    assert find_set(Snapshot(run), "latest").found.iteration == ONE


@executes("sets/refusals.py", "Next: {}")
@pytest.mark.parametrize("way", ["remove", "initializer", "tag", "file"])
def test_later_flat_files_of_another_program_are_left_or_moved(tmp_path: Path, run: PathProvider, way: str) -> None:
    """The pattern of the message names them and no other file; the lines start from what they say."""
    content = {"training_iteration": {"epoch": 3, "update": 30, "sample": 300}, "run_id": "run"}
    for part in ("model", "trainer"):
        state = {"state_dict": model().state_dict()} if part == "model" else {"callback_state_dicts": {}}
        torch.save({**state, **content}, run.checkpoint_path / f"net_cp=E3_U30_S300_{part}.th")
    before = digests(run.output_root)
    by_itself = way in ("remove", "initializer")

    def resumed() -> int:
        if not by_itself:
            return start(run, "kind: resume")
        trainer = TrainerState()
        stack = InitializerStack.from_config({"auto_resume": True, "initializers": []}, path_provider=run)
        stack.initialize(model(), trainer=trainer)
        return trainer.update

    said = advised(resumed)
    if way == "remove":
        pattern = said.removeprefix("remove ").partition(" if they are not needed")[0]
        named = sorted(run.checkpoint_path.rglob(pattern))
        assert [path.name for path in named] == [f"net_cp=E3_U30_S300_{part}.th" for part in ("model", "trainer")]
        for path in named:
            path.rename(tmp_path / path.name)
        assert resumed() == 20
        for path in named:
            (tmp_path / path.name).rename(path)
    elif way == "file":
        assert "kind: file for one of the flat files" in said
        path = run.checkpoint_path / "net_cp=E3_U30_S300_model.th"
        stack = InitializerStack.from_config(
            [{"kind": "file", "path": str(path)}], path_provider=PathProvider(run.output_root, "new")
        )
        stack.initialize(model())
    else:
        line = (
            said.rpartition("- {")[2].rstrip("}")
            if by_itself
            else "kind: resume, " + said.partition(" (in initializers.0) to resume")[0]
        )
        assert start(run, line) == 20
    assert digests(run.output_root) == before


CONFIGS: dict[str, Any] = {
    "resume": [{"kind": "resume"}],
    "resume that walks back": [{"kind": "resume", "on_invalid": "previous"}],
    "auto_resume": {"auto_resume": True},
    "auto_resume that walks back": {"auto_resume": {"on_invalid": "previous"}},
}


@executes("files/storage/disk.py", "Next: mount its disk, or change its permissions")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["manifest.json", f"net_cp={TWO}_model.th"])
def test_a_set_that_cannot_be_reached_is_no_ground_to_take_another_one(
    run: PathProvider, monkeypatch: pytest.MonkeyPatch, config: Any, name: str
) -> None:
    """Only what is absent or damaged is; after the permission was given, the newest set is resumed."""
    path = Snapshot(run).folders[-1].path / name
    before = digests(run.output_root)
    opened = os.open

    def failing(file: Any, *arguments: Any, **options: Any) -> int:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    def resumed() -> int:
        trainer = TrainerState()
        InitializerStack.from_config(config, path_provider=run).initialize(model(), trainer=trainer)
        return trainer.update

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        said = refusal(resumed)
    assert said.count("Next") == 1
    assert said.endswith("Next: mount its disk, or change its permissions")
    assert "on_invalid" not in said
    assert str(ONE) not in said
    assert resumed() == 20
    assert digests(run.output_root) == before


@pytest.mark.parametrize("walks_back", [False, True])
def test_a_set_of_a_newer_release_is_not_walked_back_from(run: PathProvider, *, walks_back: bool) -> None:
    """``on_invalid: previous`` stops at it, too, so it is not advised."""
    path = Snapshot(run).folders[-1].manifest_path
    text = path.read_text()
    path.unlink()
    path.write_text(re.sub(r'("format_version": ?)\d+', r"\g<1>99", text))
    said = refusal(lambda: start(run, "kind: resume" + (", on_invalid: previous" if walks_back else "")))
    assert "on_invalid" not in said
    assert said.count("Next") == 1
    line = re.search(r"; (checkpoint_tag: \S+) \(in initializers\.0\)", said)
    assert line is not None
    assert start(run, f"kind: resume, {line[1]}") == 10


@executes("sets/ways.py", "Next: {}")
@pytest.mark.parametrize("form", ["kind: resume", "auto_resume: true", "auto_resume: {verify: header}"])
def test_lines_of_a_refusal_name_their_place_in_the_config(tmp_path: Path, run: PathProvider, form: str) -> None:
    """File and line; pasted there, they select what the message says."""
    file = next(Snapshot(run).folders[-1].path.glob("*_model.th"))
    file.chmod(0o600)
    file.write_bytes(b"damaged")
    config = tmp_path / "init.yaml"
    by_itself = form != "kind: resume"
    config.write_text(f"# a comment\n{form}\n" if by_itself else f"# a comment\ninitializers:\n- {form}\n")

    def resumed() -> int:
        trainer = TrainerState()
        InitializerStack.from_file(config, path_provider=run).initialize(model(), trainer=trainer)
        return trainer.update

    said = refusal(resumed)
    place = "auto_resume, init.yaml:2" if by_itself else "initializers.0, init.yaml:3"
    assert f"on_invalid: previous ({'beside' if by_itself else 'in'} {place}) continues" in said
    lines = ["on_invalid: previous"] if by_itself else ["on_invalid: previous", f"checkpoint_tag: {ONE}"]
    text = config.read_text()
    for line in lines:
        assert f"{line} ({'beside' if by_itself else 'in'} {place})" in said
        config.write_text(text + (f"{line}\n" if by_itself else f"  {line}\n"))
        assert resumed() == 10

    other = PathProvider(run.output_root, "other")
    for name in ("a", "b"):
        CheckpointWriter(other).save(model(name), trainer=At(ONE))
    config.write_text(text)

    def started() -> int:
        trainer = TrainerState()
        InitializerStack.from_file(config, path_provider=other).initialize(model("a"), trainer=trainer)
        return trainer.update

    line = advised(started).removeprefix("select one, such as ")
    if form == "auto_resume: true":
        assert line == "auto_resume: {model_name: a}"
        config.write_text(line)
    else:
        assert line == f"model_name: a (in {place})"
        written = yaml.safe_load(text)
        target = written["auto_resume"] if by_itself else written["initializers"][0]
        target.update(yaml.safe_load(line.partition(" (")[0]))
        config.write_text(yaml.safe_dump(written))
    assert started() == 10


@executes("sets/refusals.py", "Next: {}")
@pytest.mark.parametrize("by_itself", [False, True])
@pytest.mark.parametrize("has_tag", [False, True])
def test_a_second_save_without_optimizer_leads_to_the_first_one(
    paths: PathProvider, *, by_itself: bool, has_tag: bool
) -> None:
    """Of the same iteration, not to an older one; also where the second one took over its last tag."""
    CheckpointWriter(paths).save(model(), trainer=At(ONE))
    CheckpointWriter(paths).save(model(), trainer=At(TWO))
    tags = ("best_model.loss",) if has_tag else ("best_model.loss", "latest", "last")
    CheckpointWriter(paths).save(model(), TWO, optimizer=False, tags=tags)
    before = digests(paths.output_root)
    first = Snapshot(paths).sets()[-2]

    def resumed(config: Any) -> int:
        trainer = TrainerState()
        report = InitializerStack.from_config(config, path_provider=paths).initialize(model(), trainer=trainer)
        assert "optimizer of net" in str(report)
        return trainer.update

    entry: Any = {"auto_resume": True} if by_itself else {"kind": "resume", "checkpoint_tag": "best"}
    said = advised(lambda: resumed(entry if by_itself else [entry]))
    line = re.match(rf"(\S+: \S+) \((beside auto_resume|in initializers\.0)\) selects {first.place}, an earlier", said)
    assert line is not None
    assert str(ONE) not in said
    config = {**entry, **yaml.safe_load(line[1])}
    assert resumed(config if by_itself else [config]) == 20
    assert digests(paths.output_root) == before
