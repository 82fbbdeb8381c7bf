"""What could not be known from names, shapes and dtypes: values that must agree or fit, modules, memory. Reads only.

Each function returns problems in words; a load with any of them is refused before anything is changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from noether_init_core.applying.targets import (
    Identity,
    ModelTargets,
    left_without_memory,
    loaded_by_code,
    modules_of_sources,
    on_meta,
    translates,
)
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.content import Versions
from noether_init_core.messages import listed
from noether_init_core.nested import equal
from noether_init_core.surgery.plan import LoadPlan, PlanRow
from noether_init_core.surgery.steps import Cast, Interpolate, Pad, carry_out


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


def lacking_memory(model: Any, rows: Sequence[PlanRow], targets: ModelTargets) -> Iterator[str]:
    """What stays on the meta device, since the file does not have it, or cannot be given memory."""
    next_step = "Next: module.to_empty(device='cpu')"
    without = left_without_memory(model, rows, targets)
    if without:
        yield (
            f"{model.name} is on the meta device, and {listed(without)} would stay there: the file does not have them, "
            f"or they are kept. {next_step}, then fill these, or build the module on the CPU"
        )
    held = [name for name, tensor in on_meta(targets).items() if weakref.getweakrefs(tensor)]
    if held:
        yield (
            f"{model.name} is on the meta device, and {held[0]} cannot be given memory: something holds a weak "
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
