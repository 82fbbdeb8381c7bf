"""The observer ``probe``: a model that was loaded is held to what it computed when it was saved."""

from __future__ import annotations

import logging
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from support.advice import digests, executes
from support.command import run_command
from support.damage import flip_tensor_bit, rewrite

from noether_init_core import (
    CheckpointCorruptError,
    CheckpointWriter,
    InitializerBase,
    InitializerStack,
    InitReport,
    KindConfig,
    PartlyInitializedError,
    PathProvider,
    ProbeMismatchError,
    TrainerState,
    TrainingIteration,
    bind,
    compose,
    kinds,
)
from noether_init_core.observers.probe import ProbeObserver

BATCH = torch.linspace(-1, 1, 32).reshape(4, 8)
LOGGER = "noether_init_core.observers.probe"


class Net(torch.nn.Module):
    """Two square layers that can be taken for each other, dropout, and running statistics."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = torch.tanh, head: int = 3) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.drop = torch.nn.Dropout(0.5)
        self.second = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, head)
        self.activation = activation

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.second(self.drop(self.activation(self.norm(self.first(inputs)))))
        return {"hidden": hidden, "logits": self.head(hidden)}


def net(seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    module = Net(**options)
    return bind(module, "net", torch.optim.AdamW(module.parameters()))


def step(model: Any) -> None:
    model(torch.randn(6, 8))["logits"].square().sum().backward()
    model.optimizer.step()
    model.optimizer.zero_grad()


def at(epoch: int) -> TrainingIteration:
    return TrainingIteration(epoch, epoch, epoch)


@pytest.fixture
def run(tmp_path: Path) -> PathProvider:
    """A run with one set, which has a probe."""
    paths = PathProvider(tmp_path, "source")
    model = net(0)
    step(model)
    CheckpointWriter(paths).save(model, at(1), probe=BATCH)
    return paths


def start(paths: PathProvider, model: Any, *configs: dict[str, Any], **arguments: Any) -> InitReport:
    config = {"observers": ["probe"], "initializers": [{"run_id": "source", **one} for one in configs]}
    return InitializerStack.from_config(config, path_provider=paths.with_run("new")).initialize(model, **arguments)


def said(report: InitReport, number: int = 0) -> str:
    """What the report says of the probe."""
    (found,) = [text for text in report.initializers[number].restored if text.startswith("probe: ")]
    return found.removeprefix("probe: ")


WARM: dict[str, Any] = {"kind": "previous_run"}
RESUME: dict[str, Any] = {"kind": "resume"}


@pytest.mark.parametrize("config", [WARM, RESUME, {**WARM, "verify": "none"}, {**WARM, "load_optim": True}])
def test_the_same_weights_make_the_same_bits(run: PathProvider, config: dict[str, Any]) -> None:
    """Switched on by name, told in the report."""
    report = start(run, net(1), config)
    assert said(report) == "same bits"
    assert "probe: same bits" in str(report)


def test_a_model_on_the_meta_device_is_compared_when_it_has_weights(run: PathProvider) -> None:
    """By then it has memory."""
    with torch.device("meta"):
        module = Net()
    assert said(start(run, bind(module, "net"), WARM)) == "same bits"


EXCHANGED = {"transforms": [{"from": "first.", "to": "second."}, {"from": "second.", "to": "first."}]}


def test_two_square_layers_that_are_exchanged_are_caught(run: PathProvider) -> None:
    """Every check of names, shapes, bytes and values is content; the output is not."""
    model = net(1)
    stack = InitializerStack.from_config([{**WARM, "run_id": "source", **EXCHANGED}], path_provider=run)
    assert stack.plan(model).problems == ()
    with pytest.raises(
        PartlyInitializedError, match="init_optimizer of previous_run failed: net computes other outputs"
    ) as caught:
        start(run, model, {**WARM, **EXCHANGED})
    error = caught.value.__cause__
    assert isinstance(error, ProbeMismatchError)
    assert error.path is not None
    assert error.path.name == "00000001_E1_U1_S1"
    assert error.output in ("output.hidden", "output.logits")
    assert error.difference is not None
    assert error.difference > 0.1
    assert (error.expected["shape"], error.expected["dtype"]) == (error.found["shape"], "float32")
    assert error.expected["digest"] != error.found["digest"]
    assert "ninit plan" in str(error)
    assert "leave out the observer probe" in str(error)


def test_the_trainer_is_put_back(run: PathProvider) -> None:
    """As after any failure behind the first change."""
    CheckpointWriter(run).save(net(0), trainer=TrainerState(seed=1), probe=BATCH)
    trainer = TrainerState(seed=1)
    trainer.advance(samples=4)
    with pytest.raises(PartlyInitializedError, match="States of trainer and callbacks were restored"):
        start(run, net(1), {**RESUME, **EXCHANGED, "load_optim": False}, trainer=trainer)
    assert str(trainer.iteration) == "E0_U1_S4"


@executes(
    "observers/probe.py", "Next: check renames and transforms with ninit plan, and changes of the code or settings"
)
@pytest.mark.parametrize("way", ["renames and transforms", "changes of the code", "leave out the observer"])
def test_a_mismatch_is_mended_as_advised(
    run: PathProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    """The plan shows the rules; without them, with the old code, or without the observer, the start is well."""
    before = digests(tmp_path)
    if way == "renames and transforms":
        with pytest.raises(PartlyInitializedError) as caught:
            start(run, net(1), {**WARM, **EXCHANGED})
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
        config = {"observers": ["probe"], "initializers": [{**WARM, "run_id": "source", **EXCHANGED}]}
        Path("init.yaml").write_text(yaml.safe_dump(config))
        command = re.search(r"with (ninit plan),", str(caught.value))
        assert command is not None
        arguments = [*command[1].split()[1:], "init.yaml", "--model", "test_probe_observer:plain", "--runs", "."]
        shown = run_command(monkeypatch, capsys, *arguments)
        assert shown.code == 0, shown.err
        assert re.search(r"rename +first\.\* .*<- second\.\* +init\.yaml:\d", shown.out), shown.out
        Path("init.yaml").unlink()
        assert said(start(run, net(1), WARM)) == "same bits"
    else:
        changed = net(1, activation=torch.relu)
        with pytest.raises(PartlyInitializedError) as caught:
            start(run, changed, WARM)
        if way == "changes of the code":
            assert said(start(run, net(1, activation=torch.tanh), WARM)) == "same bits"
        else:
            config = {"initializers": [{**WARM, "run_id": "source"}]}
            InitializerStack.from_config(config, path_provider=run.with_run("new")).initialize(changed)
            CheckpointWriter(run.with_run("again")).save(changed, at(1), probe=BATCH)
            assert said(start(run, net(2, activation=torch.relu), {**WARM, "run_id": "again"})) == "same bits"
    assert way in str(caught.value)
    assert before.items() <= digests(tmp_path).items()


def plain() -> Any:
    """What ``ninit plan`` builds."""
    return net(1)


def test_code_that_computes_otherwise_is_caught(run: PathProvider) -> None:
    """No weight is wrong, but another activation is the default by now."""
    with pytest.raises(PartlyInitializedError) as caught:
        start(run, net(1, activation=torch.relu), WARM)
    assert isinstance(caught.value.__cause__, ProbeMismatchError)


def test_a_model_that_cannot_be_run_any_more_is_caught(run: PathProvider) -> None:
    """Its own error is the cause."""

    def fail(inputs: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("not any more")

    with pytest.raises(PartlyInitializedError) as caught:
        start(run, net(1, activation=fail), WARM)
    error = caught.value.__cause__
    assert isinstance(error, ProbeMismatchError)
    assert "net cannot be run on the probe: ZeroDivisionError: not any more" in str(error)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_renames_and_steps_that_move_everything_right_are_the_same_bits(run: PathProvider) -> None:
    """A transpose there and back, a rename to other names."""

    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Net()

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.body(inputs)

    rules = [{"from": "first.weight", "to": "body.first.weight", "do": ["transpose", "transpose"]}]
    rules += [{"from": "<name>.<leaf>", "to": "body.<name>.<leaf>"}]
    assert said(start(run, bind(Renamed(), "net"), {**WARM, "transforms": rules})) == "same bits"


@pytest.mark.parametrize(
    ("config", "head", "reason"),
    [
        ({"transforms": [{"keep_model": "first."}]}, 3, "2 of 11 entries of the model did not come completely"),
        (
            {"transforms": [{"drop": "head."}], "on_missing": "reset"},
            3,
            "2 of 11 entries of the model did not come completely",
        ),
        ({"on_mismatch": "slice"}, 2, "2 of 11 entries of the model did not come completely from the set"),
        ({"on_mismatch": "pad"}, 4, "2 of 11 entries of the model did not come completely from the set"),
    ],
    ids=["kept", "reset", "sliced", "padded"],
)
def test_a_difference_that_is_to_be_expected_is_told_and_not_raised(
    run: PathProvider, config: dict[str, Any], head: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the number of entries, in the report and in the log."""
    caplog.set_level(logging.INFO, LOGGER)
    text = said(start(run, net(1, head=head), {**WARM, **config}))
    assert text.startswith("output.")
    assert f", which is expected: {reason}" in text
    assert sum(text in record.message for record in caplog.records if record.name == LOGGER) == 1


