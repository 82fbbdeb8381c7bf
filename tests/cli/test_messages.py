"""The likeliest mistakes, typed in: each message says what was asked, what exists, and what to write or type next."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from noether_init_core import CheckpointWriter, PathProvider, TrainingIteration, __version__

PROGRAM = Path(sys.executable).with_name("ninit")
MODELS = """
import torch
from noether_init_core import bind


class Vit(torch.nn.Module):
    def __init__(self, classes, positions=197):
        super().__init__()
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, positions, 24))
        self.head = torch.nn.Linear(24, classes)


def build(classes=4, positions=197):
    return bind(Vit(classes, positions), name="vit")


def larger():
    return build(10, 257)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models, and runs in a stage."""
    (tmp_path / "models.py").write_text(MODELS)
    namespace: dict[str, object] = {}
    exec(MODELS, namespace)
    build = namespace["build"]
    model = build(10)
    CheckpointWriter(PathProvider(tmp_path / "runs", "pretrain", "train")).save(model, TrainingIteration(1, 4, 32))
    return tmp_path


def typed(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """What the command makes of a line."""
    return subprocess.run([PROGRAM, *line.split()], cwd=folder, capture_output=True, text=True, check=False)


def config(folder: Path, text: str) -> None:
    """Write init.yaml."""
    (folder / "init.yaml").write_text(text)


def test_a_kind_that_is_spelt_otherwise(folder: Path) -> None:
    """File, line, key, what is near and who offers it, the next command."""
    config(folder, "initializers:\n  # the kind\n  - kind: previous-run\n")
    done = typed(folder, "validate init.yaml")
    assert done.returncode == 1
    asked = 'init.yaml:3 initializers.0.kind: no kind "previous-run".'
    there = f"Near: previous_run (noether-init-core {__version__}). Next: ninit kinds"
    assert f"{asked} {there}" in done.stdout


def test_a_run_whose_checkpoints_are_in_a_stage(folder: Path) -> None:
    """The line to add."""
    config(folder, "initializers:\n  - {kind: previous_run, run_id: pretrain}\n")
    done = typed(folder, "plan init.yaml --model models:build --runs runs")
    assert done.returncode == 1
    assert 'run "pretrain" itself has no checkpoints; stage "train" has 1 set. Next: stage_name: train' in done.stderr


def test_a_set_that_holds_weights_only(folder: Path, noether_runs: Path) -> None:
    """Which sets can be resumed instead, and how to take the weights alone."""
    lines = ["kind: resume", "run_id: mlp_train", "stage_name: train", "checkpoint_tag: best_model.loss.val.total"]
    config(folder, f"initializers:\n  - {{{', '.join(lines)}}}\n")
    done = typed(folder, f"plan init.yaml --model models:build --runs {noether_runs} --run-id new --model-name mlp")
    assert done.returncode == 1
    assert (
        '"best_model.loss.val.total" holds weights only. Next: resume from E3_U12_S96 (same iteration) or latest or '
        "last, with checkpoint_tag: E3_U12_S96 (in initializers.0, init.yaml:2); {kind: previous_run, "
        "run_id: mlp_train, stage_name: train} (in initializers.0, init.yaml:2) loads weights only" in done.stderr
    )


def test_a_head_of_another_size(folder: Path) -> None:
    """Both shapes, and the rule for a fresh head."""
    config(
        folder,
        "initializers:\n  - {kind: previous_run, run_id: pretrain, stage_name: train, transforms: [from: pos_embed]}\n",
    )
    done = typed(folder, "plan init.yaml --model models:build --runs runs")
    assert done.returncode == 1
    shown = " ".join(done.stdout.split())
    assert "x mismatch head.weight 1 key 96 file [10,24] model [4,24]" in shown
    assert "fix: - keep_model: head." in shown


def test_position_embeddings_of_another_grid(folder: Path) -> None:
    """The rule to paste, with both grids; pasted, the plan has no problem."""
    text = "initializers:\n  - {kind: previous_run, run_id: pretrain, stage_name: train, transforms: [RULES]}\n"
    config(folder, text.replace("RULES", ""))
    done = typed(folder, "plan init.yaml --model models:larger --runs runs")
    assert done.returncode == 1
    shown = " ".join(done.stdout.split())
    rule = "{from: pos_embed, do: [{interpolate: {grid: [14, 14], to_grid: [16, 16], prefix_tokens: 1}}]}"
    assert "x mismatch pos_embed 1 key 6.2 k file [1,197,24] model [1,257,24]" in shown
    assert f"fix: transforms: [{rule}] # in initializers.0, init.yaml:2" in shown
    assert "1 problem nothing was changed" in shown
    config(folder, text.replace("RULES", rule))
    assert typed(folder, "plan init.yaml --model models:larger --runs runs").returncode == 0
