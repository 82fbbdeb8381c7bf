"""Noether's classes by their own names: parameters, attributes, defaults, and subclasses that were written for them."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import noether_init_core
from noether_init_core import (
    AnyInitializer,
    CheckpointInitializer,
    CheckpointInitializerConfig,
    CheckpointWriter,
    ConfigError,
    FileInitializer,
    InitializerBase,
    InitializerConfig,
    InitializerStack,
    KindConfig,
    PathProvider,
    PreviousRunInitializer,
    PreviousRunInitializerConfig,
    ResumeInitializer,
    ResumeInitializerConfig,
    TrainingIteration,
    bind,
    compose,
    kinds,
)
from noether_init_core.kinds import contract

START = TrainingIteration(epoch=2, update=4, sample=8)
#: Class -> its methods with the parameters that Noether documents.
METHODS: dict[type, dict[str, tuple[str, ...]]] = {
    InitializerBase: {
        "__init__": ("path_provider",),
        "init_weights": ("model",),
        "init_optimizer": ("model",),
        "init_trainer": ("trainer",),
        "init_callbacks": ("callbacks", "model"),
        "start_checkpoint": (),
    },
    CheckpointInitializer: {"__init__": ("initializer_config",), "init_optimizer": ("model",)},
    PreviousRunInitializer: {
        "__init__": ("initializer_config",),
        "init_weights": ("model", "model_name"),
        "init_callbacks": ("callbacks", "model"),
    },
    ResumeInitializer: {
        "__init__": ("initializer_config",),
        "init_weights": ("model",),
        "init_optimizer": ("model",),
        "init_trainer": ("trainer",),
        "init_callbacks": ("callbacks", "model"),
        "start_checkpoint": (),
    },
}
OF_RUN = {
    "kwargs": None,
    "run_id": None,
    "stage_name": None,
    "model_name": None,
    "checkpoint_tag": None,
    "model_info": None,
}
OF_CHECKPOINT = {**OF_RUN, "pop_ckpt_kwargs_keys": None, "output_path": None}
SURGERY = ("keys_to_remove", "patterns_to_remove", "patterns_to_rename", "patterns_to_instantiate")
REQUIRED = object()
#: Config -> its fields with their defaults. ``kind`` is the registered name instead of Noether's import path.
FIELDS: dict[type[KindConfig], dict[str, Any]] = {
    InitializerConfig: {**OF_RUN, "kind": "previous_run"},
    CheckpointInitializerConfig: {**OF_CHECKPOINT, "load_optim": REQUIRED},
    PreviousRunInitializerConfig: {
        **OF_CHECKPOINT,
        "kind": "previous_run",
        "run_id": REQUIRED,
        "load_optim": False,
        **dict.fromkeys(SURGERY),
    },
    ResumeInitializerConfig: {**OF_CHECKPOINT, "kind": "resume", "load_optim": True},
}


def model_of(value: float, name: str = "net") -> Any:
    module = torch.nn.Linear(2, 2)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, value)
    return bind(module, name)


def value_of(model: Any) -> float:
    return float(model.state_dict()["weight"][0, 0])


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    """The folders of a new run, beside the run ``pretrain`` with the models ``net`` (3.0) and ``other`` (5.0)."""
    earlier = PathProvider(tmp_path, "pretrain")
    writer = CheckpointWriter(earlier)
    writer.save(model_of(5, "other"), START, tags=("other",))
    writer.save(model_of(3), START)
    return earlier.with_run("new")


def config_of(**fields: Any) -> PreviousRunInitializerConfig:
    return PreviousRunInitializerConfig(run_id="pretrain", **fields)


@pytest.mark.parametrize(
    ("cls", "name", "parameters"), [(c, n, p) for c, found in METHODS.items() for n, p in found.items()]
)
def test_methods_take_the_arguments_of_noether(cls: type, name: str, parameters: tuple[str, ...]) -> None:
    """By the same names, in the same order; arguments that are ours alone come after them and are optional."""
    found = inspect.signature(getattr(cls, name)).parameters
    if name == "__init__":
        assert set(parameters) | {"path_provider"} <= set(found)
    else:
        assert tuple(found)[1:] == parameters
    assert found["model_name"].default is None if "model_name" in parameters else "model_name" not in found


@pytest.mark.parametrize(
    ("cls", "name", "default"), [(c, n, d) for c, found in FIELDS.items() for n, d in found.items()]
)
def test_configs_have_the_fields_and_defaults_of_noether(cls: type[KindConfig], name: str, default: Any) -> None:
    """Each field is there, required or with its default."""
    field = cls.model_fields[name]
    assert field.is_required() == (default is REQUIRED)
    assert default is REQUIRED or field.default == default


@pytest.mark.parametrize("cls", FIELDS)
def test_unknown_keys_are_refused(cls: Any) -> None:
    """As Noether does."""
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        cls(run_id="pretrain", load_optim=False, unheard_of=1)


def test_every_class_of_noether_stands_at_the_front_and_its_config_makes_it(paths: PathProvider) -> None:
    """The closed union of Noether is AnyInitializer, which takes every registered kind."""
    names = [cls.__name__ for cls in (*METHODS, *FIELDS)]
    assert set(names) | {"AnyInitializer"} <= set(noether_init_core.__all__)
    assert AnyInitializer is noether_init_core.AnyInitializer
    for config, cls in ((config_of(), PreviousRunInitializer), (ResumeInitializerConfig(), ResumeInitializer)):
        assert type(kinds.create(config, path_provider=paths)) is cls
        by_path = f"noether.core.initializers.{cls.__name__}"
        written = {**config.model_dump(exclude_unset=True), "kind": by_path}
        assert type(kinds.create(written, path_provider=paths)) is cls


@pytest.mark.parametrize(
    "create",
    [
        lambda config, paths: PreviousRunInitializer(initializer_config=config, path_provider=paths),
        lambda config, paths: PreviousRunInitializer(config, path_provider=paths),
        lambda config, paths: PreviousRunInitializer(config=config, path_provider=paths),
    ],
)
def test_initializers_are_created_as_in_noether(
    create: Callable[..., PreviousRunInitializer], paths: PathProvider
) -> None:
    """By position, by Noether's name and by ours; what was created loads."""
    model = model_of(0)
    create(config_of(), paths).init_weights(model)
    assert value_of(model) == 3


