"""Look-up of kinds and observers: from a name to the class that a distribution registered for it.

A distribution is identified by the name of its metadata folder, which the installer creates. So a scan reads no file
but ``entry_points.txt``, and no distribution can impersonate another one in its metadata. Step numbers in docstrings
are those of the docstring of ``kinds``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from noether_init_core.errors import (
    ConfigError,
    KindBlockedError,
    KindConflictError,
    UnknownKindError,
    type_of,
)
from noether_init_core.kinds.hints import normalized, of_other_group, passed_over
from noether_init_core.kinds.importing import importing, shadowed_by
from noether_init_core.messages import listed, logger_of, near, quoted

if TYPE_CHECKING:
    from noether_init_core.config.base import KindConfig
    from noether_init_core.initializers.base import InitializerBase

GROUP = "noether_init.initializers"
ALLOW_VARIABLE = "NOETHER_INIT_ALLOW"
DENY_VARIABLE = "NOETHER_INIT_DENY"
_CORE = "noether-init-core"
_LISTED = 12

_logger = logger_of(__name__)
_lock = threading.Lock()
_scanned: dict[str, Mapping[str, tuple[KindInfo, ...]]] = {}


@attrs.frozen
class KindInfo:
    """What is known of a kind (or an observer) without importing it.

    ``distribution`` and ``version`` are None for a kind of ``register``. ``blocked_by`` is the environment variable
    that excludes the distribution, or None.
    """

    name: str
    distribution: str | None
    version: str | None
    target: str
    blocked_by: str | None = None

    @property
    def source(self) -> str:
        """Distribution and version, as messages show them."""
        if self.distribution is None:
            return "registered in this process"
        return f"{self.distribution} {self.version or 'of unknown version'}"


_METADATA_FOLDER = re.compile(r"(.+?)(?:-(\d[^-]*)(?:-py.*)?)?\.(?:dist-info|egg-info|egg)")


def clear_cache() -> None:
    """Drop every scan, so that the next use finds distributions that were installed or removed. May be called twice."""
    _scanned.clear()
    importlib.invalidate_caches()


def _blocking(info: KindInfo) -> str | None:
    # An empty allow list allows nothing: a typing error must not switch off a protection.
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
            # the same entry point twice in one distribution is not a conflict
            points = dict.fromkeys((one.name, one.value) for one in distribution.entry_points if one.group == group)
            for point, target in points:
                yield KindInfo(point, name, version or distribution.version, target)
        except Exception as error:  # metadata may be broken in any way, and must not make other kinds unusable
            unreadable.append(error)


def _identity(distribution: importlib.metadata.Distribution) -> tuple[str, str | None]:
    """Name and version from the name of the metadata folder, or of the egg.

    The version is None if it is not part of that name, as in the egg-info of a development install.
    """
    path = getattr(distribution, "_path", None)
    folder = getattr(path, "name", "")
    if path is not None and folder == "EGG-INFO":
        folder = path.parent.name
    found = _METADATA_FOLDER.fullmatch(folder)
    # finders of frozen applications have no folder
    return (normalized(found[1]), found[2]) if found else (normalized(distribution.name), distribution.version)


def _is_left_over(distribution: importlib.metadata.Distribution) -> bool:
    """Whether the main file of the folder is absent, as after an interrupted uninstall, or entry points are a pipe."""
    path = getattr(distribution, "_path", None)
    if not isinstance(path, Path):  # in a zip file
        return False
    # text paths and as few stat calls as possible: this runs for every distribution, and is a large part of a scan
    folder = str(path)
    if not any(stat.S_ISREG(_mode(name)) for name in (folder + "/METADATA", folder + "/PKG-INFO", folder)):
        return True
    mode = _mode(folder + "/entry_points.txt")
    return mode != 0 and not stat.S_ISREG(mode)


def _mode(path: str) -> int:
    """Type and permissions of a file; 0 for an absent one. Any other failure is raised: the file may exist."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


