"""What a problem of a plan advises is written into the config here, and the plan leads on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import yaml
from support.advice import digests, executes, pasted, saw
from support.following import advised, refusal
from torch import nn

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainingIteration, bind, compose
from noether_init_core.errors import InitError

State = dict[str, torch.Tensor]
zeros = torch.zeros


def stem_and_head() -> nn.Module:
    return nn.ModuleDict({"stem": nn.Linear(3, 2), "head": nn.Linear(2, 4)})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


class Position(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(zeros(1, 17, 8))


class Conv1D(nn.Module):
    """The weights of the file are transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)


STEM: State = dict(stem_and_head().state_dict())
TIED: State = {"a.weight": zeros(3, 3), "b.weight": zeros(3, 3)}
TWICE: State = {"a": zeros(2, 3), "b": zeros(2, 3), "bias": zeros(2)}
POSITIONS: State = {"pos": zeros(1, 5, 8)}
TRANSPOSED: State = {
    f"{name}.{part}": zeros(*shape) for name in ("first", "second") for part, shape in (("w", (3, 4)), ("bias", (4,)))
}
TO_GRID = "{interpolate: {grid: [2, 2], to_grid: [4, 4]}}"


@attrs.frozen
class Case:
    """A wrong config: ``asked`` is found in the message, and replaces ``wrong`` in the fields."""

    state: State
    model: Callable[[], nn.Module]
    fields: str
    asked: str
    wrong: str
    right: str = "{}"
    more: str = ""


CASES: dict[str, Case] = {
    "keep_model": Case(
        STEM,
        stem_and_head,
        "transforms: [{keep_model: head}]",
        r"Next: (keep_model: head\.) \(a trailing",
        "keep_model: head",
    ),
    "drop": Case(
        STEM,
        stem_and_head,
        "on_missing: keep\n    transforms: [{drop: head}]",
        r"Next: (drop: head\.) \(a trailing",
        "drop: head",
    ),
    "only": Case(
        STEM,
        stem_and_head,
        "on_missing: keep\n    transforms: [{only: stem}]",
        r"Next: (only: stem\.) \(a trailing",
        "only: stem",
    ),
    "from": Case(STEM, stem_and_head, "transforms: [{from: stam., to: stem.}]", r"Next: (from: stem\.)", "from: stam."),
    "coverage": Case(STEM, stem_and_head, "min_coverage: {head: 1.0}", r"Next: (head\.) \(a trailing", "head"),
    "prefix tokens": Case(
        POSITIONS,
        Position,
        f"transforms: [{{from: pos, do: [{TO_GRID}]}}]",
        r"Next: (prefix_tokens: 1)",
        "to_grid: [4, 4]",
        "to_grid: [4, 4], {}",
    ),
    "transpose": Case(
        TRANSPOSED,
        Conv1D,
        "transforms: [{from: '<x>.w', to: '<x>.weight', optional: true}]",
        r"Next: add (do: \[transpose\]) to",
        "optional: true",
        "optional: true, {}",
    ),
    "shadowed": Case(
        STEM,
        stem_and_head,
        "on_missing: keep\n    transforms: [{drop: head.}, {from: head.bias, to: head.bias}]",
        r"Next: (move it up), or remove it",
        "[{drop: head.}, {from: head.bias, to: head.bias}]",
        "[{from: head.bias, to: head.bias}, {drop: head.}]",
    ),
    "shadowed, removed": Case(
        STEM,
        stem_and_head,
        "on_missing: keep\n    transforms: [{drop: head.}, {from: head.bias, to: head.bias}]",
        r"Next: move it up, or (remove it)",
        ", {from: head.bias, to: head.bias}",
        "",
    ),
    "twice": Case(
        TWICE,
        lambda: nn.Linear(3, 2),
        "transforms: [{from: a, to: weight}, {from: b, to: weight}]",
        r"from b by .*Next: (drop) one of them",
        "{from: b, to: weight}",
        "{{}: b}",
    ),
    "twice, by its name": Case(
        {**TWICE, "weight": zeros(2, 3)},
        lambda: nn.Linear(3, 2),
        "transforms: [{from: a, to: weight}, {drop: b}]",
        r"from weight by its name\. Next: (drop) one of them",
        "{drop: b}",
        "{drop: b}, {{}: weight}",
    ),
    "tied": Case(
        TIED,
        Tied,
        "transforms: [{from: a.weight, do: [transpose]}]",
        r"are one tensor, and transforms compute it twice\. Next: (drop) one",
        "transforms: [",
        "transforms: [{{}: b.weight}, ",
    ),
    "root": Case(
        {**{f"module.{name}": value for name, value in STEM.items()}, "extra": zeros(1)},
        stem_and_head,
        "source_root: module",
        r"Next: (leave source_root out, and drop) or rename names by rules",
        "source_root: module",
        "transforms: [{drop: extra}]",
    ),
}


