"""Weights: what must hold of values, modules and memory before a LoadPlan, and how it is carried out.

The checks read and change nothing; each gives problems in words, and a load with any of them is refused.
``apply_rows`` is the only place that writes weights.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import _IncompatibleKeys

from noether_init_core.applying.targets import (
    Identity,
    ModelTargets,
    left_without_memory,
    loaded_by_code,
    modules_of_sources,
    reset_method,
    translates,
)
from noether_init_core.errors import StateMismatchError
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.content import Versions
from noether_init_core.memory import in_large_pages
from noether_init_core.messages import listed
from noether_init_core.nested import equal
from noether_init_core.stopwatch import Stopwatch
from noether_init_core.surgery.plan import LoadPlan, PlanRow
from noether_init_core.surgery.steps import Cast, Interpolate, Pad, Step, carry_out


def differing_ties(plan: LoadPlan, readers: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Entries of files that end up in one tensor, and are not the same."""
    for model, name, other_model, other in plan.equal:
        if model == other_model:
            if not readers[model].is_same(name, other):
                yield f"{name} and {other} differ in the file but are one tensor in {model}"
        elif not equal(readers[model].read(name), readers[other_model].read(other)):
            yield f"{name} of {model} and {other} of {other_model} differ in the files but are one tensor"


def tied_loading_code(plan: LoadPlan, targets: Mapping[str, ModelTargets]) -> Iterator[str]:
    """Tensors that are loaded by the code of modules of two classes: the last one would win.

    Modules of one class do the same to it.
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
    """Modules that get entries of several modules of the file, of different versions.

    Their loading code can be told one version only, and would translate some of them wrongly.
    """
    for prefix, own in targets.own_loading.items():
        for path, module, sources in modules_of_sources(prefix, own, rows):
            said = {source: versions[source] for source in sources if source in versions}
            if all(other == next(iter(said.values())) for other in said.values()) or not translates(module):
                continue
            name = f"{prefix}{path}".removesuffix(".") or "the whole model"
            versions_said = listed(f"{source or 'its root'} {dict(version)}" for source, version in said.items())
            yield (
                f"{name} has loading code of its own, and gets entries of modules of the file that are of different "
                f"versions: {versions_said}. It cannot translate both. Next: keep its own values there (keep_model), "
                "or load the file into the model that saved it and save that anew"
            )


def lacking_memory(path: str, model: Any, rows: Sequence[PlanRow], targets: ModelTargets) -> Iterator[str]:
    """What stays on the meta device, since the file does not have it, or cannot be given memory."""
    next_step = "Next: module.to_empty(device='cpu')"
    without = left_without_memory(model, rows, targets)
    if without:
        yield (
            f"{path} is on the meta device, and {listed(without)} would stay there: the file does not have them, "
            f"or they are kept. {next_step}, then fill these, or build the module on the CPU"
        )
    held = [name for name, tensor in targets.tensors.items() if tensor.is_meta and weakref.getweakrefs(tensor)]
    if held:
        yield (
            f"{path} is on the meta device, and {held[0]} cannot be given memory: something holds a weak "
            f"reference to it. {next_step}"
        )


def nonfinite_values(rows: Sequence[PlanRow], reader: Checkpoint) -> list[str]:
    """Which entries that are loaded hold NaN or infinities; the latter in parameters only: buffers hold masks."""
    rows = [row for row in rows if row.writes and row.dtype != "object"]
    found = reader.nonfinite(list(dict.fromkeys(source for row in rows for source in row.sources)))
    said = {
        f"{source} holds {found[source]}": None
        for row in rows
        for source in row.sources
        if source in found and (found[source] == "NaN" or row.is_parameter)
    }
    return list(said)


def unfit_casts(rows: Sequence[PlanRow], reader: Checkpoint) -> Iterator[str]:
    """Values that do not fit the dtype they are converted to: a finite number becomes infinite, an integer another.

    Rounding of floating point numbers is what a cast is asked for.
    """
    for row in rows:
        if row.action not in ("cast", "transform") or row.dtype == "object":
            continue
        dtypes = [*(step.dtype for step in row.steps if isinstance(step, Cast)), row.dtype]
        yield from _made_values(row, reader, dtypes)
        for source in row.sources:
            have = reader.tensors()[source].dtype
            for dtype in dict.fromkeys(dtypes):
                to: torch.dtype = getattr(torch, dtype)
                if _can_overflow(getattr(torch, have), to) and not all(
                    _fits(piece, to) for piece in reader.slices(source)
                ):
                    yield f"{row.key}: values of {have} in {source} of the file do not fit {dtype}"
                    break


def _made_values(row: PlanRow, reader: Checkpoint, dtypes: list[str]) -> Iterator[str]:
    """Values that steps make rather than move: fillings, and what lies between points of a grid."""
    have = [reader.tensors()[source].dtype for source in row.sources]
    for filling in (step.value for step in row.steps if isinstance(step, Pad) and step.value is not None):
        value = torch.tensor([filling], dtype=torch.float64)
        narrow = [dtype for dtype in (*have, *dtypes) if not _fits(value, getattr(torch, dtype))]
        if narrow:
            yield f"{row.key}: the filling {filling:g} does not fit {narrow[0]}"
    if any(isinstance(step, Interpolate) for step in row.steps):
        sources = [reader.read(source) for source in row.sources]
        if all(bool(torch.isfinite(source.float()).all()) for source in sources):
            made = carry_out(row.steps, sources)[row.part].to(getattr(torch, row.dtype))
            if not bool(torch.isfinite(made.float()).all()):
                yield f"{row.key}: interpolated values do not fit {row.dtype}"


def _can_overflow(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether some value of ``source`` has no counterpart in ``target``; rounding of fractions does not count."""
    if source == target or source == torch.bool:
        return False
    if target == torch.bool or source.is_complex:
        return not (target.is_complex and target.itemsize >= source.itemsize)
    if target.is_complex:
        return _can_overflow(source, _part_of(target))
    if target.is_floating_point and source.is_floating_point:
        # formats without sign or zero are odd enough to be looked at always
        return torch.finfo(source).max > torch.finfo(target).max or torch.finfo(target).min >= 0
    if source.is_floating_point or target.is_floating_point:
        return True
    have, can = torch.iinfo(source), torch.iinfo(target)
    return have.max > can.max or have.min < can.min


