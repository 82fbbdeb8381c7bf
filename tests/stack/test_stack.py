"""The stack: order, observers, one start, and all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from noether_init_core import (
    CheckpointCorruptError,
    CheckpointWriter,
    ConfigError,
    InitializerBase,
    InitializerStack,
    KindConfig,
    PartlyInitializedError,
    PathProvider,
    PlanError,
    StartConflictError,
    StateMismatchError,
    TrainingIteration,
    bind,
    compose,
    hookimpl,
    kinds,
)

CALLS: list[str] = []


class RecorderConfig(KindConfig):
    """Says what the recording kind does."""

    start: int = 0
    fail_in: str = ""


class Recorder(InitializerBase):
    """Records its calls; fails where its config says."""

    config_class: ClassVar[type[KindConfig]] = RecorderConfig
    contract: ClassVar[int] = 1
    config: RecorderConfig

    def _called(self, name: str) -> None:
        CALLS.append(f"{name} {self.config.start}")
        if self.config.fail_in == name:
            raise RuntimeError(f"{name} of the plugin failed")

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        self._called("check")

    def start_checkpoint(self) -> TrainingIteration:
        return TrainingIteration(0, self.config.start, 0)

    def init_trainer(self, trainer: Any) -> None:
        self._called("init_trainer")

    def init_weights(self, model: Any) -> None:
        self._called("init_weights")

    def init_optimizer(self, model: Any) -> None:
        self._called("init_optimizer")

    def init_callbacks(self, callbacks: list[Any], model: Any) -> None:
        self._called("init_callbacks")


@pytest.fixture(autouse=True)
def recorder() -> Iterator[None]:
    """The recording kind, registered for one test."""
    CALLS.clear()
    kinds.register("recorder", Recorder)
    yield
    kinds.unregister("recorder")


class Stateful:
    """A trainer or callback whose state is one number."""

    def __init__(self, value: int = 0, *, fails: bool = False) -> None:
        self.value = value
        self.fails = fails

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict.get("value", -1)
        if self.fails:
            self.fails = False
            raise RuntimeError("the trainer cannot load this")


def net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def bound(module: torch.nn.Module, *, optimizer: bool = True) -> Any:
    return bind(module, name="net", optimizer=torch.optim.AdamW(module.parameters()) if optimizer else None)


def trained_step(model: Any) -> None:
    (model.module(torch.randn(8, 3)) ** 2).sum().backward()
    model.optimizer.step()
    model.optimizer.zero_grad()


def state_of(model: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"weights": {k: v.clone() for k, v in model.state_dict().items()}}
    if model.optimizer is not None:
        state["optimizer"] = copy.deepcopy(model.optimizer.state_dict())
    return state


def same(first: Any, other: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, other)
    if isinstance(first, dict):
        return first.keys() == other.keys() and all(same(first[key], other[key]) for key in first)
    return bool(first == other)


@pytest.fixture
def run(tmp_path: Path) -> PathProvider:
    """A run with one set at update 7."""
    paths = PathProvider(tmp_path, "source")
    model = bound(net(seed=3))
    trained_step(model)
    CheckpointWriter(paths).save(model, TrainingIteration(1, 7, 70), trainer=Stateful(7))
    return paths


def test_hooks_run_hook_by_hook_in_declared_order() -> None:
    """Every check comes before any hook; each hook goes through all initializers before the next one begins."""
    configs: list[dict[str, Any]] = [{"kind": "recorder"}, {"kind": "recorder", "start": 5}]
    report = InitializerStack.from_config(configs).initialize(bound(net()), trainer=Stateful(), callbacks=[])
    hooks = ["check", "init_trainer", "init_weights", "init_optimizer", "init_callbacks"]
    assert [f"{hook} {start}" for hook in hooks for start in (0, 5)] == CALLS
    assert report.start == TrainingIteration(0, 5, 0)
    assert [entry.start for entry in report.initializers] == [None, "E0_U5_S0"]


def test_initializers_of_a_model_are_not_given_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a config of Noether they are for weights and optimizer: they check neither trainer nor callbacks."""
    given: list[tuple[int, bool, bool]] = []

    def check(self: Recorder, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        given.append((self.config.start, trainer is not None, callbacks is not None))

    monkeypatch.setattr(Recorder, "check", check)
    config = {
        "model": {"name": "net", "initializers": [{"kind": "recorder"}]},
        "trainer": {"initializer": {"kind": "recorder", "start": 5}},
    }
    InitializerStack.from_config(config).initialize(bound(net()), trainer=Stateful(), callbacks=[])
    assert given == [(0, False, False), (5, True, True)]
    assert [call for call in CALLS if "trainer" in call or "callbacks" in call] == [
        "init_trainer 5",
        "init_callbacks 5",
    ]


def test_without_trainer_and_callbacks_their_hooks_are_not_called() -> None:
    """What is not there is not initialized."""
    InitializerStack.from_config([{"kind": "recorder"}]).initialize(bound(net()))
    assert CALLS == ["check 0", "init_weights 0", "init_optimizer 0"]


def test_two_that_continue_a_run_are_refused() -> None:
    """Training cannot start at two iterations."""
    stack = InitializerStack.from_config([{"kind": "recorder", "start": 1}, {"kind": "recorder", "start": 2}])
    with pytest.raises(StartConflictError) as caught:
        stack.initialize(bound(net()))
    assert caught.value.starts == {"0: recorder": "E0_U1_S0", "1: recorder": "E0_U2_S0"}
    assert CALLS == []


def test_observers_wrap_each_initializer_by_itself() -> None:
    """A wrapper sees one initializer at a time, and its result."""
    seen: list[tuple[str, int, list[Any]]] = []

    class Observer:
        @hookimpl(wrapper=True)
        def init_weights(self, model: Any, initializer: Any) -> Any:
            seen.append(("before", initializer.config.start, []))
            result = yield
            seen.append(("after", initializer.config.start, result))
            return result

    configs = [{"kind": "recorder", "start": 0}, {"kind": "recorder", "start": 3}]
    InitializerStack.from_config(configs, observers=[Observer()]).initialize(bound(net()))
    assert seen == [("before", 0, []), ("after", 0, []), ("before", 3, []), ("after", 3, [])]


class Forgetful:
    """Observers that return nothing, and one that hides errors."""

    @hookimpl(wrapper=True)
    def start_checkpoint(self, initializer: Any) -> Any:
        yield

    @hookimpl(wrapper=True)
    def init_weights(self, model: Any, initializer: Any) -> Any:
        try:
            yield
        except RuntimeError:
            return None


def test_observers_change_neither_the_start_nor_a_failure() -> None:
    """What an initializer returned or raised counts, whatever a wrapper makes of it."""
    stack = InitializerStack.from_config([{"kind": "recorder", "start": 5}], observers=[Forgetful()])
    assert stack.start_checkpoint() == TrainingIteration(0, 5, 0)
    failing = InitializerStack.from_config([{"kind": "recorder", "fail_in": "init_weights"}], observers=[Forgetful()])
    with pytest.raises(PartlyInitializedError, match="init_weights of the plugin failed"):
        failing.initialize(bound(net()))


def test_what_is_no_wrapper_no_initializer_or_there_twice_is_refused() -> None:
    """Each with what it is and what to do."""

    class Plain:
        @hookimpl
        def start_checkpoint(self) -> TrainingIteration:
            return TrainingIteration(9, 9, 9)

    with pytest.raises(ConfigError, match="start_checkpoint of the observer Plain is not a wrapper"):
        InitializerStack.from_config([{"kind": "recorder"}], observers=[Plain()])
    with pytest.raises(ConfigError, match=r"initializers\.0 is a dict, not an initializer"):
        InitializerStack([{"kind": "recorder"}])  # type: ignore[list-item]
    initializer = Recorder(RecorderConfig(kind="recorder"))
    with pytest.raises(ConfigError, match="in the stack twice"):
        InitializerStack([initializer, initializer])


def test_an_interrupt_puts_states_back_and_goes_on() -> None:
    """Ctrl-C in the middle leaves trainer and callbacks as they were."""

    class Interrupted(Recorder):
        contract: ClassVar[int] = 1

        def init_weights(self, model: Any) -> None:
            raise KeyboardInterrupt

    class Loader(Recorder):
        contract: ClassVar[int] = 1

        def init_trainer(self, trainer: Any) -> None:
            trainer.load_state_dict({"value": 40})

    config = RecorderConfig(kind="recorder")
    trainer = Stateful(3)
    with pytest.raises(KeyboardInterrupt):
        InitializerStack([Loader(config), Interrupted(config)]).initialize(bound(net()), trainer=trainer)
    assert trainer.value == 3


def test_a_trainer_whose_generators_cannot_be_restored_is_put_back() -> None:
    """``restore_rng`` is the last step, and its failure is told as one."""

    class Trainer(Stateful):
        def restore_rng(self) -> None:
            raise RuntimeError("no such device")

    with pytest.raises(PartlyInitializedError, match="no such device") as caught:
        InitializerStack.from_config([{"kind": "recorder"}]).initialize(bound(net()), trainer=Trainer(1))
    assert caught.value.failed == "restore_rng of the trainer"


def test_a_state_that_cannot_be_taken_stops_before_anything_changes() -> None:
    """Without the state from before nothing could be put back."""

    class Trainer(Stateful):
        def state_dict(self) -> dict[str, Any]:
            raise ValueError("in the middle of a batch")

    with pytest.raises(StateMismatchError, match="in the middle of a batch"):
        InitializerStack.from_config([{"kind": "recorder"}]).initialize(bound(net()), trainer=Trainer(1))
    assert CALLS == ["check 0"]


def test_stacks_do_not_share_plugins() -> None:
    """Another stack's initializers are not called."""
    first = InitializerStack.from_config([{"kind": "recorder", "start": 1}])
    InitializerStack.from_config([{"kind": "recorder", "start": 2}])
    first.initialize(bound(net()))
    assert {call.split()[1] for call in CALLS} == {"1"}


def test_a_failing_check_changes_nothing(run: PathProvider) -> None:
    """The second initializer's problem is found before the first one writes."""
    model = bound(net())
    trainer = Stateful(1)
    before = state_of(model)
    configs = [{"kind": "previous_run", "run_id": "source"}, {"kind": "recorder", "fail_in": "check"}]
    with pytest.raises(RuntimeError, match="check of the plugin failed"):
        InitializerStack.from_config(configs, path_provider=run.with_run("new")).initialize(model, trainer=trainer)
    assert same(state_of(model), before)
    assert trainer.value == 1


@pytest.mark.parametrize("change", ["weights", "optimizer", "trainer"])
def test_resume_finds_problems_of_every_part_before_anything_changes(run: PathProvider, change: str) -> None:
    """A model, an optimizer or a trainer that does not fit is refused while everything is as it was."""
    other = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
    module: Any = other if change == "weights" else net()
    model = bound(module)
    trainer: Any = Stateful(1)
    if change == "optimizer":
        groups: list[dict[str, Any]] = [{"params": list(module[number].parameters())} for number in (0, 2, 1)]
        groups[-1]["lr"] = 1.0
        two = torch.optim.AdamW(groups)
        model = bind(module, name="net", optimizer=two)
        two.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    if change == "trainer":
        trainer = object()
    before = state_of(model)
    wanted = {"weights": PlanError, "optimizer": StateMismatchError, "trainer": StateMismatchError}[change]
    with pytest.raises(wanted):
        InitializerStack.from_config([{"kind": "resume"}], path_provider=run).initialize(model, trainer=trainer)
    assert same(state_of(model), before)


def test_user_code_that_fails_later_leaves_trainer_and_callbacks_as_they_were(run: PathProvider) -> None:
    """States are put back, and the error lists what is done, failed and pending."""
    model = bound(net())
    trainer, callback = Stateful(1), Stateful(2)
    configs = [{"kind": "resume"}, {"kind": "recorder", "fail_in": "init_optimizer"}]
    stack = InitializerStack.from_config(configs, path_provider=run)
    with pytest.raises(PartlyInitializedError) as caught:
        stack.initialize(model, trainer=trainer, callbacks=[callback])
    assert (trainer.value, callback.value) == (1, 2)
    assert caught.value.failed == "init_optimizer of recorder"
    assert caught.value.done == (
        "init_trainer of resume",
        "init_trainer of recorder",
        "init_weights of resume",
        "init_weights of recorder",
        "init_optimizer of resume",
    )
    assert caught.value.pending == ("init_callbacks of resume", "init_callbacks of recorder")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_trainer_that_fails_is_put_back_before_weights_change(run: PathProvider) -> None:
    """The trainer comes first, so the model is untouched when its load_state_dict raises."""
    model = bound(net())
    trainer = Stateful(1, fails=True)
    before = state_of(model)
    with pytest.raises(PartlyInitializedError, match="the trainer cannot load this"):
        InitializerStack.from_config([{"kind": "resume"}], path_provider=run).initialize(model, trainer=trainer)
    assert trainer.value == 1
    assert same(state_of(model), before)


def test_resume_restores_everything_in_place(run: PathProvider) -> None:
    """Parameters keep their identity; weights, buffers, moments, trainer and start are those of the set."""
    source = bound(net(seed=3))
    torch.manual_seed(3)
    model = bound(net(seed=8))
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    trainer = Stateful()
    report = InitializerStack.from_config([{"kind": "resume"}], path_provider=run).initialize(model, trainer=trainer)
    assert report.start == TrainingIteration(1, 7, 70)
    assert trainer.value == 7
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert model.optimizer.state[model.module[0].weight]["step"].item() == 1
    assert not same(source.state_dict()["0.weight"], model.state_dict()["0.weight"])
    assert report.initializers[0].origins == (("net", "source @ latest = E1_U7_S70", "net_cp=E1_U7_S70_model.th"),)


def test_submodels_in_a_stack(run: PathProvider) -> None:
    """``submodel`` names the part of a composite that a file is for; an unknown one is told what exists."""
    target, other = net(seed=1), net(seed=2)
    model = compose("pair", {"left": bind(target, name="l"), "right": bind(other, name="r"), "none": None})
    config = {"kind": "previous_run", "run_id": "source", "model_name": "net", "submodel": "left"}
    untouched = {name: value.clone() for name, value in other.state_dict().items()}
    InitializerStack.from_config([config], path_provider=run.with_run("new")).initialize(model)
    assert same(dict(other.state_dict()), untouched)
    assert target[1].num_batches_tracked.item() == 1
    with pytest.raises(ConfigError, match="submodel 'middle' not found in pair; found: left, right"):
        InitializerStack.from_config([{**config, "submodel": "middle"}], path_provider=run.with_run("n")).plan(model)


def test_nan_in_a_checkpoint_is_refused_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    """NaN anywhere and infinities in parameters are found before anything changes; buffers may hold infinities."""
    paths = PathProvider(tmp_path, "source")
    broken = net()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
        broken[1].running_mean[0] = float("inf")
    CheckpointWriter(paths).save(bound(broken), TrainingIteration(0, 1, 8))
    model = bound(net(seed=5))
    before = state_of(model)
    config = {"kind": "previous_run", "run_id": "source"}
    with pytest.raises(PlanError, match=r"0\.weight holds NaN") as caught:
        InitializerStack.from_config([config], path_provider=paths.with_run("new")).initialize(model)
    assert len(caught.value.problems) == 1
    assert same(state_of(model), before)
    config["on_nonfinite"] = "warn"
    InitializerStack.from_config([config], path_provider=paths.with_run("new")).initialize(model)
    assert torch.isnan(model.state_dict()["0.weight"][0, 0])
    assert torch.isinf(model.state_dict()["1.running_mean"][0])


def test_a_plain_module_is_told_to_be_bound(run: PathProvider) -> None:
    """The likeliest mistake of a plain loop gets its next step."""
    with pytest.raises(ConfigError, match="Next: bind"):
        InitializerStack.from_config([{"kind": "resume"}], path_provider=run).initialize(net())


def test_optimizer_state_can_follow_a_warm_start(run: PathProvider) -> None:
    """``previous_run`` with ``load_optim`` brings the moments, and none for entries that the model keeps."""
    model = bound(net(seed=9))
    config = {"kind": "previous_run", "run_id": "source", "load_optim": True, "patterns_to_instantiate": ["2."]}
    InitializerStack.from_config([config], path_provider=run.with_run("new")).initialize(model)
    assert model.optimizer.state[model.module[0].weight]["step"].item() == 1
    assert model.module[2].weight not in model.optimizer.state


def test_auto_resume_takes_the_newest_set_or_the_list(run: PathProvider) -> None:
    """A run with checkpoints resumes, one without applies its initializers; the report says which and why."""
    config = {"auto_resume": True, "initializers": [{"kind": "previous_run", "run_id": "source"}]}
    fresh = InitializerStack.from_config(config, path_provider=run.with_run("other")).initialize(bound(net()))
    assert fresh.start.is_zero
    assert fresh.auto_resume == "auto_resume: other has no checkpoints, the initializers of the config apply"
    again = InitializerStack.from_config(config, path_provider=run).initialize(bound(net()))
    assert again.start == TrainingIteration(1, 7, 70)
    assert again.auto_resume == "auto_resume: resumed from E1_U7_S70"
    generated = PathProvider.generate(run.output_root)
    with pytest.raises(ConfigError, match="Next: a fixed run_id"):
        InitializerStack.from_config(config, path_provider=generated)


def test_auto_resume_of_a_broken_newest_set_is_an_error(run: PathProvider) -> None:
    """Never silently a fresh start: a set that is there but cannot be read stops the run."""
    CheckpointWriter(run).save(bound(net()), TrainingIteration(2, 9, 90), trainer=Stateful(9))
    newest = sorted((run.checkpoint_path / "sets").iterdir())[-1]
    for file in newest.glob("*_model.th"):
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-30])
    model = bound(net())
    before = state_of(model)
    with pytest.raises(CheckpointCorruptError, match=r"_model\.th"):
        InitializerStack.from_config({"auto_resume": True}, path_provider=run).initialize(model)
    assert same(state_of(model), before)


