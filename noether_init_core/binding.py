"""bind and compose: plain PyTorch modules as models that initializers and writers accept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch

from noether_init_core.errors import ConfigError, InvalidNameError, type_of
from noether_init_core.paths import check_name
from noether_init_core.protocols import CompositeModelLike, ModelLike


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
    module: torch.nn.Module | BoundModel,
    name: str | None = None,
    optimizer: Any = None,
    is_frozen: bool | None = None,
    device: torch.device | str | None = None,
) -> BoundModel:
    """A view on ``module`` that can be initialized, resumed and saved; the module itself is left as it is.

    Args:
        module: Any module, also on the meta device. A view is bound anew, keeping what is not given.
        name: Name of the model in checkpoint files. Needed where the module has no ``name`` of its own.
        optimizer: The optimizer of its parameters; None means the module's own ``optimizer``, or no optimizer.
        is_frozen: A frozen model's optimizer is neither saved nor resumed. None: no parameter requires a gradient.
        device: None: the device of the first parameter.

    Raises ``ConfigError`` where there is no module or no name, and for an optimizer that is none or holds parameters of
    another module; ``InvalidNameError`` for a name that no file can have.
    """
    if isinstance(module, BoundModel):
        return bind(
            module.module,
            module.name if name is None else name,
            module.optimizer if optimizer is None else optimizer,
            module._is_frozen if is_frozen is None else is_frozen,
            module._device if device is None else device,
        )
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
    check_name(name, what)
    if "=" in name:
        raise InvalidNameError(
            f"{what} {name!r} holds '=', which separates the parts of a checkpoint's file name", what=what, value=name
        )
    return name
