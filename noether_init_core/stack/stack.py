"""InitializerStack: the initializers of one training run, called in order through pluggy."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import attrs

from noether_init_core import kinds
from noether_init_core.config.document import Entry
from noether_init_core.errors import (
    ConfigError,
    InitError,
    PartlyInitializedError,
    StartConflictError,
    type_of,
)
from noether_init_core.initializers.base import InitializerBase, Session, Source, only_start
from noether_init_core.initializers.callbacks import StatesBefore
from noether_init_core.iteration import TrainingIteration
from noether_init_core.kinds.hookspec import HOOK_NAMES
from noether_init_core.kinds.lookup import load_observer
from noether_init_core.models import check_model
from noether_init_core.paths import PathProvider
from noether_init_core.sets.provenance import InitReport
from noether_init_core.sets.selection import newest_set
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.stack.config_files import (
    LoadedConfig,
    load_config_file,
    load_config_mapping,
    validate_entry,
)
from noether_init_core.stack.members import HookCaller, Member, Prepared, Written, prepare, reported, values_of
from noether_init_core.suggest.rules import Suggestion
from noether_init_core.surgery.plan import LoadPlan, Problem

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


class InitializerStack:
    """The initializers of a run, in the order of the config, with one pluggy manager of their own.

    Args:
        initializers: Instances of ``InitializerBase``.
        observers: Objects with ``hookimpl(wrapper=True)`` methods around the hooks. They see what happens; they
            cannot change what an initializer returned, nor make one that failed look as if it had not.

    Raises ``ConfigError`` for an object that is no initializer, one that is in the stack twice, and an observer that
    is no wrapper. Every rank of a distributed run builds the same stack and makes the same calls.
    """

    def __init__(self, initializers: Iterable[InitializerBase], *, observers: Iterable[Any] = ()) -> None:
        if isinstance(initializers, Mapping | str):  # of which the keys or characters would be taken one by one
            raise ConfigError(
                f"InitializerStack takes initializers, not {type_of(initializers)}. "
                "Next: InitializerStack.from_config(config)"
            )
        self._members = tuple([Member(initializer) for initializer in initializers])
        self._auto_resume = ""
        #: What ``start_checkpoint`` returned, and the folders of the sets that it is of.
        self._told: tuple[TrainingIteration, tuple[str | None, ...]] | None = None
        self._sessions: tuple[tuple[InitializerBase, Session], ...] = ()
        self._hooks = HookCaller(self.initializers, observers)

    @classmethod
    def from_config(
        cls,
        configs: Any,
        *,
        path_provider: Any = None,
        observers: Iterable[Any] = (),
    ) -> Self:
        """Build from a list of configs, one config, or a mapping with ``initializers``, ``auto_resume``, ``observers``.

        Args:
            configs: Mappings (also OmegaConf's), namespaces, dataclass instances and the like, or validated configs.
            path_provider: The folders of the run that is started; anything with ``output_root``, ``run_id`` and
                ``stage_name``. None where no kind needs it.
            observers: Further observers, as objects.

        Raises ``ConfigError`` and its children. Only the kinds that are named are imported.
        """
        return cls._from_loaded(load_config_mapping(configs), path_provider, observers)

    @classmethod
    def from_file(cls, path: Path | str, *, path_provider: Any = None, observers: Iterable[Any] = ()) -> Self:
        """Build from a YAML file: ours, or Noether's resolved config. Errors name file, line and key."""
        return cls._from_loaded(load_config_file(Path(path)), path_provider, observers)

    @classmethod
    def _from_loaded(cls, loaded: LoadedConfig, path_provider: Any, observers: Iterable[Any]) -> Self:
        observers = [*(load_observer(name) for name in loaded.observers), *observers]
        entries: Iterable[Entry] = loaded.entries
        decision = ""
        if loaded.resume is not None:
            resumed, decision = _resumed(path_provider, loaded.resume)
            if resumed is not None:
                entries = [resumed]
        members = tuple(
            [Member(kinds.create(validate_entry(entry), path_provider=path_provider), entry) for entry in entries]
        )
        stack = cls([member.initializer for member in members], observers=observers)
        stack._members, stack._auto_resume = members, decision
        return stack

    @property
    def initializers(self) -> tuple[InitializerBase, ...]:
        """The initializers, in order."""
        return tuple(member.initializer for member in self._members)

    @property
    def auto_resume(self) -> str:
        """What ``auto_resume`` of the config decided, in words; empty without it."""
        return self._auto_resume

    def start_checkpoint(self) -> TrainingIteration:
        """The iteration at which training starts. May be called before ``initialize`` and more than once.

        What was selected for it is kept until ``initialize``, also if another process saves meanwhile.

        Raises ``StartConflictError`` if more than one initializer starts at other than zero.
        """
        with self._in_sessions():
            start = self._starts()[0]
            self._told = start, self._resumed_sets()
        return start

    def plan(self, model: Any) -> LoadPlan:
        """What ``initialize(model)`` will do to the weights. The model is untouched; only headers are read.

        An initializer sees what those before it will have loaded: for that, its file need not have anything. Kinds that
        cannot plan are left out. After ``start_checkpoint`` the plan is that of the sets that it selected.
        """
        check_model(model)
        plans: list[tuple[int, LoadPlan]] = []
        with self._in_sessions():
            for position, prepared in enumerate(prepare(self._members, model)):
                plans += [(position, plan) for _unit, plan in prepared.plans]
                if plans and not prepared.plans and "init_weights" in prepared.member.called:
                    said = f"{prepared.member.kind} comes later and states no plan: what it writes is not in this plan"
                    warning = Problem("unplanned", said, str(prepared.part.name), ())
                    number, last = plans[-1]
                    plans[-1] = number, attrs.evolve(last, warnings=(*last.warnings, warning))
        return LoadPlan.merged([plan for _number, plan in plans], [number for number, _plan in plans])

    def check_unplanned(self, model: Any) -> tuple[tuple[str, Exception | None], ...]:
        """Kinds that ``plan`` leaves out, each with what its ``check`` raised, or None. The model is untouched."""
        check_model(model)
        found: list[tuple[str, Exception | None]] = []
        with self._in_sessions():
            for member in self._members:
                if member.initializer.states_plan:
                    continue
                try:
                    member.initializer.check(member.part(model), None, None)
                    found.append((member.kind, None))
                except Exception as error:  # code of others; the caller gets it
                    found.append((member.kind, error))
        return tuple(found)

    def suggest(self, model: Any) -> tuple[tuple[int, str, Suggestion], ...]:
        """Rules for each file and single model, from names and shapes: (number of the initializer, path, suggestion).

        Surgery that the config has is not looked at. The model is untouched, only headers are read, nothing is applied.
        After ``start_checkpoint`` the files are those of the sets that it selected.
        """
        return self._asked(model, lambda one, part: one.suggest_rules(part))

    def sources(self, model: Any) -> tuple[tuple[int, str, Source], ...]:
        """The files that weights will be read from: (number of the initializer, path, source). They are only located.

        After ``start_checkpoint`` the files are those of the sets that it selected.
        """
        return self._asked(model, lambda one, part: one.sources(part))

    def _asked(
        self, model: Any, ask: Callable[[InitializerBase, Any], Mapping[str, _Answer]]
    ) -> tuple[tuple[int, str, _Answer], ...]:
        check_model(model)
        with self._in_sessions():
            return tuple(
                (number, path, answer)
                for number, member in enumerate(self._members)
                if "init_weights" in member.called
                for path, answer in ask(member.initializer, member.part(model)).items()
            )

    def initialize(
        self, model: Any, trainer: Any = None, callbacks: Sequence[Any] | None = None, *, trains: bool = True
    ) -> InitReport:
        """Start the run: find out all that could fail, then change trainer, weights, optimizer and callbacks.

        Args:
            model: A model or composite; ``bind`` makes one of a plain module.
            trainer: Anything with ``state_dict`` and ``load_state_dict``; ``restore_rng`` is called last where it is.
                Where it has ``lineage`` and ``init_report``, it is given the report's lineage and the report, which
                ``CheckpointWriter`` looks for when it saves the trainer.
            callbacks: Callbacks with ``state_dict`` and ``load_state_dict``; others are passed along.
            trains: False where no training follows: the state of a trainer is then not missed.

        Returns: the report; ``report.start`` is the iteration at which training starts.

        Raises:
            InitError: one of its children, before anything has been changed, for all that can be known beforehand.
                ``StartConflictError`` if the start is no longer the one that ``start_checkpoint`` told.
            PartlyInitializedError: user code, a kind without ``check``, or a device failed afterwards. States of
                trainer and callbacks have been put back.
        """
        check_model(model)
        callbacks = list(callbacks) if callbacks is not None else None
        with self._in_sessions(trains=trains, is_last=True):
            start, starts = self._starts()
            self._check_start(start)
            prepared = tuple(prepare(self._members, model, (trainer, callbacks)))
            written: dict[int, Written] = {}
            absent = {"init_trainer": trainer is None, "init_callbacks": callbacks is None}
            hooks = [hook for hook in HOOK_NAMES if not absent.get(hook)]
            steps = self._steps(hooks[1:], model, trainer, callbacks, prepared, written)
            self._run(steps, trainer, callbacks or [])
            report = reported(model, prepared, start, starts, hooks, written, self._auto_resume)
            if hasattr(trainer, "lineage"):
                trainer.lineage = tuple(report.lineage())
            if hasattr(trainer, "init_report"):
                trainer.init_report = report
            self._told = None
        logger.info("%s", report)
        return report

    def close(self) -> None:
        """Forget what was selected for the start that ``start_checkpoint`` returned. May be called more than once."""
        self._told, self._sessions = None, ()

    @contextlib.contextmanager
    def _in_sessions(self, *, trains: bool = True, is_last: bool = False) -> Iterator[None]:
        """Give every initializer its session for the block.

        Files are closed at the end of the block. What was selected is kept from the first ``start_checkpoint`` to the
        end of ``initialize``; without a start that somebody relies on, the next question selects anew.
        """
        units = [one for member in self._members for one in member.units]
        busy = next((one for one in units if one.session is not None), None)
        if busy is not None:
            raise ConfigError(
                f"{busy.config.kind} is in an initialization that is going on, and was asked again by a hook, an "
                "observer, a trainer, another stack or another thread. This call changed nothing. Next: ask the stack "
                "before or after initialize(); for delegates, call their hooks"
            )
        if not self._sessions:
            self._sessions = tuple([pair for member in self._members for pair in member.new_sessions()])
        for one, session in self._sessions:
            one.session, session.trains = session, trains
        try:
            yield
        finally:
            for one, session in self._sessions:
                one.session, session.loaded_before = None, frozenset()
                try:
                    session.close_files()
                except Exception:  # what is done stays done, and an error on its way must not be hidden
                    logger.exception("the files of %s could not be closed", one.config.kind)
            if is_last or self._told is None:
                self._sessions = ()

    def _starts(self) -> tuple[TrainingIteration, list[TrainingIteration | None]]:
        starts: list[TrainingIteration | None] = []
        for member in self._members:
            is_asked = "start_checkpoint" in member.called
            start = self._hooks.call("start_checkpoint", member.initializer) if is_asked else None
            if start is not None and not isinstance(start, TrainingIteration):
                raise ConfigError(f"{member.kind}: start_checkpoint returned {type_of(start)}, not a TrainingIteration")
            starts.append(start)
        named = zip((member.kind for member in self._members), starts, strict=True)
        return only_start(named, "initializer"), starts

    def _check_start(self, start: TrainingIteration) -> None:
        """After a failed initialization, everything is selected anew."""
        if self._told is not None and (start, self._resumed_sets()) != self._told:
            told = self._told[0]
            raise StartConflictError(
                f"start_checkpoint() returned {told}, and by now the start is {start}"
                + (" of another set" if start == told else "")
                + ": the set that was selected for it is no longer the one that is meant. Nothing was changed. "
                "Next: call start_checkpoint() again, and start there",
                starts={"told": str(told), "now": str(start)},
            )

    def _resumed_sets(self) -> tuple[str | None, ...]:
        return tuple(one.outcome().resumed_set for one, _session in self._sessions)

    def _steps(
        self,
        hooks: Sequence[str],
        model: Any,
        trainer: Any,
        callbacks: list[Any] | None,
        prepared: Sequence[Prepared],
        written: dict[int, Written],
    ) -> list[tuple[str, Callable[[], Any]]]:
        """What is done after the checks, in order, each with its name. ``written`` gets what no plan states."""
        steps: list[tuple[str, Callable[[], Any]]] = []
        has_loaded = False
        for hook in hooks:
            for number, one in enumerate(prepared):
                member = one.member
                if hook not in member.called:
                    continue
                given = {"model": one.part, "trainer": trainer, "callbacks": callbacks}
                call: Callable[[], Any] = functools.partial(self._hooks.call, hook, member.initializer, **given)
                if hook == "init_weights" and has_loaded and not one.plans:
                    call = functools.partial(_watched, model, member.kind, call, written, number)
                has_loaded = has_loaded or (hook == "init_weights" and bool(one.plans))
                steps.append((f"{hook} of {member.kind}", call))
        restore = getattr(trainer, "restore_rng", None)
        if callable(restore):
            steps.append(("restore_rng of the trainer", restore))
        return steps

    def _run(self, steps: Sequence[tuple[str, Callable[[], Any]]], trainer: Any, callbacks: Sequence[Any]) -> None:
        before = StatesBefore.taken(trainer, callbacks) if self._members else StatesBefore(())
        labels = [label for label, _call in steps]
        for number, (_label, call) in enumerate(steps):
            try:
                call()
            except BaseException as error:
                problems = before.put_back()
                if not isinstance(error, Exception):  # an interrupt goes on as what it is
                    raise
                kept = "States of trainer and callbacks were put back." if not problems else " ".join(problems)
                # a KeyError alone says no more than the key
                reason = error if isinstance(error, InitError) else f"{type(error).__name__}: {error}"
                raise PartlyInitializedError(
                    f"{labels[number]} failed: {reason}\nDone before it: {', '.join(labels[:number]) or 'nothing'}. "
                    f"{kept} Build the model anew before trying again",
                    done=labels[:number],
                    failed=labels[number],
                    pending=labels[number + 1 :],
                ) from error


def _watched(model: Any, kind: str, call: Callable[[], Any], written: dict[int, Written], number: int) -> None:
    """Call a kind without a plan, and see which entries have other values then: they are loaded no more."""
    before = values_of(model)
    call()
    after = values_of(model)
    changed = frozenset(place for place, digest in after.items() if before.get(place) != digest)
    written[number] = Written(kind, changed)


def _resumed(path_provider: Any, entry: Entry) -> tuple[Entry | None, str]:
    """The entry that resumes this run from its newest set (that is good), or None, and the decision in words.

    What the config says of it is validated at the first start already, when there is nothing to resume.
    """
    if path_provider is None:
        raise ConfigError("auto_resume needs path_provider=PathProvider(output_root, run_id): it resumes this very run")
    paths = PathProvider.of(path_provider)
    if paths.run_id_is_generated:
        raise ConfigError(
            f"auto_resume: the run id {paths.run_id} was generated for this start, so that no later start could find "
            "its checkpoints. Give a fixed run_id"
        )
    config = validate_entry(entry)
    snapshot = Snapshot(paths)
    keywords = {**(getattr(config, "kwargs", None) or {}), "auto_resume": snapshot}
    if getattr(config, "on_invalid", "error") == "previous" and snapshot.is_begun():
        # Which set is good is found out by reading it, when the start iteration is asked for.
        resumed = config.model_copy(update={"kwargs": keywords})
        return attrs.evolve(entry, config=resumed), "auto_resume: resumed from the newest good set"
    model = getattr(config, "model_name", None)
    # a name that no set has is an error of the resume, and no fresh start: it may be misspelt
    newest = newest_set(snapshot, model, asked_by="auto_resume")
    if newest is None and model is not None:
        newest = newest_set(snapshot, asked_by="auto_resume")
    if newest is None:
        return None, f"auto_resume: {paths.run_id} has no checkpoints, the initializers of the config apply"
    resumed = config.model_copy(update={"kwargs": keywords, "checkpoint_tag": newest.name})
    return attrs.evolve(entry, config=resumed), f"auto_resume: resumed from {newest.name}"
