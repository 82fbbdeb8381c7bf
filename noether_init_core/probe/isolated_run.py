"""A model is run in passing: afterwards flags, buffers and random generators are what they were, to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import attrs
import torch

from noether_init_core.binding import BoundModel
from noether_init_core.errors import ConfigError, type_of
from noether_init_core.probe.kept import Generators, Kept
from noether_init_core.protocols import leaf_models

__all__ = ["Quiet", "called", "device_of", "hindrance", "quietly", "tensors_of"]

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
