"""Each fix that a plan prints is pasted where it says, until the plan has no problem; no file of weights changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from support.advice import digests, executes, fixes_of, pasted
from support.command import Invoke, console

from noether_init_core import CheckpointWriter, PathProvider, TrainerState, TrainingIteration, bind, compose

MODELS = """
import torch
from torch import nn
from noether_init_core import bind, compose


def linear():
    return nn.Sequential(nn.Linear(3, 2))


def stem_and_head(classes=4):
    return nn.ModuleDict({"stem": nn.Linear(3, 2), "head": nn.Linear(2, classes)})


def normed(layers=12):
    return nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(layers)])


class Vocabulary(nn.Module):
    def __init__(self, tokens=20, channels=4, bias=False, tied=False):
        super().__init__()
        self.wte, self.conv = nn.Embedding(tokens, 4), nn.Conv2d(channels, 4, 3)
        self.lm_head = nn.Linear(4, tokens, bias=bias)
        if tied:
            self.lm_head.weight = self.wte.weight


def larger_vocabulary():
    return Vocabulary(32)


def larger_vocabulary_with_bias():
    return Vocabulary(32, bias=True)


def larger_tied_vocabulary():
    return Vocabulary(32, tied=True)


def smaller_vocabulary():
    return Vocabulary(16)


def more_channels():
    return Vocabulary(channels=9)


def detector(classes=3):
    return nn.ModuleDict({f"level{i}": nn.ModuleDict({"cls": nn.Conv2d(4, classes, 1), "box": nn.Conv2d(4, 4, 1)})
                          for i in range(12)})


def more_classes():
    return detector(5)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = normed(1), normed(1)


def two():
    return Two()


def composite():
    return compose("net", {"encoder": bind(stem_and_head(5), "encoder"), "decoder": bind(linear(), "decoder")})
"""

State = Mapping[str, torch.Tensor]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Invoke]:
    """The console script, in a folder with models; on a terminal that folds no line."""
    with console(tmp_path, monkeypatch, capsys, fix_models=MODELS) as call:
        monkeypatch.syspath_prepend(tmp_path)
        yield call


def built(name: str, *arguments: int, **keywords: bool) -> dict[str, torch.Tensor]:
    import fix_models  # type: ignore[import-not-found]  # written by the fixture

    state: dict[str, torch.Tensor] = getattr(fix_models, name)(*arguments, **keywords).state_dict()
    return state


def followed(invoke: Invoke, model: str, *more: str, most: int = 6) -> tuple[list[str], float]:
    """Paste the first fix and plan again, until the plan is fine; returns the fixes and the coverage at last."""
    before = {name: digest for name, digest in digests(Path()).items() if name != "init.yaml"}
    seen: list[str] = []
    # the whole messages, of which a terminal shows the fix in a line of its own
    invoke("plan", "init.yaml", "--model", f"fix_models:{model}", *more, "--json", "-")
    while len(seen) <= most:
        result = invoke("plan", "init.yaml", "--model", f"fix_models:{model}", *more)
        assert result.code in (0, 1), result.err
        if result.code == 0:
            after = {name: digest for name, digest in digests(Path()).items() if name != "init.yaml"}
            assert after == before
            words = result.out.split()
            return seen, float(words[words.index("coverage") + 1])
        assert fixes_of(result.out), result.out + result.err
        fix = fixes_of(result.out)[0]
        assert fix not in seen, result.out
        pasted(Path("init.yaml"), fix)
        seen.append(fix)
    raise AssertionError(seen)


def config_of(*files: str, more: str = "") -> None:
    lines = "".join(f"  - kind: file\n    path: {file}\n{more}" for file in files)
    Path("init.yaml").write_text(f"initializers:\n{lines}")


EXTRA: dict[str, State] = {
    "n_averaged": {"n_averaged": torch.tensor(1)},
    "head.": {"head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)},
    "model_ema.": {"model_ema.0.weight": torch.ones(2, 3), "model_ema.0.bias": torch.ones(2)},
    "0._extra_state": {"0._extra_state": torch.ones(3, dtype=torch.uint8)},
    "teacher.": {f"teacher.blocks.{i}.weight": torch.ones(2) for i in range(20)},
    "'0.weight #x'": {"0.weight #x": torch.ones(2)},
}


@executes("surgery/fit.py", "unread add:")
@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("rules", ["", "    transforms:\n      - {from: 0., to: 0.}\n"], ids=["none", "some"])
def test_entries_that_only_the_file_has_can_be_left_unread(invoke: Invoke, name: str, rules: str) -> None:
    """One rule, and nothing else of the file is dropped."""
    torch.save({**built("linear"), **EXTRA[name]}, "w.pt")
    config_of("w.pt", more=rules)
    fixes, coverage = followed(invoke, "linear")
    rule = f"- drop: {name}  # first in transforms of " if rules else f"transforms: [{{drop: {name}}}]  # in "
    assert fixes == [f"{rule}initializers.0, init.yaml:2"]
    assert coverage == 100


def test_names_that_no_glob_can_say_are_left_by_the_policy(invoke: Invoke) -> None:
    """Such as those with an empty segment."""
    torch.save({**built("linear"), "a..b": torch.ones(2)}, "w.pt")
    config_of("w.pt")
    assert followed(invoke, "linear") == (["on_unexpected: ignore  # in initializers.0, init.yaml:2"], 100)


def test_another_head_gets_two_fixes(invoke: Invoke) -> None:
    """The model's own is kept, and that of the file is left unread."""
    state = built("stem_and_head")
    torch.save(
        {name.replace("head.", "classifier."): value for name, value in state.items()} | {"extra": state["stem.bias"]},
        "w.pt",
    )
    config_of("w.pt")
    fixes, _coverage = followed(invoke, "stem_and_head")
    assert fixes[0].startswith("transforms: [{from: classifier., to: head.}]")
    assert fixes[1].startswith("- drop: extra")


