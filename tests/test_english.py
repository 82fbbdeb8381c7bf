"""The English of docstrings and of raised messages: short sentences, and the field's terms."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Folders whose modules the tests below read.
ROOMS = [
    "noether_init_core",
    "examples/signed_store/src",
    "plugins/noether-init-pages/src",
    "plugins/noether-init-random/src",
]

#: A sentence of this many words is accepted. Write at most 25; the rest is for names in a list.
LONGEST = 30

#: Pattern of refused words -> what to write instead.
REFUSED = {
    r"(?<!there )\b(?:is|are|was|were) no\b(?! longer| more)": "is not a ...",
    r"\bha(?:s|ve|d) not\b": "was not found, was not loaded",
    r"\b(?:is|are|was|were) none\b": "was not found; no ...",
    r"\bnobody\b": "no installed distribution",
    r"\bsaid\b": "declared, recorded",
    r"\btold\b": "reported, declared",
    r"\bmeant\b": "selected, intended",
    r"^Who(?:ever)?\b": "If a caller ...",
    r"^Nor\b": "... does not either",
    r"\b(?:audit|survey|integrity|usable)\w*": "verify",
    r"\bfor ever\b": "without end",
    r"\bnot there any more\b": "was deleted, not found",
}


def sentences(text: str) -> Iterator[str]:
    """The sentences of a docstring or message, without blocks of code; an item of a list begins one."""
    blocks = re.split(r"\n\s*\n", textwrap.dedent(text))
    is_code = False
    for block in blocks:
        is_code = block.startswith("    ") and (is_code or not re.match(r"\s+[\w*`]+(?: \([^)]*\))?:", block))
        if is_code or re.match(r"\s*==", block):
            continue
        is_code = block.rstrip().endswith("::")
        for item in re.split(r"\n(?=\s*(?:[-*\d.]+ |[\w, *`]+:\s))|:\n", block):
            text = re.sub(r"^\s*[\w, *`]+:\s|\s+", " ", item).strip()
            yield from filter(None, re.split(r"(?<=[.?!])\s+(?=[A-Z`'\"(])", text))


def texts(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Docstrings and the literal parts of what ``raise`` statements build: line, text, whether it is a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text, True
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield from ((line, text, False) for line, text in _literals(node.exc))


def _literals(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The strings in an expression; ``X`` stands for what an f-string fills in."""
    if isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(str(one.value) if isinstance(one, ast.Constant) else "X" for one in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from _literals(child)


def faults_in(source: str) -> list[str]:
    """What is wrong with the English of a module, one line a fault: line of the text, fault, sentence."""
    faults: dict[str, None] = {}
    for line, text, is_docstring in texts(ast.parse(source)):
        for sentence in sentences(text):
            words = len(sentence.split())
            if is_docstring and words > LONGEST:
                faults[f"{line}: {words} words: {sentence}"] = None
            for pattern, better in REFUSED.items():
                found = re.search(pattern, sentence)
                if found is not None:
                    faults[f"{line}: {found[0]!r} (write {better!r}): {sentence}"] = None
    return list(faults)


def modules(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_and_messages_keep_the_rules_of_english(room: str) -> None:
    """Sentences of docstrings are short, and neither docstrings nor raised messages hold a refused phrase."""
    assert modules(room), f"{room} is not a module or a folder with modules"
    faults = [f"{path.relative_to(ROOT)}:{fault}" for path in modules(room) for fault in faults_in(path.read_text())]
    assert not faults, "\n".join(faults)


def test_faults_are_found_with_line_and_sentence() -> None:
    """A long sentence and a refused phrase are found in docstrings; code, and short items of a list, are not faults."""
    long = " ".join(["word"] * (LONGEST + 1))
    module = f'''"""First line.

    Good::

        what has not to be read as prose {long}

    Args:
        one: {long[: len(long) // 2]}
        two: {long[: len(long) // 2]}
    """


def find(key):
    """{long}"""
    raise KeyError(f"{{key}} " "is none of these")
'''
    assert faults_in(module) == [
        f"14: {LONGEST + 1} words: {long}",
        "15: 'is none' (write 'was not found; no ...'): X is none of these",
    ]
