"""Values that must agree or fit, where names, shapes and dtypes cannot tell. Reads; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from noether_init_core.errors import PlanError
from noether_init_core.surgery.plan import LoadPlan, TensorSpec
from noether_init_core.surgery.steps import Cast

__all__ = ["check_across", "check_casts"]


class TensorReader(Protocol):
    """What is needed of a reader of checkpoints."""

    def read(self, key: str) -> torch.Tensor: ...
    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...
    def pieces(self, key: str) -> Iterator[torch.Tensor]: ...


def check_across(plan: LoadPlan, readers: Mapping[str, TensorReader]) -> None:
    """Tensors that submodels share must be the same in the files of all of them. Raises ``PlanError``."""
    problems = []
    for model, name, other_model, other in plan.equal_across:
        first, second = readers[model].read(name), readers[other_model].read(other)
        if first.dtype != second.dtype or first.shape != second.shape or not _same_bits(first, second):
            problems.append(f"{name} of {model} and {other} of {other_model} differ in the files but are one tensor")
    _raise(plan, problems)


def check_casts(plan: LoadPlan, model: str, reader: TensorReader) -> None:
    """Values that are converted must fit their dtype: no finite number becomes infinite, no integer another one.

    Raises ``PlanError``. Rounding of floating point numbers is what a cast is asked for.
    """
    problems = []
    for row in plan.rows_of(model):
        if row.action not in ("cast", "transform") or row.dtype == "object":
            continue
        dtypes = [*(step.dtype for step in row.steps if isinstance(step, Cast)), row.dtype]
        for source in row.sources:
            have = reader.tensors[source].dtype
            narrow = next(
                (
                    dtype
                    for dtype in dict.fromkeys(dtypes)
                    if dtype != have
                    and _can_overflow(getattr(torch, have), getattr(torch, dtype))
                    and not all(_fits(piece, getattr(torch, dtype)) for piece in reader.pieces(source))
                ),
                None,
            )
            if narrow is not None:
                problems.append(f"{row.key}: values of {have} in {source} of the file do not fit {narrow}")
    _raise(plan, problems)


def _raise(plan: LoadPlan, problems: list[str]) -> None:
    if problems:
        listed = "\n  ".join(problems[:5]) + (f"\n  and {len(problems) - 5} more" if problems[5:] else "")
        raise PlanError(f"{plan.kind}:\n  {listed}\nNothing was changed.", plan=plan, problems=problems)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals NaN."""
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))


def _can_overflow(source: torch.dtype, target: torch.dtype) -> bool:
    if source.is_complex or target.is_complex:
        return source.is_complex and target.is_complex and source.itemsize > target.itemsize
    if source.is_floating_point != target.is_floating_point:
        return source.is_floating_point
    if source == torch.bool or target == torch.bool:
        return False
    if source.is_floating_point:
        return torch.finfo(source).max > torch.finfo(target).max
    return torch.iinfo(source).max > torch.iinfo(target).max or torch.iinfo(source).min < torch.iinfo(target).min


def _fits(values: torch.Tensor, target: torch.dtype) -> bool:
    if values.numel() == 0:
        return True
    if values.is_complex():
        return bool(torch.equal(torch.isfinite(values), torch.isfinite(values.to(target))))
    if target.is_floating_point:
        return bool(torch.equal(torch.isfinite(values), torch.isfinite(values.to(target).to(values.dtype))))
    if values.is_floating_point():
        return bool(torch.equal(values, values.to(target).to(values.dtype)))
    limits = torch.iinfo(target)
    return limits.min <= int(values.min()) and int(values.max()) <= limits.max
