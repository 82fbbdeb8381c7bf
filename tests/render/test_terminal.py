"""Plans and reports as they are seen: marks, lines within the width, problems with their fix, one line for no news."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from rich.console import Console

from noether_init_core.iteration import TrainingIteration
from noether_init_core.render.terminal import PlanView
from noether_init_core.render.text import MARKS, amount, percent, place_of_rule
from noether_init_core.sets.provenance import InitializerReport, InitReport, counts_in_words
from noether_init_core.surgery.advice import Advice
from noether_init_core.surgery.fit import PlanPart, TargetSpec
from noether_init_core.surgery.name_rules import NameRules, NoetherSurgery, Rule, Transforms
from noether_init_core.surgery.patterns import parse_glob, parse_pattern
from noether_init_core.surgery.plan import Action, LoadPlan, Origin, PlanRow, Problem
from noether_init_core.surgery.planner import plan_load
from noether_init_core.surgery.steps import Split, Step, Transpose

ORIGIN = "pretrain @ latest = E4_U16_S128"


def text(view: PlanView, width: int) -> str:
    """What is printed, without colour."""
    return "\n".join(line.plain for line in view.lines(width))


def spec(*shape: int, dtype: str = "float32") -> TargetSpec:
    size = 4
    for length in shape:
        size *= length
    return TargetSpec(shape, dtype, size)


def planned(
    sources: dict[str, TargetSpec], targets: dict[str, TargetSpec], rules: NameRules | None = None, **more: Any
) -> LoadPlan:
    part = PlanPart("vit", ORIGIN, ("vit_cp=latest_model.th",), sources, targets)
    return plan_load("previous_run", [part], rules or NoetherSurgery(), advice=Advice(), **more)


def gpt(layers: int = 12, width: int = 768) -> dict[str, TargetSpec]:
    """A file with fused projections."""
    found = {"wte.weight": spec(1000, width)}
    for number in range(layers):
        for name, shape in (
            ("c_attn", (3 * width, width)),
            ("mlp.fc", (4 * width, width)),
            ("mlp.proj", (width, 4 * width)),
        ):
            found[f"h.{number}.{name}.weight"], found[f"h.{number}.{name}.bias"] = spec(*shape), spec(shape[0])
    return found


def vit(layers: int = 12, width: int = 768) -> dict[str, TargetSpec]:
    """A model with three projections."""
    found = {"wte.weight": spec(1000, width)}
    for number in range(layers):
        for name in "qkv":
            found[f"blocks.{number}.{name}.weight"] = spec(width, width)
            found[f"blocks.{number}.{name}.bias"] = spec(width)
        for name, shape in (("mlp.fc", (4 * width, width)), ("mlp.proj", (width, 4 * width))):
            found[f"blocks.{number}.{name}.weight"], found[f"blocks.{number}.{name}.bias"] = (
                spec(*shape),
                spec(shape[0]),
            )
    return {**found, "head.weight": spec(10, width), "head.bias": spec(10)}


def rule(number: int, source: str, target: str | Sequence[str], *steps: Step) -> Rule:
    targets = [target] if isinstance(target, str) else target
    label = f"init.yaml:{number + 4} transforms.{number} ({source} -> {', '.join(targets)})"
    return Rule("from", (parse_pattern(source),), label, tuple(map(parse_pattern, targets)), steps)


RULES: list[Rule] = [
    rule(0, "h.<i>.mlp.", "blocks.<i>.mlp."),
    rule(1, "h.<i>.c_attn.<leaf>", [f"blocks.<i>.{name}.<leaf>" for name in "qkv"], Split(0)),
    Rule("keep_model", (parse_glob("head."),), "init.yaml:9 transforms.2 (keep_model head.)"),
]


def surgery() -> LoadPlan:
    """All goes well, by three rules."""
    return planned(gpt(), vit(), Transforms(RULES))


def wrong_pattern() -> LoadPlan:
    """The first rule is misspelt."""
    return planned(gpt(), vit(), Transforms([rule(0, "hh.<i>.mlp.", "blocks.<i>.mlp."), *RULES[1:]]))


def missing_key() -> LoadPlan:
    """The file calls a norm by another name."""
    return planned(
        {"stem.weight": spec(8, 8), "norm_final.weight": spec(8)},
        {"stem.weight": spec(8, 8), "norm.weight": spec(8)},
    )


def wrong_shape() -> LoadPlan:
    """A head of another size."""
    sources = {f"blocks.{number}.weight": spec(24, 24) for number in range(4)}
    return planned(
        {**sources, "head.weight": spec(10, 24), "head.bias": spec(10)},
        {**sources, "head.weight": spec(4, 24), "head.bias": spec(4)},
    )


def test_a_surgery_is_a_line_for_each_thing_that_is_done() -> None:
    """Where it comes from, what is done with it, by which line of the config; then the coverage."""
    assert text(PlanView(surgery(), notes={(0, "vit"): "committed, digests present"}), 120).splitlines() == SURGERY


SURGERY = """\
previous_run  pretrain @ latest = E4_U16_S128   committed, digests present
 = load       wte.weight                  1 key  768.0 k
 > rename     blocks.{0..11}.mlp.*      48 keys   56.7 M  <- h.{0..11}.mlp.*  init.yaml:4
 ~ transform  blocks.{0..11}.{q,k,v}.*  72 keys   21.3 M  <- h.{0..11}.c_attn.*  split: 0  init.yaml:5
 o keep       head.*                     2 keys    7.7 k  init.yaml:9
