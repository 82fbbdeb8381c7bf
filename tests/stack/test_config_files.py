"""Config files and plain mappings: entries, places in errors, and what is refused."""

from __future__ import annotations

import argparse
from collections import UserDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import pytest

from noether_init_core import kinds
from noether_init_core.config.base import InitializerConfig, KindConfig
from noether_init_core.errors import ConfigError, ConfigFileError, InvalidNameError, UnknownKindError
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.stack.config_files import (
    LoadedConfig,
    examine_entry,
    load_config_file,
    load_config_mapping,
    validate_entry,
)


class Rule(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    pattern: str
    times: int = 1


class SampleConfig(InitializerConfig):
    load_optim: bool = False
    verify: str = "full"
    count: int | None = None
    rules: list[Rule] = pydantic.Field(default_factory=list)
    either: bool | dict[str, int] = False
    needed: str = pydantic.Field(default="x", description="What is needed.")


class Sample(InitializerBase):
    config_class: ClassVar[type[KindConfig]] = SampleConfig

    def init_weights(self, model: Any) -> None:
        """Nothing."""

    def init_optimizer(self, model: Any) -> None:
        """Nothing."""


class StrictConfig(SampleConfig):
    needed: str = pydantic.Field(description="What is needed.")


class Strict(Sample):
    config_class: ClassVar[type[KindConfig]] = StrictConfig


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The kinds of this module."""
    kinds.register("sample", Sample)
    kinds.register("strict", Strict)
    yield
    kinds.unregister("sample")
    kinds.unregister("strict")


def _load(tmp_path: Path, text: str) -> LoadedConfig:
    path = tmp_path / "init.yaml"
    path.write_text(text)
    return load_config_file(path)


def _validate(tmp_path: Path, text: str) -> KindConfig:
    (entry,) = _load(tmp_path, text).entries
    return validate_entry(entry)


def test_a_file_gives_its_entries_in_order(tmp_path: Path) -> None:
    """Entries know where they stand; switches and observers are read."""
    loaded = _load(
        tmp_path,
        "auto_resume: true\nobservers: [timing]\ninitializers:\n- kind: sample\n  run_id: a\n\n- {kind: strict}\n",
    )
    assert [dict(entry.config) for entry in loaded.entries] == [{"kind": "sample", "run_id": "a"}, {"kind": "strict"}]
    assert [(entry.line, entry.key_path) for entry in loaded.entries] == [(4, "initializers.0"), (7, "initializers.1")]
    assert all(entry.submodel == () and entry.hooks is None for entry in loaded.entries)
    assert (loaded.resume is not None, loaded.observers) == (True, ("timing",))
    assert loaded.document.path == tmp_path / "init.yaml"


def test_typed_fields_decide_what_a_scalar_means(tmp_path: Path) -> None:
    """off and a date stay texts in text fields, and are numbers and booleans where the field is one."""
    config = _validate(
        tmp_path,
        "initializers:\n- kind: sample\n  verify: off\n  run_id: 2026_02_19\n  stage_name: 2026-02-19\n"
        "  load_optim: true\n  count: 12\n  checkpoint_tag: {epoch: 10}\n  rules: [{pattern: 1e3, times: 2}]\n"
        "  model_info:\n  kwargs: {a: 3, b: '3', c: off, d: 1.5, e: true, f: [1, null]}\n",
    )
    assert isinstance(config, SampleConfig)
    assert (config.verify, config.run_id, config.stage_name) == ("off", "2026_02_19", "2026-02-19")
    assert (config.load_optim, config.count, config.checkpoint_tag) == (True, 12, {"epoch": 10})
    assert config.rules == [Rule(pattern="1e3", times=2)]
    assert config.model_info is None
    assert config.kwargs == {"a": 3, "b": "3", "c": "off", "d": 1.5, "e": True, "f": [1, None]}
    assert type(config.verify) is str


def test_the_likeliest_mistake_is_told_word_for_word(tmp_path: Path) -> None:
    """File, line, key, what was asked, what is near with its distribution, and the next command."""
    (entry,) = _load(tmp_path, "# warm start\ninitializers:\n- kind: previous-run\n  run_id: pretrain\n").entries
    with pytest.raises(UnknownKindError) as caught:
        validate_entry(entry)
    version = kinds.describe("previous_run").version
    text = f'no kind "previous-run". Near: previous_run (noether-init-core {version}). Next: ninit kinds'
    assert str(caught.value) == f"init.yaml:3 initializers.0.kind: {text}"
    assert caught.value.candidates == ("previous_run",)
    assert (caught.value.line, caught.value.key_path) == (3, "initializers.0.kind")


@pytest.mark.parametrize(
    ("entry", "line", "key_path", "message"),
    [
        ("kind: os.system", 2, "kind", 'no kind "os.system"'),
        ("run_id: x", 2, "kind", "names no kind"),
        ("kind:", 2, "kind", "names no kind"),
        ("kind: sample\n  run_id: ../x", 3, "run_id", "holds a path separator"),
        ("kind: sample\n  stage_name: ''", 3, "stage_name", "is empty"),
        ("kind: sample\n  runid: x", 3, "runid", r"unknown key. Near: run_id. Next: ninit schema sample"),
        ("kind: sample\n  load_optim: maybe", 3, "load_optim", "valid boolean"),
        ("kind: sample\n  rules:\n  - pattern: a\n  - pattern: b\n    times: x", 6, "rules.1.times", "valid integer"),
        ("kind: sample\n  rules:\n  - times: 3", 4, "rules.0.pattern", "is missing"),
        ("kind: sample\n  rules:\n  - pattern: a\n    glob: b", 5, "rules.0.glob", "unknown key"),
        ("kind: sample\n  either: q", 3, "either", "valid boolean.*; .*valid dictionary"),
        ("kind: strict\n  run_id: x", 2, "needed", "is missing: What is needed."),
        ("kind: sample\n  checkpoint_tag: {epoch: 1, update: 2}", 3, "checkpoint_tag", "one of them or all three"),
        ("kind: sample\n  checkpoint_tag: ['E1']", 3, "checkpoint_tag", "must be a text or a mapping"),
    ],
)
def test_errors_in_an_entry_name_line_and_key(
    tmp_path: Path, entry: str, line: int, key_path: str, message: str
) -> None:
    """Also deep inside; a missing key has the line of what lacks it."""
    with pytest.raises((ConfigFileError, UnknownKindError), match=message) as caught:
        _validate(tmp_path, f"initializers:\n- {entry}\n")
    assert isinstance(caught.value, ConfigFileError | UnknownKindError)
    assert (caught.value.line, caught.value.key_path) == (line, f"initializers.0.{key_path}")
    assert "\n" not in str(caught.value)


def test_all_that_is_wrong_in_an_entry_is_told_at_once(tmp_path: Path) -> None:
    """The first place is the error's, the others follow on lines of their own."""
    with pytest.raises(ConfigFileError) as caught:
        _validate(tmp_path, "initializers:\n- kind: sample\n  count: x\n  run_id: .hidden\n  colour: red\n")
    lines = str(caught.value).split("\n")
    assert sorted(line.split(": ")[0] for line in lines) == [
        "init.yaml:3 initializers.0.count",
        "init.yaml:4 initializers.0.run_id",
        "init.yaml:5 initializers.0.colour",
    ]
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)


