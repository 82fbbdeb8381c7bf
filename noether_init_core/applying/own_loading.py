"""How loading code of modules runs: what it is given, and what the plan keeps from it."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from noether_init_core.applying.loading_code import LoadingCode, overrides_load
from noether_init_core.applying.places import Identity
from noether_init_core.applying.rehearsal import at_prefix
from noether_init_core.applying.targets import ModelTargets
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.content import Versions
from noether_init_core.surgery.plan import PlanRow
from noether_init_core.surgery.steps import Step, carry_out


def kept_names(prefix: str, rows: Iterable[PlanRow], targets: ModelTargets) -> dict[str, bool]:
    """Names that the plan leaves as they are, and that are not given -> whether a rule of the user keeps them."""
    return {
        row.key: not str(row.rule).startswith("on_missing:")
        for row in rows
        if row.target is not None
        and row.key.startswith(prefix)
        and row.action in ("keep", "reset")
        and row.key not in targets.code.brought
        and row.key not in targets.code.fed
        and row.key not in targets.unlisted
    }


def load_strictly(module: torch.nn.Module, state: dict[str, Any]) -> Any:
    """Load; the code refuses missing and unexpected keys, as far as it does."""
    return module.load_state_dict(state)


def load_leniently(module: torch.nn.Module, state: dict[str, Any]) -> Any:
    """Load with ``strict=False`` where the code has that argument, since it then reports all keys."""
    if overrides_load(module) and "strict" not in inspect.signature(module.load_state_dict).parameters:
        return module.load_state_dict(state)
    return module.load_state_dict(state, strict=False)


def load_by_code(
    prefix: str, module: torch.nn.Module, rows: Sequence[PlanRow], reader: Checkpoint, targets: ModelTargets
) -> None:
    """Let a module load its planned entries, as torch does. What a rule keeps has its values afterwards."""
    state = state_for(prefix, module, rows, reader, targets, on_meta=False)
    kept = kept_names(prefix, rows, targets)
    names = {*kept, *(name for name in targets.code.own if name.startswith(prefix))}
    with unchanged(targets.tensors[name] for name in names if name in targets.tensors):
        (load_leniently if kept else load_strictly)(at_prefix(prefix, module), state)


@contextmanager
def unchanged(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Restore the values of the tensors at the end of the block."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)


def state_for(
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
    rows = [code.fed.get(row.key, row) for row in rows if row.target is not None and row.target.startswith(prefix)]
    found: dict[str, tuple[str, Any]] = {}
    for row in rows:
        is_given = row.writes or row.action == "mismatch"
        if is_given and row.key not in code.brought and row.key not in code.own:
            found[row.key] = row.sources[0], _value(row, reader, targets, on_meta=on_meta)
    for name, source in code.passed.items():
        if name.startswith(prefix):
            found[name] = source, _read(reader, source, on_meta=on_meta)
    # in the order of the file, which code may rely on
    order = {source: number for number, source in enumerate((*reader.tensors(), *reader.extra_state))}
    ordered = sorted(found.items(), key=lambda one: order.get(one[1][0], len(order)))
    state = OrderedDict[str, Any]((name, value) for name, (_source, value) in ordered)
    for name in code.own:
        if name.startswith(prefix):
            state[name] = _own_value(targets.tensors[name], on_meta=on_meta)
    metadata = _metadata_below(prefix, module, rows, reader.versions, code)
    if metadata:
        state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]  # as torch.nn.Module.state_dict does
    return state


def _value(row: PlanRow, reader: Checkpoint, targets: ModelTargets, *, on_meta: bool) -> Any:
    """The planned value of an entry, a tensor with its own memory."""
    if not row.steps:
        return _read(reader, row.sources[0], on_meta=on_meta)
    if row.key in targets.tensors:
        value = _own_value(targets.tensors[row.key], on_meta=on_meta)
    else:
        value = torch.empty(row.shape, dtype=getattr(torch, row.dtype), device="meta" if on_meta else "cpu")
    if not on_meta:
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


def loaded_by_code(rows: Iterable[PlanRow], targets: ModelTargets) -> dict[Identity, dict[str, torch.nn.Module]]:
    """The tensors that loading code of modules writes: for each, its names there and the module of each name."""
    found: dict[Identity, dict[str, torch.nn.Module]] = {}
    for row in rows if targets.code.runs else ():
        if row.writes and row.key in targets.tensors and row.key.startswith(tuple(targets.code.runs)):
            found.setdefault(targets.spec(row.key).identity, {})[row.key] = targets.code.of_key(row.key)
    return found
