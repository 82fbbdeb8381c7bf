"""What modules keep beside parameters and buffers: counters, lists, tensors, generators, hooks, extra state."""

from __future__ import annotations

import collections
import copy
import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import numpy
import torch

__all__ = ["Attributes", "is_equal", "same_bits"]

#: What ``quietly`` looks after by itself.
_OTHERS = frozenset({"_parameters", "_buffers", "_modules", "training"})
_MAX_DEPTH = 4


def same_bits(first: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; NaN equals NaN then."""
    if first.dtype is not other.dtype or first.shape != other.shape:
        return False
    bytes_of = [one.detach().contiguous().reshape(-1).view(torch.uint8) for one in (first, other)]
    return torch.equal(*bytes_of)


@attrs.define(eq=False)
class Attributes:
    """Attributes of modules as they were, down to containers in containers; other objects are not looked into."""

    _own: list[tuple[torch.nn.Module, dict[str, Any]]] = attrs.Factory(list)
    _containers: list[tuple[Any, Any]] = attrs.Factory(list)
    _tensors: list[tuple[torch.Tensor, torch.Tensor]] = attrs.Factory(list)
    _generators: list[tuple[Any, Any]] = attrs.Factory(list)
    _extra: list[tuple[torch.nn.Module, Any]] = attrs.Factory(list)

    @classmethod
    def of(cls, modules: Iterable[torch.nn.Module]) -> Attributes:
        found, modules = cls(), tuple(modules)
        # parameters and buffers are looked after elsewhere, also where an attribute holds them once more
        known = {id(one) for module in modules for one in (*module._parameters.values(), *module._buffers.values())}
        for module in modules:
            own = {key: value for key, value in vars(module).items() if key not in _OTHERS}
            found._own.append((module, own))
            for value in own.values():
                found._keep(value, known, 0)
            if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
                found._extra.append((module, copy.deepcopy(module.get_extra_state())))
        return found

    def _keep(self, value: Any, known: set[int], depth: int) -> None:
        if id(value) in known or depth > _MAX_DEPTH:
            return
        inner: Iterable[Any] = ()
        if isinstance(value, torch.Tensor):
            if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided:
                self._tensors.append((value, value.detach().clone()))
        elif _generator_of(value) is not None:
            self._generators.append((value, _state_of(value)))
        elif isinstance(value, dict):
            self._containers.append((value, dict(value)))
            inner = value.values()
        elif isinstance(value, list | set | collections.deque):
            self._containers.append((value, list(value)))
            inner = value
        elif isinstance(value, tuple):
            inner = value
        else:
            return
        known.add(id(value))
        for item in inner:
            self._keep(item, known, depth + 1)

    def seed(self, seed: int) -> None:
        """Begin all generators anew, so that what is drawn depends on nothing before."""
        for generator, _state in self._generators:
            _seed(generator, seed)

    def have_drawn(self, seed: int) -> bool:
        """Whether a generator has drawn since ``seed``."""
        for generator, _state in self._generators:
            now = _state_of(generator)
            _seed(generator, seed)
            begun = _state_of(generator)
            _set_state(generator, now)
            if not is_equal(now, begun):
                return True
        return False

    def put_back(self) -> str:
        """All as it was; returns what could not be put back, in words."""
        for module, own in self._own:
            here = vars(module)
            for key in [key for key in here if key not in own and key not in _OTHERS]:
                del here[key]
            for key, value in own.items():
                if here.get(key, here) is not value:
                    here[key] = value
        for container, content in self._containers:
            _fill(container, content)
        for generator, state in self._generators:
            _set_state(generator, state)
        for tensor, value in self._tensors:
            if tensor.shape != value.shape or tensor.dtype is not value.dtype:
                tensor.data = value
            elif not same_bits(tensor, value):
                tensor.detach().copy_(value)
        for module, state in self._extra:
            if not is_equal(module.get_extra_state(), state):
                module.set_extra_state(copy.deepcopy(state))
                if not is_equal(module.get_extra_state(), state):
                    return f"its forward changes the extra state of a {type(module).__name__}"
        return ""


def _fill(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        is_same = list(container) == list(content) and all(container[key] is content[key] for key in content)
        refill: Callable[[Any], Any] = container.update
    else:
        is_same = len(container) == len(content) and all(
            one is two for one, two in zip(container, content, strict=True)
        )
        refill = container.update if isinstance(container, set) else container.extend
    if not is_same:
        container.clear()
        refill(content)


def _generator_of(value: Any) -> Any:
    if isinstance(value, random.SystemRandom):  # it has no state
        return None
    kinds = (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)
    return value if isinstance(value, kinds) else None


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, numpy.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    if isinstance(generator, numpy.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, numpy.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    elif isinstance(generator, numpy.random.RandomState):
        # seed() is for Mersenne twisters alone, and so is the state of a new one
        if generator.get_state(legacy=False)["bit_generator"] == "MT19937":
            generator.seed(seed % 2**32)
    else:
        generator.seed(seed)


def is_equal(first: Any, other: Any) -> bool:
    """Of states: tensors and arrays by their bits, containers by what is in them, other objects by their pickles."""
    if type(first) is not type(other):
        return False
    if isinstance(first, torch.Tensor):
        return same_bits(first, other)
    if isinstance(first, numpy.ndarray):
        return bool(first.dtype == other.dtype and first.shape == other.shape and first.tobytes() == other.tobytes())
    if isinstance(first, dict):
        return list(first) == list(other) and all(is_equal(value, other[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(other) and all(map(is_equal, first, other))
    try:
        return bool(first == other) or pickle.dumps(first) == pickle.dumps(other)
    except Exception:
        return False
