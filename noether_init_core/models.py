"""Models: what they must offer, plain modules as models (``bind``, ``compose``), the single models of a composite.

The protocols are structural; Noether's own classes satisfy them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
    """Raise ``ConfigError`` with the next step unless ``model`` is a model or a composite."""
    if not isinstance(model, ModelLike | CompositeModelLike):
        raise ConfigError(
            f"{type_of(model)} has no name, optimizer, is_frozen and device. "
            'Next: bind(module, name="...", optimizer=...), or compose(name, {...}) for submodels'
        )


@attrs.frozen(eq=False, repr=False)
class BoundModel:
    """A view on a module with what a model needs besides: a name, an optimizer, whether it is frozen, a device.

    It holds no state: keys, parameters and every other attribute are the module's own, without a prefix. What was
    not given to ``bind`` is looked up at each access, so freezing or moving the module later shows.
    """

    module: torch.nn.Module
    name: str
    optimizer: Any = None
    _is_frozen: bool | None = None
    _device: torch.device | None = None

    @property
    def is_frozen(self) -> bool:
        """As given; else the module's own ``is_frozen``; else whether no parameter requires a gradient."""
        if self._is_frozen is not None:
            return self._is_frozen
        own = getattr(self.module, "is_frozen", None)
        if isinstance(own, bool):
            return own
        return not any(parameter.requires_grad for parameter in self.module.parameters())

    @property
    def device(self) -> torch.device:
        """As given; else the module's own ``device``; else that of the first parameter or buffer; else the CPU."""
        if self._device is not None:
            return self._device
        own = getattr(self.module, "device", None)
        if isinstance(own, torch.device):
            return own
        for tensors in (self.module.parameters(), self.module.buffers()):
            for tensor in tensors:
                return tensor.device
        return torch.device("cpu")

    # The two methods of ModelLike are spelt out: isinstance() with a protocol does not look at __getattr__.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The module's own."""
        return self.module.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's own."""
        state: dict[str, Any] = self.module.state_dict(*args, **kwargs)
        return state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        # Without the guard, copy and pickle would ask a half-built view for its module, for ever.
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
) -> BoundModel:
    """A view on ``module`` that can be initialized, resumed and saved; the module itself is left as it is.

    Args:
        module: Any module, also on the meta device.
        name: Name of the model in checkpoint files. Needed where the module has no ``name`` of its own.
        optimizer: The optimizer of its parameters; None means the module's own ``optimizer``, or no optimizer.
        is_frozen: A frozen model's optimizer is neither saved nor resumed. None: no parameter requires a gradient.
        device: None: the device of the first parameter.

    Raises ``ConfigError`` where there is no module or no name, and for an optimizer that is none or holds parameters of
    another module; ``InvalidNameError`` for a name that no file can have.
    """
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"bind() takes a torch.nn.Module, not {type_of(module)}")
    if name is None:
        name = getattr(module, "name", None)
        if not isinstance(name, str):
            raise ConfigError(
                f'{type_of(module)} has no name, and files are named after the model. Next: bind(module, name="...")'
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
    )


def compose(name: str, submodels: Mapping[str, Any]) -> ComposedModel:
    """Models under one name, such as ``compose("autoenc", {"encoder": bind(...), "decoder": None})``.

    Each submodel is saved and found under the path of names (``autoenc.encoder``); composites may be nested.

    Raises ``ConfigError`` for a submodel that is no model, ``InvalidNameError`` for a name that no file can have.
    """
    _model_name(name, "name of a model")
    if not submodels:
        raise ConfigError(f"compose({name!r}) was given no submodels")
    for part, submodel in submodels.items():
        if "." in _model_name(part, "name of a submodel"):
            raise InvalidNameError(
                f"name of a submodel {part!r} holds a dot, which separates the names of a path",
                what="name of a submodel",
                value=part,
            )
        if submodel is not None and not isinstance(submodel, ModelLike | CompositeModelLike):
            raise ConfigError(
                f"submodel {part!r} of {name!r} is {type_of(submodel)}, which is no model. "
                f'Next: bind(module, name="{part}", optimizer=...)'
            )
    return ComposedModel(name, MappingProxyType(dict(submodels)))