@attrs.frozen
class Group:
    """An entry-point group.

    Attributes:
        name: The name in ``pyproject.toml``.
        noun: The word for one of its entries in messages.
        listing: The command that lists them.
        homes: Entry -> the distribution that provides it. Install hints come from here only, so that the text of a
            config can never name a package to install.
        registered: Entry -> class, for this process only.
    """

    name: str
    noun: str
    listing: str
    homes: Mapping[str, str] = attrs.field(factory=dict)
    registered: dict[str, type[InitializerBase]] = attrs.field(factory=dict)

    def scanned(self) -> Mapping[str, tuple[KindInfo, ...]]:
        """Name -> its entry points; scanned once per process, see ``clear_cache``.

        If a distribution is found twice on the import path, the first one counts, as in an import. A distribution whose
        metadata cannot be read is left out, with a warning in the log. Safe to call from several threads, and from a
        plugin while it is imported.
        """
        if self.name not in _scanned:
            unreadable: list[Exception] = []
            with _lock:
                if self.name not in _scanned:
                    named: dict[str, tuple[KindInfo, ...]] = {}
                    for info in _scan(self.name, unreadable):
                        named[info.name] = (*named.get(info.name, ()), info)
                    _scanned[self.name] = named
            # after the lock is released, because a log handler may look up kinds
            for error in unreadable:
                _logger.warning("left out a distribution whose metadata cannot be read: %s", error)
        return _scanned[self.name]

    def installed_as(self, name: str) -> list[KindInfo]:
        """The entry points called ``name``, each with the present state of the allow and deny lists."""
        found = self.scanned().get(name, ())
        return [attrs.evolve(info, blocked_by=variable) if (variable := _blocking(info)) else info for info in found]

    def all(self) -> tuple[KindInfo, ...]:
        """Every entry, sorted by name. A name may occur more than once, which is a conflict."""
        found = [info for name in self.scanned() for info in self.installed_as(name)]
        found += [KindInfo(name, None, None, _target_of(cls)) for name, cls in self.registered.items()]
        return tuple(sorted(found, key=lambda info: (info.name, info.distribution or "")))

    def choose(self, name: str) -> KindInfo:
        """The one entry called ``name``. Imports nothing. For an unknown name the group is scanned again first.

        Raises ``KindConflictError``, ``KindBlockedError`` or ``UnknownKindError``.
        """
        own = [KindInfo(name, None, None, _target_of(self.registered[name]))] if name in self.registered else []
        if not own and not self.installed_as(name):
            clear_cache()  # it may have been installed since, while a notebook runs
        # sorted, so that the message does not depend on the import path
        named = sorted([*self.installed_as(name), *own], key=lambda info: (info.distribution or "~", info.target))
        allowed = [info for info in named if info.blocked_by is None]
        if len(allowed) == 1:
            return allowed[0]
        if allowed:
            raise self.conflict(name, allowed)
        raise self._blocked(named[0]) if named else self._unknown(name)

    def load(self, info: KindInfo) -> object:
        """Import the object of the entry point. Raises ``KindImportError`` for any exception."""
        if info.distribution is None:
            return self.registered[info.name]
        with self.importing(info):
            return importlib.metadata.EntryPoint(info.name, info.target, self.name).load()

    def importing(self, info: KindInfo) -> contextlib.AbstractContextManager[None]:
        """What a plugin's code runs in when it is imported; see ``importing.importing``."""
        distribution = None if info.distribution == _CORE else info.distribution
        return importing(f"{self.noun} {quoted(info.name)} ({info.source})", info.name, info.target, distribution)

    def summary(self) -> str:
        """What is installed, for messages: ``Installed: file, resume (noether-init-core 0.1.0)``."""
        by_source: dict[str, list[str]] = {}
        for info in self._usable():
            # a dotted name is a second name of a kind, for configs of Noether
            if "." not in info.name:
                by_source.setdefault(info.source, []).append(info.name)
        shown = [f"{listed(names, _LISTED)} ({source})" for source, names in sorted(by_source.items())]
        return f"Installed: {listed(shown, _LISTED, separator='; ')}" if shown else f"No {self.noun} is installed"

    def conflict(self, name: str, claims: list[KindInfo]) -> KindConflictError:
        """The error for an entry that several distributions provide; the caller raises it."""
        described = [f"{claim.source} -> {claim.target}" for claim in claims]
        installed = [claim.distribution for claim in claims if claim.distribution is not None]
        # never the core itself, or the other distribution would replace its kind
        removable = [one for one in installed if one != _CORE] or installed
        return KindConflictError(
            f"{self.noun} {quoted(name)} is provided more than once: {' and '.join(described)}. None of them was "
            f"imported. Next: pip uninstall {removable[-1]}, or set {DENY_VARIABLE}={removable[-1]}",
            kind=name,
            offers=described,
        )

    def _blocked(self, info: KindInfo) -> KindBlockedError:
        distribution = info.distribution or ""
        if info.blocked_by == ALLOW_VARIABLE:
            reason, remedy = f"is not listed in {ALLOW_VARIABLE}", f"add {distribution} to {ALLOW_VARIABLE}"
        else:
            reason, remedy = f"is listed in {DENY_VARIABLE}", f"take {distribution} out of {DENY_VARIABLE}"
        return KindBlockedError(
            f"{self.noun} {quoted(info.name)} is provided by {info.source}, which {reason}. Next: {remedy}",
            kind=info.name,
            distribution=distribution,
        )

    def _unknown(self, name: str) -> UnknownKindError:
        sources = {info.name: info.source for info in self._usable()}
        similar = near(name, sources, cutoff=0.75)
        absent = self.homes.keys() - {info.name for info in self.all()}
        hints = near(name, absent, cutoff=0.8)
        parts = [f"no {self.noun} {quoted(name)}"]
        if similar:
            parts.append("Near: " + ", ".join(f"{one} ({sources[one]})" for one in similar))
        elif not hints:
            parts.append(self.summary())
        parts += [f"{one} comes with {self.homes[one]}, which is not installed" for one in hints]
        other = of_other_group(name, (OBSERVERS if self.noun == "kind" else _KINDS).scanned(), self.noun)
        known = [other] if other else list(passed_over(self.name, name))
        if known:
            return UnknownKindError(". ".join([parts[0], *known]), kind=name, candidates=similar)
        if not similar and len(name) <= 200 and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
            module, _, attribute = name.rpartition(".")
            parts.append(
                f"A dotted {self.noun} is a registered name, never an import path; no installed distribution has the "
                f'line "{name}" = "{module}:{attribute}" under [project.entry-points."{self.name}"]'
            )
        parts.append(f"Next: {f'pip install {self.homes[hints[0]]}' if hints and not similar else self.listing}")
        return UnknownKindError(". ".join(parts), kind=name, candidates=similar)

    def _usable(self) -> list[KindInfo]:
        return [info for info in self.all() if info.blocked_by is None]


