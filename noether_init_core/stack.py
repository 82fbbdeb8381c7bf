"""InitializerStack: the initializers of one training run, called in order through pluggy."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs

from noether_init_core import kinds
from noether_init_core.checkpoints.store import RunStore
from noether_init_core.config.base import KindConfig
from noether_init_core.config.files import Entry, LoadedConfig, load_config_file, load_config_mapping, validate_entry
from noether_init_core.errors import (
    ConfigError,
    PartlyInitializedError,
    StartConflictError,
    StateMismatchError,
    type_of,
)
from noether_init_core.hook_caller import HookCaller
from noether_init_core.hooks import HOOK_NAMES
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.initializers.source import SourceInitializer, submodel_of
from noether_init_core.iteration import TrainingIteration
from noether_init_core.observers import load_observer
from noether_init_core.paths import PathProvider
from noether_init_core.protocols import check_model
from noether_init_core.provenance import InitializerReport, InitReport
from noether_init_core.surgery.plan import LoadPlan

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
        if loaded.auto_resume:
            resumed, decision = _auto_resume(path_provider, loaded.on_invalid)
            if resumed is not None:
                stack = cls._from_members([_Member(kinds.create(resumed, path_provider=path_provider))], observers)
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
        stack._hooks = HookCaller(stack.initializers, observers)
        return stack

    @property
    def initializers(self) -> tuple[InitializerBase, ...]:
        """The initializers, in order."""
        return tuple(member.initializer for member in self._members)

    def start_checkpoint(self) -> TrainingIteration:
        """The iteration at which training starts. May be called before ``initialize`` and more than once.

        Raises ``StartConflictError`` if more than one initializer starts at other than zero.
        """
        return self._starts()[0]

    def plan(self, model: Any) -> LoadPlan:
        """What ``initialize(model)`` will do to the weights. The model is untouched; only headers are read.

        Kinds that cannot plan are left out.
        """
        check_model(model)
        try:
            plans = [
                member.initializer.plan_weights(member.model(model))
                for member in self._members
                if isinstance(member.initializer, SourceInitializer) and member.takes_part_in("init_weights")
            ]
        finally:
            self._release()
        return LoadPlan.merged(plans)

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
            PartlyInitializedError: user code, a kind without ``check``, or a device failed afterwards. States of
                trainer and callbacks have been put back.
        """
        check_model(model)
        callbacks = list(callbacks) if callbacks is not None else None
        try:
            start, starts = self._starts()
            for member in self._members:
                everything = member.takes_part_in("init_trainer")
                member.initializer.check(
                    member.model(model),
                    trainer if everything else None,
                    callbacks if member.takes_part_in("init_callbacks") else None,
                )
            self._run(self._steps(model, trainer, callbacks), trainer, callbacks or [])
            present = {"init_trainer": trainer is not None, "init_callbacks": callbacks is not None}
            report = self._report(start, starts, [hook for hook in HOOK_NAMES if present.get(hook, True)])
            if hasattr(trainer, "lineage"):
                trainer.lineage = tuple(report.lineage())
            if hasattr(trainer, "init_report"):
                trainer.init_report = report
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

    def _steps(self, model: Any, trainer: Any, callbacks: list[Any] | None) -> list[tuple[str, Callable[[], Any]]]:
        """What is done after the checks, in order, each with its name."""
        arguments: dict[str, Callable[[_Member], dict[str, Any]]] = {}
        if trainer is not None:
            arguments["init_trainer"] = lambda member: {"trainer": trainer}
        arguments["init_weights"] = lambda member: {"model": member.model(model)}
        arguments["init_optimizer"] = lambda member: {"model": member.model(model)}
        if callbacks is not None:
            arguments["init_callbacks"] = lambda member: {"callbacks": callbacks, "model": member.model(model)}
        steps: list[tuple[str, Callable[[], Any]]] = [
            (f"{hook} of {member.kind}", functools.partial(self._hooks.call, hook, member.initializer, **make(member)))
            for hook, make in arguments.items()
            for member in self._members
            if member.takes_part_in(hook)
        ]
        restore = getattr(trainer, "restore_rng", None)
        if callable(restore):
            steps.append(("restore_rng of the trainer", restore))
        return steps

    def _run(self, steps: Sequence[tuple[str, Callable[[], Any]]], trainer: Any, callbacks: Sequence[Any]) -> None:
        before = _States.taken(trainer, callbacks) if self._members else _States(())
        labels = [label for label, _call in steps]
        for number, (_label, call) in enumerate(steps):
            try:
                call()
            except BaseException as error:
                problems = before.put_back()
                if not isinstance(error, Exception):  # an interrupt goes on as what it is
                    raise
                kept = "States of trainer and callbacks were put back." if not problems else " ".join(problems)
                raise PartlyInitializedError(
                    f"{labels[number]} failed: {error}\nDone before it: {', '.join(labels[:number]) or 'nothing'}. "
                    f"{kept} Build the model anew before trying again",
                    done=labels[:number],
                    failed=labels[number],
                    pending=labels[number + 1 :],
                ) from error

    def _report(
        self, start: TrainingIteration, starts: Sequence[TrainingIteration | None], called: Sequence[str]
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
                    origins=() if planned is None else planned.origins,
                    counts={} if planned is None else planned.counts(),
                    coverage=None if planned is None else planned.coverage(),
                    start=str(own_start) if own_start is not None and not own_start.is_zero else None,
                    restored=tuple(getattr(member.initializer, "restored", ())),
                    passed_over=tuple(getattr(member.initializer, "passed_over", ())),
                    resumed_set=getattr(member.initializer, "resumed_set", None),
                )
            )
        return InitReport(start, tuple(reports), self._auto_resume)

    def _release(self) -> None:
        for member in self._members:
            try:
                member.initializer.release()
            except Exception:  # what is done stays done, and an error on its way must not be hidden
                logger.exception("release of %s failed", member.kind)


