"""Configs as written: read from YAML, with the line of every key and the entries of initializers.

Every scalar keeps its text. The typed field decides its value, so that ``verify: off`` and ``run_id: 2026_02_19`` are
texts. Only an unquoted ``null``, ``~`` or nothing at all is None. These are refused: keys that occur twice, more than
one document, aliases that contain themselves or expand too far, and deep nesting. Tags (``!!python/object``) construct
nothing; their places are recorded, for the caller to refuse.

The initializers of Noether's resolved config (``hp_resolved.yaml``) come in Noether's order: ``initializers`` of
submodels, then those of the model, for weights and optimizer only. Then comes the initializer of the trainer with all
hooks, which a root ``resume_run_id`` replaces.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import attrs
import yaml

from noether_init_core.config.base import KindConfig, YamlText
from noether_init_core.errors import ConfigError, ConfigFileError
from noether_init_core.files.storage.disk import LOCAL
from noether_init_core.links import absence
from noether_init_core.messages import listed, near

KeyPath = tuple[str | int, ...]


def shown_path(key_path: KeyPath) -> str:
    """A path as messages write it: ``initializers.0.kind``."""
    return ".".join(map(str, key_path))


@attrs.frozen(eq=False)
class Document:
    """A config, from a YAML file or from Python.

    Attributes:
        value: dict, list, ``YamlText`` (unquoted), str (quoted, block) and None; from Python any values.
        path: The file; None for a config from Python.
        lines: Path of every key and list item -> its line (from 1).
        refusals: The errors of YAML tags and of keys that are not texts, with their places. Below such a place,
            ``value`` may differ from what the author intended.
    """

    value: Any = None
    path: Path | None = None
    lines: Mapping[KeyPath, int] = attrs.field(factory=dict)
    refusals: Sequence[tuple[KeyPath, ConfigError]] = ()

    def line(self, place: KeyPath) -> int | None:
        """The line of ``place``, or of the nearest key above it that has one; None without a file."""
        return next((self.lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self.lines), None)

    def error(self, message: str, place: KeyPath = ()) -> ConfigError:
        """An error with the place; without a file, with the key only."""
        shown = shown_path(place)
        if self.path is not None:
            return ConfigFileError(message, path=self.path, line=self.line(place), key_path=shown)
        return ConfigError(f"{shown}: {message}" if place else message)


@attrs.frozen(eq=False)
class Entry:
    """One initializer that a config declares, not validated yet.

    Attributes:
        config: A mapping, or a config that was built in Python.
        submodel: Path of names of its part of a composite; empty for the whole model.
        hooks: The hooks that it takes part in; None for all five.
        place: Its path in the document.
        places: Paths of single keys that are not below ``place``: the root keys of a resolved config that make a
            resume.
        document: The config that holds it.
    """

    config: Mapping[str, Any] | KindConfig
    submodel: tuple[str, ...] = ()
    hooks: frozenset[str] | None = None
    place: KeyPath = ()
    places: Mapping[str, KeyPath] = attrs.field(factory=dict, repr=False)
    document: Document = attrs.field(factory=Document, repr=False)

    @property
    def key_path(self) -> str:
        """Its path as messages write it: ``initializers.0``."""
        return shown_path(self.place)

    @property
    def line(self) -> int | None:
        """Its first line, from 1; None without a file."""
        return self.document.line(self.place)

    @property
    def as_value(self) -> str:
        """The key whose value is a switch in place of the config, ``auto_resume: true``; else empty."""
        value = self.document.value
        is_switch = self.place == ("auto_resume",) and isinstance(value, Mapping)
        return "auto_resume" if is_switch and not isinstance(value["auto_resume"], Mapping) else ""

    @property
    def shown_place(self) -> str:
        """Its path, file and line for messages: ``initializers.0, init.yaml:2``; empty without a document."""
        if self.places and self.place != ("auto_resume",):
            # keys at the root make a resume, and have no others beside them
            return f"trainer.initializer: {{kind: resume, ...}}, in place of {self.key_path}"
        if self.document.path is None or not self.place:
            return self.key_path
        return f"{self.key_path}, {self.document.path.name}:{self.line}"

    def place_of(self, path: KeyPath) -> KeyPath:
        """The place in the document of ``path`` in the config."""
        if path and path[0] in self.places:
            return (*self.places[str(path[0])], *path[1:])
        return (*self.place, *path)

    def where(self, *path: str | int) -> str:
        """The place of a key for messages: ``init.yaml:12 transforms.1``; without a file, the key alone."""
        shown = shown_path(path)
        if self.document.path is None:
            return shown
        line = self.document.line(self.place_of(path))
        return f"{self.document.path.name}{'' if line is None else f':{line}'} {shown}"


#: Parsing takes about ten seconds per MiB of short values, so both are limited.
MAX_BYTES = 512 * 2**10
MAX_WRITTEN = 50_000
_LOOKED_AT, _MOST_NAMES = 512, 8
MAX_NODES = 200_000
MAX_DEPTH = 64
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_MAP, _SEQUENCE, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str"))


def read_yaml(path: Path) -> Document:
    """Read one YAML document. Raises ``ConfigFileError`` with line and key, also for a file that cannot be read."""
    content = content_of(path)
    try:
        node = yaml.compose(content, Loader=_Loader)
    except _LimitError as error:
        raise ConfigFileError(
            f"has more than {MAX_WRITTEN:,} keys and values, the limit of a config", path=path
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        reason = "; ".join(part for part in (error.context, error.problem) if part)
        hint = ". Next: indent with spaces; YAML allows no tabs" if "\\t" in str(error.problem) else ""
        raise ConfigFileError(f"is not valid YAML: {reason}{hint}", path=path, line=line) from error
    except yaml.YAMLError as error:
        raise ConfigFileError(f"is not valid YAML: {error}", path=path) from error
    except RecursionError as error:
        raise ConfigFileError(f"is nested more than {MAX_DEPTH} levels deep", path=path) from error
    reader = _Reader(path)
    value = None if node is None else reader.value(node, ())
    return Document(value, path, reader.lines, reader.refusals)


def content_of(path: Path) -> bytes:
    """The bytes of a config file. Raises ``ConfigFileError`` for an absent path, a folder or a checkpoint."""
    try:
        if not LOCAL.leads_somewhere(path):
            absent = absence(path)
            instead = "" if "Next: " in absent else _instead(path.parent, path.name)
            raise ConfigFileError(f"{absent}{instead}", path=path)
        if LOCAL.is_folder(path):
            raise ConfigFileError(f"is a folder; a config is a YAML file{_instead(path, '')}", path=path)
        # Reading a FIFO would block, and reading a device may never end.
        if not LOCAL.is_file(path):
            raise ConfigFileError("is not a regular file; a config is a YAML file", path=path)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConfigFileError(f"cannot be read: {error.strerror}", path=path) from error
    # UTF-16 is text with zero bytes, and begins with a byte order mark
    if b"\0" in content[:_LOOKED_AT] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        inspect = f"ninit inspect {shlex.quote(str(path))}"
        raise ConfigFileError(f"is not text, and a config is a YAML file. Next: {inspect}", path=path)
    if len(content) > MAX_BYTES:
        raise ConfigFileError(f"has {size:,} bytes, and a config has at most {MAX_BYTES:,}", path=path)
    return content


def _instead(folder: Path, name: str) -> str:
    """The configs in the folder where ``name`` was not found, and the next command."""
    names = LOCAL.list_folder(folder) if LOCAL.is_folder(folder) else []
    there = sorted(name for name in names if fnmatch(name, "*.y*ml") and LOCAL.is_file(folder / name))
    where = "this folder" if folder == Path() else str(folder)
    if not there:
        return f"; no YAML file found in {where}. Next: ninit example previous_run"
    chosen = folder / (near(name, there, 1, cutoff=0.7) or there)[0]
    found = f"; found in {where}: {listed(there, _MOST_NAMES)}"
    return f"{found}. Next: ninit validate {shlex.quote(str(chosen))}"


class _LimitError(Exception):
    """A document has more than ``MAX_WRITTEN`` keys and values."""


class _Loader(yaml.BaseLoader):
    """Resolves no scalar, and keeps explicit tags, so that they can be refused. Counts while it parses."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._count += 1
        if self._count > MAX_WRITTEN:
            raise _LimitError
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


