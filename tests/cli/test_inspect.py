"""``ninit inspect``: what it prints of files, sets, runs and output roots, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import jsonschema
import pytest
import support.command
import torch
from support.command import run_command
from support.handmade import write_safetensors
from support.pages import ROOT

from noether_init_core import CheckpointWriter, PathProvider, TrainerState, TrainingIteration, bind

SCHEMA = json.loads((ROOT / "docs" / "schemas" / "inspect.schema.json").read_text())


class Result(support.command.Result):
    """What the command printed and how it ended."""

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.out.splitlines()]

    @property
    def rows(self) -> list[list[str]]:
        return [line.split() for line in self.out.splitlines()]


Inspect = Callable[..., Result]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """The command as the shell would call it, on a wide terminal."""
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments: Any, width: int = 200) -> Result:
        monkeypatch.setenv("COLUMNS", str(width))
        return Result(*attrs.astuple(run_command(monkeypatch, capsys, "inspect", *arguments)))

    return call


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a set in the middle of an epoch, with a schedule, below the current folder."""
    monkeypatch.chdir(tmp_path)
    network = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    state = TrainerState(seed=7, schedule=torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9))
    batches = iter(state.loader([torch.zeros(4)] * 20, batch_size=5))
    for _update in range(3):
        next(batches)
        state.advance()
    model = bind(network, name="mlp", optimizer=optimizer)
    CheckpointWriter(PathProvider("runs", "killed"), flat_names=True).save(
        model, trainer=state, tags=("latest", "best_model.loss.val")
    )
    return next((tmp_path / "runs" / "killed" / "checkpoints" / "sets").iterdir())


# Runs and output roots.


def test_a_run_is_the_table_of_its_sets_newest_first(inspect: Inspect, noether_runs: Path) -> None:
    """Tags, iterations, parts and bytes, whether the run, its stage or its checkpoints folder is given."""
    run = noether_runs / "mlp_train"
    outputs = [inspect(path) for path in (run, run / "train", run / "train" / "checkpoints")]
    size = sum(path.stat().st_size for path in (run / "train" / "checkpoints").glob("*=latest_*.th"))
    for result in outputs:
        assert result.code == 0
        expected = ["o", "legacy", "E4_U16_S128", "latest", "mlp,", "mlp", "(ema=0.9)", "mlp", "mlp", f"{size:,}"]
        assert expected in result.rows
        assert ["o", "legacy", "E3_U12_S96", "best_model.loss.val.total", "mlp"] in [row[:5] for row in result.rows]
        assert "weights of mlp: 29 tensors (27 float32, 2 int64), 3.9 k elements, 15,712 bytes" in result.lines
        assert result.lines[0] == "mlp_train/train"
    assert inspect(run / "trian").err.endswith(f"Next: ninit inspect {run / 'train'}\n")