coverage 99.9 %   no problem   nothing was changed   (--all unfolds)
""".splitlines()

WRONG_PATTERN = """\
previous_run  pretrain @ latest = E4_U16_S128
 = load        wte.weight                  1 key  768.0 k
 ~ transform   blocks.{0..11}.{q,k,v}.*  72 keys   21.3 M  <- h.{0..11}.c_attn.*  split: 0
               init.yaml:5
 o keep        head.*                     2 keys    7.7 k  init.yaml:9
 ! unexpected  h.{0..11}.mlp.*           48 keys   56.7 M
   Near h.0.mlp.fc.weight, the model has: blocks.0.mlp.fc.weight, blocks.0.mlp.proj.weight
 ? missing     blocks.{0..11}.mlp.*      48 keys   56.7 M
   Near blocks.0.mlp.fc.weight, the file has: h.0.mlp.fc.weight, h.0.mlp.proj.weight
 x problem  init.yaml:4 transforms.0 (hh.<i>.mlp. -> blocks.<i>.mlp.) matches nothing; the file has
            h.0.mlp.fc.bias
   fix: from: h.<i>.mlp.
coverage 28.0 %   3 problems   nothing was changed   (--all unfolds)
""".splitlines()

MISSING_KEY = """\
previous_run  pretrain @ latest = E4_U16_S128
 = load        stem.weight        1 key  64
 ! unexpected  norm_final.weight  1 key   8
   Near norm_final.weight, the model has: norm.weight, stem.weight
 ? missing     norm.weight        1 key   8
   Near norm.weight, the file has: norm_final.weight
   fix: - {from: norm_final., to: norm.}  # first
coverage 88.9 %   2 problems   nothing was changed
""".splitlines()

WRONG_SHAPE = """\
previous_run  pretrain @ latest = E4_U16_S128
 = load      blocks.{0..3}.weight  4 keys  2.3 k
 x mismatch  head.weight            1 key     96  file [10,24]  model [4,24]
 x mismatch  head.bias              1 key      4  file [10]  model [4]
   fix: - keep_model: head.
coverage 95.8 %   1 problem   nothing was changed   (--all unfolds)
""".splitlines()

WRONG_SHAPE_NARROW = """\
previous_run  pretrain @ latest = E4_U16_S128
 = load      blocks.{0..3}.weight  4 keys  2.3 k
 x mismatch  head.weight            1 key     96
             file [10,24]  model [4,24]
 x mismatch  head.bias              1 key      4
             file [10]  model [4]
   fix: - keep_model: head.
