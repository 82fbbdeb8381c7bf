"""The observer ``probe``: compares the outputs of a loaded model with those at the time of the save."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import attrs

from noether_init_core.errors import ProbeMismatchError
from noether_init_core.initializers.checkpoint import CheckpointInitializer
from noether_init_core.initializers.source import SourceInitializer
from noether_init_core.kinds.hookspec import hookimpl
from noether_init_core.kinds.naming import name_of
from noether_init_core.messages import logger_of
from noether_init_core.models import Leaf, submodel_of
from noether_init_core.probe.outputs import Compared, Output, compare
from noether_init_core.probe.probe import Probe, computed_by, described, device_of, dtype_of, hindrance, repeat
from noether_init_core.saving.file_writing import read_probe
from noether_init_core.sets.checkpoint_set import CheckpointSet
from noether_init_core.sets.file_names import parse
from noether_init_core.surgery.plan import PlanRow
from noether_init_core.surgery.steps import Interpolate, Pad, Slice

logger = logger_of(__name__)

Around = Generator[None, Any, Any]


@attrs.define(eq=False)
class _Pending:
    """A probe to repeat after all weights of the stack are loaded.

    ``places``: its models and their memory; ``others``: kinds that may have changed some of that memory since.
    """

    source: CheckpointSet
    probe: Probe
    places: frozenset[Any] = frozenset()
    others: list[str] = attrs.Factory(list)


class ProbeObserver:
    """Repeats the probe of every set that weights came from, after all weights of the stack are loaded.

    If the outputs are equal, or differ by rounding, the report says so. Otherwise it raises ``ProbeMismatchError``. If
    a difference is expected, report and log mention it instead: not all entries of the model came from the set, or not
    all entries of the set were loaded. The log mentions a set without a probe, and an initializer without a set.

    A damaged probe is refused before any weight changes. Model and process are unchanged after a probe.

    Args:
        tolerance: Largest difference, relative to the norm, that counts as rounding; None: by dtype, see
            ``tolerance_for``.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self._tolerance = tolerance
        # Weak keys: after a failed initialization, an observer must not keep the initializer and its model in memory.
        self._pending: weakref.WeakKeyDictionary[Any, _Pending] = weakref.WeakKeyDictionary()

    @hookimpl(wrapper=True)
    def init_weights(self, model: Any, initializer: Any) -> Around:
        self._pending.pop(initializer, None)
        pending = self._begun(initializer)  # before the weights change, so that a damaged probe changes nothing
        result = yield
        for earlier in tuple(self._pending.values()):
            # The writes of a kind without a plan are unknown, so it may have changed anything.
            rows = _rows(initializer, model) if isinstance(initializer, SourceInitializer) else ()
            if not rows or earlier.places & _places(row for row in rows if row.writes or row.action == "reset"):
                earlier.others.append(name_of(initializer))
        if pending is not None:
            pending.places = _places(_rows(initializer, model))
            self._pending[initializer] = pending
        return result

    @hookimpl(wrapper=True)
    def init_optimizer(self, model: Any, initializer: Any) -> Around:
        result = yield
        # The stack calls init_weights of all initializers before the first init_optimizer, so weights are final here.
        pending = self._pending.pop(initializer, None)
        if pending is not None:
            result_text = self._repeated(model, initializer, pending)
            initializer.session.restored.append(f"probe: {result_text}")
            logger.info("%s: probe of %s: %s", name_of(initializer), pending.source.folder, result_text)
        return result

    def _begun(self, initializer: Any) -> _Pending | None:
        """Read the probe of the set of the initializer. Raises errors of the reader for a damaged probe."""
        kind = name_of(initializer)
        selection = initializer.selection if isinstance(initializer, CheckpointInitializer) else None
        selected = None if selection is None else selection.chosen
        if selected is None:
            logger.info("%s: no set was selected, so there is no probe", kind)
            return None
        probe = read_probe(selected)
        if probe is None:
            logger.warning("%s: %s was saved without a probe", kind, selected.folder)
            return None
        return _Pending(selected, probe)

    def _repeated(self, model: Any, initializer: CheckpointInitializer, pending: _Pending) -> str:
        """Repeat the probe and return the result in words. Raises ``ProbeMismatchError``."""
        probe = pending.probe
        leaves = initializer.leaves(model)
        chosen = submodel_of(model, tuple(filter(None, (initializer.config.submodel or "").split("."))))
        reason = _another_model(initializer, leaves, model, probe) or hindrance(chosen)
        if reason:
            return f"not repeated, {reason}"
        excuse = _excuse(_rows(initializer, model), pending)
        if probe.has_drawn and device_of(chosen).type != probe.device:
            excuse = excuse or f"random numbers of {device_of(chosen).type} differ from those of {probe.device}"
        try:
            found = repeat(chosen, probe)
        except Exception as error:
            problem = f"{chosen.name} cannot be run on the probe: {described(error)}"
            if excuse:
                return f"not repeated, {problem}; {excuse}"
            raise ProbeMismatchError(
                f"{problem}. It could when {_words(pending.source)} was saved. {_NEXT}", path=pending.source.folder
            ) from error
        compared = compare(
            probe.outputs,
            found,
            dtypes=filter(None, (probe.dtype, dtype_of(chosen))),
            devices=(probe.device, device_of(chosen).type),
            tolerance=self._tolerance,
            is_alike=probe.computed_by == computed_by(chosen),
        )
        wrong = [one for one in compared if one.problem]
        if not wrong:
            return _all_well(compared) + _not_compared(probe)
        worst = max(wrong, key=lambda one: float("inf") if one.difference is None else one.difference)
        if excuse:
            return f"{_differs(worst)}, which is expected: {excuse}{_not_compared(probe)}"
        raise _mismatch(chosen, pending, found, worst)