def test_the_original_error_of_a_bad_name_is_kept(tmp_path: Path) -> None:
    """InvalidNameError with its data is reachable through the chain."""
    with pytest.raises(ConfigFileError) as caught:
        _validate(tmp_path, "initializers:\n- kind: sample\n  run_id: a/b\n")
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)
    error = caught.value.__cause__.errors()[0]["ctx"]["error"]
    assert isinstance(error, InvalidNameError)
    assert (error.what, error.value) == ("run_id", "a/b")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("initialisers: []", 1, "unknown key. Near: initializers"),
        ("initializers: []\nseed: 3", 2, "unknown key. A config has initializers, auto_resume, on_invalid, observers"),
        ("initializers: []\nmodel: {}", 2, "unknown key"),
        ("initializers:", 1, "must be a list"),
        ("initializers: {kind: sample}", 1, "must be a list"),
        ("initializers: [sample]", 1, "is a text, not a mapping. Next: kind: sample"),
        ("initializers: [[]]", 1, "must be a mapping with a kind"),
        ("initializers: [~]", 1, "must be a mapping with a kind"),
        ("observers: []", None, "initializers: not found"),
        ("", None, "has no keys"),
        ("text", None, "has no keys"),
        ("- kind: sample", None, "put it under the key initializers:"),
        (
            "initializers: []\ntransforms: []",
            2,
            r"an initializer. Next: initializers: \[{kind: ..., transforms: ...}\]. A config",
        ),
        ("auto_resume: true\ntransforms: []", 2, r"For auto_resume: auto_resume: {transforms: ...}"),
        (
            "auto_resume: true\nrun_id: a",
            2,
            r"an initializer. Next: initializers: \[{kind: ..., run_id: ...}\]. A config has",
        ),
        ("initializers: []\nauto_resume: maybe", 2, "must be true or false, or fields .*, not maybe"),
        ("initializers: []\nauto_resume: [true]", 2, "must be true or false"),
        ("initializers: []\non_invalid: previous", 2, "is for auto_resume, which was not found"),
        ("initializers: []\nobservers: timing", 2, "must be a list of names"),
        ("initializers: []\nobservers: [~]", 2, "must be the name of an observer"),
        ("defaults:\n- base\ninitializers: []", 1, "hp_resolved.yaml"),
        ("initializers:\n- kind: sample\n  run_id: ???", 3, "hp_resolved.yaml"),
        ("model:\n  name: ???", 2, "hp_resolved.yaml"),
        ("initializers:\n- kind: !!python/name:os.system x", 2, r"the tag !!python/name:os.system is refused"),
        ("initializers:\n- !!python/object/apply:os.system ['true']", 2, "is refused"),
        ("initializers: !custom []", 1, "the tag !custom is refused"),
        ("initializers: []\n? {a: b}\n: 3", 2, "a key must be a text"),
        ("!!python/object:x\n- a", 1, "is refused"),
    ],
)
def test_a_file_that_is_no_config_of_ours_is_refused(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    """Each with the line where the mistake is."""
    with pytest.raises(ConfigFileError, match=message) as caught:
        _load(tmp_path, text)
    assert caught.value.line == line


def test_what_auto_resume_does_with_a_broken_set_stands_beside_it(tmp_path: Path) -> None:
    """The default is an error; a switched-off auto_resume may keep the line."""
    for text, config in (
        ("auto_resume: true", {"kind": "resume"}),
        ("auto_resume: true\non_invalid: previous", {"kind": "resume", "on_invalid": "previous"}),
    ):
        resume = _load(tmp_path, text).resume
        assert resume is not None
        assert resume.config == config
    assert _load(tmp_path, "auto_resume: false\ninitializers: []\non_invalid: previous").resume is None


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("'on'", True), ("no", False), ("FALSE", False)])
def test_auto_resume_alone_is_a_config(tmp_path: Path, text: str, expected: bool) -> None:
    """A run that only ever resumes itself needs no list."""
    loaded = _load(tmp_path, f"auto_resume: {text}\n")
    assert (loaded.resume is not None, loaded.entries) == (expected, ())


