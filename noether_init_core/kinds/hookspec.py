"""The five hooks of an initialization, and the version of their contract.

An initializer is a subclass of ``InitializerBase``: its methods with these names are the hooks, without a decorator. An
observer is a plain object whose methods are marked with ``hookimpl(wrapper=True)``. A hook is called once per
initializer, in the order of the config; ``initializer`` is the one it is called for. An implementation may leave out
any argument that it does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from noether_init_core.initializers.base import InitializerBase
    from noether_init_core.iteration import TrainingIteration

CONTRACT_VERSION = 1
PROJECT_NAME = "noether_init"
HOOK_NAMES = ("start_checkpoint", "init_trainer", "init_weights", "init_optimizer", "init_callbacks")

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


class HookSpecs:
    """The specification of the hooks; names and arguments are the contract of ``CONTRACT_VERSION``."""

    @hookspec
    def start_checkpoint(self, initializer: InitializerBase) -> TrainingIteration | None:
        """Return the iteration at which training starts. Called first, before anything is changed.

        Zero or None means that this initializer continues no run. It may be called more than once and must not change
        anything. In a distributed run every rank calls it and must get the same answer.
        """

    @hookspec
    def init_trainer(self, trainer: Any, initializer: InitializerBase) -> None:
        """Restore the state of ``trainer`` with ``load_state_dict``. Called once, and not called without a trainer."""

    @hookspec
    def init_weights(self, model: Any, initializer: InitializerBase) -> None:
        """Write parameters and buffers of ``model`` in place; a composite is passed whole.

        The tensors keep their identity, shape, dtype and device. Called once per initialization, by every rank.
        """

    @hookspec
    def init_optimizer(self, model: Any, initializer: InitializerBase) -> None:
        """Restore the state of ``model.optimizer``, in a composite of each submodel, after all weights. Called once."""

    @hookspec
    def init_callbacks(self, callbacks: list[Any], model: Any, initializer: InitializerBase) -> None:
        """Restore the state of the callbacks. Called last and once, and not called without callbacks."""