def test_each_initialization_of_a_stack_has_a_report_of_its_own(run: PathProvider) -> None:
    """What an earlier one restored is not said again, least of all where there is nothing to restore into."""
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=run)
    for _ in range(2):
        report = stack.initialize(bound(net()), trainer=Stateful())
        assert report.initializers[0].restored == ("trainer", "optimizer of net")
    report = stack.initialize(bound(net(), optimizer=False), trainer=Stateful())
    assert report.initializers[0].restored == ("trainer",)
    assert "optimizer of net" not in str(report)


def save_later(run: PathProvider, update: int) -> None:
    """As another process would, while this one is about to start."""
    CheckpointWriter(run).save(bound(net(seed=update)), TrainingIteration(1, update, 10 * update), trainer=Stateful())


@pytest.mark.parametrize("config", [{}, {"on_invalid": "previous"}, {"checkpoint_tag": "E1"}])
def test_the_start_that_was_told_is_the_one_that_is_used(run: PathProvider, config: dict[str, Any]) -> None:
    """Though another process saves in between, and a plan and suggestions are made and their files are closed."""
    stack = InitializerStack.from_config([{"kind": "resume", **config}], path_provider=run)
    told = stack.start_checkpoint()
    save_later(run, 9)
    plan = stack.plan(bound(net()))
    assert plan.origins[0].description.endswith("= E1_U7_S70")
    assert [path for _, path, _ in stack.suggest(bound(net()))] == ["net"]
    assert stack.start_checkpoint() == told
    model, trainer = bound(net()), Stateful()
    report = stack.initialize(model, trainer=trainer)
    assert report.start == told == TrainingIteration(1, 7, 70)
    assert str(report.initializers[0].resumed_set).endswith("00000001_E1_U7_S70")
    assert trainer.value == 7
    # what was told once is said and done: the next start is that of the newest set
    assert stack.initialize(bound(net()), trainer=Stateful()).start == TrainingIteration(1, 9, 90)


