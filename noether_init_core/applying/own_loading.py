"""Loading code of modules: what it does with the entries of a file, and how it runs.

It may rename, compute, resize and drop entries, so a plan asks a rehearsal, and the code itself loads.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch.nn.modules.module import _IncompatibleKeys

from noether_init_core.applying.loading_code import LoadingCode, overrides_load, translates
from noether_init_core.applying.places import Identity
from noether_init_core.applying.rehearsal import Rehearsal, Written, at_prefix, rehearse
from noether_init_core.applying.targets import ModelTargets
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.content import Versions
from noether_init_core.messages import listed
from noether_init_core.surgery.fit import Brought, PlanPart
from noether_init_core.surgery.name_rules import NameRules
from noether_init_core.surgery.plan import LoadPlan, PlanRow
from noether_init_core.surgery.planner import NOT_A_TENSOR
from noether_init_core.surgery.steps import Step, carry_out
from noether_init_core.surgery.wrappers import prefix_of_all

# What it does: a plan asks.


def learned(
    part: PlanPart, targets: ModelTargets, plan: LoadPlan, rules: NameRules, reader: Checkpoint
) -> tuple[PlanPart, ModelTargets]:
    """Part and targets with what the loading code does to entries that do not fit by name or shape.

    ``plan`` is one that knows nothing of it. Without such entries, or such code, both are returned as they are.
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
    active = _outermost({**code.of_users, **needed})
    code = attrs.evolve(code, of_users=active)
    loaded = {row.key for row in given if row.writes}
    brought: dict[str, Brought] = {}
    consumed: dict[str, str] = {}
    for prefix, module in active.items():
        rule = f"loading code of {type(module).__name__}"
        passed = {name: source for name, source in names.items() if name.startswith(prefix)}
        absent = frozenset(row.key for row in unfit if row.action != "mismatch")
        trial = attrs.evolve(code, passed=passed, brought=absent)
        found = _rehearsed(prefix, module, rows, attrs.evolve(targets, code=trial), reader, is_lenient=True)
        if found.error and passed:
            passed, trial = {}, attrs.evolve(trial, passed={})
            found = _rehearsed(prefix, module, rows, attrs.evolve(targets, code=trial), reader, is_lenient=True)
        if found.error:
            continue
        read = {row.key: row.sources for row in given if row.writes or row.action == "mismatch"}
        fates = _Fates(rule, {**read, **{name: (source,) for name, source in passed.items()}}, found)
        for row in unfit:
            if row.key.startswith(prefix) and (one := fates.of_row(row)) is not None:
                brought[row.key] = one
        unlisted = [name for name in part.unlisted if name.startswith(prefix) and name not in loaded]
        for name in unlisted:
            if (one := fates.of(name)) is not None and one.sources:
                brought[name] = one
        code = attrs.evolve(code, own=code.own | found.missing.intersection(unlisted))
        used = {source for one in brought.values() for source in one.sources}
        for name, source in passed.items():
            if source in used or (found.unexpected is not None and name not in found.unexpected):
                consumed[source] = rule
    kept = {name: source for name, source in names.items() if source in consumed}
    has_source = {row.key for row in given if row.sources}
    absent = frozenset(name for name in brought if name not in has_source)
    code = attrs.evolve(code, passed=kept, brought=absent)
    return attrs.evolve(part, brought=brought, consumed=consumed), attrs.evolve(targets, code=code)


@attrs.frozen
class _Fates:
    """What became of entries in a rehearsal; ``read``: key of its state dict -> names in the file."""

    rule: str
    read: Mapping[str, tuple[str, ...]]
    found: Rehearsal

    def of(self, name: str) -> Brought | None:
        """What the code gives an entry that the file does not have; None if it gives nothing."""
        written = self.found.written.get(name)
        if written is None or name in self.found.missing:
            return None
        return self._brought(written)

    def of_row(self, row: PlanRow) -> Brought | None:
        """The same for an entry that did not fit by name or shape."""
        if row.action != "mismatch":
            return self.of(row.key)
        written = self.found.written.get(row.key)
        if written is None or not written.keys:
            return None
        return self._brought(written)

    def _brought(self, written: Written) -> Brought:
        # present values of the model, which the code was given too, are not of the file
        sources = tuple(source for key in written.keys for source in self.read.get(key, ()))
        return Brought(sources, self.rule, written.shape, written.is_copy and len(sources) == 1)


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
    *,
    is_lenient: bool,
) -> Rehearsal:
    def make(on_meta: bool) -> dict[str, Any]:
        return _state(prefix, module, rows, reader, targets, on_meta=on_meta)

    return rehearse(prefix, module, make, _lenient if is_lenient else _load)