def test_the_fields_of_the_config_are_attributes(paths: PathProvider) -> None:
    """With the values that Noether's instances have: lists instead of None, iterations instead of mappings."""
    plain = PreviousRunInitializer(initializer_config=config_of(), path_provider=paths)
    assert (plain.run_id, plain.stage_name, plain.model_name, plain.model_info) == ("pretrain", None, None, None)
    assert (plain.load_optim, plain.checkpoint_tag, plain.pop_ckpt_kwargs_keys) == (False, "latest", [])
    assert [getattr(plain, name) for name in SURGERY] == [[], [], [], []]
    assert plain.init_run_path_provider.run_id == "pretrain"
    assert plain.path_provider == paths
    assert isinstance(plain.logger, logging.Logger)
    full = PreviousRunInitializer(
        config_of(
            stage_name="train",
            model_name="net",
            checkpoint_tag={"epoch": 2},
            model_info="ema=0.9",
            load_optim=True,
            pop_ckpt_kwargs_keys=["dim"],
            keys_to_remove=["a"],
            patterns_to_remove=["b"],
            patterns_to_rename=[{"src": "c", "dst": "d"}],
            patterns_to_instantiate=["e"],
        ),
        path_provider=paths,
    )
    assert (full.stage_name, full.model_name, full.model_info) == ("train", "net", "ema=0.9")
    assert (full.load_optim, full.checkpoint_tag) == (True, TrainingIteration(epoch=2))
    assert full.pop_ckpt_kwargs_keys == ["dim"]
    assert [getattr(full, name) for name in SURGERY] == [["a"], ["b"], [{"src": "c", "dst": "d"}], ["e"]]
    resume = ResumeInitializer(initializer_config=ResumeInitializerConfig(model_name="net"), path_provider=paths)
    assert (resume.run_id, resume.model_name, resume.load_optim) == (None, "net", True)


