"""A model is run in passing: afterwards flags, buffers and random generators are what they were, to the bit."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import attrs
import numpy
import torch
import xxhash

from noether_init_core.binding import BoundModel
from noether_init_core.errors import ConfigError, type_of
from noether_init_core.probe.attributes import Attributes, is_equal, same_bits
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

    Afterwards every train flag, every buffer, attributes of modules (see ``Attributes``), and the random generators of
    the process and of modules are as they were, also if the block raises. A non-persistent buffer that got another
    shape, such as a table that has grown, stays.

    Raises ``ConfigError`` after the block if the model changed a parameter, a gradient, its children, or the names or
    shapes of what is saved. Even that is put back, but for what was written into a parameter: then the error says so.

    Yields: an object whose ``has_drawn`` says at the end of the block whether random numbers were drawn in it.
    """
    before = _State.of(modules_of(model))
    generators = _Generators.taken()
    quiet = Quiet()
    problems: list[str] = []
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(generators.put_back)
            stack.callback(lambda: problems.append(before.put_back()))
            stack.enter_context(torch.no_grad())
            for kind in {"cpu", device_of(model).type}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            for module, _was_training in before.flags:
                # eval() may be overridden, and change weights (adapters that are merged then)
                module.training = False
            generators.seed()
            before.attributes.seed(_SEED)
            seeded = _Generators.taken()
            yield quiet
            is_same = _Generators.taken().is_same_as(seeded)
            quiet.has_drawn = not is_same or before.attributes.have_drawn(_SEED)
    except BaseException as error:
        for changed in filter(None, problems):
            error.add_note(f"{model.name}: {changed}")
        raise
    for changed in filter(None, problems):
        lost = "It is changed now: build or load it again. " if before.is_lost() else ""
        raise ConfigError(f"{model.name}: {changed}. {lost}A model that changes while it evaluates cannot have a probe")


@attrs.frozen(eq=False)
class _Parameter:
    """A parameter with the number of writes to it, and what else tells whether it changed."""

    parameter: torch.Tensor
    alias: torch.Tensor
    memory: tuple[Any, ...]
    writes: tuple[int, ...]
    grad: torch.Tensor | None
    grad_writes: tuple[int, ...]
    requires_grad: bool

    @classmethod
    def of(cls, parameter: torch.Tensor, sums: dict[tuple[Any, ...], int]) -> _Parameter:
        return cls(
            parameter,
            parameter.detach(),
            _memory(parameter, sums),
            _writes(parameter),
            parameter.grad,
            _writes(parameter.grad),
            parameter.requires_grad,
        )


