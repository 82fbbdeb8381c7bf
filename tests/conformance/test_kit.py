"""The kit is itself tested: a right kind passes it, and each fault fails the one check that is meant for it."""

from __future__ import annotations

import inspect
import re
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

#: Kind of ``acme-faulty`` -> the check that finds its fault, and what its message says of it.
MEANT = {
    "unregistered": ("test_is_registered_by_its_distribution", 'unregistered = "acme_faulty:Unregistered"'),
    "no_contract": ("test_says_the_contract_it_was_written_for", "NoContract does not declare its contract"),
    "works_at_import": ("test_import_does_no_work", "calls os.putenv: ACME_CACHE"),
    "drifting_config": ("test_config_survives_a_round_trip", "percent (50.0 -> 0.5)"),
    "no_schema": ("test_config_has_a_json_schema", "CallableSchema"),
    "undescribed": ("test_every_key_is_described", "tries has no description"),
    "forgiving": ("test_unknown_keys_are_refused", "an unknown key under options was ignored"),
    "unpicklable": ("test_config_and_initializer_can_be_pickled", "it cannot be pickled"),
    "transposes": ("test_single_model", "square.weight has"),
    "expects_every_submodel": ("test_composite_model", "'NoneType' object has no attribute 'name'"),
    "one_level_deep": ("test_nested_composite", "outer.inner.first: embed.weight has"),
    "skips_frozen": ("test_frozen_model", "embed.weight has"),
    "skips_meta": ("test_model_on_the_meta_device", "still on the meta device"),
    "unties": ("test_tied_weights", "were one parameter, and are two"),
    "skips_buffers": ("test_buffers", "norm.running_mean has"),
    "freezes": ("test_tensors_stay_the_same_objects", "flags of net embed"),
    "fills_what_is_kept": ("test_plan_is_what_happens", "not in the plan, and changed: net extra"),
    "plans_in_eval_mode": ("test_plan_changes_nothing", "the plan changed training of net"),
    "once_only": ("test_initializing_again_gives_the_same", "the second model of one stack: net: coarse has"),
    "clears_first": (
        "test_a_model_that_does_not_fit_is_left_as_it_was",
        "was raised after these had changed: net embed.weight",
    ),
    "looks_at_files_only": (
        "test_check_finds_a_model_that_does_not_fit",
        "extra is in the model and not in the source: nothing was raised",
    ),
    "hopes_for_the_file": ("test_check_finds_wrong_configs", "an empty folder: check() did not raise"),
    "plain_errors": ("test_errors_are_of_the_right_classes", "an empty folder: KeyError"),
    "checks_by_doing": ("test_check_changes_nothing", "check() changed net coarse"),
    "starts_later": ("test_start_iteration", "training starts at E2_U8_S64, not at E0_U0_S0"),
    "forgets_its_start": (
        "test_start_is_the_same_when_asked_again",
        "the first answer is E0_U0_S0, the second E0_U1_S0",
    ),
    "needs_a_run": ("test_path_provider", "'NoneType' object has no attribute 'run_id'"),
    "clears_the_optimizer": ("test_optimizer", "restores_optimizer is closed, but the kind changed optimizer of net"),
    "resets_the_trainer": ("test_trainer", "the state of trainer is 0, and 3 is right"),
    "resets_callbacks": ("test_callbacks", "the state of callbacks is 0, and 3 is right"),
    "seeds_the_process": ("test_process_is_left_as_it_was", "initialize() changed torch's generator"),
    "leaves_a_mark": ("test_disk_is_left_as_it_was", "net.used"),
    "keeps_files_open": ("test_files_are_closed", "still open or mapped: "),
    "tells_the_token": ("test_secrets_are_not_told", "a secret occurs in the report"),
    "depends_on_the_rank": ("test_two_ranks_agree", "the ranks have different values of net"),
    "trusts_the_bytes": (
        "test_damaged_bytes_are_refused",
        "was flipped in net.pt, net_cp=E2_U8_S64_model.th, and it was loaded without an error: net coarse differ",
    ),
    "verifies_afterwards": ("test_damaged_bytes_are_refused", "was raised after these had changed: net coarse"),
    "verifies_in_check_only": (
        "test_checked_bytes_are_the_loaded_bytes",
        "after check() had read it, and it was loaded without an error",
    ),
    "overlooks_nan": (
        "test_values_that_are_not_finite_are_refused",
        "embed.weight has nan in the source, and it was loaded",
    ),
    "casts_everything": ("test_a_model_that_does_not_fit_is_left_as_it_was", "norm.weight is torch.int64 in the model"),
    "through_float32": ("test_other_dtypes", "net: fine has"),
    "unpickles": (
        "test_files_are_not_unpickled",
        "named collections.OrderedDict, torch._utils._rebuild_tensor_v2, at ",
    ),
    "by_position": ("test_entries_are_matched_by_name", "norm.weight has"),
    "writes_the_block": ("test_memory_of_other_layouts", "memory around a parameter was written"),
    "drops_absent_parts": ("test_missing_files_are_refused", "pair.decoder.pt was removed, and it was loaded"),
    "reads_in_init": ("test_making_it_reads_nothing", "__init__ looks at"),
    "looks_in_init": ("test_making_it_reads_nothing", "made before its files were there: "),
    "caches_for_ever": ("test_a_changed_source_is_read_again", "other weights under the same names"),
    "shares_its_folder": ("test_instances_share_nothing", "two initializers of different sources"),
    "wakes_the_model": ("test_tensors_stay_the_same_objects", "changed: training of net"),
    "clears_gradients": ("test_tensors_stay_the_same_objects", "gradient of net embed.bias"),
    "leaves_a_hook": ("test_tensors_stay_the_same_objects", "hooks of net"),
    "tags": ("test_tensors_stay_the_same_objects", "modules of net"),
    "plans_by_doing": ("test_plan_changes_nothing", "the plan changed net coarse"),
    "states_too_little": ("test_plan_is_what_happens", "not in the plan, and changed: net"),
    "inference_tensors": ("test_model_on_the_meta_device", "cannot be trained as before"),
    "wraps_secretly": ("test_report_says_what_was_loaded", "a hook made another initializer, file"),
    "delegates_later": ("test_delegates_are_fixed", "after an initialization"),
    "seeds_by_hash": ("test_two_ranks_agree", "hash() of a text"),
    "unpicklable_error": ("test_errors_are_of_the_right_classes", "_TwoPartsError does not survive pickling"),
    "exits": ("test_errors_are_of_the_right_classes", "an empty folder: SystemExit"),
    "switches_kernels": ("test_process_is_left_as_it_was", "torch.backends cudnn.benchmark ('False' -> 'True')"),
    "uses_tf32": ("test_process_is_left_as_it_was", "torch.backends cuda.matmul.allow_tf32 ('False' -> 'True')"),
    "lowers_precision": ("test_process_is_left_as_it_was", "torch's matmul precision ('highest' -> 'medium')"),
    "be_deterministic": ("test_process_is_left_as_it_was", "torch's deterministic algorithms"),
    "one_thread": ("test_process_is_left_as_it_was", "torch's number of threads"),
    "default_dtype": ("test_process_is_left_as_it_was", "torch's default dtype (torch.float32 -> torch.float64)"),
    "allows_classes": ("test_process_is_left_as_it_was", "torch's allowed classes (0 -> 1)"),
    "draws_in_plan": ("test_process_is_left_as_it_was", "plan() changed torch's generator"),
    "ignores_signals": ("test_process_is_left_as_it_was", "initialize() changed the handler of SIGUSR1"),
    "filters_warnings": ("test_process_is_left_as_it_was", "warning filters"),
    "quiet": ("test_process_is_left_as_it_was", "the logger urllib3.connectionpool"),
    "sets_the_environment": (
        "test_process_is_left_as_it_was",
        "environment variable TOKENIZERS_PARALLELISM (nothing -> 'false')",
    ),
    "replaces_functions": ("test_process_is_left_as_it_was", "the function torch.load"),
    "leaves_a_thread": ("test_process_is_left_as_it_was", "initialize() changed threads"),
    "prints": ("test_process_is_left_as_it_was", "was printed on standard output"),
    "stays_in_the_folder": (
        "test_a_failure_leaves_nothing_behind",
        "with a truncated file, the kind changed working folder",
    ),
    "switches_until_it_is_done": (
        "test_a_failure_leaves_nothing_behind",
        "with a truncated file, the kind changed the switch torch.backends cudnn.enabled",
    ),
    "opens_besides": ("test_files_are_closed", "still open or mapped: "),
    "maps_the_file": ("test_files_are_closed", "still open or mapped: "),
    "leaks_descriptors": ("test_files_are_closed", "each initialization leaves one more descriptor open: /dev/null"),
    "leaves_temporary_files": ("test_disk_is_left_as_it_was", "/unpacked"),
    "writes_beside_the_config": ("test_disk_is_left_as_it_was", "index.json"),
}
SINGLE = "test_single_model"
CHECKS = {name for name, _method in inspect.getmembers(InitializerConformance) if name.startswith("test_")}


