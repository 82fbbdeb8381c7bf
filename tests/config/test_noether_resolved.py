"""Noether's resolved config: which parts ask for an initializer, in which order, with which hooks."""

from __future__ import annotations

from pathlib import Path

import pytest

from noether_init_core.errors import ConfigFileError, UnknownKindError
from noether_init_core.stack.config_files import LoadedConfig, load_config_file, load_config_mapping, validate_entry

WEIGHTS = frozenset({"init_weights", "init_optimizer"})
PREVIOUS = "noether.core.initializers.PreviousRunInitializer"
RESUME = "noether.core.initializers.ResumeInitializer"

# As yaml.dump writes it: aliases, tuples, sets and paths included.
RESOLVED = f"""\
stage_name: finetune
seed: 3
output_path: !!python/object/apply:pathlib.PosixPath [/, runs]
dataset_statistics:
  mean: &id001 !!python/tuple [0.0, 1.0]
  again: *id001
  names: !!set {{a: null, b: null}}
model:
  kind: my.models.AutoEncoder
  name: autoenc
  initializers:
  - kind: {PREVIOUS}
    run_id: '2026-02-19_abcde'
    load_optim: false
    kwargs: null
    patterns_to_remove: [head]
  encoder:
    kind: my.models.Encoder
    name: enc_net
    initializers:
    - kind: {PREVIOUS}
      run_id: pretrain
      stage_name: train
      checkpoint_tag: latest
    - kind: acme
  decoder:
    name: dec
    initializers: null
    submodels:
      inner:
        initializers:
        - kind: {PREVIOUS}
          run_id: other
  optimizer_config: {{kind: torch.optim.AdamW, betas: !!python/tuple [0.9, 0.95]}}
trainer:
  kind: my.Trainer
  max_epochs: 10
  initializer:
    run_id: earlier
    stage_name: null
    checkpoint_tag: {{epoch: 5}}
    model_name: autoenc
config_schema_kind: my.Config
"""


def _load(tmp_path: Path, text: str) -> LoadedConfig:
    path = tmp_path / "hp_resolved.yaml"
    path.write_text(text)
    return load_config_file(path)


def test_entries_come_in_the_order_in_which_noether_applies_them(tmp_path: Path) -> None:
    """Submodels before their parent, the trainer's initializer last with all hooks."""
    loaded = _load(tmp_path, RESOLVED)
    assert [(entry.submodel, entry.hooks, entry.key_path) for entry in loaded.entries] == [
        (("encoder",), WEIGHTS, "model.encoder.initializers.0"),
        (("encoder",), WEIGHTS, "model.encoder.initializers.1"),
        (("decoder", "inner"), WEIGHTS, "model.decoder.submodels.inner.initializers.0"),
        ((), WEIGHTS, "model.initializers.0"),
        ((), None, "trainer.initializer"),
    ]
    assert [entry.line for entry in loaded.entries] == [21, 25, 32, 12, 38]
    assert loaded.resume is None


def test_configs_are_those_of_the_file(tmp_path: Path) -> None:
    """Quoted and unquoted values as they stand; a trainer's initializer without a kind has Noether's default."""
    configs = [entry.config for entry in _load(tmp_path, RESOLVED).entries]
    assert configs[0] == {"kind": PREVIOUS, "run_id": "pretrain", "stage_name": "train", "checkpoint_tag": "latest"}
    assert configs[3]["run_id"] == "2026-02-19_abcde"  # a mapping, as read from a file
    assert configs[4] == {
        "kind": PREVIOUS,
        "run_id": "earlier",
        "stage_name": None,
        "checkpoint_tag": {"epoch": "5"},
        "model_name": "autoenc",
    }


