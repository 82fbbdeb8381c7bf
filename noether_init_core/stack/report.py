"""The report of an initialization, from plans and outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from noether_init_core import kinds
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets.provenance import InitializerReport, InitReport
from noether_init_core.stack.members import Prepared
from noether_init_core.stack.provenance import Carried, Written, trace
from noether_init_core.surgery.plan import LoadPlan

__all__ = ["reported"]


def reported(
    model: Any,
    prepared: Sequence[Prepared],
    start: TrainingIteration,
    starts: Sequence[TrainingIteration | None],
    called: Sequence[str],
    written: Mapping[int, Written],
    decision: str,
) -> InitReport:
    """The report.

    Args:
        model: The whole model, initialized.
        prepared: The plans that were carried out, one for each member; its initializer is asked for its outcome.
        start: The iteration at which training starts.
        starts: What each member returned as its start.
        called: The hooks that were called.
        written: Number of a member without a plan -> the entries that it gave other values.
        decision: What ``auto_resume`` decided.
    """
    offers = {info.name: f"{info.distribution} {info.version}" for info in kinds.installed()}
    reports = []
    carried: list[Carried | Written] = []
    for number, (one, own_start) in enumerate(zip(prepared, starts, strict=True)):
        member = one.member
        planned = LoadPlan.merged([plan for _unit, plan in one.plans]) if one.plans else None
        outcome = member.initializer.outcome()
        reports.append(
            InitializerReport(
                kind=member.kind,
                distribution=offers.get(member.kind, ""),
                hooks=tuple(hook for hook in called if member.takes_part_in(hook)),
                origins=()
                if planned is None
                else tuple((one.model, one.description, ", ".join(one.files)) for one in planned.origins),
                counts={} if planned is None else planned.counts(),
                coverage=None if planned is None else planned.coverage(),
                start=str(own_start) if own_start is not None and not own_start.is_zero else None,
                restored=outcome.restored,
                passed_over=outcome.passed_over,
                not_restored=outcome.not_restored,
                resumed_set=outcome.resumed_set,
                timings=outcome.timings,
            )
        )
        path, name = ".".join((str(model.name), *member.submodel)), str(member.model(model).name)
        for unit, plan in one.plans:
            own = outcome if unit is member.initializer else unit.outcome()
            carried.append(Carried(unit.config.kind, plan, own, path, name))
        if number in written:
            carried.append(written[number])
    sources, tensors = trace(model, carried)
    return InitReport(start, tuple(reports), decision, sources, tensors)
