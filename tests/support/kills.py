"""A child process that saves in a loop and is killed in the middle."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable

__all__ = ["kill_once"]


def kill_once(save: Callable[[int], object], start: int, whole: int, delay: float) -> tuple[int, int]:
    """Fork a child that calls ``save`` from ``start`` on; kill it ``delay`` seconds after save ``whole`` + 1 began.

    Returns the last save that began and the last that was acknowledged.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            for number in range(start, start + 100_000):
                os.write(writing, f"s{number}\n".encode())
                save(number)
                os.write(writing, f"a{number}\n".encode())
        finally:
            os._exit(1)
    os.close(writing)
    text = b""
    while text.count(b"s") <= whole and (more := os.read(reading, 4096)):
        text += more
    deadline = time.monotonic() + delay
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            text += os.read(reading, 4096)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while rest := os.read(reading, 4096):
        text += rest
    os.close(reading)
    lines = text.decode().split()
    begun = [int(line[1:]) for line in lines if line[0] == "s"]
    acknowledged = [int(line[1:]) for line in lines if line[0] == "a"]
    return max(begun, default=start - 1), max(acknowledged, default=start - 1)
