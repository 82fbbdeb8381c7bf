"""AnyInitializer: a config field that takes every registered kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import pytest
from support.foreign import ForeignPackages

from noether_init_core import kinds
from noether_init_core.config.base import InitializerConfig, KindConfig
from noether_init_core.errors import UnknownKindError
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.kinds.any_initializer import AnyInitializer


class ScaledConfig(InitializerConfig):
    scale: float = 1.0
    folder: Path | None = None


class Scaled(InitializerBase):
    config_class: ClassVar[type[KindConfig]] = ScaledConfig

    def init_weights(self, model: Any) -> None:
        """Nothing."""

    def init_optimizer(self, model: Any) -> None:
        """Nothing."""


class BundleConfig(KindConfig):
    members: list[AnyInitializer] = pydantic.Field(default_factory=list)


class Bundle(Scaled):
    config_class: ClassVar[type[KindConfig]] = BundleConfig


class CallingConfig(KindConfig):
    function: Callable[[int], int] = abs


class Calling(Scaled):
    config_class: ClassVar[type[KindConfig]] = CallingConfig


class Training(pydantic.BaseModel):
    learning_rate: float = 0.1
    initializers: list[AnyInitializer] = []
    teacher: AnyInitializer | None = None


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The kinds of this module."""
    classes = {"scaled": Scaled, "my.dotted.Scaled": Scaled, "bundle": Bundle, "calling": Calling}
    for name, cls in classes.items():
        kinds.register(name, cls)
    yield
    for name in classes:
        kinds.unregister(name)


def test_each_entry_gets_the_config_class_of_its_kind() -> None:
    """Mappings become the kind's own config; the dotted name that was given is kept."""
    training = Training.model_validate(
        {
            "initializers": [{"kind": "scaled", "scale": "2"}, {"kind": "my.dotted.Scaled"}],
            "teacher": {"kind": "bundle"},
        }
    )
    first, second = training.initializers
    assert isinstance(first, ScaledConfig)
    assert first.scale == 2.0
    assert type(second) is ScaledConfig
    assert second.kind == "my.dotted.Scaled"
    assert type(training.teacher) is BundleConfig


def test_instances_pass_as_they_are() -> None:
    """What Python code built is not validated again."""
    config = ScaledConfig(kind="scaled", scale=3)
    assert Training(initializers=[config]).initializers[0] is config


def test_a_round_trip_through_json_and_python_keeps_the_fields_of_the_kind() -> None:
    """What is dumped validates to an equal config, also where a kind holds other kinds."""
    training = Training.model_validate(
        {
            "initializers": [
                {"kind": "scaled", "scale": 0.5, "folder": "a/b", "checkpoint_tag": {"epoch": 3}},
                {"kind": "bundle", "members": [{"kind": "scaled", "scale": 4}]},
            ]
        }
    )
    dumped = training.model_dump(exclude_unset=True)
    assert dumped["initializers"][0] == {
        "kind": "scaled",
        "scale": 0.5,
        "folder": Path("a/b"),
        "checkpoint_tag": {"epoch": 3},
    }
    assert dumped["initializers"][1]["members"] == [{"kind": "scaled", "scale": 4.0}]
    assert Training.model_validate(dumped) == training
    assert Training.model_validate(training.model_dump()) == training
    assert Training.model_validate_json(training.model_dump_json()) == training


