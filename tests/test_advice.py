"""Every advice that the code can print is executed by a test; a new one without such a test is an error here."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from support.advice import REPOSITORY, Advice, advices, registrations

#: Advice that no test executes yet, one a line; the list may only become shorter.
WAITING = REPOSITORY / "tests" / "support" / "advice_waiting.txt"
MOST_WAITING = 194


def waiting() -> list[str]:
    return WAITING.read_text(encoding="utf-8").splitlines()


def executed_by(advice: Advice) -> list[str]:
    return [test for (module, text), test in registrations().items() if module == advice.module and text in advice.text]


def test_every_advice_is_executed() -> None:
    """By a test that names it, or it is on the list of those that wait for one; a line of that list is used up."""
    found = advices()
    assert len(found) > 200
    known = Counter(map(str, found))
    not_executed = sorted(str(one) for one in found if not executed_by(one))
    assert [one for one in not_executed if one not in waiting()] == []
    assert [one for one in waiting() if one not in not_executed] == []
    assert max(known.values()) == 1
    assert len(waiting()) <= MOST_WAITING


def test_every_registration_names_advice_that_exists() -> None:
    """A changed text must be executed again."""
    found = advices()
    stale = [
        (module, text)
        for module, text in registrations()
        if not any(one.module == module and text in one.text for one in found)
    ]
    assert stale == []


WRITES_AND_READS = re.compile(r"save\w*\((?P<value>.*),\s*(?P<target>path|\w+_path)\)")


@pytest.mark.parametrize("advice", advices(), ids=str)
def test_no_advice_writes_over_what_it_reads(advice: Advice) -> None:
    """A command that loads and saves names two files."""
    found = WRITES_AND_READS.search(advice.text)
    assert found is None or found["target"] not in found["value"]
    assert "weights_only=False" not in advice.text or "if you trust" in advice.text
    assert re.search(r"\b(?:rm|mv|cp|dd|truncate) -?\w*\{", advice.text) is None


def test_the_collection_finds_new_advice() -> None:
    """In a literal, an f-string and texts that are added; not in a docstring."""
    import ast

    from support.advice import _texts

    code = '''
def f(x):
    """Next: none, this is a docstring."""
    a = "wrong. Next: one"
    b = f"wrong {x}. Next, if you trust it: two {x}"
    c = "wrong. Next: " + x + " three"
'''
    assert list(_texts(ast.parse(code))) == ["Next: one", "Next, if you trust it: two {}", "Next: {} three"]
