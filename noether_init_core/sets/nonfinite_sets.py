"""Whether a set holds values that a resume refuses, told from what its manifest or a look at its files says.

Refused are NaN in weights, buffers and optimizer state, infinities in parameters and optimizer state. Buffers may hold
infinities (masks do). Averages and the trainer's file are not asked: a resume restores the plain weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from noether_init_core.files.nonfinite_values import Finding
from noether_init_core.sets.file_names import Part
from noether_init_core.sets.manifest import Manifest, ManifestFile

__all__ = ["not_looked_at", "refused_by_resume", "refused_values", "summary"]

_STATE = "state."
_EXTRA_STATE = "_extra_state"


class _File(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def info(self) -> str | None: ...
    @property
    def part(self) -> Part: ...


def refused_by_resume(manifest: Manifest) -> tuple[str, ...]:
    """``weight of mlp holds NaN`` for each tensor that a resume refuses; none where nobody looked when it was saved."""
    return tuple(text for file in manifest.files if file.info is None for text in refused_values(file, file))


def refused_values(
    file: _File, committed: ManifestFile | None, seen: Mapping[str, Finding] | None = None
) -> tuple[str, ...]:
    """What is refused in one file, in words.

    Args:
        file: Which file; its ``info`` is left out of account.
        committed: What a manifest says of it. Without its list of buffers, infinities in weights are not refused.
        seen: Findings of a look at the tensors of ``not_looked_at``.
    """
    if file.part == "trainer":
        return ()
    found: dict[str, str] = {}
    for key, tensor in committed.tensors.items() if committed is not None else ():
        if tensor.values in ("NaN", "infinities"):
            found[key] = tensor.values
    found |= seen or {}
    if not found:
        return ()
    buffers = None if committed is None or committed.buffers is None else frozenset(committed.buffers)
    refused = []
    for key, what in found.items():
        if file.part == "optim":
            if key.startswith(_STATE):
                refused.append(f"{key} of the optimizer of {file.model} holds {what}")
        elif _is_loaded(key) and (what == "NaN" or (buffers is not None and key not in buffers)):
            refused.append(f"{key} of {file.model} holds {what}")
    return tuple(refused)


def not_looked_at(file: _File, committed: ManifestFile | None, keys: Iterable[str]) -> list[str]:
    """The tensors whose values count and of which the manifest does not say what they are."""
    if file.part == "trainer":
        return []
    known = (
        {key for key, tensor in committed.tensors.items() if tensor.values is not None}
        if committed is not None
        else frozenset()
    )
    counts = _is_loaded if file.part == "model" else lambda key: key.startswith(_STATE)
    return [key for key in keys if key not in known and counts(key)]


def summary(refused: tuple[str, ...], most: int = 3) -> str:
    """The first few of them, and how many more there are."""
    more = f", and {len(refused) - most} more tensors" if len(refused) > most else ""
    return ", ".join(refused[:most]) + more


def _is_loaded(key: str) -> bool:
    """Extra state of a module is handed over as it is, whatever its values."""
    return key.rpartition(".")[2] != _EXTRA_STATE
