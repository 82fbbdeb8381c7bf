"""``previous_run`` and the weights of ``resume`` against every result that Noether recorded."""

from __future__ import annotations

from typing import Any

import pytest
from support.ground_truth import build_target, digests, expected, file_digests, paths_for, record_id, records

from noether_init_core import CheckpointNotFoundError, ConfigError, InitError, InitializerStack, PlanError

LATEST = "mlp_cp=latest_model.th"

# Where Noether raised or recorded a defect. An exception: ours refuses too, and changes nothing, where Noether left
# some of these models half loaded. 'recorded': Noether raised although it had done the right thing. A mapping from a
# prefix of names to a file: the weights that a person would expect.
DIFFERENT: dict[tuple[str, str], Any] = {
    ("mlp_train", "tag_full_dict_not_on_disk"): CheckpointNotFoundError,
    ("mlp_train", "tag_two_keys"): ConfigError,
    ("mlp_train", "tag_empty_dict"): ConfigError,
    ("mlp_train", "tag_unknown_key"): ConfigError,
    ("mlp_train", "tag_none"): {"": LATEST},
    ("mlp_train", "tag_epoch_not_on_disk"): CheckpointNotFoundError,
    ("mlp_train", "tag_best_as_documented"): {"": "mlp_cp=best_model.loss.val.total_model.th"},
    ("mlp_train", "ema_as_documented"): CheckpointNotFoundError,
    ("mlp_train", "other_name_without_model_name"): CheckpointNotFoundError,
    ("mlp_train", "wrong_run"): CheckpointNotFoundError,
    ("mlp_train", "wrong_stage"): CheckpointNotFoundError,
    ("mlp_train", "keys_to_remove_only"): PlanError,
    ("mlp_train", "unexpected_key"): PlanError,
    ("mlp_train", "keys_to_remove_absent"): PlanError,
    ("mlp_train", "keys_to_remove_twice"): PlanError,
    ("mlp_train", "patterns_to_remove_only"): PlanError,
    ("mlp_train", "patterns_to_remove_empty_string"): ConfigError,
    ("mlp_train", "rename_overwrite_only"): PlanError,
    ("mlp_train", "rename_no_dst"): ConfigError,
    ("mlp_train", "rename_no_src"): ConfigError,
    ("mlp_train", "rename_empty_src"): ConfigError,
    ("mlp_train", "remove_runs_before_rename"): PlanError,
    ("mlp_train", "wrong_head_shape"): PlanError,
    ("mlp_train", "instantiate_everything"): ConfigError,
    ("mlp_train", "instantiate_all_parameters"): "recorded",
    ("mlp_train", "deeper_only"): PlanError,
    ("mlp_train", "same_weights_again"): {"": LATEST},
    ("mlp_train", "model_name_ignored_for_weights"): {"": LATEST},
    ("composite", "tag_epoch_ambiguous"): {
        "encoder.": "autoenc.encoder_cp=E1_U7_S42_model.th",
        "decoder.": "autoenc.decoder_cp=E1_U7_S42_model.th",
    },
    ("composite", "instantiate_encoder_out_new_shape"): "recorded",
    ("composite", "keys_to_remove_in_one_only"): {
        "encoder.": "autoenc.encoder_cp=latest_model.th",
        "decoder.": "autoenc.decoder_cp=latest_model.th",
        "except": "encoder.token",
    },
    ("composite", "keys_to_remove_with_submodel_prefix"): PlanError,
    ("composite", "model_name_ignored_for_composite"): {
        "encoder.": "autoenc.encoder_cp=latest_model.th",
        "decoder.": "autoenc.decoder_cp=latest_model.th",
    },
    ("composite", "ema_only_for_encoder"): CheckpointNotFoundError,
    ("composite", "decoder_shape_mismatch"): PlanError,
    ("composite", "encoder_alone_own_name"): CheckpointNotFoundError,
    ("composite", "same_weights_again"): "recorded",
    ("composite", "same_frozen_decoder"): "recorded",
    ("composite", "same_encoder"): {
        "encoder.": "autoenc.encoder_cp=latest_model.th",
        "decoder.": "autoenc.decoder_cp=latest_model.th",
    },
    ("composite", "composite_called_otherwise"): {
        "encoder.": "autoenc.encoder_cp=latest_model.th",
        "decoder.": "autoenc.decoder_cp=latest_model.th",
    },
    ("early_stop", "update_that_exists_only_as_early_exit"): {"": "mlp_cp=E1_U7_S28.early_exit_model.th"},
    ("early_stop", "epoch_1"): {"": "mlp_cp=E1_U7_S28.early_exit_model.th"},
}


