"""What a plan must see before anything is written: odd rules, odd names, ties, values that steps make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.counting import LineCounter

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    PlanError,
    TrainingIteration,
    bind,
    compose,
)
from noether_init_core.config.source import TransformConfig, rule_of
from noether_init_core.surgery.fit import PlanPart, TargetSpec
from noether_init_core.surgery.name_rules import Transforms
from noether_init_core.surgery.planner import plan_load

Start = Callable[..., Any]


class M(torch.nn.Module):
    def __init__(self, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def lin(inputs: int, outputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=False)


def full(module: torch.nn.Module, value: float) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def imaginary() -> torch.nn.Module:
    """A module with a complex parameter called a.weight."""
    inner = torch.nn.Module()
    inner.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    return M(a=inner)


@pytest.fixture
def stack(tmp_path: Path) -> Start:
    """A stack of kind ``file`` on a state dict."""

    def build(state: dict[str, torch.Tensor], *rules: dict[str, Any], **fields: Any) -> InitializerStack:
        torch.save(state, tmp_path / "a.pt")
        config = {"kind": "file", "path": str(tmp_path / "a.pt"), "transforms": list(rules), **fields}
        return InitializerStack.from_config([config])

    return build


def problems(stack: InitializerStack, module: torch.nn.Module) -> str:
    """Of the plan; starting fails, too, and nothing has changed."""
    model = bind(module, name="net")
    found = "\n".join(problem.message for problem in stack.plan(model).problems)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(PlanError):
        stack.initialize(model)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return found


def test_a_module_really_called_module_is_found_by_its_exact_name(stack: Start) -> None:
    """Before anything that fits only without the prefixes of wrappers."""
    module = M(enc=M(module=lin(2, 2)))
    state = {"enc.module.weight": torch.ones(2, 2), "enc.weight": torch.zeros(2, 2)}
    ready = stack(state, on_unexpected="ignore", source_root="enc", target_root="enc")
    ready.initialize(bind(module, name="net"))
    assert module.enc.module.weight.unique().tolist() == [1.0]
    both = full(M(enc=M(weight=torch.nn.Parameter(torch.zeros(2, 2)), module=lin(2, 2))), 5.0)
    ready = stack(
        {"enc.module.weight": torch.ones(2, 2)},
        {
            "drop": "x",
        },
        on_missing="keep",
        on_unmatched_rule="warn",
    )
    ready.initialize(bind(both, name="net"))
    assert both.enc.module.weight.unique().tolist() == [1.0]
    assert both.enc.weight.unique().tolist() == [5.0]


def test_a_pad_that_keeps_the_models_values_comes_last(stack: Start) -> None:
    """A filling behind it would cover what is to stay."""
    rule = {"from": "a.weight", "do": [{"pad": {"dim": 0, "size": 6}}, {"pad": {"dim": 1, "size": 6, "value": 5}}]}
    assert "must be the last step" in problems(stack({"a.weight": torch.ones(4, 4)}, rule), M(a=lin(6, 6)))


@pytest.mark.parametrize(
    ("state", "rule", "module", "message"),
    [
        (
            {"a.weight": torch.ones(2, 2, dtype=torch.complex64)},
            {"from": "a.weight", "do": [{"cast": "float32"}, {"cast": "complex64"}]},
            imaginary(),
            "does not allow the conversion",
        ),
        (
            {"a.weight": torch.ones(5, 2, dtype=torch.complex64)},
            {"from": "a.weight", "do": [{"interpolate": {"grid": [2, 2], "to_grid": [1, 1], "prefix_tokens": 1}}]},
            imaginary(),
            "does not allow the conversion",
        ),
        (
            {"a": torch.ones(1, 2, dtype=torch.float64), "b": torch.ones(1, 2)},
            {"from": ["a", "b"], "to": "a.weight", "do": [{"concat": 0}, {"cast": "float32"}]},
            M(a=lin(2, 2)),
            "float64 and float32",
        ),
    ],
    ids=["imaginary parts cast away", "grids of complex numbers", "two dtypes put together"],
)
def test_steps_that_would_lose_values_by_dtype_are_problems(
    stack: Start, state: dict[str, torch.Tensor], rule: dict[str, Any], module: torch.nn.Module, message: str
) -> None:
    """Whatever the dtype at the end: what is lost on the way does not come back."""
    assert message in problems(stack(state, rule, cast="any"), module)


def test_values_that_steps_make_are_looked_at(stack: Start) -> None:
    """Fillings beyond the dtype, and what bicubic curves make between large values."""
    fill = {"from": "a.weight", "do": [{"pad": {"dim": 1, "size": 3, "value": 1e6}}]}
    with pytest.raises(PlanError, match=r"the pad value 1e\+06 does not fit float16"):
        stack({"a.weight": torch.ones(2, 2)}, fill).initialize(bind(M(a=lin(3, 2)).half(), name="net"))
    table = torch.full((16, 2), 60000.0, dtype=torch.float16)
    table[::2] = -60000.0
    grow = {"from": "a.weight", "do": [{"interpolate": {"grid": [4, 4], "to_grid": [8, 8]}}]}
    with pytest.raises(PlanError, match="interpolated values do not fit float16"):
        stack({"a.weight": table}, grow).initialize(bind(M(a=lin(2, 64)).half(), name="net"))


def test_policies_on_shapes_do_not_touch_parts_of_a_split(stack: Start) -> None:
    """Each part would need a cut of its own; the plan says so, and nothing is half written."""
    rule = {"from": "qk", "to": ["q.weight", "k.weight"], "do": [{"split": {"sizes": [2, 4]}}]}
    module = M(first=lin(4, 4), q=lin(4, 2), k=lin(4, 3))
    state = {"first.weight": torch.ones(4, 4), "qk": torch.ones(6, 4)}
    assert "k.weight: file [6, 4]" in problems(stack(state, rule, on_mismatch="slice"), module)


def test_a_wrong_rule_is_a_problem_whatever_the_policies(stack: Start) -> None:
    """``on_mismatch: keep`` is for shapes that differ, not for sizes that do not add up."""
    rule = {"from": "qk", "to": ["q.weight", "k.weight"], "do": [{"split": {"sizes": [2, 2]}}]}
    found = problems(stack({"qk": torch.ones(6, 4)}, rule, on_mismatch="keep"), M(q=lin(4, 2), k=lin(4, 2)))
    assert "sizes [2, 2] add up to 4, dimension 0 has 6" in found


def test_no_step_makes_far_more_than_file_and_model_have(stack: Start) -> None:
    """A grid of millions, of which a later step takes four."""
    steps = [{"interpolate": {"grid": [2, 2], "to_grid": [2_000_000, 2_000_000]}}, {"slice": {"stop": 4}}]
    rule = {"from": "a.weight", "do": steps}
    assert "many more elements" in problems(stack({"a.weight": torch.ones(4, 4)}, rule), M(a=lin(4, 4)))


def test_surplus_parts_can_be_ignored(stack: Start) -> None:
    """Queries and keys of a fused projection, without values; and a rule that leads nowhere stays undone."""
    rule = {"from": "qkv", "to": ["q.weight", "k.weight", "v.weight"], "do": [{"split": 0}]}
    module = M(q=lin(2, 1), k=lin(2, 1))
    stack({"qkv": torch.arange(6.0).reshape(3, 2)}, rule, on_unexpected="ignore").initialize(bind(module, name="net"))
    assert module.k.weight.tolist() == [[2.0, 3.0]]
    assert "not found in net" in problems(stack({"qkv": torch.ones(3, 2)}, rule), module)
    other = full(M(a=lin(2, 2), c=lin(2, 2)), 5.0)
    state = {"a.weight": torch.ones(2, 2), "c.weight": torch.ones(2, 2)}
    away = {"from": "a.", "to": "b."}
    stack(state, away, on_unexpected="ignore", on_missing="keep").initialize(bind(other, name="net"))
    assert other.a.weight.unique().tolist() == [5.0]


def test_what_is_kept_is_not_reset_through_another_name(stack: Start) -> None:
    """Tied parameters, and one module under two names."""
    module = M(emb=torch.nn.Embedding(5, 4), x=lin(4, 4), head=lin(4, 5))
    module.head.weight = module.emb.weight
    found = problems(stack({"x.weight": torch.ones(4, 4)}, {"keep_model": "emb."}, on_missing="reset"), module)
    assert "emb.weight is kept, but it is the same tensor as head.weight, which is reset" in found
    shared = lin(4, 4)
    twice = full(M(a=shared, b=shared, x=lin(4, 4)), 9.0)
    ready = stack({"x.weight": torch.ones(4, 4)}, on_missing="reset")
    ready.initialize(bind(twice, name="net"))
    assert len(shared.weight.unique()) > 1


def test_a_reset_never_wipes_what_another_submodel_loads(tmp_path: Path) -> None:
    """The embedding that both use comes from the file of the first."""
    embedding = torch.nn.Embedding(5, 4)
    first, second = M(emb=embedding, x=lin(4, 4)), M(emb=embedding, y=lin(4, 4))
    model = compose("c", {"a": bind(first, name="a"), "b": bind(second, name="b")})
    saved = compose(
        "c",
        {
            "a": bind(full(M(emb=torch.nn.Embedding(5, 4), x=lin(4, 4)), 3.0), name="a"),
            "b": bind(M(y=lin(4, 4)), name="b"),
        },
    )
    CheckpointWriter(PathProvider(tmp_path, "run")).save(saved, TrainingIteration(1, 1, 1), optimizer=False)
    config = {"kind": "previous_run", "run_id": "run", "on_missing": "reset"}
    report = InitializerStack.from_config([config], path_provider=PathProvider(tmp_path, "new")).initialize(model)
    assert embedding.weight.unique().tolist() == [3.0]
    assert report.fresh_parameters() == ()


def test_a_reset_that_leaves_memory_without_values_is_refused(stack: Start) -> None:
    """On the meta device there was nothing before it."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = (torch.nn.Parameter(torch.empty(4)) for _ in range(2))

        def reset_parameters(self) -> None:
            torch.nn.init.ones_(self.weight)

    with torch.device("meta"):
        module = M(x=lin(4, 4), s=Scaled())
    ready = stack({"x.weight": torch.ones(4, 4)}, on_missing="reset")
    with pytest.raises(Exception, match=r"reset_parameters leaves s\.scale without values"):
        ready.initialize(bind(module, name="net"))


