"""InitializerStack: the initializers of one training run, called in order through pluggy."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs

from noether_init_core import kinds
from noether_init_core.config.base import KindConfig
from noether_init_core.errors import (
    ConfigError,
    InitError,
    PartlyInitializedError,
    StartConflictError,
    type_of,
)
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.initializers.source import SourceInitializer, submodel_of
from noether_init_core.initializers.states import StatesBefore
from noether_init_core.iteration import TrainingIteration
from noether_init_core.kinds.hookspec import HOOK_NAMES
from noether_init_core.observers.loading import load_observer
from noether_init_core.paths import PathProvider
from noether_init_core.protocols import check_model
from noether_init_core.sets.provenance import InitializerReport, InitReport
from noether_init_core.sets.store import RunStore
from noether_init_core.stack.config_files import (
    Entry,
    LoadedConfig,
    load_config_file,
    load_config_mapping,
    validate_entry,
)
from noether_init_core.stack.hook_caller import HookCaller
from noether_init_core.stack.provenance import Carried, Written, trace, values_of
from noether_init_core.suggest.suggestion import Suggestion
from noether_init_core.surgery.plan import LoadPlan, Problem

__all__ = ["InitializerStack"]

logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class _Member:
    """An initializer, the part of the model that it is for, and the hooks that it is called for."""

    initializer: InitializerBase
    submodel: tuple[str, ...] = ()
    hooks: frozenset[str] = frozenset(HOOK_NAMES)

    @property
    def kind(self) -> str:
        return self.initializer.config.kind

    def takes_part_in(self, hook: str) -> bool:
        return hook in self.hooks and self.initializer.takes_part_in(hook)

    def model(self, model: Any) -> Any:
        return submodel_of(model, self.submodel)


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
        self._members = tuple(_Member(initializer) for initializer in initializers)
        self._auto_resume = ""
        self._told: TrainingIteration | None = None
        self._written: dict[int, Written] = {}
        self._hooks = HookCaller(self.initializers, observers)

    @classmethod
    def from_config(
        cls,
        configs: Sequence[Mapping[str, Any] | KindConfig] | Mapping[str, Any] | KindConfig,
        *,
        path_provider: Any = None,
        observers: Iterable[Any] = (),
    ) -> Self:
        """Build from a list of configs, one config, or a mapping with ``initializers``, ``auto_resume``, ``observers``.

        Args:
            configs: Mappings (also OmegaConf's and the like) or validated configs.
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
        decision = ""
        if loaded.resume is not None:
            resumed, decision = _auto_resume(path_provider, loaded.resume)
            if resumed is not None:
                stack = cls._from_members([_member(resumed, path_provider)], observers)
                stack._auto_resume = decision
                return stack
        members = [_member(entry, path_provider) for entry in loaded.entries]
        stack = cls._from_members(members, observers)
        stack._auto_resume = decision
        return stack

    @classmethod
    def _from_members(cls, members: Sequence[_Member], observers: Iterable[Any]) -> Self:
        stack = cls.__new__(cls)
        stack._members = tuple(members)
        stack._auto_resume = ""
        stack._told = None
        stack._written = {}
        stack._hooks = HookCaller(stack.initializers, observers)
        return stack

    @property
    def initializers(self) -> tuple[InitializerBase, ...]:
        """The initializers, in order."""
        return tuple(member.initializer for member in self._members)

    def start_checkpoint(self) -> TrainingIteration:
        """The iteration at which training starts. May be called before ``initialize`` and more than once.

        What was selected for it is kept until ``initialize``, also if another process saves meanwhile.

        Raises ``StartConflictError`` if more than one initializer starts at other than zero.
        """
        self._told = self._starts()[0]
        return self._told

    def plan(self, model: Any) -> LoadPlan:
        """What ``initialize(model)`` will do to the weights. The model is untouched; only headers are read.

        An initializer sees what those before it will have loaded: for that, its file need not have anything. Kinds that
        cannot plan are left out. After ``start_checkpoint`` the plan is that of the sets that it selected.
        """
        check_model(model)
        plans: dict[int, LoadPlan] = {}
        loaded: frozenset[int] = frozenset()
        try:
            for position, member in enumerate(self._members):
                initializer = member.initializer
                if isinstance(initializer, SourceInitializer) and member.takes_part_in("init_weights"):
                    initializer.loaded_before = loaded
                    plans[position] = initializer.plan_weights(member.model(model))
                    loaded |= initializer.will_write
                elif plans and member.takes_part_in("init_weights"):
                    said = f"{member.kind} comes later and says nothing beforehand: what it writes is not in this plan"
                    warning = Problem("unplanned", said, str(member.model(model).name), ())
                    last = max(plans)
                    plans[last] = attrs.evolve(plans[last], warnings=(*plans[last].warnings, warning))
        finally:
            self._let_go()
        return LoadPlan.merged(list(plans.values()), list(plans))

    def check_unplanned(self, model: Any) -> tuple[tuple[str, Exception | None], ...]:
        """Kinds that ``plan`` leaves out, each with what its ``check`` raised, or None. The model is untouched."""
        check_model(model)
        found: list[tuple[str, Exception | None]] = []
        try:
            for member in self._members:
                if isinstance(member.initializer, SourceInitializer):
                    continue
                try:
                    member.initializer.check(member.model(model), None, None)
                except Exception as error:  # code of others; who asked is told
                    found.append((member.kind, error))
                else:
                    found.append((member.kind, None))
        finally:
            self._let_go()
        return tuple(found)

    def suggest(self, model: Any) -> tuple[tuple[int, str, Suggestion], ...]:
        """Rules for each file and single model, from names and shapes: (number of the initializer, path, suggestion).

        Surgery that the config has is not looked at. The model is untouched, only headers are read, nothing is applied.
        After ``start_checkpoint`` the files are those of the sets that it selected.
        """
        check_model(model)
        try:
            return tuple(
                (number, path, suggestion)
                for number, member in enumerate(self._members)
                if isinstance(member.initializer, SourceInitializer) and member.takes_part_in("init_weights")
                for path, suggestion in member.initializer.suggest_rules(member.model(model)).items()
            )
        finally:
            self._let_go()

    def initialize(self, model: Any, trainer: Any = None, callbacks: Sequence[Any] | None = None) -> InitReport:
        """Start the run: find out all that could fail, then change trainer, weights, optimizer and callbacks.

        Args:
            model: A model or composite; ``bind`` makes one of a plain module.
            trainer: Anything with ``state_dict`` and ``load_state_dict``; ``restore_rng`` is called last where it is.
                Where it has ``lineage`` and ``init_report``, it is given the report's lineage and the report, which
                ``CheckpointWriter`` looks for when it saves the trainer.
            callbacks: Callbacks with ``state_dict`` and ``load_state_dict``; others are passed along.

        Returns: the report; ``report.start`` is the iteration at which training starts.

        Raises:
            InitError: one of its children, before anything has been changed, for all that can be known beforehand.
                ``StartConflictError`` if the start is no longer the one that ``start_checkpoint`` told.
            PartlyInitializedError: user code, a kind without ``check``, or a device failed afterwards. States of
                trainer and callbacks have been put back.
        """
        check_model(model)
        callbacks = list(callbacks) if callbacks is not None else None
        try:
            start, starts = self._starts()
            self._check_start(start)
            loaded: frozenset[int] = frozenset()
            for member in self._members:
                everything = member.takes_part_in("init_trainer")
                initializer = member.initializer
                if isinstance(initializer, SourceInitializer):
                    initializer.loaded_before = loaded
                initializer.check(
                    member.model(model),
                    trainer if everything else None,
                    callbacks if member.takes_part_in("init_callbacks") else None,
                )
                if isinstance(initializer, SourceInitializer) and member.takes_part_in("init_weights"):
                    loaded |= initializer.will_write
            self._run(self._steps(model, trainer, callbacks), trainer, callbacks or [])
            present = {"init_trainer": trainer is not None, "init_callbacks": callbacks is not None}
            report = self._report(model, start, starts, [hook for hook in HOOK_NAMES if present.get(hook, True)])
            if hasattr(trainer, "lineage"):
                trainer.lineage = tuple(report.lineage())
            if hasattr(trainer, "init_report"):
                trainer.init_report = report
            self._told = None
        finally:
            self._release()
        logger.info("%s", report)
        return report

    def _starts(self) -> tuple[TrainingIteration, list[TrainingIteration | None]]:
        starts: list[TrainingIteration | None] = []
        for member in self._members:
            results = (
                self._hooks.call("start_checkpoint", member.initializer)
                if member.takes_part_in("start_checkpoint")
                else []
            )
            start = results[0] if results else None
            if start is not None and not isinstance(start, TrainingIteration):
                raise ConfigError(f"{member.kind}: start_checkpoint returned {type_of(start)}, not a TrainingIteration")
            starts.append(start)
        others = {
            f"{number}: {member.kind}": str(start)
            for number, (member, start) in enumerate(zip(self._members, starts, strict=True))
            if start is not None and not start.is_zero
        }
        if len(others) > 1:
            listed = ", ".join(f"initializers.{name} at {start}" for name, start in others.items())
            raise StartConflictError(
                f"more than one initializer continues a run: {listed}. Keep one; the others can be previous_run",
                starts=others,
            )
        chosen = next((start for start in starts if start is not None and not start.is_zero), None)
        return chosen or TrainingIteration.zero(), starts

    def _check_start(self, start: TrainingIteration) -> None:
        """After a failed initialization, everything is selected anew."""
        if self._told is not None and start != self._told:
            raise StartConflictError(
                f"start_checkpoint() told {self._told}, and by now the start is {start}: the set that it was told of "
                "is no longer the one that is meant. Nothing was changed. Next: call start_checkpoint() again, and "
                "start there",
                starts={"told": str(self._told), "now": str(start)},
            )

    def _steps(self, model: Any, trainer: Any, callbacks: list[Any] | None) -> list[tuple[str, Callable[[], Any]]]:
        """What is done after the checks, in order, each with its name."""
        arguments: dict[str, Callable[[_Member], dict[str, Any]]] = {}
        if trainer is not None:
            arguments["init_trainer"] = lambda member: {"trainer": trainer}
        arguments["init_weights"] = lambda member: {"model": member.model(model)}
        arguments["init_optimizer"] = lambda member: {"model": member.model(model)}
        if callbacks is not None:
            arguments["init_callbacks"] = lambda member: {"callbacks": callbacks, "model": member.model(model)}
        steps: list[tuple[str, Callable[[], Any]]] = []
        has_loaded = False
        for hook, make in arguments.items():
            for member in self._members:
                if not member.takes_part_in(hook):
                    continue
                call: Callable[[], Any] = functools.partial(self._hooks.call, hook, member.initializer, **make(member))
                is_source = isinstance(member.initializer, SourceInitializer)
                if hook == "init_weights" and has_loaded and not is_source:
                    call = functools.partial(self._watched, model, member, call)
                has_loaded = has_loaded or (hook == "init_weights" and is_source)
                steps.append((f"{hook} of {member.kind}", call))
        restore = getattr(trainer, "restore_rng", None)
        if callable(restore):
            steps.append(("restore_rng of the trainer", restore))
        return steps

    def _watched(self, model: Any, member: _Member, call: Callable[[], Any]) -> None:
        """Call a kind without a plan, and see which entries have other values then: they are loaded no more."""
        before = values_of(model)
        call()
        after = values_of(model)
        changed = frozenset(place for place, digest in after.items() if before.get(place) != digest)
        self._written[id(member)] = Written(member.kind, changed)

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

    def _report(
        self,
        model: Any,
        start: TrainingIteration,
        starts: Sequence[TrainingIteration | None],
        called: Sequence[str],
    ) -> InitReport:
        offers = {info.name: f"{info.distribution} {info.version}" for info in kinds.installed()}
        reports = []
        for member, own_start in zip(self._members, starts, strict=True):
            plan = getattr(member.initializer, "last_plan", None)
            planned = plan if isinstance(plan, LoadPlan) else None
            hooks = tuple(hook for hook in HOOK_NAMES if hook in called and member.takes_part_in(hook))
            reports.append(
                InitializerReport(
                    kind=member.kind,
                    distribution=offers.get(member.kind, ""),
                    hooks=hooks,
                    origins=()
                    if planned is None
                    else tuple((one.model, one.description, ", ".join(one.files)) for one in planned.origins),
                    counts={} if planned is None else planned.counts(),
                    coverage=None if planned is None else planned.coverage(),
                    start=str(own_start) if own_start is not None and not own_start.is_zero else None,
                    restored=tuple(getattr(member.initializer, "restored", ())),
                    passed_over=tuple(getattr(member.initializer, "passed_over", ())),
                    not_restored=tuple(getattr(member.initializer, "not_restored", ())),
                    resumed_set=getattr(member.initializer, "resumed_set", None),
                    timings=member.initializer.timings,
                )
            )
        carried: list[Carried | Written] = []
        for member in self._members:
            if not member.takes_part_in("init_weights"):
                continue
            if isinstance(member.initializer, SourceInitializer):
                path = ".".join((str(model.name), *member.submodel))
                carried.append(Carried(member.initializer, path, str(member.model(model).name)))
            elif id(member) in self._written:
                carried.append(self._written[id(member)])
        sources, tensors = trace(model, carried)
        return InitReport(start, tuple(reports), self._auto_resume, sources, tensors)

    def _let_go(self) -> None:
        """After a look: the start that was told, if one was, is that of what is selected, so it stays selected."""
        if self._told is None:
            self._release()
            return
        for member in self._members:
            if isinstance(member.initializer, SourceInitializer):
                member.initializer.close_files()
                member.initializer.loaded_before = frozenset()

    def _release(self) -> None:
        for member in self._members:
            try:
                member.initializer.stopwatch.reset()
                member.initializer.release()
            except Exception:  # what is done stays done, and an error on its way must not be hidden
                logger.exception("release of %s failed", member.kind)


def _member(entry: Entry, path_provider: Any) -> _Member:
    config = validate_entry(entry)
    initializer = kinds.create(config, path_provider=path_provider)
    if isinstance(initializer, SourceInitializer):
        initializer.said_at = entry.where
    return _Member(
        initializer,
        entry.submodel or (),
        frozenset(HOOK_NAMES) if entry.hooks is None else entry.hooks,
    )


def _auto_resume(path_provider: Any, entry: Entry) -> tuple[Entry | None, str]:
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
    store = RunStore(paths, asked_by="auto_resume")
    keywords = {**(getattr(config, "kwargs", None) or {}), "auto_resume": True}
    if getattr(config, "on_invalid", "error") == "previous" and store.is_begun():
        # Which set is good is found out by reading it, when the start iteration is asked for.
        resumed = config.model_copy(update={"kwargs": keywords})
        return attrs.evolve(entry, config=resumed), "auto_resume: resumed from the newest good set"
    model = getattr(config, "model_name", None)
    # a name that no set has is an error of the resume, and no fresh start: it may be misspelt
    newest = store.newest(model) or (store.newest() if model is not None else None)
    if newest is None:
        return None, f"auto_resume: {paths.run_id} has no checkpoints, the initializers of the config apply"
    resumed = config.model_copy(update={"kwargs": keywords, "checkpoint_tag": newest.name})
    return attrs.evolve(entry, config=resumed), f"auto_resume: resumed from {newest.name}"
