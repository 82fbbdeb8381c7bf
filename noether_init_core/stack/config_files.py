"""Config files: their entries, with the line of every key for messages.

A file has ``initializers`` (a list), ``auto_resume``, ``on_invalid`` and ``observers``; or it is the resolved config
that Noether writes beside a run. No kind validates an entry before ``examine_entry``, so that no plugin is imported.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import attrs
import pydantic

from noether_init_core import kinds
from noether_init_core.config.base import DECIDED, KindConfig, fields_of
from noether_init_core.config.document import Document, Entry, KeyPath, is_resolved, read_yaml, resolved_entries
from noether_init_core.config.plain import plain
from noether_init_core.errors import ConfigError, KindError, type_of
from noether_init_core.messages import near, one_line, yaml_field, yaml_line
from noether_init_core.paths import text_problem

_KEYS = ("initializers", "auto_resume", "on_invalid", "observers")
# Keys at the root that a config of Noether may have, too.
_READ = (*_KEYS[1:], "resume_run_id", "resume_stage_name", "resume_checkpoint")
# How deep an entry lies: initializers.0. Up to there, an instance of a dataclass stands for a mapping.
_ENTRY_DEPTH = 2
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_RESOLVED = "use hp_resolved.yaml, the resolved config that Noether writes into the folder of a run"


@attrs.frozen(eq=False)
class LoadedConfig:
    """The content of a config, not validated by kinds yet.

    Attributes:
        document: The document that holds it.
        entries: The initializers, in order.
        resume: An entry of kind ``resume``, made from ``auto_resume`` and the fields that the config sets for it. None
            if ``auto_resume`` is off or absent.
        observers: Names of observers.
    """

    document: Document
    entries: tuple[Entry, ...] = ()
    resume: Entry | None = None
    observers: tuple[str, ...] = ()


def load_config_file(path: str | os.PathLike[str]) -> LoadedConfig:
    """Read a YAML config, or Noether's resolved config. Raises ``ConfigFileError`` with line and key."""
    return _Frame(read_yaml(Path(path))).read_or_raise()


def examine_config_file(path: str | os.PathLike[str]) -> tuple[LoadedConfig, tuple[ConfigError, ...]]:
    """Read a YAML config and return it with every error outside its entries (keys, lists, YAML tags).

    Errors are in the order of lines, and entries with such an error are left out. Raises ``ConfigFileError`` for a file
    that cannot be read or is not YAML.
    """
    frame = _Frame(read_yaml(Path(path)))
    loaded = frame.read()
    return loaded, tuple(sorted(frame.found.values(), key=lambda error: getattr(error, "line", None) or 0))


def load_config_mapping(config: Any) -> LoadedConfig:
    """Read a config from Python: a mapping, a list of configs, or one config that is an instance.

    A mapping may be a dict, OmegaConf's, a jsonargparse namespace, or an instance of a dataclass, an attrs class or a
    pydantic model. Raises ``ConfigError`` with the key.
    """
    given = config
    if isinstance(config, KindConfig) or "kind" in (fields_of(config) or ()):
        config = [config]
    if isinstance(config, Sequence) and not isinstance(config, str | bytes):
        config = {"initializers": config}
    config = plain(config, record_depth=_ENTRY_DEPTH)
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"a config is a list of configs, one config or a mapping, not {type_of(given)}. Next: a list, [] for a "
            "start from scratch; InitializerStack.from_file(path, ...) for a file"
        )
    return _Frame(Document(config)).read_or_raise()


def examine_entry(entry: Entry) -> tuple[KindConfig | None, tuple[ConfigError, ...]]:
    """The config of ``entry``, validated by its kind; or None and one error for each wrong key, in the order of lines.

    Imports the plugin of the kind. Errors name line and key; the error of pydantic is their ``__cause__``. Kind errors
    keep their class.
    """
    try:
        return kinds.validate(entry.config), ()
    except pydantic.ValidationError as error:
        return None, tuple(_explained(entry, error))
    except ConfigError as error:
        located = entry.document.error(error.message, entry.place_of(("kind",)))
        located.__cause__ = error
        return None, (error.found_at(located) if isinstance(error, KindError) else located,)


def validate_entry(entry: Entry) -> KindConfig:
    """The config of ``entry``, validated by its kind. Raises the first error, with the messages of all."""
    config, found = examine_entry(entry)
    if config is None:
        first, *others = found
        first.add("".join(f"\n{other}" for other in others))
        raise first from first.__cause__
    return config


