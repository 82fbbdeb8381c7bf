"""The kit is itself tested: a right kind passes it, and each fault fails the one check that is meant for it."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest
from support.wheels import Environment

from conformance.conftest import PACKAGES, RANDOM
from noether_init_core.testing import InitializerConformance

#: Kind of ``acme-faulty`` -> the check that finds its fault.
MEANT = {
    "unregistered": "test_is_registered_by_its_distribution",
    "no_contract": "test_says_the_contract_it_was_written_for",
    "works_at_import": "test_import_does_no_work",
    "drifting_config": "test_config_survives_a_round_trip",
    "no_schema": "test_config_has_a_json_schema",
    "undescribed": "test_every_key_is_described",
    "forgiving": "test_unknown_keys_are_refused",
    "unpicklable": "test_config_and_initializer_can_be_pickled",
    "transposes": "test_single_model",
    "expects_every_submodel": "test_composite_model",
    "one_level_deep": "test_nested_composite",
    "skips_frozen": "test_frozen_model",
    "skips_meta": "test_model_on_the_meta_device",
    "unties": "test_tied_weights",
    "skips_buffers": "test_buffers",
    "freezes": "test_tensors_stay_the_same_objects",
    "fills_what_is_kept": "test_plan_is_what_happens",
    "plans_in_eval_mode": "test_plan_changes_nothing",
    "once_only": "test_initializing_again_gives_the_same",
    "clears_first": "test_a_model_that_does_not_fit_is_left_as_it_was",
    "looks_at_files_only": "test_check_finds_a_model_that_does_not_fit",
    "hopes_for_the_file": "test_check_finds_wrong_configs",
    "plain_errors": "test_errors_are_of_the_right_classes",
    "checks_by_doing": "test_check_changes_nothing",
    "starts_later": "test_start_iteration",
    "forgets_its_start": "test_start_is_the_same_when_asked_again",
    "needs_a_run": "test_path_provider",
    "clears_the_optimizer": "test_optimizer",
    "resets_the_trainer": "test_trainer",
    "resets_callbacks": "test_callbacks",
    "seeds_the_process": "test_process_is_left_as_it_was",
    "leaves_a_mark": "test_disk_is_left_as_it_was",
    "keeps_files_open": "test_files_are_closed",
    "tells_the_token": "test_secrets_are_not_told",
    "depends_on_the_rank": "test_two_ranks_agree",
}
CHECKS = {name for name, _method in inspect.getmembers(InitializerConformance) if name.startswith("test_")}


@attrs.frozen
class Outcome:
    """What pytest said of each test: test class -> check -> passed, failed or skipped, and why."""

    code: int
    outcomes: Mapping[str, Mapping[str, str]]
    messages: Mapping[tuple[str, str], str]
    output: str


def run_the_kit_on(project: Path, environment: Environment, folder: Path) -> Outcome:
    """Run the kit's tests of a package, copied away from this checkout, in the environment."""
    shutil.copytree(project / "tests", folder / "tests")
    report = folder / "report.xml"
    command = [
        str(environment.python),
        "-m",
        "pytest",
        "tests/test_conformance.py",
        f"--junitxml={report}",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={"PATH": "", "OMP_NUM_THREADS": "1"}, check=False
    )
    assert report.exists(), done.stdout + done.stderr
    outcomes: dict[str, dict[str, str]] = {}
    messages = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname", "").rpartition(".")[2].removeprefix("Test_")
        check = case.get("name", "")
        children = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
        outcomes.setdefault(name, {})[check] = next(iter(children), "passed")
        messages[name, check] = " ".join(child.get("message", "") for child in children.values())
    return Outcome(done.returncode, outcomes, messages, done.stdout)


@pytest.fixture(scope="module")
def faulty(strangers: Environment, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The kit on every faulty kind."""
    return run_the_kit_on(PACKAGES / "acme-faulty", strangers, tmp_path_factory.mktemp("faulty"))


@pytest.mark.parametrize(("project", "name"), [(PACKAGES / "acme-good", "TestFolder"), (RANDOM, "TestRandom")])
def test_a_right_kind_passes_every_check(project: Path, name: str, strangers: Environment, tmp_path: Path) -> None:
    """A stranger's wheel in a clean environment, with a file and without: all checks run, none is skipped."""
    good = run_the_kit_on(project, strangers, tmp_path)
    assert good.code == 0, good.output
    assert good.outcomes == {name: dict.fromkeys(CHECKS, "passed")}


def test_every_check_has_a_fault_that_it_finds() -> None:
    """No check of the kit is without a kind that fails it, and no fault is without a check."""
    assert sorted(MEANT.values()) == sorted(CHECKS)


@pytest.mark.parametrize("kind", MEANT)
def test_a_fault_fails_the_check_that_is_meant_for_it_and_no_other(kind: str, faulty: Outcome) -> None:
    """One subtle fault, one failing check."""
    failed = {check: faulty.messages[kind, check] for check, said in faulty.outcomes[kind].items() if said != "passed"}
    # what is registered in a process only cannot be looked at from another one
    skipped = {"test_import_does_no_work", "test_two_ranks_agree"} if kind == "unregistered" else set()
    assert set(failed) - skipped == {MEANT[kind]}, failed
    assert faulty.outcomes[kind].keys() == CHECKS


def test_the_reason_of_a_failure_is_told_in_words(faulty: Outcome) -> None:
    """An author reads what is wrong, and often what to write instead."""
    assert 'unregistered = "acme_faulty:Unregistered"' in faulty.messages["unregistered", MEANT["unregistered"]]
    assert "calls os.putenv: ACME_CACHE" in faulty.messages["works_at_import", MEANT["works_at_import"]]
    assert "restores_optimizer is closed" in faulty.messages["clears_the_optimizer", MEANT["clears_the_optimizer"]]
    assert "derive it from InitError" in faulty.messages["plain_errors", MEANT["plain_errors"]]
    assert "a secret occurs in the report" in faulty.messages["tells_the_token", MEANT["tells_the_token"]]
