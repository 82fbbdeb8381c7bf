"""The errors of noether-init-core.

::

    InitError
    |-- ConfigError (ValueError)                  the config is wrong
    |   |-- ConfigFileError                       ... at a line of a file
    |   |-- InvalidNameError                      a run id, stage, tag or model name that is not allowed
    |   `-- KindError                             a kind cannot be used
    |       |-- UnknownKindError (LookupError)
    |       |-- KindConflictError
    |       |-- KindBlockedError (PermissionError)
    |       |-- KindImportError (ImportError)
    |       `-- KindContractError (TypeError)
    |-- CheckpointError                           something on disk is wrong
    |   |-- CheckpointNotFoundError (FileNotFoundError)
    |   |   `-- IncompleteSetError                the set exists, a part of it does not
    |   |-- CheckpointUnreachableError            the disk fails, so it is unknown what exists
    |   |-- AmbiguousCheckpointError              several sets match
    |   |-- TornSetError                          files of different iterations or runs
    |   |-- CheckpointFormatError (ValueError)    the reader refuses the file
    |   |   `-- UnsafeGlobalError                 ... because of globals that it names
    |   |-- CheckpointCorruptError                bytes differ from what was written
    |   |   `-- NoGoodSetError                    ... in every set that could be resumed from
    |   `-- CheckpointWriteError (OSError)
    |-- PlanError (ValueError)                    the plan has problems; nothing was changed
    |-- StateMismatchError (ValueError)           optimizer, trainer or callback state does not fit
    |-- ProbeMismatchError (ValueError)           the model's outputs differ from those when it was saved
    |-- RankError (RuntimeError)                  ranks do not agree, or one does not answer; nothing was changed
    |-- StartConflictError (ValueError)           two initializers start after iteration zero, or the start has changed
    `-- PartlyInitializedError (RuntimeError)     user code failed after the first change

Every message names what was asked, what was found, and what to do next. The exception has the same data as attributes,
so that no caller parses text. Names in attributes are as they were found; the message and ``args`` have them escaped.
Every error can be pickled. Kind errors are ``ValueError`` so that pydantic keeps their
place in a config.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import attrs

from noether_init_core.messages import one_line, printable

#: Attributes that hold foreign names: a line break in one is escaped, so that it cannot start a line of the message.
_FOREIGN = ("kind", "value", "path", "key_path", "asked", "candidates", "key")


def text_of(error: BaseException) -> str:
    """The text of an exception, for a message of ours: what others raised is on one line."""
    return str(error) if isinstance(error, InitError) else one_line(str(error))


def type_of(value: object) -> str:
    """The type of ``value`` with its article, for messages: ``an OrderedDict``, ``a Linear``."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"an {name}" if name.lstrip("_")[:1].lower() in ("a", "e", "i", "o") else f"a {name}"


