"""The console script's function, called as the shell would call it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from noether_init_core import cli
from support.advice import saw

__all__ = ["Invoke", "Result", "console", "run_command"]


@attrs.frozen
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


#: Runs the command with arguments.
Invoke = Callable[..., Result]


@contextlib.contextmanager
def console(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    columns: int = 900,
    **modules: str,
) -> Iterator[Invoke]:
    """A terminal without colors in ``folder``, which folds no line if it is wide.

    ``modules`` are written there, by name; Python forgets them at the end.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    try:
        yield lambda *arguments: run_command(monkeypatch, capsys, *arguments)
    finally:
        for name in modules:
            sys.modules.pop(name, None)


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
