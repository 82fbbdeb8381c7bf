"""What a message of a stack advises is done here, in the situation that prints it, and leads on."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from support.advice import digests, executes, pasted
from support.command import run_command
from support.following import advised, refusal

from noether_init_core import (
    CheckpointWriter,
    InitializerBase,
    InitializerStack,
    KindConfig,
    PathProvider,
    TrainerState,
    TrainingIteration,
    bind,
    compose,
    hookimpl,
    kinds,
)
from noether_init_core.builtin.previous_run import PreviousRunInitializer, PreviousRunInitializerConfig

FIRST = TrainingIteration(1, 7, 70)


def net(classes: int = 2) -> torch.nn.Module:
    torch.manual_seed(classes)
    return torch.nn.Linear(3, classes)


def bound(module: torch.nn.Module | None = None, name: str = "net") -> Any:
    module = net() if module is None else module
    return bind(module, name, torch.optim.AdamW(module.parameters()))


class Stateful:
    """A trainer or callback whose state is one number."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state.get("value", self.value)


def save(paths: PathProvider, iteration: TrainingIteration = FIRST, trainer: Any = None, name: str = "net") -> Any:
    model = bound(name=name)
    model(torch.ones(1, 3)).sum().backward()
    model.optimizer.step()
    CheckpointWriter(paths).save(model, iteration, trainer=Stateful(7) if trainer is None else trainer)
    return model


@pytest.fixture
def run(tmp_path: Path) -> PathProvider:
    """A run with one set at update 7."""
    paths = PathProvider(tmp_path / "runs", "source")
    save(paths)
    return paths


class Filling(InitializerBase):
    """Fills every parameter with one."""

    contract: ClassVar[int] = 1

    def init_weights(self, model: Any) -> None:
        for parameter in model.parameters():
            parameter.data.fill_(1.0)

    def init_optimizer(self, model: Any) -> None:
        """There is no state."""


CONFIG = KindConfig(kind="filling")


@pytest.fixture(autouse=True)
def filling() -> Iterator[None]:
    """The kind, registered for one test."""
    kinds.register("filling", Filling)
    yield
    kinds.unregister("filling")


def bias(stack: InitializerStack) -> float:
    model = bound()
    stack.initialize(model)
    return float(model.state_dict()["bias"][0])


@executes("stack/members.py", "InitializerStack.from_config([...]) for configs")
@executes("stack/stack.py", "InitializerStack.from_config(config)")
@pytest.mark.parametrize("given", [{"kind": "filling"}, [{"kind": "filling"}], [CONFIG], "filling"])
def test_configs_are_given_to_the_advised_function(given: Any) -> None:
    """A mapping, a list of configs; a text is told what a config is."""
    said = advised(lambda: InitializerStack(given)).removesuffix(" for configs")
    config = given if isinstance(given, dict | str) else [*given]
    scope = {"InitializerStack": InitializerStack, "config": config}

    def call() -> float:
        return bias(eval(said.replace("[...]", "config"), scope))

    if not isinstance(given, list):
        # another problem is named: neither a text nor a mapping of one entry is a config
        problem = advised(call)
        assert problem.startswith(("a list, []", "initializers: [{kind: filling, ...}]"))
        scope["config"] = {"initializers": [{"kind": "filling"}]}
    assert call() == 1.0


@executes("stack/members.py", "a second instance", "def init_weights(self, model): ...")
@executes("stack/members.py", "mark it with hookimpl(wrapper=True) and yield")
def test_members_that_are_refused_are_written_as_advised() -> None:
    """One that is given twice, one that loads nothing, and an observer that is not a wrapper."""
    one = Filling(CONFIG)
    assert advised(lambda: InitializerStack([one, one])) == "a second instance"
    assert bias(InitializerStack([one, Filling(CONFIG)])) == 1.0

    class Empty(InitializerBase):
        contract: ClassVar[int] = 1

        def init_optimizer(self, model: Any) -> None:
            """There is no state."""

    line = advised(lambda: InitializerStack([Empty(CONFIG)]))
    scope: dict[str, Any] = {}
    exec(line.replace("...", "model.module.bias.data.fill_(4.0)"), scope)
    mended = type("Mended", (Empty,), {"init_weights": scope["init_weights"], "contract": 1})
    assert bias(InitializerStack([mended(CONFIG)])) == 4.0

    class Plain:
        @hookimpl
        def init_weights(self) -> None:
            """Would replace an initializer."""

    said = advised(lambda: InitializerStack([one], observers=[Plain()]))
    mark = eval(said.removeprefix("mark it with ").removesuffix(" and yield"), {"hookimpl": hookimpl})

    def around(self: Any) -> Iterator[None]:
        return (yield)

    wrapper = type("Wrapper", (), {"init_weights": mark(around)})
    assert bias(InitializerStack([one], observers=[wrapper()])) == 1.0


