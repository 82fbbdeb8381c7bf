"""Files of config: what they ask for, entry by entry, with the line of every key for messages.

A file has ``initializers`` (a list), ``auto_resume``, ``on_invalid`` and ``observers``; or it is the resolved config
that Noether writes beside a run. Nothing is validated by a kind until ``validate_entry``, so no plugin is imported.
``load_config_file`` raises the first thing that is wrong with the frame, ``examine_config_file`` finds all of them.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pydantic

from noether_init_core import kinds
from noether_init_core.config.base import KindConfig
from noether_init_core.config.json_schema import DECIDED
from noether_init_core.config.noether_resolved import is_resolved, resolved_entries
from noether_init_core.config.yaml_text import KeyPath, read_yaml, shown_path
from noether_init_core.errors import ConfigError, ConfigFileError, KindError, type_of
from noether_init_core.kinds.wording import explain

__all__ = [
    "Entry",
    "LoadedConfig",
    "examine_config_file",
    "load_config_file",
    "load_config_mapping",
    "problems_of",
    "validate_entry",
]

_KEYS = ("initializers", "auto_resume", "on_invalid", "observers")
_ON_INVALID = ("error", "previous")
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_DEEPEST = 100
_RESOLVED = "use the resolved config that Noether writes into the folder of a run, hp_resolved.yaml"


@attrs.frozen(eq=False)
class _Document:
    """Where values come from, so that errors can say it. ``source`` is None for a plain mapping.

    ``found`` collects what is wrong with the frame of a config; None: the first such thing is raised.
    """

    source: Path | None = None
    lines: Mapping[KeyPath, int] = attrs.field(factory=dict)
    refusals: Sequence[tuple[KeyPath, ConfigFileError]] = ()
    found: dict[KeyPath, ConfigError] | None = None

    def line(self, place: KeyPath) -> int | None:
        """The line of ``place``, or of the nearest key above it that has one."""
        return next((self.lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self.lines), None)

    def refuse_within(self, place: KeyPath) -> None:
        """Report the refusals (YAML tags) on the way to ``place``, at it, or below it."""
        for refused, error in self.refusals:
            if _is_within(refused, place):
                self.report(error, refused)

    def refuse(self, message: str, place: KeyPath = ()) -> None:
        """Report what is wrong at ``place``."""
        self.report(self.error(message, place), place)

    def report(self, error: ConfigError, place: KeyPath) -> None:
        """Raise the error, or collect it where all of them are wanted."""
        if self.found is None:
            raise error
        self.found.setdefault(place, error)

    def is_spoilt(self, place: KeyPath) -> bool:
        """Whether something was reported on the way to ``place``, at it, or below it: it means nothing."""
        return any(_is_within(reported, place) for reported in self.found or () if reported)

    def error(self, message: str, place: KeyPath = ()) -> ConfigError:
        if self.source is not None:
            return ConfigFileError(message, path=self.source, line=self.line(place), key_path=shown_path(place))
        return ConfigError(f"{shown_path(place)}: {message}" if place else message)


def _is_within(place: KeyPath, other: KeyPath) -> bool:
    """Whether one of two places lies at or below the other."""
    shared = min(len(place), len(other))
    return place[:shared] == other[:shared]


@attrs.frozen(eq=False)
class Entry:
    """One initializer that a config asks for, not validated yet.

    ``submodel`` is the path of names of the part of a composite that it is for, None the whole model. ``hooks`` are
    the hooks that it takes part in, None all five. ``place`` is its path in the document and ``line`` its line there.
    """

    config: Mapping[str, Any] | KindConfig
    submodel: tuple[str, ...] | None = None
    hooks: frozenset[str] | None = None
    place: KeyPath = ()
    # Where single keys stand, if not below ``place``: the root keys of a resolved config that make a resume.
    places: Mapping[str, KeyPath] = attrs.field(factory=dict, repr=False)
    document: _Document = attrs.field(factory=_Document, repr=False)

    @property
    def key_path(self) -> str:
        """Where it stands, as messages write it: ``initializers.0``."""
        return shown_path(self.place)

    @property
    def line(self) -> int | None:
        """The line where it starts, from 1; None where there is no file."""
        return self.document.line(self.place)

    def where(self, *path: str | int) -> str:
        """Where a key of the config stands, for messages: ``init.yaml:12 transforms.1``, without a file the key."""
        shown = shown_path(path)
        source, line = self.document.source, self.document.line(_place(self, path))
        return shown if source is None else f"{source.name}{'' if line is None else f':{line}'} {shown}"


@attrs.frozen(eq=False)
class LoadedConfig:
    """What a config asks for. ``source`` is its file; None for a plain mapping.

    ``resume`` is the entry of kind ``resume`` that ``auto_resume`` makes, with the fields that the config says for it;
    None without ``auto_resume``. ``on_invalid`` is what stands beside ``auto_resume``; it is in ``resume`` too.
    """

    entries: tuple[Entry, ...]
    auto_resume: bool = False
    observers: tuple[str, ...] = ()
    source: Path | None = None
    on_invalid: str = "error"
    resume: Entry | None = None
    document: _Document = attrs.field(factory=_Document, repr=False)

    def line_of(self, *place: str | int) -> int | None:
        """The line of a key, from 1; None where there is no file."""
        return self.document.line(place)


def load_config_file(path: str | os.PathLike[str]) -> LoadedConfig:
    """Read a YAML file: ours, or Noether's resolved config. Raises ``ConfigFileError`` with line and key."""
    read = read_yaml(Path(path))
    return _load(read.value, _Document(read.path, read.lines, read.refusals))


