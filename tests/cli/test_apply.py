"""``ninit apply``: the file holds what the plan said, and is there as a whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file
from support.pages import ROOT

from noether_init_core import (
    CheckpointWriteError,
    CheckpointWriter,
    InitializerStack,
    InitReport,
    PathProvider,
    TrainerState,
    TrainingIteration,
    bind,
)
from noether_init_core.cli import config as command
from noether_init_core.errors import InitError
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import FileSystem
from noether_init_core.saving import file_writing
from noether_init_core.saving.file_writing import write_weights

PROGRAM = Path(sys.executable).with_name("ninit")
MODELS = """
import torch
from noether_init_core import bind, compose


class Network(torch.nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.backbone = torch.nn.Linear(6, 8)
        self.head = torch.nn.Linear(8, classes)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.out = torch.nn.Linear(3, 5, bias=False)
        self.out.weight = self.embedding.weight


class Extra(torch.nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        assert state["seen"] == 3


def build():
    return bind(Network(), name="net")


def tied():
    return bind(Tied(), name="net")


class Conjugate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("freqs", torch.polar(torch.ones(3), torch.arange(3.0)).conj())


def conjugate():
    return bind(Conjugate(), name="net")


def drawn():
    import random
    import numpy
    made = torch.nn.Linear(2, 2)
    made.weight.data.fill_(random.random() + numpy.random.rand())
    return bind(made, name="net")


def half_bad():
    return compose("pair", {"left": bind(Network(), name="left"), "right": bind(Extra(6, 8), name="right")})


def extra():
    return bind(Extra(6, 8), name="net")


def pair():
    return compose("pair", {"left": bind(Network(), name="left"), "right": bind(Network(), name="right")})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A module of models, a run, configs."""
    (tmp_path / "models.py").write_text(MODELS)
    namespace: dict[str, object] = {}
    exec(MODELS, namespace)
    torch.manual_seed(7)
    old = namespace["Network"](10)
    CheckpointWriter(PathProvider(tmp_path / "runs", "pretrain"), flat_names=True).save(
        bind(old, name="net"), TrainingIteration(1, 1, 1)
    )
    rules = "transforms: [keep_model: head.]"
    (tmp_path / "init.yaml").write_text(f"initializers:\n  - {{kind: previous_run, run_id: pretrain, {rules}}}\n")
    (tmp_path / "wrong.yaml").write_text("initializers:\n  - {kind: previous_run, run_id: pretrain}\n")
    (tmp_path / "empty.yaml").write_text("initializers: []\n")
    return tmp_path


def apply(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in the folder."""
    words = [str(PROGRAM), "apply", *arguments]
    if "--model" not in words:
        words += ["--model", "models:build"]
    return subprocess.run([*words, "--runs", "runs"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["start.safetensors", "start.pt"])
def test_the_file_holds_what_the_plan_said(folder: Path, name: str) -> None:
    """Loaded from the run, fresh from the seed; other software reads it, and the kind file gets the same bits."""
    done = apply(folder, "init.yaml", "--out", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 parameters fresh" in done.stdout
    state = load_file(folder / name) if name.endswith("safetensors") else torch.load(folder / name, weights_only=True)
    (source,) = (folder / "runs").rglob("net_cp=latest_model.th")
    pretrained = torch.load(source, weights_only=True)["state_dict"]
    assert torch.equal(state["backbone.weight"], pretrained["backbone.weight"])
    namespace: dict[str, object] = {}
    exec(MODELS, namespace)
    torch.manual_seed(0)
    fresh = namespace["Network"]()
    assert torch.equal(state["head.weight"], fresh.head.weight)
    line = next(line for line in done.stdout.splitlines() if line.startswith("  - {kind: file"))
    digest = line.split("digest: '")[1].split("'")[0]
    again = namespace["Network"]()
    config = {"kind": "file", "path": str(folder / name), "digest": digest}
    InitializerStack.from_config([config]).initialize(bind(again, name="net"))
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    report = json.loads((folder / f"{name}.report.json").read_text())
    assert report["format"] == "noether-init-report"
    assert [record["source"] for record in report["tensors"]] == [0, 0, None, None]


def test_the_same_seed_gives_the_same_file(folder: Path) -> None:
    """And another one another file; what is loaded does not depend on it."""
    for name, seed in (("a.safetensors", "3"), ("b.safetensors", "3"), ("c.safetensors", "4")):
        assert apply(folder, "init.yaml", "--out", name, "--seed", seed).returncode == 0
    first, second, third = (folder / f"{name}.safetensors" for name in "abc")
    assert first.read_bytes() == second.read_bytes()
    assert not torch.equal(load_file(first)["head.weight"], load_file(third)["head.weight"])
    assert torch.equal(load_file(first)["backbone.weight"], load_file(third)["backbone.weight"])


def test_a_plan_with_problems_writes_nothing(folder: Path) -> None:
    """It is shown as plan shows it."""
    done = apply(folder, "wrong.yaml", "--out", "start.th")
    assert (done.returncode, done.stderr) == (1, "no file was written\n")
    assert "x mismatch" in done.stdout
    assert not list(folder.glob("*start*"))


def test_nothing_is_written_over_unless_that_is_wanted(folder: Path) -> None:
    """Found out before anything is built; and never what the weights were read from."""
    (folder / "start.th").write_text("mine")
    refused = apply(folder, "init.yaml", "--out", "start.th")
    assert refused.returncode == 1
    assert "start.th exists and was not changed" in refused.stderr
    assert (folder / "start.th").read_text() == "mine"
    assert apply(folder, "init.yaml", "--out", "start.th", "--force").returncode == 0
    assert torch.load(folder / "start.th", weights_only=True)
    (folder / "again.yaml").write_text("initializers:\n  - {kind: file, path: start.th}\n")
    before = (folder / "start.th").read_bytes()
    source = apply(folder, "again.yaml", "--out", "start.th", "--force")
    assert (source.returncode, "is the file that the weights were read from" in source.stderr) == (1, True)
    assert (folder / "start.th").read_bytes() == before


def test_several_models_need_a_name_each(folder: Path) -> None:
    """With {model} in the name; else the next command says so."""
    refused = apply(folder, "empty.yaml", "--out", "start.th", "--model", "models:pair")
    assert refused.returncode == 2
    assert "start-{model}.th" in " ".join(refused.stderr.split())
    done = apply(folder, "empty.yaml", "--out", "start-{model}.th", "--model", "models:pair", "--json")
    data = json.loads(done.stdout)
    jsonschema.validate(data, json.loads((ROOT / "docs" / "schemas" / "apply.schema.json").read_text()))
    assert [file["path"] for file in data["files"]] == ["start-pair.left.th", "start-pair.right.th"]
    assert all((folder / file["path"]).is_file() for file in data["files"])


def test_ties_and_extra_state(folder: Path) -> None:
    """Tied tensors are there under both names; extra state fits into a file of torch only."""
    assert apply(folder, "empty.yaml", "--out", "tied.safetensors", "--model", "models:tied").returncode == 0
    state = load_file(folder / "tied.safetensors")
    assert torch.equal(state["embedding.weight"], state["out.weight"])
    (folder / "again.yaml").write_text("initializers:\n  - {kind: file, path: tied.safetensors}\n")
    again = apply(folder, "again.yaml", "--out", "again.safetensors", "--model", "models:tied")
    assert again.returncode == 0, again.stderr
    refused = apply(folder, "empty.yaml", "--out", "extra.safetensors", "--model", "models:extra")
    assert refused.returncode == 1
    assert "_extra_state is not a tensor" in refused.stderr
    assert not list(folder.glob("*extra*"))
    assert apply(folder, "empty.yaml", "--out", "extra.th", "--model", "models:extra").returncode == 0
    assert torch.load(folder / "extra.th", weights_only=True)["_extra_state"] == {"seen": 3}


def test_a_config_that_goes_on_by_itself_is_applied_as_at_its_first_start(folder: Path) -> None:
    """auto_resume has no run to go on from."""
    text = (folder / "init.yaml").read_text()
    (folder / "init.yaml").write_text(f"auto_resume: true\n{text}")
    done = apply(folder, "init.yaml", "--out", "start.th", "--html", "report.html")
    assert done.returncode == 0, done.stderr
    assert "previous_run: net <- pretrain" in done.stdout
    assert "What previous_run did" in (folder / "report.html").read_text()


def test_a_run_that_is_resumed_gives_its_weights_alone(folder: Path) -> None:
    """By the kind, and by auto_resume of a run that has sets; what a training loop would take is left, and told."""
    network = bind(torch.nn.Linear(3, 2), name="net")
    state = TrainerState(seed=0)
    state.advance(samples=4)
    CheckpointWriter(PathProvider(folder / "runs", "first"), flat_names=True).save(network, trainer=state)
    (folder / "models.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(3, 2)\n")
    (folder / "fork.yaml").write_text("initializers:\n  - {kind: resume, run_id: first}\n")
    (folder / "auto.yaml").write_text("auto_resume: true\ninitializers: []\n")
    resumed = "auto_resume: resumed from E0_U1_S4\n"
    for config, more, said in (("fork.yaml", (), ""), ("auto.yaml", ("--run-id", "first"), resumed)):
        out = folder / f"{config}.pt"
        done = apply(folder, config, "--out", out.name, "--model-name", "net", *more)
        assert (done.returncode, done.stderr) == (0, said)
        assert done.stdout.startswith("start E0_U1_S4")
        assert "not restored: everything but weights, since nothing is trained here" in done.stdout
        state_dict = torch.load(out, weights_only=True)
        assert all(torch.equal(value, state_dict[key]) for key, value in network.state_dict().items())
    nothing = apply(folder, "auto.yaml", "--out", "new.pt", "--model-name", "net")
    assert nothing.returncode == 0
    assert nothing.stderr == (
        "auto_resume: planned as the first start of a new run; for a run with sets: --run-id ID\n"
    )
    assert "2 parameters fresh" in nothing.stdout


def test_a_run_that_is_not_named_is_told_as_made_up(folder: Path) -> None:
    """It is not taken for one of the user's."""
    (folder / "this.yaml").write_text("initializers:\n  - kind: resume\n")
    refused = apply(folder, "this.yaml", "--out", "new.pt")
    assert refused.returncode == 1
    message = "new-1 is a placeholder, because --run-id was not given. Next: --run-id ID"
    assert refused.stderr.splitlines()[-1] == message


def test_an_unknown_suffix_names_those_that_there_are(folder: Path) -> None:
    """The suffix says the format."""
    done = apply(folder, "init.yaml", "--out", "start.xyz")
    assert (done.returncode, "Next: start.safetensors" in done.stderr) == (1, True)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a half file nor one with a temporary name; what was there stays."""
    (tmp_path / "old.th").write_text("mine")

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_writing, "_put", full)
    for name, replace in (("new.th", False), ("new.safetensors", False), ("old.th", True)):
        with pytest.raises(CheckpointWriteError, match="No space left"):
            write_weights(tmp_path / name, {"w": torch.ones(2)}, replace=replace)
    assert [path.name for path in tmp_path.iterdir()] == ["old.th"]
    assert (tmp_path / "old.th").read_text() == "mine"


def test_a_file_that_comes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with one name: the second one says so."""
    whole = open_checkpoint

    def meanwhile(path: Path) -> object:
        (tmp_path / "new.th").write_text("theirs")
        return whole(path)

    monkeypatch.setattr(file_writing, "open_checkpoint", meanwhile)
    with pytest.raises(CheckpointWriteError, match="was created by another program meanwhile"):
        write_weights(tmp_path / "new.th", {"w": torch.ones(2)})
    assert (tmp_path / "new.th").read_text() == "theirs"


def test_a_file_that_was_written_survives_a_power_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is brought onto the disk after it has its name."""
    seen: list[tuple[Path, bool]] = []

    class Recording(FileSystem):
        def fsync_folder(self, folder: Path) -> None:
            seen.append((folder, (folder / "new.th").exists()))
            super().fsync_folder(folder)

    monkeypatch.setattr(file_writing, "LOCAL", Recording())
    write_weights(tmp_path / "new.th", {"w": torch.ones(2)})
    assert seen[-1:] == [(tmp_path, True)]


def test_weights_without_their_report_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files, or none."""

    def full(*_arguments: object) -> None:
        raise InitError("No space left")

    monkeypatch.setattr(command, "write_text", full)
    states, report = {tmp_path / "new.th": torch.nn.Linear(2, 2)}, InitReport(TrainingIteration(0, 0, 0))
    with pytest.raises(InitError, match="No space left"):
        command._write(states, report, replace=False)
    assert list(tmp_path.iterdir()) == []


def test_only_the_folder_of_a_run_is_closed(tmp_path: Path) -> None:
    """Many keep their own files in a folder named checkpoints."""
    (tmp_path / "checkpoints").mkdir()
    write_weights(tmp_path / "checkpoints" / "new.th", {"w": torch.ones(2)})
    (tmp_path / "run" / "checkpoints" / "sets").mkdir(parents=True)
    with pytest.raises(CheckpointWriteError, match="is in the folder of checkpoints of a run"):
        write_weights(tmp_path / "run" / "checkpoints" / "new.th", {"w": torch.ones(2)})


@pytest.mark.parametrize("name", ["new.th", "new.safetensors"])
def test_the_file_can_be_read_by_whom_any_new_file_can(tmp_path: Path, name: str) -> None:
    """Neither hidden from colleagues nor read-only."""
    (tmp_path / "plain").touch()
    write_weights(tmp_path / name, {"w": torch.ones(2)})
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_values_that_are_conjugated_in_name_only_are_written_as_they_are(folder: Path) -> None:
    """A lazy operation is carried out: both formats hold the same numbers."""
    for name in ("c.safetensors", "c.th"):
        assert apply(folder, "empty.yaml", "--out", name, "--model", "models:conjugate").returncode == 0
    expected = torch.polar(torch.ones(3), torch.arange(3.0)).conj().resolve_conj()
    assert torch.equal(load_file(folder / "c.safetensors")["freqs"], expected)
    assert torch.equal(torch.load(folder / "c.th", weights_only=True)["freqs"].resolve_conj(), expected)


def test_a_report_of_somebody_else_is_kept_and_several_files_are_one_matter(folder: Path) -> None:
    """Found out before anything is written; what was written is taken back where the rest fails."""
    (folder / "start.th.report.json").write_text("precious")
    refused = apply(folder, "init.yaml", "--out", "start.th")
    assert (refused.returncode, "start.th.report.json exists" in refused.stderr) == (1, True)
    assert (folder / "start.th.report.json").read_text() == "precious"
    assert not (folder / "start.th").exists()
    half = apply(folder, "empty.yaml", "--out", "s-{model}.safetensors", "--model", "models:half_bad")
    assert half.returncode == 1
    assert not list(folder.glob("*s-*"))


def test_numpy_and_python_draw_the_same_too(folder: Path) -> None:
    """Whatever a model draws with when it is built."""
    for name in ("a.safetensors", "b.safetensors"):
        assert apply(folder, "empty.yaml", "--out", name, "--model", "models:drawn").returncode == 0
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_what_a_later_kind_draws_counts_as_fresh(folder: Path) -> None:
    """In the report, and in the plan before: the file of the run has no part in it."""
    text = (folder / "init.yaml").read_text()
    (folder / "both.yaml").write_text(text + "  - {kind: random, rules: [{match: backbone.weight, init: normal_}]}\n")
    done = apply(folder, "both.yaml", "--out", "start.th")
    assert "3 parameters fresh" in done.stdout
    report = json.loads((folder / "start.th.report.json").read_text())
    by_name = {record["name"]: record for record in report["tensors"]}
    assert (by_name["backbone.weight"]["source"], by_name["backbone.bias"]["source"]) == (None, 0)
    assert by_name["backbone.weight"]["rule"] == "set by random"


@pytest.mark.parametrize("out", ["", "x" * 300 + ".th"])
def test_names_that_no_file_can_have_are_told(folder: Path, out: str) -> None:
    """Not by a traceback."""
    done = apply(folder, "init.yaml", "--out", out)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