def rehearsal_problems(plan: LoadPlan, targets: ModelTargets, reader: Checkpoint, model: str) -> Iterator[str]:
    """Problems of the loading code with exactly the entries that it will be given."""
    rows = plan.rows_of(model)
    for prefix, module in targets.code.of_users.items():
        is_root = not prefix and overrides_load(module)
        found = _rehearsed(prefix, module, rows, targets, reader, is_lenient=not is_root)
        who = f"the loading code of {type(module).__name__}" + (f" at {prefix[:-1]}" if prefix else "")
        fix = "Next: convert the file with the code that wrote it, or keep the model's values there (keep_model)"
        if found.error:
            yield f"{who} fails: {found.error}. {fix}"
        elif found.missing:
            yield f"{who} needs {listed(sorted(found.missing))}, not found in the file. {fix}"
        elif found.unexpected and not is_root:
            yield f"{who} does not take {listed(sorted(found.unexpected))}. {fix}"
    ended = _after_problem(targets)
    if ended:
        yield ended


def _after_problem(targets: ModelTargets) -> str:
    """Why a hook that runs after the load fails; empty if it does not, or if that depends on values."""
    for module in targets.code.after:
        found = rehearse("", module, lambda on_meta: {}, _only_after_hooks, with_values=False)
        if found.error and "meta" not in found.error.lower():
            return f"a hook of {type(module).__name__} that runs after the load fails: {found.error}"
    return ""


def _only_after_hooks(module: torch.nn.Module, _state: dict[str, Any]) -> None:
    run_hooks_after(module)


def run_hooks_after(module: torch.nn.Module) -> None:
    """Call the hooks of one module that run after a load, as if nothing was missing."""
    for hook in tuple(module._load_state_dict_post_hooks.values()):
        hook(module, _IncompatibleKeys([], []))


def _load(module: torch.nn.Module, state: dict[str, Any]) -> Any:
    return module.load_state_dict(state)


def _lenient(module: torch.nn.Module, state: dict[str, Any]) -> Any:
    """Load with ``strict=False`` where the code has that argument, since it then reports all keys."""
    if overrides_load(module) and "strict" not in inspect.signature(module.load_state_dict).parameters:
        return module.load_state_dict(state)
    return module.load_state_dict(state, strict=False)


# How it runs.


def load_by_code(
    prefix: str, module: torch.nn.Module, rows: Iterable[PlanRow], reader: Checkpoint, targets: ModelTargets
) -> None:
    """Let a module load its planned entries. Kept entries keep their values, also if its code translates them."""
    rows = [row for row in rows if row.target is not None and row.target.startswith(prefix)]
    state = _state(prefix, module, rows, reader, targets, on_meta=False)
    # what the state dict leaves out is the business of the code, unless the code asks for it
    left = targets.code.brought.union(targets.unlisted)
    given = (row.key for row in rows if row.action in ("keep", "reset") and row.key not in left)
    names = {*given, *(name for name in targets.code.own if name.startswith(prefix))}
    with unchanged(targets.tensors[name] for name in names if name in targets.tensors):
        _load(at_prefix(prefix, module), state)


@contextmanager
def unchanged(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Restore the values of the tensors at the end of the block."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)


def _state(
    prefix: str,
    module: torch.nn.Module,
    rows: Iterable[PlanRow],
    reader: Checkpoint,
    targets: ModelTargets,
    *,
    on_meta: bool,
) -> OrderedDict[str, Any]:
    """The state dict for the code of one module; with ``on_meta`` its tensors have no values."""
    code = targets.code
    rows = [row for row in rows if row.target is not None and row.target.startswith(prefix)]
    state: OrderedDict[str, Any] = OrderedDict()
    for row in rows:
        is_known = row.writes or row.action == "mismatch" or row.dtype == "object" or row.key in targets.tensors
        is_known = is_known and (row.writes or row.key not in targets.unlisted)
        if is_known and row.key not in code.brought and row.key not in code.own:
            state[row.key] = _value(row, reader, targets, on_meta=on_meta)
    for name in code.own:
        if name.startswith(prefix):
            state[name] = _own_value(targets.tensors[name], on_meta=on_meta)
    for name, source in code.passed.items():
        if name.startswith(prefix):
            state[name] = _read(reader, source, on_meta=on_meta)
    metadata = _metadata_below(prefix, module, rows, reader.versions, code)
    if metadata:
        state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]  # as torch.nn.Module.state_dict does
    return state


def _value(row: PlanRow, reader: Checkpoint, targets: ModelTargets, *, on_meta: bool) -> Any:
    """The planned value of an entry, a tensor with its own memory; a kept entry is returned unchanged."""
    if row.writes or row.action == "mismatch":
        if not row.steps:
            return _read(reader, row.sources[0], on_meta=on_meta)
    elif row.dtype == "object":
        return targets.extra_state[row.key].get_extra_state()
    if row.key in targets.tensors:
        value = _own_value(targets.tensors[row.key], on_meta=on_meta)
    else:
        value = torch.empty(row.shape, dtype=getattr(torch, row.dtype), device="meta" if on_meta else "cpu")
    if row.writes and not on_meta:
        put(row, [reader.read(source) for source in row.sources], value)
    return value


def _own_value(tensor: torch.Tensor, *, on_meta: bool) -> torch.Tensor:
    if on_meta:
        return torch.empty_like(tensor, device="meta", requires_grad=False)
    if tensor.is_meta:
        return torch.zeros_like(tensor, device="cpu", requires_grad=False)
    return tensor.detach().clone()


