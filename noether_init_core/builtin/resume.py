"""The kind ``resume``: continue a run with weights, optimizer, trainer, callbacks and start iteration."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import attrs
import pydantic

from noether_init_core.config.base import KindConfig
from noether_init_core.config.restore import RestoreConfig
from noether_init_core.config.source import CheckpointInitializerConfig
from noether_init_core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    PlanError,
    StateMismatchError,
    TornSetError,
    UnsafeGlobalError,
    type_of,
)
from noether_init_core.files.opening import open_checkpoint
from noether_init_core.files.storage.disk import is_out_of_reach
from noether_init_core.initializers.base import Outcome
from noether_init_core.initializers.callbacks import (
    CallbackPlan,
    StatesBefore,
    apply_callbacks,
    callback_key,
    check_resumption,
    plan_callbacks,
    resume_callbacks,
)
from noether_init_core.initializers.checkpoint import CheckpointInitializer, RunSelection
from noether_init_core.iteration import TrainingIteration
from noether_init_core.messages import listed
from noether_init_core.restore import TrainerFindings, restore_line
from noether_init_core.sets.checkpoint_set import CheckpointSet, Need, check_consistency, check_files, recorded_in
from noether_init_core.sets.file_names import Part, Query
from noether_init_core.sets.health import check_file
from noether_init_core.sets.hints import AskedBy
from noether_init_core.sets.refusals import several_models
from noether_init_core.sets.selection import Policy, find_set, walk_back
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.sets.ways import ways_on

#: Key of the state of ``TrainerState`` in a trainer file.
_TRAINER_STATE = "trainer_state"


class ResumeInitializerConfig(CheckpointInitializerConfig):
    """The config of ``resume``; ``run_id`` null is the current run, ``model_name`` null the only trainer file's model.

    With ``run_id`` null, a set that another run wrote is refused: its folder was copied or renamed. With ``run_id`` it
    is used, with a warning.
    """

    kind: str = "resume"
    load_optim: bool = pydantic.Field(
        default=True,
        description="Whether the state of the optimizer is loaded; false equals restore: {optimizer: skip}.",
    )
    restore: RestoreConfig = pydantic.Field(
        default=RestoreConfig(), description="What is taken from the checkpoint, and what from the script as it is now."
    )
    on_invalid: Literal["error", "previous"] = pydantic.Field(
        default="error",
        description="What to do if the set is broken, or refused by on_nonfinite, and the tag is an open one "
        "(latest, last, E10): error, or previous for the newest good set before it.",
    )


class ResumeInitializer(CheckpointInitializer):
    """Continue a run: everything comes from one set, so that all parts are of the same iteration.

    Frozen submodels and submodels without optimizer keep their optimizer. The trainer file is read once.

    With ``on_invalid: previous`` every file of the set is verified before the start iteration is returned. A broken set
    behind an open tag is replaced by the newest good one before it, but never a set that its tag names exactly. A set
    with NaN is broken unless ``on_nonfinite`` allows it.

    Args:
        config: A ``ResumeInitializerConfig``.
        path_provider: The folders of the run.
        auto_resume: The snapshot that the stack's ``auto_resume`` used for its decision, or None. With ``on_invalid:
            previous`` and without ``checkpoint_tag``, it begins with the newest set, whatever its tags.
    """

    config_class: ClassVar[type[KindConfig]] = ResumeInitializerConfig
    contract: ClassVar[int] = 1
    config: ResumeInitializerConfig

    def __init__(
        self,
        config: KindConfig | None = None,
        *,
        path_provider: Any = None,
        initializer_config: KindConfig | None = None,
        auto_resume: Snapshot | None = None,
    ) -> None:
        super().__init__(config, path_provider=path_provider, initializer_config=initializer_config)
        self._by_itself = auto_resume is not None
        self._seen = auto_resume
        self._warned: set[str] = set()
        #: From init_trainer to init_optimizer: a trainer whose schedules set rates after the optimizer took its state.
        self._trainer: Any = None
        self._query = Query.of(self.checkpoint_tag)
        self._is_automatic = auto_resume is not None or self._query.automatic
        self._any_tag = auto_resume is not None and self.config.checkpoint_tag is None

    @property
    def asked_by(self) -> AskedBy:
        """As in ``CheckpointInitializer``; the fields of ``auto_resume`` are others."""
        return attrs.evolve(super().asked_by, kind="auto_resume" if self._by_itself else "resume")

    @property
    def continues(self) -> bool:
        """Whether the resumed run is the run that is started, not a copy under another run id."""
        current, source = self.path_provider, self.init_run_path_provider
        return current is not None and (current.run_id, current.stage_name) == (source.run_id, source.stage_name)

    def start_checkpoint(self) -> TrainingIteration:
        """The iteration that the trainer file records, or zero if the config says so. May be called more than once.

        Raises ``CheckpointFormatError`` if it records no full iteration, ``NoGoodSetError`` if every set that could be
        resumed from is broken.
        """
        with self.in_session(), self._naming_ways_on():
            found = TrainingIteration.from_mapping(self._trainer_state()["training_iteration"])
            return found if self.config.restore.value.iteration else TrainingIteration.zero()

    def _trainer_state(self) -> Mapping[str, Any]:
        """The content of the trainer file of the selected set."""
        selection: RunSelection | None = self.session.selection
        if selection is None or selection.trainer is None:
            with self.stopwatch.phase("find"):
                selection = self.select()
                if selection.trainer is None:
                    selection.trainer = self._read_trainer(selection.chosen, selection.root)
        return selection.trainer

    def _snapshot(self) -> Snapshot:
        seen, self._seen = self._seen, None
        # auto_resume has selected the set; without it, a newer one may have been committed since
        is_named = self.config.checkpoint_tag is not None
        if seen is not None and (is_named or (seen.newest_folder is not None and seen.is_current())):
            return seen
        return Snapshot(self.init_run_path_provider)

    def _selected(self, snapshot: Snapshot, needs: Sequence[Need], state: Sequence[Need]) -> RunSelection:
        """The set with the trainer file and the weights of all models, which the trainer file names."""
        walks_back = self.config.on_invalid == "previous" and self._query.automatic
        root = self.model_name
        # without a readable manifest no model is known, and no set will be chosen either
        if root is None and (snapshot.trainer_names() or not walks_back):
            root = self._only_root(snapshot)
        trainer_file = [Need(root, "trainer")]
        parts: tuple[Part, ...] = ("model", "optim") if self.load_optim else ("model",)
        policy = Policy(any_tag=self._any_tag, walk_back=walks_back, root=root, parts=parts)
        tag, asked_by = self.checkpoint_tag, self.asked_by
        if not walks_back:
            return self._checked(find_set(snapshot, tag, trainer_file, policy, asked_by=asked_by), root)
        selected, trainer = walk_back(
            snapshot, tag, lambda found: self._prove(found, root), trainer_file, policy, asked_by=asked_by
        )
        return self._checked(selected, root, trainer)

    def _only_root(self, snapshot: Snapshot) -> str:
        """The name of the whole model in the files: that of the only trainer file.

        Raises ``AmbiguousCheckpointError`` if there are trainer files of several models.
        """
        names = snapshot.trainer_names()
        if len(names) > 1:
            raise several_models(snapshot, names, self.asked_by)
        if not names:
            find_set(snapshot, self.checkpoint_tag, [Need(None, "trainer")], asked_by=self.asked_by)
            raise CheckpointNotFoundError(f"{snapshot.folder} has no trainer file", path=snapshot.folder)
        return names[0]

    def _prove(self, found: CheckpointSet, root: str | None) -> dict[str, Any]:
        """Verify every file of the set as ``verify`` declares; returns the state of the trainer.

        Beside flat files there may be averages of another iteration, because Noether saves them at other times. If
        values would be refused, an older set may be good.
        """
        check_files(found)
        said: dict[str, tuple[TrainingIteration | None, str | None]] = {}
        for file in found.files:
            is_below = root is None or file.model == root or file.model.startswith(f"{root}.")
            if not is_below or not (found.committed or file.info in (None, self.model_info)):
                continue
            # as far as that is known without a model
            is_loaded = self.load_optim if file.part == "optim" else file.info == self.model_info
            look = self.config.nonfinite == "error" and file.part != "trainer" and is_loaded
            checked = check_file(found, file, verify=self.config.verify == "full", look=look, stopwatch=self.stopwatch)
            said[file.path.name] = checked.recorded
            if checked.refused:
                raise CheckpointError(
                    f"{file.path}: {listed(checked.refused, 3)}; it would be loaded with on_nonfinite: warn",
                    path=file.path,
                )
        check_consistency(said, found)
        return self._read_trainer(found, root)

    def _read_trainer(self, selected: CheckpointSet, root: str | None) -> dict[str, Any]:
        file = selected.file(root, "trainer")
        if file is None:
            raise CheckpointNotFoundError(f"{selected.name} has no trainer file of {root}", path=selected.folder)
        with open_checkpoint(file.path, digests=selected.file_digest(file), stopwatch=self.stopwatch) as reader:
            iteration, run_id = recorded_in(reader.metadata, file.path)
            if iteration is None or not iteration.is_fully_specified:
                raise CheckpointFormatError(
                    f"{file.path.name} is not a trainer file: training_iteration not found", path=file.path
                )
            check_consistency({file.path.name: (iteration, run_id)}, selected)
            if self.config.verify == "full":
                reader.verify()
            return dict(reader.load())

    def file_root(self, name: str, below: str) -> str:
        """The whole model's name in the files, then the names of submodels."""
        with self.in_session() as session:
            self._trainer_state()  # the files must belong to it, see check_together
            selection = session.selection
            root: str = selection.root or self._only_root(selection.snapshot)
            if name != root and self.model_name is None and name not in self._warned:
                # a plan asks for the sources again, in a session of its own
                self._warned.add(name)
                self.logger.warning(
                    "%s: the model is called %s, and the only trainer file, of %s, is used. Next: %s, if that is right",
                    self.config.kind,
                    name,
                    root,
                    self.asked_by.line({"model_name": root}),
                )
        return f"{root}.{below}" if below else root

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:
        """Weights and optimizer as in ``CheckpointInitializer``, then the states of trainer and callbacks."""
        with self.in_session() as session, self._naming_ways_on():
            # before the optimizer is planned, whose rates a schedule of the script may set
            findings = self._check_trainer(trainer) if session.trains else TrainerFindings()
            session.scheduled = findings.fields
            super().check(model, trainer, callbacks)
            for difference in findings.differences:
                session.warn(str(difference))
            if not session.trains:
                session.not_restored = ["everything but weights, since nothing is trained here"]
                return
            if callbacks:
                self._plan_callbacks(callbacks)
                check_resumption(callbacks, session.selection)
            session.not_restored = [message for _path, message in session.left_state(self.leaves(model))]
            session.not_restored += self._left_callbacks() if callbacks is None else []
            for what in session.not_restored:
                session.warn(what)

    def _check_trainer(self, trainer: Any) -> TrainerFindings:
        state, restore = self._trainer_state(), self.config.restore.value
        if trainer is None:
            if _TRAINER_STATE in state:
                members = ", ".join(["the position in the data", "random generators", *_members(state)])
                raise StateMismatchError(
                    f"{self._tag_words()} has the state of a training loop ({members}), but no trainer was given to "
                    "restore it. Next: stack.initialize(model, trainer=state); for weights alone: kind: previous_run"
                )
            return TrainerFindings()
        if not callable(getattr(trainer, "load_state_dict", None)):
            raise StateMismatchError(
                f"the trainer, {type_of(trainer)}, has no load_state_dict. "
                "Next: trainer=TrainerState(...), or give it state_dict and load_state_dict"
            )
        if not restore.is_whole and not _takes_pieces(trainer):
            raise StateMismatchError(
                f"restore chooses pieces of the training loop, and load_state_dict of the trainer, {type_of(trainer)}, "
                "has no argument restore. Next: trainer=TrainerState(...), or choose only optimizer and callbacks"
            )
        look = getattr(trainer, "check_state_dict", None)
        if not callable(look):
            return TrainerFindings()
        found = look(copy.copy(state), restore=restore) if _takes_pieces(trainer) else look(copy.copy(state))
        return found if isinstance(found, TrainerFindings) else TrainerFindings()

    @contextlib.contextmanager
    def _naming_ways_on(self) -> Iterator[None]:
        """Add to the error of a broken set the older good set, and the config that selects it; the class stays."""
        try:
            yield
        except (CheckpointCorruptError, CheckpointFormatError, TornSetError) as error:
            # globals are the same in every set; and without a selection, the refusal has the advice already
            is_of_set = self.selection is not None and not isinstance(error, UnsafeGlobalError)
            if self.selection is not None and is_of_set and not is_out_of_reach(error):
                error.say(self._with_ways_on(error.message, self.selection.chosen))
            raise
        except PlanError as error:
            if self._by_itself and "auto_resume: {" not in str(error):
                error.add("\nFields of resume go into auto_resume: auto_resume: {key: value}")
            raise

    def _with_ways_on(self, message: str, broken: CheckpointSet) -> str:
        snapshot = Snapshot(self.init_run_path_provider)  # sets may have come since
        good = snapshot.older_good(broken)
        asked = TrainingIteration() if self._by_itself else self._query.iteration
        is_asked = good is not None and (asked is None or good.iteration is None or asked.matches(good.iteration))
        may_walk_back = self._is_automatic and is_asked and self.config.on_invalid == "error"
        return ways_on(message, snapshot, good, self.asked_by, may_walk_back=may_walk_back)

    def init_trainer(self, trainer: Any) -> None:
        """Pass the content of the trainer file to ``trainer.load_state_dict``; if that raises, restore its state."""
        with self.in_session() as session:
            state = self._trainer_state()
            self._trainer = trainer
            with StatesBefore.kept(trainer):
                if _takes_pieces(trainer):
                    trainer.load_state_dict(copy.deepcopy(state), restore=self.config.restore.value)
                else:
                    trainer.load_state_dict(copy.deepcopy(state))
            restore = self.config.restore
            names = [name for name in _members(state) if restore.stateful.get(name) != "skip"]
            pieces = restore.model_dump(exclude_defaults=True, exclude={"optimizer", "callbacks"})
            said = ": ".join(filter(None, ("trainer", ", ".join(names))))
            session.restored.append(f"{said}, with {restore_line(**pieces)}" if pieces else said)

    def init_optimizer(self, model: Any) -> None:
        """As in ``CheckpointInitializer``; then schedules of the script set their rates."""
        trainer, self._trainer = self._trainer, None
        with self.in_session() as session:
            session.scheduled = getattr(trainer, "scheduled_fields", {})
            super().init_optimizer(model)
            if callable(getattr(trainer, "restore_rates", None)):
                trainer.restore_rates(session.loaded_groups)

    def init_callbacks(self, callbacks: list[Any], model: Any) -> None:
        """Give each callback its state, unless the trainer did so, then let callbacks resume from files."""
        with self.in_session() as session:
            plan = self._plan_callbacks(callbacks)
            for warning in plan.warnings:
                session.warn(warning)
            with StatesBefore.kept(None, callbacks):
                apply_callbacks(plan)
                resume_callbacks(callbacks, model, self.init_run_path_provider, session.selection.own, self.logger)
            if plan.states:
                session.restored.append(f"{len(plan.states)} callback{'s' if len(plan.states) > 1 else ''}")

    def _of_other_run(self, selected: CheckpointSet, message: str) -> None:
        """Refuse the set of another run, unless the config names a run: by default a run resumes its own sets only."""
        if self.run_id is None:
            raise CheckpointError(
                f"{message}. Nothing was changed. Next: to resume it anyway, kind: resume with "
                f"run_id: {self.init_run_path_provider.run_id}; otherwise a run_id of its own for each run",
                path=selected.folder,
            )
        super()._of_other_run(selected, message)

    def outcome(self) -> Outcome:
        """As in ``CheckpointInitializer``, with the set that was resumed."""
        found = super().outcome()
        return found if self.selection is None else attrs.evolve(found, resumed_set=str(self.selection.chosen.folder))

    def _plan_callbacks(self, callbacks: Sequence[Any]) -> CallbackPlan:
        saved, restore = self._trainer_state().get("callback_state_dicts", {}), self.config.restore
        if restore.callbacks != "checkpoint":
            if not isinstance(saved, Mapping):
                raise StateMismatchError(f"{self._tag_words()} has states of callbacks by position, not by key")
            saved = {key: state for key, state in saved.items() if restore.takes_callback(key)}
            callbacks = [one for one in callbacks if restore.takes_callback(callback_key(one))]
        return plan_callbacks(saved, callbacks, where=f"the trainer file of {self._tag_words()}")

    def _left_callbacks(self) -> list[str]:
        """The message that states of callbacks exist although no callbacks were given."""
        saved = self._trainer_state().get("callback_state_dicts")
        named = saved.items() if isinstance(saved, Mapping) else enumerate(saved) if isinstance(saved, list) else ()
        names = ", ".join([str(name) for name, state in named if state])
        message = (
            f"the trainer file of {self._tag_words()} has states of callbacks {names}; none were given. "
            "Next: stack.initialize(..., callbacks=[...]), unless the trainer restores them itself"
        )
        return [message] if names else []

    def _tag_words(self) -> str:
        if self.selection is not None and (self.selection.passed_over or self._any_tag):
            return self.selection.chosen.name
        return super()._tag_words()


def _takes_pieces(trainer: Any) -> bool:
    """Whether a trainer takes chosen pieces of its state."""
    try:
        return "restore" in inspect.signature(trainer.load_state_dict).parameters
    except (TypeError, ValueError):  # an object of C code has no signature
        return False


def _members(state: Mapping[str, Any]) -> list[str]:
    """Names of the stateful objects that a trainer file of a plain loop holds."""
    ours = state.get(_TRAINER_STATE)
    stateful = ours.get("stateful") if isinstance(ours, Mapping) else None
    return [str(name) for name in stateful] if isinstance(stateful, Mapping) else []