@executes("stack/members.py", "ninit check {}")
@pytest.mark.parametrize("form", ["async", "generator", "context manager"])
def test_a_hook_that_did_nothing_is_looked_at_by_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """It runs the static part of the checks, and says where the tests of the kit are; a plain method is used."""

    async def fill(self: Any, model: Any) -> None:
        """Never runs."""

    def parts(self: Any, model: Any) -> Iterator[None]:
        yield

    inner = {"async": fill, "generator": parts, "context manager": contextlib.contextmanager(parts)}[form]
    hidden = type("Hidden", (Filling,), {"init_weights": lambda self, model: inner(self, model), "contract": 1})
    kinds.register("filling", hidden)
    stack = InitializerStack.from_config([{"kind": "filling"}])
    command = re.search(r"Next: (ninit check \w+)", refusal(lambda: bias(stack)))
    assert command is not None
    shown = run_command(monkeypatch, capsys, *shlex.split(command[1])[1:])
    assert shown.code in (0, 1)
    assert "filling" in shown.out
    kinds.register("filling", Filling)
    assert bias(InitializerStack.from_config([{"kind": "filling"}])) == 1.0


@executes("stack/config_files.py", "Next: a list, [] for a start from scratch; InitializerStack.from_file(path, ...)")
@pytest.mark.parametrize("given", [3, "run.yaml", None, b"kind: file"])
def test_what_is_no_config_is_given_as_advised(tmp_path: Path, given: Any) -> None:
    """A list, or the file by the other function."""
    said = advised(lambda: InitializerStack.from_config(given))
    first, _, second = said.partition(" for a start from scratch; ")
    assert first == "a list, []"
    InitializerStack.from_config(eval(first.partition(", ")[2])).initialize(bound())
    (tmp_path / "run.yaml").write_text("initializers: [{kind: filling}]\n")
    call = second.removesuffix(" for a file").replace("(path, ...)", "(path)")
    scope = {"InitializerStack": InitializerStack, "path": tmp_path / "run.yaml"}
    assert bias(eval(call, scope)) == 1.0