def test_counters_that_torch_fills_are_kept_by_one_rule(invoke: Invoke) -> None:
    """Of any number of layers; no fix is needed where torch fills them by itself."""
    state = built("normed")
    for name in [name for name in state if "num_batches" in name]:
        del state[name]
    torch.save(dict(state), "w.pt")
    config_of("w.pt")
    assert followed(invoke, "normed") == ([], 100)
    torch.save(state, "w.pt")  # with the versions of its modules, for which torch requires the counters
    fixes, coverage = followed(invoke, "normed")
    assert fixes == ["transforms: [{keep_model: '*.1.num_batches_tracked'}]  # in initializers.0, init.yaml:2"]
    assert coverage == 100


@executes("surgery/fit.py", "Next: {}")
@pytest.mark.parametrize("model", ["larger_vocabulary", "more_channels", "smaller_vocabulary"])
def test_the_common_part_of_a_table_is_taken_over(invoke: Invoke, model: str) -> None:
    """Of a larger or smaller vocabulary, and of more channels; the weights of the file are not thrown away."""
    torch.save(built("Vocabulary"), "w.pt")
    config_of("w.pt")
    fixes, coverage = followed(invoke, model)
    step = {"larger_vocabulary": "{pad: {size: 32}}", "more_channels": "{pad: {size: 9, dim: 1}}"}
    assert all(step.get(model, "{slice: {stop: 16}}") in fix for fix in fixes)
    assert coverage > 50
    import fix_models

    from noether_init_core import InitializerStack

    module = getattr(fix_models, model)()
    own = {name: value.clone() for name, value in module.state_dict().items()}
    InitializerStack.from_file("init.yaml").initialize(bind(module, "net"))
    for name, value in module.state_dict().items():
        file = torch.load("w.pt", weights_only=True)[name]
        expected = own[name].clone() if own[name].numel() >= file.numel() else file[: own[name].shape[0]].clone()
        expected[tuple(slice(0, size) for size in map(min, file.shape, expected.shape))] = file[
            tuple(slice(0, size) for size in map(min, file.shape, expected.shape))
        ]
        assert torch.equal(value, expected), name


def test_an_output_layer_follows_its_table(invoke: Invoke) -> None:
    """With its bias, and where both are one tensor."""
    torch.save(built("Vocabulary", bias=True), "w.pt")
    config_of("w.pt")
    fixes, coverage = followed(invoke, "larger_vocabulary_with_bias")
    assert len(fixes) == 3
    assert all("pad: {size: 32}" in fix for fix in fixes)
    assert coverage > 50
    torch.save(built("Vocabulary", tied=True), "w.pt")
    config_of("w.pt")
    fixes, coverage = followed(invoke, "larger_tied_vocabulary")
    assert len(fixes) == 2
    assert all("pad: {size: 32}" in fix for fix in fixes)


@executes("surgery/fit.py", "there add:")
def test_another_number_of_classes_at_many_levels(invoke: Invoke) -> None:
    """Names agree, so that suggest is not named."""
    torch.save(built("detector"), "w.pt")
    config_of("w.pt")
    shown = invoke("plan", "init.yaml", "--model", "fix_models:more_classes").out
    assert "Names differ" not in shown
    fixes, _coverage = followed(invoke, "more_classes")
    assert fixes == ["transforms: [{keep_model: level*.cls.}]  # in initializers.0, init.yaml:2"]


