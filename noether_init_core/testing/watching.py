"""What code does while it is watched: files that it opens, pickles that name code, initializers that it makes."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import attrs
import torch

from noether_init_core.initializers.base import InitializerBase

#: Modules whose own pickles come from other processes of this program, and not from a checkpoint.
_MESSENGERS = ("multiprocessing", "concurrent", "torch.multiprocessing", "torch.distributed")
_OPENING = {"open", "os.listdir", "os.scandir", "os.open", "glob.glob", "pathlib.Path.glob", "mmap.__new__"}
_found: list[Event] | None = None


@attrs.frozen
class Event:
    """Something that was done, and the line of the author's code that did it.

    Attributes:
        what: ``opens`` or ``unpickles``.
        about: A path, or the name of a global.
        place: File and line.
    """

    what: str
    about: str
    place: str


@contextlib.contextmanager
def watched() -> Iterator[list[Event]]:
    """Collect what this process opens and unpickles in the block."""
    global _found
    _install()
    found: list[Event] = []
    before, _found = _found, found
    try:
        yield found
    finally:
        _found = before


@contextlib.contextmanager
def made_initializers() -> Iterator[list[InitializerBase]]:
    """Collect the initializers that are made in the block."""
    found: list[InitializerBase] = []
    original = InitializerBase.__new__

    def noted(cls: type[InitializerBase], *arguments: Any, **keywords: Any) -> InitializerBase:
        made = original(cls, *arguments, **keywords)
        found.append(made)
        return made

    InitializerBase.__new__ = noted  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        InitializerBase.__new__ = original  # type: ignore[method-assign]


_is_installed = False


def _install() -> None:
    global _is_installed
    if not _is_installed:
        sys.addaudithook(_note)
        _is_installed = True


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _found is None:
        return
    if event == "pickle.find_class":
        if not any(str(frame.f_globals.get("__name__", "")).startswith(_MESSENGERS) for frame in _frames()):
            _found.append(Event("unpickles", ".".join(map(str, arguments)), _place()))
    elif event in _OPENING and arguments and isinstance(arguments[0], str | bytes | os.PathLike):
        _found.append(Event("opens", os.fsdecode(arguments[0]), _place()))


def _frames() -> Iterator[types.FrameType]:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place() -> str:
    """The innermost line that is neither of Python, nor of torch, nor of this module."""
    library = os.path.dirname(os.__file__), os.path.dirname(torch.__file__), __file__, "<frozen"
    site = f"{os.sep}site-packages{os.sep}"
    for frame in _frames():
        name = frame.f_code.co_filename
        if site in name.removeprefix(library[1]) or not name.startswith(library):
            return f"{name}:{frame.f_lineno}"
    return "unknown"
