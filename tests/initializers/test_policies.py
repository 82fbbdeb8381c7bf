"""What is done where file and model do not fit: kept, reset, sliced, padded, counted; and what a stack adds up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    PlanError,
    StateMismatchError,
    TrainingIteration,
    bind,
)
from noether_init_core.files.opening import FileCheckpoint


class Net(torch.nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = torch.nn.Linear(4, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.head = torch.nn.Linear(5, classes)
        self.scale = torch.nn.Parameter(torch.full((2,), 7.0))


def filled(module: torch.nn.Module, value: float) -> torch.nn.Module:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(value)
    return module


def start(folder: Path, state: dict[str, torch.Tensor], module: torch.nn.Module, **config: Any) -> Any:
    """Initialize ``module`` from a file with ``state``."""
    torch.save(state, folder / "a.pt")
    stack = InitializerStack.from_config([{"kind": "file", "path": str(folder / "a.pt"), **config}])
    return stack.initialize(bind(module, name="net"))


def without(state: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def test_missing_entries_are_kept_if_asked(tmp_path: Path) -> None:
    """Everything that the file has not keeps its present value."""
    source, module = filled(Net(), 1.0).state_dict(), filled(Net(), 2.0)
    report = start(tmp_path, without(source, "head.", "norm.running_mean"), module, on_missing="keep")
    assert module.body.weight.unique().tolist() == [1.0]
    assert module.head.weight.unique().tolist() == [2.0]
    assert module.norm.running_mean.unique().tolist() == [2.0]
    assert report.fresh_parameters() == ("head.weight", "head.bias")


def test_missing_entries_are_reset_by_their_own_modules(tmp_path: Path) -> None:
    """With the module's own distribution; what the file has of that module, and what is kept, stays."""
    source, module = filled(Net(), 1.0).state_dict(), filled(Net(), 2.0)
    rules = [{"keep_model": ["norm.bias", "scale"]}]
    torch.manual_seed(3)
    start(tmp_path, without(source, "head.", "body.bias", "norm."), module, on_missing="reset", transforms=rules)
    assert module.body.weight.unique().tolist() == [1.0], "loaded, though its module was reset for the bias"
    assert len(module.body.bias.unique()) == 5
    assert module.body.bias.abs().max() <= 0.5
    assert module.head.weight.abs().max() < 1
    assert len(module.head.weight.unique()) > 5
    assert module.norm.bias.unique().tolist() == [2.0], "kept, though its module was reset"
    assert module.norm.weight.unique().tolist() == [1.0]
    assert module.norm.running_var.unique().tolist() == [1.0]
    assert module.norm.running_mean.unique().tolist() == [0.0]


def test_what_no_module_can_reset_is_a_problem(tmp_path: Path) -> None:
    """A parameter of a module without reset_parameters would stay what it is, silently; nothing was changed."""
    source, module = filled(Net(), 1.0).state_dict(), filled(Net(), 2.0)
    with pytest.raises(PlanError, match=r"needs scale, not found in the file.*keep_model: scale"):
        start(tmp_path, without(source, "scale", "head."), module, on_missing="reset")
    assert {value for tensor in module.parameters() for value in tensor.unique().tolist()} == {2.0}


def test_a_model_on_the_meta_device_is_reset_where_the_file_has_nothing(tmp_path: Path) -> None:
    """Memory first, then values; none stays without."""
    source = filled(Net(), 1.0).state_dict()
    with torch.device("meta"):
        module = Net()
    start(tmp_path, without(source, "head."), module, on_missing="reset")
    assert module.body.weight.unique().tolist() == [1.0]
    assert len(module.head.weight.unique()) > 5
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize(("policy", "rows"), [("keep", [2.0]), ("slice", [1.0]), ("pad", [])])
def test_a_longer_tensor_in_the_file_is_kept_out_or_cut(tmp_path: Path, policy: str, rows: list[float]) -> None:
    """Ten classes in the file, three in the model; padding cannot help."""
    source, module = filled(Net(10), 1.0).state_dict(), filled(Net(3), 2.0)
    if policy == "pad":
        with pytest.raises(PlanError, match=r"head\.weight: file \[10, 5\], model \[3, 5\]; head\.bias too"):
            start(tmp_path, source, module, on_mismatch=policy)
        return
    report = start(tmp_path, source, module, on_mismatch=policy)
    assert module.head.weight.unique().tolist() == rows
    assert module.head.bias.unique().tolist() == rows
    assert ("head.weight" in report.loaded_parameters()) is (policy == "slice")