def test_a_mapping_gives_the_same_entries_and_the_same_text_without_a_file() -> None:
    """No file and line in the message, the path of the key is there."""
    loaded = load_config_mapping({"initializers": [{"kind": "sample"}, {"kind": "sample", "count": "x"}]})
    assert isinstance(validate_entry(loaded.entries[0]), SampleConfig)
    assert (loaded.entries[0].line, loaded.document.path) == (None, None)
    with pytest.raises(ConfigError) as caught:
        validate_entry(loaded.entries[1])
    assert str(caught.value).startswith("initializers.1.count: Input should be a valid integer")
    assert not isinstance(caught.value, ConfigFileError)
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)


def test_validated_configs_may_stand_in_a_mapping() -> None:
    """A KindConfig built in Python passes as it is."""
    config = SampleConfig(kind="sample", count=3)
    (entry,) = load_config_mapping({"initializers": [config]}).entries
    assert validate_entry(entry) is config
    (wrong,) = load_config_mapping({"initializers": [KindConfig(kind="sample")]}).entries
    with pytest.raises(ConfigError, match=r"initializers\.0\.kind: kind \"sample\" takes a SampleConfig"):
        validate_entry(wrong)


def test_a_list_or_one_config_is_taken_as_it_is() -> None:
    """The list may be a tuple, and one validated config needs no list."""
    config = SampleConfig(kind="sample", count=3)
    for given in (config, [config], (config,)):
        (entry,) = load_config_mapping(given).entries
        assert validate_entry(entry) is config
    assert load_config_mapping([]).entries == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"not a NoneType\. Next: a list, \[\] for a start from scratch"),
        ("init.yaml", r"not a str\. .*InitializerStack\.from_file\(path, \.\.\.\) for a file"),
        ({"kind": "file"}, r"kind: .*Initializers are a list. Next: initializers: \[\{kind: file, \.\.\.\}\]"),
    ],
)
def test_what_is_no_config_says_what_to_give(given: Any, message: str) -> None:
    """A file name, None, a mapping of one initializer."""
    with pytest.raises(ConfigError, match=message):
        load_config_mapping(given)


