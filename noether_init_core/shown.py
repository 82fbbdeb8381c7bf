"""``Shown``: the base of values that people look at, whose text and table ``render`` makes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import attrs

_RENDERER = "noether_init_core.render.values"


class Shown:
    """An attrs class whose ``str()`` is what the command prints, without colour. A notebook shows it as a table.

    ``render`` imports the values that it shows, so a value finds ``render`` by name, when it is shown.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """The class, and how long its tuples are: ``<Lineage: nodes=3, edges=2>``."""
        cls: Any = type(self)
        values = ((field.name, getattr(self, field.name)) for field in attrs.fields(cls))
        lengths = ", ".join(f"{name}={len(value)}" for name, value in values if isinstance(value, tuple) and value)
        return f"<{cls.__name__}: {lengths or 'empty'}>"

    def __str__(self) -> str:
        text: str = import_module(_RENDERER).text_of(self)
        return text

    def _repr_html_(self) -> str:
        """The HTML that IPython shows: tables without scripts, all names escaped."""
        html: str = import_module(_RENDERER).html_of(self)
        return html