@executes("stack/config_files.py", "for another run or set, an initializer of kind resume in place of auto_resume")
@pytest.mark.parametrize(("key", "value"), [("checkpoint_tag", "E1_U7_S70"), ("run_id", "source")])
def test_another_set_is_resumed_by_an_initializer(tmp_path: Path, run: PathProvider, key: str, value: str) -> None:
    """In place of auto_resume, with the key that is not allowed there."""
    save(run, TrainingIteration(2, 9, 90))
    before = digests(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(f"auto_resume: {{{key}: {value}}}\ninitializers: []\n")
    said = advised(lambda: InitializerStack.from_file(config, path_provider=run))
    kind = re.search(r"an initializer of kind (\w+) in place of (\w+)", said)
    assert kind is not None
    document = yaml.safe_load(config.read_text())
    document["initializers"] = [{"kind": kind[1], **document.pop(kind[2])}]
    config.write_text(yaml.safe_dump(document))
    stack = InitializerStack.from_file(config, path_provider=run)
    report = stack.initialize(bound(), trainer=Stateful())
    assert report.start == (FIRST if key == "checkpoint_tag" else TrainingIteration(2, 9, 90))
    config.unlink()
    assert digests(tmp_path) == before


@executes("stack/config_files.py", "Next: for one start, an initializer of kind resume in place of auto_resume")
@pytest.mark.parametrize(
    "restore",
    [
        {"iteration": "zero", "data": "skip"},
        {"schedule": "skip"},
        {"schedule": {"steps": 3}},
        {"schedules": {"warmup": "skip"}},
        {"schedules": {"warmup": {"steps": 3}}},
    ],
)
def test_what_counts_anew_is_for_one_start(run: PathProvider, restore: dict[str, Any]) -> None:
    """At every restart of a run it would set the run back. Other pieces are the same each time."""
    said = advised(lambda: InitializerStack.from_config({"auto_resume": {"restore": restore}}, path_provider=run))
    kind = re.search(r"an initializer of kind (\w+) in place of auto_resume", said)
    assert kind is not None
    InitializerStack.from_config([{"kind": kind[1], "restore": restore}], path_provider=run)
    again = {"auto_resume": {"restore": {"schedule": "config", "data": "skip"}}, "initializers": []}
    InitializerStack.from_config(again, path_provider=run)


@executes("stack/stack.py", "Next: a fixed run_id")
def test_auto_resume_with_a_fixed_run_id(tmp_path: Path) -> None:
    """The first start finds no set, a later one finds it."""
    generated = "2026-02-19_abcde"
    paths = PathProvider(tmp_path, generated, run_id_is_generated=True)
    said = advised(lambda: InitializerStack.from_config({"auto_resume": True, "initializers": []}, path_provider=paths))
    assert said == "a fixed run_id"
    for start in (TrainingIteration.zero(), FIRST):
        paths = PathProvider(tmp_path, "mine")
        stack = InitializerStack.from_config({"auto_resume": True, "initializers": []}, path_provider=paths)
        assert stack.initialize(bound(), trainer=Stateful()).start == start
        save(paths)


@executes("stack/stack.py", "call start_checkpoint() again, and start there")
@pytest.mark.parametrize("same_iteration", [False, True])
def test_a_start_that_changed_is_asked_for_again(run: PathProvider, same_iteration: bool) -> None:
    """After a failure another set may be the newest; that of the second answer is used."""
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=run)
    stack.start_checkpoint()
    with pytest.raises(Exception, match="Nothing was changed"):
        stack.initialize(bound(net(5)), trainer=Stateful())
    later = FIRST if same_iteration else TrainingIteration(2, 9, 90)
    save(run, later)
    said = advised(lambda: stack.initialize(bound(), trainer=Stateful()))
    function = re.fullmatch(r"call (\w+)\(\) again, and start there", said)
    assert function is not None
    start = getattr(stack, function[1])()
    assert stack.initialize(bound(), trainer=Stateful()).start == start == later


@executes("stack/stack.py", "build the model again before you try again")
def test_a_model_that_was_partly_initialized_is_built_again(run: PathProvider) -> None:
    """The same stack initializes the new one."""

    class Failing(Stateful):
        fails = True

        def restore_rng(self) -> None:
            if self.fails:
                raise RuntimeError("no such device")

    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=run)
    model, trainer = bound(), Failing(1)
    said = advised(lambda: stack.initialize(model, trainer=trainer))
    assert said == "build the model again before you try again"
    assert trainer.value == 1
    Failing.fails = False
    assert stack.initialize(bound(), trainer=trainer).start == FIRST
    assert trainer.value == 7


@executes("stack/stack.py", "call the stack before or after initialize(); for delegates, call their hooks")
def test_a_stack_that_is_called_from_a_hook_is_called_afterwards() -> None:
    """And a delegate by its hook."""

    class Calling(Filling):
        contract: ClassVar[int] = 1
        call: ClassVar[Any] = None

        def init_weights(self, model: Any) -> None:
            type(self).call(model)

    inner = Filling(CONFIG)
    stack = InitializerStack([Calling(CONFIG)])
    Calling.call = lambda model: stack.plan(model)
    said = advised(lambda: bias(stack)).partition("Done before")[0]
    assert "build the model" in said
    told = refusal(lambda: bias(stack))
    assert "Next: call the stack before or after initialize(); for delegates, call their hooks" in told
    stack.plan(bound())
    Calling.call = inner.init_weights
    assert bias(stack) == 1.0
    stack.plan(bound())