class _Reader:
    """Builds the value of a document from its nodes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[KeyPath, int] = {}
        self.refusals: list[tuple[KeyPath, ConfigFileError]] = []
        self._count = 0

    def value(self, node: yaml.Node, place: KeyPath) -> Any:
        self._count_one(node, place)
        if len(place) > MAX_DEPTH:
            raise self._error(node, place, f"nested more than {MAX_DEPTH} levels deep, or an alias contains itself")
        self._note_tag(node, place)
        if isinstance(node, yaml.MappingNode):
            values = {}
            for key, (key_node, value_node) in self._pairs(node, place, 0).items():
                self.lines[(*place, key)] = _line(key_node)
                values[key] = self.value(value_node, (*place, key))
            return values
        if isinstance(node, yaml.SequenceNode):
            items = [((*place, number), item) for number, item in enumerate(node.value)]
            self.lines.update((where, _line(item)) for where, item in items)
            return [self.value(item, where) for where, item in items]
        assert isinstance(node, yaml.ScalarNode)
        text: str = node.value
        if node.style is not None:
            return text
        return None if text in _NULLS else YamlText(text)

    def _pairs(self, node: yaml.MappingNode, place: KeyPath, depth: int) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key -> nodes of key and value, with those of merge keys (``<<``); a mapping's own keys win."""
        if depth > MAX_DEPTH:
            raise self._error(node, (*place, "<<"), "a merge key contains itself")
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        brought: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            self._count_one(node, place)
            key = self._key(key_node, place)
            if key == "<<" and key_node.style is None:
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in sources:
                    if not isinstance(source, yaml.MappingNode):
                        raise self._error(
                            value_node, (*place, key), "a merge key takes a mapping or a list of mappings"
                        )
                    brought = {**self._pairs(source, place, depth + 1), **brought}
            elif key is None:
                continue
            elif key in own:
                raise self._error(key_node, (*place, key), f"the key occurs twice, first in line {_line(own[key][0])}")
            else:
                own[key] = (key_node, value_node)
        return own | {key: pair for key, pair in brought.items() if key not in own}

    def _count_one(self, node: yaml.Node, place: KeyPath) -> None:
        # Aliases are expanded, so that nine lines of aliases to aliases would fill the memory.
        self._count += 1
        if self._count > MAX_NODES:
            raise self._error(node, place, f"more than {MAX_NODES} values after aliases are expanded")

    def _key(self, node: yaml.Node, place: KeyPath) -> str | None:
        self._note_tag(node, place)
        if not isinstance(node, yaml.ScalarNode):
            self.refusals.append((place, self._error(node, place, "a key must be a text")))
            return None
        return str(node.value)

    def _note_tag(self, node: yaml.Node, place: KeyPath) -> None:
        plain = {yaml.MappingNode: _MAP, yaml.SequenceNode: _SEQUENCE, yaml.ScalarNode: _TEXT}[type(node)]
        if node.tag != plain:
            shown = node.tag.replace("tag:yaml.org,2002:", "!!")
            message = f"the tag {shown} is refused; a config is plain text, lists and mappings"
            self.refusals.append((place, self._error(node, place, message)))

    def _error(self, node: yaml.Node, place: KeyPath, message: str) -> ConfigFileError:
        return ConfigFileError(message, path=self.path, line=_line(node), key_path=shown_path(place))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


