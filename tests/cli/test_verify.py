"""``ninit verify``: what it finds at every kind of path, what it says of it, and its exit codes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import support.command
import torch
import yaml
from safetensors.torch import save_file
from support.command import run_command
from support.damage import flip_tensor_bit

from noether_init_core import (
    CheckpointCorruptError,
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    Snapshot,
    TrainerState,
    TrainingIteration,
    bind,
)
from noether_init_core.sets.health import verify_run

ONE, TWO, THREE = (TrainingIteration(n, 10 * n, 100 * n) for n in (1, 2, 3))


class Result(support.command.Result):
    """What the command printed and how it ended."""

    @property
    def rows(self) -> dict[str, str]:
        """Set -> its line of the table."""
        table = [
            line
            for line in self.out.splitlines()
            if line.startswith(("= ", "! ", "? ", "x ", "- ")) and ": " not in line
        ]
        return {line.split()[2]: line for line in table}


Verify = Callable[..., Result]


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Call the console script's function as the shell would, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments: Any) -> Result:
        return Result(*attrs.astuple(run_command(monkeypatch, capsys, "verify", *arguments)))

    return call


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    return PathProvider(tmp_path, "run", "train")


def save(paths: PathProvider, iteration: TrainingIteration, **how: Any) -> Path:
    """One set, whose folder is returned."""
    module = torch.nn.Linear(3, 2)
    model = bind(module, name="mlp", optimizer=torch.optim.AdamW(module.parameters()))
    return CheckpointWriter(paths, flat_names=True).save(model, iteration, **how).folder


def test_good_sets_are_good_whatever_path_is_given(verify: Verify, paths: PathProvider) -> None:
    """An output root, a run, a stage, its checkpoints, its sets, one set, one file: exit code 0 and the same sets."""
    save(paths, ONE)
    newest = save(paths, TWO)
    folder = paths.checkpoint_path
    for path in (paths.output_root, paths.output_root / "run", folder.parent, folder, folder / "sets", newest):
        result = verify(path)
        assert (result.code, result.err) == (0, "")
        assert list(result.rows) == ["00000002_E2_U20_S200", "00000001_E1_U10_S100"]
        assert result.out.splitlines()[0].split() == ["run/train", str(folder)]
        assert "  - {kind: resume, run_id: run, stage_name: train, checkpoint_tag: E2_U20_S200}" in result.out
        assert result.out.splitlines()[-1] == "sets: 2, problems: 0"
    result = verify(newest / "mlp_cp=E2_U20_S200_model.th")
    assert result.code == 0
    assert result.out.splitlines()[0].endswith(": 2 tensors, 32 bytes")


def test_tags_are_those_that_mean_the_set_now(verify: Verify, paths: PathProvider) -> None:
    """A tag that a later set took over is not listed again."""
    save(paths, ONE, tags=("latest", "best_model.loss"))
    save(paths, TWO)
    data = json.loads(verify(paths.checkpoint_path, "--json").out)
    sets = data["runs"][0]["sets"]
    assert [one["tags"] for one in sets] == [["E2_U20_S200", "latest"], ["E1_U10_S100", "best_model.loss"]]


def test_everything_that_is_wrong_is_said_of_its_set(verify: Verify, paths: PathProvider) -> None:
    """Every bad file, not the first only; the newest good set and a line that works."""
    folders = [save(paths, iteration) for iteration in (ONE, TWO, THREE)]
    flip_tensor_bit(folders[2] / "mlp_cp=E3_U30_S300_model.th")
    (folders[2] / "mlp_cp=E3_U30_S300_trainer.th").unlink()
    manifest = folders[1] / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    (folders[0].parent / "00000004_E4_U40_S400").mkdir()
    (folders[0] / "notes.txt").touch()
    result = verify(paths.output_root)
    assert result.code == 1
    assert list(result.rows) == [f"0000000{n}_E{n}_U{n}0_S{n}00" for n in (4, 3, 2, 1)]
    marks = [line.split()[:2] for line in result.rows.values()]
    assert marks == [["-", "uncommitted"], ["x", "broken"], ["x", "broken"], ["=", "good"]]
    assert "x 00000003_E3_U30_S300: mlp_cp=E3_U30_S300_model.th is damaged" in result.out
    assert "mlp_cp=E3_U30_S300_trainer.th is missing" in result.out
    assert "manifest.json cannot be read as a manifest" in result.out
    assert f"- {folders[0].name}: notes.txt is not in the manifest" in result.out
    assert result.out.splitlines()[-1] == "sets: 3, problems: 2"
    data = json.loads(verify(paths.output_root, "--json").out)
    (run,) = data["runs"]
    assert (data["version"], data["problems"], run["newest_good"]["name"]) == (1, 2, folders[0].name)
    assert [len(one["problems"]) for one in run["sets"]] == [0, 2, 1, 0]
    (config,) = yaml.safe_load(run["use"])
    stack = InitializerStack.from_config([config], path_provider=PathProvider(paths.output_root, "new"))
    assert stack.start_checkpoint() == ONE


def save_diverged(paths: PathProvider, iteration: TrainingIteration, *, also: str = "") -> Path:
    """A set with NaN in a weight; ``also`` names the info of an average that holds NaN instead."""
    module = torch.nn.Linear(3, 2)
    averages = {also: {key: torch.full_like(value, float("nan")) for key, value in module.state_dict().items()}}
    if not also:
        torch.nn.init.constant_(module.bias, float("nan"))
    model = bind(module, name="mlp", optimizer=torch.optim.AdamW(module.parameters()))
    return CheckpointWriter(paths, flat_names=True).save(model, iteration, averages=averages if also else None).folder


def test_sets_with_nan_are_marked_and_not_offered(verify: Verify, paths: PathProvider) -> None:
    """They are as they were written, so that the exit code stays 0; a resume would refuse them."""
    finite = save(paths, ONE)
    names = [save_diverged(paths, iteration).name for iteration in (TWO, THREE)]
    result = verify(paths.output_root)
    assert result.code == 0
    assert [line.split()[:2] for line in result.rows.values()] == [["!", "nonfinite"]] * 2 + [["=", "good"]]
    assert f"! {names[1]}: bias of mlp holds NaN; a resume refuses it (on_nonfinite: error)" in result.out
    assert f"newest good set: {finite.name}. To start from it:" in result.out
    assert result.out.splitlines()[-1] == "sets: 3, problems: 0"
    data = json.loads(verify(paths.output_root, "--json").out)
    (run,) = data["runs"]
    assert [one["state"] for one in run["sets"]] == ["nonfinite", "nonfinite", "good"]
    assert [one["nonfinite"] for one in run["sets"]] == [["bias of mlp holds NaN"]] * 2 + [[]]
    assert (run["newest_good"]["name"], data["problems"]) == (finite.name, 0)
    (config,) = yaml.safe_load(run["use"])
    stack = InitializerStack.from_config([config], path_provider=PathProvider(paths.output_root, "new"))
    assert stack.start_checkpoint() == ONE


def test_set_with_nan_is_offered_where_there_is_no_other_with_the_switch_it_needs(
    verify: Verify, paths: PathProvider
) -> None:
    """The line works, and says what it takes. A damaged set is broken, whatever values it holds."""
    save_diverged(paths, ONE)
    flip_tensor_bit(save_diverged(paths, TWO) / "mlp_cp=E2_U20_S200_model.th")
    result = verify(paths.output_root)
    assert result.code == 1
    assert [line[:11] for line in result.rows.values()] == ["x broken   ", "! nonfinite"]
    assert "every good set holds NaN or infinity. To start from 00000001_E1_U10_S100 anyway:" in result.out
    (config,) = yaml.safe_load(result.out.split("anyway:")[1].split("\n\n")[0])
    assert config["on_nonfinite"] == "warn"
    module = torch.nn.Linear(3, 2)
    model = bind(module, name="mlp", optimizer=torch.optim.AdamW(module.parameters()))
    stack = InitializerStack.from_config([config], path_provider=PathProvider(paths.output_root, "new"))
    assert stack.initialize(model).start == ONE
    assert bool(module.bias.isnan().all())


def test_what_continues_a_run_comes_before_what_mends_a_file(verify: Verify, paths: PathProvider) -> None:
    """The set, then how a resume goes back to it; that the damaged file may be copied again comes last."""
    module = torch.nn.Linear(3, 2)
    model = bind(module, name="mlp", optimizer=torch.optim.AdamW(module.parameters()))
    state, writer = TrainerState(seed=0), CheckpointWriter(paths)
    for _ in range(2):
        state.advance(samples=8, end_of_epoch=True)
        folder = writer.save(model, trainer=state).folder
    flip_tensor_bit(folder / "mlp_cp=E2_U2_S16_model.th")
    (paths.checkpoint_path / "sets" / "00000003_E3_U30_S300").mkdir()
    said = verify(paths.output_root).out
    parts = ("is damaged", "To start from it:", "on_invalid: previous", "copy it again")
    assert [said.count(part) for part in parts] == [1, 1, 1, 1]
    assert sorted(parts, key=said.index) == list(parts)
    resume = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    with pytest.raises(CheckpointCorruptError, match=r"Next: on_invalid: previous \(in .*; copy the file again"):
        resume.initialize(model, trainer=TrainerState())
    back = InitializerStack.from_config([{"kind": "resume", "on_invalid": "previous"}], path_provider=paths)
    assert str(back.initialize(model, trainer=TrainerState()).start) == "E1_U1_S8"


def test_nan_is_found_where_no_manifest_tells_of_values(verify: Verify, paths: PathProvider) -> None:
    """Every byte is read anyway."""
    save(paths, ONE)
    save_diverged(paths, TWO)
    shutil.rmtree(paths.checkpoint_path / "sets")
    states = {name: line.split()[1] for name, line in verify(paths.output_root).rows.items()}
    assert states == {"E2_U20_S200": "nonfinite", "latest": "nonfinite", "E1_U10_S100": "good"}


def test_nan_in_an_average_is_noted(verify: Verify, paths: PathProvider) -> None:
    """A resume does not load it as weights, and a callback may."""
    name = save_diverged(paths, ONE, also="ema=0.9").name
    result = verify(paths.output_root)
    assert result.rows[name].startswith("= good")
    assert f"- {name}: weight of mlp holds NaN (ema=0.9), which a resume ignores" in result.out


def test_line_says_which_of_several_models_it_resumes(
    verify: Verify, paths: PathProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """A tag that another model took over means a set of its own still; the line works as it stands."""
    caplog.set_level(logging.INFO)
    writer = CheckpointWriter(paths, flat_names=True)
    for name in ("gen", "disc"):
        folder = writer.save(bind(torch.nn.Linear(3, 2), name=name), ONE).folder
    flip_tensor_bit(folder / "disc_cp=E1_U10_S100_model.th")
    data = json.loads(verify(paths.output_root, "--json").out)
    assert [one["tags"] for one in data["runs"][0]["sets"]] == [["E1_U10_S100", "latest"]] * 2
    (config,) = yaml.safe_load(data["runs"][0]["use"])
    assert config["model_name"] == "gen"
    stack = InitializerStack.from_config([config], path_provider=PathProvider(paths.output_root, "new"))
    assert stack.start_checkpoint() == ONE
    assert any(record.message.endswith("sets/00000001_E1_U10_S100") for record in caplog.records)


def test_line_leads_to_the_good_set_even_if_every_tag_of_it_means_a_broken_one(
    verify: Verify, paths: PathProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """The same iteration, saved again and damaged since: only a walk-back leads to the first."""
    save(paths, ONE)
    (save(paths, ONE) / "mlp_cp=E1_U10_S100_optim.th").unlink()
    data = json.loads(verify(paths.output_root, "--json").out)
    (config,) = yaml.safe_load(data["runs"][0]["use"])
    assert config["on_invalid"] == "previous"
    stack = InitializerStack.from_config([config], path_provider=PathProvider(paths.output_root, "new"))
    assert stack.start_checkpoint() == ONE
    assert "passed over 00000002_E1_U10_S100" in caplog.text


def test_file_of_another_set_is_found(verify: Verify, paths: PathProvider) -> None:
    """Good by itself, and not what was written there."""
    old, new = save(paths, ONE), save(paths, TWO)
    target = new / "mlp_cp=E2_U20_S200_trainer.th"
    target.unlink()
    shutil.copy(old / "mlp_cp=E1_U10_S100_trainer.th", target)
    result = verify(new)
    assert result.code == 1
    assert result.rows["00000002_E2_U20_S200"].startswith("x broken")


def test_flat_files_later_than_the_committed_sets_are_a_problem(verify: Verify, paths: PathProvider) -> None:
    """Nothing can be chosen by itself then; both are named."""
    folder = save(paths, ONE)
    for part in ("model", "optim", "trainer"):
        flat = paths.checkpoint_path / f"mlp_cp=E7_U70_S700_{part}.th"
        shutil.copy(folder / f"mlp_cp=E1_U10_S100_{part}.th", flat)
    result = verify(paths.output_root)
    assert result.code == 1
    assert "flat files of E7_U70_S700 (mlp_cp=E7_U70_S700_model.th), later than the newest committed set" in result.out
    assert result.out.splitlines()[-1] == "sets: 1, problems: 1"


def test_legacy_folders_are_compared_with_their_own_checksums(
    verify: Verify, noether_runs: Path, tmp_path: Path
) -> None:
    """Those that Noether wrote are good; a flipped bit and files of two iterations under one tag are found."""
    result = verify(noether_runs)
    assert (result.code, result.out.splitlines()[-1]) == (0, "sets: 26, problems: 0")
    assert "no manifests: each file was verified with the checksums inside it" in result.out
    run = tmp_path / "mlp_train"
    shutil.copytree(noether_runs / "mlp_train", run)
    for path in run.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    folder = run / "train" / "checkpoints"
    flip_tensor_bit(folder / "mlp_cp=E4_U16_S128_optim.th")
    shutil.copy(folder / "mlp_cp=E3_U12_S96_trainer.th", folder / "mlp_cp=latest_trainer.th")
    (folder / "mlp_cp=last_trainer.th").unlink()
    result = verify(folder)
    assert result.code == 1
    states = {name: line.split()[1] for name, line in result.rows.items()}
    assert [name for name, state in states.items() if state == "broken"] == ["E4_U16_S128", "latest"]
    assert '"latest" mixes files of different iterations' in result.out
    use = "{kind: resume, run_id: mlp_train, stage_name: train, checkpoint_tag: E3_U12_S96}"
    assert use in result.out
    weights = tmp_path / "weights" / "mlp_train" / "checkpoints"
    weights.mkdir(parents=True)
    shutil.copy(folder / "mlp_cp=E2_U8_S64_model.th", weights)
    assert "{kind: previous_run, run_id: mlp_train, model_name: mlp, checkpoint_tag: E2_U8_S64}" in verify(weights).out


def test_a_single_file_is_verified_to_the_last_byte(verify: Verify, paths: PathProvider, tmp_path: Path) -> None:
    """Damage, no checkpoint at all, and a file without checksums, which cannot be vouched for."""
    file = save(paths, ONE) / "mlp_cp=E1_U10_S100_model.th"
    flip_tensor_bit(file)
    result = verify(file)
    assert result.code == 1
    assert "is damaged: the bytes of weight" in result.out or "is damaged: the bytes of bias" in result.out
    text = tmp_path / "notes.th"
    text.write_text("no checkpoint")
    assert verify(text).code == 1
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "unsummed.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    result = verify(tmp_path / "unsummed.pt")
    words = "(written without checksums, so its bytes cannot be verified. Next, to load it: verify: header)"
    assert result.out.splitlines() == [
        f"? unverifiable {tmp_path / 'unsummed.pt'}: 1 tensors, 12 bytes {words}",
        "files: 1, unverifiable: 1, problems: 0",
    ]
    assert (result.code, verify(tmp_path / "unsummed.pt", "--strict").code) == (0, 1)


def test_what_cannot_be_verified_is_not_called_verified(verify: Verify, tmp_path: Path) -> None:
    """A safetensors file has no checksums."""
    save_file({"w": torch.ones(3)}, tmp_path / "weights.safetensors")
    result = verify(tmp_path / "weights.safetensors")
    assert result.code == 0
    assert result.out.startswith(
        f"? unverifiable {tmp_path / 'weights.safetensors'}: 1 tensors, 12 bytes (structure only"
    )
    data = json.loads(verify(tmp_path / "weights.safetensors", "--json").out)
    assert (data["unverifiable"], data["files"][0]["state"], data["files"][0]["problem"]) == (1, "unverifiable", "")
    assert verify(tmp_path / "weights.safetensors", "--strict").code == 1


def test_a_run_whose_only_save_was_cut_short_has_no_problem(verify: Verify, paths: PathProvider) -> None:
    """Nobody ever picks it: the next start is a fresh one."""
    (paths.checkpoint_path / "sets" / "00000001_E1_U10_S100").mkdir(parents=True)
    result = verify(paths.output_root)
    assert result.code == 0
    assert "an unfinished save; it is never selected" in result.out
    assert "no good set" in result.out


def test_an_absent_path_and_a_folder_without_runs_are_errors(verify: Verify, tmp_path: Path) -> None:
    """They name the next step and create nothing."""
    assert "does not exist" in verify(tmp_path / "absent").err
    assert list(tmp_path.iterdir()) == []
    result = verify(tmp_path)
    assert (result.code, result.out) == (1, "")
    assert "no run found at" in result.err
    assert list(tmp_path.iterdir()) == []
    assert verify().code == 2
    assert verify("--yaml", tmp_path).code == 2


def test_runs_below_debug_are_verified_too(verify: Verify, tmp_path: Path) -> None:
    """Whoever verifies an output root wants all of it."""
    save(PathProvider(tmp_path, "one"), ONE)
    save(PathProvider(tmp_path, "two", debug=True), ONE)
    data = json.loads(verify(tmp_path, "--json").out)
    assert [run["run_id"] for run in data["runs"]] == ["one", "two"]


def test_verify_imports_no_torch_and_changes_nothing(paths: PathProvider) -> None:
    """It runs on a machine that stores checkpoints and trains nothing."""
    save(paths, ONE)
    before = {path: path.stat().st_mtime_ns for path in paths.output_root.rglob("*")}
    program = (
        "import sys\nfrom noether_init_core import cli\n"
        f"sys.argv = ['ninit', 'verify', {str(paths.output_root)!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "print([name for name in sys.modules if name in ('torch', 'numpy')])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    assert {path: path.stat().st_mtime_ns for path in paths.output_root.rglob("*")} == before


@pytest.mark.skipif(sys.platform == "win32", reason="there is no FIFO")
def test_a_fifo_does_not_block(verify: Verify, tmp_path: Path) -> None:
    """It is no regular file."""
    os.mkfifo(tmp_path / "pipe.th")
    assert verify(tmp_path / "pipe.th").code == 1


def test_a_set_without_checksums_is_neither_good_nor_broken(verify: Verify, tmp_path: Path) -> None:
    """Where nobody can vouch for anything, the line to start from it says so."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    content = {"state_dict": {"w": torch.ones(3)}, "training_iteration": ONE.to_mapping(), "run_id": "run"}
    torch.serialization.set_crc32_options(False)
    try:
        for part in ("model", "trainer"):
            torch.save(content, folder / f"mlp_cp=E1_U10_S100_{part}.th")
    finally:
        torch.serialization.set_crc32_options(True)
    result = verify(tmp_path)
    assert result.code == 0
    assert result.rows["E1_U10_S100"].startswith("? unverifiable")
    assert "- E1_U10_S100: mlp_cp=E1_U10_S100_model.th was written without checksums" in result.out
    assert "no set could be verified. To start from the newest anyway:" in result.out
    assert "{kind: resume, run_id: run, checkpoint_tag: E1_U10_S100, verify: header}" in result.out
    assert result.out.splitlines()[-1] == "sets: 1, unverifiable: 1, problems: 0"
    assert verify(tmp_path, "--strict").code == 1
    torch.save(content, folder / "mlp_cp=E1_U5_S50_model.th")
    (folder / "mlp_cp=E1_U10_S100_trainer.th").write_bytes(b"nothing")
    assert verify(tmp_path).rows["E1_U10_S100"].startswith("x broken")


