"""What the import of a plugin must not change, and whether the imported module is the one of its distribution."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from noether_init_core.errors import KindImportError
from noether_init_core.messages import listed

#: Name for messages, how to read the setting, how to put it back.
Setting = tuple[str, Callable[[], Any], Callable[[Any], object]]


_logger = logging.getLogger(__name__)
# One stack resolves a kind several times.
_warned_of: set[str] = set()


@contextlib.contextmanager
def importing(who: str, kind: str, target: str, distribution: str | None) -> Iterator[None]:
    """Run the import of a plugin, called ``who`` in messages, so that it changes nothing but ``sys.modules``.

    Two warnings name the plugin: if it changed a generator or a default, which is put back, and if the module that was
    imported is another one than ``distribution`` installed. None: this package's own, which is trusted.

    Raises ``KindImportError`` for whatever the plugin raises, also ``SystemExit``.
    """
    changed: list[str] = []
    try:
        with contextlib.nullcontext() if distribution is None else isolated(changed):
            yield
    except (Exception, SystemExit) as error:
        # the target is foreign text, and the command is meant to be pasted into a shell
        parts = re.fullmatch(r"([\w.]+)\s*:\s*(\w+)[\w.]*\s*(\[.*\])?", target, re.ASCII)
        again = f'python -c "from {parts[1]} import {parts[2]}"' if parts else f"ninit check {kind}"
        raise KindImportError(
            f"{who}: importing {target} raised {type(error).__name__}: {error}. "
            f"Other {who.partition(' ')[0]}s are not affected. Next: {again}",
            kind=kind,
        ) from error
    finally:
        if changed:
            _logger.warning("%s changed %s while it was imported; put back", who, listed(changed))
    if distribution is not None and (other := shadowed_by(distribution, target)) and other not in _warned_of:
        _warned_of.add(other)
        _logger.warning(
            "%s was imported from %s, which is not a file of its distribution. "
            "Next: start in another folder, or rename that file or folder",
            who,
            other,
        )


@contextlib.contextmanager
def isolated(changed: list[str]) -> Iterator[None]:
    """Put back every generator and default that the block changes, and send what it prints to ``sys.stderr``.

    A plugin that seeds at import would give every run the same numbers; one that prints would break ``--json``. The
    names of what was put back are appended to ``changed``, also when the block raises. Not covered: generators of CUDA
    that were never used, output that bypasses ``sys.stdout``, and generators of other threads.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")  # if the plugin imported it first, its earlier state would be unknown
    had_numpy = "numpy" in sys.modules
    before = [(setting, setting[1]()) for setting in _settings()]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for (name, read, write), value in before:
            if not _same(read(), value):
                write(value)
                changed.append(name)
        if "numpy" in sys.modules and not had_numpy:
            sys.modules["numpy"].random.seed()  # as after any first import: from the operating system


def _settings() -> Iterator[Setting]:
    yield "Python's generator", random.getstate, random.setstate
    yield "the working folder", _folder, lambda folder: os.chdir(folder) if folder else None
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        yield "NumPy's generator", numpy.random.get_state, numpy.random.set_state
    if "torch" in sys.modules:
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
        yield "cuDNN's settings", lambda: _flags(torch), lambda flags: _set_flags(torch, flags)
        yield "torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled
        yield "torch's number of threads", torch.get_num_threads, torch.set_num_threads
        yield "torch's matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
        yield (
            "torch's deterministic algorithms",
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
        )


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted
        return ""


def _flags(torch: Any) -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.enabled, cudnn.benchmark, cudnn.deterministic


def _set_flags(torch: Any, flags: tuple[bool, bool, bool]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = flags


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    found = one == other
    return bool(found.all()) if hasattr(found, "all") else bool(found)


def shadowed_by(distribution: str, target: str) -> str | None:
    """The file of the module that ``target`` refers to if it is not the file that ``distribution`` installed.

    A folder beside the script that has the name of an installed package comes first on the import path. None where it
    is the same file, where the module is not imported, and where the distribution lists no file of that name, such as
    an editable one.
    """
    module = target.partition(":")[0].strip()
    imported = getattr(sys.modules.get(module), "__file__", None)
    if imported is None:
        return None
    path = module.replace(".", "/")
    files = importlib.metadata.distribution(distribution).files or ()
    own = [Path(str(one.locate())) for one in files if one.as_posix() in (f"{path}.py", f"{path}/__init__.py")]
    is_own = any(one.exists() and one.samefile(imported) for one in own)
    return None if is_own or not own else str(imported)