coverage 95.8 %   1 problem   nothing was changed
    (--all unfolds)
""".splitlines()


@pytest.mark.parametrize(
    ("plan", "lines"),
    [(wrong_pattern, WRONG_PATTERN), (missing_key, MISSING_KEY), (wrong_shape, WRONG_SHAPE)],
    ids=["wrong pattern", "missing key", "wrong shape"],
)
def test_the_likeliest_mistakes_fit_on_a_screen_with_their_fix(plan: Any, lines: list[str]) -> None:
    """At most twelve lines at 100 columns: what is near, and the line of the config that is wrong or to be added."""
    assert text(PlanView(plan()), 100).splitlines() == lines
    assert len(lines) <= 16


def test_a_narrow_terminal_gets_the_same_on_more_lines() -> None:
    """Numbers stay in their columns; what does not fit goes on below the names."""
    assert text(PlanView(wrong_shape()), 60).splitlines() == WRONG_SHAPE_NARROW


@pytest.mark.parametrize("width", [20, 33, 60, 80, 100, 200])
@pytest.mark.parametrize("unfolded", [False, True])
@pytest.mark.parametrize("plan", [surgery, wrong_pattern, missing_key, wrong_shape])
def test_no_line_is_wider_than_the_terminal_and_no_text_is_lost(width: int, unfolded: bool, plan: Any) -> None:
    """Whatever the width: the same characters, broken elsewhere."""
    shown = text(PlanView(plan(), unfolded), width)
    assert max(map(len, shown.splitlines())) <= width
    keys = ["h.{0..11}.mlp.*"] if plan in (surgery, wrong_pattern) else []
    solid = re.sub(r"\s", "", shown)
    assert all(key in solid for key in (*keys * (not unfolded), "coverage", "pretrain@latest=E4_U16_S128"))
    if unfolded:
        assert all(row.key in solid for row in plan().rows)


def test_all_of_it_is_a_line_for_every_row() -> None:
    """In the order of the model, every source and rule said; nothing is left to unfold."""
    lines = text(PlanView(surgery(), unfolded=True), 200).splitlines()
    assert len(lines) == 1 + 123 + 1
    said = " ".join(lines[2].split())
    assert said == "~ transform blocks.0.q.weight 589.8 k <- h.0.c_attn.weight split: 0 init.yaml:5"
    assert "--all" not in lines[-1]


def test_where_all_is_well_there_is_one_line() -> None:
    """Every key is loaded by its name, and the file has no other."""
    names = {f"blocks.{number}.weight": spec(1024, 1024) for number in range(288)}
    assert text(PlanView(planned(names, names)), 120) == (
        "previous_run  pretrain @ latest = E4_U16_S128   288 of 288 keys loaded, 302.0 M parameters, coverage 100 %"
    )


def test_a_part_that_is_well_is_one_line_beside_one_that_is_not() -> None:
    """Models are named where there are several; the coverage is that of all, what two initializers load counts once."""
    well = PlanPart("auto.encoder", "a @ latest", ("e.th",), {"w": spec(4)}, {"w": spec(4)})
    bad = PlanPart("auto.decoder", "a @ latest", ("d.th",), {"w": spec(3)}, {"w": spec(4)})
    plan = plan_load("resume", [well, bad], NoetherSurgery())
    assert text(PlanView(plan), 100).splitlines() == [
        "resume  auto.encoder <- a @ latest   1 of 1 key loaded, 4 parameters, coverage 100 %",
        "resume  auto.decoder <- a @ latest",
        " x mismatch  w  1 key  4  file [3]  model [4]",
        "coverage 50.0 %   1 problem   nothing was changed",
    ]


def test_a_model_that_several_initializers_load_is_shown_once() -> None:
    """Both origins in front with a number each; of each key what happens to it in the end, and by which of them."""
    parts = [
        PlanPart("net", origin, (f"{origin}.th",), {keep: spec(9), other: spec(4)}, {"a": spec(4), "b": spec(4)})
        for origin, keep, other in (("one", "a", "b"), ("two", "b", "a"))
    ]
    plans = [
        plan_load(kind, [part], Transforms([Rule("keep_model", (parse_glob(name),), f"keep {name}")]))
        for kind, part, name in (("first", parts[0], "a"), ("second", parts[1], "b"))
    ]
    notes = {(0, "net"): "committed", (1, "net"): "not committed"}
    assert text(PlanView(LoadPlan.merged(plans), notes=notes), 100).splitlines() == [
        "first + second  (1) one; (2) two   committed   not committed",
        " = load     b  1 key  4  (1)",
        " = load     a  1 key  4  (2)",
        " - removed  a  1 key  9  keep a  (1)",
        " - removed  b  1 key  9  keep b  (2)",
        "coverage 100 %   no problem   nothing was changed",
    ]


def test_casts_say_both_dtypes_and_no_warning_each() -> None:
    """The line is the warning; other warnings are said."""
    plan = planned(
        {f"a.{one}.w": spec(2, dtype="float16") for one in range(9)}, {f"a.{one}.w": spec(2) for one in range(9)}
    )
    assert [warning.code for warning in plan.warnings] == ["cast"]
    assert text(PlanView(plan), 100).splitlines()[1:] == [
        " c cast  a.{0..8}.w  9 keys  18  float16 -> float32",
        "coverage 100 %   no problem   nothing was changed   (--all unfolds)",
    ]
    warned = attrs.evolve(plan, warnings=(*plan.warnings, Problem("unmatched-rule", "x. matches nothing", "vit")))
    assert " w warning  x. matches nothing" in text(PlanView(warned), 100).splitlines()


def test_what_is_long_is_counted_unless_all_is_asked_for() -> None:
    """Twenty lines of one action, five messages beside a line; then how much more there is."""
    many = {f"{chr(97 + one % 26) * (one // 26 + 1)}.{'x' * (one + 1)}": spec(1) for one in range(50)}
    plan = planned({**many, "lost": spec(1)}, many)
    lines = text(PlanView(plan), 100).splitlines()
    assert sum(line.startswith(" = load ") for line in lines) == 21
    assert " = load        30 more keys on 30 lines (--all shows them)" in lines
    problems = tuple(Problem("unwritable", f"number {one}", "vit", ("a.x",)) for one in range(9))
    shown = text(PlanView(attrs.evolve(plan, problems=problems)), 100)
    assert ("number 4" in shown, "number 5" in shown, "4 more messages (--all shows them)" in shown) == (
        True,
        False,
        True,
    )
    assert "number 8" in text(PlanView(attrs.evolve(plan, problems=problems), unfolded=True), 100)


def test_names_cannot_act_on_the_terminal() -> None:
    """Escape sequences and line breaks in names of a file are shown as text, in lines and in messages."""
    shown = text(PlanView(planned({"w": spec(1), "\x1b[2Jgone\n": spec(1)}, {"w": spec(1)})), 100)
    assert all(line.isprintable() for line in shown.splitlines())
    assert " ! unexpected  \\x1b[2Jgone\\n  1 key  1" in shown.splitlines()


def test_symbols_differ_without_colour_and_words_too() -> None:
    """Each action has both, and a style of its own group."""
    assert set(MARKS) == set(Action.__args__)  # type: ignore[attr-defined]
    assert len({mark.symbol for mark in MARKS.values()}) == len({mark.word for mark in MARKS.values()}) == len(MARKS)
    assert MARKS["mismatch"].symbol == "x"


@pytest.mark.parametrize("no_colour", [False, True])
def test_colour_is_only_added(no_colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the same text has colours; with NO_COLOR it has none."""
    monkeypatch.setenv("NO_COLOR", "1" if no_colour else "")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        width=100,
        _environ={"TERM": "xterm-256color", **({"NO_COLOR": "1"} if no_colour else {})},
    )
    console.print(PlanView(wrong_shape()))
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", printed).rstrip("\n") == text(PlanView(wrong_shape()), 100)
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]", printed)) is not no_colour


