"""CheckpointInitializer: weights and optimizer state from the checkpoints of a run."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pydantic
import torch

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
from noether_init_core.initializers.source import Leaf, Part, Source, SourceInitializer, SourceInitializerConfig
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider
from noether_init_core.surgery.optimizer import (
    OptimizerPlan,
    apply_optimizer,
    class_name,
    optimizer_names,
    parameter_aliases,
    plan_optimizer,
    torch_optimizer,
)
from noether_init_core.surgery.plan import WRITING

__all__ = ["CheckpointInitializer", "CheckpointInitializerConfig"]


class CheckpointInitializerConfig(InitializerConfig, SourceInitializerConfig):
    """The config of kinds that read from the checkpoints of a run."""

    load_optim: bool = pydantic.Field(description="Whether the state of the optimizer is loaded too.")
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
    reader: CheckpointReader
    keep_fields: bool
    tensors: dict[TensorInfo, torch.Tensor]


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
        self._said: dict[str, tuple[TrainingIteration | None, str | None]] = {}
        self._moments: dict[tuple[str, int], dict[TensorInfo, torch.Tensor]] = {}

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
            try:
                read = functools.partial(read_tree, step.reader, step.tensors)
                apply_optimizer(step.plan, step.optimizer, read, keep_fields=step.keep_fields)
            except Exception as error:
                raise PartlyInitializedError(
                    f"{self.config.kind}: the optimizer of {step.leaf.path} failed while it took its state: {error}",
                    done=done,
                    failed=step.leaf.path,
                    pending=[other.leaf.path for other in steps if other.leaf.path not in (*done, step.leaf.path)],
                ) from error
            done.append(step.leaf.path)
            self.restored.append(f"optimizer of {step.leaf.path}")
            self.logger.info("%s: optimizer state of %s", self.config.kind, step.leaf.path)
        self._moments.clear()
        for step in steps:
            self._close(step.leaf.path, "optim")

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
        self._selected = None
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
        source_names = self._source_names(model)
        steps = []
        for leaf in leaves:
            reader, source = self.opened(leaf, "optim"), self.source_of(leaf, "optim")
            if reader is None or source is None:
                raise StateMismatchError(f"{leaf.path} has no optimizer file")
            if self._selected is not None:
                said = said_by(reader.metadata, source.path)
                check_consistency({**self._said, source.path.name: said}, self._selected)
            optimizer = torch_optimizer(leaf.model.optimizer)
            plan = plan_optimizer(
                reader.metadata,
                optimizer_names(optimizer, leaf.model),
                {name: tuple(parameter.shape) for name, parameter in leaf.model.named_parameters()},
                source_names=source_names[leaf.path],
                aliases=parameter_aliases(leaf.model),
                current=optimizer.param_groups if optimizer is leaf.model.optimizer else None,
                optimizer_class=class_name(optimizer),
                where=source.path.name,
            )
            for warning in plan.warnings:
                self.logger.warning("%s: %s: %s", self.config.kind, leaf.path, warning)
            wrapped = optimizer is not leaf.model.optimizer
            tensors = self._read_moments(leaf, reader, source, plan)
            steps.append(_OptimizerStep(leaf, optimizer, plan, reader, keep_fields=wrapped, tensors=tensors))
        return steps

    def _source_names(self, model: Any) -> dict[str, dict[str, str | None] | None]:
        """Path of a model -> name in it -> name in the file (None: kept), where the plan of the weights differs.

        None for a model whose names are the same on both sides.
        """
        plan = self.planned(model)
        found: dict[str, dict[str, str | None] | None] = {}
        for leaf in self.leaves(model):
            names: dict[str, str | None] = {
                row.target: row.sources[0] if row.writes else None
                for row in plan.rows_of(leaf.path)
                if row.target is not None and row.is_parameter and row.action in (*WRITING, "keep", "reset")
            }
            found[leaf.path] = names if any(name != source for name, source in names.items()) else None
        return found

    def _read_moments(
        self, leaf: Leaf, reader: CheckpointReader, source: Source, plan: OptimizerPlan
    ) -> dict[TensorInfo, torch.Tensor]:
        """Read the state into the memory that it will stay in, verify it and look at it, in one pass, once per file."""
        key = (leaf.path, id(reader))
        if key not in self._moments:
            states = [state for states in plan.state for state in states if state is not None]
            on_nonfinite = self.on_nonfinite
            self._moments[key] = reader.read_all(
                tensors_of([*states, *([] if self._keeps_fields(leaf) else plan.fields)]),
                self.config.verify,
                digest=source.digest,
                committed=source.committed,
                look=on_nonfinite != "ignore",
            )
            if on_nonfinite != "ignore":
                self._check_moments(reader, states, source.path.name)
        return self._moments[key]

    @staticmethod
    def _keeps_fields(leaf: Leaf) -> bool:
        return torch_optimizer(leaf.model.optimizer) is not leaf.model.optimizer

    def _check_moments(self, reader: CheckpointReader, states: Sequence[Mapping[str, Any]], file: str) -> None:
        """Refuse NaN and infinities in the state."""
        named = [(key, value) for state in states for key, value in state.items() if isinstance(value, TensorInfo)]
        found = reader.nonfinite([value for _key, value in named])
        for key in dict.fromkeys(key for key, value in named if value in found):
            message = f"{file}: {key} of the optimizer holds NaN or infinities"
            if self.config.on_nonfinite == "error":
                raise StateMismatchError(
                    f"{message}. Nothing was changed. To load it all the same: on_nonfinite: warn",
                    problems=[message],
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
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def read_tree(reader: CheckpointReader, tensors: dict[TensorInfo, torch.Tensor], value: Any) -> Any:
    """``value`` with every description of a tensor replaced by the tensor: out of ``tensors``, from where it goes.

    A tensor that is described twice gets memory twice, since each is updated by itself.
    """
    if isinstance(value, TensorInfo):
        tensor = tensors.pop(value, None)
        return reader.read(value) if tensor is None else tensor
    if isinstance(value, Mapping):
        return {key: read_tree(reader, tensors, item) for key, item in value.items()}
    if isinstance(value, list):
        return [read_tree(reader, tensors, item) for item in value]
    if isinstance(value, tuple):
        return tuple(read_tree(reader, tensors, item) for item in value)
    return value
