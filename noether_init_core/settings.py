"""Settings of the process that decide what a training run computes, and that the import of a plugin must not change."""

from __future__ import annotations

import contextlib
import decimal
import gc
import importlib
import locale
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

#: Name for messages, how to read the setting, how to put it back.
Setting = tuple[str, Callable[[], Any], Callable[[Any], object]]

#: Variables that choose devices, ranks, threads and algorithms, or what this package allows.
_DECISIVE = (
    "CUBLAS_", "CUDA_", "GLOO_", "GOMP_", "HIP_", "KMP_", "LOCAL_RANK", "MASTER_", "MKL_", "NCCL_", "NOETHER_INIT_",
    "NVIDIA_", "OMP_", "OPENBLAS_", "PYTHONHASHSEED", "PYTORCH_", "RANK", "ROCR_", "TORCH_", "WORLD_SIZE",
)  # fmt: skip
#: Signals that schedulers send before they end a job, and that a training loop handles.
_SIGNALS = [
    one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM")
]
#: Devices whose autocast is looked at.
_DEVICES = ("cpu", "cuda")
#: What decides a result in decimal arithmetic; flags are results themselves.
_OF_DECIMAL = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp", "traps")
#: Functions of ``torch.backends.cuda``: reads a switch of scaled dot product attention, sets it.
_OF_ATTENTION = (
    ("flash_sdp_enabled", "enable_flash_sdp"), ("mem_efficient_sdp_enabled", "enable_mem_efficient_sdp"),
    ("math_sdp_enabled", "enable_math_sdp"), ("cudnn_sdp_enabled", "enable_cudnn_sdp"),
    ("fp16_bf16_reduction_math_sdp_allowed", "allow_fp16_bf16_reduction_math_sdp"),
)  # fmt: skip
_OF_CUBLAS = (
    "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation",
)  # fmt: skip


