"""``str()`` of a plan, a comparison and a lineage is what the command prints; a notebook gets tables of the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from noether_init_core import (
    CheckpointWriter,
    InitializerStack,
    InitReport,
    LoadPlan,
    PathProvider,
    PlanRow,
    Problem,
    TrainingIteration,
    bind,
    cli,
    compare_checkpoints,
    lineage_of,
)
from noether_init_core.diff.compare import CheckpointDiff, DiffRow
from noether_init_core.diff.sides import DiffSide
from noether_init_core.lineage import Lineage, LineageEdge, LineageNode
from noether_init_core.sets.provenance import InitializerReport
from noether_init_core.shown import Shown

MODEL = """
import torch


def build(classes=4):
    layers = {f"layer{number}": torch.nn.Linear(8, 8) for number in range(6)}
    return torch.nn.ModuleDict({**layers, "head": torch.nn.Linear(8, classes)})
"""
CONFIG = "initializers:\n  - {kind: previous_run, run_id: pretrain, load_optim: false}\n"
#: What a terminal or a browser would act on, and how it is to be read.
HOSTILE = {
    "a\nforged": "a\\nforged",
    "b\x1b[2Jgone": "b\\x1b[2Jgone",
    "c\u202eturned": "c\\u202eturned",
    "<script>alert(1)</script>": "<script>alert(1)</script>",
    '"><img src=x onerror=1>': '"><img src=x onerror=1>',
    "d&amp;e  f": "d&amp;e  f",
}


class Page(HTMLParser):
    """The tags and attributes of HTML, and the text of every cell and line."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.lines: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _value in attrs)
        if tag == "br":
            self.handle_data("\n")
            return
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "div":
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open:
            self.rows[-1][-1] += data
        elif self._open[-1:] != ["th"]:
            self.lines[-1] += data

    @property
    def texts(self) -> list[str]:
        """All of it, without what is empty."""
        return [text for text in (*self.lines, *(cell for row in self.rows for cell in row)) if text]


def page_of(value: Shown) -> Page:
    """The value as a notebook gets it, which is tables with inline styles and nothing else."""
    page = Page(value._repr_html_())
    assert page.tags <= {"div", "table", "thead", "tbody", "tr", "th", "td", "b", "code", "span", "br"}
    assert page.attributes <= {"style", "colspan"}
    return page


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints, in a folder with a run, another head and a config; 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shown_models", raising=False)
    Path("shown_models.py").write_text(MODEL)
    Path("init.yaml").write_text(CONFIG)
    CheckpointWriter(PathProvider("runs", "pretrain")).save(model(9), TrainingIteration(1, 2, 3), optimizer=False)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ninit", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    return call


def model(classes: int = 4) -> Any:
    space: dict[str, Any] = {}
    exec(MODEL, space)
    torch.manual_seed(0)
    return bind(space["build"](classes), name="model")


def stack(**more: Any) -> InitializerStack:
    entry = {"kind": "previous_run", "run_id": "pretrain", "load_optim": False, **more}
    return InitializerStack.from_config([entry], path_provider=PathProvider("runs", "warm"))


def test_a_plan_is_the_table_of_the_command(printed: Callable[..., str]) -> None:
    """Folded lines, problems, fix and summary; not what the command knows besides, nor its options."""
    shown = printed("plan", "init.yaml", "--model", "shown_models:build", "--runs", "runs")
    plan = InitializerStack.from_file("init.yaml", path_provider=PathProvider("runs", "warm")).plan(model())
    assert str(plan).splitlines()[:3] == [
        "previous_run  pretrain @ latest = E1_U2_S3",
        " = load      layer{0..5}.*  12 keys  432",
        " x mismatch  head.weight      1 key   32  file [9,8]  model [4,8]",
    ]
    assert f"{plan}\n" == shown.replace("   committed, digests present", "").replace("   (--all unfolds)", "")
    assert repr(plan) == "<LoadPlan: rows=14, problems=1, origins=1>"


def test_a_plan_in_a_notebook_has_a_row_for_each_line(printed: Callable[..., str]) -> None:
    """Marks, names, numbers and details are cells; a problem stands below its line, with its fix."""
    page = page_of(stack().plan(model()))
    assert page.rows[1:3] == [
        ["= load", "layer{0..5}.*", "12 keys", "432", ""],
        ["x mismatch", "head.weight", "1 key", "32", "file [9,8]  model [4,8]"],
    ]
    assert page.rows[-1][-1].startswith("fix: ")
    assert page.lines[1] == "previous_run pretrain @ latest = E1_U2_S3"
    assert page.lines[-1] == "coverage 92.3 %   1 problem   nothing was changed"


def test_a_plan_without_news_is_one_line(printed: Callable[..., str]) -> None:
    """Where every key is loaded there is no table."""
    page = page_of(stack().plan(model(9)))
    assert page.rows == []
    assert page.lines[1:] == [
        "previous_run pretrain @ latest = E1_U2_S3   14 of 14 keys loaded, 513 parameters, coverage 100 %"
    ]