@executes("builtin/previous_run.py", "model_name: {} in the config")
def test_a_model_of_another_name_is_named_in_the_config(run: PathProvider) -> None:
    """A kind that passes it to the hook is refused in a stack."""

    class Named(PreviousRunInitializer):
        contract: ClassVar[int] = 1

        def init_weights(self, model: Any, model_name: str | None = None) -> None:
            super().init_weights(model, self.config.model_name or "net")

    config: dict[str, Any] = {"kind": "previous_run", "run_id": "source"}
    stack = InitializerStack(
        [
            Named(
                PreviousRunInitializerConfig(
                    **config,
                ),
                path_provider=run,
            )
        ]
    )
    said = refusal(lambda: stack.initialize(bound()))
    line = re.search(r"Next: (model_name: \w+) in the config", said)
    assert line is not None
    config |= yaml.safe_load(line[1])
    before = digests(run.checkpoint_path)
    InitializerStack.from_config([config], path_provider=run).initialize(bound())
    assert digests(run.checkpoint_path) == before


@executes("builtin/previous_run.py", "write it as a rule under transforms")
def test_surgery_of_a_subclass_is_written_as_a_rule(run: PathProvider) -> None:
    """The entry that the field removed is dropped by the rule, and kept in the model."""

    class Removing(PreviousRunInitializer):
        contract: ClassVar[int] = 1

        @property
        def keys_to_remove(self) -> list[str]:  # as a subclass may fill it
            return ["bias"]

    rules: list[dict[str, str]] = [{"keep_model": "bias"}]
    config: dict[str, Any] = {"kind": "previous_run", "run_id": "source", "transforms": rules}
    stack = InitializerStack([Removing(PreviousRunInitializerConfig(**config), path_provider=run)])
    assert advised(lambda: stack.initialize(bound())) == "write it as a rule under transforms"
    config["transforms"] = [*rules, {"drop": "bias"}]
    model = bound()
    kept = model.state_dict()["bias"].clone()
    InitializerStack.from_config([config], path_provider=run).initialize(model)
    assert torch.equal(model.state_dict()["bias"], kept)


@executes("builtin/resume.py", "stack.initialize(..., callbacks=[...])", "Next: %s, if that is right")
@executes("builtin/resume.py", "stack.initialize(model, trainer=state); for weights alone: kind: previous_run")
@executes("builtin/resume.py", "trainer=TrainerState(...), or give it state_dict and load_state_dict")
def test_a_resume_that_lacks_an_object_is_given_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The callbacks, the trainer, a trainer with state, and the name of the model."""

    class Saving(Stateful):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "callback_state_dicts": {"ema": {"value": 3}}}

    class Callback(Stateful):
        checkpoint_key = "ema"

    paths = PathProvider(tmp_path, "saving")
    save(paths, trainer=Saving(7))
    config: dict[str, Any] = {"kind": "resume"}
    stack = InitializerStack.from_config([config], path_provider=paths)
    (said,) = stack.initialize(bound(), trainer=Stateful()).initializers[0].not_restored
    assert "Next: stack.initialize(..., callbacks=[...]), unless" in said
    callback = Callback()
    report = stack.initialize(bound(), trainer=Stateful(), callbacks=[callback])
    assert report.initializers[0].not_restored == ()
    assert callback.value == 3

    stack.initialize(bound(name="other"), trainer=Stateful(), callbacks=[])
    line = re.search(r"Next: (model_name: \w+) \(in initializers\.0\), if that is right", caplog.text)
    assert line is not None
    caplog.clear()
    named = InitializerStack.from_config([{**config, **yaml.safe_load(line[1])}], path_provider=paths)
    named.initialize(bound(name="other"), trainer=Stateful(), callbacks=[])
    assert "if that is right" not in caplog.text

    first, _, second = advised(lambda: stack.initialize(bound(), trainer=object())).partition(", or ")
    assert (first, second) == ("trainer=TrainerState(...)", "give it state_dict and load_state_dict")
    stack.initialize(bound(), trainer=Stateful())
    paths = PathProvider(tmp_path, "state")
    save(paths, TrainingIteration.zero(), TrainerState(seed=0))
    stack = InitializerStack.from_config([config], path_provider=paths)
    assert stack.initialize(bound(), trainer=TrainerState(seed=0)).start is not None
    told = refusal(lambda: stack.initialize(bound()))
    call = re.search(r"Next: (stack\.initialize\(model, trainer=state\)); for weights alone: (kind: \w+)", told)
    assert call is not None
    eval(call[1], {"stack": stack, "model": bound(), "state": TrainerState(seed=0)})
    weights = InitializerStack.from_config([{**yaml.safe_load(call[2]), "run_id": "state"}], path_provider=paths)
    weights.initialize(bound())


@executes("builtin/resume.py", "to resume it anyway, kind: resume with run_id: {}; otherwise a run_id of its own")
@pytest.mark.parametrize("way", ["anyway", "otherwise"])
def test_the_set_of_another_run_is_resumed_by_its_id(tmp_path: Path, run: PathProvider, way: str) -> None:
    """Or a run id of its own starts anew."""
    copied = PathProvider(tmp_path / "runs", "copied")
    Path(tmp_path / "runs" / "source").rename(copied.checkpoint_path.parent)
    before = digests(tmp_path)
    auto: dict[str, Any] = {"auto_resume": True, "initializers": []}
    said = refusal(
        lambda: InitializerStack.from_config(auto, path_provider=copied).initialize(bound(), trainer=Stateful())
    )
    line = re.search(
        r"Next: to resume it anyway, (kind: resume) with (run_id: \w+); otherwise a run_id of its own", said
    )
    assert line is not None, said
    if way == "anyway":
        entry = yaml.safe_load(line[1]) | yaml.safe_load(line[2])
        stack = InitializerStack.from_config([entry], path_provider=copied)
        assert stack.initialize(bound(), trainer=Stateful()).start == FIRST
    else:
        stack = InitializerStack.from_config(auto, path_provider=PathProvider(tmp_path / "runs", "own"))
        assert stack.initialize(bound(), trainer=Stateful()).start == TrainingIteration.zero()
    assert digests(tmp_path) == before


@executes("initializers/callbacks.py", "TMPDIR=... with a folder that can be written")
def test_a_folder_for_links_is_set_as_advised(
    tmp_path: Path, run: PathProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback that resumes from files is shown them there."""

    class Resuming(Stateful):
        shown: Any = None

        def resume_from_checkpoint(self, resumption_paths: Any, model: Any) -> None:
            self.shown = resumption_paths

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=run)
    said = advised(lambda: stack.initialize(bound(), trainer=Stateful(), callbacks=[Resuming()]))
    variable = said.partition("=...")[0]
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(variable, str(tmp_path))
    callback = Resuming()
    stack.initialize(bound(), trainer=Stateful(), callbacks=[callback])
    assert callback.shown is not None
    assert tempfile.gettempdir() == os.environ[variable]


