"""Weights: checks of values, modules and memory before a plan, and the writing of its rows.

The checks read and change nothing. Each yields problems in words, and a load with a problem is refused. ``apply_rows``
is the only function that writes weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

from noether_init_core.applying.own_loading import load_by_code, put, unchanged
from noether_init_core.applying.places import Identity
from noether_init_core.applying.rehearsal import copy_with_values, undisturbed
from noether_init_core.applying.targets import (
    Fill,
    ModelTargets,
    fills_of,
    left_without_memory,
    reset_method,
    reset_one,
)
from noether_init_core.errors import StateMismatchError, text_of
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.memory import in_large_pages
from noether_init_core.messages import listed
from noether_init_core.nested import equal
from noether_init_core.stopwatch import Stopwatch
from noether_init_core.surgery.plan import LoadPlan, PlanRow
from noether_init_core.surgery.steps import Cast, Interpolate, Pad, Step, carry_out


def differing_ties(plan: LoadPlan, readers: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Problems for entries of files that are loaded into one tensor, and differ."""
    for model, name, other_model, other in plan.equal:
        if model == other_model:
            if not readers[model].is_same(name, other):
                yield f"{name} and {other} differ in the file but are one tensor in {model}"
        elif not equal(readers[model].read(name), readers[other_model].read(other)):
            yield f"{name} of {model} and {other} of {other_model} differ in the files but are one tensor"


def lacking_memory(
    path: str, model: Any, rows: Sequence[PlanRow], targets: ModelTargets, *, resets: bool
) -> Iterator[str]:
    """Problems for tensors that stay on the meta device: they are not in the file, or cannot get memory.

    With ``resets``, code of the model fills non-persistent buffers; it is tried on a copy of their module.
    """
    next_step = "Next: module.to_empty(device='cpu')"
    without = left_without_memory(model, rows, targets)
    hidden = [name for name in without if name in targets.hidden]
    fills = fills_of(model, hidden) if resets else {}
    for module, (fill, names) in _by_module(fills).items():
        try:
            with undisturbed():
                empty = _filled(copy_with_values(module), fill, names, torch.device("cpu"))
        except Exception as error:
            yield f"on_missing: reset: {listed(names)} cannot be filled: {type(error).__name__}: {text_of(error)}"
            continue
        if empty:
            yield f"on_missing: reset: {listed(empty)} would get no values from {_name_of(fill)}"
    without = [name for name in without if name not in fills]
    if hidden and len(fills) < len(hidden):
        next_step = (
            "Next: on_missing: reset, with reset_parameters in their modules, _init_weights in the model, or "
            "bind(module, ..., reset=function); or module.to_empty(device='cpu')"
        )
    if without:
        yield (
            f"{path} is on the meta device, and {listed(without)} would stay there: not found in the file, "
            f"or kept. {next_step}, then fill these, or build the module on the CPU"
        )
    held = [name for name, tensor in targets.tensors.items() if tensor.is_meta and weakref.getweakrefs(tensor)]
    if held:
        yield (
            f"{path} is on the meta device, and {held[0]} cannot get memory: an object holds a weak "
            f"reference to it. {next_step}"
        )


def _by_module(
    fills: Mapping[str, tuple[torch.nn.Module, Fill]],
) -> dict[torch.nn.Module, tuple[Fill, list[str]]]:
    found: dict[torch.nn.Module, tuple[Fill, list[str]]] = {}
    for name, (module, fill) in fills.items():
        found.setdefault(module, (fill, []))[1].append(name)
    return found


def _filled(module: torch.nn.Module, fill: Fill, names: Sequence[str], device: torch.device) -> list[str]:
    """Let code fill buffers of a module that has memory; returns the names that it leaves without values."""
    leaves = {name: name.rpartition(".")[2] for name in names}
    before = {}
    with torch.no_grad():
        for name, leaf in leaves.items():
            buffer = module._buffers[leaf]
            assert buffer is not None
            if buffer.is_floating_point() or buffer.is_complex():
                buffer.fill_(float("nan"))
            before[name] = buffer, buffer._version
        with device:
            fill(module)
    empty = []
    for name, leaf in leaves.items():
        buffer = module._buffers[leaf]
        is_same = buffer is before[name][0] and buffer._version == before[name][1]
        if buffer is None or is_same or bool(torch.isnan(buffer).any()):
            empty.append(name)
    return empty


