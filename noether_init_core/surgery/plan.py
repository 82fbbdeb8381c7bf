"""The load plan: what an initialization will do to every tensor, computed from names, shapes and dtypes alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from noether_init_core.errors import PlanError
from noether_init_core.messages import listed, one_line
from noether_init_core.shown import Shown
from noether_init_core.surgery.steps import Shape, Step, carry_out, shapes_after

if TYPE_CHECKING:
    import torch

Action = Literal[
    "load", "rename", "transform", "cast", "keep", "reset", "missing", "unexpected", "removed", "mismatch", "outside"
]

#: ``PlanRow.rule`` of an entry that an earlier initializer of the stack has loaded.
LOADED_BEFORE = "loaded by an earlier initializer"

#: Actions that write a tensor of the model from the file.
WRITING: frozenset[str] = frozenset({"load", "rename", "transform", "cast"})


@attrs.frozen
class Origin:
    """The initializer, single model and files of rows of a plan; rows refer to it by number.

    Attributes:
        initializer: The kind of the initializer.
        model: Path of names of the single model, such as ``autoenc.encoder``.
        position: Number of the initializer in the stack, from 0.
        description: Origin of the files, in words: ``pretrain @ latest = E4_U16_S128``.
        files: Names of the files; empty if no file is read.
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
    """What happens to one entry of the model's state dict, or to one unused entry of the file.

    Attributes:
        model: Path of names of the single model, such as ``autoenc.encoder``.
        target: Name in the model's state dict; None for an unused entry of the file.
        sources: Names in the file.
        action: ``load``, ``rename``, ``cast`` and ``transform`` write the target from the file; ``reset`` calls
            ``reset_parameters`` of its module; the others leave it unchanged.
        shape: Shape of the target, or of the unused entry.
        dtype: Dtype of the target, or of the unused entry, without ``torch.``.
        nbytes: Bytes of the target, or of the unused entry.
        rule: The config line that decided; None if no rule did.
        source_dtype: Dtype in the file; None if the sources differ.
        is_parameter: Whether the target is a parameter; buffers may hold infinities.
        steps: The steps on the tensors of ``sources``, in order, with every argument.
        part: The number of the target among the ``parts`` tensors that the steps give.
        parts: How many tensors the steps give.
        source_shapes: Shape of each source, in their order.
        tied_to: If ``target`` is a further name of the same memory in this model, the first name; else None.
        origin: Number of its initializer, model and files in ``LoadPlan.origins``.
        identity: Equal for targets with the same memory, also of other models; None if unknown.
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
        """How many elements of the target come from the file: not all if a pad keeps some of the model's own."""
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
        """Whether only some elements of the target come from the file, and the others stay the model's own."""
        return self.writes and self.taken < self.numel

    @property
    def key(self) -> str:
        """The name under which the row is listed."""
        return self.target if self.target is not None else self.sources[0]


@attrs.frozen
class Problem:
    """A reason why a plan cannot be carried out, or a warning.

    Attributes:
        code: Stable, for programs.
        message: For people: what was found, and what to do next.
        model: Path of names of the single model; several are separated by ``", "``.
        keys: Names of the rows that it concerns; may be empty.
    """

    code: str
    message: str
    model: str
    keys: tuple[str, ...] = ()


def memory_of(row: PlanRow) -> Hashable:
    """A value that is equal for rows whose targets are known to have the same memory."""
    return row.identity if row.identity is not None else (row.model, row.tied_to or row.target)


def counted_rows(rows: Iterable[PlanRow]) -> list[PlanRow]:
    """The rows of parameters, one for each piece of memory: the first row that writes it, else the first row."""
    found: dict[Hashable, PlanRow] = {}
    for row in rows:
        if row.is_parameter and row.target is not None:
            memory = memory_of(row)
            if memory not in found or (row.writes and not found[memory].writes):
                found[memory] = row
    return list(found.values())