def wanted_digests(run: str, record: dict[str, Any], before: dict[str, str], different: Any) -> dict[str, str]:
    """The digests that the model should have afterwards."""
    if different is None or different == "recorded":
        return {**before, **record["changed"]}
    after = dict(before)
    for prefix, file in different.items():
        if prefix != "except":
            after.update({f"{prefix}{name}": value for name, value in file_digests(run, file).items()})
    if "except" in different:
        after[different["except"]] = before[different["except"]]
    return after


def check_record(kind: str, run: str, record: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    different = DIFFERENT.get((run, record["id"]))
    module, model = build_target(record["target"])
    before = digests(module)
    assert before == record.get("before", expected(run)["init_states"][record["target"]["init_file"]])
    config = {"kind": kind, **record["initializer"]}
    if isinstance(different, type):
        with pytest.raises(different) as caught:
            InitializerStack.from_config([config], path_provider=paths_for(run)).initialize(model)
        assert isinstance(caught.value, InitError)
        assert digests(module) == before
        return
    stack = InitializerStack.from_config([config], path_provider=paths_for(run))
    if kind == "resume":
        stack.initializers[0].init_weights(model)
    else:
        plan = stack.plan(model)
        assert digests(module) == before
        report = stack.initialize(model)
        assert report.start.is_zero
        assert report.initializers[0].counts == plan.counts()
    assert digests(module) == wanted_digests(run, record, before, different)


@pytest.mark.parametrize(("run", "record"), records("previous_run"), ids=record_id)
def test_previous_run_gives_the_recorded_weights(
    run: str, record: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Every surgery and tag gives Noether's weights bit for bit, or the sensible thing where Noether failed."""
    check_record("previous_run", run, record, caplog)


@pytest.mark.parametrize(
    ("run", "record"), records("previous_run")[:1] + records("resume_init_weights")[:1], ids=record_id
)
def test_the_dotted_kinds_of_noether_do_the_same(
    run: str, record: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A config written for Noether selects the same kinds by their import paths."""
    kind = "ResumeInitializer" if "model_name" in record["initializer"] else "PreviousRunInitializer"
    module, model = build_target(record["target"])
    config = {"kind": f"noether.core.initializers.{kind}", **record["initializer"]}
    before = digests(module)
    InitializerStack.from_config([config], path_provider=paths_for(run)).initializers[0].init_weights(model)
    assert digests(module) == {**before, **record["changed"]}


@pytest.mark.parametrize(("run", "record"), records("resume_init_weights"), ids=record_id)
def test_resume_gives_the_recorded_weights(run: str, record: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The weights of ``resume`` are Noether's, also where Noether refused weights that were there already."""
    check_record("resume", run, record, caplog)


def test_every_difference_is_about_a_record() -> None:
    """No expectation is left over for a record that does not exist, and every recorded failure has one."""
    known = {
        (run, record["id"]) for section in ("previous_run", "resume_init_weights") for run, record in records(section)
    }
    failed = {
        (run, record["id"])
        for section in ("previous_run", "resume_init_weights")
        for run, record in records(section)
        if record["exception"] is not None
    }
    if known:
        assert known >= DIFFERENT.keys() >= failed
