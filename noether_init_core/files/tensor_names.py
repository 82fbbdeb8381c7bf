"""How tensors in an object are named: by one function for what is written and what is read.

Both sides must agree to the letter, since a manifest lists tensors by these names. The writer has tensors in its
object, the reader descriptions of tensors; a caller says which it looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from noether_init_core.files.formats.inert_values import ForeignObject

__all__ = ["EXTRA_STATE", "children", "is_state_dict", "join", "named", "state_dict_of"]

T = TypeVar("T")

#: The last name of a module's extra state in a state dict.
EXTRA_STATE = "_extra_state"


def children(value: Any) -> Iterable[tuple[Any, Any]]:
    """Key or position, and value, of what a container holds. Members of a set are no tensors and have none."""
    if isinstance(value, dict):
        return value.items()
    if type(value) is ForeignObject:
        return (("args", value.args), ("state", value.state), ("items", value.items))
    return enumerate(value)


def join(path: str, key: Any) -> str:
    """The path of what stands under ``key`` in what ``path`` leads to."""
    text = key if type(key) is str else repr(key)
    return f"{path}.{text}" if path else text


def named(parts: Mapping[Any, Any], kind: type[T], is_searched: Callable[[Any], bool]) -> dict[str, T]:
    """Dotted path -> every value of ``kind`` in ``parts``, in their order. Of two equal paths the second gets ``#2``.

    ``is_searched``: whether a value is a container that may hold some.
    """
    found: dict[str, T] = {}
    for key, value in parts.items():
        _collect(value, join("", key), kind, is_searched, found)
    return found


def _collect(value: Any, path: str, kind: type[T], is_searched: Callable[[Any], bool], found: dict[str, T]) -> None:
    if isinstance(value, kind):
        name, number = path, 1
        while name in found:
            number += 1
            name = f"{path}#{number}"
        found[name] = value
    elif is_searched(value):
        for key, child in children(value):
            _collect(child, join(path, key), kind, is_searched, found)


def state_dict_of(value: Any, kind: type[Any]) -> dict[Any, Any] | None:
    """The state dict of a file: under the key of that name, or the whole object; None where there is none.

    Its tensors are named by its own keys, which must be texts, and all others in the file not at all.
    """
    if not isinstance(value, dict):
        return None
    state_dict = value.get("state_dict")
    if isinstance(state_dict, dict):
        return state_dict
    return value if is_state_dict(value, kind) else None


def is_state_dict(value: Any, kind: type[Any]) -> bool:
    """Whether it is a dict of tensors under texts, at least one, with nothing else than extra state beside them."""
    return (
        isinstance(value, dict)
        and any(isinstance(child, kind) for child in value.values())
        and all(
            type(key) is str and (isinstance(child, kind) or key.rpartition(".")[2] == EXTRA_STATE)
            for key, child in value.items()
        )
    )
