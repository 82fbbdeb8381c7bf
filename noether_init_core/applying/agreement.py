"""Values that must agree or fit, where names, shapes and dtypes cannot tell. Reads; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from noether_init_core.applying.targets import Identity, ModelTargets, loaded_by_code
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.nested import equal
from noether_init_core.surgery.plan import LoadPlan, PlanRow
from noether_init_core.surgery.steps import Cast, Interpolate, Pad, carry_out


def check_across(plan: LoadPlan, readers: Mapping[str, Checkpoint]) -> None:
    """Tensors that submodels share must be the same in the files of all of them. Raises ``PlanError``."""
    problems = []
    for model, name, other_model, other in plan.equal_across:
        first, second = readers[model].read(name), readers[other_model].read(other)
        if not equal(first, second):
            problems.append(f"{name} of {model} and {other} of {other_model} differ in the files but are one tensor")
    if problems:
        raise plan.refusal(problems)


def check_loading_code(plan: LoadPlan, targets: Mapping[str, ModelTargets]) -> None:
    """A tensor must not be loaded by the code of modules of two classes: the last one would win.

    Raises ``PlanError``. Modules of one class do the same to it.
    """
    problems = []
    first: dict[Identity, tuple[str, type]] = {}
    for model, found in targets.items():
        for identity, names in loaded_by_code(plan.rows_of(model), found).items():
            for name, module in names.items():
                other, kind = first.setdefault(identity, (f"{name} of {model}", type(module)))
                if kind is not type(module):
                    problems.append(
                        f"{other} and {name} of {model} are one tensor, and {kind.__name__} and "
                        f"{type(module).__name__} have loading code of their own for it. Next: untie it, or let one "
                        "module hold both"
                    )
    if problems:
        raise plan.refusal(problems)


def check_casts(plan: LoadPlan, model: str, reader: Checkpoint) -> None:
    """Values that are converted must fit their dtype: no finite number becomes infinite, no integer another one.

    Raises ``PlanError``. Rounding of floating point numbers is what a cast is asked for.
    """
    problems = []
    for row in plan.rows_of(model):
        if row.action not in ("cast", "transform") or row.dtype == "object":
            continue
        dtypes = [*(step.dtype for step in row.steps if isinstance(step, Cast)), row.dtype]
        problems += _made_values(row, reader, dtypes)
        for source in row.sources:
            have = reader.tensors()[source].dtype
            for dtype in dict.fromkeys(dtypes):
                to: torch.dtype = getattr(torch, dtype)
                if _can_overflow(getattr(torch, have), to) and not all(
                    _fits(piece, to) for piece in reader.slices(source)
                ):
                    problems.append(f"{row.key}: values of {have} in {source} of the file do not fit {dtype}")
                    break
    if problems:
        raise plan.refusal(problems, model=model)


def _made_values(row: PlanRow, reader: Checkpoint, dtypes: list[str]) -> list[str]:
    """Values that steps make rather than move: fillings, and what lies between points of a grid."""
    problems = []
    have = [reader.tensors()[source].dtype for source in row.sources]
    for filling in (step.value for step in row.steps if isinstance(step, Pad) and step.value is not None):
        value = torch.tensor([filling], dtype=torch.float64)
        narrow = [dtype for dtype in (*have, *dtypes) if not _fits(value, getattr(torch, dtype))]
        if narrow:
            problems.append(f"{row.key}: the filling {filling:g} does not fit {narrow[0]}")
    if any(isinstance(step, Interpolate) for step in row.steps):
        sources = [reader.read(source) for source in row.sources]
        if all(bool(torch.isfinite(source.float()).all()) for source in sources):
            made = carry_out(row.steps, sources)[row.part].to(getattr(torch, row.dtype))
            if not bool(torch.isfinite(made.float()).all()):
                problems.append(f"{row.key}: interpolated values do not fit {row.dtype}")
    return problems


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
    if target.is_floating_point:
        back = _numbers(values.to(torch.float64).to(target)).astype(np.float64)
        if not np.isfinite(back).all() or not (np.abs(back) < 2.0**63).all():
            return False
        return bool((back.astype(np.int64) == numbers).all())
    if target == torch.bool:
        return bool(((numbers == 0) | (numbers == 1)).all())
    limits = torch.iinfo(target)
    if numbers.dtype.kind == "f":
        # the largest integer of 64 bits is no float: its rounded neighbour is out of range
        inside = (numbers >= float(limits.min)) & (numbers < float(limits.max) + 1)
        return bool((inside & (numbers == np.floor(numbers))).all())
    return limits.min <= int(numbers.min()) and int(numbers.max()) <= limits.max


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
