"""Ranks compare what they start from before any of them changes its model; in real processes, over gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support import rank_cases
from support.advice import executes, saw

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, RankError, TrainingIteration
from noether_init_core.stack import ranks

RANKS = 2
Found = list[dict[str, dict[str, Any]]]


def save(root: Path, seed: int, *epochs: int) -> None:
    """Save a set for each epoch; other seeds give other values."""
    model = rank_cases.model()
    torch.manual_seed(seed)
    for epoch in epochs:
        with torch.no_grad():
            for value in model.module.parameters():
                value.copy_(torch.randn(value.shape))
        CheckpointWriter(PathProvider(root, "source")).save(model, TrainingIteration(epoch, epoch, epoch))


def legacy(root: Path, number: float) -> None:
    """A run of Noether: the same weights on each rank, another state of the trainer."""
    folder = PathProvider(root, "source").checkpoint_path
    folder.mkdir(parents=True)
    model, iteration = rank_cases.model(), {"epoch": 2, "update": 2, "sample": 2}
    torch.save({"state_dict": model.state_dict(), "training_iteration": iteration}, folder / "net_cp=latest_model.th")
    torch.save({"state_dict": model.optimizer.state_dict()}, folder / "net_cp=latest_optim.th")
    state = {"callback_state_dicts": {"loss": {"best": number}}, "training_iteration": iteration}
    torch.save(state, folder / "net_cp=latest_trainer.th")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What every case came to, on every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    save(folder / "one", 1, 1, 2)
    save(folder / "other", 2, 1, 2)
    save(folder / "behind", 1, 1)
    shutil.copytree(folder / "one", folder / "damaged")
    (file,) = (folder / "damaged").rglob("*E2_U2_S2_model.th")
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for rank in range(RANKS):
        (folder / f"flat{rank}").mkdir()
        torch.manual_seed(rank)
        torch.save(torch.nn.Linear(3, 2).state_dict(), folder / f"flat{rank}" / "w.pt")
        save_file(torch.nn.Linear(3, 2).state_dict(), folder / f"flat{rank}" / "w.safetensors")
        legacy(folder / f"legacy{rank}", float(rank))
    program = [sys.executable, rank_cases.__file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*program, str(rank), str(RANKS), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(RANKS)
    ]
    answers = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * RANKS, answers
    return [json.loads(out) for out, _err in answers]


@pytest.mark.parametrize("case", ["the same", "weights alike", "none"])
def test_ranks_that_agree_go_on(found: Found, case: str) -> None:
    """The exchange changes nothing: each rank loads."""
    for rank in found:
        assert rank[case]["error"] is None, rank[case]
        assert rank[case]["start"] == ("E2_U2_S2" if case == "the same" else "E0_U0_S0")
        assert rank[case]["changed"] is (case != "none")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("another root", ["rank 0: auto_resume: resumed from", "rank 1: auto_resume: source has no checkpoints"]),
        ("other flat state", ["rank 0: 0: resume reads net_cp=latest_trainer.th", "rank 1: 0: resume reads net_cp"]),
        ("other settings", ["rank 0: 0: previous_run has the settings", "rank 1: 0: previous_run has the settings"]),
        ("other bytes without checksums", ["rank 0: 0: file reads net from w.safetensors", "rank 1: 0: file"]),
        ("another order", ["rank 0: initializers previous_run, file", "rank 1: initializers file, previous_run"]),
        ("behind", ["resumed from E2_U2_S2", "resumed from E1_U1_S1", "start E1_U1_S1"]),
        ("another run, the same iteration", ["rank 0: 0: resume reads the set", "rank 1: 0: resume reads the set"]),
        ("other bytes", ["rank 0: 0: previous_run reads the set", "rank 1: 0: previous_run reads the set"]),
        ("other flat bytes", ["rank 0: 0: file reads net from w.pt", "rank 1: 0: file reads net from w.pt"]),
        ("damaged on one", ["rank 1: CheckpointCorruptError: ", "_model.th"]),
        ("another config", ["rank 0: initializers previous_run", "rank 1: initializers none"]),
        ("another model on one", ["rank 1: PlanError: "]),
    ],
)
def test_ranks_that_differ_all_raise_the_same_error(found: Found, case: str, words: list[str]) -> None:
    """Each of them names what each found; no model is changed."""
    texts = {rank[case]["text"] for rank in found}
    assert len(texts) == 1
    for rank in found:
        assert rank[case]["error"] == "RankError"
        assert rank[case]["ranks"] == [0, 1]
        assert not rank[case]["changed"]
    for word in words:
        assert word in texts.copy().pop()


def test_the_rank_that_failed_keeps_its_own_error_as_the_cause(found: Found) -> None:
    """So the traceback that explains the failure is in the output of that rank."""
    assert [rank["damaged on one"]["cause"] for rank in found] == [None, "CheckpointCorruptError"]


def test_a_failure_that_all_share_is_raised_as_it_is(found: Found) -> None:
    """The same config that fits no rank's model: each gets the error that one process would get."""
    assert [rank["another model on all"]["error"] for rank in found] == ["PlanError"] * RANKS


