"""Damaged files: every fault of the campaign in small numbers, through the public way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from faults.campaign.damage import FAULTS, counted, damaged, tally
from faults.campaign.readings import HOW, reading_failures
from faults.campaign.subjects import FORMATS, Process, build
from noether_init_core import InitializerStack, PathProvider

AMOUNTS = {"flips": 60, "truncations": 40, "zeroed": 12, "stale": 12, "appended": 24, "replaced": 0}
#: What carries a checksum or has one beside it; a lone safetensors file has none.
CHECKED = [name for name in FORMATS if name != "safetensors_alone"]


def _counted(format_name: str, fault: str, root: Path, *, baseline: bool = False) -> Counter[str]:
    subject = build(format_name, root / format_name, 96 if fault in ("zeroed", "stale") else 16)
    contents, others = [path.read_bytes() for path in subject.files], [path.read_bytes() for path in subject.others]
    damages = FAULTS[fault](contents, others, AMOUNTS[fault])
    assert damages
    return counted(tally(subject, damages, baseline=baseline))


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "replaced"])
@pytest.mark.parametrize("format_name", CHECKED)
def test_no_damage_is_loaded_and_none_changes_a_thing(format_name: str, fault: str, tmp_path: Path) -> None:
    """Each load is refused with one of our errors and everything as it was, or gives what was saved."""
    found = _counted(format_name, fault, tmp_path)
    assert found["detected"] > 0.7 * found["tried"]
    assert found["detected"] + found["harmless"] == found["tried"]
    assert (found["silent"], found["half changed"], found["foreign error"]) == (0, 0, 0)


@pytest.mark.parametrize("format_name", ["set_previous_run", "set_resume", "manifest", "flat_resume"])
def test_files_of_another_set_are_refused(format_name: str, tmp_path: Path) -> None:
    """Also where the other set is one of the same iteration and every file is a good one."""
    found = _counted(format_name, "replaced", tmp_path)
    assert found["detected"] == found["tried"] > 0
    assert found["half changed"] == 0


@pytest.mark.parametrize("fault", ["truncations", "appended"])
def test_structure_of_a_lone_safetensors_file_is_checked(fault: str, tmp_path: Path) -> None:
    """Without a checksum, what the header says about sizes still has to hold."""
    found = _counted("safetensors_alone", fault, tmp_path)
    assert found["detected"] == found["tried"]
    assert found["half changed"] == 0


@pytest.mark.parametrize(("format_name", "fault"), [("bare_file", "flips"), ("safetensors_digest", "zeroed")])
def test_the_count_sees_what_others_load(format_name: str, fault: str, tmp_path: Path) -> None:
    """The same faults are silently wrong elsewhere, so a count of none is no accident."""
    assert _counted(format_name, fault, tmp_path, baseline=True)["silent"] > AMOUNTS[fault] / 5


def test_a_fault_is_taken_out_again(tmp_path: Path) -> None:
    """The campaign would otherwise count one damage many times."""
    subject = build("set_resume", tmp_path / "set", 8)
    contents, others = [path.read_bytes() for path in subject.files], [path.read_bytes() for path in subject.others]
    for fault in FAULTS.values():
        for damage in fault(contents, others, 5):
            with damaged(damage, subject.files, contents, others):
                assert [path.read_bytes() for path in subject.files] != contents, str(damage)
            assert [path.read_bytes() for path in subject.files] == contents, str(damage)


def test_flips_are_all_different_and_reach_every_file(tmp_path: Path) -> None:
    """Ten thousand flips are ten thousand faults."""
    subject = build("set_resume", tmp_path / "set", 8)
    contents = [path.read_bytes() for path in subject.files]
    flips = FAULTS["flips"](contents, contents, 5_000)
    assert len(set(flips)) == 5_000
    assert {flip.file for flip in flips} == {0, 1, 2}
    for flip in flips:
        ((at, data),) = flip.patches
        assert (contents[flip.file][at] ^ data[0]).bit_count() == 1


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("format_name", ["set_resume", "bare_file"])
def test_every_failing_read_leaves_all_as_it_was_or_says_that_it_does_not(
    format_name: str, how: str, tmp_path: Path
) -> None:
    """Only after everything has been verified can a disk still fail, and that has an error of its own."""
    found = sum(reading_failures(build(format_name, tmp_path / "subject", 16), how), Counter[str]())
    assert found["tried"] > 5
    assert found["detected"] + found["harmless"] + found["partly"] == found["tried"]
    assert found["detected"] > 0
    assert (found["silent"], found["half changed"], found["foreign error"]) == (0, 0, 0)


def test_lone_safetensors_file_is_said_to_be_unverified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It carries no checksums; that is no secret, and a digest makes up for it."""
    subject = build("safetensors_alone", tmp_path / "subject", 8)
    caplog.set_level("INFO")
    subject.truth(subject.load)
    assert "has no checksums, so only its structure was checked" in caplog.text


def test_walking_back_from_damage_gives_the_set_before_as_a_whole(tmp_path: Path) -> None:
    """With ``on_invalid: previous`` whatever is flipped, what loads is one of the two sets, bit for bit."""
    root = tmp_path / "set"
    subject = build("set_resume", root, 16)
    stack = {"kind": "resume", "on_invalid": "previous"}

    def load(process: Process) -> None:
        made = InitializerStack.from_config([stack], path_provider=PathProvider(root, "run"))
        made.initialize(process.model, trainer=process.trainer, callbacks=[process.callback])

    contents, others = [path.read_bytes() for path in subject.files], [path.read_bytes() for path in subject.others]
    newest = subject.truth(load)
    manifest = subject.files[0].parent / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    before = subject.truth(load)
    manifest.write_bytes(content)
    assert before != newest
    found = Counter[str]()
    for damage in FAULTS["flips"](contents, others, 40):
        with damaged(damage, subject.files, contents, others):
            loaded = subject.attempt(load)
        assert loaded.error is None
        found[loaded.after] += 1
    assert set(found) == {newest, before}
    assert found[before] > 25
