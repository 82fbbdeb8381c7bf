"""Plans on a terminal: a line for each fold, each problem with its fix, and a summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import attrs
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from noether_init_core.messages import counted, listed, one_line
from noether_init_core.render.folding import Fold, KeyPattern, fold_rows
from noether_init_core.render.text import (
    MARKS,
    Mark,
    NameLine,
    amount,
    filled,
    in_columns,
    percent,
    place_of_rule,
    sizes,
)
from noether_init_core.surgery.plan import Action, LoadPlan, Origin, PlanRow, Problem, counted_rows
from noether_init_core.surgery.steps import described

_INDENT = "   "
_NARROWEST = 20
# A folded plan fits on one screen; --all shows every line.
_MOST_LINES, _MOST_PROBLEMS, _MOST_TEXTS, _MOST_SOURCES = 20, 5, 12, 3
PROBLEM, WARNING = Mark("x", "problem", "bold red"), Mark("w", "warning", "yellow")
#: Code of a problem -> actions of the rows that it concerns; other codes concern rows of any action.
_ACTIONS = {"missing": ("missing",), "mismatch": ("mismatch",), "step": ("mismatch",), "dtype": ("mismatch",)}
#: The beginning of the part of a message that names the fix.
_FIX = re.compile(
    r"(?:^| |\. )(?:Next|To keep the model's own values there add|To leave it unread add|One rename fits all): "
)
_NEAR = re.compile(r"Near [^ ]+, the (?:file|model) has: [^ ]+(?:, [^ ]+)*")
#: The first sentence of some messages repeats names and shapes of the line above, and is cut there.
_REPEATED = {
    "missing": re.compile(r"^\S+ needs .*?, not found in the file\. ?", re.DOTALL),
    "unexpected": re.compile(r"^the file has .*?, not found in \S+(?:\. ?|$)", re.DOTALL),
    "mismatch": re.compile(r"^\S+: file \[[0-9, ]*\], model \[[0-9, ]*\](?:; .*? too)?\. ?", re.DOTALL),
}


@attrs.frozen
class _Part:
    """The rows of one single model; ``origins`` by their number in the plan are several where initializers follow."""

    model: str
    origins: dict[int, Origin]
    rows: list[PlanRow]

    def header(self, has_siblings: bool) -> tuple[str, str]:
        """Kinds and files; if there are several origins, each with the number that its lines show."""
        kinds = " + ".join(dict.fromkeys(origin.initializer for origin in self.origins.values()))
        words = "; ".join(
            f"({number}) {origin.description}" if len(self.origins) > 1 else origin.description
            for number, origin in enumerate(self.origins.values(), 1)
        )
        return one_line(kinds), one_line(f"{self.model} <- {words}" if has_siblings else words)

    def name_of(self, origin: int) -> str:
        """The number of an origin in brackets; empty if there is only one."""
        return f"({list(self.origins).index(origin) + 1})" if len(self.origins) > 1 else ""


@attrs.frozen
class Message:
    """What is wrong, and the line of the config that puts it right; either may be empty."""

    said: str
    fix: str = ""


@attrs.frozen
class Section:
    """One single model: kinds, files, what is known of these, and the lines, each with the messages below it."""

    kinds: str
    files: str
    notes: Sequence[Text]
    lines: Sequence[tuple[NameLine, Sequence[Message]]] = ()


@attrs.frozen
class Content:
    """What there is to be shown of a plan, whatever shows it; without news, nothing but sections without lines."""

    sections: Sequence[Section]
    problems: Sequence[Message] = ()
    warnings: Sequence[Message] = ()
    summary: Sequence[Text] = ()


@attrs.frozen(eq=False)
class PlanView:
    """A plan as rich shows it: ``Console().print(PlanView(plan))``.

    Attributes:
        plan: The plan; also several merged into one.
        unfolded: Show a line for every row, and every warning.
        notes: Facts about files beside the plan: (position of the initializer, path of the model) -> ``committed,
            digests present``.
        option: The option that shows all rows, named where some are left out; empty outside of commands.
    """

    plan: LoadPlan
    unfolded: bool = False
    notes: Mapping[tuple[int, str], str] = attrs.Factory(dict)
    option: str = "--all"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(options.max_width)

    def lines(self, width: int) -> list[Text]:
        """The lines, each at most ``width`` columns long. A width below 20 is taken as 20."""
        width = max(width, _NARROWEST)
        content = self.content()
        found: list[Text] = []
        for section in content.sections:
            header = Text(section.kinds, "bold").append(f"  {section.files}", "not bold")
            found += filled(Text(""), [header, *section.notes], width)
            columns = in_columns([line for line, _messages in section.lines], width)
            for lines, (_line, messages) in zip(columns, section.lines, strict=True):
                found += [*lines, *_printed(messages, None, width)]
        found += _printed(content.problems, PROBLEM, width)
        found += _printed(content.warnings, WARNING, width)
        return found + (filled(Text(""), content.summary, width) if content.summary else [])

    def content(self) -> Content:
        """What is shown, before it is brought to a width."""
        problems = list(self.plan.problems)
        # the line of each cast shows both dtypes already
        warnings = [one for one in self.plan.warnings if one.code != "cast"]
        parts = _parts_of(self.plan)
        well = [self._is_well(part, [*problems, *warnings]) for part in parts]
        sections = []
        is_folded = False
        for part, is_well in zip(parts, well, strict=True):
            header = part.header(len(parts) > 1)
            if is_well:
                sections.append(Section(*header, [_all_loaded(part)]))
                continue
            known = (self.notes.get((origin.position, origin.model)) for origin in part.origins.values())
            notes = [Text(note, "dim") for note in dict.fromkeys(filter(None, known))]
            folds = tuple(map(_single, part.rows)) if self.unfolded else fold_rows(part.rows)
            is_folded = is_folded or any(len(fold.rows) > 1 for fold in folds)
            sections.append(Section(*header, notes, self._folds(part, folds, _beside(part, folds, problems))))
        summary = self._summary(is_folded) if problems or warnings or not parts or not all(well) else ()
        return Content(sections, self._messages(problems), self._messages(warnings), summary)

    def _is_well(self, part: _Part, problems: Sequence[Problem]) -> bool:
        """Whether every entry of the model is loaded by its own name, and the file has no other entry."""
        return (
            not self.unfolded
            and all(row.action == "load" for row in part.rows)
            and not any(part.model in problem.model.split(", ") for problem in problems)
        )

    def _folds(
        self, part: _Part, folds: Sequence[Fold], beside: Mapping[int, Sequence[Problem]]
    ) -> list[tuple[NameLine, Sequence[Message]]]:
        found: list[tuple[NameLine, Sequence[Message]]] = []
        left: dict[Action, list[Fold]] = {}
        counts: Counter[Action] = Counter()
        for number, fold in enumerate(folds):
            if self.unfolded or counts[fold.action] < _MOST_LINES or number in beside:
                counts[fold.action] += 1
                found.append((self._line(fold, part), self._messages(beside.get(number, ()), is_beside=True)))
            else:
                left.setdefault(fold.action, []).append(fold)
        for action, more in left.items():
            keys = counted(sum(len(fold.rows) for fold in more), "more key")
            found.append((NameLine(MARKS[action], f"{keys} on {counted(len(more), 'line')}{self._how()}"), ()))
        return found

    def _line(self, fold: Fold, part: _Part) -> NameLine:
        mark, origin = MARKS[fold.action], part.name_of(fold.rows[0].origin)
        details = [*_details(fold), *([Text(origin, "dim")] if origin else [])]
        if self.unfolded:
            return NameLine(mark, fold.pattern.text(), (amount(fold.elements),), details)
        numbers = counted(len(fold.rows), "key"), amount(fold.elements)
        return NameLine(mark, _short(fold.pattern.text(_MOST_TEXTS)), numbers, details)

    def _messages(self, problems: Sequence[Problem], *, is_beside: bool = False) -> list[Message]:
        """The first messages, or all if unfolded; ``is_beside`` for those below the line that they concern."""
        shown = problems if self.unfolded else problems[:_MOST_PROBLEMS]
        # a misspelt rule leaves keys missing; the fix "keep the model's values" would hide the mistake
        is_consequence = not self.unfolded and any(one.code == "unmatched-rule" for one in self.plan.problems)
        found = []
        for problem in shown:
            with_fix = not (is_consequence and problem.code == "missing")
            found.append(_message(problem, is_beside=is_beside, with_fix=with_fix))
        if len(problems) > len(shown):
            found.append(Message(f"{counted(len(problems) - len(shown), 'more message')}{self._how()}"))
        return found

    def _how(self) -> str:
        return f" ({self.option} shows them)" if self.option else ""

    def _summary(self, is_folded: bool) -> list[Text]:
        problems = len(self.plan.problems)
        phrases = [
            Text(f"coverage {percent(self.plan.coverage())}", "bold"),
            Text(counted(problems, "problem") if problems else "no problem", "bold red" if problems else "green"),
            Text("nothing was changed"),
        ]
        return [*phrases, *([Text(f"({self.option} unfolds)", "dim")] if is_folded and self.option else [])]


def _details(fold: Fold) -> list[Text]:
    first, is_mismatch = fold.rows[0], fold.action == "mismatch"
    found = []
    if is_mismatch and all(row.source_shapes for row in fold.rows):
        shapes = ", ".join(sizes(shape) for shape in first.source_shapes)
        found.append(Text(f"file {shapes}  model {sizes(first.shape)}"))
    is_cast = (is_mismatch or first.writes) and first.source_dtype not in (None, first.dtype)
    if fold.action == "cast" or is_cast:
        found.append(Text(one_line(f"{first.source_dtype or 'several dtypes'} -> {first.dtype}")))
    if fold.sources:
        names = [_short(pattern.text(_MOST_TEXTS)) for pattern in fold.sources]
        found.append(Text(f"<- {listed(names, _MOST_SOURCES)}"))
    if fold.steps:
        found.append(Text(", ".join(map(described, fold.steps)), "cyan"))
    if fold.rule:
        found.append(Text(place_of_rule(fold.rule), "dim"))
    return found


def _single(row: PlanRow) -> Fold:
    """A fold of one row, named in full."""
    sources = () if row.target is None or row.sources == (row.target,) else row.sources
    own, *others = (KeyPattern(((key,),)) for key in (row.key, *sources))
    return Fold(row.action, row.rule, row.steps, own, tuple(others), (row,))


def _parts_of(plan: LoadPlan) -> list[_Part]:
    """The rows by model. A merged plan has one row for each entry, from the file that is loaded last."""
    parts: dict[str, _Part] = {}
    for number, origin in enumerate(plan.origins):
        parts.setdefault(origin.model, _Part(origin.model, {}, [])).origins[number] = origin
    for row in plan.rows:
        parts[row.model].rows.append(row)
    return list(parts.values())


def _all_loaded(part: _Part) -> Text:
    targets = [row for row in part.rows if row.target is not None]
    parameters = sum(row.numel for row in counted_rows(targets))
    text = Text(f"{len(targets):,} of {counted(len(targets), 'key')} loaded, {amount(parameters)} parameters, ")
    return text.append(f"coverage {percent(1.0)}", "green")


def _beside(part: _Part, folds: Sequence[Fold], problems: list[Problem]) -> dict[int, list[Problem]]:
    """Number of the last fold that a problem concerns -> problems. These problems are removed from the list."""
    places: dict[str, list[int]] = {}
    for number, fold in enumerate(folds):
        for name in dict.fromkeys(name for row in fold.rows for name in (row.key, *row.sources)):
            places.setdefault(name, []).append(number)
    found: dict[int, list[Problem]] = {}
    others = []
    for problem in problems:
        allowed = _ACTIONS.get(problem.code)
        keys = problem.keys if problem.model == part.model else ()
        known = {number for key in keys for number in places.get(key, ())}
        fitting = [number for number in known if allowed is None or folds[number].action in allowed]
        if fitting:
            found.setdefault(max(fitting), []).append(problem)
        else:
            others.append(problem)
    problems[:] = others
    return found


def _message(problem: Problem, *, is_beside: bool, with_fix: bool) -> Message:
    message = _short(one_line(problem.message), 2000)
    if is_beside and problem.code in _REPEATED:
        message = _REPEATED[problem.code].sub("", message, count=1)
    text, fix = message, ""
    cut = _FIX.search(message)
    if cut is not None:
        text, fix = message[: cut.start()].strip(), message[cut.end() :].strip()
    return Message(text, fix if with_fix else "")


def _printed(messages: Sequence[Message], mark: Mark | None, width: int) -> list[Text]:
    """Each message, and its fix on separate lines that can be copied; without a mark, indented below its line."""
    start = Text(_INDENT) if mark is None else mark.start(0).append("  ")
    found: list[Text] = []
    for message in messages:
        said = message.said
        if mark is None and _NEAR.fullmatch(said):
            # near names are listed nearest first: drop from the end until the line fits
            while ", " in said.partition(" has: ")[2] and len(start) + len(said) > width:
                said = said.rpartition(", ")[0]
        found += filled(start, [Text(said)], width, " " * len(start)) if said else []
        if message.fix:
            line = Text(_INDENT).append("fix: ", "bold green")
            found += filled(line, [Text(message.fix)], width, " " * len(line))
    return found


def _short(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."