def examine_config_file(path: str | os.PathLike[str]) -> tuple[LoadedConfig, tuple[ConfigError, ...]]:
    """The same, with everything that is wrong with the frame (keys, lists, YAML tags), in the order of lines.

    What it asks for is as much as can be told; entries that mean nothing are left out. Raises ``ConfigFileError`` for a
    file that cannot be read, or is no YAML.
    """
    read = read_yaml(Path(path))
    found: dict[KeyPath, ConfigError] = {}
    try:
        loaded = _load(read.value, _Document(read.path, read.lines, read.refusals, found))
    except ConfigError as error:  # of Noether's resolved config
        found.setdefault((), error)
        loaded = LoadedConfig((), source=read.path)
    return loaded, tuple(sorted(found.values(), key=lambda error: getattr(error, "line", None) or 0))


def load_config_mapping(config: Any) -> LoadedConfig:
    """The same from Python: a mapping (a dict, OmegaConf's, a jsonargparse namespace), a list of configs, one config.

    Raises ``ConfigError`` with the key.
    """
    document = _Document()
    if isinstance(config, KindConfig):
        config = [config]
    if isinstance(config, Sequence) and not isinstance(config, str | bytes):
        config = {"initializers": config}
    if not isinstance(config, Mapping | argparse.Namespace):
        raise document.error(_no_config(config))
    return _load(_plain(config, (), document), document)


def _no_config(config: Any) -> str:
    if config is None:
        return "the config is None. Next: [] for a start from nothing, or a list of configs"
    if isinstance(config, str | bytes | os.PathLike):
        shown = repr(config)[:60]
        return f"a config is a list or a mapping, not the text {shown}. Next: InitializerStack.from_file({shown}, ...)"
    fields = config.__dict__ if isinstance(config, pydantic.BaseModel) else {}
    for name, value in fields.items():
        if isinstance(value, KindConfig) or (isinstance(value, list) and value and isinstance(value[0], KindConfig)):
            return f"{type_of(config)} is no config of initializers. Next: its field {name}"
    return f"a config is a list of configs, one config or a mapping, not {type_of(config)}. Next: put it into a list"


def validate_entry(entry: Entry) -> KindConfig:
    """The config of ``entry``, validated by its kind, whose plugin is imported for that.

    Raises ``ConfigFileError`` (``ConfigError`` where there is no file) that names line and key of everything that is
    wrong; what pydantic raised is its ``__cause__``. A ``KindError`` keeps its class, and its message gets the place.
    """
    try:
        return kinds.validate(entry.config)
    except pydantic.ValidationError as error:
        found = _explained(entry, error)
        found[0].message = "\n".join(str(one) for one in found)
        found[0].args = (found[0].message,)
        raise found[0] from error
    except KindError as error:
        raise error.found_at(entry.document.error(error.message, _place(entry, ("kind",)))) from error.__cause__
    except ConfigError as error:
        raise entry.document.error(error.message, _place(entry, ("kind",))) from error