def test_a_subclass_can_change_the_lists_but_not_what_was_looked_up(paths: PathProvider) -> None:
    """A list that is extended after the constructor of the base counts; run_id and the like cannot be assigned."""

    class KeepsBias(PreviousRunInitializer):
        def __init__(self, initializer_config: PreviousRunInitializerConfig, **kwargs: Any) -> None:
            super().__init__(initializer_config=initializer_config, **kwargs)
            self.patterns_to_instantiate.append("bias")
            self.keys_to_remove = [*self.keys_to_remove, "bias"]

    model = model_of(0)
    keeps = KeepsBias(config_of(), path_provider=paths)
    keeps.init_weights(model)
    assert value_of(model) == 3
    assert model.state_dict()["bias"].tolist() == [0, 0]
    for name in ("run_id", "stage_name", "model_name", "model_info", "checkpoint_tag", "load_optim"):
        with pytest.raises(AttributeError, match="no setter"):
            setattr(keeps, name, None)
    both = KeepsBias(config_of(transforms=[{"drop": "bias"}]), path_provider=paths)
    with pytest.raises(ConfigError, match="cannot be combined"):
        both.init_weights(model)


def test_init_weights_with_a_model_name_takes_the_files_of_that_name(paths: PathProvider) -> None:
    """For this call only, whatever the config says; for a composite it is the name of the whole."""
    initializer = PreviousRunInitializer(config_of(checkpoint_tag="other", model_name="net"), path_provider=paths)
    model = model_of(0)
    initializer.init_weights(model, "other")
    assert value_of(model) == 5
    initializer = PreviousRunInitializer(config_of(), path_provider=paths)
    initializer.init_weights(model, model_name=None)
    assert value_of(model) == 3
    assert initializer.model_name is None
    writer = CheckpointWriter(paths.with_run("both"))
    writer.save(compose("saved", {"encoder": model_of(7, "e"), "decoder": None}), START)
    both = compose("renamed", {"encoder": model_of(0, "e"), "decoder": None})
    of_both = PreviousRunInitializerConfig(run_id="both")
    PreviousRunInitializer(of_both, path_provider=paths).init_weights(both, model_name="saved")
    assert value_of(both.submodels["encoder"]) == 7


def test_another_model_name_is_refused_in_a_stack(paths: PathProvider) -> None:
    """Its plan and report would name other files than those that were loaded."""

    class Other(PreviousRunInitializer):
        def init_weights(self, model: Any, model_name: str | None = None) -> None:
            super().init_weights(model, "other")

    model = model_of(0)
    stack = InitializerStack([Other(config_of(), path_provider=paths)])
    with pytest.raises(
        noether_init_core.InitError, match=r"init_weights\(model, 'other'\) cannot be called in a stack"
    ):
        stack.initialize(model)
    assert value_of(model) == 0


def test_lists_that_a_subclass_changes_in_its_hook_count_in_a_stack_too(paths: PathProvider) -> None:
    """It is planned again, instead of loading what the list keeps."""

    class KeepsLate(PreviousRunInitializer):
        def init_weights(self, model: Any, model_name: str | None = None) -> None:
            self.patterns_to_instantiate.append("bias")
            super().init_weights(model)

    model = model_of(0)
    InitializerStack([KeepsLate(config_of(), path_provider=paths)]).initialize(model)
    assert value_of(model) == 3
    assert model.state_dict()["bias"].tolist() == [0, 0]


def test_the_config_of_an_initializer_is_the_one_that_is_called_so(paths: PathProvider) -> None:
    """Of several configs; where no name tells, it is required."""

    class Two(PreviousRunInitializer):
        def __init__(self, path_provider: Any = None, **configs: Any) -> None:
            super().__init__(path_provider)

    fallback = PreviousRunInitializerConfig(run_id="fallback")
    both = Two(fallback=fallback, initializer_config=config_of(), path_provider=paths)
    assert both.run_id == "pretrain"
    with pytest.raises(TypeError, match="needs a PreviousRunInitializerConfig"):
        Two(fallback=fallback, other=config_of(), path_provider=paths)