class _Frame:
    """Reads the keys outside the configs of kinds. ``found`` collects errors by place, in order."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.found: dict[KeyPath, ConfigError] = {}

    def read_or_raise(self) -> LoadedConfig:
        loaded = self.read()
        for error in self.found.values():
            raise error
        return loaded

    def read(self) -> LoadedConfig:
        value = self.document.value
        if not isinstance(value, Mapping):
            self._refuse_tags(())
            if isinstance(value, list):
                self._refuse("is a list; put it under the key initializers:")
            else:
                self._refuse(f"has no keys; initializers: is required ({', '.join(_KEYS[1:])} are optional)")
            return LoadedConfig(self.document)
        if isinstance(value.get("defaults"), list):
            message = f"a defaults list is for Hydra to compose, so this is a fragment of a config. Next: {_RESOLVED}"
            self._refuse(message, "defaults")
        for place in _unfilled(value, ()):
            self._refuse(f"??? is for Hydra to fill in, so this is a fragment of a config. Next: {_RESOLVED}", *place)
        entries = self._resolved() if is_resolved(value) else self._entries(value)
        resume = self._resume(value)
        return LoadedConfig(
            self.document,
            tuple(entry for entry in entries if not self._is_wrong(entry.place)),
            None if resume is None or self._is_wrong(resume.place) else resume,
            tuple(self._observers(value)),
        )

    def _refuse(self, message: str, *place: str | int) -> None:
        self.found.setdefault(place, self.document.error(message, place))

    def _refuse_tags(self, place: KeyPath) -> None:
        """Report YAML tags at ``place``, above it, or below it."""
        for refused, error in self.document.refusals:
            if _are_related(refused, place):
                self.found.setdefault(refused, error)

    def _is_wrong(self, place: KeyPath) -> bool:
        return any(reported and _are_related(reported, place) for reported in self.found)

    def _resolved(self) -> list[Entry]:
        try:
            entries = list(resolved_entries(self.document))
        except ConfigError as error:
            self.found.setdefault((), error)
            return []
        self._refuse_misspelt(entries)
        # Noether writes tuples and sets with tags; only those near entries are refused.
        for entry in entries:
            for place in (entry.place, *entry.places.values()):
                self._refuse_tags(place)
        return entries

    def _refuse_misspelt(self, entries: Collection[Entry]) -> None:
        """Report keys of Noether's config that are not read, and would be if they were spelt or placed otherwise."""
        root = self.document.value
        for key in root:
            right = near(key, _READ, 1, cutoff=0.85)
            if right and key not in _READ:
                self._refuse(f"is not read. Next: rename it to {right[0]}", key)
        for place, value in _below(root, ()):
            if not near(str(place[-1]), ("initializer", "initializers"), 1, cutoff=0.85) or not _are_initializers(
                value
            ):
                continue
            is_read = place == ("trainer", "initializer") or (place[0], place[-1]) == ("model", "initializers")
            if is_read or any(_are_related(entry.place, place) for entry in entries):
                continue
            part, name = ("model", "initializers") if isinstance(value, list) else ("trainer", "initializer")
            if place[0] == part and place[-1] != name:
                self._refuse(f"is not read. Next: rename it to {name}", *place)
            else:
                self._refuse(
                    "is not read here. Next: move its items to model: {initializers: [...]}, or one of them to "
                    "trainer: {initializer: {...}}",
                    *place,
                )

    def _entries(self, value: Mapping[str, Any]) -> list[Entry]:
        self._refuse_tags(())
        for key in value:
            if key not in _KEYS:
                right = next((one for one in near(key, _KEYS, 1) if one not in value), "")
                hint = f"Near: {right}. Next: rename it to {right}. " if right else ""
                if key in _fields("resume"):
                    entry = f"initializers: [{{kind: ..., {key}: ...}}]"
                    hint = f"It is a field of an initializer. Next: {entry}. "
                    if key not in DECIDED and "auto_resume" in value:
                        hint += f"For auto_resume: auto_resume: {{{key}: ...}}. "
                if key == "kind":
                    hint = f"Initializers are a list. Next: initializers: [{{{yaml_field('kind', value[key])}, ...}}]. "
                if self.document.path is None and "initializers" in value and not right:
                    hint += 'Of a config of your own, give the list: config["initializers"]. '
                self._refuse(f"unknown key. {hint}A config has {', '.join(_KEYS)}", key)
        is_misspelt = any(near(key, ("initializers",), 1) for key in value)
        if "initializers" not in value and "auto_resume" not in value and not is_misspelt:
            self._refuse("initializers: not found. Next: initializers: [], for a start from scratch")
        items = value.get("initializers", [])
        if not isinstance(items, list):
            self._refuse("must be a list of mappings, each with a kind; [] for a start from scratch", "initializers")
            return []
        for number, item in enumerate(items):
            if isinstance(item, str):
                self._refuse(f"is a text, not a mapping. Next: {yaml_field('kind', item)}", "initializers", number)
            elif not isinstance(item, Mapping | KindConfig):
                self._refuse(f"must be a mapping with a kind, not {type_of(item)}", "initializers", number)
        return [
            Entry(item, place=("initializers", number), document=self.document) for number, item in enumerate(items)
        ]

    def _resume(self, value: Mapping[str, Any]) -> Entry | None:
        """The entry for ``auto_resume``; None if it is off."""
        resume = value.get("auto_resume", False)
        config: dict[str, Any] = {"kind": "resume"}
        places: dict[str, KeyPath] = {}
        if "on_invalid" in value:
            config["on_invalid"], places["on_invalid"] = value["on_invalid"], ("on_invalid",)
            self._check_on_invalid(value)
        if isinstance(resume, Mapping):
            for key in DECIDED:
                if key in resume:
                    self._refuse(
                        "auto_resume resumes this run from its newest set, so this key is not allowed. Next: for "
                        "another run or set, an initializer of kind resume in place of auto_resume",
                        "auto_resume",
                        key,
                    )
            config = {**config, **resume}
            self._refuse_repeated(resume.get("restore"))
        else:
            switch = _SWITCHES.get(resume.lower(), resume) if isinstance(resume, str) else resume
            if not isinstance(switch, bool):
                shown = "null" if resume is None else resume
                allowed = "true or false, or fields of resume such as {verify: header}"
                self._refuse(f"must be {allowed}, not {shown}", "auto_resume")
            if switch is not True:
                return None
        return Entry(config, place=("auto_resume",), places=places, document=self.document)

    def _refuse_repeated(self, restore: Any) -> None:
        """Refuse pieces that count anew: ``auto_resume`` would set them back at every restart of the run."""
        if not isinstance(restore, Mapping):
            return
        schedules: dict[KeyPath, Any] = {("schedule",): restore.get("schedule")}
        if isinstance(restore.get("schedules"), Mapping):
            schedules |= {("schedules", name): one for name, one in restore["schedules"].items()}
        counts_anew: dict[KeyPath, bool] = {("iteration",): restore.get("iteration") == "zero"}
        for path, one in schedules.items():
            counts_anew[path] = one == "skip" or (isinstance(one, Mapping) and "steps" in one)
        for path, is_refused in counts_anew.items():
            if is_refused:
                self._refuse(
                    "auto_resume would set this back at every restart. Next: for one start, an initializer of kind "
                    "resume in place of auto_resume",
                    "auto_resume",
                    "restore",
                    *path,
                )

    def _check_on_invalid(self, value: Mapping[str, Any]) -> None:
        beside = value.get("auto_resume")
        if "auto_resume" not in value:
            self._refuse(
                "is for auto_resume, which was not found. Next: move it into the initializer of kind resume, or add "
                "auto_resume: true",
                "on_invalid",
            )
        elif isinstance(beside, Mapping) and "on_invalid" in beside:
            self._refuse("occurs twice: beside auto_resume and in it. Next: remove one of the two", "on_invalid")
        elif value["on_invalid"] not in ("error", "previous"):
            # without auto_resume no pydantic model checks the value
            self._refuse("Input should be 'error' or 'previous'", "on_invalid")

    def _observers(self, value: Mapping[str, Any]) -> list[str]:
        names = value.get("observers", [])
        if not isinstance(names, list):
            self._refuse("must be a list of names", "observers")
            return []
        for number, name in enumerate(names):
            if not isinstance(name, str) or not name:
                self._refuse("must be the name of an observer", "observers", number)
        return [str(name) for name in names]


