"""Models: the protocols, plain modules as models (``bind``, ``compose``), the single models of a composite.

The protocols are structural; Noether's own classes satisfy them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import attrs
import torch

from noether_init_core.errors import ConfigError, InvalidNameError, type_of
from noether_init_core.paths import check_model_name


@runtime_checkable
class ModelLike(Protocol):
    """A single model: a module with a name and at most one optimizer."""

    name: Any
    optimizer: Any
    is_frozen: Any
    device: Any

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Any]: ...


@runtime_checkable
class CompositeModelLike(Protocol):
    """A model made of named submodels, each a model, a composite, or None."""

    name: Any
    submodels: Any


def check_model(model: Any) -> None:
    """Raise ``ConfigError`` unless ``model`` is a model or a composite; the message names ``bind`` and ``compose``."""
    if not isinstance(model, ModelLike | CompositeModelLike):
        raise ConfigError(
            f"{type_of(model)} is not a model: it lacks name, optimizer, is_frozen or device. "
            'Next: bind(module, name="...", optimizer=...), or compose(name, {...}) for submodels'
        )


@attrs.frozen(eq=False, repr=False)
class BoundModel:
    """A view on a module that adds the attributes of a model: name, optimizer, ``is_frozen`` and device.

    The view holds no tensors: keys, parameters and all other attributes are the module's own, and keys get no prefix.
    Arguments that were not given to ``bind`` are looked up at each access, so freezing or moving the module later has
    an effect.
    """

    module: torch.nn.Module
    name: str
    optimizer: Any = None
    _is_frozen: bool | None = None
    _device: torch.device | None = None
    reset: Callable[[torch.nn.Module], object] | None = None

    @property
    def is_frozen(self) -> bool:
        """The value given to ``bind``; else the module's ``is_frozen``; else whether no parameter requires a
        gradient."""
        if self._is_frozen is not None:
            return self._is_frozen
        own = getattr(self.module, "is_frozen", None)
        if isinstance(own, bool):
            return own
        return not any(parameter.requires_grad for parameter in self.module.parameters())

    @property
    def device(self) -> torch.device:
        """The device given to ``bind``; else the module's ``device``; else that of its first tensor; else the CPU."""
        if self._device is not None:
            return self._device
        own = getattr(self.module, "device", None)
        if isinstance(own, torch.device):
            return own
        for tensors in (self.module.parameters(), self.module.buffers()):
            for tensor in tensors:
                return tensor.device
        return torch.device("cpu")

    # These two methods of ModelLike are defined here, because isinstance() with a protocol ignores __getattr__.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Call the method of the module."""
        return self.module.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call the method of the module."""
        state: dict[str, Any] = self.module.state_dict(*args, **kwargs)
        return state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        # copy and pickle ask an object without attributes for dunder methods. Without the guard, the look-up of
        # self.module would call __getattr__ again and recurse until RecursionError.
        if attribute == "module" or attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self.module, attribute)

    def __repr__(self) -> str:
        return f"BoundModel({self.name!r}, {type(self.module).__name__}, device={self.device})"


@attrs.frozen(eq=False)
class ComposedModel:
    """Named submodels under one name; each is a model, a composite, or None."""

    name: str
    submodels: Mapping[str, Any]


def bind(
    module: torch.nn.Module,
    name: str | None = None,
    optimizer: Any = None,
    is_frozen: bool | None = None,
    device: torch.device | str | None = None,
    reset: Callable[[torch.nn.Module], object] | None = None,
) -> BoundModel:
    """Return a view on ``module`` that can be initialized, resumed and saved; the module is not changed.

    A module may be bound several times. All ranks must use the same name.

    Args:
        module: Any module, also on the meta device.
        name: Name of the model in checkpoint files; None uses the ``name`` of the module.
        optimizer: The optimizer of the parameters of ``module``; None uses the ``optimizer`` of the module, if any.
        is_frozen: The optimizer of a frozen model is neither saved nor resumed. None: the ``is_frozen`` of the module,
            else whether no parameter requires a gradient.
        device: None: the ``device`` of the module, else the device of its first parameter.
        reset: Called with each inner module whose non-persistent buffers have no memory, with ``on_missing: reset``. It
            fills these buffers. None: ``reset_parameters`` of that module, or ``_init_weights`` of one around it.

    Raises ``ConfigError`` if ``module`` is not a module, if no name is found, and for an ``optimizer`` that is not an
    optimizer or holds parameters of another module. Raises ``InvalidNameError`` for a name that a file cannot have.
    """
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"bind() takes a torch.nn.Module, not {type_of(module)}")
    if name is None:
        name = getattr(module, "name", None)
        if not isinstance(name, str):
            raise ConfigError(
                f'{type_of(module)} has no name, and files need the name of the model. Next: bind(module, name="...")'
            )
    if optimizer is None:
        own = getattr(module, "optimizer", None)
        optimizer = own if hasattr(own, "state_dict") and not isinstance(own, torch.nn.Module) else None
    else:
        _check_optimizer(name, module, optimizer)
    return BoundModel(
        module,
        _model_name(name, "name of a model"),
        optimizer,
        is_frozen,
        None if device is None else torch.device(device),
        reset,
    )


def compose(name: str, submodels: Mapping[str, Any]) -> ComposedModel:
    """Join models under one name, such as ``compose("autoenc", {"encoder": bind(...), "decoder": None})``.

    Each submodel is saved and found under its path of names (``autoenc.encoder``); composites may be nested.

    Args:
        name: Name of the composite in checkpoint files.
        submodels: Name without a dot -> model, composite or None. At least one; the mapping is copied.

    Raises ``ConfigError`` if ``submodels`` is empty or holds a value that is not a model. Raises ``InvalidNameError``
    for a name that a file cannot have.
    """
    _model_name(name, "name of a model")
    if not submodels:
        raise ConfigError(f'compose({name!r}) got no submodels. Next: compose({name!r}, {{"encoder": bind(...)}})')
    for part, submodel in submodels.items():
        if "." in _model_name(part, "name of a submodel"):
            raise InvalidNameError(
                f"name of a submodel {part!r} holds a dot, which separates the names of a path",
                what="name of a submodel",
                value=part,
            )
        if submodel is not None and not isinstance(submodel, ModelLike | CompositeModelLike):
            raise ConfigError(
                f"submodel {part!r} of {name!r} is {type_of(submodel)}, not a model. "
                f'Next: bind(module, name="{part}", optimizer=...)'
            )
    return ComposedModel(name, MappingProxyType(dict(submodels)))


def _check_optimizer(name: str, module: torch.nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer that can be neither saved nor resumed; a wrapper without an optimizer yet passes."""
    if isinstance(optimizer, type) or not callable(getattr(optimizer, "state_dict", None)):
        shown = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type_of(optimizer)
        raise ConfigError(
            f"the optimizer of {name} is {shown}, not an optimizer with a state_dict(). "
            "Next: bind(module, ..., optimizer=torch.optim.AdamW(module.parameters()))"
        )
    groups = getattr(getattr(optimizer, "torch_optim", optimizer), "param_groups", None)
    # An optimizer that lists the names of its parameters is saved by name, so identity does not matter.
    if not isinstance(groups, list) or getattr(optimizer, "param_idx_to_name", None) is not None:
        return
    own = {id(parameter) for parameter in module.parameters()}
    held = [parameter for group in groups for parameter in group["params"]]
    strange = [number for number, parameter in enumerate(held) if id(parameter) not in own]
    if strange:
        raise ConfigError(
            f"the optimizer of {name} holds {len(strange)} parameters that do not belong to the module; the first is "
            f"number {strange[0]} with shape {list(held[strange[0]].shape)}. Next: build the optimizer from "
            "module.parameters(), after the module was moved to its device and has its final parameters"
        )


