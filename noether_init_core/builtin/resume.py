"""The kind ``resume``: continue a run with weights, optimizer, trainer, callbacks and start iteration."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pydantic

from noether_init_core.config.base import KindConfig
from noether_init_core.errors import (
    AmbiguousCheckpointError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    IncompleteSetError,
    PlanError,
    StateMismatchError,
    TornSetError,
    UnsafeGlobalError,
    type_of,
)
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.initializers.callbacks import CallbackPlan, apply_callbacks, plan_callbacks
from noether_init_core.initializers.checkpoint import CheckpointInitializer, CheckpointInitializerConfig, other_run
from noether_init_core.initializers.resumption import check_resumption, resume_callbacks
from noether_init_core.initializers.source import Leaf
from noether_init_core.initializers.states import StatesBefore
from noether_init_core.iteration import TrainingIteration
from noether_init_core.sets import refusals
from noether_init_core.sets.checkpoint_set import check_files, said_by
from noether_init_core.sets.file_names import Part
from noether_init_core.sets.looking import walk_back
from noether_init_core.sets.nonfinite_sets import not_looked_at, refused_values, summary
from noether_init_core.sets.selection import Policy, Query
from noether_init_core.sets.store import CheckpointFile, CheckpointSet, Need, RunStore, check_consistency

__all__ = ["ResumeInitializer", "ResumeInitializerConfig"]


#: Under this key a trainer file holds what ``TrainerState`` keeps.
_TRAINER_STATE = "trainer_state"


class ResumeInitializerConfig(CheckpointInitializerConfig):
    """The config of ``resume``; ``run_id`` null is the current run, ``model_name`` null the only trainer file's.

    With ``run_id`` null, a set that another run wrote is refused: its folder was copied or renamed. With ``run_id`` it
    is taken, with a warning.
    """

    default_kind: ClassVar[str | None] = "resume"

    load_optim: bool = pydantic.Field(default=True, description="Whether the state of the optimizer is loaded.")
    on_invalid: Literal["error", "previous"] = pydantic.Field(
        default="error",
        description="What a broken set, or one that on_nonfinite refuses, leads to, where the tag is an open one "
        "(latest, last, E10): an error, or the newest good set before it.",
    )


class ResumeInitializer(CheckpointInitializer):
    """Continue a run: everything comes from one set, so that no two parts are of different iterations.

    Frozen submodels and submodels without optimizer keep their optimizer as it is. The trainer file is read once.

    With ``on_invalid: previous`` every file of the set is verified before the start iteration is told, and a broken set
    that an open tag means gives way to the newest good one before it. A tag that names one set never does. A set with
    NaN is a broken one unless ``on_nonfinite`` says otherwise.

    Args:
        config: A ``ResumeInitializerConfig``.
        path_provider: The folders of the run.
        auto_resume: The stack's ``auto_resume`` asks. With ``on_invalid: previous`` and no ``checkpoint_tag`` it begins
            with the newest set, whatever its tags; errors advise what can be said beside it.

    Attributes:
        passed_over: (set, why) of each broken set that was passed over, newest first.
        not_restored: What the set has and ``check`` was given nothing to take it, in words.
        weights_alone: Set to True where nothing will be trained: what a trainer would take is left.
    """

    config_class: ClassVar[type[KindConfig]] = ResumeInitializerConfig
    contract: ClassVar[int] = 1
    config: ResumeInitializerConfig

    def __init__(self, config: KindConfig, *, path_provider: Any = None, auto_resume: bool = False) -> None:
        super().__init__(config, path_provider=path_provider)
        self.store = RunStore(self.source_paths, asked_by="auto_resume" if auto_resume else "resume")
        self.passed_over: tuple[tuple[str, str], ...] = ()
        self.not_restored: tuple[str, ...] = ()
        self.weights_alone = False
        self._is_automatic = auto_resume or Query.of(self.checkpoint_tag).automatic
        self._any_tag = auto_resume and self.config.checkpoint_tag is None
        self._trainer_state: dict[str, Any] | None = None
        self._root: str | None = None
        self._told_name = False

    @property
    def continues(self) -> bool:
        """Whether the run that is resumed is the one that is started, and not a copy under another run id."""
        current, source = self.path_provider, self.source_paths
        return current is not None and (current.run_id, current.stage_name) == (source.run_id, source.stage_name)

    def start_checkpoint(self) -> TrainingIteration:
        """The iteration that the trainer file says."""
        with self._saying_ways_on():
            return self._start()

    def _start(self) -> TrainingIteration:
        return TrainingIteration.from_mapping(self.trainer_state()["training_iteration"])

    @property
    def resumed_set(self) -> str | None:
        """The folder of the set that is resumed; None before it is selected."""
        return None if self._selected is None else str(self._selected.folder)

    def trainer_state(self) -> dict[str, Any]:
        """The content of the trainer file, read and verified once.

        Raises ``CheckpointFormatError`` if it says no full iteration, ``NoGoodSetError`` if every set that could be
        walked back to is broken.
        """
        if self._trainer_state is None:
            with self.stopwatch.phase("find"):
                if self._walks_back:
                    self._trainer_state = self._select_good()
                else:
                    root = self.root_name()
                    selected = self.select([*self._observed_needs(root), Need(root, "trainer")])
                    self._trainer_state = self._read_trainer(selected, root)
        return self._trainer_state

    @property
    def _walks_back(self) -> bool:
        return self.config.on_invalid == "previous" and Query.of(self.checkpoint_tag).automatic

    def _select_good(self) -> dict[str, Any]:
        """Select the newest good set that the tag leads to; returns the state of its trainer."""
        # without a readable manifest no model is known, and no set will be chosen either
        root = self.root_name() if self.config.model_name or self.store.trainer_names() else None
        parts: tuple[Part, ...] = ("model", "optim") if self.config.load_optim else ("model",)
        selected, state = walk_back(
            self.store.snapshot,
            self.checkpoint_tag,
            lambda found: self._prove(found, root),
            [Need(root, "trainer")],
            Policy(any_tag=self._any_tag, walk_back=True, root=root, parts=parts),
            asked_by=self.store.asked_by,
        )
        chosen = selected.found
        self._look_at_run(chosen)
        self._selected, self.passed_over = chosen, selected.passed_over
        for name, reason in selected.passed_over:
            self.logger.warning("%s: passed over %s: %s", self.config.kind, name, reason)
        if selected.passed_over:
            self.logger.warning("%s: walked back to %s, %s", self.config.kind, chosen.name, chosen.folder)
        else:
            self.logger.info("%s: %s is %s", self.config.kind, self.checkpoint_tag, chosen.folder)
        return state

    def _prove(self, found: CheckpointSet, root: str | None) -> dict[str, Any]:
        """Verify every file of the set as ``verify`` says; returns the state of the trainer.

        Beside flat files there may be averages of another iteration, which Noether saves at times of their own.
        Of values that the load would refuse an older set may be free.
        """
        check_files(found)
        said: dict[str, tuple[TrainingIteration | None, str | None]] = {}
        for file in found.files:
            is_below = root is None or file.model == root or file.model.startswith(f"{root}.")
            if not is_below or not (found.committed or file.info in (None, self.config.model_info)):
                continue
            with open_checkpoint(file.path, digests=found.digests_of(file), stopwatch=self.stopwatch) as reader:
                if file.part != "optim":
                    said[file.path.name] = said_by(reader.metadata, file.path)
                committed = found.committed_file(file)
                looked_at = not_looked_at(file, committed, reader.tensors()) if self._refuses_values_of(file) else []
                if self.config.verify == "full":
                    reader.verify(look=looked_at)
                if self._refuses_values_of(file):
                    refused = refused_values(file, committed, reader.nonfinite(looked_at))
                    if refused:
                        raise CheckpointError(
                            f"{file.path}: {summary(refused)}; it would be loaded with on_nonfinite: warn",
                            path=file.path,
                        )
        check_consistency(said, found)
        return self._read_trainer(found, root)

    def _refuses_values_of(self, file: CheckpointFile) -> bool:
        """Whether NaN in the file would be an error: if it is loaded, as far as that is known without a model."""
        if self.on_nonfinite != "error":
            return False
        return file.info == self.config.model_info if file.part == "model" else self._loads(file.part)

    def _read_trainer(self, selected: CheckpointSet, root: str | None) -> dict[str, Any]:
        file = selected.file(root, "trainer")
        if file is None:
            raise CheckpointNotFoundError(f"{selected.name} has no trainer file of {root}", path=selected.folder)
        with open_checkpoint(file.path, digests=selected.digest_of(file), stopwatch=self.stopwatch) as reader:
            iteration, run_id = said_by(reader.metadata, file.path)
            if iteration is None or not iteration.is_fully_specified:
                raise CheckpointFormatError(
                    f"{file.path.name} is no trainer file: it says no training_iteration", path=file.path
                )
            check_consistency({file.path.name: (iteration, run_id)}, selected)
            if self.config.verify == "full":
                reader.verify()
            return dict(reader.load())

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
                    f"Add: {refusals.model_line(names[0], self.store.asked_by)}",
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
        if name != self.root_name() and self.config.model_name is None and not self._told_name:
            self._told_name = True
            self.logger.warning(
                "%s: the model is called %s, the only trainer file is of %s, which is taken. "
                "If that is meant, say model_name: %s",
                self.config.kind,
                name,
                self.root_name(),
                self.root_name(),
            )
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
        run_id = self.trainer_state().get("run_id")
        found: dict[str, tuple[TrainingIteration | None, str | None]] = {
            "trainer": (self._start(), run_id if isinstance(run_id, str) else None)
        }
        for leaf in leaves:
            reader, source = self.opened(leaf, "model"), self.source_of(leaf, "model")
            if reader is not None and source is not None:
                found[source.path.name] = said_by(reader.metadata, source.path)
        check_consistency(found, self._selected)
        self._said.update(found)

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Weights and optimizer as in ``CheckpointInitializer``, then the states of trainer and callbacks."""
        with self._saying_ways_on():
            self._check(model, trainer, callbacks)

    def _check(self, model: Any, trainer: Any, callbacks: list[Any] | None) -> None:
        super().check(model, trainer, callbacks)
        state = self.trainer_state()
        if self.weights_alone:
            self.not_restored = ("everything but weights, since nothing is trained here",)
            return
        if trainer is None and _TRAINER_STATE in state:
            members = ", ".join(["the position in the data", "random generators", *_members(state)])
            raise StateMismatchError(
                f"{self._tag_words()} has the state of a training loop ({members}), but no trainer was given to "
                "restore it. Next: stack.initialize(model, trainer=state); for weights alone: kind: previous_run"
            )
        if trainer is not None:
            if not callable(getattr(trainer, "load_state_dict", None)):
                raise StateMismatchError(
                    f"the trainer, {type_of(trainer)}, has no load_state_dict. "
                    "Next: trainer=TrainerState(...), or give it state_dict and load_state_dict"
                )
            look = getattr(trainer, "check_state_dict", None)
            if callable(look):
                look(copy.copy(state))
        if callbacks:
            self._plan_callbacks(callbacks)
            check_resumption(callbacks)
        self.not_restored = self._left_callbacks() if callbacks is None else ()
        for what in self.not_restored:
            self.logger.warning("%s: %s", self.config.kind, what)

    @contextlib.contextmanager
    def _saying_ways_on(self) -> Iterator[None]:
        """Add to the error of a broken set which older one there is, and what a config can say; its class stays."""
        try:
            yield
        except (CheckpointCorruptError, CheckpointFormatError, TornSetError) as error:
            # another set would hold the same names; and where none was selected, the store has said it all
            if self._selected is not None and not isinstance(error, UnsafeGlobalError):
                error.add(f". {self._ways_on(self._selected)}")
            raise
        except (PlanError, IncompleteSetError, AmbiguousCheckpointError) as error:
            if self.store.asked_by == "auto_resume" and "auto_resume: {" not in str(error):
                error.add("\nWhat resume can be told stands in auto_resume: auto_resume: {key: value}")
            raise

    def _ways_on(self, broken: CheckpointSet) -> str:
        good = self.store.older_good(broken)
        asked = TrainingIteration() if self.store.asked_by == "auto_resume" else Query.of(self.checkpoint_tag).iteration
        is_asked = good is not None and (asked is None or good.iteration is None or asked.matches(good.iteration))
        may_walk_back = self._is_automatic and is_asked and self.config.on_invalid == "error"
        return refusals.ways_on(self.store.snapshot, good, self.store.asked_by, may_walk_back=may_walk_back)

    def init_trainer(self, trainer: Any) -> None:
        """Hand the trainer file's content to ``trainer.load_state_dict``; if that raises, its state is put back."""
        state = self.trainer_state()
        with StatesBefore.kept(trainer):
            trainer.load_state_dict(copy.deepcopy(state))
        self.restored.append(": ".join(filter(None, ("trainer", ", ".join(_members(state))))))

    def init_callbacks(self, callbacks: list[Any], model: Any) -> None:
        """Hand each callback its state, unless the trainer has done so, then let those that can resume from files."""
        plan = self._plan_callbacks(callbacks)
        for warning in plan.warnings:
            self.logger.warning("%s: %s", self.config.kind, warning)
        with StatesBefore.kept(None, callbacks):
            apply_callbacks(plan)
            resume_callbacks(callbacks, model, self.source_paths, self._selected, self.logger)
        if plan.states:
            self.restored.append(f"{len(plan.states)} callback{'s' if len(plan.states) > 1 else ''}")

    def _look_at_run(self, selected: CheckpointSet) -> None:
        """A run that says nothing of another one goes on from its own sets only. Naming the run makes it a choice."""
        message = other_run(selected, self.source_paths)
        if message and self.config.run_id is None:
            self._selected = None
            raise CheckpointError(
                f"{message}. Nothing was changed. Next: if it is meant, say so: kind: resume with "
                f"run_id: {self.source_paths.run_id}; otherwise a run_id of its own for each run",
                path=selected.folder,
            )
        super()._look_at_run(selected)

    def at_first(self) -> dict[str, Any]:
        """The trainer's state is read anew."""
        return {**super().at_first(), "_trainer_state": None, "_root": None, "passed_over": (), "not_restored": ()}

    def release(self) -> None:
        """Close every file; the next use reads again."""
        super().release()
        self._trainer_state = None
        self._root = None

    def _plan_callbacks(self, callbacks: Sequence[Any]) -> CallbackPlan:
        saved = self.trainer_state().get("callback_state_dicts", {})
        return plan_callbacks(saved, callbacks, where=f"the trainer file of {self._tag_words()}")

    def _left_callbacks(self) -> tuple[str, ...]:
        """That there are states of callbacks, for a start to which no callbacks are given."""
        saved = self.trainer_state().get("callback_state_dicts")
        named = saved if isinstance(saved, Mapping) else dict(enumerate(saved)) if isinstance(saved, list) else {}
        names = [str(name) for name, state in named.items() if state]
        if not names:
            return ()
        return (
            f"the trainer file of {self._tag_words()} has states of callbacks {', '.join(names)}; none were given. "
            "Next: stack.initialize(..., callbacks=[...]), unless the trainer restores them itself",
        )

    def _tag_words(self) -> str:
        if self._selected is not None and (self.passed_over or self._any_tag):
            return self._selected.name
        return super()._tag_words()

    def _observed_needs(self, root: str) -> list[Need]:
        """What a set of ``root`` has at best: an open tag (``{epoch: 10}``) then means the newest such set."""
        tag = self.checkpoint_tag
        iteration = TrainingIteration.from_mapping(tag) if isinstance(tag, Mapping) else _iteration_or_none(tag)
        if iteration is None or iteration.is_fully_specified:
            return []
        wanted = self._seen_parts(root)
        try:
            self.store.find(tag, [*wanted, Need(root, "trainer")])
        except IncompleteSetError:
            return []
        return wanted

    def _seen_parts(self, root: str) -> list[Need]:
        wanted: dict[Need, None] = {}
        for found in self.store.sets():
            for file in found.files:
                below = file.model == root or file.model.startswith(f"{root}.")
                if below and file.info is None and (file.part == "model" or self._loads(file.part)):
                    wanted[Need(file.model, file.part)] = None
        return list(wanted)

    def _loads(self, part: str) -> bool:
        return part == "optim" and self.config.load_optim


def _members(state: Mapping[str, Any]) -> list[str]:
    """Names of the stateful objects that a trainer file of a plain loop holds."""
    ours = state.get(_TRAINER_STATE)
    stateful = ours.get("stateful") if isinstance(ours, Mapping) else None
    return [str(name) for name in stateful] if isinstance(stateful, Mapping) else []


def _iteration_or_none(tag: str) -> TrainingIteration | None:
    try:
        return TrainingIteration.from_string(tag)
    except ValueError:
        return None