def test_flat_files_are_counted_and_compared_if_asked(verify: Verify, paths: PathProvider) -> None:
    """Copies for Noether may be damaged while every set is good."""
    save(paths, ONE)
    folder = save(paths, TWO)
    result = verify(paths.output_root)
    assert (
        "- 9 flat files were not read: they are copies for Noether (--flat compares those of our saves)" in result.out
    )
    result = verify(paths.output_root, "--flat")
    assert result.code == 0
    assert "- of 9 flat files, 9 are the same as in their sets" in result.out
    copy = paths.checkpoint_path / "mlp_cp=latest_model.th"
    before = copy.stat()
    flip_tensor_bit(copy)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verify(paths.output_root).code == 0
    result = verify(paths.output_root, "--flat")
    assert result.code == 1
    assert (
        f"x mlp_cp=latest_model.th is damaged: it is a copy of mlp_cp=E2_U20_S200_model.th of {folder.name}"
        in result.out
    )
    assert result.out.splitlines()[-1] == "sets: 2, problems: 1"
    os.utime(copy)
    (run,) = json.loads(verify(paths.output_root, "--flat", "--json").out)["runs"]
    assert run["flat"] == {"files": 9, "compared": 8, "problems": [], "changed": ["mlp_cp=latest_model.th"]}
    assert "mlp_cp=latest_model.th was changed after our save" in verify(paths.output_root, "--flat").out


