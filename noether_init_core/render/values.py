"""Plans, reports, comparisons and lineages as values show themselves: plain text, and HTML for notebooks.

The HTML has tables and inline styles alone: no script, no style sheet, no link. Colours of the notebook stay, light or
dark; marks bring their own background.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape

from rich.console import Console, RenderableType
from rich.text import Text

from noether_init_core.diff.compare import CheckpointDiff
from noether_init_core.lineage import Lineage
from noether_init_core.messages import one_line
from noether_init_core.render.relations import DiffView, LineageView
from noether_init_core.render.terminal import PROBLEM, WARNING, Message, PlanView
from noether_init_core.render.text import Mark, NameLine
from noether_init_core.sets.provenance import InitReport, counts_in_words
from noether_init_core.shown import Shown
from noether_init_core.surgery.plan import LoadPlan

#: Word of a style of rich -> a background on which white letters can be read.
_BACKGROUNDS = {"green": "#1a7f37", "cyan": "#0b7285", "yellow": "#8a6100", "red": "#c92a2a"}
_OTHER = "#636c76"
_CELL = "text-align:left;vertical-align:top;padding:.15em .6em;white-space:pre-wrap;overflow-wrap:anywhere"


def text_of(value: Shown) -> str:
    """What the command prints of ``value``, without colour, as wide as the terminal (80 columns without one).

    What a command knows besides the value is left out: notes on files of a plan, and the names of its options.
    """
    console = Console(file=io.StringIO(), color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(_view(value), soft_wrap=True)
    return captured.get().removesuffix("\n")


def _view(value: Shown) -> RenderableType:
    match value:
        case LoadPlan():
            return PlanView(value, option="")
        case CheckpointDiff():
            return DiffView(value, option="")
        case Lineage():
            return LineageView(value)
    raise TypeError(f"a {type(value).__name__} has no view")


def html_of(value: Shown) -> str:
    """The same as HTML, with the lines of the text as rows of tables. Every text is escaped."""
    match value:
        case LoadPlan():
            parts = _plan(PlanView(value, option=""))
        case CheckpointDiff():
            parts = _diff(DiffView(value, option=""))
        case Lineage():
            parts = _lineage(LineageView(value))
        case InitReport():
            parts = _report(value)
        case _:
            raise TypeError(f"a {type(value).__name__} has no view")
    return f"<div>{''.join(parts)}</div>"


def _plan(view: PlanView) -> Iterable[str]:
    content = view.content()
    for section in content.sections:
        rows = []
        for line, messages in section.lines:
            rows.append(_row(_name_cells(line)))
            rows += (f'<tr><td></td><td colspan="4" style="{_CELL}">{_message(one)}</td></tr>' for one in messages)
        yield _line(f"<b>{_text(section.kinds)}</b> {_text(section.files)}", *map(_text, section.notes))
        if rows:
            yield _table(("action", "keys", "", "elements", ""), rows)
    for mark, messages in ((PROBLEM, content.problems), (WARNING, content.warnings)):
        for one in messages:
            yield _line(f"{_mark(mark)} {_message(one)}")
    if content.summary:
        yield _line(*map(_text, content.summary))


def _diff(view: DiffView) -> Iterable[str]:
    for name, words, tensors in view.sides():
        yield _line(f"<b>{name}</b> {_text(words)}", _text(tensors))
    models = view.models()
    for model, lines in models.items():
        if len(models) > 1:
            yield _line(f"<b>{_text(model)}</b>")
        yield _table(("state", "keys", "", "elements", ""), (_row(_name_cells(line)) for line in lines))
    moved = [
        _row((f"{row.relative_norm:.3g}", "" if row.cosine is None else f"{row.cosine:.6f}", _code(row.key)))
        for row in view.largest()
    ]
    if moved:
        yield _line("<b>moved most</b>")
        yield _table(("drift", "cosine", "key"), moved)
    for note in view.diff.notes:
        yield _line(f"{_mark(WARNING)} {_text(note)}")
    yield _line(*map(_text, view.summary()))


def _lineage(view: LineageView) -> Iterable[str]:
    rows = []
    for line in view.lines():
        first, *others = map(_text, line.phrases)
        style = f"{_CELL};padding-left:{0.6 + 1.5 * line.depth}em"
        rows.append(f'<tr><td style="{style}">{first}</td>{_cells([_joined(others)])}</tr>')
    yield _table(("run or file", ""), rows)
    for note in view.notes():
        yield _line(_text(note))


def _report(report: InitReport) -> Iterable[str]:
    yield _line(f"<b>start</b> {_text(str(report.start))}", _text(report.auto_resume))
    rows = []
    for one in report.initializers:
        said = [
            *one.restored,
            *(f"passed over {name}: {reason}" for name, reason in one.passed_over),
            *(f"not restored: {what}" for what in one.not_restored),
        ]
        sources = [f"{model} <- {origin}" for model, origin, _file in one.origins] or ["no files"]
        columns = [one.kind], sources, [counts_in_words(one.counts)], said
        rows.append(_row("<br>".join(map(_text, lines)) for lines in columns))
    if rows:
        yield _table(("initializer", "from", "tensors", ""), rows)


def _name_cells(line: NameLine) -> list[str]:
    numbers = line.numbers or ("", "")
    return [_mark(line.mark), _code(line.name), *map(_text, numbers), _joined(map(_text, line.details))]


def _message(message: Message) -> str:
    fix = f"<b>fix:</b> {_code(message.fix)}" if message.fix else ""
    return "<br>".join(filter(None, (_text(message.said), fix)))


def _table(names: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th style="{_CELL}">{name}</th>' for name in names)
    style = "border-collapse:collapse;margin:.3em 0"
    return f'<table style="{style}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{_cells(cells)}</tr>"


def _cells(cells: Iterable[str]) -> str:
    return "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells)


def _line(*phrases: str) -> str:
    return f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{_joined(phrases)}</div>'


def _joined(phrases: Iterable[str]) -> str:
    return "   ".join(filter(None, phrases))


def _mark(mark: Mark) -> str:
    colour = next((colour for word, colour in _BACKGROUNDS.items() if word in mark.style), _OTHER)
    style = f"background-color:{colour};color:#fff;padding:0 .4em;border-radius:.2em;white-space:nowrap"
    return f'<span style="{style}">{_text(mark.symbol)} {_text(mark.word)}</span>'


def _code(text: str) -> str:
    return f'<code style="white-space:pre-wrap">{_text(text)}</code>'


def _text(text: Text | str) -> str:
    return escape(one_line(text.plain if isinstance(text, Text) else text))
