"""``ninit lineage``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind
from noether_init_core.lineage import LineageEdge, LineageNode, related

PROGRAM = Path(sys.executable).with_name("ninit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs below ``runs``."""
    here = tmp_path_factory.mktemp("work")
    model = bind(torch.nn.Linear(4, 2), name="net")
    CheckpointWriter(PathProvider(here / "runs", "first"), flat_names=True).save(model, TrainingIteration(1, 4, 32))
    paths = PathProvider(here / "runs", "second")
    configs = [{"kind": "previous_run", "run_id": "first"}]
    report = InitializerStack.from_config(configs, path_provider=paths).initialize(model)
    CheckpointWriter(paths, report=report, flat_names=True).save(model, TrainingIteration(2, 8, 64))
    return here


def lineage(folder: Path, *arguments: str, width: int = 80) -> subprocess.CompletedProcess[str]:
    """The command, in the folder, at a width."""
    environment = {"COLUMNS": str(width), "PATH": "/usr/bin:/bin", "NO_COLOR": "1"}
    words = [str(PROGRAM), "lineage", *arguments]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_tree_says_where_a_run_came_from(folder: Path) -> None:
    """And what came from it."""
    up = lineage(folder, "runs/second")
    assert (up.returncode, up.stderr) == (0, "")
    assert up.stdout.splitlines() == [
        "o second  1 set, newest E2_U8_S64 (latest)",
        "└── came from",
        "    └── o first  previous_run @ latest = E1_U4_S32  net: 2 tensors (100 %)  - ",
        "        the origin of its weights was not recorded",
    ]
    down = lineage(folder, "runs/first")
    assert "└── went into" in down.stdout
    both = lineage(folder, "runs")
    assert "o second  previous_run @ latest = E1_U4_S32" in both.stdout


def test_no_line_is_wider_than_a_narrow_terminal(folder: Path) -> None:
    """At 40 columns, with all words there."""
    shown = lineage(folder, "runs/second", width=40).stdout
    assert max(map(len, shown.splitlines())) <= 40
    assert "previous_run" in shown


def test_json_and_page_say_the_same(folder: Path) -> None:
    """The page is written beside what is printed."""
    done = lineage(folder, "runs/second", "--json", "--html", "lineage.html")
    data = json.loads(done.stdout)
    assert (data["format"], data["version"], data["focus"]) == ("noether-init-lineage", 1, "second")
    assert done.stderr == "page: lineage.html\n"
    page = (folder / "lineage.html").read_text()
    assert "Where second came from" in page


def test_wrong_paths_name_the_next_command(folder: Path) -> None:
    """A path that is near to one, a file, a page that would destroy something."""
    near = lineage(folder, "rums")
    assert (near.returncode, near.stdout) == (1, "")
    assert "rums does not exist. Near: runs." in near.stderr
    (file,) = (folder / "runs" / "first").rglob("net_cp=latest_model.th")
    assert "Next: ninit lineage RUN_FOLDER" in lineage(folder, str(file)).stderr
    (folder / "init.yaml").write_text("mine")
    refused = lineage(folder, "runs", "--html", "init.yaml")
    assert refused.returncode == 2
    assert (folder / "init.yaml").read_text() == "mine"


def test_a_problem_is_exit_code_1_and_the_rest_is_shown(folder: Path, tmp_path: Path) -> None:
    """A damaged record is no reason to be silent about the others."""
    shutil.copytree(folder / "runs", tmp_path / "runs")
    (record,) = (tmp_path / "runs" / "second").rglob("provenance.json")
    record.write_text("{}")
    done = lineage(tmp_path, "runs")
    assert done.returncode == 1
    assert "o first" in done.stdout
    assert "x " in done.stdout
    assert "the origin of the weights cannot be read" in done.stdout


def test_a_long_chain_ends_with_the_command_that_goes_on(tmp_path: Path) -> None:
    """Lines have an end; a thousand generations are no reason to fail either."""
    model = bind(torch.nn.Linear(1, 1), name="net")
    for number in range(9):
        paths = PathProvider(tmp_path / "runs", f"r{number}")
        configs = [{"kind": "previous_run", "run_id": f"r{number - 1}"}] if number else []
        report = InitializerStack.from_config(configs, path_provider=paths).initialize(model)
        CheckpointWriter(paths, report=report, flat_names=True).save(model, TrainingIteration(1, 1, 1))
    done = lineage(tmp_path, "runs/r8", width=60)
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert "o r2 " in done.stdout
    assert "o r1 " not in done.stdout
    assert " ".join(done.stdout.split()).endswith("... earlier ones: ninit lineage runs/r2")
    assert "o r0 " in lineage(tmp_path, "runs/r2").stdout


def test_a_run_with_stages_shows_what_has_to_do_with_them(tmp_path: Path) -> None:
    """And says nothing of strangers."""
    model = bind(torch.nn.Linear(1, 1), name="net")
    for run_id, stage in (("run", "one"), ("run", "two"), ("stranger", None)):
        CheckpointWriter(PathProvider(tmp_path / "runs", run_id, stage), flat_names=True).save(
            model, TrainingIteration(1, 1, 1)
        )
    done = lineage(tmp_path, "runs/run", "--json")
    assert [node["id"] for node in json.loads(done.stdout)["nodes"]] == ["run/one", "run/two"]


def test_symbols_do_without_colour_and_without_unicode(folder: Path) -> None:
    """On a terminal that only knows ASCII."""
    environment = {"COLUMNS": "80", "PATH": "/usr/bin:/bin", "NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    words = [str(PROGRAM), "lineage", "runs/second"]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "o first  previous_run @ latest = E1_U4_S32" in done.stdout


def test_the_command_imports_no_torch(folder: Path) -> None:
    """Records are text."""
    code = (
        "import sys; from noether_init_core import cli\nsys.argv = ['ninit', 'lineage', 'runs/second']\n"
        "try: cli.main()\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_names_out_of_records_cannot_look_like_lines_of_ours() -> None:
    """A run whose recorded name holds a line break or an escape is one line, spelt out."""
    nodes = [
        LineageNode("odd\nx broken\x1b[31m", "missing", "odd", None, "odd"),
        LineageNode("b", "run", "b", None, "b"),
    ]
    edges = [LineageEdge(nodes[0].id, "b", "file\nx", "m", "f", "t", None, None, 1, 0.5)]
    shown = str(related(["b"], nodes, edges, ["a\nx b"]))
    assert "odd\\nx broken\\x1b[31m" in shown
    assert [line for line in shown.splitlines() if line.startswith("x ")] == ["x a\\nx b"]
