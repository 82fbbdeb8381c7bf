"""Prefixes of wrappers: what belongs together despite them, and what cannot be known."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, strategies as st
from support.advice import executes

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    PathProvider,
    PlanError,
    TrainingIteration,
    bind,
)
from noether_init_core.surgery.wrappers import bare_names, forms_of, paired, prefix_of_all


def pairing(sources: tuple[str, ...], targets: tuple[str, ...], *roots: str, taken: tuple[str, ...] = ()) -> Any:
    file_root, model_root = roots or ("", "")
    return paired(forms_of(sources, file_root), forms_of(targets, model_root), taken)


NESTED = ("scale", "module.scale", "module.module.weight")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.module."])
@pytest.mark.parametrize("is_model_wrapped", [False, True])
def test_a_prefix_of_the_whole_file_or_model_goes_first(prefix: str, is_model_wrapped: bool) -> None:
    """Exact names would exchange ``scale`` and ``module.scale`` in a module that has both."""
    wrapped = tuple(prefix + name for name in NESTED)
    sources, targets = (NESTED, wrapped) if is_model_wrapped else (wrapped, NESTED)
    found = pairing(sources, targets)
    assert found.moves == dict(zip(targets, sources, strict=True))
    assert found.unclear == ()


def test_equal_names_stay_equal_where_the_prefix_fits_fewer() -> None:
    """A file of one wrapped part, and a model with a module that is really called module."""
    found = pairing(("module.scale", "module.module.weight"), ("scale", "module.scale", "module.module.weight"))
    assert found.moves == {"module.scale": "module.scale", "module.module.weight": "module.module.weight"}
    assert found.unclear == ()


def test_what_two_readings_fit_equally_well_is_unclear() -> None:
    """Both are named."""
    found = pairing(("module.a",), ("a", "module.a"))
    assert found.unclear == (("module.a", ("module.a", "a")),)


def test_what_is_left_of_names_that_only_wrappers_tell_apart_is_unclear() -> None:
    """As of an AveragedModel, whose n_averaged has no prefix: exact names alone would exchange the two."""
    found = pairing(("n_averaged", "module.scale", "module.module.scale"), ("scale", "module.scale"))
    assert found.unclear == (("module.module.scale", ("scale",)),)
    said = pairing(("n_averaged", "module.module.scale"), ("scale", "module.scale"), taken=("scale",))
    assert said.unclear == ()
    assert said.moves == {"module.scale": "module.module.scale"}


def test_two_readings_are_never_mixed() -> None:
    """One of them is used for all names; what it leaves is paired if nothing else is like it, or is unclear."""
    inner = ("module.scale", "module.module.scale")
    sources, targets = (*(f"encoder.{name}" for name in inner), "head.w"), tuple(f"module.{name}" for name in inner)
    found = pairing(sources, targets, "encoder.", "")
    assert found.moves == dict(zip(targets, sources, strict=False))
    sources = (
        "module.module.b._fsdp_wrapped_module.w",
        "module.module.b._fsdp_wrapped_module.a._fsdp_wrapped_module.w",
        "module.module.module.w",
        "module.module.module.module.w",
    )
    targets = ("b.module.w", "b.module.a.module.w", "module.module.w", "module.module.module.w")
    found = pairing(sources, targets)
    unclear = {source for source, _choices in found.unclear}
    right = dict(zip(targets, sources, strict=True))
    assert all(right[target] == source for target, source in found.moves.items() if source not in unclear)


def test_names_that_are_the_same_for_the_whole_model_are_taken() -> None:
    """A file with raw weights and their average, and a wrapped model: as torch does. With a name more it is unclear."""
    sources = ("w", "b", "module.w", "module.b")
    found = pairing(sources, ("module.w", "module.b"))
    assert found.moves == {"module.w": "module.w", "module.b": "module.b"}
    assert found.unclear == ()
    found = pairing(sources, ("module.w", "module.b", "module.c"))
    assert {source for source, _choices in found.unclear} == set(sources)


def test_a_root_that_is_the_prefix_of_a_wrapper_is_refused_if_it_would_choose(tmp_path: Path) -> None:
    """It is ignored, so that names outside it would be loaded."""
    own = torch.nn.Linear(2, 2)
    average = {f"module.{name}": tensor + 5 for name, tensor in own.state_dict().items()}
    torch.save({**own.state_dict(), **average}, tmp_path / "both.pt")
    torch.save(average, tmp_path / "average.pt")
    model = torch.nn.Linear(2, 2)
    config = {"kind": "file", "source_root": "module", "on_unexpected": "ignore"}
    with pytest.raises(PlanError, match=r"source_root: module is the prefix of a wrapper .* 2 of 4 names"):
        InitializerStack.from_config([{**config, "path": str(tmp_path / "both.pt")}]).initialize(bind(model, "net"))
    InitializerStack.from_config([{**config, "path": str(tmp_path / "average.pt")}]).initialize(bind(model, "net"))
    assert torch.equal(model.weight, average["module.weight"])


def test_names_below_roots_are_paired_by_what_follows_the_root() -> None:
    """The prefix of the whole file stands before the root that a rule names."""
    sources = tuple(f"module.teacher.{name}" for name in NESTED)
    targets = tuple(f"net.{name}" for name in NESTED)
    found = pairing(sources, targets, "teacher.", "net.")
    assert found.moves == dict(zip(targets, sources, strict=True))


@executes("surgery/name_rules.py", "choose, for example under transforms: {}")
@pytest.mark.parametrize("target", ["a", "module.a"])
def test_the_rule_that_the_message_shows_chooses(target: str, tmp_path: Path) -> None:
    """The file's only prefix is not part of names in rules, so the shown rule leaves it out."""
    torch.save({"module.a": torch.ones(2)}, tmp_path / "one.pt")
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(2))
    model.module = torch.nn.Module()
    model.module.a = torch.nn.Parameter(torch.zeros(2))
    config: dict[str, Any] = {"kind": "file", "path": str(tmp_path / "one.pt"), "on_missing": "keep"}
    with pytest.raises(PlanError, match=r"module\.a may be module\.a or a: ") as raised:
        InitializerStack.from_config([config]).initialize(bind(model, "net"))
    shown = [rule for rule in re.findall(r"\{from: .*?\}", str(raised.value)) if rule.endswith(f"to: {target}}}")]
    rules = [yaml.safe_load(rule) for rule in shown]
    InitializerStack.from_config([{**config, "transforms": rules}]).initialize(bind(model, "net"))
    loaded = {name: tensor.tolist() for name, tensor in model.named_parameters()}
    assert loaded == {"a": [0, 0], "module.a": [0, 0], target: [1, 1]}


