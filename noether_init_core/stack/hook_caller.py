"""HookCaller: the pluggy manager of one stack; calls a hook for one initializer at a time, inside its observers."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import pluggy

from noether_init_core.errors import ConfigError, type_of
from noether_init_core.initializers.base import InitializerBase
from noether_init_core.kinds import hookspec
from noether_init_core.kinds.hookspec import HOOK_NAMES, PROJECT_NAME, hookimpl

__all__ = ["HookCaller"]


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

    def _record(self) -> Generator[None, list[Any], list[Any]]:
        self.results, self.error = [], None
        try:
            self.results = yield
        except BaseException as error:
            self.error = error
            raise
        return self.results

    @hookimpl(wrapper=True, trylast=True)
    def start_checkpoint(self) -> Generator[None, list[Any], list[Any]]:
        return (yield from self._record())

    @hookimpl(wrapper=True, trylast=True)
    def init_trainer(self) -> Generator[None, list[Any], list[Any]]:
        return (yield from self._record())

    @hookimpl(wrapper=True, trylast=True)
    def init_weights(self) -> Generator[None, list[Any], list[Any]]:
        return (yield from self._record())

    @hookimpl(wrapper=True, trylast=True)
    def init_optimizer(self) -> Generator[None, list[Any], list[Any]]:
        return (yield from self._record())

    @hookimpl(wrapper=True, trylast=True)
    def init_callbacks(self) -> Generator[None, list[Any], list[Any]]:
        return (yield from self._record())


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
        self._register_observers(tuple(observers))
        # registered last, so that it is called innermost
        self._recorder = _Recorder()
        self._manager.register(self._recorder)
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise ConfigError(
                f"{type(error.plugin).__name__} cannot be called: {error}. The hooks are {', '.join(HOOK_NAMES)}"
            ) from error

    def call(self, hook: str, initializer: InitializerBase, **arguments: Any) -> list[Any]:
        """What ``hook`` of ``initializer`` returned, as a list of one, or of none for None.

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
        return self._recorder.results

    def _register_observers(self, observers: tuple[Any, ...]) -> None:
        for observer in observers:
            self._register(observer, None)
        for hook in HOOK_NAMES:
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin in observers and not (implementation.wrapper or implementation.hookwrapper):
                    raise ConfigError(
                        f"{hook} of the observer {type(implementation.plugin).__name__} is no wrapper, so that it "
                        "would stand in for an initializer. Next: mark it with hookimpl(wrapper=True) and yield"
                    )

    def _register(self, plugin: Any, name: str | None) -> None:
        try:
            self._manager.register(plugin, name=name)
        except ValueError as error:
            raise ConfigError(f"{type(plugin).__name__} is in the stack twice; make another instance") from error
        except pluggy.PluginValidationError as error:
            raise ConfigError(f"{type(plugin).__name__} cannot be called: {error}") from error