def test_parameters_are_listed_once(stack: Start) -> None:
    """By the name that ``named_parameters`` has, so that groups can be built from the lists."""
    module = M(emb=torch.nn.Embedding(5, 4), head=lin(4, 5))
    module.head.weight = module.emb.weight
    state = {"emb.weight": torch.ones(5, 4), "head.weight": torch.ones(5, 4)}
    report = stack(state).initialize(bind(module, name="net"))
    assert report.loaded_parameters() == tuple(dict(module.named_parameters()))
    assert report.fresh_parameters() == ()


def test_the_way_back_has_every_name_of_tied_entries_and_no_extra_state(stack: Start) -> None:
    """What the plan makes of the model is a file that the plan loads."""

    class Extra(torch.nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"version": 1}

    module = M(emb=torch.nn.Embedding(5, 4), head=lin(4, 5), extra=Extra())
    module.head.weight = module.emb.weight
    plan = stack(module.state_dict()).plan(bind(module, name="net"))
    back = plan.inverted().transformed(module.state_dict())
    assert set(back) == {"emb.weight", "head.weight"}


def test_coverage_cannot_be_had_cheaply(stack: Start) -> None:
    """Not by the second name of a tied parameter, nor by a row of a thousand."""
    module = M(emb=torch.nn.Embedding(5, 4), head=lin(4, 5), x=lin(4, 4))
    module.head.weight = module.emb.weight
    ready = stack({"x.weight": torch.ones(4, 4)}, on_missing="keep", min_coverage={"head.": 1.0})
    assert "0.0 % of the parameters of head." in problems(ready, module)
    ready = stack({"a.weight": torch.ones(1, 4)}, on_mismatch="pad", min_coverage=0.5)
    assert "0.1 % of the parameters" in problems(ready, M(a=lin(4, 1000)))