@executes("initializers/optimizer.py", "bind(module, optimizer=...), or {}")
@executes("initializers/optimizer.py", "init_weights first, as InitializerStack.initialize does")
def test_optimizer_state_without_an_optimizer_or_memory(run: PathProvider) -> None:
    """Both ways on; called by hand, the hooks have an order."""
    config: dict[str, Any] = {"kind": "previous_run", "run_id": "source", "load_optim": True}
    stack = InitializerStack.from_config([config], path_provider=run)
    first, _, second = advised(lambda: stack.initialize(bind(net(), "net"))).partition(", or ")
    module = net()
    call = first.replace("optimizer=...", "'net', optimizer=torch.optim.AdamW(module.parameters())")
    model = eval(call, {"bind": bind, "torch": torch, "module": module})
    stack.initialize(model)
    assert model.optimizer.state
    InitializerStack.from_config([config | yaml.safe_load(second)], path_provider=run).initialize(bind(net(), "net"))

    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    initializer = kinds.create(config, path_provider=run)
    said = advised(lambda: initializer.init_optimizer(bound(module)))
    getattr(initializer, said.partition(" first")[0])(model := bound(module))
    initializer.init_optimizer(bound(model.module))
    assert not module.weight.is_meta


@executes("initializers/source.py", "submodel: {}, or another of them")
def test_a_file_for_one_model_names_the_submodel(tmp_path: Path) -> None:
    """With the path that the message lists; nothing on disk changes."""
    torch.save(net().state_dict(), tmp_path / "w.pt")
    config = tmp_path / "run.yaml"
    config.write_text(f"initializers: [{{kind: file, path: {tmp_path}/w.pt}}]\n")
    before = digests(tmp_path)
    model = compose("pair", {"first": bound(), "second": bound()})
    line = advised(lambda: InitializerStack.from_file(config).initialize(model)).partition(", or another of them")[0]
    pasted(config, line, "initializers.0")
    InitializerStack.from_file(config).initialize(model)
    assert digests(tmp_path)["w.pt"] == before["w.pt"]
