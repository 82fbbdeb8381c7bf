"""Refuse the parts of a file that were skipped, where somebody asks for them; and print commands that lead on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from noether_init_core.errors import CheckpointFormatError, UnsafeGlobalError
from noether_init_core.files.content import ForeignObject, TensorInfo, place_of
from noether_init_core.files.graph import ObjectGraph
from noether_init_core.files.handed import TAKES_WEIGHTS
from noether_init_core.messages import listed, one_line, python_command, python_text

ALLOW_GLOBALS_VARIABLE = "NOETHER_INIT_ALLOW_GLOBALS"
NEXT_PLAIN = "Next: write it to another file with torch.save(state_dict, path), with tensors and plain values only"
NEXT_SMALLER = (
    "Next: write it to another file with torch.save(state_dict, path), with one tensor in place of a list of many "
    "values, and no objects of other classes"
)
_MOST_PASTED = 200
_MOST_LOOKED_AT = 50_000
_MOST_FOR_ADVICE = 100


def unsafe(
    path: Path,
    unknown: Iterable[str],
    places: Mapping[str, str] | None = None,
    module: str | None = None,
    weights: str | None = None,
) -> UnsafeGlobalError:
    """Return the error for names that are not allowed.

    ``module``: the expression that leads from the object to a pickled module in it; None if there is no module.
    ``weights``: that to a state dict whose values only the calls of the file give; else None.
    """
    names = [one_line(name) for name in unknown]
    placed = {one_line(name): one_line(place) for name, place in (places or {}).items() if place}
    shown = [f"{name} (at {placed[name]})" if name in placed else name for name in names]
    if module is not None:
        target = new_name(path, ".state_dict")
        advice = (
            "It holds a pickled module, not a state dict. Next, if you trust the file, write the state dict to another "
            f"file, and read that: torch.save(torch.load({str(path)!r}, weights_only=False){module}.state_dict(), "
            f"{target!r})"
        )
    elif weights is not None:
        loaded = f"torch.load({python_text(str(path))}, weights_only=False){weights}"
        plain = f"{{key: torch.as_tensor(value).as_subclass(torch.Tensor) for key, value in {loaded}.items()}}"
        save = f"import torch; torch.save({plain}, {python_text(new_name(path, '.state_dict'))})"
        advice = f"Its calls make or change weights. Next, if you trust it: {python_command(save)}, then give that file"
    else:
        # A list to paste is complete or left out: a shortened one would not work. Nobody can judge hundreds of names.
        pasted = ",".join(names) if len(names) <= _MOST_PASTED else "..."
        advice = (
            "Next, to read objects of these classes as inert records: in code, open_checkpoint(path, "
            f"allow_globals=[...]); for a config, set {ALLOW_GLOBALS_VARIABLE}={pasted} in the environment"
        )
    return UnsafeGlobalError(
        f"{path} refers to {listed(shown, 20)}, which tensors and plain values do not need. Nothing "
        f"was imported or called. {advice}",
        path=path,
        names=names,
    )


def new_name(path: Path, ending: str, suffix: str | None = None) -> str:
    """Return a path beside ``path`` at which no file exists: ``a.state_dict.pt`` for ``a.pt``.

    ``suffix``: of the new file; None: that of ``path``.
    """
    numbers = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    last = path.suffix if suffix is None else suffix
    names = (str(path.with_name(f"{path.stem}{ending}{number}{last}")) for number in numbers)
    return next(name for name in names if not os.path.lexists(name))


def refusal(
    path: Path, graph: ObjectGraph, value: Any, place: tuple[Any, ...] = (), without: str | None = None
) -> CheckpointFormatError | None:
    """Return the error for a caller that asks for ``value``, the part of the object at ``place``; None if it is read.

    ``without``: a key of ``value`` that the caller does not ask for.
    """
    if not graph.is_spoiled(value):
        return called_on(path, graph.calls_on(value, are_weights=False), value, place)
    places: dict[str, str] = {}
    reasons: list[str] = []
    weights: str | None = None
    met: set[int] = set()
    walked: set[int] = set()
    known = graph.names()
    for number, (at, part, unread) in enumerate(graph.unread(value, place)):
        if number == _MOST_LOOKED_AT:
            # Of the parts behind, names that stand anywhere in the file are listed.
            places = {**dict.fromkeys(known, ""), **places}
            break
        if number >= _MOST_FOR_ADVICE and len(places) >= len(known) and all(places.values()):
            break
        if without is not None and at[len(place) :][:1] == (without,):
            continue
        if unread.foreign:
            places[unread.foreign] = places.get(unread.foreign) or place_of(at)
            if weights is None and number < _MOST_FOR_ADVICE:
                weights = _weights_by(part, graph, value, place, at, walked)
        elif len(reasons) < _MOST_PASTED:
            reasons.append(f"{one_line(place_of(at))}: {unread.reason}" if at else unread.reason)
        for name in graph.names_in(part, met):
            places.setdefault(name, "")
    if places:
        return unsafe(path, places, places, _module_in(value, place), weights)
    if not reasons:
        return None
    return CheckpointFormatError(
        f"{path} cannot be read as a checkpoint: {listed(reasons, 10, separator='; ')}. {NEXT_PLAIN}", path=path
    )


def called_on(path: Path, called: Mapping[str, str], value: Any, place: tuple[Any, ...]) -> UnsafeGlobalError | None:
    """Return the error for names that the file lets change ``value`` at ``place``, or None."""
    if not called:
        return None
    has_weights = type(value) is dict and any(type(one) is TensorInfo for one in value.values())
    is_taken = has_weights and TAKES_WEIGHTS in called.values()
    return unsafe(path, called, called, weights=_index(place) if is_taken else None)


def _weights_by(
    part: Any, graph: ObjectGraph, value: Any, place: tuple[Any, ...], at: tuple[Any, ...], walked: set[int]
) -> str | None:
    """Return the index expression of the state dict that ``part``, the result of a call, is or belongs to; or None.

    ``value`` is at ``place``, and ``part`` in it at ``at``. An array of NumPy is made by a call, too.

    ``walked``: ids of what earlier calls have as arguments, which are not looked at again; ids are added.
    """
    if type(part) is not ForeignObject or part.items:
        return None
    is_array = part.name.endswith(".multiarray._reconstruct")
    is_result = part.state is None and any(type(one) is TensorInfo for one in graph.walk(part.args, walked))
    if not is_array and not is_result:
        return None
    if at == place:
        return None if is_array else _index(at)
    for key in at[len(place) : -1]:
        value = value.get(key) if type(value) is dict else None
    alike = value.values() if type(value) is dict else ()
    return _index(at[:-1]) if is_array or any(type(one) is TensorInfo for one in alike) else None


def _index(place: Iterable[Any]) -> str | None:
    """Return the expression that leads from the object of a file to ``place``; None if not all keys are texts."""
    keys = tuple(place)
    return "".join(f"[{python_text(key)}]" for key in keys) if all(type(key) is str for key in keys) else None


def _module_in(value: Any, place: tuple[Any, ...]) -> str | None:
    """Return the index expression of a pickled module: empty for the object itself, ``['key']``, or None."""
    found = [(place, value)] if type(value) is not dict else [((*place, key), child) for key, child in value.items()]
    for at, child in found:
        if is_module(child) and all(type(key) is str for key in at):
            return "".join(f"[{one_line(repr(key))}]" for key in at)
    return None


def is_module(value: Any) -> bool:
    """Whether an inert record is that of a ``torch.nn.Module``."""
    return (
        type(value) is ForeignObject and type(value.state) is dict and {"_parameters", "_modules"} <= value.state.keys()
    )


class Guarded(Mapping[Any, Any]):
    """Values by key; asking for one that was not read raises ``CheckpointFormatError``, or ``UnsafeGlobalError``.

    ``refuse`` returns the error for a value and its key, or None.
    """

    def __init__(self, values: Mapping[Any, Any], refuse: Callable[[Any, Any], CheckpointFormatError | None]) -> None:
        self._values = values
        self._refuse = refuse

    def __getitem__(self, key: Any) -> Any:
        value = self._values[key]
        error = self._refuse(value, key)
        if error is not None:
            raise error
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<values of the keys {listed(map(repr, self._values), 10)}>"