def test_a_report_in_a_notebook_says_what_its_text_says(printed: Callable[..., str]) -> None:
    """A row for each initializer."""
    report = stack(transforms=[{"keep_model": "head."}]).initialize(model())
    page = page_of(report)
    assert page.lines[1:] == ["start E0_U0_S0"]
    (row,) = page.rows[1:]
    assert row[:2] == ["previous_run", "model <- pretrain @ latest = E1_U2_S3"]
    assert row[2] == "12 loaded, 2 kept; 2 of the file unused"
    assert f"({row[2]})" in str(report)
    assert repr(report) == "<InitReport: initializers=1, sources=1, tensors=14>"


def test_a_comparison_is_what_the_command_prints(printed: Callable[..., str]) -> None:
    """Both sides, folded lines, what moved most, the numbers of the whole."""
    CheckpointWriter(PathProvider("runs", "other")).save(model(), TrainingIteration(1, 2, 3), optimizer=False)
    diff = compare_checkpoints("runs/pretrain", "runs/other")
    assert f"{diff}\n" == printed("diff", "runs/pretrain", "runs/other")
    page = page_of(diff)
    assert page.lines[1:3] == [
        "A pretrain @ latest = E1_U2_S3   14 tensors",
        "B other @ latest = E1_U2_S3   14 tensors",
    ]
    assert page.rows[1] == ["= equal", "layer{0..5}.*", "12 keys", "432", ""]
    assert page.lines[-1] == "drift 0   cosine 1.000000   432 of 513 elements compared   2 keys not comparable"
    assert repr(diff) == "<CheckpointDiff: rows=14>"


def test_a_lineage_is_what_the_command_prints(printed: Callable[..., str]) -> None:
    """Of a run and of an output root."""
    initializers = stack(transforms=[{"keep_model": "head."}])
    warm = model()
    report = initializers.initialize(warm)
    CheckpointWriter(PathProvider("runs", "warm"), report=report).save(
        warm, TrainingIteration(1, 1, 1), optimizer=False
    )
    for path in ("runs/warm", "runs"):
        assert f"{lineage_of(path)}\n" == printed("lineage", path)
    lineage = lineage_of("runs/warm")
    assert [row[0] for row in page_of(lineage).rows[1:]] == ["o warm", "came from", "o pretrain"]
    assert page_of(lineage).rows[3][1].startswith("previous_run @ latest = E1_U2_S3   model: 12 tensors (85.7 %)")
    assert repr(lineage) == "<Lineage: nodes=2, edges=1>"


def hostile_values(name: str) -> list[Shown]:
    """Each of the four, with the name wherever it has one."""
    row = PlanRow(name, name, (), "missing", (2,), "float32", 8, name)
    plan = LoadPlan(name, (row,), (Problem("other", name, name),), (Problem("other", name, name),))
    edge = LineageEdge(name, "b", name, name, name, name, name, name, 1, 0.5, False, name)
    nodes = (LineageNode(name, "run", name, name, name, note=name), LineageNode("b", "run", "b", None, "b"))
    side = DiffSide(name, name)
    return [
        plan,
        InitReport(
            TrainingIteration(0, 0, 0),
            (InitializerReport(name, origins=((name, name, name),), restored=(name,), not_restored=(name,)),),
            name,
        ),
        CheckpointDiff(side, side, (DiffRow(name, name, "only_a", note=name),), notes=(name,)),
        Lineage("b", nodes, (edge,), (name,)),
    ]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_texts(name: str) -> None:
    """They make no tag, no line and no direction of text, in HTML, in the text and in the short form."""
    for value in hostile_values(name):
        assert HOSTILE[name] in "".join(page_of(value).texts)
        for text in (*page_of(value).texts, *str(value).split("\n"), repr(value)):
            assert text.replace("\n", "").isprintable()
        assert not any(line.startswith("forged") for line in str(value).splitlines())
        assert "\n" not in repr(value)


def test_what_is_long_is_folded() -> None:
    """Of ten thousand lines that cannot be folded each table has a few, and no option of a command is named."""
    names = [f"{chr(97 + number % 26)}{number * 7919 % 10007}.{number % 7}x" for number in range(10_000)]
    rows = tuple(
        PlanRow("net", name, (), "missing", (number,), "float32", 8, name) for number, name in enumerate(names)
    )
    problems = tuple(Problem("other", name, "net") for name in names)
    plan = LoadPlan("file", rows, problems)
    differences = tuple(DiffRow("net", name, "shape", (number,), (1,)) for number, name in enumerate(names))
    for value in (plan, CheckpointDiff(DiffSide("a"), DiffSide("b"), differences)):
        page = page_of(value)
        assert len(page.rows) == 22
        assert "more key" in page.rows[-1][1]
        assert len(value._repr_html_()) < 20_000
        assert "--all" not in value._repr_html_() + str(value)
        assert len(repr(value)) < 80


def test_the_text_has_no_colour_where_colour_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says of terminals."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    plan = LoadPlan("file", (PlanRow("net", "w", (), "keep", (2,), "float32", 8),))
    assert str(plan).splitlines()[1] == " o keep  w  1 key  2"
    assert "\x1b" not in str(plan)
