"""Folding: few lines, each of which stands for exactly the rows that it lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from support.counting import LineCounter

from noether_init_core.render.folding import Fold, KeyPattern, _segments_of, fold_alike, fold_rows
from noether_init_core.surgery.plan import Action, PlanRow
from noether_init_core.surgery.steps import Split, Step, Transpose


def fold_keys(keys: Sequence[str], known: Sequence[str]) -> list[KeyPattern]:
    """Patterns for ``keys``, beside other names that are known."""
    looks = dict.fromkeys(known, False) | dict.fromkeys(keys, True)
    return [pattern for pattern, members in fold_alike(looks) if looks[members[0]]]


def matches(pattern: KeyPattern, key: str) -> bool:
    """Whether ``key`` is one of the names that a pattern stands for."""
    segments, known = _segments_of(key), len(pattern.segments)
    if len(segments) <= known if pattern.below else len(segments) != known:
        return False
    return all(segment in texts for segment, texts in zip(segments, pattern.segments, strict=False))


def row(target: str | None, *sources: str, action: Action = "load", rule: str | None = None, **more: Any) -> PlanRow:
    sources = sources or ((target,) if target is not None and action == "load" else ())
    shape = more.pop("shape", (2, 3))
    found = PlanRow(
        "net", target, sources, action, shape, "float32", 24, rule, source_dtype="float32" if sources else None
    )
    return attrs.evolve(found, **more)


def layers(count: int, *leaves: str) -> list[str]:
    return [f"blocks.{number}.{leaf}" for number in range(count) for leaf in leaves]


def told(folds: Sequence[Fold]) -> list[tuple[str, str, int]]:
    return [(fold.action, str(fold.pattern), len(fold.rows)) for fold in folds]


def test_equal_layers_become_one_line() -> None:
    """With the number of keys and their elements."""
    names = layers(12, "mlp.fc.weight", "mlp.fc.bias", "mlp.proj.weight", "mlp.proj.bias")
    kept = row("head.weight", action="keep", rule="transforms.0")
    (mlp, head) = fold_rows([*map(row, names), kept])
    assert (str(mlp.pattern), [one.key for one in mlp.rows], mlp.elements) == ("blocks.{0..11}.mlp.*", names, 288)
    assert (mlp.action, mlp.rule, mlp.sources) == ("load", None, ())
    assert (str(head.pattern), head.action, head.rule) == ("head.weight", "keep", "transforms.0")


def test_sources_are_folded_likewise() -> None:
    """Three projections from one: the texts stand in the order of the parts, not of the model."""
    rows = [
        row(
            f"blocks.{number}.{name}.{leaf}",
            f"h.{number}.c_attn.{leaf}",
            action="transform",
            rule="transforms.1",
            steps=(Transpose(), Split(0, (2, 2, 2))),
            part="qkv".index(name),
            parts=3,
        )
        for number in range(12)
        for name in "kqv"
        for leaf in ("weight", "bias")
    ]
    kept = [row(f"blocks.{number}.norm.w", action="keep") for number in range(12)]
    fold = fold_rows([*rows, *kept])[0]
    assert (str(fold.pattern), [str(one) for one in fold.sources]) == (
        "blocks.{0..11}.{q,k,v}.*",
        ["h.{0..11}.c_attn.*"],
    )
    assert fold.steps == (Transpose(), Split(0, (2, 2, 2)))
    assert fold.rows == tuple(rows)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"action": "keep", "sources": (), "source_dtype": None}, 3),
        ({"rule": "another"}, 3),
        ({"steps": (Transpose(),)}, 3),
        ({"action": "cast", "source_dtype": "float16"}, 3),
        ({"target": "blocks.3.mlp.other", "sources": ("blocks.3.mlp.other",)}, 2),
    ],
)
def test_a_layer_that_differs_is_a_line_of_its_own(change: dict[str, Any], lines: int) -> None:
    """In action, rule, steps, dtype or names: the other layers no longer include it."""
    rows = [row(name) for name in layers(6, "mlp.weight", "mlp.bias")]
    rows[6] = attrs.evolve(rows[6], **change)
    folds = fold_rows(rows)
    assert len(folds) == lines
    assert (str(folds[0].pattern), len(folds[0].rows)) == ("blocks.{0..2,4,5}.mlp.*", 10)
    assert all(row.key.startswith("blocks.3.") for fold in folds[1:] for row in fold.rows)


def test_a_layer_that_differs_is_not_hidden_below_its_parent() -> None:
    """Everything is loaded, but one layer has a name that its siblings have not; two that differ are no layers."""
    names = [f"net.{name}" for name in layers(3, "w", "b")]
    assert told(fold_rows([row(name) for name in (*names, "net.norm.w", "net.norm.b")])) == [("load", "net.*", 8)]
    assert told(fold_rows([row(name) for name in (*names, "net.blocks.1.extra", "net.norm.w")])) == [
        ("load", "net.blocks.{0,2}.*", 4),
        ("load", "net.blocks.1.*", 3),
        ("load", "net.norm.w", 1),
    ]
    assert told(fold_rows([row(name) for name in ("a.b.0.w", "a.b.1.w", "a.b.1.b", "a.w")])) == [("load", "a.*", 4)]


def test_layers_that_exchange_places_are_not_told_as_if_they_did_not() -> None:
    """One rule, 0 from 1 and 1 from 0: a line each; parts in another order than the numbers likewise."""
    rows = [row(f"a.{one}.w", f"b.{1 - one}.w", action="rename", rule="r") for one in (0, 1)]
    folds = fold_rows(rows)
    assert [(str(fold.pattern), str(fold.sources[0])) for fold in folds] == [("a.0.w", "b.1.w"), ("a.1.w", "b.0.w")]
    parts = [row(f"a.{one}.w", "all", action="transform", rule="r", part=1 - one, parts=2) for one in (0, 1)]
    assert sorted(str(fold.pattern) for fold in fold_rows(parts)) == ["a.0.w", "a.1.w"]
    in_order = [row(f"a.{one}.w", "all", action="transform", rule="r", part=one, parts=2) for one in (0, 1)]
    assert [str(fold.pattern) for fold in fold_rows(in_order)] == ["a.{0,1}.w"]


def test_shapes_that_do_not_fit_are_told_apart() -> None:
    """A line for each pair of shapes, so that the line can show both."""
    rows = [
        row(f"a.{one}.w", f"a.{one}.w", action="mismatch", shape=(size, 2), source_shapes=((9, 2),))
        for one, size in enumerate((3, 3, 4))
    ]
    assert told(fold_rows(rows)) == [("mismatch", "a.{0,1}.w", 2), ("mismatch", "a.2.w", 1)]


def test_groups_are_listed_from_loads_to_mismatches() -> None:
    """Whatever stands in the way is at the end, next to the summary."""
    rows = [
        row("z", action="missing"),
        row(None, "y", action="unexpected"),
        row("x", action="keep"),
        row("w"),
        row("v", "v", action="mismatch"),
    ]
    assert [fold.action for fold in fold_rows(rows)] == ["load", "keep", "unexpected", "missing", "mismatch"]


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        (["layer1.w", "layer2.w", "layer3.w", "layer10.w"], ["layer{1..3,10}.w"]),
        (["q_proj.w", "k_proj.w"], ["{q_proj,k_proj}.w"]),
        (["0.w", "00.w", "1.w"], ["{0,00,1}.w"]),
        (["a", "a.b", "a.c"], ["a", "a.*"]),
        (["w"], ["w"]),
        ([""], [""]),
        (["..", "a"], ["..", "a"]),
        (["a{1}.w", "b*.w,\\"], ["a\\{1\\}.w", "b\\*.w\\,\\\\"]),
        (["a\x1b[2J", "a\nb", "a\u202eb"], ["{a\\x1b[2J,a\\nb,a\\u202eb}"]),
        ([".".join(map(str, range(100))), ".".join(map(str, range(99)))], None),
    ],
    ids=str,
)
def test_names_of_all_sorts(keys: list[str], texts: list[str] | None) -> None:
    """Numbers behind a stem, empty segments, special and unprintable characters, names of a hundred segments."""
    found = [str(pattern) for pattern in fold_keys(keys, [])]
    assert found == (texts if texts is not None else [f"{{{','.join(keys)}}}"])


def test_a_star_needs_all_that_is_known_below() -> None:
    """What the model has besides is not included."""
    assert [str(one) for one in fold_keys(["a.x", "a.y"], ["b"])] == ["a.*"]
    assert [str(one) for one in fold_keys(["a.x", "a.y"], ["a.z"])] == ["a.{x,y}"]


def test_many_alternatives_are_counted_where_room_is_short() -> None:
    """The text says how many are not shown; the pattern itself has them all."""
    keys = [f"{chr(97 + one) * 2}.w" for one in range(20)]
    (pattern,) = fold_keys(keys, ["other"])
    assert pattern.text(3) == "{aa,bb,cc,... 17 more}.w"
    assert all(matches(pattern, key) for key in keys)


SEGMENTS = st.sampled_from(["0", "1", "2", "3", "10", "01", "a", "b", "q", "k", "w1", "w2", "", "*", "{0..2}", "0,1"])
KEYS = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)
WAYS: list[tuple[Action, str | None, tuple[Step, ...]]] = [
    ("load", None, ()),
    ("rename", "rule 1", ()),
    ("rename", "rule 2", ()),
    ("transform", "rule 1", (Transpose(),)),
    ("keep", "rule 3", ()),
]
BLOCKS = st.builds(
    lambda count, leaves: layers(count, *leaves), st.integers(1, 5), st.lists(KEYS, min_size=1, max_size=4, unique=True)
)


@st.composite
def plans(draw: st.DrawFn) -> list[PlanRow]:
    """Rows of any names and ways: layers of which some go another way, sources with numbers of their own, rests."""
    names = draw(st.one_of(st.lists(KEYS, max_size=12), st.tuples(BLOCKS, st.lists(KEYS, max_size=4)).map(
        lambda pair: [*pair[0], *pair[1]]
    )))  # fmt: skip
    usual = draw(st.sampled_from(WAYS))
    rows = []
    for name in dict.fromkeys(names):
        action, rule, steps = draw(st.one_of(st.just(usual), st.just(usual), st.sampled_from(WAYS)))
        stem = draw(st.sampled_from(["h.", "", "1."]))
        sources = {"load": (name,), "keep": ()}.get(action, (draw(st.one_of(st.just(f"{stem}{name}"), KEYS)),))
        parts = draw(st.sampled_from([1, 1, 1, 2])) if action == "transform" else 1
        part = draw(st.integers(0, parts - 1))
        rows.append(row(name, *sources, action=action, rule=rule, steps=steps, part=part, parts=parts))
    used = {source for one in rows for source in one.sources}
    rest = dict.fromkeys(key for key in draw(st.lists(KEYS, max_size=6)) if key not in used)
    return [*rows, *(row(None, key, action=draw(st.sampled_from(["removed", "unexpected"]))) for key in rest)]


def expression(text: str) -> re.Pattern[str]:
    """The text of a pattern, read as a person would: an independent statement of what it means."""
    made, position = "", 0
    while position < len(text):
        one = text[position]
        if one == "\\":
            made += re.escape(text[position + 1])
            position += 2
        elif one == "{":
            end = re.compile(r"(?:[^\\}]|\\.)*").match(text, position + 1)
            assert end is not None
            made += "(?:" + "|".join(map(alternative, re.findall(r"(?:[^\\,]|\\.)+", end[0]))) + ")"
            position = end.end() + 1
        elif one == "*":
            made += ".+"
            position += 1
        else:
            made += re.escape(one)
            position += 1
    return re.compile(made, re.DOTALL)


def alternative(text: str) -> str:
    first, dots, last = text.partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        return "|".join(map(str, range(int(first), int(last) + 1)))
    return re.escape(re.sub(r"\\(.)", r"\1", text))


def check(patterns: Sequence[KeyPattern], keys: set[str], known: set[str]) -> None:
    """Each key is matched once, no other is, and the text says the same as the pattern."""
    for key in known:
        matching = [pattern for pattern in patterns if matches(pattern, key)]
        assert len(matching) == (key in keys), key
    for pattern in patterns:
        matched = {key for key in known if matches(pattern, key)}
        text = pattern.text()
        assert matched, text
        if not any(not key or key.startswith(".") or ".." in key or key.endswith(".") for key in known):
            assert matched == {key for key in known if expression(text).fullmatch(key)}, text


@settings(max_examples=400, deadline=None)
@given(plans())
def test_unfolding_gives_back_exactly_the_keys(rows: list[PlanRow]) -> None:
    """Whatever the plan: no key is lost, doubled or claimed by a line that is not about it, on either side."""
    folds = fold_rows(rows)
    places = {id(one): number for number, one in enumerate(rows)}
    assert sorted(places[id(one)] for fold in folds for one in fold.rows) == list(range(len(rows)))
    targets = {one.key for one in rows if one.target is not None}
    sources = {source for one in rows for source in one.sources}
    for fold in folds:
        first = fold.rows[0]
        assert {(one.action, one.rule, one.steps) for one in fold.rows} == {(fold.action, fold.rule, fold.steps)}
        check([fold.pattern], {one.key for one in fold.rows}, sources if first.target is None else targets)
        taken = {source for one in fold.rows for source in one.sources}
        if fold.sources:
            check(fold.sources, taken, sources)
        elif first.target is not None:
            assert all(one.sources in ((), (one.target,)) for one in fold.rows)


@settings(max_examples=200, deadline=None)
@given(plans())
def test_numbers_of_sources_are_those_of_targets(rows: list[PlanRow]) -> None:
    """A number that changes along a line on the right is the same number, in every row, as one on the left."""
    for fold in fold_rows(rows):
        shapes = {
            (tuple(re.sub(r"[0-9]+", "#", one.key).split(".")), tuple(re.sub(r"[0-9]+", "#", s) for s in one.sources))
            for one in fold.rows
        }
        names = [name for one in fold.rows for name in (one.key, *one.sources)]
        # 01 is no number of a layer, and is not folded as one
        if not fold.sources or len(shapes) > 1 or any(re.search(r"(?<![0-9])0[0-9]", name) for name in names):
            continue
        own = list(zip(*(re.findall(r"[0-9]+", one.key) for one in fold.rows), strict=True))
        theirs = list(zip(*(re.findall(r"[0-9]+", ".".join(one.sources)) for one in fold.rows), strict=True))
        assert all(len(set(column)) == 1 or column in own for column in theirs)


def test_ten_thousand_rows_are_folded_in_few_lines_each() -> None:
    """One pattern for all, in fewer than 400 lines of Python for each row."""
    rows = [
        row(f"a.{one // 100}.b.{one % 100}.w", f"c.{one // 100}.d.{one % 100}.w", action="rename")
        for one in range(10_000)
    ]
    with LineCounter() as lines:
        (fold,) = fold_rows(rows)
    assert str(fold.pattern) == "a.{0..99}.b.{0..99}.w"
    assert lines.count < 400 * len(rows)


def test_keys_with_the_same_value_are_folded_and_no_others() -> None:
    """Each key is in one pattern, which matches no key of another value; patterns come by their first key."""
    keys = {f"blocks.{number}.{name}": len(name) for number in range(4) for name in ("norm.w", "norm.b", "mlp")}
    keys |= {"blocks.4.norm.w": 0, "head": 3}
    found = fold_alike(keys)
    assert [str(pattern) for pattern, _ in found] == [
        "blocks.{0..3}.norm.*",
        "blocks.{0..3}.mlp",
        "blocks.4.norm.w",
        "head",
    ]
    assert sorted(key for _, members in found for key in members) == sorted(keys)
    for pattern, members in found:
        assert [key for key in keys if matches(pattern, key)] == list(members)