def _are_related(place: KeyPath, other: KeyPath) -> bool:
    """Whether two places are equal, or one is below the other."""
    shared = min(len(place), len(other))
    return place[:shared] == other[:shared]


def _below(value: Any, place: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """The place and the value of every key below ``value``."""
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(value, Mapping):
            yield (*place, key), item
        yield from _below(item, (*place, key))


def _are_initializers(value: Any) -> bool:
    """Whether a value is the config of initializers, rather than of functions that draw parameters."""
    items = value if isinstance(value, list) else [value]
    names = {info.name for info in kinds.installed()}
    return any(isinstance(one, Mapping) and ("run_id" in one or one.get("kind") in names) for one in items)


def _unfilled(value: Any, place: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, str) and value == "???":
        yield place
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _unfilled(item, (*place, key))


def _explained(entry: Entry, error: pydantic.ValidationError) -> Iterator[ConfigError]:
    """One error for each wrong key, in the order of lines."""
    kind = str(entry.config.get("kind")) if isinstance(entry.config, Mapping) else entry.config.kind
    # For a field of several types, pydantic reports one error per type at the same place.
    messages: dict[KeyPath, dict[str, None]] = {}
    for problem in error.errors(include_url=False):
        path = _known_part(entry.config, problem["loc"], is_missing=problem["type"] == "missing")
        message = _explain(kind, problem["type"], one_line(problem["msg"]), path, problem["input"])
        messages.setdefault(path, {})[message] = None
    for path in sorted(messages, key=lambda path: entry.document.line(entry.place_of(path)) or 0):
        found = entry.document.error("; ".join(messages[path]), entry.place_of(path))
        found.__cause__ = error
        yield found


def _known_part(config: Any, location: Sequence[str | int], *, is_missing: bool) -> KeyPath:
    """The part of ``location`` that exists in the config: pydantic appends names for unions and validators."""
    path: list[str | int] = []
    for number, part in enumerate(location, 1):
        inside = part in config if isinstance(config, Mapping) else isinstance(config, list) and isinstance(part, int)
        if not inside and isinstance(config, Mapping) and any(later in config for later in location[number:]):
            continue
        if not inside:
            return (*path, part) if is_missing and part == location[-1] else tuple(path)
        path.append(part)
        config = config[part]
    return tuple(path)


_OURS = "noether-init-core"


def _explain(kind: str, problem: str, message: str, path: Sequence[str | int], value: Any) -> str:
    """The message for a wrong ``value`` at ``path`` in a config of ``kind``, from pydantic's error type and message."""
    fields = kinds.resolve(kind).config_class.model_fields if len(path) == 1 else {}
    if problem == "extra_forbidden":
        return _unknown_key(kind, path, fields)
    if problem == "missing":
        description = fields[str(path[0])].description if path and path[0] in fields else None
        return f"is missing{': ' + description if description else ''}"
    if problem in ("path_type", "string_type") and isinstance(value, int | float | date):
        return text_problem(value, str(path[-1]) if path else kind)
    if problem == "list_type" and path[-1:] == ("transforms",) and not isinstance(value, Mapping):
        from noether_init_core.config.source import no_rule

        return no_rule(value)
    if problem == "list_type" and path[-1:] in (("transforms",), ("do",)) and isinstance(value, Mapping):
        return f"{message}: [{yaml_line(value)}]"
    if problem == "list_type" and isinstance(value, str | int | float):
        return f"{message}: [{value}]"
    return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _owners(key: str, kind: str) -> str:
    """Other kinds of this distribution that have the key; other distributions are not imported for a hint."""
    names = {info.name for info in kinds.installed() if info.distribution == _OURS and info.blocked_by is None}
    # dotted names are Noether's names for the same kinds
    return ", ".join(sorted(name for name in names - {kind} if "." not in name and key in _fields(name)))


def _unknown_key(kind: str, path: Sequence[str | int], fields: Collection[str]) -> str:
    """The message for a key that is not a field, with the name that is probably intended."""
    from noether_init_core.config.source import rule_keys
    from noether_init_core.surgery.steps import STEPS

    key, known, whole = str(path[-1]) if path else "", fields, f"{kind} has"
    if path[:1] == ("transforms",):
        name = path[4] if len(path) == 6 else ""
        step = STEPS.get(name) if isinstance(name, str) else None
        arguments = [] if step is None else [one.name for one in attrs.fields(type(step))]
        known = rule_keys() if len(path) == 3 else STEPS if len(path) == 5 else arguments
        whole = "a rule has" if len(path) == 3 else "steps are" if len(path) == 5 else f"{name} has"
        misplaced = near(key, STEPS, 1, cutoff=0.75) if len(path) == 3 else []
        if misplaced:
            argument = misplaced[0] if misplaced[0] == "transpose" else f"{{{misplaced[0]}: ...}}"
            return f"unknown key. {misplaced[0]} is a step of a rule with from. Next: do: [{argument}]"
    if path[:1] == ("restore",) and len(path) == 2:
        pieces = kinds.resolve(kind).config_class.model_fields["restore"].annotation
        known, whole = getattr(pieces, "model_fields", ()), f"restore of {kind} has"
    # a word of a name is near, too: keep for keep_model
    similar = near(key, known, 1) or [one for one in known if key in one.split("_") and len(key) > 2][:3]
    hint = f" Near: {', '.join(similar)}." if similar else ""
    owners = _owners(key, kind) if fields else ""
    if owners:
        hint += f" {key} belongs to the kind{'s' if ',' in owners else ''} {owners}."
    elif known and not similar:
        hint = f" {whole}: {', '.join(known)}."
    return f"unknown key.{hint} Next: ninit schema {kind}"


def _fields(kind: str) -> Collection[str]:
    try:
        return kinds.resolve(kind).config_class.model_fields
    except KindError:  # without the plugin, the error only has no advice
        return ()
