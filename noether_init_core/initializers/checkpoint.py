"""CheckpointInitializer: weights and optimizer state from the checkpoints of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import attrs
import pydantic
import torch

from noether_init_core.applying.optimizer_state import apply_optimizer, moved_value
from noether_init_core.applying.optimizer_targets import (
    class_name,
    optimizer_names,
    parameter_aliases,
    torch_optimizer,
)
from noether_init_core.config.base import InitializerConfig, KindConfig
from noether_init_core.errors import (
    CheckpointNotFoundError,
    ConfigError,
    PartlyInitializedError,
    StateMismatchError,
    TornSetError,
)
from noether_init_core.files.checkpoint import Checkpoint
from noether_init_core.files.tensor_info import TensorInfo
from noether_init_core.initializers.source import Leaf, Part, Source, SourceInitializer, SourceInitializerConfig
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider
from noether_init_core.sets.checkpoint_set import said_by
from noether_init_core.sets.file_names import parse
from noether_init_core.sets.histories import read_histories
from noether_init_core.sets.provenance import History
from noether_init_core.sets.store import CheckpointSet, Need, RunStore, check_consistency
from noether_init_core.surgery.optimizer_fields import OptimizerPolicies
from noether_init_core.surgery.optimizer_plan import Moved, OptimizerPlan, ParameterOrigin, Stays, plan_optimizer
from noether_init_core.surgery.plan import LOADED_BEFORE, LoadPlan, PlanRow, Problem

__all__ = ["CheckpointInitializer", "CheckpointInitializerConfig"]


class CheckpointInitializerConfig(InitializerConfig, SourceInitializerConfig):
    """The config of kinds that read from the checkpoints of a run."""

    load_optim: bool = pydantic.Field(description="Whether the state of the optimizer is loaded too.")
    param_groups: dict[str, Literal["checkpoint", "config"]] = pydantic.Field(
        default={},
        description="Field of the optimizer's groups (lr, weight_decay; * for all others) -> whose value stays: that "
        "of the checkpoint (the default), or of the optimizer as it is configured now.",
    )
    on_missing_state: Literal["error", "fresh"] = pydantic.Field(
        default="error",
        description="What a parameter leads to whose weights are loaded and that has no optimizer state in the file.",
    )
    on_unexpected_state: Literal["error", "ignore"] | None = pydantic.Field(
        default=None,
        description="What optimizer state leads to of a parameter that is not there: an error; when null a warning "
        "where weights were renamed or left out.",
    )

    @pydantic.model_validator(mode="after")
    def _check_optimizer_fields(self) -> Self:
        about_state: dict[str, Any] = {"param_groups": {}, "on_missing_state": "error", "on_unexpected_state": None}
        given = [name for name, default in about_state.items() if getattr(self, name) != default]
        if given and not self.load_optim:
            raise ValueError(f"{given[0]} is about optimizer state, which is not loaded. Add: load_optim: true")
        return self

    pop_ckpt_kwargs_keys: list[str] | None = pydantic.Field(
        default=None, description="Keys to drop from the stored model_config when a model is rebuilt from it."
    )
    output_path: Path | None = pydantic.Field(
        default=None, description="Output root of the source run; the current run's when null."
    )


#: A plan names so many problems of one optimizer; what is wrong with one parameter is wrong with many.
_MOST_PROBLEMS = 5


@attrs.frozen(eq=False)
class _OptimizerStep:
    """What one optimizer will get. ``keep_fields``: it is inside a wrapper that keeps its own fields of groups."""

    leaf: Leaf
    optimizer: torch.optim.Optimizer
    plan: OptimizerPlan
    keep_fields: bool

    def restored(self, *, continues: bool) -> str:
        """What is restored, in words for the report; empty for nothing. To be asked before it is done."""
        states = [state for group in self.plan.state for state in group]
        taken = sum(isinstance(state, Mapping) for state in states)
        notes = []
        if any(isinstance(state, Stays) for state in states):
            notes.append(f"{taken} of {len(states)} parameters, the others as loaded before")
        if not continues and not self.keep_fields:
            notes.append(self._changes())
        said = f" ({'; '.join(filter(None, notes))})" if any(notes) else ""
        if taken:
            return f"optimizer of {self.leaf.path}{said}"
        if any(self.plan.fields) and not self.keep_fields:
            return f"settings of the optimizer of {self.leaf.path}, which has no state{said}"
        return ""

    def _changes(self) -> str:
        """Where fields that a script tunes become those of the checkpoint, and what keeps them."""
        changes: dict[str, dict[str, None]] = {}
        for group, fields in zip(self.optimizer.param_groups, self.plan.fields, strict=True):
            for field in ("lr", "weight_decay"):
                before, after = _number(group.get(field)), _number(fields.get(field))
                if before is not None and after is not None and before != after:
                    changes.setdefault(field, {})[f"{before:g} -> {after:g}"] = None
        if not changes:
            return ""
        listed = ", ".join(f"{field} {' and '.join(found)}" for field, found in changes.items())
        keeping = ", ".join(f"{field}: config" for field in changes)
        return f"{listed} as in the checkpoint; to keep yours: param_groups: {{{keeping}}}"


class CheckpointInitializer(SourceInitializer):
    """Weights, and with ``load_optim`` optimizer state, of one set of checkpoints of a run.

    Every file comes from one set: the same tag, the same training iteration. Base of ``previous_run`` and ``resume``;
    it can be derived from and is not a kind itself.

    Raises ``ConfigError`` if no run can be told from the config and the path provider.
    """

    config_class: ClassVar[type[KindConfig]] = CheckpointInitializerConfig
    config: CheckpointInitializerConfig

    def __init__(self, config: KindConfig, *, path_provider: Any = None) -> None:
        super().__init__(config, path_provider=path_provider)
        self.source_paths = self._source_paths()
        self.store = RunStore(self.source_paths)
        self._selected: CheckpointSet | None = None
        #: What the headers of opened files say: name -> (iteration, run id).
        self._histories: dict[str, History] | None = None
        self._said: dict[str, tuple[TrainingIteration | None, str | None]] = {}
        # what was read for one file and one layout of groups
        self._moments: dict[tuple[Any, ...], OptimizerPlan] = {}

    @property
    def checkpoint_tag(self) -> str | dict[str, int]:
        """The tag that is asked for; ``latest`` where the config says none."""
        return self.config.checkpoint_tag if self.config.checkpoint_tag is not None else "latest"

    @property
    def selected_set(self) -> CheckpointSet | None:
        """The set that everything comes from; None before it is selected."""
        return self._selected

    def select(self, needs: Sequence[Need]) -> CheckpointSet:
        """The set that the tag means. It is decided once; a later call only makes sure that it has ``needs``.

        Raises ``CheckpointNotFoundError``, ``IncompleteSetError`` or ``AmbiguousCheckpointError``.
        """
        if self._selected is None:
            self._selected = self.store.find(self.checkpoint_tag, needs)
            self._look_at_run(self._selected)
            self.logger.info("%s: %s is %s", self.config.kind, self.checkpoint_tag, self._selected.folder)
        else:
            self.store.require(self._selected, needs)
        return self._selected

    def locate(self, model_name: str, part: Part) -> Source | None:
        """The file of the selected set. Optimizer state belongs to the plain weights, whatever ``model_info`` says."""
        info = self.config.model_info if part == "model" else None
        selected = self._selected
        if selected is None:
            selected = self.select([Need(model_name, part, info)])
        found = selected.file(model_name, part, info)
        if found is None:
            return None
        origin = {"run_id": self.source_paths.run_id, "tag": self._tag_words()}
        if self.source_paths.stage_name is not None:
            origin["stage_name"] = self.source_paths.stage_name
        iteration = self.store.iteration_of(selected)
        if iteration is not None:
            origin["iteration"] = str(iteration)
        return Source(found.path, digest=selected.digest_of(found), committed=selected.digests_of(found), origin=origin)

    def file_root(self, name: str, below: str) -> str:
        """``model_name`` where the config says it, also for a composite."""
        return self.config.model_name or super().file_root(name, below)

    def before_locating(self, leaves: Sequence[Leaf]) -> None:
        """Select the set that has the weights of all models."""
        self.select([self._need(leaf, "model") for leaf in leaves])

    def after_opening(self, leaves: Sequence[Leaf]) -> None:
        """Make sure that the files of the set are of one iteration and one run."""
        found: dict[str, tuple[TrainingIteration | None, str | None]] = {}
        for leaf in leaves:
            reader, source = self.opened(leaf, "model"), self.source_of(leaf, "model")
            if reader is not None and source is not None:
                found[source.path.name] = said_by(reader.metadata, source.path)
        if self._selected is not None:
            check_consistency(found, self._selected)
        self._said.update(found)

    def plan_weights(self, model: Any) -> LoadPlan:
        """As in ``SourceInitializer``, with what stands in the way of the optimizer as problems of code ``optimizer``.

        Of the optimizer's file only the header is read, too.
        """
        plan = super().plan_weights(model)
        if not self.config.load_optim:
            return plan
        problems, warnings = self._optimizer_findings(model, plan)
        return attrs.evolve(plan, problems=(*plan.problems, *problems), warnings=(*plan.warnings, *warnings))

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Weights as in ``SourceInitializer``, and the state of every optimizer that will be loaded."""
        super().check(model, trainer, callbacks)
        self._plan_optimizers(model)

    def init_optimizer(self, model: Any) -> None:
        """Restore the optimizer state by parameter name; nothing with ``load_optim: false``.

        Everything is planned and verified before the first optimizer changes.
        """
        done: list[str] = []
        steps = self._plan_optimizers(model)
        for step in steps:
            _refuse_meta(step)
        for step in steps:
            restored = step.restored(continues=self.continues)
            try:
                with self.stopwatch.phase("copy"):
                    apply_optimizer(step.plan, step.optimizer, _as_it_is, keep_fields=step.keep_fields)
            except Exception as error:
                raise PartlyInitializedError(
                    f"{self.config.kind}: the optimizer of {step.leaf.path} failed while it took its state: {error}",
                    done=done,
                    failed=step.leaf.path,
                    pending=[other.leaf.path for other in steps if other.leaf.path not in (*done, step.leaf.path)],
                ) from error
            done.append(step.leaf.path)
            if restored:
                self.restored.append(restored)
            self.logger.info("%s: %s", self.config.kind, restored or f"no state for the optimizer of {step.leaf.path}")
        self._moments.clear()
        for step in steps:
            self._close(step.leaf.path, "optim")

    def history_of(self, model: str) -> History:
        """What the set says of where its weights came from; nothing where it says nothing."""
        file = self.last_sources[model].path.name
        parsed = parse(file)
        if self._selected is None or parsed is None:
            return {}
        if self._histories is None:
            self._histories = read_histories(self._selected)
        return self._histories.get(parsed.model, {})

    def stored_model_config(self, model_name: str) -> dict[str, Any]:
        """The ``model_config`` stored with the weights, without ``pop_ckpt_kwargs_keys``.

        Raises ``ConfigError`` where the file has none or a key to drop is absent.
        """
        self.select([Need(model_name, "model", self.config.model_info)])
        leaf = Leaf(model_name, (model_name,), None)
        reader = self.opened(leaf, "model")
        stored = None if reader is None else reader.metadata.get("model_config")
        self._close(model_name, "model")
        if not isinstance(stored, Mapping):
            raise ConfigError(f"the file of {model_name} at {self._tag_words()} stores no model_config")
        dropped = self.config.pop_ckpt_kwargs_keys or []
        absent = [key for key in dropped if key not in stored]
        if absent:
            raise ConfigError(
                f"pop_ckpt_kwargs_keys: the stored model_config has no {', '.join(absent)}; it has "
                f"{', '.join(map(str, stored))}"
            )
        return {key: value for key, value in stored.items() if key not in dropped}

    def at_first(self) -> dict[str, Any]:
        """The set that the tag means is looked up anew."""
        return {**super().at_first(), "_selected": None, "_histories": None, "_said": {}, "_moments": {}}

    def release(self) -> None:
        """Close every file and forget which set the tag meant."""
        super().release()
        self._selected = self._histories = None
        self._said.clear()
        self._moments.clear()

    def _need(self, leaf: Leaf, part: Part) -> Need:
        """The first name of the model that some set has, else its full path."""
        info = self.config.model_info if part == "model" else None
        if len(leaf.file_names) > 1:
            known = {file.model for found in self.store.sets() for file in found.files if file.part == part}
            for name in leaf.file_names:
                if name in known:
                    return Need(name, part, info)
        return Need(leaf.file_names[0], part, info)

    def _look_at_run(self, selected: CheckpointSet) -> None:
        """Tell of a committed set that another run or stage wrote: its folder was copied, or has another name now."""
        message = other_run(selected, self.source_paths)
        if message:
            self.logger.warning("%s: %s", self.config.kind, message)

    def _tag_words(self) -> str:
        tag = self.checkpoint_tag
        return str(TrainingIteration.from_mapping(tag)) if isinstance(tag, Mapping) else tag

    def _source_paths(self) -> PathProvider:
        config, current = self.config, self.path_provider
        if current is None:
            if config.output_path is None or config.run_id is None:
                raise ConfigError(
                    f"{config.kind} needs path_provider=PathProvider(output_root, run_id), or output_path and run_id "
                    "in its config"
                )
            return PathProvider(config.output_path, config.run_id, config.stage_name)
        stage = config.stage_name
        if config.run_id is None and stage is None:
            stage = current.stage_name
        return current.with_run(config.run_id, stage, output_root=config.output_path)

    def _optimizer_leaves(self, model: Any) -> list[Leaf]:
        """Models whose optimizer state is loaded: those with an optimizer that are not frozen."""
        if not self.config.load_optim:
            return []
        chosen, without, frozen = self._by_optimizer(model)
        for path in frozen:
            self.logger.info("%s: %s is frozen, its optimizer is left", self.config.kind, path)
        for path in without:
            self.logger.info("%s: %s has no optimizer", self.config.kind, path)
        if without and not chosen and self._optimizer_is_asked_for:
            raise ConfigError(
                f"load_optim: true, but {', '.join(without)} has no optimizer to load into. "
                "Next: bind(module, optimizer=...), or load_optim: false"
            )
        return chosen

    @property
    def _optimizer_is_asked_for(self) -> bool:
        """Whether the config asks for optimizer state that the kind would not load by itself."""
        return self.config.load_optim and type(self.config).model_fields["load_optim"].default is not True

    def _by_optimizer(self, model: Any) -> tuple[list[Leaf], list[str], list[str]]:
        """Models with an optimizer to load, paths of those that have none, and of those that are frozen."""
        chosen, without, frozen = [], [], []
        for leaf in self.leaves(model):
            if leaf.model.is_frozen:
                frozen.append(leaf.path)
            elif leaf.model.optimizer is None:
                without.append(leaf.path)
            else:
                chosen.append(leaf)
        return chosen, without, frozen

    def _optimizer_findings(self, model: Any, plan: LoadPlan) -> tuple[list[Problem], list[Problem]]:
        """What is known beforehand of the optimizers: problems, and warnings."""
        chosen, without, _frozen = self._by_optimizer(model)
        problems: list[Problem] = []
        warnings: list[Problem] = []
        if not chosen and self._optimizer_is_asked_for:
            message = "optimizer state: not planned, the model has no optimizer"
            warnings += [Problem("optimizer", message, path) for path in without]
        for leaf in chosen:
            try:
                self.select([self._need(leaf, "optim")])
                decided = self._decide(leaf, plan)
            except (StateMismatchError, CheckpointNotFoundError, TornSetError) as error:
                messages = list(getattr(error, "problems", ())) or [str(error)]
                shown = messages[:_MOST_PROBLEMS]
                if len(messages) > len(shown):
                    shown.append(f"and {len(messages) - len(shown)} more")
                problems += [Problem("optimizer", f"optimizer state: {message}", leaf.path) for message in shown]
            else:
                # state follows the weights: what a plan with problems makes of it tells nobody anything
                if plan.is_fine:
                    warnings += [Problem("optimizer", message, leaf.path) for message in decided.plan.warnings]
        return problems, warnings

    def _plan_optimizers(self, model: Any) -> list[_OptimizerStep]:
        """What each optimizer will get, decided and read."""
        leaves = self._optimizer_leaves(model)
        if not leaves:
            return []
        with self.stopwatch.phase("find"):
            self.before_locating(self.leaves(model))
            self.select([self._need(leaf, "optim") for leaf in leaves])
        plan = self.planned(model)
        steps = []
        for leaf in leaves:
            optimizer = torch_optimizer(leaf.model.optimizer)
            reader, source = self._opened_state(leaf)
            key = leaf.path, id(reader), tuple(map(tuple, optimizer_names(optimizer, leaf.model)))
            if key not in self._moments:
                decided = self._decide(leaf, plan)
                for warning in decided.plan.warnings:
                    self.logger.warning("%s: %s: %s", self.config.kind, leaf.path, warning)
                self._moments[key] = self._read_moments(leaf, reader, source, decided.plan)
            steps.append(_OptimizerStep(leaf, optimizer, self._moments[key], keep_fields=self._keeps_fields(leaf)))
        return steps

    def _opened_state(self, leaf: Leaf) -> tuple[Checkpoint, Source]:
        """The optimizer's file, which is of the same iteration and run as the weights."""
        reader, source = self.opened(leaf, "optim"), self.source_of(leaf, "optim")
        if reader is None or source is None:
            raise StateMismatchError(f"{leaf.path} has no optimizer file")
        if self._selected is not None:
            said = said_by(reader.metadata, source.path)
            check_consistency({**self._said, source.path.name: said}, self._selected)
        return reader, source

    def _decide(self, leaf: Leaf, plan: LoadPlan) -> _OptimizerStep:
        """What an optimizer will get, by the header of its file and the plan of the weights; nothing else is read."""
        reader, source = self._opened_state(leaf)
        optimizer = torch_optimizer(leaf.model.optimizer)
        keeps_fields = self._keeps_fields(leaf)
        fields = self.config.param_groups
        decided = plan_optimizer(
            reader.metadata,
            optimizer_names(optimizer, leaf.model),
            {name: tuple(parameter.shape) for name, parameter in leaf.model.named_parameters()},
            origins=self._origins(leaf, plan),
            aliases=parameter_aliases(leaf.model),
            current=optimizer.param_groups,
            optimizer_class=class_name(optimizer),
            policies=OptimizerPolicies(
                self.config.on_missing_state,
                self.config.on_unexpected_state,
                dict.fromkeys([*fields, "*"], "config") if keeps_fields else fields,
            ),
            where=source.path.name,
        )
        return _OptimizerStep(leaf, optimizer, decided, keep_fields=keeps_fields)

    def _origins(self, leaf: Leaf, plan: LoadPlan) -> dict[str, ParameterOrigin] | None:
        """Name in a model -> where its value comes from; None where that is the same name for all."""
        named = leaf.model.named_parameters(remove_duplicate=False)
        before = {name for name, parameter in named if id(parameter) in self.loaded_before}
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

    def _read_moments(self, leaf: Leaf, reader: Checkpoint, source: Source, plan: OptimizerPlan) -> OptimizerPlan:
        """The plan with tensors in place of descriptions: read into the memory that they will stay in, verified and
        looked at in one pass, and carried along with their parameters.
        """
        states = [state for states in plan.state for state in states if isinstance(state, Mapping)]
        fields = [] if self._keeps_fields(leaf) else list(plan.fields)
        on_nonfinite = self.on_nonfinite
        tensors = reader.read_all(
            tensors_of([*states, *fields]),
            verify=self.config.verify == "full",
            look=on_nonfinite != "ignore",
        )
        if on_nonfinite != "ignore":
            self._check_moments(reader, states, source.path.name)
            self._check_fields(fields, source.path.name)
        tree = _Tree(reader, tensors, source.path.name)
        with self.stopwatch.phase("copy"):
            return attrs.evolve(
                plan,
                state=tuple(tuple(map(tree.of, states)) for states in plan.state),
                fields=tuple(tree.of(values) for values in plan.fields) if fields else plan.fields,
            )

    @staticmethod
    def _keeps_fields(leaf: Leaf) -> bool:
        return torch_optimizer(leaf.model.optimizer) is not leaf.model.optimizer

    def _check_moments(self, reader: Checkpoint, states: Sequence[Mapping[str, Any]], file: str) -> None:
        """Refuse NaN and infinities in the state."""
        named = [(key, info) for state in states for key, value in state.items() for info in tensors_of(value)]
        found = reader.nonfinite([info for _key, info in named])
        for key in dict.fromkeys(key for key, info in named if info in found):
            self._found_nonfinite(f"{file}: {key} of the optimizer holds NaN or infinities")

    def _check_fields(self, fields: Sequence[Mapping[str, Any]], file: str) -> None:
        for number, values in enumerate(fields):
            for key, value in values.items():
                if isinstance(value, float) and math.isnan(value):
                    self._found_nonfinite(f"{file}: {key} of group {number} of the optimizer is NaN")

    def _found_nonfinite(self, message: str) -> None:
        if self.on_nonfinite == "error":
            raise StateMismatchError(
                f"{message}. Nothing was changed. To load it all the same: on_nonfinite: warn", problems=[message]
            )
        self.logger.warning("%s: %s", self.config.kind, message)


