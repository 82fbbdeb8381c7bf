"""Configs of other libraries as plain mappings and lists; none of these libraries is imported."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from noether_init_core.config.base import fields_of
from noether_init_core.errors import ConfigError

Place = tuple[str | int, ...]
_DEEPEST = 100


def error_at(message: str, place: Place) -> ConfigError:
    """A ``ConfigError`` that names the key at ``place``."""
    return ConfigError(f"{'.'.join(map(str, place))}: {message}" if place else message)


def plain(
    value: Any, place: Place = (), *, record_depth: int = 0, error: Callable[[str, Place], Exception] = error_at
) -> Any:
    """Mappings, sequences and namespaces of any library as dict and list; everything else as it is.

    Args:
        value: The config, or a part of it. Reading its values resolves the interpolations of OmegaConf.
        place: Where it stands.
        record_depth: The length of the longest place at which a dataclass instance and the like (``fields_of``) stands
            for a mapping. Further down it is kept as it is, for example in ``kwargs``.
        error: Makes the exception for a value that cannot be read, from a message and a place.
    """
    if len(place) > _DEEPEST:
        raise error(f"is nested deeper than {_DEEPEST}, or holds itself", place[:8])
    if isinstance(value, argparse.Namespace):  # jsonargparse's is one
        value = vars(value)
    elif len(place) <= record_depth:
        fields = fields_of(value)
        value = value if fields is None else fields

    def item(key: Any, step: str | int) -> Any:
        here = (*place, step)
        return plain(_read(lambda: value[key], here, error), here, record_depth=record_depth, error=error)

    if isinstance(value, Mapping):
        return {str(key): item(key, str(key)) for key in _read(lambda: list(value), place, error)}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [item(number, number) for number in range(_read(lambda: len(value), place, error))]
    return value


def _read(read: Callable[[], Any], place: Place, error: Callable[[str, Place], Exception]) -> Any:
    try:
        return read()
    # OmegaConf raises errors of its own; it is not imported for their names
    except Exception as raised:
        # the key below the root of the whole config, of which this may be a part; Hydra writes no brackets
        key = getattr(raised, "full_key", None) or ".".join(map(str, place)) or "the config"
        key = re.sub(r"\[(\d+)\]", r".\1", key)
        if type(raised).__name__ == "MissingMandatoryValue":
            message = f"is ???, so that its value is missing. Next: set it, in Hydra by the argument {key}=..."
        else:
            reason = str(raised).partition("\n")[0]
            message = f"cannot be read: {type(raised).__name__}: {reason}. Next: correct {key} in the config"
        raise error(message, place) from raised
