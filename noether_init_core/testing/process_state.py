"""Snapshots of the process: the settings, generators and hooks that all code in it shares."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import decimal
import gc
import json
import locale
import logging
import multiprocessing
import os
import pickle
import pkgutil
import random
import signal
import socket
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

#: Names in ``state_of_process`` of the global generators.
GENERATORS = ("torch's generator", "NumPy's generator", "Python's generator")

#: Modules and classes whose functions nobody may replace.
_OWNERS = (
    builtins, os, pickle, random, json, logging, torch, torch.serialization,
    torch.nn.init, torch.nn.Module, torch.nn.Parameter, torch.optim.Optimizer, np, np.random,
)  # fmt: skip
#: The switches of ``torch.backends.cuda.matmul``, which answers by ``__getattr__``.
_OF_CUBLAS = (
    "allow_tf32", "fp32_precision", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def state_of_process() -> dict[str, Any]:
    """The settings and generators that all code in this process shares."""
    numpy_state: Any = np.random.get_state(legacy=True)
    state = {
        "torch's generator": torch.random.get_rng_state().clone(),
        "NumPy's generator": [str(numpy_state[0]), np.asarray(numpy_state[1]).tolist(), *map(str, numpy_state[2:])],
        "Python's generator": random.getstate(),
        **_state_of_torch(),
        **_state_of_logging(),
        "working folder": os.getcwd(),
        # pytest sets it to the name of the running test
        "environment variable": {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"},
        "umask": _umask(),
        "sys.path": list(sys.path),
        "sys.argv": list(sys.argv),
        "import hooks": [id(one) for one in (*sys.meta_path, *sys.path_hooks)],
        "standard streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr)],
        "warning filters": [str(one) for one in warnings.filters],
        "excepthook": [sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook],
        "functions at exit": atexit._ncallbacks(),
        "trace functions": [sys.getprofile(), threading.gettrace(), threading.getprofile()],
        "garbage collector": (gc.isenabled(), gc.get_threshold(), len(gc.callbacks)),
        "the handler of": {
            number.name: signal.getsignal(number)
            for number in sorted(signal.valid_signals())
            if isinstance(number, signal.Signals)
        },
        "timers": [signal.getitimer(one)[1] for one in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)]
        if hasattr(signal, "getitimer")
        else [],
        "limits": _limits(),
        "locale": locale.setlocale(locale.LC_ALL),
        "decimal context": repr(decimal.getcontext()),
        "NumPy's error handling": np.geterr(),
        "NumPy's print options": {key: str(value) for key, value in np.get_printoptions().items()},
        "recursion limit": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "timeout of sockets": socket.getdefaulttimeout(),
        "folder of temporary files": tempfile.tempdir,
        "start method of processes": multiprocessing.get_start_method(allow_none=True),
        "child processes": len(multiprocessing.active_children()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "the function": _functions(),
    }
    found: dict[str, Any] = {}
    for name, value in state.items():
        found.update({f"{name} {key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value})
    return found


def _state_of_torch() -> dict[str, Any]:
    nn, cuda = torch.nn.modules.module, torch.backends.cuda
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "torch's modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "torch's number of threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch's deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "the switch torch.backends": dict(_backends()),
        "the switch torch.backends.cuda": {
            name: str(getattr(cuda, name)())
            for name in dir(cuda)
            if name.endswith("_enabled") or name.startswith("preferred_")
        },
        "torch's gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch's anomaly mode": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "torch's autocast": [
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        ],
        "torch's treatment of denormal numbers": float(torch.tensor([1e-310], dtype=torch.float64).mul(0.5)) == 0.0,
        "torch's print options": str(vars(torch._tensor_str.PRINT_OPTS)),
        # torch allows its own classes while it is imported, part by part
        "torch's allowed classes": len(
            [one for one in map(str, torch.serialization.get_safe_globals()) if "torch." not in one]
        ),
        "torch's options of torch.save and torch.load": (
            torch.serialization.get_crc32_options(),
            torch.serialization.get_default_mmap_options(),
            str(torch.serialization.get_default_load_endianness()),
        ),
        "torch's rules for loading": [
            getattr(torch.__future__, name)()
            for name in ("get_overwrite_module_params_on_conversion", "get_swap_module_params_on_conversion")
        ],
        "torch's global module hooks": {
            name: len(value)
            for name, value in vars(nn).items()
            if name.startswith("_global_") and name.endswith("_hooks")
        },
        "torch's sharing of memory": torch.multiprocessing.get_sharing_strategy(),  # type: ignore[no-untyped-call]
        "torch's process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "torch's warnings": torch.is_warn_always_enabled(),
    }


def _backends() -> Iterator[tuple[str, str]]:
    """Every switch of ``torch.backends``, such as ``cudnn.benchmark``."""
    owners: dict[str, Any] = {"": torch.backends, "cuda.matmul.": torch.backends.cuda.matmul}
    for found in pkgutil.iter_modules(torch.backends.__path__):
        module = sys.modules.get(f"{torch.backends.__name__}.{found.name}")
        owners[f"{found.name}."] = module
        # conv, matmul and rnn have a precision of their own
        owners |= {f"{found.name}.{name}.": one for name, one in vars(type(module)).items() if hasattr(one, "_backend")}
    for place, owner in owners.items():
        for name in (*vars(owner or object), *vars(type(owner)), *_OF_CUBLAS):
            # a switch may be absent from this build
            with contextlib.suppress(RuntimeError, AttributeError, AssertionError):
                value = getattr(owner, name)
                if not name.startswith("__") and isinstance(value, bool | int | float | str | None):
                    yield f"{place}{name}", str(value)
    yield "mha.fastpath", str(torch.backends.mha.get_fastpath_enabled())


def _state_of_logging() -> dict[str, Any]:
    manager = logging.root.manager
    loggers = {
        name: (logger.level, logger.disabled, logger.propagate, len(logger.handlers), _filters(logger))
        for name, logger in manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    new = logging.NOTSET, False, True, 0, 0
    return {
        "root logger": (logging.root.level, [type(handler).__name__ for handler in logging.root.handlers]),
        "disabled logging": (manager.disable, logging.raiseExceptions),
        "classes of logging": (logging.getLoggerClass(), logging.getLogRecordFactory()),
        # a logger that is made and not changed is no difference
        "the logger": {name: state for name, state in sorted(loggers.items()) if state != new},
    }


def _filters(logger: logging.Logger) -> int:
    """The number of filters; that of the core, which every logger of an initializer has, is left out."""
    return len([one for one in logger.filters if not type(one).__module__.startswith("noether_init_core.")])


def _functions() -> dict[str, int]:
    return {
        f"{owner.__name__}.{name}": id(value)
        for owner in _OWNERS
        for name, value in vars(owner).items()
        if isinstance(value, _FUNCTIONS)
    }


def _umask() -> int:
    mask = os.umask(0)  # it cannot be read without setting it
    os.umask(mask)
    return mask


def _limits() -> dict[str, Any]:
    try:
        import resource
    except ImportError:  # Windows
        return {}
    names = ("RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_STACK", "RLIMIT_CORE", "RLIMIT_CPU")
    return {name: resource.getrlimit(getattr(resource, name)) for name in names}
