"""Kinds: from a name in a config to the class that a distribution registered for it.

A kind is an entry point of the group ``noether_init.initializers``. A name becomes an initializer in nine steps:

1. distributions that ``NOETHER_INIT_ALLOW`` and ``NOETHER_INIT_DENY`` shut out do not count;
2. the group is scanned once per process, on first use (``clear_cache`` forgets it); nothing is imported for that;
3. the exact name is looked up; a dotted kind is a name like any other, never an import path;
4. several distributions that offer it: ``KindConflictError``, before anything is imported;
5. none: ``UnknownKindError``, or ``KindBlockedError`` where step 1 shut out the only one;
6. that one entry point is loaded: ``KindImportError`` if that fails;
7. the class is checked against the contract: ``KindContractError``;
8. the config is validated by the ``config_class`` of the class;
9. the class is called: ``cls(config, path_provider=..., **kwargs)``, ``kwargs`` being the config's, where it has them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from noether_init_core.errors import (
    ConfigError,
    KindBlockedError,
    KindConflictError,
    KindContractError,
    KindImportError,
    UnknownKindError,
    type_of,
)
from noether_init_core.kinds import entry_points
from noether_init_core.kinds.entry_points import ALLOW_VARIABLE, DENY_VARIABLE

if TYPE_CHECKING:
    from noether_init_core.config.base import KindConfig
    from noether_init_core.initializers.base import InitializerBase

__all__ = [
    "ALLOW_VARIABLE",
    "DENY_VARIABLE",
    "GROUP",
    "KindInfo",
    "clear_cache",
    "create",
    "describe",
    "home_of",
    "installed",
    "load",
    "register",
    "resolve",
    "unregister",
    "validate",
    "without_installed",
]

GROUP = "noether_init.initializers"
_LISTED = 12
# Which distribution brings a kind that is not installed. Shipped with the core, so that the text of a config can never
# name a package to install; and only what has been published, lest a stranger takes the name.
_DISTRIBUTION_OF = {"random": "noether-init-random"}


@attrs.frozen
class KindInfo:
    """What is known of a kind without importing it.

    ``distribution`` and ``version`` are None for a kind of ``register``. ``blocked_by`` is the environment variable
    that shuts the distribution out, if one does.
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


_registered: dict[str, type[InitializerBase]] = {}


def installed() -> tuple[KindInfo, ...]:
    """Every kind that an installed distribution or ``register`` offers, by name. Imports no plugin.

    Kinds that are shut out are listed too, with ``blocked_by``; a name may occur more than once (a conflict).
    """
    found = [info for name in entry_points.offers(GROUP) for info, _offer in _offered_as(name)]
    registered = [_registered_info(name) for name in _registered]
    return tuple(sorted(found + registered, key=lambda info: (info.name, info.distribution or "")))


def describe(kind: str) -> KindInfo:
    """The one distribution that offers ``kind`` (steps 1 to 5). Imports no plugin.

    Raises ``UnknownKindError``, ``KindBlockedError`` or ``KindConflictError``.
    """
    return _described(kind)[0]


def _described(kind: str) -> tuple[KindInfo, entry_points.Offer | None]:
    named: list[tuple[KindInfo, entry_points.Offer | None]] = [*_offered_as(kind)]
    if kind in _registered:
        named.append((_registered_info(kind), None))
    # in an order that does not depend on the import path
    named.sort(key=lambda one: (one[0].distribution or "~", one[0].target))
    allowed = [one for one in named if one[0].blocked_by is None]
    if len(allowed) > 1:
        raise _conflict(kind, [info for info, _offer in allowed])
    if allowed:
        return allowed[0]
    if named:
        raise _blocked(named[0][0])
    raise _unknown(kind)


def home_of(kind: str) -> str | None:
    """The distribution that ``kind`` is known to come with, installed or not; None for a kind that nobody knows."""
    return _DISTRIBUTION_OF.get(kind)


def resolve(kind: str) -> type[InitializerBase]:
    """The class behind ``kind`` (steps 1 to 7). Imports the one plugin that offers it.

    Raises ``KindError``: unknown, blocked, in conflict, failing on import, or breaking the contract.
    """
    info, loaded = load(kind)
    return _registered[info.name] if info.distribution is None else _checked(info, loaded)


def load(kind: str) -> tuple[KindInfo, object]:
    """What the one entry point of ``kind`` leads to, whatever it is (steps 1 to 6). Imports the plugin.

    Raises ``KindError``: unknown, blocked, in conflict, or failing on import.
    """
    info, offer = _described(kind)
    if offer is None:
        return info, _registered[info.name]
    try:
        return info, offer.load()
    # A plugin may raise anything at all, and must not end a training run by sys.exit either.
    except (Exception, SystemExit) as error:
        raise _import_failed(info, error) from error


def validate(config: Mapping[str, Any] | KindConfig, *, context: Any = None) -> KindConfig:
    """``config`` as an instance of its kind's ``config_class`` (steps 1 to 8); ``context`` is pydantic's.

    Raises ``ConfigError`` where no kind is said, ``KindError``, or the ``pydantic.ValidationError`` of the config.
    """
    return _validated(config, context)[1]


