"""Rules on names: simultaneous, first match wins, every collision and every idle rule is told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from noether_init_core.config.source import TransformConfig, rule_of
from noether_init_core.surgery.name_rules import NameMatch, Transforms
from noether_init_core.surgery.patterns import PatternSet, parse_glob, parse_pattern, parse_regex


def transforms(*rules: dict[str, Any], **more: Any) -> Transforms:
    found = [rule_of(TransformConfig.model_validate(rule), f"rule {number}") for number, rule in enumerate(rules)]
    return Transforms(found, **more)


def moves(match: NameMatch) -> dict[str, tuple[str, ...]]:
    return {target: taken.sources for target, taken in match.moves.items()}


def test_rules_never_see_what_others_made() -> None:
    """A chain of renames moves each name once, and a cycle exchanges them."""
    rules = transforms(*({"from": f"{a}.", "to": f"{b}."} for a, b in ("ab", "bc", "ca")))
    match = rules.match(("a.w", "b.w", "c.w"), ("a.w", "b.w", "c.w"))
    assert moves(match) == {"b.w": ("a.w",), "c.w": ("b.w",), "a.w": ("c.w",)}
    assert match.problems == ()


def test_the_first_rule_that_matches_takes_a_name() -> None:
    """Also before a drop, and the rule that came too late is told who took its names."""
    rules = transforms({"from": "h.0.", "to": "first."}, {"drop": "h."}, {"from": "h.<i>.", "to": "b.<i>."})
    match = rules.match(("h.0.w", "h.1.w"), ("first.w",))
    assert moves(match) == {"first.w": ("h.0.w",)}
    assert match.removed == {"h.1.w": "rule 1 (drop h.)"}
    ((message, is_error),) = rules.unmatched([match], ("h.0.w", "h.1.w"), ())
    assert is_error
    assert message == (
        "rule 2 (h.<i>. -> b.<i>.) matches nothing: earlier rules take its names: rule 0 (h.0. -> first.), "
        "rule 1 (drop h.). Next: move it up, or remove it"
    )


def test_an_idle_rule_is_told_what_the_file_says() -> None:
    """With the nearest name; an optional one may be idle, and a policy makes it a warning."""
    idle = {"from": "layers.<i>.w", "to": "b.<i>.w"}
    sources = ("model.layers.0.w", "step")
    rules = transforms(idle)
    assert rules.unmatched([rules.match(sources, ())], sources, ()) == [
        (
            "rule 0 (layers.<i>.w -> b.<i>.w) matches nothing; the file has model.layers.0.w. "
            "Next: from: model.layers.<i>.w",
            True,
        )
    ]
    optional = transforms({**idle, "optional": True})
    assert optional.unmatched([optional.match(sources, ())], sources, ()) == []
    warned = transforms(idle, warns=True)
    assert [is_error for _message, is_error in warned.unmatched([warned.match(sources, ())], sources, ())] == [False]


def test_wrappers_are_gone_before_rules_look() -> None:
    """A rule that says module. is told so."""
    rules = transforms({"from": "module.a", "to": "b"})
    sources = ("module.a", "module._orig_mod.c")
    match = rules.match(sources, ("_orig_mod.b", "c"))
    assert moves(match) == {"c": ("module._orig_mod.c",)}
    ((message, _),) = rules.unmatched([match], sources, ())
    assert "prefixes of wrappers (module., _orig_mod., _fsdp_wrapped_module.) are removed before rules match" in message


def test_two_sources_for_one_target_are_a_problem_that_names_both() -> None:
    """Two rules, or a rule and a name that stays."""
    rules = transforms({"from": "a", "to": "c"}, {"from": "b", "to": "c"})
    (problem,) = rules.match(("a", "b"), ("c",)).problems
    assert problem.message == (
        "c would be loaded twice: from a by rule 0 (a -> c) and from b by rule 1 (b -> c). Next: drop one of them"
    )
    rules = transforms({"from": "a", "to": "b"})
    (problem,) = rules.match(("a", "b"), ("b",)).problems
    assert "from a by rule 0 (a -> b) and from b by its name" in problem.message


def test_an_incomplete_group_is_a_problem_that_names_what_is_lacking() -> None:
    """Keys and values without their queries are no attention."""
    rules = transforms({"from": ["<i>.q", "<i>.k", "<i>.v"], "to": "<i>.qkv", "do": [{"concat": 0}]})
    match = rules.match(("0.q", "0.k", "0.v", "1.v", "1.k"), ("0.qkv", "1.qkv"))
    assert moves(match) == {"0.qkv": ("0.q", "0.k", "0.v")}
    (problem,) = match.problems
    assert problem.message.endswith("the file has 1.k, 1.v, and 1.q was not found")


def test_roots_bound_what_rules_are_about() -> None:
    """Names of the file outside are outside, names of the model outside keep their value, rules are relative."""
    rules = transforms({"from": "x.", "to": "y."}, source_root="ema", target_root="backbone.")
    match = rules.match(("ema.x.w", "ema.z", "step"), ("backbone.y.w", "backbone.z", "head.w"))
    assert moves(match) == {"backbone.y.w": ("ema.x.w",), "backbone.z": ("ema.z",)}
    assert match.outside == {"step"}
    assert match.kept == {"head.w": "outside target_root backbone."}


def test_only_and_keep_model_hold_wherever_they_stand() -> None:
    """``only`` leaves the rest of the file alone, ``keep_model`` the entries of the model."""
    rules = transforms({"from": "a.", "to": "b."}, {"only": ["a.", "c."]}, {"keep_model": "b.x"})
    match = rules.match(("a.w", "a.x", "c.w", "d.w"), ("b.w", "b.x", "c.w", "d.w"))
    assert moves(match) == {"b.w": ("a.w",), "c.w": ("c.w",)}
    assert match.removed == {"d.w": "rule 1 (only a., c.)"}
    assert match.unused_kept == {"a.x": "b.x"}


def test_a_rule_that_leads_nowhere_is_told_where() -> None:
    """The name that it makes and the model has not."""
    match = transforms({"from": "a.", "to": "b."}).match(("a.w",), ("c.w",))
    assert match.astray == {"a.w": ("b.w", "rule 0 (a. -> b.)")}


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("head.", ["head.w", "head.a.b"], ["head", "xhead.w", "a.head.w"]),
        ("*.bias", ["a.bias"], ["bias", "a.b.bias"]),
        ("**.bias", ["bias", "a.bias", "a.b.bias"], ["a.biased", "abias"]),
        ("a.**", ["a.b", "a.b.c"], ["a", "b.a"]),
        ("**", ["a", "a.b"], []),
        ("blocks.*.norm*.", ["blocks.0.norm1.w"], ["blocks.0.1.norm1.w", "blocks.0.norm1"]),
        ("a.b", ["a.b"], ["a.bc", "aab", "a.b.c"]),
    ],
)
def test_globs_match_by_segment(glob: str, yes: list[str], no: list[str]) -> None:
    """A star stays within its segment, two of them span any number, a trailing dot means everything below."""
    found = PatternSet([parse_glob(glob).expression])
    assert [name for name in yes if not found.matching(name)] == []
    assert [name for name in no if found.matching(name)] == []


SEGMENT = st.text(st.sampled_from("ab01_%+\\é\n"), min_size=1, max_size=4)


@given(st.lists(SEGMENT, min_size=1, max_size=4), st.data())
def test_what_a_pattern_captures_fills_it_again(segments: list[str], data: st.DataObject) -> None:
    """For any name: the pattern with captures in place of some of its parts gives the name back, exactly."""
    pattern = []
    for number, segment in enumerate(segments):
        begin = data.draw(st.integers(0, len(segment) - 1))
        end = data.draw(st.integers(begin + 1, len(segment)))
        how = data.draw(st.sampled_from(["literal", "part", "whole"]))
        shown = {"literal": segment, "part": f"{segment[:begin]}<c{number}>{segment[end:]}", "whole": f"<c{number}..>"}
        pattern.append(shown[how])
    name = ".".join(segments)
    parsed = parse_pattern(".".join(pattern))
    captures = parsed.match(name)
    assert captures is not None
    assert parsed.fill(captures) == name
    assert PatternSet([parsed.expression]).matching(name) == [0]
    assert parsed.captures == set(captures)


@given(st.lists(SEGMENT, min_size=1, max_size=3).map(".".join), st.lists(SEGMENT, min_size=1, max_size=3).map(".".join))
def test_a_pattern_without_captures_matches_its_own_text_only(pattern: str, name: str) -> None:
    """No character of a name has a meaning of its own."""
    assert (parse_pattern(pattern).match(name) is not None) == (pattern == name)
    assert bool(PatternSet([parse_pattern(pattern).expression]).matching(name)) == (pattern == name)


def test_an_expression_that_would_backtrack_forever_does_not() -> None:
    """RE2 takes time in proportion to the name; Python's own would not end within the age of the world."""
    pattern = parse_regex("(a|a)*(a|a)*(a|a)*b")
    assert pattern.match("a" * 5000) is None
    assert PatternSet([pattern.expression]).matching("a" * 5000) == ()


def test_names_that_are_no_text_stay_as_they_are() -> None:
    """A file may hold a lone surrogate; it is matched by nothing and harms nobody."""
    rules = transforms({"from": "a.<x>", "to": "b.<x>"}, {"drop": "c."})
    match = rules.match(("a.\ud800", "a.w"), ("b.w", "a.\ud800"))
    assert moves(match) == {"b.w": ("a.w",), "a.\ud800": ("a.\ud800",)}
