"""Text where a path is expected, and what pathlib would silently make a local folder of: a URI, and ``~``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from noether_init_core.errors import ConfigError
from noether_init_core.messages import one_line

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
    scheme, after = uri[1].lower(), text[uri.end() :]
    if scheme == "file":
        path, host = _path_of(after)
        where = f"copy it from {one_line(host)}" if host else one_line(path)
        raise ConfigError(f"'{one_line(text)}' is a URI; only paths are read. Next: {where}")
    raise ConfigError(
        # a Path has one slash of the two
        f"'{uri[1]}://{one_line(after.lstrip('/'))}' is a URI of {uri[1]}; runs and files are read from folders of "
        "this machine only. Next: mount the store, or copy the run, and give that folder"
    )


def _path_of(after: str) -> tuple[str, str]:
    """The path of a URI of ``file``, and the other machine that it names; ``after``: what follows ``file:/``."""
    host, _slash, below = after.removeprefix("/").partition("/")
    if after.startswith("/"):
        path, host = f"/{below.lstrip('/')}", "" if host.lower() == "localhost" else host
    else:
        # a Path has lost slashes, so that a host may follow the one that is left
        path, host = (f"/{below}" if host.lower() == "localhost" and below else f"/{after}"), ""
    return unquote(path), host