def problems_of(entry: Entry) -> tuple[ConfigError, ...]:
    """What ``validate_entry`` would raise, one error for each key that is wrong, in the order of lines."""
    try:
        validate_entry(entry)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, pydantic.ValidationError) and not isinstance(error, KindError):
            return tuple(_explained(entry, cause))
        return (error,)
    return ()


def _load(value: Any, document: _Document) -> LoadedConfig:
    nothing = LoadedConfig((), source=document.source)
    if isinstance(value, Sequence) and not isinstance(value, str):
        document.refuse_within(())
        document.refuse("is a list; put it under the key initializers:")
        return nothing
    if not isinstance(value, Mapping):
        document.refuse(f"holds no keys; it needs initializers: (and may have {', '.join(_KEYS[1:])})")
        return nothing
    _refuse_fragment(value, document)
    if is_resolved(value):
        entries = [
            Entry(found.config, found.submodel, found.hooks, found.place, found.places, document)
            for found in resolved_entries(value, document.error)
        ]
        # The rest of it may hold tags: Noether writes tuples and sets so. They are left as they are.
        for place in [place for entry in entries for place in (entry.place, *entry.places.values())]:
            document.refuse_within(place)
    else:
        document.refuse_within(())
        _refuse_unknown_keys(value, document)
        entries = _entries(value, document)
    on_invalid = _on_invalid(value, document)
    resume = _resume(value, document, on_invalid)
    return LoadedConfig(
        tuple(entry for entry in entries if not document.is_spoilt(entry.place)),
        resume is not None,
        tuple(_observers(value, document)),
        document.source,
        on_invalid,
        None if resume is None or document.is_spoilt(resume.place) else resume,
        document,
    )


def _entries(value: Mapping[str, Any], document: _Document) -> list[Entry]:
    if "initializers" not in value:
        if "auto_resume" not in value:
            document.refuse("has no initializers:; an empty list there means a start from nothing")
        return []
    items = value["initializers"]
    if not isinstance(items, list):
        document.refuse("must be a list of mappings, each with a kind; [] for none", ("initializers",))
        return []
    entries = []
    for number, item in enumerate(items):
        place: KeyPath = ("initializers", number)
        if isinstance(item, str):
            document.refuse(f"is a text; write it as a mapping: kind: {item}", place)
        elif not isinstance(item, Mapping | KindConfig):
            document.refuse("must be a mapping with a kind", place)
        else:
            entries.append(Entry(item, place=place, document=document))
    return entries


def _resume(value: Mapping[str, Any], document: _Document, on_invalid: str) -> Entry | None:
    """The entry that ``auto_resume`` asks for; None where it is off."""
    said, place = value.get("auto_resume", False), ("auto_resume",)
    config: dict[str, Any] = {"kind": "resume"}
    if isinstance(said, Mapping):
        for key in [key for key in said if key in DECIDED]:
            document.refuse(
                "auto_resume resumes this very run, from its newest set, so this cannot be said of it. For another "
                "run or set, write an initializer of kind resume in place of auto_resume",
                (*place, key),
            )
        config |= said
    else:
        if isinstance(said, str) and said.lower() in _SWITCHES:
            said = _SWITCHES[said.lower()]
        if not isinstance(said, bool):
            shown = "null" if said is None else said
            document.refuse(
                f"must be true or false, or fields of resume such as {{verify: header}}, not {shown}", place
            )
        if said is not True:
            return None
    if "on_invalid" not in value:
        return Entry(config, place=place, document=document)
    if "on_invalid" in config:
        document.refuse("is said twice: beside auto_resume and in it. Leave out one of the two", ("on_invalid",))
    config["on_invalid"] = on_invalid
    return Entry(config, place=place, places={"on_invalid": ("on_invalid",)}, document=document)


