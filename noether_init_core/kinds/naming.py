"""The name of an initializer in reports: its kind, or its class where the kind is that of another class."""

from __future__ import annotations

import importlib.metadata
import operator
import sys
from typing import TYPE_CHECKING

from noether_init_core.kinds.lookup import GROUP, KindInfo, installed

if TYPE_CHECKING:
    from noether_init_core.initializers.base import InitializerBase


def name_of(initializer: InitializerBase) -> str:
    """The kind in its config, or ``package.module.Class`` if that kind is registered for another class.

    The config of a subclass has the kind of its base class unless it declares its own. A report with that kind would
    name the distribution of the base class for what the subclass did. Imports nothing.
    """
    kind, cls = initializer.config.kind, type(initializer)
    claims = [info for info in installed() if info.name == kind]
    if not claims or any(_leads_to(info, cls) for info in claims):
        return kind
    return f"{cls.__module__}.{cls.__qualname__}"


def _leads_to(info: KindInfo, cls: type[InitializerBase]) -> bool:
    if info.target == f"{cls.__module__}:{cls.__qualname__}":
        return True
    # a package may offer a class that one of its modules defines
    entry = importlib.metadata.EntryPoint(info.name, info.target, GROUP)
    try:
        return operator.attrgetter(entry.attr)(sys.modules[entry.module]) is cls
    except (KeyError, AttributeError):  # not imported, or a class within a function
        return False
