"""Conversions of dtypes: what torch can convert, and what the policy ``cast`` of a config allows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

from noether_init_core.surgery.steps import Cast, Concat, Interpolate, Stack, Step

CastPolicy = Literal["same_kind", "none", "any"]
#: Torch converts each of these to each other one; asked about others, it must be there.
PLAIN = frozenset({
    "bool", "uint8", "int8", "int16", "int32", "int64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
})  # fmt: skip


def _kind_of(dtype: str) -> str:
    if dtype in ("bool", "object"):
        return dtype
    if dtype.startswith("complex"):
        return "complex"
    return "float" if dtype.startswith(("float", "bfloat")) else "integer"


def can_cast(source: str, target: str, policy: CastPolicy) -> bool:
    """Whether the policy ``cast:`` of the config allows the conversion of one dtype to the other."""
    if source == target:
        return True
    from_kind, to_kind = _kind_of(source), _kind_of(target)
    if policy == "none" or "object" in (from_kind, to_kind) or (from_kind == "complex" and to_kind != "complex"):
        return False
    is_allowed = policy == "any" or from_kind == to_kind
    return is_allowed and ({source, target} <= PLAIN or _torch_converts(source, target))


@functools.cache
def _torch_converts(source: str, target: str) -> bool:
    """Whether torch can copy one dtype to the other; there are dtypes, such as bits8, that only hold bytes."""
    import torch

    dtypes = [getattr(torch, dtype, None) for dtype in (source, target)]
    if not all(isinstance(dtype, torch.dtype) for dtype in dtypes):
        return True
    one, other = (torch.empty(1, dtype=dtype, device="cpu") for dtype in dtypes)
    try:
        other.copy_(one)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def can_follow(dtypes: Sequence[str], steps: Sequence[Step]) -> bool:
    """Whether the steps lose nothing by dtype: complex stays complex, and combined tensors have one dtype."""
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