def _on_invalid(value: Mapping[str, Any], document: _Document) -> str:
    said = value.get("on_invalid", _ON_INVALID[0])
    if said not in _ON_INVALID:
        document.refuse(f"must be {' or '.join(_ON_INVALID)}, not {said!r}", ("on_invalid",))
        return _ON_INVALID[0]
    if "on_invalid" in value and "auto_resume" not in value:
        document.refuse(
            "says what auto_resume does with a broken set, and there is no auto_resume. Write it into the initializer "
            "of kind resume, or add: auto_resume: true",
            ("on_invalid",),
        )
    return str(said)


def _observers(value: Mapping[str, Any], document: _Document) -> list[str]:
    said = value.get("observers", [])
    if not isinstance(said, list):
        document.refuse("must be a list of names", ("observers",))
        return []
    for number, name in enumerate(said):
        if not isinstance(name, str) or not name:
            document.refuse("must be the name of an observer", ("observers", number))
    return [str(name) for name in said]


def _refuse_unknown_keys(value: Mapping[str, Any], document: _Document) -> None:
    for key in value:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"Near: {near[0]}. " if near else ""
            if key == "kind":
                hint = f"One initializer goes into the list, too: initializers: [{{kind: {value[key]}, ...}}]. "
            document.refuse(f"unknown key. {hint}A config has {', '.join(_KEYS)}", (key,))


def _refuse_fragment(value: Mapping[str, Any], document: _Document) -> None:
    if isinstance(value.get("defaults"), list):
        document.refuse(
            f"a defaults list is composed by Hydra, this is a fragment of a config; {_RESOLVED}", ("defaults",)
        )
    for place in _find_missing(value, ()):
        document.refuse(f"??? is filled in by Hydra, this is a fragment of a config; {_RESOLVED}", place)


def _find_missing(value: Any, place: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, str) and value == "???":
        yield place
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from _find_missing(item, (*place, key))


def _plain(value: Any, place: KeyPath, document: _Document) -> Any:
    """Mappings and sequences of any library as dict and list; everything else as it is."""
    if len(place) > _DEEPEST:
        raise document.error(f"is nested deeper than {_DEEPEST}, or holds itself", place[:8])
    if isinstance(value, argparse.Namespace):  # jsonargparse's is one
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(_read(value, key, place, document), (*place, str(key)), document) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [
            _plain(_read(value, number, place, document), (*place, number), document) for number in range(len(value))
        ]
    return value


def _read(container: Any, key: Any, place: KeyPath, document: _Document) -> Any:
    try:
        return container[key]
    # OmegaConf raises errors of its own for values that Hydra has not filled in; it is not imported for their names.
    except Exception as error:
        where = (*place, key if isinstance(key, int) else str(key))
        raise document.error(f"the value cannot be read: {error}. If Hydra fills it in: {_RESOLVED}", where) from error


def _place(entry: Entry, path: KeyPath) -> KeyPath:
    """The place in the document of ``path`` in the config of ``entry``."""
    if path and path[0] in entry.places:
        return (*entry.places[str(path[0])], *path[1:])
    return (*entry.place, *path)


def _explained(entry: Entry, error: pydantic.ValidationError) -> list[ConfigError]:
    """One error for each key that is wrong, in the order of lines."""
    kind = str(entry.config.get("kind")) if isinstance(entry.config, Mapping) else entry.config.kind
    messages: dict[KeyPath, list[str]] = {}
    for problem in error.errors(include_url=False):
        path = _known_part(entry.config, problem["loc"], missing=problem["type"] == "missing")
        message = explain(kind, problem["type"], problem["msg"], path, problem["input"])
        if message not in messages.setdefault(path, []):
            messages[path].append(message)
    # A field that takes several types fails once for each of them, at one place.
    places = {path: _place(entry, path) for path in messages}
    ordered = sorted(messages, key=lambda path: entry.document.line(places[path]) or 0)
    return [entry.document.error("; ".join(messages[path]), places[path]) for path in ordered]


def _known_part(config: Any, location: Sequence[str | int], *, missing: bool) -> KeyPath:
    """``location`` up to where the config goes: pydantic adds names of its own for unions and the like."""
    path: list[str | int] = []
    for part in location:
        inside = part in config if isinstance(config, Mapping) else isinstance(config, list) and isinstance(part, int)
        if not inside:
            return (*path, part) if missing and part == location[-1] else tuple(path)
        path.append(part)
        config = config[part]
    return tuple(path)
