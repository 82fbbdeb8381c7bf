"""What is said when a command fails: one message, and how to see where. A fault of our own keeps its traceback."""

from __future__ import annotations

import errno
import os
import sys
import traceback

from noether_init_core.errors import InitError, PartlyInitializedError
from noether_init_core.messages import one_line, printable

__all__ = ["TRACEBACK_VARIABLE", "explained", "how_to_see", "show_traceback"]

#: Set to anything but 0, every error of a command comes with its traceback.
TRACEBACK_VARIABLE = "NOETHER_INIT_TRACEBACK"

# What is wrong with a path that was typed, or with the disk, and not with this program.
_OF_PATHS = (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS)
_OURS = "noether_init_core"


def explained(error: Exception) -> str | None:
    """What went wrong, for people; None where only the traceback can say it."""
    if isinstance(error, PartlyInitializedError) and isinstance(error.__cause__, Exception):
        where = _of_a_plugin(error.__cause__)
        return str(error) if where is None else f"{error}\n{where}"
    if isinstance(error, InitError):
        return str(error)
    told = _of_a_plugin(error)
    if told is None and isinstance(error, OSError) and error.errno in _OF_PATHS:
        # without a name it is about standard output
        what = "the output cannot be written" if error.filename is None else one_line(str(error.filename)[:200])
        return f"{what}: {error.strerror}"
    return told


def show_traceback(error: Exception) -> None:
    """Print it on standard error, with all causes, where that was asked for."""
    if _is_wanted():
        traceback.print_exception(error, file=sys.stderr)


def how_to_see() -> str:
    """Ends a message about code of others; empty where the traceback is shown anyway."""
    return "" if _is_wanted() else f" Its traceback: {TRACEBACK_VARIABLE}=1 before the command"


def _is_wanted() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def _of_a_plugin(error: Exception) -> str | None:
    """Who failed and where, if the deepest code that belongs to anybody is that of an installed kind or observer."""
    offered_by = _packages()
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == _OURS:
            return None
        if package in offered_by:
            where = f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname}"
            said = f"{offered_by[package]} failed: {type(error).__name__}: {error} ({where})."
            return printable(f"{said}{how_to_see()}")
    return None


def _packages() -> dict[str, str]:
    """Top-level package -> the distribution that offers kinds or observers from it; without those of the core."""
    from noether_init_core import kinds
    from noether_init_core.observers.loading import installed_observers

    found = {info.target.partition(":")[0].partition(".")[0]: info.source for info in kinds.installed()}
    found.update({info.target.partition(":")[0].partition(".")[0]: info.source for info in installed_observers()})
    found.pop(_OURS, None)
    return found
