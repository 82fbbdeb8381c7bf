"""A model is run in passing: what the run may change is kept, and afterwards it is what it was, to the bit."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy
import torch
import xxhash

from noether_init_core.errors import ConfigError, type_of
from noether_init_core.models import BoundModel, leaf_models
from noether_init_core.nested import equal, mapped

_Generator: TypeAlias = torch.Generator | random.Random | numpy.random.Generator | numpy.random.RandomState
_Container: TypeAlias = dict[Any, Any] | list[Any] | set[Any]


class Kept:
    """The state of modules as it is now.

    Kept are the attributes of modules (flags, counters), what they hold if they are tensors or generators, and which
    entries they have if they are lists, sets or dicts (so also buffers, children and hooks). Nothing deeper is kept.
    Of parameters only what is written into their memory cannot be put back, which ``put_back`` reports.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self.generators: list[_Generator] = []
        self._containers: list[tuple[_Container, _Container, list[Any]]] = []
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._parameters: dict[int, _Parameter] = {}
        for module in modules:
            held = vars(module)
            for value in (held, *held.values()):
                if isinstance(value, dict | list | set):
                    self._containers.append((value, copy.copy(value), _entries(value)))
            for value in (*held.values(), *module._buffers.values()):
                if isinstance(value, torch.Tensor) and _is_plain(value):
                    self._tensors.setdefault(id(value), (value, value.detach().clone()))
                # that of the system has no state
                elif isinstance(value, _Generator) and not isinstance(value, random.SystemRandom):
                    self.generators.append(value)
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in self._parameters:
                    self._parameters[id(parameter)] = _Parameter(parameter, f"{name} of a {type(module).__name__}")

    @torch.no_grad()
    def put_back(self) -> str:
        """Put everything back. Returns what could not be put back, in words."""
        for container, content, entries in self._containers:
            if _entries(container) != entries:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for tensor, before in self._tensors.values():
            _write(tensor, before)
        return next(filter(None, [kept.put_back() for kept in self._parameters.values()]), "")


class _Parameter:
    """A parameter, what tells whether it was written to, and what can be put back of it."""

    def __init__(self, parameter: torch.nn.Parameter, place: str) -> None:
        self._parameter = parameter
        self._place = place
        self._alias = parameter.detach()
        self._grad = parameter.grad
        self._requires_grad = parameter.requires_grad
        self._written = _checksum(self._alias), _writes(self._grad)

    def put_back(self) -> str:
        parameter = self._parameter
        if parameter.grad is not self._grad:
            parameter.grad = self._grad
        if _is_plain(parameter) and parameter.data_ptr() != self._alias.data_ptr():
            parameter.data = self._alias
        if parameter.is_leaf and parameter.requires_grad is not self._requires_grad:
            parameter.requires_grad_(self._requires_grad)
        checksum, writes = self._written
        if _writes(self._grad) != writes:
            return f"its forward changes the gradient of the parameter {self._place}"
        return "" if _checksum(self._alias) == checksum else f"its forward changes the parameter {self._place}"


class Generators:
    """States of random generators: those of the process, those of accelerators in use, and others that are given."""

    def __init__(self, others: Iterable[_Generator] = ()) -> None:
        # the generators behind the functions of both modules
        own = [getattr(function, "__self__") for function in (random.getstate, numpy.random.get_state)]  # noqa: B009 - the types of these functions lack it
        self._states = [(one, _state_of(one)) for one in (*own, torch.default_generator, *_accelerators(), *others)]

    def seed(self, seed: int) -> None:
        """Start all of them anew, so that what is drawn depends on nothing before."""
        for generator, _state in self._states:
            _seed(generator, seed)

    def put_back(self) -> None:
        """Set all of them to their states."""
        for generator, state in self._states:
            _set_state(generator, state)

    def have_moved(self) -> bool:
        """Whether one of them has another state now."""
        return not all(_is_same(_state_of(generator), state) for generator, state in self._states)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta


def _write(tensor: torch.Tensor, before: torch.Tensor) -> None:
    if tensor.shape != before.shape or tensor.dtype is not before.dtype:
        tensor.data = before
    # a needless write would disturb a graph that waits for its backward
    elif not equal(tensor.detach(), before):
        with torch.inference_mode(tensor.is_inference()):
            tensor.detach().copy_(before)


def _entries(container: _Container) -> list[Any]:
    """Keys of a dict, and which objects it has."""
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return list(map(id, container))


def _writes(tensor: torch.Tensor | None) -> int:
    """How often it was written to in place; tensors made in inference mode do not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _checksum(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of its bytes: the counter of writes does not see what is written through ``.data``."""
    if not _is_plain(tensor) or not tensor.numel():
        return (_writes(tensor),)
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    if content.device.type == "cpu":
        return (xxhash.xxh3_64_intdigest(content.numpy().data),)
    whole = content.numel() // 8 * 8
    return int(content[:whole].view(torch.int64).sum()), int(content[whole:].sum())


def _state_of(generator: _Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, numpy.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def _set_state(generator: _Generator, state: Any) -> None:
    if isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed(generator: _Generator, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, numpy.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    # seed() is for Mersenne twisters alone
    elif generator.get_state(legacy=False)["bit_generator"] == "MT19937":
        generator.seed(seed % 2**32)


def _is_same(first: Any, other: Any) -> bool:
    """Of states of generators."""
    plain = [
        mapped(one, lambda leaf: leaf.tobytes() if isinstance(leaf, numpy.ndarray) else leaf) for one in (first, other)
    ]
    return equal(*plain)


def _accelerators() -> list[torch.Generator]:
    """Generators of accelerators that were used; one that was not has drawn nothing, and asking would start it."""
    found: list[torch.Generator] = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch lacks it
        found += torch.cuda.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found


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


def tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every parameter of ``modules_of(model)``, then of every buffer."""
    modules = modules_of(model)
    for held in ("_parameters", "_buffers"):
        for module in modules:
            for name, tensor in getattr(module, held).items():
                if tensor is not None:
                    yield name, tensor


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
    for name, tensor in tensors_of(model):
        if torch.nn.parameter.is_lazy(tensor):
            return f"its {name} has no shape yet (a lazy module)"
        if tensor.is_meta:
            return f"its {name} is on the meta device"
        if hasattr(tensor, "device_mesh"):
            return f"its {name} is sharded over processes"
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules_of(model)):
        return "it is sharded over processes"
    return ""


def device_of(model: Any) -> torch.device:
    """Where a batch goes: the device that the model says, else that of its first parameter or buffer, else the CPU."""
    own = getattr(model, "device", None)
    if isinstance(own, torch.device):
        return own
    return next((tensor.device for _name, tensor in tensors_of(model)), torch.device("cpu"))


@contextlib.contextmanager
def quietly(model: Any) -> Iterator[Callable[[], bool]]:
    """Run ``model`` in the block: evaluating, without gradient and autocast, with random generators seeded alike.

    Afterwards the attributes of all modules (flags, buffers, children, hooks; see ``Kept``) and the random generators
    of the process and of modules are as they were, also if the block raises.

    Raises ``ConfigError`` after the block if the model wrote into a parameter or a gradient, which cannot be put back.

    Yields: a function that says whether random numbers have been drawn in the block so far.
    """
    modules = modules_of(model)
    kept = Kept(modules)
    generators = Generators(kept.generators)

    def put_back() -> str:
        generators.put_back()
        problem = kept.put_back()
        return f"{model.name}: {problem}" if problem else ""

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in {"cpu", device_of(model).type}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            for module in modules:
                # eval() may be overridden, and change weights (adapters that are merged then)
                module.training = False
            generators.seed(_SEED)
            yield Generators(kept.generators).have_moved
    except BaseException as error:
        problem = put_back()
        if problem:
            error.add_note(problem)
        raise
    problem = put_back()
    if problem:
        raise ConfigError(
            f"{problem}. It is changed now: build or load it again. A model that changes while it evaluates cannot "
            "have a probe"
        )
