"""One name in one entry-point group: the distributions that offer it, its import, and the errors of both.

Kinds and observers are looked up alike. Entry points are found in the metadata of installed distributions. A
distribution is known by the name of its metadata folder, which the installer made. So a scan reads no file but
``entry_points.txt``, and no distribution can pass for another one by what its metadata says. Nothing is imported before
it is certain which distribution is meant.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import attrs

from noether_init_core.errors import KindBlockedError, KindConflictError, KindImportError, UnknownKindError
from noether_init_core.messages import listed, near, quoted

ALLOW_VARIABLE = "NOETHER_INIT_ALLOW"
DENY_VARIABLE = "NOETHER_INIT_DENY"
_CORE = "noether-init-core"
_LISTED = 12

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


@attrs.frozen
class Group:
    """An entry-point group.

    Attributes:
        name: As it stands in ``pyproject.toml``.
        noun: What messages call one of its entries.
        listing: The command that lists them.
        homes: Entry -> the distribution that it comes with. Install hints are taken from here, so that the text of a
            config can never name a package to install.
    """

    name: str
    noun: str
    listing: str
    homes: Mapping[str, str] = attrs.field(factory=dict)


def all_of(group: Group, registered: Iterable[KindInfo] = ()) -> tuple[KindInfo, ...]:
    """Every entry of ``group``, by name. A name may occur more than once (a conflict)."""
    installed = [info for name in offers(group.name) for info in found_under(group.name, name)]
    return tuple(sorted([*installed, *registered], key=lambda info: (info.name, info.distribution or "")))


def choose(group: Group, name: str, registered: Iterable[KindInfo] = ()) -> KindInfo:
    """The one entry called ``name``. Imports nothing. The group is scanned again before a name counts as unknown.

    Raises ``KindConflictError``, ``KindBlockedError`` or ``UnknownKindError``.
    """
    mine = [info for info in registered if info.name == name]
    if not mine and not found_under(group.name, name):
        clear_cache()  # it may have been installed since, beside a notebook that runs
    # in an order that does not depend on the import path
    named = sorted([*found_under(group.name, name), *mine], key=lambda info: (info.distribution or "~", info.target))
    allowed = [info for info in named if info.blocked_by is None]
    if len(allowed) == 1:
        return allowed[0]
    if allowed:
        raise conflict(group, name, allowed)
    if named:
        raise _blocked(group, named[0])
    raise _unknown(group, name, [info for info in all_of(group, registered) if info.blocked_by is None])


def load(group: Group, info: KindInfo) -> object:
    """Import what the entry point refers to. Raises ``KindImportError`` for whatever that raises."""
    with importing(group, info):
        return importlib.metadata.EntryPoint(info.name, info.target, group.name).load()


@contextlib.contextmanager
def importing(group: Group, info: KindInfo) -> Iterator[None]:
    """Turn what a plugin raises within the block, also ``SystemExit``, into ``KindImportError``."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # the target is foreign text, and the command is meant to be pasted into a shell
        parts = re.fullmatch(r"([\w.]+)\s*:\s*(\w+)[\w.]*\s*(\[.*\])?", info.target, re.ASCII)
        again = f'python -c "from {parts[1]} import {parts[2]}"' if parts else f"noether-init check {info.name}"
        raise KindImportError(
            f"{group.noun} {quoted(info.name)} ({info.source}): importing {info.target} raised "
            f"{type(error).__name__}: {error}. Other {group.noun}s are not affected. Next: {again}",
            kind=info.name,
        ) from error


def summary(group: Group, usable: Iterable[KindInfo]) -> str:
    """What is installed, for messages: ``Installed: file, resume (noether-init-core 0.1.0)``."""
    by_source: dict[str, list[str]] = {}
    for info in usable:
        # dotted names are second names of kinds, for configs of Noether
        if "." not in info.name:
            by_source.setdefault(info.source, []).append(info.name)
    shown = [f"{listed(names, _LISTED)} ({source})" for source, names in sorted(by_source.items())]
    return f"Installed: {listed(shown, _LISTED, separator='; ')}" if shown else f"No {group.noun} is installed"


def conflict(group: Group, name: str, claims: list[KindInfo]) -> KindConflictError:
    described = [f"{claim.source} -> {claim.target}" for claim in claims]
    installed = [claim.distribution for claim in claims if claim.distribution is not None]
    # never the core itself, which the other claim would then replace
    removable = [one for one in installed if one != _CORE] or installed
    return KindConflictError(
        f"{group.noun} {quoted(name)} is offered more than once: {' and '.join(described)}. None of them was "
        f"imported. Next: pip uninstall {removable[-1]}, or set {DENY_VARIABLE}={removable[-1]}",
        kind=name,
        offers=described,
    )


def _blocked(group: Group, info: KindInfo) -> KindBlockedError:
    distribution = info.distribution or ""
    if info.blocked_by == ALLOW_VARIABLE:
        reason, remedy = f"is not listed in {ALLOW_VARIABLE}", f"add {distribution} to {ALLOW_VARIABLE}"
    else:
        reason, remedy = f"is listed in {DENY_VARIABLE}", f"take {distribution} out of {DENY_VARIABLE}"
    return KindBlockedError(
        f"{group.noun} {quoted(info.name)} is offered by {info.source}, which {reason}. Next: {remedy}",
        kind=info.name,
        distribution=distribution,
    )


def _unknown(group: Group, name: str, usable: list[KindInfo]) -> UnknownKindError:
    sources = {info.name: info.source for info in usable}
    similar = near(name, sources, cutoff=0.75)
    absent = group.homes.keys() - {info.name for info in all_of(group)}
    hints = near(name, absent, cutoff=0.8)
    parts = [f"no {group.noun} {quoted(name)}"]
    if similar:
        parts.append("Near: " + ", ".join(f"{one} ({sources[one]})" for one in similar))
    elif not hints:
        parts.append(summary(group, usable))
    parts += [f"{one} comes with {group.homes[one]}, which is not installed" for one in hints]
    if not similar and len(name) <= 200 and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        module, _, attribute = name.rpartition(".")
        parts.append(
            f"A dotted {group.noun} is a registered name, never an import path; no installed distribution has the line "
            f'"{name}" = "{module}:{attribute}" under [project.entry-points."{group.name}"]'
        )
    parts.append(f"Next: {f'pip install {group.homes[hints[0]]}' if hints and not similar else group.listing}")
    return UnknownKindError(". ".join(parts), kind=name, candidates=similar)
