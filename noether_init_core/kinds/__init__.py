"""Kinds: from a name in a config to the class that a distribution registered for it.

A kind is an entry point of the group ``noether_init.initializers``. A name becomes an initializer in nine steps:

1. distributions that ``NOETHER_INIT_ALLOW`` and ``NOETHER_INIT_DENY`` exclude are ignored;
2. the group is scanned once per process, on first use (``clear_cache`` drops the scan); no plugin is imported;
3. the exact name is looked up; a dotted kind is a name like any other, never an import path;
4. if several distributions provide it: ``KindConflictError``, before any of them is imported;
5. if no distribution provides it: ``UnknownKindError``, or ``KindBlockedError`` if step 1 excluded the only one;
6. that one entry point is loaded: ``KindImportError`` if that fails;
7. the class is checked against the contract: ``KindContractError``;
8. the config is validated by the ``config_class`` of the class;
9. the class is called: ``cls(config, path_provider=..., **kwargs)``, with ``kwargs`` of the config, if it has them.

This package holds entry points, the registry, the contract and its hookspec, and the config type for every kind.
Nothing in it reads a checkpoint, and importing it imports neither torch nor a plugin.
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
