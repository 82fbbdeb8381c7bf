"""What installed distributions offer under an entry-point group, read from their metadata; nothing is imported.

A scan of a group reads the ``entry_points.txt`` of every distribution once. Name and version are read when they are
asked for, of the distributions that offer something: that is most of what a scan would cost.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

__all__ = [
    "ALLOW_VARIABLE",
    "DENY_VARIABLE",
    "Offer",
    "blocking_variable",
    "clear_cache",
    "normalized",
    "offers",
    "sound",
    "without_installed",
]

ALLOW_VARIABLE = "NOETHER_INIT_ALLOW"
DENY_VARIABLE = "NOETHER_INIT_DENY"

_logger = logging.getLogger(__name__)
_METADATA_FILES = ("METADATA", "PKG-INFO", "")
_lock = threading.Lock()
_scanned: dict[str, dict[str, tuple[Offer, ...]]] = {}
_hidden: list[str] = []
# of which the log has said that they are left out
_told: set[Offer] = set()


@attrs.frozen(eq=False, slots=False)
class Offer:
    """One entry point of one distribution."""

    name: str
    target: str
    group: str
    _distribution: importlib.metadata.Distribution = attrs.field(repr=False)

    @functools.cached_property
    def identity(self) -> tuple[str, str | None]:
        """Name and version of the distribution. Raises whatever broken metadata of a stranger leads to."""
        return _identity(self._distribution)

    @property
    def distribution(self) -> str:
        """The name of the distribution, as it writes it itself."""
        return self.identity[0]

    @property
    def version(self) -> str | None:
        """The version of the distribution; None where its metadata does not say one."""
        return self.identity[1]

    def load(self) -> Any:
        """Import what the entry point leads to. Raises whatever that raises."""
        return importlib.metadata.EntryPoint(self.name, self.target, self.group).load()


def offers(group: str) -> dict[str, tuple[Offer, ...]]:
    """Name -> everything that is offered under it in ``group``; scanned once per process, see ``clear_cache``.

    Of a distribution that is found twice on the import path, the first one counts, as in an import. One whose metadata
    cannot be read is left out, and the log says so. May be called by several threads, and by a plugin while it is
    imported.
    """
    if group in _hidden:
        return {}
    found = _scanned.get(group)
    if found is None:
        left_out: list[str] = []
        with _lock:
            found = _scanned.get(group)
            if found is None:
                found = _scanned[group] = _by_name(_find(group, left_out))
        # a handler of the log may ask for kinds itself, so the lock is free again
        for reason in left_out:
            _logger.warning("left out a distribution whose metadata cannot be read: %s", reason)
    return found


def sound(found: Iterable[Offer]) -> tuple[Offer, ...]:
    """The offers whose distribution tells its name; others are left out, and the log says so."""
    return tuple(offer for offer in found if _tells_its_name(offer))


@contextlib.contextmanager
def without_installed(group: str) -> Iterator[None]:
    """Within the block nothing is offered under ``group``, whatever is installed. For tests."""
    _hidden.append(group)
    try:
        yield
    finally:
        _hidden.remove(group)


def _tells_its_name(offer: Offer) -> bool:
    try:
        return bool(_own_name(offer._distribution, offer.distribution))
    except Exception as error:  # metadata of a stranger may be broken in any way, and must not take ours along
        if offer not in _told:
            _told.add(offer)
            _logger.warning("left out a distribution whose metadata cannot be read: %s", error)
        return False


def clear_cache() -> None:
    """Forget every scan: the next use sees distributions that were installed or removed since."""
    _scanned.clear()
    _told.clear()
    importlib.invalidate_caches()


def normalized(distribution: str) -> str:
    """The name of a distribution as names are compared: ``Noether.Init_Core`` is ``noether-init-core``."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def blocking_variable(distribution: str) -> str | None:
    """The environment variable that shuts a distribution out; None where none does. Read anew at each call."""
    name = normalized(distribution)
    # An allow list that is set but empty allows nothing: a list for safety must not open up by a typing error.
    allow = os.environ.get(ALLOW_VARIABLE)
    if allow is not None and name not in _names_in(allow):
        return ALLOW_VARIABLE
    if name in _names_in(os.environ.get(DENY_VARIABLE, "")):
        return DENY_VARIABLE
    return None