def _part_of(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex32: torch.float16, torch.complex64: torch.float32}.get(dtype, torch.float64)


def _fits(values: torch.Tensor, target: torch.dtype) -> bool:
    if values.numel() == 0:
        return True
    if values.is_complex():
        return all(_fits(part, _part_of(target)) for part in (values.real, values.imag))
    if target.is_complex:
        target = _part_of(target)
    if values.is_floating_point() and target.is_floating_point:
        return _floats_fit(values, target)
    # NumPy compares integers of all widths and signs; torch does not
    numbers = _numbers(values)
    if target == torch.bool:
        return bool(((numbers == 0) | (numbers == 1)).all())
    if target.is_floating_point:
        back = _numbers(values.to(torch.float64).to(target)).astype(np.float64)
        return bool((np.abs(back) < 2.0**63).all()) and bool((back.astype(np.int64) == numbers).all())
    # Python compares integers with floats exactly; NaN is in no range
    limits, low, high = torch.iinfo(target), numbers.min().item(), numbers.max().item()
    return bool(limits.min <= low <= high <= limits.max and (numbers == np.floor(numbers)).all())


def _floats_fit(values: torch.Tensor, target: torch.dtype) -> bool:
    numbers = _numbers(values)
    finite = numbers[np.isfinite(numbers)]
    limits = torch.finfo(target)
    if limits.min >= 0 and bool((finite < limits.tiny).any()):
        return False  # neither sign nor zero
    converted = _numbers(values.to(target))
    if not bool((np.isfinite(converted) == np.isfinite(numbers)).all()):
        return False
    # some formats saturate instead of becoming infinite
    return finite.size == 0 or bool((np.abs(finite) <= limits.max * (1 + limits.eps / 2)).all())


