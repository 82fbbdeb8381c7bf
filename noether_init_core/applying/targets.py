"""What a model has: its state dict's entries as specifications for the plan, and as tensors to write to."""

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

#: Equal for two tensors that are one; see ``tensor_identity``.
Identity = Hashable

_EXTRA_STATE = "_extra_state"
# Elements up to which those of a view are looked at one by one; a larger one takes all from its first to its last.
_FEW = 1 << 16


@attrs.frozen(eq=False)
class ModelTargets:
    """The entries of one single model.

    Attributes:
        specs: Name -> specification, in the order of the state dict.
        tensors: Name -> the parameter or buffer itself, never a copy. Extra state is not in it.
        hidden: Names of non-persistent buffers.
        extra_state: Name -> the module that has extra state.
        own_loading: Prefix -> the outermost modules with loading code of their own (pre-hooks,
            ``_load_from_state_dict``, at the root ``load_state_dict``), which has to run for everything below them.
        after_loading: Other modules with hooks that run after a load, innermost first as torch has it.
        resettable: Name -> module of those entries whose module can initialize itself anew.
    """

    specs: Mapping[str, TargetSpec]
    tensors: Mapping[str, torch.Tensor]
    hidden: frozenset[str]
    extra_state: Mapping[str, torch.nn.Module]
    own_loading: Mapping[str, torch.nn.Module] = attrs.Factory(dict)
    after_loading: tuple[torch.nn.Module, ...] = ()
    resettable: Mapping[str, torch.nn.Module] = attrs.Factory(dict)


def loaded_by_code(rows: Iterable[PlanRow], targets: ModelTargets) -> dict[Identity, dict[str, torch.nn.Module]]:
    """The tensors that the loading code of modules writes: for each, its names there and the module that has them."""
    found: dict[Identity, dict[str, torch.nn.Module]] = {}
    for row in rows if targets.own_loading else ():
        if row.writes and row.key in targets.tensors:
            for prefix, module in targets.own_loading.items():
                if row.key.startswith(prefix):
                    found.setdefault(targets.specs[row.key].identity, {})[row.key] = module
    return found


def tensor_identity(tensor: torch.Tensor) -> Identity:
    """Equal for two tensors that are the same elements of the same memory; on the meta device, for one object."""
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

    Every target is a registered parameter or buffer: where ``state_dict`` is overridden or hooked and hands out
    copies, the tensor registered under that name is meant, as in torch's own loading.

    Raises ``ConfigError`` for a module that has not seen its first input yet, and for an entry of the state dict that
    no module has under that name.
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
                f"{model.name}: its state_dict() has {name}, but no module has a parameter or buffer of that name, so "
                "it could not be loaded. Initialize the module without the hook or override that adds it"
            )
        identity = tensor_identity(tensor)
        first = first_names.setdefault(identity, name)
        tensors[name] = tensor
        specs[name] = TargetSpec(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            nbytes=tensor.numel() * tensor.element_size(),
            is_parameter=isinstance(tensor, torch.nn.Parameter),
            tied_to=None if first == name else first,
            identity=identity,
            unwritable=_unwritable(tensor),
        )
    for name, other in _overlapping(tensors, specs).items():
        said = specs[name].unwritable or f"shares memory with {other}, as another view of it"
        specs[name] = attrs.evolve(specs[name], unwritable=said)
    hidden = frozenset(name for name, _buffer in model.named_buffers(remove_duplicate=False)) - specs.keys()
    own = _own_loading(modules)
    after = [
        module
        for path, module in reversed(modules.items())
        if module._load_state_dict_post_hooks and not f"{path}.".startswith(tuple(own))
    ]
    owners = {name: every.get(name.rpartition(".")[0]) for name in tensors}
    resettable = {name: module for name, module in owners.items() if module is not None and reset_method(module)}
    return ModelTargets(specs, tensors, hidden, extra, own, tuple(after), resettable)


def named_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of a model or composite, in declared order.

    Names begin below the model: ``norm.weight``, in a composite ``encoder.norm.weight``. A tied parameter has its
    first name only. Segments that wrappers add (``module``, ``_orig_mod``) are left out, as rules leave them out.

    Raises ``ConfigError`` for an object that is no model, with the next step.
    """
    check_model(model)
    found: dict[torch.nn.Parameter, str] = {}
    for path, leaf in leaf_models(model):
        for name, parameter in leaf.named_parameters():
            found.setdefault(parameter, f"{path}.{name}".removeprefix(f"{model.name}."))
    named = {name: parameter for parameter, name in found.items()}
    return {bare: named[name] for bare, name in bare_names(named).items()}


def reset_method(module: torch.nn.Module) -> Callable[[], object] | None:
    """The method by which a module initializes itself anew; None where it has none."""
    methods = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
    return next(filter(callable, methods), None)


def _overlapping(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TargetSpec]) -> dict[str, str]:
    """Names of tensors that share memory without being one tensor -> another: writing one would change both."""
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
    """The bytes of its storage that a tensor takes, from and to; columns of one matrix take turns."""
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
    """Modules of torch itself only translate older files there, and what they would add is reported as missing."""
    if type(module).__module__.split(".")[0] == "torch":
        return bool(module._load_state_dict_pre_hooks)
    return translates(module)


def translates(module: torch.nn.Module) -> bool:
    """Whether code of the module or of its class sees what is loaded before it is copied."""
    return bool(module._load_state_dict_pre_hooks) or (
        type(module)._load_from_state_dict is not torch.nn.Module._load_from_state_dict
    )


def _unwritable(tensor: torch.Tensor) -> str:
    """Why the tensor cannot be written in place, in words; empty where it can."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode"
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return "is expanded: several of its elements share memory"
    return ""


def left_without_memory(model: Any, rows: Iterable[PlanRow], targets: ModelTargets) -> list[str]:
    """Parameters and buffers on the meta device that ``rows`` do not load, and so would have no values.

    Among them are non-persistent buffers, which no file has.
    """
    written = {id(targets.tensors.get(row.key)) for row in rows if row.writes or row.action == "reset"}
    found = {**_registered(model), **targets.tensors}
    return [name for name, tensor in found.items() if tensor.is_meta and id(tensor) not in written]


def device_for(model: Any) -> torch.device:
    """Where the memory is to be: the device that was given for the model, else the CPU."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) and device.type != "meta" else torch.device("cpu")


def modules_of_sources(
    prefix: str, module: torch.nn.Module, rows: Iterable[PlanRow]
) -> Iterator[tuple[str, torch.nn.Module, tuple[str, ...]]]:
    """Each module from ``module``, at ``prefix``, on: its path, and the modules of the file that its entries are of."""
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
        # an entry that was renamed inside the module tells less surely which module it was in
        yield path, inside, tuple(same[path] or renamed[path])
