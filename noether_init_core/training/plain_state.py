"""State dicts of arbitrary objects as plain data, with their types beside it, and back.

What a checkpoint holds is read by ``torch.load(weights_only=True)``, so it is made of dict, list, tuple, str, int,
float, bool, None and tensors. What else a state is made of is written down beside it: for each such value its place, as
positions in the containers around it, the name of its type, and a detail.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import numpy
import torch

from noether_init_core.errors import StateMismatchError, type_of

__all__ = ["Plain", "like", "plain", "restored"]

_SCALARS = (bool, int, float, str)
_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)}
#: Letters of NumPy's dtypes: numbers that tensors hold, and scalars that are plain numbers or texts.
_ARRAYS, _NUMBERS = "biufc", "biufU"
_METADATA = "_metadata"


@attrs.frozen(eq=False)
class Plain:
    """``value`` as plain data. ``types``: ``[place, type, detail]`` of everything in it that was of another type."""

    value: Any
    types: list[list[Any]]


def plain(value: Any, place: str) -> Plain:
    """``value`` as plain data. Containers are new ones, tensors are not copied, and lose their gradients.

    Taken are also NumPy arrays and scalars of numbers, sets, deques, named tuples, and the dicts of ``collections``.
    Raises ``StateMismatchError`` naming the ``place`` of anything else, subclasses included: a checkpoint with an
    arbitrary object in it could not be read by a safe loader, and would not give back what was saved.
    """
    types: list[list[Any]] = []
    return Plain(_Describer(types).of(value, place, ()), types)


class _Describer:
    def __init__(self, types: list[list[Any]]) -> None:
        self._types = types

    def of(self, value: Any, place: str, at: tuple[int, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach()
        if value is None or type(value) in _SCALARS:
            return value
        if isinstance(value, numpy.generic):
            return self._scalar(value, place, at)
        if type(value) is numpy.ndarray:
            return self._array(value, place, at)
        if type(value) in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict):
            return self._mapping(value, place, at)
        if type(value) in (list, set, frozenset, collections.deque):
            if type(value) is not list:
                self._note(at, type(value).__name__, getattr(value, "maxlen", None))
            return [self.of(item, f"{place}.{number}", (*at, number)) for number, item in enumerate(value)]
        if type(value) in (tuple, torch.Size) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            if type(value) is torch.Size:
                self._note(at, "Size")
            elif type(value) is not tuple:
                self._note(at, "namedtuple", _class_name(type(value)))
            return tuple(self.of(item, f"{place}.{number}", (*at, number)) for number, item in enumerate(value))
        raise StateMismatchError(
            f"{place} is a {_class_name(type(value))}, which a checkpoint cannot hold. "
            "Next: let its state_dict() return numbers, texts, tensors, arrays, and lists or dicts of these"
        )

    def _note(self, at: tuple[int, ...], kind: str, detail: Any = None) -> None:
        self._types.append([list(at), kind, detail])

    def _scalar(self, value: Any, place: str, at: tuple[int, ...]) -> Any:
        item = value.item()
        if type(item) not in _SCALARS or value.dtype.kind not in _NUMBERS:
            raise StateMismatchError(f"{place} is a NumPy scalar of {value.dtype}, which a checkpoint cannot hold")
        self._note(at, "scalar", value.dtype.str)
        return item

    def _array(self, value: Any, place: str, at: tuple[int, ...]) -> torch.Tensor:
        try:
            tensor = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        except TypeError as error:
            raise StateMismatchError(f"{place} is a NumPy array of {value.dtype}, which no tensor can hold") from error
        self._note(at, "ndarray", value.dtype.str)
        return tensor

    def _mapping(self, value: Any, place: str, at: tuple[int, ...]) -> dict[Any, Any]:
        kind = type(value)
        if kind is collections.defaultdict:
            factory = value.default_factory
            name = next((name for name, known in _FACTORIES.items() if known is factory), "another")
            self._note(at, "defaultdict", None if factory is None else name)
        elif kind is not dict:
            metadata = getattr(value, _METADATA, None)
            said = None if metadata is None else plain({**metadata}, f"{place}.{_METADATA}")
            if said is not None and said.types:
                raise StateMismatchError(f"{place}.{_METADATA} holds more than plain values")
            self._note(at, kind.__name__, None if said is None else said.value)
        found = {}
        keys = []
        for number, (key, item) in enumerate(value.items()):
            plain_key = key
            if isinstance(key, numpy.generic):
                plain_key = key.item()
                keys.append([number, key.dtype.str])
            if not (plain_key is None or type(plain_key) in _SCALARS):
                raise StateMismatchError(f"{place} has the key {key!r}, {type_of(key)}; keys must be texts or numbers")
            found[plain_key] = self.of(item, f"{place}.{key}", (*at, number))
        if keys:
            self._note(at, "keys", keys)
        return found


def restored(saved: Plain, template: Any, place: str) -> Any:
    """What ``plain`` was given, in new containers and arrays. Tensors are not copied.

    ``template``: the state that the owner has at the moment; what has no name in a file, a class of named tuples or the
    factory of a ``defaultdict``, is taken from the same place there. Raises ``StateMismatchError`` where it is not
    there, and for types that do not fit the value.
    """
    try:
        types: dict[tuple[int, ...], dict[str, Any]] = {}
        for at, kind, detail in saved.types:
            types.setdefault(tuple(at), {})[kind] = detail
        return _Restorer(types).of(saved.value, template, place, ())
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, StateMismatchError):
            raise
        raise StateMismatchError(f"the types that the checkpoint says of {place} do not fit: {error}") from error


class _Restorer:
    def __init__(self, types: Mapping[tuple[int, ...], Mapping[str, Any]]) -> None:
        self._types = types

    def of(self, value: Any, template: Any, place: str, at: tuple[int, ...]) -> Any:
        said = self._types.get(at, {})
        if isinstance(value, Mapping):
            return self._mapping(value, template, place, at, said)
        if isinstance(value, list | tuple):
            known = list(template) if isinstance(template, list | tuple | collections.deque) else []
            known += [None] * (len(value) - len(known))
            items = [
                self.of(item, known[number], f"{place}.{number}", (*at, number)) for number, item in enumerate(value)
            ]
            return self._sequence(items, type(value), template, place, said)
        if "ndarray" in said:
            dtype = _dtype(said["ndarray"], _ARRAYS)
            return value.detach().cpu().numpy().astype(dtype)
        return _dtype(said["scalar"], _NUMBERS).type(value) if "scalar" in said else value

    @staticmethod
    def _sequence(items: list[Any], plain_kind: Any, template: Any, place: str, said: Mapping[str, Any]) -> Any:
        if "deque" in said:
            return collections.deque(items, said["deque"])
        if "namedtuple" in said:
            if _class_name(type(template)) != said["namedtuple"]:
                raise StateMismatchError(
                    f"{place} was a {said['namedtuple']} when saved, and is {type_of(template)} now, so that the class "
                    "is not known. Next: let the object have such a value before its state is loaded, or save a tuple"
                )
            return type(template)(*items)
        kinds: dict[str, Callable[[Iterable[Any]], Any]] = {"set": set, "frozenset": frozenset, "Size": torch.Size}
        return next((kinds[kind](items) for kind in said if kind in kinds), plain_kind(items))

    def _mapping(
        self, value: Mapping[Any, Any], template: Any, place: str, at: tuple[int, ...], said: Mapping[str, Any]
    ) -> Any:
        known = template if isinstance(template, Mapping) else {}
        dtypes = {number: _dtype(name, _NUMBERS) for number, name in said.get("keys", ())}
        items = {}
        for number, (key, item) in enumerate(value.items()):
            whole = dtypes[number].type(key) if number in dtypes else key
            items[whole] = self.of(item, known.get(whole), f"{place}.{key}", (*at, number))
        if "Counter" in said:
            return collections.Counter(items)
        if "OrderedDict" in said:
            ordered = collections.OrderedDict(items)
            if said["OrderedDict"] is not None:
                metadata = collections.OrderedDict((path, dict(of)) for path, of in said["OrderedDict"].items())
                setattr(ordered, _METADATA, metadata)  # as torch.nn.Module.state_dict does
            return ordered
        if "defaultdict" in said:
            return collections.defaultdict(_factory(said["defaultdict"], template, place), items)
        return items


def _factory(name: str | None, template: Any, place: str) -> Any:
    if name is None or name in _FACTORIES:
        return None if name is None else _FACTORIES[name]
    if not isinstance(template, collections.defaultdict):
        raise StateMismatchError(
            f"{place} was a defaultdict with a function of its own when saved, and is {type_of(template)} now, so that "
            "the function is not known. Next: let the object have such a dict before its state is loaded"
        )
    return template.default_factory


def _dtype(name: Any, kinds: str) -> Any:
    dtype = numpy.dtype(str(name))
    if dtype.kind not in kinds:
        raise ValueError(f"the dtype {name!r}")
    return dtype


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def like(template: Any, value: Any) -> Any:
    """``value`` of a file that does not say its types, in those of ``template``: the state that its owner has now.

    Files had no types at first. The types are a guess: where a value would not be the same in them, or
    ``template`` says nothing, ``value`` stays plain. Containers are new ones.
    """
    if isinstance(value, Mapping):
        known = template if isinstance(template, Mapping) else {}
        items = {key: like(known.get(key), item) for key, item in value.items()}
        if isinstance(template, collections.Counter):
            return collections.Counter(items)
        if isinstance(template, collections.defaultdict):
            return collections.defaultdict(template.default_factory, items)
        if isinstance(template, collections.OrderedDict):
            ordered = collections.OrderedDict(items)
            if hasattr(template, "_metadata"):
                ordered._metadata = template._metadata  # type: ignore[attr-defined]  # as torch.nn.Module does
            return ordered
        return items
    if isinstance(value, list | tuple):
        if isinstance(template, set | frozenset):
            return type(template)(value)
        if isinstance(template, collections.deque):
            return collections.deque(value, template.maxlen)
        if isinstance(template, list | tuple) and len(template) == len(value):
            items_ = [like(known, item) for known, item in zip(template, value, strict=True)]
        else:
            items_ = [like(None, item) for item in value]
        if isinstance(template, tuple) and hasattr(template, "_fields"):
            return type(template)(*items_)
        return type(value)(items_)
    if isinstance(template, numpy.ndarray) and isinstance(value, torch.Tensor):
        return value.cpu().numpy().copy()
    if isinstance(template, numpy.generic) and isinstance(value, bool | int | float | complex | str):
        return _if_same(template.dtype.type, value)
    return value


def _if_same(kind: Callable[[Any], Any], value: Any) -> Any:
    """``kind(value)``, unless that is another number, or none."""
    try:
        with numpy.errstate(all="ignore"):
            converted = kind(value)
    except (ArithmeticError, TypeError, ValueError):
        return value
    return converted if converted == value or (converted != converted and value != value) else value