def planned(model: nn.Module) -> str:
    """The problems of the plan of the config, or the error instead of one."""
    try:
        plan = InitializerStack.from_file("c.yaml").plan(bind(model, "net"))
        return saw("\n".join(problem.message for problem in plan.problems))
    except InitError as error:
        return str(error)


@executes(
    "surgery/name_rules.py", "Next: keep_model: {}. (a trailing", "Next: {}: {}. (a trailing", "move it up, or remove"
)
@executes("surgery/name_rules.py", "drop one of them", "leave {} out, and drop or rename", "Next: from: {}")
@executes("surgery/planner.py", "Next: {}. (a trailing dot means everything below)")
@executes("surgery/steps.py", "prefix_tokens: {}")
@executes("surgery/fit.py", "add do: [transpose] to {}")
@executes("surgery/ties.py", "drop one")
@pytest.mark.parametrize("name", CASES)
def test_the_advised_text_takes_the_place_of_the_wrong_one(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Then the plan has no problem, and the model loads; the file is as it was."""
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    torch.save(case.state, "w.pt")
    before = digests(tmp_path)
    config = "initializers:\n  - kind: file\n    path: w.pt\n    "
    Path("c.yaml").write_text(config + case.fields)
    said = planned(case.model())
    found = re.search(case.asked, said)
    assert found is not None, said
    assert case.wrong in case.fields
    Path("c.yaml").write_text(config + case.fields.replace(case.wrong, case.right.replace("{}", found[1])))
    assert planned(case.model()) == ""
    InitializerStack.from_file("c.yaml").initialize(bind(case.model(), "net"))
    assert before.items() <= digests(tmp_path).items()


@executes("surgery/patterns.py", "shorter patterns, above all without counted repetitions such as {400}")
def test_patterns_that_need_too_much_memory_are_shortened(tmp_path: Path) -> None:
    """By the counted repetition that the message speaks of."""
    torch.save(STEM, tmp_path / "w.pt")
    rules = [{"from_regex": f"(a|b|c{number}){{900}}.*", "to": "x", "optional": True} for number in range(200)]
    config = {"kind": "file", "path": str(tmp_path / "w.pt"), "transforms": rules}

    def plan() -> Any:
        return InitializerStack.from_config([config]).plan(bind(stem_and_head(), "net"))

    repetition = re.search(r"shorter patterns, .* counted repetitions such as (\{400\})", advised(plan))
    assert repetition is not None
    counted = re.escape(repetition[1]).replace("400", "[0-9]+")
    config["transforms"] = [{**rule, "from_regex": re.sub(counted, "+", str(rule["from_regex"]))} for rule in rules]
    assert plan().problems == ()


@executes("surgery/plan.py", "model= one of {}")
@executes("surgery/plan.py", "the plan of one initializer")
def test_a_plan_of_several_models_or_files_is_used_in_parts(tmp_path: Path) -> None:
    """One of the models that the message lists; the plan of each initializer by itself."""
    for name in ("one", "two"):
        torch.save(STEM, tmp_path / f"{name}.pt")
    configs = [{"kind": "file", "path": str(tmp_path / f"{name}.pt"), "submodel": name} for name in ("one", "two")]
    model = compose("net", {name: bind(stem_and_head(), name) for name in ("one", "two")})
    plan = InitializerStack.from_config(configs).plan(model)
    names = re.fullmatch(r"model= one of (.*)", advised(lambda: plan.transformed(STEM)))
    assert names is not None
    for name in names[1].split(", "):
        assert plan.transformed(STEM, model=name).keys() == STEM.keys()
    assert len(plan.inverted().rows) == 2 * len(STEM)
    # into one model, the two files would be written into one
    configs = [{"kind": "file", "path": str(tmp_path / f"{name}.pt"), "target_root": name} for name in ("one", "two")]
    whole = bind(nn.ModuleDict({"one": stem_and_head(), "two": stem_and_head()}), "net")
    stack = InitializerStack.from_config(configs)
    assert "Next: the plan of one initializer" in refusal(stack.plan(whole).inverted)
    for config in configs:
        own = InitializerStack.from_config([{**config, "on_missing": "keep"}]).plan(whole).inverted()
        assert [row.target for row in own.rows] == list(STEM)


def model_of(kind: Any = torch.optim.AdamW, parts: str = "ab", **arguments: Any) -> Any:
    """Two layers with an optimizer of the parameters of ``parts``, which made a step."""
    module = nn.ModuleDict({name: nn.Linear(3, 3) for name in "ab"})
    optimizer = kind([value for part in parts for value in module[part].parameters()], lr=0.1, **arguments)
    sum(layer(torch.ones(1, 3)).sum() for layer in module.values()).backward()
    optimizer.step()
    return bind(module, "net", optimizer)


AMSGRAD = {"amsgrad": True}
#: What was saved, what is built, the key of the config that it needs, and the line that is advised.
OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "amsgrad": ({}, AMSGRAD, {"restore": {"optimizer": {"amsgrad": "config"}}}, "load_optim: false"),
    "missing": ({"parts": "a"}, {}, {}, "on_missing_state: fresh"),
    "unexpected": ({}, {"parts": "a"}, {"on_unexpected_state": "error"}, "on_unexpected_state: ignore"),
    "class": ({}, {"kind": torch.optim.SGD, "momentum": 0.9}, {}, "load_optim: false"),
}
PLACES = {
    "resume": "initializers:\n  - {entry}\n",
    "previous_run": "initializers:\n  - {entry}\n",
    "auto_resume": "auto_resume: {entry}\ninitializers: []\n",
}


@executes("surgery/optimizer_plan.py", "Next: build the optimizer without {}, or {}", "Next, for a fresh optimizer: {}")
@executes("surgery/optimizer_plan.py", "Next: {}")
@executes("initializers/optimizer.py", "Next: {}")
@executes("config/source.py", "load_optim: true, or remove {}")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_a_line_about_optimizer_state_goes_where_it_says(tmp_path: Path, case: str, place: str) -> None:
    """Into the entry, or into auto_resume, with and without keys; then the run resumes."""
    saved, built, fields, expected = OPTIMIZERS[case]
    paths = PathProvider(tmp_path / "runs", "run")
    CheckpointWriter(paths).save(model_of(**saved), TrainingIteration(1, 1, 1))
    before = digests(tmp_path / "runs")
    config = tmp_path / "c.yaml"
    entry: Any = fields or True
    if place != "auto_resume":
        entry = {"kind": place, **fields, **({"run_id": "run", "load_optim": True} if place == "previous_run" else {})}
    text = yaml.safe_dump(entry, default_flow_style=True).partition("\n")[0]
    config.write_text(PLACES[place].replace("{entry}", text))

    def start() -> Any:
        return InitializerStack.from_file(config, path_provider=paths).initialize(model_of(**built))

    problems = InitializerStack.from_file(config, path_provider=paths).plan(model_of(**built)).problems
    assert all(expected in saw(problem.message) for problem in problems)

    said = refusal(start)
    found = re.search(rf"Next[^:]*: (?:[^\n]*, or )?([^\n]*{expected}[^\n]*)", said)
    assert found is not None, said
    pasted(config, found[1])
    if case == "amsgrad":
        others = re.search(r"Next: load_optim: true, or remove (\w+)", refusal(start))
        assert others is not None
        document = yaml.safe_load(config.read_text())
        entry = document["auto_resume"] if place == "auto_resume" else document["initializers"][0]
        del entry[others[1]]
        config.write_text(yaml.safe_dump(document))
    start()
    assert digests(tmp_path / "runs") == before
