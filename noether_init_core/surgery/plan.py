"""LoadPlan: what an initialization will do to every tensor, computed from names, shapes and dtypes alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs

from noether_init_core.errors import PlanError
from noether_init_core.surgery.steps import Step, step_to_dict

if TYPE_CHECKING:
    import torch

__all__ = [
    "LOADED_BEFORE",
    "Action",
    "LoadPlan",
    "PlanPart",
    "PlanRow",
    "Problem",
    "TargetSpec",
    "TensorSpec",
    "share_loaded",
]

Action = Literal[
    "load", "rename", "transform", "cast", "keep", "reset", "missing", "unexpected", "removed", "mismatch", "outside"
]

#: The rule of an entry that an earlier initializer of the stack has loaded.
LOADED_BEFORE = "loaded by an earlier initializer"

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
        action: ``load``, ``rename``, ``cast`` and ``transform`` write the target from the file; ``reset`` lets its
            module initialize it anew; the others leave it.
        shape: Shape of the target, or of the unused entry.
        dtype: Dtype of the target, or of the unused entry.
        nbytes: Bytes of the target, or of the unused entry.
        rule: The config line responsible; None where no rule had a say.
        source_shape: Shape in the file, where there is one source.
        source_dtype: Dtype in the file, where all sources have the same.
        is_parameter: Whether the target is a parameter; buffers may hold infinities.
        steps: What is done with the tensors of ``sources``, in order, every argument said.
        part: Which of the ``parts`` tensors that the steps make is the target's.
        parts: How many tensors the steps make.
        source_shapes: Shape of each source, in their order.
        tied_to: The first name of the same memory in this model, where ``target`` is another name of it.
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
    steps: tuple[Step, ...] = ()
    part: int = 0
    parts: int = 1
    source_shapes: tuple[tuple[int, ...], ...] = ()
    tied_to: str | None = None

    @property
    def writes(self) -> bool:
        """Whether the target gets its value from the file."""
        return self.action in WRITING

    @property
    def numel(self) -> int:
        """Number of elements of the target, or of the unused entry."""
        return math.prod(self.shape) if self.dtype != "object" else 0

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
        loaded: Names of the model that an earlier initializer will have loaded.
        resettable: Names of the model whose module can initialize itself anew.
    """

    model: str
    origin: str
    file: str
    sources: Mapping[str, TensorSpec]
    targets: Mapping[str, TargetSpec]
    hidden: frozenset[str] = frozenset()
    loaded: frozenset[str] = frozenset()
    resettable: frozenset[str] = frozenset()


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

    def coverage(self, module: str = "") -> float:
        """Share of the elements of parameters that come from the checkpoint, from 0 to 1 (1 for no parameters).

        Args:
            module: Only those below this module, such as ``encoder.blocks``; empty for all. Tied parameters count once.
        """
        below = f"{module}." if module else ""
        return share_loaded(row for row in self.rows if (row.target or "").startswith(below) or row.target == module)

    def coverage_by_module(self) -> dict[str, float]:
        """The coverage of every module with parameters below it, by path, parents first; the model's own is ``""``."""
        found: dict[str, list[PlanRow]] = {}
        for row in self.rows:
            if row.target is not None and row.is_parameter:
                segments = row.target.split(".")[:-1]
                for depth in range(len(segments) + 1):
                    found.setdefault(".".join(segments[:depth]), []).append(row)
        return {module: share_loaded(rows) for module, rows in sorted(found.items())}

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

    def inverted(self) -> LoadPlan:
        """The plan from the model's entries to the file's: the direction of an export. See ``surgery.inverse``.

        ``plan.inverted().transformed(model.state_dict())`` is a state dict that this plan loads again, bit for bit.

        Raises ``PlanError`` where a rule has no inverse.
        """
        from noether_init_core.surgery.inverse import inverted

        return inverted(self)

    def transformed(self, state: Mapping[str, torch.Tensor], model: str | None = None) -> dict[str, torch.Tensor]:
        """What the plan makes of tensors in memory: new ones under the names of its targets.

        ``model`` is the path of one single model, None where there is only one. Raises ``PlanError`` where ``state``
        lacks an entry.
        """
        from noether_init_core.surgery.inverse import transformed

        return transformed(self, state, model)

    @classmethod
    def merged(cls, plans: Sequence[LoadPlan]) -> LoadPlan:
        """Several plans for one model, in order, as one: of each entry the row that counts in the end."""
        if len(plans) == 1:
            return plans[0]
        final: dict[tuple[str, str], PlanRow] = {}
        for row in (row for plan in plans for row in plan.rows):
            place = row.model, str(row.target)
            if row.target is not None and (row.writes or place not in final or not final[place].writes):
                final[place] = row
        kept = set(map(id, final.values()))
        return cls(
            " + ".join(plan.kind for plan in plans),
            tuple(row for plan in plans for row in plan.rows if row.target is None or id(row) in kept),
            tuple(problem for plan in plans for problem in plan.problems),
            tuple(warning for plan in plans for warning in plan.warnings),
            tuple(origin for plan in plans for origin in plan.origins),
            tuple(names for plan in plans for names in plan.equal),
            tuple(names for plan in plans for names in plan.equal_across),
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, by ``docs/plan.schema.json``; ``version`` changes with the meaning of a field."""

        def plain(row: PlanRow) -> dict[str, Any]:
            values = {field.name: getattr(row, field.name) for field in attrs.fields(PlanRow)}
            return {**values, "steps": [step_to_dict(step) for step in row.steps]}

        return {
            "format": "noether-init-plan",
            "version": SCHEMA_VERSION,
            "kind": self.kind,
            "origins": [{"model": model, "origin": origin, "file": file} for model, origin, file in self.origins],
            "rows": [plain(row) for row in self.rows],
            "problems": [attrs.asdict(problem) for problem in self.problems],
            "warnings": [attrs.asdict(warning) for warning in self.warnings],
            "counts": self.counts(),
            "totals": {
                "parameters": sum(row.numel for row in self.rows if _is_counted(row)),
                "parameters_loaded": sum(row.numel for row in self.rows if _is_counted(row) and row.writes),
                "bytes": sum(row.nbytes for row in self.rows if row.target is not None),
                "bytes_loaded": self.loaded_bytes,
            },
            "coverage": self.coverage(),
            "coverage_by_module": self.coverage_by_module(),
        }

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)


def share_loaded(rows: Iterable[PlanRow], *, or_before: bool = False) -> float:
    """Share of the elements of parameters in ``rows`` that come from the file, from 0 to 1 (1 for no parameters).

    With ``or_before``, what an earlier initializer has loaded counts, too.
    """
    loaded = total = 0
    for row in rows:
        if _is_counted(row):
            numel = row.numel
            total += numel
            if row.writes or (or_before and row.rule == LOADED_BEFORE):
                loaded += numel
    return loaded / total if total else 1.0


def _is_counted(row: PlanRow) -> bool:
    return row.is_parameter and row.target is not None and row.tied_to is None
