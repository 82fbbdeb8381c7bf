"""What a comparison of two checkpoints found. Pure data."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Literal

import attrs

DIFF_VERSION = 1

State = Literal["equal", "changed", "dtype", "shape", "nonfinite", "only_a", "only_b"]


@attrs.frozen
class DiffSide:
    """One of the two checkpoints.

    Attributes:
        path: The file, or the folder of the set.
        origin: Run, tag and iteration in words; None for a file of no run.
        run_id: The run that wrote it, where that is known.
        stage: Its stage.
        tag: The tag that was asked for.
        iteration: The iteration of the set.
        tensors: Number of entries that were looked at.
        bytes: Of their elements.
    """

    path: str
    origin: str | None = None
    run_id: str | None = None
    stage: str | None = None
    tag: str | None = None
    iteration: str | None = None
    tensors: int = 0
    bytes: int = 0


@attrs.frozen
class DiffRow:
    """One name of one or both checkpoints.

    Attributes:
        model: Name of the model, with the info of averages behind it; empty for a file without one.
        key: Its name in the state dict.
        state: ``equal``: the same dtype, shape and bits. ``changed``: other bits. ``dtype``: another dtype, compared by
            value. ``shape``: another shape, not compared. ``nonfinite``: NaN or infinities in one of them, not
            compared. ``only_a``, ``only_b``: in one of them alone.
        shape_a: Its shape in A; None where it is not there.
        shape_b: Its shape in B.
        dtype_a: Its dtype in A, without ``torch.``; ``object`` for what is no tensor.
        dtype_b: Its dtype in B.
        elements: Number of elements, of A where both are there.
        relative_norm: The Euclidean norm of B - A over that of A, in float64. None where it is not compared, or A is
            all zero and B is not.
        cosine: Of the angle between A and B as vectors; None where it is not compared or one of them is all zero.
        norm_a: Euclidean norm of A.
        norm_b: Euclidean norm of B.
        max_abs: The largest absolute difference of two elements.
        nonfinite_a: How many elements of A are NaN or infinite.
        nonfinite_b: How many elements of B are.
        note: What there is to know besides, in words; empty for nothing.
    """

    model: str
    key: str
    state: State
    shape_a: tuple[int, ...] | None = None
    shape_b: tuple[int, ...] | None = None
    dtype_a: str | None = None
    dtype_b: str | None = None
    elements: int = 0
    relative_norm: float | None = None
    cosine: float | None = None
    norm_a: float | None = None
    norm_b: float | None = None
    max_abs: float | None = None
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    note: str = ""


@attrs.frozen
class CheckpointDiff:
    """What two checkpoints have in common, and how far each tensor moved from A to B; pure data.

    Attributes:
        a: The first checkpoint.
        b: The second.
        rows: Every name, in the order of A, then those of B alone.
        elements: Number of elements of names that both have.
        elements_compared: Of those that were compared by value.
        relative_norm: Of all compared elements as one vector; see ``DiffRow``.
        cosine: Of the same.
        notes: What there is to know besides, a sentence each.
    """

    a: DiffSide
    b: DiffSide
    rows: tuple[DiffRow, ...]
    elements: int = 0
    elements_compared: int = 0
    relative_norm: float | None = None
    cosine: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_same_form(self) -> bool:
        """Whether both have the same names and shapes, and nothing but finite numbers."""
        return not any(row.state in ("shape", "nonfinite", "only_a", "only_b") for row in self.rows)

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same bits under the same names."""
        return all(row.state == "equal" for row in self.rows)

    def counts(self) -> dict[str, int]:
        """Number of rows of each state that occurs."""
        return dict(sorted(Counter(row.state for row in self.rows).items()))

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, by ``docs/schemas/diff.schema.json``. Numbers are finite, or null."""
        data = attrs.asdict(self)
        totals = {name: data.pop(name) for name in ("elements", "elements_compared", "relative_norm", "cosine")}
        last = {"counts": self.counts(), "totals": totals, "notes": data.pop("notes")}
        return {"format": "noether-init-diff", "version": DIFF_VERSION, **data, **last}

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)
