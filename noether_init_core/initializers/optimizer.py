"""Optimizer state in one initialization: planned from the header of its file, read, verified and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from noether_init_core import nested
from noether_init_core.applying.optimizer_state import (
    apply_optimizer,
    class_name,
    moved_value,
    optimizer_names,
    parameter_aliases,
    rehearsed_optimizer,
    torch_optimizer,
)
from noether_init_core.config.source import OptimizerStateConfig
from noether_init_core.errors import CheckpointNotFoundError, ConfigError, StateMismatchError, TornSetError
from noether_init_core.files.content import TensorInfo
from noether_init_core.initializers.session import OpenFile, Planned, WeightsSession, close_all
from noether_init_core.models import Leaf
from noether_init_core.restore import Side, restore_line
from noether_init_core.surgery.optimizer_fields import OptimizerPolicies
from noether_init_core.surgery.optimizer_plan import Moved, OptimizerPlan, ParameterOrigin, Stays, plan_optimizer
from noether_init_core.surgery.plan import LOADED_BEFORE, LoadPlan, PlanRow, Problem

#: A plan lists this many problems of one optimizer, because a problem of one parameter often affects many.
_MOST_PROBLEMS = 5


@attrs.define(eq=False)
class OptimizerStep:
    """The planned state of one optimizer.

    Attributes:
        leaf: Its model.
        optimizer: The optimizer, without a wrapper around it.
        file: The open file of the state.
        plan: The plan; its tensors are descriptions until ``read``.
        is_read: Whether the tensors were read and verified.
    """

    leaf: Leaf
    optimizer: torch.optim.Optimizer
    file: OpenFile
    plan: OptimizerPlan
    is_read: bool = False

    def fits(self) -> bool:
        """Whether the model still has the optimizer and the groups for which the step was planned."""
        optimizer = self.leaf.model.optimizer
        if optimizer is None:
            return False
        current = torch_optimizer(optimizer)
        return current is self.optimizer and [len(group["params"]) for group in current.param_groups] == [
            len(states) for states in self.plan.state
        ]

    def read(self, config: OptimizerStateConfig) -> list[str]:
        """Replace descriptions by tensors; returns warnings.

        Tensors are read into their final memory, verified and examined in one pass, and follow their parameters. Raises
        ``StateMismatchError`` for NaN and infinities, unless the config allows them.
        """
        states = [state for states in self.plan.state for state in states if isinstance(state, Mapping)]
        fields, reader = list(self.plan.fields), self.file.reader
        examines = config.nonfinite != "ignore"
        tensors = reader.read_all(list(_infos([states, fields])), verify=config.verify == "full", look=examines)
        warnings = self._nonfinite(states, fields) if examines else []
        if warnings and config.nonfinite == "error":
            raise StateMismatchError(
                f"{warnings[0]}. Nothing was changed. To load it all the same: on_nonfinite: warn",
                problems=warnings[:1],
            )
        given: set[TensorInfo] = set()

        # neither calls itself: a recursive closure keeps every tensor alive until a garbage collection
        def taken(value: Any) -> Any:
            if not isinstance(value, TensorInfo):
                return value
            # a tensor that occurs twice gets memory twice, because the optimizer updates each occurrence separately
            if value not in tensors or value in given:
                return reader.read(value)
            given.add(value)
            return tensors[value]

        def made(value: Any) -> Any:
            if not isinstance(value, Moved):
                return taken(value)
            has_own_memory = bool(value.steps) or value.dtype is not None
            values = [tensors[one] if has_own_memory and one in tensors else taken(one) for one in value.values]
            return moved_value(value, values, self.file.source.location.name)

        self.plan = attrs.evolve(
            self.plan,
            state=nested.mapped(self.plan.state, made),
            fields=nested.mapped(self.plan.fields, made),
        )
        self.is_read = True
        return warnings

    def rehearse(self) -> None:
        """Raise ``StateMismatchError`` if hooks or methods of the optimizer refuse the state that was read."""
        problem = rehearsed_optimizer(self.plan, self.optimizer)
        if problem:
            name = type(self.optimizer).__name__
            raise StateMismatchError(
                f"{self.leaf.path}: the loading code of the optimizer {name} fails: {problem}. Nothing was changed. "
                "To train with fresh state: load_optim: false",
                problems=[problem],
            )

    def check_memory(self) -> None:
        """Raise ``StateMismatchError`` for parameters on the meta device, where their state would be lost."""
        if any(parameter.is_meta for group in self.optimizer.param_groups for parameter in group["params"]):
            raise StateMismatchError(
                f"{self.leaf.path} is on the meta device, so that its optimizer cannot take state yet. "
                "Next: init_weights first, as InitializerStack.initialize does"
            )

    def restored(self, *, continues: bool) -> str:
        """What is restored, in words for the report; empty for nothing. Call it before the state is written."""
        states = [state for group in self.plan.state for state in group]
        taken = sum(isinstance(state, Mapping) for state in states)
        notes = []
        if any(isinstance(state, Stays) for state in states):
            notes.append(f"{taken} of {len(states)} parameters, the others as loaded before")
        if not continues:
            notes.append(self._changes())
        words = f" ({'; '.join(filter(None, notes))})" if any(notes) else ""
        if taken:
            return f"optimizer of {self.leaf.path}{words}"
        if any(self.plan.fields):
            return f"settings of the optimizer of {self.leaf.path}, which has no state{words}"
        return ""

    def _changes(self) -> str:
        """Fields that a script tunes and that the checkpoint changes, and the config that keeps them."""
        changes: dict[str, dict[str, None]] = {}
        for group, fields in zip(self.optimizer.param_groups, self.plan.fields, strict=True):
            for field in ("lr", "weight_decay"):
                before, after = _number(group.get(field)), _number(fields.get(field))
                if before is not None and after is not None and before != after:
                    changes.setdefault(field, {})[f"{before:g} -> {after:g}"] = None
        if not changes:
            return ""
        listed = ", ".join(f"{field} {' and '.join(found)}" for field, found in changes.items())
        keeping = restore_line(optimizer=dict.fromkeys(changes, "config"))
        return f"{listed} as in the checkpoint; to keep yours: {keeping}"

    def _nonfinite(self, states: Sequence[Mapping[str, Any]], fields: Sequence[Mapping[str, Any]]) -> list[str]:
        """Problems for NaN or infinities in the state, and NaN in the fields."""
        file = self.file.source.location.name
        named = [(key, info) for state in states for key, value in state.items() for info in _infos(value)]
        found = self.file.reader.nonfinite([info for _key, info in named])
        keys = dict.fromkeys(key for key, info in named if info in found)
        return [f"{file}: {key} of the optimizer holds NaN or infinities" for key in keys] + [
            f"{file}: {key} of group {number} of the optimizer is NaN"
            for number, values in enumerate(fields)
            for key, value in values.items()
            if isinstance(value, float) and math.isnan(value)
        ]


class LoadSession(WeightsSession):
    """A session of a kind that reads weights and optimizer state from files that it locates."""

    def __init__(self, kind: Any) -> None:
        super().__init__(kind)
        has_state = isinstance(self.config, OptimizerStateConfig) and self.config.load_optim
        self._state_config: OptimizerStateConfig | None = kind.config if has_state else None
        # whether the config declares load_optim, and not the default of the kind
        self._is_asked_for = has_state and type(kind.config).model_fields["load_optim"].default is not True
        self._steps: dict[str, OptimizerStep] = {}
        #: Id of an optimizer -> fields of its groups that schedules of the script set.
        self.scheduled: Mapping[int, frozenset[str]] = {}
        #: Ids of the groups of optimizers that took their state.
        self.loaded_groups: set[int] = set()

    def close_files(self) -> None:
        steps = tuple(self._steps.values())
        self._steps.clear()
        try:
            super().close_files()
        finally:
            close_all(step.file.reader for step in steps)

    def _problems_beside(self, planned: Planned) -> list[Problem]:
        return self.findings(planned)[0]

    def findings(self, planned: Planned) -> tuple[list[Problem], list[Problem]]:
        """Problems and warnings of the optimizers that are known before a change. Reads only headers."""
        if self._state_config is None:
            return [], []
        chosen, without = by_optimizer(planned.opened.leaves)
        problems: list[Problem] = []
        warnings: list[Problem] = []
        if not chosen and self._is_asked_for:
            message = "optimizer state: not planned, the model has no optimizer"
            warnings += [Problem("optimizer", message, path) for path in without]
        warnings += [Problem("optimizer", message, path) for path, message in self.left_state(planned.opened.leaves)]
        for leaf in chosen:
            try:
                step = self._step(leaf, planned)
            except (StateMismatchError, CheckpointNotFoundError, TornSetError) as error:
                messages = list(getattr(error, "problems", ())) or [str(error)]
                if len(messages) > _MOST_PROBLEMS:
                    messages[_MOST_PROBLEMS:] = [f"and {len(messages) - _MOST_PROBLEMS} more"]
                if isinstance(error, StateMismatchError):
                    fresh = f". Next: {self.advice.field('load_optim', False)}"
                    messages = [one if "Next: " in one or "\n" in one else one + fresh for one in messages]
                problems += [Problem("optimizer", f"optimizer state: {message}", leaf.path) for message in messages]
            else:
                # state follows the weights, so that a plan with problems would only repeat them
                if planned.plan.is_fine:
                    warnings += [Problem("optimizer", message, leaf.path) for message in step.plan.warnings]
        return problems, warnings

    def left_state(self, leaves: Sequence[Leaf]) -> list[tuple[str, str]]:
        """(path, message) of models that take no optimizer state although the checkpoint has it."""
        if self._state_config is None or (self._is_asked_for and not by_optimizer(leaves)[0]):
            return []
        return [
            (leaf.path, f"optimizer state: not loaded, {_why_not(leaf)}")
            for leaf in leaves
            if _why_not(leaf) and self.kind.has_state(leaf)
        ]

    def checked_optimizers(self, model: Any) -> list[OptimizerStep]:
        """The steps of all optimizers, planned, read and verified. Changes nothing."""
        config = self._state_config
        if config is None:
            return []
        planned = self.plan(model)
        chosen, without = by_optimizer(planned.opened.leaves)
        for path in without:
            self.kind.logger.info("%s: %s has no optimizer", config.kind, path)
        if without and not chosen and self._is_asked_for:
            raise ConfigError(
                f"load_optim: true, but {', '.join(without)} has no optimizer to load into. "
                f"Next: bind(module, optimizer=...), or {self.advice.field('load_optim', False)}"
            )
        # plan all before the first one is read, which takes long
        steps = [self._step(leaf, planned) for leaf in chosen]
        for step in steps:
            if not step.is_read:
                for warning in step.plan.warnings:
                    self.warn(f"{step.leaf.path}: {warning}")
                for warning in step.read(config):
                    self.warn(warning)
                step.rehearse()
        return steps

    def apply_optimizers(self, model: Any) -> None:
        """Write the state of every optimizer. Everything is verified before the first one changes."""
        steps = self.checked_optimizers(model)
        for step in steps:
            step.check_memory()
        done: list[str] = []
        leaves = [step.leaf for step in steps]
        for step in steps:
            restored = step.restored(continues=self.kind.continues)
            path = step.leaf.path
            with (
                self.writing(f"the optimizer of {path} failed while it took its state", leaves, done),
                self.stopwatch.phase("copy"),
            ):
                # if it raises, it restores the earlier state of this optimizer
                apply_optimizer(step.plan, step.optimizer)
            done.append(path)
            self.loaded_groups |= {id(group) for group in step.optimizer.param_groups}
            if restored:
                self.restored.append(restored)
            self.kind.logger.info("%s: %s", self.config.kind, restored or f"no state for the optimizer of {path}")
        for step in steps:
            step.file.reader.close()
        self._steps.clear()

    def _step(self, leaf: Leaf, planned: Planned) -> OptimizerStep:
        """The step of an optimizer, from the header of its file and the plan of the weights.

        Raises ``StateMismatchError`` with everything that does not fit.
        """
        known, config = self._steps.get(leaf.path), self._state_config
        assert config is not None
        if known is not None:
            if known.fits():
                return known
            file = known.file
        else:
            with self.stopwatch.phase("find"):
                self.kind.select([leaf], "optim")
                source = self.source(leaf, "optim")
            if source is None:
                raise StateMismatchError(f"no optimizer file was found for {leaf.path}")
            file = OpenFile(source, self.kind.open(source))
        try:
            self.kind.check_together({**planned.opened.metadata, file.source.location: file.reader.metadata})
            optimizer = torch_optimizer(leaf.model.optimizer)
            scheduled = self.scheduled.get(id(optimizer), frozenset())
            fields: dict[str, Side] = {**config.restore.fields, **dict.fromkeys(scheduled, "config")}
            if optimizer is not leaf.model.optimizer:  # a wrapper, such as Noether's, adds its own fields to groups
                fields = dict.fromkeys([*fields, "*"], "config")
            plan = plan_optimizer(
                file.reader.metadata,
                optimizer_names(optimizer, leaf.model),
                {name: tuple(parameter.shape) for name, parameter in leaf.model.named_parameters()},
                optimizer.param_groups,
                origins=_origins(leaf, planned.plan, self.loaded_before),
                aliases=parameter_aliases(leaf.model),
                optimizer_class=class_name(optimizer),
                policies=OptimizerPolicies(
                    config.on_missing_state, config.on_unexpected_state, fields, config.restore.fields.keys(), scheduled
                ),
                where=file.source.location.name,
                advice=self.advice,
            )
        except BaseException:
            self._steps.pop(leaf.path, None)
            file.reader.close()
            raise
        step = OptimizerStep(leaf, optimizer, file, plan)
        self._steps[leaf.path] = step
        return step


def _why_not(leaf: Leaf) -> str:
    """Why a model takes no optimizer state, with the next step; empty if it does."""
    if leaf.model.optimizer is None:
        return f"{leaf.path} has no optimizer. Next: bind(module, optimizer=...), or {restore_line(optimizer='skip')}"
    if leaf.model.is_frozen:
        return f"{leaf.path} is frozen. Next: requires_grad_ before initialize, or {restore_line(optimizer='skip')}"
    return ""


def by_optimizer(leaves: Sequence[Leaf]) -> tuple[list[Leaf], list[str]]:
    """Models with an optimizer to load, and paths of models without one; frozen models keep theirs."""
    trained = [leaf for leaf in leaves if not leaf.model.is_frozen]
    chosen = [leaf for leaf in trained if leaf.model.optimizer is not None]
    return chosen, [leaf.path for leaf in trained if leaf.model.optimizer is None]


def _origins(leaf: Leaf, plan: LoadPlan, loaded_before: frozenset[int]) -> dict[str, ParameterOrigin] | None:
    """Name in a model -> origin of its value; None if all names are the same on both sides."""
    named = leaf.model.named_parameters(remove_duplicate=False)
    before = {name for name, parameter in named if id(parameter) in loaded_before}
    origins = {
        row.target: _origin_of(row, was_loaded=row.target in before)
        for row in plan.rows_of(leaf.path)
        if row.target is not None and row.is_parameter
    }
    plain = all(
        origin.sources == (name,)
        and not origin.steps
        and (origin.dtypes is None or origin.dtypes[0] == origin.dtypes[1])
        for name, origin in origins.items()
    )
    return None if plain else origins


def _origin_of(row: PlanRow, *, was_loaded: bool) -> ParameterOrigin:
    if not row.writes:
        return ParameterOrigin(stays=was_loaded or row.rule == LOADED_BEFORE)
    return ParameterOrigin(row.sources, row.steps, row.part, row.source_shapes, (row.source_dtype, row.dtype))


def _infos(value: Any) -> Iterator[TensorInfo]:
    """Every description of a tensor in a stored value."""
    for leaf in nested.leaves(value):
        if isinstance(leaf, TensorInfo):
            yield leaf
        elif isinstance(leaf, Moved):
            yield from _infos(leaf.values)


def _number(value: Any) -> float | None:
    """A field of a group as a number, also from a tensor; None if it is not a number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    return float(value) if isinstance(value, int | float) else None
