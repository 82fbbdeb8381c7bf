"""Walk-back: from a broken set to the newest good one before it, with the reason for every set that is passed over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, TypeVar

import attrs

from noether_init_core.errors import CheckpointError, NoGoodSetError
from noether_init_core.sets.store import CheckpointSet, Need, RunStore

__all__ = ["Walked", "walk_back"]

T = TypeVar("T")
_PARTS = {"model": "weights", "optim": "optimizer state", "trainer": "trainer state"}


@attrs.frozen
class Walked(Generic[T]):
    """The set that is used, what its proof gave, and (set, why) of each that was passed over, newest first."""

    chosen: CheckpointSet
    proof: T
    passed_over: tuple[tuple[str, str], ...] = ()


def walk_back(
    store: RunStore,
    descending: Iterator[tuple[str, CheckpointSet | CheckpointError]],
    prove: Callable[[CheckpointSet], T],
    *,
    needs: Sequence[Need],
    wanted: Collection[Need],
    is_choosy: bool,
) -> Walked[T]:
    """The first set that is proven good.

    Args:
        store: Where the sets are.
        descending: What the tag means, then what to walk back to; see ``RunStore.descending``.
        prove: Verifies a set; raises ``CheckpointError`` or ``OSError`` for a broken one.
        needs: What the set that the tag means must have.
        wanted: What a set that is walked back to must have besides.
        is_choosy: Whether the tag means the newest set that has all of it, and not one set.

    Raises ``NoGoodSetError`` with every reason, if no set is good; what ``descending`` raises; and
    ``IncompleteSetError`` if the one set that the tag means was saved without a part that is needed.
    """
    tried: dict[str, str] = {}
    incomplete: CheckpointSet | None = None
    everything = list(dict.fromkeys((*needs, *wanted)))
    for name, found in descending:
        if isinstance(found, CheckpointError):
            tried[name] = str(found)
            continue
        lacking = [need for need in (everything if tried or is_choosy else needs) if not found.has(need)]
        if lacking and not tried:
            if not is_choosy:
                store.require(found, needs)
            incomplete = incomplete or found
            continue
        if lacking:
            tried[name] = "it was saved without " + ", ".join(
                f"{_PARTS[need.part]} of {need.model}" if need.model else _PARTS[need.part] for need in lacking
            )
            continue
        try:
            return Walked(found, prove(found), tuple(tried.items()))
        except (CheckpointError, OSError) as error:
            tried[name] = str(error)
    if incomplete is not None and not tried:
        store.require(incomplete, everything)
    listed = "".join(f"\n- {name}: {reason}" for name, reason in tried.items())
    raise NoGoodSetError(
        f"{store.folder} holds no set that can be resumed from; nothing was changed, and nothing was started anew. "
        f"Tried, newest first:{listed}\nNext: noether-init verify {store.folder}",
        path=store.folder,
        tried=tried,
    )