def test_a_shorter_tensor_in_the_file_fills_the_leading_part(tmp_path: Path) -> None:
    """Behind it the model's own values stay, as for new words of a vocabulary."""
    source, module = filled(Net(3), 1.0).state_dict(), filled(Net(10), 2.0)
    start(tmp_path, source, module, on_mismatch="pad")
    assert module.head.weight[:3].unique().tolist() == [1.0]
    assert module.head.weight[3:].unique().tolist() == [2.0]
    assert module.head.bias.tolist() == [1.0] * 3 + [2.0] * 7


def test_surplus_entries_are_left_if_asked(tmp_path: Path) -> None:
    """And an error otherwise."""
    source = {**filled(Net(), 1.0).state_dict(), "ema.decay": torch.ones(1)}
    with pytest.raises(PlanError, match=r"the file has ema\.decay, not found in net"):
        start(tmp_path, source, filled(Net(), 2.0))
    module = filled(Net(), 2.0)
    start(tmp_path, source, module, on_unexpected="ignore")
    assert module.body.weight.unique().tolist() == [1.0]


def test_coverage_is_a_contract(tmp_path: Path) -> None:
    """Overall or by glob: too little of the parameters from the file is an error that says how much and what lacks."""
    source = without(filled(Net(), 1.0).state_dict(), "head.")
    keep = {"on_missing": "keep"}
    module = filled(Net(), 2.0)
    total = sum(parameter.numel() for parameter in module.parameters())
    share = 1 - 18 / total
    with pytest.raises(PlanError, match=rf"{100 * share:.1f} % of the parameters come from a checkpoint, below 90 %"):
        start(tmp_path, source, module, min_coverage=0.9, **keep)
    with pytest.raises(
        PlanError, match=r"0\.0 % of the parameters of head\. come .*not loaded: head\.weight, head\.bias"
    ):
        start(tmp_path, source, module, min_coverage={"body.": 1, "head.": 0.5}, **keep)
    with pytest.raises(PlanError, match=r"min_coverage: heads\. matches no parameter"):
        start(tmp_path, source, module, min_coverage={"heads.": 0.5}, **keep)
    assert module.body.weight.unique().tolist() == [2.0]
    start(tmp_path, source, module, min_coverage={"body.": 1, "**": share - 0.001}, **keep)
    assert module.body.weight.unique().tolist() == [1.0]


def test_a_later_initializer_needs_only_what_earlier_ones_did_not_load(tmp_path: Path) -> None:
    """A backbone from one file, the head from another; the plan of the whole is covered, and origins are told apart."""
    whole = filled(Net(), 1.0).state_dict()
    torch.save(without(whole, "head."), tmp_path / "backbone.pt")
    torch.save({"head.weight": torch.full((3, 5), 5.0), "head.bias": torch.full((3,), 5.0)}, tmp_path / "head.pt")
    configs: list[dict[str, Any]] = [
        {"kind": "file", "path": str(tmp_path / "backbone.pt"), "transforms": [{"keep_model": "head."}]},
        {"kind": "file", "path": str(tmp_path / "head.pt"), "min_coverage": 1.0},
    ]
    module = filled(Net(), 2.0)
    stack = InitializerStack.from_config(configs)
    plan = stack.plan(bind(module, name="net"))
    assert plan.is_fine
    assert plan.coverage() == 1.0
    assert len({row.target for row in plan.rows}) == len(plan.rows)
    report = stack.initialize(bind(module, name="net"))
    assert module.head.weight.unique().tolist() == [5.0]
    assert module.body.weight.unique().tolist() == [1.0]
    files = {record.name: report.sources[record.source or 0].file for record in report.tensors}
    assert files["head.bias"] == "head.pt"
    assert files["scale"] == "backbone.pt"
    assert report.fresh_parameters() == ()
    with pytest.raises(PlanError, match="not found in the file"):
        InitializerStack.from_config(configs[::-1]).plan(bind(module, name="net")).raise_for_problems()


