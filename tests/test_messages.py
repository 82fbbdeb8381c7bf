"""Parts of messages, and nested values: written once, so held once."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from hypothesis import given, strategies as st

from noether_init_core.messages import counted, listed, near, one_line, printable, quoted, yaml_line
from noether_init_core.nested import equal, leaves, mapped

HOSTILE = "a\x1b[31m\nb\x07\u202ec\r\"'# :"


def test_a_list_is_cut_and_says_how_many_more_there_are() -> None:
    """Exactly as many as fit are shown without a rest."""
    assert listed("abc", 3) == "a, b, c"
    assert listed("abcd", 3) == "a, b, c and 1 more"
    assert listed("abcd", 3, separator="\n  ") == "a\n  b\n  c\n  and 1 more"
    assert listed([], none="none") == "none"


def test_a_count_has_its_noun() -> None:
    """One of a thing is singular."""
    assert [counted(n, "set") for n in (0, 1, 1200)] == ["0 sets", "1 set", "1,200 sets"]
    assert counted(2, "entry", "entries") == "2 entries"


def test_near_names_ignore_case_and_hyphens_and_bound_their_time() -> None:
    """A misspelt name is found as it is written; among too many nothing is sought."""
    assert near("Previous-Run", ["resume", "previous_run"]) == ["previous_run"]
    assert near("b.w", ["q.w", "k.w", "v.w", "b.wx"], 2) == ["b.wx", "q.w"]
    assert near("wholly else", ["resume"]) == []
    assert near("a1", [f"a{n}" for n in range(5_001)]) == []
    assert near("x" * 10_000_000, ["x" * 200]) == ["x" * 200]


def test_foreign_text_cannot_act_on_a_terminal_or_forge_a_line() -> None:
    """Escape, bell, right-to-left override, carriage return and newline are shown as escapes."""
    for text in (one_line(HOSTILE), quoted(HOSTILE)):
        assert text.isprintable()
    assert "\n" in printable(HOSTILE)
    assert all(one.isprintable() or one == "\n" for one in printable(HOSTILE))
    assert quoted("x" * 100, 10) == '"xxxxxxx..."'


@given(st.recursive(st.text() | st.integers() | st.booleans() | st.none(), lambda one: st.lists(one, max_size=3)
                    | st.dictionaries(st.text(), one, max_size=3), max_leaves=6))  # fmt: skip
def test_yaml_to_paste_means_what_was_said(value: object) -> None:
    """Whatever names hold, the pasted line is one printable line and reads back as the same value."""
    text = yaml_line(value)
    assert "\n" not in text
    assert text.isprintable()
    assert yaml.safe_load(text) == value


def test_a_line_break_is_an_escape() -> None:
    """In a value and in a key, alone and among other text."""
    for value, text in (("\n", '"\\n"'), ("a\nb", '"a\\nb"'), ({"a\nb": ["c"]}, '{? "a\\nb" : [c]}')):
        assert yaml_line(value) == text
        assert yaml.safe_load(text) == value


def test_a_comment_sign_is_quoted() -> None:
    """Unquoted, the rest of the line would be a comment."""
    assert yaml.safe_load(f"source_root: {yaml_line('a #c.')}") == {"source_root": "a #c."}


def test_leaves_and_mapped_agree() -> None:
    """The same leaves in the same order, in the same shape."""
    value = {"a": [1, (2, {"b": 3})], "c": ()}
    assert list(leaves(value)) == [1, 2, 3]
    assert mapped(value, lambda one: one * 2) == {"a": [2, (4, {"b": 6})], "c": ()}


@pytest.mark.parametrize(
    ("first", "other", "expected"),
    [
        ({"a": torch.tensor([math.nan])}, {"a": torch.tensor([math.nan])}, True),
        (math.nan, float("nan"), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2, 1), torch.ones(2), False),
        ([1], (1,), False),
        (1, True, False),
        (1, 1.0, False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (torch.ones(1), 1.0, False),
        (torch.tensor(3), torch.tensor(3), True),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j]), True),
        ({"a": [torch.ones(0, 3)]}, {"a": [torch.ones(0, 3)]}, True),
    ],
)
def test_equality_is_to_the_bit_and_to_the_type(first: object, other: object, expected: bool) -> None:
    """What would be restored differently is different."""
    assert equal(first, other) is expected
    assert equal(other, first) is expected
