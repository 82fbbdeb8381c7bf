"""From the name of an observer in a config to the object that a distribution registered for it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from noether_init_core.errors import ConfigError

__all__ = ["OBSERVER_GROUP", "load_observer"]

OBSERVER_GROUP = "noether_init.observers"


def load_observer(name: str) -> Any:
    """The observer registered as ``name`` in ``noether_init.observers``: the entry point's object, called without
    arguments where it is a class.

    Raises ``ConfigError`` for a name that no distribution or more than one offers.
    """
    offers = list(importlib.metadata.entry_points(group=OBSERVER_GROUP))
    found = {offer.value: offer for offer in offers if offer.name == name}
    if not found:
        there = ", ".join(sorted({offer.name for offer in offers})) or "none"
        raise ConfigError(f"no observer {name!r} is installed; there are: {there}")
    if len(found) > 1:
        raise ConfigError(f"several distributions offer the observer {name!r}: {', '.join(sorted(found))}")
    observer = next(iter(found.values())).load()
    return observer() if isinstance(observer, type) else observer