def saved(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> PathProvider:
    loss = sum((parameter**2).sum() for parameter in module.parameters())
    torch.as_tensor(loss).backward()
    optimizer.step()
    paths = PathProvider(folder, "before")
    CheckpointWriter(paths).save(bind(module, name="net", optimizer=optimizer), TrainingIteration(1, 1, 1))
    return paths


def warm(paths: PathProvider, module: torch.nn.Module, optimizer: Any, **config: Any) -> Any:
    configs = [{"kind": "previous_run", "run_id": "before", "load_optim": True, **config}]
    stack = InitializerStack.from_config(configs, path_provider=paths.with_run("after"))
    return stack.initialize(bind(module, name="net", optimizer=optimizer))


def test_fields_of_groups_come_from_where_the_config_says(tmp_path: Path) -> None:
    """Per field: the learning rate of the config, all else of the checkpoint; or the other way round."""
    module = Net()
    paths = saved(tmp_path, module, torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.25, eps=1e-3))
    for fields, wanted in (
        ({}, (0.5, 0.25, 1e-3)),
        ({"lr": "config"}, (0.1, 0.25, 1e-3)),
        ({"*": "config", "weight_decay": "checkpoint"}, (0.1, 0.25, 1e-8)),
    ):
        fresh = Net()
        optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.1, weight_decay=0.0)
        warm(paths, fresh, optimizer, restore={"optimizer": fields})
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], group["eps"]) == wanted
        assert fresh.scale in optimizer.state


def test_a_parameter_that_was_frozen_has_no_state_unless_fresh_is_allowed(tmp_path: Path) -> None:
    """Its weights are loaded, and the optimizer of the saved run did not hold it."""
    module = Net()
    paths = saved(
        tmp_path, module, torch.optim.AdamW([p for name, p in module.named_parameters() if "body" not in name])
    )
    fresh = Net()
    optimizer = torch.optim.AdamW(fresh.parameters())
    with pytest.raises(StateMismatchError, match=r"state of body\.weight not found in the file") as caught:
        warm(paths, fresh, optimizer)
    assert "on_missing_state: fresh" in str(caught.value)
    assert not optimizer.state
    warm(paths, fresh, optimizer, on_missing_state="fresh")
    assert fresh.body.weight not in optimizer.state
    assert torch.equal(optimizer.state[fresh.scale]["exp_avg"], torch.full((2,), 1.4))
    assert torch.equal(fresh.body.weight, module.body.weight)


def test_state_of_a_parameter_that_is_gone_is_an_error_or_left(tmp_path: Path) -> None:
    """The optimizer now holds the head only."""
    module = Net()
    paths = saved(tmp_path, module, torch.optim.AdamW(module.parameters()))
    fresh = Net()
    optimizer = torch.optim.AdamW(fresh.head.parameters())
    with pytest.raises(StateMismatchError, match="on_unexpected_state: ignore"):
        warm(paths, fresh, optimizer)
    warm(paths, fresh, optimizer, on_unexpected_state="ignore")
    assert set(optimizer.state) == set(fresh.head.parameters())


def test_moments_follow_a_conversion_of_their_parameters(tmp_path: Path) -> None:
    """Into bfloat16, as torch makes them there; without that the next step would fail."""
    module = Net()
    paths = saved(tmp_path, module, torch.optim.AdamW(module.parameters()))
    fresh = Net().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(fresh.parameters())
    warm(paths, fresh, optimizer)
    assert optimizer.state[fresh.scale]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[fresh.scale]["step"].dtype == torch.float32
    torch.as_tensor(sum((parameter**2).sum() for parameter in fresh.parameters())).backward()
    optimizer.step()
    assert torch.isfinite(fresh.scale).all()


