"""What a kind without a file needs besides its base class: the parameters of any model by name, and globs on names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from noether_init_core.models import check_model, leaf_models
from noether_init_core.surgery import name_rules
from noether_init_core.surgery.patterns import PatternSet, parse_glob


def named_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of a model or composite, in declared order.

    Names begin below the model: ``norm.weight``, in a composite ``encoder.norm.weight``. A tied parameter has its
    first name only. Segments that wrappers add (``module``, ``_orig_mod``) are left out, as rules leave them out.

    Raises ``ConfigError`` for an object that is no model, with the next step.
    """
    check_model(model)
    found: dict[torch.nn.Parameter, str] = {}
    for path, leaf in leaf_models(model):
        for name, parameter in leaf.named_parameters():
            found.setdefault(parameter, f"{path}.{name}".removeprefix(f"{model.name}."))
    named = {name: parameter for parameter, name in found.items()}
    return {bare: named[name] for bare, name in name_rules.bare_names(named).items()}


class NameGlobs(PatternSet):
    """Globs as in ``transforms``: ``*`` is part of a segment, ``**`` any segments, a trailing dot everything below.

    ``matching(name)`` gives the numbers of the globs that match, from 0; it takes the same time for many globs.

    Raises ``ValueError`` for a text that is no glob, so that pydantic shows it at its place in the config.
    """

    def __init__(self, globs: Iterable[str]) -> None:
        super().__init__(parse_glob(glob).expression for glob in globs)

    @staticmethod
    def near(name: str, others: Iterable[str]) -> list[str]:
        """Up to three of ``others`` that look like ``name``, for messages."""
        return name_rules.near(name, list(others))