def test_advice_speaks_as_rules_do(stack: Start) -> None:
    """Below the roots, without wrappers: following it works."""
    module = M(bb=M(body=lin(2, 2), head=lin(2, 3)))
    state = {"body.weight": torch.ones(2, 2), "head.weight": torch.ones(9, 2)}
    found = problems(stack(state, {"from": "body."}, target_root="bb"), module)
    assert "add: - keep_model: head." in found
    plan = stack(state, {"from": "body."}, {"keep_model": "head."}, target_root="bb").plan(bind(module, name="net"))
    assert plan.is_fine
    found = problems(
        stack({"old.weight": torch.ones(2, 2)}, {"from": "old."}, target_root="bb"), M(bb=M(new=lin(2, 2)))
    )
    assert "{from: old., to: new.}" in found


def test_a_forgotten_transpose_is_what_is_advised(stack: Start) -> None:
    """And not a fresh start of these weights; square ones beside are warned of."""
    module = M(h=torch.nn.ModuleList([M(fc=lin(2, 3), proj=lin(2, 2))]))
    state = {"h.0.fc.weight": torch.ones(2, 3), "h.0.proj.weight": torch.ones(2, 2)}
    found = problems(stack(state, {"from": "h.<i>.fc.", "to": "h.<i>.fc."}), module)
    assert "Transposed. Next: add do: [transpose] to transforms.0" in found
    plan = stack(state, {"from": "h.<i>.fc.", "do": ["transpose"]}).plan(bind(module, name="net"))
    assert plan.is_fine
    (warning,) = plan.warnings
    assert warning.message.startswith(
        "h.0.proj.weight is square and not transposed, while others in the same layers are"
    )