@pytest.mark.parametrize(
    ("config", "place", "message"),
    [
        ({"initializers": [{"kind": "scaled"}, {"kind": "scaledd"}]}, ("initializers", 1, "kind"), 'no kind "scaledd"'),
        ({"initializers": [{"scale": 1}]}, ("initializers", 0, "kind"), "names no kind"),
        ({"initializers": [3]}, ("initializers", 0), "mapping"),
        ({"initializers": [{"kind": "scaled", "scale": "x"}]}, ("initializers", 0, "scale"), "valid number"),
        ({"initializers": [{"kind": "scaled", "scle": 1}]}, ("initializers", 0, "scle"), "Extra inputs"),
        (
            {"teacher": {"kind": "bundle", "members": [{"kind": "scaled", "scle": 1}]}},
            ("teacher", "members", 0, "scle"),
            "Extra inputs",
        ),
        ({"initializers": [{"kind": "scaled", "run_id": "../x"}]}, ("initializers", 0, "run_id"), "path separator"),
        ({"teacher": {"kind": "os.system"}}, ("teacher", "kind"), 'no kind "os.system"'),
        (
            {"initializers": [{"kind": "bundle", "members": [{"kind": "scaled"}, {"kind": "no"}]}]},
            ("initializers", 0, "members", 1, "kind"),
            'no kind "no"',
        ),
    ],
)
def test_errors_keep_their_place_in_the_whole_config(
    config: dict[str, Any], place: tuple[str | int, ...], message: str
) -> None:
    """One error, at the very key that is wrong."""
    with pytest.raises(pydantic.ValidationError) as caught:
        Training.model_validate(config)
    (error,) = caught.value.errors()
    assert error["loc"] == place
    assert message in error["msg"]


def test_the_error_of_the_kind_can_be_taken_from_the_validation_error() -> None:
    """Its data is there for programs: the kind and its near names."""
    with pytest.raises(pydantic.ValidationError) as caught:
        Training.model_validate({"teacher": {"kind": "previous-run"}})
    error = caught.value.errors()[0]["ctx"]["error"]
    assert isinstance(error, UnknownKindError)
    assert error.candidates == ("previous_run",)


def test_only_the_kind_that_is_named_is_imported(foreign: ForeignPackages) -> None:
    """Defining the field and validating one kind runs no other plugin's module."""
    marker = foreign.folder / "imported"
    source = f"open({str(marker)!r}, 'w').close()\n"
    foreign.install("acme-init", offers={"acme": "acme_any:K"}, modules={"acme_any": source})

    class Local(pydantic.BaseModel):
        field: AnyInitializer

    assert Local.model_validate({"field": {"kind": "scaled"}}).field.kind == "scaled"
    assert not marker.exists()


def test_the_json_schema_offers_every_installed_kind(foreign: ForeignPackages) -> None:
    """One alternative per kind with its name as a constant; broken plugins and Python-only fields do not spoil it."""
    foreign.install("broken-init", offers={"broken": "broken_any:K"}, modules={"broken_any": "1 / 0"})
    schema = Training.model_json_schema()
    alternatives = {item["title"]: item for item in schema["properties"]["initializers"]["items"]["oneOf"]}
    assert set(alternatives) >= {"scaled", "my.dotted.Scaled", "bundle", "calling"}
    assert "broken" not in alternatives
    scaled = alternatives["scaled"]
    assert scaled["properties"]["kind"]["const"] == "scaled"
    assert alternatives["my.dotted.Scaled"]["properties"]["kind"]["const"] == "my.dotted.Scaled"
    assert scaled["properties"]["scale"]["type"] == "number"
    assert (scaled["required"], scaled["additionalProperties"]) == (["kind"], False)
    assert "scaled" in alternatives["bundle"]["properties"]["members"]["items"]["properties"]["kind"]["enum"]
    assert alternatives["calling"]["required"] == ["kind"]


def test_a_kind_that_is_installed_later_is_taken_without_a_new_type(foreign: ForeignPackages) -> None:
    """The type is open: kinds are looked up when a config is validated, not when the class was made."""
    with pytest.raises(pydantic.ValidationError, match='no kind "constant"'):
        Training.model_validate({"teacher": {"kind": "constant"}})
    from support.foreign import INITIALIZER

    target = "later_kind:ConstantInitializer"
    foreign.install("later-init", offers={"constant": target}, modules={"later_kind": INITIALIZER})
    teacher = Training.model_validate({"teacher": {"kind": "constant", "value": 2}}).teacher
    assert teacher is not None
    assert teacher.model_dump() == {"kind": "constant", "value": 2.0}
