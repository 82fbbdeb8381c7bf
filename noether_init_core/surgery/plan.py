"""LoadPlan: what an initialization will do to every tensor, computed from names, shapes and dtypes alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from noether_init_core.errors import PlanError
from noether_init_core.messages import listed
from noether_init_core.shown import Shown
from noether_init_core.surgery.steps import Shape, Step, carry_out, shapes_after

if TYPE_CHECKING:
    import torch

Action = Literal[
    "load", "rename", "transform", "cast", "keep", "reset", "missing", "unexpected", "removed", "mismatch", "outside"
]

#: The rule of an entry that an earlier initializer of the stack has loaded.
LOADED_BEFORE = "loaded by an earlier initializer"

#: Actions that write a tensor of the model.
WRITING: frozenset[str] = frozenset({"load", "rename", "transform", "cast"})


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


def memory_of(row: PlanRow) -> Hashable:
    """Equal for rows of targets that are the same memory, as far as that is known."""
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


SCHEMA_VERSION = 1


@attrs.frozen(repr=False)
class LoadPlan(Shown):
    """What ``init_weights`` will do, row by row; pure data.

    A kind may build one from rows of its own. ``str(plan)`` is the folded table of ``ninit plan``.

    Attributes:
        kind: The kind that the plan is of, for messages.
        rows: One for each entry of the model's state dict, and for each entry of the file that is not used.
        problems: With any of these, the plan is never carried out, not even in part.
        warnings: These do not stop it.
        origins: The initializer, model and files of the rows, which refer to them by ``PlanRow.origin``. Without any
            there is one without files, for the model of the first row. A row without its origin raises ``ValueError``.
        equal: ``(model, name, model, name)`` of entries of files that end up in one tied tensor, which submodels may
            share, and must hold the same bytes.
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
            raise ValueError(f"{self.kind}: a row has an origin that is none of the {len(self.origins)} of the plan")

    @property
    def is_fine(self) -> bool:
        """No problem stands in the way."""
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
        self.refuse([problem.message for problem in self.problems], most=len(self.problems))

    def refuse(self, problems: Iterable[str], *, model: str | None = None, hint: str = "", most: int = 5) -> None:
        """Raise ``PlanError``, which says why the plan is not carried out, where there are problems.

        Args:
            problems: For people; all of them are on the error.
            model: The single model that they are about; None for all.
            hint: What to do next.
            most: How many of them the message lists.
        """
        problems = tuple(problems)
        if problems:
            sources = "; ".join(str(origin) for origin in self.origins if model in (None, origin.model))
            message = listed([f"{self.kind}: {sources}", *problems], most + 1, separator="\n  ")
            message += (f"\n{hint}" if hint else "") + "\nNothing was changed."
            raise PlanError(message, plan=self, problems=problems)

    def inverted(self) -> LoadPlan:
        """The plan from the model's entries to the file's: the direction of an export; dtypes are those of the model.

        ``plan.inverted().transformed(model.state_dict())`` is a state dict that this plan loads again, bit for bit.
        What the model keeps, and what of the file is not used, has no part in it.

        Raises ``PlanError`` for a plan with problems, for steps that lose something (slice, pad, interpolate, cast),
        and where only some of the parts of a split have a place in the model.
        """
        self.raise_for_problems()
        rows, problems = _rows_back(self.rows)
        if problems:
            reasons = "\n  ".join(dict.fromkeys(problems))
            raise PlanError(f"{self.kind} has no way back:\n  {reasons}", plan=self, problems=problems)
        return LoadPlan(f"{self.kind}, inverted", rows, origins=self.origins)

    def transformed(self, state: Mapping[str, torch.Tensor], model: str | None = None) -> dict[str, torch.Tensor]:
        """What the plan makes of tensors in memory: new ones under the names of its targets.

        Args:
            state: The tensors under the names of the sources; they stay as they are.
            model: Path of one single model; None where there is only one.

        Raises ``PlanError`` for a plan with problems, where ``state`` lacks an entry, and where ``model`` is needed.
        """
        self.raise_for_problems()
        models = list(dict.fromkeys(row.model for row in self.rows))
        if model is None and len(models) > 1:
            raise PlanError(f"the plan is about several models; say which: {', '.join(models)}", plan=self)
        rows = [row for row in self.rows if row.writes and model in (None, row.model)]
        lacking = [source for row in rows for source in row.sources if source not in state]
        if lacking:
            raise PlanError(f"the state has no {listed(lacking)}, which the plan needs", plan=self)
        import torch

        made: dict[str, torch.Tensor] = {}
        for row in rows:
            value = carry_out(row.steps, [state[source].detach() for source in row.sources])[row.part]
            made[row.key] = value.clone(memory_format=torch.contiguous_format)
        return made

    @classmethod
    def merged(cls, plans: Sequence[LoadPlan], positions: Sequence[int] | None = None) -> LoadPlan:
        """Several plans for one model, in order, as one: of each entry the row that counts in the end.

        Every row keeps its origin.

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
    """The rows that make the file's entries of the model's, and why some have no way back."""
    ways: dict[tuple[str, tuple[str, ...], tuple[Step, ...]], list[PlanRow]] = {}
    for row in rows:
        if row.writes and row.target is not None and row.dtype != "object":
            ways.setdefault((row.model, row.sources, row.steps), []).append(row)
    found: list[PlanRow] = []
    problems: list[str] = []
    for (_model, sources, steps), parts in ways.items():
        # of several names of one tensor, the first will do
        parts = sorted({row.part: row for row in reversed(parts)}.values(), key=lambda row: row.part)
        first = parts[0]
        where = first.rule or first.key
        back, reason = _back(steps, first.source_shapes)
        if not reason and steps and [row.part for row in parts] != list(range(first.parts)):
            reason = "some of its parts have no place in the model"
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
            problems.append(f"{row.target}: several files have such an entry. Next: the plan of one initializer")
        seen.add((row.model, row.target))
    return tuple(found), tuple(problems)


def _back(steps: tuple[Step, ...], shapes: tuple[Shape, ...]) -> tuple[tuple[Step, ...], str]:
    """The steps back, and why there are none."""
    current, back = list(shapes), []
    for step in steps:
        undone = step.inverse(current)
        if undone is None:
            return (), f"{step.name} has no inverse"
        back.append(undone)
        current = step.shapes(current)
    return tuple(reversed(back)), ""