def test_ranks_of_other_groups_may_start_from_something_else(found: Found) -> None:
    """Several runs in one job: each group agrees by itself."""
    assert [rank["groups of one"]["error"] for rank in found] == [None] * RANKS
    assert [rank["groups of one"]["changed"] for rank in found] == [True, False]


@executes("stack/ranks.py", "Next: give every rank the same config, and a folder that all of them see")
def test_the_same_config_and_folder_for_all_starts_them(found: Found) -> None:
    """As the message about ranks that differ advises."""
    saw(found[1]["another root"]["text"])
    assert [rank["the same"]["error"] for rank in found] == [None] * RANKS


@executes("stack/ranks.py", "Next: give each rank the group that it is in, or none")
def test_a_rank_outside_the_given_group_is_refused(found: Found) -> None:
    """It would start by itself, compared with nobody. With a group that it is in, or none, it starts."""
    saw(found[1]["not in the group"]["text"])
    assert [rank[case]["error"] for rank in found for case in ("groups of one", "weights alike")] == [None] * 4
    assert [rank["not in the group"]["error"] for rank in found] == [None, "ConfigError"]
    assert "rank 1, which is not in that group" in found[1]["not in the group"]["text"]
    assert not found[1]["not in the group"]["changed"]


@executes("stack/ranks.py", "Next: read the output of the other ranks, and start all of them again")
def test_a_rank_that_never_comes_ends_the_wait(found: Found) -> None:
    """The others raise after ``timeout_s``, and have changed nothing. Where all of them start, they load."""
    absent = found[0]["absent"]
    saw(absent["text"])
    assert [rank["weights alike"]["changed"] for rank in found] == [True] * RANKS
    assert absent["error"] == "RankError"
    assert "not all of the 2 ranks answered within 2 s" in absent["text"]
    assert not absent["changed"]


def test_one_process_exchanges_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a process group, and with one of a single rank, no group is made."""
    made: list[object] = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "new_group", lambda *arguments, **keywords: made.append(arguments))
        InitializerStack([]).initialize(rank_cases.model())
    finally:
        dist.destroy_process_group()
    InitializerStack([]).initialize(rank_cases.model())
    assert made == []


def test_the_message_groups_ranks_and_leaves_out_what_all_found() -> None:
    """A thousand ranks of which one differs give two lines."""
    found = {rank: ("initializers resume", "start E2" if rank != 7 else "start E1") for rank in range(1000)}
    text = ranks._told(found)
    assert "ranks 0-6, 8-999: start E2\n" in text
    assert "rank 7: start E1\n" in text
    assert "initializers resume" not in text


def test_the_error_keeps_what_each_rank_found() -> None:
    """For programs: rank -> lines."""
    assert RankError("text", found={0: ("a",), 1: ("b",)}).found[1] == ("b",)