def test_problems_are_one_for_each_key_in_the_order_of_lines(tmp_path: Path) -> None:
    """Whatever order pydantic finds them in; ``validate_entry`` raises all of them as one."""
    loaded = _load(
        tmp_path, "initializers:\n- kind: sample\n  zzz: 1\n  rules: 4.\n  count: x\n- kind: sample\n- kind: absent\n"
    )
    config, found = examine_entry(loaded.entries[0])
    assert config is None
    assert [getattr(error, "line", None) for error in found] == [3, 4, 5]
    assert str(found[1]).endswith("rules: Input should be a valid list: [4.]")
    with pytest.raises(ConfigFileError) as caught:
        validate_entry(loaded.entries[0])
    assert str(caught.value) == "\n".join(map(str, found))
    config, none = examine_entry(loaded.entries[1])
    assert (type(config), none) == (SampleConfig, ())
    assert [type(error) for error in examine_entry(loaded.entries[2])[1]] == [UnknownKindError]


def test_a_tag_that_is_a_number_says_how_to_write_it() -> None:
    """An epoch is E4, or a mapping."""
    (entry,) = load_config_mapping([{"kind": "sample", "checkpoint_tag": 4}]).entries
    with pytest.raises(ConfigError, match=r"not 4; for example E4 or \{epoch: 4\}"):
        validate_entry(entry)


class _Sealed(UserDict[str, Any]):
    """Like OmegaConf's mapping: reading a value that Hydra has not filled in raises an error of its own."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value == "???":
            raise RuntimeError(f"Missing mandatory value: {key}")
        return value


def test_mappings_of_other_libraries_work_without_importing_them() -> None:
    """Any Mapping, nested, and argparse's namespaces become plain data."""
    inner: Mapping[str, Any] = _Sealed(kind="sample", count=2, rules=(_Sealed(pattern="a"),))
    for config in (_Sealed(initializers=[inner]), argparse.Namespace(initializers=[argparse.Namespace(**inner)])):
        (entry,) = load_config_mapping(config).entries
        validated = validate_entry(entry)
        assert isinstance(validated, SampleConfig)
        assert (validated.count, validated.rules[0].pattern) == (2, "a")


def test_a_value_that_cannot_be_read_is_named() -> None:
    """The key, the error of the other library, and what to do."""
    with pytest.raises(ConfigError, match=r"^initializers\.0\.run_id: cannot be read: RuntimeError: Missing") as caught:
        load_config_mapping(_Sealed(initializers=[_Sealed(kind="sample", run_id="???")]))
    assert "Next: correct initializers.0.run_id in the config" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_loading_a_file_imports_no_plugin(tmp_path: Path) -> None:
    """Unknown kinds are only noticed when an entry is validated."""
    assert len(_load(tmp_path, "initializers: [{kind: nobody.has.this}]").entries) == 1


def test_a_mapping_that_holds_itself_is_refused() -> None:
    """And one that is nested without end; both with the place where it begins."""
    endless: dict[str, Any] = {"kind": "file"}
    endless["kwargs"] = endless
    with pytest.raises(ConfigError, match="nested deeper than 100, or holds itself"):
        load_config_mapping({"initializers": [endless]})


