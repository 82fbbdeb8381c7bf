"""Which dtypes torch converts."""

from __future__ import annotations

import itertools

import pytest

from noether_init_core.surgery import casts

PAIRS = [
    (source, target)
    for source, target in itertools.permutations(sorted(casts.PLAIN), 2)
    if target.startswith("complex") or not source.startswith("complex")
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_torch_converts_each_plain_dtype_to_each_other_one(source: str, target: str) -> None:
    """So that a plan of these need not ask it. Complex to real is never allowed."""
    assert casts._torch_converts(source, target)
    assert casts.can_cast(source, target, "any")
