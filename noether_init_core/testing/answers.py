"""Answers to what a kind can do: open, or closed with the reason."""

from __future__ import annotations

import attrs

__all__ = ["Answer", "closed", "open_"]


@attrs.frozen
class Answer:
    """Whether a kind can do something. ``reason`` says why not, for people who read the tests."""

    is_open: bool
    reason: str = ""


def open_() -> Answer:
    """The kind can do it; the kit looks whether it does it right."""
    return Answer(True)


def closed(reason: str) -> Answer:
    """The kind does not do it; the kit looks whether it refuses, or leaves alone what it does not restore.

    Raises ``ValueError`` without a reason.
    """
    if not reason.strip():
        raise ValueError('closed("...") needs the reason: readers want to know why the kind cannot do it')
    return Answer(False, reason)
