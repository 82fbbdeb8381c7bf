"""Bars: on a terminal, after a second, with bytes and rate; nothing anywhere else."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

import noether_init_core.progress as module

SLOW = """
import sys, time
import noether_init_core.progress as module
from noether_init_core.progress import progress
module._PATIENCE_S = float(sys.argv[3])  # so that a test hangs neither on a second nor on the load of the machine
if sys.argv[1] == "told":
    with progress("verifying {x} [red]", 40_000_000) as advance:
        for _ in range(20):
            advance(2_000_000)
            time.sleep(float(sys.argv[2]))
else:
    with progress("loading", None):
        time.sleep(20 * float(sys.argv[2]))
print("done")
"""


def on_a_terminal(*arguments: str) -> str:
    """What a program writes to standard error, which is a terminal of 80 columns."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    words = [sys.executable, "-c", SLOW, *arguments]
    with subprocess.Popen(words, stderr=follower, stdout=subprocess.PIPE, env=environment, text=True) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"
    os.close(leader)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_what_takes_longer_shows_bytes_and_rate() -> None:
    """Of work that tells how far it is."""
    shown = on_a_terminal("told", "0.05", "0")
    assert "verifying {x} [red]" in shown
    assert re.search(r"\d+(\.\d)?/40\.0 MB", shown)
    assert re.search(r"\d MB/s", shown)


def test_work_that_does_not_tell_has_a_bar_without_numbers() -> None:
    """It shows that something goes on."""
    assert "loading" in on_a_terminal("untold", "0.05", "0")


def test_what_is_quick_shows_nothing() -> None:
    """What ends before the patience of a second does is not shown; here the patience is longer."""
    assert "verifying" not in on_a_terminal("told", "0", "1000")


def test_in_a_notebook_one_output_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar of HTML with bytes and rate, escaped, from whichever thread; a second bar inside it shows nothing."""
    shown: list[tuple[str, dict[str, str]]] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(("update", data))

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert (raw, display_id) == (True, True)
        shown.append(("display", data))
        return Handle()

    kernel = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    with module.progress("<b>read", 4_000) as advance, module.progress("inner", 10) as inner:
        inner(10)
        advance(1_000)
        other = threading.Thread(target=advance, args=(3_000,))
        other.start()
        other.join()
    assert [way for way, _data in shown] == ["display", "update", "update"]
    assert [data["text/plain"].partition(",")[0] for _way, data in shown] == [
        "<b>read  1.0 kB of 4.0 kB",
        "<b>read  4.0 kB of 4.0 kB",
        "<b>read  4.0 kB of 4.0 kB",
    ]
    assert shown[0][1]["text/html"].startswith('<progress value="1000" max="4000"></progress> &lt;b&gt;read  1.0 kB')


def test_without_a_terminal_nothing_is_written(tmp_path: Path) -> None:
    """Logs and pipes stay clean."""
    words = [sys.executable, "-c", SLOW, "told", "0", "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")
