"""Outcome: what one initializer did, beyond its plan, for the report and for provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import attrs

from noether_init_core.sets.provenance import History
from noether_init_core.stopwatch import Timing, summed

__all__ = ["LoadedFile", "Outcome"]


@attrs.frozen(eq=False)
class LoadedFile:
    """A file that the weights of a single model came from.

    Attributes:
        path: The file.
        digest: Of the whole file, where it is known: ``xxh3_128:...`` or ``sha256:...``.
        origin: Where the file came from: run_id, stage_name, tag, iteration.
        tensors: Name in the file -> digest of the tensor's bytes, where a manifest records it.
        history: Name in the file -> where its values came from before.
    """

    path: Path = attrs.field(converter=Path)
    digest: str | None = None
    origin: Mapping[str, str] = attrs.Factory(dict)
    tensors: Mapping[str, str] = attrs.Factory(dict)
    history: History = attrs.Factory(dict)


@attrs.frozen(eq=False)
class Outcome:
    """What one initializer did in one initialization. The stack asks for it after the last hook.

    Attributes:
        files: Path of a single model -> the file that its weights came from.
        restored: What was restored besides weights, in words.
        not_restored: What the checkpoint has and nothing was given to take, in words.
        passed_over: (set, reason) of each broken set that was passed over, newest first.
        resumed_set: The folder of the set that is resumed; None where nothing is resumed.
        continues: Whether the weights come from the very run that is started.
        timings: Seconds and bytes of each phase.
    """

    files: Mapping[str, LoadedFile] = attrs.Factory(dict)
    restored: tuple[str, ...] = ()
    not_restored: tuple[str, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()
    resumed_set: str | None = None
    continues: bool = False
    timings: tuple[Timing, ...] = ()

    @classmethod
    def merged(cls, outcomes: Iterable[Outcome]) -> Outcome:
        """Several outcomes as one; of two files for one model, the later one counts."""
        each = tuple(outcomes)
        return cls(
            {model: file for one in each for model, file in one.files.items()},
            tuple(what for one in each for what in one.restored),
            tuple(what for one in each for what in one.not_restored),
            tuple(passed for one in each for passed in one.passed_over),
            next((one.resumed_set for one in each if one.resumed_set is not None), None),
            any(one.continues for one in each),
            summed(timing for one in each for timing in one.timings),
        )
