"""The members of a stack: what each is for, what it will do, planned and checked in order, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import attrs
import pluggy

from noether_init_core.applying.targets import model_targets
from noether_init_core.errors import ConfigError, type_of
from noether_init_core.initializers.base import InitializerBase, dotted, with_delegates
from noether_init_core.kinds import hookspec
from noether_init_core.kinds.hookspec import HOOK_NAMES, PROJECT_NAME, hookimpl
from noether_init_core.models import leaf_models, submodel_of
from noether_init_core.surgery.plan import LoadPlan


@attrs.frozen(eq=False)
class Member:
    """An initializer, the part of the model that it is for, the hooks that it is called for, its place in the config.

    ``units`` are its delegates, depth first, and itself.
    """

    initializer: InitializerBase
    submodel: tuple[str, ...] = ()
    hooks: frozenset[str] = frozenset(HOOK_NAMES)
    where: Callable[..., str] = dotted
    units: tuple[InitializerBase, ...] = attrs.field(init=False)

    @units.default
    def _find_units(self) -> tuple[InitializerBase, ...]:
        return tuple(with_delegates(self.initializer)) if isinstance(self.initializer, InitializerBase) else ()

    @property
    def kind(self) -> str:
        """The kind, as the config names it."""
        return self.initializer.config.kind

    def takes_part_in(self, hook: str) -> bool:
        """Whether the stack calls ``hook`` for it."""
        return hook in self.hooks - self.initializer.skipped_hooks

    def model(self, model: Any) -> Any:
        """The part of the model that it is for. Raises ``ConfigError`` where there is none."""
        return submodel_of(model, self.submodel)


@attrs.frozen(eq=False)
class Prepared:
    """The plans of one member, each with the initializer that states it; none where nothing is said beforehand.

    ``hooks`` are those that the stack calls for it.
    """

    member: Member
    hooks: frozenset[str]
    plans: tuple[tuple[InitializerBase, LoadPlan], ...]


def prepare(
    members: Sequence[Member], model: Any, check: tuple[Any, list[Any] | None] | None = None
) -> Iterator[Prepared]:
    """The plans of every member, each made with what those before it will have loaded.

    With ``check`` (trainer, callbacks) everything is checked too, and problems of a plan are raised.
    """
    loaded: frozenset[int] = frozenset()
    for member in members:
        hooks = _hooks_of(member.initializer, member.hooks)
        # nobody asks what the last one writes
        is_last = member is members[-1]
        plans, loaded = _prepare(member.initializer, hooks, member.model(model), loaded, check, is_last=is_last)
        yield Prepared(member, hooks, tuple(plans))


def _hooks_of(initializer: InitializerBase, hooks: frozenset[str]) -> frozenset[str]:
    return hooks - initializer.skipped_hooks


def _prepare(
    initializer: InitializerBase,
    hooks: frozenset[str],
    part: Any,
    loaded: frozenset[int],
    check: tuple[Any, list[Any] | None] | None,
    *,
    is_last: bool = False,
) -> tuple[list[tuple[InitializerBase, LoadPlan]], frozenset[int]]:
    """The plan of an initializer, or else those of its delegates, and the ids of what is loaded after them."""
    loads = "init_weights" in hooks
    initializer.session.loaded_before = within = loaded
    found: list[tuple[InitializerBase, LoadPlan]] = []
    for one in initializer.delegates:
        plans, within = _prepare(one, _hooks_of(one, hooks), part, within, check)
        found += plans
    if check is not None:
        trainer, callbacks = check
        has_trainer, has_callbacks = "init_trainer" in hooks, "init_callbacks" in hooks
        initializer.check(part, trainer if has_trainer else None, callbacks if has_callbacks else None)
    plan = initializer.plan(part) if loads else None
    if plan is None:
        return (found, within) if loads else ([], loaded)
    if check is not None:
        plan.raise_for_problems()
    return [(initializer, plan)], loaded if is_last else loaded | _written_by(plan, part)


def _written_by(plan: LoadPlan, model: Any) -> frozenset[int]:
    """Ids of the tensors of ``model`` that a plan writes."""
    tensors = {path: model_targets(leaf).tensors for path, leaf in leaf_models(model)}
    found = (tensors.get(row.model, {}).get(row.target or "") for row in plan.rows if row.writes)
    return frozenset(id(tensor) for tensor in found if tensor is not None)


class _PluginManager(pluggy.PluginManager):
    """Recognises the hooks of an ``InitializerBase`` by their names; observers mark theirs with ``hookimpl``."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        if isinstance(plugin, InitializerBase):
            if name not in HOOK_NAMES:
                return None
            return pluggy.HookimplOpts(
                wrapper=False, hookwrapper=False, optionalhook=False, tryfirst=False, trylast=False, specname=None
            )
        return super().parse_hookimpl_opts(plugin, name)


