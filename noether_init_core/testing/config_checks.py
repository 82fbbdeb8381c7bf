"""The checks of registration, import and config: round trips, schema, unknown keys, pickling.

The messages are complete without the details that pytest adds and cuts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import importlib.metadata
import json
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
import pytest

from noether_init_core import kinds
from noether_init_core.config.base import KindConfig
from noether_init_core.kinds import contract
from noether_init_core.kinds.hints import normalized
from noether_init_core.kinds.hookspec import CONTRACT_VERSION
from noether_init_core.messages import listed
from noether_init_core.testing.cases import Case, leaf_state
from noether_init_core.testing.checks import Checks, Config, NewCase, seed_generators
from noether_init_core.testing.processes import work_at_import
from noether_init_core.testing.snapshots import differences, said, told

_UNKNOWN = "no_such_key_of_any_config"


class ConfigChecks(Checks):
    """The registration, the import, and the config: round trips, schema, unknown keys, pickling."""

    def test_is_registered_by_its_distribution(self) -> None:
        """One installed distribution provides the kind by an entry point: the one that the author declares."""
        info = kinds.describe(self.kind)
        if self.distribution is None:
            assert info.distribution is None, told(
                f"{self.kind} is provided by {info.source}, and the test class declares no distribution",
                "the kit would look at another class than users get",
                f'distribution = "{info.distribution}"',
            )
            return
        assert info.distribution is not None, told(
            f"{self.kind} is registered in this process only",
            "users cannot use it",
            f'in pyproject.toml:\n[project.entry-points."{kinds.GROUP}"]\n{self.kind} = "{info.target}"',
        )
        assert normalized(info.distribution) == normalized(self.distribution), told(
            f"{self.kind} is provided by {info.source}, not by {self.distribution}",
            "users would get that class",
            "uninstall the other distribution, or choose another name",
        )
        installed = importlib.metadata.version(self.distribution)
        assert info.version == installed, told(
            f"{self.kind} is of version {info.version}, and {self.distribution} {installed} is installed",
            "reports would name the wrong version",
            f"python -m pip install --force-reinstall --no-deps {self.distribution}, or the folder of its project",
        )

    def test_says_the_contract_it_was_written_for(self) -> None:
        """The class itself declares ``contract``, so that later releases of the core know the rules it follows."""
        cls = kinds.resolve(self.kind)
        assert "contract" in vars(cls), told(
            f"{cls.__qualname__} does not declare its contract",
            "a later core could not tell which rules it follows",
            f"contract: ClassVar[int] = {CONTRACT_VERSION}",
        )
        findings = contract.examine(cls)
        assert not findings, told(f"{listed(findings)}", "the core refuses such a class", f"ninit check {self.kind}")

    def test_import_does_no_work(self) -> None:
        """Importing the module writes no file, opens no connection or process, prints nothing and changes nothing."""
        info = kinds.describe(self.kind)
        if info.distribution is None:
            pytest.skip("registered in this process only: another process cannot import it")
        found = work_at_import(info.target.partition(":")[0].strip(), info.distribution)
        assert not found, told(
            f"the import {listed(found)}",
            "a kind is imported for ninit kinds --json and for configs that use others",
            "move it into __init__, check() or a hook",
        )

    def test_config_survives_a_round_trip(self, single_config: Config) -> None:
        """A dumped config, as data and as JSON, validates to an equal config, and dumps to the same data.

        Secrets are left out of JSON, as required.
        """
        config = kinds.validate({"kind": self.kind, **single_config})
        hidden = list(secret_fields(type(config)))
        dumps = [("python", config.model_dump())]
        if not any("." in name for name in hidden):
            secrets = {name: getattr(config, name) for name in hidden}
            dumps.append(("json", json.loads(config.model_dump_json()) | secrets))
        for mode, dumped in dumps:
            again = kinds.validate(dumped)
            first, second = config.model_dump(), again.model_dump()
            other_fields = [f"{name} ({first[name]} -> {second.get(name)})" for name in differences(first, second)]
            is_same = again == config and not other_fields
            assert is_same, told(
                f"dumped as {mode} and validated again, the config has another {listed(other_fields)}",
                "reports store the dump, and launchers send it to other processes",
                "let validators leave alone what they have converted already",
            )

    def test_config_has_a_json_schema(self, single_config: Config) -> None:
        """The config has a JSON schema for editors, with every key of the config and no other."""
        why = "editors complete and check configs with it, and ninit schema shows it"
        try:
            schema = kinds.resolve(self.kind).config_class.model_json_schema()
        except pydantic.PydanticUserError as error:
            raise AssertionError(
                told(f"there is no schema: {error}", why, "leave out fields that only Python can fill; use kwargs")
            ) from error
        missing = sorted({"kind", *single_config} - set(schema["properties"]))
        assert not missing, told(f"not found in the schema: {listed(missing)}", why, "declare them as fields")
        assert schema.get("additionalProperties") is False, told(
            "the schema allows other keys", why, 'model_config = ConfigDict(extra="forbid")'
        )

    def test_every_key_is_described(self) -> None:
        """Every key has a description, which ``ninit schema`` shows to users."""
        cls = kinds.resolve(self.kind).config_class
        bare = [path for path, field in contract.config_fields(cls) if not field.description]
        assert not bare, told(
            f"{listed(bare)} has no description",
            "ninit schema, ninit example and editors show it to users",
            "pydantic.Field(description=...)",
        )

    def test_unknown_keys_are_refused(self, single_config: Config) -> None:
        """A misspelt key is an error at every depth, never ignored."""
        config = {"kind": self.kind, **single_config}
        for path in _models_in(kinds.validate(config), config):
            try:
                kinds.validate(_with_unknown_key(config, path))
            except ValueError:
                continue
            raise AssertionError(
                told(
                    f"an unknown key under {'.'.join(map(str, path)) or 'the config'} was ignored",
                    "a misspelt key would have no effect, without an error",
                    'model_config = ConfigDict(extra="forbid") in that model',
                )
            )

    def test_config_and_initializer_can_be_pickled(
        self, single: Case, single_config: Config, new_case: NewCase
    ) -> None:
        """Launchers send them to other processes: the copy is equal, and initializes to the same values."""
        config = kinds.validate({"kind": self.kind, **single_config})
        initializer = kinds.create(config, path_provider=single.paths)
        why = "launchers send them to other processes"
        try:
            same = pickle.loads(pickle.dumps(config)) == config
            again = pickle.loads(pickle.dumps(initializer))
        except Exception as error:
            change = "define the classes at the top of a module, and keep no open file, lock or lambda in attributes"
            raise AssertionError(told(f"it cannot be pickled: {said(error)}", why, change)) from error
        assert same, told("the copy of the config is not equal to it", why, "keep everything in fields")
        other = new_case("single")
        for one, of in ((initializer, single), (again, other)):
            self.check(one, of)
            seed_generators(0)
            one.init_weights(of.model)
        self.assert_weights(other, {"net": leaf_state(single.model)})


def secret_fields(cls: type[pydantic.BaseModel]) -> Iterator[str]:
    """The secret fields of pydantic models, those of nested models as ``store.token``."""
    for name, field in contract.config_fields(cls):
        if any(one in (pydantic.SecretStr, pydantic.SecretBytes) for one in _types_in(field.annotation)):
            yield name


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _types_in(argument)


def _models_in(value: Any, given: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places in ``given`` that were validated to a pydantic model in ``value``."""
    if isinstance(value, pydantic.BaseModel) and isinstance(given, Mapping):
        # the kit of another kind checks its config
        if path and isinstance(value, KindConfig):
            return
        yield path
        inner = {key: getattr(value, key) for key in given.keys() & type(value).model_fields.keys()}
    elif isinstance(value, Mapping) and isinstance(given, Mapping):
        inner = {key: value[key] for key in given.keys() & value.keys()}
    elif isinstance(value, list | tuple) and isinstance(given, list | tuple):
        inner = dict(enumerate(value[: len(given)]))
    else:
        return
    for key, item in inner.items():
        yield from _models_in(item, given[key], (*path, key))


def _with_unknown_key(config: Mapping[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    copied: Any = json.loads(json.dumps(config, default=str))
    place = copied
    for key in path:
        place = place[key]
    place[_UNKNOWN] = 1
    return dict(copied)