def test_a_shard_says_that_the_file_lacks_entries(invoke: Invoke) -> None:
    """A file with the first half of the layers: no name differs."""
    state = built("normed")
    torch.save(dict(list(state.items())[: len(state) // 2]), "w.pt")
    config_of("w.pt")
    shown = invoke("plan", "init.yaml", "--model", "fix_models:normed").out
    assert "Names differ" not in shown
    fixes, coverage = followed(invoke, "normed")
    assert len(fixes) == 1
    assert 0 < coverage < 100


def test_two_files_for_one_model(invoke: Invoke) -> None:
    """All but the last keep what a later one loads; the last one must have the rest."""
    state = built("two")
    for part in ("encoder", "decoder"):
        torch.save({name: value for name, value in state.items() if name.startswith(part)}, f"{part}.pt")
    config_of("encoder.pt", "decoder.pt")
    assert followed(invoke, "two") == (["on_missing: keep  # in initializers.0, init.yaml:2"], 100)
    config_of("encoder.pt", "encoder.pt")
    fixes, coverage = followed(invoke, "two")
    assert fixes[0] == "on_missing: keep  # in initializers.0, init.yaml:2"
    assert fixes[1].startswith("transforms: [{keep_model: decoder.}]  # in initializers.1, init.yaml:")
    assert coverage == 50


def test_suggested_rules_for_two_files_leave_no_problem(invoke: Invoke) -> None:
    """With unequal shapes they are sure, and what is printed is pasted as it is."""
    for part, module in (("encoder", torch.nn.Linear(3, 4)), ("decoder", torch.nn.Linear(5, 2))):
        torch.save({f"net.{part}.{name}": value for name, value in module.state_dict().items()}, f"{part}.pt")
    Path("fix_models.py").write_text(
        "import torch\n\n\ndef build():\n"
        "    return torch.nn.ModuleDict({'encoder': torch.nn.Linear(3, 4), 'decoder': torch.nn.Linear(5, 2)})\n"
    )
    config_of("encoder.pt", "decoder.pt")
    asked = ("--model", "fix_models:build")
    shown = invoke("suggest", "init.yaml", *asked)
    assert shown.code == 0, shown.out
    blocks = shown.out.split("# for initializers.")[1:]
    text = "initializers:\n"
    for file, block in zip(("encoder.pt", "decoder.pt"), blocks, strict=True):
        lines = block.partition("\n")[2].splitlines()
        text += f"  - kind: file\n    path: {file}\n" + "".join(f"    {line}\n" for line in lines)
    Path("init.yaml").write_text(text)
    assert invoke("plan", "init.yaml", *asked).code == 0


def test_suggested_rules_are_relative_to_the_roots(invoke: Invoke) -> None:
    """Beside source_root and target_root, which stay in the config."""
    torch.save(
        {f"net.body.{name}": value for name, value in built("linear").items()} | {"ema.x": torch.ones(1)}, "w.pt"
    )
    config_of("w.pt", more="    source_root: net\n")
    shown = invoke("suggest", "init.yaml", "--model", "fix_models:linear")
    assert shown.code == 0
    assert "the rules are relative to source_root: net\n" in shown.out
    config_of("w.pt", more="    source_root: net\n" + "".join(f"    {line}\n" for line in shown.out.splitlines()))
    assert invoke("plan", "init.yaml", "--model", "fix_models:linear").code == 0


@pytest.mark.parametrize(
    "state",
    [
        {"n_averaged": torch.tensor(1)},
        {"head.weight": torch.ones(2, 2)},
        {"model_ema.0.weight": torch.ones(2, 3), "model_ema.0.bias": torch.ones(2)},
    ],
)
def test_suggest_ends_as_the_plan_with_its_rules(invoke: Invoke, state: State) -> None:
    """Exit code 0 only where the plan with the pasted rules has none."""
    torch.save({**built("linear"), **state}, "w.pt")
    config_of("w.pt")
    shown = invoke("suggest", "init.yaml", "--model", "fix_models:linear")
    config_of("w.pt", more="".join(f"    {line}\n" for line in shown.out.splitlines()))
    assert shown.code == 0
    assert invoke("plan", "init.yaml", "--model", "fix_models:linear").code == 0


def test_suggest_does_not_call_optimizer_state_fine_that_the_plan_refuses(invoke: Invoke) -> None:
    """The rules are right, and the state of the optimizer is of another class."""
    Path("fix_models.py").write_text(
        "import torch\nfrom noether_init_core import bind\n\n\ndef build():\n"
        "    module = torch.nn.Linear(3, 2)\n"
        "    return bind(module, 'net', torch.optim.SGD(module.parameters(), 0.1))\n"
    )
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    CheckpointWriter(PathProvider("runs", "before")).save(bind(module, "net", optimizer), TrainingIteration(1, 1, 1))
    Path("init.yaml").write_text("initializers:\n  - {kind: previous_run, run_id: before, load_optim: true}\n")
    asked = ("init.yaml", "--model", "fix_models:build", "--runs", "runs")
    assert invoke("plan", *asked).code == 1
    shown = invoke("suggest", *asked)
    assert shown.code == 1
    assert "optimizer state" in shown.out


def saved_run(models: object) -> None:
    CheckpointWriter(PathProvider("runs", "before")).save(models, trainer=TrainerState(seed=0))


@pytest.mark.parametrize("value", ["true", "{verify: header}", "{transforms: [{from: stem., to: stem.}]}"])
def test_a_fix_below_auto_resume_says_so(invoke: Invoke, value: str) -> None:
    """Whatever auto_resume is: a switch, fields, or fields with rules."""
    import fix_models

    saved_run(bind(fix_models.stem_and_head(), "model"))
    Path("init.yaml").write_text(f"auto_resume: {value}\ninitializers: []\n")
    Path("fix_models.py").write_text(MODELS.replace("classes=4", "classes=7"))
    sys.modules.pop("fix_models", None)
    fixes, _coverage = followed(invoke, "stem_and_head", "--runs", "runs", "--run-id", "before")
    assert len(fixes) == 1
    assert "keep_model: head." in fixes[0]


def test_a_fix_in_the_resolved_config_names_the_submodel(invoke: Invoke) -> None:
    """The list of initializers of that submodel, below the model."""
    import fix_models

    saved_run(
        compose(
            "net",
            {"encoder": bind(fix_models.stem_and_head(4), "encoder"), "decoder": bind(fix_models.linear(), "decoder")},
        )
    )
    one = "    initializers:\n      - {kind: previous_run, run_id: before, model_name: net."
    Path("init.yaml").write_text(
        f"model:\n  name: net\n  kind: some.Model\n  encoder:\n{one}encoder}}\n  decoder:\n{one}decoder}}\n"
        "trainer:\n  kind: some.Trainer\n"
    )
    fixes, _coverage = followed(invoke, "composite", "--runs", "runs")
    assert [fix.partition("  # in ")[2].partition(",")[0] for fix in fixes] == ["model.encoder.initializers.0"]


@pytest.mark.parametrize(
    "fields", ["keys_to_remove: [extra.weight]", "patterns_to_remove: [extra]", "patterns_to_instantiate: [head.w]"]
)
def test_fields_of_noether_get_further_entries(invoke: Invoke, fields: str) -> None:
    """A field that the config has already is printed with its present entries."""
    module = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("extra", "stem", "head", "other")})
    saved_run(bind(module, "model"))
    Path("init.yaml").write_text(
        f"initializers:\n  - {{kind: previous_run, run_id: before, on_missing: error, {fields}}}\n"
    )
    Path("fix_models.py").write_text(
        "import torch\n\n\ndef build():\n"
        "    return torch.nn.ModuleDict({'stem': torch.nn.Linear(2, 2), 'head': torch.nn.Linear(2, 3)})\n"
    )
    fixes, _coverage = followed(invoke, "build", "--runs", "runs")
    assert 1 <= len(fixes) <= 4


@pytest.mark.parametrize("value", ["true", "{verify: header}"])
def test_a_line_for_the_optimizer_says_where_it_goes(invoke: Invoke, value: str) -> None:
    """Below auto_resume, whatever that is; the optimizer is of another class than the one that was saved."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    CheckpointWriter(PathProvider("runs", "before")).save(
        bind(module, "net", optimizer), trainer=TrainerState(seed=0), iteration=TrainingIteration.zero()
    )
    Path("fix_models.py").write_text(
        "import torch\nfrom noether_init_core import bind\n\n\ndef build():\n"
        "    module = torch.nn.Linear(3, 2)\n"
        "    return bind(module, 'net', torch.optim.SGD(module.parameters(), 0.1, momentum=0.9))\n"
    )
    Path("init.yaml").write_text(f"auto_resume: {value}\ninitializers: []\n")
    fixes, coverage = followed(invoke, "build", "--runs", "runs", "--run-id", "before")
    expected = (
        "auto_resume: {load_optim: false}" if value == "true" else "load_optim: false  # in auto_resume, init.yaml:1"
    )
    assert [fix[: len(expected)] for fix in fixes] == [expected]
    assert coverage == 100
