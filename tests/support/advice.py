"""Collects the advice that the code can print, and does what it says: types a command, pastes a line of a config.

A test that does what an advice says carries ``executes(module, text)``; ``tests/test_advice.py`` compares both. Such a
test fails unless that text occurs while it runs: in an error of ours, in a log, or in what it passes to ``saw``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
import yaml

from noether_init_core.errors import InitError

__all__ = [
    "REPOSITORY",
    "Advice",
    "advices",
    "digests",
    "executes",
    "fixes_of",
    "named",
    "pasted",
    "registrations",
    "saw",
    "typed",
    "unseen",
    "watched",
]

REPOSITORY = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"Next\b[^:.;]{0,60}: |fix: |\bAdd: |there add: |unread add: |pip install|Did you mean: ")
_PLACE = re.compile(r"(?:(?P<inside>\w+) of )?(?P<path>[\w.]+), (?P<file>[\w.]+):(?P<line>\d+)$")
_Test = TypeVar("_Test", bound=Callable[..., Any])


@attrs.frozen(order=True)
class Advice:
    """A text in the code that tells a user what to do: its module, and the text from the mark on, ``{}`` for values."""

    module: str
    text: str
    #: the whole texts that end in it, from before the mark
    sources: tuple[str, ...] = attrs.field(default=(), eq=False, order=False)

    def __str__(self) -> str:
        return f"{self.module} | {self.text}"


@functools.cache
def advices() -> list[Advice]:
    """Every advice in the package and its plugins, sorted; docstrings are left out."""
    found: dict[Advice, set[str]] = {}
    for root in (REPOSITORY / "noether_init_core", *sorted((REPOSITORY / "plugins").glob("*/src"))):
        for path in sorted(root.rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            module = path.relative_to(root).as_posix()
            for text, source in _texts(tree):
                found.setdefault(Advice(module, text), set()).add(source)
    return sorted(attrs.evolve(advice, sources=tuple(sorted(sources))) for advice, sources in found.items())


def _texts(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Each advice, and the whole text that has it."""
    text = _text(node)
    mark = None if text is None else _MARK.search(text)
    if text is not None and mark is not None:
        # a mark alone is what a message is searched for, or a label
        if text.strip(" .\n") not in ("Next:", "fix:"):
            yield " ".join(text[mark.start() :].split()), text
        return
    body = list(ast.iter_child_nodes(node))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
        body.remove(node.body[0])
    for child in body:
        yield from _texts(child)


def _text(node: ast.AST) -> str | None:
    """The text of a literal, of an f-string, and of such that are added, with ``{}`` for every value in it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        both = _text(node.left), _text(node.right)
        return None if both == (None, None) else "".join("{}" if one is None else one for one in both)
    return None


@functools.cache
def named(module: str, part: str) -> tuple[Advice, ...]:
    """The advice of a module whose text is ``part``; if none is, those that have it in their text."""
    of_module = tuple(one for one in advices() if one.module == module)
    exact = tuple(one for one in of_module if one.text == part)
    return exact or tuple(one for one in of_module if part in one.text)


def executes(module: str, *texts: str) -> Callable[[_Test], _Test]:
    """Say that a test does what the advice in ``module`` says that contains one of ``texts``, all of them literals.

    A text that is a whole advice names only that one.
    """

    def registered(test: _Test) -> _Test:
        vars(test).setdefault("executes", []).extend((module, text) for text in texts)
        return test

    return registered


#: What was said during the tests of each function that executes advice, and how many of them ran.
_SAID: dict[Callable[..., Any], tuple[list[str], list[None]]] = {}
_RECORDS: list[list[str]] = []


def saw(text: str) -> str:
    """Return a text that a function returned or a command printed; an advice in it counts as seen."""
    for record in _RECORDS:
        record.append(text)
    return text


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        saw(record.getMessage())


def watched(function: Callable[..., Any], patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run one test of ``function``; after the last of its parameters, each advice that it executes must have been seen.

    If some of its tests are not run, nothing is checked.
    """
    registered = getattr(function, "executes", None)
    if registered is None:
        yield
        return
    made, replaced = InitError.__attrs_post_init__, InitError.say

    def recorded(error: InitError) -> None:
        made(error)
        saw(error.message)

    def recorded_again(error: InitError, message: str) -> None:
        replaced(error, message)
        saw(error.message)

    patch.setattr(InitError, "__attrs_post_init__", recorded)
    patch.setattr(InitError, "say", recorded_again)
    said, runs = _SAID.setdefault(function, ([], []))
    _RECORDS.append(said)
    log = _Log()
    logging.getLogger().addHandler(log)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(log)
        _RECORDS.remove(said)
    runs.append(None)
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    if len(runs) == math.prod(len(mark.args[1]) for mark in marks):
        lacking = unseen(registered, said)
        _SAID.pop(function)
        assert not lacking, f"the test executes advice that was not given while it ran: {[*map(str, lacking)]}"


