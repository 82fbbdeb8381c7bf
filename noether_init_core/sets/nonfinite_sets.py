"""Which values that are not finite a resume refuses.

Refused are NaN in weights, buffers and optimizer state, infinities in parameters and optimizer state. Buffers may hold
infinities (masks do). Averages and the trainer's file are not asked: a resume restores the plain weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from noether_init_core.files.examining import Finding
from noether_init_core.sets.checkpoint_set import CheckpointFile, CheckpointSet
from noether_init_core.sets.file_names import Part
from noether_init_core.sets.manifest import Manifest

__all__ = ["not_looked_at", "refused", "refused_by_resume", "refused_values", "worth_a_look"]

_STATE = "state."
_EXTRA_STATE = "_extra_state"


def worth_a_look(part: Part, keys: Iterable[str]) -> list[str]:
    """The tensors of a file whose values count. Extra state of a module is handed over as it is, whatever it holds."""
    if part == "optim":
        return [key for key in keys if key.startswith(_STATE)]
    return [key for key in keys if part == "model" and key.rpartition(".")[2] != _EXTRA_STATE]


def refused(part: Part, found: Mapping[str, Finding], buffers: Collection[str] | None) -> dict[str, Finding]:
    """What a resume refuses of the values that were found; without ``buffers``, no infinities in weights."""
    return {
        key: found[key]
        for key in worth_a_look(part, found)
        if part == "optim" or found[key] == "NaN" or (buffers is not None and key not in buffers)
    }


def refused_by_resume(manifest: Manifest) -> tuple[str, ...]:
    """``weight of mlp holds NaN`` for each tensor of a set that a resume refuses."""
    return tuple(
        text for file in manifest.files if file.info is None for text in _in_words(file.model, file.part, file.refused)
    )


def not_looked_at(checkpoint_set: CheckpointSet, file: CheckpointFile, keys: Iterable[str]) -> list[str]:
    """The tensors whose values count, and at which nobody looked when the file was written."""
    return [] if checkpoint_set.committed else worth_a_look(file.part, keys)


def refused_values(checkpoint_set: CheckpointSet, file: CheckpointFile, seen: Mapping[str, Finding]) -> tuple[str, ...]:
    """What is refused in one file, whatever its info, in words; ``seen`` is found in what was not looked at."""
    head = checkpoint_set.head_of(file)
    return _in_words(file.model, file.part, refused(file.part, seen, None) if head is None else head.refused)


def _in_words(model: str, part: Part, values: Mapping[str, Finding]) -> tuple[str, ...]:
    place = f"the optimizer of {model}" if part == "optim" else model
    return tuple(f"{key} of {place} holds {what}" for key, what in values.items())
