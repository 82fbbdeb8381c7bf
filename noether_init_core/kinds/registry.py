"""Kinds: from a name in a config to the class that a distribution registered for it.

A kind is an entry point of the group ``noether_init.initializers``. A name becomes an initializer in nine steps:

1. distributions that ``NOETHER_INIT_ALLOW`` and ``NOETHER_INIT_DENY`` exclude do not count;
2. the group is scanned once per process, on first use (``clear_cache`` forgets it); nothing is imported for that;
3. the exact name is looked up; a dotted kind is a name like any other, never an import path;
4. several distributions that offer it: ``KindConflictError``, before anything is imported;
5. none: ``UnknownKindError``, or ``KindBlockedError`` where step 1 excluded the only one;
6. that one entry point is loaded: ``KindImportError`` if that fails;
7. the class is checked against the contract: ``KindContractError``;
8. the config is validated by the ``config_class`` of the class;
9. the class is called: ``cls(config, path_provider=..., **kwargs)``, ``kwargs`` being the config's, where it has them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from noether_init_core.errors import ConfigError, KindContractError, UnknownKindError, type_of
from noether_init_core.kinds import lookup
from noether_init_core.kinds.lookup import KindInfo
from noether_init_core.messages import listed, quoted

if TYPE_CHECKING:
    from noether_init_core.config.base import KindConfig
    from noether_init_core.initializers.base import InitializerBase

GROUP = "noether_init.initializers"
# homes: published distributions only, since anyone may publish under a name that is free
_KINDS = lookup.Group(GROUP, "kind", "noether-init kinds", {"random": "noether-init-random"})
_registered: dict[str, type[InitializerBase]] = {}


def installed() -> tuple[KindInfo, ...]:
    """Every kind that an installed distribution or ``register`` offers, by name. Imports no plugin.

    Excluded kinds are listed too, with ``blocked_by``; a name may occur more than once (a conflict).
    """
    return lookup.all_of(_KINDS, _of_this_process())


def describe(kind: str) -> KindInfo:
    """The one distribution that offers ``kind`` (steps 1 to 5). Imports no plugin.

    Raises ``UnknownKindError``, ``KindBlockedError`` or ``KindConflictError``.
    """
    return lookup.choose(_KINDS, kind, _of_this_process())


def home_of(kind: str) -> str | None:
    """The distribution that ``kind`` is known to come with, installed or not; None for an unknown kind."""
    return _KINDS.homes.get(kind)


def resolve(kind: str) -> type[InitializerBase]:
    """The class behind ``kind`` (steps 1 to 7). Imports the one plugin that offers it.

    Raises ``KindError``: unknown, blocked, in conflict, failing on import, or breaking the contract.
    """
    info, loaded = load(kind)
    return _registered[kind] if info.distribution is None else _checked(info, loaded)


def load(kind: str) -> tuple[KindInfo, object]:
    """The object that the entry point of ``kind`` refers to, whatever it is (steps 1 to 6). Imports the plugin.

    Raises ``KindError``: unknown, blocked, in conflict, or failing on import.
    """
    info = describe(kind)
    return info, _registered[kind] if info.distribution is None else lookup.load(_KINDS, info)


def validate(config: Mapping[str, Any] | KindConfig, *, context: Any = None) -> KindConfig:
    """``config`` as an instance of its kind's ``config_class`` (steps 1 to 8); ``context`` is pydantic's.

    An instance is taken as it is. Raises ``ConfigError`` where the config names no kind, ``KindError``, or the
    ``pydantic.ValidationError`` of the config.
    """
    return _validated(config, context)[1]


def create(config: Mapping[str, Any] | KindConfig, *, path_provider: Any = None) -> InitializerBase:
    """The initializer that ``config`` asks for (steps 1 to 9).

    Raises what ``validate`` raises, ``ConfigError`` for ``kwargs`` that the constructor does not take, and whatever
    the constructor raises.
    """
    cls, validated = _validated(config)
    keywords = dict(getattr(validated, "kwargs", None) or {})
    try:
        if {"config", "path_provider"} & keywords.keys():
            raise TypeError("config and path_provider are given already")
        inspect.signature(cls).bind(validated, path_provider=path_provider, **keywords)
    except TypeError as error:
        raise ConfigError(
            f"kwargs of kind {quoted(validated.kind)} do not fit the constructor of {_target_of(cls)}: {error}. "
            f"Next: noether-init schema {validated.kind}"
        ) from None
    return cls(validated, path_provider=path_provider, **keywords)


def register(name: str, cls: type[InitializerBase]) -> None:
    """Offer ``cls`` as the kind ``name`` in this process, for notebooks and tests. A second call replaces the class.

    The contract is checked here. Allow and deny lists do not apply. Raises ``KindConflictError`` where an installed
    distribution offers the name, ``KindContractError`` where the class breaks the contract.
    """
    info = KindInfo(name, None, None, _target_of(cls))
    taken = lookup.found_under(GROUP, name)
    if taken:
        raise lookup.conflict(_KINDS, name, [*taken, info])
    _registered[name] = _checked(info, cls)


def unregister(name: str) -> None:
    """Take back ``register``. Raises ``UnknownKindError`` for a name that was not registered."""
    if name not in _registered:
        known = listed(sorted(_registered), none="nothing")
        message = f"kind {quoted(name)} was not registered in this process; registered: {known}"
        raise UnknownKindError(f"{message}. Next: noether-init kinds", kind=name, candidates=tuple(_registered))
    del _registered[name]


def without_installed() -> contextlib.AbstractContextManager[None]:
    """Within the block only kinds of ``register`` are known, whatever is installed. For tests."""
    return lookup.without_installed(GROUP)


def _of_this_process() -> list[KindInfo]:
    return [KindInfo(name, None, None, _target_of(cls)) for name, cls in _registered.items()]


def _target_of(cls: object) -> str:
    named = cls if isinstance(cls, type) else type(cls)
    return f"{named.__module__}:{named.__qualname__}"


def _checked(info: KindInfo, loaded: object) -> type[InitializerBase]:
    # Imported here: a scan must need neither torch nor pydantic.
    from noether_init_core.initializers.base import InitializerBase
    from noether_init_core.kinds import contract

    if info.distribution is None:
        mend = f"correct the class, and kinds.register({quoted(info.name)}, ...) again"
    else:
        upgrade = f"pip install --upgrade {info.distribution}"
        mend = f"noether-init check {info.name}; if the package is not yours: {upgrade}"
    if not (isinstance(loaded, type) and issubclass(loaded, InitializerBase)):
        shown = (
            f"the class {loaded.__qualname__}" if isinstance(loaded, type) else f"of type {type(loaded).__qualname__}"
        )
        findings: tuple[str, ...] = (f"is {shown}, not a subclass of InitializerBase",)
        problem = findings[0]
    elif newer := contract.newer(loaded):
        findings, problem, mend = (newer.message,), newer.message, newer.fix
    elif findings := tuple(finding.message for finding in contract.examine(loaded)):
        problem = f"breaks the contract of initializers: {'; '.join(findings)}"
    else:
        return loaded
    raise KindContractError(
        f"kind {quoted(info.name)} ({info.source}): {info.target} {problem}. Next: {mend}",
        kind=info.name,
        findings=findings,
    )


def _validated(config: Mapping[str, Any] | KindConfig, context: Any = None) -> tuple[type[InitializerBase], KindConfig]:
    from noether_init_core.config.base import KindConfig

    if isinstance(config, KindConfig):
        cls = resolve(config.kind)
        if not isinstance(config, cls.config_class):
            raise ConfigError(
                f"kind {quoted(config.kind)} takes a {cls.config_class.__qualname__}, not {type_of(config)}. "
                f"Next: noether-init schema {config.kind}"
            )
        return cls, config
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"the config of an initializer is a mapping or a KindConfig, not {type_of(config)}. "
            "Next: noether-init kinds"
        )
    kind = config.get("kind")
    if not isinstance(kind, str):
        named = "no kind" if kind is None else f"a kind that is not a text ({kind!r})"
        there = lookup.summary(_KINDS, [info for info in installed() if info.blocked_by is None])
        raise ConfigError(f"the config of an initializer names {named}. {there}. Next: noether-init kinds")
    cls = resolve(kind)
    return cls, cls.config_class.model_validate(config, context=context)
