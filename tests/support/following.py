"""Takes the advice out of the message that a call raises or logs, for tests that do what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from support.advice import saw

__all__ = ["advised", "refusal"]


def refusal(call: Callable[[], Any]) -> str:
    """The message of the exception that ``call`` raises; it must advise something."""
    with pytest.raises((Exception,)) as refused:  # of any class: it is the text that is followed
        call()
    assert re.search(r"Next\b[^:.;]{0,60}: ", str(refused.value)), refused.value
    return saw(str(refused.value))


def advised(call: Callable[[], Any], mark: str = "Next: ") -> str:
    """What the message of ``call`` says to do: the text behind its last ``mark``."""
    return refusal(call).rpartition(mark)[2]
