"""Entries whose values do not come from a file, although a plan or an earlier initializer loaded them from one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import xxhash

from noether_init_core.applying.targets import registered
from noether_init_core.files.reading import memory_of_tensor
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.models import leaf_models
from noether_init_core.surgery.plan import LoadPlan

#: Path of a single model, name of an entry in it.
Place = tuple[str, str]


@attrs.frozen
class Written:
    """The entries whose values an initializer changed: (path of a single model, name); ``how`` says how, in words."""

    kind: str
    entries: frozenset[Place]
    how: str = "set by"


def entries_of(model: Any) -> Iterator[tuple[Place, Any, bool]]:
    """Place, tensor, and whether it is a parameter, for every parameter and buffer."""
    for path, leaf in leaf_models(model):
        for named, is_parameter in ((leaf.named_parameters, True), (getattr(leaf, "named_buffers", dict), False)):
            for name, tensor in dict(named()).items():
                yield (path, name), tensor, is_parameter


def values_of(model: Any) -> dict[Place, str]:
    """Place -> digest of the bytes, for every parameter and buffer that has memory."""
    return {place: _digest(tensor) for place, tensor, _is_parameter in entries_of(model) if not tensor.is_meta}


def _digest(tensor: Any) -> str:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return xxhash.xxh3_128_hexdigest(memory_of_tensor(plain))


def written_without_plan(model: Any, kind: str, call: Callable[[], Any]) -> Written:
    """Call a kind without a plan; the entries that it changed no longer come from a file."""
    before = values_of(model)
    call()
    after = values_of(model)
    return Written(kind, frozenset(place for place, digest in after.items() if before.get(place) != digest))


def may_change_afterwards(units: Iterable[InitializerBase]) -> bool:
    """Whether ``init_weights`` of one of them is code outside this package, which may change what was loaded."""
    own = __name__.partition(".")[0]
    return any(str(getattr(type(one).init_weights, "__module__", "")).partition(".")[0] != own for one in units)


def changed_afterwards(
    part: Any,
    full: Callable[[str], str],
    kind: str,
    units: Iterable[InitializerBase],
    plans: Iterable[tuple[InitializerBase, LoadPlan]],
    call: Callable[[], Any],
) -> Written:
    """Call a kind, and compare what this package wrote for it with the values that the model has in the end.

    In place, through ``.data`` and through NumPy all change bytes, so the digests of bytes are compared; counters of
    versions would miss the last two. Rows of a plan that the kind made itself are not compared.

    Args:
        part: The part of the model that the kind initializes.
        full: The path of a single model of a plan -> its path in the whole model.
        kind: The name of the kind.
        units: Its delegates and itself, in sessions.
        plans: Each plan with its initializer.
        call: Calls ``init_weights``.
    """
    written: dict[int, tuple[Any, Any]] = {}
    writers: set[int] = set()

    def note(unit: InitializerBase, leaf: Any, names: Iterable[str]) -> None:
        writers.add(id(unit))
        own = registered(leaf)
        for tensor in (own[name] for name in names if name in own):
            # with the tensor, so that no other one gets its id
            written[id(tensor)] = tensor, _state(tensor)

    units = tuple(units)
    for unit in units:
        unit.session.on_written = functools.partial(note, unit)
    try:
        call()
    finally:
        for unit in units:
            unit.session.on_written = None
    changed = set()
    for unit, plan in plans:
        for path, leaf in leaf_models(part) if id(unit) in writers else ():
            own = registered(leaf)
            for row in plan.rows_of(path):
                tensor = own.get(row.target or "") if row.writes else None
                if tensor is not None and written.get(id(tensor), (None, None))[1] != _state(tensor):
                    changed.add((full(path), str(row.target)))
    return Written(kind, frozenset(changed), "changed afterwards by")


def _state(tensor: Any) -> Any:
    """What differs after a change of values."""
    try:
        return str(tensor.dtype), tuple(tensor.shape), _digest(tensor)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # such as sparse or distributed tensors
        return tensor._version
