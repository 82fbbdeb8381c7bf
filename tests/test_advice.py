"""Every advice that the code can print is executed by a test; a new one without such a test is an error here."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from support.advice import REPOSITORY, Advice, advices, named, registrations, unseen

#: Advice that no test executes yet, one a line; the list may only become shorter.
WAITING = REPOSITORY / "tests" / "support" / "advice_waiting.txt"
MOST_WAITING = 0


def waiting() -> list[str]:
    return WAITING.read_text(encoding="utf-8").splitlines()


def test_every_advice_is_executed() -> None:
    """By a test that names it, or it is on the list of those that wait for one; a line of that list is used up."""
    found = advices()
    assert len(found) > 200
    known = Counter(map(str, found))
    executed = {one for module, part in registrations() for one in named(module, part)}
    not_executed = sorted(str(one) for one in found if one not in executed)
    assert [one for one in not_executed if one not in waiting()] == []
    assert [one for one in waiting() if one not in not_executed] == []
    assert max(known.values()) == 1
    assert len(waiting()) <= MOST_WAITING


def test_every_registration_names_advice_that_exists() -> None:
    """A changed text must be executed again."""
    assert [(module, part) for module, part in registrations() if not named(module, part)] == []


@pytest.mark.parametrize(
    ("said", "is_seen"),
    [
        ("linear lacks x. Next: save without\n probe=", False),
        ("probe: net cannot be run here: it is on meta. Nothing\n was written. Next: save without probe=", True),
        ("probe: net cannot be run here: it is on meta. Nothing was written. Next: save", False),
        ("nothing of the kind", False),
    ],
)
def test_advice_counts_as_seen_with_any_values(said: str, is_seen: bool) -> None:
    """The whole text that has it, not only its end."""
    asked = [("probe/probe.py", "Next: save without probe=")]
    assert (unseen(asked, [said]) == []) is is_seen
    assert [one.text for one in unseen(asked, [])] == ["Next: save without probe="]


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
    assert [text for text, _source in _texts(ast.parse(code))] == [
        "Next: one",
        "Next, if you trust it: two {}",
        "Next: {} three",
    ]
