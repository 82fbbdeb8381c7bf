"""YAML in which every scalar stays the text that was written, with the line of every key.

What a text means is decided by the typed field that it is for, so that ``verify: off`` and ``run_id: 2026_02_19`` are
texts. Only an unquoted ``null``, ``~`` or nothing at all is None. Refused are: keys that occur twice, more than one
document, aliases that contain themselves or that blow up the document, and deep nesting. Tags (``!!python/object``)
construct nothing; where they stand is noted, for the caller to refuse.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from noether_init_core.config.base import YamlText
from noether_init_core.config.document import Document, KeyPath, shown_path
from noether_init_core.errors import ConfigFileError
from noether_init_core.messages import listed, near

__all__ = ["check_is_text", "read_yaml"]

MAX_BYTES = 4 * 2**20
_LOOKED_AT, _MOST_NAMES = 512, 8
MAX_NODES = 200_000
MAX_DEPTH = 64
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_MAP, _SEQUENCE, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str"))


def read_yaml(path: Path) -> Document:
    """Read one YAML document. Raises ``ConfigFileError`` with line and key, also for a file that cannot be read."""
    content = _content(path)
    try:
        # BaseLoader resolves no scalar, and it keeps explicit tags, by which they can be told and refused.
        node = yaml.compose(content, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        reason = "; ".join(part for part in (error.context, error.problem) if part)
        hint = ". YAML is indented by spaces, never by tabs" if "\\t" in str(error.problem) else ""
        raise ConfigFileError(f"is no valid YAML: {reason}{hint}", path=path, line=line) from error
    except yaml.YAMLError as error:
        raise ConfigFileError(f"is no valid YAML: {error}", path=path) from error
    except RecursionError as error:
        raise ConfigFileError(f"is nested more than {MAX_DEPTH} levels deep", path=path) from error
    reader = _Reader(path)
    value = None if node is None else reader.value(node, ())
    return Document(value, path, reader.lines, reader.refusals)


def check_is_text(path: Path) -> None:
    """Raise ``ConfigFileError`` for what cannot be a config, whatever is in it: no file, a folder, a checkpoint."""
    _content(path)


def _content(path: Path) -> bytes:
    if not path.exists():
        raise ConfigFileError(f"does not exist{_instead(path.parent, path.name)}", path=path)
    if path.is_dir():
        raise ConfigFileError(f"is a folder; a config is a YAML file{_instead(path, '')}", path=path)
    # A FIFO would block, and a device never ends.
    if not path.is_file():
        raise ConfigFileError("is not a regular file; a config is a YAML file", path=path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigFileError(f"cannot be read: {error.strerror}", path=path) from error
    # bytes of UTF-16 are text, too
    if b"\0" in content[:_LOOKED_AT] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        inspect = f"noether-init inspect {shlex.quote(str(path))}"
        raise ConfigFileError(f"is no text, and a config is a YAML file. If it is a checkpoint: {inspect}", path=path)
    if len(content) > MAX_BYTES:
        raise ConfigFileError(f"is larger than {MAX_BYTES} bytes; is it a config?", path=path)
    return content


def _instead(folder: Path, name: str) -> str:
    """Which configs there are in the place of ``name``, and the next command."""
    there = sorted(item.name for item in folder.glob("*.y*ml") if item.is_file()) if folder.is_dir() else []
    where = "this folder" if folder == Path() else str(folder)
    if not there:
        return f"; no YAML file is in {where}. Next: noether-init example KIND, which writes one and a loop"
    chosen = folder / (near(name, there, 1, cutoff=0.7) or there)[0]
    said = f"; in {where} there are: {listed(there, _MOST_NAMES)}"
    return f"{said}. Next: noether-init validate {shlex.quote(str(chosen))}"


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
        """Key -> nodes of key and value, with what merge keys (``<<``) bring; a mapping's own keys win over that."""
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
        # Aliases are written out, so nine lines of aliases to aliases would fill the memory.
        self._count += 1
        if self._count > MAX_NODES:
            raise self._error(node, place, f"more than {MAX_NODES} values once aliases are written out")

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
