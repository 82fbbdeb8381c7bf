"""A model is run in passing: what the run may change is kept, and afterwards it is what it was, to the bit."""

from __future__ import annotations

import collections
import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import attrs
import numpy
import torch
import xxhash

from noether_init_core.errors import ConfigError, type_of
from noether_init_core.models import BoundModel, leaf_models
from noether_init_core.nested import equal, mapped

_MAX_DEPTH = 8
_Generator: TypeAlias = torch.Generator | random.Random | numpy.random.Generator | numpy.random.RandomState


class Kept:
    """The state of modules as it is now.

    Kept are the attributes of modules (so also their children, hooks and flags), and what containers in them hold:
    tensors, generators, and other containers. Other objects are not searched. Of parameters only what is written into
    their memory cannot be put back, which ``put_back`` reports.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self.generators: list[_Generator] = []
        self._undo: list[Callable[[], None]] = []
        self._parameters: list[_Parameter] = []
        self._seen: set[int] = set()
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in self._seen:
                    self._seen.add(id(parameter))
                    self._parameters.append(_Parameter.of(parameter, f"{name} of a {type(module).__name__}"))
        for module in modules:
            self._keep(vars(module), 0)

    @torch.no_grad()
    def put_back(self) -> str:
        """Put everything back. Returns what could not be put back, in words."""
        for undo in self._undo:
            undo()
        return next(filter(None, [kept.put_back() for kept in self._parameters]), "")

    def _keep(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > _MAX_DEPTH:
            return
        if isinstance(value, torch.Tensor):
            if _is_plain(value):
                before = value.detach().clone()
                self._undo.append(lambda: _write(value, before))
        elif isinstance(value, _Generator) and not isinstance(value, random.SystemRandom):  # that one has no state
            self.generators.append(value)
        elif isinstance(value, dict):
            content = dict(value)
            self._undo.append(lambda: _refill(value, content, value.update))
        elif isinstance(value, list | collections.deque | set):
            items = list(value)
            self._undo.append(lambda: _refill(value, items, value.update if isinstance(value, set) else value.extend))
        elif not isinstance(value, tuple):
            return
        self._seen.add(id(value))
        if isinstance(value, dict | list | collections.deque | set | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                self._keep(item, depth + 1)


@attrs.frozen(eq=False)
class _Parameter:
    """A parameter, what tells whether it was written to, and what can be put back of it."""

    parameter: torch.nn.Parameter
    place: str
    alias: torch.Tensor
    grad: torch.Tensor | None
    requires_grad: bool
    written: tuple[int, ...]
    grad_written: int

    @classmethod
    def of(cls, parameter: torch.nn.Parameter, place: str) -> _Parameter:
        alias, grad = parameter.detach(), parameter.grad
        return cls(parameter, place, alias, grad, parameter.requires_grad, _written(alias), _writes(grad))

    def put_back(self) -> str:
        parameter = self.parameter
        if parameter.grad is not self.grad:
            parameter.grad = self.grad
        if _is_plain(parameter) and parameter.data_ptr() != self.alias.data_ptr():
            parameter.data = self.alias
        if parameter.is_leaf and parameter.requires_grad is not self.requires_grad:
            parameter.requires_grad_(self.requires_grad)
        if _writes(self.grad) != self.grad_written:
            return f"its forward changes the gradient of the parameter {self.place}"
        return "" if _written(self.alias) == self.written else f"its forward changes the parameter {self.place}"


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


def _refill(container: Any, content: Any, refill: Callable[[Any], Any]) -> None:
    now, then = (list(map(id, one.values() if isinstance(one, dict) else one)) for one in (container, content))
    if now != then or list(container) != list(content):
        container.clear()
        refill(content)


def _writes(tensor: torch.Tensor | None) -> int:
    """How often it was written to in place; tensors made in inference mode do not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _written(tensor: torch.Tensor) -> tuple[int, ...]:
    """Number of writes and a checksum of the bytes: the counter does not see what is written through ``.data``."""
    if not _is_plain(tensor) or not tensor.numel():
        return (_writes(tensor),)
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    if content.device.type == "cpu":
        return _writes(tensor), xxhash.xxh3_64_intdigest(content.numpy().data)
    whole = content.numel() // 8 * 8
    return _writes(tensor), int(content[:whole].view(torch.int64).sum()), int(content[whole:].sum())


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


@attrs.define(eq=False)
class Quiet:
    """What ``quietly`` finds out about the block."""

    has_drawn: bool = False


@contextlib.contextmanager
def quietly(model: Any) -> Iterator[Quiet]:
    """Run ``model`` in the block: evaluating, without gradient and autocast, with random generators seeded alike.

    Afterwards the attributes of all modules (flags, buffers, children, hooks; see ``Kept``) and the random generators
    of the process and of modules are as they were, also if the block raises.

    Raises ``ConfigError`` after the block if the model wrote into a parameter or a gradient, which cannot be put back.

    Yields: an object whose ``has_drawn`` says at the end of the block whether random numbers were drawn in it.
    """
    modules = modules_of(model)
    kept = Kept(modules)
    generators = Generators(kept.generators)
    quiet = Quiet()
    problems: list[str] = []
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(generators.put_back)
            stack.callback(lambda: problems.append(kept.put_back()))
            stack.enter_context(torch.no_grad())
            for kind in {"cpu", device_of(model).type}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            for module in modules:
                # eval() may be overridden, and change weights (adapters that are merged then)
                module.training = False
            generators.seed(_SEED)
            seeded = Generators(kept.generators)
            yield quiet
            quiet.has_drawn = seeded.have_moved()
    except BaseException as error:
        for problem in filter(None, problems):
            error.add_note(f"{model.name}: {problem}")
        raise
    for problem in filter(None, problems):
        raise ConfigError(
            f"{model.name}: {problem}. It is changed now: build or load it again. A model that changes while it "
            "evaluates cannot have a probe"
        )
