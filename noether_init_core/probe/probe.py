"""The probe of a set: run a model on a batch when the set is saved, and again after it was loaded."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import numpy
import pydantic
import torch
import xxhash

from noether_init_core.errors import ConfigError, text_of, type_of
from noether_init_core.files.plain_data import plain
from noether_init_core.files.reading import memory_of_tensor
from noether_init_core.messages import one_line
from noether_init_core.models import BoundModel, leaf_models
from noether_init_core.nested import equal, mapped
from noether_init_core.probe.outputs import Output, has_values, outputs_of, uncompared

_Generator: TypeAlias = torch.Generator | random.Random | numpy.random.Generator | numpy.random.RandomState

#: The seed of random generators during a run, for models that draw random numbers in evaluation mode.
_SEED = 0x50524F4245


class Probe(pydantic.BaseModel):
    """A batch, and the outputs of a model for it.

    Attributes:
        batch: CPU tensors, plain values, and dicts, lists and tuples of them. A dict is passed as keyword arguments, a
            list or tuple as arguments, anything else as the only argument.
        outputs: Records of all tensors, numbers and strings in the returned value.
        model: Name of the model.
        models: Paths of its single models; for a single model its name.
        device: Type of the device that it ran on.
        dtype: Dtype of its first floating-point parameter or buffer; None for a model without one.
        has_drawn: Whether it drew random numbers. The generators were seeded, but other types of devices draw others.
        uncompared: Objects in the returned value that cannot be compared, in words.
        computed_by: Release of torch, number of threads, and processor.
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

    @pydantic.field_validator("outputs")
    @classmethod
    def _have_one_path_each(cls, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
        if len({one.path for one in outputs}) < len(outputs):
            raise ValueError("two outputs have the same path")
        return outputs


def take(model: Any, batch: Any) -> Probe:
    """Run ``model`` on a batch and record both; the state of model and process is restored, see ``quietly``.

    Raises ``CheckpointFormatError`` for a batch that cannot be saved, ``ConfigError`` if the model cannot be run on it.
    """
    kept = _changed(plain(batch, "probe"), torch.Tensor.clone)
    reason = hindrance(model)
    if reason:
        raise ConfigError(
            f"probe: {model.name} cannot be run here: {reason}. Nothing was written. Next: save without probe="
        )
    try:
        outputs, others, has_drawn = _run(model, kept)
        if not has_values(outputs):
            raise ConfigError(
                f"probe: all outputs of {model.name} are NaN, so they cannot distinguish models. "
                "Next: check its weights, or save without probe="
            )
    except ConfigError as error:
        error.add(". Nothing was written")
        raise
    except Exception as error:
        raise ConfigError(
            f"probe: {model.name} cannot be run on it: {described(error)}. Nothing was written. A dict is passed as "
            "keyword arguments, a list or tuple as arguments, a tensor as the only argument; dtypes are not changed. "
            "Next: pass another probe, or save without probe="
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


def described(error: Exception) -> str:
    """Return an error of a run in words, with its notes about state that could not be restored, see ``quietly``."""
    return "; ".join([f"{type(error).__name__}: {one_line(str(error))}", *getattr(error, "__notes__", ())])


def computed_by(model: Any) -> str:
    """Return what rounding depends on: release of torch, threads, instruction set of the CPU or name of the GPU."""
    device = device_of(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device.type} {name}"


def repeat(model: Any, probe: Probe) -> tuple[Output, ...]:
    """Run ``model`` on the batch of ``probe``; the state of model and process is restored, see ``quietly``.

    If the dtype of the model has changed since the save, the batch is cast to it. Errors of the model are raised.
    """
    now = dtype_of(model)
    then = None if probe.dtype is None else getattr(torch, probe.dtype, None)

    def follow(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(getattr(torch, now)) if now is not None and tensor.dtype is then else tensor

    return _run(model, _changed(probe.batch, follow))[0]


def _run(model: Any, batch: Any) -> tuple[tuple[Output, ...], tuple[str, ...], bool]:
    """Return the outputs, the objects that cannot be compared, and whether random numbers were drawn."""
    function, device = called(model), device_of(model)
    # A copy, because the model may write into its inputs.
    ready = _changed(batch, lambda tensor: tensor.to(device, copy=True))
    with quietly(model) as has_drawn:
        if isinstance(ready, Mapping):
            returned = function(**ready)
        elif isinstance(ready, list | tuple):
            returned = function(*ready)
        else:
            returned = function(ready)
        # Recorded inside the block: an output may be a buffer, whose former value is restored at the end.
        return outputs_of(returned), uncompared(returned), has_drawn()


def _changed(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return mapped(batch, lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf)


@contextlib.contextmanager
def quietly(model: Any) -> Iterator[Callable[[], bool]]:
    """Run ``model`` in the block in evaluation mode, without gradient and autocast, with seeded random generators.

    Afterwards, also if the block raises, these are restored:

    - the random generators of the process,
    - the attributes of all modules (flags, counters, buffers, children, hooks),
    - tensors and generators among these attributes,
    - the entries of lists, sets and dicts among these attributes, and the tensors and generators in them.

    Deeper values are not restored. Parameters are not copied: their memory, gradient and ``requires_grad`` are
    restored,
    and a checksum detects writes into them.

    Raises ``ConfigError`` after the block for state that cannot be restored. If the block itself raised, its error gets
    a note instead.

    Yields: a function that returns whether random numbers of torch were drawn in the block so far.
    """
    modules = _modules_of(model)
    generators, steps = _kept(modules)
    try:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for kind in {"cpu", device_of(model).type}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            for module in modules:
                # Not eval(): a module may override it and change weights, such as an adapter that merges itself.
                module.training = False
            for one in generators:
                _seed(one)
            begun = [(one, one.get_state()) for one in generators if isinstance(one, torch.Generator)]
            yield lambda: not all(equal(one.get_state(), state) for one, state in begun)
    except BaseException as error:
        problem = _put_back(steps)
        if problem:
            error.add_note(f"{model.name}: {problem}. The model was changed. Next: build or load it again")
        raise
    problem = _put_back(steps)
    if problem:
        raise ConfigError(
            f"{model.name}: {problem}. The model was changed, and a model that changes in evaluation mode cannot have "
            "a probe. Next: build or load it again, and save without probe="
        )


@torch.no_grad()
def _put_back(steps: Iterable[Callable[[], object]]) -> str:
    """Run all steps, even if some fail; return the first failure in words."""
    problems = []
    for step in steps:
        try:
            step()
        except ConfigError as error:
            problems.append(str(error))
        except Exception as error:
            problems.append(f"a change by its forward cannot be restored: {type(error).__name__}: {text_of(error)}")
    return problems[0] if problems else ""


def _kept(modules: Sequence[torch.nn.Module]) -> tuple[list[_Generator], list[Callable[[], object]]]:
    """Return the generators that the modules may use, and the steps that restore everything, generators first."""
    tensors: dict[int, _KeptTensor] = {}
    # The global generators of both modules are reachable only as the owner of their functions.
    own = [getattr(function, "__self__") for function in (random.getstate, numpy.random.get_state)]  # noqa: B009 - the types of these functions lack it
    generators: list[_Generator] = [*own, torch.default_generator, *_accelerators()]
    steps: list[Callable[[], object]] = []
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                place = f"the parameter {name} of a {type(module).__name__}"
                tensors.setdefault(id(parameter), _KeptTensor(parameter, place, is_copied=False))
    for module in modules:
        attributes = vars(module)
        containers = [one for one in (attributes, *attributes.values()) if isinstance(one, dict | list | set)]
        steps += [functools.partial(_refill, one, one.copy()) for one in containers]
        # Scripted modules keep buffers and flags outside vars().
        buffers = dict(module._buffers.items())
        steps.append(functools.partial(_reset, module, {"training": module.training, **buffers}))
        for container in (*containers, buffers):
            for value in container.values() if isinstance(container, dict) else container:
                # SystemRandom reads from the operating system and has no state to restore.
                if isinstance(value, _Generator) and not isinstance(value, random.SystemRandom):
                    generators.append(value)
                elif isinstance(value, torch.Tensor) and _is_plain(value) and id(value) not in tensors:
                    tensors[id(value)] = _KeptTensor(value, "a tensor", is_copied=True)
    steps += [one.put_back for one in tensors.values()]
    return generators, [*(functools.partial(_set_state, one, _state_of(one)) for one in generators), *steps]


class _KeptTensor:
    """A tensor and its former state: a copy of its values, or for a parameter, which may be large, a checksum."""

    def __init__(self, tensor: torch.Tensor, place: str, *, is_copied: bool) -> None:
        self._tensor = tensor
        self._place = place
        self._memory = tensor.detach()
        self._nbytes = self._memory.untyped_storage().nbytes() if _is_plain(self._memory) else 0
        self._content = self._memory.clone() if is_copied else _checksum(self._memory)
        self._is_leaf, self._requires_grad = tensor.is_leaf, tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        self._grad_writes = _writes(self._grad)

    def put_back(self) -> None:
        """Restore the tensor. Raises ``ConfigError`` for a parameter or gradient that was written to."""
        tensor, memory, content = self._tensor, self._memory, self._content
        if self._is_leaf and tensor.grad is not self._grad:
            tensor.grad = self._grad
        if self._nbytes and memory.untyped_storage().nbytes() < self._nbytes:
            memory.untyped_storage().resize_(self._nbytes)  # reading a freed storage would crash the process
        if _is_plain(tensor) and _place_of(tensor) != _place_of(memory):
            tensor.data = memory
        if self._is_leaf and tensor.requires_grad is not self._requires_grad:
            tensor.requires_grad_(self._requires_grad)
        if not isinstance(content, torch.Tensor):
            if _checksum(memory) != content:
                raise ConfigError(f"its forward changes {self._place}")
        # Only if it differs: each write raises the version of the tensor, and a pending backward would fail.
        elif not equal(memory, content):
            with torch.inference_mode(memory.is_inference()):
                memory.copy_(content)
        if _writes(self._grad) != self._grad_writes:
            raise ConfigError(f"its forward changes the gradient of {self._place}")


def _refill(container: Any, content: Any) -> None:
    before, now = (
        [(key, id(value)) for key, value in (one.items() if isinstance(one, dict) else enumerate(one))]
        for one in (content, container)
    )
    if now != before:
        container.clear()
        container.extend(content) if isinstance(container, list) else container.update(content)


def _reset(module: torch.nn.Module, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if getattr(module, name) is not value:
            setattr(module, name, value)


def _is_plain(tensor: torch.Tensor) -> bool:
    is_strided = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and is_strided


def _place_of(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _writes(tensor: torch.Tensor | None) -> int:
    """Return the number of in-place writes; 0 for inference tensors, which have no version counter."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _checksum(tensor: torch.Tensor) -> int:
    """Return a checksum of the bytes, because the version counter misses writes through ``.data``."""
    if not _is_plain(tensor):
        return _writes(tensor)
    return xxhash.xxh3_64_intdigest(memory_of_tensor(tensor.cpu().resolve_conj().resolve_neg().contiguous()))


def _seed(generator: _Generator) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(_SEED)
    elif isinstance(generator, numpy.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(_SEED).state
    elif isinstance(generator, random.Random):
        generator.seed(_SEED)
    # RandomState.seed() works only with MT19937.
    elif generator.get_state(legacy=False)["bit_generator"] == "MT19937":
        generator.seed(_SEED % 2**32)


def _state_of(generator: _Generator) -> Any:
    if isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, numpy.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: _Generator, state: Any) -> None:
    if isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _accelerators() -> list[torch.Generator]:
    """Return the generators of initialized accelerators; others drew nothing, and access would initialize them."""
    found: list[torch.Generator] = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch lacks it
        found += torch.cuda.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found


def called(model: Any) -> Any:
    """Return the callable of a model: the module inside a view, ``DistributedDataParallel`` or ``torch.compile``.

    These wrappers would wait for other ranks, or compile again. Raises ``ConfigError`` for a model without
    ``__call__``.
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
            f"{model.name} is {type_of(found)} without __call__, so it cannot be run on a probe. Next: define "
            "__call__(self, batch), or save without probe="
        )
    return found


def hindrance(model: Any) -> str:
    """Return why this process cannot run the complete model; empty if it can."""
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
    """Return the device for a batch: ``device`` of the model, else of its first parameter or buffer, else the CPU."""
    own = getattr(model, "device", None)
    if isinstance(own, torch.device):
        return own
    return next((tensor.device for _name, tensor in _tensors_of(model)), torch.device("cpu"))


def dtype_of(model: Any) -> str | None:
    """Return the dtype of the first floating-point parameter, else buffer, of ``model``; None without one."""
    floating = (one.dtype for _name, one in _tensors_of(model) if one.is_floating_point() or one.is_complex())
    return next((str(dtype).removeprefix("torch.") for dtype in floating), None)


def _modules_of(model: Any) -> tuple[torch.nn.Module, ...]:
    """Return all modules of ``model``, including those of the submodels of a composite."""
    found: dict[int, torch.nn.Module] = {}
    for root in (model, *(leaf for _path, leaf in leaf_models(model))):
        list_modules = getattr(root, "modules", None)
        for module in list_modules() if callable(list_modules) else ():
            found.setdefault(id(module), module)
    return tuple(found.values())


def _tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of all parameters of all modules, then of all buffers."""
    modules = _modules_of(model)
    for held in ("_parameters", "_buffers"):
        for module in modules:
            for name, tensor in getattr(module, held).items():
                if tensor is not None:
                    yield name, tensor