def _read(reader: Checkpoint, key: str, *, on_meta: bool = False) -> Any:
    """A tensor of the file, or extra state as saved: some modules keep theirs in a tensor."""
    if key in reader.extra_state:
        return reader.materialize(reader.extra_state[key])
    if on_meta:
        info = reader.tensors()[key]
        return torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
    return reader.read(key)


def put(row: PlanRow, sources: list[torch.Tensor], target: torch.Tensor) -> None:
    """Carry out the steps of a row; after a pad without value, the target keeps its own elements there."""
    steps: list[Step] = list(row.steps)
    while steps and steps[-1].keeps_model:
        steps.pop()
    value = carry_out(steps, sources)[row.part]
    for dim, size in enumerate(value.shape):
        if size != target.shape[dim]:
            target = target.narrow(dim, 0, size)
    target.copy_(value)


def _metadata_below(
    prefix: str, module: torch.nn.Module, rows: Sequence[PlanRow], versions: Versions, code: LoadingCode
) -> dict[str, dict[str, Any]]:
    """The ``_metadata`` for the state dict of one module: its path -> such as ``{"version": 2}``.

    Loading code translates entries of an older version, which it recognizes by this. With surgery on names, the version
    in the file follows the entries of a module: they are in the form of the module that saved them.

    A module whose entries all come from one module of the file gets the version of that one. A module without loaded
    entries has its own version, because it keeps its own entries. If the code gets entries that only it knows, a module
    that keeps nothing has the version that the file records. If the file records no version, none is passed, as in
    torch.
    """
    found = {}
    named = [row for row in rows if row.key not in code.brought]
    keeping = {row.key.rpartition(".")[0] for row in named if not row.writes}
    outer = next((source[: -len(name)] for name, source in code.passed.items() if source.endswith(name)), "")
    for path, below, sources in modules_of_sources(prefix, module, named):
        full = f"{prefix}{path}".removesuffix(".")
        recorded = [versions[source] for source in sources if source in versions]
        if not sources and code.passed and full not in keeping:
            recorded = [versions[one] for one in [f"{outer}{full}".removesuffix(".")] if one in versions]
        elif not sources:
            found[full] = {"version": getattr(below, "_version", None)}
        if recorded and all(other == recorded[0] for other in recorded):
            found[full] = dict(recorded[0])
    return found


def modules_of_sources(
    prefix: str, module: torch.nn.Module, rows: Iterable[PlanRow]
) -> Iterator[tuple[str, torch.nn.Module, tuple[str, ...]]]:
    """Each module from ``module`` at ``prefix`` down: its path, and the modules of the file for its entries."""
    modules = dict(module.named_modules(remove_duplicate=False))
    same: defaultdict[str, dict[str, None]] = defaultdict(dict)
    renamed: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        segments = row.key.removeprefix(prefix).split(".") if row.writes and row.key.startswith(prefix) else []
        for above in range(len(segments)):
            path, below = ".".join(segments[:above]), segments[above:]
            for source in row.sources if path in modules else ():
                names = source.split(".")
                outer, inner = names[: -len(below)], names[-len(below) :]
                if len(inner) == len(below):
                    chosen = same if inner == below else renamed
                    chosen[path][".".join(outer)] = None
    for path, inside in modules.items():
        # an entry whose name in the module is unchanged identifies its module in the file better than a renamed one
        yield path, inside, tuple(same[path] or renamed[path])


# What it cannot do.


def loaded_by_code(rows: Iterable[PlanRow], targets: ModelTargets) -> dict[Identity, dict[str, torch.nn.Module]]:
    """The tensors that loading code of modules writes: for each, its names there and the module of each name."""
    found: dict[Identity, dict[str, torch.nn.Module]] = {}
    for row in rows if targets.code.of_users else ():
        if row.writes and row.key in targets.tensors:
            for prefix, module in targets.code.of_users.items():
                if row.key.startswith(prefix):
                    found.setdefault(targets.spec(row.key).identity, {})[row.key] = module
    return found


def tied_loading_code(plan: LoadPlan, targets: Mapping[str, ModelTargets]) -> Iterator[str]:
    """Problems for tensors that the loading code of two classes of modules writes: the last one would win.

    Two modules of one class write the same value, which is not a problem.
    """
    first: dict[Identity, tuple[str, type]] = {}
    for model, found in targets.items():
        for identity, names in loaded_by_code(plan.rows_of(model), found).items():
            for name, module in names.items():
                other, kind = first.setdefault(identity, (f"{name} of {model}", type(module)))
                if kind is not type(module):
                    yield (
                        f"{other} and {name} of {model} are one tensor, and {kind.__name__} and "
                        f"{type(module).__name__} have loading code of their own for it. Next: untie it, or let one "
                        "module hold both"
                    )


def mixed_versions(rows: Sequence[PlanRow], versions: Versions, targets: ModelTargets) -> Iterator[str]:
    """Problems for modules that get entries of modules of the file with different versions.

    Their loading code receives one version only, and would translate some entries wrongly.
    """
    named = [row for row in rows if row.key not in targets.code.brought]
    for prefix, own in targets.code.of_users.items():
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
