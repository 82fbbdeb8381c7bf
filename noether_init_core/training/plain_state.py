"""Convert state dicts of arbitrary objects to plain data with a list of types, and back.

A checkpoint must be readable by ``torch.load(weights_only=True)``, so it consists of dict, list, tuple, str, int,
float, bool, None and tensors. For values of other types, the list has the place (positions in the containers around
it), the name of the type, and a detail.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from noether_init_core.errors import StateMismatchError, type_of

_SCALARS = (bool, int, float, str)
_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)}
#: Kinds of NumPy dtypes (``dtype.kind``): of arrays that a tensor can hold, and of scalars with a plain equivalent.
_ARRAYS, _NUMBERS = "biufc", "biufU"
_METADATA = "_metadata"
#: Types that are written as a list, tuple or dict, and restored by their name.
_FROM_ITEMS: dict[str, Any] = {kind.__name__: kind for kind in (set, frozenset, torch.Size, collections.Counter)}


def plain(value: Any, place: str) -> tuple[Any, list[list[Any]]]:
    """Return ``value`` as plain data, and ``[place, type, detail]`` of every value in it that had another type.

    Containers are copied; tensors are detached but not copied. Other supported types are NumPy arrays and scalars of
    numbers, sets, deques, named tuples, and the dicts of ``collections``.

    Raises ``StateMismatchError``, with the ``place``, for any other type, including subclasses: a safe loader could not
    read arbitrary objects, and could not restore them.
    """
    types: list[list[Any]] = []
    return _described(value, place, (), types), types


def _described(value: Any, place: str, at: tuple[int, ...], types: list[list[Any]]) -> Any:
    def note(name: str, detail: Any = None) -> None:
        types.append([list(at), name, detail])

    kind = type(value)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if value is None or kind in _SCALARS:
        return value
    if isinstance(value, numpy.generic):
        item = value.item()
        if type(item) not in _SCALARS or value.dtype.kind not in _NUMBERS:
            raise StateMismatchError(f"{place} is a NumPy scalar of {value.dtype}, which cannot be saved")
        note("scalar", value.dtype.str)
        return item
    if kind is numpy.ndarray:
        try:
            tensor = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        except TypeError as error:
            raise StateMismatchError(f"{place} is a NumPy array of {value.dtype}, which cannot be saved") from error
        note("ndarray", value.dtype.str)
        return tensor
    if kind in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict):
        if kind is not dict:
            note(kind.__name__, _detail(value, place))
        found = {}
        keys = []
        for number, (key, item) in enumerate(value.items()):
            plain_key = key.item() if isinstance(key, numpy.generic) else key
            if not (plain_key is None or type(plain_key) in _SCALARS):
                raise StateMismatchError(
                    f"{place} has the key {key!r}, {type_of(key)}; keys must be strings or numbers"
                )
            if plain_key is not key:
                keys.append([number, key.dtype.str])
            found[plain_key] = _described(item, f"{place}.{key}", (*at, number), types)
        if keys:
            note("keys", keys)
        return found
    is_named = isinstance(value, tuple) and hasattr(value, "_fields")
    if not is_named and kind not in (list, tuple, *_FROM_ITEMS.values(), collections.deque):
        raise StateMismatchError(
            f"{place} is a {_class_name(kind)}, which cannot be saved. "
            "Next: return numbers, strings, tensors, arrays, and lists or dicts of these in its state_dict()"
        )
    if is_named:
        note("namedtuple", _class_name(kind))
    elif kind not in (list, tuple):
        note(kind.__name__, getattr(value, "maxlen", None))
    items = [_described(item, f"{place}.{number}", (*at, number), types) for number, item in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) else items


def _detail(value: Any, place: str) -> Any:
    """Return the detail of a dict of ``collections``: the name of its factory, or the versions of a state dict."""
    if isinstance(value, collections.defaultdict):
        factory = value.default_factory
        return factory and next((name for name, known in _FACTORIES.items() if known is factory), "another")
    metadata = getattr(value, _METADATA, None)
    if metadata is None:
        return None
    versions, types = plain({**metadata}, f"{place}.{_METADATA}")
    if types:
        raise StateMismatchError(f"{place}.{_METADATA} has values that are not plain data, so it cannot be saved")
    return versions


def restored(value: Any, described: list[list[Any]], template: Any, place: str) -> Any:
    """Return the original argument of ``plain``, with new containers and arrays. Tensors are not copied.

    ``template``: the current state of the owner. A class of named tuples, and the factory of a ``defaultdict``, cannot
    be saved and are taken from the same place in it. Raises ``StateMismatchError`` if they are not found there, and for
    types that do not fit the value.
    """
    try:
        types: dict[tuple[int, ...], dict[str, Any]] = {}
        for at, kind, detail in described:
            types.setdefault(tuple(at), {})[kind] = detail
        return _restored(value, template, place, (), types)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, StateMismatchError):
            raise
        raise StateMismatchError(f"the types that the checkpoint records for {place} do not fit: {error}") from error


_Types = Mapping[tuple[int, ...], Mapping[str, Any]]


def _restored(value: Any, template: Any, place: str, at: tuple[int, ...], types: _Types) -> Any:
    recorded = types.get(at, {})
    if isinstance(value, Mapping):
        known = template if isinstance(template, Mapping) else {}
        dtypes = {number: _dtype(name, _NUMBERS) for number, name in recorded.get("keys", ())}
        found = {}
        for number, (key, item) in enumerate(value.items()):
            whole = dtypes[number].type(key) if number in dtypes else key
            found[whole] = _restored(item, known.get(whole), f"{place}.{key}", (*at, number), types)
        return _container(found, template, place, recorded)
    if isinstance(value, list | tuple):
        there = list(template) if isinstance(template, list | tuple | collections.deque) else []
        there += [None] * (len(value) - len(there))
        items = [
            _restored(item, there[number], f"{place}.{number}", (*at, number), types)
            for number, item in enumerate(value)
        ]
        return _container(type(value)(items), template, place, recorded)
    if "ndarray" in recorded:
        return value.detach().cpu().numpy().astype(_dtype(recorded["ndarray"], _ARRAYS))
    return _dtype(recorded["scalar"], _NUMBERS).type(value) if "scalar" in recorded else value


def _container(items: Any, template: Any, place: str, recorded: Mapping[str, Any]) -> Any:
    """Convert ``items``, a dict, list or tuple, to its recorded type."""
    for kind, detail in recorded.items():
        if kind in _FROM_ITEMS:
            return _FROM_ITEMS[kind](items)
        if kind == "deque":
            return collections.deque(items, detail)
        if kind == "defaultdict":
            return collections.defaultdict(_factory(detail, template, place), items)
        if kind == "OrderedDict":
            ordered = collections.OrderedDict(items)
            if detail is not None:
                metadata = collections.OrderedDict((path, dict(of)) for path, of in detail.items())
                setattr(ordered, _METADATA, metadata)  # as torch.nn.Module.state_dict does
            return ordered
        if kind == "namedtuple":
            if _class_name(type(template)) != detail:
                raise StateMismatchError(
                    f"{place} was a {detail} when saved and is {type_of(template)} now, so the class is unknown. "
                    "Next: give the object such a value before its state is loaded, or save a plain tuple"
                )
            return type(template)(*items)
    return items


def _factory(name: str | None, template: Any, place: str) -> Any:
    if name is None or name in _FACTORIES:
        return None if name is None else _FACTORIES[name]
    if not isinstance(template, collections.defaultdict):
        raise StateMismatchError(
            f"{place} was a defaultdict with a custom factory when saved and is {type_of(template)} now, so the "
            "factory is unknown. Next: give the object such a dict before its state is loaded"
        )
    return template.default_factory


def _dtype(name: Any, kinds: str) -> Any:
    dtype = numpy.dtype(str(name))
    if dtype.kind not in kinds:
        raise ValueError(f"the dtype {name!r}")
    return dtype


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