def unseen(registered: Collection[tuple[str, str]], said: Iterable[str]) -> list[Advice]:
    """Advice of ``(module, part of an advice)`` that none of the texts has, with any values in it."""
    texts = [" ".join(text.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split()) for text in said]
    return [
        one
        for one in sorted({one for module, part in registered for one in named(module, part)})
        if not any(_is_in(source, text) for source in one.sources for text in texts)
    ]


def _is_in(source: str, text: str) -> bool:
    """Whether a text of the code is in ``text``; ``{}``, ``%s`` and the like stand for any value."""
    at = 0
    for part in re.split(r"\{\}|%[sdr]", " ".join(source.split())):
        found = text.find(part.strip(), at)
        if found < 0:
            return False
        at = found + len(part.strip())
    return True


@functools.cache
def registrations() -> dict[tuple[str, str], str]:
    """(module, part of an advice) -> the test that executes it, of all tests, read without importing them."""
    found = {}
    for root in (REPOSITORY / "tests", *sorted((REPOSITORY / "plugins").glob("*/tests"))):
        for path in sorted(root.rglob("test_*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for mark in getattr(node, "decorator_list", ()):
                    if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "executes":
                        module, *texts = (ast.literal_eval(argument) for argument in mark.args)
                        found.update({(module, text): f"{path.name}::{node.name}" for text in texts})  # type: ignore[attr-defined]
    return found


def digests(folder: Path) -> dict[str, str]:
    """Relative path of each file below ``folder`` -> digest of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def typed(command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a line as a shell does that finds this Python; it must end well."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def fixes_of(output: str) -> list[str]:
    """The lines that a plan on a wide terminal marks with ``fix:``."""
    return [line.partition("fix: ")[2] for line in output.splitlines() if line.strip().startswith("fix: ")]


def pasted(config: Path, line: str, place: str = "") -> None:
    """Add a line to the config file, at the place that its comment names; without one, at ``place`` or at the root.

    A field that is there already gets the new value; an item is appended to its list, or put before it.
    """
    # as the project reads it: every scalar is a text
    document, added = (yaml.load(text, Loader=yaml.BaseLoader) for text in (config.read_text("utf-8"), line))
    comment = line.partition("  # ")[2]
    found = _PLACE.search(comment)
    if found is not None:
        assert found["file"] == config.name
        assert int(found["line"]) <= len(config.read_text("utf-8").splitlines())
        place = found["path"]
    target: Any = document
    for key in filter(None, place.split(".")):
        target = target[int(key) if isinstance(target, list) else key]
    if isinstance(added, list):
        assert found is not None, line
        rules = target[found["inside"]]
        target[found["inside"]] = [*added, *rules] if comment.startswith("first in ") else [*rules, *added]
    else:
        assert isinstance(added, Mapping), line
        target.update(added)
    config.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), "utf-8")