segments = st.sampled_from(["module", "_orig_mod", "a", "b"])
trees = st.sets(
    st.lists(segments, min_size=1, max_size=4).map(lambda parts: ".".join([*parts, "w"])), min_size=1, max_size=6
)


@given(trees, st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod."]), st.booleans())
def test_a_wrapped_file_of_the_same_model_is_paired_right_or_refused(names: set[str], prefix: str, swap: bool) -> None:
    """Whatever the module's own names are: never one for another."""
    own, wrapped = tuple(sorted(names)), tuple(sorted(prefix + name for name in names))
    sources, targets = (own, wrapped) if swap else (wrapped, own)
    right = dict(zip(targets, sources, strict=True))
    found = pairing(sources, targets)
    unclear = {source for source, _choices in found.unclear}
    assert {t: s for t, s in found.moves.items() if s not in unclear} == {
        t: s for t, s in right.items() if s not in unclear
    }
    if not any({"module", "_orig_mod"} & set(name.split(".")) for name in names):
        assert (found.moves, unclear) == (right, set())


@given(trees)
def test_bare_names_are_unique_and_stand_for_every_name(names: set[str]) -> None:
    """Rules can say each of them."""
    found = bare_names(names)
    assert sorted(found.values()) == sorted(names)


def test_the_prefix_of_all_is_made_of_wrappers_only() -> None:
    """Neither a common name nor the last segment counts."""
    assert prefix_of_all(("module.a.w", "module.a.b")) == "module."
    assert prefix_of_all(("module._orig_mod.a", "module._orig_mod.module.b")) == "module._orig_mod."
    assert prefix_of_all(("module.module", "module.module")) == "module."
    assert prefix_of_all(("a.module.w",)) == ""
    assert prefix_of_all(()) == ""


class Scaled(torch.nn.Module):
    """A module whose child is really called module."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.module = inner
        self.scale = torch.nn.Parameter(torch.rand(1))


def nested() -> Scaled:
    return Scaled(Scaled(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("is_ours", [False, True])
@pytest.mark.parametrize("further", [{}, {"transforms": [{"from": "absent", "to": "absent", "optional": True}]}])
def test_a_data_parallel_file_of_a_module_with_a_child_called_module_loads(
    tmp_path: Path, is_ours: bool, further: dict[str, Any]
) -> None:
    """From torch.save and from our own writer, with and without rules: every tensor is the right one."""
    source, model = nested(), nested()
    wrapped = torch.nn.Module()
    wrapped.module = source
    if is_ours:
        CheckpointWriter(PathProvider(tmp_path, "run")).save(bind(wrapped, "net"), TrainingIteration(1, 1, 1))
        config = {"kind": "previous_run", "run_id": "run", **further}
    else:
        torch.save(wrapped.state_dict(), tmp_path / "ddp.pt")
        config = {"kind": "file", "path": str(tmp_path / "ddp.pt"), **further}
    InitializerStack.from_config([config], path_provider=PathProvider(tmp_path, "new")).initialize(bind(model, "net"))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_an_average_of_it_is_refused_and_the_advice_loads_it(tmp_path: Path) -> None:
    """n_averaged has no prefix, so that two readings are left; nothing is changed before one is chosen."""
    source, model = nested(), nested()
    before = OrderedDict((name, tensor.clone()) for name, tensor in model.state_dict().items())
    average = torch.optim.swa_utils.AveragedModel(source)
    torch.save(average.state_dict(), tmp_path / "average.pt")
    config: dict[str, Any] = {"kind": "file", "path": str(tmp_path / "average.pt"), "on_unexpected": "ignore"}
    with pytest.raises(PlanError, match=r"module\.module\.scale may be scale or no entry of the model") as raised:
        InitializerStack.from_config([config]).initialize(bind(model, "net"))
    assert "transforms: {from: module.module.scale, to: scale}" in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    config["transforms"] = [{"from": "module.scale", "to": "scale"}]
    InitializerStack.from_config([config]).initialize(bind(model, "net"))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in source.state_dict().items())


class Half(torch.nn.Module):
    """Has ``scale`` with and without ``module.``, so that rules see the prefix in that name only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(1))
        self.module = torch.nn.Module()
        self.module.scale = torch.nn.Parameter(torch.rand(1))
        self.module.b = torch.nn.Linear(2, 2)
        self.module.c = torch.nn.Linear(2, 2)
        self.b = torch.nn.Module()
        self.b.other = torch.nn.Parameter(torch.rand(1))