REPORT = InitReport(
    TrainingIteration(4, 16, 128),
    (
        InitializerReport(
            "previous_run",
            origins=(("mlp", "pretrain @ latest = E4_U16_S128", "mlp.th"),),
            counts={"keep": 2, "load": 4, "removed": 2},
            coverage=0.7,
            restored=("optimizer of mlp",),
            not_restored=("callback ema",),
            passed_over=(("00000003_E3_U12_S96", "mlp.th is damaged"),),
        ),
        InitializerReport("constant"),
    ),
    "auto_resume: x has no checkpoints, the initializers of the config apply",
)


def test_a_report_says_what_was_done() -> None:
    """What was loaded comes first, what the file has besides comes last; foreign names stay on their line."""
    assert str(REPORT).splitlines() == [
        "start E4_U16_S128  (auto_resume: x has no checkpoints, the initializers of the config apply)",
        "previous_run: mlp <- pretrain @ latest = E4_U16_S128 "
        "(4 loaded, 2 kept; 2 of the file unused; optimizer of mlp)",
        "  passed over 00000003_E3_U12_S96: mlp.th is damaged",
        "  not restored: callback ema",
        "constant: no files",
    ]
    assert str(attrs.evolve(REPORT, auto_resume="a\nb\x1b[2J")).splitlines()[0] == "start E4_U16_S128  (a\\nb\\x1b[2J)"


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"keep": 2, "load": 4, "removed": 2}, "4 loaded, 2 kept; 2 of the file unused"),
        ({"load": 4}, "4 loaded"),
        ({"outside": 1, "removed": 2, "rename": 3}, "3 loaded by another name; 3 of the file unused"),
        ({"cast": 1, "reset": 2, "transform": 3}, "3 loaded and transformed, 1 loaded and converted, 2 reset"),
        ({"removed": 1}, "1 of the file unused"),
        ({}, ""),
    ],
)
def test_counts_are_said_in_words(counts: dict[str, int], words: str) -> None:
    """Entries of the model first, entries of the file behind a semicolon."""
    assert counts_in_words(counts) == words


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 k"),
        (999_949, "999.9 k"),
        (999_950, "1.0 M"),
        (302_300_000, "302.3 M"),
        (7_700_000_000, "7.7 G"),
        (10**21, "1000000.0 P"),
    ],
)
def test_amounts_are_short(number: int, text: str) -> None:
    """One decimal, and never 1000 of a unit that has a next one."""
    assert amount(number) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (0.0004, "< 0.1 %"), (0.5, "50.0 %"), (0.99999, "99.9 %"), (0.29, "29.0 %"), (1.0, "100 %")],
)
def test_only_all_is_a_hundred_percent(share: float, text: str) -> None:
    """A model of which one of a million parameters is missing is not covered."""
    assert percent(share) == text


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("init.yaml:7 transforms.2 (a. -> b.)", "init.yaml:7"),
        ("my file.yaml:7 initializers.0.transforms.2 (drop x (y))", "my file.yaml:7"),
        ("initializers.0.transforms.2 (a -> b)", "initializers.0.transforms.2"),
        ("patterns_to_rename: a. -> b.", "patterns_to_rename: a. -> b."),
        ("on_missing: keep", "on_missing: keep"),
    ],
)
def test_rules_are_said_by_their_place(rule: str, text: str) -> None:
    """The names that a transform moves stand on the line already."""
    assert place_of_rule(rule) == text


def test_steps_are_shown_in_order() -> None:
    """As a config writes them."""
    steps = (Transpose(), Split(0, (2, 2)))
    row = PlanRow("net", "a", ("b",), "transform", (2, 2), "float32", 16, "r", "float16", steps=steps, parts=2)
    plan = LoadPlan("file", (row,), origins=(Origin("file", "net", 0, "f", ("f",)),))
    shown = text(PlanView(plan), 100).splitlines()
    assert shown[1] == " ~ transform  a  1 key  4  float16 -> float32  <- b  transpose, split: 0  r"