def _names_in(text: str) -> set[str]:
    return {normalized(name) for name in text.split(",") if name.strip()}


def _by_name(found: Iterator[Offer]) -> dict[str, tuple[Offer, ...]]:
    named: dict[str, list[Offer]] = {}
    for offer in found:
        named.setdefault(offer.name, []).append(offer)
    return {name: tuple(same) for name, same in named.items()}


def _find(group: str, left_out: list[str]) -> Iterator[Offer]:
    # The first distribution of a name on sys.path is the one that is imported; editable and doubled installs show
    # the same name again further back.
    seen: set[str] = set()
    header = f"[{group}]"
    for distribution in importlib.metadata.distributions():
        try:
            name = _cheap_name(distribution) or _own_name(distribution, _identity(distribution)[0])
            if name in seen:
                continue
            text = _entry_points_of(distribution)
            if text is None:  # what an interrupted uninstall left behind hides nobody
                continue
            seen.add(name)
            if header not in text:
                continue
            for point, target in dict.fromkeys(_points(text, header)):
                yield Offer(point, target, group, distribution)
        except Exception as error:  # metadata of a stranger may be broken in any way, and must not take ours along
            left_out.append(str(error))


def _entry_points_of(distribution: importlib.metadata.Distribution) -> str | None:
    """The text of ``entry_points.txt``, empty where there is none; None for a folder without metadata.

    Raises ``ValueError`` for a file that is no file, which would block.
    """
    folder = getattr(distribution, "_path", None)
    if isinstance(folder, Path):
        try:
            if not stat.S_ISREG((folder / "entry_points.txt").stat().st_mode):
                raise ValueError(f"{folder.name}/entry_points.txt is no file")
        except (FileNotFoundError, NotADirectoryError):
            return "" if folder.is_file() or any((folder / name).exists() for name in _METADATA_FILES[:2]) else None
    return distribution.read_text("entry_points.txt") or ""


def _points(text: str, header: str) -> Iterator[tuple[str, str]]:
    """Name and target of each line of one section of ``entry_points.txt``.

    Source: the entry points specification of the Python Packaging Authority; case counts, comments begin a line.
    """
    inside = False
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("["):
            inside = line == header
        elif inside and line and line[0] not in "#;":
            name, sign, target = line.partition("=")
            if sign and name.strip() and target.strip():
                yield name.strip(), target.strip()


def _cheap_name(distribution: importlib.metadata.Distribution) -> str | None:
    """The name out of the name of the metadata folder, which needs no file to be read; None where it says none."""
    path = getattr(distribution, "_path", None)
    match = re.fullmatch(r"(.+)-[^-]+\.dist-info", getattr(path, "name", ""))
    return normalized(match[1]) if match else None


def _own_name(distribution: importlib.metadata.Distribution, said: str) -> str:
    """The name that its metadata ``said``, as names are compared.

    Raises ``ValueError`` where the folder says another one: it would pass for that, in messages and in the allow list.
    """
    folder, name = _folder_of(distribution), normalized(said)
    if folder and not re.fullmatch(rf"{re.escape(name)}(-\d.*)?-(dist-info|egg-info|egg)", normalized(folder)):
        raise ValueError(f"the metadata of {folder} says that its name is {said}")
    return name


def _folder_of(distribution: importlib.metadata.Distribution) -> str:
    """The name of the folder of metadata, which the installer has made; of an egg, that of the egg."""
    path = getattr(distribution, "_path", None)
    name = str(getattr(path, "name", ""))
    return str(path.parent.name) if name == "EGG-INFO" and path is not None else name


def _identity(distribution: importlib.metadata.Distribution) -> tuple[str, str | None]:
    """Name and version. ``Distribution.metadata`` parses the whole description too, which takes most of a scan."""
    for file in _METADATA_FILES:
        text = distribution.read_text(file)
        if text:
            header = text.replace("\r\n", "\n").split("\n\n", 1)[0]
            fields = [re.search(rf"^{field}:[ \t]*(\S+)", header, re.MULTILINE) for field in ("Name", "Version")]
            name, version = (found.group(1) if found else None for found in fields)
            if name is not None:
                return name, version
    raise ValueError(f"{getattr(distribution, '_path', 'a distribution')} has no name in its metadata")
