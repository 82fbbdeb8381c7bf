"""Coverage-guided search for headers that make a reader misbehave; ``python -m faults.campaign.fuzzing`` runs one.

Atheris (libFuzzer) does it where it is installed: it sees which lines of the readers an input reaches and keeps those
that reach new ones. Elsewhere inputs are changed blindly. What is found is kept as a file and does not end the run;
finds at one line count as one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

__all__ = ["Hunt", "is_guided"]


def is_guided() -> bool:
    """Whether atheris is installed."""
    return importlib.util.find_spec("atheris") is not None


class Hunt:
    """Gives inputs to a reader, counts them, and keeps those that it misbehaved on."""

    def __init__(self, target: str, folder: Path) -> None:
        from faults.campaign.headers import MisbehaviourError, check

        self._check, self._misbehaviour = check, MisbehaviourError
        self.target, self.folder = target, folder
        self.counted = {"tried": 0, "accepted": 0, "found": 0}
        self.places: dict[str, str] = {}

    def one(self, data: bytes) -> None:
        """One input."""
        self.counted["tried"] += 1
        try:
            self.counted["accepted"] += self._check(self.target, data)
        except self._misbehaviour as error:
            frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
            place = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} {str(error)[:60]}"
            if place not in self.places:
                self.places[place] = str(error)
                self.counted["found"] += 1
                (self.folder / f"found-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
                self.write()
        if self.counted["tried"] % 1000 == 0:
            self.write()

    def write(self) -> None:
        """Bring the counts onto the disk: the fuzzer ends the process without a word."""
        text = json.dumps({**self.counted, "places": self.places})
        temporary = self.folder / "counted.tmp"
        temporary.write_text(text)
        temporary.replace(self.folder / "counted.json")


def _guided(target: str, seconds: int, folder: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["noether_init_core"]):
        hunt = Hunt(target, folder)
        from faults.campaign.headers import seeds
    arguments = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        "-max_len=16384",
        "-timeout=30",
        "-rss_limit_mb=4096",
        "-print_final_stats=0",
        "-verbosity=0",
        f"-artifact_prefix={folder}/ended-",
        str(_corpus(folder, seeds(target))),
    ]
    atheris.Setup(arguments, hunt.one)
    atheris.Fuzz()


def _blind(target: str, seconds: int, folder: Path) -> None:
    from faults.campaign.headers import seeds

    hunt, chance, known = Hunt(target, folder), random.Random(0), seeds(target)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        hunt.one(changed(chance, known))
    hunt.write()


def changed(chance: random.Random, known: list[bytes]) -> bytes:
    """One of the known inputs with a few bytes set, removed, repeated or taken from another."""
    data = bytearray(chance.choice(known))
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(data) + 1)
        step: Callable[[], None] = chance.choice(
            (
                lambda at=at: data.__setitem__(slice(at, at + 1), chance.randbytes(1)),
                lambda at=at: data.__setitem__(slice(at, at + chance.randint(1, 9)), b""),
                lambda at=at: data.__setitem__(slice(at, at), chance.randbytes(chance.randint(1, 9))),
                lambda at=at: data.__setitem__(slice(at, at), data[at : at + chance.randint(1, 40)] * 3),
                lambda at=at: data.__setitem__(slice(at, at + 8), chance.choice(known)[at : at + 8]),
                lambda at=at: data.__setitem__(slice(at, at + 4), chance.choice((b"\xff" * 4, b"\x7f\xff\xff\xff"))),
            )
        )
        step()
    return bytes(data)


def _corpus(folder: Path, known: list[bytes]) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for data in known:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    return corpus


def main() -> None:
    """Hunt with one target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("seconds", type=int)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (_guided if is_guided() else _blind)(arguments.target, arguments.seconds, arguments.folder)


if __name__ == "__main__":
    main()
