"""A model is run in passing: afterwards flags, buffers and random generators are what they were, to the bit."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import attrs
import numpy
import torch

from noether_init_core.binding import BoundModel
from noether_init_core.errors import ConfigError, type_of
from noether_init_core.protocols import leaf_models

__all__ = ["Quiet", "called", "device_of", "hindrance", "modules_of", "quietly", "same_bits"]

#: What models draw from that draw random numbers in evaluation, too.
_SEED = 0x50524F4245


def modules_of(model: Any) -> tuple[torch.nn.Module, ...]:
    """Every module of ``model``; of a composite, also those of its submodels."""
    found: dict[int, torch.nn.Module] = {}
    for root in (model, *(leaf for _path, leaf in leaf_models(model))):
        list_modules = getattr(root, "modules", None)
        for module in list_modules() if callable(list_modules) else ():
            found.setdefault(id(module), module)
    return tuple(found.values())


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
    for module in modules_of(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if torch.nn.parameter.is_lazy(tensor):
                return f"its {name} has no shape yet (a lazy module)"
            if tensor.is_meta:
                return f"its {name} is on the meta device"
            if hasattr(tensor, "device_mesh"):
                return f"its {name} is sharded over processes"
        if type(module).__name__ == "FullyShardedDataParallel":
            return "it is sharded over processes"
    return ""


def device_of(model: Any) -> torch.device:
    """Where a batch goes: the device that the model says, else that of its first parameter or buffer, else the CPU."""
    own = getattr(model, "device", None)
    if isinstance(own, torch.device):
        return own
    for module in modules_of(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                return tensor.device
    return torch.device("cpu")


@attrs.define(eq=False)
class Quiet:
    """What ``quietly`` finds out about the block."""

    has_drawn: bool = False


@contextlib.contextmanager
def quietly(model: Any) -> Iterator[Quiet]:
    """Run ``model`` in the block: evaluating, without gradient and autocast, with random generators seeded alike.

    Afterwards every train flag, every buffer and the random generators of the process are as they were, also if the
    block raises. A non-persistent buffer that got another shape, such as a table that has grown, stays.

    Raises ``ConfigError`` after the block if the model changed a parameter, or the names or shapes of what is saved:
    that cannot be put back.

    Yields: an object whose ``has_drawn`` says at the end of the block whether random numbers were drawn in it.
    """
    before = _State.of(modules_of(model))
    generators = _Generators.taken()
    quiet = Quiet()
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(generators.put_back)
            stack.callback(before.put_back)
            stack.enter_context(torch.no_grad())
            for kind in {"cpu", device_of(model).type}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            for module, _was_training in before.flags:
                # eval() may be overridden, and change weights (adapters that are merged then)
                module.training = False
            generators.seed()
            seeded = _Generators.taken()
            yield quiet
            quiet.has_drawn = not _Generators.taken().is_same_as(seeded)
    except BaseException as error:
        if before.changed():
            error.add_note(f"{model.name}: {before.changed()}")
        raise
    changed = before.changed()
    if changed:
        raise ConfigError(f"{model.name}: {changed}. A model that changes while it evaluates cannot have a probe")


def same_bits(first: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; NaN equals NaN then."""
    if first.dtype is not other.dtype or first.shape != other.shape:
        return False
    bytes_of = [one.detach().contiguous().reshape(-1).view(torch.uint8) for one in (first, other)]
    return torch.equal(*bytes_of)


