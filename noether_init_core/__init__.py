"""noether-init-core: start any PyTorch training run from any checkpoint, declared in the config.

This is the public front; ``__init__.pyi`` lists its names. Every name is imported from its module on first use, so that
importing the package imports neither torch nor pydantic nor a plugin.
"""

from importlib import import_module
from pkgutil import get_data
from typing import Any


def _homes() -> dict[str, str]:
    """Public name -> the module that defines it, from the lines ``from MODULE import NAME as NAME`` of the stub."""
    found, module = {}, ""
    for line in (get_data(__name__, "__init__.pyi") or b"").decode().splitlines():
        words = line.replace(",", "").split()
        if words[:1] == ["from"]:
            module = words[1]
        found.update({words[at + 1]: module for at, word in enumerate(words) if word == "as"})
    return found


_HOME_OF = _homes()
__all__ = sorted((*_HOME_OF, "__version__"))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("noether-init-core")
    elif name == "kinds":
        value = import_module("noether_init_core.kinds")
    elif name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
