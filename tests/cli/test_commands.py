"""The command line: what each command prints, its exit codes, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Result, run_command
from support.foreign import INITIALIZER, ForeignPackages

from noether_init_core import CheckpointWriter, PathProvider, TrainingIteration, bind, cli, kinds
from noether_init_core.cli import usage

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Call the console script's function as the shell would."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments: Any) -> Result:
        return run_command(monkeypatch, capsys, *arguments)

    return call


def _version() -> str | None:
    return kinds.describe("file").version


def test_alone_it_shows_what_is_here_and_the_next_commands(
    invoke: Invoke, noether_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version, plain kinds, runs below the folder where there are any; a folder of code is no run."""
    (tmp_path / "package" / "checkpoints").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    result = invoke()
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == f"noether-init-core {_version()}"
    # plugins of this repository are installed, too
    assert {"file", "previous_run", "resume"} <= set(lines[1].removeprefix("kinds    ").split(", "))
    following = [line.split()[1:3] for line in lines if line.startswith("  ninit")]
    assert following == [["example", "previous_run"], ["kinds"], ["--help"]]
    assert "\nruns " not in result.out
    monkeypatch.chdir(noether_runs)
    shown = invoke().out
    runs = "composite/pretrain @ E3_U12_S72, early_stop/train @ E1_U7_S28, mlp_train/train @ E4_U16_S128"
    assert f"runs     {runs}\n" in shown
    assert "ninit inspect .\n" in shown


