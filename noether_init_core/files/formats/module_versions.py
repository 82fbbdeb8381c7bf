"""Versions of modules: the ``_metadata`` that torch attaches to state dicts, screened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from noether_init_core.files.formats.builders import OpcodeError
from noether_init_core.files.formats.object_graph import ObjectGraph
from noether_init_core.files.tensor_names import children

__all__ = ["METADATA", "Versions", "not_plain", "versions_in"]

#: The attribute of a state dict.
METADATA = "_metadata"

#: Path of a module, without a dot at its end -> what it says of its state, such as ``{"version": 2}``.
Versions = Mapping[str, Mapping[str, Any]]

_SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None)})


def versions_in(attached: Iterable[tuple[dict[Any, Any], Any]], size: int) -> dict[int, Versions]:
    """Id of a dict -> the versions that were attached to it; ``size`` are the bytes of the pickle.

    A file may attach one object to many dicts, so each is looked at once. Raises ``OpcodeError`` for ``_metadata`` that
    is no dict of dicts of plain values: torch could not use it either.
    """
    named = [(owner, state[METADATA]) for owner, state in attached if type(state) is dict and METADATA in state]
    ObjectGraph([metadata for _owner, metadata in named], size)
    screened: dict[int, Versions] = {}
    plain: set[int] = set()
    for _owner, metadata in named:
        if id(metadata) not in screened:
            screened[id(metadata)] = _screened(metadata, plain)
    return {id(owner): screened[id(metadata)] for owner, metadata in named}


def _screened(metadata: Any, plain: set[int]) -> Versions:
    wrong = not_plain(metadata, plain)
    if wrong is not None:
        raise OpcodeError(f"the _metadata of a state dict says of {wrong:.80} something else than plain values")
    return MappingProxyType(metadata)


def not_plain(metadata: Any, known: set[int] | None = None) -> str | None:
    """The first module of which it is not a dict of plain values that is said; None where all is well.

    ``known``: ids of containers that were found plain before.
    """
    known = set() if known is None else known
    if not isinstance(metadata, dict):
        return "all modules"
    return next(
        (
            repr(path)
            for path, said in metadata.items()
            if type(path) is not str or not isinstance(said, dict) or not _is_plain(said, known)
        ),
        None,
    )


def _is_plain(value: Any, known: set[int]) -> bool:
    """Whether it is made of dicts, lists, tuples and scalars; ``known`` are the containers that were looked at."""
    if type(value) in _SCALARS:
        return True
    if not isinstance(value, dict | list | tuple):
        return False
    if id(value) not in known:
        if isinstance(value, dict) and not all(type(key) in _SCALARS for key in value):
            return False
        if not all(_is_plain(child, known) for _key, child in children(value)):
            return False
        known.add(id(value))
    return True
