"""The console script's function, called as the shell would call it."""

from __future__ import annotations

import sys
from typing import Any

import attrs
import pytest

from noether_init_core import cli
from support.advice import saw

__all__ = ["Result", "run_command"]


@attrs.frozen
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> Result:
    """Run the command with ``arguments``; it always ends with ``SystemExit``."""
    monkeypatch.setattr(sys, "argv", ["ninit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    saw(captured.out + captured.err)
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return Result(code or 0, captured.out, captured.err)