def test_moments_that_an_earlier_initializer_loaded_stay(tmp_path: Path) -> None:
    """Each file brings the state of what it brings, as the report says; neither takes away the other's."""

    class Half(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.add_module(name, torch.nn.Linear(4, 4))

    optimizers = {}
    for name in ("body", "head"):
        module = Half(name)
        optimizers[name] = torch.optim.AdamW(module.parameters(), lr=0.1)
        saved(tmp_path / name, module, optimizers[name])
    both = torch.nn.Module()
    both.body, both.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(both.parameters(), lr=0.1)
    model = bind(both, name="net", optimizer=optimizer)
    common = {"kind": "previous_run", "run_id": "before", "load_optim": True}
    for second in ({}, {"transforms": [{"keep_model": "body."}]}):
        optimizer.state.clear()
        configs = [
            {**common, "output_path": str(tmp_path / "body"), "transforms": [{"keep_model": "head."}]},
            {**common, "output_path": str(tmp_path / "head"), **second},
        ]
        stack = InitializerStack.from_config(configs, path_provider=PathProvider(tmp_path, "after"))
        assert stack.plan(model).is_fine
        report = stack.initialize(model)
        for name, its in optimizers.items():
            for mine, theirs in zip(getattr(both, name).parameters(), its.param_groups[0]["params"], strict=True):
                assert torch.equal(optimizer.state[mine]["exp_avg"], its.state[theirs]["exp_avg"])
        assert [one.restored for one in report.initializers] == [
            ("optimizer of net",),
            ("optimizer of net (2 of 4 parameters, the others as loaded before)",),
        ]


def test_a_warm_start_says_which_settings_the_checkpoint_changes(tmp_path: Path) -> None:
    """A learning rate for fine-tuning would silently become that of the pretraining; the line that keeps it is said."""
    module = Net()
    paths = saved(tmp_path, module, torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.25))

    def said(lr: float, **config: Any) -> tuple[str, ...]:
        fresh = Net()
        return tuple(
            warm(paths, fresh, torch.optim.AdamW(fresh.parameters(), lr=lr), **config).initializers[0].restored
        )

    assert said(1e-5, restore={"optimizer": {"weight_decay": "config"}}) == (
        "optimizer of net (lr 1e-05 -> 0.001 as in the checkpoint; to keep yours: restore: {optimizer: {lr: config}})",
    )
    assert said(1e-5) == (
        "optimizer of net (lr 1e-05 -> 0.001, weight_decay 0.01 -> 0.25 as in the checkpoint; to keep yours: "
        "restore: {optimizer: {lr: config, weight_decay: config}})",
    )
    as_tensor: Any = torch.tensor(0.5)
    assert said(as_tensor, restore={"optimizer": {"weight_decay": "config"}}) == (
        "optimizer of net (lr 0.5 -> 0.001 as in the checkpoint; to keep yours: restore: {optimizer: {lr: config}})",
    )
    assert said(1e-5, restore={"optimizer": {"*": "config"}}) == ("optimizer of net",)
    assert said(1e-3, restore={"optimizer": {"weight_decay": "config"}}) == ("optimizer of net",)


def test_a_resume_of_the_same_run_says_nothing_of_settings(tmp_path: Path) -> None:
    """They are those of the run, which goes on; of another run they are told."""
    module = Net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5)
    loss = sum((parameter**2).sum() for parameter in module.parameters())
    torch.as_tensor(loss).backward()
    optimizer.step()
    paths = PathProvider(tmp_path, "before")
    model = bind(module, name="net", optimizer=optimizer)
    iteration = TrainingIteration(1, 1, 1)
    CheckpointWriter(paths).save(model, iteration)
    for run_id, has_note in (("before", False), ("after", True)):
        fresh = Net()
        mine = torch.optim.AdamW(fresh.parameters(), lr=0.1)
        stack = InitializerStack.from_config(
            [{"kind": "resume", "run_id": "before"}], path_provider=paths.with_run(run_id)
        )
        report = stack.initialize(bind(fresh, name="net", optimizer=mine))
        assert ("lr 0.1 -> 0.5" in str(report)) is has_note
        assert mine.param_groups[0]["lr"] == 0.5


