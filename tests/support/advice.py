"""Collects the advice that the code can print, and does what it says: types a command, pastes a line of a config.

A test that does what an advice says carries ``executes(module, text)``; ``tests/test_advice.py`` compares both.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import yaml

__all__ = ["REPOSITORY", "Advice", "advices", "digests", "executes", "fixes_of", "pasted", "registrations", "typed"]

REPOSITORY = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"Next\b[^:.;]{0,60}: |fix: |\bAdd: |there add: |unread add: |pip install|Did you mean: ")
_PLACE = re.compile(r"(?:(?P<inside>\w+) of )?(?P<path>[\w.]+), (?P<file>[\w.]+):(?P<line>\d+)$")
_Test = TypeVar("_Test", bound=Callable[..., Any])


@attrs.frozen(order=True)
class Advice:
    """A text in the code that tells a user what to do: its module, and the text from the mark on, ``{}`` for values."""

    module: str
    text: str

    def __str__(self) -> str:
        return f"{self.module} | {self.text}"


@functools.cache
def advices() -> list[Advice]:
    """Every advice in the package and its plugins, sorted; docstrings are left out."""
    found = set()
    for root in (REPOSITORY / "noether_init_core", *sorted((REPOSITORY / "plugins").glob("*/src"))):
        for path in sorted(root.rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            module = path.relative_to(root).as_posix()
            found |= {Advice(module, text) for text in _texts(tree)}
    return sorted(found)


def _texts(node: ast.AST) -> Iterator[str]:
    text = _text(node)
    if text is not None:
        mark = _MARK.search(text)
        if mark is not None:
            yield " ".join(text[mark.start() :].split())
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


def executes(module: str, *texts: str) -> Callable[[_Test], _Test]:
    """Say that a test does what the advice in ``module`` says that contains one of ``texts``, all of them literals."""
    return lambda test: test


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