def _tuple(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


@attrs.define(slots=False, repr=False)
class InitError(Exception):
    """Root of every error that noether-init-core raises on purpose. ``message`` is its text."""

    message: str

    def __attrs_post_init__(self) -> None:
        for attribute in _FOREIGN:
            found: Any = getattr(self, attribute, None) or ()
            for name in found.parts if isinstance(found, Path) else [found] if isinstance(found, str) else found:
                if "\n" in name:
                    self.message = self.message.replace(name, one_line(name))
        # a name from a hostile file may hold escape sequences, which a terminal would carry out
        self.message = printable(self.message)
        # what else prints an exception shows args: they hold the safe text, and the attributes hold names as they are
        self.args = (self.message,)

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException pickles positional arguments only, and constructors of children take keywords
        return _unpickled, (type(self), self.args, self.__dict__)

    def add(self, text: str) -> None:
        """Append ``text`` to the message; class and data stay. A caller can so add facts without a new error."""
        self.say(self.message + text)

    def say(self, message: str) -> None:
        """Replace the message; class and data stay."""
        self.message = printable(message)
        self.args = (self.message,)


def _unpickled(kind: type[InitError], arguments: tuple[Any, ...], data: dict[str, Any]) -> InitError:
    keywords = inspect.signature(kind).parameters.keys() & data.keys() - {"message"}
    error = kind("", **{name: data[name] for name in keywords})
    error.__dict__.update(data)
    error.args = arguments
    return error


class ConfigError(InitError, ValueError):
    """A config cannot be used."""


@attrs.define(slots=False, repr=False)
class ConfigFileError(ConfigError):
    """A config file cannot be used; ``path``, ``line`` (from 1) and ``key_path`` are the place of the problem."""

    path: Path
    line: int | None = None
    key_path: str = ""

    def __attrs_post_init__(self) -> None:
        place = self.path.name if self.line is None else f"{self.path.name}:{self.line}"
        self.message = f"{place} {self.key_path}: {self.message}" if self.key_path else f"{place}: {self.message}"
        super().__attrs_post_init__()


@attrs.define(slots=False, repr=False)
class InvalidNameError(ConfigError):
    """``value`` is not allowed as ``what``: a run id, stage name, tag, model name or model info."""

    what: str
    value: str


@attrs.define(slots=False, repr=False)
class KindError(ConfigError):
    """The kind named ``kind`` cannot be used.

    ``config_file``, ``line`` (from 1) and ``key_path`` are the place in a config file that names it, if there is one.
    """

    kind: str
    config_file: Path | None = attrs.field(default=None, init=False)
    line: int | None = attrs.field(default=None, init=False)
    key_path: str = attrs.field(default="", init=False)

    def found_at(self, located: ConfigError) -> Self:
        """Set place and message to those of ``located``, and return this error; its class and cause stay."""
        self.message = located.message
        self.args = (self.message,)
        if isinstance(located, ConfigFileError):
            self.config_file, self.line, self.key_path = located.path, located.line, located.key_path
        return self


@attrs.define(slots=False, repr=False)
class UnknownKindError(KindError, LookupError):
    """No installed distribution provides the kind; ``candidates`` are near names."""

    candidates: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class KindConflictError(KindError):
    """Several distributions provide the kind; ``offers`` describes each. None of them was imported."""

    offers: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class KindBlockedError(KindError, PermissionError):
    """``NOETHER_INIT_ALLOW`` or ``NOETHER_INIT_DENY`` excludes ``distribution``, which provides the kind."""

    distribution: str = ""


class KindImportError(KindError, ImportError):
    """The plugin raised while it was imported; its exception is the ``__cause__``."""


@attrs.define(slots=False, repr=False)
class KindContractError(KindError, TypeError):
    """The object behind the entry point breaks the contract of initializers; ``findings`` lists each violation."""

    findings: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class CheckpointError(InitError):
    """Something is wrong with files; ``path`` is the file or folder, or None."""

    path: Path | None = None


@attrs.define(slots=False, repr=False)
class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """Nothing matches ``asked``; ``candidates`` are names that exist."""

    asked: str = ""
    candidates: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class IncompleteSetError(CheckpointNotFoundError):
    """The set exists, but its ``missing`` parts do not; ``candidates`` are tags of sets with these parts."""

    missing: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


class CheckpointUnreachableError(CheckpointError):
    """``path`` cannot be read, because of the disk or a permission, so it is unknown what exists there."""


@attrs.define(slots=False, repr=False)
class AmbiguousCheckpointError(CheckpointError):
    """Several checkpoints match (``candidates``), and none is selected automatically."""

    candidates: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class TornSetError(CheckpointError):
    """Files of one set come from different iterations or runs; ``found``: file -> what it records."""

    found: Mapping[str, str] = attrs.Factory(dict)


class CheckpointFormatError(CheckpointError, ValueError):
    """The reader refuses the file: not a checkpoint, an unsafe construct, or sizes that are inconsistent."""


@attrs.define(slots=False, repr=False)
class UnsafeGlobalError(CheckpointFormatError):
    """The file refers to globals that are not allowed, ``names``. None of them was imported or called."""

    names: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class CheckpointCorruptError(CheckpointError):
    """The bytes under ``key`` differ from those that were written, by checksum or digest."""

    key: str = ""


@attrs.define(slots=False, repr=False)
class NoGoodSetError(CheckpointCorruptError):
    """Every set that could be resumed from is broken. ``tried``: set -> what is wrong with it, newest first."""

    tried: Mapping[str, str] = attrs.Factory(dict)


class CheckpointWriteError(CheckpointError, OSError):
    """A file or a set could not be written; sets that were committed before are unchanged."""


@attrs.define(slots=False, repr=False)
class PlanError(InitError, ValueError):
    """The plan has ``problems`` (messages), and nothing was changed. ``plan`` is the whole ``LoadPlan``."""

    plan: Any = None
    problems: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class StateMismatchError(InitError, ValueError):
    """State of an optimizer, trainer or callback does not fit; ``problems`` lists every place."""

    problems: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.define(slots=False, repr=False)
class ProbeMismatchError(InitError, ValueError):
    """With the weights of a set, the model's outputs for its probe differ from those when the set was saved.

    ``path`` is the folder of the set, and ``output`` the place of the worst output in what the model returns.
    ``expected`` and ``found`` describe that output then and now (shape, dtype, norm, digest), or are None if it is
    absent. ``difference`` is the norm of the difference relative to the norm, or None if it cannot be computed.
    """

    path: Path | None = None
    output: str = ""
    expected: Any = None
    found: Any = None
    difference: float | None = None


@attrs.define(slots=False, repr=False)
class StartConflictError(InitError, ValueError):
    """Two initializers start after iteration zero, or the start differs from what ``start_checkpoint()`` returned.

    ``starts``: initializer -> iteration; for a changed start, ``returned`` and ``now`` -> iteration.
    """

    starts: Mapping[str, str] = attrs.Factory(dict)


@attrs.define(slots=False, repr=False)
class RankError(InitError, RuntimeError):
    """The ranks of a distributed run do not agree, or one of them does not answer. Nothing was changed on any rank.

    ``found``: rank -> what it found, one line for each fact; empty if a rank did not answer.
    """

    found: Mapping[int, tuple[str, ...]] = attrs.Factory(dict)


@attrs.define(slots=False, repr=False)
class PartlyInitializedError(InitError, RuntimeError):
    """User code, a kind without ``check`` or a device failed after the first change.

    States of the trainer and of callbacks were restored; weights may be changed. ``done``, ``failed`` and ``pending``
    name the steps.
    """

    done: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    failed: str = ""
    pending: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
