"""The grammar of checkpoint file names and tags."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from noether_init_core.errors import InvalidNameError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.file_names import PARTS, CheckpointFileName, check_tag, iteration_of_tag, parse

NAMES = st.text(alphabet="mE1_=.-cp ü", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp_cp=latest_model.th", ("mlp", None, "latest", "model")),
        ("mlp_cp=last_optim.th", ("mlp", None, "last", "optim")),
        ("mlp_ema=0.9_cp=latest_model.th", ("mlp", "ema=0.9", "latest", "model")),
        ("my_big_net_ema=0.9_cp=E1_U4_S32_model.th", ("my_big_net", "ema=0.9", "E1_U4_S32", "model")),
        (
            "mlp_cp=best_model.loss.val.total_model.th",
            ("mlp", None, "best_model.loss.val.total", "model"),
        ),
        ("mlp_cp=E1_U7_S28.early_exit_trainer.th", ("mlp", None, "E1_U7_S28.early_exit", "trainer")),
        ("autoenc.encoder_cp=E10_U100_S200_optim.th", ("autoenc.encoder", None, "E10_U100_S200", "optim")),
        ("netE9_U9_S9_cp=E1_U1_S1_model.th", ("netE9_U9_S9", None, "E1_U1_S1", "model")),
        ("a=b_cp=latest_model.th", ("a=b", None, "latest", "model")),
        ("mlp_cp=a_model_optim.th", ("mlp", None, "a_model", "optim")),
    ],
)
def test_name_is_read_into_its_four_parts(name: str, expected: tuple[str, str | None, str, str]) -> None:
    """Model, info, tag and part come out as Noether put them in."""
    parsed = parse(name)
    assert parsed is not None
    assert (parsed.model, parsed.info, parsed.tag, parsed.part) == expected


@pytest.mark.parametrize(
    "name",
    [
        "entries.th",
        "mlp_cp=latest.th",
        "mlp_cp=latest_model.th.tmp",
        "mlp_cp=latest_model.th\n",
        "mlp_cp=latest_weights.th",
        "_cp=latest_model.th",
        "mlp_cp=_model.th",
        "mlp_latest_model.th",
        ".mlp_cp=latest_model.th",
        "../mlp_cp=latest_model.th",
        "mlp_cp=a/b_model.th",
        "mlp_cp=..\\x_model.th",
        "",
    ],
)
def test_other_files_are_no_checkpoints(name: str) -> None:
    """Whatever is not exactly of the form is no checkpoint."""
    assert parse(name) is None


def test_every_file_of_noether_prints_as_it_was(noether_runs: Path) -> None:
    """Names that Noether wrote survive parsing and printing."""
    names = [path.name for path in noether_runs.glob("*/*/checkpoints/*.th")]
    assert len(names) > 60
    assert [str(parse(name)) for name in names] == names


@given(model=NAMES, info=st.none() | NAMES, tag=NAMES, part=st.sampled_from(PARTS))
def test_every_name_that_may_be_written_reads_back(model: str, info: str | None, tag: str, part: str) -> None:
    """The writer accepts a name only if the parser finds the same four parts in it."""
    name = CheckpointFileName(model, info, tag, next(one for one in PARTS if one == part))
    try:
        name.checked()
    except InvalidNameError:
        return
    assert parse(str(name)) == name


@given(st.lists(st.sampled_from(["mlp", "_", "=", "_cp=", "ema", "0.9", ".", "_model.th", "_optim.th"]), max_size=9))
def test_every_name_that_parses_prints_as_it_was(pieces: list[str]) -> None:
    """Parsing loses nothing, whoever wrote the name."""
    name = "".join(["m", *pieces, "_cp=t_model.th"])
    parsed = parse(name)
    if parsed is not None:
        assert str(parsed) == name


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (CheckpointFileName("mlp_ema=0.9", None, "latest", "model"), "model_name"),
        (CheckpointFileName("mlp", "ema", "latest", "model"), "model_info"),
        (CheckpointFileName("mlp", "ema_factor=0.9", "latest", "model"), "model_info"),
        (CheckpointFileName("mlp", "=0.9", "latest", "model"), "model_info"),
        (CheckpointFileName("mlp", None, "a_cp=b", "model"), "checkpoint_tag"),
        (CheckpointFileName("../mlp", None, "latest", "model"), "model_name"),
        (CheckpointFileName("mlp", None, "../latest", "model"), "checkpoint_tag"),
        (CheckpointFileName("", None, "latest", "model"), "model_name"),
        (CheckpointFileName("m" * 150, None, "t" * 150, "model"), "model_name"),
    ],
)
def test_name_that_would_read_back_as_another_is_refused(name: CheckpointFileName, what: str) -> None:
    """A name that could be mistaken for another model's, or leave its folder, is never written."""
    with pytest.raises(InvalidNameError) as caught:
        name.checked()
    assert caught.value.what == what


@pytest.mark.parametrize(
    "tag", ["latest", "last", "best_model.loss.val.total", "E10_U100_S200", "E1_U7_S28.early_exit"]
)
def test_tags_of_noether_are_legal(tag: str) -> None:
    """Tags that Noether writes can be written."""
    assert check_tag(tag) == tag


@pytest.mark.parametrize(
    ("tag", "iteration"),
    [
        ("E10_U100_S200", TrainingIteration(10, 100, 200)),
        ("E1_U7_S28.early_exit", TrainingIteration(1, 7, 28)),
        ("E10", None),
        ("U100_S200", None),
        ("E01_U1_S1", None),
        ("E1_U7_S28_more", None),
        ("latest", None),
        ("Ensemble", None),
        ("best_model.E1_U7_S28", None),
    ],
)
def test_iteration_of_a_tag(tag: str, iteration: TrainingIteration | None) -> None:
    """A full iteration, also before a suffix, is the iteration of the tag; nothing else is."""
    assert iteration_of_tag(tag) == iteration


def test_a_model_has_a_name_also_where_an_info_could_stand() -> None:
    """What stands before the info is the model, and it is not empty."""
    assert parse("_ema=1_cp=E1_U1_S1_model.th") == CheckpointFileName("_ema=1", None, "E1_U1_S1", "model")


def test_the_longest_name_that_a_disk_takes_is_written() -> None:
    """255 bytes, and no more."""
    rest = len(str(CheckpointFileName("m" * 150, "a=", "latest", "model")))
    longest = CheckpointFileName("m" * 150, "a=" + "v" * (255 - rest), "latest", "model")
    assert longest.checked() is longest
    with pytest.raises(InvalidNameError, match="has 256 bytes, more than 255"):
        CheckpointFileName("m" * 150, f"{longest.info}v", "latest", "model").checked()
