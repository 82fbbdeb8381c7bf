"""What loading code of modules does with the entries of a file.

It may rename, compute, resize and drop entries, so a plan asks a rehearsal, and the code itself loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from noether_init_core.applying.loading_code import LoadingCode, translates
from noether_init_core.applying.own_loading import (
    kept_names,
    load_leniently,
    load_strictly,
    loaded_by_code,
    modules_of_sources,
    state_for,
)
from noether_init_core.applying.places import Identity
from noether_init_core.applying.rehearsal import Load, Rehearsal, Written, rehearse
from noether_init_core.applying.targets import ModelTargets
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.content import Versions
from noether_init_core.messages import listed
from noether_init_core.surgery.fit import Brought, PlanPart
from noether_init_core.surgery.name_rules import NameRules
from noether_init_core.surgery.plan import LoadPlan, PlanRow
from noether_init_core.surgery.planner import NOT_A_TENSOR
from noether_init_core.surgery.wrappers import prefix_of_all


def learned(
    part: PlanPart, targets: ModelTargets, plan: LoadPlan, rules: NameRules, reader: Checkpoint
) -> tuple[PlanPart, ModelTargets]:
    """Part and targets with what the loading code does to entries.

    ``plan`` is one that knows nothing of it. Without such code, or without entries for it, both are returned as they
    are.
    """
    rows, code = plan.rows_of(part.model), targets.code
    given = [row for row in rows if row.target is not None]
    unfit = [row for row in given if _is_unfit(row)]
    names = _expected_names(part, rules, [row.sources[0] for row in rows if row.target is None and _is_free(row)])
    prefixes = [row.key for row in unfit] + list(names)
    needed = {
        prefix: module
        for prefix, module in code.of_torch.items()
        if any(name.startswith(prefix) for name in prefixes) or any(n.startswith(prefix) for n in targets.unregistered)
    }
    runs = _outermost({**code.runs, **needed})
    code = attrs.evolve(code, runs=runs)
    loaded = {row.key for row in given if row.writes}
    brought: dict[str, Brought] = {}
    consumed: dict[str, str] = {}
    for prefix, module in runs.items():
        passed = {name: source for name, source in names.items() if name.startswith(prefix)}
        absent = frozenset(row.key for row in unfit if row.action != "mismatch")
        kept = frozenset(row.key for row in given if row.action == "keep" and row.key.startswith(prefix)) - absent
        for trial in _trials(attrs.evolve(code, brought=absent), passed, kept.intersection(targets.tensors)):
            found = _rehearsed(prefix, module, rows, attrs.evolve(targets, code=trial), reader, load_leniently)
            if not found.error or found.is_refused:
                break
        if found.error:
            continue
        code = attrs.evolve(code, own=code.own | trial.own)
        read = {row.key: row.sources for row in given if row.writes or row.action == "mismatch"}
        fates = _Fates(code, {**read, **{name: (source,) for name, source in trial.passed.items()}}, found)
        for row in unfit:
            if row.key.startswith(prefix) and (one := fates.of_row(row)) is not None:
                brought[row.key] = one
        for row in given if prefix in targets.code.runs else ():
            if row.writes and (one := fates.of_loaded(row, targets)) is not None:
                brought[row.key] = one
        unlisted = [name for name in part.unlisted if name.startswith(prefix) and name not in loaded]
        for name in unlisted:
            if (one := fates.of(name)) is not None and one.sources:
                brought[name] = one
        code = attrs.evolve(code, own=code.own | found.missing.intersection(unlisted))
        used = {source for one in brought.values() for source in one.sources}
        used.update(source for row in given if row.writes and row.key not in brought for source in row.sources)
        for name, source in trial.passed.items():
            if source in used or (found.unexpected is not None and name not in found.unexpected):
                consumed[source] = fates.rule(name)
        for row in given:
            if row.key in brought:
                consumed.update((source, fates.rule(row.key)) for source in row.sources if source not in used)
    kept_names = {name: source for name, source in names.items() if source in consumed}
    fed = {row.key: row for row in given if row.sources and row.key in brought}
    code = attrs.evolve(code, passed=kept_names, brought=frozenset(brought).difference(fed), fed=fed)
    return attrs.evolve(part, brought=brought, consumed=consumed), attrs.evolve(targets, code=code)


def _trials(code: LoadingCode, passed: Mapping[str, str], kept: frozenset[str]) -> Iterator[LoadingCode]:
    """What to give to the code, the likeliest first: as torch would, else without entries of unknown names.

    Code that cannot do without an entry which the config keeps is given the present value.
    """
    for own in dict.fromkeys((frozenset[str](), kept)):
        yield attrs.evolve(code, passed=passed, own=own)
        if passed:
            yield attrs.evolve(code, passed={}, own=own)


@attrs.frozen
class _Fates:
    """What became of entries in a rehearsal; ``read``: key of its state dict -> names in the file."""

    code: LoadingCode
    read: Mapping[str, tuple[str, ...]]
    found: Rehearsal

    def rule(self, key: str) -> str:
        """The code that decides on an entry, in words."""
        return f"loading code of {type(self.code.of_key(key)).__name__}"

    def of(self, name: str) -> Brought | None:
        """What the code gives an entry that the file does not have; None if it gives nothing."""
        written = self.found.written.get(name)
        if written is None or name in self.found.missing:
            return None
        return self._brought(name, written)

    def of_loaded(self, row: PlanRow, targets: ModelTargets) -> Brought | None:
        """The same for an entry that fits; None if it is loaded as it is."""
        written = self.found.written.get(row.key)
        if written is None or row.key not in targets.tensors:
            return None
        identity = targets.spec(row.key).identity
        tied = {key for key in written.keys if key in targets.tensors and targets.spec(key).identity == identity}
        if written.is_copy and tied:
            return None
        # values that went through NumPy cannot be followed
        return None if written.is_touched and not written.keys else self._brought(row.key, written)

    def of_row(self, row: PlanRow) -> Brought | None:
        """The same for an entry that did not fit by name or shape."""
        if row.action != "mismatch":
            return self.of(row.key)
        written = self.found.written.get(row.key)
        if written is None or not written.keys:
            return None
        return self._brought(row.key, written)

    def _brought(self, key: str, written: Written) -> Brought:
        # present values of the model, which the code was given too, are not of the file
        sources = tuple(dict.fromkeys(source for one in written.keys for source in self.read.get(one, ())))
        return Brought(sources, self.rule(key), written.shape, written.is_copy and len(sources) == 1)


def _is_unfit(row: PlanRow) -> bool:
    """Whether an entry of the model is not in the file, or has another shape there."""
    if row.action == "mismatch":
        return len(row.sources) == 1 and not row.steps and row.source_shapes[0] != row.shape
    return row.action == "missing" or str(row.rule).startswith("on_missing:")


def _is_free(row: PlanRow) -> bool:
    """Whether no rule decided on an entry of the file that the model does not have."""
    return row.action == "unexpected" or row.rule in ("on_unexpected: ignore", NOT_A_TENSOR)


def _expected_names(part: PlanPart, rules: NameRules, sources: Sequence[str]) -> dict[str, str]:
    """Name as the model may expect it -> name in the file: after the rules, with the prefix of the whole model."""
    if not sources:
        return {}
    match = rules.match(tuple(part.sources), (*part.targets, *part.unlisted))
    of_file, of_model = prefix_of_all(tuple(part.sources)), prefix_of_all(tuple(part.targets))
    found = {}
    for source in sources:
        name = match.astray[source][0] if source in match.astray else source.removeprefix(of_file)
        found[name if name.startswith(of_model) else f"{of_model}{name}"] = source
    return found


def _outermost(modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    found: dict[str, torch.nn.Module] = {}
    for prefix in sorted(modules, key=len):
        if not prefix.startswith(tuple(found)):
            found[prefix] = modules[prefix]
    return {prefix: module for prefix, module in modules.items() if prefix in found}


def _rehearsed(
    prefix: str,
    module: torch.nn.Module,
    rows: Sequence[PlanRow],
    targets: ModelTargets,
    reader: Checkpoint,
    load: Load,
    *,
    on_meta: bool = True,
) -> Rehearsal:
    def make(on_meta: bool) -> dict[str, Any]:
        return state_for(prefix, module, rows, reader, targets, on_meta=on_meta)

    return rehearse(module, make, load, prefix=prefix, on_meta=on_meta)


def rehearsal_problems(plan: LoadPlan, targets: ModelTargets, reader: Checkpoint, model: str) -> Iterator[str]:
    """Problems of the loading code with exactly the entries that it will be given."""
    rows = plan.rows_of(model)
    for prefix, module in targets.code.runs.items():
        load = load_leniently if kept_names(prefix, rows, targets) else load_strictly
        yield from _failures(
            prefix, module, rows, targets, reader, _rehearsed(prefix, module, rows, targets, reader, load)
        )


def value_problems(plan: LoadPlan, targets: ModelTargets, reader: Checkpoint, model: str) -> Iterator[str]:
    """Problems of the loading code of users with the verified values, which the model and the file must be in memory
    for.

    Code that does something else with values than the plan found is refused.
    """
    rows = plan.rows_of(model)
    for prefix, module in targets.code.runs.items() if targets.code.of_users else ():
        load = load_leniently if kept_names(prefix, rows, targets) else load_strictly
        found = _rehearsed(prefix, module, rows, targets, reader, load, on_meta=False)
        planned = _rehearsed(prefix, module, rows, targets, reader, load)
        problems = [*_failures(prefix, module, rows, targets, reader, found, on_meta=False)]
        yield from problems
        if not problems and attrs.evolve(planned, has_values=True) != found:
            yield (
                f"{_who(targets.code)} does something else with values than with names and shapes only, so that "
                "a plan would be wrong. Next: let it decide by names and shapes"
            )


def _failures(
    prefix: str,
    module: torch.nn.Module,
    rows: Sequence[PlanRow],
    targets: ModelTargets,
    reader: Checkpoint,
    found: Rehearsal,
    *,
    on_meta: bool = True,
) -> Iterator[str]:
    """Problems in words of what a rehearsal found."""
    who, kept = _who(targets.code), kept_names(prefix, rows, targets)
    if found.is_refused:
        yield f"{who}: {found.error}. Next: load this model by its own load_state_dict, without an initializer"
        return
    if found.error and not kept:
        # the message of torch names every entry; these are the ones that are wrong
        lenient = _rehearsed(prefix, module, rows, targets, reader, load_leniently, on_meta=on_meta)
        found = lenient if lenient.missing or lenient.unexpected else found
    missing = found.missing.difference(kept)
    if found.error:
        yield (
            f"{who} fails: {found.error}. Next: convert the file with the code that wrote it. It ran on a copy of the "
            "model: code that needs the model itself, as by its id, works only without an initializer"
        )
    elif missing:
        yield (
            f"{who} reports missing entries: {listed(sorted(missing))}. Next: convert the file with the code that "
            "wrote it, or keep the model's values there (keep_model)"
        )
    elif found.unexpected:
        yield (
            f"{who} reports unexpected entries: {listed(sorted(found.unexpected))}. "
            "Next: convert the file with the code that wrote it"
        )
    for name, is_asked in kept.items():
        written = found.written.get(name)
        if written is not None and (written.is_replaced or (written.is_touched and not is_asked)):
            yield f"{who} changes {name}, which the plan keeps. Next: let the code leave it, or load it from the file"


def _who(code: LoadingCode) -> str:
    """The loading code, in words: the modules that have it."""
    modules = (code.of_users or code.runs).items()
    names = [type(one).__name__ + (f" at {prefix[:-1]}" if prefix else "") for prefix, one in modules]
    return f"the loading code of {listed(names, 3)}"


def tied_loading_code(plan: LoadPlan, targets: Mapping[str, ModelTargets]) -> Iterator[str]:
    """Problems for tensors that the loading code of two models writes, by modules of two classes.

    Within a model, the last one wins, as in torch. Two modules of one class write the same value.
    """
    first: dict[Identity, tuple[str, str, type]] = {}
    for model, found in targets.items():
        for identity, names in loaded_by_code(plan.rows_of(model), found).items():
            for name, module in names.items():
                other, owner, kind = first.setdefault(identity, (f"{name} of {model}", model, type(module)))
                if kind is not type(module) and owner != model:
                    yield (
                        f"{other} and {name} of {model} are one tensor, and {kind.__name__} and "
                        f"{type(module).__name__} have loading code of their own for it. Next: untie it, or let one "
                        "module hold both: call load_state_dict of its parts, and save it"
                    )


def mixed_versions(rows: Sequence[PlanRow], versions: Versions, targets: ModelTargets) -> Iterator[str]:
    """Problems for modules that get entries of modules of the file with different versions.

    Their loading code receives one version only, and would translate some entries wrongly.
    """
    code = targets.code
    named = [code.fed.get(row.key, row) for row in rows if row.key not in code.brought]
    for prefix, own in code.runs.items():
        for path, module, sources in modules_of_sources(prefix, own, named):
            versions_of = {source: versions[source] for source in sources if source in versions}
            if all(other == next(iter(versions_of.values())) for other in versions_of.values()) or not translates(
                module
            ):
                continue
            name = f"{prefix}{path}".removesuffix(".") or "the whole model"
            shown = listed(f"{source or 'its root'} {dict(version)}" for source, version in versions_of.items())
            yield (
                f"{name} has loading code of its own, and gets entries of modules of the file that are of different "
                f"versions: {shown}. It cannot translate both. Next: keep its own values there (keep_model), "
                "or load the file into the model that saved it, and save that model again"
            )
