"""Faults of bytes: flipped bits, cut files, zeroed and stale blocks, appended bytes, exchanged files.

A fault is put in, the file is loaded, the fault is taken out. Every list of faults is the same at each start, so a
campaign that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from faults.campaign.subjects import Process, Subject
from noether_init_core.errors import InitError

__all__ = ["FAULTS", "Damage", "Verdict", "counted", "damaged", "judge", "tally"]

BLOCK = 4096


@attrs.frozen
class Damage:
    """What is done to files: for each file bytes at places, a new length, bytes at the end, or another content."""

    file: int
    patches: tuple[tuple[int, bytes], ...] = ()
    length: int | None = None
    tail: bytes = b""
    replaced: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.replaced:
            return f"files {self.replaced} replaced"
        if self.patches:
            return f"file {self.file} at byte {self.patches[0][0]}"
        return f"file {self.file} cut to {self.length}" if self.length is not None else f"file {self.file} appended to"


@contextlib.contextmanager
def damaged(
    damage: Damage, files: Sequence[Path], contents: Sequence[bytes], others: Sequence[bytes]
) -> Iterator[None]:
    """The files with the damage in them; afterwards they are as they were."""
    for index in damage.replaced:
        files[index].write_bytes(others[index])
    path, content = files[damage.file], contents[damage.file]
    if not damage.replaced:
        with open(path, "r+b") as file:
            for offset, data in damage.patches:
                file.seek(offset)
                file.write(data)
            if damage.length is not None:
                file.truncate(damage.length)
            file.seek(0, 2)
            file.write(damage.tail)
    try:
        yield
    finally:
        for index in damage.replaced:
            files[index].write_bytes(contents[index])
        if not damage.replaced:
            with open(path, "r+b") as file:
                for offset, data in damage.patches:
                    file.seek(offset)
                    file.write(content[offset : offset + len(data)])
                if damage.length is not None:
                    file.seek(damage.length)
                    file.write(content[damage.length :])
                file.truncate(len(content))


def flips(contents: Sequence[bytes], others: Sequence[bytes], count: int) -> list[Damage]:
    """Single bits, everywhere with equal chance, no bit twice."""
    sizes = [8 * len(content) for content in contents]
    found = []
    for bit in random.Random(1).sample(range(sum(sizes)), min(count, sum(sizes))):
        index = next(index for index in range(len(sizes)) if bit < sum(sizes[: index + 1]))
        position, shift = divmod(bit - sum(sizes[:index]), 8)
        found.append(Damage(index, ((position, bytes([contents[index][position] ^ (1 << shift)])),)))
    return found


def truncations(contents: Sequence[bytes], others: Sequence[bytes], count: int) -> list[Damage]:
    """Every length from none to one byte less; ``count`` spreads fewer of them evenly, 0 means all."""
    found = [Damage(index, length=length) for index, content in enumerate(contents) for length in range(len(content))]
    return found[:: max(1, len(found) // count)] if count else found


def zeroed(contents: Sequence[bytes], others: Sequence[bytes], count: int) -> list[Damage]:
    """Aligned blocks of 4 KiB that hold zeros, as a hole after a crash; blocks of zeros are left out."""
    blocks = [
        Damage(index, ((start, bytes(len(block))),))
        for index, content in enumerate(contents)
        for start in range(0, len(content), BLOCK)
        if any(block := content[start : start + BLOCK])
    ]
    return random.Random(2).sample(blocks, min(count, len(blocks)))


def stale(contents: Sequence[bytes], others: Sequence[bytes], count: int) -> list[Damage]:
    """Aligned blocks of 4 KiB that hold what the same file held before; equal blocks are left out."""
    blocks = [
        Damage(index, ((start, block),))
        for index, (content, other) in enumerate(zip(contents, others, strict=True))
        for start in range(0, len(content), BLOCK)
        if (block := other[start : start + BLOCK]) != content[start : start + BLOCK]
        and len(block) == len(content[start : start + BLOCK])
    ]
    return random.Random(3).sample(blocks, min(count, len(blocks)))


def appended(contents: Sequence[bytes], others: Sequence[bytes], count: int) -> list[Damage]:
    """Zeros, noise, the file once more, or the other file, behind the end."""
    chance = random.Random(4)
    found = []
    for number in range(count):
        index = number % len(contents)
        length = 1 + number // len(contents) % 700
        choices = (bytes(length), chance.randbytes(length), contents[index], others[index])
        found.append(Damage(index, tail=choices[number // len(contents) % 4]))
    return found


def replaced(contents: Sequence[bytes], others: Sequence[bytes], count: int) -> list[Damage]:
    """Every choice of some of the files, but not all of several, exchanged for those of the same names."""
    numbers = range(len(contents))
    sizes = range(1, max(2, len(contents)))
    found = [Damage(0, replaced=chosen) for size in sizes for chosen in itertools.combinations(numbers, size)]
    return found[:count] if count else found


FAULTS: Mapping[str, Callable[[Sequence[bytes], Sequence[bytes], int], list[Damage]]] = {
    "flips": flips,
    "truncations": truncations,
    "zeroed": zeroed,
    "stale": stale,
    "appended": appended,
    "replaced": replaced,
}


@attrs.frozen
class Verdict:
    """What became of one attempt to load: ``detected``, ``harmless`` or ``silent``, and what else went wrong."""

    outcome: str
    half_changed: bool = False
    foreign_error: bool = False


def judge(subject: Subject, load: Callable[[Process], None], truth: str) -> Verdict:
    """Load once and compare with the truth."""
    found = subject.attempt(load)
    if found.error is None:
        return Verdict("harmless" if found.after == truth else "silent")
    return Verdict("detected", found.after != found.before, not isinstance(found.error, InitError))


def tally(
    subject: Subject, damages: Sequence[Damage], *, baseline: bool = False, start: int = 0
) -> Iterator[tuple[int, Verdict]]:
    """Put in every fault from number ``start`` on and say what became of it."""
    load = subject.baseline if baseline else subject.load
    assert load is not None
    truth = subject.truth(load)
    contents, others = [path.read_bytes() for path in subject.files], [path.read_bytes() for path in subject.others]
    for number in range(start, len(damages)):
        with damaged(damages[number], subject.files, contents, others):
            verdict = judge(subject, load, truth)
        yield number, verdict
    if subject.truth(load) != truth:
        raise AssertionError(f"{subject.name}: the files are not as they were before the faults")


def counted(verdicts: Iterator[tuple[int, Verdict]]) -> Counter[str]:
    """How many of each."""
    found: Counter[str] = Counter()
    for _, verdict in verdicts:
        found["tried"] += 1
        found[verdict.outcome] += 1
        found["half changed"] += verdict.half_changed
        found["foreign error"] += verdict.foreign_error
    return found