def test_several_paths_are_verified_at_once(verify: Verify, paths: PathProvider, tmp_path: Path) -> None:
    """One that is absent, or is no checkpoint, hides no other."""
    folder = save(paths, ONE)
    (tmp_path / "init.yaml").write_text("initializers: []")
    file = folder / "mlp_cp=E1_U10_S100_model.th"
    result = verify(tmp_path / "nope", paths.checkpoint_path, file, tmp_path / "init.yaml")
    assert result.code == 1
    lines = result.out.splitlines()
    assert [line.split(":")[0] for line in lines[-4:-1]] == [
        f"x broken {tmp_path / 'nope'} does not exist. Found in {tmp_path}",
        f"= good {file}",
        f"x broken {tmp_path / 'init.yaml'} is a YAML file, not a checkpoint. Next",
    ]
    assert lines[-2].endswith(f": ninit validate {tmp_path / 'init.yaml'}")
    assert lines[-1] == "sets: 1, files: 3, problems: 2"
    assert json.loads(verify(file, folder, "--json").out)["paths"] == [str(file), str(folder)]


def test_a_path_that_cannot_be_meant_is_told_what_could(
    verify: Verify, paths: PathProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near names, the command for a config, and no empty path that would be the working folder."""
    save(paths, ONE)
    monkeypatch.chdir(tmp_path)
    assert verify("runn").err == (
        "runn does not exist. Near: run. Found in this folder: run. Next: ninit inspect run\n"
    )
    assert "Near: run/train. Found in run: train" in verify("run/tarin/checkpoints").err
    Path("init.yaml").write_text("initializers: []")
    assert verify("init.yaml").err == ("init.yaml is a YAML file, not a checkpoint. Next: ninit validate init.yaml\n")
    result = verify("")
    assert (result.code, "it is empty" in result.err) == (2, True)


def test_runs_of_several_roots_are_told_apart(verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their folder, and by an output_path that a config needs then; not below the one root that was asked for."""
    for root in ("one", "two words"):
        save(PathProvider(tmp_path / root, "run"), ONE)
    monkeypatch.chdir(tmp_path)
    result = verify(".")
    assert [line.split("  ")[1].strip() for line in result.out.splitlines() if line.startswith("run  ")] == [
        "one/run/checkpoints",
        "two words/run/checkpoints",
    ]
    configs = [yaml.safe_load(run["use"])[0] for run in json.loads(verify(".", "--json").out)["runs"]]
    assert [one["output_path"] for one in configs] == [str(tmp_path / "one"), str(tmp_path / "two words")]
    for config in configs:
        stack = InitializerStack.from_config([config], path_provider=PathProvider(tmp_path / "three", "new"))
        assert stack.start_checkpoint() == ONE
    for path in ("one", "one/run"):
        assert "output_path" not in verify(path).out


def test_a_byte_between_records_that_changed_is_a_note_and_no_damage(tmp_path: Path) -> None:
    """Nothing that is loaded is of it; that the file is as it was written would be wrong all the same."""
    paths = PathProvider(tmp_path, "run")
    saved = CheckpointWriter(paths).save(bind(torch.nn.Linear(2, 1), name="net"), TrainingIteration(1, 1, 1))
    path = next(file.path for file in saved.files if file.part == "model")
    content = bytearray(path.read_bytes())
    content[content.index(b"ZZZZZZZZ")] ^= 1  # torch pads records with these
    path.chmod(0o644)
    path.write_bytes(content)
    (found,) = verify_run(Snapshot(paths)).sets
    assert (found.state, found.problems) == ("good", ())
    assert found.notes == (
        f"{path} has changed bytes, all of them outside its tensors and records, so it still loads as it was "
        "saved. Next: copy the file again if you have a copy",
    )