def test_entries_of_the_set_that_went_nowhere_are_a_reason(run: PathProvider) -> None:
    """Whoever leaves out a head gets no other one."""

    class Headless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden": self.second(self.first(inputs))}

    text = said(start(run, bind(Headless(), "net"), {**WARM, "on_unexpected": "ignore"}))
    assert text.startswith("output.")
    assert text.endswith("which is expected: 7 entries of the set were not loaded")


def test_what_a_later_initializer_loads_is_a_reason(run: PathProvider, tmp_path: Path) -> None:
    """The probe is about what one set alone makes of a model."""
    torch.save(torch.nn.Linear(8, 3).state_dict(), tmp_path / "head.pt")
    file = {"kind": "file", "path": str(tmp_path / "head.pt"), "target_root": "head."}
    config = {"observers": ["probe"], "initializers": [{**WARM, "run_id": "source"}, file]}
    report = InitializerStack.from_config(config, path_provider=run).initialize(net(1))
    assert "output.logits differs by" in said(report)
    assert said(report).endswith("which is expected: file may have changed weights since")


class Part(torch.nn.Module):
    """Two square layers that can be taken for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(inputs).relu())


TWO_PARTS = [
    {**WARM, "run_id": "first", "submodel": "enc", "model_name": "m"},
    {**WARM, "run_id": "second", "submodel": "dec", "model_name": "m"},
]


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("are_tied", [False, True])
def test_another_model_that_is_loaded_later_is_no_reason(tmp_path: Path, wrong: int, are_tied: bool) -> None:
    """Unless it shares memory with the first one: a composite of parts of two runs."""
    paths = PathProvider(tmp_path, "new")
    torch.manual_seed(0)
    for run_id in ("first", "second"):
        CheckpointWriter(paths.with_run(run_id)).save(bind(Part(), "m"), at(1), probe=torch.randn(3, 4))
    enc, dec = Part(), Part()
    if are_tied:
        dec.a.weight = enc.a.weight
    configs = [dict(one) for one in TWO_PARTS]
    configs[wrong]["transforms"] = [{"from": "a.", "to": "b."}, {"from": "b.", "to": "a."}]
    stack = InitializerStack.from_config({"observers": ["probe"], "initializers": configs}, path_provider=paths)
    model = compose("c", {"enc": bind(enc, "enc"), "dec": bind(dec, "dec")})
    if are_tied and wrong == 0:
        text = said(stack.initialize(model))
        assert text.endswith("which is expected: previous_run may have changed weights since")
        return
    with pytest.raises(PartlyInitializedError) as caught:
        stack.initialize(model)
    assert isinstance(caught.value.__cause__, ProbeMismatchError)
    assert f"of {('first', 'second')[wrong]} was saved" in str(caught.value.__cause__)


def test_a_later_initializer_that_loads_the_same_does_no_harm(run: PathProvider) -> None:
    """Both are the same bits."""
    report = start(run, net(1), WARM, WARM)
    assert [said(report, number) for number in (0, 1)] == ["same bits", "same bits"]


class Noise(InitializerBase):
    """Writes so that nothing counts it."""

    config_class: ClassVar[type[KindConfig]] = KindConfig
    contract: ClassVar[int] = 1

    def init_weights(self, model: Any) -> None:
        model.module.head.weight.data.normal_()

    def init_optimizer(self, model: Any) -> None:
        pass


@pytest.fixture
def noise() -> Iterator[None]:
    kinds.register("noise", Noise)
    yield
    kinds.unregister("noise")


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("noise_first", [True, False])
def test_a_kind_without_a_plan_is_a_reason_only_after_the_set(run: PathProvider, noise_first: bool) -> None:
    """Before it, everything that it wrote is written over."""
    initializers = [{"kind": "noise"}, {**WARM, "run_id": "source"}]
    config = {"observers": ["probe"], "initializers": initializers if noise_first else initializers[::-1]}
    report = InitializerStack.from_config(config, path_provider=run).initialize(net(1))
    if noise_first:
        assert said(report, 1) == "same bits"
    else:
        assert said(report, 0).endswith("which is expected: noise may have changed weights since")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_is_rounding(run: PathProvider, dtype: torch.dtype) -> None:
    """The batch follows the model; the difference is told, and within what the dtype allows."""
    model = bind(Net().to(dtype), "net")
    text = said(start(run, model, WARM))
    assert text.startswith("differs by ")
    limit = {torch.float64: "0.0001", torch.bfloat16: "0.05", torch.float16: "0.01"}[dtype]
    assert text.endswith(f" of the norm, within {limit}")


def test_exchanged_layers_are_caught_in_a_coarse_dtype_too(run: PathProvider) -> None:
    """What is wrong is far more than rounding."""
    with pytest.raises(PartlyInitializedError) as caught:
        start(run, bind(Net().to(torch.bfloat16), "net"), {**WARM, **EXCHANGED})
    assert isinstance(caught.value.__cause__, ProbeMismatchError)


def test_a_limit_can_be_given(run: PathProvider) -> None:
    """A wide one lets anything pass, and says how far apart it is."""
    config = [{**WARM, "run_id": "source", **EXCHANGED}]
    stack = InitializerStack.from_config(config, path_provider=run, observers=[ProbeObserver(tolerance=10)])
    assert said(stack.initialize(net(1))).endswith("of the norm, within 10")


def test_a_set_without_a_probe_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who switched the observer on expects a comparison; nothing else happens."""
    paths = PathProvider(tmp_path, "source")
    CheckpointWriter(paths).save(net(0), at(1))
    config = {"observers": ["probe"], "initializers": [{**WARM, "run_id": "source"}]}
    stack = InitializerStack.from_config(config, path_provider=paths)
    assert stack.initialize(net(1)).initializers[0].restored == ()
    told = [record for record in caplog.records if record.name == LOGGER]
    assert [record.levelname for record in told] == ["WARNING"]
    assert told[0].message.endswith("00000001_E1_U1_S1 was saved without a probe")


