"""Why a path leads to nothing, in words."""

from __future__ import annotations

import itertools
import os
import shlex
from pathlib import Path

from noether_init_core.messages import near, one_line

# Names of a folder that are looked at; it may be on a network disk.
_MOST = 1_000


def no_folder(folder: Path) -> str:
    """The first part of a folder's path that does not exist, where it was looked for, and near names. Never raises."""
    missing = next((part for part in (*reversed(folder.parents), folder) if _is_absent(part)), folder)
    where = missing.parent
    try:
        with os.scandir(where) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST) if entry.is_dir()]
    except OSError:
        names = []
    found = [one_line(str(where / name)) for name in near(missing.name, sorted(names))]
    nearest = f". Near: {', '.join(found)}" if found else ""
    return f"folder {one_line(str(missing))} does not exist in {one_line(os.path.abspath(where))}{nearest}"


def _is_absent(path: Path) -> bool:
    """Whether nothing is there; not where the look fails."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # another error names it
        return False
    return False


def absence(path: Path) -> str:
    """The end of a sentence about a path at which nothing was found: a link that leads nowhere is named as such.

    Without such a link it is ``does not exist``. Never raises.
    """
    for part in (*reversed(path.parents), path):
        try:
            target = os.readlink(part)
            os.stat(part)
        except FileNotFoundError:
            if _is_absent(part):
                return "does not exist"
            broken = f"a link to {one_line(target)}, which does not exist"
            what = f"is {broken}" if part == path else f"does not exist: {one_line(str(part))} is {broken}"
            return f"{what}. Next: ls -l {shlex.quote(one_line(str(part)))}, then mount its disk or make the link again"
        except OSError:  # no link, or one that cannot be looked at: another error names it
            continue
    return "does not exist"
