"""What a model, an optimizer, a trainer and a callback must offer; structural, Noether's own classes satisfy it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from noether_init_core.errors import ConfigError, type_of


@runtime_checkable
class ModelLike(Protocol):
    """A single model: a module with a name and at most one optimizer."""

    @property
    def name(self) -> str: ...
    @property
    def optimizer(self) -> Any: ...
    @property
    def is_frozen(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Any]: ...


@runtime_checkable
class CompositeModelLike(Protocol):
    """A model made of named submodels, each a model, a composite, or None."""

    @property
    def name(self) -> str: ...
    @property
    def submodels(self) -> Mapping[str, Any]: ...


@runtime_checkable
class TrainerLike(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@runtime_checkable
class CallbackLike(Protocol):
    """A callback with state, matched by ``checkpoint_key`` where it has one, else by its class name."""

    def state_dict(self) -> dict[str, Any] | None: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def check_model(model: Any) -> None:
    """Raise ``ConfigError`` with the next step unless ``model`` is a model or a composite."""
    if not isinstance(model, ModelLike | CompositeModelLike):
        raise ConfigError(
            f"{type_of(model)} has no name, optimizer, is_frozen and device. "
            'Next: bind(module, name="...", optimizer=...), or compose(name, {...}) for submodels'
        )


def leaf_models(model: Any, path: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield ``(path of names, single model)`` in declared order; submodels that are None are left out.

    ``path`` starts as the name of ``model``: a composite ``autoenc`` with ``encoder`` yields ``autoenc.encoder``.
    """
    path = model.name if path is None else path
    submodels = getattr(model, "submodels", None)
    if isinstance(submodels, Mapping):
        for name, submodel in submodels.items():
            if submodel is not None:
                yield from leaf_models(submodel, f"{path}.{name}")
    else:
        yield path, model