class _Recorder:
    """The innermost wrapper: what the initializer itself returned or raised, whatever observers make of it."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.error: BaseException | None = None

    @hookimpl(wrapper=True, trylast=True)
    def start_checkpoint(self) -> Generator[None, list[Any], list[Any]]:
        self.results, self.error = [], None
        try:
            self.results = yield
        except BaseException as error:
            self.error = error
            raise
        return self.results

    init_trainer = init_weights = init_optimizer = init_callbacks = start_checkpoint


class HookCaller:
    """Holds the initializers and observers of one stack and nothing else.

    Raises ``ConfigError`` for an object that is no initializer, one that is there twice, and an observer that is no
    wrapper.
    """

    def __init__(self, initializers: Sequence[Any], observers: Iterable[Any]) -> None:
        self._initializers = tuple(initializers)
        self._manager = _PluginManager(PROJECT_NAME)
        self._manager.add_hookspecs(hookspec.HookSpecs)
        for number, initializer in enumerate(self._initializers):
            if not isinstance(initializer, InitializerBase):
                raise ConfigError(
                    f"initializers.{number} is {type_of(initializer)}, no initializer. "
                    "Next: InitializerStack.from_config([...]) for configs"
                )
            if type(initializer).init_weights is InitializerBase.init_weights and not initializer.delegates:
                raise ConfigError(
                    f"{initializer.config.kind} ({type(initializer).__name__}) implements no init_weights and has no "
                    "delegates, so that it would load nothing. Next: def init_weights(self, model): ..."
                )
            self._register(initializer, f"{number}:{initializer.config.kind}")
        observers = tuple(observers)
        for observer in observers:
            self._register(observer, None)
        for hook in HOOK_NAMES:
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin in observers and not (implementation.wrapper or implementation.hookwrapper):
                    raise ConfigError(
                        f"{hook} of the observer {type(implementation.plugin).__name__} is no wrapper, so that it "
                        "would stand in for an initializer. Next: mark it with hookimpl(wrapper=True) and yield"
                    )
        # registered last, so that it is called innermost
        self._recorder = _Recorder()
        self._manager.register(self._recorder)
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise ConfigError(
                f"{type(error.plugin).__name__} cannot be called: {error}. The hooks are {', '.join(HOOK_NAMES)}"
            ) from error

    def call(self, hook: str, initializer: InitializerBase, **arguments: Any) -> Any:
        """What ``hook`` of ``initializer`` returned.

        Raises what the initializer raised, and what an observer raised around it.
        """
        others = [other for other in self._initializers if other is not initializer]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        caller(initializer=initializer, **arguments)
        if self._recorder.error is not None:
            raise self._recorder.error
        for result in self._recorder.results:
            if inspect.isawaitable(result) or inspect.isgenerator(result) or hasattr(result, "__exit__"):
                if inspect.iscoroutine(result):
                    result.close()  # else Python warns that nobody awaited it
                raise ConfigError(
                    f"{hook} of {initializer.config.kind} returned {type_of(result)}, so that nothing was done: it is "
                    "async, a generator or a context manager behind a decorator. "
                    f"Next: noether-init check {initializer.config.kind}"
                )
        return next(iter(self._recorder.results), None)

    def _register(self, plugin: Any, name: str | None) -> None:
        try:
            self._manager.register(plugin, name=name)
        except ValueError as error:
            raise ConfigError(f"{type(plugin).__name__} is in the stack twice; make another instance") from error
        except pluggy.PluginValidationError as error:
            raise ConfigError(f"{type(plugin).__name__} cannot be called: {error}") from error