def _name_of(fill: Fill) -> str:
    return "reset_parameters" if fill is reset_one else getattr(fill, "__qualname__", repr(fill))


def fill_hidden(model: Any, rows: Sequence[PlanRow], targets: ModelTargets, device: torch.device) -> None:
    """Give memory and initial values to non-persistent buffers on the meta device, by code of the model.

    Tensors of their modules that the plan keeps keep their values. Raises ``StateMismatchError`` if the code leaves a
    buffer without values.
    """
    hidden = [name for name in left_without_memory(model, rows, targets) if name in targets.hidden]
    for module, (fill, names) in _by_module(fills_of(model, hidden)).items():
        below = [*module.parameters(), *module.buffers()]
        kept = [tensor for tensor in below if not tensor.is_meta]
        _FreshMemory(below, device).hand_over(below)
        with unchanged(kept):
            empty = _filled(module, fill, names, device)
        if empty:
            raise StateMismatchError(f"on_missing: reset: {listed(empty)} got no values", problems=empty)


def nonfinite_values(rows: Sequence[PlanRow], reader: Checkpoint) -> list[str]:
    """Problems for loaded entries with NaN, and for parameters with infinities, which buffers may hold as masks."""
    rows = [row for row in rows if row.writes and row.dtype != "object"]
    found = reader.nonfinite(list(dict.fromkeys(source for row in rows for source in row.sources)))
    problems = {
        f"{source} holds {found[source]}": None
        for row in rows
        for source in row.sources
        if source in found and (found[source] == "NaN" or row.is_parameter)
    }
    return list(problems)


def unfit_casts(rows: Sequence[PlanRow], reader: Checkpoint) -> Iterator[str]:
    """Problems for values that do not fit their new dtype: a finite number becomes infinite, or an integer changes.

    A cast may round floating-point numbers.
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
    """Problems for values that steps compute: the value of a pad, and interpolated values."""
    have = [reader.tensors()[source].dtype for source in row.sources]
    for filling in (step.value for step in row.steps if isinstance(step, Pad) and step.value is not None):
        value = torch.tensor([filling], dtype=torch.float64, device="cpu")
        narrow = [dtype for dtype in (*have, *dtypes) if not _fits(value, getattr(torch, dtype))]
        if narrow:
            yield f"{row.key}: the pad value {filling:g} does not fit {narrow[0]}"
    if any(isinstance(step, Interpolate) for step in row.steps):
        sources = [reader.read(source) for source in row.sources]
        if all(bool(torch.isfinite(source.float()).all()) for source in sources):
            made = carry_out(row.steps, sources)[row.part].to(getattr(torch, row.dtype))
            if not bool(torch.isfinite(made.float()).all()):
                yield f"{row.key}: interpolated values do not fit {row.dtype}"


def _can_overflow(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether some value of ``source`` is out of the range of ``target``; rounding does not count."""
    if source == target or source == torch.bool:
        return False
    if target == torch.bool or source.is_complex:
        return not (target.is_complex and target.itemsize >= source.itemsize)
    if target.is_complex:
        return _can_overflow(source, _part_of(target))
    if target.is_floating_point and source.is_floating_point:
        # formats without sign or zero, such as float8_e8m0fnu: always compare values
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
    # NumPy compares integers of all widths and signs exactly; torch does not
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
    # some float8 formats saturate instead of becoming infinite, so compare with the limit
    return finite.size == 0 or bool((np.abs(finite) <= limits.max * (1 + limits.eps / 2)).all())