@pytest.mark.parametrize("tag", ["E10", "E10_U100_S200", "Ensemble", "latest", "best_model.loss.val.total", "S7", "12"])
def test_a_root_resume_is_the_last_entry_with_the_tag_as_written(tmp_path: Path, tag: str) -> None:
    """It replaces the trainer's initializer, as in Noether, which writes both into the file."""
    root = f"resume_run_id: 2026_02_19\nresume_stage_name: train\nresume_checkpoint: {tag}\n"
    entries = _load(tmp_path, RESOLVED + root).entries
    assert len(entries) == 5
    assert entries[-1].config == {
        "kind": "resume",
        "run_id": "2026_02_19",
        "stage_name": "train",
        "checkpoint_tag": tag,
        "model_name": "autoenc",
    }
    assert (entries[-1].submodel, entries[-1].hooks, entries[-1].key_path) == ((), None, "resume_run_id")


def test_a_root_resume_alone_needs_no_other_key() -> None:
    """What is not said is not in the config; null keys do not count."""
    mapping = {"resume_run_id": "a", "resume_checkpoint": None, "resume_stage_name": None, "model": None}
    (entry,) = load_config_mapping(mapping).entries
    assert entry.config == {"kind": "resume", "run_id": "a"}
    assert load_config_mapping({"resume_run_id": None, "trainer": {"initializer": None}}).entries == ()


def test_submodels_in_a_list_go_by_their_names() -> None:
    """A list has no keys, so the name of the model config serves."""
    inner = {"name": "first", "initializers": [{"kind": "file"}]}
    loaded = load_config_mapping({"model": {"submodels": [inner, {"initializers": [{"kind": "file"}]}]}})
    assert [entry.submodel for entry in loaded.entries] == [("first",), ("1",)]


@pytest.mark.parametrize(
    ("text", "line", "key_path", "message"),
    [
        ("resume_run_id: ../x\nmodel: {name: m}\n", 1, "resume_run_id", "path separator"),
        ("resume_run_id: x\nresume_stage_name: .s\n", 2, "resume_stage_name", "starts with a dot"),
        ("model:\n  name: ../m\nresume_run_id: x\n", 2, "model.name", "path separator"),
        ("model:\n  initializers:\n  - kind: os.system\n", 3, "model.initializers.0.kind", 'no kind "os.system"'),
    ],
)
@pytest.mark.needs_torch
def test_errors_name_the_root_key_that_is_wrong(
    tmp_path: Path, text: str, line: int, key_path: str, message: str
) -> None:
    """The keys of a resume are those that the file has, not those of the config made of them."""
    entry = _load(tmp_path, text).entries[-1]
    with pytest.raises((ConfigFileError, UnknownKindError), match=message) as caught:
        validate_entry(entry)
    assert isinstance(caught.value, ConfigFileError | UnknownKindError)
    assert (caught.value.line, caught.value.key_path) == (line, key_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: 3\n", "model: must be a mapping"),
        ("model: {initializers: {}}\n", "model.initializers: must be a list"),
        ("model: {initializers: [~]}\n", "model.initializers.0: must be a mapping"),
        ("trainer: {initializer: x}\n", "trainer.initializer: must be a mapping"),
        ("model: {initializers: [{kind: !!python/name:os.system }]}\n", "is refused"),
        ("model: !!python/object:my.Model {initializers: [{kind: file}]}\n", "is refused"),
        ("resume_run_id: !!python/name:os.system x\n", "is refused"),
    ],
)
def test_parts_that_are_used_must_be_plain(tmp_path: Path, text: str, message: str) -> None:
    """Tags elsewhere are left alone, in an initializer they are errors."""
    with pytest.raises(ConfigFileError, match=message):
        _load(tmp_path, text)


@pytest.mark.needs_torch
def test_the_dotted_kinds_validate_as_they_are(tmp_path: Path) -> None:
    """A config written for Noether needs no change: the dotted names are registered kinds and are kept."""
    entries = _load(tmp_path, RESOLVED.replace("    - kind: acme\n", "")).entries
    assert {validate_entry(entry).kind for entry in entries} == {PREVIOUS}
    root = f"trainer: {{initializer: {{kind: {RESUME}, run_id: a, model_name: m, load_optim: true}}}}\n"
    (entry,) = _load(tmp_path, root).entries
    assert validate_entry(entry).kind == RESUME
