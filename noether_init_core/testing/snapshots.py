"""Snapshots of what must not change, as values to compare: a model, the process, files."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import logging
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noether_init_core.messages import listed
from noether_init_core.models import leaf_models
from noether_init_core.nested import equal


def state_of_model(model: Any) -> dict[str, Any]:
    """Every tensor of the model by value and by identity, flags, gradients, and its optimizers."""
    found: dict[str, Any] = {}
    for path, leaf in leaf_models(model):
        for name, tensor in _tensors(leaf):
            is_meta = tensor.is_meta
            found[f"{path} {name}"] = "meta" if is_meta else tensor.detach().clone()
            # views, flat copies and buckets of wrappers refer to the memory, not to the object
            memory = None if is_meta else tensor.data_ptr()
            found[f"identity of {path} {name}"] = (id(tensor), memory, tensor.shape, tensor.dtype, tensor.device)
            found[f"flags of {path} {name}"] = (tensor.requires_grad, tensor.grad is None, tensor.is_leaf)
        found[f"training of {path}"] = tuple(module.training for module in leaf.modules())
        found[f"hooks of {path}"] = tuple(
            len(hooks) for module in leaf.modules() for kind, hooks in vars(module).items() if kind.endswith("_hooks")
        )
        if leaf.optimizer is not None:
            found.update(state_of_optimizer(path, leaf.optimizer))
    return found


def state_of_optimizer(path: str, optimizer: Any) -> dict[str, Any]:
    """State and groups of an optimizer by value, and which tensors it updates."""
    state = copy.deepcopy(optimizer.state_dict())
    found: dict[str, Any] = {
        f"optimizer of {path}: parameters": [id(one) for group in optimizer.param_groups for one in group["params"]],
        f"optimizer of {path}: groups": state["param_groups"],
    }
    for index, values in state["state"].items():
        found.update({f"optimizer of {path}: {index} {name}": value for name, value in values.items()})
    return found


def _tensors(leaf: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from leaf.named_parameters(remove_duplicate=False)
    yield from leaf.named_buffers(remove_duplicate=False)


def state_of_process() -> dict[str, Any]:
    """The settings and generators that all code in this process shares."""
    numpy_state: Any = np.random.get_state(legacy=True)
    return {
        "torch's generator": torch.random.get_rng_state().clone(),
        "NumPy's generator": [str(numpy_state[0]), np.asarray(numpy_state[1]).tolist(), *map(str, numpy_state[2:])],
        "Python's generator": random.getstate(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "working folder": os.getcwd(),
        # pytest sets it to the name of the running test
        "environment": {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"},
        "sys.path": list(sys.path),
        "root logger": (logging.root.level, [type(handler).__name__ for handler in logging.root.handlers]),
        "disabled logging": logging.root.manager.disable,
        "warning filters": [str(one) for one in warnings.filters],
        "excepthook": sys.excepthook,
        "garbage collector": (gc.isenabled(), gc.get_threshold()),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "NumPy's error handling": np.geterr(),
        "recursion limit": sys.getrecursionlimit(),
        "timeout of sockets": socket.getdefaulttimeout(),
        "number of threads": threading.active_count(),
        "loggers of torch and of the core": [
            (name, logger.level, logger.disabled, len(logger.handlers))
            for name, logger in sorted(logging.root.manager.loggerDict.items())
            if isinstance(logger, logging.Logger)
            and name.partition(".")[0] in ("torch", "noether_init_core")
            and (logger.level or logger.disabled or logger.handlers)
        ],
    }


def state_of_files(*folders: Path) -> dict[str, Any]:
    """Every file and folder below ``folders``: mode, time of the last change, and digest of the content."""
    found: dict[str, Any] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.exists() else ():
            status = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            found[str(path)] = (status.st_mode, status.st_mtime_ns if content else None, content)
    return found


def open_files(*folders: Path) -> list[str] | None:
    """The files below ``folders`` that this process has open; None if the system does not list them."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return None
    found = []
    for entry in descriptors.iterdir():
        try:
            target = Path(os.readlink(entry))
        except OSError:  # the descriptor of iterdir() itself, which is closed by now
            continue
        if any(target.is_relative_to(folder.resolve()) for folder in folders):
            found.append(str(target))
    return sorted(found)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names under which the two differ: changed, removed, or new."""
    names = dict.fromkeys([*before, *after])
    return [name for name in names if not (name in before and name in after and equal(before[name], after[name]))]


@contextlib.contextmanager
def unchanged(look: Callable[[], Mapping[str, Any]], what: str, advice: str = "") -> Iterator[None]:
    """Assert that ``look()`` returns the same before and after the block; ``advice`` ends the message."""
    before = look()
    yield
    changed = differences(before, look())
    assert not changed, f"{what} changed {listed(changed)}{advice and '. '}{advice}"
