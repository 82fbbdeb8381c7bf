"""Kinds: from a name in a config to the class that a distribution registered for it.

Here live entry points, the registry, the contract and its hookspec, and the config type that takes every kind. Nothing
here reads a checkpoint, and importing it imports neither torch nor a plugin.
"""

from noether_init_core.kinds.lookup import ALLOW_VARIABLE, DENY_VARIABLE, KindInfo, clear_cache
from noether_init_core.kinds.registry import (
    GROUP,
    create,
    describe,
    home_of,
    installed,
    load,
    register,
    resolve,
    unregister,
    validate,
    without_installed,
)

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