@contextlib.contextmanager
def isolated(changed: list[str]) -> Iterator[None]:
    """Put back every generator and setting that the block changes, and send what it prints to ``sys.stderr``.

    A plugin that seeds at import would give every run the same numbers; one that prints would break ``--json``. The
    names of what was put back are appended to ``changed``, also when the block raises.

    Filters for every warning are put back; others are for single dependencies, and stay.

    Not covered: generators of CUDA that were never used, those of other threads, output that bypasses ``sys.stdout``,
    the number of threads between operations, and modes of torch that stay entered. Also not covered: ``sys.path``,
    handlers of loggers, functions that were replaced, and what runs at exit.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")  # if the plugin imported it first, its earlier state would be unknown
    had_numpy = "numpy" in sys.modules
    before = [(setting, setting[1]()) for setting in (*_of_python(), *_of_numpy(), *_of_torch())]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for (name, read, write), value in before:
            try:
                if not _same(read(), value):
                    changed.append(name)
                    write(value)
            except Exception as error:  # the others must still be put back
                changed.append(f"{name}, which cannot be put back ({type(error).__name__}: {error})")
        if "numpy" in sys.modules and not had_numpy:
            sys.modules["numpy"].random.seed()  # as after any first import: from the operating system


def _of_python() -> Iterator[Setting]:
    yield "Python's generator", random.getstate, random.setstate
    yield "the working folder", _folder, lambda folder: os.chdir(folder) if folder else None
    yield "variables of the environment", _variables, _set_variables
    yield "the level below which logging is off", lambda: logging.root.manager.disable, logging.disable
    yield "the level of the root logger", lambda: logging.root.level, logging.root.setLevel
    yield "the mask of permissions for new files", _mask, os.umask
    yield "the locale", lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)
    yield "the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit
    yield "filters of warnings", _Filters.present, _Filters.put_back
    yield "the context of decimal numbers", _decimals, _set_decimals
    yield "the timeout of sockets", socket.getdefaulttimeout, socket.setdefaulttimeout
    yield (
        "the start method of processes",
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda method: multiprocessing.set_start_method(method, force=True),
    )
    yield "the garbage collector", lambda: (gc.isenabled(), gc.get_threshold()), _set_collector
    if threading.current_thread() is threading.main_thread():
        # a handler of C code is None, and cannot be set from Python
        yield "handlers of signals", lambda: [signal.getsignal(one) for one in _SIGNALS], _set_handlers


def _of_numpy() -> Iterator[Setting]:
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        yield "NumPy's generator", numpy.random.get_state, numpy.random.set_state
        yield "NumPy's handling of errors", numpy.geterr, lambda modes: numpy.seterr(**modes)


def _of_torch() -> Iterator[Setting]:
    if "torch" not in sys.modules:
        return
    torch = sys.modules["torch"]
    yield "torch's generator", torch.get_rng_state, torch.set_rng_state
    if torch.cuda.is_initialized():
        yield "the generators of CUDA", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
    yield "torch's default dtype", torch.get_default_dtype, torch.set_default_dtype
    # None takes the mode of the device away again; the CPU as default device is the state without one
    yield (
        "torch's default device",
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    )
    yield "cuDNN's settings", *_attributes(torch.backends.cudnn, ("enabled", "benchmark", "deterministic"))
    yield "MKL-DNN's settings", *_attributes(torch.backends.mkldnn, ("enabled",))
    yield "torch's precision of float32", lambda: _precisions(torch), lambda found: _set_precisions(torch, found)
    yield "cuBLAS's settings", *_attributes(torch.backends.cuda.matmul, _OF_CUBLAS)
    yield (
        "torch's libraries for CUDA",
        *_functions(
            torch.backends.cuda, [(name, name) for name in ("preferred_linalg_library", "preferred_blas_library")]
        ),
    )
    yield "torch's backends of attention", *_functions(torch.backends.cuda, _OF_ATTENTION)
    yield (
        "the fast path of attention modules",
        *_functions(torch.backends.mha, [("get_fastpath_enabled", "set_fastpath_enabled")]),
    )
    yield "torch's treatment of tiny numbers", _flushes_to_zero, torch.set_flush_denormal
    yield "torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled
    yield "torch's anomaly mode", torch.is_anomaly_enabled, torch.set_anomaly_enabled
    yield "autocast", lambda: [torch.is_autocast_enabled(one) for one in _DEVICES], lambda on: _set_autocast(torch, on)
    yield "torch's number of threads", torch.get_num_threads, torch.set_num_threads
    yield (
        "torch's deterministic algorithms",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
    )


def _attributes(owner: Any, names: Iterable[str]) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def write(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(owner, name, value)

    return lambda: {name: getattr(owner, name) for name in names}, write


def _functions(
    owner: Any, pairs: Iterable[tuple[str, str]]
) -> tuple[Callable[[], list[Any]], Callable[[list[Any]], None]]:
    """For settings that one function reads and another one sets."""
    known = [(getattr(owner, read), getattr(owner, write)) for read, write in pairs]

    def write(values: list[Any]) -> None:
        for (_read, change), value in zip(known, values, strict=True):
            change(value)

    return lambda: [read() for read, _change in known], write


@attrs.frozen
class _Filters:
    """The filters that apply to every warning, which decide; and all filters in order."""

    general: list[Any]
    every: list[Any] = attrs.field(eq=False)

    @classmethod
    def present(cls) -> _Filters:
        every = list(warnings.filters)
        return cls([one for one in every if _is_general(one)], every)

    def put_back(self) -> None:
        """Take general filters that came since away; without the earlier ones, all filters are those from before."""
        now = [one for one in warnings.filters if not _is_general(one) or one in self.general]
        warnings.resetwarnings()
        warnings.filters[:] = now if all(one in now for one in self.general) else self.every  # type: ignore[index]


def _is_general(one: Any) -> bool:
    _action, message, category, module, line = one
    return message is None and module is None and not line and issubclass(Warning, category)


def _decimals() -> dict[str, Any]:
    context = decimal.getcontext()
    found = {name: getattr(context, name) for name in _OF_DECIMAL}
    return {**found, "traps": dict(context.traps)}


def _set_decimals(values: dict[str, Any]) -> None:
    context = decimal.getcontext()
    context.traps.update(values["traps"])
    for name in _OF_DECIMAL[:-1]:
        setattr(context, name, values[name])


def _mask() -> int:
    """The permissions that new files do not get."""
    with contextlib.suppress(OSError):
        found = re.search(rb"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_bytes(), re.MULTILINE)
        if found:
            return int(found[1], 8)
    # elsewhere it can only be read by setting it; files of other threads must not be open to others meanwhile
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _flushes_to_zero() -> bool:
    """Whether results below the smallest normal number are zero; torch has no function that tells."""
    smallest, half = sys.float_info.min, 0.5
    return smallest * half == 0.0


@attrs.frozen
class _Precisions:
    """The precision of each backend and operation, which decide; and the one word for products, if there is one."""

    each: list[str]
    products: str | None = attrs.field(eq=False)


def _precisions(torch: Any) -> _Precisions:
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:  # there is no such word, because the backends were set one by one
        products = None
    return _Precisions([one.fp32_precision for one in _with_precision(torch)], products)


def _set_precisions(torch: Any, found: _Precisions) -> None:
    # torch refuses to read the word if it contradicts the backends
    if found.products is not None:
        torch.set_float32_matmul_precision(found.products)
    for one, precision in zip(_with_precision(torch), found.each, strict=True):
        one.fp32_precision = precision


def _with_precision(torch: Any) -> tuple[Any, ...]:
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    return torch.backends, cudnn, mkldnn, cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn


def _set_autocast(torch: Any, is_on: list[bool]) -> None:
    for device, value in zip(_DEVICES, is_on, strict=True):
        torch.set_autocast_enabled(device, value)


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted
        return ""


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_DECISIVE)}


def _set_variables(variables: dict[str, str]) -> None:
    for name in _variables().keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _set_collector(state: tuple[bool, tuple[int, int, int]]) -> None:
    is_on, thresholds = state
    (gc.enable if is_on else gc.disable)()
    gc.set_threshold(*thresholds)


def _set_handlers(handlers: list[Any]) -> None:
    for number, handler in zip(_SIGNALS, handlers, strict=True):
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    found = one == other
    return bool(found.all()) if hasattr(found, "all") else bool(found)