@attrs.frozen(eq=False)
class _State:
    """Flags and buffers of modules as they were, and parameters with the number of writes to them."""

    flags: tuple[tuple[torch.nn.Module, bool], ...]
    buffers: tuple[tuple[torch.nn.Module, dict[str, tuple[torch.Tensor, torch.Tensor]]], ...]
    parameters: tuple[tuple[torch.nn.Module, dict[str, tuple[torch.Tensor, tuple[int, ...]]]], ...]
    saved: tuple[tuple[torch.nn.Module, frozenset[str]], ...]

    @classmethod
    def of(cls, modules: tuple[torch.nn.Module, ...]) -> _State:
        return cls(
            tuple((module, module.training) for module in modules),
            tuple(
                (module, {name: (buffer, buffer.detach().clone()) for name, buffer in _held(module._buffers)})
                for module in modules
                if module._buffers
            ),
            tuple(
                (module, {name: (parameter, _writes(parameter)) for name, parameter in _held(module._parameters)})
                for module in modules
            ),
            tuple((module, _persistent(module)) for module in modules),
        )

    @torch.no_grad()
    def put_back(self) -> None:
        for module, was_training in self.flags:
            module.training = was_training
        for module, buffers in self.buffers:
            for name, (buffer, value) in buffers.items():
                found = module._buffers.get(name)
                # another shape under a name that is not saved: a cache has grown, and its module knows
                if found is not buffer and (found is None or found.shape == buffer.shape):
                    module._buffers[name] = buffer
                if not same_bits(buffer, value):
                    buffer.copy_(value)

    def changed(self) -> str:
        """What could not be put back, in words; empty where all was."""
        for module, parameters in self.parameters:
            for name, (parameter, writes) in parameters.items():
                if module._parameters.get(name) is not parameter or _writes(parameter) != writes:
                    return f"its forward changes the parameter {name} of a {type(module).__name__}"
        for module, names in self.saved:
            other = sorted(names ^ _persistent(module))
            if other:
                return f"its forward changes which entries a {type(module).__name__} saves: {', '.join(other)}"
        for module, buffers in self.buffers:
            for name, (buffer, _value) in buffers.items():
                if module._buffers.get(name) is not buffer and name in _persistent(module):
                    return f"its forward gives the buffer {name} of a {type(module).__name__} another shape"
        return ""


def _persistent(module: torch.nn.Module) -> frozenset[str]:
    hidden = module._non_persistent_buffers_set
    return frozenset([*module._parameters, *(name for name in module._buffers if name not in hidden)])


def _held(tensors: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _writes(tensor: torch.Tensor) -> tuple[int, ...]:
    """How often it and its gradient were written to in place; tensors made in inference mode do not count."""
    grad = tensor.grad
    found = (tensor,) if grad is None else (tensor, grad)
    return (id(grad), *(0 if one.is_inference() else one._version for one in found))


@attrs.frozen(eq=False)
class _Generators:
    """States of the global random generators: of Python, NumPy, torch, and of accelerators that are in use."""

    of_python: Any
    of_numpy: dict[str, Any]
    of_torch: torch.Tensor
    accelerators: tuple[tuple[torch.Generator, torch.Tensor], ...]

    @classmethod
    def taken(cls) -> _Generators:
        return cls(
            random.getstate(),
            dict(numpy.random.get_state(legacy=False)),
            torch.get_rng_state(),
            tuple((generator, generator.get_state()) for generator in _accelerators()),
        )

    def seed(self) -> None:
        # torch.manual_seed would also seed accelerators that nobody uses yet, once they are used
        torch.default_generator.manual_seed(_SEED)
        random.seed(_SEED)
        numpy.random.seed(_SEED % 2**32)
        for generator, _state in self.accelerators:
            generator.manual_seed(_SEED)

    def put_back(self) -> None:
        random.setstate(self.of_python)
        numpy.random.set_state(self.of_numpy)
        torch.set_rng_state(self.of_torch)
        for generator, state in self.accelerators:
            generator.set_state(state)

    def is_same_as(self, other: _Generators) -> bool:
        tensors = zip(
            (self.of_torch, *(state for _generator, state in self.accelerators)),
            (other.of_torch, *(state for _generator, state in other.accelerators)),
            strict=True,
        )
        return (
            self.of_python == other.of_python
            and _is_equal(self.of_numpy, other.of_numpy)
            and all(torch.equal(one, two) for one, two in tensors)
        )


def _is_equal(first: Any, other: Any) -> bool:
    """Of states of NumPy's generator: dicts with numbers, texts, an array."""
    if isinstance(first, dict):
        return all(_is_equal(value, other[key]) for key, value in first.items())
    return bool(numpy.array_equal(first, other))


def _accelerators() -> list[torch.Generator]:
    """Generators of accelerators that were used; one that was not has drawn nothing, and asking would start it."""
    found: list[torch.Generator] = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch lacks it
        found += torch.cuda.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found