@pytest.mark.usefixtures("noise")
def test_kinds_that_read_no_set_are_told_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Random numbers and lone files have no probe, ever."""
    caplog.set_level(logging.INFO, LOGGER)
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    config = {
        "observers": ["probe"],
        "initializers": [{"kind": "file", "path": str(tmp_path / "a.pt")}, {"kind": "noise"}],
    }
    InitializerStack.from_config(config).initialize(net(1))
    told = [(record.levelname, record.message) for record in caplog.records if record.name == LOGGER]
    assert told == [
        ("INFO", "file: no set was selected, so there is no probe"),
        ("INFO", "noise: no set was selected, so there is no probe"),
    ]


def test_a_damaged_probe_is_refused_before_a_weight_changes(run: PathProvider) -> None:
    """By its digest; without the observer nobody reads it."""
    (probe,) = run.checkpoint_path.rglob("probe.th")
    content = bytearray(probe.read_bytes())
    content[len(content) // 2] ^= 1
    rewrite(probe, bytes(content))
    model = net(1)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with pytest.raises(PartlyInitializedError) as caught:
        start(run, model, WARM)
    assert isinstance(caught.value.__cause__, CheckpointCorruptError)
    assert caught.value.failed == "init_weights of previous_run"
    assert all(map(torch.equal, before, model.state_dict().values()))
    stack = InitializerStack.from_config([{**WARM, "run_id": "source"}], path_provider=run)
    assert stack.initialize(model).initializers[0].restored == ()


def test_walking_back_repeats_the_probe_of_the_set_that_is_used(run: PathProvider) -> None:
    """Not that of the broken one."""
    saved = CheckpointWriter(run).save(net(7), at(2), probe=BATCH * 2)
    flip_tensor_bit(saved.files[0].path)
    model = net(1)
    report = start(run, model, {**RESUME, "on_invalid": "previous"})
    assert str(report.start) == "E1_U1_S1"
    assert said(report) == "same bits"


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_flags_generators_and_buffers_stay_as_they_were(run: PathProvider) -> None:
    """A start with the observer leaves the process as one without."""
    model = net(1)
    model.module.norm.eval()
    before = states()
    start(run, model, WARM)
    assert states() == before
    assert [model.module.training, model.module.norm.training, model.module.drop.training] == [True, False, True]
    assert model.module.norm.num_batches_tracked.item() == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def train(folder: Path, observers: list[str], probe: Any, stops: tuple[int, ...]) -> list[torch.Tensor]:
    """Eight steps with dropout; killed and started again at each of ``stops``."""
    paths = PathProvider(folder, "run")
    for stop in (*stops, 8):
        model, state = net(2), TrainerState(seed=4)
        config = {"auto_resume": True, "observers": observers, "initializers": []}
        InitializerStack.from_config(config, path_provider=paths).initialize(model, trainer=state)
        while state.iteration.update < stop:
            step(model)
            state.advance(samples=6)
            CheckpointWriter(paths).save(model, trainer=state, probe=probe)
    return list(model.state_dict().values())


def test_a_run_that_is_resumed_with_probes_ends_with_the_same_bits(tmp_path: Path) -> None:
    """As one that was never interrupted, and never heard of probes."""
    plain = train(tmp_path / "plain", [], None, ())
    probed = train(tmp_path / "probed", ["probe", "timing"], BATCH, (3, 5))
    assert all(map(torch.equal, plain, probed))


class Masking(torch.nn.Module):
    """Scores with a mask, and what cannot be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> dict[str, Any]:
        scores = self.second(torch.tanh(self.first(inputs)))
        mask = torch.ones(4, 8).triu(1).bool()
        masked = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        return {"scores": masked, "law": torch.distributions.Normal(scores, 1.0)}


