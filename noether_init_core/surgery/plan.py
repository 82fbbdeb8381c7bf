"""LoadPlan: what an initialization will do to every tensor, computed from names, shapes and dtypes alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, Protocol

import attrs

from noether_init_core.errors import PlanError

__all__ = ["Action", "LoadPlan", "PlanPart", "PlanRow", "Problem", "TargetSpec", "TensorSpec"]

Action = Literal[
    "load", "rename", "transform", "cast", "keep", "missing", "unexpected", "removed", "mismatch", "outside"
]

#: Actions that write a tensor of the model.
WRITING: frozenset[str] = frozenset({"load", "rename", "transform", "cast"})
SCHEMA_VERSION = 1


class TensorSpec(Protocol):
    """What the plan needs of a tensor of a file: ``TensorInfo`` of the readers has it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


@attrs.frozen
class TargetSpec:
    """One entry of a model's state dict.

    Attributes:
        shape: The shape; empty for a 0-dimensional tensor and for an object that is no tensor.
        dtype: The dtype without ``torch.``, or ``object`` for a module's extra state.
        nbytes: Number of elements times bytes of one.
        is_parameter: False for buffers and extra state.
        tied_to: The first name of the same memory in this model, where this is another name of it.
        identity: Equal for entries, also of other models, that are the same memory; None where that is not known.
        unwritable: Why the entry cannot be written in place, in words; empty where it can.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    is_parameter: bool = True
    tied_to: str | None = None
    identity: Hashable = None
    unwritable: str = ""


@attrs.frozen
class PlanRow:
    """What happens to one entry of the model's state dict, or to one entry of the file that is not used.

    Attributes:
        model: Path of names of the single model, such as ``autoenc.encoder``.
        target: Name in the model's state dict; None where the row is about an unused entry of the file.
        sources: Names in the file.
        action: ``load``, ``rename``, ``cast`` and ``transform`` write the target; the others leave it.
        shape: Shape of the target, or of the unused entry.
        dtype: Dtype of the target, or of the unused entry.
        nbytes: Bytes of the target, or of the unused entry.
        rule: The config line responsible; None where no rule had a say.
        source_shape: Shape in the file, where there is one source.
        source_dtype: Dtype in the file, where there is one source.
        is_parameter: Whether the target is a parameter; buffers may hold infinities.
    """

    model: str
    target: str | None
    sources: tuple[str, ...]
    action: Action
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    rule: str | None = None
    source_shape: tuple[int, ...] | None = None
    source_dtype: str | None = None
    is_parameter: bool = True

    @property
    def writes(self) -> bool:
        """Whether carrying out the row changes the model."""
        return self.action in WRITING

    @property
    def key(self) -> str:
        """The name that the row is listed under."""
        return self.target if self.target is not None else self.sources[0]


@attrs.frozen
class Problem:
    """A reason why the plan may not be carried out. ``code`` is stable, ``message`` is for people."""

    code: str
    message: str
    model: str
    keys: tuple[str, ...] = ()


@attrs.frozen
class PlanPart:
    """One single model with the file that it is initialized from.

    Attributes:
        model: Path of names of the model.
        origin: Where the file came from, in words: ``pretrain @ latest = E4_U16_S128``.
        file: Name of the file.
        sources: Entries of the file's state dict.
        targets: Entries of the model's state dict, in order.
        hidden: Names of buffers that the model has but its state dict has not (non-persistent ones).
    """

    model: str
    origin: str
    file: str
    sources: Mapping[str, TensorSpec]
    targets: Mapping[str, TargetSpec]
    hidden: frozenset[str] = frozenset()


@attrs.frozen
class LoadPlan:
    """What ``init_weights`` will do, row by row; pure data.

    A plan with problems is never carried out, not even in part. ``warnings`` do not stop it. ``equal`` lists
    ``(model, name, name)`` of entries of the file that end up in one tied tensor and must hold the same bytes;
    ``equal_across`` lists ``(model, name, model, name)`` of those that are tied across submodels.
    """

    kind: str
    rows: tuple[PlanRow, ...]
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    origins: tuple[tuple[str, str, str], ...] = ()
    equal: tuple[tuple[str, str, str], ...] = ()
    equal_across: tuple[tuple[str, str, str, str], ...] = ()

    @property
    def is_fine(self) -> bool:
        """No problem stands in the way."""
        return not self.problems

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the model that will be written."""
        return sum(row.nbytes for row in self.rows if row.writes)

    def counts(self) -> dict[str, int]:
        """Number of rows of each action that occurs."""
        return dict(sorted(Counter(row.action for row in self.rows).items()))

    def coverage(self) -> float:
        """Share of the bytes of parameters that come from the checkpoint, from 0 to 1 (1 for no parameters)."""
        parameters = [row for row in self.rows if row.is_parameter and row.target is not None]
        total = sum(row.nbytes for row in parameters)
        return sum(row.nbytes for row in parameters if row.writes) / total if total else 1.0

    def rows_of(self, model: str) -> tuple[PlanRow, ...]:
        """The rows of one single model."""
        return tuple(row for row in self.rows if row.model == model)

    def raise_for_problems(self) -> None:
        """Raise ``PlanError`` with every problem, where there is one."""
        if self.problems:
            shown = [problem.message for problem in self.problems]
            listed = "\n  ".join(shown)
            sources = "; ".join(f"{model} <- {origin} ({file})" for model, origin, file in self.origins)
            raise PlanError(
                f"{self.kind}: {sources}\n  {listed}\nNothing was changed.", plan=self, problems=tuple(shown)
            )

    @classmethod
    def merged(cls, plans: Sequence[LoadPlan]) -> LoadPlan:
        """Several plans for one model, in order, as one; each later one writes over the earlier."""
        return cls(
            " + ".join(plan.kind for plan in plans),
            tuple(row for plan in plans for row in plan.rows),
            tuple(problem for plan in plans for problem in plan.problems),
            tuple(warning for plan in plans for warning in plan.warnings),
            tuple(origin for plan in plans for origin in plan.origins),
            tuple(names for plan in plans for names in plan.equal),
            tuple(names for plan in plans for names in plan.equal_across),
        )

    def to_json(self) -> str:
        """The plan as JSON; ``version`` changes when a field changes its meaning."""
        return json.dumps({"version": SCHEMA_VERSION, **attrs.asdict(self), "counts": self.counts()}, indent=1)
