"""A config as it was written: its value, the lines of its keys, and the initializers that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from noether_init_core.config.base import KindConfig
from noether_init_core.errors import ConfigError, ConfigFileError

__all__ = ["Document", "Entry", "KeyPath", "shown_path"]

KeyPath = tuple[str | int, ...]


def shown_path(key_path: KeyPath) -> str:
    """``initializers.0.kind``: how messages write a path."""
    return ".".join(map(str, key_path))


@attrs.frozen(eq=False)
class Document:
    """A config, from a YAML file or from Python.

    Attributes:
        value: dict, list, ``YamlText`` (unquoted), str (quoted, block) and None; from Python any values.
        path: The file; None for a config from Python.
        lines: The line (from 1) of every key and list item, by its path.
        refusals: The errors of YAML tags and of keys that are no texts, with their places. Below such a place,
            ``value`` is not what the author of the file meant.
    """

    value: Any = None
    path: Path | None = None
    lines: Mapping[KeyPath, int] = attrs.field(factory=dict)
    refusals: Sequence[tuple[KeyPath, ConfigError]] = ()

    def line(self, place: KeyPath) -> int | None:
        """The line of ``place``, or of the nearest key above it that has one; None where there is no file."""
        return next((self.lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self.lines), None)

    def error(self, message: str, place: KeyPath = ()) -> ConfigError:
        """An error that names the place; without a file, the key alone."""
        shown = shown_path(place)
        if self.path is not None:
            return ConfigFileError(message, path=self.path, line=self.line(place), key_path=shown)
        return ConfigError(f"{shown}: {message}" if place else message)


@attrs.frozen(eq=False)
class Entry:
    """One initializer that a config asks for, not validated yet.

    Attributes:
        config: A mapping, or a config that was built in Python.
        submodel: Path of names of the part of a composite that it is for; None: the whole model.
        hooks: The hooks that it takes part in; None: all five.
        place: Its path in the document.
        places: Where single keys stand that are not below ``place``: the root keys of a resolved config that make a
            resume.
        document: The config that it stands in.
    """

    config: Mapping[str, Any] | KindConfig
    submodel: tuple[str, ...] | None = None
    hooks: frozenset[str] | None = None
    place: KeyPath = ()
    places: Mapping[str, KeyPath] = attrs.field(factory=dict, repr=False)
    document: Document = attrs.field(factory=Document, repr=False)

    @property
    def key_path(self) -> str:
        """Where it stands, as messages write it: ``initializers.0``."""
        return shown_path(self.place)

    @property
    def line(self) -> int | None:
        """The line where it starts, from 1; None where there is no file."""
        return self.document.line(self.place)

    def place_of(self, path: KeyPath) -> KeyPath:
        """The place in the document of ``path`` in the config."""
        if path and path[0] in self.places:
            return (*self.places[str(path[0])], *path[1:])
        return (*self.place, *path)

    def where(self, *path: str | int) -> str:
        """Where a key of the config stands, for messages: ``init.yaml:12 transforms.1``, without a file the key."""
        shown = shown_path(path)
        if self.document.path is None:
            return shown
        line = self.document.line(self.place_of(path))
        return f"{self.document.path.name}{'' if line is None else f':{line}'} {shown}"