def other_run(selected: CheckpointSet, asked: PathProvider) -> str:
    """What is to be said of a committed set that is not of the run and stage that were asked for; else empty."""
    if not selected.committed or (selected.run_id, selected.stage_name) == (asked.run_id, asked.stage_name):
        return ""
    said, here = (
        f"run {run_id}" + (f", stage {stage_name}" if stage_name is not None else "")
        for run_id, stage_name in ((selected.run_id, selected.stage_name), (asked.run_id, asked.stage_name))
    )
    return f"{selected.folder} was written by {said}, and is read as {here}: the folder was renamed or copied"


def tensors_of(value: Any) -> Iterator[TensorInfo]:
    """Every description of a tensor in a stored value."""
    if isinstance(value, TensorInfo):
        yield value
    elif isinstance(value, Moved):
        for item in value.values:
            yield from tensors_of(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


class _Tree:
    """Stored values with tensors in place of their descriptions.

    A tensor that is described twice gets memory twice, since each is updated by itself.
    """

    def __init__(self, reader: Checkpoint, tensors: dict[TensorInfo, torch.Tensor], where: str) -> None:
        self._reader, self._tensors, self._where = reader, tensors, where
        self._given: set[TensorInfo] = set()

    def of(self, value: Any) -> Any:
        if isinstance(value, TensorInfo):
            tensor = self._tensors.get(value)
            if tensor is None or value in self._given:
                return self._reader.read(value)
            self._given.add(value)
            return tensor
        if isinstance(value, Moved):
            if not value.steps and value.dtype is None:
                values = [self.of(item) for item in value.values]
            else:  # what is made of them has memory of its own
                values = [self._tensors[item] if item in self._tensors else self.of(item) for item in value.values]
            return moved_value(value, values, self._where)
        if isinstance(value, Mapping):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item) for item in value]
        if isinstance(value, tuple):
            return tuple(self.of(item) for item in value)
        return value


def _number(value: Any) -> float | None:
    """A field of a group as a number, also out of a tensor; None for what is none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    return float(value) if isinstance(value, int | float) else None


def _as_it_is(value: Any) -> Any:
    return value


def _origin_of(row: PlanRow, *, was_loaded: bool) -> ParameterOrigin:
    if not row.writes:
        return ParameterOrigin(stays=was_loaded or row.rule == LOADED_BEFORE)
    return ParameterOrigin(row.sources, row.steps, row.part, row.source_shapes, (row.source_dtype, row.dtype))


def _refuse_meta(step: _OptimizerStep) -> None:
    """Moments go where their parameter is; on the meta device they would be lost."""
    if any(parameter.is_meta for group in step.optimizer.param_groups for parameter in group["params"]):
        raise StateMismatchError(
            f"{step.leaf.path} is on the meta device, so that its optimizer cannot take state yet. "
            "Next: init_weights first, as InitializerStack.initialize does"
        )
