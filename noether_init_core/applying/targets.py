"""The entries of a model: the specifications that a plan needs, and the tensors to write to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch

from noether_init_core.errors import ConfigError
from noether_init_core.models import check_model, leaf_models
from noether_init_core.surgery.fit import TargetSpec
from noether_init_core.surgery.plan import PlanRow
from noether_init_core.surgery.wrappers import bare_names

#: Equal for two tensors with the same elements in memory; see ``tensor_identity``.
Identity = Hashable

_EXTRA_STATE = "_extra_state"
# Up to this many elements, the overlap of views is exact; a larger view counts as the range from first to last byte.
_FEW = 1 << 16


@attrs.frozen(eq=False)
class ModelTargets:
    """The entries of one single model.

    Attributes:
        specs: Name -> specification, in the order of the state dict.
        tensors: Name -> the parameter or buffer itself, never a copy. Extra state is not included.
        hidden: Names of non-persistent buffers.
        extra_state: Name -> the module that has extra state.
        own_loading: Prefix -> the outermost modules with their own loading code (pre-hooks, ``_load_from_state_dict``,
            at the root ``load_state_dict``), which must run for everything below them.
        after_loading: Other modules with hooks that run after a load, innermost first, as in torch.
        resettable: Name -> module of the entries whose module has ``reset_parameters``.
        unlisted: Name -> specification of parameters that the state dict leaves out; they keep their values.
    """

    specs: Mapping[str, TargetSpec]
    tensors: Mapping[str, torch.Tensor]
    hidden: frozenset[str]
    extra_state: Mapping[str, torch.nn.Module]
    own_loading: Mapping[str, torch.nn.Module] = attrs.Factory(dict)
    after_loading: tuple[torch.nn.Module, ...] = ()
    resettable: Mapping[str, torch.nn.Module] = attrs.Factory(dict)
    unlisted: Mapping[str, TargetSpec] = attrs.Factory(dict)


def loaded_by_code(rows: Iterable[PlanRow], targets: ModelTargets) -> dict[Identity, dict[str, torch.nn.Module]]:
    """The tensors that loading code of modules writes: for each, its names there and the module of each name."""
    found: dict[Identity, dict[str, torch.nn.Module]] = {}
    for row in rows if targets.own_loading else ():
        if row.writes and row.key in targets.tensors:
            for prefix, module in targets.own_loading.items():
                if row.key.startswith(prefix):
                    found.setdefault(targets.specs[row.key].identity, {})[row.key] = module
    return found


def tensor_identity(tensor: torch.Tensor) -> Identity:
    """Equal for two tensors that are the same elements of the same memory; on the meta device, the same object."""
    if tensor.is_meta or tensor.numel() == 0 or type(tensor.data) is not torch.Tensor:
        return ("object", id(tensor))
    storage = tensor.untyped_storage()
    return (
        str(tensor.device),
        storage.data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def model_targets(model: Any) -> ModelTargets:
    """Read names, shapes and dtypes of ``model`` (a module, or a view on one). Nothing is changed or copied.

    Every target is a registered parameter or buffer. Where an override or hook of ``state_dict`` returns copies, the
    registered tensor of that name is the target, as in torch's own loading.

    Raises ``ConfigError`` for a lazy module before its first input, and for an entry of the state dict without a
    parameter or buffer of that name.
    """
    owned = _registered(model)
    modules = dict(model.named_modules())
    every = dict(model.named_modules(remove_duplicate=False))
    specs: dict[str, TargetSpec] = {}
    tensors: dict[str, torch.Tensor] = {}
    extra: dict[str, torch.nn.Module] = {}
    first_names: dict[Identity, str] = {}
    by_object = {id(tensor) for tensor in owned.values()}
    for name, value in _state_dict(model).items():
        owner, _, leaf = name.rpartition(".")
        if leaf == _EXTRA_STATE and owner in modules:
            extra[name] = modules[owner]
            specs[name] = TargetSpec((), "object", 0, is_parameter=False)
            continue
        tensor = value if id(value) in by_object else owned.get(name)
        if tensor is None:
            raise ConfigError(
                f"{model.name}: its state_dict() has {name}, but no parameter or buffer has that name, so it cannot be "
                "loaded. Next: initialize the module without the hook or override that adds it"
            )
        identity = tensor_identity(tensor)
        first = first_names.setdefault(identity, name)
        tensors[name] = tensor
        specs[name] = _spec_of(tensor, identity, None if first == name else first)
    for name, other in _overlapping(tensors, specs).items():
        reason = specs[name].unwritable or f"shares memory with {other}, as another view of it"
        specs[name] = attrs.evolve(specs[name], unwritable=reason)
    hidden = frozenset(name for name, _buffer in model.named_buffers(remove_duplicate=False)) - specs.keys()
    own = _own_loading(modules)
    after = [
        module
        for path, module in reversed(modules.items())
        if module._load_state_dict_post_hooks and not f"{path}.".startswith(tuple(own))
    ]
    owners = {name: every.get(name.rpartition(".")[0]) for name in tensors}
    resettable = {name: module for name, module in owners.items() if module is not None and reset_method(module)}
    unlisted = {
        name: _spec_of(parameter, identity)
        for name, parameter in model.named_parameters()
        if name not in specs and (identity := tensor_identity(parameter)) not in first_names
    }
    return ModelTargets(specs, tensors, hidden, extra, own, tuple(after), resettable, unlisted)


def _spec_of(tensor: torch.Tensor, identity: Identity, tied_to: str | None = None) -> TargetSpec:
    return TargetSpec(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        nbytes=tensor.numel() * tensor.element_size(),
        is_parameter=isinstance(tensor, torch.nn.Parameter),
        tied_to=tied_to,
        identity=identity,
        unwritable=_unwritable(tensor),
    )


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


def _overlapping(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TargetSpec]) -> dict[str, str]:
    """Name of a tensor that shares memory with another without being the same tensor -> that other name."""
    storages: defaultdict[Any, dict[Identity, str]] = defaultdict(dict)
    for name in tensors:
        identity: Any = specs[name].identity
        if identity[0] != "object":
            storages[identity[:2]].setdefault(identity, name)
    found: dict[str, str] = {}
    for views in storages.values():
        names = views.values() if len(views) > 1 else ()
        reach = 0, 0, ""
        for place in sorted((begin, end, name) for name in names for begin, end in _bytes_of(tensors[name])):
            if place[0] < reach[1] and place[2] != reach[2]:
                found.setdefault(reach[2], place[2])
                found.setdefault(place[2], reach[2])
            reach = max(reach, place, key=lambda one: one[1])
    return found


def _bytes_of(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Ranges of bytes of its storage that a tensor takes; a column of a matrix takes one range per row."""
    size, begin = tensor.element_size(), int(tensor.storage_offset())
    if tensor.is_contiguous() or tensor.numel() > _FEW:
        span = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return [(begin * size, (begin + int(span)) * size)]
    positions = torch.full(tensor.shape, begin, dtype=torch.int64)
    for dim, (length, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        positions += (torch.arange(length) * stride).reshape([-1 if one == dim else 1 for one in range(tensor.dim())])
    return [(position * size, (position + 1) * size) for position in positions.flatten().tolist()]


def _own_loading(modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    found: dict[str, torch.nn.Module] = {}
    for path, module in modules.items():
        own_root = not path and type(module).load_state_dict is not torch.nn.Module.load_state_dict
        if (own_root or _loads_itself(module)) and not f"{path}.".startswith(tuple(found)):
            found[f"{path}." if path else ""] = module
    return found


def _registered(model: Any) -> dict[str, torch.Tensor]:
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


def _loads_itself(module: torch.nn.Module) -> bool:
    """Whether a module has its own loading code. Modules of torch itself do not count.

    Torch's modules only translate older files, and what they would add is reported as missing.
    """
    if type(module).__module__.split(".")[0] == "torch":
        return bool(module._load_state_dict_pre_hooks)
    return translates(module)


def translates(module: torch.nn.Module) -> bool:
    """Whether code of the module or its class sees the loaded entries before they are copied."""
    return bool(module._load_state_dict_pre_hooks) or (
        type(module)._load_from_state_dict is not torch.nn.Module._load_from_state_dict
    )


def _unwritable(tensor: torch.Tensor) -> str:
    """Why the tensor cannot be written in place, in words; empty if it can."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode"
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return "is expanded: several of its elements share memory"
    return ""


def left_without_memory(model: Any, rows: Iterable[PlanRow], targets: ModelTargets) -> list[str]:
    """Parameters and buffers on the meta device that ``rows`` do not load, so that they would have no values.

    Among them are non-persistent buffers, which no file has.
    """
    written = {id(targets.tensors.get(row.key)) for row in rows if row.writes or row.action == "reset"}
    found = {**_registered(model), **targets.tensors}
    return [name for name, tensor in found.items() if tensor.is_meta and id(tensor) not in written]


def device_for(model: Any) -> torch.device:
    """The device for new memory: the one given for the model, else the CPU."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) and device.type != "meta" else torch.device("cpu")


def modules_of_sources(
    prefix: str, module: torch.nn.Module, rows: Iterable[PlanRow]
) -> Iterator[tuple[str, torch.nn.Module, tuple[str, ...]]]:
    """Each module from ``module`` at ``prefix`` down: its path, and the modules of the file for its entries."""
    modules = dict(module.named_modules(remove_duplicate=False))
    same: defaultdict[str, dict[str, None]] = defaultdict(dict)
    renamed: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        segments = row.key.removeprefix(prefix).split(".") if row.writes and row.key.startswith(prefix) else []
        for above in range(len(segments)):
            path, below = ".".join(segments[:above]), segments[above:]
            for source in row.sources if path in modules else ():
                names = source.split(".")
                outer, inner = names[: -len(below)], names[-len(below) :]
                if len(inner) == len(below):
                    chosen = same if inner == below else renamed
                    chosen[path][".".join(outer)] = None
    for path, inside in modules.items():
        # an entry whose name in the module is unchanged identifies its module in the file better than a renamed one
        yield path, inside, tuple(same[path] or renamed[path])