# homes: published distributions only, because anyone may publish under a free name
_KINDS = Group(GROUP, "kind", "ninit kinds", {"random": "noether-init-random"})
OBSERVERS = Group("noether_init.observers", "observer", "ninit kinds --observers")


def installed() -> tuple[KindInfo, ...]:
    """Every kind that an installed distribution or ``register`` provides, sorted by name. Imports no plugin.

    Excluded kinds are listed too, with ``blocked_by``; a name may occur more than once (a conflict).
    """
    return _KINDS.all()


def describe(kind: str) -> KindInfo:
    """The one distribution that provides ``kind`` (steps 1 to 5). Imports no plugin.

    Raises ``UnknownKindError``, ``KindBlockedError`` or ``KindConflictError``.
    """
    return _KINDS.choose(kind)


def home_of(kind: str) -> str | None:
    """The distribution that is known to provide ``kind``, installed or not; None for an unknown kind."""
    return _KINDS.homes.get(kind)


def resolve(kind: str) -> type[InitializerBase]:
    """The class behind ``kind`` (steps 1 to 7). Imports only the plugin that provides it.

    Raises ``KindError``: the kind is unknown, blocked, in conflict, raises on import, or breaks the contract.
    """
    return _checked(*load(kind))


def load(kind: str) -> tuple[KindInfo, object]:
    """The object of the entry point of ``kind``, of any type (steps 1 to 6). Imports the plugin.

    Raises ``KindError``: the kind is unknown, blocked, in conflict, or raises on import.
    """
    info = describe(kind)
    return info, _KINDS.load(info)


def validate(config: Mapping[str, Any] | KindConfig, *, context: Any = None) -> KindConfig:
    """``config`` as an instance of its kind's ``config_class`` (steps 1 to 8); ``context`` is passed to pydantic.

    An instance is returned unchanged. Raises ``ConfigError`` for a config without a kind, ``KindError``, or
    ``pydantic.ValidationError``.
    """
    return _validated(config, context)[1]


