"""InitializerBase: what every kind derives from."""

from __future__ import annotations

import abc
import functools
import logging
from typing import Any, ClassVar

from noether_init_core.config.base import KindConfig
from noether_init_core.iteration import TrainingIteration
from noether_init_core.paths import PathProvider
from noether_init_core.stopwatch import Stopwatch, Timing

__all__ = ["InitializerBase"]


class InitializerBase(abc.ABC):
    """One way to start a training run; registered as a kind by an entry point of ``noether_init.initializers``.

    A subclass names its ``config_class`` and implements ``init_weights`` and ``init_optimizer``; the other hooks do
    nothing unless overridden. Methods with the names of hooks are hooks, no decorator needed. It is created by
    ``cls(config, path_provider=..., **kwargs)``, with the ``kwargs`` of the config where it has them.

    Attributes:
        config: The validated config, an instance of ``config_class``.
        path_provider: The folders of the run that is being started; None where none was given.
        logger: A logger named after the class.
    """

    #: The pydantic model that validates this kind's config; unknown keys must be errors.
    config_class: ClassVar[type[KindConfig]] = KindConfig
    #: The version of the hook contract that the class was written for.
    contract: ClassVar[int] = 1

    def __init__(self, config: KindConfig, *, path_provider: Any = None) -> None:
        self.config = config
        self.path_provider: PathProvider | None = None if path_provider is None else PathProvider.of(path_provider)
        self.logger = logging.getLogger(f"{type(self).__module__}.{type(self).__qualname__}")

    @functools.cached_property
    def stopwatch(self) -> Stopwatch:
        """Takes the time of phases (``with self.stopwatch.phase("read", nbytes):``); the stack resets it at its end."""
        return Stopwatch()

    @property
    def timings(self) -> tuple[Timing, ...]:
        """Seconds and bytes of each phase so far, for the report and for observers.

        They count from the end of the last initialization on, so what was selected and read to tell the start, or
        planned beforehand, counts.
        """
        return self.stopwatch.timings

    def check(self, model: Any, trainer: Any = None, callbacks: list[Any] | None = None) -> None:  # noqa: B027 - doing nothing is the default
        """Find out everything that could fail, and change nothing. Not a hook; the stack calls it before any hook.

        Whatever can be known beforehand (files, bytes, keys, shapes, optimizer and callback state) is raised here, so
        that a failed initialization leaves everything as it was. It may be called more than once.
        """

    def takes_part_in(self, hook: str) -> bool:
        """Whether an ``InitializerStack`` calls ``hook`` for this initializer. A direct call always works."""
        return True

    def release(self) -> None:  # noqa: B027 - doing nothing is the default
        """Let go of open files and cached state. The stack calls it at the end; it may be called more than once."""

    def start_checkpoint(self) -> TrainingIteration:
        """The iteration at which training starts: zero, unless the kind resumes. May be called more than once."""
        return TrainingIteration.zero()

    def init_trainer(self, trainer: Any) -> None:  # noqa: B027 - doing nothing is the default
        """Restore the state of the trainer; by default nothing."""

    @abc.abstractmethod
    def init_weights(self, model: Any) -> None:
        """Write parameters and buffers of ``model`` in place."""

    @abc.abstractmethod
    def init_optimizer(self, model: Any) -> None:
        """Restore the state of the optimizer of ``model``; do nothing where the kind has no such state."""

    def init_callbacks(self, callbacks: list[Any], model: Any) -> None:  # noqa: B027 - doing nothing is the default
        """Restore the state of the callbacks; by default nothing."""
