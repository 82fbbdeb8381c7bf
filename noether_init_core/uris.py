"""Text where a path is expected, and what pathlib would silently make a local folder of: a URI, and ``~``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from noether_init_core.errors import ConfigError

#: At least two letters, since ``C:`` is a drive.
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local_path(value: str | os.PathLike[str]) -> Path:
    """``value`` as a path; ``~`` or ``~name`` at its start is the home folder of a user, also in a config.

    Raises ``ConfigError`` for a URI, which as a path would be a folder of this machine.
    """
    text = os.fspath(value)
    uri = _URI.match(text)
    if uri is None:
        return Path(os.path.expanduser(text))
    rest = text[uri.end() :].lstrip("/")
    if uri[1] == "file":
        raise ConfigError(f"'file:///{rest}' is a URI; only paths are read. Next: /{rest}")
    raise ConfigError(
        # a Path has one slash of the two
        f"'{uri[1]}://{rest}' is a URI of {uri[1]}; runs and files are read from folders of this machine only. "
        "Next: mount the store, or copy the run, and give that folder"
    )
