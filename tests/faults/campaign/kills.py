"""SIGKILL at random points of saves, ours and the baselines'.

A child is forked for every kill and saves in a loop, each time with another number; it says through a pipe when a save
begins and when it has returned. It is killed at a random time after one began.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from support.kills import kill_once

from faults.campaign.saves import BASELINES, Found, Numbered, found_by_torch, found_by_us, is_torn_for_noether

__all__ = ["METHODS", "kills"]

METHODS = ("ours", *BASELINES)


def kills(method: str, root: Path, count: int, width: int = 256, *, seed: int = 0) -> Iterator[Counter[str]]:
    """One counter for each kill. Everything before the first kill happens without one."""
    numbered = Numbered(width)
    save: Callable[[int], None]
    if method == "ours":

        def save(number: int) -> None:
            numbered.save(root, number, keep_last=3)

        def look() -> Found:
            return found_by_us(root, width)
    else:

        def save(number: int) -> None:
            BASELINES[method](numbered, root, number)

        def look() -> Found:
            return found_by_torch(root)

    last, durations = 0, []
    for _ in range(5):
        last += 1
        begin = time.monotonic()
        save(last)
        durations.append(time.monotonic() - begin)
    usual, chance = statistics.median(durations), random.Random(seed)
    for _ in range(count):
        # a save that was killed in the round before must not be blamed on this one
        last += 1
        save(last)
        begun, acknowledged = kill_once(save, last + 1, chance.randint(0, 1), chance.uniform(0, 1.1 * usual))
        found, counted = look(), Counter(tried=1)
        counted["in flight"] += begun > acknowledged
        counted[found.problem or "good"] += 1
        counted["lost"] += not found.problem and (found.number is None or found.number < acknowledged)
        counted["torn for Noether"] += method == "ours" and is_torn_for_noether(root)
        last = begun
        yield counted
