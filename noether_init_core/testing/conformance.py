"""InitializerConformance: every check of the kit, for one kind. No check depends on a particular kind."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic
import pytest
import torch

from noether_init_core import kinds
from noether_init_core.config.base import KindConfig
from noether_init_core.errors import ConfigError, InitError, PartlyInitializedError
from noether_init_core.iteration import TrainingIteration
from noether_init_core.kinds import contract
from noether_init_core.kinds.hints import normalized
from noether_init_core.kinds.hookspec import CONTRACT_VERSION
from noether_init_core.stack.stack import InitializerStack
from noether_init_core.testing.cases import Case, Wrong, leaf_state
from noether_init_core.testing.checks import Checks, Config, NewCase, WeightChecks
from noether_init_core.testing.processes import work_at_import
from noether_init_core.testing.snapshots import (
    differences,
    open_files,
    state_of_files,
    state_of_optimizer,
    state_of_process,
    unchanged,
)

_UNKNOWN = "no_such_key_of_any_config"


class ConfigChecks(Checks):
    """Checks of the registration, the import, and the config: round trips, schema, unknown keys, pickling."""

    def test_is_registered_by_its_distribution(self) -> None:
        """One installed distribution provides the kind by an entry point: the one that the author declares."""
        info = kinds.describe(self.kind)
        if self.distribution is None:
            assert info.distribution is None, f"{self.kind} is provided by {info.source}. Next: distribution = ..."
            return
        assert info.distribution is not None, (
            f"{self.kind} is registered in this process only, so that users cannot use it. Next, in pyproject.toml:\n"
            f'[project.entry-points."{kinds.GROUP}"]\n{self.kind} = "{info.target}"'
        )
        assert normalized(info.distribution) == normalized(self.distribution), f"provided by {info.source}"
        assert info.version == importlib.metadata.version(self.distribution)

    def test_says_the_contract_it_was_written_for(self) -> None:
        """The class itself declares ``contract``, so that later releases of the core know the rules it follows."""
        cls = kinds.resolve(self.kind)
        assert "contract" in vars(cls), (
            f"{cls.__qualname__} does not declare its contract. Next: contract: ClassVar[int] = {CONTRACT_VERSION}"
        )
        assert not contract.examine(cls)

    def test_import_does_no_work(self) -> None:
        """Importing the module writes no file, opens no connection or process, prints nothing and changes nothing."""
        info = kinds.describe(self.kind)
        if info.distribution is None:
            pytest.skip("registered in this process only: another process cannot import it")
        assert work_at_import(info.target.partition(":")[0].strip(), info.distribution) == []

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
            assert again == config, f"validated again from {mode}: {again!r}, not {config!r}"
            assert again.model_dump() == config.model_dump()

    def test_config_has_a_json_schema(self, single_config: Config) -> None:
        """The config has a JSON schema for editors, with every key of the config and no other."""
        schema = kinds.resolve(self.kind).config_class.model_json_schema()
        keys = {"kind", *single_config}
        missing = sorted(keys - set(schema["properties"]))
        assert not missing, f"not found in the schema: {missing}"
        assert schema.get("additionalProperties") is False, "the schema allows other keys"

    def test_every_key_is_described(self) -> None:
        """Every key has a description, which ``ninit schema`` shows to users."""
        cls = kinds.resolve(self.kind).config_class
        bare = [path for path, field in contract.config_fields(cls) if not field.description]
        assert not bare, f"pydantic.Field(description=...) not found for {', '.join(bare)}"

    def test_unknown_keys_are_refused(self, single_config: Config) -> None:
        """A misspelt key is an error at every depth, never ignored."""
        config = {"kind": self.kind, **single_config}
        for path in _models_in(kinds.validate(config), config):
            with pytest.raises(ValueError):
                kinds.validate(_with_unknown_key(config, path))
                pytest.fail(f"an unknown key under {'.'.join(map(str, path)) or 'the config'} was ignored")

    def test_config_and_initializer_can_be_pickled(
        self, single: Case, single_config: Config, new_case: NewCase
    ) -> None:
        """Launchers send them to other processes: the copy is equal, and initializes to the same values."""
        config = kinds.validate({"kind": self.kind, **single_config})
        assert pickle.loads(pickle.dumps(config)) == config
        initializer = kinds.create(config, path_provider=single.paths)
        again = pickle.loads(pickle.dumps(initializer))
        other = new_case("single")
        for one, of in ((initializer, single), (again, other)):
            one.check(of.model, of.trainer, of.callbacks)
            one.init_weights(of.model)
        self.assert_weights(other, {"net": leaf_state(single.model)})


class StateChecks(Checks):
    """Checks that everything is refused before the first change, of the start, and of state besides weights."""

    def test_check_finds_wrong_configs(self, new_case: NewCase, wrong_configs: Sequence[Wrong]) -> None:
        """Each wrong config raises in ``check`` or before it, and nothing has changed."""
        if not self.can_be_wrong.is_open:
            assert not wrong_configs, (
                f"can_be_wrong is closed ({self.can_be_wrong.reason}), but wrong_configs is not empty"
            )
            return
        assert wrong_configs, (
            "wrong_configs is empty. Next: return configs that only files or the model show to be wrong, or declare "
            'can_be_wrong = closed("why")'
        )
        for wrong in wrong_configs:
            case = new_case("single")
            with (
                unchanged(partial(self.everything, case), f"{wrong.what}: check() raised after it had"),
                pytest.raises(Exception),  # noqa: B017 - the next check looks at the class
            ):
                self.one(case, wrong.config).check(case.model, case.trainer, case.callbacks)
                pytest.fail(f"{wrong.what}: check() did not raise")

    def test_errors_are_of_the_right_classes(self, new_case: NewCase, wrong_configs: Sequence[Wrong]) -> None:
        """A user error raises an ``InitError`` of the declared class, with the declared message."""
        for wrong in wrong_configs:
            with pytest.raises(Exception) as caught:
                self.initialize(new_case("single"), wrong.config)
                pytest.fail(f"{wrong.what}: nothing was raised")
            error: BaseException = caught.value
            if isinstance(error, PartlyInitializedError) and error.__cause__ is not None:
                error = error.__cause__  # another check refuses that it comes too late
            assert isinstance(error, InitError), (
                f"{wrong.what}: {type(error).__name__}: {error}: derive it from InitError (ConfigError, "
                "CheckpointNotFoundError, ...), so that callers can tell it from a bug"
            )
            assert isinstance(error, wrong.error), f"{wrong.what}: {error!r} is not a {wrong.error.__name__}"
            assert wrong.message in str(error), f"{wrong.what}: {wrong.message!r} not found in the message: {error}"

    def test_check_changes_nothing(self, single: Case, single_config: Config) -> None:
        """``check`` changes nothing, and may be called twice."""
        initializer = self.one(single, single_config)
        with unchanged(lambda: self.everything(single), "check()"):
            for _time in range(2):
                initializer.check(single.model, single.trainer, single.callbacks)

    def test_start_iteration(self, single: Case, single_config: Config) -> None:
        """The start is zero, or the iteration of the source, as the author declares."""
        start = self.initialize(single, single_config).start
        right = single.source.iteration if self.continues.is_open else TrainingIteration.zero()
        assert start == right, f"training starts at {start}, not at {right}"

    def test_start_is_the_same_when_asked_again(self, single: Case, single_config: Config) -> None:
        """``start_checkpoint`` may be called before ``initialize``, and more than once."""
        initializer = self.one(single, single_config)
        first, again = initializer.start_checkpoint(), initializer.start_checkpoint()
        assert first == again, f"first {first}, then {again}"

    def test_path_provider(self, single: Case, single_config: Config) -> None:
        """Without a path provider, a kind that needs one raises, and another kind works."""
        config = {"kind": self.kind, **single_config}
        if not self.needs_path_provider.is_open:
            InitializerStack.from_config([config]).initialize(single.model)
            return
        with pytest.raises(ConfigError, match="path_provider"):
            InitializerStack.from_config([config]).initialize(single.model)
            pytest.fail("without a path_provider nothing was raised")

    def test_optimizer(self, single: Case, single_config: Config) -> None:
        """The optimizer gets the state of the source if the kind restores it; else it is not changed."""
        optimizer = single.model.optimizer
        if not self.restores_optimizer.is_open:
            with unchanged(lambda: state_of_optimizer("net", optimizer), "restores_optimizer is closed, but the kind"):
                self.initialize(single, single_config)
            return
        self.initialize(single, single_config)
        rates = [group["lr"] for group in single.source.optimizer["net"]["param_groups"]]
        assert [group["lr"] for group in optimizer.param_groups] == rates, "the learning rates are not the source's"
        wanted = {
            f"optimizer of net: {index} {name}": value
            for index, values in single.source.optimizer["net"]["state"].items()
            for name, value in values.items()
        }
        assert wanted
        after = state_of_optimizer("net", optimizer)
        wrong = differences(wanted, {name: value for name, value in after.items() if name in wanted})
        assert not wrong, f"not the source's: {', '.join(wrong[:5])}"

    def test_trainer(self, single: Case, single_config: Config) -> None:
        """The trainer gets the number of the source if the kind restores trainers; else it keeps its own."""
        own = single.trainer.number
        self.initialize(single, single_config)
        assert single.trainer.number == (single.source.number if self.restores_trainer.is_open else own)

    def test_callbacks(self, single: Case, single_config: Config) -> None:
        """The callback gets the number of the source if the kind restores callbacks; else it keeps its own."""
        own = single.callbacks[0].number
        self.initialize(single, single_config)
        assert single.callbacks[0].number == (single.source.number if self.restores_callbacks.is_open else own)

    def test_process_is_left_as_it_was(self, single: Case, single_config: Config) -> None:
        """Generators, default dtype, threads, working folder, environment, import path and logging do not change."""
        kinds.resolve(self.kind)  # another check covers the import
        # leave the state that a fixed seed gives: a kind that seeds a generator must be seen to change it
        torch.rand(()), np.random.random(), random.random()
        with unchanged(state_of_process, "the kind", "Next: use a torch.Generator of your own, and context managers"):
            self.initialize(single, single_config)

    def test_disk_is_left_as_it_was(
        self, single: Case, single_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No checkpoint changes or disappears, and no file is created, in the runs and in the working folder."""
        here = tmp_path / "working folder of this check"
        here.mkdir()
        monkeypatch.chdir(here)
        folders = single.source.paths.output_root, single.source.file.parent, here
        with unchanged(lambda: state_of_files(*folders), "the kind"):
            self.initialize(single, single_config)

    def test_files_are_closed(self, single: Case, single_config: Config) -> None:
        """After the initialization no file of the source is open: a long training would run out of descriptors."""
        folders = single.source.paths.output_root, single.source.file.parent
        if open_files(*folders) is None:
            pytest.skip("this system does not list open files")
        stack = self.make(single, single_config)
        stack.initialize(single.model, trainer=single.trainer, callbacks=single.callbacks)
        left = open_files(*folders)
        assert not left, f"still open: {', '.join(left or ())}. Next: close them in release()"

    def test_secrets_are_not_told(
        self,
        single: Case,
        single_config: Config,
        secrets: Sequence[str],
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """No secret occurs in a report, a representation, a dump, the log or on the terminal."""
        hidden = list(secret_fields(kinds.resolve(self.kind).config_class))
        assert secrets or not hidden, (
            f"{', '.join(hidden)} is secret. Next: a fixture secrets, which returns the secret texts"
        )
        with caplog.at_level(logging.DEBUG):
            stack = self.make(single, single_config)
            report = stack.initialize(single.model, trainer=single.trainer, callbacks=single.callbacks)
        config = stack.initializers[0].config
        printed = capfd.readouterr()
        outputs = {
            "the report": f"{report}{report.to_json()}{report.provenance()}",
            "the config": f"{config!r}{config}{config.model_dump_json()}",
            "the initializer": repr(stack.initializers[0]),
            "the log": caplog.text,
            "the terminal": printed.out + printed.err,
        }
        for secret in secrets:
            places = [place for place, text in outputs.items() if secret in text]
            assert not places, (
                f"a secret occurs in {' and '.join(places)}. Next: use pydantic.SecretStr, and leave it out"
            )


class InitializerConformance(ConfigChecks, WeightChecks, StateChecks):
    """The conformance kit: derive a test class from it, and pytest runs every check on your kind.

    ::

        class TestNewestFile(InitializerConformance):
            kind = "newest_file"
            distribution = "noether-init-newest"
            composites = nested = closed("one file holds one model")

            @pytest.fixture
            def make_config(self):
                return lambda case: {"folder": str(case.source.file.parent)}

            @pytest.fixture
            def wrong_configs(self, tmp_path):
                return [Wrong("an empty folder", {"folder": str(tmp_path)}, CheckpointNotFoundError)]

    Class attributes declare what the kind can do: ``open_()`` or ``closed("why")``; ``Checks`` lists them. For a closed
    answer the kit checks that the kind refuses, or does not change what it does not restore; only ``ranks`` is skipped.
    The expected values are those of ``case.source``, unless a fixture ``expected`` returns others.

    A base class for several test classes declares ``__test__ = False``. ``expected_failures`` names checks that fail at
    present, each with the reason; they are strict.
    """

    #: Pytest collects derived classes only.
    __test__: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        if "__test__" in vars(cls):  # a base class of several test classes sets it to False, and may be incomplete
            return
        cls.__test__ = True
        for name in ("kind", "distribution"):
            if not hasattr(cls, name):
                raise TypeError(f'{cls.__name__} does not declare {name} = "..."')
        checks = {name for name in dir(cls) if name.startswith("test_")}
        for name in cls.expected_failures.keys() - checks:
            raise TypeError(f"{cls.__name__}.expected_failures names {name}, which is not a check of the kit")


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
