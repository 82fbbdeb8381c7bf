"""Which dtypes may become which, by their names. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from noether_init_core.surgery.steps import Cast, Concat, Interpolate, Stack, Step

__all__ = ["CastPolicy", "can_cast", "can_follow"]

CastPolicy = Literal["same_kind", "none", "any"]


def _kind_of(dtype: str) -> str:
    if dtype in ("bool", "object"):
        return dtype
    if dtype.startswith("complex"):
        return "complex"
    return "float" if dtype.startswith(("float", "bfloat")) else "integer"


def can_cast(source: str, target: str, policy: CastPolicy) -> bool:
    """Whether ``cast:`` of the config allows to convert one dtype to the other."""
    if source == target:
        return True
    from_kind, to_kind = _kind_of(source), _kind_of(target)
    if policy == "none" or "object" in (from_kind, to_kind) or (from_kind == "complex" and to_kind != "complex"):
        return False
    return policy == "any" or from_kind == to_kind


def can_follow(dtypes: Sequence[str], steps: Sequence[Step]) -> bool:
    """Whether steps lose nothing by dtype: complex stays complex, and what is put together is of one dtype."""
    current = set(dtypes)
    for step in steps:
        kinds = set(map(_kind_of, current))
        if isinstance(step, Cast):
            if "object" in kinds or ("complex" in kinds and _kind_of(step.dtype) != "complex"):
                return False
            current = {step.dtype}
        elif isinstance(step, Concat | Stack):
            if len(current) > 1:
                return False
        elif isinstance(step, Interpolate) and kinds != {"float"}:
            return False
    return len(current) == 1