def _model_name(name: str, what: str) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"{what} must be a string, not {name!r}")
    return check_model_name(name, what)


@attrs.frozen(eq=False)
class Leaf:
    """A single model, its path of names, and the names that its files may have, preferred first."""

    path: str
    file_names: tuple[str, ...]
    model: Any


def leaf_models(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(path of names, single model)`` in declared order; submodels that are None are skipped.

    A path begins with the name of ``model``: a composite ``autoenc`` with ``encoder`` yields ``autoenc.encoder``. A
    single model yields itself.
    """
    for leaf in _leaves(model, model.name, model.name):
        yield leaf.path, leaf.model


def modules_of(model: Any) -> tuple[int, ...]:
    """Return the ids of the modules of the single models.

    A composite may create new views at each access, so only the modules identify the models.
    """
    return tuple([id(getattr(leaf, "module", leaf)) for _path, leaf in leaf_models(model)])


def leaves_of(model: Any, path: str, file_name: str) -> tuple[Leaf, ...]:
    """Return the single models below ``model`` in declared order.

    Args:
        model: A model or a composite.
        path: Its path of names.
        file_name: Its name in files.

    Raises ``ConfigError`` if no single model is found.
    """
    found = tuple(_leaves(model, path, file_name))
    if not found:
        raise ConfigError(f"no single model was found below {path}: all its submodels are None")
    # A fallback name that two models share does not identify either.
    claims = Counter(name for leaf in found for name in leaf.file_names)
    return tuple(
        attrs.evolve(leaf, file_names=(leaf.file_names[0], *(n for n in leaf.file_names[1:] if claims[n] == 1)))
        for leaf in found
    )


def _leaves(model: Any, path: str, *file_names: str) -> Iterator[Leaf]:
    """Yield the single models with their file names.

    Noether's writer names files of a nested submodel after the inner composite only, so that name is the second choice.
    """
    submodels = _submodels(model)
    if submodels is None:
        yield Leaf(path, tuple(dict.fromkeys(file_names)), model)
    else:
        for name, submodel in submodels.items():
            yield from _leaves(submodel, f"{path}.{name}", f"{file_names[0]}.{name}", f"{model.name}.{name}")


def submodel_of(model: Any, names: Sequence[str]) -> Any:
    """Return the submodel at the path ``names``; ``model`` itself for an empty path.

    Raises ``ConfigError``, which lists the submodels that exist.
    """
    chosen, path = model, str(model.name)
    for name in names:
        submodels = _submodels(chosen) or {}
        if name not in submodels:
            raise ConfigError(f"submodel {name!r} not found in {path}; found: {', '.join(submodels) or 'no submodels'}")
        chosen, path = submodels[name], f"{path}.{name}"
    return chosen


def _submodels(model: Any) -> dict[str, Any] | None:
    """Return name -> submodel of a composite, without submodels that are None; None for a single model."""
    submodels = getattr(model, "submodels", None)
    if not isinstance(submodels, Mapping):
        return None
    return {name: submodel for name, submodel in submodels.items() if submodel is not None}