def create(config: Mapping[str, Any] | KindConfig, *, path_provider: Any = None) -> InitializerBase:
    """The initializer that ``config`` asks for (steps 1 to 9).

    Raises what ``validate`` raises, ``ConfigError`` for ``kwargs`` that the constructor does not take, and whatever
    the constructor raises.
    """
    cls, validated = _validated(config)
    keywords = dict(getattr(validated, "kwargs", None) or {})
    _check_keywords(cls, validated, keywords)
    return cls(validated, path_provider=path_provider, **keywords)


def register(name: str, cls: type[InitializerBase]) -> None:
    """Offer ``cls`` as the kind ``name`` in this process, for notebooks and tests; again replaces it.

    The contract is checked here. Allow and deny lists do not apply. Raises ``KindConflictError`` where an installed
    distribution offers the name, ``KindContractError`` where the class breaks the contract.
    """
    taken = [info for info, _offer in _offered_as(name)]
    info = KindInfo(name, None, None, _target_of(cls))
    if taken:
        raise _conflict(name, [*taken, info])
    _registered[name] = _checked(info, cls)


def unregister(name: str) -> None:
    """Take back ``register``. Raises ``UnknownKindError`` for a name that was not registered."""
    if name not in _registered:
        known = ", ".join(sorted(_registered)) or "nothing"
        raise UnknownKindError(
            f"kind {_quoted(name)} was not registered in this process; registered: {known}. Next: noether-init kinds",
            kind=name,
            candidates=tuple(sorted(_registered)),
        )
    del _registered[name]


def clear_cache() -> None:
    """Forget the scan: the next use sees distributions that were installed or removed since. Keeps ``register``."""
    entry_points.clear_cache()


def without_installed() -> contextlib.AbstractContextManager[None]:
    """Within the block only kinds of ``register`` are known, whatever is installed. For tests."""
    return entry_points.without_installed(GROUP)


def _offered_as(name: str) -> Iterator[tuple[KindInfo, entry_points.Offer]]:
    for offer in entry_points.sound(entry_points.offers(GROUP).get(name, ())):
        blocked_by = entry_points.blocking_variable(offer.distribution)
        yield KindInfo(offer.name, offer.distribution, offer.version, offer.target, blocked_by), offer


def _registered_info(name: str) -> KindInfo:
    return KindInfo(name, None, None, _target_of(_registered[name]))


def _target_of(cls: object) -> str:
    named = cls if isinstance(cls, type) else type(cls)
    return f"{named.__module__}:{named.__qualname__}"


def _checked(info: KindInfo, loaded: object) -> type[InitializerBase]:
    # Imported here: a scan must need neither torch nor pydantic.
    from noether_init_core.initializers.base import InitializerBase
    from noether_init_core.kinds import contract
    from noether_init_core.kinds.hookspec import CONTRACT_VERSION

    place = f"kind {_quoted(info.name)} ({info.source}): {info.target}"
    if not (isinstance(loaded, type) and issubclass(loaded, InitializerBase)):
        finding = f"is {_shown(loaded)}, not a subclass of InitializerBase"
        raise KindContractError(f"{place} {finding}. {_mend(info)}", kind=info.name, findings=[finding])
    version = contract.declared_version(loaded)
    if isinstance(version, int) and version > CONTRACT_VERSION:
        finding = f"was written for contract {version}; the installed noether-init-core has contract {CONTRACT_VERSION}"
        raise KindContractError(
            f"{place} {finding}. Next: pip install --upgrade noether-init-core", kind=info.name, findings=[finding]
        )
    findings = contract.findings(loaded)
    if findings:
        raise KindContractError(
            f"{place} breaks the contract of initializers: {'; '.join(findings)}. {_mend(info)}",
            kind=info.name,
            findings=findings,
        )
    return loaded


def _mend(info: KindInfo) -> str:
    """The next command, for the author of the class, and for somebody who did not write it."""
    if info.distribution is None:
        return f"Next: mend the class, and kinds.register({_quoted(info.name)}, ...) again"
    return (
        f"Next: noether-init check {info.name}; if the package is not yours: pip install --upgrade {info.distribution}"
    )


def _shown(value: object) -> str:
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"of type {type(value).__qualname__}"


def _validated(config: Mapping[str, Any] | KindConfig, context: Any = None) -> tuple[type[InitializerBase], KindConfig]:
    from noether_init_core.config.base import KindConfig

    if isinstance(config, KindConfig):
        cls = resolve(config.kind)
        if not isinstance(config, cls.config_class):
            raise ConfigError(
                f"kind {_quoted(config.kind)} takes a {cls.config_class.__qualname__}, not "
                f"{type_of(config)}. Next: noether-init schema {config.kind}"
            )
        return cls, config
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"the config of an initializer is a mapping or a KindConfig, not {_shown(config)}. Next: noether-init kinds"
        )
    kind = config.get("kind")
    if not isinstance(kind, str):
        said = "no kind" if kind is None else f"a kind that is no text ({kind!r})"
        raise ConfigError(f"the config of an initializer says {said}. {_offered()}. Next: noether-init kinds")
    cls = resolve(kind)
    return cls, cls.config_class.model_validate(config, context=context)