def test_an_output_root_is_a_table_of_runs(
    inspect: Inspect, noether_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newest iteration and its tags, models, number of sets, bytes; the last line leads on."""
    monkeypatch.chdir(noether_runs)
    result = inspect(".")
    assert result.code == 0
    size = sum(path.stat().st_size for path in Path("early_stop/train/checkpoints").glob("*.th"))
    tags = "E1_U7_S28.early_exit"
    assert ["o", "legacy", "early_stop/train", "E1_U7_S28", tags, "mlp", "4", f"{size:,}"] in result.rows
    assert [row[2] for row in result.rows[1:4]] == ["composite/pretrain", "early_stop/train", "mlp_train/train"]
    assert result.lines[-1] == "3 runs. Next: ninit inspect composite/pretrain"


def test_committed_runs_in_a_root_are_runs_and_not_stages(inspect: Inspect, saved: Path) -> None:
    """A folder of runs without stages looks like a run with stages; what the sets say decides."""
    CheckpointWriter(PathProvider("runs", "second", "warm"), flat_names=True).save(
        bind(torch.nn.Linear(2, 2), name="m"), TrainingIteration(1, 2, 3)
    )
    root = inspect("runs")
    assert [row[:4] for row in root.rows[1:3]] == [
        ["=", "committed", "killed", "E0_U3_S15"],
        ["=", "committed", "second/warm", "E1_U2_S3"],
    ]
    for path in ("runs/second", "runs/second/warm"):
        assert inspect(path).lines[0] == "second/warm"
    assert inspect("runs/killed").lines[0] == "killed"
    Path("runs/second").rename("runs/third")
    Path("runs/killed").rename("runs/copy of it")
    assert [one["path"].removeprefix(f"{Path.cwd()}/runs/") for one in _runs(inspect)] == ["copy of it", "third/warm"]
    assert inspect("runs/third").lines[0] == "third/warm"
    Path("runs/copy of it").rename("runs/killed")
    assert inspect(saved.parent) == inspect(saved.parents[1]) == inspect("runs/killed")


def _runs(inspect: Inspect) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(inspect("runs", "--json").out)["runs"]
    return found


def test_a_run_fits_80_columns(inspect: Inspect, saved: Path) -> None:
    """One line for a set: the tag of the iteration is not said twice. At 60 the symbol stands for the word."""
    size = f"{sum(path.stat().st_size for path in saved.iterdir()):,}"
    result = inspect("runs/killed", width=80)
    row = ["E0_U3_S15", "latest,", "best_model.loss.val", "mlp", "mlp", "mlp", size]
    assert ["=", "committed", *row[:2]] == result.rows[2][:4]
    assert max(map(len, result.lines)) <= 80
    narrow = inspect("runs", width=60)
    assert narrow.rows[1][:4] == ["=", "killed", "E0_U3_S15", "latest,"]
    assert "= committed" in narrow.lines
    assert max(map(len, narrow.lines)) <= 60


def test_what_is_broken_in_a_run_is_said_and_the_rest_is_shown(inspect: Inspect, saved: Path) -> None:
    """A file that is gone, an unfinished save; exit code 1. The output root says it, too."""
    (saved.parent / "00000009_E9_U9_S9").mkdir()
    assert "- 00000009_E9_U9_S9: uncommitted; it is never selected" in inspect("runs/killed").lines
    assert "- killed: 1 unfinished save, never selected" in inspect("runs").lines
    optimizer = next(saved.glob("*_optim.th"))
    optimizer.unlink()
    for path in ("runs", "runs/killed", saved):
        result = inspect(path)
        assert result.code == 1
        assert any(line.startswith("x ") and optimizer.name in line for line in result.lines), path
    assert "E0_U3_S15" in inspect("runs/killed").out
    next(saved.glob("*_model.th")).write_bytes(b"PK")
    (saved / "manifest.json").write_text("{}")
    result = inspect("runs")
    assert (result.code, result.rows[1][:4]) == (1, ["=", "committed", "killed", "E0_U3_S15"])


def test_a_damaged_legacy_file_does_not_hide_the_others(inspect: Inspect, tmp_path: Path) -> None:
    """Its iteration is unknown; the reason stands below."""
    folder = tmp_path / "runs" / "old" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {}}, folder / "m_cp=E1_U2_S3_model.th")
    (folder / "m_cp=latest_model.th").write_bytes(b"PK damaged")
    result = inspect(folder.parent)
    assert result.code == 1
    assert ["o", "legacy", "unknown", "latest", "m", "10"] in result.rows
    assert ["o", "legacy", "E1_U2_S3"] in [row[:3] for row in result.rows]
    assert sum(line.startswith("x ") for line in result.lines) == 1


# Sets.


def test_a_set_is_its_files_with_what_is_in_them(inspect: Inspect, saved: Path) -> None:
    """Elements and bytes of each, parameters of weights, tags; whether there is a probe, and a record of origins."""
    result = inspect(saved)
    assert result.code == 0
    assert result.lines[0].startswith(f"set {saved.name} of run killed, committed 20")
    weights = next(saved.glob("*_model.th"))
    assert ["mlp", "weights", "2", "10", f"{weights.stat().st_size:,}", weights.name] in result.rows
    assert "weights of mlp: 2 tensors (float32), 10 parameters, 40 bytes" in result.lines
    assert "probe: none" in result.lines
    assert any(line.startswith("tags: ") and "best_model.loss.val" in line for line in result.lines)


def test_a_probe_is_shown(inspect: Inspect, tmp_path: Path) -> None:
    """In the set with its outputs, in the run by a column, in its file like any other."""
    model = bind(torch.nn.Linear(4, 2), name="mlp")
    paths = PathProvider(tmp_path, "probed")
    CheckpointWriter(paths, flat_names=True).save(model, TrainingIteration(1, 2, 3), probe=torch.ones(2, 4))
    (folder,) = (tmp_path / "probed" / "checkpoints" / "sets").iterdir()
    (line,) = [line for line in inspect(folder).lines if line.startswith("probe")]
    assert line == f"probe of mlp: output, {(folder / 'probe.th').stat().st_size:,} bytes"
    run = inspect(tmp_path / "probed")
    assert (run.rows[1][-2], run.rows[2][-2]) == ("probe", "yes")
    assert inspect(folder / "probe.th").code == 0
    (folder / "probe.th").write_bytes(b"PK")
    assert inspect(folder).code == 1


def test_what_is_no_committed_set_names_those_that_are(inspect: Inspect, saved: Path) -> None:
    """An unfinished save, and a folder of another name."""
    (saved.parent / "00000009_E9_U9_S9").mkdir()
    (saved.parent / "mine").mkdir()
    unfinished, other = inspect(saved.parent / "00000009_E9_U9_S9"), inspect(saved.parent / "mine")
    assert (unfinished.code, other.code) == (1, 1)
    assert "has no manifest.json: an interrupted save" in unfinished.err
    assert f"does not have the name of a set; it is never selected. Sets: {saved.name}" in other.err


# Files.


def test_a_file_is_shown_folded_and_with_all_key_by_key(inspect: Inspect, noether_runs: Path) -> None:
    """Names of one dtype and shape in a line, with their number; the last line counts."""
    path = noether_runs / "mlp_train/train/checkpoints/mlp_cp=latest_model.th"
    unfolded = inspect(path, "--all")
    assert ["head.weight", "float32", "[4,24]", "96"] in unfolded.rows
    keys = [row[0] for row in unfolded.rows[1:] if len(row) == 4 and row[2].startswith("[")]
    assert len(keys) == 29
    assert unfolded.lines[-1] == "29 tensors (27 float32, 2 int64), 3.9 k elements, 15,712 bytes, torch format"
    folded = inspect(path)
    counts = [int(row[1]) for row in folded.rows[1:] if len(row) > 4 and row[3].startswith("[")]
    assert (sum(counts), len(counts) < 29) == (29, True)
    assert folded.lines[-1] == f"{unfolded.lines[-1]} (--all unfolds)"
    assert "run: mlp_train" in folded.lines


def test_very_many_keys_are_listed_all_the_same(inspect: Inspect, tmp_path: Path) -> None:
    """In columns, one line for each; names out of the file stay on their line."""
    tensor = torch.zeros(3000)
    torch.save({f"k{number}\n": tensor[: number + 1] for number in range(3000)}, tmp_path / "a.pt")
    for arguments in ([], ["--all"]):
        result = inspect(tmp_path / "a.pt", *arguments)
        assert len(result.lines) == 3002
        assert result.rows[3000][0] == "k2999\\n"
        assert result.lines[0].index("dtype") == result.lines[2000].index("float32")


def test_tied_keys_and_buffers_are_told(inspect: Inspect, tmp_path: Path) -> None:
    """Tied weights count once, and buffers are no parameters where the manifest names them."""
    network = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "norm": torch.nn.BatchNorm1d(3)})
    network["b"] = torch.nn.Linear(3, 3, bias=False)
    network["b"].weight = network["a"].weight
    CheckpointWriter(PathProvider(tmp_path, "tied"), flat_names=True).save(
        bind(network, name="net"), TrainingIteration(1, 2, 3)
    )
    (path,) = (tmp_path / "tied" / "checkpoints" / "sets").rglob("*_model.th")
    result = inspect(path)
    assert "tied: a.weight = b.weight" in result.lines
    assert result.lines[-1].startswith(
        "7 tensors (6 float32, 1 int64), 15 parameters and 7 elements of buffers, 92 bytes, torch format"
    )
    assert f"committed set: {path.parent.name} (saved as E1_U2_S3, latest)" in result.lines
    data = json.loads(inspect(path, "--json").out)
    assert data["tied"] == [["a.weight", "b.weight"]]
    assert (data["content"]["elements"], data["content"]["parameters"], data["committed"]) == (22, 15, True)


def test_a_safetensors_file_is_shown_with_its_metadata(inspect: Inspect, tmp_path: Path) -> None:
    """The same table; the last line says the format. A damaged one ends with the reason."""
    header = {"__metadata__": {"format": "pt"}, "w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    result = inspect(write_safetensors(tmp_path / "a.safetensors", header, bytes(8)))
    assert result.rows[1] == ["w", "1", "bfloat16", "[2,2]", "4"]
    assert result.lines[-2:] == [
        "metadata format: pt",
        "1 tensor (bfloat16), 4 elements, 8 bytes, safetensors format",
    ]
    result = inspect(write_safetensors(tmp_path / "b.safetensors", header, bytes(9)))
    assert (result.code, "1 bytes after its last tensor" in result.err) == (1, True)


def test_a_trainer_file_says_where_the_loop_was(inspect: Inspect, saved: Path) -> None:
    """Run, iteration, seed, the objects with state, and how far into the data."""
    result = inspect(next(saved.glob("*_trainer.th")))
    at = result.lines.index("run: killed")
    assert result.lines[at : at + 5] == [
        "run: killed",
        "iteration: epoch 0, update 3, sample 15",
        "seed: 7",
        "with state: schedule",
        "data: 3 batches of this epoch consumed",
    ]


def test_names_and_texts_of_a_file_cannot_act_on_the_terminal(inspect: Inspect, tmp_path: Path) -> None:
    """Escapes are shown as such, in keys, runs and metadata; JSON escapes them by itself."""
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"a\x1b[2J": torch.zeros(1)}, "run_id": "\x1b[31mred\nx fake"}, path)
    for arguments in ([path], [path, "--all"], [path, "--json"]):
        result = inspect(*arguments)
        assert (result.code, "\x1b" in result.out) == (0, False)
    assert not any(line.startswith("x ") for line in inspect(path).lines)
    metadata = {"note": "\x1b[2J"}
    header = {"__metadata__": metadata, "w": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    assert "\x1b" not in inspect(write_safetensors(tmp_path / "b.safetensors", header, bytes(4))).out


def test_a_text_and_an_absent_path_name_the_next_command(inspect: Inspect, tmp_path: Path) -> None:
    """A config is told which command checks it; nothing is created."""
    (tmp_path / "init.yaml").write_text("initializers: []")
    assert "ninit validate" in inspect(tmp_path / "init.yaml").err
    assert "does not exist" in inspect(tmp_path / "absent").err
    (tmp_path / "empty").mkdir()
    result = inspect(tmp_path / "empty")
    assert (result.code, result.out) == (1, "")
    assert "no run found at" in result.err
    assert list((tmp_path / "empty").iterdir()) == []


# For programs.


def test_json_follows_the_schema_and_says_the_type(inspect: Inspect, saved: Path, noether_runs: Path) -> None:
    """Of a file, a set, a run and a root, of ours and of Noether; also where something is wrong."""
    paths = {
        saved.parents[3]: "root",
        noether_runs: "root",
        saved.parents[2]: "run",
        noether_runs / "composite": "run",
        saved: "set",
        next(saved.glob("*_optim.th")): "file",
        next(saved.glob("*_trainer.th")): "file",
        noether_runs / "mlp_train/train/checkpoints/mlp_cp=latest_model.th": "file",
    }
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for path, kind in paths.items():
        data = json.loads(inspect(path, "--json").out)
        validator.validate(data)
        assert (data["format"], data["version"], data["type"]) == ("noether-init-inspect", 1, kind)
    next(saved.glob("*_optim.th")).unlink()
    for path in (saved, saved.parents[2], saved.parents[3]):
        result = inspect(path, "--json")
        validator.validate(json.loads(result.out))
        assert (result.code, len(json.loads(result.out)["problems"])) == (1, 1)


def test_it_imports_no_torch(saved: Path) -> None:
    """Of a file, a set, a run, a root: a fresh process that has shown it knows no torch and no numpy."""
    program = (
        "import sys\nfrom noether_init_core import cli\nsys.argv = ['ninit', 'inspect', sys.argv[1]]\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    for path in (next(saved.glob("*_model.th")), saved, saved.parents[2], saved.parents[3]):
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