def test_exchanged_layers_are_found_beside_masked_scores(tmp_path: Path) -> None:
    """The constant of the mask hides nothing; objects without a fingerprint are named."""
    paths = PathProvider(tmp_path, "source")
    CheckpointWriter(paths).save(bind(Masking(), "net"), at(1), probe=BATCH)
    assert said(start(paths, bind(Masking(), "net"), WARM)) == "same bits; not compared: output.law (a Normal)"
    exchanged = [{"from": "first.", "to": "second."}, {"from": "second.", "to": "first."}]
    with pytest.raises(PartlyInitializedError, match=r"output\.scores differs by"):
        start(paths, bind(Masking(), "net"), {**WARM, "transforms": exchanged})


def test_a_model_that_replaces_its_children_is_caught_and_put_back(tmp_path: Path) -> None:
    """Its code is another one than when it was saved."""
    paths = PathProvider(tmp_path, "source")
    CheckpointWriter(paths).save(bind(Masking(), "net"), at(1), probe=BATCH)

    class Building(Masking):
        def forward(self, inputs: torch.Tensor) -> dict[str, Any]:
            self.first = torch.nn.Linear(8, 8)
            return super().forward(inputs)

    module = Building()
    first = module.first
    with pytest.raises(PartlyInitializedError, match="net computes other outputs than when"):
        start(paths, bind(module, "net"), WARM)
    assert module.first is first


