"""Why a path leads to nothing, in words."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from noether_init_core.messages import one_line


def absence(path: Path) -> str:
    """The end of a sentence about a path at which nothing was found: a link that leads nowhere is named as such.

    Without such a link it is ``does not exist``. Never raises.
    """
    for part in (*reversed(path.parents), path):
        try:
            target = os.readlink(part)
            os.stat(part)
        except FileNotFoundError:
            if not os.path.lexists(part):
                return "does not exist"
            broken = f"a link to {one_line(target)}, which does not exist"
            what = f"is {broken}" if part == path else f"does not exist: {one_line(str(part))} is {broken}"
            return f"{what}. Next: ls -l {shlex.quote(one_line(str(part)))}, then mount its disk or make the link again"
        except OSError:  # no link, or one that cannot be looked at: another error names it
            continue
    return "does not exist"
