"""The rows of a plan, and what they are made of: pure data."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Literal, Protocol

import attrs

from noether_init_core.surgery.steps import Step, shapes_after

__all__ = [
    "LOADED_BEFORE",
    "WRITING",
    "Action",
    "Origin",
    "PlanPart",
    "PlanRow",
    "Problem",
    "TargetSpec",
    "TensorSpec",
    "counted_rows",
    "share_loaded",
]

Action = Literal[
    "load", "rename", "transform", "cast", "keep", "reset", "missing", "unexpected", "removed", "mismatch", "outside"
]

#: The rule of an entry that an earlier initializer of the stack has loaded.
LOADED_BEFORE = "loaded by an earlier initializer"

#: Actions that write a tensor of the model.
WRITING: frozenset[str] = frozenset({"load", "rename", "transform", "cast"})


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
class Origin:
    """The initializer, single model and files that rows of a plan are about; rows refer to it by number.

    Attributes:
        initializer: The kind of the initializer.
        model: Path of names of the single model, such as ``autoenc.encoder``.
        position: Number of the initializer in the stack, from 0.
        description: Where the files come from, in words: ``pretrain @ latest = E4_U16_S128``.
        files: Names of the files; none where no file is read.
    """

    initializer: str
    model: str
    position: int = 0
    description: str = ""
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        files = f" ({', '.join(self.files)})" if self.files else ""
        return f"{self.model} <- {self.description}{files}"


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
        source_dtype: Dtype in the file, where all sources have the same.
        is_parameter: Whether the target is a parameter; buffers may hold infinities.
        steps: What is done with the tensors of ``sources``, in order, every argument said.
        part: Which of the ``parts`` tensors that the steps make is the target's.
        parts: How many tensors the steps make.
        source_shapes: Shape of each source, in their order.
        tied_to: The first name of the same memory in this model, where ``target`` is another name of it.
        origin: Number of its initializer, model and files in ``LoadPlan.origins``.
        identity: Equal for targets, also of other models, that are the same memory; None where that is not known.
    """

    model: str
    target: str | None
    sources: tuple[str, ...]
    action: Action
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    rule: str | None = None
    source_dtype: str | None = None
    is_parameter: bool = True
    steps: tuple[Step, ...] = ()
    part: int = 0
    parts: int = 1
    source_shapes: tuple[tuple[int, ...], ...] = ()
    tied_to: str | None = None
    origin: int = 0
    identity: Hashable = attrs.field(default=None, eq=False, repr=False)

    @property
    def writes(self) -> bool:
        """Whether the target gets its value from the file."""
        return self.action in WRITING

    @property
    def numel(self) -> int:
        """Number of elements of the target, or of the unused entry."""
        return math.prod(self.shape) if self.dtype != "object" else 0

    @property
    def taken(self) -> int:
        """How many elements of the target come from the file: fewer than all where a pad leaves the model's own."""
        if not self.writes:
            return 0
        number = self.numel
        for step in reversed(self.steps):
            if not step.keeps_model:
                break
            shorter = shapes_after(self.steps[: self.steps.index(step)], self.source_shapes, self.parts)[1][self.part]
            number = math.prod(shorter)
        return number

    @property
    def is_partial(self) -> bool:
        """Whether some elements of the target come from the file, and others stay the model's own."""
        return self.writes and self.taken < self.numel

    @property
    def key(self) -> str:
        """The name that the row is listed under."""
        return self.target if self.target is not None else self.sources[0]


@attrs.frozen
class Problem:
    """A reason why a plan cannot be carried out, or a warning.

    Attributes:
        code: Stable, for programs.
        message: For people: what was found, and what to do next.
        model: Path of names of the single model; several are separated by ``", "``.
        keys: Names of the rows that it is about, if it is about some.
    """

    code: str
    message: str
    model: str
    keys: tuple[str, ...] = ()


@attrs.frozen
class PlanPart:
    """One single model with the file that it is initialized from.

    Attributes:
        model: Path of names of the model.
        description: Where the file came from, in words: ``pretrain @ latest = E4_U16_S128``.
        files: Names of the files.
        sources: Entries of the file's state dict.
        targets: Entries of the model's state dict, in order.
        hidden: Names of buffers that the model has but its state dict has not (non-persistent ones).
        loaded: Names of the model that an earlier initializer will have loaded.
        resettable: Names of the model whose module can initialize itself anew.
    """

    model: str
    description: str
    files: tuple[str, ...]
    sources: Mapping[str, TensorSpec]
    targets: Mapping[str, TargetSpec]
    hidden: frozenset[str] = frozenset()
    loaded: frozenset[str] = frozenset()
    resettable: frozenset[str] = frozenset()


def counted_rows(rows: Iterable[PlanRow]) -> list[PlanRow]:
    """The rows of parameters, one for each piece of memory: the first row that writes it, else the first row."""
    found: dict[Hashable, PlanRow] = {}
    for row in rows:
        if row.is_parameter and row.target is not None:
            memory = row.identity if row.identity is not None else (row.model, row.tied_to or row.target)
            if memory not in found or (row.writes and not found[memory].writes):
                found[memory] = row
    return list(found.values())


def share_loaded(rows: Iterable[PlanRow], *, or_before: bool = False) -> float:
    """Share of the elements of parameters in ``rows`` that come from the file, from 0 to 1 (1 for no parameters).

    With ``or_before``, what an earlier initializer has loaded counts, too.
    """
    loaded = total = 0
    for row in counted_rows(rows):
        numel = row.numel
        total += numel
        if row.writes:
            loaded += row.taken if row.steps else numel
        elif or_before and row.rule == LOADED_BEFORE:
            loaded += numel
    return loaded / total if total else 1.0