@attrs.frozen(eq=False)
class _States:
    """States of trainer and callbacks as they were."""

    saved: tuple[tuple[Any, Any], ...]

    @classmethod
    def taken(cls, trainer: Any, callbacks: Sequence[Any]) -> _States:
        saved = []
        for owner in (trainer, *callbacks):
            take = getattr(owner, "state_dict", None)
            if callable(take) and callable(getattr(owner, "load_state_dict", None)):
                try:
                    saved.append((owner, copy.deepcopy(take())))
                except Exception as error:
                    raise StateMismatchError(
                        f"the state of {type_of(owner)} cannot be taken, so that it could not be put back: "
                        f"{error}. Nothing was changed"
                    ) from error
        return cls(tuple(saved))

    def put_back(self) -> list[str]:
        """Give every owner its state again; what went wrong with that, in words."""
        problems = []
        for owner, state in self.saved:
            try:
                if state is not None:
                    owner.load_state_dict(state)
                elif owner.state_dict() is not None:
                    problems.append(f"{type(owner).__name__} had no state before and has one now.")
            except Exception as error:
                problems.append(f"The state of {type(owner).__name__} could not be put back: {error}.")
        return problems


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


def _auto_resume(path_provider: Any, on_invalid: str) -> tuple[dict[str, Any] | None, str]:
    """The config that resumes this run from its newest set (that is good), or None, and the decision in words."""
    if path_provider is None:
        raise ConfigError("auto_resume needs path_provider=PathProvider(output_root, run_id): it resumes this very run")
    paths = PathProvider.of(path_provider)
    if paths.run_id_is_generated:
        raise ConfigError(
            f"auto_resume: the run id {paths.run_id} was generated for this start, so that no later start could find "
            "its checkpoints. Give a fixed run_id"
        )
    store = RunStore(paths)
    if on_invalid == "previous" and store.is_begun():
        # Which set is good is found out by reading it, when the start iteration is asked for.
        config = {"kind": "resume", "on_invalid": on_invalid, "kwargs": {"any_tag": True}}
        return config, "auto_resume: resumed from the newest good set"
    newest = store.newest()
    if newest is None:
        return None, f"auto_resume: {paths.run_id} has no checkpoints, the initializers of the config apply"
    return {"kind": "resume", "checkpoint_tag": newest.name}, f"auto_resume: resumed from {newest.name}"
