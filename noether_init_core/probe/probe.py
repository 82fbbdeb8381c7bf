"""The probe of a set: a model is run on a batch in passing, when the set is saved and again when it was loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import pydantic
import torch

from noether_init_core.errors import ConfigError, type_of
from noether_init_core.files.plain_data import plain
from noether_init_core.models import BoundModel, leaf_models
from noether_init_core.nested import equal, mapped
from noether_init_core.probe.outputs import Output, has_values, outputs_of, uncompared
from noether_init_core.training.randomness import seeded

#: What models draw from that draw random numbers in evaluation, too.
_SEED = 0x50524F4245


class Probe(pydantic.BaseModel):
    """A batch, and what a model made of it.

    Attributes:
        batch: Tensors in CPU memory, plain values, and dicts, lists and tuples of them. A dict is passed as keywords, a
            list or tuple as arguments, anything else as the only argument.
        outputs: What is kept of all tensors, numbers and texts that came back.
        model: Name of the model.
        models: Paths of its single models; the model's name alone for one that is no composite.
        device: Type of the device that it ran on.
        dtype: Dtype of its first floating-point parameter or buffer; None where it has none.
        has_drawn: Whether it drew random numbers, from generators that were seeded for that: another kind of device
            draws others.
        uncompared: What else came back, in words: objects that cannot be compared.
        computed_by: Release of torch, threads and processor.
    """

    model_config = pydantic.ConfigDict(frozen=True, protected_namespaces=())

    batch: Any
    outputs: Annotated[tuple[Output, ...], pydantic.Field(min_length=1)]
    model: str
    models: tuple[str, ...]
    device: str
    dtype: str | None
    has_drawn: bool
    uncompared: tuple[str, ...]
    computed_by: str


def take(model: Any, batch: Any) -> Probe:
    """Run ``model`` on a batch and keep both; the model and the process are as before, see ``quietly``.

    Raises ``CheckpointFormatError`` for a batch that cannot be kept, ``ConfigError`` for a model that cannot be run on
    it.
    """
    kept = _changed(plain(batch, "probe"), torch.Tensor.clone)
    reason = hindrance(model)
    if reason:
        raise ConfigError(f"probe: {model.name} cannot be run here: {reason}. Nothing was written. Next: save without")
    try:
        outputs, others, has_drawn = _run(model, kept)
        if not has_values(outputs):
            raise ConfigError(
                f"probe: all that {model.name} returns is NaN, which tells models apart by nothing. "
                "Next: look into its weights, or save without"
            )
    except ConfigError as error:
        error.add(". Nothing was written")
        raise
    except Exception as error:
        raise ConfigError(
            f"probe: {model.name} cannot be run on it: {type(error).__name__}: {error}. Nothing was written. A dict "
            "is passed as keywords, a list or tuple as arguments, a tensor as the only argument; dtypes stay as they "
            "are. Next: another probe, or save without"
        ) from error
    return Probe(
        batch=kept,
        outputs=outputs,
        model=str(model.name),
        models=tuple(path for path, _leaf in leaf_models(model)),
        device=device_of(model).type,
        dtype=dtype_of(model),
        has_drawn=has_drawn,
        uncompared=others,
        computed_by=computed_by(model),
    )


def computed_by(model: Any) -> str:
    """What the last bits depend on: release of torch, threads, instructions of the processor, name of the GPU."""
    device = device_of(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device.type} {name}"


def repeat(model: Any, probe: Probe) -> tuple[Output, ...]:
    """What ``model`` makes of the batch of ``probe`` now; the model and the process are as before, see ``quietly``.

    If the model's dtype is another one than then, the batch follows it. Raises what the model raises.
    """
    now = dtype_of(model)
    then = None if probe.dtype is None else getattr(torch, probe.dtype, None)

    def follow(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(getattr(torch, now)) if now is not None and tensor.dtype is then else tensor

    return _run(model, _changed(probe.batch, follow))[0]


def _run(model: Any, batch: Any) -> tuple[tuple[Output, ...], tuple[str, ...], bool]:
    """What came back, what of it cannot be compared, and whether random numbers were drawn."""
    function, device = called(model), device_of(model)
    # a copy: the model may write into it
    ready = _changed(batch, lambda tensor: tensor.to(device, copy=True))
    with quietly(model) as has_drawn:
        if isinstance(ready, Mapping):
            returned = function(**ready)
        elif isinstance(ready, list | tuple):
            returned = function(*ready)
        else:
            returned = function(ready)
        # in here: an output may be a buffer, which gets its former value
        return outputs_of(returned), uncompared(returned), has_drawn()


def _changed(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return mapped(batch, lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf)


@contextlib.contextmanager
def quietly(model: Any) -> Iterator[Callable[[], bool]]:
    """Run ``model`` in the block: evaluating, without gradient and autocast, with random generators seeded alike.

    Afterwards the attributes of all modules are what they were (flags, counters, buffers, children), with the entries
    of dicts and the values of tensors among them, and so are the random generators of the process and those of torch
    among the attributes, also if the block raises. What a model writes into its parameters stays: they are not copied.

    Raises ``ConfigError`` after the block if a parameter was written to in place; writes through ``.data`` do not show.

    Yields: a function that says whether random numbers of torch have been drawn in the block so far.
    """
    modules = _modules_of(model)
    dicts = [held for one in modules for held in (vars(one), *vars(one).values()) if isinstance(held, dict)]
    attributes = [(held, dict(held)) for held in dicts]
    values = [value for held in dicts for value in held.values()]
    plain_tensors = [one for one in values if type(one) is torch.Tensor and one.layout is torch.strided]
    tensors = [(one, one.detach().clone()) for one in plain_tensors if not one.is_meta]
    held_generators = [one for one in values if isinstance(one, torch.Generator)]
    generators = [torch.default_generator, *_accelerators(), *held_generators]
    states = [one.get_state() for one in generators]
    parameters = [
        (name, one, one._version)
        for name, one in _tensors_of(model)
        if isinstance(one, torch.nn.Parameter) and not one.is_inference()
    ]
    try:
        with torch.no_grad(), seeded(_SEED), contextlib.ExitStack() as stack:
            for kind in {"cpu", device_of(model).type}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            for module in modules:
                # eval() may be overridden, and change weights (adapters that are merged then)
                module.training = False
            begun = [one.manual_seed(_SEED).get_state() for one in generators]
            yield lambda: not equal([one.get_state() for one in generators], begun)
    finally:
        for held, before in attributes:
            for name in held.keys() - before.keys():
                del held[name]
            held.update(before)
        for tensor, content in tensors:
            # a needless write would disturb a graph that waits for its backward
            if not equal(tensor, content):
                tensor.detach().copy_(content)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
    for name, one, version in parameters:
        if one._version != version:
            raise ConfigError(
                f"{model.name}: its forward changes the parameter {name}, which is changed now: build or load the "
                "model again. A model that changes while it evaluates cannot have a probe"
            )


def _accelerators() -> list[torch.Generator]:
    """Generators of accelerators that were used; one that was not has drawn nothing, and asking would start it."""
    found: list[torch.Generator] = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch lacks it
        found += torch.cuda.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found


def called(model: Any) -> Any:
    """What is called: the module behind a view, behind ``DistributedDataParallel`` and ``torch.compile``.

    These wrappers would wait for other ranks, or compile anew. Raises ``ConfigError`` for what cannot be called.
    """
    found = model.module if isinstance(model, BoundModel) else model
    while isinstance(found, torch.nn.Module):
        if isinstance(found, torch.nn.parallel.DistributedDataParallel):
            found = found.module
        elif isinstance(getattr(found, "_orig_mod", None), torch.nn.Module):
            found = found._orig_mod
        else:
            break
    if not callable(found):
        raise ConfigError(
            f"{model.name} is {type_of(found)}, which cannot be called with a probe. Next: give it __call__, which "
            "says what becomes of a batch, or save without probe"
        )
    return found


def hindrance(model: Any) -> str:
    """Why this process cannot run the model by itself, in words; empty where it can."""
    for name, tensor in _tensors_of(model):
        if torch.nn.parameter.is_lazy(tensor):
            return f"its {name} has no shape yet (a lazy module)"
        if tensor.is_meta:
            return f"its {name} is on the meta device"
        if hasattr(tensor, "device_mesh"):
            return f"its {name} is sharded over processes"
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in _modules_of(model)):
        return "it is sharded over processes"
    return ""


def device_of(model: Any) -> torch.device:
    """Where a batch goes: the device that the model says, else that of its first parameter or buffer, else the CPU."""
    own = getattr(model, "device", None)
    if isinstance(own, torch.device):
        return own
    return next((tensor.device for _name, tensor in _tensors_of(model)), torch.device("cpu"))


def dtype_of(model: Any) -> str | None:
    """Dtype of the first floating-point parameter, else buffer, of ``model``."""
    floating = (one.dtype for _name, one in _tensors_of(model) if one.is_floating_point() or one.is_complex())
    return next((str(dtype).removeprefix("torch.") for dtype in floating), None)


def _modules_of(model: Any) -> tuple[torch.nn.Module, ...]:
    """Every module of ``model``; of a composite, also those of its submodels."""
    found: dict[int, torch.nn.Module] = {}
    for root in (model, *(leaf for _path, leaf in leaf_models(model))):
        list_modules = getattr(root, "modules", None)
        for module in list_modules() if callable(list_modules) else ():
            found.setdefault(id(module), module)
    return tuple(found.values())


def _tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every parameter of all modules, then of every buffer."""
    modules = _modules_of(model)
    for held in ("_parameters", "_buffers"):
        for module in modules:
            for name, tensor in getattr(module, held).items():
                if tensor is not None:
                    yield name, tensor