@pytest.mark.parametrize(
    ("kind", "key", "words"),
    [
        ("previous_run", "on_invalid", "on_invalid belongs to the kind resume. Next: "),
        ("resume", "keys_to_remove", "keys_to_remove belongs to the kind previous_run. Next: "),
        ("file", "checkpoint_tag", "checkpoint_tag belongs to the kinds previous_run, resume. Next: "),
        ("file", "patterns_to_renam", "file has: kind, verify,"),
        ("previous_run", "zzz", "previous_run has: kind, verify,"),
        ("previous_run", "on_mising", "Near: on_missing. Next: "),
    ],
)
def test_a_key_of_another_kind_is_told_where_it_belongs(kind: str, key: str, words: str) -> None:
    """Instead of a list of all that this kind has."""
    config = {"kind": kind, "run_id": "a", key: "previous"} if kind != "file" else {"kind": kind, "path": "a", key: "b"}
    (entry,) = load_config_mapping([config]).entries
    _config, (found,) = examine_entry(entry)
    assert str(found).startswith(f"initializers.0.{key}: unknown key. {words}")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"digest": "md5:aa"}, "digest: 'md5:aa' is not a valid digest. Next: write xxh3_128:<32"),
        ({"digest": "sha256:AA"}, "is not a valid digest"),
        ({"digest": "sha256:" + "0" * 64, "verify": "header"}, "verify: header would ignore it"),
        ({"digest": "xxh3_128:" + "0" * 32, "verify": "none"}, "verify: none would ignore it"),
    ],
)
def test_a_digest_that_could_not_be_compared_is_an_error_of_the_config(fields: dict[str, str], words: str) -> None:
    """Before anything is started; one that is ignored would be worse than none."""
    (entry,) = load_config_mapping([{"kind": "file", "path": "a.pt", **fields}]).entries
    _config, (found,) = examine_entry(entry)
    assert words in str(found)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            "auto_resume:\n  verfy: header",
            2,
            r"auto_resume.verfy: unknown key. Near: verify. Next: ninit schema",
        ),
        ("auto_resume:\n  on_invalid: older", 2, "auto_resume.on_invalid: Input should be 'error' or 'previous'"),
        ("auto_resume: true\non_invalid: newest", 2, "on_invalid: Input should be 'error' or 'previous'"),
        ("auto_resume: false\non_invalid: prevoius", 2, "on_invalid: Input should be 'error' or 'previous'"),
        ("auto_resume: {load_optim: maybe}", 1, "auto_resume.load_optim: Input should be a valid boolean"),
    ],
)
def test_fields_in_auto_resume_are_validated_by_resume(tmp_path: Path, text: str, line: int, message: str) -> None:
    """With line and key, at every start: not only when there is something to resume."""
    from noether_init_core import InitializerStack, PathProvider

    path = tmp_path / "init.yaml"
    path.write_text(text)
    with pytest.raises(ConfigFileError, match=message) as caught:
        InitializerStack.from_file(path, path_provider=PathProvider(tmp_path, "fresh"))
    assert caught.value.line == line


@pytest.mark.parametrize("key", ["kind", "run_id", "stage_name", "checkpoint_tag", "output_path"])
def test_what_auto_resume_decides_cannot_be_said_of_it(tmp_path: Path, key: str) -> None:
    """It would be ignored, or mean another run."""
    with pytest.raises(ConfigFileError, match=rf"auto_resume\.{key}: auto_resume resumes this run"):
        _load(tmp_path, f"auto_resume:\n  {key}: x\n")


def test_on_invalid_may_stand_beside_auto_resume_or_in_it(tmp_path: Path) -> None:
    """Once; an empty mapping is ``true``."""
    for text in ("auto_resume: {on_invalid: previous}", "auto_resume: {verify: none}\non_invalid: previous"):
        resume = _load(tmp_path, text).resume
        assert resume is not None
        assert validate_entry(resume).on_invalid == "previous"  # type: ignore[attr-defined]
    loaded = _load(tmp_path, "auto_resume: {}")
    assert (loaded.resume is not None, loaded.entries) == (True, ())
    with pytest.raises(ConfigFileError, match="on_invalid: occurs twice"):
        _load(tmp_path, "auto_resume: {on_invalid: error}\non_invalid: previous")
