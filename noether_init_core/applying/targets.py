"""The entries of a model: the specifications that a plan needs, and the tensors to write to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch

from noether_init_core.applying.loading_code import LoadingCode
from noether_init_core.applying.places import (
    Identity,
    ReadOnlyMemory,
    overlapping,
    tensor_identity,
    unwritable,
    valueless_mode,
)
from noether_init_core.errors import ConfigError
from noether_init_core.models import BoundModel, check_model, leaf_models
from noether_init_core.surgery.fit import PlanPart, TargetSpec
from noether_init_core.surgery.plan import PlanRow
from noether_init_core.surgery.wrappers import bare_names

_EXTRA_STATE = "_extra_state"


@attrs.frozen(eq=False)
class ModelTargets:
    """The entries of one single model.

    Attributes:
        specs: Name -> specification, in the order of the state dict.
        tensors: Name -> the parameter or buffer itself, never a copy; also of ``unlisted``, not of extra state.
        hidden: Names of non-persistent buffers.
        extra_state: Name -> the module that has extra state.
        code: The loading code of its modules.
        resettable: Name -> module of the entries whose module has ``reset_parameters``.
        unlisted: Name -> specification of parameters and persistent buffers that the state dict leaves out.
        unregistered: Names of the state dict that only loading code can take: no tensor of a module has them.
        left_out: Names of the state dict whose values are neither tensors nor extra state.
    """

    specs: Mapping[str, TargetSpec]
    tensors: Mapping[str, torch.Tensor]
    hidden: frozenset[str]
    extra_state: Mapping[str, torch.nn.Module]
    code: LoadingCode = attrs.Factory(LoadingCode)
    resettable: Mapping[str, torch.nn.Module] = attrs.Factory(dict)
    unlisted: Mapping[str, TargetSpec] = attrs.Factory(dict)
    unregistered: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()

    def spec(self, name: str) -> TargetSpec:
        """The specification of an entry, whether the state dict lists it or not."""
        return self.specs[name] if name in self.specs else self.unlisted[name]


def model_targets(model: Any) -> ModelTargets:
    """Read names, shapes and dtypes of ``model`` (a module, or a view on one). Nothing is changed or copied.

    Every target is a registered parameter or buffer. Where an override or hook of ``state_dict`` returns copies, the
    registered tensor of that name is the target, as in torch's own loading. Other tensors of the state dict are targets
    of loading code, where there is some.

    Raises ``ConfigError`` for a lazy module before its first input, and for FullyShardedDataParallel. Also for an entry
    of the state dict that no parameter, buffer or loading code can take.
    """
    root: torch.nn.Module = model.module if isinstance(model, BoundModel) else model
    _refuse_flat_parameters(root)
    owned = registered(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    code = LoadingCode.of(root)
    codes = (*code.runs, *code.of_torch)
    specs: dict[str, TargetSpec] = {}
    tensors: dict[str, torch.Tensor] = {}
    extra: dict[str, torch.nn.Module] = {}
    unregistered, left_out = [], []
    first_names: dict[Identity, str] = {}
    by_object = {id(tensor) for tensor in owned.values()}
    read_only, mode = ReadOnlyMemory(), valueless_mode()

    def spec_of(name: str, tensor: torch.Tensor) -> TargetSpec:
        identity = tensor_identity(tensor)
        first = first_names.setdefault(identity, name)
        return _spec_of(tensor, identity, None if first == name else first, unwritable(tensor, read_only) or mode)

    for name, value in _state_dict(model).items():
        owner, _, leaf = name.rpartition(".")
        if leaf == _EXTRA_STATE and owner in modules:
            if name in owned:
                raise ConfigError(
                    f"{model.name}: {name} is a parameter or buffer, but torch uses that name for extra state. "
                    "Next: rename it"
                )
            extra[name] = modules[owner]
            specs[name] = TargetSpec((), "object", 0, is_parameter=False)
            continue
        tensor = value if id(value) in by_object else owned.get(name)
        if tensor is not None:
            tensors[name] = tensor
            specs[name] = spec_of(name, tensor)
        elif not isinstance(value, torch.Tensor):
            left_out.append(name)
        elif name.startswith(codes):
            unregistered.append(name)
            specs[name] = attrs.evolve(_spec_of(value, None, None, ""), is_parameter=False)
        else:
            raise ConfigError(
                f"{model.name}: its state_dict() has {name}, but no parameter or buffer has that name, so it cannot be "
                "loaded. Next: initialize the module without the hook or override that adds it"
            )
    hidden = _non_persistent(modules)
    unlisted = {}
    for name, tensor in owned.items():
        if name not in specs and name not in hidden:
            tensors[name] = tensor
            unlisted[name] = spec_of(name, tensor)
    shared: dict[str, str] = overlapping(tensors)
    for name, other in shared.items():
        of = specs if name in specs else unlisted
        reason = of[name].unwritable or f"shares memory with {other}, as another view of it"
        of[name] = attrs.evolve(of[name], unwritable=reason)
    owners = {name: modules.get(name.rpartition(".")[0]) for name in tensors}
    resettable = {name: module for name, module in owners.items() if module is not None and reset_method(module)}
    return ModelTargets(
        specs, tensors, hidden, extra, code, resettable, unlisted, frozenset(unregistered), tuple(left_out)
    )


def _spec_of(tensor: torch.Tensor, identity: Identity, tied_to: str | None, reason: str) -> TargetSpec:
    return TargetSpec(
        # the sizes of nested tensors are no numbers
        shape=() if tensor.is_nested else tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        nbytes=0 if tensor.is_nested else tensor.numel() * tensor.element_size(),
        is_parameter=isinstance(tensor, torch.nn.Parameter),
        tied_to=tied_to,
        identity=identity,
        unwritable=reason,
    )


def _refuse_flat_parameters(root: torch.nn.Module) -> None:
    """Refuse FullyShardedDataParallel: its parameters are pieces of one flat parameter, and its state dict a collective
    call."""
    for path, module in root.named_modules():
        if any(kind.__module__.startswith("torch.distributed.fsdp.fully_sharded") for kind in type(module).__mro__):
            raise ConfigError(
                f"{path or 'the model'} is wrapped in {type(module).__name__}, which is not supported. "
                "Next: load before the model is wrapped"
            )


def _non_persistent(modules: Mapping[str, torch.nn.Module]) -> frozenset[str]:
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in modules.items()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    )


def separated(found: Sequence[tuple[PlanPart, ModelTargets]]) -> list[tuple[PlanPart, ModelTargets]]:
    """The parts of a plan, where tensors of one model that overlap those of another cannot be written."""
    every = {(part.model, name): tensor for part, own in found for name, tensor in own.tensors.items()}
    shared: dict[str, dict[str, str]] = {part.model: {} for part, _own in found}
    for (model, name), (other_model, other) in overlapping(every).items() if len(found) > 1 else ():
        if model != other_model:
            shared[model][name] = f"shares memory with {other} of {other_model}, as another view of it"

    def changed(specs: Mapping[str, TargetSpec], reasons: Mapping[str, str]) -> dict[str, TargetSpec]:
        return {
            name: attrs.evolve(spec, unwritable=spec.unwritable or reasons.get(name, ""))
            for name, spec in specs.items()
        }

    return [
        (attrs.evolve(part, targets=changed(part.targets, reasons), unlisted=changed(part.unlisted, reasons)), own)
        if (reasons := shared[part.model])
        else (part, own)
        for part, own in found
    ]


def named_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of a model or composite, in declared order. May be called any number of times.

    Names begin below the model: ``norm.weight``, in a composite ``encoder.norm.weight``. A tied parameter is listed
    under its first name only. Segments of wrappers (``module``, ``_orig_mod``) are left out, as in rules.

    Raises ``ConfigError`` for an object that is not a model.
    """
    check_model(model)
    found: dict[torch.nn.Parameter, str] = {}
    for path, leaf in leaf_models(model):
        for name, parameter in leaf.named_parameters():
            found.setdefault(parameter, f"{path}.{name}".removeprefix(f"{model.name}."))
    named = {name: parameter for parameter, name in found.items()}
    return {bare: named[name] for bare, name in bare_names(named).items()}