def share_loaded(rows: Iterable[PlanRow], *, or_before: bool = False) -> float:
    """Share of the elements of parameters in ``rows`` that come from the file, from 0 to 1 (1 for no parameters).

    With ``or_before``, elements that an earlier initializer has loaded count, too.
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


SCHEMA_VERSION = 1


@attrs.frozen(repr=False)
class LoadPlan(Shown):
    """What ``init_weights`` will do, row by row; pure data. A kind may build one from its own rows.

    ``str(plan)`` is the folded table of ``ninit plan``.

    Attributes:
        kind: The kind of the plan, for messages.
        rows: One for each entry of the model's state dict, and for each unused entry of the file.
        problems: A plan with problems is never carried out, not even in part.
        warnings: Problems that do not prevent it.
        origins: The initializer, model and files of the rows, which refer to them by ``PlanRow.origin``. By default one
            origin without files, for the model of the first row. A row without its origin raises ``ValueError``.
        equal: ``(model, name, model, name)`` of entries that are loaded into one tied tensor, also of several
            submodels, and so must hold the same bytes.
    """

    kind: str
    rows: tuple[PlanRow, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    origins: tuple[Origin, ...] = ()
    equal: tuple[tuple[str, str, str, str], ...] = ()

    def __attrs_post_init__(self) -> None:
        if self.rows and not self.origins:
            object.__setattr__(self, "origins", (Origin(self.kind, self.rows[0].model),))  # the class is frozen
        if any(row.origin >= len(self.origins) for row in self.rows):
            raise ValueError(f"{self.kind}: a row has an origin that is not among the {len(self.origins)} of the plan")

    @property
    def is_fine(self) -> bool:
        """Whether the plan has no problem, so that it can be carried out."""
        return not self.problems

    def counts(self) -> dict[str, int]:
        """Number of rows of each action that occurs."""
        return dict(sorted(Counter(row.action for row in self.rows).items()))

    def coverage(self) -> float:
        """Share of the elements of parameters that come from the checkpoint, from 0 to 1 (1 for no parameters).

        Tied parameters count once.
        """
        return share_loaded(self.rows)

    def coverage_by_module(self) -> dict[str, float]:
        """Path of each module with parameters -> its coverage, parents first; the path of the model is ``""``."""
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
        """Raise ``PlanError`` with every problem, if there is one."""
        self.refuse([problem.message for problem in self.problems], most=len(self.problems))

    def refuse(self, problems: Iterable[str], *, model: str | None = None, hint: str = "", most: int = 5) -> None:
        """Raise ``PlanError`` with the problems, if there are any. For problems that only reading the file shows.

        Args:
            problems: Messages; the error has all of them.
            model: The single model that they concern; None for all.
            hint: What to do next.
            most: How many of them the message lists.
        """
        problems = tuple(problems)
        if problems:
            sources = "; ".join(one_line(str(origin)) for origin in self.origins if model in (None, origin.model))
            message = listed([f"{self.kind}: {sources}", *map(one_line, problems)], most + 1, separator="\n  ")
            message += (f"\n{hint}" if hint else "") + "\nNothing was changed."
            raise PlanError(message, plan=self, problems=problems)

    def inverted(self) -> LoadPlan:
        """The plan from the model's entries to the file's, as for an export; dtypes are those of the model.

        ``plan.inverted().transformed(model.state_dict())`` is a state dict that this plan loads again, bit for bit.
        Entries that the model keeps, and unused entries of the file, are left out.

        Raises ``PlanError`` for a plan with problems, and for steps that lose information (slice, pad, interpolate,
        cast). Also if only some parts of a split are in the model.
        """
        self.raise_for_problems()
        rows, problems = _rows_back(self.rows)
        if problems:
            reasons = "\n  ".join(map(one_line, dict.fromkeys(problems)))
            raise PlanError(f"the plan of {self.kind} has no inverse:\n  {reasons}", plan=self, problems=problems)
        return LoadPlan(f"{self.kind}, inverted", rows, origins=self.origins)

    def transformed(self, state: Mapping[str, torch.Tensor], model: str | None = None) -> dict[str, torch.Tensor]:
        """Apply the plan to tensors in memory: returns new tensors under the names of its targets.

        Args:
            state: The tensors under the names of the sources, with the shapes of the plan; they are not changed.
            model: Path of one single model; None if there is only one.

        Raises ``PlanError`` for a plan with problems, if an entry is not in ``state``, and if ``model`` is needed.
        """
        self.raise_for_problems()
        models = list(dict.fromkeys(row.model for row in self.rows))
        if model is None and len(models) > 1:
            raise PlanError(f"the plan has several models. Next: model= one of {', '.join(models)}", plan=self)
        rows = [row for row in self.rows if row.writes and model in (None, row.model)]
        lacking = [source for row in rows for source in row.sources if source not in state]
        if lacking:
            raise PlanError(f"the plan needs {listed(lacking)}, not found in the state", plan=self)
        import torch

        made: dict[str, torch.Tensor] = {}
        for row in rows:
            value = carry_out(row.steps, [state[source].detach() for source in row.sources])[row.part]
            made[row.key] = value.clone(memory_format=torch.contiguous_format)
        return made

    @classmethod
    def merged(cls, plans: Sequence[LoadPlan], positions: Sequence[int] | None = None) -> LoadPlan:
        """Several plans for one model, in order, as one: for each entry the row that decides its final value.

        Each row keeps its origin.

        Args:
            plans: In the order in which they are carried out.
            positions: Number of the initializer of each plan in the stack; by default 0, 1, 2, ...
        """
        origins: list[Origin] = []
        rows: list[PlanRow] = []
        final: dict[tuple[str, str], int] = {}
        for position, plan in zip(range(len(plans)) if positions is None else positions, plans, strict=True):
            for row in plan.rows:
                place = row.model, str(row.target)
                if row.target is not None and (row.writes or row.action == "reset" or place not in final):
                    final[place] = len(rows)
                rows.append(attrs.evolve(row, origin=row.origin + len(origins)) if origins else row)
            origins += (attrs.evolve(origin, position=position) for origin in plan.origins)
        kept = set(final.values())
        return cls(
            " + ".join(plan.kind for plan in plans),
            tuple(row for number, row in enumerate(rows) if row.target is None or number in kept),
            tuple(problem for plan in plans for problem in plan.problems),
            tuple(warning for plan in plans for warning in plan.warnings),
            tuple(origins),
            tuple(names for plan in plans for names in plan.equal),
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, by ``docs/plan.schema.json``; ``version`` changes with the meaning of a field."""
        names = [field.name for field in attrs.fields(PlanRow) if field.name != "identity"]
        counted = counted_rows(self.rows)
        counted_ids = set(map(id, counted))
        return {
            "format": "noether-init-plan",
            "version": SCHEMA_VERSION,
            "kind": self.kind,
            "origins": [attrs.asdict(origin) for origin in self.origins],
            "rows": [
                {name: getattr(row, name) for name in names}
                | {"steps": [{"step": step.name, **attrs.asdict(step)} for step in row.steps]}
                | {"counted": id(row) in counted_ids}
                for row in self.rows
            ],
            "problems": [attrs.asdict(problem) for problem in self.problems],
            "warnings": [attrs.asdict(warning) for warning in self.warnings],
            "counts": self.counts(),
            "totals": {
                "parameters": sum(row.numel for row in counted),
                "parameters_loaded": sum(row.taken for row in counted),
                "bytes": sum(row.nbytes for row in self.rows if row.target is not None),
                "bytes_loaded": sum(row.nbytes for row in self.rows if row.writes),
            },
            "coverage": self.coverage(),
            "coverage_by_module": self.coverage_by_module(),
        }

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)


