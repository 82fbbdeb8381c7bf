"""Readers of foreign headers: whatever the bytes are, an ``InitError`` or nothing, soon, and in little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from faults.campaign.headers import TARGETS, MisbehaviourError, check, seeds
from noether_init_core.errors import InitError

QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def edited(draw: st.DrawFn, target: str) -> bytes:
    """A real input with a few places overwritten, cut out, or filled with something else."""
    known = seeds(target)
    data = bytearray(draw(st.sampled_from(known)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 8)))
        data[start:stop] = draw(
            st.binary(max_size=8) | st.sampled_from([b"\xff" * 4, b"\x7f" + b"\xff" * 7, b"(" * 40])
        )
    return bytes(data)


@pytest.mark.parametrize("target", list(TARGETS))
def test_real_inputs_are_accepted(target: str) -> None:
    """A search that starts from refused inputs would stay at the door."""
    found = [check(target, data) for data in seeds(target) if target != "names" or b"_cp=" not in data]
    assert found
    assert all(found)


@pytest.mark.parametrize("target", list(TARGETS))
def test_edited_inputs_are_read_or_refused(target: str) -> None:
    """No other exception, no long time, no much memory."""

    @QUICK
    @given(edited(target))
    def try_one(data: bytes) -> None:
        check(target, data)

    try_one()


@pytest.mark.parametrize("target", list(TARGETS))
def test_any_bytes_are_read_or_refused(target: str) -> None:
    """Also those that look like nothing."""

    @settings(QUICK, max_examples=40)
    @given(st.binary(max_size=300))
    def try_one(data: bytes) -> None:
        check(target, data)

    try_one()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is asked of Linux")
def test_a_misbehaving_reader_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exception and much memory are told from an error of ours, whatever the process took before."""

    def reader(data: bytes) -> None:
        if data == b"ours":
            raise InitError("refused")
        if data == b"other":
            raise KeyError("x")
        if data == b"much":
            bytearray(b"x") * (400 << 20)

    monkeypatch.setattr("faults.campaign.headers.TARGETS", {"reader": reader})
    bytearray(b"x") * (600 << 20)  # an earlier test may have taken more
    assert check("reader", b"")
    assert not check("reader", b"ours")
    with pytest.raises(MisbehaviourError, match="KeyError"):
        check("reader", b"other")
    with pytest.raises(MisbehaviourError, match=r"\d+ MB"):
        check("reader", b"much")
