"""LoadPlan: what an initialization will do to every tensor, computed from names, shapes and dtypes alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from noether_init_core.errors import PlanError
from noether_init_core.messages import listed
from noether_init_core.surgery.inverse import rows_back, transformed
from noether_init_core.surgery.rows import (
    LOADED_BEFORE,
    Action,
    Origin,
    PlanPart,
    PlanRow,
    Problem,
    TargetSpec,
    TensorSpec,
    counted_rows,
    share_loaded,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "LOADED_BEFORE",
    "Action",
    "LoadPlan",
    "Origin",
    "PlanPart",
    "PlanRow",
    "Problem",
    "TargetSpec",
    "TensorSpec",
    "counted_rows",
    "share_loaded",
]

SCHEMA_VERSION = 1


@attrs.frozen
class LoadPlan:
    """What ``init_weights`` will do, row by row; pure data.

    A kind may build one from rows of its own.

    Attributes:
        kind: The kind that the plan is of, for messages.
        rows: One for each entry of the model's state dict, and for each entry of the file that is not used.
        problems: With any of these, the plan is never carried out, not even in part.
        warnings: These do not stop it.
        origins: The initializer, model and files of the rows, which refer to them by ``PlanRow.origin``. Without any
            there is one without files, for the model of the first row. A row without its origin raises ``ValueError``.
        equal: ``(model, name, name)`` of entries of the file that end up in one tied tensor and must hold the same
            bytes.
        equal_across: ``(model, name, model, name)`` of those that are tied across submodels.
    """

    kind: str
    rows: tuple[PlanRow, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    origins: tuple[Origin, ...] = ()
    equal: tuple[tuple[str, str, str], ...] = ()
    equal_across: tuple[tuple[str, str, str, str], ...] = ()

    def __attrs_post_init__(self) -> None:
        if self.rows and not self.origins:
            object.__setattr__(self, "origins", (Origin(self.kind, self.rows[0].model),))  # the class is frozen
        if any(row.origin >= len(self.origins) for row in self.rows):
            raise ValueError(f"{self.kind}: a row has an origin that is none of the {len(self.origins)} of the plan")

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
            messages = [problem.message for problem in self.problems]
            raise self.refusal(messages, most=len(messages))

    def refusal(self, problems: Sequence[str], *, model: str | None = None, hint: str = "", most: int = 5) -> PlanError:
        """The error that says why the plan is not carried out.

        Args:
            problems: For people; all of them are on the error.
            model: The single model that they are about; None for all.
            hint: What to do next.
            most: How many of them the message lists.
        """
        sources = "; ".join(str(origin) for origin in self.origins if model in (None, origin.model))
        shown = [f"{self.kind}: {sources}", *problems[:most]]
        if len(problems) > most:
            shown.append(f"and {len(problems) - most} more")
        message = "\n  ".join(shown) + (f"\n{hint}" if hint else "") + "\nNothing was changed."
        return PlanError(message, plan=self, problems=tuple(problems))

    def inverted(self) -> LoadPlan:
        """The plan from the model's entries to the file's: the direction of an export; dtypes are those of the model.

        ``plan.inverted().transformed(model.state_dict())`` is a state dict that this plan loads again, bit for bit.
        What the model keeps, and what of the file is not used, has no part in it.

        Raises ``PlanError`` for a plan with problems, for steps that lose something (slice, pad, interpolate, cast),
        and where only some of the parts of a split have a place in the model.
        """
        self.raise_for_problems()
        rows, problems = rows_back(self.rows)
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
        return transformed(rows, state)

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
            tuple(names for plan in plans for names in plan.equal_across),
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, by ``docs/plan.schema.json``; ``version`` changes with the meaning of a field."""

        def plain(row: PlanRow) -> dict[str, Any]:
            values = {name: getattr(row, name) for name in names}
            return {
                **values,
                "steps": [{"step": step.name, **attrs.asdict(step)} for step in row.steps],
                "counted": id(row) in counted_ids,
            }

        names = [field.name for field in attrs.fields(PlanRow) if field.name != "identity"]
        counted = counted_rows(self.rows)
        counted_ids = set(map(id, counted))

        return {
            "format": "noether-init-plan",
            "version": SCHEMA_VERSION,
            "kind": self.kind,
            "origins": [attrs.asdict(origin) for origin in self.origins],
            "rows": [plain(row) for row in self.rows],
            "problems": [attrs.asdict(problem) for problem in self.problems],
            "warnings": [attrs.asdict(warning) for warning in self.warnings],
            "counts": self.counts(),
            "totals": {
                "parameters": sum(row.numel for row in counted),
                "parameters_loaded": sum(row.taken for row in counted),
                "bytes": sum(row.nbytes for row in self.rows if row.target is not None),
                "bytes_loaded": self.loaded_bytes,
            },
            "coverage": self.coverage(),
            "coverage_by_module": self.coverage_by_module(),
        }

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)