def _rows_back(rows: Iterable[PlanRow]) -> tuple[tuple[PlanRow, ...], tuple[str, ...]]:
    """The rows from entries of the model to entries of the file, and reasons why some have no inverse."""
    ways: dict[tuple[str, int, tuple[str, ...], tuple[Step, ...]], list[PlanRow]] = {}
    for row in rows:
        if row.writes and row.target is not None and row.dtype != "object":
            ways.setdefault((row.model, row.origin, row.sources, row.steps), []).append(row)
    found: list[PlanRow] = []
    problems: list[str] = []
    for (_model, _origin, sources, steps), parts in ways.items():
        # several names of one tensor hold the same values: the first one suffices
        parts = sorted({row.part: row for row in reversed(parts)}.values(), key=lambda row: row.part)
        first = parts[0]
        where = first.rule or first.key
        back, reason = _back(steps, first.source_shapes)
        if not reason and steps and [row.part for row in parts] != list(range(first.parts)):
            reason = "some of its parts are not in the model"
        if reason:
            problems.append(f"{where}: {reason}")
            continue
        targets = tuple(row.key for row in parts)
        shapes = tuple(row.shape for row in parts)
        if not steps:
            targets, shapes = targets[:1], shapes[:1]  # several names in the model for one entry of the file
        for number, source in enumerate(sources):
            action: Action = "transform" if back else ("load" if targets == (source,) else "rename")
            found.append(
                attrs.evolve(
                    first,
                    target=source,
                    sources=targets,
                    action=action,
                    shape=first.source_shapes[number],
                    nbytes=first.nbytes // max(first.numel, 1) * math.prod(first.source_shapes[number]),
                    source_dtype=first.dtype,
                    steps=back,
                    part=number,
                    parts=len(sources),
                    source_shapes=shapes,
                )
            )
    seen: set[tuple[str, str | None]] = set()
    for row in found:
        if (row.model, row.target) in seen:
            problems.append(f"{row.target}: several files have this entry. Next: the plan of one initializer")
        seen.add((row.model, row.target))
    return tuple(found), tuple(problems)


def _back(steps: tuple[Step, ...], shapes: tuple[Shape, ...]) -> tuple[tuple[Step, ...], str]:
    """The inverse steps, or no steps and the reason why there is no inverse."""
    current, back = list(shapes), []
    for step in steps:
        undone = step.inverse(current)
        if undone is None:
            return (), f"{step.name} has no inverse"
        back.append(undone)
        current = step.shapes(current)
    return tuple(reversed(back)), ""
