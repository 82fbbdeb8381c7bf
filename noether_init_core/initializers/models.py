"""Single models below a composite, with the names that their files may have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from noether_init_core.errors import ConfigError

__all__ = ["Leaf", "leaves_of", "signature", "submodel_of"]


@attrs.frozen(eq=False)
class Leaf:
    """A single model, the path of names that leads to it, and the names that its files may have, best first."""

    path: str
    file_names: tuple[str, ...]
    model: Any


def submodel_of(model: Any, names: Sequence[str]) -> Any:
    """The submodel that ``names`` lead to; ``model`` itself for none. Raises ``ConfigError`` with what exists."""
    chosen, path = model, str(model.name)
    for name in names:
        submodels = getattr(chosen, "submodels", None) or {}
        if submodels.get(name) is None:
            there = ", ".join(other for other, submodel in submodels.items() if submodel is not None)
            raise ConfigError(f"{path} has no submodel {name!r}; it has {there or 'none'}")
        chosen, path = submodels[name], f"{path}.{name}"
    return chosen


def leaves_of(model: Any, path: str, file_name: str) -> tuple[Leaf, ...]:
    """The single models below ``model`` in declared order.

    Args:
        model: A model or a composite.
        path: The path of names that leads to it.
        file_name: Its name in files.

    Raises ``ConfigError`` if there is none.
    """
    found = tuple(_walk(model, path, file_name, ()))
    if not found:
        raise ConfigError(f"{path} has no submodel that is a model")
    # a fallback name that two models would claim identifies neither
    claims = Counter(other for leaf in found for other in leaf.file_names)
    return tuple(
        attrs.evolve(leaf, file_names=(leaf.file_names[0], *(n for n in leaf.file_names[1:] if claims[n] == 1)))
        for leaf in found
    )


def _walk(model: Any, path: str, file_name: str, others: tuple[str, ...]) -> Iterator[Leaf]:
    """``others``: names that Noether's writer gives to nested submodels (only the inner composite's own name)."""
    submodels = getattr(model, "submodels", None)
    if isinstance(submodels, Mapping):
        for name, submodel in submodels.items():
            if submodel is not None:
                own = f"{model.name}.{name}"
                yield from _walk(submodel, f"{path}.{name}", f"{file_name}.{name}", (own,))
    else:
        yield Leaf(path, tuple(dict.fromkeys((file_name, *others))), model)


def signature(leaves: Iterable[Leaf]) -> tuple[Any, ...]:
    """What a plan depends on, on the side of the models: which tensors they have, and what these look like."""
    return tuple(
        (leaf.path, name, id(tensor), tensor.shape, tensor.dtype, tensor.device)
        for leaf in leaves
        for named in (leaf.model.named_parameters, leaf.model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    )
