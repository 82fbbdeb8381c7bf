"""InitializerStack: the initializers of one training run, called in order through pluggy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
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
from noether_init_core.messages import logger_of, one_line
from noether_init_core.models import check_model
from noether_init_core.paths import PathProvider
from noether_init_core.sets.hints import AskedBy
from noether_init_core.sets.provenance import InitReport
from noether_init_core.sets.selection import newest_set
from noether_init_core.sets.snapshot import Snapshot
from noether_init_core.stack.changes import Written, changed_afterwards, may_change_afterwards, written_without_plan
from noether_init_core.stack.config_files import (
    LoadedConfig,
    load_config_file,
    load_config_mapping,
    validate_entry,
)
from noether_init_core.stack.members import (
    HookCaller,
    Member,
    Prepared,
    full_paths,
    prepare,
    reported,
    written_by,
)
from noether_init_core.stack.ranks import agreed, facts
from noether_init_core.suggest.rules import Suggestion
from noether_init_core.surgery.plan import LoadPlan, Problem

logger = logger_of(__name__)

_Answer = TypeVar("_Answer")
_Ready = tuple[TrainingIteration, list[TrainingIteration | None], tuple[Prepared, ...]]


class InitializerStack:
    """The initializers of one training run, called in the order of the config.

    Args:
        initializers: Instances of ``InitializerBase``.
        observers: Objects with ``hookimpl(wrapper=True)`` methods around the hooks. They cannot change what an
            initializer returned, nor hide an error that it raised.

    Raises ``ConfigError`` for an object that is not an initializer, an object that is given twice, and an observer that
    is not a wrapper. Every rank of a distributed run builds the same stack and makes the same calls. One stack is not
    for several threads at once.
    """

    def __init__(self, initializers: Iterable[InitializerBase], *, observers: Iterable[Any] = ()) -> None:
        if isinstance(initializers, Mapping | str):  # of which the keys or characters would be taken one by one
            raise ConfigError(
                f"InitializerStack takes initializers, not {type_of(initializers)}. "
                "Next: InitializerStack.from_config(config)"
            )
        self._members = tuple([Member(initializer) for initializer in initializers])
        self._auto_resume = ""
        #: What ``start_checkpoint`` returned, and the folders of the sets that it selected.
        self._returned: tuple[TrainingIteration, tuple[str | None, ...]] | None = None
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
        """Build a stack from a list of configs, one config, or a mapping with ``initializers`` and more.

        Args:
            configs: Mappings (dict, OmegaConf), namespaces, instances of dataclasses and similar, or validated configs.
            path_provider: The folders of the run that is started: an object with ``output_root``, ``run_id`` and
                ``stage_name``. None if no kind needs it.
            observers: Further observers, as objects.

        Raises ``ConfigError`` and its subclasses, such as ``KindError``. Only the kinds in the config are imported.
        """
        return cls._from_loaded(load_config_mapping(configs), path_provider, observers)

    @classmethod
    def from_file(cls, path: Path | str, *, path_provider: Any = None, observers: Iterable[Any] = ()) -> Self:
        """Build a stack from a YAML config, or from Noether's resolved config; arguments as in ``from_config``.

        Raises ``ConfigFileError`` with file, line and key, and ``KindError``.
        """
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
        """The decision of ``auto_resume``, in words; empty if the config does not have it."""
        return self._auto_resume

    def start_checkpoint(self) -> TrainingIteration:
        """The iteration at which training starts. May be called before ``initialize``, and more than once.

        ``initialize`` uses the sets that this call selected, also if another process saves in between.

        Raises ``StartConflictError`` if more than one initializer starts after iteration zero, and ``CheckpointError``
        if a set cannot be selected. Every rank calls it.
        """
        with self._in_sessions():
            start = self._starts()[0]
            self._returned = start, self._resumed_sets()
        return start

    def plan(self, model: Any) -> LoadPlan:
        """The plan of ``initialize(model)`` for the weights. Reads only headers; the model is not changed.

        An entry that an earlier initializer will have loaded need not be in the files of a later one. Kinds without a
        plan are left out. After ``start_checkpoint`` the plan is for the sets that it selected. May be called more than
        once.

        Raises ``CheckpointError`` for files that cannot be read; what does not fit is a problem in the plan.
        """
        check_model(model)
        plans: list[tuple[int, LoadPlan]] = []
        with self._in_sessions():
            for position, prepared in enumerate(prepare(self._members, model)):
                plans += [(position, plan) for _unit, plan in prepared.plans]
                if plans and not prepared.plans and "init_weights" in prepared.member.called:
                    message = f"{prepared.member.kind} comes later without a plan: what it writes is not in this plan"
                    warning = Problem("unplanned", message, str(prepared.part.name), ())
                    number, last = plans[-1]
                    plans[-1] = number, attrs.evolve(last, warnings=(*last.warnings, warning))
        return LoadPlan.merged([plan for _number, plan in plans], [number for number, _plan in plans])

    def check_unplanned(self, model: Any) -> tuple[tuple[str, Exception | None], ...]:
        """Kinds that ``plan`` leaves out, each with the error of its ``check``, or None. The model is not changed."""
        check_model(model)
        found: list[tuple[str, Exception | None]] = []
        with self._in_sessions():
            for member in self._members:
                if member.initializer.states_plan:
                    continue
                try:
                    member.initializer.check(member.part(model), None, None)
                    found.append((member.kind, None))
                except Exception as error:  # a plugin may raise anything; the caller decides what to do with it
                    found.append((member.kind, error))
        return tuple(found)

    def suggest(self, model: Any) -> tuple[tuple[int, str, Suggestion], ...]:
        """Suggest rules for each file and single model: (number of the initializer, path of the model, suggestion).

        Rules in the config are ignored. What an earlier initializer loads with its suggestion need not be in the files
        of a later one. Reads only headers and changes nothing. After ``start_checkpoint``, for the selected sets.
        """
        loaded: frozenset[int] = frozenset()

        def suggested(one: InitializerBase, part: Any) -> Mapping[str, Suggestion]:
            nonlocal loaded
            one.session.loaded_before = loaded
            found = one.suggest_rules(part)
            for suggestion in found.values():
                loaded |= written_by(suggestion.plan, part)
            return found

        return self._asked(model, suggested)

    def sources(self, model: Any) -> tuple[tuple[int, str, Source], ...]:
        """The files that weights will be read from: (number of the initializer, path of the model, source).

        No file is opened. After ``start_checkpoint`` the files are those of the sets that it selected. May be called
        more than once.
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
        self,
        model: Any,
        trainer: Any = None,
        callbacks: Sequence[Any] | None = None,
        *,
        trains: bool = True,
        group: Any = None,
        timeout_s: float = 300.0,
    ) -> InitReport:
        """Start the run: check all that can fail, then change trainer, weights, optimizer and callbacks.

        In a distributed run, the ranks compare what they found before the first change: the initializers, the sets and
        files, the settings, the start iteration, and errors. If anything differs, all raise. A failure of user code
        after the first change is raised on its own rank only.

        Args:
            model: A model or composite; ``bind`` makes one of a plain module.
            trainer: An object with ``state_dict`` and ``load_state_dict``; its ``restore_rng`` is called last if it
                exists. If it has ``lineage`` and ``init_report``, both are set from the report, so that
                ``CheckpointWriter`` records them.
            callbacks: Callbacks with ``state_dict`` and ``load_state_dict``; others are passed to the hooks only.
            trains: False if no training follows: then the state of a trainer is not required.
            group: The process group whose ranks start this run together; None: all ranks.
            timeout_s: Seconds to wait for the other ranks.

        Returns the report; ``report.start`` is the iteration at which training starts. Every rank calls it. Called
        again, it initializes again from a new selection.

        Raises:
            InitError: A subclass of it, before the first change, for everything that can be known before it.
                ``StartConflictError`` if the start is no longer the one that ``start_checkpoint`` returned.
                ``RankError`` if ranks do not agree, or one does not answer.
            PartlyInitializedError: User code, a kind without ``check``, or a device failed after the first change.
                States of trainer and callbacks were restored.
        """
        callbacks = list(callbacks) if callbacks is not None else None
        with self._in_sessions(trains=trains, is_last=True):
            ready = partial(self._ready, model, trainer, callbacks)
            start, starts, prepared = agreed(
                ready, lambda found: facts(self._auto_resume, self._members, found[0]), group=group, timeout_s=timeout_s
            )
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
            self._returned = None
        logger.info("%s", report)
        return report

    def _ready(self, model: Any, trainer: Any, callbacks: list[Any] | None) -> _Ready:
        """What will be done, after every check: the start, that of each member, and their plans."""
        check_model(model)
        start, starts = self._starts()
        self._check_start(start)
        return start, starts, tuple(prepare(self._members, model, (trainer, callbacks)))

    def close(self) -> None:
        """Drop the selection of ``start_checkpoint``, so that the next call selects again. May be called twice."""
        self._returned, self._sessions = None, ()

    @contextlib.contextmanager
    def _in_sessions(self, *, trains: bool = True, is_last: bool = False) -> Iterator[None]:
        """Give every initializer its session for the block.

        Files are closed at the end of the block. The selection is kept from the first ``start_checkpoint`` to the end
        of ``initialize``; without ``start_checkpoint``, the next call selects again.
        """
        units = [one for member in self._members for one in member.units]
        busy = next((one for one in units if one.session is not None), None)
        if busy is not None:
            raise ConfigError(
                f"{busy.config.kind} is in an initialization that is not finished, and was called again by a hook, an "
                "observer, a trainer, another stack or another thread. This call changed nothing. Next: call the stack "
                "before or after initialize(); for delegates, call their hooks"
            )
        if not self._sessions:
            self._sessions = tuple(
                pair
                for number, member in enumerate(self._members)
                for pair in member.new_sessions(is_followed=member.is_followed_by(self._members[number + 1 :]))
            )
        for one, session in self._sessions:
            one.session, session.trains = session, trains
        try:
            yield
        finally:
            for one, session in self._sessions:
                one.session, session.loaded_before = None, frozenset()
                try:
                    session.close_files()
                except (
                    Exception
                ):  # the model is initialized already, and an error of the block must not be replaced by this one
                    logger.exception("the files of %s could not be closed", one.config.kind)
            if is_last or self._returned is None:
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
        """Raise if another set is selected now than when ``start_checkpoint`` returned its iteration."""
        if self._returned is not None and (start, self._resumed_sets()) != self._returned:
            returned = self._returned[0]
            raise StartConflictError(
                f"start_checkpoint() returned {returned}, but the start is now {start}"
                + (" of another set" if start == returned else "")
                + ": another set is selected since. Nothing was changed. "
                "Next: call start_checkpoint() again, and start there",
                starts={"returned": str(returned), "now": str(start)},
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
        """The steps after the checks, in order, with their names. ``written`` collects writes without a plan."""
        steps: list[tuple[str, Callable[[], Any]]] = []
        has_loaded = False
        for hook in hooks:
            for number, one in enumerate(prepared):
                member = one.member
                if hook not in member.called:
                    continue
                given = {"model": one.part, "trainer": trainer, "callbacks": callbacks}
                call: Callable[[], Any] = partial(self._hooks.call, hook, member.initializer, **given)
                if hook == "init_weights" and has_loaded and not one.plans:
                    noted = partial(written_without_plan, model, member.kind, call)
                    call = partial(_noted, written, number, noted)
                elif hook == "init_weights" and one.plans and may_change_afterwards(member.units):
                    full = full_paths(model, one)
                    noted = partial(changed_afterwards, one.part, full, member.kind, member.units, one.plans, call)
                    call = partial(_noted, written, number, noted)
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
                if not isinstance(error, Exception):  # KeyboardInterrupt and SystemExit stay what they are
                    raise
                kept = "States of trainer and callbacks were restored." if not problems else " ".join(problems)
                is_written = any(label.startswith(("init_weights", "init_optimizer")) for label in labels[: number + 1])
                kept += "" if is_written else " No initializer has written weights."
                # str(KeyError) is the key alone, so name the class
                reason = error if isinstance(error, InitError) else f"{type(error).__name__}: {one_line(str(error))}"
                raise PartlyInitializedError(
                    f"{labels[number]} failed: {reason}\nDone before it: {', '.join(labels[:number]) or 'nothing'}. "
                    f"{kept} Next: build the model again before you try again",
                    done=labels[:number],
                    failed=labels[number],
                    pending=labels[number + 1 :],
                ) from error


def _noted(written: dict[int, Written], number: int, call: Callable[[], Written]) -> None:
    written[number] = call()


def _resumed(path_provider: Any, entry: Entry) -> tuple[Entry | None, str]:
    """The entry that resumes this run from its newest (good) set, or None, and the decision in words.

    Its config is validated also at the first start, when there is no set to resume from.
    """
    if path_provider is None:
        raise ConfigError("auto_resume needs path_provider=PathProvider(output_root, run_id): it resumes this run")
    paths = PathProvider.of(path_provider)
    if paths.run_id_is_generated:
        raise ConfigError(
            f"auto_resume: the run id {paths.run_id} was generated for this start, so that a later start cannot find "
            "its checkpoints. Next: a fixed run_id"
        )
    config = validate_entry(entry)
    snapshot = Snapshot(paths)
    keywords = {**(getattr(config, "kwargs", None) or {}), "auto_resume": snapshot}
    if getattr(config, "on_invalid", "error") == "previous" and snapshot.is_begun():
        # Only reading a set shows that it is good, which start_checkpoint() does.
        resumed = config.model_copy(update={"kwargs": keywords})
        return attrs.evolve(entry, config=resumed), "auto_resume: resumed from the newest good set"
    model = getattr(config, "model_name", None)
    # a model name that no set has is an error, not a fresh start: it may be misspelt
    asked_by = AskedBy("auto_resume", entry.shown_place, entry.as_value)
    newest = newest_set(snapshot, model, asked_by=asked_by)
    if newest is None and model is not None:
        newest = newest_set(snapshot, asked_by=asked_by)
    if newest is None:
        return None, f"auto_resume: {paths.run_id} has no checkpoints, the initializers of the config apply"
    resumed = config.model_copy(update={"kwargs": keywords, "checkpoint_tag": newest.name})
    return attrs.evolve(entry, config=resumed), f"auto_resume: resumed from {newest.name}"