def test_what_is_next_fits_to_what_is_here(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with their newest iteration, configs; --json says the same."""
    monkeypatch.chdir(tmp_path)
    model = bind(torch.nn.Linear(2, 2), name="net")
    for run_id in ("first", "second"):
        for epoch in (1, 2):
            CheckpointWriter(PathProvider("runs", run_id)).save(model, TrainingIteration(epoch, epoch, epoch))
    (tmp_path / "b.yaml").touch()
    (tmp_path / "init.yaml").touch()
    shown = invoke().out
    assert "runs     runs/first @ E2_U2_S2, runs/second @ E2_U2_S2\nconfigs  b.yaml, init.yaml\n" in shown
    data = json.loads(invoke("--json").out)
    assert (data["format"], data["version"]) == ("noether-init-overview", 1)
    assert data["runs"] == [{"path": f"runs/{name}", "newest": "E2_U2_S2"} for name in ("first", "second")]
    assert data["next"] == [
        "ninit inspect runs",
        "ninit validate init.yaml",
        "ninit plan init.yaml --model module:callable",
    ]


def test_a_folder_of_very_many_things_is_not_walked_to_its_end(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a level of very many entries, nor very many levels; what is near is looked at first."""
    monkeypatch.chdir(tmp_path)
    looked_at: list[Path] = []
    for number in range(600):
        (tmp_path / f"{number:04}").mkdir()
    whole = usage._folders_in

    def counting(folder: Path) -> Any:
        looked_at.append(folder)
        return whole(folder)

    monkeypatch.setattr(usage, "_folders_in", counting)
    assert invoke().code == 0
    assert 400 < len(looked_at) < 520
    for number in range(600):
        for inner in range(10):
            (tmp_path / f"{number:04}" / f"{inner}").mkdir()
    looked_at.clear()
    assert invoke().code == 0
    assert len(looked_at) < 2_100


def test_the_version_is_one_line(invoke: Invoke) -> None:
    """For bug reports."""
    assert invoke("--version") == Result(0, f"noether-init-core {_version()}\n", "")


def test_kinds_lists_every_kind_with_its_distribution(invoke: Invoke, foreign: ForeignPackages) -> None:
    """Conflicts and blocked kinds are marked by symbol and word; no plugin is imported."""
    marker = foreign.folder / "imported"
    source = f"open({str(marker)!r}, 'w').close()"
    foreign.install("acme-init", offers={"acme": "acme_cli:K"}, modules={"acme_cli": source})
    foreign.install("rival-init", offers={"acme": "acme_cli:K"})
    rows = [line.split() for line in invoke("kinds").out.splitlines()]
    assert ["ok", "previous_run", "noether-init-core", _version()] in rows
    assert ["x", "conflict", "acme", "acme-init", "1.0"] in rows
    assert ["x", "conflict", "acme", "rival-init", "1.0"] in rows
    assert not marker.exists()


def test_kinds_breaks_no_name_on_a_narrow_terminal(
    invoke: Invoke, foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the table does not fit, who offers a kind is broken into lines beside it."""
    long = "a-distribution-with-a-name-that-is-as-long-as-some-are"
    foreign.install(long, offers={"acme": "acme_cli:K"}, modules={"acme_cli": ""})
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.rstrip() for line in invoke("kinds").out.splitlines()]
    assert max(map(len, lines)) <= 80
    (at,) = [number for number, line in enumerate(lines) if line.startswith(("ok  acme ", "o   acme "))]
    beside = lines[at].partition("acme")[2] + lines[at + 1] + lines[at + 2] + lines[at + 3]
    assert long in "".join(beside.split())
    assert any("noether.core.initializers.PreviousRunInitializer " in line for line in lines)


def test_kinds_as_json_is_for_programs(
    invoke: Invoke, foreign: ForeignPackages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of objects with stable keys."""
    foreign.install("acme-init", offers={"acme": "acme_cli:K"}, version="3.2")
    monkeypatch.setenv("NOETHER_INIT_DENY", "acme-init")
    rows = {row["name"]: row for row in json.loads(invoke("kinds", "--json").out)}
    assert rows["acme"] == {
        "name": "acme",
        "distribution": "acme-init",
        "version": "3.2",
        "target": "acme_cli:K",
        "blocked_by": "NOETHER_INIT_DENY",
        "conflict": False,
    }
    assert rows["file"]["blocked_by"] is None


def test_schema_prints_the_json_schema_of_a_kind(invoke: Invoke, foreign: ForeignPackages) -> None:
    """Of a stranger's kind too, with its name as a constant."""
    target = "constant_cli:ConstantInitializer"
    foreign.install("acme-init", offers={"constant": target}, modules={"constant_cli": INITIALIZER})
    schema = json.loads(invoke("schema", "constant").out)
    assert schema["properties"]["kind"]["const"] == "constant"
    assert schema["properties"]["value"] == {"default": 0.0, "title": "Value", "type": "number"}
    assert schema["additionalProperties"] is False


def test_an_error_of_ours_is_its_message_and_exit_code_1(invoke: Invoke) -> None:
    """No traceback, on standard error."""
    result = invoke("schema", "previous-run")
    message = f'no kind "previous-run". Near: previous_run (noether-init-core {_version()}). Next: ninit kinds\n'
    assert result == Result(1, "", message)


def test_validate_tells_every_problem_of_every_entry(invoke: Invoke, tmp_path: Path) -> None:
    """Good entries are listed too; the exit code is 1 as long as one problem is left."""
    config = tmp_path / "init.yaml"
    config.write_text(
        "auto_resume: true\ninitializers:\n- kind: previous_run\n  run_id: a\n- kind: nothing_like_it\n"
        "- kind: previous_run\n  zzz: 1\n  run_id: ../b\n"
    )
    result = invoke("validate", config)
    lines = result.out.splitlines()
    assert result.code == 1
    assert lines[:2] == [
        "ok auto_resume: the newest set of this run comes before the list",
        "ok initializers.0: previous_run",
    ]
    assert lines[2].startswith('x init.yaml:5 initializers.1.kind: no kind "nothing_like_it".')
    assert lines[3].startswith("x init.yaml:7 initializers.2.zzz: unknown key")
    assert lines[4].startswith("x init.yaml:8 initializers.2.run_id: run_id '../b' holds a path separator")
    assert lines[5:] == ["initializers: 3, problems: 3"]
    config.write_text("model:\n  name: m\n  encoder:\n    initializers:\n    - {kind: previous_run, run_id: a}\n")
    result = invoke("validate", config)
    assert result.code == 0
    assert result.out.splitlines()[0] == (
        "ok model.encoder.initializers.0: previous_run for encoder, init_optimizer, init_weights only"
    )


def test_validate_tells_what_is_wrong_around_the_entries_too(invoke: Invoke, tmp_path: Path) -> None:
    """All in one pass, in the order of lines; what can be checked is checked all the same."""
    config = tmp_path / "init.yaml"
    config.write_text(
        "seed: 3\nauto_resume: {verfy: header}\nobservers: timing\ninitializers:\n- file\n- kind: file\n  path: a\n"
        "- {kind: file, path: '???'}\n- {kind: file, path: !!python/tuple [a]}\n- kind: previous_run\n- 3\n"
    )
    result = invoke("validate", config)
    assert result.code == 1
    assert [line.split(": ")[0] for line in result.out.splitlines()[:-1]] == [
        "x init.yaml:1 seed",
        "x init.yaml:2 auto_resume.verfy",
        "x init.yaml:3 observers",
        "x init.yaml:5 initializers.0",
        "ok initializers.1",
        "x init.yaml:8 initializers.2.path",
        "x init.yaml:9 initializers.3.path",
        "x init.yaml:10 initializers.4.run_id",
        "x init.yaml:11 initializers.5",
    ]
    assert result.out.splitlines()[-1] == "initializers: 2, problems: 8"
    config.write_text("- kind: file\n")
    result = invoke("validate", config)
    assert (result.code, result.out.splitlines()) == (
        1,
        ["x init.yaml: is a list; put it under the key initializers:", "initializers: 0, problems: 1"],
    )
    config.write_text("auto_resume: {on_invalid: previous}\n")
    assert invoke("validate", config).out.startswith("ok auto_resume: the newest good set of this run")
    config.write_text("model: {initializers: 3}\ntrainer: {}\non_invalid: x\n")
    assert invoke("validate", config).out.splitlines()[-1] == "initializers: 0, problems: 2"


def test_validate_of_an_absent_file_names_its_neighbours(invoke: Invoke, tmp_path: Path) -> None:
    """The command line is wrong, and not the config: exit code 2, and the YAML files that are there."""
    (tmp_path / "other.yaml").touch()
    result = invoke("validate", tmp_path / "init.yaml")
    assert (result.code, result.out) == (2, "")
    assert "other.yaml" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["schema"],
        ["schema", "file", "file"],
        ["kinds", "--yaml"],
        ["validate"],
        ["inspect"],
        ["verify"],
        ["new"],
        ["new", "demo", "--base", "no"],
    ],
)
def test_wrong_usage_is_exit_code_2(invoke: Invoke, arguments: list[str]) -> None:
    """A missing or surplus argument, an unknown command or option."""
    result = invoke(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: ninit" in result.err


@pytest.mark.parametrize("command", [[], *([name] for _panel, name, _function, _example in cli.COMMANDS)])
def test_help_ends_with_one_example_of_that_command(invoke: Invoke, command: list[str]) -> None:
    """The last line can be copied."""
    lines = [line.strip() for line in invoke(*command, "--help").out.splitlines() if line.strip()]
    examples = [line for line in lines if line.startswith("Example: ")]
    assert examples == lines[-1:]
    assert examples[0].startswith("Example: " + " ".join(["ninit", *(command or ["example"])]))


def test_commands_that_only_read_import_no_torch(tmp_path: Path) -> None:
    """Those that the page of the command line lists, in one fresh process."""
    CheckpointWriter(PathProvider(tmp_path, "run")).save(
        bind(torch.nn.Linear(2, 2), name="net"), TrainingIteration(1, 1, 1)
    )
    lines = (
        "kinds",
        "inspect run",
        "lineage run",
        "verify run",
        "new demo --dry-run",
        "example previous_run --print",
        "",
    )
    program = (
        "import sys\nfrom noether_init_core import cli\n"
        f"for line in {lines!r}:\n"
        "    sys.argv = ['ninit', *line.split()]\n"
        "    try:\n        cli.main()\n    except SystemExit as ended:\n        assert not ended.code, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_listing_kinds_imports_no_torch() -> None:
    """A fresh process: neither torch nor numpy nor a built-in is loaded (typer itself may load pydantic)."""
    program = (
        "import sys\nfrom noether_init_core import cli\nsys.argv = ['ninit', 'kinds']\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "print([name for name in sys.modules if name in ('torch', 'numpy') or '.builtin' in name])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["diff", "--help"], ["kinds"], []])
def test_a_terminal_of_ascii_gets_all_of_it(arguments: list[str], tmp_path: Path) -> None:
    """What it cannot show is spelt out; nothing is lost, and nothing raised."""
    environment = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PATH": "/usr/bin:/bin"}
    words = [str(Path(sys.executable).with_name("ninit")), *arguments]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["kinds"], ["kinds", "--json"], []])
def test_a_full_disk_behind_the_output_is_told(arguments: list[str], tmp_path: Path) -> None:
    """In a line, not by a traceback."""
    words = [str(Path(sys.executable).with_name("ninit")), *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