MODEL_HOOKS = frozenset({"init_weights", "init_optimizer"})
_MARKS = ("model", "trainer", "resume_run_id")
# Keys that hold submodels, and are not names of submodels.
_STRUCTURAL = frozenset({"submodels", "models"})
_DEFAULT_KIND = "noether.core.initializers.PreviousRunInitializer"
# Field of resume -> its place in the resolved config. The tag keeps its form, because resume accepts every form.
_RESUME: Mapping[str, KeyPath] = {
    "run_id": ("resume_run_id",),
    "stage_name": ("resume_stage_name",),
    "checkpoint_tag": ("resume_checkpoint",),
    "model_name": ("model", "name"),
}


def is_resolved(value: Mapping[str, Any]) -> bool:
    """Whether ``value`` is a config of Noether rather than one of ours."""
    return "initializers" not in value and any(mark in value for mark in _MARKS)


def resolved_entries(document: Document) -> Iterator[Entry]:
    """The initializers in the order in which Noether applies them. Raises ``ConfigError`` with the place."""
    root = document.value
    model, trainer = (
        {} if root.get(key) is None else _mapping(root[key], (key,), document) for key in ("model", "trainer")
    )
    yield from _of_model(model, ("model",), (), document)
    if root.get("resume_run_id") is not None:
        # Noether uses this one instead of trainer.initializer, but writes both into the resolved config.
        found = {key: (model if len(place) > 1 else root).get(str(place[-1])) for key, place in _RESUME.items()}
        config = {"kind": "resume"} | {key: value for key, value in found.items() if value is not None}
        yield Entry(config, place=_RESUME["run_id"], places=_RESUME, document=document)
    elif trainer.get("initializer") is not None:
        place: KeyPath = ("trainer", "initializer")
        # Noether omits fields that were not set, and this is the default kind.
        config = {"kind": _DEFAULT_KIND, **_mapping(trainer["initializer"], place, document)}
        yield Entry(config, place=place, document=document)


def _of_model(model: Mapping[str, Any], place: KeyPath, names: tuple[str, ...], document: Document) -> Iterator[Entry]:
    for key, value in model.items():
        if key != "initializers":
            yield from _of_part(value, (*place, key), names if key in _STRUCTURAL else (*names, key), document)
    items = model.get("initializers")
    place = (*place, "initializers")
    if items is not None and not isinstance(items, list):
        raise document.error("must be a list of mappings, each with a kind", place)
    for number, item in enumerate(items or ()):
        here = (*place, number)
        yield Entry(_mapping(item, here, document), names, MODEL_HOOKS, here, document=document)


def _of_part(value: Any, place: KeyPath, names: tuple[str, ...], document: Document) -> Iterator[Entry]:
    if isinstance(value, Mapping):
        yield from _of_model(value, place, names, document)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, Mapping):
                name = item.get("name")
                inner = (*names, str(number if name is None else name))
                yield from _of_model(item, (*place, number), inner, document)


def _mapping(value: Any, place: KeyPath, document: Document) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise document.error("must be a mapping", place)
    return value
