"""Noether's four surgery fields, as a mapping of names."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, strategies as st

from noether_init_core.surgery.name_rules import NoetherSurgery, Rename, Taken
from noether_init_core.surgery.patterns import near

SEGMENTS = st.sampled_from(["a", "aa", "b", "ab", "head", "norm", "0", "1"])
KEYS = st.lists(SEGMENTS, min_size=1, max_size=3).map(".".join)
PATTERNS = st.sampled_from(["a", "b", ".", "a.", "head", "norm", "0", "ab", "zzz"])
SURGERIES = st.builds(
    NoetherSurgery,
    st.lists(KEYS, max_size=2, unique=True).map(tuple),
    st.lists(PATTERNS, max_size=2).map(tuple),
    st.lists(st.builds(Rename, PATTERNS, st.sampled_from(["a", "c", "", "x.", "b"])), max_size=3).map(tuple),
    st.lists(PATTERNS, max_size=2).map(tuple),
)


def carried_out(surgery: NoetherSurgery, file: Mapping[str, int], model: Mapping[str, int]) -> dict[str, int]:
    """What happens to a dictionary that is edited step by step; the values say where an entry came from."""
    state = dict(file)
    for key in surgery.keys_to_remove:
        state.pop(key, None)
    for pattern in surgery.patterns_to_remove:
        state = {key: value for key, value in state.items() if pattern not in key}
    for rename in surgery.patterns_to_rename:
        for key in list(state):
            if rename.src in key:
                value = state.pop(key)
                state[key.replace(rename.src, rename.dst)] = value
    for pattern in surgery.patterns_to_instantiate:
        state.update({key: value for key, value in model.items() if pattern in key})
    return state


@given(SURGERIES, st.lists(KEYS, unique=True, max_size=8), st.lists(KEYS, unique=True, max_size=8))
def test_the_mapping_is_what_editing_a_dictionary_gives(
    surgery: NoetherSurgery, sources: list[str], targets: list[str]
) -> None:
    """For any fields and names, every entry of the model gets the value that sequential editing would give it."""
    file = {name: number for number, name in enumerate(sources)}
    model = {name: -1 - number for number, name in enumerate(targets)}
    edited = carried_out(surgery, file, model)
    match = surgery.match(tuple(sources), tuple(targets))
    for name in targets:
        if name in match.kept:
            assert edited[name] == model[name]
        elif name in match.moves:
            assert edited[name] == file[match.moves[name].sources[0]]
        else:
            assert name not in edited


@given(SURGERIES, st.lists(KEYS, unique=True, max_size=8), st.lists(KEYS, unique=True, max_size=8))
def test_every_entry_of_the_file_is_accounted_for_once(
    surgery: NoetherSurgery, sources: list[str], targets: list[str]
) -> None:
    """No entry of the file is both moved and dropped, and no two targets take the same entry."""
    match = surgery.match(tuple(sources), tuple(targets))
    used = [source for taken in match.moves.values() for source in taken.sources]
    assert len(used) == len(set(used))
    assert not set(used) & match.removed.keys()
    assert not set(used) & match.unused_kept.keys()
    assert set(used) | match.removed.keys() | match.unused_kept.keys() <= set(sources)


def test_an_overwritten_entry_is_reported() -> None:
    """Two entries that become one name: the later wins, and both are named."""
    surgery = NoetherSurgery(patterns_to_rename=(Rename("blocks.0.", "blocks.1."),))
    match = surgery.match(("blocks.0.w", "blocks.1.w"), ("blocks.1.w",))
    assert match.moves == {"blocks.1.w": Taken(("blocks.0.w",), "patterns_to_rename: blocks.0. -> blocks.1.")}
    assert match.overwritten == (
        ("blocks.1.w", "blocks.0.w", "blocks.1.w", "patterns_to_rename: blocks.0. -> blocks.1."),
    )


def test_a_key_that_is_absent_in_every_part_is_an_error_and_a_pattern_a_warning() -> None:
    """A key that one part has is fine; what matches nowhere is told, with its neighbours."""
    surgery = NoetherSurgery(("token", "hed.bias"), ("zzz",))
    parts = [("token", "head.bias"), ("lift.weight",)]
    matches = [surgery.match(part, ()) for part in parts]
    messages = surgery.unmatched(matches, [name for part in parts for name in part], ())
    assert messages == [
        ("keys_to_remove: hed.bias not found in the file; near: head.bias", True),
        ("patterns_to_remove: zzz matches nothing", False),
    ]


def test_near_prefers_the_same_leaf() -> None:
    """A neighbour with the same last segment comes before one that merely looks alike."""
    assert (
        near("encoder.layer.0.weight", ["encoder.layers.0.weight", "encoder.layer.0.bias"])[0]
        == "encoder.layers.0.weight"
    )


def test_wrappers_are_looked_through_except_for_what_was_renamed() -> None:
    """A rule decided about a renamed entry; its old name is no prefix of a wrapper."""
    surgery = NoetherSurgery(patterns_to_rename=(Rename("old", "new"),))
    match = surgery.match(("module.a", "old"), ("a", "old"))
    assert match.moves == {"a": Taken(("module.a",), "prefix of a wrapper")}