def _check_keywords(cls: type[InitializerBase], config: KindConfig, keywords: Mapping[str, Any]) -> None:
    import inspect

    if not keywords:
        return
    try:
        inspect.signature(cls).bind(config, **{"path_provider": None} | dict(keywords))
        problem = "config and path_provider are given already" if {"config", "path_provider"} & keywords.keys() else ""
    except TypeError as error:
        problem = str(error)
    if problem:
        raise ConfigError(
            f"kwargs of kind {_quoted(config.kind)} do not fit the constructor of {_target_of(cls)}: {problem}. "
            f"Next: noether-init schema {config.kind}"
        )


def _conflict(kind: str, claims: Iterable[KindInfo]) -> KindConflictError:
    claims = list(claims)
    described = [f"{claim.source} -> {claim.target}" for claim in claims]
    installed_claims = [claim.distribution for claim in claims if claim.distribution is not None]
    # never the core itself, which a stranger's claim would then replace
    removable = [name for name in installed_claims if name != "noether-init-core"] or installed_claims
    return KindConflictError(
        f"kind {_quoted(kind)} is offered more than once: {' and '.join(described)}. None of them was imported. "
        f"Next: pip uninstall {removable[-1]}, or set {DENY_VARIABLE}={removable[-1]}",
        kind=kind,
        offers=described,
    )


def _blocked(info: KindInfo) -> KindBlockedError:
    distribution = info.distribution or ""
    if info.blocked_by == ALLOW_VARIABLE:
        reason, remedy = f"is not listed in {ALLOW_VARIABLE}", f"add {distribution} to {ALLOW_VARIABLE}"
    else:
        reason, remedy = f"is listed in {DENY_VARIABLE}", f"take {distribution} out of {DENY_VARIABLE}"
    return KindBlockedError(
        f"kind {_quoted(info.name)} is offered by {info.source}, which {reason}. Next: {remedy}",
        kind=info.name,
        distribution=distribution,
    )


def _import_failed(info: KindInfo, error: BaseException) -> KindImportError:
    # the text is a stranger's, and is meant to be pasted into a shell
    parts = re.fullmatch(r"([\w.]+)\s*:\s*(\w+)[\w.]*\s*(\[.*\])?", info.target, re.ASCII)
    again = f'python -c "from {parts[1]} import {parts[2]}"' if parts else f"noether-init check {info.name}"
    return KindImportError(
        f"kind {_quoted(info.name)} ({info.source}): importing {info.target} raised {type(error).__name__}: {error}. "
        f"Other kinds are not affected. Next: {again}",
        kind=info.name,
    )


def _unknown(kind: str) -> UnknownKindError:
    there = {info.name for info in installed()}
    usable = {info.name: info for info in installed() if info.blocked_by is None}
    near = _near(kind, usable)
    hints = _near(kind, [name for name in _DISTRIBUTION_OF if name not in there], cutoff=0.8)
    parts = [f"no kind {_quoted(kind)}"]
    if near:
        parts.append("Near: " + ", ".join(f"{name} ({usable[name].source})" for name in near))
    elif not hints:
        parts.append(_offered())
    parts += [f"{name} comes with {_DISTRIBUTION_OF[name]}, which is not installed" for name in hints]
    if not near and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", kind) and len(kind) <= 200:
        module, _, name = kind.rpartition(".")
        parts.append(
            "A dotted kind is a registered name, never an import path; no installed distribution has the line "
            f'"{kind}" = "{module}:{name}" under [project.entry-points."{GROUP}"]'
        )
    parts.append(
        f"Next: pip install {_DISTRIBUTION_OF[hints[0]]}" if hints and not near else "Next: noether-init kinds"
    )
    return UnknownKindError(". ".join(parts), kind=kind, candidates=near)


def _near(kind: str, names: Iterable[str], cutoff: float = 0.75) -> list[str]:
    import difflib

    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(_folded(name), []).append(name)
    found = difflib.get_close_matches(_folded(kind[:200]), list(folded), n=3, cutoff=cutoff)
    return [name for match in found for name in sorted(folded[match])]


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")


def _offered() -> str:
    by_source: dict[str, list[str]] = {}
    for info in installed():
        # Dotted names are second names of kinds, kept for configs of Noether.
        if info.blocked_by is None and "." not in info.name:
            by_source.setdefault(info.source, []).append(info.name)
    if not by_source:
        return "No kind is installed"
    shown = []
    for source, names in sorted(by_source.items()):
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        shown.append(f"{', '.join(names[:_LISTED])}{more} ({source})")
    return "Installed: " + "; ".join(shown[:_LISTED])


def _quoted(text: str) -> str:
    """In double quotes, on one line, and short, whatever the text."""
    return json.dumps(text if len(text) <= 80 else text[:77] + "...", ensure_ascii=False)
