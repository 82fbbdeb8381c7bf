"""From the name of an observer in a config to the object that a distribution registered for it."""

from __future__ import annotations

from typing import Any

from noether_init_core.kinds.lookup import Group, KindInfo

OBSERVER_GROUP = "noether_init.observers"
_OBSERVERS = Group(OBSERVER_GROUP, "observer", "noether-init kinds --observers")


def installed_observers() -> tuple[KindInfo, ...]:
    """Every observer that an installed distribution offers, by name. Imports none."""
    return _OBSERVERS.all()


def describe_observer(name: str) -> KindInfo:
    """The one distribution that offers the observer ``name``. Imports nothing; allow and deny lists apply.

    Raises ``UnknownKindError``, ``KindBlockedError`` or ``KindConflictError``.
    """
    return _OBSERVERS.choose(name)


def load_observer(name: str) -> Any:
    """The observer registered as ``name``: the entry point's object, called without arguments where it is a class.

    Only that one plugin is imported. Raises what ``describe_observer`` raises, and ``KindImportError`` where the plugin
    raises.
    """
    info = describe_observer(name)
    observer = _OBSERVERS.load(info)
    with _OBSERVERS.importing(info):
        return observer() if isinstance(observer, type) else observer