def _check_optimizer(name: str, module: torch.nn.Module, optimizer: Any) -> None:
    """Refuse what could be neither saved nor resumed; a wrapper that has yet to build its optimizer passes."""
    if isinstance(optimizer, type) or not callable(getattr(optimizer, "state_dict", None)):
        shown = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type_of(optimizer)
        raise ConfigError(
            f"the optimizer of {name} is {shown}, which has no state. "
            "Next: bind(module, ..., optimizer=torch.optim.AdamW(module.parameters()))"
        )
    groups = getattr(getattr(optimizer, "torch_optim", optimizer), "param_groups", None)
    # One that says the names of its parameters is saved by these.
    if not isinstance(groups, list) or getattr(optimizer, "param_idx_to_name", None) is not None:
        return
    own = {id(parameter) for parameter in module.parameters()}
    held = [parameter for group in groups for parameter in group["params"]]
    strange = [number for number, parameter in enumerate(held) if id(parameter) not in own]
    if strange:
        raise ConfigError(
            f"the optimizer of {name} holds {len(strange)} parameters that are not the module's, the first of them "
            f"number {strange[0]} with shape {list(held[strange[0]].shape)}. Next: build the optimizer from the "
            "parameters() of this very module, after it was moved and has its final parameters"
        )


def _model_name(name: str, what: str) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"{what} must be a text, not {name!r}")
    return check_model_name(name, what)


@attrs.frozen(eq=False)
class Leaf:
    """A single model, the path of names that leads to it, and the names that its files may have, best first."""

    path: str
    file_names: tuple[str, ...]
    model: Any


def leaf_models(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(path of names, single model)`` in declared order; submodels that are None are left out.

    A path begins with the name of ``model``: a composite ``autoenc`` with ``encoder`` yields ``autoenc.encoder``.
    """
    for leaf in _leaves(model, model.name, model.name):
        yield leaf.path, leaf.model


def modules_of(model: Any) -> tuple[int, ...]:
    """Ids of the modules of the single models; a composite may make views of them anew whenever it is asked."""
    return tuple([id(getattr(leaf, "module", leaf)) for _path, leaf in leaf_models(model)])


def leaves_of(model: Any, path: str, file_name: str) -> tuple[Leaf, ...]:
    """The single models below ``model`` in declared order.

    Args:
        model: A model or a composite.
        path: The path of names that leads to it.
        file_name: Its name in files.

    Raises ``ConfigError`` if there is none.
    """
    found = tuple(_leaves(model, path, file_name))
    if not found:
        raise ConfigError(f"{path} has no submodel that is a model")
    # a fallback name that two models would claim identifies neither
    claims = Counter(name for leaf in found for name in leaf.file_names)
    return tuple(
        attrs.evolve(leaf, file_names=(leaf.file_names[0], *(n for n in leaf.file_names[1:] if claims[n] == 1)))
        for leaf in found
    )


def _leaves(model: Any, path: str, *file_names: str) -> Iterator[Leaf]:
    """Noether's writer gives nested submodels only the inner composite's own name, which is tried second."""
    submodels = _submodels(model)
    if submodels is None:
        yield Leaf(path, tuple(dict.fromkeys(file_names)), model)
    else:
        for name, submodel in submodels.items():
            yield from _leaves(submodel, f"{path}.{name}", f"{file_names[0]}.{name}", f"{model.name}.{name}")


def submodel_of(model: Any, names: Sequence[str]) -> Any:
    """The submodel that ``names`` lead to; ``model`` itself for none. Raises ``ConfigError`` with what exists."""
    chosen, path = model, str(model.name)
    for name in names:
        submodels = _submodels(chosen) or {}
        if name not in submodels:
            raise ConfigError(f"{path} has no submodel {name!r}; it has {', '.join(submodels) or 'none'}")
        chosen, path = submodels[name], f"{path}.{name}"
    return chosen


def _submodels(model: Any) -> dict[str, Any] | None:
    """Name -> submodel of a composite, without those that are None; None for a single model."""
    submodels = getattr(model, "submodels", None)
    if not isinstance(submodels, Mapping):
        return None
    return {name: submodel for name, submodel in submodels.items() if submodel is not None}