class Drawing(torch.nn.Module):
    """Its bits depend on its own generator and on a counter, which are extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)
        self.generator = torch.Generator().manual_seed(3)
        self.count = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(inputs) + torch.randn(4, generator=self.generator) / self.count

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": torch.tensor(self.count), "generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])
        self.generator.set_state(state["generator"])


def drawn(root: Path, probe: Any, observers: list[str], is_interrupted: bool) -> torch.Tensor:
    """Weights after five steps, with a save, and where asked a new process, after the second."""
    paths = PathProvider(root, "source")

    def build() -> Any:
        torch.manual_seed(0)
        module = Drawing()
        return bind(module, "net", torch.optim.SGD(module.parameters(), 0.1))

    def steps(model: Any, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            model(torch.randn(4, 8)).square().sum().backward()
            model.optimizer.step()
            model.optimizer.zero_grad()

    model = build()
    steps(model, range(2))
    CheckpointWriter(paths).save(model, at(1), probe=probe)
    if is_interrupted:
        model = build()
        config = {"observers": observers, "initializers": [{"run_id": "source", **RESUME}]}
        report = InitializerStack.from_config(config, path_provider=paths.with_run("new")).initialize(model)
        assert "probe" not in observers or said(report) == "same bits"
    steps(model, range(2, 5))
    return model.module.linear.weight.detach().clone()


def test_a_model_with_generator_counter_and_extra_state_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Saved with a probe, or resumed with the observer."""
    plain = drawn(tmp_path / "plain", None, [], False)
    assert torch.equal(drawn(tmp_path / "saved", BATCH, [], False), plain)
    assert torch.equal(drawn(tmp_path / "resumed", BATCH, ["probe"], True), plain)
    assert torch.equal(drawn(tmp_path / "unobserved", BATCH, [], True), plain)


