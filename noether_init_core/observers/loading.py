"""From the name of an observer in a config to the object that a distribution registered for it."""

from __future__ import annotations

import difflib
import json
from typing import Any

import attrs

from noether_init_core.errors import ConfigError
from noether_init_core.kinds import entry_points

__all__ = ["OBSERVER_GROUP", "ObserverInfo", "describe_observer", "installed_observers", "load_observer"]

OBSERVER_GROUP = "noether_init.observers"
_NEXT = "Next: noether-init kinds --observers"


@attrs.frozen
class ObserverInfo:
    """What is known of an observer without importing it; ``blocked_by`` as for kinds."""

    name: str
    distribution: str
    version: str | None
    target: str
    blocked_by: str | None = None

    @property
    def source(self) -> str:
        """Distribution and version as messages show them."""
        return f"{self.distribution} {self.version or 'of unknown version'}"


def installed_observers() -> tuple[ObserverInfo, ...]:
    """Every observer that an installed distribution offers, by name. Imports none."""
    return tuple(sorted((info for name in _offered() for info, _ in _offered_as(name)), key=lambda info: info.name))


def load_observer(name: str) -> Any:
    """The observer registered as ``name`` in ``noether_init.observers``: the entry point's object, called without
    arguments where it is a class. Only that one plugin is imported.

    Raises what ``describe_observer`` raises, and ``ConfigError`` where the plugin raises.
    """
    info, offer = _described(name)
    try:
        observer = offer.load()
        return observer() if isinstance(observer, type) else observer
    # A plugin may raise anything at all, and must not end a training run by sys.exit either.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"observer {_quoted(name)} ({info.source}): {info.target} raised {type(error).__name__}: {error}. {_NEXT}"
        ) from error


def describe_observer(name: str) -> ObserverInfo:
    """The one distribution that offers the observer ``name``. Imports nothing; allow and deny lists apply.

    Raises ``ConfigError`` for a name that no distribution or more than one offers, or that a list shuts out.
    """
    return _described(name)[0]


def _described(name: str) -> tuple[ObserverInfo, entry_points.Offer]:
    named = sorted(_offered_as(name), key=lambda one: (one[0].distribution, one[0].target))
    allowed = [one for one in named if one[0].blocked_by is None]
    if len(allowed) > 1:
        claims = " and ".join(f"{info.source} -> {info.target}" for info, _offer in allowed)
        names = [info.distribution for info, _offer in allowed]
        last = ([name for name in names if name != "noether-init-core"] or names)[-1]
        raise ConfigError(
            f"observer {_quoted(name)} is offered more than once: {claims}. None of them was imported. "
            f"Next: pip uninstall {last}, or set {entry_points.DENY_VARIABLE}={last}"
        )
    if not allowed and named:
        info = named[0][0]
        raise ConfigError(
            f"observer {_quoted(name)} is offered by {info.source}, which {info.blocked_by} shuts out. "
            f"Next: change {info.blocked_by}"
        )
    if not allowed:
        raise ConfigError(_unknown(name))
    return allowed[0]


def _offered() -> dict[str, tuple[entry_points.Offer, ...]]:
    return entry_points.offers(OBSERVER_GROUP)


def _offered_as(name: str) -> list[tuple[ObserverInfo, entry_points.Offer]]:
    return [
        (
            ObserverInfo(
                offer.name,
                offer.distribution,
                offer.version,
                offer.target,
                entry_points.blocking_variable(offer.distribution),
            ),
            offer,
        )
        for offer in entry_points.sound(_offered().get(name, ()))
    ]


def _unknown(name: str) -> str:
    usable = {info.name: info for info in installed_observers() if info.blocked_by is None}
    near = difflib.get_close_matches(name[:200].lower().replace("-", "_"), usable, n=3, cutoff=0.6)
    there = ", ".join(f"{other} ({usable[other].source})" for other in near or usable)
    return f"no observer {_quoted(name)}. {'Near' if near else 'Installed'}: {there or 'none'}. {_NEXT}"


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= 80 else text[:77] + "...", ensure_ascii=False)