@attrs.frozen
class Outcome:
    """What pytest said of each test: test class -> check -> passed, failed or skipped, and why."""

    code: int
    outcomes: Mapping[str, Mapping[str, str]]
    messages: Mapping[tuple[str, str], str]
    output: str


def run_the_kit_on(project: Path, environment: Environment, folder: Path, *ids: str) -> Outcome:
    """Run the kit's tests of a package, copied away from this checkout, in the environment; with ids only those."""
    shutil.copytree(project / "tests", folder / "tests")
    report = folder / "report.xml"
    command = [
        str(environment.python),
        "-m",
        "pytest",
        *([f"tests/test_conformance.py::{one}" for one in ids] or ["tests/test_conformance.py"]),
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
        # the attribute "message" is cut after a few lines
        texts = [child.get("message", "") for child in children.values()]
        for child in children.values():
            texts += [line for line in (child.text or "").splitlines() if line.startswith("E  ")]
        messages[name, check] = "\n".join(texts)
    return Outcome(done.returncode, outcomes, messages, done.stdout)


@pytest.fixture(scope="module")
def faulty(strangers: Environment, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """On every faulty kind, the check that is meant for it, and that of a single model."""
    ids = dict.fromkeys(f"Test_{kind}::{check}" for kind in MEANT for check in (MEANT[kind][0], SINGLE))
    return run_the_kit_on(PACKAGES / "acme-faulty", strangers, tmp_path_factory.mktemp("faulty"), *ids)


def test_right_kinds_pass_every_check(strangers: Environment, tmp_path: Path) -> None:
    """Wheels of strangers in a clean environment: with files, a plan, delegates and draws, and without each of them."""
    good = run_the_kit_on(PACKAGES / "acme-good", strangers, tmp_path)
    assert good.code == 0, good.output
    assert len(good.outcomes) == 7
    skipped = {"TestNoise": {"test_two_ranks_agree"}}
    for name, outcomes in good.outcomes.items():
        assert outcomes.keys() == CHECKS
        assert {check for check, said in outcomes.items() if said != "passed"} == skipped.get(name, set())


def test_a_published_kind_passes_every_check(strangers: Environment, tmp_path: Path) -> None:
    """That of the plugin for random weights, in the same environment."""
    good = run_the_kit_on(RANDOM, strangers, tmp_path)
    assert good.code == 0, good.output
    assert good.outcomes == {"TestRandom": dict.fromkeys(CHECKS, "passed")}


def test_every_check_has_a_fault_that_it_finds() -> None:
    """No check of the kit is without a kind that fails it."""
    assert {check for check, _words in MEANT.values()} == CHECKS


@pytest.mark.parametrize("kind", MEANT)
def test_a_fault_fails_the_check_that_is_meant_for_it(kind: str, faulty: Outcome) -> None:
    """A single model gets the right weights, and the message names the fault, its reason and a remedy."""
    (meant, words), outcomes = MEANT[kind], faulty.outcomes[kind]
    assert outcomes[meant] == "failure", faulty.output
    assert meant == SINGLE or outcomes[SINGLE] == "passed", faulty.messages[kind, SINGLE]
    message = faulty.messages[kind, meant]
    assert words in message
    assert re.search(r"\. Why it matters: .+\. Next: .+", message, re.DOTALL), message
