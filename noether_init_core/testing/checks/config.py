"""The config of a kind: what a user writes, an editor completes, and a launcher sends to other processes."""

from __future__ import annotations

import json
import pickle
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pydantic
import pytest

from noether_init_core import kinds
from noether_init_core.config.base import KindConfig
from noether_init_core.kinds import contract
from noether_init_core.testing.checks.base import Checks, MakeConfig, NewCase
from noether_init_core.testing.models import leaf_state

_STRANGE = "no_such_key_of_any_config"


class ConfigChecks(Checks):
    """Round trips, schema, unknown keys, pickling."""

    def config_of(self, case: Any, make_config: MakeConfig) -> KindConfig:
        """The validated config."""
        return kinds.validate({"kind": self.kind, **make_config(case)})

    def test_config_survives_a_round_trip(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """What was dumped, as data and as JSON, validates to the same config again, and dumps to the same.

        Secrets are left out of JSON, as they should be.
        """
        config = self.config_of(new_case("single"), make_config)
        hidden = list(secret_fields(type(config)))
        dumps = [("python", config.model_dump())]
        if not any("." in name for name in hidden):
            secrets = {name: getattr(config, name) for name in hidden}
            dumps.append(("json", json.loads(config.model_dump_json()) | secrets))
        for mode, dumped in dumps:
            again = kinds.validate(dumped)
            assert again == config, f"validated again from {mode}: {again!r}, not {config!r}"
            assert again.model_dump() == config.model_dump()

    def test_config_has_a_json_schema(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Editors can complete it: a schema can be made, and it knows every key of the config, and no other."""
        cls = kinds.resolve(self.kind).config_class
        schema = cls.model_json_schema()
        said = {"kind", *make_config(new_case("single"))}
        assert said <= set(schema["properties"]), f"the schema lacks {sorted(said - set(schema['properties']))}"
        assert schema.get("additionalProperties") is False, "the schema lets other keys pass"

    def test_every_key_is_described(self) -> None:
        """``noether-init schema`` is where users look what a key means."""
        cls = kinds.resolve(self.kind).config_class
        bare = [path for path, field in contract.config_fields(cls) if not field.description]
        assert not bare, f"pydantic.Field(description=...) is missing for {', '.join(bare)}"

    def test_unknown_keys_are_refused(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """A misspelt key is an error at every depth, never ignored."""
        config = {"kind": self.kind, **make_config(new_case("single"))}
        kinds.validate(config)
        for path in _models_in(kinds.resolve(self.kind).config_class, config):
            with pytest.raises(ValueError):
                kinds.validate(_with_strange_key(config, path))
                pytest.fail(f"an unknown key under {'.'.join(map(str, path)) or 'the config'} was ignored")

    def test_config_and_initializer_can_be_pickled(self, new_case: NewCase, make_config: MakeConfig) -> None:
        """Launchers send them to other processes; what arrives is equal, and initializes the same."""
        case, other = new_case("single"), new_case("single")
        config = self.config_of(case, make_config)
        assert pickle.loads(pickle.dumps(config)) == config
        initializer = kinds.create(config, path_provider=case.paths)
        again = pickle.loads(pickle.dumps(initializer))
        for one, of in ((initializer, case), (again, other)):
            one.check(of.model, of.trainer, of.callbacks)
            one.init_weights(of.model)
        self.assert_weights(other, {"net": leaf_state(case.model)})


def secret_fields(cls: type[pydantic.BaseModel]) -> Iterator[str]:
    """The fields that pydantic keeps secret, those of models below as ``store.token``."""
    for name, field in contract.config_fields(cls):
        if any(one in (pydantic.SecretStr, pydantic.SecretBytes) for one in _types_in(field.annotation)):
            yield name


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _types_in(argument)


def _models_in(cls: type[pydantic.BaseModel], said: Mapping[str, Any]) -> Iterator[tuple[str | int, ...]]:
    """The places in ``said`` that a pydantic model validates: the config itself, and mappings below it."""
    yield ()
    for name, field in cls.model_fields.items():
        for path in dict.fromkeys(_places(field.annotation, said.get(name))):
            yield (name, *path)


def _places(annotation: Any, value: Any) -> Iterator[tuple[str | int, ...]]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        # the config of another kind has a kit of its own
        if isinstance(value, Mapping) and not issubclass(annotation, KindConfig):
            yield from _models_in(annotation, value)
    elif isinstance(value, Mapping) and isinstance(origin, type) and issubclass(origin, Mapping):
        for key, item in value.items():
            yield from ((key, *path) for path in _places(arguments[1], item))
    elif isinstance(value, list | tuple) and isinstance(origin, type) and issubclass(origin, Iterable):
        for number, item in enumerate(value):
            yield from ((number, *path) for path in _places(arguments[0], item))
    else:  # a union, or an annotated type
        for argument in arguments:
            yield from _places(argument, value)


def _with_strange_key(config: Mapping[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    copied: Any = json.loads(json.dumps(config, default=str))
    place = copied
    for key in path:
        place = place[key]
    place[_STRANGE] = 1
    return dict(copied)