#: A rule -> the rules that its message advises.
PARTLY: dict[str, str] = {
    "{drop: module.}": "{drop: b.weight}, {drop: b.bias}, {drop: c.}",
    "{drop: mod*.}": "{drop: b.weight}, {drop: b.bias}, {drop: c.}",
    "{keep_model: module.}": "{keep_model: b.weight}, {keep_model: b.bias}, {keep_model: c.}",
    "{only: module.}": "{only: b.weight}, {only: b.bias}, {only: c.}",
}


@executes("surgery/wrapper_rules.py", "Next: further rules under transforms: ")
@pytest.mark.parametrize("rule", PARTLY)
def test_a_rule_for_a_wrapper_that_matches_some_names_below_it_is_refused(tmp_path: Path, rule: str) -> None:
    """It would apply to a part of what it says without a word; with the advised rules it applies to all of it."""
    torch.save(Half().state_dict(), tmp_path / "half.pt")
    model = Half()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rules = [yaml.safe_load(rule)]
    config = {"kind": "file", "path": str(tmp_path / "half.pt"), "on_missing": "keep", "transforms": rules}
    with pytest.raises(PlanError, match=r"so it leaves out module\.b\.weight \(in rules b\.weight\)") as refused:
        InitializerStack.from_config([config]).initialize(bind(model, "net"))
    told = re.search(r"Next: further rules under transforms: (.*)", str(refused.value))
    assert told is not None
    assert told[1] == PARTLY[rule]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rules += yaml.safe_load(f"[{told[1]}]")
    report = InitializerStack.from_config([config]).initialize(bind(model, "net"))
    below, others = ({name for name in before if name.startswith("module.") is is_below} for is_below in (True, False))
    assert set(report.loaded_parameters()) == (below if "only" in rule else others)


@executes("surgery/wrapper_rules.py", "Next: further rules under transforms: ")
def test_a_rename_of_a_wrapper_that_matches_some_names_below_it_is_refused(tmp_path: Path) -> None:
    """The advised rules rename the others as the rule says."""
    source = Half()
    torch.save(source.state_dict(), tmp_path / "half.pt")
    model = torch.nn.Module()
    model.new = torch.nn.Module()
    model.new.scale = torch.nn.Parameter(torch.rand(1))
    model.new.b, model.new.c = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    rules = [{"from": "module.", "to": "new."}]
    config = {"kind": "file", "path": str(tmp_path / "half.pt"), "on_unexpected": "ignore", "transforms": rules}
    while len(rules) < 5:
        with pytest.raises(PlanError, match="so it leaves out") as refused:
            InitializerStack.from_config([config]).initialize(bind(model, "net"))
        told = re.search(r"Next: further rules under transforms: (.*?\})(?: and \d+ more)?$", str(refused.value), re.M)
        assert told is not None
        rules += yaml.safe_load(f"[{told[1]}]")
    InitializerStack.from_config([config]).initialize(bind(model, "net"))
    for name, value in source.module.state_dict().items():
        assert torch.equal(model.state_dict()[f"new.{name}"], value)


def test_a_rule_that_names_no_wrapper_is_not_asked_for_what_wrappers_hide(tmp_path: Path) -> None:
    """Neither one whose word only ends as a wrapper does, nor a rule with a star for any segment."""
    torch.save(Half().state_dict(), tmp_path / "half.pt")
    rules = [{"drop": "*.scale"}, {"keep_model": "module.scale"}]
    config = {"kind": "file", "path": str(tmp_path / "half.pt"), "on_missing": "keep", "transforms": rules}
    report = InitializerStack.from_config([config]).initialize(bind(Half(), "net"))
    assert report.fresh_parameters() == ("module.scale",)
