"""What the import of a plugin must not change, and whether the imported module is the one of its distribution."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from noether_init_core.errors import KindImportError
from noether_init_core.files.storage.disk import LOCAL, reaching
from noether_init_core.kinds.hints import install_extra
from noether_init_core.messages import listed, logger_of, one_line
from noether_init_core.settings import isolated

_logger = logger_of(__name__)
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
        again = install_extra(distribution, target, error) or again
        raise KindImportError(
            f"{who}: importing {target} raised {type(error).__name__}: {one_line(str(error))}. "
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


def shadowed_by(distribution: str, target: str) -> str | None:
    """The file of the module that ``target`` refers to if it is not the file that ``distribution`` installed.

    A folder beside the script that has the name of an installed package comes first on the import path. An editable
    distribution owns what lies in its folder. None where it is the same file, where the module is not imported, and
    where the distribution has no source file of that name, such as an extension module.
    """
    module = target.partition(":")[0].strip()
    imported = getattr(sys.modules.get(module), "__file__", None)
    if imported is None:
        return None
    path = module.replace(".", "/")
    try:
        installed = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:  # its metadata folder has a name that is not normalized
        return None
    places = [Path(str(installed.locate_file(f"{path}{end}"))) for end in (".py", "/__init__.py")]
    with reaching(Path(imported)):
        own = [one for one in places if LOCAL.is_file(one)]
        folder = None if own else _editable_folder(installed)
        if folder is not None:
            is_own = LOCAL.resolve(Path(imported)).is_relative_to(LOCAL.resolve(folder))
        else:
            is_own = not own or any(LOCAL.is_same_file(one, Path(imported)) for one in own)
    return None if is_own else str(imported)


def _editable_folder(installed: importlib.metadata.Distribution) -> Path | None:
    """The folder of an editable distribution; source: PEP 610."""
    try:
        found = json.loads(installed.read_text("direct_url.json") or "{}")
        is_editable = found["dir_info"]["editable"] is True
        return Path(url2pathname(urlsplit(found["url"]).path)) if is_editable else None
    except (ValueError, KeyError, TypeError):  # written by an installer that does it in another way
        return None