def planned(paths: PathProvider, module: torch.nn.Module, optimizer: Any, **config: Any) -> Any:
    configs = [{"kind": "previous_run", "run_id": "before", "load_optim": True, **config}]
    stack = InitializerStack.from_config(configs, path_provider=paths.with_run("after"))
    return stack.plan(bind(module, name="net", optimizer=optimizer))


def test_the_plan_knows_what_stands_in_the_way_of_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another class, missing state, a set without state: problems of the plan, as the start would raise them.

    No value is read for that.
    """
    module = Net()
    held = [parameter for name, parameter in module.named_parameters() if "body" not in name]
    paths = saved(tmp_path, module, torch.optim.AdamW(held))
    for method in ("read", "read_all", "verify"):
        monkeypatch.setattr(FileCheckpoint, method, lambda *_args, **_kwargs: pytest.fail("values were read"))
    fresh = Net()
    plan = planned(paths, fresh, torch.optim.SGD(fresh.parameters(), lr=0.1), on_missing_state="fresh")
    assert [(problem.code, problem.model, problem.message) for problem in plan.problems] == [
        (
            "optimizer",
            "net",
            "optimizer state: the state is of a torch.optim.adamw.AdamW, the optimizer is a torch.optim.sgd.SGD. "
            "Next: load_optim: false  # in initializers.0",
        )
    ]
    adamw = torch.optim.AdamW(fresh.parameters())
    plan = planned(paths, fresh, adamw)
    assert [problem.message for problem in plan.problems] == [
        f"optimizer state: state of body.{leaf} not found in the file. "
        "Next: on_missing_state: fresh  # in initializers.0"
        for leaf in ("weight", "bias")
    ]
    assert planned(paths, fresh, adamw, on_missing_state="fresh").is_fine
    assert planned(paths, fresh, adamw, load_optim=False).is_fine
    CheckpointWriter(paths).save(bind(fresh, name="net"), TrainingIteration(1, 2, 2))
    plan = planned(paths, fresh, adamw, checkpoint_tag="latest")
    assert [problem.code for problem in plan.problems] == ["optimizer"]
    assert "optim" in plan.problems[0].message
    assert not adamw.state


def test_the_plan_of_a_model_without_optimizer_says_that_its_state_was_not_planned(tmp_path: Path) -> None:
    """A module on the meta device, as the command builds it: the weights are planned, and a warning says the rest."""
    module = Net()
    paths = saved(tmp_path, module, torch.optim.AdamW(module.parameters()))
    with torch.device("meta"):
        bare = Net()
    plan = planned(paths, bare, None)
    assert plan.is_fine
    assert [(warning.code, warning.message) for warning in plan.warnings] == [
        ("optimizer", "optimizer state: not planned, the model has no optimizer")
    ]
    assert planned(paths, bare, None, load_optim=False).warnings == ()
    with torch.device("meta"):
        held = Net()
        optimizer = torch.optim.AdamW(held.parameters())
    assert planned(paths, held, optimizer).warnings == ()


def test_the_plan_says_what_starts_afresh(tmp_path: Path) -> None:
    """Factors of Adafactor do not go with a rule that splits; known from headers alone."""
    module = Net(4)
    paths = saved(tmp_path, module, torch.optim.Adafactor(module.parameters()))
    fresh = Net(3)
    plan = planned(paths, fresh, torch.optim.Adafactor(fresh.parameters()), on_mismatch="slice")
    assert plan.is_fine
    assert [(warning.code, warning.message) for warning in plan.warnings] == [
        (
            "optimizer",
            "optimizer state of head.weight is fresh: row_var does not have the shape of its parameter, so that "
            "transforms do not apply to it",
        )
    ]