def _numbers(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same numbers as NumPy has them; narrow floats are widened, which is exact."""
    if values.is_floating_point() and values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    return values.contiguous().numpy()


class _FreshMemory:
    """New tensors that take the place of ones on the meta device, once they are filled.

    The objects of parameters stay the same, so ties, optimizers and ``requires_grad`` stay as they are.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        self._device = device
        self._meta = {id(tensor): tensor for tensor in tensors if tensor.is_meta}
        self._new: dict[int, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is to be filled: the tensor itself where it has memory, else the one that will take its place."""
        if id(tensor) not in self._meta:
            return tensor
        if id(tensor) not in self._new:
            self._new[id(tensor)] = in_large_pages(torch.empty_like(tensor, device=self._device, requires_grad=False))
        return self._new[id(tensor)]

    def can_be_mapped(self, tensor: torch.Tensor, dtype: str) -> bool:
        """Whether memory of the file can take the place of ``tensor``."""
        is_ours = id(tensor) in self._meta and self._device.type == "cpu" and tensor.is_contiguous()
        return is_ours and tensor.dtype is getattr(torch, dtype, None)

    def put(self, tensor: torch.Tensor, new: torch.Tensor) -> None:
        """Let ``new`` take the place of ``tensor``."""
        self._new[id(tensor)] = new

    def hand_over(self, tensors: Iterable[torch.Tensor] | None = None) -> None:
        """Give the tensors (all that were asked for) their memory."""
        chosen = list(self._new) if tensors is None else [id(tensor) for tensor in tensors if id(tensor) in self._meta]
        for key in chosen:
            old = self._meta.pop(key)
            new = self._new.pop(key, None)
            if new is None:
                new = torch.empty_like(old, device=self._device, requires_grad=False)
            if isinstance(old, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def apply_rows(
    rows: Iterable[PlanRow],
    reader: Checkpoint,
    targets: ModelTargets,
    *,
    by_code: Set[Identity],
    device: torch.device,
    may_map: bool,
    stopwatch: Stopwatch,
) -> list[str]:
    """Write every tensor that ``rows`` (of one model) load, in place; parameters keep their identity.

    Tensors on the meta device get memory on ``device``; with ``may_map`` that may be the file, mapped.

    Each tensor is written once, also when it has several names. Modules of rows that reset are initialized anew first,
    by their own ``reset_parameters``. Modules with loading code of their own get it run, with everything below them, on
    tensors in memory, with the versions that the file says of them; hooks that follow a load are called. What such code
    loads has its value from there, under every name: ``by_code`` are the tensors that modules of all models load so.

    The plan must be free of problems and the reader verified; nothing is decided here. ``stopwatch`` gets the time of
    what is copied in memory; that of reading the reader counts itself. Returns the names that were written.
    """
    rows = tuple(rows)
    fresh = _FreshMemory(targets.tensors.values(), device)
    _reset(rows, targets, fresh)
    for prefix, module in targets.own_loading.items():
        fresh.hand_over(tensor for name, tensor in targets.tensors.items() if name.startswith(prefix))
        with stopwatch.phase("copy"):
            _load_itself(prefix, module, rows, reader, targets)
    written = {row.key: row for row in rows if row.writes}
    prefixes = tuple(targets.own_loading)
    seen = set(by_code)
    plain: list[tuple[PlanRow, torch.Tensor]] = []
    made: dict[tuple[tuple[str, ...], tuple[Step, ...]], list[tuple[PlanRow, torch.Tensor]]] = {}
    for key, row in written.items():
        if key.startswith(prefixes):
            continue
        if row.dtype == "object":
            targets.extra_state[key].set_extra_state(_extra_state(reader, row.sources[0]))
            continue
        tensor = targets.tensors[key]
        # the value in the file may be in the form of an earlier version, which the module of ``by_code`` has translated
        if targets.specs[key].identity in seen:
            continue
        seen.add(targets.specs[key].identity)
        if row.steps:
            made.setdefault((row.sources, row.steps), []).append((row, tensor))
        else:
            plain.append((row, tensor))
    with torch.no_grad():
        _copy_plain(plain, reader, fresh, may_map)
        if made:
            with stopwatch.phase("copy", sum(row.nbytes for together in made.values() for row, _tensor in together)):
                for (sources, _steps), together in made.items():
                    tensors = [reader.read(source) for source in sources]
                    for row, tensor in together:
                        _put(row, tensors, fresh.of(tensor))
    fresh.hand_over()
    for module in targets.after_loading:
        for hook in tuple(module._load_state_dict_post_hooks.values()):
            hook(module, _IncompatibleKeys([], []))
    return list(written)


def _copy_plain(
    plain: Sequence[tuple[PlanRow, torch.Tensor]], reader: Checkpoint, fresh: _FreshMemory, may_map: bool
) -> None:
    """Entries that are taken as they are, but for their dtype: mapped where that may be, else read into place."""
    mappable = {
        row.sources[0]: tensor
        for row, tensor in plain
        if may_map and row.source_dtype and fresh.can_be_mapped(tensor, row.source_dtype)
    }
    mapped = reader.mapped(mappable) if mappable else {}
    for source, new in mapped.items():
        fresh.put(mappable[source], new)
    reader.copy_into(
        [
            (row.sources[0], None, fresh.of(tensor))
            for row, tensor in plain
            if row.sources[0] not in mapped or mappable[row.sources[0]] is not tensor
        ]
    )


def _put(row: PlanRow, sources: list[torch.Tensor], target: torch.Tensor) -> None:
    """Carry out the steps of a row; behind a pad without value the target keeps what it has."""
    steps = list(row.steps)
    while steps and steps[-1].keeps_model:
        steps.pop()
    value = carry_out(steps, sources)[row.part]
    for dim, size in enumerate(value.shape):
        if size != target.shape[dim]:
            target = target.narrow(dim, 0, size)
    target.copy_(value)


def _reset(rows: Sequence[PlanRow], targets: ModelTargets, fresh: _FreshMemory) -> None:
    """Let the modules of rows that reset initialize themselves; what else they hold, and is kept, stays as it was.

    Raises ``StateMismatchError`` for a tensor that ``reset_parameters`` leaves without values, having had no memory.
    """
    names = [row.key for row in rows if row.action == "reset"]
    kept = {id(targets.tensors[row.key]) for row in rows if row.action == "keep" and row.key in targets.tensors}
    for module in {id(targets.resettable[name]): targets.resettable[name] for name in names}.values():
        below = [*module.parameters(), *module.buffers()]
        without = {id(tensor) for tensor in below if tensor.is_meta}
        fresh.hand_over(below)
        with torch.no_grad():
            for tensor in below:
                if id(tensor) in without and (tensor.is_floating_point() or tensor.is_complex()):
                    tensor.fill_(float("nan"))
        reset = reset_method(module)
        with _unchanged(one for one in below if id(one) in kept - without):
            if reset is not None:
                reset()
    empty = [name for name in names if bool(torch.isnan(targets.tensors[name].detach()).any())]
    if empty:
        raise StateMismatchError(
            f"on_missing: reset: reset_parameters gives {listed(empty)} no values, or NaN. "
            "Next: fill them in reset_parameters, or build the module with values and on_missing: keep",
            problems=empty,
        )


def _load_itself(
    prefix: str, module: torch.nn.Module, rows: Iterable[PlanRow], reader: Checkpoint, targets: ModelTargets
) -> None:
    """Let a module load what is planned for it. What is kept stays, also where its code translates what it is given."""
    rows = [row for row in rows if row.target is not None and row.target.startswith(prefix)]
    state = OrderedDict((row.key.removeprefix(prefix), _value(row, reader, targets)) for row in rows)
    metadata = _metadata_below(prefix, module, rows, reader.versions)
    if metadata:
        state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]  # as torch.nn.Module.state_dict does
    kept = (targets.tensors[row.key] for row in rows if row.action in ("keep", "reset") and row.dtype != "object")
    with _unchanged(kept):
        module.load_state_dict(state)


@contextmanager
def _unchanged(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Give the tensors the values again that they had before the block."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)


def _value(row: PlanRow, reader: Checkpoint, targets: ModelTargets) -> Any:
    """The planned value of an entry, a tensor in memory of its own; what is kept is as it is."""
    if row.dtype == "object" and not row.writes:
        return targets.extra_state[row.key].get_extra_state()
    if row.writes and not row.steps:
        return _extra_state(reader, row.sources[0])
    value = targets.tensors[row.key].detach().clone()
    if row.writes:
        _put(row, [reader.read(source) for source in row.sources], value)
    return value


def _extra_state(reader: Checkpoint, key: str) -> Any:
    """Extra state as it was saved, or a tensor; some modules keep their extra state in one."""
    return reader.materialize(reader.extra_state[key]) if key in reader.extra_state else reader.read(key)


def _metadata_below(
    prefix: str, module: torch.nn.Module, rows: Iterable[PlanRow], versions: Versions
) -> dict[str, dict[str, Any]]:
    """The ``_metadata`` for the state dict of one module: path from that module on -> such as ``{"version": 2}``.

    A module with loading code of its own translates what an older version of it has saved, and tells it by this. With
    surgery on names, what the file says of a module follows the module's entries: they are in the form of the module
    that saved them, wherever they go.

    A module whose entries all come from one module of the file has what the file says of that one. One of which nothing
    is loaded has its own version, since its entries are those that it has. Where the file says nothing of a module,
    nothing is said, as in torch.
    """
    found = {}
    for path, below, sources in modules_of_sources(prefix, module, rows):
        said = [versions[source] for source in sources if source in versions]
        if not sources:
            found[path] = {"version": getattr(below, "_version", None)}
        elif said and all(other == said[0] for other in said):
            found[path] = dict(said[0])
    return found
