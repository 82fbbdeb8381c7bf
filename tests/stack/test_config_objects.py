"""Configs as objects of Python: instances with fields, and what YAML made of a text before we saw it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any, ClassVar

import attrs
import pydantic
import pytest

from noether_init_core import InitializerStack, PathProvider, kinds
from noether_init_core.config.base import InitializerConfig, KindConfig
from noether_init_core.errors import ConfigError
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.stack.config_files import load_config_mapping, validate_entry


class Rule(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    pattern: str


class SampleConfig(InitializerConfig):
    count: int | None = None
    rules: list[Rule] = pydantic.Field(default_factory=list)


class Sample(InitializerBase):
    config_class: ClassVar[type[KindConfig]] = SampleConfig

    def init_weights(self, model: Any) -> None:
        """Nothing."""

    def init_optimizer(self, model: Any) -> None:
        """Nothing."""


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The kind of this module."""
    kinds.register("sample", Sample)
    yield
    kinds.unregister("sample")


@dataclasses.dataclass
class RuleRecord:
    """An entry of ``rules``, as somebody's own dataclass."""

    pattern: str = "a"


@dataclasses.dataclass
class SampleRecord:
    """A config of the kind sample, as somebody's own dataclass."""

    count: int = 2
    kind: str = "sample"
    rules: list[Any] = dataclasses.field(default_factory=lambda: [RuleRecord()])
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    derived: int = dataclasses.field(default=7, init=False)


@attrs.define
class SampleAttrs:
    """The same as an attrs class."""

    kind: str = "sample"
    rules: list[Any] = attrs.Factory(lambda: [RuleRecord()])
    count: int = 2


class SampleModel(pydantic.BaseModel):
    """The same as a pydantic model that is no KindConfig; its defaults count."""

    kind: str = "sample"
    count: int = 2
    rules: list[Any] = [RuleRecord()]


@dataclasses.dataclass
class WholeRecord:
    """A whole config."""

    initializers: list[Any]
    auto_resume: bool = False


@pytest.mark.parametrize("make", [SampleRecord, SampleAttrs, SampleModel])
def test_instances_of_classes_with_fields_stand_for_mappings(make: Callable[[], Any]) -> None:
    """Alone, in a list, in a whole config that is one itself, and for ``kinds.create``; nested rules, too."""
    for config in (make(), [make()], {"initializers": [make()]}, WholeRecord([make()])):
        (entry,) = load_config_mapping(config).entries
        validated = validate_entry(entry)
        assert isinstance(validated, SampleConfig)
        assert (validated.count, [rule.pattern for rule in validated.rules]) == (2, ["a"])
    created = kinds.create(make()).config
    assert isinstance(created, SampleConfig)
    assert created.count == 2


def test_an_instance_in_kwargs_is_handed_over_as_it_is() -> None:
    """There it is an argument of the constructor, not a config."""
    record = RuleRecord("b")
    configs: tuple[Any, ...] = (SampleRecord(kwargs={"rule": record}), {"kind": "sample", "kwargs": {"rule": record}})
    for config in configs:
        (entry,) = load_config_mapping([config]).entries
        for validated in (validate_entry(entry), kinds.validate(config)):
            assert isinstance(validated, SampleConfig)
            assert validated.kwargs is not None
            assert validated.kwargs["rule"] is record


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SampleRecord, "not the class SampleRecord"),
        ([SampleRecord], r"initializers\.0: must be a mapping with a kind, not the class SampleRecord"),
        ([object()], r"initializers\.0: must be a mapping with a kind, not an object"),
        ([RuleRecord()], r"initializers\.0\.kind: the config of an initializer names no kind"),
        ([SampleRecord(count="x")], r"^initializers\.0\.count: Input should be a valid integer"),  # type: ignore[arg-type]
        (WholeRecord(initializers=[], auto_resume="maybe"), r"^auto_resume: must be true or false"),  # type: ignore[arg-type]
    ],
)
def test_other_objects_are_refused_by_their_class(config: Any, message: str) -> None:
    """A class in the place of an instance, and an instance without a kind."""
    with pytest.raises(ConfigError, match=message):
        InitializerStack.from_config(config)


@pytest.mark.parametrize(
    ("value", "noun", "example"),
    [
        (20260219, "20260219 is an integer", "2026_02_19"),
        (2.5, "2.5 is a number", "0.90"),
        (False, "False is a boolean", "on"),
        (date(2026, 2, 19), "2026-02-19 is a date", "2026-02-19"),
    ],
)
@pytest.mark.parametrize("key", ["run_id", "stage_name", "model_name", "model_info"])
def test_what_yaml_made_of_a_text_is_refused_and_not_guessed(key: str, value: Any, noun: str, example: str) -> None:
    """The integer 20260219 may have been 2026_02_19: another run could be meant than its digits say."""
    (entry,) = load_config_mapping([{"kind": "sample", key: value}]).entries
    with pytest.raises(ConfigError) as caught:
        validate_entry(entry)
    assert str(caught.value) == (
        f"initializers.0.{key}: {key} {noun}, not a text. YAML reads {example} without quotes as "
        f'{noun.partition(" is ")[2]}. Next: write the text in quotes, for example {key}: "{example}"'
    )


def test_a_date_is_no_tag_and_a_number_no_path() -> None:
    """The fields of any kind say so, also where a kind has texts of its own."""
    configs = [{"kind": "sample", "checkpoint_tag": date(2026, 2, 19)}, {"kind": "file", "path": 2026}]
    (tag, path) = load_config_mapping(configs).entries
    with pytest.raises(ConfigError, match="checkpoint_tag: checkpoint_tag 2026-02-19 is a date, not a text"):
        validate_entry(tag)
    with pytest.raises(ConfigError, match="path: path 2026 is an integer, not a text"):
        validate_entry(path)
    with pytest.raises(ConfigError, match="run_id 20260219 is an integer"):
        PathProvider("runs", 20260219)  # type: ignore[arg-type]


def test_a_key_of_ones_own_config_says_how_to_give_the_list() -> None:
    """A whole config of a training has more keys than ours."""
    with pytest.raises(ConfigError, match=r'lr: unknown key\. .*config\["initializers"\]'):
        load_config_mapping({"lr": 0.1, "initializers": []})


def test_a_stack_of_a_mapping_says_what_builds_one() -> None:
    """Its keys are not taken for initializers."""
    with pytest.raises(ConfigError, match=r"takes initializers, not a dict\. Next: InitializerStack\.from_config"):
        InitializerStack({"initializers": []})  # type: ignore[dict-item]