def test_another_grid_is_what_is_advised(stack: Start) -> None:
    """With the class token that both have."""
    module = M()
    module.pos_embed = torch.nn.Parameter(torch.zeros(1, 37, 2))
    found = problems(stack({"pos_embed": torch.zeros(1, 17, 2)}), module)
    assert "interpolate: {grid: [4, 4], to_grid: [6, 6], prefix_tokens: 1}" in found


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"keep_model": "head"}, "Next: keep_model: head. (a trailing dot means everything below)"),
        ({"from": "stem", "to": "body"}, "Next: from: stem. (a trailing dot means everything below)"),
    ],
    ids=["keep without dot", "from without dot"],
)
def test_likely_slips_are_recognised(stack: Start, rule: dict[str, Any], message: str) -> None:
    """The rule matches nothing, and what was meant is said."""
    state = {"stem.weight": torch.ones(2, 2), "head.weight": torch.ones(2, 2)}
    assert message in problems(stack(state, rule), M(body=lin(2, 2), head=lin(2, 2)))


def test_a_group_that_takes_no_part_stands_for_nothing() -> None:
    """Not for the word None."""
    config = TransformConfig.model_validate({"from_regex": r"layer(?P<i>\d+)?\.weight", "to": "block<i>.weight"})
    match = Transforms([rule_of(config, "rule 0")]).match(
        ("layer.weight", "layer1.weight"), ("block.weight", "block1.weight")
    )
    assert {target: taken.sources for target, taken in match.moves.items()} == {
        "block.weight": ("layer.weight",),
        "block1.weight": ("layer1.weight",),
    }


def test_work_grows_with_the_number_of_names_only() -> None:
    """Entries that are kept, and modules that are missing: four times as many take about four times as many lines."""

    def planned(number: int, *, kept: bool) -> int:
        targets = {f"m{one}.weight": TargetSpec((2,), "float32", 8) for one in range(number)}
        sources = {name if kept else f"old.{name}": spec for name, spec in targets.items()}
        rules = [rule_of(TransformConfig.model_validate({"keep_model": "**"}), "rule 0")] if kept else []
        part = PlanPart("net", "here", ("a.pt",), sources, targets)
        with LineCounter() as lines:
            plan_load("file", [part], Transforms(rules))
        return lines.count

    for kept in (True, False):
        assert planned(4_000, kept=kept) < 4.2 * planned(1_000, kept=kept)