_NEXT = (
    "Every entry of the model came completely from that set, so entries were loaded to wrong places, or the code of "
    "the model has changed. Next: check renames and transforms with ninit plan, and changes of the code or "
    "settings of the model; if the change is intended, leave out the observer probe until the next save with probe="
)


def _mismatch(model: Any, pending: _Pending, found: Sequence[Output], worst: Compared) -> ProbeMismatchError:
    then, now = (
        next((one for one in outputs if one.path == worst.path), None) for outputs in (pending.probe.outputs, found)
    )
    norms = "" if then is None or now is None else f" (norm {then.norm:.6g} then, {now.norm:.6g} now)"
    expected, described = (
        None if one is None else {"shape": one.shape, "dtype": one.dtype, "norm": one.norm, "digest": one.digest}
        for one in (then, now)
    )
    return ProbeMismatchError(
        f"{model.name} computes other outputs than when {_words(pending.source)} was saved: on its probe "
        f"{_differs(worst)}{norms}. {_NEXT}",
        path=pending.source.folder,
        output=worst.path,
        expected=expected,
        found=described,
        difference=worst.difference,
    )


def _words(source: CheckpointSet) -> str:
    return f"{source.name} of {source.run_id}"


def _differs(one: Compared) -> str:
    if one.difference is None or one.changed is not None:
        return f"{one.path} {one.problem}"
    return f"{one.path} differs by {one.difference:.2g} of the norm, more than {one.tolerance:g}"


def _all_well(compared: Sequence[Compared]) -> str:
    if all(one.is_same for one in compared):
        return "same bits"
    worst = max((one for one in compared if one.changed is None), key=lambda one: one.difference or 0.0)
    return f"differs by {worst.difference:.1g} of the norm, within {worst.tolerance:g}"


def _not_compared(probe: Probe) -> str:
    return f"; not compared: {', '.join(probe.uncompared)}" if probe.uncompared else ""


def _another_model(initializer: CheckpointInitializer, leaves: Iterable[Leaf], model: Any, probe: Probe) -> str:
    """Return why the probe is not of the initialized models; empty if it is."""
    root = ".".join(filter(None, (str(model.name), initializer.config.submodel)))
    places = {}
    for leaf in leaves:
        name = parse(initializer.outcome().files[leaf.path].path.name)
        if name is None or name.info is not None:
            return "the probe is of the plain weights, but other weights were loaded"
        places[leaf.path.removeprefix(root)] = name.model.removeprefix(probe.model)
    below = {path.removeprefix(probe.model) for path in probe.models}
    if all(here == there for here, there in places.items()) and places.keys() == below:
        return ""
    return f"the probe is of {' and '.join(probe.models)}, but other models were initialized"


def _rows(initializer: SourceInitializer, model: Any) -> Sequence[PlanRow]:
    """Return the rows that were applied; for a kind that writes itself, the rows of its stated plan."""
    planned = initializer.session.planned
    plan = initializer.plan(model) if planned is None else planned.plan
    return () if plan is None else plan.rows


def _places(rows: Iterable[PlanRow]) -> frozenset[Any]:
    """Return the models of rows, and the memory (device and address) of their targets, because views may overlap."""
    found: set[Any] = set()
    for row in rows:
        if row.target is not None:
            found.add(row.model)
            if isinstance(row.identity, tuple):
                found.add(row.identity[:2])
    return frozenset(found)


def _excuse(rows: Sequence[PlanRow], pending: _Pending) -> str:
    """Return why other outputs are expected; empty if they are not."""
    if pending.others:
        return f"{', '.join(pending.others)} may have changed weights since"
    entries = [row for row in rows if row.target is not None and row.tied_to is None]
    missing = sum(not row.writes or row.action == "reset" or _loses(row) for row in entries)
    unused = sum(row.target is None for row in rows)
    reasons = []
    if missing:
        reasons.append(f"{missing:,} of {len(entries):,} entries of the model did not come completely from the set")
    if unused:
        reasons.append(f"{unused:,} entries of the set were not loaded")
    return ", ".join(reasons)


def _loses(row: PlanRow) -> bool:
    return row.is_partial or any(isinstance(step, Slice | Pad | Interpolate) for step in row.steps)