@attrs.frozen(eq=False)
class _State:
    """Flags, buffers, children and attributes of modules as they were, and parameters with what tells of changes."""

    flags: tuple[tuple[torch.nn.Module, bool], ...]
    buffers: tuple[tuple[torch.nn.Module, dict[str, tuple[torch.Tensor, torch.Tensor]]], ...]
    parameters: tuple[tuple[torch.nn.Module, dict[str, _Parameter]], ...]
    children: tuple[tuple[torch.nn.Module, dict[str, torch.nn.Module | None]], ...]
    saved: tuple[tuple[torch.nn.Module, frozenset[str]], ...]
    attributes: Attributes

    @classmethod
    def of(cls, modules: tuple[torch.nn.Module, ...]) -> _State:
        sums: dict[tuple[Any, ...], int] = {}
        return cls(
            tuple((module, module.training) for module in modules),
            tuple(
                (module, {name: (buffer, buffer.detach().clone()) for name, buffer in _held(module._buffers)})
                for module in modules
                if module._buffers
            ),
            tuple(
                (module, {name: _Parameter.of(parameter, sums) for name, parameter in _held(module._parameters)})
                for module in modules
            ),
            tuple((module, dict(module._modules)) for module in modules),
            tuple((module, _persistent(module)) for module in modules),
            Attributes.of(modules),
        )

    @torch.no_grad()
    def put_back(self) -> str:
        """Returns what is no probe's business to change, in words, whether or not it could be put back."""
        changed = self._changed()
        for module, was_training in self.flags:
            module.training = was_training
        for module, children in self.children:
            if list(module._modules.items()) != list(children.items()):
                module._modules.clear()
                module._modules.update(children)
        for module, parameters in self.parameters:
            for name in [name for name in module._parameters if name not in parameters]:
                if module._parameters[name] is not None:
                    del module._parameters[name]
            for name, kept in parameters.items():
                module._parameters[name] = kept.parameter  # type: ignore[assignment]  # torch: a Parameter
                _put_back(kept)
        for module, buffers in self.buffers:
            for name, (buffer, value) in buffers.items():
                there = module._buffers.get(name)
                # another shape under a name that is not saved: a cache has grown, and its module knows
                if there is not buffer and (
                    there is None or there.shape == buffer.shape or name in _persistent(module)
                ):
                    module._buffers[name] = buffer
                if not same_bits(buffer, value):
                    with torch.inference_mode(buffer.is_inference()):
                        buffer.copy_(value)
        for module, names in self.saved:
            for name in _persistent(module) - names:
                module._buffers.pop(name, None)
        return changed or self.attributes.put_back()

    def _changed(self) -> str:
        sums: dict[tuple[Any, ...], int] = {}
        for module, children in self.children:
            if list(module._modules.items()) != list(children.items()):
                return f"its forward builds or replaces children of a {type(module).__name__}"
        for module, parameters in self.parameters:
            kind = type(module).__name__
            for name, kept in parameters.items():
                found = module._parameters.get(name)
                if found is not kept.parameter or _writes(found) != kept.writes or _memory(found, sums) != kept.memory:
                    return f"its forward changes the parameter {name} of a {kind}"
                if found.grad is not kept.grad or _writes(found.grad) != kept.grad_writes:
                    return f"its forward leaves a gradient at the parameter {name} of a {kind}"
        for module, names in self.saved:
            other = sorted(names ^ _persistent(module))
            if other:
                return f"its forward changes which entries a {type(module).__name__} saves: {', '.join(other)}"
        for module, buffers in self.buffers:
            for name, (buffer, _value) in buffers.items():
                now = module._buffers.get(name)
                if (now is None or now.shape != buffer.shape) and name in _persistent(module):
                    return f"its forward gives the buffer {name} of a {type(module).__name__} another shape"
        return ""

    def is_lost(self) -> bool:
        """Whether a parameter, or its gradient, is another one still, after all was put back."""
        sums: dict[tuple[Any, ...], int] = {}
        return any(
            _memory(kept.parameter, sums) != kept.memory or _writes(kept.grad) != kept.grad_writes
            for _module, parameters in self.parameters
            for kept in parameters.values()
        )


def _put_back(kept: _Parameter) -> None:
    """All but what was written into its memory."""
    parameter = kept.parameter
    if parameter.grad is not kept.grad:
        parameter.grad = kept.grad
    if _place(parameter) != _place(kept.alias):
        parameter.data = kept.alias
    if parameter.is_leaf and parameter.requires_grad is not kept.requires_grad:
        parameter.requires_grad_(kept.requires_grad)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    if not _is_plain(tensor):
        return ()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _memory(tensor: torch.Tensor, sums: dict[tuple[Any, ...], int]) -> tuple[Any, ...]:
    """Place, form and a checksum of the bytes: version counters do not see what is written through ``.data``."""
    if not _is_plain(tensor):
        return ()
    storage = tensor.untyped_storage()
    key = storage.data_ptr(), storage.nbytes(), tensor.device
    if key not in sums:
        sums[key] = _checksum(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
    return (*_place(tensor), sums[key])


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta


def _checksum(content: torch.Tensor) -> int:
    if not content.numel():
        return 0
    if content.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(content.numpy().data)
    whole = content.numel() // 8 * 8
    return int(content[:whole].view(torch.int64).sum()) + int(content[whole:].sum())


def _persistent(module: torch.nn.Module) -> frozenset[str]:
    hidden = module._non_persistent_buffers_set
    return frozenset([*module._parameters, *(name for name in module._buffers if name not in hidden)])


def _held(tensors: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _writes(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """How often it was written to in place; tensors made in inference mode do not count."""
    return () if tensor is None else (0 if tensor.is_inference() else tensor._version,)


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
            and is_equal(self.of_numpy, other.of_numpy)
            and all(torch.equal(one, two) for one, two in tensors)
        )


def _accelerators() -> list[torch.Generator]:
    """Generators of accelerators that were used; one that was not has drawn nothing, and asking would start it."""
    found: list[torch.Generator] = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch lacks it
        found += torch.cuda.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found
