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

Here live entry points, the registry, the contract and its hookspec, and the config type that takes every kind. Nothing
here reads a checkpoint, and importing it imports neither torch nor a plugin.
"""

from noether_init_core.kinds.lookup import (
    ALLOW_VARIABLE as ALLOW_VARIABLE,
    DENY_VARIABLE as DENY_VARIABLE,
    GROUP as GROUP,
    KindInfo as KindInfo,
    clear_cache as clear_cache,
    create as create,
    describe as describe,
    home_of as home_of,
    imported_from as imported_from,
    installed as installed,
    load as load,
    register as register,
    resolve as resolve,
    unregister as unregister,
    validate as validate,
)
