"""The report of an initialization, with the origin of every tensor, from the plans that were carried out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from noether_init_core import kinds
from noether_init_core.initializers.base import LoadedFile, Outcome
from noether_init_core.iteration import TrainingIteration
from noether_init_core.models import leaf_models
from noether_init_core.sets.provenance import InitializerReport, InitReport, SourceRecord, TensorRecord
from noether_init_core.stack.members import Prepared
from noether_init_core.surgery.plan import LoadPlan, PlanRow
from noether_init_core.surgery.steps import described

#: (path of a single model, name of an entry) -> digest of its bytes.
Values = dict[tuple[str, str], str]


@attrs.frozen
class Carried:
    """A plan that was carried out, and the path of names of the part of the model that it was for."""

    kind: str
    plan: LoadPlan
    outcome: Outcome
    path: str
    name: str

    def file_of(self, row: PlanRow) -> LoadedFile:
        """The file that a row is loaded from; as far as the plan knows it where the outcome does not record it."""
        if row.model in self.outcome.files:
            return self.outcome.files[row.model]
        files = self.plan.origins[row.origin].files
        return LoadedFile(files[0] if files else self.kind)

    def full(self, model: str) -> str:
        """The path of a single model in the whole, which the plan of a part knows by the name of the part."""
        return self.path + model.removeprefix(self.name)


@attrs.frozen
class Written:
    """An initializer without a plan, and the entries that it gave other values: (path of a single model, name)."""

    kind: str
    entries: frozenset[tuple[str, str]]


def values_of(model: Any) -> Values:
    """Digests of every parameter and buffer with memory, to be compared with those of another moment."""
    import torch
    import xxhash

    found = {}
    for path, leaf in leaf_models(model):
        for named in (leaf.named_parameters, getattr(leaf, "named_buffers", None)):
            for name, tensor in () if named is None else named():
                if not tensor.is_meta:
                    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
                    found[path, name] = xxhash.xxh3_128_hexdigest(plain.view(torch.uint8).numpy().data)
    return found


def trace(
    model: Any, carried: Iterable[Carried | Written]
) -> tuple[tuple[SourceRecord, ...], tuple[TensorRecord, ...]]:
    """The files that values came from, and one record for every parameter and buffer of ``model``.

    Of several initializers that wrote a tensor the last one counts.
    """
    sources: dict[SourceRecord, int] = {}
    found: dict[tuple[str, str], TensorRecord] = {}
    for one in carried:
        if isinstance(one, Written):
            _forget(found, one)
            continue
        plan = one.plan
        files: dict[tuple[int, str], tuple[int, LoadedFile]] = {}
        paths = {model: one.full(model) for model in dict.fromkeys(row.model for row in plan.rows)}
        for row in plan.rows:
            if row.target is None:
                continue
            path = paths[row.model]
            place = path, row.target
            if not row.writes:
                if place not in found or row.action == "reset":
                    found[place] = TensorRecord(path, row.target, row.is_parameter, rule=row.rule, tied_to=row.tied_to)
                continue
            if (row.origin, row.model) not in files:
                file = one.file_of(row)
                record = _record_of(one, row.model, file)
                files[row.origin, row.model] = sources.setdefault(record, len(sources)), file
            number, file = files[row.origin, row.model]
            found[place] = TensorRecord(
                path,
                row.target,
                row.is_parameter,
                number,
                row.sources,
                tuple([file.tensors.get(key) for key in row.sources]),
                row.rule,
                tuple(map(described, row.steps)) if row.steps else (),
                _ancestors(file.history, row.sources, sources) if file.history else (),
                bool(row.steps) and row.is_partial,
                row.tied_to,
            )
    firsts: dict[int, tuple[str, str]] = {}
    for path, leaf in leaf_models(model):
        for name, parameter in leaf.named_parameters():
            # one parameter of several submodels: what one of them loaded, all have
            first = firsts.setdefault(id(parameter), (path, name))
            if first != (path, name) and {first, (path, name)} <= found.keys():
                _share(found, first, (path, name))
        for named, is_parameter in ((leaf.named_parameters, True), (getattr(leaf, "named_buffers", None), False)):
            for name, _tensor in () if named is None else named():
                found.setdefault((path, name), TensorRecord(path, name, is_parameter))
    return tuple(sources), tuple(found.values())


def _forget(found: dict[tuple[str, str], TensorRecord], written: Written) -> None:
    """What has other values now did not come from a file, whatever was loaded before."""
    rule = f"{written.kind} gave it its value"
    for place in written.entries & found.keys():
        old = found[place]
        found[place] = TensorRecord(old.model, old.name, old.is_parameter, rule=rule, tied_to=old.tied_to)


def _share(found: dict[tuple[str, str], TensorRecord], first: tuple[str, str], other: tuple[str, str]) -> None:
    loaded, fresh = (first, other) if found[first].source is not None else (other, first)
    if found[loaded].source is not None and found[fresh].source is None:
        rule = f"the same tensor as {loaded[1]} of {loaded[0]}"
        found[fresh] = attrs.evolve(found[loaded], model=fresh[0], name=fresh[1], rule=rule)


def _record_of(one: Carried, model: str, file: LoadedFile) -> SourceRecord:
    return SourceRecord(
        one.kind,
        one.full(model),
        file.path.name,
        # a path below the folder that it was started in is of no use to those who read it later
        str(file.path.absolute()),
        file.digest,
        tuple(sorted(file.origin.items())),
        one.outcome.continues,
    )


def _ancestors(
    history: Mapping[str, tuple[tuple[SourceRecord, tuple[str, ...]], ...]],
    keys: Iterable[str],
    sources: dict[SourceRecord, int],
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Where the values under ``keys`` of a file came from before; what several have in common stands once."""
    chain = dict.fromkeys(step for key in keys for step in history.get(key, ()))
    return tuple((sources.setdefault(record, len(sources)), names) for record, names in chain)


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
                hooks=tuple(hook for hook in called if hook in one.hooks),
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