def test_plan_after_a_told_start_keeps_no_file_open(run: PathProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was selected is kept."""
    from noether_init_core.files.opening import FileCheckpoint

    closed: list[Path] = []
    close = FileCheckpoint.close

    def closing(self: FileCheckpoint) -> None:
        closed.append(self.path)
        close(self)

    monkeypatch.setattr(FileCheckpoint, "close", closing)
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=run)
    stack.start_checkpoint()
    closed.clear()
    stack.plan(bound(net()))
    assert [path.name for path in closed] == ["net_cp=E1_U7_S70_model.th", "net_cp=E1_U7_S70_optim.th"]


def test_plan_without_a_told_start_is_that_of_what_is_there(run: PathProvider) -> None:
    """Nobody relies on a start yet."""
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=run)
    stack.plan(bound(net()))
    save_later(run, 9)
    assert stack.plan(bound(net())).origins[0].description.endswith("= E1_U9_S90")
    assert stack.start_checkpoint() == TrainingIteration(1, 9, 90)


def test_start_that_is_another_one_after_a_failure_is_refused(run: PathProvider) -> None:
    """A loop that counts from the start that it was told would skip or repeat steps; asked again, it is told."""
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=run)
    stack.start_checkpoint()
    with pytest.raises(PlanError):
        stack.initialize(bound(torch.nn.Sequential(torch.nn.Linear(5, 4))), trainer=Stateful())
    save_later(run, 9)
    model = bound(net())
    before = state_of(model)
    with pytest.raises(StartConflictError, match=r"returned E1_U7_S70, but the start is now E1_U9_S90") as caught:
        stack.initialize(model, trainer=Stateful())
    assert caught.value.starts == {"returned": "E1_U7_S70", "now": "E1_U9_S90"}
    assert same(state_of(model), before)
    assert stack.start_checkpoint() == stack.initialize(model, trainer=Stateful()).start == TrainingIteration(1, 9, 90)


def test_an_optimizer_whose_state_is_empty_is_not_called_restored(tmp_path: Path) -> None:
    """Plain SGD has a learning rate, and that is all that is taken."""
    paths = PathProvider(tmp_path, "source")
    source, target = net(), net(1)
    CheckpointWriter(paths).save(
        bind(source, name="net", optimizer=torch.optim.SGD(source.parameters(), lr=0.25)), TrainingIteration(1, 7, 70)
    )
    optimizer = torch.optim.SGD(target.parameters(), lr=0.5)
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    report = stack.initialize(bind(target, name="net", optimizer=optimizer))
    assert report.initializers[0].restored == ("settings of the optimizer of net, which has no state",)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_states_of_callbacks_that_nobody_was_there_to_take_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log and in the report; an average that starts anew is easily overlooked otherwise."""

    class Saving(Stateful):
        def state_dict(self) -> dict[str, Any]:
            return {"callback_state_dicts": {"ema": {"step": 3}, "best": {"loss": 0.5}, "plain": None}}

    paths = PathProvider(tmp_path, "source")
    CheckpointWriter(paths).save(bound(net()), TrainingIteration(1, 7, 70), trainer=Saving())
    stack = InitializerStack.from_config([{"kind": "resume"}], path_provider=paths)
    report = stack.initialize(bound(net()), trainer=Stateful())
    (said,) = report.initializers[0].not_restored
    assert said.startswith("the trainer file of latest has states of callbacks ema, best; none were given. Next: ")
    assert f"  not restored: {said}" in str(report).splitlines()
    assert f"resume: {said}" in [record.message for record in caplog.records if record.levelname == "WARNING"]
    report = stack.initialize(bound(net()), trainer=Stateful(), callbacks=[])
    assert report.initializers[0].not_restored == ()
    assert "states of callbacks that this run has not: ema, best" in caplog.text


def test_a_hook_that_only_looks_like_one_is_an_error_and_no_success(run: PathProvider) -> None:
    """Behind a decorator, async methods and generators are plain functions that do nothing."""

    async def fill(self: Any, model: Any) -> None:
        """Never runs."""

    def wrapped(self: Any, model: Any) -> Any:
        return fill(self, model)

    hidden = type("Hidden", (Recorder,), {"init_weights": wrapped, "contract": 1})
    stack = InitializerStack([hidden(RecorderConfig(kind="recorder"))])
    with pytest.raises(PartlyInitializedError, match="returned a coroutine, so that nothing was done"):
        stack.initialize(bound(net()))


def test_a_kind_with_a_name_of_ours_does_not_hide_its_own_error() -> None:
    """Letting go of it fails; what is told is why it failed."""

    class Odd(Recorder):
        stopwatch: Any = None

        def __init__(self, config: KindConfig, *, path_provider: Any = None) -> None:
            super().__init__(config, path_provider=path_provider)
            self.stopwatch = None

        def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
            raise ConfigError("the real error")

    with pytest.raises(ConfigError, match="the real error"):
        InitializerStack([Odd(RecorderConfig(kind="recorder"))]).initialize(bound(net()))


def test_an_observer_with_a_misspelt_hook_is_told_which_hooks_there_are() -> None:
    """An error of ours, which callers can catch."""

    class Watch:
        @hookimpl(wrapper=True)
        def init_weigths(self) -> Iterator[None]:
            return (yield)

    with pytest.raises(ConfigError, match=r"Watch cannot be called: .*The hooks are start_checkpoint, init_trainer"):
        InitializerStack([], observers=[Watch()])