def reset_method(module: torch.nn.Module) -> Callable[[], object] | None:
    """``reset_parameters`` of a module; None if it does not exist."""
    methods = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
    return next(filter(callable, methods), None)


def registered(model: Any) -> dict[str, torch.Tensor]:
    """Name -> parameter or buffer, under every name. Raises ``ConfigError`` for one without a shape."""
    owned: dict[str, torch.Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in owned.items():
        if torch.nn.parameter.is_lazy(tensor):
            raise ConfigError(
                f"{model.name}: {name} has no shape yet (a lazy module). Next: pass one batch through the model"
            )
    return owned


def _state_dict(model: Any) -> Mapping[str, Any]:
    try:
        state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    except TypeError:  # an override without torch's arguments
        state = model.state_dict()
    return state


def left_without_memory(model: Any, rows: Iterable[PlanRow], targets: ModelTargets) -> list[str]:
    """Parameters and buffers on the meta device that ``rows`` do not load, so that they would have no values.

    Among them are non-persistent buffers, which no file has.
    """
    written = {id(targets.tensors.get(row.key)) for row in rows if row.writes or row.action == "reset"}
    found = {**registered(model), **targets.tensors}
    return [name for name, tensor in found.items() if tensor.is_meta and id(tensor) not in written]


#: Gives the tensors of a module their initial values.
Fill = Callable[[torch.nn.Module], object]


def fills_of(model: Any, names: Iterable[str]) -> dict[str, tuple[torch.nn.Module, Fill]]:
    """Name of a non-persistent buffer -> its module, and the code that gives it its initial value, if there is some.

    The code is ``reset`` of ``bind``, else ``reset_parameters`` of the module, else ``_init_weights`` of the innermost
    module around it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    given = model.reset if isinstance(model, BoundModel) else None
    found: dict[str, tuple[torch.nn.Module, Fill]] = {}
    for name in names:
        path = name.rpartition(".")[0]
        around = [path, *(path[:end] for end in range(len(path) - 1, 0, -1) if path[end] == "."), ""]
        module = modules[path]
        own: Fill | None = reset_one if reset_method(module) else None
        others = (getattr(modules[one], "_init_weights", None) for one in dict.fromkeys(around))
        fill = given or own or next(filter(callable, others), None)
        if fill is not None:
            found[name] = module, fill
    return found


def reset_one(module: torch.nn.Module) -> None:
    """Call ``reset_parameters`` of a module that has it."""
    reset = reset_method(module)
    assert reset is not None
    reset()


def device_for(model: Any) -> torch.device:
    """The device for new memory: the one given for the model, else the CPU."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) and device.type != "meta" else torch.device("cpu")