def test_nan_in_the_output_is_no_difference(tmp_path: Path) -> None:
    """Where it was, it is; who saves a diverged run gets the same one back."""
    paths = PathProvider(tmp_path, "source")

    def divide(inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([inputs[:1] * float("nan"), inputs[1:2] / 0, inputs[2:]])

    CheckpointWriter(paths).save(net(0, activation=divide), at(1), probe=BATCH)
    assert said(start(paths, net(1, activation=divide), WARM)) == "same bits"
    with pytest.raises(PartlyInitializedError, match="lacks the recorded NaN or infinities"):
        start(paths, net(1), WARM)


def test_averages_are_not_held_to_the_plain_weights(run: PathProvider) -> None:
    """The probe was taken of others."""
    averages = {"ema=0.9": net(3).state_dict()}
    CheckpointWriter(run).save(net(0), at(2), probe=BATCH, averages=averages)
    text = said(start(run, net(1), {**WARM, "model_info": "ema=0.9"}))
    assert text == "not repeated, the probe is of the plain weights, but other weights were loaded"


class Pair(torch.nn.Module):
    """A composite with a forward."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.name = "pair"
        torch.manual_seed(seed)
        self.left, self.right = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.submodels = {"left": bind(self.left, "left"), "right": bind(self.right, "right")}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.right(torch.tanh(self.left(inputs)))


def test_a_composite_is_compared_as_a_whole(tmp_path: Path) -> None:
    """And not where only a part of it is initialized, or a part becomes a model."""
    paths = PathProvider(tmp_path, "source")
    CheckpointWriter(paths).save(Pair(0), at(1), probe=BATCH)
    assert said(start(paths, Pair(1), WARM)) == "same bits"
    together = "not repeated, the probe is of pair.left and pair.right, but other models were initialized"
    assert said(start(paths, Pair(1), {**WARM, "submodel": "left"})) == together
    left = bind(torch.nn.Linear(8, 8), "other")
    assert said(start(paths, left, {**WARM, "model_name": "pair.left"})) == together


def test_a_model_that_becomes_a_part_of_a_composite_is_compared_there(run: PathProvider, tmp_path: Path) -> None:
    """By the submodel that the config names."""
    whole = compose("whole", {"encoder": net(1), "other": bind(torch.nn.Linear(2, 2), "other")})
    assert said(start(run, whole, {**WARM, "model_name": "net", "submodel": "encoder"})) == "same bits"


def test_a_model_of_another_name_is_compared(run: PathProvider) -> None:
    """It is the same model."""
    model = bind(Net(), "other")
    assert said(start(run, model, {**WARM, "model_name": "net"})) == "same bits"


def test_outputs_of_transformers_are_compared(tmp_path: Path) -> None:
    """A ModelOutput is searched like the mapping that it is; tied weights and dropout are no hindrance."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    paths = PathProvider(tmp_path, "source")
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "output_hidden_states": True}
    CheckpointWriter(paths).save(bind(transformers.GPT2LMHeadModel(config), "gpt"), at(1), probe=batch)
    text = said(start(paths, bind(transformers.GPT2LMHeadModel(config), "gpt"), WARM))
    assert text.startswith("same bits; not compared: output.")
    assert "(a DynamicCache)" in text
    exchanged = [{"from": "transformer.h.0.", "to": "transformer.h.1."}]
    exchanged += [{"from": "transformer.h.1.", "to": "transformer.h.0."}]
    with pytest.raises(PartlyInitializedError) as caught:
        start(paths, bind(transformers.GPT2LMHeadModel(config), "gpt"), {**WARM, "transforms": exchanged})
    error = caught.value.__cause__
    assert isinstance(error, ProbeMismatchError)
    assert error.output.startswith(("output.logits", "output.hidden_states."))
