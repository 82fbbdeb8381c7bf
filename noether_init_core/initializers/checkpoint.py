"""CheckpointInitializer: weights and optimizer state from the checkpoints of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import attrs
import pydantic
import torch

from noether_init_core.checkpoints.names import parse
from noether_init_core.checkpoints.reader import CheckpointReader
from noether_init_core.checkpoints.sets import said_by
from noether_init_core.checkpoints.store import CheckpointSet, Need, RunStore, check_consistency
from noether_init_core.checkpoints.tensor_info import TensorInfo
from noether_init_core.config.base import InitializerConfig, KindConfig
from noether_init_core.errors import (
    ConfigError,
    PartlyInitializedError,
    StateMismatchError,
)
from noether_init_core.initializers.history import read_histories
from noether_init_core.initializers.source import Leaf, Part, Source, SourceInitializer, SourceInitializerConfig
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider
from noether_init_core.provenance import History
from noether_init_core.surgery.optimizer import (
    Moved,
    OptimizerPlan,
    OptimizerPolicies,
    ParameterOrigin,
    class_name,
    optimizer_names,
    parameter_aliases,
    plan_optimizer,
    torch_optimizer,
)
from noether_init_core.surgery.optimizer_state import apply_optimizer, moved_value
from noether_init_core.surgery.plan import PlanRow

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
        about_state = ("param_groups", "on_missing_state", "on_unexpected_state")
        given = [name for name in about_state if name in self.model_fields_set]
        if given and not self.load_optim:
            raise ValueError(f"{given[0]} is about optimizer state, which is not loaded. Add: load_optim: true")
        return self

    pop_ckpt_kwargs_keys: list[str] | None = pydantic.Field(
        default=None, description="Keys to drop from the stored model_config when a model is rebuilt from it."
    )
    output_path: Path | None = pydantic.Field(
        default=None, description="Output root of the source run; the current run's when null."
    )


@attrs.frozen(eq=False)
class _OptimizerStep:
    leaf: Leaf
    optimizer: torch.optim.Optimizer
    plan: OptimizerPlan
    keep_fields: bool


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
        return Source(
            found.path, digest=selected.digest_of(found), committed=selected.committed_file(found), origin=origin
        )

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
            try:
                apply_optimizer(step.plan, step.optimizer, _as_it_is, keep_fields=step.keep_fields)
            except Exception as error:
                raise PartlyInitializedError(
                    f"{self.config.kind}: the optimizer of {step.leaf.path} failed while it took its state: {error}",
                    done=done,
                    failed=step.leaf.path,
                    pending=[other.leaf.path for other in steps if other.leaf.path not in (*done, step.leaf.path)],
                ) from error
            done.append(step.leaf.path)
            if any(state is not None for group in step.plan.state for state in group):
                self.restored.append(f"optimizer of {step.leaf.path}")
            elif not step.keep_fields:
                self.restored.append(f"settings of the optimizer of {step.leaf.path}, which has no state")
            self.logger.info("%s: optimizer state of %s", self.config.kind, step.leaf.path)
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
        chosen = []
        without = []
        for leaf in self.leaves(model):
            if leaf.model.is_frozen:
                self.logger.info("%s: %s is frozen, its optimizer is left", self.config.kind, leaf.path)
            elif leaf.model.optimizer is None:
                self.logger.info("%s: %s has no optimizer", self.config.kind, leaf.path)
                without.append(leaf.path)
            else:
                chosen.append(leaf)
        if without and not chosen and "load_optim" in self.config.model_fields_set:
            raise ConfigError(
                f"load_optim: true, but {', '.join(without)} has no optimizer to load into. "
                "Next: bind(module, optimizer=...), or load_optim: false"
            )
        return chosen

    def _plan_optimizers(self, model: Any) -> list[_OptimizerStep]:
        leaves = self._optimizer_leaves(model)
        if not leaves:
            return []
        self.before_locating(self.leaves(model))
        self.select([self._need(leaf, "optim") for leaf in leaves])
        origins = self._origins(model)
        policies = OptimizerPolicies(
            self.config.on_missing_state, self.config.on_unexpected_state, self.config.param_groups
        )
        steps = []
        for leaf in leaves:
            reader, source = self.opened(leaf, "optim"), self.source_of(leaf, "optim")
            if reader is None or source is None:
                raise StateMismatchError(f"{leaf.path} has no optimizer file")
            if self._selected is not None:
                said = said_by(reader.metadata, source.path)
                check_consistency({**self._said, source.path.name: said}, self._selected)
            optimizer = torch_optimizer(leaf.model.optimizer)
            names = optimizer_names(optimizer, leaf.model)
            key = leaf.path, id(reader), tuple(map(tuple, names))
            if key not in self._moments:
                plan = plan_optimizer(
                    reader.metadata,
                    names,
                    {name: tuple(parameter.shape) for name, parameter in leaf.model.named_parameters()},
                    origins=origins[leaf.path],
                    aliases=parameter_aliases(leaf.model),
                    current=optimizer.param_groups if optimizer is leaf.model.optimizer else None,
                    optimizer_class=class_name(optimizer),
                    policies=policies,
                    where=source.path.name,
                )
                for warning in plan.warnings:
                    self.logger.warning("%s: %s: %s", self.config.kind, leaf.path, warning)
                self._moments[key] = self._read_moments(leaf, reader, source, plan)
            wrapped = optimizer is not leaf.model.optimizer
            steps.append(_OptimizerStep(leaf, optimizer, self._moments[key], keep_fields=wrapped))
        return steps

    def _origins(self, model: Any) -> dict[str, dict[str, ParameterOrigin] | None]:
        """Path of a model -> name in it -> where its value comes from; None where that is the same name for all."""
        plan = self.planned(model)
        found: dict[str, dict[str, ParameterOrigin] | None] = {}
        for leaf in self.leaves(model):
            origins = {
                row.target: _origin_of(row)
                for row in plan.rows_of(leaf.path)
                if row.target is not None and row.is_parameter
            }
            plain = all(
                origin.sources == (name,) and not origin.steps and not origin.dtypes for name, origin in origins.items()
            )
            found[leaf.path] = None if plain else origins
        return found

    def _read_moments(self, leaf: Leaf, reader: CheckpointReader, source: Source, plan: OptimizerPlan) -> OptimizerPlan:
        """The plan with tensors in place of descriptions: read into the memory that they will stay in, verified and
        looked at in one pass, and carried along with their parameters.
        """
        states = [state for states in plan.state for state in states if state is not None]
        fields = [] if self._keeps_fields(leaf) else list(plan.fields)
        on_nonfinite = self.on_nonfinite
        tensors = reader.read_all(
            tensors_of([*states, *fields]),
            self.config.verify,
            digest=source.digest,
            committed=source.committed,
            look=on_nonfinite != "ignore",
        )
        if on_nonfinite != "ignore":
            self._check_moments(reader, states, source.path.name)
            self._check_fields(fields, source.path.name)
        tree = _Tree(reader, tensors, source.path.name)
        return attrs.evolve(
            plan,
            state=tuple(tuple(None if state is None else tree.of(state) for state in states) for states in plan.state),
            fields=tuple(tree.of(values) for values in plan.fields) if fields else plan.fields,
        )

    @staticmethod
    def _keeps_fields(leaf: Leaf) -> bool:
        return torch_optimizer(leaf.model.optimizer) is not leaf.model.optimizer

    def _check_moments(self, reader: CheckpointReader, states: Sequence[Mapping[str, Any]], file: str) -> None:
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
        if self.config.on_nonfinite == "error":
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

    def __init__(self, reader: CheckpointReader, tensors: dict[TensorInfo, torch.Tensor], where: str) -> None:
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


def _as_it_is(value: Any) -> Any:
    return value


def _origin_of(row: PlanRow) -> ParameterOrigin:
    if not row.writes:
        return ParameterOrigin()
    dtypes = None if row.source_dtype in (None, row.dtype) else (str(row.source_dtype), row.dtype)
    return ParameterOrigin(row.sources, row.steps, row.part, row.source_shapes, dtypes)


def _refuse_meta(step: _OptimizerStep) -> None:
    """Moments go where their parameter is; on the meta device they would be lost."""
    if any(parameter.is_meta for group in step.optimizer.param_groups for parameter in group["params"]):
        raise StateMismatchError(
            f"{step.leaf.path} is on the meta device, so that its optimizer cannot take state yet. "
            "Next: init_weights first, as InitializerStack.initialize does"
        )
