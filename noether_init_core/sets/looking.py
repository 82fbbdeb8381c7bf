"""Which set is meant on the disk: asked again where the folder changes meanwhile, an error where none can be told."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from noether_init_core.errors import CheckpointError
from noether_init_core.files.storage.disk import is_out_of_reach
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need
from noether_init_core.sets.refusals import AskedBy, worded
from noether_init_core.sets.selection import Missing, NothingHere, Policy, Query, Refusal, Selected, select
from noether_init_core.sets.snapshot import Snapshot

__all__ = ["find_set", "newest_set", "require", "walk_back"]

T = TypeVar("T")
#: How often sets are listed anew before an error is believed.
_LOOKS = 5


def find_set(
    snapshot: Snapshot,
    tag: str | Mapping[str, Any] | TrainingIteration | None = None,
    needs: Sequence[Need] = (),
    policy: Policy = Policy(),  # noqa: B008  # a frozen value
    *,
    broken: Mapping[str, str] | None = None,
    asked_by: AskedBy = "tag",
) -> Selected:
    """The set that ``tag`` means, with every file that is needed; what that is, ``select`` says.

    A writer may commit or retire sets meanwhile: then it is asked again, of a new snapshot, which ``Selected`` holds.

    Args:
        snapshot: What is there.
        tag: None (``latest``), a tag as it was saved, ``best`` or ``best.<metric>``, or an iteration as text or
            mapping: ``E10_U100_S200``, or one field of it (``E10``, ``{"epoch": 10}``).
        needs: The files that the set must have.
        policy: How it is answered.
        broken: Sets that the caller has found broken.
        asked_by: Who asks; errors advise what its config can say.

    Raises:
        ConfigError: ``tag`` is none.
        CheckpointNotFoundError: The run, stage, tag, model or info does not exist; what exists is listed.
        IncompleteSetError: The set lacks a part; sets that have everything are listed.
        AmbiguousCheckpointError: ``best`` with several metrics; several models for a need without a name; flat files of
            a later iteration than the newest committed set, unless one set is asked for by name.
        CheckpointCorruptError: The manifest is broken, or files are missing or cut short. ``CheckpointFormatError``:
            another release wrote it. ``NoGoodSetError``: so it is with every set that could be walked back to.
    """
    answer, snapshot = _ask(snapshot, Query.of(tag), needs, policy, broken or {})
    if isinstance(answer, Selected):
        return answer
    raise worded(answer, snapshot, asked_by) from getattr(answer, "error", None)


def _ask(
    snapshot: Snapshot, query: Query, needs: Sequence[Need], policy: Policy, broken: Mapping[str, str]
) -> tuple[Selected | Refusal, Snapshot]:
    """The answer, and the snapshot that gave it: one that writers have not overtaken."""
    for _ in range(_LOOKS):
        answer = select(snapshot, query, needs, policy, broken)
        is_doubtful = snapshot.saw_unfinished or not isinstance(answer, Selected)
        if not is_doubtful or snapshot.is_current():
            return answer, snapshot
        snapshot = Snapshot(snapshot.paths, storage=snapshot.storage)
    return select(snapshot, query, needs, policy, broken), snapshot


def newest_set(snapshot: Snapshot, model: str | None = None, *, asked_by: AskedBy = "tag") -> CheckpointSet | None:
    """The newest set with a trainer file (of ``model``), whatever its tags; None where there is none.

    Raises ``CheckpointCorruptError`` if a newer committed set is broken, ``AmbiguousCheckpointError`` if flat files
    of a later iteration, not ours, lie beside the committed sets.
    """
    needs = () if model is None else (Need(model, "trainer"),)
    answer, snapshot = _ask(snapshot, Query.of(None), needs, Policy(any_tag=True), {})
    if isinstance(answer, Missing | NothingHere):
        return None
    if isinstance(answer, Selected):
        return answer.found
    raise worded(answer, snapshot, asked_by) from getattr(answer, "error", None)


def walk_back(
    snapshot: Snapshot,
    tag: str | Mapping[str, Any] | TrainingIteration | None,
    prove: Callable[[CheckpointSet], T],
    needs: Sequence[Need],
    policy: Policy,
    *,
    asked_by: AskedBy,
) -> tuple[Selected, T]:
    """The newest set that is proven good, and what its proof gave; ``policy`` has ``walk_back``.

    ``prove`` verifies a set; it raises ``CheckpointError`` or ``OSError`` for a broken one. Raises what ``find_set``
    raises, and what ``prove`` raises for a set that cannot be reached: nobody knows whether that is broken.
    """
    broken: dict[str, str] = {}
    while True:
        selected = find_set(snapshot, tag, needs, policy, broken=broken, asked_by=asked_by)
        try:
            return selected, prove(selected.found)
        except (CheckpointError, OSError) as error:
            if is_out_of_reach(error, but=errno.EIO):
                raise
            snapshot = selected.snapshot
            broken[selected.found.place] = str(error)


def require(snapshot: Snapshot, found: CheckpointSet, needs: Sequence[Need], *, asked_by: AskedBy = "tag") -> None:
    """Make sure that a set which was selected before has further files; raises what ``find_set`` would raise."""
    if not all(found.has(need) for need in needs):
        raise worded(Missing(found, found.name, tuple(needs)), snapshot, asked_by)
