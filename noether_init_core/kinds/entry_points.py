"""Entry points of installed distributions, found in their metadata; nothing is imported.

A distribution is known by the name of its metadata folder, which the installer made. So a scan reads no file but
``entry_points.txt``, and no distribution can pass for another one by what its metadata says.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

__all__ = [
    "ALLOW_VARIABLE",
    "DENY_VARIABLE",
    "KindInfo",
    "clear_cache",
    "found_under",
    "normalized",
    "offers",
    "without_installed",
]

ALLOW_VARIABLE = "NOETHER_INIT_ALLOW"
DENY_VARIABLE = "NOETHER_INIT_DENY"

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_scanned: dict[str, Mapping[str, tuple[KindInfo, ...]]] = {}
_hidden: list[str] = []


@attrs.frozen
class KindInfo:
    """What is known of a kind (or an observer) without importing it.

    ``distribution`` and ``version`` are None for a kind of ``register``. ``blocked_by`` is the environment variable
    that excludes the distribution, if one does.
    """

    name: str
    distribution: str | None
    version: str | None
    target: str
    blocked_by: str | None = None

    @property
    def source(self) -> str:
        """Distribution and version as messages show them."""
        if self.distribution is None:
            return "registered in this process"
        return f"{self.distribution} {self.version or 'of unknown version'}"


def offers(group: str) -> Mapping[str, tuple[KindInfo, ...]]:
    """Name -> its entry points in ``group``; scanned once per process, see ``clear_cache``.

    Of a distribution that is found twice on the import path, the first one counts, as in an import. One whose metadata
    cannot be read is left out with a warning in the log. Safe to call from several threads, and from a plugin while it
    is imported.
    """
    if group in _hidden:
        return {}
    if group not in _scanned:
        unreadable: list[Exception] = []
        with _lock:
            if group not in _scanned:
                named: dict[str, tuple[KindInfo, ...]] = {}
                for info in _scan(group, unreadable):
                    named[info.name] = (*named.get(info.name, ()), info)
                _scanned[group] = named
        # after the lock is released: a log handler may ask for kinds
        for error in unreadable:
            _logger.warning("left out a distribution whose metadata cannot be read: %s", error)
    return _scanned[group]


def found_under(group: str, name: str) -> list[KindInfo]:
    """The entry points called ``name`` in ``group``, each with what the allow and deny lists say now."""
    found = offers(group).get(name, ())
    return [attrs.evolve(info, blocked_by=variable) if (variable := _blocking(info)) else info for info in found]


def clear_cache() -> None:
    """Forget every scan: the next use sees distributions that were installed or removed since."""
    _scanned.clear()
    importlib.invalidate_caches()


@contextlib.contextmanager
def without_installed(group: str) -> Iterator[None]:
    """Within the block, ``group`` has no entry points, whatever is installed. For tests."""
    _hidden.append(group)
    try:
        yield
    finally:
        _hidden.remove(group)


def normalized(distribution: str) -> str:
    """The name of a distribution as names are compared: ``Noether.Init_Core`` is ``noether-init-core``."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _blocking(info: KindInfo) -> str | None:
    # An allow list that is set but empty allows nothing: a list for safety must not open up by a typing error.
    if ALLOW_VARIABLE in os.environ and info.distribution not in _listed_in(ALLOW_VARIABLE):
        return ALLOW_VARIABLE
    return DENY_VARIABLE if info.distribution in _listed_in(DENY_VARIABLE) else None


def _listed_in(variable: str) -> set[str]:
    return {normalized(name) for name in os.environ.get(variable, "").split(",")}


def _scan(group: str, unreadable: list[Exception]) -> Iterator[KindInfo]:
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        try:
            name, version = _identity(distribution)
            if name in seen or _is_left_over(distribution):
                continue
            seen.add(name)
            # one line twice is no conflict
            points = dict.fromkeys((one.name, one.value) for one in distribution.entry_points if one.group == group)
            for point, target in points:
                yield KindInfo(point, name, version or distribution.version, target)
        except Exception as error:  # metadata may be broken in any way, and must not make other kinds unusable
            unreadable.append(error)


def _identity(distribution: importlib.metadata.Distribution) -> tuple[str, str | None]:
    """Name and version from the name of the metadata folder (of an egg: of the egg).

    Version None: it is not part of that name, as in the egg-info of a development install.
    """
    path = getattr(distribution, "_path", None)
    folder = getattr(path, "name", "")
    if path is not None and folder == "EGG-INFO":
        folder = path.parent.name
    found = re.fullmatch(r"(.+?)(?:-(\d[^-]*)(?:-py.*)?)?\.(?:dist-info|egg-info|egg)", folder)
    # other finders, such as those of frozen applications, have no folder
    return (normalized(found[1]), found[2]) if found else (normalized(distribution.name), distribution.version)


def _is_left_over(distribution: importlib.metadata.Distribution) -> bool:
    """Whether the folder lacks its main file, as after an interrupted uninstall, or has a pipe for entry points."""
    path = getattr(distribution, "_path", None)
    if not isinstance(path, Path):  # in a zip file
        return False
    # texts, since this is done for every distribution, and joining paths takes most of a scan
    folder, points = str(path), f"{path}/entry_points.txt"
    has_metadata = any(map(os.path.isfile, (f"{folder}/METADATA", f"{folder}/PKG-INFO", folder)))
    return not has_metadata or (not os.path.isfile(points) and os.path.exists(points))