def test_a_foreign_path_provider_without_a_run_id_is_refused(tmp_path: Path) -> None:
    """It would else be the run called None, which every such program shares."""

    class Foreign:
        output_root, stage_name = tmp_path, None
        run_id: Any = None

    for run_id in (None, 20260219, True):
        Foreign.run_id = run_id
        with pytest.raises(ConfigError, match="run_id"):
            PathProvider.of(Foreign())


class ShiftConfig(KindConfig):
    kind: str = "shift"
    value: float = 1.0


class ByPosition(InitializerBase):
    """As people write it for Noether: only the path provider goes to the base."""

    config_class: ClassVar[type[KindConfig]] = ShiftConfig

    def __init__(self, initializer_config: ShiftConfig, path_provider: Any = None) -> None:
        super().__init__(path_provider)
        self.value = initializer_config.value

    def init_weights(self, model: Any) -> None:
        torch.nn.init.constant_(model.module.weight, self.value)

    def init_optimizer(self, model: Any) -> None:
        """Nothing."""


class ByName(ByPosition):
    def __init__(self, config: ShiftConfig, path_provider: Any) -> None:
        InitializerBase.__init__(self, path_provider=path_provider)
        self.value = config.value


class ByKeywords(ByPosition):
    def __init__(self, initializer_config: ShiftConfig, **kwargs: Any) -> None:
        InitializerBase.__init__(self, **kwargs)
        self.value = initializer_config.value


@pytest.mark.parametrize("cls", [ByPosition, ByName, ByKeywords])
@pytest.mark.parametrize("is_registered", [False, True])
def test_a_subclass_in_noethers_form_has_its_config(
    cls: type[InitializerBase], paths: PathProvider, is_registered: bool
) -> None:
    """Created by hand or by its kind, in a stack or copied: kind, config and path provider are those it was given."""
    kinds.register("shift", cls)
    try:
        config = ShiftConfig(value=4)
        initializer = kinds.create(config, path_provider=paths) if is_registered else cls(config, path_provider=paths)
        assert initializer.config is config
        assert initializer.path_provider == paths
        assert copy.deepcopy(initializer).config == config
        model = model_of(0)
        report = InitializerStack([initializer]).initialize(model)
        assert value_of(model) == 4
        assert [one.kind for one in report.initializers] == ["shift"]
    finally:
        kinds.unregister("shift")


def test_a_subclass_of_a_reading_kind_keeps_its_rules(paths: PathProvider) -> None:
    """With the path provider alone at the base, transforms would else be those of an empty config."""

    class Mine(PreviousRunInitializer):
        def __init__(self, initializer_config: PreviousRunInitializerConfig, path_provider: PathProvider) -> None:
            super().__init__(path_provider)  # type: ignore[arg-type]  # as subclasses of Noether's do

    model = model_of(0)
    Mine(config_of(transforms=[{"keep_model": "bias"}]), path_provider=paths).init_weights(model)
    assert value_of(model) == 3
    assert model.state_dict()["bias"].tolist() == [0, 0]


def test_noethers_own_path_provider_is_told_by_what_it_has(paths: PathProvider) -> None:
    """Any object with its three names, by position too; none of its folders is created."""

    class Foreign:
        output_root, run_id, stage_name, debug = paths.output_root, "new", None, False

        @property
        def checkpoint_path(self) -> Path:
            raise AssertionError("Noether's creates the folder")

    class NoConfig(ByPosition):
        config_class: ClassVar[type[KindConfig]] = KindConfig

        def __init__(self, path_provider: Any) -> None:
            InitializerBase.__init__(self, path_provider)

    initializer = NoConfig(Foreign())
    assert initializer.path_provider == paths
    assert initializer.config.kind.endswith("NoConfig")