def _numbers(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same numbers as a NumPy array; narrow floats are widened, which is exact."""
    if values.is_floating_point() and values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    return values.contiguous().numpy()


class _FreshMemory:
    """New tensors that replace those on the meta device once they are filled.

    The parameter objects stay the same, so that ties, optimizers and ``requires_grad`` stay.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        self._device = device
        self._meta = {id(tensor): tensor for tensor in tensors if tensor.is_meta}
        self._new: dict[int, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor to fill: ``tensor`` itself if it has memory, else its replacement."""
        if id(tensor) not in self._meta:
            return tensor
        if id(tensor) not in self._new:
            self._new[id(tensor)] = in_large_pages(torch.empty_like(tensor, device=self._device, requires_grad=False))
        return self._new[id(tensor)]

    def can_be_mapped(self, tensor: torch.Tensor, dtype: str) -> bool:
        """Whether mapped memory of the file can replace ``tensor``."""
        is_ours = id(tensor) in self._meta and self._device.type == "cpu" and tensor.is_contiguous()
        return is_ours and tensor.dtype is getattr(torch, dtype, None)

    def put(self, tensor: torch.Tensor, new: torch.Tensor) -> None:
        """Register ``new`` as the replacement of ``tensor``."""
        self._new[id(tensor)] = new

    def hand_over(self, tensors: Iterable[torch.Tensor] | None = None) -> None:
        """Give ``tensors`` their memory; by default all tensors with a replacement."""
        chosen = list(self._new) if tensors is None else [id(tensor) for tensor in tensors if id(tensor) in self._meta]
        for key in dict.fromkeys(chosen):  # a tied tensor is listed under each of its names
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
    written: list[str],
) -> None:
    """Write every tensor that ``rows`` (of one model) load, in place; parameters keep their identity.

    Tensors on the meta device get memory on ``device``; with ``may_map`` the memory may be the mapped file.

    A tensor with several names is written once. Modules with rows that reset run ``reset_parameters`` first. A model
    with loading code of its own is loaded by its ``load_state_dict``, from tensors in memory, with the versions
    recorded in the file. ``by_code`` are the tensors that such code loads in any of the models: they get their value
    there, under every name.

    The plan must have no problems and the reader must be verified; this function decides nothing. ``stopwatch`` gets
    the time of copies in memory; the reader counts its own. ``written`` gets the names as they are written, so that an
    error can say how many were. Not thread-safe.
    """
    rows = tuple(rows)
    fresh = _FreshMemory(targets.tensors.values(), device)
    _reset(rows, targets, fresh)
    for prefix, module in targets.code.runs.items():
        fresh.hand_over(tensor for name, tensor in targets.tensors.items() if name.startswith(prefix))
        with stopwatch.phase("copy"):
            load_by_code(prefix, module, rows, reader, targets)
        written += [row.key for row in rows if row.writes and row.key.startswith(prefix)]
    prefixes = tuple(targets.code.runs)
    seen = set(by_code)
    plain: list[tuple[PlanRow, torch.Tensor]] = []
    made: dict[tuple[tuple[str, ...], tuple[Step, ...]], list[tuple[PlanRow, torch.Tensor]]] = {}
    shared: list[str] = []
    for key, row in {row.key: row for row in rows if row.writes and not row.key.startswith(prefixes)}.items():
        tensor = targets.tensors[key]
        # the file may hold the form of an earlier version, which the module of ``by_code`` has translated
        identity = targets.spec(key).identity
        if identity in seen:
            shared.append(key)
            continue
        seen.add(identity)
        if row.steps:
            made.setdefault((row.sources, row.steps), []).append((row, tensor))
        else:
            plain.append((row, tensor))
    with torch.no_grad():
        _copy_plain(plain, reader, fresh, may_map)
        written += [row.key for row, _tensor in plain]
        if made:
            with stopwatch.phase("copy", sum(row.nbytes for together in made.values() for row, _tensor in together)):
                for (sources, _steps), together in made.items():
                    tensors = [reader.read(source) for source in sources]
                    for row, tensor in together:
                        put(row, tensors, fresh.of(tensor))
                        written.append(row.key)
    written += shared
    fresh.hand_over()


def _copy_plain(
    plain: Sequence[tuple[PlanRow, torch.Tensor]], reader: Checkpoint, fresh: _FreshMemory, may_map: bool
) -> None:
    """Load entries without steps, apart from a cast: mapped where allowed, else read into place."""
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


def _reset(rows: Sequence[PlanRow], targets: ModelTargets, fresh: _FreshMemory) -> None:
    """Call ``reset_parameters`` of modules with rows that reset; their other tensors keep their values.

    Raises ``StateMismatchError`` for a tensor without memory that ``reset_parameters`` does not fill.
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
        with unchanged(one for one in below if id(one) in kept - without):
            if reset is not None:
                reset()
    empty = [name for name in names if bool(torch.isnan(targets.tensors[name].detach()).any())]
    if empty:
        raise StateMismatchError(
            f"on_missing: reset: reset_parameters leaves {listed(empty)} without values, or with NaN. "
            "Next: fill them in reset_parameters, or build the module with values and on_missing: keep",
            problems=empty,
        )