def create(config: Mapping[str, Any] | KindConfig, *, path_provider: Any = None) -> InitializerBase:
    """The initializer of ``config`` (steps 1 to 9).

    Raises what ``validate`` raises, ``ConfigError`` for ``kwargs`` that the constructor does not take, and any
    exception of the constructor.
    """
    cls, validated = _validated(config)
    keywords = dict(getattr(validated, "kwargs", None) or {})
    try:
        if {"config", "initializer_config", "path_provider"} & keywords.keys():
            raise TypeError("the config and path_provider are given already")
        inspect.signature(cls).bind(validated, path_provider=path_provider, **keywords)
    except TypeError as error:
        raise ConfigError(
            f"kwargs of kind {quoted(validated.kind)} do not fit the constructor of {_target_of(cls)}: {error}. "
            f"Next: ninit schema {validated.kind}"
        ) from None
    return cls(validated, path_provider=path_provider, **keywords)


def imported_from(info: KindInfo) -> str | None:
    """The file that an installed kind was imported from, where its distribution installed another one; else None."""
    if info.distribution is None or info.distribution == _CORE:
        return None
    return shadowed_by(info.distribution, info.target)


def load_observer(name: str) -> Any:
    """The observer registered as ``name``: the object of the entry point, or an instance if it is a class.

    Imports only that plugin. Raises ``UnknownKindError``, ``KindBlockedError`` or ``KindConflictError``, and
    ``KindImportError`` if the plugin raises.
    """
    info = OBSERVERS.choose(name)
    observer = OBSERVERS.load(info)
    with OBSERVERS.importing(info):
        return observer() if isinstance(observer, type) else observer


def register(name: str, cls: type[InitializerBase]) -> None:
    """Register ``cls`` as the kind ``name`` in this process, for notebooks and tests. A second call replaces the class.

    Checks the contract. Allow and deny lists do not apply. Raises ``KindConflictError`` if an installed distribution
    provides the name, and ``KindContractError`` if the class breaks the contract.
    """
    info = KindInfo(name, None, None, _target_of(cls))
    taken = _KINDS.installed_as(name)
    if taken:
        raise _KINDS.conflict(name, [*taken, info])
    from noether_init_core.kinds.contract import forget

    forget(cls)
    _KINDS.registered[name] = _checked(info, cls)


def unregister(name: str) -> None:
    """Remove the registration of ``name``; does nothing for a name that is not registered."""
    _KINDS.registered.pop(name, None)


def _target_of(cls: object) -> str:
    named = cls if isinstance(cls, type) else type(cls)
    return f"{named.__module__}:{named.__qualname__}"


def _checked(info: KindInfo, loaded: object) -> type[InitializerBase]:
    # Imported late, because a scan must not import torch or pydantic.
    from noether_init_core.kinds import contract

    if info.distribution is None:
        fix = f"correct the class, and kinds.register({quoted(info.name)}, ...) again"
    else:
        upgrade = f"pip install --upgrade {info.distribution}"
        fix = f"ninit check {info.name}; if the package is not yours: {upgrade}"
    return contract.check(loaded, info.name, f"kind {quoted(info.name)} ({info.source}): {info.target}", fix)


def _validated(config: Mapping[str, Any] | KindConfig, context: Any = None) -> tuple[type[InitializerBase], KindConfig]:
    from noether_init_core.config.base import KindConfig
    from noether_init_core.config.plain import plain

    if isinstance(config, KindConfig):
        cls = resolve(config.kind)
        if not isinstance(config, cls.config_class):
            raise ConfigError(
                f"kind {quoted(config.kind)} takes a {cls.config_class.__qualname__}, not {type_of(config)}. "
                f"Next: ninit schema {config.kind}"
            )
        says_kind = "kind" in config.model_fields_set or "kind" in inspect.get_annotations(type(config))
        if type(config) is not cls.config_class and not says_kind:
            # an inherited kind would create another class than the one that the config was written for
            raise ConfigError(
                f"{type(config).__name__} inherits its kind, {quoted(config.kind)}, from "
                f"{cls.config_class.__name__}. Next: {type(config).__name__}(kind=...), or a default in the class"
            )
        return cls, config
    given = config
    if type(config) is not dict:  # a dict is not copied: in kwargs a tuple stays a tuple
        config = plain(config)
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"the config of an initializer is a mapping, a KindConfig or a dataclass instance, not {type_of(given)}. "
            "Next: ninit kinds"
        )
    kind = config.get("kind")
    if not isinstance(kind, str):
        named = "no kind" if kind is None else f"a kind that is not a text ({kind!r})"
        message = f"the config of an initializer names {named}. {_KINDS.summary()}. Next: ninit kinds"
        raise ConfigError(message)
    cls = resolve(kind)
    return cls, cls.config_class.model_validate(config, context=context)