#: Without their types, to be called wrongly.
previous_run: Any = PreviousRunInitializer
by_keywords: Any = ByKeywords


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: previous_run({"run_id": "pretrain"}), "must be a PreviousRunInitializerConfig or a path"),
        (lambda: previous_run("pretrain"), "not a str"),
        (lambda: FileInitializer(Path("x")), "must be a FileInitializerConfig"),
        (
            lambda: PreviousRunInitializer(ResumeInitializerConfig()),
            "takes a PreviousRunInitializerConfig, not a Resume",
        ),
        (lambda: PreviousRunInitializer(initializer_config=ShiftConfig()), "takes a PreviousRunInitializerConfig"),
        (lambda: PreviousRunInitializer(path_provider=PathProvider("a", "b")), "needs a PreviousRunInitializerConfig"),
        (lambda: previous_run(PathProvider("a", "b")), "needs a PreviousRunInitializerConfig"),
        (lambda: PreviousRunInitializer(config_of(), initializer_config=config_of()), "two configs"),
        (lambda: by_keywords(PathProvider("a", "b"), config=1), "must be a ShiftConfig or a path provider, not an int"),
        (lambda: FileInitializer(PathProvider("a", "b"), path_provider=PathProvider("a", "b")), "two path providers"),
        (lambda: previous_run(config_of(), PathProvider("a", "b")), "positional argument"),
    ],
)
def test_anything_else_is_a_type_error(create: Callable[[], object], message: str) -> None:
    """Never taken for the config or the path provider without an error."""
    with pytest.raises(TypeError, match=message):
        create()


@pytest.mark.parametrize("name", ["path_provider", "config", "initializer_config"])
def test_kwargs_of_a_config_hold_neither_the_path_provider_nor_the_config(name: str, paths: PathProvider) -> None:
    """They are given already; a config could else replace the run that is started."""
    with pytest.raises(ConfigError, match="the config and path_provider are given already"):
        kinds.create({"kind": "previous_run", "run_id": "pretrain", "kwargs": {name: "x"}}, path_provider=paths)


def test_a_config_whose_kind_is_inherited_makes_no_initializer_of_another_class(paths: PathProvider) -> None:
    """The base's default would create the base's class, without what the subclass does."""

    class MyConfig(PreviousRunInitializerConfig):
        """Of a kind that it does not name."""

    class SaysIt(PreviousRunInitializerConfig):
        kind: str = "previous_run"

    with pytest.raises(ConfigError, match=r"MyConfig inherits its kind, .*Next: MyConfig\(kind=") as raised:
        kinds.create(MyConfig(run_id="pretrain"), path_provider=paths)
    assert "PreviousRunInitializerConfig" in str(raised.value)
    with pytest.raises(ConfigError, match="takes a PreviousRunInitializerConfig"):
        kinds.create(CheckpointInitializerConfig(run_id="pretrain", load_optim=False), path_provider=paths)
    for config in (MyConfig(kind="previous_run", run_id="pretrain"), SaysIt(run_id="pretrain")):
        assert type(kinds.create(config, path_provider=paths)) is PreviousRunInitializer


@pytest.mark.parametrize("options", [{"exclude_unset": True}, {"exclude_defaults": True}, {}])
def test_what_is_dumped_names_its_kind(options: dict[str, Any]) -> None:
    """So that it validates again in a list of any kinds, whatever was left out."""
    config = config_of(keys_to_remove=["a"])
    dumped = config.model_dump(**options)
    assert dumped["kind"] == "previous_run"
    assert kinds.validate(dumped) == config
    assert "kind" not in config.model_dump(include={"run_id"})
    assert "kind" not in config.model_dump(exclude={"kind"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("self, model, model_name=None", ""),
        ("self, model, *, strict=True", ""),
        ("self, model, initialiser=None", "init_weights takes initialiser=None, which would never be filled"),
        ("self, model=None", "init_weights takes model=None; model must be a plain argument"),
        ("self, model, trainer=None", "init_weights takes trainer=None, which would never be filled"),
        ("self, module", "init_weights takes module, which would never be filled"),
    ],
)
def test_a_hook_may_have_optional_arguments_of_its_own(arguments: str, message: str) -> None:
    """They keep their default, as in Noether; one with the name of a hook's argument, or near it, is a mistake."""
    names: dict[str, Any] = {"Base": InitializerBase}
    hooks = f"    def init_weights({arguments}): pass\n    def init_optimizer(self, model): pass\n"
    exec(f"class Kind(Base):\n{hooks}", names)
    found = "; ".join(finding.message for finding in contract.examine(names["Kind"]))
    assert (message in found) if message else found == ""
