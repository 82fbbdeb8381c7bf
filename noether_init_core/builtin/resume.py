"""The kind ``resume``: continue a run with weights, optimizer, trainer, callbacks and start iteration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pydantic

from noether_init_core.checkpoints.reader import open_checkpoint
from noether_init_core.checkpoints.store import Need, check_consistency
from noether_init_core.config.base import KindConfig
from noether_init_core.errors import (
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    IncompleteSetError,
    StateMismatchError,
)
from noether_init_core.initializers.callbacks import CallbackPlan, apply_callbacks, plan_callbacks
from noether_init_core.initializers.checkpoint import CheckpointInitializer, CheckpointInitializerConfig, said_by
from noether_init_core.initializers.resumption import ResumptionPaths
from noether_init_core.initializers.source import Leaf
from noether_init_core.iteration import TrainingIteration

__all__ = ["ResumeInitializer", "ResumeInitializerConfig"]


class ResumeInitializerConfig(CheckpointInitializerConfig):
    """The config of ``resume``; ``run_id`` null is the current run, ``model_name`` null the only trainer file's."""

    default_kind: ClassVar[str | None] = "resume"

    load_optim: bool = pydantic.Field(default=True, description="Whether the state of the optimizer is loaded.")


class ResumeInitializer(CheckpointInitializer):
    """Continue a run: everything comes from one set, so that no two parts are of different iterations.

    Frozen submodels and submodels without optimizer keep their optimizer as it is. The trainer file is read once.
    """

    config_class: ClassVar[type[KindConfig]] = ResumeInitializerConfig
    contract: ClassVar[int] = 1
    config: ResumeInitializerConfig

    def __init__(self, config: KindConfig, *, path_provider: Any = None) -> None:
        super().__init__(config, path_provider=path_provider)
        self._trainer_state: dict[str, Any] | None = None
        self._root: str | None = None

    def start_checkpoint(self) -> TrainingIteration:
        """The iteration that the trainer file says."""
        return TrainingIteration.from_mapping(self.trainer_state()["training_iteration"])

    def trainer_state(self) -> dict[str, Any]:
        """The content of the trainer file, read and verified once.

        Raises ``CheckpointFormatError`` if it says no full iteration.
        """
        if self._trainer_state is None:
            root = self.root_name()
            selected = self.select([*self._observed_needs(root), Need(root, "trainer")])
            file = selected.file(root, "trainer")
            if file is None:
                raise CheckpointNotFoundError(f"{selected.name} has no trainer file of {root}", path=selected.folder)
            with open_checkpoint(file.path) as reader:
                iteration, run_id = said_by(reader.metadata, file.path)
                if iteration is None or not iteration.is_fully_specified:
                    raise CheckpointFormatError(
                        f"{file.path.name} is no trainer file: it says no training_iteration", path=file.path
                    )
                check_consistency({file.path.name: (iteration, run_id)}, selected)
                reader.verify(self.config.verify, digest=selected.digest_of(file))
                self._trainer_state = dict(reader.load())
        return self._trainer_state

    def root_name(self) -> str:
        """The name of the whole model in the files: ``model_name``, else that of the only trainer file.

        Raises ``AmbiguousCheckpointError`` if there are trainer files of several models.
        """
        if self._root is None:
            self._root = self.config.model_name
        if self._root is None:
            names = self.store.trainer_names()
            if len(names) > 1:
                raise AmbiguousCheckpointError(
                    f"{self.source_paths.checkpoint_path} has trainer files of several models: {', '.join(names)}. "
                    f"Add: model_name: {names[0]}",
                    path=self.source_paths.checkpoint_path,
                    candidates=names,
                )
            if not names:
                self.store.find(self.checkpoint_tag, [Need(None, "trainer")])
                raise CheckpointNotFoundError(
                    f"{self.source_paths.checkpoint_path} has no trainer file", path=self.source_paths.checkpoint_path
                )
            self._root = names[0]
        return self._root

    def file_root(self, name: str, below: str) -> str:
        """The whole model's name in the files, then the names of submodels."""
        return f"{self.root_name()}.{below}" if below else self.root_name()

    def before_locating(self, leaves: Sequence[Leaf]) -> None:
        """Select the set that has the trainer file and the weights of all models."""
        self.trainer_state()
        super().before_locating(leaves)

    def after_opening(self, leaves: Sequence[Leaf]) -> None:
        """Make sure that weights and trainer are of one iteration and one run."""
        super().after_opening(leaves)
        if self._selected is None:
            return
        found: dict[str, tuple[TrainingIteration | None, str | None]] = {"trainer": (self.start_checkpoint(), None)}
        for leaf in leaves:
            reader, source = self.opened(leaf, "model"), self.source_of(leaf, "model")
            if reader is not None and source is not None:
                found[source.path.name] = said_by(reader.metadata, source.path)
        check_consistency(found, self._selected)

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Weights and optimizer as in ``CheckpointInitializer``, then the states of trainer and callbacks."""
        super().check(model, trainer, callbacks)
        state = self.trainer_state()
        if trainer is not None:
            if not callable(getattr(trainer, "load_state_dict", None)):
                raise StateMismatchError(
                    f"the trainer, a {type(trainer).__name__}, has no load_state_dict. "
                    "Next: trainer=TrainerState(...), or give it state_dict and load_state_dict"
                )
            look = getattr(trainer, "check_state_dict", None)
            if callable(look):
                look(copy.copy(state))
        if callbacks:
            self._plan_callbacks(callbacks)

    def init_trainer(self, trainer: Any) -> None:
        """Hand the trainer file's content to ``trainer.load_state_dict``."""
        trainer.load_state_dict(copy.deepcopy(self.trainer_state()))

    def init_callbacks(self, callbacks: list[Any], model: Any) -> None:
        """Hand each callback its state, unless the trainer has done so, then let those that can resume from files."""
        plan = self._plan_callbacks(callbacks)
        for warning in plan.warnings:
            self.logger.warning("%s: %s", self.config.kind, warning)
        apply_callbacks(plan)
        with ResumptionPaths.showing(self.source_paths, self._selected, self.logger) as paths:
            for callback in callbacks:
                resume = getattr(callback, "resume_from_checkpoint", None)
                if callable(resume):
                    resume(resumption_paths=paths, model=model)

    def release(self) -> None:
        """Close every file; the next use reads again."""
        super().release()
        self._trainer_state = None
        self._root = None

    def _plan_callbacks(self, callbacks: Sequence[Any]) -> CallbackPlan:
        saved = self.trainer_state().get("callback_state_dicts", {})
        return plan_callbacks(saved, callbacks, where=f"the trainer file of {self._tag_words()}")

    def _observed_needs(self, root: str) -> list[Need]:
        """What a set of ``root`` has at best: an open tag (``{epoch: 10}``) then means the newest such set."""
        tag = self.checkpoint_tag
        iteration = TrainingIteration.from_mapping(tag) if isinstance(tag, Mapping) else _iteration_or_none(tag)
        if iteration is None or iteration.is_fully_specified:
            return []
        wanted: dict[Need, None] = {}
        for found in self.store.sets():
            for file in found.files:
                below = file.model == root or file.model.startswith(f"{root}.")
                if below and file.info is None and (file.part == "model" or self._loads(file.part)):
                    wanted[Need(file.model, file.part)] = None
        try:
            self.store.find(tag, [*wanted, Need(root, "trainer")])
        except IncompleteSetError:
            return []
        return list(wanted)

    def _loads(self, part: str) -> bool:
        return part == "optim" and self.config.load_optim


def _iteration_or_none(tag: str) -> TrainingIteration | None:
    try:
        return TrainingIteration.from_string(tag)
    except ValueError:
        return None
